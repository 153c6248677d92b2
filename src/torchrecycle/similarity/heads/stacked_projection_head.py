"""Linear layers of given widths with an activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError

__all__ = ["StackedProjectionHead"]


class StackedProjectionHead(EncoderHead):
    """From 768 numbers over 1,024 to 128: ``StackedProjectionHead(768, [1024, 128])``.

    Args:
        input_embedding_size: Width of what it takes.
        output_sizes: Width of what each of the linear layers gives; the last one is `output_size`.
        activation_fn: Name of a function in `torch.nn.functional`, applied between the layers and not after the last.
        dropout: As of `EncoderHead`.
    """

    takes_vectors = True

    def __init__(
        self,
        input_embedding_size: int,
        output_sizes: Sequence[int],
        activation_fn: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(input_embedding_size, dropout=dropout)
        if not output_sizes or min(output_sizes) < 1:
            raise HeadError(
                f"output_sizes is {list(output_sizes)}: give one width or more, each from 1, as [1024, 128]"
            )
        _must_be_function(activation_fn)
        self._output_sizes = list(output_sizes)
        self._activation_fn = activation_fn
        modules: list[nn.Module] = []
        for before, size in zip([input_embedding_size, *output_sizes], output_sizes, strict=False):
            modules += [Activation(activation_fn)] if modules else []
            modules += [nn.Linear(before, size)]
        self._stack = nn.Sequential(*modules)

    @property
    def output_size(self) -> int:
        return self._output_sizes[-1]

    def transform(self, input_vectors: Tensor) -> Tensor:
        return self._stack(input_vectors)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            **super().get_config_dict(),
            "output_sizes": self._output_sizes,
            "activation_fn": self._activation_fn,
        }


class Activation(nn.Module):
    """A function of `torch.nn.functional`, by name.

    Args:
        activation_fn: its name, as ``"relu"`` or ``"gelu"``.
    """

    def __init__(self, activation_fn: str) -> None:
        super().__init__()
        _must_be_function(activation_fn)
        self._activation_fn = activation_fn

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(F, self._activation_fn)(inputs)

    def extra_repr(self) -> str:
        return self._activation_fn


def _must_be_function(name: str) -> None:
    if name.startswith("_") or not callable(getattr(F, name, None)):
        raise HeadError(
            f"activation_fn is {name!r}, and torch.nn.functional has no function of that name: give one that it has, "
            "as 'relu', 'gelu', 'silu' or 'tanh'"
        )
