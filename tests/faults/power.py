"""A power cut: what a file system may have kept of the calls that were made before it.

POSIX promises two things. What a file held at its last ``fsync`` is there, and the names that a folder had at its last
``fsync`` are there. Of all else any part may be there: a file that was written and not synced may be empty, cut, or
full of zeros; a name may lead to what it led to before or after a rename, each name by itself. `Disk` looks at a folder
after each call of the system and remembers what was synced, and `Moment.left` makes one of the states that a cut at
that moment may leave. It is stricter than ext4, xfs or btrfs, which keep the order of renames.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.killing import after_each_call, is_of_the_system

Listing = dict[str, int]
"""The names in a folder; each leads to a file or a folder by a number of our own."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A folder after one call."""

    listings: dict[int, list[Listing]]
    """Per folder, its names at its last fsync, and at each change since."""
    contents: dict[int, bytes]
    """Per file, what it holds now, or held when it was last seen."""
    synced: dict[int, bytes]
    """Per file, what it held at its last fsync."""
    done: int
    """How many of the acts had returned."""

    def left(self, folder: Path, how: str, draw: random.Random) -> None:
        """Make one state that a cut may leave.

        Args:
            folder: A new one.
            how: ``"synced"`` for what must be there and nothing else; ``"named"`` for all names with as little in the
                files as may be; ``"drawn"`` for anything between.
            draw: What it is drawn with.
        """
        self._make(0, folder, how, draw)

    def _make(self, number: int, path: Path, how: str, draw: random.Random) -> None:
        if number not in self.listings:
            path.write_bytes(self._kept(number, how, draw))
            return
        path.mkdir()
        listings = self.listings[number]
        for name in sorted(set().union(*listings)):
            listing = {"synced": listings[0], "named": listings[-1]}.get(how) or draw.choice(listings)
            if name in listing:
                self._make(listing[name], path / name, how, draw)

    def _kept(self, number: int, how: str, draw: random.Random) -> bytes:
        content = self.contents[number]
        if self.synced.get(number) == content:
            return content
        cut = 0 if how == "named" else draw.randrange(len(content) + 1)
        return content[:cut] + bytes(draw.choice([0, len(content) - cut]))


class Disk:
    """Watches what is done in one folder by this process."""

    def __init__(self, root: Path) -> None:
        self.moments: list[Moment] = []
        self.done = 0
        self._root = root
        self._numbers: dict[int, int] = {os.stat(root).st_ino: 0}
        self._next = 1
        self._listings: dict[int, list[Listing]] = {0: [{}]}
        self._contents: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this context each call of the system is followed by a look at the folder."""
        originals = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        for name, original in originals.items():
            setattr(os, name, self._noting(original))
        after_each_call(self._called)
        try:
            yield
        finally:
            after_each_call(None)
            for name, original in originals.items():
                setattr(os, name, original)

    def _noting(self, sync: Callable[[int], None]) -> Callable[[Any], None]:
        def noted(descriptor: Any) -> None:
            sync(descriptor)
            number = self._numbers.get(os.fstat(descriptor).st_ino)
            if number in self._listings:
                self._listings[number] = self._listings[number][-1:]
            elif number is not None:
                self._synced[number] = self._contents[number]
            self._remember()

        return noted

    def _called(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_return" and is_of_the_system(called):
            seen: set[int] = set()
            self._look(self._root, 0, seen)
            # The number of a file that has gone may be given to a new one.
            self._numbers = {inode: number for inode, number in self._numbers.items() if inode in seen}
            self._remember()

    def _look(self, folder: Path, number: int, seen: set[int]) -> None:
        listing: Listing = {}
        seen.add(os.stat(folder).st_ino)
        for entry in os.scandir(folder):
            inode = entry.inode()
            seen.add(inode)
            if inode not in self._numbers:
                self._numbers[inode], self._next = self._next, self._next + 1
            child = listing[entry.name] = self._numbers[inode]
            if entry.is_dir(follow_symlinks=False):
                self._listings.setdefault(child, [{}])
                self._look(Path(entry.path), child, seen)
            else:
                self._contents[child] = Path(entry.path).read_bytes()
        if listing != self._listings[number][-1]:
            self._listings[number] = [*self._listings[number], listing]

    def _remember(self) -> None:
        moment = Moment(dict(self._listings), dict(self._contents), dict(self._synced), self.done)
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)
