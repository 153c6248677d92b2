"""Several softmaxes beside one another: each part of the embedding is a distribution over some hidden classes.

Eight groups of sixteen make an embedding of 128 numbers, and how flat a group is says how unsure the model is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError

__all__ = ["SoftmaxEmbeddingsHead", "SoftmaxHead"]


class SoftmaxEmbeddingsHead(EncoderHead):
    """A linear layer, cut into groups, of which each is made a distribution.

    Args:
        output_groups: How many groups there are.
        output_size_per_group: How many numbers are in each; they are positive and sum to 1.
        input_embedding_size: Width of what it takes.
        dropout: As of `EncoderHead`.
    """

    takes_vectors = True

    def __init__(
        self, output_groups: int, output_size_per_group: int, input_embedding_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__(input_embedding_size, dropout=dropout)
        if min(output_groups, output_size_per_group) < 1:
            raise HeadError(
                f"{output_groups} groups of {output_size_per_group} numbers: both output_groups and "
                "output_size_per_group are to be whole numbers from 1"
            )
        self.output_groups = output_groups
        self.output_size_per_group = output_size_per_group
        self.projection_layer = nn.Linear(input_embedding_size, self.output_size)

    @property
    def output_size(self) -> int:
        return self.output_size_per_group * self.output_groups

    def transform(self, input_vectors: Tensor) -> Tensor:
        """``[batch, ..., input_embedding_size]`` to ``[batch, ..., output_groups * output_size_per_group]``."""
        projected = self.projection_layer(input_vectors)
        groups = projected.unflatten(-1, (self.output_groups, self.output_size_per_group))
        return torch.softmax(groups, dim=-1).flatten(-2)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            **super().get_config_dict(),
            "output_groups": self.output_groups,
            "output_size_per_group": self.output_size_per_group,
        }


SoftmaxHead = SoftmaxEmbeddingsHead
