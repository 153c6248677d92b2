"""Writing segments anew: many small ones into few, without rows that came twice, without rows that are to be forgotten.

Eight processes that fill for an hour leave some hundred segments that are not full, and of the rows that two of them
computed both copies. `compact` writes them into segments of 256 MB. It reads from maps and writes piece by piece, so a
store of any size takes the memory of its keys' first copies (one byte each) and half a million keys at a time.

The new file is written first, whole and on the disk, and then the old ones are unlinked. So whoever kills this at any
moment leaves rows that are there twice, and never loses one. Whoever has an old file mapped goes on reading it; whoever
opens it by name later finds in the new file which row of which segment each row was (`Origin`).

Two that compact at once, or are killed and begin again, must not each drop the copy that the other keeps. So of several
copies that one stays which comes first in an order that both know without talking: segments that were merged more often
come first, and among those the name decides. A copy is unlinked only by whoever has seen one that comes before it, or
has written one. The very first of all copies that ever were is thus unlinked by nobody.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchrecycle.store.contract import Leaf, LeafSpec
from torchrecycle.store.holdings import leftovers_of
from torchrecycle.store.index_file import INDEX, sorted_runs
from torchrecycle.store.mapping import release
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.segment import Batch, Origin, Segment, pack_segment
from torchrecycle.store.shelf import Shelf
from torchrecycle.store.sizes import bytes_in_words, counted

__all__ = ["CompactReport", "Source", "compact_shelf", "open_sources", "rewrite"]

DOUBLE_SHARE = 0.01
"""A full segment is written anew for this share of rows that are elsewhere too; for fewer it would cost more."""


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What `compact` has done for one fingerprint."""

    fingerprint: str
    segments_before: int
    segments: int
    """How many there are now."""
    doubles: int
    """Rows that were there twice, and are there once now."""
    nbytes_before: int
    nbytes: int
    """The size of all files now."""
    leftovers: tuple[str, ...]
    """Files of killed writers that were removed."""

    def __str__(self) -> str:
        if self.segments == self.segments_before and not self.doubles and not self.leftovers:
            return f"{counted(self.segments, 'segment')}, {bytes_in_words(self.nbytes)}: nothing to do"
        words = [f"{counted(self.segments_before, 'segment')} -> {self.segments}"]
        words.append(f"{bytes_in_words(self.nbytes_before)} -> {bytes_in_words(self.nbytes)}")
        words += [f"{counted(self.doubles, 'row')} dropped that came twice"] if self.doubles else []
        words += [f"{counted(len(self.leftovers), 'file')} of killed writers removed"] if self.leftovers else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Source:
    """A segment that may be written anew."""

    name: str
    segment: Segment
    used: float
    """When it was last used."""
    keep: np.ndarray
    """``[rows]`` bool: which rows are to stay."""

    @property
    def generation(self) -> int:
        """How often its rows were merged. It is in the name, and believed only of a merged segment."""
        return _number(self.name) if self.segment.origin is not None else 0

    @property
    def kept(self) -> int:
        """How many rows stay."""
        return int(self.keep.sum())

    @property
    def kept_bytes(self) -> int:
        """About how many bytes they take."""
        return self.segment.nbytes * self.kept // max(len(self.keep), 1)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2].removesuffix(".safetensors")[:18])


def open_sources(shelf: Shelf, specs: Sequence[LeafSpec]) -> list[Source]:
    """The segments there are, in the order in which of two copies the first stays.

    Raises:
        DamagedRowError: One is not as it was written.
    """
    found = []
    for name, stat in shelf.stats().items():
        data = shelf.read(name) if is_segment(name) else None
        if data is not None:
            segment = Segment(f"{shelf.url}/{name}", data, specs, owner=shelf.owner)
            found.append(Source(name, segment, stat.used, np.ones(segment.rows, dtype=np.bool_)))
    return sorted(found, key=lambda source: (-source.generation, source.name))


