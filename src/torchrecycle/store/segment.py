"""One immutable file of rows: written whole, then read a few rows at a time from the map.

A segment of 256 MB holds 1,300 rows of 200 KB, or 170,000 of 1.5 KB. Its tensors are ``keys`` ``[rows, 16]``,
``sums`` ``[blocks, 16]``, and for each leaf ``leaf.N`` ``[rows, ...]``, or ``leaf.N.values`` ``[total, ...]`` and
``leaf.N.offsets`` ``[rows + 1]`` if it is ragged. Each begins at a page. A block is some consecutive rows, of 64 KB
together or one row if that is larger, and its sum the first 16 bytes of the BLAKE3 of

    the keys of its rows, then for each leaf in order: the lengths as 8 bytes each, little-endian, if it is ragged; the
    bytes of its rows

so that rows under other rows' keys, or leaves that swapped a length, are noticed as well as a flipped bit. A block is
compared with its sum when a row of it is first read in a process. Hashing row by row would take four times as long as
reading 1.5 KB; in blocks it goes at the speed of BLAKE3. (Format 1 had a sum of 8 bytes for each row.)

Batches are gathered with `torch.index_select` straight from the map into the batch. It copies without looking at the
values, so leaves are read as the widest integers that their rows divide into, which halves the time for large rows and
lets dtypes through that it does not know. Which rows were compared with their sums is marked in memory that forked
workers share: each block is hashed once, and not once per worker and epoch.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import blake3
import numpy as np
import torch

from torchrecycle.store.container import Entry, Packed, damaged, flat_bytes, pack, unpack
from torchrecycle.store.contract import KEY_BYTES, Leaf, LeafSpec, Ragged
from torchrecycle.store.mapping import release

_CARRIERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_BLOCK_BYTES = 64 * 1024
_SUM_BYTES = 16
_BLOCK_FIELD = "torchrecycle.rows_per_sum"
_ROW_SUM_BYTES = 8
"""Of format 1."""
_RELEASED = 64 * 2**20
"""Bytes that are read before their pages are let go."""

_ORIGIN = "origin"
_ORIGIN_FIELD = "torchrecycle.origin"


def leaf_bytes(leaf: Leaf) -> int:
    """The bytes of a leaf's rows, with the lengths if it is ragged."""
    if isinstance(leaf, Ragged):
        return leaf_bytes(leaf.values) + leaf_bytes(leaf.lengths)
    return leaf.numel() * leaf.dtype.itemsize


def row_bytes(spec: LeafSpec) -> int:
    """Bytes of one row of a leaf; of one step of it, if it is ragged."""
    return math.prod(spec.shape) * spec.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to be written, in pieces as they came."""

    keys: Sequence[torch.Tensor]
    """``[n, 16]`` uint8 each."""

    leaves: Sequence[Sequence[Leaf]]
    """For each leaf, as many pieces, on the CPU and contiguous."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(len(keys) for keys in self.keys)


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


