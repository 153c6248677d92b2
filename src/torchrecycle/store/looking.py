"""Looking keys up: in the index on disk for most of a large store, in memory for what came since.

What is on the shelf is listed when it is first asked, and again by `refresh`. An index on disk that covers a segment
spares opening it; the keys of the others are read from them into a sorted index in memory.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence

import numpy as np

from torchrecycle.errors import DamagedRowError, StoreError
from torchrecycle.store.index import Index, halves
from torchrecycle.store.index_file import INDEX, IndexFile, Listed, open_index, pack_index
from torchrecycle.store.mapping import map_file
from torchrecycle.store.numbered import Numbered, is_segment
from torchrecycle.store.segment import Segment
from torchrecycle.store.shelf import Shelf

IN_MEMORY = 200_000
"""How many keys are kept in memory before they are written to an index on disk."""

OUTSIDE = 8
"""Of so many keys of an index on disk, one may be outside of it: with 10 million that is 30 MB of memory for each
process, and an index is written some thirty times while they come."""


class Lookup:
    """Which location a key has, as far as one process knows."""

    def __init__(self, shelf: Shelf, segments: Numbered) -> None:
        self._shelf, self._segments = shelf, segments
        self.forget()

    def forget(self) -> None:
        """Look at the shelf anew when something is asked."""
        self._listed = False
        self._file: IndexFile | None = None
        self._firsts = np.empty(0, dtype=np.int64)
        """The first location of each segment of the index on disk; -1 for those that have left."""
        self._covered: set[int] = set()
        self._memory: Index | None = None

    # What is there

    def refresh(self) -> None:
        """See what others have published, and what has left."""
        names = [name for name in self._shelf.names() if is_segment(name)]
        gone = {entry.name for entry in self._segments.listed}.difference(names)
        if (self._segments.leave(gone) | self._segments.forget_changed()) and self._listed:
            self.forget()
        if not self._listed:
            self._open_index(set(names))
        for name in names:
            self._find(name)
        # Not before: what cannot be opened is an error each time that somebody looks, and no miss.
        self._listed = True
        self._write_index_if_due(names)

    def overwritten(self) -> bool:
        """Forget files that were written over since they were opened. Whether there are any."""
        found = self._segments.forget_changed()
        if found:
            self.forget()
        return found

    def _find(self, name: str) -> None:
        if self._segments.number_of(name) is None:
            number = self._segments.find(name)
            if number is not None and self._memory is not None:
                self._add(self._memory, number)

    def added(self, name: str) -> None:
        """Look a segment up that this process has published."""
        if self._listed:
            self._find(name)
            self._write_index_if_due(self._shelf.names())
        else:
            self.refresh()

    def _list_once(self) -> None:
        if not self._listed:
            self.refresh()

    def _visible(self) -> list[int]:
        self._list_once()
        return self._segments.visible()

    @property
    def nbytes(self) -> int:
        """The bytes of the segments' data."""
        return sum(self._segments.listed[number].nbytes for number in self._visible())

    # Looking up

    def __len__(self) -> int:
        # Keys of the index on disk whose segments have left are counted no more; which they are is not known.
        memory = self._in_memory()
        if self._file is None:
            return len(memory)
        left = sum(entry.rows for entry, first in zip(self._file.segments, self._firsts, strict=True) if first < 0)
        return max(0, self._file.keys - left) + len(memory)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """``[n]`` int64 locations of ``[n, 16]`` keys, -1 where there is none."""
        memory = self._in_memory()
        if self._file is None:
            return memory.find(keys)
        first, second = halves(keys)
        place = self._file.run.find(first, second)
        started = self._firsts[place >> 32]  # of -1 some segment, which is not used
        found = np.where((place >= 0) & (started >= 0), started + (place & 0xFFFFFFFF), -1)
        return np.maximum(found, memory.find(keys))

    def _in_memory(self) -> Index:
        self._list_once()
        if self._memory is None:
            memory = Index()
            for number in self._segments.visible():
                if number not in self._covered:
                    self._add(memory, number)
            self._memory = memory
        return self._memory

    def _add(self, memory: Index, number: int) -> None:
        segment = self._segments[number]
        memory.add(segment.keys.numpy(), self._segments.locations(number))

    # The index on disk

    def read_index(self) -> IndexFile | None:
        """The index on the shelf, or None.

        Raises:
            DamagedRowError: It is not as it was written.
        """
        data = self._shelf.read(INDEX)
        return None if data is None else open_index(f"{self._shelf.url}/{INDEX}", data, owner=self._shelf.owner)

    def _open_index(self, names: set[str]) -> None:
        # A damaged index is worth nothing and harms nobody; `verify` sets it aside.
        with contextlib.suppress(DamagedRowError):
            index = self.read_index()
            if index is not None:
                self._use(index, names)

    def _use(self, index: IndexFile, names: set[str]) -> None:
        firsts = np.full(len(index.segments), -1, dtype=np.int64)
        covered: set[int] = set()
        for place, entry in enumerate(index.segments):
            if entry.name in names and is_segment(entry.name):
                number = self._segments.number_of(entry.name)
                number = self._segments.expect(entry) if number is None else number
                if self._segments.listed[number] == entry and number not in self._segments.hidden:
                    firsts[place] = self._segments.first(number)
                    covered.add(number)
        self._file, self._firsts, self._covered = index, firsts, covered
        self._memory = None

    def _write_index_if_due(self, names: Sequence[str]) -> None:
        """Write an index when much is not covered by the one there is: in memory it would be anonymous memory."""
        listed = self._segments.listed
        covered = sum(listed[number].rows for number in self._covered)
        outside = sum(listed[number].rows for number in self._segments.visible() if number not in self._covered)
        if not self._shelf.maps or outside <= max(IN_MEMORY, covered // OUTSIDE):
            return
        there = set(names)
        known = [number for number in self._segments.visible() if listed[number].name in there]
        # Without an index keys are found as well. What is wrong with a segment is said when it is read.
        with contextlib.suppress(StoreError, OSError):
            self._use(self._written([(listed[number], self._segments[number]) for number in known]), there)

    def _written(self, segments: Sequence[tuple[Listed, Segment]]) -> IndexFile:
        """The index, on the shelf if that may be written, else in a file without a name."""
        with contextlib.suppress(StoreError):
            self._shelf.write(INDEX, pack_index(segments, owner=self._shelf.owner))
            index = self.read_index()
            if index is not None:
                return index
        packed = pack_index(segments, owner=self._shelf.owner)
        with tempfile.TemporaryFile() as file:
            for chunk in packed.chunks:
                file.write(chunk.data)
            file.flush()
            data = map_file(file.fileno(), packed.nbytes)
            return open_index(f"{self._shelf.url}/{INDEX}", data, owner=self._shelf.owner)
