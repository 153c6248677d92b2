"""Keys: every sample against every other, pinned digests, and the rows of a batch against one by one."""

from __future__ import annotations

import array
import atexit
import copy
import datetime as dt
import enum
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import types
import uuid
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field, make_dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from torchrecycle import keys
from torchrecycle.errors import BatchError, KeyTypeError
from torchrecycle.keys import KEY_BYTES, key, tensor_row_keys

# ------------------------------------------------------------------------------------------------ samples
# Their module is named, so that they have the same keys however this file is imported.


@dataclass
class Clip:
    frames: Any
    rate: int = 25


@dataclass
class Sound:
    frames: Any
    rate: int = 25


class Row:
    def __init__(self, number: int) -> None:
        self.number = number

    def __recycle_key__(self) -> Any:
        return self.number


class OtherRow(Row):
    pass


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 2


class Level(enum.IntEnum):
    LOW = 1


class Right(enum.Flag):
    READ = 1
    WRITE = 2


Point = namedtuple("Point", "x y", module="samples")
Pixel = namedtuple("Pixel", "x y", module="samples")
for _cls in (Clip, Sound, Row, OtherRow, Colour, Level, Right):
    _cls.__module__ = "samples"

_FOLDER = tempfile.TemporaryDirectory()
atexit.register(_FOLDER.cleanup)


def file_of(content: bytes, name: str = "file") -> Path:
    path = Path(_FOLDER.name) / f"{name}-{content[:8].hex()}-{len(content)}"
    path.write_bytes(content)
    return path


def image_of(mode: str, size: tuple[int, int] = (3, 2), fill: int = 0) -> Image.Image:
    image = Image.new(mode, size)
    image.paste(fill if len(image.getbands()) == 1 else (fill,) * len(image.getbands()), (0, 0, 1, 1))
    return image


def palette_image(colours: list[int]) -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette(colours)
    image.putpixel((0, 1), 1)
    return image


def transparent_image() -> Image.Image:
    image = palette_image([1, 2, 3, 4, 5, 6])
    image.info["transparency"] = 1
    return image


def reloaded(image: Image.Image, suffix: str) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=suffix)
    buffer.seek(0)
    return Image.open(buffer)


def aligned(filler: int) -> np.ndarray:
    """A structured array whose bytes between the fields hold ``filler``."""
    dtype = np.dtype([("a", "i1"), ("b", "<i4")], align=True)
    raw = np.full(2 * dtype.itemsize, filler, np.uint8).view(dtype)
    raw["a"], raw["b"] = [1, 2], [3, 4]
    return raw


def bits(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8).view(dtype)


def sparse(layout: str = "coo") -> torch.Tensor:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    return getattr(dense, f"to_sparse_{layout}")() if layout != "coo" else dense.to_sparse()


