"""The same data set, reading rows instead of objects.

`RecycledDataset` stands for the user's data set in any `DataLoader` or trainer. Asked for a batch of indices
(``__getitems__``), it hands out a `Fetched`: a sequence of items in which absent inputs are stand-ins, and which our
collate function turns into a batch at once, without making the items. The user's data set is not read.

Where 3 rows of a batch of 64 are missing (the disk was full, or rows were evicted meanwhile), those 3 items are read,
and their stand-ins hold what was read. Where all are missing, the items are the user's own.

Of several views, one of each object is drawn when a batch is asked for. The *place* of item 17 in view 3 of 2,000 items
is 2,000 * 3 + 17: by it rows and targets are found, and what has no row is read under that view's seed.
"""

from __future__ import annotations

import copy
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from torchrecycle.absent import RecycledTensor
from torchrecycle.data.columns import Column
from torchrecycle.data.manifest import Manifest
from torchrecycle.data.resident import Resident
from torchrecycle.data.source import RowSource, own_numbers
from torchrecycle.data.views import Draws, viewed
from torchrecycle.errors import BatchError, StaleActivationError

__all__ = ["Fetched", "RecycledDataset", "item_number"]


class RecycledDataset(Dataset[Any]):
    """A map-style data set whose items carry rows in place of model inputs.

    Args:
        base: the user's data set; read only where rows are missing.
        owner: the recycling, which fills and renews it; not pickled to workers.
        views: in how many views each item is kept, if it draws random numbers.
    """

    def __init__(self, base: Any, owner: Any, views: int = 1) -> None:
        self.base = base
        self._owner = owner
        self.asked_views = views
        self.views = 1
        """In how many views each item is kept: one, where items draw nothing."""
        self.manifest: Manifest | None = None
        self.locations = torch.empty(0, dtype=torch.int64)
        """Where the row at each place is, ``[views * items]`` int64; -1 for those without one."""
        self.source: RowSource | None = None
        self.generation = 0
        """How often it was given other rows: workers that were started before have the old ones."""
        self._raw = False
        self.name: str | None = None
        self.fill_arguments: dict[str, Any] = {}
        self.resident: Resident | None = None
        """A copy of its rows in memory, if there is one."""
        self._given: np.ndarray | None = None
        self._objects: Any = base
        self._draws: Draws | None = None
        self._losses = torch.zeros(1, dtype=torch.int64)
        self._losses_seen = 0

    @property
    def owner(self) -> Any:
        """The recycling; None in a worker."""
        return self._owner

    def renew(self, manifest: Manifest, locations: np.ndarray, source: RowSource, views: int = 1) -> None:
        """Take these rows from now on, if they are others.

        Args:
            manifest: of the data set, all views one after the other.
            locations: where the row at each place is; the array that is given tells whether it is another one.
            source: of the rows.
            views: how many the manifest has of each item.
        """
        if self.manifest is manifest and self.source is source and self._given is locations:
            return
        self.generation += 1
        if self.manifest is not manifest:
            self.views, self._objects = views, viewed(self.base, views)
            objects = len(manifest) // views
            if views == 1:
                self._draws = None
            elif self._draws is None or (self._draws.objects, self._draws.views) != (objects, views):
                self._draws = Draws(objects, views)
        self.manifest, self.source, self._given = manifest, source, locations
        shared = torch.from_numpy(locations)
        self.locations = shared.share_memory_() if len(shared) else shared
        if not self._losses.is_shared():
            self._losses.share_memory_()

    def take_resident(self, resident: Resident | None) -> None:
        """Gather from this copy of the rows from now on; from the store if None."""
        if self.resident is not resident:
            self.generation += 1
            self.resident = resident

    def look_again(self) -> None:
        """Look all keys up again, for this process, since rows have left the store."""
        assert self.manifest is not None
        assert self.source is not None
        self._losses += 1
        self.source.rows.refresh()
        # Not where the others look: locations are those of this process.
        self.locations = torch.from_numpy(self.source.rows.lookup(self.manifest.keys))

    def takes_losses(self) -> bool:
        """Whether rows were found to have left since this was last asked, here or in a worker."""
        before, self._losses_seen = self._losses_seen, int(self._losses)
        return self._losses_seen != before

    def __len__(self) -> int:
        return len(self.base)

    def set_epoch(self, epoch: int) -> None:
        """An epoch begins, as trainers tell a data set that make loaders of their own (Accelerate, transformers).

        The user's data set is told too, and the rows are looked at as at each iteration of the recycling's loader.
        """
        tell = getattr(self.base, "set_epoch", None)
        if tell is not None:
            tell(epoch)
        if self.owner is not None:
            self.owner.renew(self)

    def __getstate__(self) -> dict[str, Any]:
        owner = self.owner
        return {**self.__dict__, "_owner": None, "_raw": self._raw or (owner is not None and owner.off)}

    def __copy__(self) -> RecycledDataset:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._draws = copy.copy(self._draws)
        return made

    def __deepcopy__(self, memo: Any) -> RecycledDataset:
        return self.__copy__()

    def _follow(self) -> None:
        """Take the rows of the recycling as it is divided now, for a trainer that makes its own loaders."""
        owner = self.owner
        if owner is not None and owner.source is not self.source and get_worker_info() is None:
            owner.renew(self)

    @property
    def _is_off(self) -> bool:
        owner = self.owner
        return self.manifest is None or (self._raw if owner is None else owner.off)

    def __getitem__(self, index: int) -> Any:
        self._follow()
        return _read(self.base, [index])[0] if self._is_off else self._fetched(self._drawn([index]))[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """Items for a batch: a `Fetched`, or the raw items where the recycling is off or no item has a row.

        Of several views, each item's next one is drawn; while the recycling is off, items come as they come.
        """
        self._follow()
        return _read(self.base, indices) if self._is_off else self.fetch(self._drawn(indices))

    def read(self, places: Sequence[int]) -> Sequence[Any]:
        """What the user's data set gives at these places: of several views, each item under the view's seed."""
        return _read(self._objects, places)

    def fetch(self, places: torch.Tensor) -> Sequence[Any]:
        """The items at these places, ``[batch]`` int64; the raw ones where none has a row."""
        if bool((self.locations[places] < 0).all()):
            return self.read(places.tolist())
        return self._fetched(places)

    def _fetched(self, places: torch.Tensor) -> Fetched:
        locations = self.locations[places]
        at = (locations < 0).nonzero()[:, 0]
        if not len(at):
            return Fetched(self, places, locations)
        assert self.manifest is not None
        missing = places[at]
        locations[at] = own_numbers(self.manifest.keys[missing.numpy()])
        # Where no input is left out, the manifest has all of an item.
        whole = all(column.kind != "absent" for column in self.manifest.columns)
        raw = {} if whole else dict(zip(at.tolist(), self.read(missing.tolist()), strict=True))
        return Fetched(self, places, locations, raw)

    def peek(self, index: torch.Tensor) -> torch.Tensor:
        """The places that these items would now be taken from, ``[batch]`` int64, if this process takes them."""
        return index if self._draws is None else self._draws.peek(index)

    def _drawn(self, indices: Sequence[Any]) -> torch.Tensor:
        index = self._positions(indices)
        return index if self._draws is None else self._draws.take(index)

    def _positions(self, indices: Sequence[Any]) -> torch.Tensor:
        count = len(self.locations) // self.views
        if len(self.base) != count:
            raise StaleActivationError(
                f"the data set has {len(self.base)} items where its rows were found for {count}: it has changed "
                "since. Make a new iterator of the recycling's loader, or call recycling.dataset(...) again."
            )
        index = torch.tensor([item_number(one) for one in indices], dtype=torch.int64)
        wrong = (index < -count) | (index >= count)
        if bool(wrong.any()):
            raise IndexError(
                f"item {int(index[wrong][0])} was asked of a data set of {count}: the sampler counts the items of "
                "another one"
            )
        return torch.where(index < 0, index + count, index)


def item_number(index: Any) -> int:
    """The number that a sampler means; NumPy would make 1 of 1.7, and two numbers of the pair (3, 224)."""
    try:
        return operator.index(index)
    except (TypeError, ValueError):
        raise BatchError(
            f"the sampler gives {reprlib.repr(index)}, a {type(index).__name__}, where the number of an item was "
            "expected: rows and targets are kept by item number. What else an item depends on (a size, a crop) belongs "
            "into the data set."
        ) from None


def _read(objects: Any, indices: Sequence[int]) -> Sequence[Any]:
    fetch = getattr(objects, "__getitems__", None)
    return fetch(list(indices)) if fetch else [objects[i] for i in indices]


class Fetched(Sequence[Any]):
    """The items of one batch, made when somebody looks at them.

    Args:
        dataset: of which they are.
        index: the place of each, ``[batch]`` int64.
        locations: of the rows, ``[batch]`` int64; negative for items without one.
        raw: of items without a row, what the user's data set gives, by place in the batch. None of them where the
            manifest has all of an item.
    """

    def __init__(
        self,
        dataset: RecycledDataset,
        index: torch.Tensor,
        locations: torch.Tensor,
        raw: Mapping[int, Any] | None = None,
    ) -> None:
        self.dataset, self.places, self.locations, self.raw = dataset, index, locations, raw or {}

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        manifest = self.dataset.manifest
        assert manifest is not None
        at = range(len(self))[at]
        own = manifest.template.split(self.raw[at]) if at in self.raw else None
        item = int(self.places[at])
        leaves = []
        for position, column in enumerate(manifest.columns):
            if column.kind == "absent":
                leaf = self._stand_in(at, column, manifest.inputs[position], None if own is None else own[position])
            else:
                leaf = column[item] if own is None else own[position]
            leaves.append(leaf)
        return manifest.template.join(leaves)

    def _stand_in(self, at: int, column: Column, name: str, real: Any) -> RecycledTensor:
        source = self.dataset.source
        assert source is not None
        missing = None if real is None else torch.as_tensor(real)
        return RecycledTensor(  # pyright: ignore[reportCallIssue]
            column[int(self.places[at])] if missing is None else missing.shape,
            getattr(torch, column.dtype) if missing is None else missing.dtype,
            locations=self.locations[at],
            fingerprint=source.fingerprint,
            numbering=source.numbering,
            input_name=name,
            missing=None if missing is None else missing[None],
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def batch(self) -> Any:
        """What ``default_collate`` makes of the items, with stand-ins; None where it must see the items.

        Vectorised: no item is made.
        """
        if self.raw:
            return None
        manifest, source = self.dataset.manifest, self.dataset.source
        assert manifest is not None
        assert source is not None
        leaves = []
        for position, column in enumerate(manifest.columns):
            if column.kind == "absent":
                leaf = self._stand_ins(column, source, manifest.inputs[position])
            else:
                leaf = column.batch(self.places)
            if leaf is None:
                return None
            leaves.append(leaf)
        return manifest.template.join(leaves, collated=True)

    def _stand_ins(self, column: Column, source: RowSource, name: str) -> RecycledTensor | None:
        shapes = column.values.index_select(0, self.places)
        if bool((shapes != shapes[:1]).any()):
            return None
        return RecycledTensor(  # pyright: ignore[reportCallIssue]
            (len(self), *shapes[0].tolist()),
            getattr(torch, column.dtype),
            locations=self.locations,
            fingerprint=source.fingerprint,
            numbering=source.numbering,
            input_name=name,
        )
