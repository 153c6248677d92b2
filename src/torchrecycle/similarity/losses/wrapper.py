"""Any loss and miner of pytorch-metric-learning, with the targets that our loaders give.

    PytorchMetricLearningWrapper(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner())(embeddings, groups)
    PytorchMetricLearningPairWrapper(losses.NTXentLoss())(embeddings, pairs, labels, subgroups)

That library knows groups only. A pair becomes a group of two: of 16 pairs, each of the 32 objects has one positive and
30 negatives. Where some pairs do not belong together, or where objects of other pairs are no negatives, what is
compared is said pair by pair instead: ``negatives="given"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.losses.base import GroupLoss, LossError, PairwiseLoss, one_of, require_library

__all__ = ["PytorchMetricLearningPairWrapper", "PytorchMetricLearningWrapper"]

_TWO_VIEWS = ("SelfSupervisedLoss", "VICRegLoss")
"""Losses that compare two views of each object, and know no groups."""

_ALONE = ("ManifoldLoss",)
"""Losses that look at the embeddings alone, and refuse groups."""


def _is_one_of(loss: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(loss).__mro__)


def _check(loss: Any, miner: Any) -> None:
    require_library("a loss of pytorch-metric-learning")
    from pytorch_metric_learning.losses import BaseMetricLossFunction, MultipleLosses
    from pytorch_metric_learning.losses.base_loss_wrapper import BaseLossWrapper
    from pytorch_metric_learning.miners import BaseMiner

    if not isinstance(loss, (BaseMetricLossFunction, BaseLossWrapper, MultipleLosses)):
        raise LossError(
            f"the loss must be one of pytorch-metric-learning, such as TripletMarginLoss(): {type(loss).__name__} came"
        )
    if miner is not None and not isinstance(miner, BaseMiner):
        raise LossError(
            f"the miner must be one of pytorch-metric-learning, such as BatchHardMiner(): {type(miner).__name__} came"
        )


def _scalar(value: Any, loss: nn.Module) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise LossError(
            f"{type(loss).__name__} gave a {type(value).__name__} that is no single number: give it a reducer that "
            "makes one, such as MeanReducer()"
        )
    return value.reshape(())


class PytorchMetricLearningWrapper(GroupLoss):
    """A loss of pytorch-metric-learning as a group loss.

    What the loss learns is found by ``parameters()``. It may be used with cross-batch memory where the library's own
    `CrossBatchMemory` takes it.

    Args:
        loss: an object of a class of ``pytorch_metric_learning.losses``.
        miner: one of ``pytorch_metric_learning.miners``; all pairs or triplets of the batch without one.

    Raises:
        LossError: they are not of that library, or compare two views of an object; or it is not installed.
    """

    def __init__(self, loss: Any, miner: Any = None) -> None:
        super().__init__()
        _check(loss, miner)
        if _is_one_of(loss, _TWO_VIEWS):
            raise LossError(
                f"{type(loss).__name__} compares two views of each object: give it pairs, through "
                "PytorchMetricLearningPairWrapper"
            )
        self.loss = loss
        self.miner = miner
        self.learns_groups = any(True for _ in loss.parameters())

    def get_config_dict(self) -> dict[str, Any]:
        """The classes' names: objects cannot be said in JSON."""
        return _described(self.loss, self.miner)

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        if _is_one_of(self.loss, _ALONE):
            return _scalar(self.loss(embeddings), self.loss)
        mined = None if self.miner is None else self.miner(embeddings, groups)
        return _scalar(self.loss(embeddings, groups, mined), self.loss)

    @property
    def supports_xbm(self) -> bool:
        from pytorch_metric_learning.losses import CrossBatchMemory

        return _is_one_of(self.loss, tuple(CrossBatchMemory.supported_losses()))

    def _xbm_loss(self, embeddings: Tensor, groups: Tensor, memory: Tensor, memory_groups: Tensor) -> Tensor:
        mined = None if self.miner is None else self.miner(embeddings, groups, memory, memory_groups)
        value = self.loss(embeddings, groups, mined, ref_emb=memory, ref_labels=memory_groups)
        return _scalar(value, self.loss)

    def _described(self) -> str:
        return type(self.loss).__name__


def _described(loss: nn.Module, miner: nn.Module | None) -> dict[str, Any]:
    return {"loss": type(loss).__name__, "miner": None if miner is None else type(miner).__name__}


