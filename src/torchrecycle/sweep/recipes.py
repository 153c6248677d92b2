"""How a level is trained: rates, epochs, batch size, loss scale.

A head on kept features wants a rate of 3e-3 and forty epochs of 0.1 seconds; a whole network wants a third of that rate
or less and has time for three epochs. To compare levels at one rate and one number of epochs would compare how well
that one choice suits each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["USUAL", "Recipe", "usual_recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train at one level."""

    epochs: int
    """passes over the training split"""
    suffix_rate: float
    """AdamW's learning rate for what is left of the pretrained trunk"""
    head_rate: float
    """the same for the head"""
    class_rate: float = 1e-2
    """the same for the class vectors of a loss that learns some; they get no weight decay"""
    batch_size: int = 64
    """images, or pairs of texts, in a step"""
    weight_decay: float = 1e-2
    """AdamW's, decoupled"""
    warm_up: float = 0.1
    """share of the steps in which the rates rise from zero; after that they fall to zero along a cosine"""
    scale: float = 4.0
    """what the cosines are multiplied by in the loss"""


USUAL = {
    "full": Recipe(epochs=4, suffix_rate=3e-4, head_rate=1e-3),
    "between": Recipe(epochs=5, suffix_rate=3e-4, head_rate=1e-3),
    "head": Recipe(epochs=30, suffix_rate=0.0, head_rate=3e-3),
}
"""What suits a network of pictures; texts want a third of the rate."""

LEAST_STEPS, LEAST_HEAD_STEPS = 60, 300
"""Steps that a training has at least, however little there is to train on."""
MOST_EPOCHS, MOST_HEAD_EPOCHS = 30, 150


def usual_recipe(
    base: Mapping[str, Recipe],
    level: str,
    share: float,
    objects: int,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
) -> Recipe:
    """The recipe of a level: of those for ``full``, ``head`` and what lies ``between``.

    Args:
        base: usual recipes.
        level: such as ``50``.
        share: that is recycled really, 0 to 1: more epochs where less is trained.
        objects: that an epoch has; pairs count once.
        epochs: in place of the usual number; five times as many for head only, where they cost next to nothing.
        batch_size: in place of the usual one.

    >>> usual_recipe(USUAL, "50", 0.5, 10_000).epochs, usual_recipe(USUAL, "50", 0.5, 128).epochs
    (6, 30)
    """
    usual, is_head = base.get(level, base["between"]), level == "head"
    size = batch_size or usual.batch_size
    count = usual.epochs if level in base else usual.epochs + round(2 * share)
    least = math.ceil((LEAST_HEAD_STEPS if is_head else LEAST_STEPS) / max(1, objects / size))
    count = max(count, min(least, MOST_HEAD_EPOCHS if is_head else MOST_EPOCHS))
    if epochs is not None:
        count = epochs * (5 if is_head else 1)
    return replace(usual, epochs=count, batch_size=size)
