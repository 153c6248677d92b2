"""Two sweeps in a terminal, and the rows that the page shows as well: a level in each, what A has beside what B has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torchrecycle.report.columns import EXPECTED
from torchrecycle.report.compare import Comparison, Difference, Pair, recommended_in_words
from torchrecycle.report.grid import Head, fitting
from torchrecycle.report.words import clean, estimate, megabytes, seconds, shortened, signed, times
from torchrecycle.sweep.results import Estimate, LevelResult, SweepResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["are_times_alike", "compared_heads", "compared_rows", "compared_tables", "cost_heads", "print_comparison"]


def print_comparison(comparison: Comparison, *, console: Console) -> None:
    """Print what differs, the tables, what must be known before they are read, and the sentence."""
    from rich.text import Text

    for table in [*_differences(comparison.differences, console.width), *compared_tables(comparison, console.width)]:
        console.print(table)
    for line in _notes(comparison):
        console.print(Text(f"  {clean(line)}"))
    console.print()
    for line in comparison.warnings:
        console.print(Text(clean(line), style="bold red"))
    console.print(Text(clean(comparison.sentence), style="bold"))


def _differences(differences: Sequence[Difference], width: int) -> list[Table]:
    heads = [Head("what differs", "left"), Head("A", "left", True), Head("B", "left", True)]
    rows = [[shortened(clean(one.what), 40), clean(one.a) or "-", clean(one.b) or "-"] for one in differences]
    return fitting("", heads, rows, width) if rows else []


def compared_tables(comparison: Comparison, width: int) -> list[Table]:
    """One table if it fits; else one for quality and one or two for what it costs; else blocks of lines."""
    heads = [
        Head("level", "left"),
        *map(Head, compared_heads(comparison, "\n")),
        *map(Head, cost_heads(comparison, "\n")),
    ]
    rows = [[name, *cells] for _, name, cells in compared_rows(comparison)]
    title = comparison.a.title if comparison.a.title == comparison.b.title else ""
    first = 1 + len(compared_heads(comparison))
    return fitting(title, heads, rows, width, parts=((first,), (first, first + 4)))


def compared_heads(comparison: Comparison, between: str = " ") -> list[str]:
    """Of the columns of quality: for each metric A, B and, if it can be told, B less A."""
    heads = []
    for metric in comparison.metrics:
        heads += [f"{clean(metric)}{between}{side}" for side in ("A", "B")]
        heads += [] if comparison.is_same_test is False else [f"B less A,{between}{clean(metric)}"]
    return heads


def cost_heads(comparison: Comparison, between: str = " ") -> list[str]:
    """Of the columns of seconds and bytes; which is quicker is told only of one task on one machine."""
    heads = [f"{what}{between}{side}" for what in ("epoch s", "in all s") for side in ("A", "B")]
    heads += [f"B is{between}quicker"] if are_times_alike(comparison) else []
    return [*heads, *(f"MB kept{between}{side}" for side in ("A", "B"))]


def are_times_alike(comparison: Comparison) -> bool:
    return comparison.is_same_machine and comparison.is_same_test is not False


def compared_rows(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """For the pretrained model and each level: its key, its name, and a cell for each column."""
    nothing = [""] * len(cost_heads(comparison))
    untrained = _untrained_cells(comparison)
    rows = [("untrained", "untrained", [*untrained, *nothing])] if untrained else []
    if all(pair.level != "full" for pair in comparison.pairs) and (
        comparison.a.expected_full or comparison.b.expected_full
    ):
        empty = Pair("full", None, None)
        rows.append(("full", empty.words, [*_quality_cells(comparison, empty), *_cost_cells(comparison, empty)]))
    for pair in comparison.pairs:
        rows.append(
            (pair.level, clean(pair.words), [*_quality_cells(comparison, pair), *_cost_cells(comparison, pair)])
        )
    return rows


def _untrained_cells(comparison: Comparison) -> list[str]:
    cells = []
    for metric in comparison.metrics:
        by = comparison.untrained_difference(metric)
        cells += [estimate(comparison.a.untrained[metric]), estimate(comparison.b.untrained[metric])]
        cells += [] if comparison.is_same_test is False else [signed(by) if by else ""]
    return cells


def _quality_cells(comparison: Comparison, pair: Pair) -> list[str]:
    cells = []
    for metric in comparison.metrics:
        by = comparison.difference(pair, metric)
        cells += [
            _quality(comparison.a, pair.a, pair.level, metric),
            _quality(comparison.b, pair.b, pair.level, metric),
        ]
        cells += [] if comparison.is_same_test is False else [signed(by) if by else ""]
    return cells


def _quality(result: SweepResult, one: LevelResult | None, level: str, metric: str) -> str:
    if one is not None:
        return estimate(one.quality[metric]) if metric in one.quality else ""
    expected = expected_of(result, level, metric)
    return EXPECTED + estimate(expected) if expected else ""


def expected_of(result: SweepResult, level: str, metric: str) -> Estimate | None:
    """What is expected of full training where it was not run."""
    return result.expected_full if level == "full" and metric == result.metric else None


def _cost_cells(comparison: Comparison, pair: Pair) -> list[str]:
    a, b = pair.a, pair.b
    whole = _whole(comparison.a, a, pair.level), _whole(comparison.b, b, pair.level)
    cells = [_of(a, lambda one: seconds(one.epoch_seconds)), _of(b, lambda one: seconds(one.epoch_seconds)), *whole]
    if are_times_alike(comparison):
        cells.append(times(_in_all(a) / _in_all(b)) if a and b and _in_all(b) else "")
    return [*cells, *(_of(one, lambda one: megabytes(one.bytes_kept) if one.cut else "") for one in (a, b))]


def _of(one: LevelResult | None, cell: Callable[[LevelResult], str]) -> str:
    return "" if one is None else cell(one)


def _whole(result: SweepResult, one: LevelResult | None, level: str) -> str:
    if one is not None:
        return seconds(_in_all(one))
    return (
        f"{EXPECTED}{seconds(result.expected_full_seconds)}" if level == "full" and result.expected_full_seconds else ""
    )


def _in_all(one: LevelResult) -> float:
    return one.total_seconds + one.fill_seconds


def _notes(comparison: Comparison) -> list[str]:
    """What the columns mean, a line each; plain text."""
    notes = []
    if comparison.is_same_test is not False:
        sure = comparison.how_sure
        notes.append("B less A: more than 0 is higher in B" + (f"; its error is {sure}" if sure else ""))
    notes.append("in all: seconds of all epochs of one training and of the pass that fills")
    if any(result.expected_full is not None for result in (comparison.a, comparison.b)):
        notes.append(f"{EXPECTED.strip()}: not run, but expected from the levels that were")
    if min(len(comparison.a.seeds), len(comparison.b.seeds)) == 1:
        notes.append("with one seed, errors cover the objects alone: another seed gives another figure")
    notes += [f"{name} recommends: {recommended_in_words(result)}" for name, result in sides(comparison)]
    return notes


def sides(comparison: Comparison) -> tuple[tuple[str, SweepResult], tuple[str, SweepResult]]:
    """Each with its name."""
    return ("A", comparison.a), ("B", comparison.b)
