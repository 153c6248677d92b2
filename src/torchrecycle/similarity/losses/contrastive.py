"""Contrastive loss: pairs that belong together are drawn together, all else is pushed out to a margin.

A pair at the distance d with the score s costs ``(s d² + (1 - s) relu(margin - d)²) / 2`` (Hadsell, Chopra and LeCun,
*Dimensionality Reduction by Learning an Invariant Mapping*, 2006, equation 4). With a margin of 0.5, a pair of score 1
at 0.3 costs 0.045, one of score 0 there 0.02.

Where the batch has several subgroups, each of the two objects also has a nearest object of another subgroup, at n, and
that costs ``relu(margin - n)²`` more. So pairs that belong together are enough, if they say by their subgroups what
does not: every question of one subgroup pushes away the answers of the others. Without subgroups and without pairs of
a low score, all embeddings may become one at no cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.losses.base import LossError, PairwiseLoss

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(PairwiseLoss):
    """Pairs that belong together are drawn together, all else is pushed out to a margin.

    Args:
        distance_metric_name: what makes the distances. Cosine distances of a pair are 1 - cosine, from 0 to 2; those to
            objects of other subgroups half of that, since they come from a matrix: see `distances`.
        margin: the distance from which on what does not belong together is left alone.
        size_average: whether the pairs' costs are averaged; else they are summed up.
    """

    def __init__(
        self,
        distance_metric_name: Distance | str = Distance.COSINE,
        margin: float = 0.5,
        size_average: bool = True,
    ) -> None:
        super().__init__(distance_metric_name)
        self.margin = margin
        self.size_average = size_average

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "margin": self.margin, "size_average": self.size_average}

    def forward(self, embeddings: Tensor, pairs: Tensor, labels: Tensor, subgroups: Tensor) -> Tensor:
        labels = _scores(labels).to(embeddings.dtype)
        others = subgroups[:, None] != subgroups
        left, right = pairs.unbind(1)
        distances = self.distance_metric.distance(embeddings[left], embeddings[right])
        own = labels * distances.square() + (1 - labels) * (self.margin - distances).relu().square()
        nearest = self.distance_metric.distance_matrix(embeddings).masked_fill(~others, torch.inf).min(1).values
        close = (self.margin - nearest).relu().square()
        costs = own / 2 + close[left] + close[right]
        return costs.mean() if self.size_average else costs.sum()


def _scores(labels: Tensor) -> Tensor:
    lowest, highest = torch.stack(torch.aminmax(labels)).tolist()
    if not 0 <= lowest <= highest <= 1:
        raise LossError(
            f"scores of pairs go from 0 (nothing in common) to 1 (belong together), and {lowest:g} to {highest:g} "
            "came: divide them by the largest"
        )
    return labels