GROUPS: list[list[Any]] = [
    # Constants and numbers
    [lambda: None],
    [lambda: ...],
    [lambda: True],
    [lambda: False],
    [lambda: 0],
    [lambda: 1],
    [lambda: -1],
    [lambda: 127],
    [lambda: 128],
    [lambda: -128],
    [lambda: 255],
    [lambda: 256],
    [lambda: 1 << 64],
    [lambda: -(1 << 64)],
    [lambda: 10**100],
    [lambda: 0.0],
    [lambda: -0.0],
    [lambda: 1.0],
    [lambda: 0.1],
    [lambda: math.inf],
    [lambda: -math.inf],
    [lambda: math.nan, lambda: -math.nan, lambda: struct.unpack("<d", b"\1\0\0\0\0\0\xf8\x7f")[0]],
    [lambda: 5e-324],
    [lambda: 1 + 0j],
    [lambda: complex(1, -0.0)],
    [lambda: 1j],
    [lambda: Decimal("1.0")],
    [lambda: Decimal("1.00")],
    [lambda: Decimal("1")],
    [lambda: Decimal("-0")],
    [lambda: Decimal("NaN")],
    [lambda: Decimal("1E+2")],
    [lambda: Fraction(1, 2), lambda: Fraction(2, 4)],
    [lambda: Fraction(1)],
    [lambda: Fraction(2, 1)],
    [lambda: uuid.UUID(int=1)],
    [lambda: uuid.UUID(int=2)],
    # Strings and bytes
    [lambda: ""],
    [lambda: "1"],
    [lambda: "a"],
    [lambda: "a" * 100_000],
    [lambda: "a\0"],
    [lambda: "é"],
    [lambda: "e\u0301"],
    [lambda: "\ud800"],
    [lambda: b"", lambda: bytearray()],
    [lambda: b"1"],
    [lambda: b"ab", lambda: bytearray(b"ab"), lambda: memoryview(b"ab"), lambda: memoryview(b"axb")[::2]],
    [lambda: b"a" * 100_000],
    # Dates
    [lambda: dt.date(2024, 1, 2)],
    [lambda: dt.datetime(2024, 1, 2)],
    [lambda: dt.datetime(2024, 1, 2, microsecond=1)],
    [lambda: dt.datetime(2024, 1, 2, fold=1)],
    [
        lambda: dt.datetime(2024, 1, 2, tzinfo=dt.timezone.utc),
        lambda: dt.datetime(2024, 1, 2, tzinfo=ZoneInfo("UTC")),
    ],
    [lambda: dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1)))],
    [lambda: dt.datetime(2024, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=1), "CET"))],
    [lambda: dt.time()],
    [lambda: dt.time(1)],
    [lambda: dt.time(1, tzinfo=dt.timezone.utc)],
    [lambda: dt.timedelta(0)],
    [lambda: dt.timedelta(days=-1)],
    [lambda: dt.timedelta(days=1), lambda: dt.timedelta(hours=24)],
    # Containers
    [list],
    [lambda: (), lambda: torch.Size([])],
    [dict, OrderedDict, UserDict, lambda: defaultdict(list)],
    [set, frozenset],
    [lambda: [[]]],
    [lambda: [[], []]],
    [lambda: [[[]]]],
    [lambda: [None]],
    [lambda: ["ab", "c"]],
    [lambda: ["a", "bc"]],
    [lambda: ["abc"]],
    [lambda: ("ab", "c")],
    # Strings that hold the tags and lengths of other objects
    [lambda: ["as", "b"]],
    [lambda: ["a", "sb"]],
    [lambda: ["a", "b"]],
    [lambda: ["as\1\0\0\0\0\0\0\0b"]],
    [lambda: [b"ab", b"b"]],
    [lambda: [b"a", b"bb"]],
    [lambda: ["c", "ab"]],
    [lambda: [1, 2], lambda: list(range(1, 3))],
    [lambda: (1, 2), lambda: torch.Size([1, 2])],
    [lambda: {1, 2}, lambda: frozenset([2, 1])],
    [lambda: {1, 3}],
    [lambda: {(1, 2)}],
    [lambda: {frozenset([1, 2])}],
    [lambda: [1, [2]]],
    [lambda: [[1], 2]],
    [lambda: [[1, 2]]],
    [lambda: {"a": 1}],
    [lambda: [("a", 1)]],
    [lambda: {("a", 1)}],
    [lambda: {"a": 2}],
    [lambda: {1: "a"}],
    [lambda: {1.0: "a"}],
    [lambda: {True: "a"}],
    [lambda: {"1": "a"}],
    [lambda: {b"1": "a"}],
    [lambda: {(1, 2): "a"}],
    [
        lambda: {"a": 1, "b": 2},
        lambda: {"b": 2, "a": 1},
        lambda: OrderedDict(b=2, a=1),
        lambda: UserDict(a=1, b=2),
        lambda: types.MappingProxyType({"a": 1, "b": 2}),
    ],
    [lambda: {"a": 2, "b": 1}],
    [lambda: {"a": {"b": 2}}],
    [lambda: {"a": {}, "b": 2}],
    [lambda: {"a": None}],
    [lambda: range(3)],
    [lambda: range(0, 3, 2)],
    [lambda: range(1, 3)],
    [lambda: slice(3)],
    [lambda: slice(0, 3)],
    [lambda: slice(None)],
    [lambda: Point(1, 2)],
    [lambda: Pixel(1, 2)],
    [lambda: Point(2, 1)],
    # Classes of the user
    [lambda: Clip(1), lambda: Clip(frames=1, rate=25)],
    [lambda: Clip(1, 30)],
    [lambda: Sound(1)],
    [lambda: Clip(None)],
    [lambda: Clip(torch.ones(2))],
    [lambda: Row(1)],
    [lambda: Row(2)],
    [lambda: OtherRow(1)],
    [lambda: Colour.RED],
    [lambda: Colour.CRIMSON],
    [lambda: Level.LOW],
    [lambda: Right.READ],
    [lambda: Right.READ | Right.WRITE],
    [lambda: Right(0)],
    # NumPy
    [lambda: np.zeros(3, np.float32), lambda: np.zeros(3, ">f4"), lambda: np.zeros(6, np.float32)[::2]],
    [lambda: np.zeros(3, np.float64)],
    [lambda: np.zeros(3, np.float16)],
    [lambda: np.zeros(3, np.int32)],
    [lambda: np.zeros(3, np.uint32)],
    [lambda: np.zeros(3, np.int64)],
    [lambda: np.zeros(3, bool)],
    [lambda: np.zeros(3, np.complex64)],
    [lambda: np.zeros((3, 1), np.float32)],
    [lambda: np.zeros((1, 3), np.float32)],
    [lambda: np.zeros(0, np.float32)],
    [lambda: np.zeros((0, 2), np.float32)],
    [lambda: -np.zeros(3, np.float32)],
    [lambda: np.full(3, np.nan, np.float32)],
    [lambda: np.float32(1), lambda: np.array(1, np.float32)],
    [lambda: np.float64(1)],
    [lambda: np.int64(1), lambda: np.array(1, ">i8")],
    [lambda: np.bool_(True)],
    [lambda: np.str_("a"), lambda: np.array("a")],
    [lambda: np.bytes_(b"a")],
    [lambda: np.array(["a", "b"]), lambda: np.array(["a", "b"], ">U1")],
    [lambda: np.array(["a", "b"], "U2")],
    [lambda: np.array(["a", "b"], object)],
    [lambda: np.array(["a", "b"], np.dtypes.StringDType())],
    [lambda: np.array([b"a", b"b"])],
    [lambda: np.array([1, "a", None], object)],
    [lambda: np.array([[1], ["a"], [None]], object)],
    [lambda: np.array(None, object)],
    [lambda: np.datetime64("2024-01-01", "D")],
    [lambda: np.datetime64("2024-01-01", "ns")],
    [lambda: np.datetime64("NaT", "D")],
    [lambda: np.timedelta64(1, "D")],
    [lambda: np.array(["2024-01-01", "2024-01-02"], "M8[D]")],
    [lambda: np.arange(6).reshape(2, 3), lambda: np.asfortranarray(np.arange(6).reshape(2, 3))],
    [lambda: np.arange(1.0), lambda: np.arange(4.0)[::4], lambda: np.arange(4.0)[:1:-4] * 0],
    [lambda: np.arange(6).reshape(3, 2)],
    [lambda: np.arange(6).reshape(2, 3)[::-1]],
    [lambda: aligned(0), lambda: aligned(255)],
    [lambda: np.array([(1, 3), (2, 4)], [("a", "i1"), ("c", "i4")])],
    [lambda: np.array([(1, [3, 5])], [("a", "i1"), ("b", "i4", 2)])],
    [lambda: np.array([(1, "x")], [("a", "i1"), ("b", object)])],
    [lambda: aligned(0)[0]],
    [lambda: np.void(b"ab")],
    [lambda: np.arange(50_000)],
    [lambda: np.arange(1, 50_001)],
    # Tensors
    *[[lambda dtype=dtype: bits(dtype)] for dtype in (torch.uint8, torch.int8, torch.bool)],
    *[[lambda dtype=dtype: bits(dtype)] for dtype in (torch.int16, torch.uint16, torch.float16, torch.bfloat16)],
    *[[lambda dtype=dtype: bits(dtype)] for dtype in (torch.int32, torch.uint32, torch.float32, torch.complex32)],
    *[[lambda dtype=dtype: bits(dtype)] for dtype in (torch.int64, torch.uint64, torch.float64, torch.complex64)],
    *[
        [lambda dtype=dtype: bits(dtype)]
        for dtype in (
            torch.float8_e4m3fn,
            torch.float8_e4m3fnuz,
            torch.float8_e5m2,
            torch.float8_e5m2fnuz,
            torch.float8_e8m0fnu,
            torch.float4_e2m1fn_x2,
        )
    ],
    [
        lambda: torch.zeros(3),
        lambda: torch.zeros(3, requires_grad=True),
        lambda: torch.nn.Parameter(torch.zeros(3)),
        lambda: torch.zeros(1).expand(3),
        lambda: torch.zeros(3).to_mkldnn(),
    ],
    [lambda: -torch.zeros(3)],
    [lambda: torch.tensor(0.0)],
    [lambda: torch.zeros(1)],
    [lambda: torch.zeros(0)],
    [lambda: torch.zeros(0, 2)],
    [lambda: torch.zeros(2, 0)],
    [lambda: torch.zeros(3, 1)],
    [lambda: torch.zeros(3, dtype=torch.float64)],
    [lambda: torch.zeros(3, dtype=torch.complex128)],
    [
        lambda: torch.arange(6).reshape(2, 3),
        lambda: torch.arange(6).reshape(2, 3).t().contiguous().t(),
        lambda: torch.arange(12).reshape(2, 6)[:, ::2] // 2 + torch.tensor([[0], [0]]),
    ],
    [lambda: torch.arange(6).reshape(3, 2)],
    [lambda: torch.arange(6).reshape(3, 2).t()],
    [
        lambda: torch.arange(24.0).reshape(1, 2, 3, 4),
        lambda: torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    ],
    [lambda: torch.tensor([1 + 2j]), lambda: torch.tensor([1 - 2j]).conj()],
    [lambda: torch.tensor([1 - 2j])],
    [lambda: torch.tensor([-2.0]), lambda: torch.tensor([1 + 2j]).conj().imag],
    [lambda: torch.tensor([2.0])],
    [
        sparse,
        *[lambda layout=layout: sparse(layout) for layout in ("csr", "csc")],
        lambda: torch.sparse_coo_tensor([[1, 0], [0, 1]], [3.0, 2.0], (2, 2), check_invariants=True),
        lambda: torch.sparse_coo_tensor([[1, 0, 0], [0, 1, 1]], [3.0, 1.0, 1.0], (2, 2), check_invariants=True),
    ],
    [lambda: sparse().to_dense()],
    [lambda: sparse().double()],
    [lambda: torch.sparse_coo_tensor([[0, 1], [1, 0]], [2.0, 3.0], (2, 3), check_invariants=True)],
    [lambda: torch.arange(50_000)],
    [lambda: [torch.zeros(3), torch.zeros(3)]],
    [lambda: torch.zeros(2, 3)],
    # Images and files
    *[[lambda mode=mode: image_of(mode)] for mode in ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "HSV", "YCbCr")],
    *[[lambda mode=mode: image_of(mode)] for mode in ("I", "F", "I;16")],
    [lambda: image_of("L", fill=1), lambda: reloaded(image_of("L", fill=1), "png")],
    [lambda: image_of("RGB", fill=1), lambda: reloaded(image_of("RGB", fill=1), "bmp")],
    [lambda: image_of("RGB", (2, 3))],
    [lambda: image_of("RGB", (0, 3))],
    [
        lambda: palette_image([1, 2, 3, 4, 5, 6]),
        lambda: palette_image([1, 2, 3, 4, 5, 6, 9, 9, 9]),
        *[lambda name=name: reloaded(palette_image([1, 2, 3, 4, 5, 6]), name) for name in ("png", "gif", "tiff")],
    ],
    [lambda: palette_image([1, 2, 3, 4, 5, 7])],
    [lambda: palette_image([1, 2, 3, 4, 5, 6]).convert("PA")],
    [lambda: Image.new("P", (0, 2))],
    [transparent_image],
    [lambda: file_of(b""), lambda: file_of(b"", "other")],
    [lambda: file_of(b"abc"), lambda: file_of(b"abc", "other")],
    [lambda: file_of(b"abc" * 1_000_000)],
    [lambda: str(file_of(b"abc", "as-text"))],
]
"""Each inner list builds objects that have one key; objects of different lists have different keys."""

