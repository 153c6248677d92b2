"""Tables in a terminal that fit it: whole, or in parts beside the first column, or as a block of lines for each row.

Eleven columns of a sweep take 108 characters, in two tables 70. In 40 there is no room for a row of either, and what a
terminal does then is to cut figures off, which must not be: ``0.936 ± 0.0`` is not what was measured. So each row
becomes lines of its own, a figure in each. Only names of modules may be broken into two lines, since they stay what
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchrecycle.report.words import clean

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Head", "fitting", "grid", "width_of"]

BROKEN = 14
"""Characters that a column is given at least in which names may be broken."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a column."""

    name: str
    """With a line break where it may have two lines."""
    side: Literal["left", "right"] = "right"
    is_broken: bool = False
    """Whether what is in it may be broken into several lines."""


def fitting(
    title: str,
    heads: Sequence[Head],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    parts: Sequence[Sequence[int]] = (),
) -> list[Table]:
    """As few tables as fit.

    Args:
        title: above the first.
        heads: of the columns; the first names the row.
        rows: as many cells in each.
        width: characters of a line.
        parts: ways to part the columns, of which the first that fits is taken where one table does not; each names the
            first column of each further table: ``(3,)`` leaves three columns in the first table and repeats the first
            column before all others in the second. A row that is empty in a further table is left out there.
    """
    for begins in ((), *parts):
        tables = _parted(title, heads, rows, width, begins)
        if tables:
            return tables
    return _blocks(title, heads, rows)


def _parted(
    title: str, heads: Sequence[Head], rows: Sequence[Sequence[str]], width: int, begins: Sequence[int]
) -> list[Table]:
    """Nothing if one of them does not fit."""
    tables = []
    for begin, end in zip((1, *begins), (*begins, len(heads)), strict=True):
        columns = (0, *range(begin, end))
        own = [heads[at] for at in columns]
        cut = [[row[at] for at in columns] for row in rows]
        full = cut if begin == 1 else [row for row in cut if any(row[1:])]
        if width_of(own, full) > width:
            return []
        tables.append(grid(title if begin == 1 else "", own, full))
    return tables


def width_of(heads: Sequence[Head], rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line that a table takes at least."""
    from rich.console import Console
    from rich.measure import Measurement

    table = grid("", heads, rows)
    for head, column in zip(heads, table.columns, strict=True):
        column.max_width = BROKEN if head.is_broken else None
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def grid(title: str, heads: Sequence[Head], rows: Sequence[Sequence[str]]) -> Table:
    """One table. What the user named is shown as it is: brackets in a title or a cut are no markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(clean(title)) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.collapse_padding = True
    for head in heads:
        # What is in a column that is not broken fits: else `fitting` takes blocks.
        table.add_column(Text(head.name), justify=head.side, no_wrap=not head.is_broken, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _blocks(title: str, heads: Sequence[Head], rows: Sequence[Sequence[str]]) -> list[Table]:
    """For each row its name, and below it the name and the value of each cell that is not empty."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for number, row in enumerate(rows):
        said = [*filter(None, (clean(title) if number == 0 else "", row[0]))]
        table = Table(title=Text("\n".join(said)), title_justify="left", box=None, show_header=False, pad_edge=False)
        for _ in range(2):
            table.add_column(justify="left", overflow="fold")
        for head, cell in zip(heads[1:], row[1:], strict=True):
            if cell:
                table.add_row(Text(f"  {head.name.replace(chr(10), ' ')}"), Text(cell))
        tables.append(table)
    return tables
