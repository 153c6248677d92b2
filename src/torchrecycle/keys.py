"""Any Python object -> its key: 128 bits of BLAKE3 over the content, the same on every machine.

Two runs of a training script, on two machines, load the same image of 3 x 224 x 224 floats (600 KB). In both,
its key is the same 16 bytes, found in 0.1 ms, so the second run finds the row that the first has kept. If the
image is resized in another way, one pixel differs, the key differs, and the old row is not found: a miss,
never a wrong hit.

The object is spelled out as a stream of bytes, and the stream is hashed. Each value opens with a tag of one
byte for its type; whatever has a length is preceded by it. So no two objects share a stream: ``1``, ``1.0``,
``True`` and ``"1"`` differ by tag, ``["ab", "c"]`` and ``["a", "bc"]`` by lengths. Big contents (pixels,
files) go to the hasher where they lie, without a copy. Sets and dicts have no order of their own: their
elements and names are hashed one by one, and the hashes sorted. Nothing is pickled (a pickle differs between
versions), and neither ``id()`` nor ``hash()`` enters a key (they differ between processes).

What counts, where it is not obvious:

- A tensor counts by dtype, shape and values. Device, strides, ``requires_grad``, being a
  `torch.nn.Parameter`, pending conjugation or negation do not. A NumPy array of the same values is another
  object: another key.
- All sparse layouts of the same entries have one key, which is not that of the dense tensor. Explicit zeros
  count.
- Bytes in tensors and arrays count as they are: ``-0.0`` is not ``0.0``, and NaNs of other bits are other
  NaNs. Python's own floats differ in one point: all NaNs are one, as their sign depends on the processor.
- NumPy's byte order does not count; a NumPy scalar is an array without dimensions.
- ``bytes``, ``bytearray`` and ``memoryview`` of bytes are one type, ``set`` and ``frozenset`` also, and so is
  every mapping (``OrderedDict``, ``BatchEncoding``).
- A path stands for the content of its file, not for its name. An image stands for its pixels as decoded, with
  the colours of its palette that they use, and transparency; format, file name and Exif do not count.
- An instance of a class counts by the qualified name of the class, so a class moved to another module gives
  new keys.
- Subclasses of ``str``, ``int``, ``list``, ``datetime`` and the like may carry more than their base shows: they have
  no key.
- Frames, tables, series, arrays and scalars of pandas, Arrow and polars count by types, names, index and
  values. Arrow's chunks and what lies in the places of nulls do not count, nor does who holds pandas' strings.

Numbers are little-endian in the stream; on a big-endian machine contents are swapped first.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import os
import pathlib
import struct
import sys
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from blake3 import blake3

from torchrecycle.errors import BatchError, KeyTypeError
from torchrecycle.frames import FRAME_PACKAGES, is_frame, plain_of

__all__ = ["KEY_BYTES", "KEY_VERSION", "Key", "hash_threads", "key", "tensor_row_keys"]

Key: TypeAlias = bytes
"""16 bytes; ``.hex()`` to show it."""

KEY_VERSION = 1
"""The version of the recipe. It is hashed first: a key of another version never meets one of this."""

KEY_BYTES = 16

_FORKED: list[int] = []


def hash_threads() -> int:
    """How many threads BLAKE3 may use for large inputs: as many as it likes, but one in a forked process.

    Its pool of threads is one for all, and after a fork the child has the pool without its threads: it would wait for
    ever.
    """
    return 1 if _FORKED else blake3.AUTO


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(os.getpid()))
"""The length of a key."""

_PREFIX = b"torchrecycle key %d\0" % KEY_VERSION
_STR, _BYTES, _INT = _PREFIX + b"s", _PREFIX + b"b", _PREFIX + b"i"
_DIRECT = 1 << 14
"""Bytes from which a content is hashed where it lies. Below, a copy costs less than one more call."""

_FILE_CHUNK = 1 << 20
_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}

_u64 = struct.Struct("<Q").pack
_f64 = struct.Struct("<d").pack
_moment = struct.Struct("<HBBBBBIB").pack


def key(obj: Any, *, where: str = "item") -> Key:
    """The key of an object: the same for the same content, on every machine and in every process.

    Args:
        obj: strings, bytes, numbers, None, NumPy arrays, tensors, PIL images, paths (the file's content),
            dates, enums, dataclasses, frames and scalars of pandas, Arrow and polars, objects with
            ``__recycle_key__``, and tuples, lists, dicts and sets of these.
        where: what the object is called in an error.

    Returns:
        16 bytes.

    Raises:
        KeyTypeError: if the object, or something in it, has no key by content. It names the type and place.
        FileNotFoundError: if a path leads to no file.

    Example:
        >>> key({"text": "a", "id": 1}) == key({"id": 1, "text": "a"})
        True
        >>> key(1) == key(1.0)
        False
        >>> key("cat").hex()
        '63f9e07a84294cfe6d56a3300835e362'
    """
    # Alone, these need no stream: what is left is the call of the hasher, and one concatenation.
    kind = type(obj)
    if kind is str:
        data = obj.encode("utf-8", "surrogatepass")
        return blake3(_STR + _u64(len(data)) + data).digest(KEY_BYTES)
    if kind is bytes and len(obj) < _DIRECT:
        return blake3(_BYTES + _u64(len(obj)) + obj).digest(KEY_BYTES)
    if kind is int:
        data = _spell_int(obj)
        return blake3(_INT + _u64(len(data)) + data).digest(KEY_BYTES)
    try:
        return _digest(obj, set())
    except _RefusedError as refused:
        raise refused.as_key_error(where) from None
    except RecursionError:
        raise KeyTypeError(
            f"no key for {where}, a {_name_of(type(obj))}: it is nested deeper than Python's recursion limit "
            f"({sys.getrecursionlimit()}). {_ADVICE}"
        ) from None


def tensor_row_keys(
    inputs: Mapping[str, torch.Tensor],
    masks: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    ragged: Collection[str] = (),
) -> np.ndarray:
    """The keys of all rows of a batch: of row i, the key of ``{name: tensor[i]}`` without its padding.

    Args:
        inputs: tensors [batch, ...] on any device, at least one.
        masks: [batch, T], zero where a position is padding, which may lie left, right or between. None:
            nothing is padding. By name of an input, where several have lengths of their own.
        ragged: the names of the inputs [batch, T, ...] of which only the positions under the mask count. The
            others count in full. Masks by name say it themselves.

    Returns:
        [batch, 16] uint8, a new array: row i is ``key({name: tensor[i], ...})``, where a ragged tensor enters
        as ``tensor[i][masks[i].bool()]``.

    Raises:
        BatchError: if the tensors do not agree on the batch or with the mask.
        KeyTypeError: if a value is no tensor, or a tensor without content (meta, fake, a stand-in).

    Example:
        >>> ids = torch.tensor([[7, 8, 0], [5, 0, 0]])
        >>> rows = tensor_row_keys({"ids": ids}, masks=ids != 0, ragged={"ids"})
        >>> rows[0].tobytes() == key({"ids": torch.tensor([7, 8])})
        True
    """
    batch = _batch_size(inputs)
    own = masks if isinstance(masks, Mapping) else {} if masks is None else dict.fromkeys(ragged, masks)
    if any(_is_special(tensor) for tensor in inputs.values()):
        return _slow_row_keys(inputs, own, batch)
    kept: dict[int, Any] = {}
    columns: list[Sequence[bytes | memoryview]] = [[_PREFIX + b"d" + _u64(len(inputs))] * batch]
    for name in sorted(inputs, key=_str_key):
        tensor = inputs[name]
        mask = own.get(name)
        if mask is not None:
            _compare_shapes(name, tensor, mask)
            if id(mask) not in kept:
                kept[id(mask)] = _kept_positions(mask)
        try:
            columns += _columns(_str_key(name), tensor, None if mask is None else kept[id(mask)], batch)
        except _RefusedError as refused:
            raise refused.as_key_error(f"inputs[{name!r}]") from None
    digests = b"".join([_row_key(parts) for parts in zip(*columns, strict=True)])
    return np.frombuffer(digests, np.uint8).reshape(batch, KEY_BYTES).copy()


# ---------------------------------------------------------------------------------------------------- errors

_ADVICE = (
    "Give its class a method __recycle_key__(self) that returns what identifies it (a string, a number, a "
    "path, a tensor, or a nest of these), or pass key=, a function from an item of the data set to what "
    "identifies it."
)


class _RefusedError(Exception):
    """Something has no key. Each container on the way out adds the step that leads to it."""

    def __init__(self, obj: Any, why: str = "objects of this type have no key by content") -> None:
        super().__init__(why)
        self.type = type(obj)
        self.why = why
        self.steps: list[str] = []

    def through(self, step: str) -> _RefusedError:
        self.steps.append(step)
        return self

    def as_key_error(self, where: str) -> KeyTypeError:
        place = where + "".join(reversed(self.steps))
        return KeyTypeError(f"no key for {place}, a {_name_of(self.type)}: {self.why}. {_ADVICE}")


def _name_of(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# ------------------------------------------------------------------------------------------------ the stream


class _Stream:
    """What an object is spelled into: a hasher behind a small buffer."""

    __slots__ = ("buffer", "hasher", "open")

    def __init__(self, open_: set[int]) -> None:
        self.buffer = bytearray(_PREFIX)
        self.hasher: blake3 | None = None
        self.open = open_
        """The containers around the present object, by id: to find those in themselves. Never hashed."""

    def content(self, data: Any) -> None:
        """Adds bytes of a length that the stream already tells; ``data`` is not kept."""
        if len(data) < _DIRECT:
            self.buffer += data
            if len(self.buffer) > _DIRECT:
                self._flush()
        else:
            self._flush().update(data)

    def sized(self, data: Any) -> None:
        self.buffer += _u64(len(data))
        self.content(data)

    def text(self, text: str) -> None:
        self.sized(text.encode("utf-8", "surrogatepass"))

    def write(self, obj: Any) -> None:
        spell = _LEAVES.get(type(obj))
        if spell is not None:
            spell(self, obj)
            return
        if id(obj) in self.open:
            raise _RefusedError(obj, "it contains itself")
        self.open.add(id(obj))
        try:
            _writer_for(obj)(self, obj)
        finally:
            self.open.discard(id(obj))

    def write_at(self, step: str, obj: Any) -> None:
        try:
            self.write(obj)
        except _RefusedError as refused:
            raise refused.through(step) from None

    def digest(self) -> Key:
        if self.hasher is None:
            return blake3(self.buffer).digest(KEY_BYTES)
        return self._flush().digest(KEY_BYTES)

    def _flush(self) -> blake3:
        hasher = self.hasher = self.hasher or blake3()
        hasher.update(self.buffer)
        self.buffer.clear()
        return hasher


def _digest(obj: Any, open_: set[int]) -> Key:
    stream = _Stream(open_)
    stream.write(obj)
    return stream.digest()


@lru_cache(maxsize=1024)
def _str_key(text: str) -> Key:
    return key(text)


# ------------------------------------------------------------------------------------------- leaves of a nest


def _str(out: _Stream, text: str) -> None:
    out.buffer += b"s"
    out.text(text)


def _bytes(out: _Stream, data: bytes | bytearray) -> None:
    out.buffer += b"b"
    out.sized(data)


def _memoryview(out: _Stream, view: memoryview) -> None:
    if view.ndim != 1 or view.itemsize != 1:
        raise _RefusedError(view, "only memoryviews of bytes in one dimension have one, or numpy.asarray(it)")
    _bytes(out, view.tobytes())


def _bool(out: _Stream, flag: bool) -> None:
    out.buffer += b"T" if flag else b"F"


def _spell_int(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


def _int(out: _Stream, number: int) -> None:
    out.buffer += b"i"
    out.sized(_spell_int(number))


def _spell_float(number: float) -> bytes:
    return _f64(math.nan if number != number else number)


def _float(out: _Stream, number: float) -> None:
    out.buffer += b"f" + _spell_float(number)


def _complex(out: _Stream, number: complex) -> None:
    out.buffer += b"c" + _spell_float(number.real) + _spell_float(number.imag)


def _decimal(out: _Stream, number: Decimal) -> None:
    # As written, so that 1.0 and 1.00 differ. Not str(): it obeys the context.
    sign, digits, exponent = number.as_tuple()
    out.buffer += b"m"
    out.text(f"{sign} {''.join(map(str, digits))} {exponent}")


def _fraction(out: _Stream, number: Fraction) -> None:
    out.buffer += b"q"
    _int(out, number.numerator)
    _int(out, number.denominator)


def _uuid(out: _Stream, value: uuid.UUID) -> None:
    out.buffer += b"u" + value.bytes


def _range(out: _Stream, steps: range) -> None:
    out.buffer += b"R"
    for number in (steps.start, steps.stop, steps.step):
        _int(out, number)


def _date(out: _Stream, day: datetime.date) -> None:
    out.buffer += b"y" + _moment(day.year, day.month, day.day, 0, 0, 0, 0, 0)


def _datetime(out: _Stream, at: datetime.datetime) -> None:
    fields = (at.year, at.month, at.day, at.hour, at.minute, at.second, at.microsecond, at.fold)
    out.buffer += b"Y" + _moment(*fields)
    _zone(out, at)


def _time(out: _Stream, at: datetime.time) -> None:
    out.buffer += b"h" + _moment(0, 0, 0, at.hour, at.minute, at.second, at.microsecond, at.fold)
    _zone(out, at)


def _zone(out: _Stream, at: datetime.datetime | datetime.time) -> None:
    """The offset and its name: what a zone means at this moment, whichever package it comes from."""
    if at.tzinfo is None:
        out.buffer += b"N"
        return
    offset = at.utcoffset()
    if offset is None:
        raise _RefusedError(at, f"its zone {at.tzinfo} has no offset without a date")
    _timedelta(out, offset)
    out.write(at.tzname())


def _timedelta(out: _Stream, span: datetime.timedelta) -> None:
    out.buffer += b"w"
    _int(out, span // datetime.timedelta(microseconds=1))


_LEAVES: dict[type, Callable[[_Stream, Any], None]] = {
    str: _str,
    bytes: _bytes,
    bytearray: _bytes,
    memoryview: _memoryview,
    bool: _bool,
    int: _int,
    float: _float,
    complex: _complex,
    type(None): lambda out, _: out.content(b"N"),
    type(...): lambda out, _: out.content(b"."),
    Decimal: _decimal,
    Fraction: _fraction,
    uuid.UUID: _uuid,
    range: _range,
    datetime.date: _date,
    datetime.datetime: _datetime,
    datetime.time: _time,
    datetime.timedelta: _timedelta,
}
"""By exact type: a subclass may carry more than its base shows."""


# ------------------------------------------------------------------------------------------------ containers


def _list(out: _Stream, items: Sequence[Any]) -> None:
    out.buffer += b"l" + _u64(len(items))
    _items(out, items)


def _tuple(out: _Stream, items: Sequence[Any]) -> None:
    out.buffer += b"t" + _u64(len(items))
    _items(out, items)


def _items(out: _Stream, items: Sequence[Any]) -> None:
    index = -1
    try:
        for index, item in enumerate(items):  # noqa: B007
            out.write(item)
    except _RefusedError as refused:
        raise refused.through(f"[{index}]") from None


def _slice(out: _Stream, part: slice) -> None:
    out.buffer += b":"
    out.write_at(".start", part.start)
    out.write_at(".stop", part.stop)
    out.write_at(".step", part.step)


def _set(out: _Stream, elements: Collection[Any]) -> None:
    digests = []
    for element in elements:
        try:
            digests.append(_digest(element, out.open))
        except _RefusedError as refused:
            raise refused.through("{an element}") from None
    out.buffer += b"S" + _u64(len(digests))
    out.content(b"".join(sorted(digests)))


def _mapping(out: _Stream, mapping: Mapping[Any, Any]) -> None:
    values: dict[Key, tuple[Any, Any]] = {}
    for name, value in mapping.items():
        digest = _name_digest(out, name)
        if digest in values:
            raise _RefusedError(mapping, f"two of its keys have the same content, {_short(name)}")
        values[digest] = (name, value)
    out.buffer += b"d" + _u64(len(values))
    for digest in sorted(values):
        name, value = values[digest]
        out.buffer += digest
        try:
            out.write(value)
        except _RefusedError as refused:
            raise refused.through(f"[{_short(name)}]") from None


def _name_digest(out: _Stream, name: Any) -> Key:
    if type(name) is str:
        return _str_key(name)
    try:
        return _digest(name, out.open)
    except _RefusedError as refused:
        raise refused.through("{a key}") from None


def _short(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."


def _namedtuple(out: _Stream, items: Any) -> None:
    if getattr(items, "__dict__", None):
        raise _RefusedError(items, "it carries attributes beside its items")
    out.buffer += b"n"
    out.text(_name_of(type(items)))
    out.buffer += _u64(len(items))
    for name, item in zip(items._fields, items, strict=True):
        out.text(name)
        out.write_at(f".{name}", item)


def _dataclass(out: _Stream, obj: Any) -> None:
    fields = dataclasses.fields(obj)
    out.buffer += b"D"
    out.text(_name_of(type(obj)))
    out.buffer += _u64(len(fields))
    for field in fields:
        out.text(field.name)
        if not hasattr(obj, field.name):
            raise _RefusedError(obj, f"its field {field.name!r} is not set")
        out.write_at(f".{field.name}", getattr(obj, field.name))
    # transformers' ModelOutput is a dataclass and a dict, and its dict may hold more than its fields.
    if isinstance(obj, Mapping):
        _mapping(out, obj)
    else:
        out.buffer += b"N"


def _enum(out: _Stream, member: enum.Enum) -> None:
    out.buffer += b"E"
    out.text(_name_of(type(member)))
    # The name of a combination of flags differs between Python versions; its value does not.
    out.text("" if isinstance(member, enum.Flag) else member.name)
    out.write_at(".value", member.value)


def _own_key(out: _Stream, obj: Any) -> None:
    out.buffer += b"K"
    out.text(_name_of(type(obj)))
    out.write_at(".__recycle_key__()", type(obj).__recycle_key__(obj))


_CONTAINERS: dict[type, Callable[[_Stream, Any], None]] = {
    list: _list,
    tuple: _tuple,
    torch.Size: _tuple,
    dict: _mapping,
    OrderedDict: _mapping,
    defaultdict: _mapping,
    set: _set,
    frozenset: _set,
    slice: _slice,
}

_VALUES = (str, bytes, bytearray, int, float, complex, list, set, frozenset, datetime.date, datetime.time)


def _writer_for(obj: Any) -> Callable[[_Stream, Any], None]:
    cls = type(obj)
    if cls in _CONTAINERS:
        return _CONTAINERS[cls]
    if hasattr(cls, "__recycle_key__"):
        return _own_key
    for kind, writer in _BY_BASE:
        if isinstance(obj, kind):
            return writer
    if hasattr(cls, "__dataclass_fields__") and not isinstance(obj, (*_VALUES, tuple)):
        return _dataclass
    if isinstance(obj, tuple) and hasattr(cls, "_fields"):
        return _namedtuple
    if _is_image(obj):
        return _image
    if is_frame(obj):
        return _frame
    if isinstance(obj, Mapping):
        return _mapping
    return _refuse


def _refuse(out: _Stream, obj: Any) -> None:
    if isinstance(obj, type):
        raise _RefusedError(obj, f"a class ({_name_of(obj)}) has no content to hash")
    base = next((base for base in (*_VALUES, tuple) if isinstance(obj, base)), None)
    if base is None:
        raise _RefusedError(obj)
    raise _RefusedError(obj, f"a subclass of {base.__name__} may carry more than a {base.__name__} shows")


# ------------------------------------------------------------------------- tensors, arrays, images, files


def _spell_shape(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape)


def _spell_tensor_head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    name = str(dtype).encode()
    return b"A" + _u64(len(name)) + name + _spell_shape(shape)


def _tensor(out: _Stream, tensor: torch.Tensor) -> None:
    if tensor.is_nested:
        out.buffer += b"g"
        _list(out, tensor.detach().unbind())
    elif tensor.layout in _SPARSE:
        _sparse(out, tensor.detach())
    else:
        data = _dense_content(tensor)
        out.buffer += _spell_tensor_head(tensor.dtype, tensor.shape)
        out.content(data)


def _sparse(out: _Stream, tensor: torch.Tensor) -> None:
    _check_has_content(tensor)
    try:
        tensor = tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse_coo()
        tensor = tensor.coalesce()
    except (RuntimeError, NotImplementedError) as error:
        raise _unreadable(tensor, error) from error
    out.buffer += b"p" + _spell_shape(tensor.shape)
    _tensor(out, tensor.indices())
    _tensor(out, tensor.values())


def _dense_content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: a view of its memory where it can be."""
    _check_has_content(tensor)
    try:
        plain = tensor.detach()
        plain = plain.to_dense() if plain.is_mkldnn else plain.as_subclass(torch.Tensor)
        plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
        if plain.numel() == 0:
            return memoryview(b"")
        # A single value may have any stride and still pass for contiguous, but not for a view of its bytes.
        raw = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise _unreadable(tensor, error) from error
    return _little_endian(raw, plain.itemsize // (2 if plain.is_complex() else 1)).data


def _unreadable(tensor: torch.Tensor, error: Exception) -> _RefusedError:
    return _RefusedError(tensor, f"its values cannot be read ({str(error).splitlines()[0]})")


def _check_has_content(tensor: torch.Tensor) -> None:
    cls = type(tensor)
    if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # pyright: ignore
        raise _RefusedError(tensor, "it stands for a tensor and does not hold its values")
    if tensor.device.type == "meta":
        raise _RefusedError(tensor, "a tensor on the meta device has no values")
    if tensor.is_quantized:
        raise _RefusedError(tensor, "a quantised tensor has none, its .dequantize() and its .int_repr() have")
    if cls not in (torch.Tensor, torch.nn.Parameter) and vars(tensor):
        names = ", ".join(sorted(vars(tensor)))
        raise _RefusedError(tensor, f"it carries attributes beside its values ({names})")


def _little_endian(raw: np.ndarray, width: int, order: str = sys.byteorder) -> np.ndarray:
    if order == "little" or width == 1:
        return raw
    return np.ascontiguousarray(raw.reshape(-1, width)[:, ::-1]).reshape(-1)


def _array(out: _Stream, array: np.ndarray | np.generic) -> None:
    if isinstance(array, np.generic):
        array = np.asarray(array)
    elif type(array) not in (np.ndarray, np.memmap, np.recarray):
        raise _RefusedError(array, "a subclass of numpy.ndarray may carry more than an array shows")
    array = array.view(np.ndarray)
    dtype = array.dtype
    if dtype.names is not None:
        _structured(out, array, dtype.names)
    elif dtype.hasobject or dtype.kind == "T":
        _object_array(out, array)
    elif dtype.char in "gG":
        raise _RefusedError(array, f"{dtype.name} differs between machines; .astype(numpy.float64) has one")
    else:
        out.buffer += b"a"
        # Types from other packages (bfloat16 of ml_dtypes) all share one .str.
        out.text(dtype.name if dtype.isbuiltin == 2 else dtype.newbyteorder("<").str)
        out.buffer += _spell_shape(array.shape)
        if array.nbytes:
            out.content(_array_content(array))


def _array_content(array: np.ndarray) -> memoryview:
    if array.dtype.isbuiltin != 2:
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # As uint8, since dates have no buffer of their own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _structured(out: _Stream, array: np.ndarray, names: tuple[str, ...]) -> None:
    # Field by field: the bytes between aligned fields are whatever was in memory.
    out.buffer += b"r" + _spell_shape(array.shape) + _u64(len(names))
    for name in names:
        out.text(name)
        try:
            _array(out, array[name])
        except _RefusedError as refused:
            raise refused.through(f"[{name!r}]") from None


def _object_array(out: _Stream, array: np.ndarray) -> None:
    out.buffer += b"o"
    out.text(array.dtype.kind)
    out.buffer += _spell_shape(array.shape)
    index = 0
    try:
        for index, item in enumerate(array.astype(object).ravel()):  # noqa: B007
            out.write(item)
    except _RefusedError as refused:
        place = ", ".join(str(int(at)) for at in np.unravel_index(index, array.shape)) if array.ndim else "()"
        raise refused.through(f"[{place}]") from None


def _is_image(obj: Any) -> bool:
    # There are no images before PIL is loaded.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(obj, module.Image)


def _used_colours(image: Any, pixels: np.ndarray) -> bytes:
    # Some formats fill the palette up to 256 colours, and others do not.
    colours = image.getpalette(image.palette.mode)
    return bytes(colours[: len(image.palette.mode) * (int(pixels.max()) + 1)])


def _image(out: _Stream, image: Any) -> None:
    data = image.tobytes()
    width = 4 if image.mode in ("I", "F") else 1
    out.buffer += b"I"
    out.text(image.mode)
    out.buffer += _spell_shape(image.size)
    out.sized(_little_endian(np.frombuffer(data, np.uint8), width).data if data else data)
    if image.mode in ("P", "PA") and data and image.palette is not None:
        _str(out, image.palette.mode)
        out.sized(_used_colours(image, np.frombuffer(data, np.uint8)[:: len(image.mode)]))
    else:
        out.buffer += b"N"
    out.write_at(".info['transparency']", image.info.get("transparency"))


def _frame(out: _Stream, frame: Any) -> None:
    if type(frame).__module__.partition(".")[0] not in FRAME_PACKAGES:
        raise _RefusedError(frame, f"a subclass of {_base_of(frame)} may carry more than its content shows")
    try:
        content = plain_of(frame)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _RefusedError(frame, str(error).splitlines()[0]) from error
    out.buffer += b"x"
    try:
        out.write(content)
    except _RefusedError as refused:
        raise _RefusedError(frame, f"it holds a {_name_of(refused.type)}: {refused.why}") from None


def _base_of(frame: Any) -> str:
    bases = (base for base in type(frame).__mro__ if base.__module__.partition(".")[0] in FRAME_PACKAGES)
    return _name_of(next(bases))


def _path(out: _Stream, path: pathlib.PurePath) -> None:
    if not isinstance(path, pathlib.Path):
        raise _RefusedError(path, "a pure path leads to no file")
    if path.exists() and not path.is_file():
        raise _RefusedError(path, f"it stands for the content of a file, and {str(path)!r} is not a file")
    content = blake3()
    # Without Python's buffer in between, which is one more copy.
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_FILE_CHUNK):
            content.update(chunk)
    out.buffer += b"P" + content.digest()


_BY_BASE: list[tuple[type | tuple[type, ...], Callable[[_Stream, Any], None]]] = [
    (torch.Tensor, _tensor),
    ((np.ndarray, np.generic), _array),
    (enum.Enum, _enum),
    (pathlib.PurePath, _path),
    # A module's fields are not what it is, even where it is a dataclass.
    (torch.nn.Module, _refuse),
]


# -------------------------------------------------------------------------------------------- rows of a batch


def _batch_size(inputs: Mapping[str, torch.Tensor]) -> int:
    if not inputs:
        raise BatchError("no keys for a batch without inputs: at least one tensor is needed")
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor):
            refused = _RefusedError(tensor, "a batch of rows is made of tensors")
            raise refused.as_key_error(f"inputs[{name!r}]")
        if tensor.ndim == 0:
            raise BatchError(f"inputs[{name!r}] has no batch dimension: its shape is ()")
    sizes = {name: tensor.size(0) for name, tensor in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise BatchError(f"the inputs do not agree on the number of rows: {sizes}")
    return next(iter(sizes.values()))


def _is_special(tensor: torch.Tensor) -> bool:
    return tensor.is_nested or tensor.layout is not torch.strided


def _slow_row_keys(inputs: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], batch: int) -> np.ndarray:
    """Row by row: for sparse and nested tensors, which have no common buffer to cut rows from."""
    keys = []
    for row in range(batch):
        values = {name: tensor[row] for name, tensor in inputs.items()}
        values = {n: v[masks[n][row].bool()] if n in masks else v for n, v in values.items()}
        keys.append(key(values, where="inputs"))
    return np.frombuffer(b"".join(keys), np.uint8).reshape(batch, KEY_BYTES).copy()