SAMPLES = [(group, build) for group, builders in enumerate(GROUPS) for build in builders]

# The last one, a path as text, differs from run to run.
STABLE = [build for group, build in SAMPLES if group < len(GROUPS) - 1]


def test_there_are_some_two_hundred_samples():
    assert len(SAMPLES) > 200


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_every_sample_against_every_other():
    first = [key(build()) for _, build in SAMPLES]
    again = [key(build()) for _, build in SAMPLES]
    assert first == again
    assert {(type(k), len(k)) for k in first} == {(bytes, KEY_BYTES)}
    wrong = [
        (SAMPLES[i][1](), SAMPLES[j][1]())
        for i in range(len(SAMPLES))
        for j in range(i)
        if (first[i] == first[j]) != (SAMPLES[i][0] == SAMPLES[j][0])
    ]
    assert not wrong


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_a_sample_keeps_its_key_inside_a_list_and_a_dict():
    """In a nest, a sample is spelled in the middle of a stream: the differences must survive there."""
    nested: dict[bytes, int] = {}
    for group, build in SAMPLES:
        found = nested.setdefault(key([0, {"x": build()}, 0]), group)
        assert found == group, (build(), GROUPS[found][0]())


GOLDEN: list[tuple[Any, str]] = [
    (lambda: None, "d3e6e351d4c4c5d39ae375a07c24fcb6"),
    (lambda: True, "6f185cfebb552db1af8ef275dead02f7"),
    (lambda: 1, "5980970a0593be29289a0dbf1709d4af"),
    (lambda: -(1 << 64), "a6d48036c7b131518e24445ad2f8469d"),
    (lambda: 1.5, "351c967651ecb10b72f85c4f2ec5ca29"),
    (lambda: math.nan, "fd06fcf2e6e827511125b5c1a8677b24"),
    (lambda: 1 - 2j, "3a80461d79230495b0a8d54a7d58f201"),
    (lambda: "cat", "63f9e07a84294cfe6d56a3300835e362"),
    (lambda: b"cat", "d77006cf835937fc7ad95d8e86f8e5b6"),
    (
        lambda: dt.datetime(2024, 1, 2, 3, 4, 5, 6, dt.timezone(dt.timedelta(hours=1))),
        "e9a55bc880acfc299464160bd6f09184",
    ),
    (lambda: Decimal("1.50"), "808ee9c6a821859466dec9ec2e62f408"),
    (lambda: Fraction(1, 3), "e0d93020b6920d9351085a7b9e09f44c"),
    (lambda: uuid.UUID(int=7), "e1612122102f29122df56fa900ba2ccb"),
    (lambda: [1, "a", None], "7938fb5e44e9c8e5eef2857f4ca21330"),
    (lambda: (1, "a", None), "4d753cd18487be5a6ff14445a8551b1e"),
    (lambda: {"b": 1, "a": [2, {"c": 3}], 4: 5}, "3d1a45ac7619a79bed61abbafc490530"),
    (lambda: {1, "a", (2, 3)}, "c8190817a8a6c91fe7ad98702877dc2f"),
    (lambda: range(1, 9, 2), "9fa4c4dcf974f24cff4f7a6edea829cd"),
    (lambda: Point(1, 2), "b632a0451b753ecb6427d8895239cabc"),
    (lambda: Clip(torch.arange(3)), "af68381c622a220c5bf1219b8d5cf513"),
    (lambda: Row(3), "cacb288920b16b4c5739229eb1322107"),
    (lambda: Colour.RED, "09ee61e52436fb550924a8a6ce0ec0fa"),
    (lambda: Right.READ | Right.WRITE, "6a0da858b09df4e4ee631d9fa175944a"),
    (lambda: np.arange(6, dtype=np.int16).reshape(2, 3), "f637e4adbd6e23b18fc047694cf35667"),
    (lambda: np.array(["2024-01-01"], "M8[s]"), "1dff8b478bc387c92d0105c62a4236cb"),
    (lambda: np.array([1, "a"], object), "b15ed863438059d7eeba8c16d4d7352f"),
    (lambda: aligned(7), "8d5ebabb801143adbfa4e1a5db5ddb8e"),
    (lambda: torch.arange(6.0).reshape(2, 3), "2effda409499852b3a331c36dc3ca3ad"),
    (lambda: torch.ones(2, dtype=torch.bfloat16), "f7a011e33c96be7f48b10771d0661936"),
    (lambda: torch.arange(100_000), "8ed8db016cdde7b2b7230fef096afd1e"),
    (lambda: sparse(), "5261f8c9e61ced3aabd382bc2e9c393e"),
    (lambda: image_of("RGB", fill=9), "d1766ea0ff6389dc74d3b2d66987406b"),
    (lambda: palette_image([1, 2, 3, 4, 5, 6]), "799896958fc2134e18b5e74dc1799fb7"),
    (lambda: file_of(b"cat"), "aea9215356b55a2e8d996ec726d2dbb5"),
]
"""What key() gave when its version was set. A change here makes every store unreadable: raise KEY_VERSION."""


