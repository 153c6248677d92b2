"""Which learning rate? Few epochs for all of a grid, and more for those that do well: successive halving.

Five rates around a recipe's, 1, 3, 1/3, 9 and 1/9 times it, nine epochs each, are 45 epochs. The first runs through.
The others stand at epochs 1 and 3 before whoever came before them: at three times the rate one is better and runs
through, too; the other three are worse after one epoch and end there: 21 epochs. A rate that makes the loss NaN ends at
once and is never chosen.

The rule is asynchronous successive halving (L. Li et al.: A System for Massively Parallel Hyperparameter Tuning, MLSys
2020, algorithm 2) with a reduction of 3, as Optuna's ``SuccessiveHalvingPruner`` has it: one trial after another, so
that no weights need be kept of trials that wait. At a rung (epochs 1, 3, 9, ...) a trial goes on if it is among the
best third of those that have reached the rung, or the best of all where there are fewer than six. The grid comes in one
order, its middle first: the same qualities give the same rates, whenever and wherever.

Nothing here knows of models: `Halving.ask` gives an `Attempt`, which is told what quality an epoch has come to, and
says whether to go on. Optuna is loaded when a `Halving` is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from torchrecycle.errors import RecycleError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial as OptunaTrial

__all__ = [
    "FACTORS",
    "REDUCTION",
    "Attempt",
    "Halving",
    "HalvingError",
    "Tried",
    "require_optuna",
    "rungs",
    "search_epochs",
]

FACTORS = (1.0, 3.0, 1 / 3, 9.0, 1 / 9)
"""What a recipe's rate is multiplied by, in the order in which it is tried."""
REDUCTION = 3
"""Of the trials at a rung, one in so many goes on; the next rung is so many times as many epochs."""
SHORTEST = 3
"""Epochs of a search, if the recipe has as many: with fewer, no rung would come before the end."""


class HalvingError(RecycleError, ValueError):
    """Optuna is missing, or what is asked of a search cannot be."""


def require_optuna() -> None:
    """
    Raises:
        HalvingError: Optuna, which looks for rates, is not installed.
    """
    if find_spec("optuna") is None:
        raise HalvingError(
            'looking for learning rates needs optuna, which is not installed: pip install "torchrecycle[sweep]", '
            "or take the recipes' rates, with search=False"
        )


def search_epochs(epochs: int, level: str) -> int:
    """How many epochs a search gives its best rates: a third of the recipe's, and three at least. Of head only, whose
    epochs cost next to nothing, all: in a third of them, a rate looks best that is too high for the whole. (Similar
    cars, 12 epochs: with 4 of them 9e-3 is ahead of 1e-3, and comes to 0.157 where 1e-3 comes to 0.170.)

    >>> search_epochs(30, "50"), search_epochs(5, "50"), search_epochs(2, "full"), search_epochs(30, "head")
    (10, 3, 2, 30)
    """
    if level == "head":
        return epochs
    return max(math.ceil(epochs / 3), min(epochs, SHORTEST))


State = Literal["finished", "pruned", "diverged", "stopped"]


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one rate."""

    factor: float
    """Of the recipe's rate."""
    epochs: int
    """The last epoch that it was told of; 0 if none."""
    quality: float | None
    """After that epoch; None if it was never told, or is no finite number."""
    state: State
    """``finished`` all epochs; ``pruned``: others were better at a rung; ``diverged``; or ``stopped`` for a reason of
    the caller's, such as time."""


class Attempt:
    """One rate that is tried; made by `Halving.ask`.

    Args:
        factor: of the recipe's rate.
        epochs: of an attempt that is not pruned.
        trial: Optuna's.
    """

    def __init__(self, factor: float, epochs: int, trial: OptunaTrial) -> None:
        self.factor = factor
        self._epochs, self._trial = epochs, trial
        self._epoch, self._quality = 0, None
        self._state: State = "finished"

    def report(self, epoch: int, quality: float) -> bool:
        """Tell what it has come to. Between rungs nothing is decided, and nothing need be told.

        Args:
            epoch: from 1, each time a later one.
            quality: more is better; NaN or infinity if it has diverged.

        Returns:
            whether to go on

        Raises:
            HalvingError: the epoch has been told of, or was told after the end.
        """
        if self._state != "finished":
            raise HalvingError(f"epoch {epoch} was told of an attempt that was {self._state} at epoch {self._epoch}")
        if epoch <= self._epoch:
            raise HalvingError(f"epoch {epoch} was told after epoch {self._epoch}: tell each epoch once, in order")
        self._epoch = epoch
        if not math.isfinite(quality):
            self._quality, self._state = None, "diverged"
            return False
        self._quality = quality
        self._trial.report(quality, epoch)
        if epoch < self._epochs and self._trial.should_prune():
            self._state = "pruned"
        return self.is_open

    @property
    def epoch(self) -> int:
        """The last epoch that it was told of; 0 if none."""
        return self._epoch

    @property
    def is_open(self) -> bool:
        """Whether another epoch may be told of."""
        return self._state == "finished" and self._epoch < self._epochs

    def close(self, quality: float) -> None:
        """Tell the quality of a training that has ended by itself, before all epochs were told of."""
        if self.is_open:
            self.report(self._epochs, quality)

    def so_far(self, *, stopped: bool = False) -> Tried:
        """What became of it until now.

        Args:
            stopped: whether it ends for another reason than its quality.
        """
        state = "stopped" if stopped and self._state == "finished" else self._state
        return Tried(self.factor, self._epoch, self._quality, state)


