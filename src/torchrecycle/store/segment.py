"""One immutable file of rows: written whole, then read a few rows at a time from the map.

A segment of 256 MB holds 1,300 rows of 200 KB, or 170,000 of 1.5 KB. Its tensors are ``keys`` ``[rows, 16]``,
``sums`` ``[rows, 8]``, and for each leaf ``leaf.N`` ``[rows, ...]``, or ``leaf.N.values`` ``[total, ...]``
and ``leaf.N.offsets`` ``[rows + 1]`` if it is ragged. ``sums`` holds the first 8 bytes of the BLAKE3 of

    the key, then for each leaf in order: the length as 8 bytes, little-endian, if it is ragged; the bytes of
    the row

so that a row under another row's key, or leaves that swapped a length, are noticed as well as a flipped bit.

Batches are gathered with `torch.index_select` straight from the map into the batch. It copies without looking
at the values, so leaves are read as the widest integers that their rows divide into, which halves the time
for large rows and lets dtypes through that it does not know. Which rows were compared with their sums is
marked in memory that forked workers share: each row is hashed once, and not once per worker and epoch.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import blake3
import numpy as np
import torch

from torchrecycle.store.container import Entry, Packed, damaged, flat_bytes, pack, unpack
from torchrecycle.store.contract import KEY_BYTES, SUM_BYTES, Leaf, LeafSpec, Ragged

_CARRIERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_VERIFY_BYTES = 16 * 2**20
_ORIGIN = "origin"
_ORIGIN_FIELD = "torchrecycle.origin"


def row_bytes(spec: LeafSpec) -> int:
    """Bytes of one row of a leaf; of one step of it, if it is ragged."""
    return math.prod(spec.shape) * spec.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to be written, in pieces as they came."""

    keys: Sequence[torch.Tensor]
    sums: Sequence[torch.Tensor]
    leaves: Sequence[Sequence[Leaf]]
    """For each leaf, its pieces."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which rows of earlier segments the rows of a merged one are, for readers that hold locations of those."""

    segments: tuple[tuple[str, str], ...]
    """Name and digest of each earlier segment."""

    rows: torch.Tensor
    """``[rows, 2]`` uint32: for each row of the merged segment, which of them it was in, and where."""

    def digest(self) -> str:
        """128 bits of BLAKE3 of all of it, as 32 letters."""
        hasher = blake3.blake3(json.dumps(self.segments).encode())
        hasher.update(flat_bytes(self.rows).data)
        return hasher.hexdigest(length=16)


def pack_segment(specs: Sequence[LeafSpec], batch: Batch, origin: Origin | None = None) -> Packed:
    """The file that holds these rows."""
    rows = sum(len(keys) for keys in batch.keys)
    entries = [
        Entry("keys", torch.uint8, (rows, KEY_BYTES), batch.keys),
        Entry("sums", torch.uint8, (rows, SUM_BYTES), batch.sums),
        *(
            entry
            for number, (spec, pieces) in enumerate(zip(specs, batch.leaves, strict=True))
            for entry in _leaf_entries(f"leaf.{number}", spec, rows, pieces)
        ),
    ]
    metadata = {}
    if origin is not None:
        entries.append(Entry(_ORIGIN, torch.uint32, (rows, 2), [origin.rows]))
        metadata[_ORIGIN_FIELD] = json.dumps({"segments": origin.segments, "blake3": origin.digest()})
    return pack(entries, metadata, aligned=True)


def _leaf_entries(name: str, spec: LeafSpec, rows: int, pieces: Sequence[Leaf]) -> list[Entry]:
    if not spec.ragged:
        return [
            Entry(
                name,
                spec.dtype,
                (rows, *spec.shape),
                [piece for piece in pieces if isinstance(piece, torch.Tensor)],
            )
        ]
    ragged = [piece for piece in pieces if isinstance(piece, Ragged)]
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.cat([piece.lengths for piece in ragged]), 0, out=offsets[1:])
    return [
        Entry(f"{name}.offsets", torch.int64, (rows + 1,), [offsets]),
        Entry(f"{name}.values", spec.dtype, (int(offsets[-1]), *spec.shape), [piece.values for piece in ragged]),
    ]


