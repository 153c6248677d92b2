"""The collate function and the loader: a plain `DataLoader` whose batches carry rows.

Workers and trainers that make their own `DataLoader` of the data set and the collate function get the same batches. The
loader adds one thing: at the beginning of each iteration it lets the recycling look whether its model, its data set and
its rows still belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, default_collate

from torchrecycle.data.ahead import copied_ahead
from torchrecycle.data.dataset import Fetched, RecycledDataset
from torchrecycle.data.order import ReadAhead, draws_at_once
from torchrecycle.data.resident import Resident
from torchrecycle.data.source import RowSource
from torchrecycle.errors import BatchError

__all__ = ["RecycledCollate", "RecycledLoader"]


class RecycledCollate:
    """Items to a batch with rows in it.

    Args:
        collate_fn: the user's; None for ``default_collate``, which is done column by column where possible.
        source: gives the present `RowSource`, or None while recycling is off.
    """

    def __init__(self, collate_fn: Callable[[Sequence[Any]], Any] | None, source: RowSource | None) -> None:
        self.collate_fn = collate_fn
        self.source = source

    def __call__(self, items: Sequence[Any]) -> Any:
        fetched = isinstance(items, Fetched)
        source = items.dataset.source if isinstance(items, Fetched) else self.source
        if self.collate_fn is not None:
            batch = self._by_user(items, fetched)
        elif not isinstance(items, Fetched):
            batch = default_collate(list(items))
        else:  # in the order of the data set, so that the manifest tells the rows
            batch = items.batch()
            batch = default_collate(list(items)) if batch is None else batch
            return batch if source is None else source.place(batch, items.locations, items.dataset.resident)
        resident = items.dataset.resident if isinstance(items, Fetched) else None
        return batch if source is None else self._placed(batch, source, resident)

    def _placed(self, batch: Any, source: RowSource, resident: Resident | None = None) -> Any:
        """A batch of items that tell nothing of their rows, with these in it."""
        return source.place(batch, resident=resident)

    def _by_user(self, items: Sequence[Any], fetched: bool) -> Any:
        assert self.collate_fn is not None
        try:
            return self.collate_fn(list(items))
        except Exception as error:
            if not fetched or self.source is None or not self.source.absent:
                raise
            name = getattr(self.collate_fn, "__qualname__", type(self.collate_fn).__name__)
            raise BatchError(
                f"the collate function {name} did not run on items whose model inputs {sorted(self.source.absent)} "
                f"are stand-ins, since their rows are kept: {type(error).__name__}: {error} If it reads their values, "
                "do this work in the data set's __getitem__, so that it is part of the object."
            ) from error


class RecycledLoader(DataLoader[Any]):
    """A `DataLoader` over a `RecycledDataset`, which renews it at each iteration and reads ahead."""

    @property
    def _index_sampler(self) -> Any:
        sampler, dataset = super()._index_sampler, self.dataset
        if not isinstance(dataset, RecycledDataset) or dataset.source is None or not draws_at_once(sampler):
            return sampler
        if dataset.resident is not None:
            return sampler
        # Which view comes next only the worker knows that takes it.
        return sampler if self.num_workers and dataset.views > 1 else ReadAhead(sampler, dataset)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore
        dataset = self.dataset
        owner = dataset.owner if isinstance(dataset, RecycledDataset) else None
        if owner is None:
            return super().__iter__()
        assert isinstance(dataset, RecycledDataset)
        owner.renew(dataset)
        if isinstance(self.collate_fn, RecycledCollate):
            self.collate_fn.source = None if owner.off else owner.source
        self._end_old_workers((dataset.generation, owner.off))
        batches = owner.watched(super().__iter__(), self)
        return batches if owner.off else copied_ahead(batches, owner.source, owner.device)

    def _end_old_workers(self, now: tuple[int, bool]) -> None:
        """Persistent workers hold the rows that they were started with."""
        workers = self._iterator
        if workers is not None and self.__dict__.get("_started_with") != now:
            workers._shutdown_workers()  # pyright: ignore
            self._iterator = None
        self.__dict__["_started_with"] = now
