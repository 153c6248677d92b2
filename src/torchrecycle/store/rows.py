"""The rows of one fingerprint on a shelf: numbering, looking up, gathering, appending, publishing, verifying.

A pass over 50,000 images with rows of 200 KB appends 10 GB, which is published as 40 segments of 256 MB; the
next epoch looks 50,000 keys up once and gathers 64 locations at a time. All state that matters is in the
files: what this object holds (which segment has which number, the index, the rows that wait) is rebuilt from
them when it is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import blake3
import numpy as np
import torch

from torchrecycle.errors import BatchError, DamagedRowError, StoreError
from torchrecycle.store.about import read_about, write_about
from torchrecycle.store.container import Entry, code_of, damaged, flat_bytes, pack, unpack
from torchrecycle.store.contract import Leaf, LeafSpec, Ragged, Rows, VerifyReport
from torchrecycle.store.index import halves
from torchrecycle.store.index_file import INDEX, IndexFile, Listed
from torchrecycle.store.joining import Part, join
from torchrecycle.store.looking import Lookup
from torchrecycle.store.numbered import Numbered, is_segment
from torchrecycle.store.planes import OPENING
from torchrecycle.store.segment import Batch, Segment, leaf_bytes, pack_segment
from torchrecycle.store.shelf import MANIFESTS, Shelf
from torchrecycle.store.waiting import Waiting, misfit

PROBE = "probe.safetensors"
SEGMENT_BYTES = 256 * 2**20
PUBLISH_SECONDS = 30.0
LOOK_SECONDS = 1.0
"""How often it is looked, while rows are gathered, whether files were written over."""
THREAD_BYTES = 2**20
"""What fills a segment smaller than this is published at once, and not in a thread."""

_FINGERPRINT = re.compile(r"[A-Za-z0-9_-]{1,128}")
_IDENTITY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_DOCUMENT_NAME = re.compile(rf"(probe|{MANIFESTS}/[^/]+)\.safetensors")
_OURS = "torchrecycle."
_CONTENT_FIELD = "torchrecycle.blake3"


def is_fingerprint(name: str) -> bool:
    """Whether a folder of this name can be one of a store."""
    return _FINGERPRINT.fullmatch(name) is not None


def check_fingerprint(name: str) -> str:
    """The fingerprint, if it can be the name of a folder."""
    if not is_fingerprint(name):
        raise StoreError(f"a fingerprint is 1 to 128 letters, digits, '_' or '-', not {name!r}")
    return name


def _manifest_name(identity: str) -> str:
    if not _IDENTITY.fullmatch(identity):
        raise StoreError(
            f"a manifest's name is 1 to 128 letters, digits, '.', '_' or '-', not {identity!r}: hash it first"
        )
    return f"{MANIFESTS}/{identity}.safetensors"


def _content(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """What a manifest or a probe says, as a hash."""
    names = sorted(tensors)
    shapes = [[name, code_of(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    hasher = blake3.blake3(json.dumps([shapes, sorted(metadata.items())]).encode())
    for name in names:
        hasher.update(flat_bytes(tensors[name]).data)
    return hasher.hexdigest()


def _as_locations(locations: np.ndarray | torch.Tensor) -> torch.Tensor:
    found = locations if isinstance(locations, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(locations))
    if found.ndim != 1 or found.dtype is not torch.int64:
        raise StoreError(f"locations are [n] int64, as lookup gives them, not {list(found.shape)} {found.dtype}")
    return found.cpu()


def _empty(spec: LeafSpec) -> Leaf:
    values = torch.empty((0, *spec.shape), dtype=spec.dtype)
    return Ragged(values, torch.empty(0, dtype=torch.int64)) if spec.ragged else values


def _other(entry: Listed, sound: Mapping[str, Segment]) -> bool:
    """Whether the segment that an index lists is another one than is there now."""
    return entry.name in sound and sound[entry.name].digest != entry.digest


class ShelfRows(Rows):
    """Rows whose files lie on a `Shelf`."""

    def __init__(
        self,
        shelf: Shelf,
        leaves: Sequence[LeafSpec],
        about: Mapping[str, Any],
        *,
        segment_bytes: int = SEGMENT_BYTES,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        for leaf in leaves:
            code_of(leaf.dtype)
        if not leaves:
            raise StoreError("a row has at least one leaf")
        self.url = shelf.url
        self.leaves = tuple(leaves)
        known = read_about(shelf, self.leaves)
        self.about = json.loads(json.dumps(dict(about))) if known is None else known
        self._shelf = shelf
        self._segment_bytes = segment_bytes
        self._publish_seconds = publish_seconds
        self._segments = Numbered(shelf, leaves)
        self._forget_process()

    def _forget_process(self) -> None:
        self._lookup = Lookup(self._shelf, self._segments)
        self._waiting = Waiting(len(self.leaves))
        self._next_look = time.monotonic() + LOOK_SECONDS
        self.bytes_read = self.bytes_written = self.verified_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        left = ("_lookup", "_waiting", "_next_look", "bytes_read", "bytes_written", "verified_bytes")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._forget_process()

    def __repr__(self) -> str:
        return f"<rows at {self.url}: {len(self)} rows, {self.nbytes / 1e6:.1f} MB>"

    # Finding

    def __len__(self) -> int:
        return len(self._lookup)

    @property
    def nbytes(self) -> int:
        return self._lookup.nbytes

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        found = self._lookup.find(keys)
        self._shelf.touch(self._segments.names_of(found[found >= 0]))
        return found

    def refresh(self) -> None:
        self._lookup.refresh()

    def overwritten(self) -> bool:
        return self._lookup.overwritten()

    # Reading

    def gather(self, locations: np.ndarray | torch.Tensor) -> list[Leaf]:
        where = _as_locations(locations)
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self.overwritten()
        leaves = self._segments.planes.gather(where)
        if leaves is None:
            leaves = self._gather_checked(where.numpy())
        self.bytes_read += sum(map(leaf_bytes, leaves))
        return leaves

    def _gather_checked(self, where: np.ndarray) -> list[Leaf]:
        """Rows that are read for the first time, or that are not on the planes."""
        if not len(where):
            return [_empty(spec) for spec in self.leaves]
        where = self._segments.moved(where)
        parts = [Part(self._segments[number], rows, at) for number, at, rows in self._segments.split(where)]
        self._check(parts, where)
        leaves = self._segments.planes.gather(torch.from_numpy(where))
        return join(self.leaves, parts) if leaves is None else leaves

    def prefetch(self, locations: np.ndarray | torch.Tensor) -> None:
        where = _as_locations(locations).numpy()
        if len(where):
            where = self._segments.moved(where)
            self._segments.planes.read(where)
            self._check(
                [Part(self._segments[number], rows, at) for number, at, rows in self._segments.split(where)], where
            )

    def _check(self, parts: Sequence[Part], where: np.ndarray) -> None:
        """Compare rows with their sums, where nobody has yet."""
        self._segments.read_unchecked([(part.segment, where[part.at[0]] - part.rows[0], part.rows) for part in parts])
        compared = sum(part.segment.check(part.rows) for part in parts)
        with OPENING:
            self.verified_bytes += compared

    # Writing

    def append(self, keys: np.ndarray, leaves: Sequence[Leaf]) -> None:
        self._check_form(keys, leaves)
        waiting = self._own_waiting()
        new = waiting.new(keys, self.lookup(keys) < 0)
        if len(new):
            waiting.add(keys, leaves, new)
        if not waiting.busy:
            self._show_written()
        if waiting.nbytes >= self._segment_bytes or waiting.seconds() > self._publish_seconds:
            self._publish_meanwhile()

    def _check_form(self, keys: np.ndarray, leaves: Sequence[Leaf]) -> None:
        halves(keys)
        if len(leaves) != len(self.leaves):
            raise BatchError(f"{len(leaves)} leaves came, and rows of {self.url} have {len(self.leaves)}")
        for number, (leaf, spec) in enumerate(zip(leaves, self.leaves, strict=True)):
            problem = misfit(leaf, spec, len(keys))
            if problem:
                raise BatchError(f"leaf {number} does not fit the rows of {self.url}: {problem}")

    def _own_waiting(self) -> Waiting:
        # After a fork the rows that wait are the parent's to publish, and so is its name for files.
        if self._waiting.pid != os.getpid():
            self._waiting = Waiting(len(self.leaves))
        return self._waiting

    def publish(self) -> None:
        waiting = self._own_waiting()
        self._show_written()
        if not waiting.nbytes:
            return
        write_about(self._shelf, self.leaves, self.about)
        name = waiting.next_name()
        nbytes = self._write(name, waiting.batch())
        waiting.clear()
        self._show(name, nbytes)

    def _publish_meanwhile(self) -> None:
        """Publish in a thread where that takes long enough to be worth one."""
        waiting = self._own_waiting()
        if waiting.nbytes < THREAD_BYTES:
            self.publish()
            return
        self._show_written()
        write_about(self._shelf, self.leaves, self.about)
        waiting.start(self._write)

    def _write(self, name: str, batch: Batch) -> int:
        packed = pack_segment(self.leaves, batch, owner=self._shelf.owner)
        self._shelf.write(name, packed)
        return packed.nbytes

    def _show_written(self) -> None:
        """Wait for the segment that a thread is writing, and let it be found."""
        written = self._own_waiting().written()
        if written is not None:
            self._show(*written)

    def _show(self, name: str, nbytes: int) -> None:
        self.bytes_written += nbytes
        self._lookup.added(name)

    def discard(self) -> int:
        waiting = self._own_waiting()
        with contextlib.suppress(StoreError):
            self._show_written()
        return waiting.clear()

    # Verifying

    def verify(self) -> VerifyReport:
        index: IndexFile | None = None
        sound: dict[str, Segment] = {}
        wrong: list[str] = []
        for name in self._shelf.names():
            try:
                if is_segment(name):
                    segment = self._sound(name)
                    if segment is not None:
                        sound[name] = segment
                elif name == INDEX:
                    index = self._lookup.read_index()
                elif _DOCUMENT_NAME.fullmatch(name):
                    self._read_document(name)
            except DamagedRowError:
                self._shelf.set_aside(name)
                wrong.append(name)
        if index is not None and any(_other(entry, sound) for entry in index.segments):
            self._shelf.set_aside(INDEX)
            wrong.append(INDEX)
        self._segments.leave(wrong, damaged=True)
        self._lookup.forget()
        self._lookup.refresh()
        nbytes = sum(segment.nbytes for segment in sound.values())
        self.verified_bytes += nbytes
        rows = sum(segment.rows for segment in sound.values())
        return VerifyReport(len(sound), rows, nbytes, tuple(f"{self.url}/{name}" for name in wrong))

    def _sound(self, name: str) -> Segment | None:
        """The segment of that name, all of whose rows match their sums."""
        segment = self._segments.read(name)
        if segment is None:
            return None
        segment.check_all()
        number = self._segments.number_of(name)
        if number is not None and self._segments.listed[number].digest != segment.digest:
            self._segments.forget(name)
        elif number is not None and number not in self._segments.hidden:
            # What is mapped may be an earlier file of that name, of which nothing is known now.
            self._segments.open(number, segment)
        return segment

    # Manifests and the probe

    def read_manifest(self, identity: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        return self._read_document(_manifest_name(identity))

    def write_manifest(self, identity: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        self._write_document(_manifest_name(identity), tensors, metadata, keep=False)

    def read_probe(self) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        return self._read_document(PROBE)

    def write_probe(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._write_document(PROBE, tensors, metadata or {}, keep=True)

    def _read_document(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        data = self._shelf.read(name)
        if data is None:
            return None
        file = f"{self.url}/{name}"
        views, metadata = unpack(data, file, owner=f"{self._shelf.owner}/{name}")
        tensors = {key: views[key].clone() for key in views}
        own = {key: metadata[key] for key in metadata if not key.startswith(_OURS)}
        if metadata.get(_CONTENT_FIELD) != _content(tensors, own):
            raise damaged(file, "it does not match its checksum")
        return tensors, own

    def _write_document(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, keep: bool
    ) -> None:
        if any(key.startswith(_OURS) for key in metadata):
            raise BatchError(f"names of metadata that start with {_OURS!r} are the store's own: {sorted(metadata)}")
        ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
        entries = [Entry(key, tensors[key].dtype, tuple(tensors[key].shape), [tensors[key]]) for key in ordered]
        content = {_CONTENT_FIELD: _content(tensors, metadata)}
        packed = pack(entries, {**metadata, **content}, owner=f"{self._shelf.owner}/{name}")
        write_about(self._shelf, self.leaves, self.about)
        self._shelf.write(name, packed, keep=keep)
