"""What pandas, Arrow and polars objects consist of, as nests of strings, numbers and NumPy arrays.

A frame of 8,144 rows with a path and a label is a tuple of two columns: the label as 65 KB of integers where they lie,
the path as 8,144 lengths and the letters. Keys hash that nest, so that the same content has the same key whether it
came from one chunk or ten, with pyarrow's strings or Python's; `state_of` hashes it to see that a cell was edited.

The packages are asked for only if somebody has loaded them. What has no content (a lazy frame, a reader) is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["FRAME_PACKAGES", "is_frame", "plain_of", "texts_of"]

FRAME_PACKAGES = ("pandas", "pyarrow", "polars")


def is_frame(value: Any) -> bool:
    """Whether `plain_of` may know this object: its class, or one that it derives from, is of one of the packages."""
    return any(base.__module__.partition(".")[0] in FRAME_PACKAGES for base in type(value).__mro__)


def plain_of(value: Any, *, by_chunk: bool = False) -> Any:
    """The content of a pandas, Arrow or polars object.

    Args:
        value: a frame, table, series, array, index or scalar.
        by_chunk: leave Arrow's chunks as they are: the content of 10 GB is not copied, and other chunks are another
            nest.

    Returns:
        A nest of tuples, lists, strings, numbers, None and NumPy arrays.

    Raises:
        ValueError: it has no content, or none that is known here; the message says which.
    """
    for name, plain in (("pandas", _pandas), ("pyarrow", _arrow), ("polars", _polars)):
        package = sys.modules.get(name)
        found = None if package is None else plain(package, value, by_chunk)
        if found is not None:
            return (name, *found)
    raise ValueError(f"a {type(value).__module__}.{type(value).__qualname__} has no content that is known here")


def texts_of(value: Any) -> Iterator[list[Any]]:
    """The columns of a frame, table, series or array that begin with a string, which may be the path of a file."""
    for column in _columns_of(value):
        first: Any = (
            column[0] if hasattr(column, "__getitem__") and hasattr(column, "__len__") and len(column) else None
        )
        if isinstance(first.as_py() if hasattr(first, "as_py") else first, str):
            yield column.to_pylist() if hasattr(column, "to_pylist") else list(column)


def _columns_of(value: Any) -> Sequence[Any]:
    pd, pa, pl = (sys.modules.get(name) for name in FRAME_PACKAGES)
    if pd is not None and isinstance(value, pd.DataFrame):
        return [value.iloc[:, at].array for at in range(value.shape[1])]
    if pd is not None and isinstance(value, (pd.Series, pd.Index)):
        return [value.array]
    if pa is not None and isinstance(value, (pa.Table, pa.RecordBatch)):
        return value.columns
    return value.get_columns() if pl is not None and isinstance(value, pl.DataFrame) else [value]


# -- pandas ------------------------------------------------------------------------------------------------------------


def _pandas(pd: Any, value: Any, by_chunk: bool) -> tuple[Any, ...] | None:
    if isinstance(value, pd.DataFrame):
        columns = [_values(pd, value.iloc[:, at].array, by_chunk) for at in range(value.shape[1])]
        labels = [_values(pd, index, by_chunk) for index in (value.columns, value.index)]
        return ("DataFrame", *labels, columns, dict(value.attrs) or None)
    if isinstance(value, pd.Series):
        name, index = _name(pd, value.name), _values(pd, value.index, by_chunk)
        return ("Series", name, index, _values(pd, value.array, by_chunk), dict(value.attrs) or None)
    if isinstance(value, (pd.Index, pd.api.extensions.ExtensionArray)):
        return ("array", _values(pd, value, by_chunk))
    return _pandas_scalar(pd, value)


def _name(pd: Any, name: Any) -> Any:
    return plain_of(name) if _pandas_scalar(pd, name) is not None else name


def _pandas_scalar(pd: Any, value: Any) -> tuple[Any, ...] | None:
    if value is pd.NA or value is pd.NaT:
        return ("NA" if value is pd.NA else "NaT",)
    if isinstance(value, pd.Timestamp):
        zone = None if value.tzinfo is None else (value.utcoffset(), value.tzname())
        return ("Timestamp", _nanoseconds(value.asm8), zone)
    if isinstance(value, pd.Timedelta):
        return ("Timedelta", _nanoseconds(value.asm8))
    if isinstance(value, pd.Period):
        return ("Period", value.ordinal, value.freqstr)
    if isinstance(value, pd.Interval):
        return ("Interval", _name(pd, value.left), _name(pd, value.right), value.closed)
    return None


_PER_UNIT = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def _nanoseconds(moment: Any) -> int:
    """The same number for the same moment, in whichever unit it is kept."""
    return int(moment.view("i8")) * _PER_UNIT[np.datetime_data(moment.dtype)[0]]


def _values(pd: Any, values: Any, by_chunk: bool) -> Any:
    """An index or the array of a column."""
    if isinstance(values, pd.RangeIndex):
        return ("range", values.start, values.stop, values.step, values.name)
    if isinstance(values, pd.MultiIndex):
        levels = [_values(pd, values.get_level_values(at), by_chunk) for at in range(values.nlevels)]
        return ("levels", levels)
    if isinstance(values, pd.Index):
        return ("index", _name(pd, values.name), _values(pd, values.array, by_chunk))
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return ("categories", _values(pd, values.categories, by_chunk), np.asarray(values.codes), bool(values.ordered))
    if isinstance(dtype, pd.StringDtype):
        return _strings(values, by_chunk)
    if isinstance(dtype, pd.ArrowDtype):
        return ("arrow", _column(sys.modules["pyarrow"], values.__arrow_array__(), by_chunk))
    if isinstance(dtype, pd.IntervalDtype):
        return ("intervals", _values(pd, values.left, by_chunk), _values(pd, values.right, by_chunk), values.closed)
    if isinstance(dtype, (pd.DatetimeTZDtype, pd.PeriodDtype)) or getattr(dtype, "kind", None) in ("m", "M"):
        return (str(dtype), np.asarray(values.view("i8")))
    if isinstance(dtype, pd.SparseDtype):
        return (str(dtype), np.asarray(values))
    if hasattr(dtype, "numpy_dtype") and not isinstance(dtype, np.dtype) and hasattr(values, "isna"):
        if isinstance(values, pd.arrays.NumpyExtensionArray):
            return _numbers(pd, values.to_numpy())
        filled = values.to_numpy(dtype=dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0))
        return (str(dtype), np.asarray(values.isna()), filled)
    return _numbers(pd, np.asarray(values)) if isinstance(dtype, np.dtype) else (str(dtype), list(values))


def _numbers(pd: Any, values: np.ndarray) -> Any:
    return ("objects", values.tolist()) if values.dtype.hasobject else values


def _strings(values: Any, by_chunk: bool) -> tuple[Any, ...]:
    """Of Python's strings and of Arrow's the same, unless it has to be fast."""
    if by_chunk and "pyarrow" in sys.modules and values.dtype.storage == "pyarrow":
        return ("arrow", _column(sys.modules["pyarrow"], values.__arrow_array__(), by_chunk))
    missing = values.isna()
    return ("objects", [None if gone else str(one) for one, gone in zip(values, missing, strict=True)])


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _arrow(pa: Any, value: Any, by_chunk: bool) -> tuple[Any, ...] | None:
    if isinstance(value, (pa.Table, pa.RecordBatch)):
        columns = [_column(pa, column, by_chunk) for column in value.columns]
        return ("table", list(value.schema.names), value.num_rows, columns)
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return ("array", _column(pa, value, by_chunk))
    if isinstance(value, pa.Scalar):
        kind = value.type
        single = pa.array([value.as_py() if isinstance(kind, pa.BaseExtensionType) else value], type=kind)
        return ("scalar", _column(pa, single, by_chunk))
    if isinstance(value, pa.Schema):
        return ("schema", [(field.name, str(field.type)) for field in value])
    if isinstance(value, (pa.DataType, pa.Field)):
        return ("type", str(value))
    if isinstance(value, pa.Buffer):
        return ("buffer", np.frombuffer(value, np.uint8))
    return None


def _column(pa: Any, values: Any, by_chunk: bool) -> Any:
    if isinstance(values, pa.ChunkedArray):
        if by_chunk:
            return (str(values.type), [_array(pa, chunk) for chunk in values.chunks])
        if values.num_chunks > 1:
            values = values.combine_chunks()
        else:
            values = values.chunk(0) if values.num_chunks else pa.array([], values.type)
    if isinstance(values, pa.ChunkedArray):
        raise ValueError(f"an Arrow column of type {values.type} is too long for one array")
    return _array(pa, values)


def _array(pa: Any, array: Any) -> Any:
    """Type, which entries are null, and the content of the others, by the rules of the type."""
    kind, types = array.type, pa.types
    valid = None
    if array.null_count and not types.is_null(kind):
        valid = array.is_valid().to_numpy(zero_copy_only=False)
    return (str(kind), len(array), valid, _content(pa, types, kind, array, valid))


def _content(pa: Any, types: Any, kind: Any, array: Any, valid: np.ndarray | None) -> Any:
    if types.is_null(kind) or not len(array):
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return _array(pa, array.storage)
    if types.is_dictionary(kind):
        return _array(pa, array.dictionary_decode())
    if types.is_boolean(kind):
        return _zeroed(array.to_numpy(zero_copy_only=False), valid).astype(np.bool_)
    if types.is_string(kind) or types.is_binary(kind):
        return _letters(array, np.int32, valid)
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return _letters(array, np.int64, valid)
    if types.is_struct(kind):
        names = [kind.field(at).name for at in range(kind.num_fields)]
        return (names, [_array(pa, part) for part in array.flatten()])
    if types.is_list(kind) or types.is_large_list(kind):
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return (lengths, _array(pa, array.flatten()))
    if types.is_fixed_size_list(kind):
        return _array(pa, array.flatten())
    try:
        width = kind.byte_width
    except ValueError:  # maps, unions, views
        return array.to_pylist()
    return _fixed(array, width, valid)


def _zeroed(values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """What lies in the places of nulls is whatever was in memory."""
    if valid is None:
        return values
    values = values.copy()
    values[~valid] = 0
    return values


def _fixed(array: Any, width: int, valid: np.ndarray | None) -> np.ndarray:
    raw = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return _zeroed(raw.reshape(-1, width), valid)


def _letters(array: Any, width: Any, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    letters = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    lengths = np.diff(ends)
    if valid is None or not lengths[~valid].any():
        return lengths, letters[ends[0] : ends[-1]]
    pieces = [letters[a:b] for a, b, there in zip(ends[:-1], ends[1:], valid, strict=True) if there]
    return lengths * valid, np.concatenate(pieces) if pieces else letters[:0]


# -- polars ------------------------------------------------------------------------------------------------------------


def _polars(pl: Any, value: Any, by_chunk: bool) -> tuple[Any, ...] | None:
    if isinstance(value, pl.DataFrame):
        return ("DataFrame", list(value.columns), [list(_series(pl, column)) for column in value.iter_columns()])
    if isinstance(value, pl.Series):
        return ("Series", value.name, *_series(pl, value))
    if isinstance(value, pl.DataType) or (isinstance(value, type) and issubclass(value, pl.DataType)):
        return ("type", str(value))
    if isinstance(value, (pl.LazyFrame, pl.Expr)):
        raise ValueError(f"a polars {type(value).__name__} has no content before it is collected")
    return None


def _series(pl: Any, series: Any) -> Iterator[Any]:
    yield str(series.dtype)
    dtype = series.dtype
    if dtype in (pl.Boolean, pl.Float32, pl.Float64) or (dtype.is_integer() and not str(dtype).endswith("128")):
        yield series.is_null().to_numpy()
        yield series.fill_null(False if dtype == pl.Boolean else 0).to_numpy()
    elif dtype.is_temporal():  # Python's own know no nanoseconds
        yield series.to_physical().to_list()
    elif dtype.is_nested():
        yield [list(_series(pl, part)) for part in _parts(pl, series)]
    else:
        yield series.to_list()


def _parts(pl: Any, series: Any) -> Iterator[Any]:
    yield series.is_null()
    if series.dtype == pl.Struct:
        yield from (series.struct.field(name) for name in series.struct.fields)
    else:
        if series.dtype == pl.List:
            yield series.list.len()
        yield series.explode()
