"""What lies in a store: one line for each fingerprint, or everything about one.

Whoever finds 40 GB under ``3f9c2a61b7e0...`` learns here that it is ResNet-34 cut at ``layer3`` in bfloat16, 50,000
rows, last used on Tuesday, for the data sets ``train`` and ``test``. Only headers are read, so a store of 40 GB is
listed in a tenth of a second; whether the rows are sound is `verify`'s to say. What cannot be read is listed with the
reason, since a list is what one looks at when something is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchrecycle.errors import StoreError
from torchrecycle.store.about import need_form
from torchrecycle.store.container import unpack
from torchrecycle.store.contract import LeafSpec
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.segment import Segment
from torchrecycle.store.shelf import MANIFESTS, FileStat, Shelf
from torchrecycle.store.sizes import bytes_in_words

__all__ = ["DataSet", "Details", "Holding", "Leftover", "SegmentStat", "holding_of", "leftovers_of"]

OLD_SECONDS = 3600.0
"""After this time without a change, the writer of a half-written file or of a claim is dead."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set whose manifest is kept."""

    identity: str
    """The manifest's name: a hash of what the data set is."""
    name: str
    """What whoever wrote it called it; empty if that was not said."""
    items: int
    """How many there are; -1 if the manifest cannot be read."""

    def __str__(self) -> str:
        name = self.name or self.identity[:8]
        return f"{name} (not readable)" if self.items < 0 else f"{name} ({self.items:,})"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that no reader needs."""

    name: str
    """Its name in the fingerprint's folder."""
    kind: Literal["half-written", "claim", "damaged"]
    """Of a writer that was killed or is at work; who computes what; set aside by `verify`."""
    nbytes: int
    """Its size."""
    seconds: float
    """How long ago it was written to."""

    @property
    def is_dead(self) -> bool:
        """Whether its writer cannot be at work any more."""
        return self.kind == "damaged" or self.seconds > OLD_SECONDS


@dataclass(frozen=True, slots=True)
class SegmentStat:
    """One file of rows."""

    name: str
    rows: int
    """How many rows; -1 if it cannot be read."""
    nbytes: int
    """The size of the file."""
    used: float
    """When its rows were last looked up, or it was written: seconds since 1970, exact to an hour."""
    merged: bool
    """Whether it was made of earlier ones."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What is kept under one fingerprint."""

    fingerprint: str
    model: str
    """The class of the model that the rows are of; ``?`` where that was not said. So are cut and precision."""
    cut: str
    precision: str
    rows: int
    """How many rows there are; a row that two writers have written counts twice until `compact`."""
    nbytes: int
    """The size of all files."""
    segments: int
    """How many files the rows are in."""
    used: float | None
    """When rows were last looked up or written: seconds since 1970, exact to an hour. None if there are none."""
    data_sets: tuple[DataSet, ...]
    """The data sets whose manifests are kept."""
    damaged: tuple[str, ...]
    """Files that `verify` has set aside."""
    problem: str = ""
    """Why some of it cannot be read; empty if all can."""


@dataclass(frozen=True, slots=True)
class Details:
    """All that is known of one fingerprint without reading its rows."""

    holding: Holding
    about: Mapping[str, Any]
    """``about.json``: what the fingerprint covers, in words."""
    leaves: tuple[LeafSpec, ...]
    """The form of a row."""
    segments: tuple[SegmentStat, ...]
    """The files of rows."""
    leftovers: tuple[Leftover, ...]
    """Files that no reader needs."""
    others: Mapping[str, int]
    """The other files and their sizes: ``about.json``, the probe, manifests, the index."""


def leftovers_of(stats: Mapping[str, FileStat]) -> list[Leftover]:
    """Which of these files no reader needs."""
    now = time.time()
    found = []
    for name, stat in stats.items():
        kind = _kind(name)
        if kind is not None:
            found.append(Leftover(name, kind, stat.nbytes, max(0.0, now - stat.changed)))
    return found


def _kind(name: str) -> Literal["half-written", "claim", "damaged"] | None:
    if ".tmp-" in name:
        return "half-written"
    if name.startswith("claims/"):
        return "claim"
    return "damaged" if name.endswith(".damaged") or ".damaged/" in name else None


