"""Which labels are classes that a sweep can learn from, and what to say of those that are not.

A class needs two members, since one is asked for and the other is to be found. A column of 1,000 prices of which 950
occur once is no label at all, and is refused whether or not bad rows are skipped: leaving out 950 would hide the
mistake. Labels stay the texts that the table has; whole numbers have no point (``13``, not the ``13.0`` that a table
makes of them when one is missing).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from torchrecycle.files.errors import DataError, LeftOut, count_of, examples, shown
from torchrecycle.files.tables import Row, is_nothing, places

__all__ = ["cells_of", "check_column", "keep_classes", "text_of"]

MEMBERS = 2
"""So many members a class must have."""

OWN_VALUES = 0.8
"""A column in which this share of the rows has a value of its own holds no classes."""

_NOT_A_NUMBER = ("nan", "null", "<na>")


def text_of(value: Any) -> str | None:
    """A cell as text, or None if it is a list, a dict or the like.

    >>> text_of("cat"), text_of(13), text_of(13.0), text_of([13])
    ('cat', '13', '13', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if value is None or isinstance(value, (list, tuple, set, dict, bytes)):
        return None
    return str(value)


def cells_of(rows: Sequence[Row], column: str, left_out: LeftOut, *, what: str, remedy: str) -> list[tuple[Row, str]]:
    """The cells of a column as stripped texts, without those that are none.

    Args:
        rows: of a table.
        column: the column to read.
        left_out: where rows without such a text go.
        what: what the cells are: ``class`` or ``file name``.
        remedy: what to do about one that is none.

    Raises:
        DataError: if a cell is empty, null, not a number, a list or a dict.
    """
    good, bad, reasons = [], [], []
    for row in rows:
        value = row.values[column]
        why = _why_not(value)
        if why is None:
            good.append((row, str(text_of(value)).strip()))
        else:
            bad.append(row)
            reasons.append(why)
    if bad:
        left_out.bad(f"{places(bad)}: no {what} in column {column!r} (it is {reasons[0]})", remedy)
    return good


def _why_not(value: Any) -> str | None:
    if value is None:
        return "null"
    if value != value:
        return "NaN"
    if is_nothing(value):
        return "empty"
    if isinstance(value, str) and value.strip().lower() in _NOT_A_NUMBER:
        return repr(value.strip())
    return None if text_of(value) is not None else f"a {type(value).__name__}"


def check_column(labels: Sequence[str], column: str, option: str) -> None:
    """
    Raises:
        DataError: if (nearly) every row has a value of its own, as a price or an id has.
    """
    own = sum(count == 1 for count in Counter(labels).values())
    if labels and own >= OWN_VALUES * len(labels):
        raise DataError(
            f"column {column!r} looks like no class: {own:,} of {count_of(len(labels), 'row')} have a value of their "
            f"own. Name the column that holds classes with {option}"
        )


def keep_classes(labels: Sequence[str], left_out: LeftOut, *, noun: str, where: str, step: str) -> list[int]:
    """Which objects belong to classes with two members or more.

    Args:
        labels: one for each object.
        left_out: where a class with one member goes.
        noun: what an object is: ``picture`` or ``text``.
        where: what holds them, for messages.
        step: what to do if there is one class only.

    Returns:
        Indices into ``labels``, in order.

    Raises:
        DataError: if a class has one member, or if fewer than two classes are left.
    """
    counts = Counter(labels)
    small = sorted(label for label, count in counts.items() if count < MEMBERS)
    if len(counts) == 1:
        (label, count) = next(iter(counts.items()))
        raise DataError(f"{where} has one class only, {_named(label)}, with {count_of(count, noun)}. {step}")
    if small:
        which = "a class has" if len(small) == 1 else f"{len(small):,} of {len(counts):,} classes have"
        one = f"{where}: {which} one {noun} only, and two are needed: {examples(map(_named, small))}"
        left_out.bad(one, f"Add {noun}s")
    if len(counts) - len(small) < 2:
        left = f" ({'; '.join(left_out.lines)})" if left_out.lines else ""
        raise DataError(f"{where}: fewer than two classes with two {noun}s are left{left}. {step}")
    return [index for index, label in enumerate(labels) if counts[label] >= MEMBERS]


def _named(label: str) -> str:
    return f"'{shown(label)}'"