def checksums(keys: np.ndarray, leaves: Sequence[Leaf], at: Iterable[int]) -> np.ndarray:
    """``[n, 8]`` checksums of rows.

    Args:
        keys: ``[n, 16]``, of the n rows to be hashed.
        leaves: Contiguous leaves in which those rows are.
        at: Where in the leaves each of the n rows is.
    """
    columns = [_row_slices(leaf) for leaf in leaves]
    digests = []
    for key, row in zip(keys, at, strict=True):
        hasher = blake3.blake3(key.tobytes())
        for values, bounds, lengths in columns:
            if lengths is not None:
                hasher.update(int(lengths[row]).to_bytes(8, "little"))
            if isinstance(bounds, int):
                hasher.update(values[row * bounds : (row + 1) * bounds])
            else:
                hasher.update(values[bounds[row] : bounds[row + 1]])
        digests.append(hasher.digest(length=SUM_BYTES))
    # A bytearray, since torch warns of arrays that are not writable.
    return np.frombuffer(bytearray().join(digests), dtype=np.uint8).reshape(-1, SUM_BYTES)


def _row_slices(leaf: Leaf) -> tuple[memoryview, int | list[int], list[int] | None]:
    """A leaf's bytes; the bytes of a row, or where each row begins and ends; the lengths, if it is ragged."""
    if isinstance(leaf, torch.Tensor):
        return flat_bytes(leaf).data, leaf[:1].numel() * leaf.dtype.itemsize, None
    step = leaf.values.dtype.itemsize * math.prod(leaf.values.shape[1:])
    bounds = np.concatenate([[0], np.cumsum(leaf.lengths.numpy())]) * step
    return flat_bytes(leaf.values).data, bounds.tolist(), leaf.lengths.tolist()


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of each length, joined: ``ranges([7, 2], [2, 3])`` is ``[7, 8, 2, 3, 4]``."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