@pytest.mark.parametrize(("build", "digest"), GOLDEN)
def test_pinned_digests(build, digest):
    assert keys.KEY_VERSION == 1
    assert key(build()).hex() == digest


def test_the_version_enters_the_key():
    assert b"1" in keys._PREFIX
    script = (
        "import pathlib, torchrecycle.keys as k; source = pathlib.Path(k.__file__).read_text();"
        "scope = {'__name__': 'later'};"
        "exec(source.replace('KEY_VERSION = 1', 'KEY_VERSION = 2'), scope);"
        "print([k.key(x) == scope['key'](x) for x in ('a', 1, [])], scope['KEY_VERSION'])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[False, False, False] 2"


# ------------------------------------------------------------------------------------ across processes


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_keys_are_the_same_in_processes_with_other_hash_seeds():
    script = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        f"import {Path(__file__).stem} as t;"
        "many = {str(i) for i in range(50)};"
        "print(json.dumps([list(many)[0]] + [t.key(b()).hex() for b in [*t.STABLE, lambda: many]]))"
    )
    here = [key(build()).hex() for build in [*STABLE, lambda: {str(i) for i in range(50)}]]
    orders = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"}
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        order, *there = json.loads(out.stdout)
        orders.append(order)
        assert there == here
    assert orders[0] != orders[1], "the two processes ordered their sets alike, so nothing was tested"


