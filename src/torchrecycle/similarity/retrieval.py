"""Retrieval metrics as `torchmetrics.Metric`: fed a batch at a time, computed over all of them.

    metric = RetrievalPrecision(k=5)
    for features, targets in loader:
        metric.update(model(features), **targets)    # {"groups": [32]}, or {"pairs": [16, 2], "labels": [16], ...}
    metric.compute()                                 # tensor(0.8312)

What is asked, what is right and how ties count is said in `torchrecycle.similarity.metrics`. The same class serves
groups and pairs, one kind at a time. Until `reset` a metric holds the embeddings that it has seen, without their graph:
8,000 of 384 numbers are 12 MB, which ``compute_on_cpu=True`` keeps out of a graphics card's memory. ``compute`` ranks a
block at a time; in a distributed run, all processes get the figure of all objects together.

``metric(embeddings, **targets)`` also gives the figure of the batch alone. There is none where a batch has nothing to
ask (its last one may hold a single pair): that is NaN, and a warning says so once. ``compute`` over everything raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from torchrecycle.errors import BatchError, RecycleWarning
from torchrecycle.similarity.distances import Distance
from torchrecycle.similarity.metrics import (
    AveragePrecision,
    Groups,
    Measure,
    NothingToAskError,
    Pairs,
    Precision,
    Recall,
    ReciprocalRank,
    Relevance,
    RPrecision,
    measure,
)

__all__ = [
    "RetrievalMAP",
    "RetrievalMetric",
    "RetrievalPrecision",
    "RetrievalRPrecision",
    "RetrievalRecall",
    "RetrievalReciprocalRank",
]


class _Batch(NamedTuple):
    """What is kept of a batch, each of one dimension: a process that saw no batch has empty ones to be gathered, which
    could not be done with others, as it does not know the width of the embeddings."""

    embeddings: Tensor
    """``[objects * dim]``"""
    shapes: Tensor
    """``[3]``: objects, dim, pairs"""
    groups: Tensor
    """``[objects]``, or none"""
    pairs: Tensor
    """``[pairs * 2]``, or none"""
    labels: Tensor
    """``[pairs]``"""
    subgroups: Tensor
    """``[pairs]``"""

    @classmethod
    def of(cls, embeddings: Tensor, relevance: Relevance) -> _Batch:
        none = torch.empty(0)
        groups, pairs, labels, subgroups = none, none, none, none
        if isinstance(relevance, Groups):
            groups = relevance.groups
        elif isinstance(relevance, Pairs):
            count = len(relevance.pairs)
            pairs = relevance.pairs
            labels = torch.ones(count) if relevance.scores is None else relevance.scores
            subgroups = torch.zeros(count) if relevance.subgroups is None else relevance.subgroups
            if subgroups.is_floating_point():  # which numbers they are does not count, only whether they are the same
                subgroups = subgroups.double().view(torch.long)
        return cls(
            embeddings.flatten(),
            torch.tensor([*embeddings.shape, pairs.numel() // 2]),
            groups,
            pairs.flatten(),
            labels,
            subgroups,
        )


def _pairs_of(pairs: Any, labels: Tensor | None, subgroups: Tensor | None) -> Pairs:
    """Targets as loaders give them: with the subgroup of each object, which is that of its pair."""
    count = len(pairs)
    if subgroups is None or len(subgroups) != 2 * count:
        return Pairs(pairs, labels, subgroups)
    left, right = subgroups.view(2, count)
    if bool((left != right).any()):
        raise BatchError(
            "subgroups= of 2 * pairs numbers are those of all left objects and then of all right ones, the same twice, "
            "and these differ: give one for each pair"
        )
    return Pairs(pairs, labels, left)


class RetrievalMetric(Metric):
    """Base class: any `Measure` of rankings. Use one of those below, or give it a measure of your own.

    Args:
        measure: a figure for each ranking.
        distance_metric_name: what to rank by.
        reduce_func: from the figures of all that asked, ``[asked]``, to one; None for all of them.
        distinguish: of pairs, only left objects ask, and only right ones are ranked; else all ask all.
        **arguments: of `torchmetrics.Metric`, such as ``compute_on_cpu``. Embeddings are kept in float32, unless
            ``set_dtype(torch.float64)`` says otherwise.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    embeddings: list[Tensor]
    shapes: list[Tensor]
    groups: list[Tensor]
    pairs: list[Tensor]
    labels: list[Tensor]
    subgroups: list[Tensor]

    def __init__(
        self,
        measure: Measure,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.measure = measure
        self.distance_metric_name = Distance.get_by_name(distance_metric_name)
        self.reduce_func = reduce_func
        self.distinguish = distinguish
        self._of_batch = False
        self._warned = False
        for name in _Batch._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        embeddings: Tensor,
        groups: Tensor | None = None,
        pairs: Tensor | None = None,
        labels: Tensor | None = None,
        subgroups: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            embeddings: ``[objects, dim]``
            groups: ``[objects]``, integers
            pairs: ``[pairs, 2]``, positions in `embeddings`; if given, `groups` must not be
            labels: ``[pairs]``, scores: above 0, the two belong together
            subgroups: ``[pairs]``, or ``[2 * pairs]``: of all left objects and then of all right ones

        Raises:
            BatchError: there are both or neither of groups and pairs, they do not fit the embeddings, or this metric
                holds objects of the other kind.
        """
        if (groups is None) == (pairs is None):
            raise BatchError(
                f"{type(self).__name__} takes groups= of the objects, or pairs= (with labels= and subgroups=), and "
                f"{'both' if groups is not None else 'neither'} came"
            )
        relevance = Groups(groups) if groups is not None else _pairs_of(pairs, labels, subgroups)
        try:
            relevance.check(len(embeddings))
        except ValueError as error:
            raise BatchError(str(error)) from None
        self._refuse_the_other_kind(relevance)
        batch = _Batch.of(embeddings.detach(), relevance)
        for name, values in batch._asdict().items():
            getattr(self, name).append(values.to(device=embeddings.device, dtype=self._dtype_of(name)))

    def _refuse_the_other_kind(self, relevance: Relevance) -> None:
        came, held, other = ("groups", "pairs", self.pairs)
        if isinstance(relevance, Pairs):
            came, held, other = ("pairs", "groups", self.groups)
        if any(map(len, other)):
            raise BatchError(
                f"this {type(self).__name__} holds {held}, and {came} came: take one metric for each, or reset() it in "
                "between"
            )

    def _dtype_of(self, name: str) -> torch.dtype:
        return {"embeddings": self.dtype, "labels": torch.float32}.get(name, torch.long)

    def compute(self) -> Tensor:
        """The figure over all batches since the last `reset`: a scalar, unless `reduce_func` says otherwise.

        Raises:
            NothingToAskError: no object has both a relative and a negative; or there was no batch.
            NotFiniteError: an embedding is not finite.
            BatchError: the processes hold different kinds, or embeddings of different widths.
        """
        try:
            embeddings, relevance = self._everything()
            figures = measure(embeddings, relevance, {"": self.measure}, distance=self.distance_metric_name)[""]
        except NothingToAskError as error:
            if not self._of_batch:
                raise
            self._warn(error)
            return torch.tensor(torch.nan, device=self.device)
        return self.reduce(figures[~figures.isnan()])

    def reduce(self, figures: Tensor) -> Tensor:
        """From figures of all that asked, ``[asked]``, to what `compute` gives."""
        figures = figures.float()
        return figures if self.reduce_func is None else self.reduce_func(figures)

    def _warn(self, error: NothingToAskError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} of one batch is NaN: {error}. Batches like this one will be NaN without "
                "further notice; the figure over all of them counts their objects",
                RecycleWarning,
                stacklevel=2,
            )

    def _everything(self) -> tuple[Tensor, Relevance]:
        kept = _Batch(*(self._whole(name) for name in _Batch._fields))
        objects, widths, pairs = kept.shapes.view(-1, 3).unbind(1)
        if not len(objects):
            raise NothingToAskError("nothing to ask: there was no batch. Call update(embeddings, **targets) first")
        if bool((widths != widths[0]).any()):
            raise BatchError(f"embeddings of {sorted(set(widths.tolist()))} numbers came to one {type(self).__name__}")
        if len(kept.groups) and len(kept.pairs):
            raise BatchError(f"of this {type(self).__name__}, one process holds groups and another pairs")
        embeddings = kept.embeddings.view(-1, int(widths[0]))
        if not len(kept.pairs):
            return embeddings, Groups(kept.groups)
        before = (objects.cumsum(0) - objects).repeat_interleave(pairs)  # a batch counts its objects from 0
        positions = kept.pairs.view(-1, 2) + before[:, None]
        return embeddings, Pairs(positions, kept.labels, kept.subgroups, distinguish=self.distinguish)

    def _whole(self, name: str) -> Tensor:
        """A state is a list of batches, or, once gathered from several processes, a tensor."""
        state = getattr(self, name)
        if isinstance(state, list) and not state:
            return torch.empty(0, dtype=self._dtype_of(name), device=self.device)
        return dim_zero_cat(state)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Add a batch, as `update`, and give the figure of it alone; NaN where it has nothing to ask."""
        self._of_batch = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._of_batch = False

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics gathers an empty list as one of floats, which the others' integers would be read into.
        for name in _Batch._fields:
            if not len(getattr(self, name)):
                setattr(self, name, [self._whole(name)])
        super()._sync_dist(*args, **kwargs)


class RetrievalPrecision(RetrievalMetric):
    """Precision@k: the share of the k nearest that are right, 0 to 1. Who has fewer than k relatives cannot reach 1.

    Args:
        k: how many of the nearest are looked at.
        distance_metric_name: what to rank by.
        reduce_func: as of `RetrievalMetric`.
        distinguish: as of `RetrievalMetric`.
        **arguments: of `torchmetrics.Metric`.
    """

    def __init__(
        self,
        k: int = 1,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(Precision(k), distance_metric_name, reduce_func, distinguish=distinguish, **arguments)
        self.k = k


class RetrievalRecall(RetrievalMetric):
    """Recall@k: the share of the relatives that are among the k nearest, 0 to 1.

    Args:
        k: how many of the nearest are looked at.
        distance_metric_name: what to rank by.
        reduce_func: as of `RetrievalMetric`.
        distinguish: as of `RetrievalMetric`.
        **arguments: of `torchmetrics.Metric`.
    """

    def __init__(
        self,
        k: int = 1,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(Recall(k), distance_metric_name, reduce_func, distinguish=distinguish, **arguments)
        self.k = k


class RetrievalReciprocalRank(RetrievalMetric):
    """One over the rank of the first relative, 0 to 1. Arguments as of `RetrievalMetric`, without the measure."""

    def __init__(
        self,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(ReciprocalRank(), distance_metric_name, reduce_func, distinguish=distinguish, **arguments)


class RetrievalRPrecision(RetrievalMetric):
    """The share of the R nearest that are right, R being how many relatives there are, 0 to 1. Arguments as of
    `RetrievalMetric`, without the measure."""

    def __init__(
        self,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(RPrecision(), distance_metric_name, reduce_func, distinguish=distinguish, **arguments)


class RetrievalMAP(RetrievalMetric):
    """Mean average precision: of an object, the mean precision at the ranks of its relatives, 0 to 1. Arguments as of
    `RetrievalMetric`, without the measure."""

    def __init__(
        self,
        distance_metric_name: Distance = Distance.COSINE,
        reduce_func: Callable[[Tensor], Tensor] | None = torch.mean,
        *,
        distinguish: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(AveragePrecision(), distance_metric_name, reduce_func, distinguish=distinguish, **arguments)
