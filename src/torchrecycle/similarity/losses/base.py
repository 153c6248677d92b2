"""What all losses on embeddings have in common: who calls them with what, and what is refused.

There are two kinds, told by what a batch carries beside 32 embeddings ``[32, 384]``:

    GroupLoss      loss(embeddings, groups)                       groups [32]: 0 0 0 0 1 1 1 1 ...
    PairwiseLoss   loss(embeddings, pairs, labels, subgroups)     pairs [16, 2]: (0, 16), (1, 17), ...

so ``loss(embeddings, **targets)`` suits either, and a loss of one kind that is given the targets of the other says
which loss takes them. `KnownGroupsLoss` is a group loss that learns something for each group, and so must know how
many there are.

The checks are made in ``__call__``, not in ``forward``, so that a class written by a user has them too. There the
embeddings also become float32 and autocast is switched off: bfloat16 tells cosines near 1 apart by 0.004 only, which is
too coarse to say which of two objects is the harder one.

A batch may hold nothing to learn from (no two of a group, one pair alone). Its loss is 0 with a gradient of 0, so that
a training loop need not ask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.distances import Distance

__all__ = [
    "GroupLoss",
    "KnownGroupsLoss",
    "LossError",
    "LossTargetsError",
    "PairwiseLoss",
    "SimilarityLoss",
    "XbmError",
    "library",
    "no_loss",
    "one_of",
    "require_library",
]


class LossError(RecycleError, ValueError):
    """There is no such loss, or what it is given is not of the form that it works on."""


class LossTargetsError(RecycleError, TypeError):
    """A loss for groups was given pairs, or the other way round."""


class XbmError(RecycleError, NotImplementedError):
    """The loss has no form for cross-batch memory."""


def require_library(what: str) -> None:
    """
    Raises:
        LossError: pytorch-metric-learning, which this needs, is not installed.
    """
    if find_spec("pytorch_metric_learning") is None:
        raise LossError(
            f'{what} needs pytorch-metric-learning, which is not installed: pip install "torchrecycle[similarity]"'
        )


def library() -> ModuleType:
    """Our part of pytorch-metric-learning, `losses.library`, loaded on first use.

    Raises:
        LossError: the package is not installed.
    """
    require_library("this loss")
    return import_module("torchrecycle.similarity.losses.library")


def no_loss(embeddings: Tensor) -> Tensor:
    """0 with a gradient of 0, for a batch that has nothing to learn from. NaN stays NaN."""
    return (embeddings * 0).sum()


def one_of(given: str, known: tuple[str, ...], what: str) -> str:
    """The word, if it is one of the known.

    Raises:
        LossError: it is not.
    """
    if given not in known:
        choices = ", ".join(f"'{word}'" for word in known)
        raise LossError(f"{what} {given!r} is not known: give one of {choices}")
    return given


class SimilarityLoss(nn.Module, ABC):
    """A loss on embeddings.

    Args:
        distance_metric_name: how embeddings are compared.

    Raises:
        DistanceError: there is no such distance.
    """

    def __init__(self, distance_metric_name: Distance | str = Distance.COSINE) -> None:
        super().__init__()
        self.distance_metric = Distance.get_by_name(distance_metric_name)

    @property
    def distance_metric_name(self) -> Distance:
        """How embeddings are compared: `distance_metric`, which is equal to its name."""
        return self.distance_metric

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that it was made with, ready for JSON: ``type(loss)(**loss.get_config_dict())`` is its like."""
        return {"distance_metric_name": self.distance_metric.value}

    def _in_full_precision(self, embeddings: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        if embeddings.dtype in (torch.float16, torch.bfloat16):
            embeddings = embeddings.float()
        device = embeddings.device.type
        if not torch.is_autocast_enabled(device):
            return run(embeddings)
        with torch.autocast(device, enabled=False):
            return run(embeddings)

    def _check_embeddings(self, embeddings: Any, what: str = "embeddings") -> None:
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
            raise LossError(
                f"{type(self).__name__} takes {what} as floating-point numbers of shape [batch, dim]: "
                f"{_said(embeddings)} came. Feature maps and tokens go through a head that makes one vector of them"
            )


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def _range(numbers: Tensor) -> tuple[int, int]:
    """The least and the greatest, in one transfer from a GPU; two zeros if there are no numbers."""
    if numbers.numel() == 0:
        return 0, 0
    lowest, highest = torch.stack(torch.aminmax(numbers)).tolist()
    return lowest, highest


class GroupLoss(SimilarityLoss):
    """A loss that knows of each object to which group it belongs. Write ``forward(embeddings, groups)``."""

    learns_groups: bool = False
    """Whether an object is compared with what was learned for the groups, and not with other objects of the batch."""

    @abstractmethod
    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        """
        Args:
            embeddings: ``[batch, dim]``, of any length.
            groups: ``[batch]``, whole numbers: objects of the same are alike.

        Returns:
            a scalar
        """

    def _checked_call(self, embeddings: Tensor, groups: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if groups is None:
            raise LossTargetsError(
                f"{type(self).__name__} needs groups, and {_names(kwargs)} came: give it a data set of "
                "SimilarityGroupSample, or take a loss for pairs, such as MultipleNegativesRankingLoss, "
                "ContrastiveLoss, or PytorchMetricLearningPairWrapper around one of pytorch-metric-learning"
            )
        self._check_embeddings(embeddings)
        groups = self._checked_groups(embeddings, groups)
        if len(embeddings) == 0:
            return no_loss(embeddings)
        call = super().__call__
        return self._in_full_precision(embeddings, lambda full: call(full, groups, *args, **kwargs))

    __call__: Callable[..., Tensor] = _checked_call

    def _checked_groups(self, embeddings: Tensor, groups: Any, what: str = "groups") -> Tensor:
        whole = isinstance(groups, Tensor) and not groups.is_floating_point() and groups.dtype != torch.bool
        if not whole or groups.shape != embeddings.shape[:1]:
            raise LossError(
                f"{type(self).__name__} takes {what} as one whole number for each of the {len(embeddings)} "
                f"embeddings, [{len(embeddings)}]: {_said(groups)} came"
            )
        return groups.to(embeddings.device, torch.int64)

    @property
    def supports_xbm(self) -> bool:
        """Whether it has a form for cross-batch memory."""
        mine = type(self)
        return mine._xbm_loss is not GroupLoss._xbm_loss or mine.xbm_loss is not GroupLoss.xbm_loss

    def xbm_loss(self, embeddings: Tensor, groups: Tensor, memory_embeddings: Tensor, memory_groups: Tensor) -> Tensor:
        """The loss between the objects of a batch and those of a memory, in which they are not.

        Args:
            embeddings: ``[batch, dim]``, the anchors.
            groups: ``[batch]``
            memory_embeddings: ``[kept, dim]``, what they are compared with, on any device; no gradient goes there.
            memory_groups: ``[kept]``

        Returns:
            a scalar; 0 if the batch or the memory is empty.

        Raises:
            XbmError: the loss has no such form.
        """
        if not self.supports_xbm:
            raise XbmError(
                f"{self._described()} cannot be used with cross-batch memory: take TripletLoss, OnlineContrastiveLoss, "
                "CircleLoss, or PytorchMetricLearningWrapper around a loss that takes ref_emb"
            )
        self._check_embeddings(embeddings)
        self._check_embeddings(memory_embeddings, "embeddings of the memory")
        groups = self._checked_groups(embeddings, groups)
        kept = self._checked_groups(memory_embeddings, memory_groups, "groups of the memory")
        if embeddings.shape[1] != memory_embeddings.shape[1]:
            raise LossError(
                f"embeddings of {embeddings.shape[1]} numbers came, and a memory of embeddings of "
                f"{memory_embeddings.shape[1]}"
            )
        if len(kept) == 0 or len(groups) == 0:
            return no_loss(embeddings)
        memory, kept = memory_embeddings.detach(), kept.to(groups.device)
        return self._in_full_precision(embeddings, lambda full: self._xbm_loss(full, groups, memory.to(full), kept))

    def _xbm_loss(self, embeddings: Tensor, groups: Tensor, memory: Tensor, memory_groups: Tensor) -> Tensor:
        raise NotImplementedError

    def _described(self) -> str:
        return type(self).__name__


def _names(kwargs: dict[str, Any]) -> str:
    return ", ".join(kwargs) or "none"


class KnownGroupsLoss(GroupLoss):
    """A group loss that learns something for each of the groups, which are numbered from 0.

    What it has learned is of no use after the training; but it must be trained: pass ``loss.parameters()`` to the
    optimiser in `configure_optimizers`; `fit` warns where they are not.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on.

    Raises:
        LossError: one of them is less than 1.
    """

    learns_groups = True

    def __init__(self, embedding_size: int, num_groups: int) -> None:
        super().__init__()
        if embedding_size < 1 or num_groups < 1:
            raise LossError(
                f"{type(self).__name__} needs at least one number and one group: embedding_size={embedding_size} and "
                f"num_groups={num_groups} came"
            )
        self.embedding_size = embedding_size
        self.num_groups = num_groups

    def get_config_dict(self) -> dict[str, Any]:
        return {"embedding_size": self.embedding_size, "num_groups": self.num_groups}

    def _checked_groups(self, embeddings: Tensor, groups: Any, what: str = "groups") -> Tensor:
        groups = super()._checked_groups(embeddings, groups, what)
        name = type(self).__name__
        if embeddings.shape[1] != self.embedding_size:
            raise LossError(
                f"{name} was made for embeddings of {self.embedding_size} numbers, and {embeddings.shape[1]} came: "
                "embedding_size is the output_size of the head"
            )
        # checked here since on a GPU the number of a group that is not there ends the process
        lowest, highest = _range(groups)
        if lowest < 0 or highest >= self.num_groups:
            raise LossError(
                f"{name} knows the groups 0 to {self.num_groups - 1}, and those of the batch are {lowest} to "
                f"{highest}: number them from 0, and give their number as num_groups"
            )
        return groups


class PairwiseLoss(SimilarityLoss):
    """A loss that knows of two objects how alike they are. Write ``forward(embeddings, pairs, labels, subgroups)``."""

    compares_all_pairs: bool = False
    """Whether the objects of all other pairs of a batch are negatives, whatever their subgroup."""

    @abstractmethod
    def forward(self, embeddings: Tensor, pairs: Tensor, labels: Tensor, subgroups: Tensor) -> Tensor:
        """
        Args:
            embeddings: ``[objects, dim]``, of any length; a loader gives all left objects, then all right ones.
            pairs: ``[pairs, 2]``, rows of the embeddings.
            labels: ``[pairs]``, 1 where the two belong together, 0 where they do not.
            subgroups: ``[objects]``; objects of different ones do not belong together.

        Returns:
            a scalar
        """

    def _checked_call(
        self, embeddings: Tensor, pairs: Any = None, labels: Any = None, subgroups: Any = None, **kwargs: Any
    ) -> Tensor:
        if pairs is None:
            raise LossTargetsError(
                f"{type(self).__name__} needs pairs, and {_names(kwargs)} came: give it a data set of "
                "SimilarityPairSample, or take a loss for groups, such as TripletLoss, OnlineContrastiveLoss, or "
                "PytorchMetricLearningWrapper around one of pytorch-metric-learning"
            )
        self._check_embeddings(embeddings)
        self._check_pairs(embeddings, pairs, labels, subgroups)
        if len(pairs) == 0:
            return no_loss(embeddings)
        call = super().__call__
        return self._in_full_precision(embeddings, lambda full: call(full, pairs, labels, subgroups, **kwargs))

    __call__: Callable[..., Tensor] = _checked_call

    def _check_pairs(self, embeddings: Tensor, pairs: Any, labels: Any, subgroups: Any) -> None:
        name, objects = type(self).__name__, len(embeddings)
        if not isinstance(pairs, Tensor) or pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
            raise LossError(f"{name} takes pairs as rows of the embeddings, [pairs, 2]: {_said(pairs)} came")
        lowest, highest = _range(pairs)
        if len(pairs) and not 0 <= lowest <= highest < objects:
            raise LossError(f"{name}: the pairs name rows {lowest} to {highest}, and there are {objects} embeddings")
        for given, count, what in ((labels, len(pairs), "labels"), (subgroups, objects, "subgroups")):
            if not isinstance(given, Tensor) or given.shape != (count,):
                raise LossError(
                    f"{name} takes {what} of shape [{count}], with {len(pairs)} pairs and {objects} embeddings: "
                    f"{_said(given)} came"
                )
