"""Batches of a data set of samples for a similarity model: rows where an encoder is recycled, objects elsewhere.

`SampleBatches` stands for the data set in a `DataLoader`. Asked for the samples ``[7, 3, 5]``, it gives the batch at
once: ``({"data": {"image": KeptRows, "text": {"input_ids": ...}}, "meta": {}}, {"groups": tensor([4, 4, 2])})``. If all
encoders are recycled and all rows are there, the data set is not read, and the targets come from the manifest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from torchrecycle.data import draws_at_once, item_number
from torchrecycle.errors import BatchError
from torchrecycle.similarity.loaders import (
    GroupBatches,
    SimilarityDataLoader,
    group_targets,
    pair_targets,
)
from torchrecycle.similarity.samples import SimilarityGroupSample
from torchrecycle.similarity.stages import StageRows

__all__ = ["BatchLoader", "ModelInputs", "SampleBatches", "loader_over"]

Collate = Callable[[list[Any]], Any]


class ModelInputs:
    """From objects to what a similarity model takes. Pickles to workers if the collate functions do.

    Args:
        collates: per encoder, its collate function.
        metas: per encoder that has one of its own, its meta extractor.
    """

    def __init__(self, collates: Mapping[str, Collate], metas: Mapping[str, Collate]) -> None:
        self.collates, self.metas = dict(collates), dict(metas)

    def __call__(self, objects: list[Any], ready: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """A batch for ``SimilarityModel.forward``, of which some encoders' part is there."""
        data = {name: ready[name] if name in ready else collate(objects) for name, collate in self.collates.items()}
        return {"data": data, "meta": {name: meta(objects) for name, meta in self.metas.items()}}


