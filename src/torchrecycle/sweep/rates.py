"""Looking for a rate at a level: around the recipe's own, in steps of three, by successive halving.

A recipe's rate is right for a usual model and data set within a factor of three or so; what is looked for is which way.
Five trainings, of a third of the epochs where epochs cost, tell; those that fall behind after one or three end there
(`torchrecycle.sweep.halving`). What a training came to depends on those before it, by which it may have been stopped:
so it is kept under their rates, too, and a search that goes on after a kill is the search that it would have been.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torchrecycle.sweep.halving import Attempt, Tried
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint, Trial

__all__ = ["chosen", "diverged", "rate_of", "report", "scaled", "settle"]


def scaled(recipe: Recipe, level: str, factor: float) -> Recipe:
    """The rate that matters most at a level, times a factor: of what is left of the trunk, of the head where nothing
    is.

    >>> scaled(Recipe(epochs=3, suffix_rate=1e-4, head_rate=1e-3), "50", 3.0).suffix_rate
    0.0003
    """
    if level == "head":
        return replace(recipe, head_rate=float(f"{recipe.head_rate * factor:.2g}"))
    return replace(recipe, suffix_rate=float(f"{recipe.suffix_rate * factor:.2g}"))


def rate_of(recipe: Recipe, level: str) -> float:
    """The rate that `scaled` changes."""
    return recipe.head_rate if level == "head" else recipe.suffix_rate


def chosen(best: Tried | None, recipe: Recipe, level: str) -> Recipe:
    """The recipe with the rate that did best; as it is, if there was no time for any."""
    return recipe if best is None else scaled(recipe, level, best.factor)


def settle(attempt: Attempt, trial: Trial, metric: str) -> None:
    """Tell an attempt all that it has not been told of its training: whether that has just ended, or is read from the
    journal.

    Args:
        attempt: of the rate.
        trial: what the training came to.
        metric: which figure counts.
    """
    for point in trial.curve:
        if point.epoch > attempt.epoch and attempt.is_open:
            report(attempt, point)
    if attempt.is_open:  # a fit that tells of no epochs, or has stopped by itself
        attempt.close(math.nan if diverged(trial) else trial.quality[metric])


def report(attempt: Attempt, point: EpochPoint) -> bool:
    """Tell an attempt of an epoch.

    Returns:
        whether to go on
    """
    if not math.isfinite(point.loss):
        return attempt.report(point.epoch, math.nan)
    return True if point.quality is None else attempt.report(point.epoch, point.quality)


def diverged(trial: Trial) -> bool:
    """Whether the loss or an output was no finite number at the end."""
    return bool(trial.curve) and not math.isfinite(trial.curve[-1].loss)