def pack_segment(specs: Sequence[LeafSpec], batch: Batch, *, owner: str, origin: Origin | None = None) -> Packed:
    """The file that holds these rows."""
    rows = batch.rows
    leaves = [
        entry
        for number, (spec, pieces) in enumerate(zip(specs, batch.leaves, strict=True))
        for entry in _leaf_entries(f"leaf.{number}", spec, rows, pieces)
    ]
    nbytes = sum(entry.nbytes for entry in leaves)
    in_block = max(1, min(rows, _BLOCK_BYTES * rows // max(nbytes, 1)))
    sums = b"".join(_sum(parts) for parts in _blocks(batch, in_block))
    entries = [
        Entry("keys", torch.uint8, (rows, KEY_BYTES), batch.keys),
        Entry("sums", torch.uint8, (len(sums) // _SUM_BYTES, _SUM_BYTES), [_as_bytes(sums)]),
        *leaves,
    ]
    metadata = {_BLOCK_FIELD: str(in_block)}
    if origin is not None:
        entries.append(Entry(_ORIGIN, torch.uint32, (rows, 2), [origin.rows]))
        metadata[_ORIGIN_FIELD] = json.dumps({"segments": origin.segments, "blake3": origin.digest()})
    return pack(entries, metadata, owner=owner, aligned=True)


def _as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


_Part = tuple[torch.Tensor, list[Leaf]]
"""Some rows: keys and leaves."""


def _sum(parts: Sequence[_Part]) -> bytes:
    """The sum of a block whose rows come in these parts."""
    hasher = blake3.blake3()
    for keys, _ in parts:
        hasher.update(flat_bytes(keys).data)
    for number in range(len(parts[0][1])):
        leaves = [leaves[number] for _, leaves in parts]
        for leaf in leaves:
            if isinstance(leaf, Ragged):
                hasher.update(flat_bytes(leaf.lengths).data)
        for leaf in leaves:
            hasher.update(flat_bytes(leaf.values if isinstance(leaf, Ragged) else leaf).data)
    return hasher.digest(length=_SUM_BYTES)


def _blocks(batch: Batch, in_block: int) -> Iterator[list[_Part]]:
    """The rows of a batch, so many at a time."""
    block: list[_Part] = []
    missing = in_block
    for number, keys in enumerate(batch.keys):
        leaves = [_Slices(pieces[number]) for pieces in batch.leaves]
        start = 0
        while start < len(keys):
            stop = min(start + missing, len(keys))
            block.append((keys[start:stop], [leaf.slice(start, stop) for leaf in leaves]))
            missing -= stop - start
            start = stop
            if not missing:
                yield block
                block, missing = [], in_block
    if block:
        yield block


class _Slices:
    """Slices of a leaf by rows."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        if isinstance(leaf, Ragged):
            self._ends = np.concatenate([[0], np.cumsum(leaf.lengths.numpy())])

    def slice(self, start: int, stop: int) -> Leaf:
        if isinstance(self._leaf, torch.Tensor):
            return self._leaf[start:stop]
        values = self._leaf.values[int(self._ends[start]) : int(self._ends[stop])]
        return Ragged(values, self._leaf.lengths[start:stop])


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
    if len(spec.shape) == 1 and spec.shape[0]:
        return carried.view(spec.dtype)
    return carried.view(-1).view(spec.dtype).view(len(carried), *spec.shape)


class Segment:
    """The rows of one file. Opening it compares all that the file says of itself with what must be."""

    def __init__(self, file: str, data: torch.Tensor, specs: Sequence[LeafSpec], *, owner: str) -> None:
        self.file = file
        self.data = data
        """The bytes of the file."""
        self.version: tuple[int, ...] | None = None
        """What the shelf says of the file, to know it again."""
        tensors, metadata = unpack(data, file, owner=owner)
        origin = tensors.pop(_ORIGIN, None)
        _expect_names(file, tensors, specs)
        self.rows = len(tensors["keys"]) if tensors["keys"].ndim else -1
        _expect(file, tensors, "keys", torch.uint8, (self.rows, KEY_BYTES))
        # Tensors and not NumPy arrays: these follow when the bytes of a store in memory move into shared
        # memory.
        self.keys = tensors["keys"]
        # A copy: a file that is written over while it is mapped brings sums of its own.
        self.sums = tensors["sums"].clone()
        self.columns = [_column(file, tensors, number, spec, self.rows) for number, spec in enumerate(specs)]
        self.origin = None if origin is None else _origin(file, origin, metadata, self.rows)
        """Where its rows were before, if it was merged of earlier segments."""
        self.nbytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
        self._in_block = _rows_per_sum(file, metadata, self.sums, self.rows)
        """Rows that share a sum; 0 in format 1, whose rows have sums of their own."""
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

    def slice(self, start: int, stop: int) -> list[Leaf]:
        """These rows, not copied and not compared with their sums: see `check`."""
        return [column.slice(start, stop) for column in self.columns]

    def unchecked(self, rows: np.ndarray) -> np.ndarray:
        """All rows that `check` of these would read."""
        step = self._in_block or 1
        starts = np.unique(rows[~self.checked[rows]] // step) * step
        return ranges(starts, np.minimum(starts + step, self.rows) - starts)

    def check(self, rows: np.ndarray) -> int:
        """Compare rows with their sums, where nobody has yet, and remember that.

        Args:
            rows: Which rows of this segment.

        Returns:
            How many bytes were compared.

        Raises:
            DamagedRowError: One does not match.
        """
        step = self._in_block or 1
        compared = 0
        for block in np.unique(rows[~self.checked[rows]] // step).tolist():
            start, stop = block * step, min((block + 1) * step, self.rows)
            leaves = self.slice(start, stop)
            if not self._matches(block, start, stop, leaves):
                which = f"row {start}" if stop == start + 1 else f"one of the rows {start} to {stop - 1}"
                raise damaged(f"{which} of {self.file}", "it does not match its checksum")
            self.checked[start:stop] = True
            compared += sum(map(leaf_bytes, leaves))
        return compared

    def _matches(self, block: int, start: int, stop: int, leaves: list[Leaf]) -> bool:
        keys, expected = self.keys[start:stop], self.sums[block].numpy().tobytes()
        if self._in_block:
            return _sum([(keys, leaves)]) == expected
        # One row, so that a length stands before its values as it does in a block.
        return _sum([(keys, leaves)])[:_ROW_SUM_BYTES] == expected

    def check_all(self) -> None:
        """Compare every row with its sum, also those that were compared before."""
        self.checked[:] = False
        step = max(1, self.rows * _RELEASED // max(self.nbytes, 1))
        for start in range(0, self.rows, step):
            self.check(np.arange(start, min(start + step, self.rows)))
            release(self.data)


def _rows_per_sum(file: str, metadata: dict[str, str], sums: torch.Tensor, rows: int) -> int:
    text = metadata.get(_BLOCK_FIELD)
    if text is None:
        _expect(file, {"sums": sums}, "sums", torch.uint8, (rows, _ROW_SUM_BYTES))
        return 0
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 16 and int(text) > 0):
        raise damaged(file, f"its {_BLOCK_FIELD!r} is {text!r}")
    _expect(file, {"sums": sums}, "sums", torch.uint8, (-(-rows // int(text)), _SUM_BYTES))
    return int(text)


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
