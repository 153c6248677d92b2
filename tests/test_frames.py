"""Keys and states of pandas, Arrow and polars objects: the content, and nothing but the content."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from torchrecycle.data import state_of
from torchrecycle.errors import KeyTypeError
from torchrecycle.keys import key

DAY = "2020-01-01"
COLUMNS: dict[str, Any] = {
    "int": [1, 2, 3],
    "float": [1.0, 2.0, float("nan")],
    "text": ["x", "y", None],
    "objects": [1, "x", None],
    "date": pd.to_datetime([DAY, "2021-01-01", None]),
    "zoned": pd.to_datetime([DAY, "2021-01-01", None]).tz_localize("Europe/Rome"),
    "span": pd.to_timedelta([1, 2, 3]),
    "category": pd.Categorical(["u", "v", "v"]),
    "nullable": pd.array([1, None, 3], dtype="Int64"),
    "flag": pd.array([True, None, False], dtype="boolean"),
    "string": pd.array(["q", None, "r"], dtype="string"),
    "interval": pd.arrays.IntervalArray.from_breaks([0, 1, 2, 3]),
    "period": pd.period_range("2020", "2022", freq="Y"),
    "sparse": pd.arrays.SparseArray([0, 0, 1]),
    "arrow": pd.array([1, 2, None], dtype=pd.ArrowDtype(pa.int16())),
}
FRAME = pd.DataFrame(COLUMNS)


def arrow(values: Any, kind: Any = None) -> pa.Array:
    return pa.array(values, type=kind)


SAMPLES: list[Any] = [
    *(FRAME[[name]] for name in COLUMNS),
    *(FRAME[[name]].iloc[::-1].reset_index(drop=True) for name in COLUMNS),
    *(FRAME[name] for name in COLUMNS),
    FRAME,
    FRAME[["float", "int"]],
    FRAME[["int", "float"]],
    FRAME.iloc[0],
    FRAME.iloc[1],
    FRAME["int"].rename("other"),
    FRAME["int"].astype("int32"),
    FRAME["int"].set_axis(["a", "b", "c"]),
    FRAME.set_index(["text", "float"])[["int"]],
    FRAME.columns,
    FRAME.index,
    pd.Timestamp(DAY),
    pd.Timestamp(DAY) + pd.Timedelta(1, "ns"),
    pd.Timestamp(DAY, tz="UTC"),
    pd.Timestamp(DAY, tz="Europe/Rome"),
    datetime.datetime(2020, 1, 1),
    pd.NaT,
    pd.NA,
    None,
    pd.Timedelta(1, "ns"),
    pd.Timedelta(1, "us"),
    pd.Period("2020"),
    pd.Interval(0, 1),
    pd.Interval(0, 1, "left"),
    arrow([1, 2, None], pa.int32()),
    arrow([1, 2, 0], pa.int32()),
    arrow([1, 2, None], pa.int64()),
    arrow(["a", "bc"]),
    arrow(["ab", "c"]),
    arrow(["a", None]),
    arrow(["a", ""]),
    arrow(["a", "bc"], pa.large_string()),
    arrow(["a", "bc"], pa.string_view()),
    arrow([[1, 2], [3]]),
    arrow([[1], [2, 3]]),
    arrow([[1], None, [2, 3]]),
    arrow([[1], [], [2, 3]]),
    arrow([{"x": 1, "y": "a"}]),
    arrow([{"x": 1, "y": "b"}]),
    arrow([True, None]),
    arrow([True, False]),
    arrow([1, 2], pa.timestamp("ns")),
    arrow([1, 2], pa.timestamp("us")),
    arrow([1, 2], pa.timestamp("us", "UTC")),
    arrow(["a", "b", "a"]).dictionary_encode(),
    arrow(["a", "a", "b"]).dictionary_encode(),
    arrow([None, None], pa.null()),
    arrow([None], pa.null()),
    arrow([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
    arrow([[("k", 2)]], pa.map_(pa.string(), pa.int8())),
    arrow([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    arrow([[1, 2], None], pa.list_(pa.int8(), 2)),
    pa.scalar(1),
    pa.scalar(2),
    pa.scalar(1, pa.int8()),
    pa.scalar(None, pa.int64()),
    pa.scalar("1"),
    1,
    "1",
    pa.table({"a": [1, 2]}),
    pa.table({"b": [1, 2]}),
    pa.table({"a": [2, 1]}),
    pa.table({"a": [1], "b": [2]}),
    pa.schema([("a", pa.int8())]),
]


def test_no_two_contents_share_a_key_or_a_state():
    for function in (key, state_of):
        found = [function(sample) for sample in SAMPLES]
        for (a, one), (b, other) in itertools.combinations(zip(SAMPLES, found, strict=True), 2):
            assert one != other, f"{a!r} and {b!r}"


def test_a_key_is_the_same_each_time_and_for_a_copy():
    for sample in SAMPLES:
        assert key(sample) == key(sample)
        if isinstance(sample, (pd.DataFrame, pd.Series)):
            assert key(sample.copy()) == key(sample)


@pytest.mark.parametrize(
    "whole",
    [
        arrow([5, 1, None, 2]),
        arrow(["zz", "a", None, "bc"]),
        arrow([[1], [2, 3], None, [4]]),
        arrow([{"x": 1}, {"x": None}, None, {"x": 3}]),
        arrow([[1, 2], [3, 4], None, [5, 6]], pa.list_(pa.int8(), 2)),
        arrow([True, False, None, True]),
        arrow(["a", "b", None, "a"]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_chunks_and_slices_do_not_count(whole):
    chunked = pa.chunked_array([whole.slice(0, 1), whole.slice(1)])
    assert key(chunked) == key(whole)
    assert key(pa.chunked_array([whole])) == key(whole)
    assert key(whole.slice(1)) == key(arrow(whole.slice(1).to_pylist(), whole.type))
    assert key(pa.table({"a": chunked})) == key(pa.table({"a": whole}))


def test_what_lies_in_the_place_of_a_null_does_not_count():
    validity = pa.py_buffer(b"\x01")
    letters = [pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"abc")]
    assert key(pa.Array.from_buffers(pa.string(), 2, [validity, *letters])) == key(arrow(["a", None]))
    numbers = pa.py_buffer(np.array([7, 9], np.int64))
    assert key(pa.Array.from_buffers(pa.int64(), 2, [validity, numbers])) == key(arrow([7, None]))


def test_who_holds_the_strings_and_the_unit_of_a_moment_do_not_count():
    kinds = (pd.StringDtype("python"), pd.StringDtype("pyarrow"), object)  # pandas 2 has the last, 3 its own
    assert len({key(pd.Series(["a", None], dtype=kind)) for kind in kinds}) == 1
    assert key(pd.Timestamp(DAY).as_unit("s")) == key(pd.Timestamp(DAY).as_unit("ns"))


def test_keys_of_frames_stay_what_they_are():
    pinned = {
        "576c": pd.DataFrame({"path": ["a.png", "b.png"], "label": [0, 1]}),
        "c0bf": pa.table({"path": ["a.png", "b.png"], "label": [0, 1]}),
        "79f8": pd.Timestamp(DAY),
        "05aa": pa.scalar(7),
    }
    assert {key(sample).hex()[:4]: type(sample) for sample in pinned.values()} == {
        digest: type(sample) for digest, sample in pinned.items()
    }


class OwnFrame(pd.DataFrame):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (OwnFrame({"a": [1]}), r"OwnFrame: a subclass of pandas.DataFrame may carry more"),
        (pd.DataFrame({"a": [object()]}), r"pandas.DataFrame: it holds a object: objects of this type"),
        (FRAME.groupby("int"), r"DataFrameGroupBy has no content that is known here.*__recycle_key__"),
    ],
    ids=["subclass", "object", "group"],
)
def test_what_has_no_content_is_refused_by_name(value, words):
    with pytest.raises(KeyTypeError, match=words):
        key(value)


def set_cell(frame: pd.DataFrame) -> None:
    frame.loc[1, "int"] = 9


def set_text(frame: pd.DataFrame) -> None:
    frame.iloc[1, frame.columns.get_loc("text")] = "z"


def set_missing(frame: pd.DataFrame) -> None:
    frame.loc[0, "nullable"] = pd.NA


def rename(frame: pd.DataFrame) -> None:
    frame.columns = [name.upper() for name in frame.columns]


def reorder(frame: pd.DataFrame) -> None:
    frame["int"] = frame["int"].to_numpy()[::-1]


def add(frame: pd.DataFrame) -> None:
    frame["new"] = 1


@pytest.mark.parametrize("edit", [set_cell, set_text, set_missing, rename, reorder, add])
def test_the_state_of_a_frame_shows_an_edit_in_place(edit: Callable[[pd.DataFrame], None]):
    frame = FRAME.copy()
    before = state_of(frame)
    frame["int"].sum(), frame.describe(), frame.iloc[0]  # which fill its caches
    assert state_of(frame) == before
    edit(frame)
    assert state_of(frame) != before


class Described(pd.DataFrame):
    @property
    def _constructor(self) -> type:
        return Described


def test_the_state_of_a_frame_of_ones_own_class_shows_what_it_adds():
    frame = Described({"a": [1, 2]})
    object.__setattr__(frame, "scale", 1)
    before = state_of(frame)
    object.__setattr__(frame, "scale", 2)
    assert state_of(frame) != before
    object.__setattr__(frame, "scale", 1)
    assert state_of(frame) == before
    frame.loc[0, "a"] = 3
    assert state_of(frame) != before


def test_the_state_of_an_arrow_array_shows_what_was_written_under_it():
    numbers = np.arange(4.0)
    array = pa.array(numbers)
    before = state_of(array)
    numbers[0] = 9
    assert state_of(array) != before


@pytest.mark.parametrize(
    "made",
    [
        lambda path: pd.DataFrame({"label": [0, 1], "path": [path, "none"]}),
        lambda path: pd.Series([path, "none"]),
        lambda path: pa.table({"label": [0, 1], "path": [path, "none"]}),
        lambda path: pa.array([path, "none"]),
    ],
    ids=["frame", "series", "table", "array"],
)
def test_the_state_of_a_column_of_paths_shows_an_edited_file(made, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    held = made(str(path))
    before = state_of(held)
    assert state_of(held) == before
    path.write_text("other")
    assert state_of(held) != before


def test_polars_frames_have_keys_and_states_by_content():
    pl = pytest.importorskip("polars")
    samples = [
        pl.DataFrame({"a": [1, 2], "b": ["x", None]}),
        pl.DataFrame({"a": [1, 2], "b": ["x", ""]}),
        pl.Series("a", [1, 2]),
        pl.Series("b", [1, 2]),
        pl.Series("a", [1, None]),
        pl.Series("a", [1, 0]),
        pl.Series("a", [[1], [2, 3]]),
        pl.Series("a", [[1, 2], [3]]),
        pl.Series("a", [[1], [], [2, 3]]),
        pl.Series("a", [[1], None, [2, 3]]),
        pl.Series("a", [{"x": 1}, {"x": 2}]),
        pl.Series("a", [{"x": 2}, {"x": 1}]),
        pl.Series("a", ["u", "v"], dtype=pl.Categorical),
        pl.Series("a", [1, 2], dtype=pl.Datetime("ns")),
        pl.Series("a", [1, 3], dtype=pl.Datetime("ns")),
        pl.Series("a", [[1, 2]], dtype=pl.Array(pl.Int64, 2)),
        pl.Series("a", [[1, 3]], dtype=pl.Array(pl.Int64, 2)),
    ]
    for function in (key, state_of):
        assert len({function(sample) for sample in samples}) == len(samples)
        assert function(samples[0]) == function(samples[0].clone())
    frame = samples[0].clone()
    frame[0, "a"] = 5
    assert key(frame) != key(samples[0])
    with pytest.raises(KeyTypeError, match="no content before it is collected"):
        key(frame.lazy())