def holding_of(fingerprint: str, shelf: Shelf) -> Details:
    """Look at one fingerprint. What cannot be read is said in `Holding.problem`."""
    problems: list[str] = []
    stats: dict[str, FileStat] = {}
    about: dict[str, Any] = {}
    leaves: list[LeafSpec] = []
    try:
        stats = shelf.stats()
        about, leaves = need_form(shelf)
    except StoreError as error:
        problems.append(str(error))
    leftovers = leftovers_of(stats)
    segments = [_segment_stat(shelf, name, stats[name], leaves, problems) for name in filter(is_segment, stats)]
    manifests = [name for name in stats if name.startswith(f"{MANIFESTS}/") and name.endswith(".safetensors")]
    used = [segment.used for segment in segments]
    holding = Holding(
        fingerprint,
        model=str(about.get("model", "?")),
        cut=str(about.get("cut", "?")),
        precision=precision_of(about, leaves),
        rows=sum(max(segment.rows, 0) for segment in segments),
        nbytes=sum(stat.nbytes for stat in stats.values()),
        segments=len(segments),
        used=max(used) if used else None,
        data_sets=tuple(_data_set(shelf, name, problems) for name in manifests),
        damaged=tuple(left.name for left in leftovers if left.kind == "damaged"),
        problem="; ".join(problems),
    )
    known = {left.name for left in leftovers} | {segment.name for segment in segments}
    others = {name: stat.nbytes for name, stat in stats.items() if name not in known}
    return Details(holding, about, tuple(leaves), tuple(segments), tuple(leftovers), others)


def precision_of(about: Mapping[str, Any], leaves: Iterable[LeafSpec]) -> str:
    """How rows are kept: what was asked for, or the activation's own dtype."""
    said = str(about.get("precision", "?"))
    own = [str(leaf.dtype).removeprefix("torch.") for leaf in leaves if leaf.dtype.is_floating_point]
    return ", ".join(dict.fromkeys(own)) or said if said == "own" else said


def _segment_stat(
    shelf: Shelf, name: str, stat: FileStat, leaves: Iterable[LeafSpec], problems: list[str]
) -> SegmentStat:
    rows, merged = -1, False
    try:
        data = shelf.read(name) if leaves else None
        if data is not None:
            segment = Segment(f"{shelf.url}/{name}", data, list(leaves), owner=shelf.owner)
            rows, merged = segment.rows, segment.origin is not None
    except StoreError as error:
        problems.append(str(error))
    return SegmentStat(name, rows, stat.nbytes, stat.used, merged)


def _data_set(shelf: Shelf, name: str, problems: list[str]) -> DataSet:
    identity = name.removeprefix(f"{MANIFESTS}/").removesuffix(".safetensors")
    items, called = -1, ""
    try:
        data = shelf.read(name)
        if data is not None:
            tensors, metadata = unpack(data, f"{shelf.url}/{name}", owner=f"{shelf.owner}/{name}")
            items = len(tensors["keys"]) if "keys" in tensors and tensors["keys"].ndim else -1
            called = metadata.get("data set") or metadata.get("name", "")
    except StoreError as error:
        problems.append(str(error))
    return DataSet(identity, called, items)


def in_words(leftovers: Iterable[Leftover]) -> str:
    """What lies there that nobody needs; empty if nothing does.

    >>> in_words([Leftover("a-1.safetensors.tmp-7-ab", "half-written", 2_000_000, 7200.0)])
    '1 half-written file of a writer that was killed (2.0 MB)'
    """
    words = []
    for kind, dead, one, many in _WORDS:
        found = [left for left in leftovers if left.kind == kind and left.is_dead == dead]
        if found:
            size = bytes_in_words(sum(left.nbytes for left in found))
            words.append(f"{len(found)} {one if len(found) == 1 else many} ({size})")
    return ", ".join(words)


_WORDS = (
    ("half-written", False, "file that a writer is writing", "files that writers are writing"),
    ("half-written", True, "half-written file of a writer that was killed", "half-written files of killed writers"),
    ("claim", False, "claim of a process that is filling", "claims of processes that are filling"),
    ("claim", True, "claim of a process that was killed", "claims of processes that were killed"),
    ("damaged", True, "damaged file set aside", "damaged files set aside"),
)