# ------------------------------------------------------------------------------------------- contents


_ALONE = [
    *("", "cat", "ünï", "\ud800", "long " * 4_000, b"", b"cat", bytes(range(256)) * 63, bytes(1 << 14)),
    *(0, 1, -1, 127, 128, -128, -129, 2**63, -(2**63), 2**64, -(10**400), 10**400),
]


@pytest.mark.parametrize("obj", _ALONE, ids=lambda obj: f"{type(obj).__name__}-{str(obj)[:12]!a}")
def test_the_short_way_for_texts_bytes_and_integers_gives_the_key_of_the_long_one(obj):
    assert key(obj) == keys._digest(obj, set())


@pytest.mark.slow
def test_keys_are_as_fast_as_promised():
    # In processor time, which other programs hardly lengthen; `python benchmarks/keys.py` has the figures.
    def seconds(call: Any) -> float:
        times = []
        for _ in range(9):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        return min(times)

    image = torch.randn(1 << 18)
    texts = [f"a short text, number {number}" for number in range(20_000)]
    assert 100 * (1 << 20) / seconds(lambda: [key(image) for _ in range(100)]) > 2e9
    assert len(texts) / seconds(lambda: [key(text) for text in texts]) > 200_000


def test_an_edited_file_under_the_same_path_has_another_key(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"before")
    before = key(path)
    stamp = path.stat()
    path.write_bytes(b"after!")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert key(path) != before
    path.write_bytes(b"before")
    assert key(path) == before


def test_a_tensor_changed_in_one_bit_has_another_key():
    tensor = torch.zeros(300, 300)
    before = key(tensor)
    tensor.view(torch.int32)[299, 299] ^= 1
    assert key(tensor) != before


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 8, 8), (2, 8, 40, 40)])
def test_a_view_has_the_key_of_its_contiguous_copy(shape):
    whole = torch.randn(*(2 * n for n in shape))
    for view in (whole[tuple(slice(None, None, 2) for _ in shape)], whole.transpose(0, -1), whole.flip(0)):
        assert key(view) == key(view.clone(memory_format=torch.contiguous_format))
    array_view = whole.numpy()[::-1]
    assert key(array_view) == key(array_view.copy())


