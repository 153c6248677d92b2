"""Iterable data sets: read and keyed in every epoch, in the order in which they come.

A stream of 10,000 photos has no index that could stand for an object, so there is no manifest: each photo is read,
hashed (0.15 ms for 600 KB), and its row looked up under that key. In the first epoch none has one; the model computes
them with the user's own forward, and what it computed is kept. In the second all 10,000 are found, and only the suffix
runs. Since nothing is found by its place, a stream may shuffle, be resumed, or be split among workers as it likes.

The data set goes into the loader as it is, and the collate function does the work, in the workers: so a stream's own
``set_epoch``, its state and its ``worker_init_fn`` see the very object that they were written for. A stream that gives
other content in every epoch (a random crop) finds nothing again; `Tally` notices, and says so once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from torchrecycle.absent import RecycledTensor
from torchrecycle.data.loader import RecycledCollate
from torchrecycle.data.source import RowSource, own_numbers
from torchrecycle.errors import RecycleWarning

__all__ = ["Marks", "StreamLoader", "Tally", "is_stream", "place_of_stream"]

ALMOST_NOTHING = 0.01
"""The share of found objects, after the first epoch, below which a stream is called one that never comes again."""


def is_stream(dataset: Any) -> bool:
    """Whether `DataLoader` would iterate over it, and not index it."""
    return isinstance(dataset, IterableDataset)


@dataclass(slots=True)
class Marks:
    """Whether a batch none of whose objects has a row is handed out as one, so that its rows are kept.

    One for a recycling and all of its collate functions: turned on with the first stream.
    """

    on: bool = False


def place_of_stream(source: RowSource, batch: Any) -> Any:
    """The batch with rows in place of its inputs, found by content; objects without a row bring what was read of them.

    Args:
        source: of the rows.
        batch: as the user's collate function gives it.
    """
    inputs = source.rule(batch)
    if any(isinstance(tensor, RecycledTensor) for tensor in inputs.tensors().values()):
        return source.place(batch)  # items of a map-style data set of the same recycling
    keys = source.keys(inputs)
    if get_worker_info() is not None and bool((source.rows.lookup(keys) < 0).any()):
        source.rows.refresh()  # the main process has published since, if this worker outlives an epoch
    found = source.find(keys, inputs)
    locations, leaves = (own_numbers(keys), None) if found is None else found
    return source.fill_in(batch, inputs, locations, leaves)


class Tally:
    """How many objects of a stream were found again.

    Args:
        name: of the stream, for the warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._of: Any = None
        self._reset()
        self.useless = False
        """Whether it was found that nothing comes again."""

    def _reset(self) -> None:
        self._epoch = self._first = self._later = self._found = self._kept = 0

    def begin(self, source: RowSource, kept: int) -> None:
        """An epoch begins.

        Args:
            source: of the rows. With another one, nothing of before can be found.
            kept: how many rows of streams were kept so far.
        """
        if source is not self._of:
            self._of = source
            self._reset()
        self._epoch += 1
        if self._epoch == 1:
            self._kept = kept

    def add(self, objects: int, found: int) -> None:
        """One batch."""
        if self._epoch < 2:
            self._first += objects
        else:
            self._later += objects
            self._found += found

    def judge(self, kept: int) -> None:
        """Warn once if as many objects as the first epoch had have come since, and almost none was found.

        Args:
            kept: how many rows of streams were kept so far: after an epoch that kept none, nothing can be found.
        """
        if self._epoch == 1 and kept == self._kept:
            self._reset()
        enough = self._later >= max(1, self._first)
        if self.useless or not enough or self._found > ALMOST_NOTHING * self._later:
            return
        self.useless = True
        warnings.warn(
            f"of {self._later:,} objects that the {self._name} gave after its first epoch of {self._first:,}, "
            f"{self._found:,} were found again: the frozen layers run for all others in every epoch, and no more of "
            "their rows are kept. An iterable data set is found by content, and a random transform (a crop, a flip, "
            "noise) makes new content each time. Take it out of the stream and give recycle(augment=) one that works "
            "on activations, or give a map-style data set with views=.",
            RecycleWarning,
            stacklevel=3,
        )


class StreamLoader(DataLoader[Any]):
    """A `DataLoader` over the user's own iterable data set, whose collate function finds rows by content.

    ``owner`` and ``tally`` are set by `Recycling.loader`; a trainer that builds another one of its data set and collate
    function gets the same batches.
    """

    owner: Any = None
    tally: Tally | None = None

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore
        owner, tally, collate = self.owner, self.tally, self.collate_fn
        if tally is None or not isinstance(collate, RecycledCollate):
            return super().__iter__()
        owner.renew_stream(tally)
        source = None if owner.off else owner.source
        # A worker that outlives an epoch does not see what is written into the memory of this process meanwhile.
        here = source is not None and self.num_workers > 0 and source.rows.url.startswith("memory://")
        collate.source = None if here else source
        self._end_old_workers(collate.source)
        batches = super().__iter__()
        if source is not None and here:
            batches = (place_of_stream(source, batch) for batch in batches)
        return self._counted(batches, tally, source)

    def _end_old_workers(self, source: RowSource | None) -> None:
        """Persistent workers have the collate function that they were started with."""
        if self._iterator is not None and self.__dict__.get("_started_with") is not source:
            self._iterator._shutdown_workers()  # pyright: ignore
            self._iterator = None
        self.__dict__["_started_with"] = source

    def _counted(self, batches: Iterator[Any], tally: Tally, source: RowSource | None) -> Iterator[Any]:
        owner = self.owner
        try:
            for batch in batches:
                if source is not None:
                    _count(batch, source, tally)
                yield batch
        finally:  # the model has had the last batch by now
            owner.end_of_stream(tally)


def _count(batch: Any, source: RowSource, tally: Tally) -> None:
    carrier = source.rule(batch).tensors().get(source.carrier)
    if isinstance(carrier, RecycledTensor):
        tally.add(carrier.rows, carrier.rows - len(carrier.misses))
