"""Online contrastive loss: positives are drawn together, negatives are pushed out to a margin, pairs made in the batch.

A batch of 32 in groups of four has 96 ordered pairs of one group and 896 of two. With ``mining="all"``, the loss is
half of the mean distance of the first and the mean of ``relu(margin - distance)`` of the second; with ``"hard"``, each
object gives its farthest positive and its nearest negative only. (Hadsell, Chopra and LeCun, *Dimensionality Reduction
by Learning an Invariant Mapping*, 2006, equation 4, with distances that are not squared, as in Quaterion.)

In Quaterion 0.1.35, each object is its own nearest negative, at the distance 0, so that nothing is ever pushed apart.
Here an object is not compared with itself.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.losses.base import GroupLoss, one_of
from torchrecycle.similarity.losses.mining import hardest, masks

__all__ = ["OnlineContrastiveLoss"]


class OnlineContrastiveLoss(GroupLoss):
    """Positives are drawn together, negatives are pushed out to a margin. It may be used with cross-batch memory.

    Args:
        margin: the distance from which on a negative is left alone.
        distance_metric_name: what makes the distances.
        mining: which pairs count: ``hard`` or ``all``.

    Raises:
        LossError: there is no such mining.
    """

    def __init__(
        self, margin: float = 0.5, distance_metric_name: Distance | str = Distance.COSINE, mining: str = "hard"
    ) -> None:
        super().__init__(distance_metric_name)
        self.margin = margin
        self.mining = one_of(mining, ("hard", "all"), "mining")

    def get_config_dict(self) -> dict[str, Any]:
        return {"margin": self.margin, **super().get_config_dict(), "mining": self.mining}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        return self._loss(embeddings, groups, None, None)

    def _xbm_loss(self, embeddings: Tensor, groups: Tensor, memory: Tensor, memory_groups: Tensor) -> Tensor:
        return self._loss(embeddings, groups, memory, memory_groups)

    def _loss(self, embeddings: Tensor, groups: Tensor, others: Tensor | None, other_groups: Tensor | None) -> Tensor:
        distances = self.distance_metric.distance_matrix(embeddings, others)
        positive, negative = masks(groups, other_groups)
        if self.mining == "all":
            far, far_counts, near, near_counts = distances, positive, distances, negative
        else:
            chosen = hardest(distances, positive, negative)
            far = distances.gather(1, chosen.positive[:, None]).squeeze(1)
            near = distances.gather(1, chosen.negative[:, None]).squeeze(1)
            far_counts, near_counts = chosen.has_positive, chosen.has_negative
        return (_mean(far, far_counts) + _mean(F.relu(self.margin - near), near_counts)) / 2


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum() / counts.sum().clamp_min(1)
