"""One trained number for each number of the embedding: so few that a small training set is enough."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead

__all__ = ["GatedHead"]


class GatedHead(EncoderHead):
    """``x * tanh(gates)``: weakens or turns around single numbers of the embedding.

    All gates are 2 at first, so that the head gives 0.964 of each number: the embedding as it was, to cosines.

    Args:
        input_embedding_size: Width of the embeddings, in and out.
        dropout: As of `EncoderHead`.
    """

    takes_vectors = True

    def __init__(self, input_embedding_size: int, dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout=dropout)
        self.gates = nn.Parameter(torch.empty(self.output_size))
        self.reset_parameters()

    @property
    def output_size(self) -> int:
        assert self.input_embedding_size is not None
        return self.input_embedding_size

    def transform(self, input_vectors: Tensor) -> Tensor:
        return input_vectors * torch.tanh(self.gates)

    def reset_parameters(self) -> None:
        """All numbers are let through."""
        nn.init.constant_(self.gates, 2.0)
