"""What was predicted from a few batches, before anything was filled, beside what then came.

At 50 % an epoch was predicted to take 5.6 s, and took 5.86: 4 % less than what came. Where an epoch from the store is
slower than one with the same layers frozen and computed again, this says so: recycling does not pay there, whatever
else the level is good for.

Like is compared with like. Of a level whose rows have no room, an epoch without a store is what was predicted. Of
levels that were filled in turns, filling is not compared: what was predicted is one pass for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchrecycle.report.levels import level_name
from torchrecycle.report.markup import definitions, scrolling, text
from torchrecycle.report.sheets import Cell, Sheet
from torchrecycle.report.words import clean, count, megabytes, seconds
from torchrecycle.sweep.results import LevelResult, Prediction, SweepResult, in_words

__all__ = ["Row", "predicted_rows", "predicted_section", "predictions_sheet", "slow_lines"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that is predicted."""

    name: str
    meaning: str
    predicted: Callable[[SweepResult, Prediction], str]
    measured: Callable[[LevelResult], str]
    is_of_filling: bool = False
    """Whether it depends on which levels are filled at once."""


QUANTITIES = (
    Quantity(
        "epoch s",
        "Seconds of one epoch of training.",
        lambda result, one: seconds(one.epoch_seconds),
        lambda one: seconds(one.epoch_seconds),
    ),
    Quantity(
        "frozen s",
        "Seconds of one epoch with the same layers frozen but computed again: without a store.",
        lambda result, one: seconds(one.frozen_epoch_seconds),
        lambda one: seconds(one.frozen_epoch_seconds),
    ),
    Quantity(
        "fill s",
        "Seconds of filling: the pass that computes the frozen layers and keeps what they give, for all levels "
        "at once. No prediction is shown where other levels were filled at once than it is of, such as in turns.",
        lambda result, one: seconds(one.fill_seconds) if one.cut else "",
        lambda one: seconds(one.fill_seconds) if one.cut else "",
        is_of_filling=True,
    ),
    Quantity(
        "MB kept",
        "Megabytes on the disk, all splits.",
        lambda result, one: megabytes(one.bytes_kept) if one.cut else "",
        lambda one: megabytes(one.bytes_kept) if one.cut else "",
    ),
    Quantity(
        "paid after",
        "Epochs after which the time of filling is won back, compared with computing the frozen layers in each epoch.",
        lambda result, one: _paid(one.frozen_epoch_seconds, one.epochs_until_paid),
        lambda one: _paid(one.frozen_epoch_seconds, one.epochs_until_paid),
        is_of_filling=True,
    ),
)


def _paid(frozen: float | None, epochs: int | None) -> str:
    if frozen is None:
        return ""
    return "never" if epochs is None else f"{epochs:,}"


@dataclass(frozen=True, slots=True)
class Row:
    """One prediction, and what came of it."""

    prediction: Prediction
    measured: LevelResult | None
    """None if the level was not run, or not with this precision."""

    @property
    def name(self) -> str:
        precision = f", {clean(self.prediction.precision)}" if self.prediction.precision else ""
        return f"{in_words(self.prediction.level)}{precision}"

    @property
    def off(self) -> str:
        """By how much the prediction of an epoch's seconds is above what was measured."""
        measured = self.measured.epoch_seconds if self.measured is not None else 0.0
        if not measured:
            return ""
        share = round(100 * (self.prediction.epoch_seconds / measured - 1))
        return f"{'−' if share < 0 else '+'}{abs(share)} %" if share else "0 %"

    @property
    def verdict(self) -> str:
        """Whether reading is quicker than computing again, as predicted and as measured; empty for full training."""
        if self.measured is not None and _has_no_room(self.measured):
            return _NO_ROOM
        predicted = _pace(self.prediction.epoch_seconds, self.prediction.frozen_epoch_seconds)
        came = _pace_of(self.measured) if self.measured is not None else ""
        if not predicted or not came or predicted == came:
            return came or predicted
        return f"predicted: {predicted}; measured: {came}"

    def figures(self, result: SweepResult) -> list[tuple[str, str, str]]:
        """For each quantity its name, what was predicted of it, and what was measured; nothing where the prediction is
        of something else."""
        return [
            (
                one.name,
                one.predicted(result, self.prediction) if self._is_comparable(one) else "",
                one.measured(self.measured) if self.measured else "",
            )
            for one in QUANTITIES
        ]

    def _is_comparable(self, quantity: Quantity) -> bool:
        return self.measured is None or self.measured.filled_as_predicted or not quantity.is_of_filling


_QUICK, _SLOW = "reading is quicker", "reading is slower than computing again"
_NO_ROOM = "its rows are not kept, for want of room: an epoch without a store"
_LIKE = "reading takes as long as computing again"
NOISE = 0.05
"""Share by which two measured times may differ and be the same."""


def _pace(epoch: float, frozen: float | None) -> str:
    """In words, how reading compares with computing again; empty where one of them is not known."""
    if not frozen or not epoch:
        return ""
    if abs(epoch / frozen - 1) <= NOISE:
        return _LIKE
    return _SLOW if epoch > frozen else _QUICK


def _has_no_room(one: LevelResult) -> bool:
    return one.cut is not None and not one.is_kept


def _pace_of(one: LevelResult) -> str:
    return "" if _has_no_room(one) else _pace(one.epoch_seconds, one.frozen_epoch_seconds)


