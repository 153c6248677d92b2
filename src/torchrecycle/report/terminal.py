"""The table of levels in a terminal: one table of 150 characters, or two where it is narrower, and notes below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from torchrecycle.report.columns import COSTS, metric_columns, recommended
from torchrecycle.report.ran import recipe_in_words
from torchrecycle.report.words import clean, duration
from torchrecycle.sweep.results import LevelResult, SweepResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["WIDE", "notes", "print_table", "tables"]

WIDE = 150
"""Characters that the whole table asks for; on a narrower terminal it comes as two."""

Side = Literal["left", "right"]


def print_table(result: SweepResult, *, console: Console) -> None:
    """Print the recommendation, the table and the notes."""
    from rich.text import Text

    for table in tables(result, console.width):
        console.print(table)
    for line in notes(result):
        console.print(Text(line))
    console.print()
    if result.ran.random_weights:
        console.print(
            Text("The weights are random: the figures say nothing about a pretrained model.", style="bold red")
        )
    console.print(Text(clean(result.recommendation.sentence), style="bold"))


def tables(result: SweepResult, width: int) -> list[Table]:
    """One table, or one for quality and one for time where the terminal is narrow.

    What the user named is shown as it is: brackets in a title or a cut are no markup.
    """
    metrics = metric_columns(result)
    quality: list[tuple[str, Side]] = [("level", "left"), ("cut", "left"), *((one.name, "right") for one in metrics)]
    costs: list[tuple[str, Side]] = [(column.name.replace(" ", "\n", 1), "right") for column in COSTS]
    untrained = [_named(result, "untrained", "untrained"), "", *(column.untrained(result) for column in metrics)]
    rows = [_row(result, one) for one in result.levels]
    count = len(quality)
    if width >= WIDE:
        return [_table(result.title, [*quality, *costs], [untrained, *rows])]
    timed = [[row[0], *row[count:]] for row in rows]
    return [
        _table(result.title, quality, [untrained, *(row[:count] for row in rows)]),
        _table("", [("level", "left"), *costs], timed),
    ]


def _table(title: str, columns: Sequence[tuple[str, Side]], rows: Sequence[Sequence[str]]) -> Table:
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
    for name, justify in columns:
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _row(result: SweepResult, one: LevelResult) -> list[str]:
    columns = [*metric_columns(result), *COSTS]
    return [
        _named(result, one.level, one.words),
        clean(one.cut or ""),
        *(column.cell(result, one) for column in columns),
    ]


def _named(result: SweepResult, level: str, words: str) -> str:
    return f"{words} *" if level == recommended(result) else words


def notes(result: SweepResult) -> Iterator[str]:
    """What the columns mean, how each level was trained, and what was run, a line each; plain text, no markup."""
    if recommended(result):
        yield "  *: recommended"
    yield "  speed-up: total seconds of full training, by those of the level, without and with filling"
    yield "  against frozen: an epoch with the same prefix frozen but computed again, by one from the store"
    yield "  fill: one pass fills all levels; paid after: so many epochs, against the frozen prefix"
    for one in result.levels:
        if verdict := result.recommendation.verdicts.get(one.level):
            yield f"  {one.words}: {clean(verdict)}"
    for one in result.levels:
        yield f"  used for {one.words}: {recipe_in_words(one.trials[0].recipe)}"
    ran = result.ran
    yield f"  seeds {' and '.join(map(str, result.seeds))}; loss: {clean(ran.loss)}"
    yield f"  {clean(ran.machine)}, torch {ran.versions.get('torch', '')}; took {duration(ran.seconds)} in all"