def test_hashing_leaves_no_trace_on_a_tensor():
    tensor = torch.randn(3, 4, requires_grad=True).t()
    before = (tensor._version, tensor.stride(), tensor.requires_grad, tensor.detach().clone())
    key(tensor)
    assert before[:3] == (tensor._version, tensor.stride(), tensor.requires_grad)
    assert torch.equal(before[3], tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_count():
    tensor = torch.randn(3, 4)
    assert key(tensor.cuda()) == key(tensor)


def test_nested_tensors_count_by_their_parts():
    def nested(*lengths):
        return torch.nested.nested_tensor([torch.arange(float(n)) for n in lengths], layout=torch.jagged)

    assert key(nested(2, 3)) == key(nested(2, 3))
    assert len({key(nested(2, 3)), key(nested(3, 2)), key([torch.arange(2.0), torch.arange(3.0)])}) == 3


def test_tv_tensors_without_attributes_are_tensors():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    pixels = torch.rand(3, 4, 4)
    assert key(tv_tensors.Image(pixels)) == key(pixels)
    boxes = tv_tensors.BoundingBoxes(torch.ones(1, 4), format="XYXY", canvas_size=(4, 4))
    with pytest.raises(KeyTypeError, match="carries attributes beside its values"):
        key(boxes)


def test_extension_dtypes_of_numpy_differ_though_their_str_is_one():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    raw = np.arange(4, dtype=np.uint8)
    found = {key(raw.view(t)) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3, ml_dtypes.int4)}
    assert len(found) == 3


def test_memory_mapped_and_record_arrays_are_arrays(tmp_path):
    values = np.arange(10.0)
    np.save(tmp_path / "a.npy", values)
    assert key(np.load(tmp_path / "a.npy", mmap_mode="r")) == key(values)
    records = np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")])
    assert key(records.view(np.recarray)) == key(records)


def test_transformers_containers_are_mappings():
    transformers = pytest.importorskip("transformers")
    values = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
    assert key(transformers.BatchEncoding(values)) == key(values)
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.ones(2))
    other = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.zeros(2))
    assert key(output) == key(copy.deepcopy(output)) != key(other)


def test_contents_of_a_big_endian_machine_are_swapped():
    raw = np.arange(4, dtype=">i4").view(np.uint8)
    assert keys._little_endian(raw, 4, order="big").tobytes() == np.arange(4, dtype="<i4").tobytes()
    assert keys._little_endian(raw, 4, order="little") is raw


# --------------------------------------------------------------------------------------------- errors


def _generator():
    yield 1


class Opaque:
    pass


class Text(str):
    pass


REFUSED: list[tuple[Any, str]] = [
    (lambda: lambda x: x, "a function"),
    (lambda: _generator(), "a generator"),
    (lambda: len, "a builtin_function_or_method"),
    (lambda: random.Random(0), "a random.Random"),
    (lambda: torch.nn.Linear(1, 1), "a torch.nn.modules.linear.Linear"),
    (lambda: sys, "a module"),
    (lambda: Opaque(), r"a [\w.]+Opaque: objects of this type have no key by content"),
    (lambda: Opaque, r"a class \([\w.]+Opaque\) has no content"),
    (lambda: Text("a"), "a subclass of str may carry more than a str shows"),
    (lambda: io.BytesIO(b"a"), "a _io.BytesIO"),
    (lambda: iter([1]), "a list_iterator"),
    (lambda: NotImplemented, "a NotImplementedType"),
    (lambda: object(), "a object"),
    (lambda: torch.empty(2, device="meta"), "on the meta device has no values"),
    (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quantised tensor"),
    (lambda: torch.empty(4, 2, dtype=torch.int4).t(), "a torch.Tensor: its values cannot be read"),
    (lambda: np.ones(2, np.longdouble), "differs between machines"),
    (lambda: np.ma.masked_array([1, 2], [True, False]), "a numpy.ma.MaskedArray|MaskedArray: a subclass of"),
    (lambda: PurePosixPath("a"), "a pure path leads to no file"),
    (lambda: Path(_FOLDER.name), "is not a file"),
    (lambda: memoryview(array.array("i", [1])), r"numpy.asarray\(it\)"),
    (lambda: dt.time(1, tzinfo=ZoneInfo("Europe/Berlin")), "has no offset without a date"),
    (lambda: make_dataclass("Half", [("a", int, field(init=False))])(), "its field 'a' is not set"),
    (lambda: {float("nan"): 1, float("-nan"): 2}, "two of its keys have the same content"),
]


@pytest.mark.parametrize(("build", "says"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.filterwarnings("ignore:.*[qQ]uant.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*[qQ]uant.*:UserWarning")
def test_what_has_no_key_by_content_is_refused(build, says):
    with pytest.raises(KeyTypeError, match=says) as caught:
        key(build())
    for part in ("no key for item, a ", "__recycle_key__", "key="):
        assert part in str(caught.value)


def test_the_error_is_a_type_error():
    with pytest.raises(TypeError):
        key(object())


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda bad: {"meta": [0, 1, 2, bad]}, "item['meta'][3]"),
        (lambda bad: ({"a": (bad,)},), "item[0]['a'][0]"),
        (lambda bad: Clip([bad]), "item.frames[0]"),
        (lambda bad: Point(1, {"z": bad}), "item.y['z']"),
        (lambda bad: {"a": {bad}}, "item['a']{an element}"),
        (lambda bad: {bad: 1}, "item{a key}"),
        (lambda bad: np.array([[1, 2], [bad, 3]], object), "item[1, 0]"),
        (lambda bad: np.array([(1, bad)], [("a", int), ("b", object)]), "item['b'][0]"),
        (lambda bad: [Row(bad)], "item[0].__recycle_key__()"),
        (lambda bad: slice(1, bad), "item.stop"),
    ],
)
def test_an_error_says_where_in_the_nest(build, place):
    with pytest.raises(KeyTypeError) as caught:
        key(build(Opaque()))
    assert f"no key for {place}, a {__name__}.Opaque: " in str(caught.value)


