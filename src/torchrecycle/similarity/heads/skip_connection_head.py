"""A linear layer beside the embedding, let in through gates: the pretrained embedding at first, for all it is worth.

With an input of 512 numbers and one layer it has 263,168 parameters. The gates start at ``sigmoid(-4) = 0.018``, so
that training begins from what the encoder knows and takes in only as much of the new layer as helps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError

__all__ = ["SkipConnectionHead"]


class SkipConnectionHead(EncoderHead):
    """``x + linear(dropout(x)) * sigmoid(gates)``, once or several times.

    Args:
        input_embedding_size: Width of the embeddings, in and out.
        dropout: Of the whole input, as of `EncoderHead`.
        skip_dropout: Of what the linear layers see only, so that the embedding beside them stays whole.
        n_layers: How many such layers follow one another.
    """

    takes_vectors = True

    def __init__(
        self, input_embedding_size: int, dropout: float = 0.0, skip_dropout: float = 0.0, n_layers: int = 1
    ) -> None:
        super().__init__(input_embedding_size, dropout=dropout)
        if n_layers < 1:
            raise HeadError(f"n_layers is {n_layers}: a SkipConnectionHead has one layer or more")
        size = self.output_size
        for i in range(n_layers):
            self.register_parameter(f"gates_{i}", nn.Parameter(torch.empty(size)))
            self.add_module(f"fc_{i}", nn.Linear(size, size))
        self.skip_dropout: nn.Module = nn.Dropout(p=skip_dropout) if skip_dropout > 0.0 else nn.Identity()
        self._skip_dropout_prob = skip_dropout
        self._n_layers = n_layers
        self.reset_parameters()

    @property
    def output_size(self) -> int:
        assert self.input_embedding_size is not None
        return self.input_embedding_size

    def transform(self, input_vectors: Tensor) -> Tensor:
        for i in range(self._n_layers):
            layer, gates = self.get_submodule(f"fc_{i}"), self.get_parameter(f"gates_{i}")
            input_vectors = layer(self.skip_dropout(input_vectors)) * torch.sigmoid(gates) + input_vectors
        return input_vectors

    def reset_parameters(self) -> None:
        """Shut the gates, all but 1.8 %."""
        for i in range(self._n_layers):
            nn.init.constant_(self.get_parameter(f"gates_{i}"), -4.0)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "skip_dropout": self._skip_dropout_prob, "n_layers": self._n_layers}
