"""All segments of a fingerprint as one tensor per leaf, so that a batch is one `torch.index_select`.

A row's location is its number on the planes: segments begin at multiples of 4,096 rows, so whatever a row's size, each
begins at a page. 16 segments of 1,700 rows of 150 KB take 10 GB of addresses, and of memory what has been read. The
steps of ragged rows have numbers of their own.

One byte for each location says that its row is there and was compared with its sum. A batch in which all are set needs
no other question: for 64 rows of 1.5 KB, which are copied in 6 microseconds, each question counts.

Pages that were read stay with the process until they are released. Releasing costs a page fault for each that is read
again, so it is done when they may come to a quarter of the machine's memory, and not before.

Whoever touches a page that is not in memory waits for that page alone, one after the other. So while gathering has to
wait for the disk, the next batch's pages are asked for together: rows of 150 KB then come three times as fast.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch.utils.data import get_worker_info

from torchrecycle.store.contract import Leaf, LeafSpec, Ragged
from torchrecycle.store.mapping import MAPS, PAGE, Plane, blocks_read
from torchrecycle.store.outputs import LARGE_BYTES, empty
from torchrecycle.store.segment import Segment, carrier, ranges, row_bytes, uncarried

SLOT = 4096
"""Rows between two places where a segment may begin: as many as there are bytes in a page."""

OPENING = threading.RLock()
"""Held while a segment is opened or counted, by whichever thread. Workers are forked between two such moments, not in
the midst of one: a lock that another thread holds would stay locked in them for ever."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=OPENING.acquire, after_in_parent=OPENING.release, after_in_child=OPENING.release)

_AROUND = 64 * 1024
"""The system maps so many bytes around each that is touched."""

_SLICE = 2**15
"""Elements: from here on, torch's `index_select` copies line by line, all threads at each, and waits for them."""