class Column:
    """One leaf of a segment."""

    __slots__ = ("offsets", "spec", "values")

    def __init__(self, spec: LeafSpec, values: torch.Tensor, offsets: torch.Tensor | None) -> None:
        self.spec = spec
        self.values = _carried(spec, values)
        """``[rows or total, width]`` integers: the leaf's bytes."""
        self.offsets = offsets

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where ragged rows start, and their lengths."""
        assert self.offsets is not None
        offsets = self.offsets.numpy()
        starts = offsets[rows]
        return starts, offsets[rows + 1] - starts

    def gather(self, rows: np.ndarray) -> Leaf:
        """Copies of these rows."""
        if self.offsets is None:
            return uncarried(self.spec, self.values.index_select(0, torch.from_numpy(rows)))
        starts, lengths = self.bounds(rows)
        steps = torch.from_numpy(ranges(starts, lengths))
        return Ragged(uncarried(self.spec, self.values.index_select(0, steps)), torch.from_numpy(lengths))

    def slice(self, start: int, stop: int) -> Leaf:
        """These rows, not copied."""
        if self.offsets is None:
            return uncarried(self.spec, self.values[start:stop])
        offsets = self.offsets[start : stop + 1]
        values = self.values[int(offsets[0]) : int(offsets[-1])]
        return Ragged(uncarried(self.spec, values), offsets[1:] - offsets[:-1])


def carrier(spec: LeafSpec, aligned: int = 8) -> tuple[torch.dtype, int]:
    """The integers that carry a leaf, and how many make a row, where data is aligned to so many bytes."""
    nbytes = row_bytes(spec)
    width = next(width for width in _CARRIERS if nbytes % width == 0 and aligned % width == 0)
    return _CARRIERS[width], nbytes // width


def _carried(spec: LeafSpec, values: torch.Tensor) -> torch.Tensor:
    aligned = math.gcd(8, values.storage_offset() * values.dtype.itemsize)
    dtype, width = carrier(spec, aligned)
    return values.reshape(-1).view(dtype).view(len(values), width)


def uncarried(spec: LeafSpec, carried: torch.Tensor) -> torch.Tensor:
    """The values that these integers carry."""
    return carried.view(-1).view(spec.dtype).view(len(carried), *spec.shape)


class Segment:
    """The rows of one file. Opening it compares all that the file says of itself with what must be."""

    def __init__(self, file: str, data: torch.Tensor, specs: Sequence[LeafSpec]) -> None:
        self.file = file
        self.data = data
        """The bytes of the file."""
        tensors, metadata = unpack(data, file)
        origin = tensors.pop(_ORIGIN, None)
        _expect_names(file, tensors, specs)
        self.rows = len(tensors["keys"]) if tensors["keys"].ndim else -1
        _expect(file, tensors, "keys", torch.uint8, (self.rows, KEY_BYTES))
        _expect(file, tensors, "sums", torch.uint8, (self.rows, SUM_BYTES))
        # Tensors and not NumPy arrays: these follow when the bytes of a store in memory move into shared
        # memory.
        self.keys = tensors["keys"]
        self.sums = tensors["sums"]
        self.columns = [_column(file, tensors, number, spec, self.rows) for number, spec in enumerate(specs)]
        self.origin = None if origin is None else _origin(file, origin, metadata, self.rows)
        """Where its rows were before, if it was merged of earlier segments."""
        self.nbytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
        # An anonymous map is shared with forked workers, and unlike shared tensors takes no file descriptor.
        self._checked_memory = mmap.mmap(-1, max(self.rows, 1))
        self.checked = np.frombuffer(self._checked_memory, dtype=np.bool_)[: self.rows]
        """Which rows were compared with their sums."""

    @cached_property
    def digest(self) -> str:
        """What tells this segment from any other: 128 bits of BLAKE3 of all keys and sums, as 32 letters.

        A segment found under a name is known by it again, in another process too: files may be renamed.
        """
        hasher = blake3.blake3(flat_bytes(self.keys).data)
        hasher.update(flat_bytes(self.sums).data)
        return hasher.hexdigest(length=16)

    def gather(self, rows: np.ndarray) -> list[Leaf]:
        """Copies of these rows, of which none is negative, not compared with their sums: see `check`."""
        return [column.gather(rows) for column in self.columns]

    def unchecked(self, rows: np.ndarray) -> np.ndarray:
        """At which places of ``rows`` there are rows that nobody has compared with their sums."""
        checked = self.checked[rows]
        return np.flatnonzero(~checked) if not checked.all() else rows[:0]

    def check(self, rows: np.ndarray, leaves: Sequence[Leaf], at: np.ndarray) -> None:
        """Compare copies of rows with their sums, and remember that.

        Args:
            rows: Which rows of this segment.
            leaves: Contiguous leaves in which their copies are.
            at: Where in the leaves each one is.
        """
        wrong = self._wrong(rows, leaves, at)
        if len(wrong):
            raise damaged(f"row {int(rows[wrong[0]])} of {self.file}", "it does not match its checksum")
        self.checked[rows] = True

    def _wrong(self, rows: np.ndarray, leaves: Sequence[Leaf], at: np.ndarray) -> np.ndarray:
        found = checksums(self.keys.numpy()[rows], leaves, at.tolist())
        return np.flatnonzero((found != self.sums.numpy()[rows]).any(axis=1))

    def check_all(self) -> None:
        """Compare every row with its sum, 16 MB at a time."""
        step = max(1, int(_VERIFY_BYTES * self.rows // max(self.nbytes, 1)))
        for start in range(0, self.rows, step):
            rows = np.arange(start, min(start + step, self.rows))
            leaves = [column.slice(start, start + len(rows)) for column in self.columns]
            self.check(rows, leaves, rows - start)


def _origin(file: str, rows: torch.Tensor, metadata: dict[str, str], count: int) -> Origin:
    if rows.dtype != torch.uint32 or tuple(rows.shape) != (count, 2):
        raise damaged(file, f"{_ORIGIN!r} is {rows.dtype} {list(rows.shape)}")
    try:
        found = json.loads(metadata[_ORIGIN_FIELD])
        origin = Origin(tuple((str(name), str(digest)) for name, digest in found["segments"]), rows)
        if origin.digest() != found["blake3"]:
            raise ValueError("it does not match its checksum")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(file, f"{_ORIGIN_FIELD!r} is not readable ({error})") from None
    if count and int(rows[:, 0].to(torch.int64).max()) >= len(origin.segments):
        raise damaged(file, f"{_ORIGIN!r} names more segments than the {len(origin.segments)} there were")
    return origin


def _expect_names(file: str, tensors: dict[str, torch.Tensor], specs: Sequence[LeafSpec]) -> None:
    expected = {"keys", "sums"}
    for number, spec in enumerate(specs):
        name = f"leaf.{number}"
        expected |= {f"{name}.values", f"{name}.offsets"} if spec.ragged else {name}
    if set(tensors) != expected:
        raise damaged(file, f"it holds {sorted(tensors)}, and about.json says {sorted(expected)}")


def _expect(
    file: str, tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    found = tensors[name]
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise damaged(file, f"{name!r} is {found.dtype} {list(found.shape)}, where {dtype} {list(shape)} was expected")
    return found


def _column(file: str, tensors: dict[str, torch.Tensor], number: int, spec: LeafSpec, rows: int) -> Column:
    name = f"leaf.{number}"
    if not spec.ragged:
        return Column(spec, _expect(file, tensors, name, spec.dtype, (rows, *spec.shape)), None)
    offsets = _expect(file, tensors, f"{name}.offsets", torch.int64, (rows + 1,))
    total = int(offsets[-1])
    values = _expect(file, tensors, f"{name}.values", spec.dtype, (total, *spec.shape))
    if int(offsets[0]) != 0 or (offsets[1:] < offsets[:-1]).any():
        raise damaged(file, f"the offsets of {name!r} do not ascend from 0 to {total}")
    return Column(spec, values, offsets)
