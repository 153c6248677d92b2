"""What can be learned: which class an object has, which objects are alike, which text belongs to which.

`Classify` trains class scores and counts hits. `Similar` trains embeddings so that objects of classes that were never
seen lie beside each other, and measures R-precision. `Matching` does so for pairs of texts, and ranks all answers for
each question.

For an untrained model, a class is told by the nearest of the means of the training split's classes (Rocchio's rule):
what the pretrained features are good for with no training at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.similarity import CosineSoftmax, MultipleNegativesRanking, pair_ranks, r_precision_of_each
from torchrecycle.similarity.heads import HeadKind, class_head, embedding_head
from torchrecycle.similarity.loaders import GroupBatches
from torchrecycle.similarity.losses import LossError, learns_classes, loss_by_name
from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.datasets import PairBatches, two_by_two
from torchrecycle.sweep.objective_task import Feed, Objective
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Found
from torchrecycle.sweep.task import Evaluation, Split

__all__ = ["Classify", "Matching", "Similar"]

NEAREST = 5
"""How many neighbours of an object are shown."""


def _all_outputs(feed: Feed, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    found = [feed(batch) for batch in batches]
    outputs, targets = (torch.cat(part) for part in zip(*found, strict=True))
    return outputs.float().cpu(), targets.cpu()


def _evaluation(scores: dict[str, Tensor], found: Sequence[Found]) -> Evaluation:
    quality = {name: float(each.nanmean()) for name, each in scores.items()}
    return Evaluation(quality, {name: tuple(each.tolist()) for name, each in scores.items()}, tuple(found))


def _nearest(embeddings: Tensor, query: int, *, among: Tensor, leave_out: int | None) -> list[int]:
    similar = among @ embeddings[query]
    if leave_out is not None:
        similar[leave_out] = -torch.inf
    return similar.topk(min(NEAREST, len(among) - (leave_out is not None))).indices.tolist()


_SMOOTHING = {"cross-entropy": 0.0, "label-smoothing": 0.1}


class Classify(Objective):
    """Which of the known classes is it?

    Args:
        names: of the classes, in the order of their numbers.
        head: one layer, ``linear``, or two, ``mlp``.
        loss: ``cross-entropy``, or ``label-smoothing``: the same with a tenth of each label spread over all classes.

    Raises:
        LossError: there is no such loss.
    """

    metric = "accuracy"
    metrics = {
        "accuracy": "share of the objects whose class is told right",
        "mean recall": "the same for each class, then the mean over the classes: small classes count as much",
    }
    unit = False
    pretrained = "the pretrained features with the nearest class mean"

    def __init__(self, names: Sequence[str], *, head: HeadKind = "linear", loss: str | None = None) -> None:
        self.names = tuple(names)
        self.head: HeadKind = head
        self.loss = loss or "cross-entropy"
        if self.loss not in _SMOOTHING:
            raise LossError(f"there is no loss '{loss}' to tell classes apart: give {' or '.join(_SMOOTHING)}")

    def make_head(self, dim: int) -> nn.Module:
        return class_head(self.head, dim, len(self.names))

    def make_loss(self, dim: int, recipe: Recipe, seed: int) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=_SMOOTHING[self.loss])

    def evaluate(
        self, feed: Feed, batches: Iterable[Any], split: Split, queries: Sequence[int], *, known: Iterable[Any] | None
    ) -> Evaluation:
        outputs, labels = _all_outputs(feed, batches)
        if not outputs.isfinite().all():
            raise NotFiniteError(
                "an output holds NaN or infinity: the training has diverged, or the weights that it began with hold "
                "some already"
            )
        trained = known is None
        scores = outputs if known is None else _scores_by_mean(outputs, *_all_outputs(feed, known), len(self.names))
        said = scores.argmax(1)
        right = (said == labels).double()
        counts = torch.bincount(labels, minlength=len(self.names)).double()
        weight = len(labels) / (counts[labels] * (counts > 0).sum())
        each = {"accuracy": right, "mean recall": right * weight}
        embeddings = F.normalize(outputs - outputs.mean(0) if trained else outputs, dim=-1)
        sure = scores.softmax(1).max(1).values
        found = []
        for query in queries:
            nearest = _nearest(embeddings, query, among=embeddings, leave_out=query)
            note = f"told to be {self.names[int(said[query])]}"
            note += f" ({float(sure[query]):.0%} sure)" if trained else ""
            found.append(Found(query, tuple(nearest), tuple(bool(labels[n] == labels[query]) for n in nearest), note))
        return _evaluation(each, found)

    def clusters(self, split: Split) -> tuple[int, ...]:
        """Each object by itself: the classes are the ones that are asked for, and no sample of others."""
        return tuple(range(len(split)))


def _scores_by_mean(features: Tensor, known: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Cosines to the mean of each class among known objects; minus infinity for a class that has none."""
    sums = torch.zeros(classes, known.shape[1]).index_add_(0, labels, known)
    scores = F.normalize(features, dim=-1) @ F.normalize(sums, dim=-1).T
    return scores.masked_fill(torch.bincount(labels, minlength=classes) == 0, -torch.inf)