def _compare_shapes(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.ndim != 2:
        raise BatchError(f"the mask must be [batch, T]; its shape is {tuple(mask.shape)}")
    if tensor.shape[:2] != mask.shape:
        raise BatchError(
            f"inputs[{name!r}] of shape {tuple(tensor.shape)} does not begin with the mask's shape, {tuple(mask.shape)}"
        )


def _kept_positions(mask: torch.Tensor) -> tuple[torch.Tensor, list[int]] | None:
    """The mask as booleans on the CPU, and how many positions each row keeps. None if all are kept."""
    kept = mask.detach().cpu().bool()
    if bool(kept.all()):
        return None
    return kept, kept.sum(1).tolist()


def _columns(
    name: Key, tensor: torch.Tensor, kept: tuple[torch.Tensor, list[int]] | None, batch: int
) -> list[Sequence[bytes | memoryview]]:
    """Of one input, the head and the content of each row: two lists of ``batch`` pieces."""
    if kept is not None:
        mask, lengths = kept
        _check_has_content(tensor)
        data = _dense_content(tensor.detach().cpu()[mask])
        rest = tensor.shape[2:]
        heads = {n: name + _spell_tensor_head(tensor.dtype, (n, *rest)) for n in set(lengths)}
        width = math.prod(rest) * tensor.itemsize
        return [[heads[n] for n in lengths], _pieces(data, [n * width for n in lengths])]
    data = _dense_content(tensor)
    head = name + _spell_tensor_head(tensor.dtype, tensor.shape[1:])
    width = math.prod(tensor.shape[1:]) * tensor.itemsize
    return [[head] * batch, _pieces(data, [width] * batch)]


def _pieces(data: memoryview, sizes: list[int]) -> list[bytes | memoryview]:
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return pieces


def _row_key(parts: Sequence[bytes | memoryview]) -> Key:
    if sum(map(len, parts)) < _DIRECT:
        return blake3(b"".join(parts)).digest(KEY_BYTES)
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest(KEY_BYTES)
