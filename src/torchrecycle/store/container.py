"""Named tensors <-> the bytes of a safetensors file, read with suspicion.

A file is eight bytes that say how long the header is, the header (JSON: name, dtype, shape and place of each
tensor), and the tensors without gaps. Any safetensors reader opens what is written here. It is read by our
own hand for two reasons: tensors come back as views of the mapped file, so that a batch of 64 rows touches 64
rows of a 256 MB segment; and a header is believed only after each of its claims was compared with the size of
the file, so that a damaged or hostile one is an error and never a crash, a wrong row, or more memory than the
file has bytes.

The header is padded with spaces until the data start at a multiple of 4,096, so that pages of the data are
pages of the file, and every tensor is aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrecycle.errors import DamagedRowError, StoreError
from torchrecycle.store.contract import FORMAT_VERSION

PAGE = 4096
FORMAT_FIELD = "torchrecycle.format"
OWNER_FIELD = "torchrecycle.owner"
_PAD = "pad."

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written, in pieces, so that a segment of 256 MB is never held twice."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[torch.Tensor]
    """Pieces that make up the tensor, one after the other."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Packed:
    """A file to be written: its size, and its bytes in order."""

    nbytes: int
    chunks: Iterable[np.ndarray]


def flat_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor as a flat uint8 array: a view where the tensor is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def pack(entries: Sequence[Entry], metadata: Mapping[str, str], *, owner: str, aligned: bool = False) -> Packed:
    """The file that holds these tensors, in this order. The same tensors and metadata give the same bytes.

    Args:
        entries: The tensors.
        metadata: Strings by name.
        owner: What the file belongs to: for anybody else it is damaged.
        aligned: Let each tensor begin at a page, by tensors of zeros between them, which `unpack` leaves out:
            safetensors allows no gaps.
    """
    if aligned:
        entries = list(_with_pads(entries))
    header: dict[str, Any] = {"__metadata__": {FORMAT_FIELD: str(FORMAT_VERSION), OWNER_FIELD: owner, **metadata}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        header[entry.name] = {
            "dtype": code_of(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    head = np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)
    return Packed(len(head) + start, _chunks(head, entries))


def _with_pads(entries: Sequence[Entry]) -> Iterable[Entry]:
    for number, entry in enumerate(entries):
        yield entry
        missing = -entry.nbytes % PAGE
        if missing and number + 1 < len(entries):
            yield Entry(f"{_PAD}{number}", torch.uint8, (missing,), [torch.zeros(missing, dtype=torch.uint8)])


def _chunks(head: np.ndarray, entries: Sequence[Entry]) -> Iterable[np.ndarray]:
    yield head
    for entry in entries:
        for chunk in entry.chunks:
            yield flat_bytes(chunk)


def code_of(dtype: torch.dtype) -> str:
    """How safetensors spells a dtype."""
    if dtype not in CODES:
        raise StoreError(f"a store cannot keep {dtype}; it keeps {', '.join(str(d) for d in CODES)}")
    return CODES[dtype]


def unpack(data: torch.Tensor, file: str, *, owner: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, as views of its bytes, and its metadata.

    Args:
        data: ``[size of the file]`` uint8.
        file: The file's name, for messages.
        owner: What the file must belong to.

    Raises:
        DamagedRowError: Anything in the header is not as it must be, or the file is of somebody else: copied here,
            renamed, exchanged with another. (Files of format 1 do not say whose they are.)
        StoreError: The file is of a newer format.
    """
    try:
        header, start = _header(data)
        metadata = _metadata(header.pop("__metadata__", {}))
        if _format(metadata, file) > 1 and metadata.get(OWNER_FIELD) != owner:
            raise _HeaderError(f"it belongs to {metadata.get(OWNER_FIELD)!r} and not to {owner!r}")
        return _without_pads(_views(header, data[start:])), metadata
    except _HeaderError as error:
        raise damaged(file, str(error)) from None


class _HeaderError(ValueError):
    """A claim of a header that does not hold."""


def damaged(file: str, what: str) -> DamagedRowError:
    """The error for a file in which something is not as it was written."""
    return DamagedRowError(
        f"{file} is damaged: {what}. Run `torchrecycle store verify` (or Rows.verify()): it sets the file "
        "aside, and what was in it is computed again"
    )


def _header(data: torch.Tensor) -> tuple[dict[str, Any], int]:
    size = len(data)
    if size < 8:
        raise _HeaderError(f"it has {size} bytes, and a header takes more")
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if length > size - 8:
        raise _HeaderError(f"its header claims {length} bytes, and the file has {size}")
    try:
        header = json.loads(data[8 : 8 + length].numpy().tobytes().decode(), object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise _HeaderError(f"its header is not readable ({error})") from None
    if not isinstance(header, dict):
        raise _HeaderError("its header is no JSON object")
    return header, 8 + length


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _HeaderError("its metadata are not strings")
    return found


def _format(metadata: Mapping[str, str], file: str) -> int:
    found = metadata.get(FORMAT_FIELD, "")
    if not (found.isascii() and found.isdigit() and 0 < len(found) < 10 and int(found) > 0):
        raise _HeaderError(f"its metadata do not say the format ({FORMAT_FIELD!r}), so torchrecycle has not written it")
    refuse_newer(int(found), file)
    return int(found)


def refuse_newer(found: int, file: str) -> None:
    """Raise if a file is of a format that this release does not know."""
    if found > FORMAT_VERSION:
        raise StoreError(f"{file}: format {found}; this version reads {FORMAT_VERSION}; upgrade torchrecycle")


def _views(header: dict[str, Any], data: torch.Tensor) -> dict[str, torch.Tensor]:
    places = {name: _place(name, entry) for name, entry in header.items()}
    expected = 0
    for name, (_, _, start, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != expected:
            raise _HeaderError(f"{name!r} starts at {start}, where {expected} was expected")
        expected = end
    if expected != len(data):
        raise _HeaderError(f"its header describes {expected} bytes of data, and it holds {len(data)}")
    return {name: _view(name, data, *place) for name, place in places.items()}


def _without_pads(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in [name for name in views if name.startswith(_PAD)]:
        pad = views.pop(name)
        if pad.dtype != torch.uint8 or pad.numel() >= PAGE or bool(pad.any()):
            raise _HeaderError(f"{name!r} should be fewer than {PAGE} zeros, for alignment")
    return views


def _place(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"the entry {name!r} is of no known form")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _HeaderError(f"{name!r} has the unknown dtype {code!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise _HeaderError(f"{name!r} has shape {shape!r} and place {offsets!r}")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _HeaderError(f"{name!r} takes {nbytes} bytes by its shape, and {offsets[1] - offsets[0]} by its place")
    return DTYPES[code], tuple(shape), offsets[0], offsets[1]


def _are_sizes(found: Any) -> bool:
    # bool is a subclass of int, and `true` in a header is no size.
    return isinstance(found, list) and all(type(size) is int and 0 <= size < 2**62 for size in found)


def _view(
    name: str, data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int
) -> torch.Tensor:
    try:
        if start == end:
            return torch.empty(shape, dtype=dtype)
        # torch refuses a place that is not aligned for the dtype.
        return data[start:end].view(dtype).view(shape)
    except (RuntimeError, OverflowError) as error:
        raise _HeaderError(f"{name!r} cannot be of shape {shape} ({error})") from None