class SampleBatches(Dataset[Any]):
    """See the module.

    Args:
        samples: a data set of samples.
        kind: the class of the samples.
        pre_collate: from samples to (objects, targets).
        inputs: from objects to what the model takes.
        rows: per recycled encoder, its rows.
    """

    def __init__(
        self,
        samples: Any,
        kind: type,
        pre_collate: Callable[[Sequence[Any]], tuple[list[Any], dict[str, Tensor]]],
        inputs: ModelInputs,
        rows: Mapping[str, StageRows],
    ) -> None:
        self.samples, self.kind, self.pre_collate = samples, kind, pre_collate
        self.inputs, self.rows = inputs, dict(rows)

    @property
    def reads(self) -> bool:
        """Whether batches need the objects even if all rows are there."""
        return bool(self.inputs.metas) or self.rows.keys() != self.inputs.collates.keys()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The batch of some samples."""
        chosen = self._numbers(indices)
        positions = self._positions(chosen)
        ready = {}
        for name, rows in self.rows.items():
            found = rows.fetch(positions)
            if found is not None:
                ready[name] = found
        if len(ready) == len(self.inputs.collates) and not self.inputs.metas:
            return self.inputs([], ready), self._targets(chosen)
        objects, targets = self.pre_collate([self.samples[index] for index in indices])
        return self.inputs(objects, ready), targets

    def many(self, batches: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Several batches. Where their rows are whole outputs, the store is asked once for all of them."""
        whole = all(rows.whole and rows.waiting is None for rows in self.rows.values())
        if self.reads or not whole or len(batches) < 2:
            yield from map(self.__getitems__, batches)
            return
        chosen = [self._numbers(batch) for batch in batches]
        positions = [self._positions(one) for one in chosen]
        together = torch.cat(positions)
        found = {name: rows.fetch(together) for name, rows in self.rows.items()}
        if any(one is None for one in found.values()):
            yield from map(self.__getitems__, batches)
            return
        sizes = [len(one) for one in positions]
        parts = {name: kept.split(sizes) for name, kept in found.items()}
        targets = self._many_targets(chosen)
        for number, one in enumerate(targets):
            yield {"data": {name: parts[name][number] for name in self.inputs.collates}, "meta": {}}, one

    def _numbers(self, indices: Sequence[int]) -> Tensor:
        """Of samples. One too many would be another's right object where pairs have two."""
        numbers, count = [item_number(one) for one in indices], len(self.samples)
        wrong = next((one for one in numbers if not 0 <= one < count), None)
        if wrong is not None:
            raise BatchError(
                f"the sampler gives sample {wrong}, and the data set has {count} samples, numbered from 0: give a "
                "sampler over this data set"
            )
        return torch.tensor(numbers, dtype=torch.int64)

    def _positions(self, chosen: Tensor) -> Tensor:
        """The objects of some samples: of pairs, all left ones and then all right ones."""
        return chosen if self.kind is SimilarityGroupSample else torch.cat([chosen, chosen + len(self.samples)])

    def _many_targets(self, chosen: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        if self.kind is not SimilarityGroupSample:
            return [self._targets(one) for one in chosen]
        groups = self._targets(torch.cat(list(chosen)))["groups"].split([len(one) for one in chosen])
        return [{"groups": one} for one in groups]

    def _targets(self, chosen: Tensor) -> dict[str, Tensor]:
        rows = next(iter(self.rows.values()))
        if self.kind is SimilarityGroupSample:
            return group_targets(rows.column(" group", chosen))
        return pair_targets(rows.column(" score", chosen), rows.column(" subgroup", chosen))

    def groups(self) -> list[int] | None:
        """The group of each sample, if it is known without reading them."""
        rows = next(iter(self.rows.values()), None)
        if rows is None or self.kind is not SimilarityGroupSample or not rows.ready():
            return None
        return rows.column(" group", torch.arange(len(self.samples))).tolist()


AT_ONCE = 512
"""Samples whose rows are gathered at once, at most, if batches are smaller."""


def _as_it_is(batch: Any) -> Any:
    return batch


class BatchLoader(DataLoader[Any]):
    """A `DataLoader` over `SampleBatches` that lets rows be renewed at each iteration."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore
        dataset = self.dataset
        assert isinstance(dataset, SampleBatches)
        for rows in dataset.rows.values():
            rows.renew()
        now = [rows.recycled.generation for rows in dataset.rows.values()]
        workers = self._iterator
        if workers is not None and self.__dict__.get("_started_with") != now:  # they hold the rows of then
            workers._shutdown_workers()  # pyright: ignore
            self._iterator = None
        self.__dict__["_started_with"] = now
        if self.num_workers or dataset.reads:
            return super().__iter__()
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # which `DataLoader` draws for its workers
        return self._of_rows(dataset)

    def _of_rows(self, dataset: SampleBatches) -> Iterator[Any]:
        """The same batches as `DataLoader` gives without workers, with fewer questions to the store."""
        sampler: Any = self.batch_sampler
        drawn, left = iter(sampler), len(sampler)
        ahead = max(1, AT_ONCE // sampler.batch_size) if draws_at_once(sampler) else 1
        # The last batch is drawn when it is asked for: a sampler that comes to its end draws from its generator again.
        while batches := list(itertools.islice(drawn, max(1, min(left - 1, ahead)))):
            left -= len(batches)
            for batch in dataset.many(batches):
                yield pin_memory(batch) if self.pin_memory else batch


def loader_over(batches: SampleBatches, loader: SimilarityDataLoader) -> BatchLoader:
    """A loader that draws the same samples as the user's, in the same order for the same seed.

    Args:
        batches: of the loader's data set.
        loader: the user's. It is left as it is.
    """
    workers = loader.num_workers if batches.reads else 0  # rows are read faster than a process hands them over
    arguments: dict[str, Any] = {
        "num_workers": workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout if workers else 0,
        "worker_init_fn": loader.worker_init_fn,
        "generator": loader.generator,
    }
    if workers:
        arguments |= {
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
        }
    sampler = loader.batch_sampler
    if isinstance(sampler, GroupBatches):
        groups = batches.groups()
        sampler = sampler if groups is None else sampler.know(groups)
    if type(sampler) is BatchSampler:
        arguments |= {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    else:
        arguments["batch_sampler"] = sampler
    return BatchLoader(batches, collate_fn=_as_it_is, **arguments)
