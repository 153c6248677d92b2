"""What is predicted of a sweep's levels: measured once, before anything is filled, and known from then on.

Cars at four levels, with a search for rates: 270 whole steps of full training, 270 of 50 %, 270 of 75 % and 700 of head
only are planned. To measure eight batches of each, frozen and recycled, takes as long as 30 steps of full training, a
fifteenth of the whole. So they are measured, and the report shows what was predicted beside what came. Of a sweep of a
hundred objects nothing is predicted: it is over in the time that measuring takes.

What is cheap is told from numbers of steps, before anything is measured. One is counted by what it runs through: a
forward through all layers counts 1, a backward 2, and frozen layers have no backward. So a step of full training counts
3, one at 50 % from the store 1.5, one with the same half frozen and computed again 2, and a batch that is filled 0.5.

A prediction is kept for each level in the journal, with the trainings: a sweep that goes on does not measure again, and
one that is asked for a further level measures that one. One with batches of another size is measured anew: an epoch of
32 steps says nothing of one of 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from torchrecycle.sweep.halving import search_epochs
from torchrecycle.sweep.levels import share_of
from torchrecycle.sweep.plan import SweepPlan
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.records import MissingRecordError, Records
from torchrecycle.sweep.results import Prediction
from torchrecycle.sweep.task import Task

__all__ = ["Foresight", "Planned", "cheap_rounds", "planned_epochs"]

MOST_SHARE = 0.1
"""Of the planned work, so much may be measured before."""
LEAST_WORK = 500
"""Forwards of a batch that are planned at least: fewer are over as soon as they are measured."""
LEAST_ROUNDS = 3
"""Where steps are so quick that a second takes more of them."""
STEPS = 8
"""Batches of a round; see `torchrecycle.sweep.predict`."""


def planned_epochs(recipe: Recipe, level: str, *, seeds: int, rates: int) -> float:
    """How many epochs a level is trained for, all trainings together.

    Args:
        recipe: of the level.
        level: which.
        seeds: a training each.
        rates: how many are tried before; 1 for no search. Two run through, the others end after an epoch.

    >>> planned_epochs(Recipe(5, 1e-3, 1e-3), "50", seeds=3, rates=5)
    24
    """
    search = 2 * search_epochs(recipe.epochs, level) + (rates - 2) if rates > 1 else 0
    return seeds * recipe.epochs + search


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done at a level."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that are recycled, such as ``50``."""
    epochs: float
    """All trainings together."""
    steps: int
    """Batches of an epoch."""

    @property
    def share(self) -> float:
        return share_of(self.level)


def cheap_rounds(levels: Sequence[Planned], filled: float) -> int:
    """How many rounds of a few batches may be measured of each level, if that takes a tenth of what is planned at most.

    Args:
        levels: what is planned at each.
        filled: batches that are filled, all splits.

    Returns:
        0 if not even one. Of quick steps three are measured all the same; see `predict`.

    >>> cars = [Planned("full", 18, 15), Planned("50", 18, 15), Planned("75", 18, 15), Planned("head", 90, 15)]
    >>> cheap_rounds(cars, 30), cheap_rounds([Planned("50", 30, 2)], 3)
    (3, 0)
    """
    deepest = max(one.share for one in levels)
    planned = sum(one.epochs * one.steps * 3 * (1 - one.share) for one in levels) + filled * deepest
    if planned < LEAST_WORK:
        return 0
    measured = 0.0
    for one in levels:
        recycled = 3 * (1 - one.share)
        frozen = recycled + one.share if one.share else 0.0
        measured += min(STEPS, one.steps) * (recycled + frozen)
    measured += 2 * STEPS * deepest  # what is measured is filled, and so are as many batches in the split's order
    rounds = math.floor(MOST_SHARE * planned / measured)
    return max(LEAST_ROUNDS, rounds) if rounds else 0


