"""Data loaders over samples: batches of objects and of what is known about their likeness.

``GroupSimilarityDataLoader(samples, batch_size=32)`` gives ``(objects, {"groups": int64 [32]})``, and with
``objects_per_group=4`` batches of eight whole groups, which losses that compare the objects of a batch live on: with 98
groups at random, 23 objects of a batch of 32 are alone in it. ``PairSimilarityDataLoader`` gives the left
objects of a batch and then the right ones, for one forward over both:
``(2 * 32 objects, {"pairs": [32, 2], "labels": [32], "subgroups": [64]})``.

They are plain `DataLoader` with another collate function. Objects stay objects here; `torchrecycle.similarity.fit`
lets the model's encoders collate them, and reads kept rows in their place where an encoder is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from torchrecycle.errors import BatchError
from torchrecycle.similarity.samples import SimilarityGroupSample, SimilarityPairSample

__all__ = [
    "GroupBatches",
    "GroupSimilarityDataLoader",
    "PairSimilarityDataLoader",
    "PairsSimilarityDataLoader",
    "SimilarityDataLoader",
    "SimilarityGroupDataset",
    "group_targets",
    "objects_of",
    "pair_targets",
    "targets_of",
]


# -- from samples to objects and targets -------------------------------------------------------------------------------


def objects_of(samples: Sequence[Any], kind: type) -> list[Any]:
    """The objects of samples of one kind: of pairs, all left ones and then all right ones.

    Raises:
        BatchError: a sample is of another kind.
    """
    for sample in samples:
        if not isinstance(sample, kind):
            raise BatchError(
                f"the data set gives a {type(sample).__name__} where a {kind.__name__} is expected: let __getitem__ "
                f"return {_SHOWN[kind]}"
            )
    if kind is SimilarityGroupSample:
        return [sample.obj for sample in samples]
    return [sample.obj_a for sample in samples] + [sample.obj_b for sample in samples]


_SHOWN = {
    SimilarityGroupSample: "SimilarityGroupSample(obj=photo, group=371)",
    SimilarityPairSample: "SimilarityPairSample(obj_a=question, obj_b=answer)",
}


def group_targets(groups: Tensor) -> dict[str, Tensor]:
    """What group losses take besides embeddings.

    Args:
        groups: ``[batch]``, integers
    """
    return {"groups": groups.long()}


def pair_targets(scores: Tensor, subgroups: Tensor) -> dict[str, Tensor]:
    """What pairwise losses take besides embeddings of all left objects and then all right ones.

    Args:
        scores: ``[pairs]``
        subgroups: ``[pairs]``

    Returns:
        ``pairs`` ``[pairs, 2]``, positions in the batch of objects; ``labels`` ``[pairs]``, the scores; ``subgroups``
        ``[2 * pairs]``, of each object.
    """
    count = len(scores)
    first = torch.arange(count)
    return {
        "pairs": torch.stack([first, first + count], dim=1),
        "labels": scores.float(),
        "subgroups": subgroups.repeat(2),
    }


def targets_of(samples: Sequence[Any], kind: type) -> dict[str, Tensor]:
    """The targets of a batch of samples."""
    if kind is SimilarityGroupSample:
        return group_targets(torch.tensor([group_number(sample.group) for sample in samples]))
    scores = torch.tensor([float(sample.score) for sample in samples])
    return pair_targets(scores, torch.tensor([group_number(sample.subgroup) for sample in samples]))


def group_number(group: Any) -> int:
    """The number of a group, which may come as a NumPy or torch scalar.

    Raises:
        BatchError: it is no whole number.
    """
    try:
        number = int(group)
    except (TypeError, ValueError):
        number = None
    if number is None or number != group:
        raise BatchError(
            f"a group is {group!r}, a {type(group).__name__}: groups are whole numbers. Number them, for example with "
            "{name: number for number, name in enumerate(sorted(set(names)))}"
        )
    return number


# -- loaders -----------------------------------------------------------------------------------------------------------


class SimilarityDataLoader(DataLoader[Any]):
    """A `DataLoader` over samples of one kind. Use one of its two kinds.

    Args:
        dataset: map-style, of samples.
        batch_size: samples in a batch.
        **arguments: of ``torch.utils.data.DataLoader``.
    """

    sample_kind: ClassVar[type]
    """The class of the samples."""

    def __init__(self, dataset: Any, batch_size: int | None = 1, **arguments: Any) -> None:
        if type(self) is SimilarityDataLoader:
            raise TypeError("use GroupSimilarityDataLoader or PairSimilarityDataLoader, according to the samples")
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise BatchError(
                f"a {type(dataset).__name__} is no map-style data set: it needs __len__ and __getitem__, so that an "
                "index stands for a sample"
            )
        if "batch_sampler" in arguments:
            batch_size = 1
        if arguments.get("collate_fn") is None:
            arguments["collate_fn"] = type(self).pre_collate_fn
        super().__init__(dataset, batch_size=batch_size, **arguments)

    @classmethod
    def pre_collate_fn(cls, samples: Sequence[Any]) -> tuple[list[Any], dict[str, Tensor]]:
        """Samples to (objects, targets)."""
        samples = list(samples)
        return objects_of(samples, cls.sample_kind), targets_of(samples, cls.sample_kind)

    @property
    def collates_itself(self) -> bool:
        """Whether its collate function is a user's own, whose batches cannot be made of kept rows."""
        return getattr(self.collate_fn, "__func__", None) is not SimilarityDataLoader.pre_collate_fn.__func__


