"""FastAP: the average precision of a batch, made smooth by sorting distances into bins.

Each object ranks all others of the batch. Squared distances between vectors of length one go from 0 to 4; with ten
bins, the edges are at 0, 0.4, 0.8, ... and a distance counts for its two edges by how near it is. Precision is then
read at each edge, and one minus the average precision is the loss. (Cakir et al., *Deep Metric Learning to Rank*,
2019, section 3.) It is pytorch-metric-learning's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.losses.base import GroupLoss, LossError, library

__all__ = ["FastAPLoss"]


class FastAPLoss(GroupLoss):
    """The average precision of a batch, made smooth. Distances are euclidean, between vectors of length one.

    Args:
        num_bins: how many bins the distances are sorted into.

    Raises:
        LossError: less than one bin.
    """

    def __init__(self, num_bins: int = 10) -> None:
        super().__init__(Distance.EUCLIDEAN)
        if num_bins < 1:
            raise LossError(f"FastAPLoss needs a bin at least: num_bins={num_bins} came")
        self.num_bins = num_bins
        self.library = library().fast_ap(num_bins)

    def get_config_dict(self) -> dict[str, Any]:
        return {"num_bins": self.num_bins}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        return self.library(embeddings, groups)
