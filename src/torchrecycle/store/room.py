"""Least recently used rows make room for new ones: `evict`, and a store with a limit.

A store of ``max_bytes="200 GB"`` holds the rows of a dozen cuts. When a thirteenth is filled, the segments whose rows
nobody has looked up for the longest time go first. When a segment was used is its file's access time, which this
package sets itself, at most once an hour, since systems are mounted with ``noatime`` or move it for any backup; our own
reading for other purposes does not move it.

A process must not evict what it is about to read: of the fingerprint that is written, and of those that it fills at the
same time (`fill_many`), only segments go which it has neither written nor looked up. If that is not enough, it is
`ENOSPC`, as on a full disk: filling ends, and the training goes on.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torchrecycle.errors import StoreError
from torchrecycle.store.holdings import leftovers_of
from torchrecycle.store.index_file import INDEX
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.shelf import FileStat, Shelf, in_use
from torchrecycle.store.sizes import bytes_in_words, counted

__all__ = ["EvictReport", "Room", "evict_shelves"]

TOGETHER_SECONDS = 600.0
"""Two fingerprints that are written in turns, with pauses shorter than this, are filled at the same time."""


@dataclass(frozen=True, slots=True)
class EvictReport:
    """What `evict` has done."""

    max_bytes: int
    nbytes_before: int
    nbytes: int
    """The size of the store now."""
    segments: tuple[str, ...]
    """The segments that are gone, as ``fingerprint/name``, the least recently used first."""
    fingerprints: tuple[str, ...]
    """The fingerprints of which nothing is left."""

    @property
    def fits(self) -> bool:
        """Whether the store is as small as was asked for."""
        return self.nbytes <= self.max_bytes

    def __str__(self) -> str:
        if self.nbytes == self.nbytes_before:
            words = f"{bytes_in_words(self.nbytes)}: nothing to do"
        else:
            words = f"{bytes_in_words(self.nbytes_before)} -> {bytes_in_words(self.nbytes)}: "
            words += f"{counted(len(self.segments), 'segment')} evicted"
            words += f", {counted(len(self.fingerprints), 'fingerprint')} removed entirely" if self.fingerprints else ""
        return words if self.fits else f"{words}. What is left is more than {bytes_in_words(self.max_bytes)}"


@dataclass(frozen=True, slots=True)
class _File:
    """A file that may go."""

    fingerprint: str
    name: str
    stat: FileStat


def evict_shelves(shelves: Mapping[str, Shelf], max_bytes: int) -> EvictReport:
    """Remove what is least recently used until all files together take no more than so many bytes."""
    stats = {fingerprint: shelf.stats() for fingerprint, shelf in shelves.items()}
    before = _total(stats)
    chosen, _ = _chosen([*_dead(stats), *_segments(stats)], stats, before - max_bytes)
    emptied = _drop(shelves, stats, chosen)
    after = _total({fingerprint: shelf.stats() for fingerprint, shelf in shelves.items()}) if chosen else before
    segments = tuple(f"{file.fingerprint}/{file.name}" for file in chosen if is_segment(file.name))
    return EvictReport(max_bytes, before, after, segments, tuple(emptied))


def _total(stats: Mapping[str, Mapping[str, FileStat]]) -> int:
    return sum(stat.nbytes for files in stats.values() for stat in files.values())


def _dead(stats: Mapping[str, Mapping[str, FileStat]]) -> list[_File]:
    """Files that no reader needs and no writer is writing."""
    return [
        _File(fingerprint, left.name, files[left.name])
        for fingerprint, files in stats.items()
        for left in leftovers_of(files)
        if left.is_dead
    ]


def _segments(stats: Mapping[str, Mapping[str, FileStat]]) -> list[_File]:
    """All segments, the least recently used first."""
    found = [
        _File(fingerprint, name, stat)
        for fingerprint, files in stats.items()
        for name, stat in files.items()
        if is_segment(name)
    ]
    return sorted(found, key=lambda file: (file.stat.used, file.fingerprint, file.name))


def _chosen(
    files: Iterable[_File], stats: Mapping[str, Mapping[str, FileStat]], excess: int, keep: str = ""
) -> tuple[list[_File], int]:
    """The first of these files with which so many bytes go, and how many are missing if they do not do.

    With the last segment of a fingerprint goes all the rest of it, except of `keep`; with any segment the index.
    """
    left = {fingerprint: {name: stat.nbytes for name, stat in of.items()} for fingerprint, of in stats.items()}
    found = []
    for file in files:
        if excess <= 0:
            break
        found.append(file)
        here = left[file.fingerprint]
        excess -= here.pop(file.name)
        if is_segment(file.name):
            excess -= here.pop(INDEX, 0)
            if file.fingerprint != keep and not any(map(is_segment, here)):
                excess -= sum(here.values())
                here.clear()
    return found, max(0, excess)


def _drop(
    shelves: Mapping[str, Shelf],
    stats: Mapping[str, Mapping[str, FileStat]],
    files: Iterable[_File],
    keep: str = "",
) -> list[str]:
    """Remove these files, and what then has no segment left, except `keep`: the names of that."""
    by_fingerprint: dict[str, list[str]] = {}
    for file in files:
        by_fingerprint.setdefault(file.fingerprint, []).append(file.name)
    emptied = []
    for fingerprint, names in by_fingerprint.items():
        gone = any(map(is_segment, names))
        # The index lists the segments; it is made anew when it is needed.
        shelves[fingerprint].remove([*names, INDEX] if gone else names)
        left = set(map(str, stats[fingerprint])).difference(names)
        if gone and fingerprint != keep and not any(map(is_segment, left)):
            shelves[fingerprint].clear()
            emptied.append(fingerprint)
    return emptied


# -- a store with a limit ----------------------------------------------------------------------------------------------

_WRITTEN: dict[str, tuple[float, float]] = {}
"""By shelf, when this process has first and last written there."""


class Room:
    """Makes room on the shelves of one store before something is written.

    Args:
        where: The store, for messages.
        shelves: Gives the shelves by fingerprint. Pickles to workers with the rows.
        max_bytes: How many bytes all files together may take.
    """

    def __init__(self, where: str, shelves: Callable[[], Mapping[str, Shelf]], max_bytes: int) -> None:
        self._where, self._shelves, self._max_bytes = where, shelves, max_bytes

    def __call__(self, own: Shelf, nbytes: int) -> None:
        """Make room for so many bytes.

        Raises:
            StoreError: There is none to be had; `errno` is ``ENOSPC``. Then nothing was evicted.
        """
        shelves = dict(self._shelves())
        stats = {fingerprint: shelf.stats() for fingerprint, shelf in shelves.items()}
        together = self._written_together(own)
        excess = _total(stats) + nbytes - self._max_bytes
        if excess <= 0:
            return
        kept = {
            (fingerprint, name)
            for fingerprint, shelf in shelves.items()
            if shelf.url in together
            for name in in_use(shelf.url)
        }
        free = [file for file in _segments(stats) if (file.fingerprint, file.name) not in kept]
        others = [file for file in free if shelves[file.fingerprint].url not in together]
        of_these = [file for file in free if shelves[file.fingerprint].url in together]
        mine = next((fingerprint for fingerprint, shelf in shelves.items() if shelf.url == own.url), "")
        chosen, missing = _chosen([*_dead(stats), *others, *of_these], stats, excess, keep=mine)
        if missing:
            raise self._full(nbytes)
        _drop(shelves, stats, chosen, keep=mine)

    def _written_together(self, own: Shelf) -> set[str]:
        """The shelves that this process writes in turns with its own, by url; its own is one."""
        now = time.monotonic()
        began, _ = _WRITTEN.get(own.url, (now, now))
        _WRITTEN[own.url] = (began, now)
        return {own.url} | {
            url for url, (_, last) in _WRITTEN.items() if last > began and now - last < TOGETHER_SECONDS
        }

    def _full(self, nbytes: int) -> StoreError:
        error = StoreError(
            f"the store {self._where} is full: {bytes_in_words(nbytes)} more would exceed max_bytes="
            f"{bytes_in_words(self._max_bytes)}, and what it holds is in use. Give it more, or `torchrecycle store rm` "
            "what is not needed"
        )
        error.errno = errno.ENOSPC
        return error
