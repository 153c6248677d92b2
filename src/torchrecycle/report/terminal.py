"""The table of levels in a terminal, as wide as it needs or in parts that fit, what was predicted, and notes below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torchrecycle.report.columns import (
    EXPECTED,
    EXPECTED_WORDS,
    cost_columns,
    expects_full,
    metric_columns,
    recommended,
)
from torchrecycle.report.grid import Head, fitting
from torchrecycle.report.predicted import predicted_rows, slow_lines
from torchrecycle.report.ran import recipe_in_words
from torchrecycle.report.words import clean, duration
from torchrecycle.sweep.results import LevelResult, SweepResult, in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["WIDE", "notes", "predicted_tables", "print_table", "tables"]

WIDE = 150
"""Characters of a line where it is no terminal that is written to."""


def print_table(result: SweepResult, *, console: Console) -> None:
    """Print the recommendation, the tables and the notes."""
    from rich.text import Text

    for table in [*tables(result, console.width), *predicted_tables(result, console.width)]:
        console.print(table)
    for line in notes(result):
        console.print(Text(line))
    console.print()
    if result.ran.random_weights:
        console.print(
            Text("The weights are random: the figures say nothing about a pretrained model.", style="bold red")
        )
    for line in slow_lines(result):
        console.print(Text(line, style="bold"))
    console.print(Text(clean(result.recommendation.sentence), style="bold"))


def tables(result: SweepResult, width: int) -> list[Table]:
    """One table if it fits; else one for quality and one or two for time; else a block of lines for each level."""
    metrics, costs = metric_columns(result), cost_columns(result)
    heads = [Head("level", "left"), Head("cut", "left", is_broken=True), *(Head(one.name) for one in metrics)]
    heads += [Head(one.name.replace(" ", "\n", 1)) for one in costs]
    columns = [*metrics, *costs]
    rows = [[_named(result, "untrained", "untrained"), "", *(column.untrained(result) for column in columns)]]
    if expects_full(result):
        rows.append([f"{in_words('full')} {EXPECTED.strip()}", "", *(column.expected(result) for column in columns)])
    rows += [_row(result, one) for one in result.levels]
    first = 2 + len(metrics)
    return fitting(result.title, heads, rows, width, parts=((first,), (first, first + (len(costs) + 1) // 2)))


def predicted_tables(result: SweepResult, width: int) -> list[Table]:
    """What was predicted beside what came; nothing if nothing was."""
    ran, others = predicted_rows(result)
    if not ran and not others:
        return []
    heads = [
        Head("level", "left"),
        Head("epoch\ns"),
        Head("frozen\ns"),
        Head("epoch\noff by"),
        Head("store", "left", True),
    ]
    heads += [Head("fill\ns"), Head("MB\nkept"), Head("paid\nafter")]
    rows = []
    for row in (*ran, *others):
        epoch, frozen, fill, kept, paid = (_both(predicted, came) for _, predicted, came in row.figures(result))
        rows.append([row.name, epoch, frozen, row.off, row.verdict, fill, kept, paid])
    return fitting("predicted from a few batches / measured", heads, rows, width, parts=((5,), (4, 5)))


def _both(predicted: str, measured: str) -> str:
    return f"{predicted} / {measured}" if measured else predicted


def _row(result: SweepResult, one: LevelResult) -> list[str]:
    columns = [*metric_columns(result), *cost_columns(result)]
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
    names = [one.name for one in cost_columns(result)]
    if "speed-up" in names:
        yield "  speed-up: how many times quicker than full training, without and with filling"
    if expects_full(result):
        yield f"  {in_words('full')} {EXPECTED.strip()} {EXPECTED_WORDS}"
    if "against frozen" in names:
        yield "  against frozen: how many times quicker an epoch is than with the same layers frozen but computed again"
    if "fill s" in names:
        yield "  fill: one pass for all levels; paid after: so many epochs, against frozen layers computed again"
    is_own = result.kind == "objects"
    for one in result.levels:
        if verdict := result.recommendation.verdicts.get(one.level):
            yield f"  {one.words}: {clean(verdict)}"
    for one in result.levels:
        recipe = recipe_in_words(one.trials[0].recipe, is_own=is_own)
        yield f"  {'given to fit' if is_own else 'used'} for {one.words}: {recipe}"
    ran = result.ran
    yield f"  seeds {' and '.join(map(str, result.seeds))}; loss: {clean(ran.loss)}"
    yield f"  {clean(ran.machine)}, torch {ran.versions.get('torch', '')}; took {duration(ran.seconds)} in all"
