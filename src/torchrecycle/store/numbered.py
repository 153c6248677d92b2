"""The segments of one fingerprint: numbered in the order in which they were found, opened when they are read.

Each takes a range of locations, which must mean the same rows for as long as anybody holds locations, in workers too,
which are given the names and open the files by themselves. Since files can be renamed and exchanged meanwhile, a
segment is known again by its digest, not by its name. What has left the shelf is either still mapped, and goes on being
read; or was merged into another segment, which says where its rows are now; or is gone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from torchrecycle.errors import GoneRowsError, StoreError
from torchrecycle.store.container import damaged
from torchrecycle.store.contract import LeafSpec
from torchrecycle.store.index_file import Listed
from torchrecycle.store.joining import by_number
from torchrecycle.store.planes import OPENING, SLOT, Planes
from torchrecycle.store.segment import Origin, Segment
from torchrecycle.store.shelf import Shelf

_SEGMENT_NAME = re.compile(r"[A-Za-z0-9]+-[0-9]+\.safetensors")


def is_segment(name: str) -> bool:
    """Whether a file of that name is a segment."""
    return _SEGMENT_NAME.fullmatch(name) is not None


class Numbered:
    """Names, digests and, once they were read, the segments."""

    def __init__(self, shelf: Shelf, specs: Sequence[LeafSpec]) -> None:
        self._shelf = shelf
        self._specs = tuple(specs)
        self.listed: list[Listed] = []
        """What is known of each segment, by number."""
        self._firsts: list[int] = []
        """The first location of each."""
        self.hidden: set[int] = set()
        """Numbers of segments that have left the shelf: not looked up any more."""
        self._aside: set[int] = set()
        """Those of them that were damaged: not read any more."""
        self._forget_process()

    def _forget_process(self) -> None:
        self._numbers = {entry.name: number for number, entry in enumerate(self.listed)}
        self._opened: dict[int, Segment] = {}
        self._versions: dict[int, tuple[int, ...] | None] = {}
        self._moved: dict[int, np.ndarray] = {}
        self.planes = Planes(self._specs)

    def __getstate__(self) -> dict[str, Any]:
        left = ("_numbers", "_opened", "_versions", "_moved", "planes")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process()

    def __len__(self) -> int:
        return len(self.listed)

    def number_of(self, name: str) -> int | None:
        """The number of the segment of that name, if it has one."""
        return self._numbers.get(name)

    def visible(self) -> list[int]:
        """The numbers of segments that are looked up."""
        return [number for number in range(len(self.listed)) if number not in self.hidden]

    def expect(self, entry: Listed) -> int:
        """Number a segment of which all is known, without opening it."""
        with OPENING:
            known = self._numbers.get(entry.name)
            return self._expect(entry) if known is None else known

    def _expect(self, entry: Listed) -> int:
        number = len(self.listed)
        used = self._firsts[-1] + self.listed[-1].rows + 1 if number else 0
        self._firsts.append(-(-used // SLOT) * SLOT)
        self.listed.append(entry)
        self._numbers[entry.name] = number
        return number

    def find(self, name: str) -> int | None:
        """Open a segment and number it; None if it is not there."""
        with OPENING:
            if name in self._numbers:  # another thread was first
                return self._numbers[name]
            segment = self.read(name)
            if segment is None:
                return None
            number = self.expect(Listed(name, segment.digest, segment.rows, segment.nbytes))
            self.open(number, segment)
        return number

    def read(self, name: str) -> Segment | None:
        """The segment of that name as it is on the shelf now, or None.

        Raises:
            DamagedRowError: It is not as it was written.
        """
        version = self._shelf.version(name)
        data = self._shelf.read(name)
        if data is None:
            return None
        segment = Segment(f"{self._shelf.url}/{name}", data, self._specs, owner=self._shelf.owner)
        segment.version = version
        return segment

    def open(self, number: int, segment: Segment) -> None:
        """Read this segment where that number is asked for, instead of any that was opened before."""
        with OPENING:
            self._opened[number] = segment
            self._versions[number] = segment.version
            self.planes.show(self._firsts[number], segment)

    def __getitem__(self, number: int) -> Segment:
        """The segment of that number, opened if need be.

        Raises:
            DamagedRowError: The file of its name is another one, or damaged.
            GoneRowsError: It is not there any more.
        """
        found = self._opened.get(number)
        if found is not None:
            return found
        with OPENING:
            if number not in self._opened:
                self.open(number, self._open_again(number))
            return self._opened[number]

    def _open_again(self, number: int) -> Segment:
        entry = self.listed[number]
        segment = None if number in self._aside else self.read(entry.name)
        if segment is None:
            raise GoneRowsError(
                f"{self._shelf.url}/{entry.name} is no longer there: it was set aside, merged, evicted or deleted. "
                "Look the keys up again"
            )
        if segment.digest != entry.digest:
            raise damaged(segment.file, "it holds other rows than when it was found: files were exchanged")
        return segment

    def leave(self, names: Iterable[str], *, damaged: bool = False) -> bool:
        """Look these segments up no more; do not read them either if they are damaged. Whether any was known."""
        numbers = {number for name in names if (number := self._numbers.get(name)) is not None}
        new = not numbers <= self.hidden
        self.hidden |= numbers
        if damaged:
            for number in numbers:
                self._aside.add(number)
                segment = self._opened.pop(number, None)
                if segment is not None:
                    segment.checked[:] = False  # on the planes as well
                self._moved.pop(number, None)
        return new

    def forget(self, name: str) -> None:
        """Know a file no more by its name: it is another one than was numbered."""
        self.leave([name], damaged=True)
        self._numbers.pop(name, None)

    def forget_changed(self) -> bool:
        """Forget the files that were written over since they were opened. Whether there are any."""
        changed = [
            self.listed[number].name
            for number, version in self._versions.items()
            if number in self._opened
            and number not in self.hidden
            and self._shelf.version(self.listed[number].name) not in (version, None)
        ]
        for name in changed:
            self.forget(name)
        return bool(changed)

    # Locations

    def first(self, number: int) -> int:
        """The location of a segment's first row."""
        return self._firsts[number]

    def locations(self, number: int) -> np.ndarray:
        """The locations of a segment's rows."""
        first = self._firsts[number]
        return np.arange(first, first + self.listed[number].rows, dtype=np.int64)

    def names_of(self, where: np.ndarray) -> list[str]:
        """The names of the segments that some locations are in."""
        numbers = np.searchsorted(np.array(self._firsts, dtype=np.int64), where, side="right") - 1
        return [self.listed[number].name for number in np.unique(numbers).tolist()]

    def split(self, where: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Which segments some locations are in; for each, which of the locations, and their rows.

        Raises:
            StoreError: A location that no lookup has given.
        """
        firsts = np.array(self._firsts, dtype=np.int64)
        numbers = np.searchsorted(firsts, where, side="right") - 1
        parts = []
        for number, at in by_number(numbers):
            rows = where[at] - (firsts[number] if number >= 0 else 0)
            if number < 0 or int(rows.max()) >= self.listed[number].rows:
                wrong = int(where[at][rows.argmax()])
                what = "lookup gives -1 for a key that is not there" if wrong == -1 else f"no row is at {wrong}"
                raise StoreError(
                    f"no such location in {self._shelf.url}: {what}; gather takes what lookup of this object gave"
                )
            parts.append((number, at, rows))
        return parts

    def read_unchecked(self, parts: Sequence[tuple[Segment, int, np.ndarray]]) -> None:
        """Have what is to be checked of some segments read at once: hashing would ask the disk page by page.

        Args:
            parts: segments, their first locations, and rows of them.
        """
        self.planes.read(np.concatenate([first + segment.unchecked(rows) for segment, first, rows in parts]))

    def moved(self, where: np.ndarray) -> np.ndarray:
        """The locations, those in segments that were merged into others replaced by where their rows are now.

        Opens all segments that the locations are in.

        Raises:
            DamagedRowError: A file is another one than was found, or damaged.
            GoneRowsError: Some of the rows are not there any more.
            StoreError: A location that no lookup has given.
        """
        moved = where
        for number, at, rows in self.split(where):
            try:
                self[number]
            except GoneRowsError:
                new = self._new_places(number)[rows]
                if (new < 0).any():
                    raise
                moved = where.copy() if moved is where else moved
                moved[at] = new
        return moved

    def _new_places(self, number: int) -> np.ndarray:
        """For each row of a segment that is gone, where it is now, or -1."""
        if number not in self._moved:
            entry = self.listed[number]
            known = (entry.name, entry.digest)
            places = np.full(entry.rows, -1, dtype=np.int64)
            with OPENING:
                for other, origin in self._merged():
                    if known in origin.segments:
                        came = origin.rows.numpy().astype(np.int64)
                        rows = np.flatnonzero(came[:, 0] == origin.segments.index(known))
                        inside = rows[came[rows, 1] < entry.rows]
                        places[came[inside, 1]] = self._firsts[other] + inside
            self._moved[number] = places
        return self._moved[number]

    def _merged(self) -> list[tuple[int, Origin]]:
        """The segments on the shelf that were merged of others, and of which."""
        found = []
        for name in filter(is_segment, self._shelf.names()):
            # What cannot be read says nothing of where rows have gone.
            with contextlib.suppress(StoreError):
                number = self._numbers.get(name)
                number = self.find(name) if number is None else number
                origin = None if number is None else self[number].origin
                if number is not None and origin is not None:
                    found.append((number, origin))
        return found
