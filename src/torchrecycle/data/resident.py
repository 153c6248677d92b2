"""Rows that stay where they are needed: a copy of a data set's rows in memory, or on the GPU.

The rows of 8,144 photos behind a ViT-B/16's sixth block take 2.5 GB in bfloat16. On a GPU with 80 GB they are copied
there once, when the first epoch begins, and a batch of 64 is one ``index_select`` of 20 microseconds: no disk, no
collating, no copy over the bus. The batch that crosses the user's loop then holds numbers of rows and no rows, and the
model's next call gathers them.

A `Resident` is found by location, as the store is, and never changes: rows of a location are the same for ever. Where
it lacks one (rows came since, or the loader that it belonged to is gone), all rows of the batch come from the store. So
it can be slower than expected, and not wrong. Whose locations they are is told by a *numbering*: two recyclings of one
folder may number its rows in different ways, and a batch of one is refused by the other.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from torchrecycle.allocator import kept_bytes
from torchrecycle.errors import BatchError, GoneRowsError, StoreError
from torchrecycle.store import Leaf, LeafSpec, Ragged, Rows

__all__ = ["Residency", "Resident", "Residents", "refuse_residency"]

Residency = Literal["disk", "ram", "cuda"]

PORTION_BYTES = 32 * 2**20
"""What is copied at a time."""

SHARE = 4
"""Rows go to the GPU by themselves where they fit this part of its free memory."""


def refuse_residency(word: Any) -> None:
    """Refuse what is none of the three words, nor None."""
    if word not in ("disk", "ram", "cuda", None):
        raise ValueError(f"resident={word!r} is none of 'disk', 'ram', 'cuda' and None (chosen by what fits)")


# -- one data set's rows -----------------------------------------------------------------------------------------------


class Resident:
    """The rows at some locations as tensors on one device.

    In another process (a worker that was not forked) it knows which locations it has, and not their rows.

    Args:
        rows: of the store; read once from end to end, and compared with their checksums.
        locations: ``[items]`` int64, negative for items without a row; held, so that it tells whose rows these are.
        device: where to.
        numbering: whose locations they are.
        most: how many bytes it may take.

    Raises:
        GoneRowsError: rows have left the store since they were found.
        TooLarge: it would take more bytes.
    """

    def __init__(
        self, rows: Rows, locations: np.ndarray, device: torch.device, numbering: str, most: int | None = None
    ) -> None:
        self.given = locations
        self.device = device
        self.numbering = numbering
        self.late = False
        """Whether batches hold no rows, since the model gathers them on its own device."""
        self.where = np.unique(locations[locations >= 0])
        """The locations, ascending."""
        lengths = _lengths(rows, self.where)
        self.nbytes = _bytes_of(rows.leaves, len(self.where), lengths)
        """Bytes on the device."""
        if most is not None and self.nbytes > most:
            raise TooLarge(self.nbytes, most)
        self._leaves = _copied(rows, self.where, lengths, device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None, "_leaves": None}

    def __len__(self) -> int:
        return len(self.where)

    def __repr__(self) -> str:
        return f"Resident({len(self):,} rows, {self.nbytes / 1e6:,.1f} MB on {self.device})"

    def _places(self, locations: torch.Tensor) -> np.ndarray | None:
        wanted = locations.numpy()
        if not len(self.where):
            return None if len(wanted) else wanted
        places = np.searchsorted(self.where, wanted)
        np.minimum(places, len(self.where) - 1, out=places)
        return places if np.array_equal(self.where[places], wanted) else None

    def has(self, locations: torch.Tensor) -> bool:
        """Whether it has all of these rows, ``[n]`` int64; negative ones are none."""
        return self._places(locations[locations >= 0]) is not None

    def gather(self, locations: torch.Tensor) -> list[Leaf] | None:
        """Copies of these rows, ``[n]`` int64, as `Rows.gather` gives them; None if it does not have them all."""
        if self._leaves is None:
            return None
        places = self._places(locations)
        if places is None:
            return None
        index = torch.from_numpy(places)
        if self.device.type == "cuda":  # from pinned memory, so that nothing waits for the GPU
            index = index.pin_memory().to(self.device, non_blocking=True)
        return [leaf.gather(places, index) for leaf in self._leaves]


class TooLarge(Exception):
    """Rows take more bytes than they may. See `Residents`, which puts it into words."""

    def __init__(self, nbytes: int, most: int) -> None:
        super().__init__(nbytes, most)
        self.nbytes, self.most = nbytes, most


class _Dense:
    """A leaf whose rows are all of one shape.

    Args:
        spec: its form.
        count: of rows.
        device: where it is.
    """

    def __init__(self, spec: LeafSpec, count: int, device: torch.device) -> None:
        self.values = torch.empty((count, *spec.shape), dtype=spec.dtype, device=device)

    def put(self, start: int, rows: Leaf) -> None:
        """Copy rows to a place."""
        assert isinstance(rows, torch.Tensor)
        _copy(rows, self.values[start : start + len(rows)])

    def gather(self, places: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        """``[batch, ...]``"""
        return self.values.index_select(0, index)


class _Ragged:
    """A leaf whose rows differ in length: all of them one after the other.

    Args:
        spec: its form.
        lengths: of all rows, ``[rows]`` int64.
        device: where it is.
    """

    def __init__(self, spec: LeafSpec, lengths: np.ndarray, device: torch.device) -> None:
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths
        total = int(self.stops[-1]) if len(lengths) else 0
        self.values = torch.empty((total, *spec.shape), dtype=spec.dtype, device=device)

    def put(self, start: int, rows: Leaf) -> None:
        """Copy rows to a place."""
        assert isinstance(rows, Ragged)
        if not np.array_equal(rows.lengths.numpy(), (self.stops - self.starts)[start : start + len(rows.lengths)]):
            raise GoneRowsError("rows have other lengths than a moment ago: the store has changed meanwhile")
        if len(rows.lengths):
            _copy(rows.values, self.values[self.starts[start] : self.stops[start + len(rows.lengths) - 1]])

    def gather(self, places: np.ndarray, index: torch.Tensor) -> Ragged:
        """The rows, one after the other."""
        starts, lengths = self.starts[places], (self.stops - self.starts)[places]
        before = np.cumsum(lengths) - lengths
        steps = torch.from_numpy(np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64))
        if self.values.is_cuda:
            steps = steps.pin_memory().to(self.values.device, non_blocking=True)
        return Ragged(self.values.index_select(0, steps), torch.from_numpy(lengths))


def _copy(rows: torch.Tensor, to: torch.Tensor) -> None:
    to.copy_(rows.pin_memory() if to.is_cuda else rows, non_blocking=to.is_cuda)


def _portions(rows: Rows, where: np.ndarray) -> Iterator[tuple[int, list[Leaf]]]:
    """All rows, as many at a time as fill a portion."""
    step = max(1, PORTION_BYTES // max(1, rows.nbytes // max(1, len(rows))))
    for start in range(0, len(where), step):
        yield start, rows.gather(where[start : start + step])


def _lengths(rows: Rows, where: np.ndarray) -> list[np.ndarray | None]:
    """Of each leaf the rows' lengths, if they differ: to be known before memory is taken, which then is never too
    much."""
    if not any(spec.ragged for spec in rows.leaves):
        return [None for _ in rows.leaves]
    found: list[list[torch.Tensor]] = [[] for _ in rows.leaves]
    for _, leaves in _portions(rows, where):
        for lengths, leaf in zip(found, leaves, strict=True):
            if isinstance(leaf, Ragged):
                lengths.append(leaf.lengths)
    none = torch.empty(0, dtype=torch.int64)
    return [
        torch.cat([none, *lengths]).numpy() if spec.ragged else None
        for spec, lengths in zip(rows.leaves, found, strict=True)
    ]


def _row_bytes(rows: Rows) -> int:
    """Of a row on the average, without its key, its sum and where its ragged leaves begin."""
    beside = 24 + 8 * sum(spec.ragged for spec in rows.leaves)
    return max(0, rows.nbytes // max(1, len(rows)) - beside)


def _bytes_of(specs: Sequence[LeafSpec], count: int, lengths: Sequence[np.ndarray | None]) -> int:
    sizes = (count if own is None else int(own.sum()) for own in lengths)
    return sum(size * math.prod(spec.shape) * spec.dtype.itemsize for size, spec in zip(sizes, specs, strict=True))


def _copied(
    rows: Rows, where: np.ndarray, lengths: Sequence[np.ndarray | None], device: torch.device
) -> list[_Dense | _Ragged]:
    leaves = [
        _Dense(spec, len(where), device) if own is None else _Ragged(spec, own, device)
        for spec, own in zip(rows.leaves, lengths, strict=True)
    ]
    for start, portion in _portions(rows, where):
        for leaf, part in zip(leaves, portion, strict=True):
            leaf.put(start, part)
    if device.type == "cuda":  # whatever stream gathers from them
        torch.cuda.synchronize(device)
    return leaves


# -- all that a recycling has ------------------------------------------------------------------------------------------


class Residents:
    """The copies that a recycling's data sets have now. Each lives as long as a data set holds it."""

    def __init__(self) -> None:
        self._made: weakref.WeakSet[Resident] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Resident]:
        return iter(sorted(self._made, key=repr))

    def of(
        self, word: Residency | None, rows: Rows, locations: np.ndarray, numbering: str, device: torch.device
    ) -> Resident | None:
        """The copy of a data set's rows, made if need be; None where they are gathered from the store.

        Args:
            word: what the user wants; None to have it chosen.
            rows: of the store.
            locations: ``[items]`` int64; another array where it changes.
            numbering: whose locations they are.
            device: where the model is.

        Raises:
            BatchError: ``"cuda"`` is wanted, and the model is not there.
            StoreError: the rows are too large for where they are wanted.
        """
        if word == "cuda" and device.type != "cuda":
            raise BatchError(
                f"resident='cuda' keeps rows beside the model, which is on {device}: move it to the GPU before its "
                "loaders are iterated, or use resident='ram'"
            )
        if word == "disk" or (word is None and device.type != "cuda"):
            return None
        to = torch.device("cpu") if word == "ram" else device
        for made in self._made:
            if made.given is locations and made.device == to and made.numbering == numbering:
                made.late = to == device
                return made
        most = free_bytes(to) // (SHARE if word is None else 1)
        resident = self._make(word, rows, locations, numbering, to, most)
        if resident is not None:
            resident.late = to == device
            self._made.add(resident)
        return resident

    def _make(
        self, word: Residency | None, rows: Rows, locations: np.ndarray, numbering: str, to: torch.device, most: int
    ) -> Resident | None:
        about = _row_bytes(rows) * len(np.unique(locations[locations >= 0]))
        try:
            if about > 1.25 * most:  # without reading them all
                raise TooLarge(about, most)
            return Resident(rows, locations, to, numbering, most)
        except TooLarge as error:
            if word is None:
                return None
            raise StoreError(
                f"resident={word!r}: the rows of this data set take {error.nbytes / 1e9:,.2f} GB, and {to} has "
                f"{error.most / 1e9:,.2f} GB free. Leave them on the disk (resident='disk'), make them smaller "
                "(precision='bfloat16' or 'int8', or a cut with smaller rows: see cuts()), or take a part of the data "
                "set."
            ) from error
        except GoneRowsError:  # at that very moment; the next epoch looks again
            return None

    def gather(self, locations: torch.Tensor, numbering: str) -> list[Leaf] | None:
        """Rows at these locations, ``[n]`` int64, if one copy has them all."""
        for made in self._made:
            if made.numbering == numbering:
                found = made.gather(locations)
                if found is not None:
                    return found
        return None


def free_bytes(device: torch.device) -> int:
    """How much memory a device has left."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_available(), _left_of_group()) + kept_bytes()


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            words = dict(line.split(":", 1) for line in file)
        return int(words["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_of_group() -> int:
    """What a container has left of what it is allowed."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            most = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            return max(0, most - int(file.read()))
    except (OSError, ValueError):
        return 2**63
