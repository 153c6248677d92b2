"""The manifests of a recycling's data sets: found in this process, read from the store, or made by reading the items.

A loader asks at each iteration. If the data set is what it was (`state_of`), its manifest is at hand, and no item is
read. A new loader also reads 8 items, and compares their keys and targets: what the digest cannot see (a database
behind the data set) is found there. Whatever does not fit is read anew, item by item; the prefix runs only for objects
whose rows are missing.

Under ``views=4`` the manifest of a data set that draws random numbers has all four views of each item, one view after
the other; that of a data set that draws none has one, as it has under ``views=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from torchrecycle.bypass import first_difference
from torchrecycle.data.dataset import RecycledDataset
from torchrecycle.data.manifest import Manifest, identity_of
from torchrecycle.data.source import RowSource
from torchrecycle.data.state import state_of
from torchrecycle.data.views import RECIPE, Views, draws, some_of, viewed
from torchrecycle.errors import BatchError, StoreError
from torchrecycle.keys import key
from torchrecycle.trace import random_state, set_random_state

__all__ = ["Known", "KnownManifests", "items_of", "user_key_of"]

REMEMBERED = 16
"""How many data sets a recycling remembers; they are held, with their manifests."""


@dataclass(slots=True)
class Known:
    """A data set whose manifest is at hand."""

    base: Any
    name: str | None
    collate_fn: Any
    collate_state: str
    state: str
    manifest: Manifest
    locations: np.ndarray
    """Where the row at each place is; -1 for those without one. Replaced by another array where it changes."""
    asked_views: int = 1
    """How many views of each item were asked for."""
    views: int = 1
    """How many there are in the manifest: one, where items draw nothing."""
    left_out: np.ndarray | None = None
    """Which places had no row after the last pass over them in this process: the store took no more."""

    @property
    def lacks(self) -> bool:
        """Whether rows are missing that a pass might make."""
        missing = self.locations < 0
        return bool((missing if self.left_out is None else missing & ~self.left_out).any())

    def serves(self, asked_views: int) -> bool:
        """Whether it is what so many views are asked of: one of each item also serves those who want no more."""
        return self.asked_views == asked_views or (self.views == 1 and (asked_views == 1 or self.asked_views > 1))


def items_of(base: Any, indices: list[int]) -> list[Any]:
    """Items of a data set, read as `DataLoader` does."""
    fetch = getattr(base, "__getitems__", None)
    return list(fetch(indices)) if fetch else [base[i] for i in indices]


def user_key_of(
    item: Any, name: str | None, function: Callable[[Any], Any], seed: tuple[int, int] | None = None
) -> bytes:
    """The key of an item under the user's own ``key=``.

    Args:
        item: of the data set.
        name: of the preprocessing, which is part of the key.
        function: the user's.
        seed: index and view that the item was read under, of several views. Both are part of the key: under another
            index the same object in the same view is another one.
    """
    own = (name, function(item)) if seed is None else (name, function(item), "view", RECIPE, *seed)
    return key(own, where="key(item)")


class KnownManifests:
    """See the module.

    Args:
        source: of the recycling, as its prefix now is.
        user_key: what the user gave as ``key=``.
        form: what tells how model inputs are found in a batch; None where a function of the user's does.
    """

    def __init__(self, source: RowSource, user_key: Callable[[Any], Any] | None, form: Any) -> None:
        self.source = source
        self.user_key = user_key
        self.form = form
        self._known: list[Known] = []

    def of(self, dataset: RecycledDataset, fill: Callable[[], None], *, made: bool) -> Known:
        """The manifest of a data set as it is now, and where its rows are.

        Args:
            dataset: the data set.
            fill: reads all items and calls `keep`.
            made: whether a loader was made just now: then a few items are read and compared.
        """
        base = dataset.base
        known = self._find(dataset)
        looked = False
        if (
            known is None
            or known.state != state_of(base)
            or (made and not self._still_fits(known.manifest, known.views, dataset))
        ):
            # Under a name of the user's there is what the data set was before it changed.
            known = None if known is not None and dataset.name is not None else self._read(dataset)
            if known is None:
                fill()
                known = self._found(dataset)
            looked = True
        lost = dataset.takes_losses() | self.source.rows.overwritten()
        if not looked and (lost or made or bool((known.locations < 0).any())):
            self._look_again(known, anew=lost)
        if known.lacks:
            fill()
            known = self._found(dataset)
        return known

    def keep(
        self, base: Any, name: str | None, collate_fn: Any, manifest: Manifest, *, asked_views: int = 1, views: int = 1
    ) -> None:
        """Remember what was read of a data set, in this process and, if its identity allows, beside the rows.

        Rows may be missing: where the store took no more of them, filling has said so, and the same pass would end the
        same way.

        Args:
            base: the data set.
            name: the user's for it.
            collate_fn: the user's.
            manifest: of so many views.
            asked_views: how many were asked for.
            views: how many there are.
        """
        known = self._add(base, name, collate_fn, manifest, asked_views, views)
        known.left_out = known.locations < 0
        identity = self._identity(viewed(base, views), name, collate_fn)
        if identity is None or not manifest.template.is_plain:
            return
        try:
            tensors, words = manifest.to_tensors()
            self.source.rows.write_manifest(identity, tensors, {**words, "data set": _in_words(base, name)})
        except StoreError as error:
            if error.errno is None:
                raise
            # The disk is full or read-only: the next process reads the items once more.

    @contextmanager
    def reading(self, base: Any) -> Iterator[None]:
        """Within this context items may be read: generators are as before, and counters of the data set may move."""
        before = state_of(base)
        random = random_state()
        try:
            yield
        finally:
            set_random_state(random)
            after = state_of(base)
            for known in self._known:
                if known.base is base and known.state == before:
                    known.state = after

    # -- in this process -----------------------------------------------------------------------------------------------

    def _find(self, dataset: RecycledDataset) -> Known | None:
        collate_fn = dataset.fill_arguments.get("collate_fn")
        same = [
            known
            for known in self._known
            if known.base is dataset.base and known.name == dataset.name and known.serves(dataset.asked_views)
        ]
        found = next((known for known in same if known.collate_fn is collate_fn), None)
        if found is None and same:
            state = state_of(collate_fn)
            found = next((known for known in same if known.collate_state == state), None)
        return found

    def _found(self, dataset: RecycledDataset) -> Known:
        known = self._find(dataset)
        if known is None:
            raise StoreError(f"a data set that was just read is not known in {self.source.rows.url}")
        return known

    def _look_again(self, known: Known, *, anew: bool) -> None:
        """Where the rows are now. Those that came after all, and have left again, may be made once more.

        Args:
            known: of the data set.
            anew: whether locations are to be given to data sets also if they are the same.
        """
        locations = self._lookup(known.manifest)
        if anew or not np.array_equal(locations, known.locations):
            known.locations = locations
        if known.left_out is not None:
            known.left_out &= locations < 0

    def _add(
        self, base: Any, name: str | None, collate_fn: Any, manifest: Manifest, asked_views: int, views: int
    ) -> Known:
        collate_state = state_of(collate_fn)
        locations = self._lookup(manifest)
        known = Known(base, name, collate_fn, collate_state, state_of(base), manifest, locations, asked_views, views)
        others = [
            k
            for k in self._known
            if not (
                k.base is base
                and k.name == name
                and k.serves(asked_views)
                and (k.collate_fn is collate_fn or k.collate_state == collate_state)
            )
        ]
        self._known = [*others, known][-REMEMBERED:]
        return known

    def _lookup(self, manifest: Manifest) -> np.ndarray:
        self.source.rows.refresh()
        return self.source.rows.lookup(manifest.keys)

    # -- of an earlier process -----------------------------------------------------------------------------------------

    def _identity(self, base: Any, name: str | None, collate_fn: Any) -> str | None:
        """What a manifest is kept under; None if it serves this process only."""
        if name is None and (collate_fn is not None or self.form is None or self.user_key is not None):
            return None
        identity = identity_of(base, name)
        return None if identity is None else key((identity, self.form)).hex()

    def _read(self, dataset: RecycledDataset) -> Known | None:
        """What an earlier process wrote down about this very data set, if it still fits."""
        found = self._read_views(dataset, dataset.asked_views)
        # Of a data set that draws nothing there is one view, also if more are asked for.
        return self._read_views(dataset, 1) if found is None and dataset.asked_views > 1 else found

    def _read_views(self, dataset: RecycledDataset, views: int) -> Known | None:
        base, name, collate_fn = dataset.base, dataset.name, dataset.fill_arguments.get("collate_fn")
        identity = self._identity(viewed(base, views), name, collate_fn)
        found = None if identity is None else self.source.rows.read_manifest(identity)
        if found is None:
            return None
        try:
            manifest = Manifest.from_tensors(*found)
        except ValueError as error:
            raise StoreError(
                f"the manifest {identity} in {self.source.rows.url} is damaged: {error}. Remove it."
            ) from error
        if not self._still_fits(manifest, views, dataset):
            return None
        return self._add(base, name, collate_fn, manifest, dataset.asked_views, views)

    # -- a few items ---------------------------------------------------------------------------------------------------

    def _still_fits(self, manifest: Manifest, views: int, dataset: RecycledDataset) -> bool:
        """Read a few items: are their keys and targets what the manifest of so many views says?"""
        objects = viewed(dataset.base, views)
        if len(objects) != len(manifest):
            return False
        places = some_of(len(objects))
        with self.reading(dataset.base):
            if views < dataset.asked_views and draws(dataset.base):
                return False
            items = items_of(objects, places)
            keys = self._keys(items, dataset, objects.seeds(places) if isinstance(objects, Views) else None)
        if keys is not None and not np.array_equal(keys, manifest.keys[places]):
            return False
        return all(_same_leaves(manifest, place, item) for place, item in zip(places, items, strict=True))

    def _keys(
        self, items: list[Any], dataset: RecycledDataset, seeds: list[tuple[int, int]] | None
    ) -> np.ndarray | None:
        """The keys of a few items; None where a key depends on how long the batch is padded."""
        if self.user_key is not None:
            found = [
                user_key_of(item, dataset.name, self.user_key, None if seeds is None else seeds[number])
                for number, item in enumerate(items)
            ]
            return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
        sequences, padding = self.source.sequences, self.source.padding
        if sequences.spatial or sequences.bare or (sequences and not (padding.right and padding.left)):
            return None
        batch = (dataset.fill_arguments.get("collate_fn") or default_collate)(items)
        return self.source.keys(self.source.rule(batch))


def _same_leaves(manifest: Manifest, index: int, item: Any) -> bool:
    try:
        leaves = manifest.template.split(item)
    except BatchError:
        return False
    return all(
        column.kind == "absent" or _same(column[index], leaf)
        for column, leaf in zip(manifest.columns, leaves, strict=True)
    )


def _same(kept: Any, leaf: Any) -> bool:
    if type(kept) is not type(leaf) and not isinstance(leaf, torch.Tensor):
        return False
    if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, (np.str_, np.bytes_)):
        kept, leaf = torch.as_tensor(kept), torch.as_tensor(leaf)
    if isinstance(leaf, torch.Tensor):
        return first_difference(kept, leaf) is None
    return repr(kept) == repr(leaf)


def _in_words(base: Any, name: str | None) -> str:
    """What people call a data set."""
    root = getattr(base, "root", None)
    folder = f" {os.path.basename(os.path.normpath(root))}" if isinstance(root, (str, os.PathLike)) else ""
    return name or type(base).__name__ + folder
