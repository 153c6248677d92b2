"""Losses by name: those of pytorch-metric-learning, beside our own.

``loss_by_name("ArcFaceLoss", classes=98, dim=1280, seed=0)`` is that library's, with its usual margin. A loss that
learns a vector for each class takes plain batches; one that compares the objects of a batch wants several of each class
in it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from torchrecycle.similarity.losses.base import LossError, require_library

__all__ = ["learns_classes", "loss_by_name"]

USUAL = "SupConLoss, MultiSimilarityLoss, TripletMarginLoss, NTXentLoss, ArcFaceLoss, ProxyAnchorLoss"


def _library_class(name: str) -> Any:
    require_library(f"the loss '{name}'")
    from pytorch_metric_learning import losses

    found = getattr(losses, name, None)
    base = losses.BaseMetricLossFunction
    if not (isinstance(found, type) and issubclass(found, base)) or found is base or not _takes(found):
        raise LossError(
            f"there is no loss '{name}' that can be used here: give one of pytorch-metric-learning's that needs no "
            f"arguments, such as {USUAL}"
        )
    return found


def _needed(kind: Any) -> set[str]:
    """The arguments that have no default."""
    taken = inspect.signature(kind.__init__).parameters
    return {
        name
        for name, parameter in taken.items()
        if name != "self"
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _takes(kind: Any) -> bool:
    return _needed(kind) <= {"num_classes", "embedding_size"}


def learns_classes(name: str) -> bool:
    """Whether the loss holds a vector for each class.

    Raises:
        LossError: there is no such loss.
    """
    return "num_classes" in _needed(_library_class(name))


def loss_by_name(name: str, *, classes: int, dim: int, seed: int) -> nn.Module:
    """A loss of pytorch-metric-learning: of embeddings ``[batch, dim]`` and labels ``[batch]``.

    Args:
        name: of its class.
        classes: how many there are to train on.
        dim: width of the embeddings.
        seed: of the class vectors, if it learns some.

    Raises:
        LossError: there is no such loss.
    """
    kind = _library_class(name)
    given = {"num_classes": classes, "embedding_size": dim}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**{argument: given[argument] for argument in _needed(kind)})