class PytorchMetricLearningPairWrapper(PairwiseLoss):
    """A loss of pytorch-metric-learning as a loss on pairs. The two of a pair are the views of one that compares views.

    Args:
        loss: an object of a class of ``pytorch_metric_learning.losses``.
        miner: one of ``pytorch_metric_learning.miners``.
        negatives: what an object is compared with beside its partner. ``batch``: all other objects of the batch; the
            pairs must all be of score 1, and subgroups are not looked at. ``given``: the other objects of pairs of
            score 0 that it is in, and all of other subgroups; nothing can be mined then.

    Raises:
        LossError: they are not of that library; no such ``negatives``; a miner with ``given``.
    """

    def __init__(self, loss: Any, miner: Any = None, *, negatives: str = "batch") -> None:
        super().__init__()
        _check(loss, miner)
        self.negatives = one_of(negatives, ("batch", "given"), "negatives")
        self.compares_all_pairs = negatives == "batch"
        if _is_one_of(loss, _TWO_VIEWS) and (negatives == "given" or miner is not None):
            raise LossError(f"{type(loss).__name__} compares the two of a pair: it takes no miner, and no negatives")
        if negatives == "given" and miner is not None:
            raise LossError(
                f"{type(miner).__name__} chooses among groups, and with negatives='given' it is said pair by pair what "
                "is compared: leave one of them out"
            )
        self.loss = loss
        self.miner = miner

    def get_config_dict(self) -> dict[str, Any]:
        """The classes' names: objects cannot be said in JSON."""
        return {**_described(self.loss, self.miner), "negatives": self.negatives}

    def forward(self, embeddings: Tensor, pairs: Tensor, labels: Tensor, subgroups: Tensor) -> Tensor:
        if self.negatives == "given":
            return self._compare(embeddings, _given(pairs, labels, subgroups))
        groups = _twos(pairs, labels, len(embeddings))
        if _is_one_of(self.loss, _TWO_VIEWS):
            left, right = pairs.unbind(1)
            return _scalar(self.loss(embeddings[left], ref_emb=embeddings[right]), self.loss)
        mined = None if self.miner is None else self.miner(embeddings, groups)
        return _scalar(self.loss(embeddings, groups, mined), self.loss)

    def _compare(self, embeddings: Tensor, indices: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        try:
            value = self.loss(embeddings, None, indices)
        except ValueError as error:  # the library's word for "labels are required"
            raise LossError(
                f"{type(self.loss).__name__} cannot be told pair by pair what to compare ({error}): take "
                "ContrastiveLoss(), or negatives='batch'"
            ) from error
        return _scalar(value, self.loss)


def _twos(pairs: Tensor, labels: Tensor, objects: int) -> Tensor:
    """The pair's number for each of its two objects, ``[objects]``."""
    if bool((labels != 1).any()):
        raise LossError(
            f"with negatives='batch' all pairs belong together, of score 1, and one of score "
            f"{float(labels[labels != 1][0]):g} came: leave such pairs out, or say negatives='given'"
        )
    if not bool((torch.bincount(pairs.flatten(), minlength=objects) == 1).all()):
        raise LossError(
            "with negatives='batch' each object of a batch is in one pair: here some are in none or in several. Say "
            "negatives='given', or number them as groups"
        )
    groups = torch.empty(objects, dtype=torch.int64, device=pairs.device)
    groups[pairs] = torch.arange(len(pairs), device=pairs.device)[:, None]
    return groups


def _given(pairs: Tensor, labels: Tensor, subgroups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is compared, both ways round: anchors and positives, anchors and negatives."""
    if not bool(((labels == 0) | (labels == 1)).all()):
        odd = labels[(labels != 0) & (labels != 1)][0]
        raise LossError(
            f"with negatives='given' a pair belongs together, score 1, or not, score 0, and a score of {float(odd):g} "
            "came: round it, or take ContrastiveLoss of torchrecycle.similarity, which weighs by it"
        )
    left, right = pairs.unbind(1)
    negative = subgroups[:, None] != subgroups
    positive = torch.zeros_like(negative)
    together = labels == 1
    negative[left, right] = negative[right, left] = ~together
    positive[left, right] = positive[right, left] = together
    return *positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True)  # pyright: ignore[reportReturnType]
