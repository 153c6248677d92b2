"""Keys -> locations in a file: ten million keys are opened without being read into memory.

``index.safetensors`` lies beside the segments and holds the keys of many of them, sorted, as two columns of 64 bits,
with a column of places: ``number in the file's own list << 32 | row``. A store of fewer than 200,000 keys has none,
since reading keys from the segments then takes less than a tenth of a second; a larger one is given a new one when the
keys that it does not cover come to half of those that it does.

It is a copy of what the segments say, so it is believed only about a segment that is byte for byte the one that was
read: each is listed with the digest of its keys and sums, which is compared when the segment is opened. The file as a
whole has a checksum, compared when it is opened. Whatever does not hold makes it worthless and never wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import blake3
import numpy as np
import torch

from torchrecycle.keys import hash_threads
from torchrecycle.store.container import Entry, Packed, damaged, flat_bytes, pack, unpack
from torchrecycle.store.index import Run, halves
from torchrecycle.store.mapping import release
from torchrecycle.store.segment import Segment

INDEX = "index.safetensors"

_AT_ONCE = 2**19
"""Keys that are sorted in memory at a time."""

_CHUNK = 2**18
"""Rows of a segment that are looked at at a time."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A segment that an index covers."""

    name: str
    digest: str
    rows: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class IndexFile:
    """An opened index."""

    segments: tuple[Listed, ...]
    keys: int
    """How many different keys it has."""
    run: Run
    """The keys, with the places as locations."""


def open_index(file: str, data: torch.Tensor, *, owner: str) -> IndexFile:
    """The index in these bytes.

    Raises:
        DamagedRowError: Something in it is not as it was written.
        StoreError: It is of a newer format.
    """
    tensors, _ = unpack(data, file, owner=f"{owner}/{INDEX}")
    found = {name: (tensors[name].dtype, tensors[name].dim()) for name in tensors}
    expected = dict.fromkeys(("first", "second"), (torch.uint64, 1)) | {
        "places": (torch.int64, 1),
        "listed": (torch.uint8, 1),
        "keys": (torch.int64, 1),
        "sum": (torch.uint8, 1),
    }
    if found != expected:
        raise damaged(file, f"it holds {sorted(tensors)} in other forms than an index has")
    first, second, places = (tensors[name] for name in ("first", "second", "places"))
    hasher = blake3.blake3(max_threads=hash_threads())
    for name in ("first", "second", "places", "listed", "keys"):
        hasher.update(flat_bytes(tensors[name]).data)
    same = hasher.digest() == tensors["sum"].numpy().tobytes()
    if not same or not len(first) == len(second) == len(places) or len(tensors["keys"]) != 1:
        raise damaged(file, "it does not match its checksum")
    try:
        segments = tuple(map(_listed, json.loads(tensors["listed"].numpy().tobytes())))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(file, f"its list of segments is not readable ({error})") from None
    keys = int(tensors["keys"])
    if not _are_places(places.numpy(), segments) or not 0 <= keys <= len(places):
        raise damaged(file, "it names rows that its segments do not have")
    release(data)
    return IndexFile(segments, keys, Run(first.numpy(), second.numpy(), places.numpy()))


def _listed(entry: Any) -> Listed:
    name, digest, rows, nbytes = entry
    if not (
        isinstance(name, str) and isinstance(digest, str) and all(type(n) is int and n >= 0 for n in (rows, nbytes))
    ):
        raise ValueError(f"no entry of an index: {entry!r}")
    return Listed(name, digest, rows, nbytes)


def _are_places(places: np.ndarray, segments: Sequence[Listed]) -> bool:
    """Whether all places are rows of these segments, which have no more rows than there are places."""
    if sum(entry.rows for entry in segments) != len(places):
        return False
    rows = np.array([entry.rows for entry in segments], dtype=np.int64)
    for start in range(0, len(places), _CHUNK):
        some = places[start : start + _CHUNK]
        number = some >> 32
        if (some < 0).any() or (number >= len(rows)).any() or ((some & 0xFFFFFFFF) >= rows[number]).any():
            return False
    return True


def pack_index(segments: Sequence[tuple[Listed, Segment]], *, owner: str) -> Packed:
    """The index of these segments. It is made while it is written, half a million keys at a time."""
    listed = [[entry.name, entry.digest, entry.rows, entry.nbytes] for entry, _ in segments]
    text = torch.frombuffer(bytearray(json.dumps(listed).encode()), dtype=torch.uint8)
    count = sum(entry.rows for entry, _ in segments)
    keys, digest = torch.zeros(1, dtype=torch.int64), torch.zeros(32, dtype=torch.uint8)
    hasher = blake3.blake3()

    def hashed(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for piece in pieces:
            hasher.update(flat_bytes(piece).data)
            yield piece

    def column(pick: Callable[[Run], np.ndarray], *, counted: bool = False) -> Iterator[torch.Tensor]:
        for run in sorted_runs([segment for _, segment in segments], count):
            if counted:
                keys[0] += _different(run)
            yield torch.from_numpy(pick(run))

    def total() -> Iterator[torch.Tensor]:
        yield from hashed(iter([keys]))
        digest.copy_(torch.frombuffer(bytearray(hasher.digest()), dtype=torch.uint8))

    entries = [
        Entry("first", torch.uint64, (count,), hashed(column(lambda run: run.first, counted=True))),
        Entry("second", torch.uint64, (count,), hashed(column(lambda run: run.second))),
        Entry("places", torch.int64, (count,), hashed(column(lambda run: run.locations))),
        Entry("listed", torch.uint8, (len(text),), hashed(iter([text]))),
        Entry("keys", torch.int64, (1,), total()),
        Entry("sum", torch.uint8, (32,), [digest]),
    ]
    return pack(entries, {}, owner=f"{owner}/{INDEX}", aligned=True)


def _different(run: Run) -> int:
    same = (run.first[1:] == run.first[:-1]) & (run.second[1:] == run.second[:-1])
    return len(run) - int(np.count_nonzero(same))


def sorted_runs(segments: Sequence[Segment], count: int) -> Iterator[Run]:
    """All keys in ascending order, a range of first halves at a time; equal ones in the order of their places."""
    parts = 1 << max(0, (count - 1) // _AT_ONCE).bit_length()
    shift = np.uint64(64 - (parts.bit_length() - 1))
    for part in range(parts):
        pieces = [piece for number, segment in enumerate(segments) for piece in _part(number, segment, part, shift)]
        for segment in segments:
            release(segment.data)
        first, second, places = (np.concatenate(column) for column in zip(*pieces, strict=True))
        order = np.argsort(first, kind="stable")
        ordered = first[order]
        if (ordered[1:] == ordered[:-1]).any():
            order = np.lexsort((places, second, first))
        yield Run(first[order], second[order], places[order])


def _part(number: int, segment: Segment, part: int, shift: np.uint64) -> Iterator[tuple[np.ndarray, ...]]:
    keys = segment.keys.numpy()
    for start in range(0, segment.rows, _CHUNK):
        first, second = halves(keys[start : start + _CHUNK])
        # Shifting by all 64 bits is no zero in C.
        rows = np.flatnonzero(first >> shift == part) if shift < 64 else np.arange(len(first))
        yield first[rows], second[rows], (number << 32) + start + rows
