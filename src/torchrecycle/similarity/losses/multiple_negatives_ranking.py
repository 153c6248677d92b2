"""Multiple negatives ranking: each left object picks its right one among all right ones of the batch.

In a batch of 32 questions with their answers, the negatives of a question are the other 31 answers, so nothing but
pairs that belong together is needed, and larger batches teach more. (Henderson et al., *Efficient Natural Language
Response Suggestion for Smart Reply*, 2017, section 4.)

It comes in two forms over one function, `ranking_loss`: `MultipleNegativesRankingLoss` takes what a loader of pairs
gives, under Quaterion's names; `MultipleNegativesRanking`, which the sweep trains with, takes two tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.similarity.distances import Distance, unit
from torchrecycle.similarity.losses.base import LossError, PairwiseLoss

__all__ = ["MultipleNegativesRanking", "MultipleNegativesRankingLoss", "ranking_loss"]


def ranking_loss(logits: Tensor, *, symmetric: bool) -> Tensor:
    """Mean cross-entropy of finding entry i in row i; if symmetric, the mean of that and of finding it in column i.

    Args:
        logits: ``[pairs, pairs]``
        symmetric: whether each right object picks its left one as well.
    """
    own = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.T, own)) / 2 if symmetric else loss


class MultipleNegativesRankingLoss(PairwiseLoss):
    """Each left object picks its right one. Scores must all be 1; subgroups are not looked at.

    Args:
        scale: what the similarities are multiplied by. Cosines come as ``(1 + cosine) / 2``, as in Quaterion, so a
            scale of 40 is that of 20 of `MultipleNegativesRanking` and of Sentence-Transformers.
        distance_metric_name: what makes the similarities; with the dot product, the usual scale is 1.
        symmetric: whether each right object picks its left one as well.
    """

    compares_all_pairs = True

    def __init__(
        self,
        scale: float = 20.0,
        distance_metric_name: Distance | str = Distance.COSINE,
        symmetric: bool = False,
    ) -> None:
        super().__init__(distance_metric_name)
        self.scale = scale
        self.symmetric = symmetric

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, **super().get_config_dict(), "symmetric": self.symmetric}

    def forward(self, embeddings: Tensor, pairs: Tensor, labels: Tensor, subgroups: Tensor) -> Tensor:
        if bool((labels != 1).any()):
            raise LossError(
                f"MultipleNegativesRankingLoss learns from pairs that belong together, of score 1, and one of score "
                f"{float(labels[labels != 1][0])} came: leave such pairs out, or take ContrastiveLoss"
            )
        left, right = embeddings[pairs[:, 0]], embeddings[pairs[:, 1]]
        similarities = self.distance_metric.similarity_matrix(left, right)
        return ranking_loss(self.scale * similarities, symmetric=self.symmetric)


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
        return ranking_loss(self.scale * unit(queries) @ unit(answers).T, symmetric=True)
