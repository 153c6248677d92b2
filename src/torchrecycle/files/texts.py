"""A table of texts with labels, or of pairs of texts -> what a sweep learns from.

``find_texts(Path("reviews.csv"), text="text", label="label")`` reads 1,000 reviews in two classes; ``find_pairs(
Path("faq.jsonl"), left="question", right="answer")`` 8,498 questions, each with its answer. A text is kept as it is,
with its spaces; one without any letter is a mistake of the table and named by its line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrecycle.files.errors import DataError, LeftOut, count_of, shown
from torchrecycle.files.labels import cells_of, check_column, keep_classes, text_of
from torchrecycle.files.tables import Row, is_nothing, places, read_table
from torchrecycle.keys import key

__all__ = ["Pairs", "Texts", "find_pairs", "find_texts", "with_texts"]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts, each with its class."""

    texts: tuple[str, ...]
    """In the table's order."""
    labels: tuple[str, ...]
    """One for each text; each class has two texts or more."""
    left_out: tuple[str, ...]
    """What was left out, a line each, for the user."""
    identity: str
    """Hash of texts and labels, in hex."""
    where: str
    """In words: ``reviews.csv, 1,000 texts of 2 classes``."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Texts that belong together, two and two."""

    left: tuple[str, ...]
    """In the table's order."""
    right: tuple[str, ...]
    """What belongs to each of ``left``."""
    left_out: tuple[str, ...]
    """What was left out, a line each, for the user."""
    identity: str
    """Hash of both, in hex."""
    where: str
    """In words: ``faq.jsonl, 8,498 pairs``."""


def find_texts(path: Path, *, text: str, label: str, skip_bad: bool = False) -> Texts:
    """The texts of a table, with their labels.

    Args:
        path: CSV, TSV, JSON lines, JSON or Parquet.
        text: the column with the texts.
        label: the column with the classes.
        skip_bad: whether rows without a text or class, and classes with one text, are left out.

    Raises:
        DataError: if the table is not as described, or if there are not two classes with two texts each.
    """
    path, left_out = Path(path), LeftOut(skip_bad)
    name = shown(path.name)
    rows = read_table(path, [text, label], options=["--text", "--label"], left_out=left_out)
    rows = with_texts(rows, text, left_out)
    cells = cells_of(rows, label, left_out, what="class", remedy="Fill in a class, or name another column with --label")
    check_column([cell for _, cell in cells], label, "--label")
    if not cells:
        raise DataError(_nothing_left(name, left_out))
    step = "Name another column with --label, or add texts of other classes"
    kept = keep_classes([cell for _, cell in cells], left_out, noun="text", where=name, step=step)
    texts = tuple(str(text_of(cells[index][0].values[text])) for index in kept)
    labels = tuple(cells[index][1] for index in kept)
    words = f"{name}, {count_of(len(texts), 'text')} of {count_of(len(set(labels)), 'class')}"
    return Texts(texts, labels, tuple(left_out.lines), key((texts, labels)).hex(), words)


def find_pairs(path: Path, *, left: str, right: str, skip_bad: bool = False) -> Pairs:
    """The pairs of a table. One that occurs again is dropped and said; a text may belong to many others.

    Args:
        path: CSV, TSV, JSON lines, JSON or Parquet.
        left: the column with what is asked, such as a question.
        right: the column with what is to be found, such as the answer.
        skip_bad: whether rows without one of the texts are left out.

    Raises:
        DataError: if the table is not as described, or if fewer than two pairs are left.
    """
    path, left_out = Path(path), LeftOut(skip_bad)
    name = shown(path.name)
    if left == right:
        raise DataError(f"--left and --right both name column {left!r} of {name}: expected two columns")
    rows = read_table(path, [left, right], options=["--left", "--right"], left_out=left_out)
    for column in (left, right):
        rows = with_texts(rows, column, left_out)
    pairs = _once(rows, left, right, left_out)
    if len(pairs) < 2:
        raise DataError(_nothing_left(name, left_out) if not pairs else f"{name} has one pair: expected two or more")
    lefts, rights = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    words = f"{name}, {count_of(len(pairs), 'pair')}"
    return Pairs(lefts, rights, tuple(left_out.lines), key((lefts, rights)).hex(), words)


def _nothing_left(name: str, left_out: LeftOut) -> str:
    return f"nothing is left of {name}: {'; '.join(left_out.lines)}"


def with_texts(rows: Sequence[Row], column: str, left_out: LeftOut) -> list[Row]:
    """The rows that have a text in the column."""
    reasons = [_why_no_text(row.values[column]) for row in rows]
    bad = [row for row, why in zip(rows, reasons, strict=True) if why]
    if bad:
        why = next(why for why in reasons if why)
        left_out.bad(f"{places(bad)}: no text in column {column!r} (it is {why})", "Fill it in")
    return [row for row, why in zip(rows, reasons, strict=True) if not why]


def _why_no_text(value: Any) -> str | None:
    if is_nothing(value):
        return "empty" if isinstance(value, str) else "null"
    text = text_of(value)
    if text is None:
        return f"a {type(value).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON may spell half of a pair of surrogates, which no tokenizer takes.
        return "broken Unicode"
    return None


def _once(rows: Sequence[Row], left: str, right: str, left_out: LeftOut) -> list[tuple[str, str]]:
    seen: dict[tuple[str, str], Row] = {}
    again = []
    for row in rows:
        pair = (str(text_of(row.values[left])), str(text_of(row.values[right])))
        if pair in seen:
            again.append(row)
        seen.setdefault(pair, row)
    if again:
        what = "1 pair that occurs" if len(again) == 1 else f"{len(again):,} pairs that occur"
        left_out.note(f"{what} again: {places(again)}")
    return list(seen)