class GroupSimilarityDataLoader(SimilarityDataLoader):
    """Batches of `SimilarityGroupSample`: ``(objects, {"groups": int64 [batch]})``.

    Args:
        dataset: map-style, of `SimilarityGroupSample`.
        batch_size: objects in a batch.
        objects_per_group: if given, each batch consists of so many objects of each of its groups (`GroupBatches`).
        groups: the group of each sample, if it is at hand; with `objects_per_group` the data set is else read once.
        **arguments: of ``torch.utils.data.DataLoader``.
    """

    sample_kind = SimilarityGroupSample

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        *,
        objects_per_group: int | None = None,
        groups: Sequence[int] | None = None,
        **arguments: Any,
    ) -> None:
        if objects_per_group is not None:
            for name in ("shuffle", "sampler", "batch_sampler", "drop_last"):
                if arguments.pop(name, None) and name != "shuffle":
                    raise ValueError(f"objects_per_group= chooses the objects of a batch: leave out {name}=")
            arguments["batch_sampler"] = GroupBatches(
                groups if groups is not None else lambda: _groups_of(dataset),
                batch_size=batch_size or 1,
                each=objects_per_group,
                generator=arguments.pop("generator", None),
            )
        super().__init__(dataset, batch_size, **arguments)


def _groups_of(dataset: Any) -> list[int]:
    samples = (dataset[index] for index in range(len(dataset)))
    return [group_number(sample.group) for sample in samples]


class PairSimilarityDataLoader(SimilarityDataLoader):
    """Batches of `SimilarityPairSample`: all left objects and then all right ones, and the targets of `pair_targets`.

    Args:
        dataset: map-style, of `SimilarityPairSample`.
        batch_size: pairs in a batch.
        **arguments: of ``torch.utils.data.DataLoader``.
    """

    sample_kind = SimilarityPairSample


PairsSimilarityDataLoader = PairSimilarityDataLoader
"""The name that Quaterion has for it."""


class GroupBatches(Sampler[list[int]]):
    """Batches in which each group has several objects: what losses that compare objects with each other live on.

    A group with fewer objects gives some of them again. As many batches as plain ones would be; of a group that is
    large, an epoch sees some.

    Args:
        groups: The group of each object, or a function that gives them when they are first needed.
        batch_size: Objects in a step, at most: so many whole groups as fit, two at least.
        each: Objects of a group in a batch.
        generator: Draws groups and objects, anew for each iteration; the global one if none is given.
    """

    def __init__(
        self,
        groups: Sequence[int] | Callable[[], Sequence[int]],
        *,
        batch_size: int,
        each: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        if each < 2:
            raise ValueError(f"{each} objects of each group are none to compare with one another: give 2 or more")
        self._groups = groups
        self.batch_size, self.each, self.generator = batch_size, each, generator
        self._members: dict[int, list[int]] | None = None

    @property
    def members(self) -> dict[int, list[int]]:
        """The objects of each group."""
        if self._members is None:
            self._members = {}
            for index, group in enumerate(self._groups() if callable(self._groups) else self._groups):
                self._members.setdefault(group, []).append(index)
            if len(self._members) < 2:
                raise BatchError(
                    f"the data set has {len(self._members)} group: with no other group there is nothing to tell it from"
                )
            if max(map(len, self._members.values())) < 2:
                raise BatchError(
                    f"each of the {len(self._members)} groups has a single member: there are no two objects that "
                    "belong together, so there is nothing to learn"
                )
        return self._members

    def know(self, groups: Sequence[int]) -> GroupBatches:
        """The same batches, for whoever has the groups at hand: the data set is not read for them."""
        if self._members is not None or not callable(self._groups):
            return self
        return GroupBatches(groups, batch_size=self.batch_size, each=self.each, generator=self.generator)

    @property
    def groups_per_batch(self) -> int:
        """How many groups a batch has."""
        return min(len(self.members), max(2, self.batch_size // self.each))

    def __len__(self) -> int:
        objects = sum(map(len, self.members.values()))
        return max(1, round(objects / (self.groups_per_batch * self.each)))

    def __iter__(self) -> Iterator[list[int]]:
        members = list(self.members.values())
        for _ in range(len(self)):
            chosen = torch.randperm(len(members), generator=self.generator)[: self.groups_per_batch]
            yield [index for group in chosen.tolist() for index in self._some_of(members[group])]

    def _some_of(self, members: Sequence[int]) -> list[int]:
        order = torch.randperm(len(members), generator=self.generator).tolist()
        return [members[order[n % len(order)]] for n in range(self.each)]


class SimilarityGroupDataset(Dataset[SimilarityGroupSample]):
    """A data set of ``(object, label)``, as those of torchvision are, as samples in groups.

    Args:
        dataset: map-style; items are ``(object, label)``.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SimilarityGroupSample:
        obj, label = self._dataset[index]
        return SimilarityGroupSample(obj=obj, group=group_number(label))
