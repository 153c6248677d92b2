"""Center loss: each group has a learned centre, and its objects are drawn there.

It does not push groups apart, so it is added to a loss that does. At 384 numbers, the loss is ``lambda_c`` times the
mean over all objects and numbers of the squared difference between the embedding, at length one, and the centre of its
group. (Wen et al., *A Discriminative Feature Learning Approach for Deep Face Recognition*, 2016, equation 2; the mean
and the length as in Quaterion. The centres are learned by the optimiser, not moved by the paper's own rule.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.similarity.distances import unit
from torchrecycle.similarity.losses.base import KnownGroupsLoss

__all__ = ["CenterLoss"]


class CenterLoss(KnownGroupsLoss):
    """Each group has a learned centre, and its objects are drawn there.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on; they are numbered from 0.
        lambda_c: what the loss is multiplied by.

    Raises:
        LossError: a size is less than 1.
    """

    def __init__(self, embedding_size: int, num_groups: int, lambda_c: float = 0.5) -> None:
        super().__init__(embedding_size, num_groups)
        self.lambda_c = lambda_c
        self.centers = nn.Parameter(torch.empty(num_groups, embedding_size))
        nn.init.xavier_uniform_(self.centers)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "lambda_c": self.lambda_c}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        return self.lambda_c * F.mse_loss(unit(embeddings), self.centers[groups])
