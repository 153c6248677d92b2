"""Looking for a rate at a level: around the recipe's own, in steps of three.

A recipe's rate is right for a usual model and data set within a factor of three or so; what is looked for is which way.
Three short trainings tell, and a fourth one if the best was the outermost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Trial

__all__ = ["best_of", "rate_of", "scaled", "search_order"]


def search_order(recipe: Recipe, level: str, tried: Sequence[Trial]) -> Iterator[Recipe]:
    """Recipes to try, with a third of the epochs: the rate itself, three times it, a third of it, and one step further
    on the side that was better, if that was the outermost.

    Args:
        recipe: the default, in the middle.
        level: whose.
        tried: what came out, filled by the caller as it goes.
    """
    short = replace(recipe, epochs=max(1, round(recipe.epochs / 3)))
    for factor in (1.0, 3.0, 1 / 3):
        yield scaled(short, level, factor)
    best = max(range(len(tried)), key=lambda i: _quality(tried[i], next(iter(tried[i].quality))))
    if best:
        yield scaled(short, level, (9.0, 1 / 9)[best - 1])


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


def best_of(tried: Sequence[Trial], recipe: Recipe, metric: str) -> Recipe:
    """The recipe with the rate that did best."""
    best = max(tried, key=lambda trial: _quality(trial, metric)).recipe
    return replace(best, epochs=recipe.epochs)


def _quality(trial: Trial, metric: str) -> float:
    """One that has diverged is the worst, also where qualities may be below 0."""
    diverged = trial.curve and not math.isfinite(trial.curve[-1].loss)
    return -math.inf if diverged else trial.quality[metric]
