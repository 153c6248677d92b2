"""A training as a task's `fit` sees it: what to train, with what recipe, and whom to tell of its epochs.

    def fit(self, model, loader, trial):
        optimizer = torch.optim.AdamW(trial.parameters, lr=trial.recipe.suffix_rate)
        for epoch in range(1, trial.recipe.epochs + 1):
            losses = [step(model, optimizer, batch) for batch in loader]
            if not trial.ended(epoch, sum(losses) / len(losses)):
                break

`ended` takes the time, has the model judged now and then, which does not count as training, and says whether to go on.
A `fit` that never calls it works too: it is timed as a whole and never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint

__all__ = ["RunningTrial"]


class _Clock:
    """When a training began, and what its epochs came to."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.away = 0.0
        self.ended: float | None = None
        self.points: list[EpochPoint] = []
        self.stopped = False

    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began - self.away


@dataclass(frozen=True, slots=True, eq=False)
class RunningTrial:
    """One training that is under way. Its clock starts when it is made."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that are recycled, such as ``50``."""
    share: float
    """The share of the blocks that is recycled, 0 to 1: what the cut that was found really is."""
    recipe: Recipe
    """Rates, epochs and batch size; the loader has that batch size already."""
    seed: int
    """The generators of Python, NumPy and torch are seeded with it before `fit`."""
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    """What to train: of a recycled level, what is left after the cut."""
    judge: Callable[[int], float | None] | None = field(default=None, repr=False)
    """Told the epoch that has ended, gives the quality then, or None."""
    go_on: Callable[[EpochPoint], bool] | None = field(default=None, repr=False)
    """Whether the training goes on after an epoch."""
    _clock: _Clock = field(default_factory=_Clock, init=False, repr=False)

    @property
    def curve(self) -> tuple[EpochPoint, ...]:
        """One point for each epoch that was told of."""
        return tuple(self._clock.points)

    @property
    def seconds(self) -> float:
        """Wall seconds since it began, without what judging took."""
        return self._clock.seconds()

    def stop_clock(self) -> None:
        """To be called by whoever called `fit`, when it is over."""
        self._clock.ended = time.perf_counter()

    def ended(self, epoch: int, loss: float) -> bool:
        """To be called after each epoch. May judge the model, which is left in the mode that it was in.

        Args:
            epoch: which one has ended, from 1.
            loss: mean over its steps; a tensor of one number will do.

        Returns:
            whether to go on; False if the loss is no finite number, if others do better, or if time is up

        Raises:
            SweepError: the epoch is not the next one, or the loss is no number.
        """
        clock = self._clock
        seconds = clock.seconds()
        if clock.stopped:  # a loop that does not listen
            return False
        if epoch != len(clock.points) + 1:
            raise SweepError(
                f"trial.ended({epoch!r}, ...) was called for epoch {len(clock.points) + 1}: call it once after each "
                "epoch, counted from 1"
            )
        point = self._judged(epoch, seconds, _number(loss))
        clock.points.append(point)
        wanted = math.isfinite(point.loss) and (self.go_on is None or self.go_on(point))
        clock.stopped = not wanted
        return wanted

    def _judged(self, epoch: int, seconds: float, loss: float) -> EpochPoint:
        quality, began = None, time.perf_counter()
        try:
            if self.judge is not None and math.isfinite(loss):
                quality = self.judge(epoch)
        except NotFiniteError:  # the last step of the epoch did it: no loss has seen it yet
            loss = math.nan
        finally:
            self._clock.away += time.perf_counter() - began
        return EpochPoint(epoch, seconds, loss, quality)


def _number(loss: Any) -> float:
    try:
        if isinstance(loss, (str, bytes)):
            raise TypeError("a text")
        return loss.item() if isinstance(loss, Tensor) else float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SweepError(
            f"trial.ended was given a loss of {loss!r}, a {type(loss).__name__}: give one number, the mean over the "
            "epoch's steps"
        ) from error