def test_the_object_can_be_named_in_errors():
    with pytest.raises(KeyTypeError, match=r"no key for batch\[1\], a "):
        key([1, object()], where="batch")


def test_a_container_in_itself_is_refused():
    items: list[Any] = [1]
    items.append({"me": items})
    with pytest.raises(KeyTypeError, match=r"item\[1\]\['me'\], a list: it contains itself"):
        key(items)
    clip = Clip(None)
    clip.frames = (clip,)
    with pytest.raises(KeyTypeError, match=r"item.frames\[0\].*contains itself"):
        key(clip)
    cell = np.array([None], object)
    cell[0] = cell
    with pytest.raises(KeyTypeError, match="contains itself"):
        key(cell)


def test_one_object_twice_is_no_cycle():
    shared = [1]
    assert key([shared, shared]) == key([[1], [1]])


def test_a_nest_deeper_than_the_recursion_limit_is_refused():
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]
    try:
        with pytest.raises(KeyTypeError, match="nested deeper than"):
            key(nest)
    finally:
        while nest:  # taken apart by hand, since freeing it recurses
            nest = nest.pop()


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        key(tmp_path / "missing")


# ------------------------------------------------------------------------------------------ Hypothesis

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.integers()
    | st.sampled_from([0.0, -0.0, 1.0, 2.0, math.nan, math.inf])
    | st.floats()
    | st.text("asN1", max_size=3)
    | st.text(max_size=5)
    | st.binary(max_size=3)
)
_NAMES = st.text("as1", max_size=2) | st.integers(-1, 2).map(str) | st.binary(max_size=1)
_NESTS = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(_NAMES, inner, max_size=3)
    ),
    max_leaves=8,
)


def spelled(nest: Any) -> str:
    """An independent spelling: `repr` tells types and values of these nests apart, and dicts are sorted."""
    if isinstance(nest, dict):
        return "{" + ",".join(sorted(f"{k!r}:{spelled(v)}" for k, v in nest.items())) + "}"
    if isinstance(nest, list):
        return "[" + ",".join(map(spelled, nest)) + "]"
    if isinstance(nest, tuple):
        return "(" + ",".join(map(spelled, nest)) + ")"
    return repr(nest)


@settings(max_examples=300, deadline=None)
@given(_NESTS, _NESTS)
def test_two_nests_have_one_key_exactly_if_they_are_the_same(one, other):
    assert (key(one) == key(other)) == (spelled(one) == spelled(other))


@settings(max_examples=200, deadline=None)
@given(_NESTS)
def test_a_deep_copy_has_the_same_key(nest):
    assert key(copy.deepcopy(nest)) == key(nest)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_NAMES, _NESTS, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_a_dict_does_not_count(mapping, shuffler):
    items = list(mapping.items())
    shuffler.shuffle(items)
    assert key(dict(items)) == key(mapping)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("as", max_size=2), max_size=4), st.lists(st.text("as", max_size=2), max_size=4))
def test_lists_of_strings_cannot_be_shifted_into_each_other(one, other):
    assert (key(one) == key(other)) == (one == other)
    assert (key(set(one)) == key(set(other))) == (set(one) == set(other))


# --------------------------------------------------------------------------------------- rows of a batch


def one_at_a_time(inputs, masks=None, ragged=()):
    rows = []
    for i in range(len(next(iter(inputs.values())))):
        row = {n: t[i][masks[i].bool()] if masks is not None and n in ragged else t[i] for n, t in inputs.items()}
        rows.append(np.frombuffer(key(row), np.uint8))
    return np.stack(rows)