def predicted_rows(result: SweepResult) -> tuple[list[Row], list[Row]]:
    """What was predicted of levels that were run, and of others, also of the same with another precision."""
    ran = [Row(one.predicted, one) for one in result.levels if one.predicted is not None]
    known = [row.prediction for row in ran]
    return ran, [Row(one, None) for one in result.predictions if one not in known]


def slow_lines(result: SweepResult) -> list[str]:
    """For each level at which reading is slower than computing again, as measured, a sentence."""
    return [
        f"{one.words}: {_SLOW}. An epoch takes {seconds(one.epoch_seconds)} s from the store, and "
        f"{seconds(one.frozen_epoch_seconds)} s with the same layers frozen and no store."
        for one in result.levels
        if _pace_of(one) == _SLOW
    ]


# -- on the page -------------------------------------------------------------------------------------------------------


def predicted_section(result: SweepResult, ident: str) -> str:
    """A table of what was predicted and what came; empty if nothing was predicted."""
    ran, others = predicted_rows(result)
    if not ran and not others:
        return ""
    steps = max(row.prediction.steps for row in (*ran, *others))
    after = "" if not ran else " Beside each prediction stands what the sweep then measured."
    rest = _table(result, others, "Predicted, but not run") if others else ""
    if ran and others:
        summary = f"{count(len(others), 'prediction')} of what was not run"
        rest = f'<details class="legend"><summary>{summary}</summary>{rest}</details>'
    return (
        f'<section aria-labelledby="{ident}-predicted"><h3 id="{ident}-predicted">Predicted, and what came</h3>'
        f"<p>Each level was timed on {steps:,} batches at most before anything was filled, and all else was predicted "
        f"from them.{after}</p>"
        f"{_table(result, ran, 'Predicted, and what came') if ran else ''}{rest}"
        f'<details class="legend"><summary>What these columns mean</summary>{_meanings()}</details></section>'
    )


def _table(result: SweepResult, rows: list[Row], caption: str) -> str:
    """Two columns for each quantity, or one where nothing was measured."""
    is_run = any(row.measured for row in rows)
    kinds = ("predicted", "measured") if is_run else ("predicted",)
    heads = [f"{one.name} {kind}" for one in QUANTITIES for kind in kinds] + ["epoch off by"] * is_run
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    body = "".join(
        f'<tr{_SLOW_ROW if row.verdict.endswith(_SLOW) else ""}><th scope="row">{_name(result, row)}</th>'
        f"{''.join(f'<td>{text(cell)}</td>' for cell in _cells(result, row, is_run))}"
        f'<td class="words verdict">{text(row.verdict)}</td></tr>'
        for row in rows
    )
    caption = f"{caption}: {result.title}"
    table = (
        f'<table class="levels predicted"><caption>{text(caption)}</caption>'
        f'<thead><tr><th scope="col" class="words">level</th>{head}'
        f'<th scope="col" class="words">verdict</th></tr></thead><tbody>{body}</tbody></table>'
    )
    return scrolling(table, caption)


_SLOW_ROW = ' class="slow"'


def _cells(result: SweepResult, row: Row, is_run: bool) -> list[str]:
    both = [cell for _, *cells in row.figures(result) for cell in cells[: 1 + is_run]]
    return [*both, row.off] if is_run else both


def _name(result: SweepResult, row: Row) -> str:
    precision = f" <small>{text(row.prediction.precision)}</small>" if row.prediction.precision else ""
    return f"{level_name(result, row.prediction.level)}{precision}"


def _meanings() -> str:
    own = [(one.name, text(one.meaning)) for one in QUANTITIES]
    off = ("epoch off by", "How much the predicted seconds of an epoch are above (+) or below (−) what was measured.")
    store = (
        "verdict",
        "Whether an epoch that reads what was kept is quicker than one in which the frozen layers are computed again.",
    )
    return definitions([*own, off, store], "meanings")


# -- as a sheet --------------------------------------------------------------------------------------------------------


def predictions_sheet(result: SweepResult) -> Sheet | None:
    """Every figure that was predicted, not rounded, beside what was measured; None if nothing was."""
    ran, others = predicted_rows(result)
    if not ran and not others:
        return None
    names = ("fill_seconds", "epoch_seconds", "frozen_epoch_seconds", "epochs_until_paid")
    header = ("level", "cut", "precision", "objects", "steps", "full_epoch_seconds", "pays")
    header += ("bytes_kept predicted", "bytes_kept measured")
    header += tuple(f"{name} {kind}" for name in names for kind in ("predicted", "measured"))
    rows = []
    for row in (*ran, *others):
        one = row.prediction
        cells: list[Cell] = [one.level, one.cut, one.precision, one.objects, one.steps, one.full_epoch_seconds]
        cells.append(str(one.pays).lower() if one.frozen_epoch_seconds is not None else None)
        cells += [one.bytes_kept, row.measured.bytes_kept if row.measured is not None else None]
        for name in names:
            is_of_filling = name in ("fill_seconds", "epochs_until_paid")
            is_other = is_of_filling and row.measured is not None and not row.measured.filled_as_predicted
            cells += [
                None if is_other else getattr(one, name),
                getattr(row.measured, name) if row.measured is not None else None,
            ]
        rows.append(tuple(cells))
    return Sheet("predictions", header, tuple(rows))