class Halving:
    """Rates to try, one after the other.

        halving = Halving(epochs=9)
        while attempt := halving.ask():
            for epoch, quality in enumerate(train(rate * attempt.factor), 1):
                if not attempt.report(epoch, quality):
                    break
            halving.tell(attempt)
        rate *= halving.best().factor

    Args:
        epochs: of an attempt that is not pruned.
        rates: how many are tried, 1 to 5: 3 tries the rate, three times it and a third of it.

    Raises:
        HalvingError: Optuna is not installed, or there are no such numbers.
    """

    def __init__(self, *, epochs: int, rates: int = len(FACTORS)) -> None:
        require_optuna()
        if not 1 <= rates <= len(FACTORS):
            raise HalvingError(f"{rates} rates were asked for: from 1 to {len(FACTORS)} can be tried")
        if epochs < 1:
            raise HalvingError(f"{epochs} epochs were asked for: a rate is tried for one at least")
        self.epochs, self.factors = epochs, FACTORS[:rates]
        self.tried: list[Tried] = []
        self._asked: Attempt | None = None
        self._study = _study(self.factors)

    def ask(self) -> Attempt | None:
        """The next rate to try; None if all were.

        Raises:
            HalvingError: the one before was not told.
        """
        if self._asked is not None:
            raise HalvingError("tell(attempt) what became of the attempt before, then ask for the next")
        if len(self.tried) == len(self.factors):
            return None
        trial = self._study.ask()
        factor = trial.suggest_categorical("factor", self.factors)
        assert isinstance(factor, float)
        self._asked = Attempt(factor, self.epochs, trial)
        return self._asked

    def tell(self, attempt: Attempt, *, stopped: bool = False) -> Tried:
        """What became of it, which is kept.

        Args:
            attempt: the one that was asked for.
            stopped: whether it ended for another reason than its quality, such as time.

        Raises:
            HalvingError: it was not asked for, or was told already.
        """
        from optuna.trial import TrialState

        if attempt is not self._asked:
            raise HalvingError("this attempt was told already, or comes from another Halving")
        self._asked = None
        tried = attempt.so_far(stopped=stopped)
        self.tried.append(tried)
        if tried.state == "finished" and tried.quality is not None:
            self._study.tell(attempt._trial, tried.quality)
        else:
            self._study.tell(attempt._trial, state=TrialState.PRUNED if tried.state == "pruned" else TrialState.FAIL)
        return tried

    def best(self) -> Tried | None:
        """The rate to take: the best of those that finished; if none has, the best of those that came furthest.

        Of equals, the one nearest to the recipe's. None if all diverged, or nothing was told.
        """
        known = [(each.state == "finished", each) for each in self.tried if each.quality is not None]
        return max(known, key=lambda one: (one[0], 0 if one[0] else one[1].epochs, one[1].quality), default=(0, None))[
            1
        ]

    @property
    def is_outermost(self) -> bool:
        """Whether the rate to take is the largest or the smallest that was tried, so that one further may be better."""
        best = self.best()
        tried = [each.factor for each in self.tried]
        return best is not None and len(tried) > 1 and best.factor in (min(tried), max(tried))


def rungs(epochs: int) -> tuple[int, ...]:
    """Epochs after which a quality is needed: where something is decided, and the last.

    >>> rungs(10), rungs(1)
    ((1, 3, 9, 10), (1,))
    """
    powers = [REDUCTION**power for power in range(64) if REDUCTION**power < epochs]
    return (*powers, epochs)


def _study(factors: tuple[float, ...]) -> Study:
    import optuna

    with _quiet():
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.RandomSampler(seed=0),  # never drawn from: all trials are enqueued
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
        )
        for factor in factors:
            study.enqueue_trial({"factor": factor})
    return study


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a word of each study that is made; a user's own studies are as loud as before."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)
