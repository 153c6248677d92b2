"""What is needed of pytorch-metric-learning, made safe for embeddings without a length.

That library divides by a length of 1e-12 where there is none, so a zero embedding has a gradient of 1e12; and the
gradient of its ArcFace is NaN where an embedding lies exactly on its group's vector. Both are mended by the distance
that its losses are given: `Cosines` and `Chords`.

This module loads the library, and is itself loaded by the first loss that needs it: see `metric_learning`.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor, nn

from torchrecycle.similarity.distances import unit

__all__ = ["arcface", "circle", "cosface", "fast_ap"]


class Cosines(CosineSimilarity):
    """Cosines; zero vectors have a gradient of usual size."""

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        return unit(embeddings, dim)


class InnerCosines(Cosines):
    """Cosines that are never quite 1, where the angle has no gradient."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        limit = 1 - 4 * torch.finfo(query_emb.dtype).eps
        return super().compute_mat(query_emb, ref_emb).clamp(-limit, limit)


class Chords(LpDistance):
    """Squared euclidean distances of vectors of length one; zero vectors have a gradient of usual size."""

    def __init__(self) -> None:
        super().__init__(power=2)

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        return unit(embeddings, dim)


_losses: Any = losses  # its annotations are guessed from whole numbers as defaults


def arcface(embedding_size: int, num_groups: int, *, degrees: float, scale: float) -> nn.Module:
    """ArcFace, whose vectors are ``W``."""
    return _losses.ArcFaceLoss(num_groups, embedding_size, margin=degrees, scale=scale, distance=InnerCosines())


def cosface(embedding_size: int, num_groups: int, *, margin: float, scale: float) -> nn.Module:
    """CosFace, whose vectors are ``W``."""
    return _losses.CosFaceLoss(num_groups, embedding_size, margin=margin, scale=scale, distance=Cosines())


def circle(margin: float, scale: float) -> nn.Module:
    """Circle loss."""
    return _losses.CircleLoss(m=margin, gamma=scale, distance=Cosines())


def fast_ap(bins: int) -> nn.Module:
    """FastAP."""
    return _losses.FastAPLoss(num_bins=bins, distance=Chords())
