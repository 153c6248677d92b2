"""The same data set, reading rows instead of objects.

`RecycledDataset` stands for the user's data set in any `DataLoader` or trainer. Asked for a batch of indices
(``__getitems__``), it hands out a `Fetched`: a sequence of items in which absent inputs are stand-ins, and which our
collate function turns into a batch at once, without making the items. The user's data set is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from torchrecycle.absent import RecycledTensor
from torchrecycle.data.manifest import Manifest
from torchrecycle.data.source import RowSource
from torchrecycle.errors import StaleActivationError

__all__ = ["Fetched", "RecycledDataset"]


class RecycledDataset(Dataset[Any]):
    """A map-style data set whose items carry rows in place of model inputs.

    Args:
        base: the user's data set; read only where rows are missing.
        owner: the recycling, which fills and renews it; not pickled to workers.
    """

    def __init__(self, base: Any, owner: Any) -> None:
        self.base = base
        self._owner = owner
        self.manifest: Manifest | None = None
        self.locations = torch.empty(0, dtype=torch.int64)
        self.source: RowSource | None = None
        self.generation = 0
        """How often it was given other rows: workers that were started before have the old ones."""
        self._raw = False
        self.name: str | None = None
        self.fill_arguments: dict[str, Any] = {}

    @property
    def owner(self) -> Any:
        """The recycling; None in a worker."""
        return self._owner

    def renew(self, manifest: Manifest, locations: torch.Tensor, source: RowSource) -> None:
        """Take these rows from now on."""
        self.generation += 1
        self.manifest, self.source = manifest, source
        self.locations = locations.share_memory_() if len(locations) else locations

    def __len__(self) -> int:
        return len(self.base)

    def __getstate__(self) -> dict[str, Any]:
        owner = self.owner
        return {**self.__dict__, "_owner": None, "_raw": self._raw or (owner is not None and owner.off)}

    def __copy__(self) -> RecycledDataset:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: Any) -> RecycledDataset:
        return self.__copy__()

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """Items for a batch: a `Fetched`, or the raw items where the recycling is off or a row is missing."""
        owner = self.owner
        if self.manifest is not None and not (self._raw if owner is None else owner.off):
            index = self._positions(indices)
            locations = self.locations[index]
            if bool((locations >= 0).all()):
                return Fetched(self, index, locations)
        fetch = getattr(self.base, "__getitems__", None)
        return fetch(list(indices)) if fetch else [self.base[i] for i in indices]

    def _positions(self, indices: Sequence[Any]) -> torch.Tensor:
        count = len(self.locations)
        if len(self.base) != count:
            raise StaleActivationError(
                f"the data set has {len(self.base)} items where its rows were found for {count}: it has changed "
                "since. Make a new iterator of the recycling's loader, or call recycling.dataset(...) again."
            )
        index = torch.from_numpy(np.array(indices, dtype=np.int64).reshape(-1))
        wrong = (index < -count) | (index >= count)
        if bool(wrong.any()):
            raise IndexError(f"item {int(index[wrong][0])} was asked of a data set of {count}")
        return torch.where(index < 0, index + count, index)


class Fetched(Sequence[Any]):
    """The items of one batch, made when somebody looks at them."""

    def __init__(self, dataset: RecycledDataset, index: torch.Tensor, locations: torch.Tensor) -> None:
        self.dataset, self.places, self.locations = dataset, index, locations

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> list[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        manifest, source = self.dataset.manifest, self.dataset.source
        assert manifest is not None
        assert source is not None
        item, location = int(self.places[at]), self.locations[at]
        leaves = []
        for position, column in enumerate(manifest.columns):
            leaf = column[item]
            if column.kind == "absent":
                leaf = RecycledTensor(  # pyright: ignore[reportCallIssue]
                    leaf,
                    getattr(torch, column.dtype),
                    locations=location,
                    fingerprint=source.fingerprint,
                    input_name=manifest.inputs[position],
                )
            leaves.append(leaf)
        return manifest.template.join(leaves)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def batch(self) -> Any:
        """What ``default_collate`` makes of the items, with stand-ins; None where it must see the items.

        Vectorised: no item is made.
        """
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

    def _stand_ins(self, column: Any, source: RowSource, name: str) -> RecycledTensor | None:
        shapes = column.values.index_select(0, self.places)
        if bool((shapes != shapes[:1]).any()):
            return None
        return RecycledTensor(  # pyright: ignore[reportCallIssue]
            (len(self), *shapes[0].tolist()),
            getattr(torch, column.dtype),
            locations=self.locations,
            fingerprint=source.fingerprint,
            input_name=name,
        )
