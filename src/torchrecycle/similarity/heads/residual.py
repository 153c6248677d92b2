"""Heads that are no head until they are trained: what a sweep starts from.

An encoder with a `ResidualHead` gives exactly the pretrained embedding at first, so whatever training adds is added
to that: ``x + linear(x)`` with a linear layer of zeros. Weight decay pulls it back to the pretrained embedding, where
it would pull a linear layer that starts as the identity towards giving nothing. A classifier's head is a linear layer
of zeros, so that all classes are as likely at the start.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead

__all__ = ["HeadKind", "ResidualHead", "ResidualMlpHead", "class_head", "embedding_head"]


class ResidualHead(EncoderHead):
    """``x + linear(x)``, the identity until it is trained.

    Args:
        dim: Width of the embedding.
    """

    takes_vectors = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.linear = _zeros(nn.Linear(dim, dim))

    @property
    def output_size(self) -> int:
        return self.linear.out_features

    def transform(self, input_vectors: Tensor) -> Tensor:
        return input_vectors + self.linear(input_vectors)

    def get_config_dict(self) -> dict[str, Any]:
        return {"dim": self.input_embedding_size}


class ResidualMlpHead(EncoderHead):
    """``x + mlp(x)``, the identity until it is trained.

    Args:
        dim: Width of the embedding, and of the layer inside.
    """

    takes_vectors = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.layers = _mlp(dim, dim)

    @property
    def output_size(self) -> int:
        assert self.input_embedding_size is not None
        return self.input_embedding_size

    def transform(self, input_vectors: Tensor) -> Tensor:
        return input_vectors + self.layers(input_vectors)

    def get_config_dict(self) -> dict[str, Any]:
        return {"dim": self.input_embedding_size}


def _zeros(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _mlp(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), _zeros(nn.Linear(dim, out)))


HeadKind = Literal["linear", "mlp"]


def embedding_head(kind: HeadKind, dim: int) -> EncoderHead:
    """From features to an embedding as wide: the identity at first, plus one layer or two."""
    return ResidualMlpHead(dim) if kind == "mlp" else ResidualHead(dim)


def class_head(kind: HeadKind, dim: int, classes: int) -> nn.Module:
    """From features to class scores, by one layer or two; all scores are nought at first."""
    return _mlp(dim, classes) if kind == "mlp" else _zeros(nn.Linear(dim, classes))
