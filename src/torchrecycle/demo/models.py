"""The two encoders of the demo: a pretrained trunk, then a head that starts as no head at all.

An untrained `ImageEncoder` gives exactly the pretrained embedding: the 1,280 pooled features of EfficientNet-Lite0,
normalised. So "untrained" in the demo's tables is what a user has for nothing, and whatever training adds is added to
that. The head is ``x + linear(x)`` with a linear layer of zeros, and weight decay pulls it back to the pretrained
embedding, where it would pull a linear layer that starts as the identity towards giving nothing.

Pooling over tokens is a module of its own, so that an encoder can be cut right after it: 384 numbers kept for a text
in place of 384 for each of its tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ImageEncoder", "MeanPool", "ResidualHead", "TextEncoder"]


class ResidualHead(nn.Module):
    """``x + linear(x)``, the identity until it is trained.

    Args:
        dim: Width of the embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class MeanPool(nn.Module):
    """The mean of the tokens that are no padding: ``[batch, tokens, dim]`` and a 0/1 mask give ``[batch, dim]``."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


class ImageEncoder(nn.Module):
    """Images ``[batch, 3, height, width]`` to embeddings ``[batch, dim]`` of length one.

    Args:
        trunk: A model from images to pooled features, such as `torchrecycle.demo.weights.image_trunk` gives.
        dim: How many features those are.
    """

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ResidualHead(dim)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(images)), dim=-1)


class TextEncoder(nn.Module):
    """Token ids ``[batch, tokens]`` to embeddings ``[batch, dim]`` of length one, as all-MiniLM-L6-v2 makes them.

    Args:
        trunk: A transformers encoder that gives ``last_hidden_state``.
        dim: Its width.
    """

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pool = MeanPool()
        self.head = ResidualHead(dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.head(self.pool(hidden, attention_mask)), dim=-1)
