"""Softmax over cosines to one learned vector per class: the loss of the sweep for objects that have a class.

It does not ask for embeddings of length one: it normalises. Its class vectors want a higher learning rate than the
model (1e-2 where the model gets 3e-4), so pass ``loss.parameters()`` to the optimiser as a group of its own; after
training they are thrown away, since the classes that matter are new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrecycle.similarity.distances import unit
from torchrecycle.similarity.losses.softmax import class_cross_entropy

__all__ = ["CosineSoftmax"]


class CosineSoftmax(nn.Module):
    """Cross-entropy over the training classes, with scaled cosines to one learned vector per class as logits.

    Args:
        classes: How many classes there are to train on.
        dim: Width of the embeddings.
        scale: What the cosines are multiplied by. Cosines end at 1, so without it the softmax could never become
            sure: with 150 classes, the best possible loss is 4.02 at scale 1 and 0.00002 at scale 16.
        generator: Draws the class vectors; the global one if none is given.
    """

    def __init__(
        self, classes: int, dim: int, *, scale: float = 16.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim, generator=generator))
        self.scale = scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            embeddings: ``[batch, dim]``
            labels: ``[batch]``, class numbers from 0

        Returns:
            the mean loss, a scalar
        """
        return class_cross_entropy(unit(embeddings), unit(self.weight), labels, scale=self.scale)
