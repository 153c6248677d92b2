"""No head: what the encoders give is what is compared."""

from __future__ import annotations

from torch import Tensor

from torchrecycle.similarity.heads.encoder_head import EncoderHead

__all__ = ["EmptyHead"]


class EmptyHead(EncoderHead):
    """Gives back what it gets.

    Args:
        input_embedding_size: Width of the embeddings, in and out.
        dropout: As of `EncoderHead`.
    """

    takes_vectors = True

    def __init__(self, input_embedding_size: int, dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout=dropout)

    @property
    def output_size(self) -> int:
        assert self.input_embedding_size is not None
        return self.input_embedding_size

    def transform(self, input_vectors: Tensor) -> Tensor:
        return input_vectors