class _Column:
    """One column of all segments."""

    def __init__(self, dtype: torch.dtype, width: int, *, blank: bool = False) -> None:
        self.dtype, self.width, self.nbytes = dtype, width, dtype.itemsize * width
        self.plane: Plane | None = None
        self.units = torch.empty((0, width), dtype=dtype)
        """``[capacity, width]`` integers, one line per row or step."""
        self._blank = blank

    def reserve(self, capacity: int) -> None:
        plane = Plane(-(-capacity * self.nbytes // PAGE) * PAGE, blank=self._blank)
        units = plane.bytes[: capacity * self.nbytes].view(self.dtype).view(capacity, self.width)
        self.plane, self.units = plane, units

    def show(self, data: torch.Tensor, first: int) -> None:
        assert self.plane is not None
        if data.numel():
            self.plane.show(data, first * self.nbytes)


@dataclass(slots=True)
class _Space:
    """Numbers of rows, or of the steps of one ragged leaf, and the columns that have them."""

    columns: list[_Column]
    capacity: int = 0
    shown: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """What is where: by first number, the data of each column."""

    def show(self, first: int, count: int, data: list[torch.Tensor]) -> bool:
        """Show data from a number on. Whether all that was shown before is in another place now."""
        grows = first + count >= self.capacity
        if grows:
            self._grow(max(first + count, SLOT) * 4)
        for column, of_column in zip(self.columns, data, strict=True):
            column.show(of_column, first)
        self.shown[first] = data
        return grows

    def _grow(self, capacity: int) -> None:
        grown = [_Column(column.dtype, column.width, blank=column._blank) for column in self.columns]
        for number, column in enumerate(grown):
            column.reserve(capacity)
            for first, data in self.shown.items():
                column.show(data[number], first)
        # Whoever reads meanwhile has the old ones, which stay as they are.
        self.columns[:], self.capacity = grown, capacity


@dataclass(frozen=True, slots=True)
class _Shown:
    """What readers need, replaced as a whole, so that those in other threads see one state."""

    sound: np.ndarray
    """``[capacity]`` bool: which locations have a row that is there and was compared with its sum."""
    dense: tuple[torch.Tensor, ...]
    """For each leaf that is not ragged, ``[capacity, width]``."""
    ragged: tuple[tuple[torch.Tensor, torch.Tensor, np.ndarray], ...]
    """For each that is: offsets within segments by row; values by step; the first step of each segment."""
    firsts: np.ndarray
    """The first location of each segment, ascending."""
    stops: np.ndarray
    """The location behind the last one of each."""
    columns: tuple[_Column, ...]
    """The columns with values, in the order of dense and ragged."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a segment is shown."""

    first: int
    """The location of its first row."""
    steps: tuple[int, ...]
    """The first step of each of its ragged leaves."""
    segment: Segment


class Planes:
    """The segments of one fingerprint side by side. One thread at a time may `show`; any number may read."""

    def __init__(self, specs: Sequence[LeafSpec]) -> None:
        self._specs = tuple(specs)
        self._usable = MAPS and all(row_bytes(spec) for spec in specs)
        self._plain = not any(spec.ragged for spec in specs)
        self._row_bytes = sum(row_bytes(spec) for spec in specs)
        ragged = [spec for spec in specs if self._usable and spec.ragged]
        dense = [_Column(*carrier(spec)) for spec in specs if self._usable and not spec.ragged]
        self._count = len(dense)
        self._rows = _Space([*dense, *(_Column(torch.int64, 1) for _ in ragged), _Column(torch.uint8, 1, blank=True)])
        self._steps = [_Space([_Column(*carrier(spec))]) for spec in ragged]
        self._used = [0 for _ in ragged]
        self._places: dict[int, _Place] = {}
        """By first location."""
        self._shown: _Shown | None = None
        self._touched = 0
        self._cold = True
        """Whether the last large batch had to be read from the disk."""

    def show(self, first: int, segment: Segment) -> None:
        """Show a segment from a location on, if it can be shown: others are gathered from their own maps."""
        if not self._usable or not segment.rows or not _begins_at_pages(segment):
            return
        offsets = [column.offsets for column in segment.columns if column.offsets is not None]
        dense = [column.values for column in segment.columns if column.offsets is None]
        ragged = [column.values for column in segment.columns if column.offsets is not None]
        # What forked workers share of the marks stays shared: it is the same memory, shown again.
        sound = torch.from_numpy(segment.checked.view(np.uint8))
        try:
            shown = [self._show_steps(number, values) for number, values in enumerate(ragged)]
            grown = self._rows.show(first, segment.rows + 1, [*dense, *offsets, sound])
        except OSError:
            # Addresses are limited (`ulimit -v`): what is there already stays.
            self._usable = False
            return
        place = self._places[first] = _Place(first, tuple(start for start, _ in shown), segment)
        self._shown = None
        for moved in self._places.values() if grown or any(grew for _, grew in shown) else (place,):
            self._lay(moved)

    def _lay(self, place: _Place) -> None:
        """Let a segment read its leaves from the planes too, so that its pages are mapped once."""
        dense, offsets, steps = iter(self._rows.columns), iter(self._rows.columns[self._count :]), iter(self._steps)
        numbers = iter(place.steps)
        for column in place.segment.columns:
            if column.offsets is None:
                column.values = next(dense).units[place.first : place.first + place.segment.rows]
            else:
                count, start = len(column.values), next(numbers)
                column.offsets = next(offsets).units[place.first : place.first + place.segment.rows + 1, 0]
                column.values = next(steps).columns[0].units[start : start + count]

    def _show_steps(self, number: int, values: torch.Tensor) -> tuple[int, bool]:
        space = self._steps[number]
        step = PAGE // math.gcd(PAGE, space.columns[0].nbytes)
        first = -(-self._used[number] // step) * step
        grown = space.show(first, len(values), [values])
        self._used[number] = first + len(values)
        return first, grown

    def _look(self) -> _Shown | None:
        """What is shown now. It is put together when rows are read, and not for each of thousands of segments."""
        with OPENING:
            if self._shown is None and self._places:
                self._shown = self._now()
            return self._shown

    def _now(self) -> _Shown:
        columns = self._rows.columns
        places = [self._places[first] for first in sorted(self._places)]
        steps = np.array([place.steps for place in places], dtype=np.int64).reshape(len(places), -1)
        return _Shown(
            sound=columns[-1].units.numpy()[:, 0].view(np.bool_),
            dense=tuple(column.units for column in columns[: self._count]),
            ragged=tuple(
                (offsets.units[:, 0], space.columns[0].units, steps[:, number])
                for number, (offsets, space) in enumerate(zip(columns[self._count : -1], self._steps, strict=True))
            ),
            firsts=np.array([place.first for place in places], dtype=np.int64),
            stops=np.array([place.first + place.segment.rows for place in places], dtype=np.int64),
            columns=(*columns[: self._count], *(space.columns[0] for space in self._steps)),
        )

    def gather(self, locations: torch.Tensor) -> list[Leaf] | None:
        """Copies of the rows at ``[n]`` int64 locations; None if one is not on the planes or not known to be sound."""
        shown = self._shown or self._look()
        if shown is None:
            return None
        where = locations.numpy()
        try:
            if not shown.sound.take(where).all():
                return None
            if self._plain and len(where) * self._row_bytes < LARGE_BYTES:
                return self._gather_plain(shown, locations, where)
            before = blocks_read()
            if self._cold:
                self.read(where)
            gather = self._gather_plain if self._plain else self._gather_ragged
            leaves = gather(shown, locations, where)
            self._cold = blocks_read() > before
            return leaves
        except IndexError:
            return None

    def _gather_plain(self, shown: _Shown, locations: torch.Tensor, where: np.ndarray) -> list[Leaf]:
        self.touch(len(where) * (self._row_bytes + _AROUND))
        return [
            uncarried(spec, _picked(units, locations)) for spec, units in zip(self._specs, shown.dense, strict=True)
        ]

    def _gather_ragged(self, shown: _Shown, locations: torch.Tensor, where: np.ndarray) -> list[Leaf] | None:
        leaves: list[Leaf] = []
        dense, ragged = iter(shown.dense), iter(shown.ragged)
        number = np.searchsorted(shown.firsts, where, side="right") - 1
        if not (where < shown.stops[number]).all():
            return None  # of a segment that another thread has shown since we looked
        for spec in self._specs:
            if not spec.ragged:
                leaves.append(uncarried(spec, _picked(next(dense), locations)))
                continue
            offsets, values, steps = next(ragged)
            starts = offsets.index_select(0, locations).numpy()
            lengths = offsets.index_select(0, locations + 1).numpy() - starts
            index = torch.from_numpy(ranges(starts + steps[number], lengths))
            leaves.append(Ragged(uncarried(spec, _picked(values, index)), torch.from_numpy(lengths)))
            self.touch(len(index) * row_bytes(spec))
        self.touch(len(where) * (self._row_bytes + _AROUND * len(self._specs)))
        return leaves

    def read(self, where: np.ndarray) -> None:
        """Have the rows at these locations of shown segments read from the disk, neighbours in one piece."""
        shown = self._shown or self._look()
        if shown is None or not len(where):
            return
        where = np.unique(where)
        number = np.searchsorted(shown.firsts, where, side="right") - 1
        # Where no segment is shown, reading would end the process.
        there = (number >= 0) & (where < shown.stops[number])
        where, number = where[there], number[there]
        for at, column in enumerate(shown.columns):
            if at < self._count:
                self.touch(_read(column, where, where + 1))
            else:
                offsets, _, steps = shown.ragged[at - self._count]
                first, bounds = steps[number], offsets.numpy()
                self.touch(_read(column, bounds[where] + first, bounds[where + 1] + first))

    def touch(self, nbytes: int) -> None:
        """Count bytes that may have been mapped, and let go when they may be too many."""
        self._touched += nbytes
        if self._touched > resident_bytes():
            self._touched = 0
            if _mapped_bytes() > resident_bytes():
                self.release()

    def release(self) -> None:
        """Let go of all pages that were read."""
        for space in (self._rows, *self._steps):
            for column in space.columns:
                if column.plane is not None:
                    column.plane.release()


def _picked(units: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows, width = len(index), units.shape[1]
    if rows * width * 8 < LARGE_BYTES:
        return units.index_select(0, index)
    pieces = 1
    while width // pieces >= _SLICE and width % (2 * pieces) == 0:
        pieces *= 2
    if pieces > 1:
        units = units.view(-1, width // pieces)
        index = (index[:, None] * pieces + torch.arange(pieces)).view(-1)
    out = empty(rows * pieces, width // pieces, units.dtype)
    return torch.index_select(units, 0, index, out=out).view(rows, width)


def _begins_at_pages(segment: Segment) -> bool:
    columns = [column.values for column in segment.columns if column.values.numel()]
    columns += [column.offsets for column in segment.columns if column.offsets is not None]
    return all(data.data_ptr() % PAGE == 0 for data in columns)


def _read(column: _Column, starts: np.ndarray, stops: np.ndarray) -> int:
    """Read ascending ranges of units, those that touch as one. How many bytes that is."""
    if not len(starts):
        return 0
    assert column.plane is not None
    starts, stops = starts * column.nbytes, stops * column.nbytes
    new = np.flatnonzero(starts[1:] > stops[:-1] + PAGE) + 1
    starts, stops = starts[np.r_[0, new]], stops[np.r_[new - 1, -1]]
    column.plane.read(list(zip(starts.tolist(), stops.tolist(), strict=True)))
    return int((stops - starts).sum())


@cache
def resident_bytes() -> int:
    """How many bytes of mapped files a process may hold: a quarter of the memory, shared among a loader's workers."""
    worker = get_worker_info()
    memory = PAGE * os.sysconf("SC_PHYS_PAGES")
    return min(memory, _limit_of_group()) // 4 // (worker.num_workers if worker else 1)


if MAPS:
    os.register_at_fork(after_in_child=resident_bytes.cache_clear)


def _mapped_bytes() -> int:
    """How many bytes of files are mapped into this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[2]) * PAGE


def _limit_of_group() -> int:
    """What a container allows, in bytes."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 2**63
