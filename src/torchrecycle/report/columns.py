"""The columns of the table of levels, with what each means: the same on the page, in a notebook and in a terminal.

A column stands only where it says something: without full training there is nothing that a speed-up could be against.
What is expected of full training then, from the levels that were run, is a row of its own, and each figure in it begins
with ``≈``, so that it is not taken for one that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchrecycle.report.words import (
    clean,
    estimate,
    megabytes,
    seconds,
    times,
)
from torchrecycle.sweep.results import LevelResult, SweepResult, Trial

__all__ = [
    "EXPECTED",
    "EXPECTED_WORDS",
    "Column",
    "cost_columns",
    "epochs_run",
    "expects_full",
    "metric_columns",
    "recommended",
]

EXPECTED = "≈ "
"""Before a figure that was not measured."""
EXPECTED_WORDS = "not run, so not measured: what is expected of it from the levels that were"


def expects_full(result: SweepResult) -> bool:
    """Whether full training was not run, but something is known of what would come."""
    return result.full is None and (result.expected_full is not None or result.expected_full_seconds is not None)


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    meaning: str
    """One or two sentences."""
    cell: Callable[[SweepResult, LevelResult], str]
    untrained: Callable[[SweepResult], str] = lambda result: ""
    expected: Callable[[SweepResult], str] = lambda result: ""
    """What is expected of full training, where it was not run."""


def metric_columns(result: SweepResult) -> list[Column]:
    """One for each metric, the one that counts first."""
    names = sorted(result.untrained, key=lambda name: name != result.metric)
    best = "more is better" if result.kind == "objects" else "1 is best"  # of a user's own figure nothing else is known
    return [_metric_column(name, result.metrics.get(name, ""), best) for name in names]


def _metric_column(name: str, meaning: str, best: str) -> Column:
    return Column(
        clean(name),
        f"{clean(meaning).rstrip('. ')}. On the test split, with its standard error where it is known; {best}."
        "".removeprefix(". "),
        lambda result, one: estimate(one.quality[name]) if name in one.quality else "",
        lambda result: estimate(result.untrained[name]),
        lambda result: _expected(result) if name == result.metric else "",
    )


def _expected(result: SweepResult) -> str:
    return EXPECTED + estimate(result.expected_full) if result.expected_full is not None else ""


def cost_columns(result: SweepResult) -> list[Column]:
    """Those that say something of this sweep."""
    shown = [*_COSTS[:3], *(_AGAINST_FULL if result.full is not None else ()), *_COSTS[3:]]
    if result.full is None and result.expected_full_seconds is not None:
        shown.insert(3, _AGAINST_EXPECTED)
    return [one for one in shown if one.name in _ALWAYS or any(one.cell(result, level) for level in result.levels)]


def epochs_run(trial: Trial) -> int | None:
    """How many epochs a training really had; None where nobody has told."""
    return len(trial.curve) or trial.untold_epochs or None


def _fill(result: SweepResult, one: LevelResult) -> str:
    return seconds(one.fill_seconds) if one.cut else ""


def _paid(result: SweepResult, one: LevelResult) -> str:
    if one.frozen_epoch_seconds is None:
        return ""
    return "never" if one.epochs_until_paid is None else f"{one.epochs_until_paid:,}"


def _expected_epoch(result: SweepResult) -> str:
    known = [one.full_epoch_seconds for one in result.predictions if one.full_epoch_seconds is not None]
    return EXPECTED + seconds(known[0]) if known else ""


def _expected_total(result: SweepResult) -> str:
    return EXPECTED + seconds(result.expected_full_seconds) if result.expected_full_seconds is not None else ""


def _against_expected(result: SweepResult, one: LevelResult) -> str:
    spent, full = one.total_seconds + one.fill_seconds, result.expected_full_seconds
    return EXPECTED + times(full / spent) if full is not None and spent else ""


_ALWAYS = ("epoch s", "total s", "MB kept")
_COSTS = (
    Column(
        "fill s",
        "Seconds of filling: the one pass over the training data that computed the frozen layers and kept what they "
        "give, for all levels at once. Of rows that an earlier run had kept: by how much an epoch without a store is "
        "longer.",
        _fill,
    ),
    Column(
        "epoch s",
        "Seconds of one epoch of training, mean.",
        lambda result, one: seconds(one.epoch_seconds),
        expected=_expected_epoch,
    ),
    Column(
        "total s",
        "Seconds of all epochs of one training, without filling. Levels differ in how many epochs they are given.",
        lambda result, one: seconds(one.total_seconds),
        expected=_expected_total,
    ),
    Column(
        "against frozen",
        "How many times quicker an epoch from the store is than one with the same layers frozen, but computed again: "
        "what recycling itself gives, beyond freezing. Below 1×, reading is slower than computing again.",
        lambda result, one: times(result.speed_up_against_frozen(one.level)),
    ),
    Column(
        "MB kept",
        "Megabytes on the disk for this level, all splits.",
        lambda result, one: megabytes(one.bytes_kept) if one.cut else "",
    ),
    Column(
        "paid after",
        "Epochs after which the time of filling is won back, compared with computing the frozen layers in each epoch.",
        _paid,
    ),
)
_AGAINST_FULL = (
    Column(
        "speed-up",
        "How many times quicker one training is than full training.",
        lambda result, one: times(result.speed_up(one.level)),
    ),
    Column(
        "with filling",
        "The same with filling counted in, as if it served one training only.",
        lambda result, one: times(result.speed_up(one.level, filling=True)),
    ),
)
_AGAINST_EXPECTED = Column(
    "expected speed-up",
    "How many times quicker one training is, filling counted in, than full training is expected to be, which was not "
    "run.",
    _against_expected,
)


def recommended(result: SweepResult) -> str:
    """The row to mark: a level, or ``untrained`` if no level is better; empty where weights are random, since then
    nothing is worth taking as it comes."""
    level = result.recommendation.level
    if level is None:
        return "" if result.ran.random_weights else "untrained"
    return level
