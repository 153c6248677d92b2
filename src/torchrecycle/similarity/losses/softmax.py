"""Softmax loss: which of the training groups is it, told by products with one learned vector per group.

With 98 groups, 384 numbers and the usual temperature of 0.05, the logits are ``embeddings @ kernel * 20``. Lengths
count; `CosineSoftmax` is the same on vectors of length one, and both share `class_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.similarity.losses.base import KnownGroupsLoss, LossError

__all__ = ["SoftmaxLoss", "class_cross_entropy"]


def class_cross_entropy(embeddings: Tensor, vectors: Tensor, groups: Tensor, *, scale: float) -> Tensor:
    """Mean cross-entropy over classes, with scaled products with one vector per class as logits.

    Args:
        embeddings: ``[batch, dim]``
        vectors: ``[classes, dim]``
        groups: ``[batch]``, the right class of each.
        scale: what the products are multiplied by: one over the temperature.
    """
    products = embeddings @ vectors.T
    return F.cross_entropy(scale * products, groups)


class SoftmaxLoss(KnownGroupsLoss):
    """Cross-entropy over the training groups.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on; they are numbered from 0.
        temperature: what the products are divided by.

    Raises:
        LossError: the temperature is not above 0, or a size is less than 1.
    """

    def __init__(self, embedding_size: int, num_groups: int, temperature: float = 0.05) -> None:
        super().__init__(embedding_size, num_groups)
        if not temperature > 0:
            raise LossError(f"the temperature of SoftmaxLoss must be above 0: {temperature} came")
        self.temperature = temperature
        self.kernel = nn.Parameter(torch.empty(embedding_size, num_groups))
        nn.init.normal_(self.kernel, std=0.01)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "temperature": self.temperature}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        return class_cross_entropy(embeddings, self.kernel.T, groups, scale=1 / self.temperature)