class Foresight:
    """What is predicted of the levels of one sweep.

    Args:
        build_model: gives the pretrained model.
        task: what is learned.
        plan: where its store is, and how rows are kept.
        records: where predictions are kept.
    """

    def __init__(self, build_model: Callable[[], nn.Module], task: Task, plan: SweepPlan, records: Records) -> None:
        self._build, self.task, self.plan, self._records = build_model, task, plan, records
        others = plan.predict if isinstance(plan.predict, (list, tuple)) else ()
        self.precisions = tuple(dict.fromkeys((plan.precision, *others)))
        """That of the sweep's rows, and others that are asked for beside it."""
        self._known: dict[tuple[str, str | None], Prediction] = {}
        self._together: dict[str, frozenset[str]] = {}

    def recall(self, levels: Sequence[str]) -> list[str]:
        """Levels of which not all is known; what was predicted before is known now."""
        for level, precision in self._wanted(levels):
            if (level, precision) not in self._known:
                with suppress(MissingRecordError):
                    record = self._records.known(**self._facts(level, precision))
                    self._known[level, precision] = Prediction(**record["prediction"])
                    self._together[level] = frozenset(record["together"])
        return [level for level in levels if any(each not in self._known for each in self._wanted([level]))]

    def _wanted(self, levels: Sequence[str]) -> list[tuple[str, str | None]]:
        """Levels with precisions; full training keeps nothing."""
        return [
            (level, precision)
            for level in levels
            for precision in (self.precisions if level != "full" else self.precisions[:1])
        ]

    def _facts(self, level: str, precision: str | None) -> dict[str, Any]:
        other = {} if precision == self.plan.precision else {"rows": precision}
        batch = self.task.recipe(level, share_of(level)).batch_size
        return {"kind": "prediction", "level": level, "batch_size": batch, **other}

    def together(self, level: str) -> frozenset[str]:
        """The levels that were filled in the pass from which its filling is predicted, itself among them; empty where
        nothing is known of it."""
        return self._together.get(level, frozenset())

    def of(self, levels: Sequence[str]) -> tuple[Prediction, ...]:
        """Of each level, as far as it is known, what is predicted at the sweep's precision."""
        return self._found((level, self.precisions[0]) for level in levels)

    def others(self, levels: Sequence[str]) -> tuple[Prediction, ...]:
        """The same at other precisions."""
        return self._found(each for each in self._wanted(levels) if each[1] != self.precisions[0])

    def _found(self, wanted: Iterable[tuple[str, str | None]]) -> tuple[Prediction, ...]:
        found = [self._known[each] for each in wanted if each in self._known]
        full = self._known.get(("full", self.precisions[0]))
        return tuple(each if full is None else replace(each, full_epoch_seconds=full.epoch_seconds) for each in found)

    def measure(self, levels: Sequence[str], rounds: int | None = None) -> tuple[Prediction, ...]:
        """What is predicted of all of these levels, at the sweep's precision; measured, if it is not known.

        Args:
            levels: from no recycling to all.
            rounds: at most so many of a few batches are measured; None for as many as a second takes.

        Raises:
            PredictionError: there is too little to measure.
            CutError: a level has no valid cut.
            StoreError: the rows of a few batches cannot be written.
        """
        missing = self.recall(levels)
        if missing:
            from torchrecycle.sweep.predict import MOST_ROUNDS, predict

            store = str(self.plan.store)
            found = predict(
                self._build,
                self.task,
                missing,
                precisions=self.precisions,
                store_folder=store if "://" in store else Path(store).absolute().parent,
                views=self.plan.views,
                rounds=MOST_ROUNDS if rounds is None else rounds,
            )
            together = frozenset(missing) - {"full"}
            self._together.update(dict.fromkeys(missing, together))
            for each in found:
                self.plan.tell(f"predicted: {each}")
                precision = each.precision if each.cut is not None else self.precisions[0]
                self._known[each.level, precision] = each
                record = {"prediction": asdict(each), "together": sorted(together)}
                self._records.write(record, **self._facts(each.level, precision))
        return self.of(levels)
