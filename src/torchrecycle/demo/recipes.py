"""How each level is trained: rates, epochs, batch size, loss scale. Presets, since the best rate shifts with the level.

A head on kept features wants 3e-3 and forty epochs of 0.1 seconds; the whole network wants a third of that rate and has
time for three epochs of 15 seconds. To compare the levels at one rate and one number of epochs would compare how well
that one choice suits each of them.

The presets were found on the training half alone, itself split in two by `torchrecycle.demo.split.halves` (seeds 1000
and up); the classes and pairs that the demo evaluates on were never looked at. What was tried, with numbers, is in
``docs/decisions.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["IMAGE_RECIPES", "LEVELS", "TEXT_RECIPES", "Level", "Recipe", "quicker"]

Level = Literal["full", "50", "75", "head"]
"""How much is recycled: nothing, about 50 % or 75 % of the blocks, or all but the head."""

LEVELS: tuple[Level, ...] = ("full", "50", "75", "head")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train at one level."""

    cut: str | None
    """name of the module whose output is kept; None trains everything"""
    epochs: int
    """passes over the training half"""
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


IMAGE_RECIPES: dict[Level, Recipe] = {
    "full": Recipe(cut=None, epochs=3, suffix_rate=1e-3, head_rate=1e-3),
    "50": Recipe(cut="trunk.blocks.2", epochs=4, suffix_rate=1e-3, head_rate=1e-3),
    "75": Recipe(cut="trunk.blocks.4", epochs=5, suffix_rate=1e-3, head_rate=1e-3, batch_size=32),
    "head": Recipe(cut="trunk", epochs=40, suffix_rate=0.0, head_rate=3e-3),
}
"""EfficientNet-Lite0 has seven stages: 3 of 7 are 43 %, 5 of 7 are 71 %."""

TEXT_RECIPES: dict[Level, Recipe] = {
    "full": Recipe(cut=None, epochs=3, suffix_rate=1e-4, head_rate=1e-3, scale=20.0),
    "50": Recipe(cut="trunk.encoder.layer.2", epochs=4, suffix_rate=2e-4, head_rate=1e-3, scale=20.0),
    "75": Recipe(cut="trunk.encoder.layer.3", epochs=4, suffix_rate=1e-4, head_rate=1e-3, scale=20.0),
    "head": Recipe(cut="pool", epochs=20, suffix_rate=0.0, head_rate=1e-3, scale=20.0),
}
"""MiniLM has six layers: 3 of 6 are 50 %, 4 of 6 are 67 %."""


def quicker(recipe: Recipe) -> Recipe:
    """The same for a quick look: a third of the epochs, smaller batches for the smaller data.

    >>> quicker(Recipe(cut=None, epochs=3, suffix_rate=1e-4, head_rate=1e-3)).epochs
    1
    """
    return replace(recipe, epochs=max(1, recipe.epochs // 3), batch_size=32)
