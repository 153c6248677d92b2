"""How a level is trained: rates, epochs, batch size, loss scale.

A head on kept features wants a rate of 3e-3 and forty epochs of 0.1 seconds; a whole network wants a third of that rate
or less and has time for three epochs. To compare levels at one rate and one number of epochs would compare how well
that one choice suits each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recipe"]


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
