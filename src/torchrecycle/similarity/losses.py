"""Two losses on embeddings: one for objects that have a class, one for objects that come in pairs.

Neither asks for embeddings of length one: both normalise. `CosineSoftmax` holds one learned vector for each training
class, and these vectors want a higher learning rate than the model (1e-2 where the model gets 3e-4), so pass
``loss.parameters()`` to the optimiser as a group of its own; after training they are thrown away, since the classes
that matter are new ones. `MultipleNegativesRanking` learns nothing itself: the negatives of a pair are the other pairs
of the batch, 31 of them in a batch of 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CosineSoftmax", "MultipleNegativesRanking"]


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
        cosines = F.normalize(embeddings, dim=-1) @ F.normalize(self.weight, dim=-1).T
        return F.cross_entropy(self.scale * cosines, labels)


class MultipleNegativesRanking(nn.Module):
    """Each query picks its answer among those of the batch, and each answer its query.

    A batch should hold no query and no answer twice: the pair would count as its own negative.

    Args:
        scale: What the cosines are multiplied by: the inverse of the temperature.
    """

    def __init__(self, *, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, queries: Tensor, answers: Tensor) -> Tensor:
        """
        Args:
            queries: ``[pairs, dim]``
            answers: ``[pairs, dim]``, row i belongs to query i

        Returns:
            the mean loss of both directions, a scalar
        """
        logits = self.scale * F.normalize(queries, dim=-1) @ F.normalize(answers, dim=-1).T
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
