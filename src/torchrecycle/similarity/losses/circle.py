"""Circle loss: each similarity is pulled at the harder, the farther it is from where it should be.

With a margin of 0.25, positives should reach a cosine of 0.75 and negatives fall to 0.25. A positive at 0.5 is pulled
with the weight 1 + 0.25 - 0.5 = 0.75, one at 0.9 with 0.35. (Sun et al., *Circle Loss: A Unified Perspective of Pair
Similarity Optimization*, 2020, equations 4 to 8.) It is pytorch-metric-learning's: one loss for each object of the
batch that has positives and negatives, then the mean of those that are not 0.

Quaterion 0.1.35 has the weight of a positive the wrong way round (1.25 + 0.5), takes ``(1 + cosine) / 2`` for the
cosine, and makes one loss of all pairs of the batch; here it is as in the paper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.losses.base import GroupLoss, LossError, library

__all__ = ["CircleLoss"]


class CircleLoss(GroupLoss):
    """Each similarity is pulled at the harder, the farther it is from its goal. It may be used with cross-batch memory.

    Args:
        margin: how far from 1 positives may stay, and how far from 0 negatives.
        scale_factor: what the similarities are multiplied by. The paper has 256 for faces, 80 for finer classes.
        distance_metric_name: cosines only, on which it is defined.

    Raises:
        LossError: another distance, or a scale that is not above 0.
    """

    def __init__(
        self,
        margin: float = 0.25,
        scale_factor: float = 256,
        distance_metric_name: Distance | str = Distance.COSINE,
    ) -> None:
        super().__init__(distance_metric_name)
        if self.distance_metric is not Distance.COSINE:
            raise LossError(
                f"CircleLoss is defined on cosines, and '{self.distance_metric.value}' came: leave "
                "distance_metric_name out, or take TripletLoss"
            )
        if not scale_factor > 0:
            raise LossError(f"the scale_factor of CircleLoss must be above 0: {scale_factor} came")
        self.margin = margin
        self.scale_factor = scale_factor
        self.library = library().circle(margin, scale_factor)

    def get_config_dict(self) -> dict[str, Any]:
        return {"margin": self.margin, "scale_factor": self.scale_factor, **super().get_config_dict()}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        return self.library(embeddings, groups)

    def _xbm_loss(self, embeddings: Tensor, groups: Tensor, memory: Tensor, memory_groups: Tensor) -> Tensor:
        return self.library(embeddings, groups, ref_emb=memory, ref_labels=memory_groups)