BATCHES = {
    "numbers": {"x": torch.arange(5)},
    "images": {"pixel_values": torch.randn(5, 3, 40, 40)},
    "images of many bytes": {"pixel_values": torch.randn(5, 3, 100, 100)},
    "channels last": {"pixel_values": torch.randn(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)},
    "texts": {"input_ids": torch.randint(0, 9, (5, 7)), "attention_mask": torch.ones(5, 7)},
    "many types": {
        "a": torch.randn(5, 7).bfloat16(),
        "c": torch.randn(5, 7, 2, dtype=torch.complex64).conj(),
        "b": torch.randn(5, 7, requires_grad=True) > 0,
        "grad": torch.randn(5, 2, requires_grad=True),
        "empty": torch.zeros(5, 0, 3),
        "expanded": torch.randn(1, 4).expand(5, 4),
        "strided": torch.randn(7, 5).t(),
    },
    "sparse": {"graph": torch.eye(5).to_sparse(), "x": torch.randn(5, 2)},
    "big beside small": {"image": torch.randn(5, 70, 70), "ids": torch.arange(5)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_rows_have_the_keys_of_their_objects(name):
    inputs = BATCHES[name]
    rows = tensor_row_keys(inputs)
    assert (rows.dtype, rows.shape) == (np.uint8, (5, KEY_BYTES))
    assert rows.flags.writeable
    np.testing.assert_array_equal(rows, one_at_a_time(inputs))


MASKS = {
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1]],
    "an empty row": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "only empty rows": [[0] * 6] * 3,
    "full": [[1] * 6] * 3,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("width", [(), (2,), (9000,)])
def test_rows_under_a_mask_have_the_keys_of_their_objects(name, dtype, width):
    masks = torch.tensor(MASKS[name]).to(dtype)
    inputs = {
        "input_ids": torch.arange(18).reshape(3, 6),
        "frames": torch.randn(3, 6, *width).transpose(0, 1).contiguous().transpose(0, 1),
        "image": torch.randn(3, 2, 2),
    }
    ragged = {"input_ids", "frames"}
    np.testing.assert_array_equal(tensor_row_keys(inputs, masks, ragged), one_at_a_time(inputs, masks, ragged))


def test_the_width_of_the_padding_does_not_count():
    short = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    wide = torch.nn.functional.pad(short, (0, 9), value=1)
    left = torch.tensor([[1, 5, 6, 7], [1, 1, 8, 9]])
    right_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    left_mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    expected = tensor_row_keys({"ids": short}, right_mask, ["ids"])
    wide_mask = torch.nn.functional.pad(right_mask, (0, 9))
    np.testing.assert_array_equal(tensor_row_keys({"ids": wide}, wide_mask, ["ids"]), expected)
    np.testing.assert_array_equal(tensor_row_keys({"ids": left}, left_mask, ["ids"]), expected)
    assert key({"ids": torch.tensor([5, 6, 7])}) == expected[0].tobytes()


def test_the_order_of_the_inputs_does_not_count():
    a, b = torch.randn(3, 2), torch.randn(3, 4)
    np.testing.assert_array_equal(tensor_row_keys({"a": a, "b": b}), tensor_row_keys({"b": b, "a": a}))
    assert (tensor_row_keys({"a": a, "b": b}) != tensor_row_keys({"b": a, "a": b})).any()


def test_a_batch_without_rows_has_no_keys():
    assert tensor_row_keys({"x": torch.zeros(0, 3)}).shape == (0, KEY_BYTES)
    ids = torch.zeros(0, 3, dtype=torch.int64)
    assert tensor_row_keys({"ids": ids}, ids, ["ids"]).shape == (0, KEY_BYTES)


def test_what_is_no_batch_is_refused():
    with pytest.raises(BatchError, match="without inputs"):
        tensor_row_keys({})
    with pytest.raises(BatchError, match="do not agree on the number of rows"):
        tensor_row_keys({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(BatchError, match=r"inputs\['a'\] has no batch dimension"):
        tensor_row_keys({"a": torch.tensor(1)})
    with pytest.raises(BatchError, match="does not begin with the mask's shape"):
        tensor_row_keys({"a": torch.zeros(2, 3)}, torch.ones(2, 4), ["a"])
    with pytest.raises(BatchError, match=r"must be \[batch, T\]"):
        tensor_row_keys({"a": torch.zeros(2, 3)}, torch.ones(2), ["a"])
    with pytest.raises(KeyTypeError, match=r"no key for inputs\['a'\], a list"):
        tensor_row_keys({"a": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(KeyTypeError, match=r"no key for inputs\['a'\], a .*meta device"):
        tensor_row_keys({"a": torch.zeros(2, 3, device="meta")})


def test_a_tensor_that_only_stands_for_another_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(2, 3)
    for call in (lambda: key({"x": fake}), lambda: tensor_row_keys({"x": fake})):
        with pytest.raises(KeyTypeError, match="does not hold its values"):
            call()
    with pytest.raises(KeyTypeError, match="does not hold its values"):
        tensor_row_keys({"x": fake}, torch.tensor([[1, 0, 0], [1, 1, 1]]), ["x"])
