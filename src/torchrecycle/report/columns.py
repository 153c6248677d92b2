"""The columns of the table of levels, with what each means: the same on the page, in a notebook and in a terminal."""

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
from torchrecycle.sweep.results import LevelResult, SweepResult

__all__ = ["COSTS", "Column", "metric_columns", "recommended"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    meaning: str
    """One or two sentences."""
    cell: Callable[[SweepResult, LevelResult], str]
    untrained: Callable[[SweepResult], str] = lambda result: ""


def metric_columns(result: SweepResult) -> list[Column]:
    """One for each metric, the one that counts first."""
    names = sorted(result.untrained, key=lambda name: name != result.metric)
    return [_metric_column(name, result.metrics.get(name, "")) for name in names]


def _metric_column(name: str, meaning: str) -> Column:
    return Column(
        clean(name),
        f"{clean(meaning).rstrip('. ')}. On the test split, with its standard error; 1 is best.".removeprefix(". "),
        lambda result, one: estimate(one.quality[name]) if name in one.quality else "",
        lambda result: estimate(result.untrained[name]),
    )


def _fill(result: SweepResult, one: LevelResult) -> str:
    return seconds(one.fill_seconds) if one.cut else ""


def _paid(result: SweepResult, one: LevelResult) -> str:
    if one.frozen_epoch_seconds is None:
        return ""
    return "never" if one.epochs_until_paid is None else f"{one.epochs_until_paid:,}"


COSTS = (
    Column(
        "fill s",
        "Seconds of the one pass that computed the frozen layers and kept what they give, for all levels at once.",
        _fill,
    ),
    Column("epoch s", "Seconds of one epoch of training, mean.", lambda result, one: seconds(one.epoch_seconds)),
    Column(
        "total s",
        "Seconds of all epochs of one training, without filling; levels need different numbers of epochs.",
        lambda result, one: seconds(one.total_seconds),
    ),
    Column(
        "speed-up",
        "Total seconds of full training, by those of the level.",
        lambda result, one: times(result.speed_up(one.level)),
    ),
    Column(
        "with filling",
        "The same with the pass that fills counted in, as if it served one training only.",
        lambda result, one: times(result.speed_up(one.level, filling=True)),
    ),
    Column(
        "against frozen",
        "An epoch with the same layers frozen but computed again, by an epoch from the store: what recycling itself "
        "gives, beside what freezing gives.",
        lambda result, one: times(result.speed_up_against_frozen(one.level)),
    ),
    Column(
        "MB kept",
        "Megabytes on the disk for this level, all splits.",
        lambda result, one: megabytes(one.bytes_kept) if one.cut else "",
    ),
    Column("paid after", "After how many epochs filling has paid, against the frozen layers computed again.", _paid),
)


def recommended(result: SweepResult) -> str:
    """The row to mark: a level, or ``untrained`` if no level is better; empty where weights are random, since then
    nothing is worth taking as it comes."""
    level = result.recommendation.level
    if level is None:
        return "" if result.ran.random_weights else "untrained"
    return level