def compact_shelf(fingerprint: str, shelf: Shelf, specs: Sequence[LeafSpec], segment_bytes: int) -> CompactReport:
    """Merge the small segments of one fingerprint.

    Args:
        fingerprint: For the report.
        shelf: Where they are.
        specs: The form of their rows.
        segment_bytes: The size of a full segment.

    Raises:
        DamagedRowError: A row does not match its checksum. What was merged before is merged; nothing is lost.
    """
    before = shelf.stats()
    dead = [left.name for left in leftovers_of(before) if left.is_dead and left.kind != "damaged"]
    shelf.remove(dead)
    sources = open_sources(shelf, specs)
    _drop_doubles(sources)
    doubles = 0
    for group in _groups(sources, segment_bytes):
        doubles += sum(len(source.keep) - source.kept for source in group)
        rewrite(shelf, specs, group)
    after = shelf.stats()
    return CompactReport(
        fingerprint,
        segments_before=sum(map(is_segment, before)),
        segments=sum(map(is_segment, after)),
        doubles=doubles,
        nbytes_before=sum(stat.nbytes for stat in before.values()),
        nbytes=sum(stat.nbytes for stat in after.values()),
        leftovers=tuple(dead),
    )


def _drop_doubles(sources: Sequence[Source]) -> None:
    """Keep of each key the first row."""
    count = sum(source.segment.rows for source in sources)
    if not count:
        return
    for run in sorted_runs([source.segment for source in sources], count):
        same = (run.first[1:] == run.first[:-1]) & (run.second[1:] == run.second[:-1])
        for place in run.locations[1:][same].tolist():
            sources[place >> 32].keep[place & 0xFFFFFFFF] = False


def _groups(sources: Sequence[Source], segment_bytes: int) -> Iterator[list[Source]]:
    """Which segments become one."""
    group: list[Source] = []
    for source in sources:
        doubles = len(source.keep) - source.kept
        small = source.segment.nbytes * 2 < segment_bytes
        if not small and doubles < max(1, DOUBLE_SHARE * len(source.keep)):
            continue
        if group and sum(one.kept_bytes for one in group) + source.kept_bytes > segment_bytes:
            yield from _worth_it(group)
            group = []
        group.append(source)
    yield from _worth_it(group)


def _worth_it(group: list[Source]) -> Iterator[list[Source]]:
    if len(group) > 1 or any(not source.keep.all() for source in group):
        yield group


def rewrite(shelf: Shelf, specs: Sequence[LeafSpec], sources: Sequence[Source]) -> str | None:
    """Write the rows of some segments that are to stay into one new segment, then remove those.

    Returns:
        Its name; None if no row stays.

    Raises:
        DamagedRowError: A row does not match its checksum; then nothing was changed.
    """
    for source in sources:
        source.segment.check_all()
    generation = 1 + max(source.generation for source in sources)
    name = f"{secrets.token_hex(8)}-{generation:06d}.safetensors"
    batch, origin = _kept_rows(specs, sources)
    if batch.rows:
        shelf.write(name, pack_segment(specs, batch, owner=shelf.owner, origin=origin))
        shelf.date(name, max(source.used for source in sources))
    # The index lists segments by name. It is made anew when it is needed.
    shelf.remove([*(source.name for source in sources), INDEX])
    for source in sources:
        release(source.segment.data)
    return name if batch.rows else None


def _kept_rows(specs: Sequence[LeafSpec], sources: Sequence[Source]) -> tuple[Batch, Origin]:
    keys: list[torch.Tensor] = []
    leaves: list[list[Leaf]] = [[] for _ in specs]
    places: list[np.ndarray] = []
    for number, source in enumerate(sources):
        for start, stop in _runs(source.keep):
            keys.append(source.segment.keys[start:stop])
            for pieces, leaf in zip(leaves, source.segment.slice(start, stop), strict=True):
                pieces.append(leaf)
            rows = np.arange(start, stop, dtype=np.uint32)
            places.append(np.stack([np.full_like(rows, number), rows], axis=1))
    rows = np.concatenate(places) if places else np.empty((0, 2), dtype=np.uint32)
    names = tuple((source.name, source.segment.digest) for source in sources)
    return Batch(keys, leaves), Origin(names, torch.from_numpy(rows))


def _runs(keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