class Similar(Objective):
    """Which objects are of the same class, where the class was never trained on?

    Args:
        names: of the classes that are trained on, in the order of their numbers.
        head: one layer, ``linear``, or two, ``mlp``, beside the identity.
        loss: the name of a class of pytorch-metric-learning; `CosineSoftmax` if None.

    Raises:
        LossError: there is no such loss.
    """

    metric = "R-precision"
    metrics = {
        "R-precision": (
            "of an object's R nearest neighbours, R being how many others of its class there are, the share of "
            "its class"
        )
    }
    unit = True

    def __init__(self, names: Sequence[str], *, head: HeadKind = "linear", loss: str | None = None) -> None:
        self.names = tuple(names)
        self.head: HeadKind = head
        self.library_loss = loss
        self.compares = loss is not None and not learns_classes(loss)
        self.loss = loss or "softmax over cosines to one learned vector per training class"

    def make_head(self, dim: int) -> nn.Module:
        return embedding_head(self.head, dim)

    def make_loss(self, dim: int, recipe: Recipe, seed: int) -> nn.Module:
        if self.library_loss is not None:
            return loss_by_name(self.library_loss, classes=len(self.names), dim=dim, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        return CosineSoftmax(len(self.names), dim, scale=recipe.scale, generator=generator)

    def loader_arguments(self, split: Split, recipe: Recipe, generator: torch.Generator) -> dict[str, Any]:
        if self.compares:
            batches = GroupBatches(split.labels, batch_size=recipe.batch_size, generator=generator)
            return {"batch_sampler": batches}
        return super().loader_arguments(split, recipe, generator)

    def evaluate(
        self, feed: Feed, batches: Iterable[Any], split: Split, queries: Sequence[int], *, known: Iterable[Any] | None
    ) -> Evaluation:
        embeddings, labels = _all_outputs(feed, batches)
        each = r_precision_of_each(embeddings, labels)
        found = []
        for query in queries:
            nearest = _nearest(embeddings, query, among=embeddings, leave_out=query)
            found.append(Found(query, tuple(nearest), tuple(bool(labels[n] == labels[query]) for n in nearest), ""))
        return _evaluation({"R-precision": each}, found)

    def clusters(self, split: Split) -> tuple[int, ...]:
        return split.labels


class Matching(Objective):
    """Which right text belongs to the left one?

    Args:
        head: one layer, ``linear``, or two, ``mlp``, beside the identity.
        loss: the name of a class of pytorch-metric-learning, for which the two texts of a pair are a class of two;
            `MultipleNegativesRanking` if None.

    Raises:
        LossError: there is no such loss, or it learns a vector for each class.
    """

    metric = "reciprocal rank"
    metrics = {
        "reciprocal rank": "all right texts are ranked for each left one: the mean of 1 / rank of its own",
        "precision@1": "share of the left texts whose own right one is ranked first",
    }
    unit = True

    def __init__(self, *, head: HeadKind = "linear", loss: str | None = None) -> None:
        self.head: HeadKind = head
        self.library_loss = loss
        self.loss = loss or "multiple negatives ranking, both ways"
        if loss is not None and learns_classes(loss):
            raise LossError(
                f"{loss} learns a vector for each class, and pairs have none: give SupConLoss or NTXentLoss"
            )

    def make_head(self, dim: int) -> nn.Module:
        return embedding_head(self.head, dim)

    def make_loss(self, dim: int, recipe: Recipe, seed: int) -> nn.Module:
        if self.library_loss is not None:
            return loss_by_name(self.library_loss, classes=0, dim=dim, seed=seed)
        return MultipleNegativesRanking(scale=recipe.scale)

    def loader_arguments(self, split: Split, recipe: Recipe, generator: torch.Generator) -> dict[str, Any]:
        pairs = len(split) // 2
        return {"batch_sampler": PairBatches(pairs, batch_size=recipe.batch_size, generator=generator)}

    def losses(self, feed: Feed, loss: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
        for left, right in two_by_two(batches):
            one, pairs = feed(left)
            other, _ = feed(right)
            if self.library_loss is None:
                yield loss(one, other)
            else:
                yield loss(torch.cat([one, other]), pairs.repeat(2))

    def steps(self, batches: Sized) -> int:
        return len(batches) // 2

    def evaluate(
        self, feed: Feed, batches: Iterable[Any], split: Split, queries: Sequence[int], *, known: Iterable[Any] | None
    ) -> Evaluation:
        embeddings, _ = _all_outputs(feed, batches)
        left, right = embeddings.chunk(2)
        ranks = pair_ranks(left, right)
        pairs = len(left)
        found = []
        for query in queries:
            nearest = _nearest(left, query, among=right, leave_out=None)
            note = f"its own is ranked {int(ranks[query]):,} of {pairs:,}"
            found.append(Found(query, tuple(n + pairs for n in nearest), tuple(n == query for n in nearest), note))
        return _evaluation({"reciprocal rank": 1 / ranks.double(), "precision@1": (ranks == 1).double()}, found)

    def clusters(self, split: Split) -> tuple[int, ...]:
        return tuple(range(len(split) // 2))
