"""The models of a sweep: a pretrained trunk, pooling, and a head that starts as no head at all.

An untrained encoder with a `ResidualHead` gives exactly the pretrained embedding: of EfficientNet-Lite0 the 1,280
pooled features, normalised. So "untrained" in a table is what a user has for nothing, and whatever training adds is
added to that.

Pooling over tokens is a module of its own, so that an encoder can be cut right after it: 384 numbers kept for a text
in place of 384 for each of its tokens.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FirstToken",
    "ImageEncoder",
    "MeanPool",
    "PooledOutput",
    "TextEncoder",
]


class MeanPool(nn.Module):
    """The mean of the tokens that are no padding: ``[batch, tokens, dim]`` and a 0/1 mask give ``[batch, dim]``."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


class FirstToken(nn.Module):
    """The first token, which some models are trained to sum a text up in: ``[batch, tokens, dim]`` to ``[batch,
    dim]``."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return hidden[:, 0]


class PooledOutput(nn.Module):
    """One vector of what an image model gives: a vector as it is, maps and tokens by their mean.

    A ModelOutput's ``pooler_output`` is preferred to the mean of its ``last_hidden_state``.
    """

    def forward(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            pooled = getattr(output, "pooler_output", None)
            output = output.last_hidden_state if pooled is None else pooled
        if output.dim() == 4:  # [batch, dim, height, width]
            return output.flatten(2).mean(2)
        return output.mean(1) if output.dim() == 3 else output  # [batch, tokens, dim]


class ImageEncoder(nn.Module):
    """Images ``[batch, 3, height, width]`` to embeddings of length one, or to class scores.

    Args:
        trunk: A model from images to features.
        head: From features ``[batch, dim]`` to what is asked for.
        unit: Whether what comes out is made of length one.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, unit: bool = True) -> None:
        super().__init__()
        self.trunk = trunk
        self.pool = PooledOutput()
        self.head = head
        self.unit = unit

    def forward(self, images: Tensor) -> Tensor:
        out = self.head(self.pool(self.trunk(images)))
        return F.normalize(out, dim=-1) if self.unit else out


class TextEncoder(nn.Module):
    """Token ids ``[batch, tokens]`` to embeddings of length one, or to class scores.

    Args:
        trunk: A transformers encoder that gives ``last_hidden_state``.
        head: From features ``[batch, dim]`` to what is asked for.
        unit: Whether what comes out is made of length one.
        pool: How tokens become one vector; `MeanPool` if None.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, unit: bool = True, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.pool = MeanPool() if pool is None else pool
        self.head = head
        self.unit = unit

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        out = self.head(self.pool(hidden, attention_mask))
        return F.normalize(out, dim=-1) if self.unit else out
