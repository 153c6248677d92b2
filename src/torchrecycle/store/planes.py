"""All segments of a fingerprint as one tensor per leaf, so that a batch is one `torch.index_select`.

Row r of segment s has the number ``first[s] + r`` on every plane, where ``first[s]`` is a multiple of 4,096: whatever
a row's size, each segment then begins at a page. 16 segments of 1,700 rows of 150 KB take 10 GB of addresses, and of
memory what has been read. The steps of ragged rows have numbers of their own.

Pages that were read stay with the process until they are released. Releasing costs a page fault for each that is read
again, so it is done when they may come to a quarter of the machine's memory, and not before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import get_worker_info

from torchrecycle.store.contract import Leaf, LeafSpec, Ragged
from torchrecycle.store.mapping import MAPS, PAGE, Plane
from torchrecycle.store.segment import Segment, carrier, ranges, row_bytes, uncarried

_SLOT = 4096
"""Rows between two places where a segment may begin: as many as there are bytes in a page."""

_AROUND = 64 * 1024
"""The system maps so many bytes around each that is touched."""

_NO_ROWS = -(2**62)


class _Column:
    """One column of all segments."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.width, self.nbytes = dtype, width, dtype.itemsize * width
        self.plane: Plane | None = None
        self.units = torch.empty(0)
        """``[capacity, width]`` integers, one line per row or step."""

    def reserve(self, capacity: int) -> None:
        self.plane = Plane(-(-capacity * self.nbytes // PAGE) * PAGE)
        self.units = self.plane.bytes[: capacity * self.nbytes].view(self.dtype).view(capacity, self.width)

    def show(self, data: torch.Tensor, first: int) -> None:
        assert self.plane is not None
        if data.numel():
            self.plane.show(data, first * self.nbytes)


@dataclass(slots=True)
class _Space:
    """Numbers of rows, or of the steps of one ragged leaf, and the columns that have them."""

    columns: list[_Column]
    step: int
    """What a segment's first number is a multiple of."""
    capacity: int = 0
    used: int = 0
    shown: list[tuple[int, list[torch.Tensor]]] = field(default_factory=list)
    """What is where: first number, and the data of each column."""

    def add(self, count: int, data: list[torch.Tensor]) -> int:
        first = -(-self.used // self.step) * self.step
        if first + count >= self.capacity:
            self._grow(max(first + count, self.step) * 4)
        for column, of_column in zip(self.columns, data, strict=True):
            column.show(of_column, first)
        self.shown.append((first, data))
        self.used = first + count
        return first

    def _grow(self, capacity: int) -> None:
        for column in self.columns:
            column.reserve(capacity)
        self.capacity = capacity
        for first, data in self.shown:
            for column, of_column in zip(self.columns, data, strict=True):
                column.show(of_column, first)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the segments are, by number: replaced as a whole, so that readers in other threads see one state."""

    limit: np.ndarray
    """The first location that a segment does not have; far below zero if it is not on the planes."""
    to_row: np.ndarray
    """From a location to its number on the planes."""
    to_step: tuple[np.ndarray, ...]
    """For each ragged leaf, from a segment's offsets to numbers of steps."""
    segments: dict[int, tuple[int, Segment]]
    """First number and segment."""


class Planes:
    """The segments of one fingerprint side by side. One thread at a time may `add`; any number may read."""

    def __init__(self, specs: Sequence[LeafSpec]) -> None:
        self._specs = tuple(specs)
        self._usable = MAPS and all(row_bytes(spec) for spec in specs)
        self._dense = [_Column(*carrier(spec)) for spec in specs if self._usable and not spec.ragged]
        self._offsets = [_Column(torch.int64, 1) for spec in specs if self._usable and spec.ragged]
        self._checked = _Column(torch.uint8, 1)
        self._rows = _Space([*self._dense, *self._offsets, self._checked], _SLOT)
        self._steps = [
            _Space([_Column(*carrier(spec))], PAGE // math.gcd(PAGE, row_bytes(spec)))
            for spec in specs
            if self._usable and spec.ragged
        ]
        self._table = _Table(
            np.full(1, _NO_ROWS), np.zeros(1, np.int64), tuple(np.zeros((len(self._offsets), 1), np.int64)), {}
        )
        self._touched = 0

    def add(self, number: int, segment: Segment) -> None:
        """Show a segment, if it can be shown: others are gathered from their own maps."""
        if not self._usable or not segment.rows or not _begins_at_pages(segment):
            return
        offsets = [column.offsets for column in segment.columns if column.offsets is not None]
        dense = [column.values for column in segment.columns if column.offsets is None]
        ragged = [column.values for column in segment.columns if column.offsets is not None]
        try:
            # What forked workers share of the marks stays shared: it is the same memory, shown again.
            checked = torch.from_numpy(segment.checked.view(np.uint8))
            first = self._rows.add(segment.rows + 1, [*dense, *offsets, checked])
            steps = [space.add(len(values), [values]) for space, values in zip(self._steps, ragged, strict=True)]
        except OSError:
            # Addresses are limited (`ulimit -v`): what is there already stays.
            self._usable = False
            return
        self._table = self._with(number, segment, first, steps)

    def _with(self, number: int, segment: Segment, first: int, steps: Sequence[int]) -> _Table:
        table = self._table
        size = max(len(table.limit) - 1, number + 1)
        limit, to_row = _longer(table.limit, size, _NO_ROWS), _longer(table.to_row, size, 0)
        limit[number] = (number << 32) + segment.rows
        to_row[number] = first - (number << 32)
        to_step = []
        for known, start in zip(table.to_step, steps, strict=True):
            longer = _longer(known, size, 0)
            longer[number] = start
            to_step.append(longer)
        return _Table(limit, to_row, tuple(to_step), {**table.segments, number: (first, segment)})

    def leave(self, number: int) -> None:
        """Show a segment no longer: its locations are then not on the planes."""
        table = self._table
        if number in table.segments:
            limit = table.limit.copy()
            limit[number] = _NO_ROWS
            kept = {other: found for other, found in table.segments.items() if other != number}
            self._table = _Table(limit, table.to_row, table.to_step, kept)

    def gather(self, where: np.ndarray) -> tuple[list[Leaf], np.ndarray] | None:
        """Copies of the rows at ``[n]`` locations, and the places of those that nobody has compared with their sums.

        None if some of the rows are not on the planes.
        """
        table = self._table
        # As unsigned, since a negative number would count from the end.
        number = (where >> 32).view(np.uint64)
        try:
            if not (where < table.limit[number]).all():
                return None
        except IndexError:
            return None
        at = where + table.to_row[number]
        index = torch.from_numpy(at)
        dense, ragged = iter(self._dense), iter(zip(self._offsets, self._steps, table.to_step, strict=True))
        leaves: list[Leaf] = []
        nbytes = 0
        for spec in self._specs:
            if not spec.ragged:
                units = next(dense).units.index_select(0, index)
                leaves.append(uncarried(spec, units))
            else:
                offsets, space, to_step = next(ragged)
                starts = offsets.units[:, 0].index_select(0, index).numpy()
                lengths = offsets.units[:, 0].index_select(0, index + 1).numpy() - starts
                steps = torch.from_numpy(ranges(starts + to_step[number], lengths))
                units = space.columns[0].units.index_select(0, steps)
                leaves.append(Ragged(uncarried(spec, units), torch.from_numpy(lengths)))
            nbytes += units.numel() * units.element_size()
        self._touch(nbytes + _AROUND * len(at) * len(self._specs))
        unchecked = self._checked.units.numpy()[at, 0] == 0
        return leaves, np.flatnonzero(unchecked) if unchecked.any() else at[:0]

    def will_need(self, where: np.ndarray) -> None:
        """Ask the disk for the rows at these locations, neighbours in one piece, but for those not on the planes."""
        table = self._table
        number = where >> 32
        known = (number >= 0) & (number < len(table.limit) - 1)
        number = np.where(known, number, -1)
        known = where < table.limit[number]
        where, number = where[known], number[known]
        at = where + table.to_row[number]
        order = np.argsort(at)
        at, number = at[order], number[order]
        if not len(at):
            return
        for column in self._dense:
            _ask(column, at, at + 1)
        for offsets, space, to_step in zip(self._offsets, self._steps, table.to_step, strict=True):
            bounds = offsets.units[:, 0].numpy()
            shift = to_step[number]
            _ask(space.columns[0], bounds[at] + shift, bounds[at + 1] + shift)

    def _touch(self, nbytes: int) -> None:
        self._touched += nbytes
        if self._touched > resident_bytes():
            self.release()

    def release(self) -> None:
        """Let go of all pages that were read."""
        self._touched = 0
        for space in (self._rows, *self._steps):
            for column in space.columns:
                if column.plane is not None:
                    column.plane.release()


def _longer(known: np.ndarray, size: int, rest: int) -> np.ndarray:
    made = np.full(size + 1, rest, dtype=np.int64)
    made[: len(known) - 1] = known[:-1]
    return made


def _begins_at_pages(segment: Segment) -> bool:
    columns = [column.values for column in segment.columns if column.values.numel()]
    columns += [column.offsets for column in segment.columns if column.offsets is not None]
    return all(data.data_ptr() % PAGE == 0 for data in columns)


def _ask(column: _Column, starts: np.ndarray, stops: np.ndarray) -> None:
    """Ask for ascending ranges of units, those that touch as one."""
    assert column.plane is not None
    starts, stops = starts * column.nbytes, stops * column.nbytes
    new = np.flatnonzero(starts[1:] > stops[:-1] + PAGE) + 1
    for start, stop in zip(starts[np.r_[0, new]].tolist(), stops[np.r_[new - 1, -1]].tolist(), strict=True):
        column.plane.will_need(start, stop)


_RESIDENT: dict[int, int] = {}


def resident_bytes() -> int:
    """How many bytes of mapped files a process may hold: a quarter of the memory, shared among a loader's workers."""
    pid = os.getpid()
    if pid not in _RESIDENT:
        worker = get_worker_info()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _RESIDENT.clear()
        _RESIDENT[pid] = min(memory, _limit_of_group()) // 4 // (worker.num_workers if worker else 1)
    return _RESIDENT[pid]


def _limit_of_group() -> int:
    """What a container allows, in bytes."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 2**63
