"""Every figure of a sweep as plain sheets of rows, which become CSV files: nothing that was measured is only drawn.

Three sheets hold it all: ``levels`` (what the table shows, not rounded), ``trials`` (one row for each training, also
those that looked for a rate) and ``epochs`` (one row for each epoch of each of them). Each plot has a sheet of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

from torchrecycle.report.columns import epochs_run, expects_full
from torchrecycle.report.words import clean
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import LevelResult, SweepResult, Trial

__all__ = ["Cell", "Sheet", "sheets_of", "to_csv"]

Cell = str | int | float | None
"""None is an empty cell."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows under a header."""

    name: str
    """Of the file, without ending."""
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def to_csv(sheet: Sheet) -> str:
    """
    >>> print(to_csv(Sheet("it", ("level", "loss"), (("=1+1", -0.5), ("50", None)))))
    level,loss
    '=1+1,-0.5
    50,
    <BLANKLINE>
    """
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerows([_safe(cell) for cell in row] for row in (sheet.header, *sheet.rows))
    return held.getvalue()


def _safe(cell: Cell) -> Cell:
    """A text that a spreadsheet would run as a formula gets an apostrophe; numbers may begin with a minus."""
    if not isinstance(cell, str):
        return cell
    cell = clean(cell)
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def sheets_of(result: SweepResult) -> list[Sheet]:
    """All figures: levels, trials, epochs."""
    return [_levels(result), _trials(result), _epochs(result)]


def _levels(result: SweepResult) -> Sheet:
    metrics = [part for metric in result.untrained for part in (metric, f"{metric} error")]
    costs = (
        "fill_seconds",
        "epoch_seconds",
        "total_seconds",
        "search_seconds",
        "frozen_epoch_seconds",
        "speed_up",
        "speed_up_with_filling",
        "speed_up_against_frozen",
        "bytes_kept",
        "epochs_until_paid",
        "verdict",
    )
    untrained: list[Cell] = [part for value in result.untrained.values() for part in (value.mean, value.error)]
    rows = [("untrained", None, None, None, *untrained, *(None for _ in costs)), *_expected_full(result, len(costs))]
    rows += [_level(result, one) for one in result.levels]
    return Sheet("levels", ("level", "cut", "share", "trained_parameters", *metrics, *costs), tuple(rows))


def _expected_full(result: SweepResult, costs: int) -> Iterator[tuple[Cell, ...]]:
    """A row for full training where it was not run, under a name which says that nothing in it was measured."""
    if not expects_full(result):
        return
    expected = result.expected_full
    quality: list[Cell] = []
    for metric in result.untrained:
        quality += [expected.mean, expected.error] if expected is not None and metric == result.metric else [None, None]
    yield (
        "full, not run, expected",
        None,
        0.0,
        None,
        *quality,
        None,
        None,
        result.expected_full_seconds,
        *[None] * (costs - 3),
    )


def _level(result: SweepResult, one: LevelResult) -> tuple[Cell, ...]:
    quality: list[Cell] = []
    for metric in result.untrained:
        value = one.quality.get(metric)
        quality += [value.mean, value.error] if value else [None, None]
    return (
        one.level,
        one.cut,
        one.share,
        one.trained_parameters,
        *quality,
        one.fill_seconds,
        one.epoch_seconds,
        one.total_seconds,
        one.search_seconds,
        one.frozen_epoch_seconds,
        result.speed_up(one.level),
        result.speed_up(one.level, filling=True),
        result.speed_up_against_frozen(one.level),
        one.bytes_kept,
        one.epochs_until_paid,
        result.recommendation.verdicts.get(one.level),
    )


def _all_trials(result: SweepResult) -> Iterator[tuple[int, Trial]]:
    """Each with a number, by which its epochs are found."""
    yield from enumerate((trial for one in result.levels for trial in (*one.search, *one.trials)), start=1)


def _trials(result: SweepResult) -> Sheet:
    """Quality is on the validation split where the purpose is ``search``, else on the test split."""
    recipe = tuple(field.name for field in fields(Recipe))
    return Sheet(
        "trials",
        ("trial", "level", "purpose", "seed", *recipe, "epochs_run", "seconds", "epoch_seconds", *result.untrained),
        tuple(
            (
                number,
                trial.level,
                trial.purpose,
                trial.seed,
                *asdict(trial.recipe).values(),
                epochs_run(trial),
                trial.seconds,
                trial.epoch_seconds,
                *(trial.quality.get(metric) for metric in result.untrained),
            )
            for number, trial in _all_trials(result)
        ),
    )


def _epochs(result: SweepResult) -> Sheet:
    return Sheet(
        "epochs",
        ("trial", "level", "purpose", "seed", "epoch", "seconds", "loss", f"{result.metric} ({result.curve_split})"),
        tuple(
            (number, trial.level, trial.purpose, trial.seed, at.epoch, at.seconds, at.loss, at.quality)
            for number, trial in _all_trials(result)
            for at in trial.curve
        ),
    )
