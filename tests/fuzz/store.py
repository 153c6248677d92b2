"""Stores as a stranger, or a broken disk, could have left them: what may come of opening one?

A small store is written, something in it is changed (a byte, a number in a header, a checksum made to fit, a name, a
link that leads out), and it is opened and read in every way there is. What may come of it is an error of the store's, a
miss, or a row that is right to the bit. Never another exception, a crash or a hang, another row, memory that the sizes
of the files do not explain, a path outside of the store, or a pickle.

``python tests/fuzz/store.py --count 5000`` runs so many changes under Hypothesis, which makes a failure as small as it
can. The files of the last failure are left in ``--folder``; of a crash also, since they are written before they are
opened. ``--replay FOLDER`` opens such files again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import json
import os
import pickle
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from torchrecycle.data.columns import Template, absent_column, make_column
from torchrecycle.data.manifest import Manifest
from torchrecycle.errors import RecycleError, StoreError
from torchrecycle.store import FolderStore, Leaf, LeafSpec, Ragged, Rows, looking, open_store
from torchrecycle.store.about import _digest as digest_of_about
from torchrecycle.store.container import pack, unpack
from torchrecycle.store.rows import _content as content_of
from torchrecycle.store.segment import Batch, Origin, Segment, pack_segment
from torchrecycle.testing.store_contract import ABOUT, FINGERPRINT, SPECS, keys_of, leaves_of, length_of

GOLDEN = Path(__file__).parents[1] / "golden"
MEMORY = 8 * 2**20
"""Bytes that reading a store of some 100 KB may take: Python's objects of a header of 20 KB are 1 MB."""
CHUNK = 5_000
"""Changes in one run of Hypothesis, which remembers each."""

Files = dict[str, "bytes | Special"]


@dataclass(frozen=True)
class Special:
    """Something else than a plain file under some name."""

    kind: str
    """``link``, ``pipe`` or ``folder``."""
    target: str = ""


# -- stores to start from ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A sound store of some rows of the contract's form."""

    name: str
    files: Files
    rows: int
    held: bytes | None = None
    """A pickled `Rows` of before segments were merged, with locations in those."""
    locations: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def read_files(folder: Path) -> Files:
    found: Files = {}
    if folder.is_symlink():
        return {".": Special("link", os.readlink(folder))}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = Special("link", os.readlink(path))
        elif path.is_fifo():
            found[name] = Special("pipe")
        elif path.is_file():
            found[name] = path.read_bytes()
        elif name != "manifests":
            found[name] = Special("folder")
    return found


def segment_bytes(numbers: range, origin: Origin | None = None) -> bytes:
    batch = Batch([torch.from_numpy(keys_of(numbers))], [[leaf] for leaf in leaves_of(numbers)])
    return b"".join(chunk.tobytes() for chunk in pack_segment(SPECS, batch, owner=FINGERPRINT, origin=origin).chunks)


def samples(folder: Path) -> list[Sample]:
    """The golden stores of both formats; one of three segments with an index; one whose segments were merged."""
    found = [Sample(f"format {n}", read_files(GOLDEN / f"format{n}" / FINGERPRINT), 12) for n in (1, 2)]
    found.append(indexed(folder))
    found.append(merged(folder))
    return found


def fresh(folder: Path) -> Rows:
    return FolderStore(folder).rows(FINGERPRINT, SPECS, ABOUT)


def begin(folder: Path, *parts: range) -> Path:
    """A store of a segment for each part, under names that are always the same."""
    shutil.rmtree(folder, ignore_errors=True)
    rows = fresh(folder)
    numbers = range(parts[0].start, parts[-1].stop)
    rows.write_manifest("train", *manifest_of(numbers).to_tensors())
    rows.write_probe({"input": torch.arange(4.0)}, {"seed": "0"})
    inside = folder / FINGERPRINT
    for number, part in enumerate(parts):
        (inside / f"a-{number:06d}.safetensors").write_bytes(segment_bytes(part))
    return inside


def manifest_of(numbers: range) -> Manifest:
    """Items (picture, {"label": int, "text": str, "boxes": tensors of different sizes, "more": a list})."""
    columns = (
        absent_column([[3, 8, 8 + number % 2] for number in numbers], torch.float32),
        make_column([number % 3 for number in numbers], "label"),
        make_column([f"text {number}" for number in numbers], "text"),
        make_column([torch.full((number % 4, 4), float(number)) for number in numbers], "boxes"),
        make_column([[number, None] for number in numbers], "more"),
    )
    item = (torch.zeros(3, 8, 8), {"label": 0, "text": "", "boxes": torch.zeros(1, 4), "more": [0, None]})
    return Manifest(keys_of(numbers), Template.of(item), columns, {0: "x"})


def indexed(folder: Path) -> Sample:
    inside = begin(folder, range(10), range(10, 20), range(20, 30))
    before, looking.IN_MEMORY = looking.IN_MEMORY, 0
    try:
        fresh(folder).lookup(keys_of(range(30)))
    finally:
        looking.IN_MEMORY = before
    files = read_files(inside)
    assert "index.safetensors" in files, "no index was written: the fuzzing would not see one"
    return Sample("indexed", files, 30)


def merged(folder: Path) -> Sample:
    parts = [range(10), range(10, 20)]
    inside = begin(folder, *parts)
    rows = fresh(folder)
    locations = rows.lookup(keys_of(range(20)))
    names = [f"a-{number:06d}.safetensors" for number in range(len(parts))]
    old = [
        (name, Segment(name, as_tensor((inside / name).read_bytes()), SPECS, owner=FINGERPRINT).digest)
        for name in names
    ]
    places = torch.tensor([[number // 10, number % 10] for number in range(20)]).to(torch.uint32)
    for name in names:
        (inside / name).unlink()
    (inside / "b-000001.safetensors").write_bytes(segment_bytes(range(20), Origin(tuple(old), places)))
    return Sample("merged", read_files(inside), 20, pickle.dumps(rows), locations)


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


# -- changes -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    *(-1, 0, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 255, 4095, 4096, 4097, -4096, 2**31 - 1, 2**31, 2**32, 2**32 + 1),
    *(2**40, 2**53, 2**61, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), -(2**64), -(10**30)),
]
OTHERS: list[Any] = [
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), True, False, None, "", "a", "0", "1", "2", "3", "-1", "1.0"),
    *("١", "9" * 30, "9" * 5_000, "../a-000001.safetensors", "/etc/passwd", "\0", "\ud800", "keys", "sums", "leaf.0"),
    *("leaf.0.values", "pad.0", "origin", "__metadata__", "F32", "I32", "U8", "BF16", "F8_E4M3", "C64", "F128"),
    *([], [[]], {}, [0], [0, 0], [2**62 - 1, 0], [0, 2**62 - 1], [2**31, 2**31], [1] * 40, [-1, -1], {"a": 1}),
    *([["a-000000.safetensors", "0" * 32, 2**40, 8]], [["a-000000.safetensors", "0" * 32]], [[[], {}, "", None]]),
]
TEXTS = [
    "",
    "{",
    "null",
    "[" * 100_000,
    '{"a":' * 50_000,
    '{"a": ' + "9" * 20_000 + "}",
    '{"a": 1e99999}',
    '{"keys": 1, "keys": 2}',
    '"\\ud800"',
    "\ufeff{}",
    '{"format": 2, "leaves": [], "about": {}}',
    '{"format": 1, "leaves": ' + "[" * 900 + "]" * 900 + ', "about": {}}',
]
SIZES = [0, 1, 7, 8, 9, 100, 4095, 4096, 4097, 8192]


class Change:
    """What is done to the files of a store, all of it drawn from one generator.

    Args:
        draw: the generator.
        files: of a store; changed in place.
    """

    def __init__(self, draw: random.Random, files: Files) -> None:
        self.draw, self.files = draw, files
        self.fitting: set[str] = set()
        """Files that were changed and carry checksums that fit."""

    def run(self) -> str:
        kind = self.draw.choice(list(KINDS))
        KINDS[kind](self)
        return kind

    def pick(self, ending: str = "") -> str:
        """The name of a plain file."""
        names = [n for n in sorted(self.files) if n.endswith(ending) and isinstance(self.files[n], bytes)]
        return self.draw.choice(names)

    def data(self, name: str) -> bytearray:
        found = self.files[name]
        assert isinstance(found, bytes)
        return bytearray(found)

    # Bytes

    def place(self, data: bytes | bytearray) -> int:
        """Somewhere in a file, half of the time in the part of the header that says something."""
        if not data:
            return 0
        if self.draw.random() < 0.5:
            head = min(len(data), 8 + int.from_bytes(data[:8], "little")) if len(data) > 4096 else len(data)
            return self.draw.randrange(max(1, len(bytes(data[:head]).rstrip())))
        return self.draw.randrange(len(data))

    def scribble(self) -> None:
        name = self.pick()
        data = self.data(name)
        for _ in range(self.draw.choice([1, 1, 1, 2, 8])):
            at = self.place(data)
            data[at : at + 1] = bytes([self.draw.choice([0, 1, 32, 48, 57, 128, 255, self.draw.randrange(256)])])
        self.files[name] = bytes(data)

    def flip(self) -> None:
        name = self.pick()
        data = self.data(name)
        if data:
            data[self.place(data)] ^= 1 << self.draw.randrange(8)
        self.files[name] = bytes(data)

    def resize(self) -> None:
        name = self.pick()
        data = self.data(name)
        at, size = self.place(data), self.draw.choice(SIZES)
        how = self.draw.choice(["cut off", "end", "cut out", "put in", "twice", "zeros"])
        if how == "cut off":
            data = data[:at]
        elif how == "end":
            data += bytes(size)
        elif how == "cut out":
            del data[at : at + size]
        elif how == "put in":
            data[at:at] = bytes(size)
        elif how == "twice":
            data = data * 2
        else:
            data[at : at + size] = bytes(len(data[at : at + size]))
        self.files[name] = bytes(data)

    def splice(self) -> None:
        name, other = self.pick(), self.pick()
        data, source = self.data(name), self.data(other)
        size = self.draw.choice([8, 16, 64, 4096])
        start, at = self.place(source) // size * size, self.place(data) // size * size
        piece = source[start : start + size]
        data[at : at + len(piece)] = piece
        self.files[name] = bytes(data)

    def numbers(self) -> None:
        """A number of 8 bytes, such as an offset or a place, made a hostile one; the checksum may be made to fit."""
        name = self.pick(".safetensors")
        data = self.data(name)
        for _ in range(self.draw.choice([1, 1, 2])):
            start = min(len(data), 8 + int.from_bytes(data[:8], "little"))
            at = start + self.draw.randrange(max(1, len(data) - start)) // 8 * 8
            width = self.draw.choice([4, 8])
            data[at : at + width] = (self.draw.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        self.files[name] = self.repaired(name, bytes(data))

    def index_columns(self) -> None:
        """An entry of an index, of any of its columns, under a checksum that fits."""
        if "index.safetensors" not in self.files:
            return self.numbers()
        name, data = "index.safetensors", self.data("index.safetensors")
        header, start = header_of(bytes(data))
        begin, end = header[self.draw.choice(["first", "second", "places", "keys", "listed"])]["data_offsets"]
        at = start + begin + self.draw.randrange(max(1, end - begin)) // 8 * 8
        data[at : at + 8] = (self.draw.choice(NUMBERS) % 2**64).to_bytes(8, "little")
        self.files[name] = self.repaired(name, bytes(data), always=True)
        return None

    # What JSON says

    def header(self) -> None:
        name = self.pick(".safetensors")
        data = bytes(self.data(name))
        header, start = header_of(data)
        for _ in range(self.draw.choice([1, 1, 2, 3])):
            self.edit(header)
        self.files[name] = self.repaired(name, joined(header, data[start:]))

    def header_text(self) -> None:
        name = self.pick(".safetensors")
        data = bytes(self.data(name))
        header, start = header_of(data)
        text = self.draw.choice([*TEXTS, self.doubled(json.dumps(header))])
        self.files[name] = joined_text(text.encode("utf-8", "surrogatepass"), data[start:])

    def doubled(self, text: str) -> str:
        """The same object with one of its names twice."""
        found = json.loads(text)
        name = self.draw.choice(list(found))
        value = self.draw.choice([found[name], found[self.draw.choice(list(found))]])
        return text[:-1] + f", {json.dumps(name)}: {json.dumps(value)}" + "}"

    def listed(self) -> None:
        """What an index says of its segments, or a merged segment of where its rows were."""
        name = self.pick(".safetensors")
        data = bytes(self.data(name))
        header, start = header_of(data)
        metadata = header.get("__metadata__", {})
        if "torchrecycle.origin" in metadata:
            origin = json.loads(metadata["torchrecycle.origin"])
            self.edit(origin)
            metadata["torchrecycle.origin"] = json.dumps(origin)
            self.files[name] = self.repaired(name, joined(header, data[start:]), always=self.draw.random() < 0.8)
        elif "listed" in header:
            begin, end = header["listed"]["data_offsets"]
            entries = json.loads(data[start + begin : start + end])
            self.edit(entries)
            self.files[name] = packed_index(data, json.dumps(entries).encode())
            self.fitting.add(name)
        else:
            self.header()

    def manifest(self) -> None:
        """What a manifest says of its items, under a checksum that fits."""
        name = "manifests/train.safetensors"
        data = bytes(self.data(name))
        header, start = header_of(data)
        about = json.loads(header["__metadata__"].get("about", "{}"))
        for _ in range(self.draw.choice([1, 1, 2])):
            self.edit(about)
        text = json.dumps(about)
        if self.draw.random() < 0.1:
            depth = self.draw.choice([100, 500, 5_000])
            text = text.replace('["tuple"', '["list", [0], [' * depth + '["tuple"', 1)
            text = text.replace(', "columns"', "]]" * depth + ', "columns"', 1)
        header["__metadata__"]["about"] = text
        self.files[name] = self.repaired(name, joined(header, data[start:]), always=True)

    def about(self) -> None:
        found = json.loads(bytes(self.data("about.json")))
        for _ in range(self.draw.choice([1, 1, 2, 3])):
            self.edit(found)
        if "blake3" in found and self.draw.random() < 0.7:
            found["blake3"] = digest_of_about({name: found[name] for name in found if name != "blake3"})
        self.files["about.json"] = json.dumps(found).encode()

    def about_text(self) -> None:
        text = self.draw.choice([*TEXTS, self.doubled(bytes(self.data("about.json")).decode())])
        self.files["about.json"] = text.encode("utf-8", "surrogatepass")

    def edit(self, nest: Any) -> None:
        """Change something somewhere in a nest of dicts and lists."""
        at: Any = nest
        while True:
            names = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not names:
                return
            name = self.draw.choice(names)
            inner = at[name]
            if isinstance(inner, (dict, list)) and inner and self.draw.random() < 0.8:
                at = inner
                continue
            how = self.draw.choice(["value", "value", "value", "remove", "swap", "rename", "deep"])
            if how == "value":
                at[name] = self.value(inner)
            elif how == "remove":
                del at[name]
            elif how == "swap":
                other = self.draw.choice(names)
                at[name], at[other] = at[other], at[name]
            elif how == "deep":
                at[name] = self.deep(inner)
            elif isinstance(at, dict):
                at[str(self.draw.choice(OTHERS))] = at.pop(name) if self.draw.random() < 0.7 else inner
            else:
                at.append(self.value(inner))
            return

    def value(self, before: Any) -> Any:
        if type(before) is int and self.draw.random() < 0.5:
            return before + self.draw.choice([-1, 1, -8, 8, 2**32, -(2**32), 4096])
        return copy.deepcopy(self.draw.choice(NUMBERS if self.draw.random() < 0.5 else OTHERS))

    def deep(self, inner: Any) -> Any:
        for _ in range(self.draw.choice([1, 10, 200, 990])):
            inner = [inner] if self.draw.random() < 0.5 else {"a": inner}
        return inner

    def repaired(self, name: str, data: bytes, *, always: bool = False) -> bytes:
        """The file with the checksum that it carries of itself made to fit, half of the time."""
        if not always and self.draw.random() < 0.5:
            return data
        with contextlib.suppress(StoreError, KeyError, ValueError, TypeError, RuntimeError, RecursionError):
            fixed = repair(name, data)
            self.fitting.add(name)
            return fixed
        return data

    # Names

    def names(self) -> None:
        how = self.draw.choice(list(NAMED))
        NAMED[how](self)

    def swap(self) -> None:
        one, other = self.pick(), self.pick()
        self.files[one], self.files[other] = self.files[other], self.files[one]

    def remove(self) -> None:
        del self.files[self.pick()]

    def double(self) -> None:
        self.files[self.draw.choice(NAMES)] = bytes(self.data(self.pick()))

    def rename(self) -> None:
        self.files[self.draw.choice(NAMES)] = self.files.pop(self.pick())

    def link(self) -> None:
        name = self.draw.choice([self.pick(), *NAMES])
        self.files[name] = Special("link", self.draw.choice(LINKS))

    def pipe(self) -> None:
        self.files[self.draw.choice([self.pick(), *NAMES])] = Special("pipe")

    def folder(self) -> None:
        self.files[self.draw.choice([self.pick(), *NAMES])] = Special("folder")

    def manifests(self) -> None:
        """The folder of manifests is something else."""
        for name in [name for name in self.files if name.startswith("manifests/")]:
            del self.files[name]
        self.files["manifests"] = self.draw.choice(
            [Special("link", "OUT/manifests"), Special("link", "."), Special("pipe"), b"", b"{}"]
        )

    def whole(self) -> None:
        """The folder of the fingerprint is a link that leads out."""
        self.files["."] = Special("link", "OUT")


NAMES = [
    "z-000001.safetensors",
    "0-9.safetensors",
    "a-000000.safetensors",
    "a-000001.safetensors",
    "index.safetensors",
    "probe.safetensors",
    "about.json",
    "manifests/train.safetensors",
    "manifests/outside.safetensors",
    "manifests/..safetensors",
    "a-1.safetensors.tmp-1-00",
    "a-1.safetensors.damaged",
    "a-1.safetensors\n",
    "a-١.safetensors",
    "a\\..\\b-1.safetensors",
    "a-" + "9" * 200 + ".safetensors",
    ".safetensors",
    "-.safetensors",
]
LINKS = [
    "OUT/z-000001.safetensors",
    "OUT/about.json",
    "OUT/manifests/outside.safetensors",
    "OUT/probe.safetensors",
    "OUT",
    "/etc/passwd",
    "/dev/zero",
    "/nowhere",
    "about.json",
    "a-000000.safetensors",
    "z-000001.safetensors",
    "..",
]
"""``OUT`` stands for a folder outside of the store, with rows that no reader of the store may be given."""

NAMED: dict[str, Callable[[Change], None]] = {
    "swap": Change.swap,
    "remove": Change.remove,
    "double": Change.double,
    "rename": Change.rename,
    "link": Change.link,
    "pipe": Change.pipe,
    "folder": Change.folder,
    "manifests": Change.manifests,
    "whole": Change.whole,
}
KINDS: dict[str, Callable[[Change], None]] = {
    "scribble": Change.scribble,
    "flip": Change.flip,
    "resize": Change.resize,
    "splice": Change.splice,
    "numbers": Change.numbers,
    "index columns": Change.index_columns,
    "header": Change.header,
    "header text": Change.header_text,
    "listed": Change.listed,
    "manifest": Change.manifest,
    "about": Change.about,
    "about text": Change.about_text,
    "names": Change.names,
}


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), start


def joined(header: Any, data: bytes) -> bytes:
    return joined_text(json.dumps(header).encode(), data)


def joined_text(text: bytes, data: bytes) -> bytes:
    text += b" " * (-(len(text) + 8) % 4096)
    return len(text).to_bytes(8, "little") + text + data


def repair(name: str, data: bytes) -> bytes:
    """The file with the checksum that a stranger would put there."""
    header, start = header_of(data)
    metadata = header.get("__metadata__", {})
    if name == "index.safetensors":
        begin, end = header["sum"]["data_offsets"]
        fixed = bytearray(data)
        fixed[start + begin : start + end] = digest_of_index(data)
        return bytes(fixed)
    if "torchrecycle.origin" in metadata:
        origin = json.loads(metadata["torchrecycle.origin"])
        begin, end = header["origin"]["data_offsets"]
        rows = as_tensor(data[start + begin : start + end]).view(torch.uint32).view(-1, 2)
        origin["blake3"] = Origin(tuple(tuple(entry) for entry in origin["segments"]), rows).digest()
        metadata["torchrecycle.origin"] = json.dumps(origin)
        return joined(header, data[start:])
    if "torchrecycle.blake3" in metadata:
        tensors, said = unpack(as_tensor(data), name, owner=f"{FINGERPRINT}/{name}")
        own = {key: said[key] for key in said if not key.startswith("torchrecycle.")}
        metadata["torchrecycle.blake3"] = content_of(tensors, own)
        return joined(header, data[start:])
    return data


def digest_of_index(data: bytes) -> bytes:
    tensors, _ = unpack(as_tensor(data), "index", owner=f"{FINGERPRINT}/index.safetensors")
    hasher = blake3.blake3()
    for name in ("first", "second", "places", "listed", "keys"):
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.digest()


def packed_index(data: bytes, listed: bytes) -> bytes:
    """An index with another list of segments, and the checksum of that."""
    from torchrecycle.store.container import Entry

    tensors, _ = unpack(as_tensor(data), "index", owner=f"{FINGERPRINT}/index.safetensors")
    tensors["listed"] = as_tensor(listed)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()]
    made = b"".join(
        chunk.tobytes() for chunk in pack(entries, {}, owner=f"{FINGERPRINT}/index.safetensors", aligned=True).chunks
    )
    return repair("index.safetensors", made)


# -- reading in every way ----------------------------------------------------------------------------------------------


class Failure(AssertionError):
    """Something came of it that may not."""


def expected(number: int) -> list[bytes]:
    pictures, texts = leaves_of([number])
    assert isinstance(pictures, torch.Tensor)
    assert isinstance(texts, Ragged)
    return [raw(pictures), length_of(number).to_bytes(8, "little") + raw(texts.values)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


TRUTH = {keys_of([number])[0].tobytes(): expected(number) for number in range(30)}
OUTSIDE = range(900, 910)
"""Rows that lie outside of the store, and may not be found by links."""
TRUE_KEYS = keys_of(range(30))
OUTSIDE_KEYS = keys_of(OUTSIDE)


WAYS = ("rows", "existing", "verify")


@dataclass
class Reading:
    """Opens and reads a store, and remembers what came of it."""

    folder: Path
    sample: Sample
    more_keys: np.ndarray
    """Keys that a changed file may seem to have."""
    believed: bool
    """Whether a stranger said under a fitting checksum where rows are, which he could as well have written himself."""
    outcomes: collections.Counter[str]

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Errors of the store's are what should come."""
        try:
            yield
        except StoreError:
            self.outcomes["refused"] += 1

    def run(self, way: str) -> None:
        """Open the store in one of `WAYS`; and the merged one also as one who has read it before."""
        with self.refusing():
            if way == "rows":
                self.read(open_store(self.folder).rows(FINGERPRINT, SPECS, ABOUT))
            elif way == "existing":
                open_store(self.folder).fingerprints()
                self.read(open_store(self.folder).existing(FINGERPRINT))
            else:
                self.verify()
        if self.sample.held is not None:
            with self.refusing():
                self.read_held()

    def read(self, rows: Rows) -> None:
        with self.refusing():
            self.manifest(rows.read_manifest("train"))
        with self.refusing():
            self.count("probe", rows.read_probe())
        with self.refusing():
            if rows.read_manifest("outside") is not None and "manifests/outside.safetensors" in self.linked():
                raise Failure("a manifest from outside of the store was read")
        with self.refusing():
            rows.gather(np.zeros(0, np.int64))
        with self.refusing():
            self.count("counted", (len(rows), rows.nbytes, repr(rows)))
        with self.refusing():
            self.find(rows)
        with self.refusing():
            rows.refresh()
            self.count("found again", (rows.lookup(TRUE_KEYS) >= 0).any() or None)

    def manifest(self, found: tuple[dict[str, torch.Tensor], dict[str, str]] | None) -> None:
        """What is done with a manifest: its items are put together, one by one and as a batch."""
        self.count("manifest", found)
        if found is None or "about" not in found[1]:
            return
        try:
            manifest = Manifest.from_tensors(*found)
        except (KeyError, ValueError, TypeError):
            self.outcomes["refused"] += 1  # `KnownManifests` says these in words.
            return
        for index in range(0, min(len(manifest), 40), 4):
            # A writer is trusted for what items hold: nonsense may be an error of any kind when it is read.
            with contextlib.suppress(RecycleError, ValueError, TypeError, LookupError, RuntimeError):
                manifest.template.join([column[index] for column in manifest.columns])
        with contextlib.suppress(RecycleError, ValueError, TypeError, LookupError, RuntimeError):
            [column.batch(torch.arange(4)) for column in manifest.columns]

    def linked(self) -> set[str]:
        return {str(p.relative_to(self.folder / FINGERPRINT)) for p in self.folder.rglob("*") if p.is_symlink()}

    def count(self, what: str, found: Any) -> None:
        if found is not None:
            self.outcomes[what] += 1

    def find(self, rows: Rows, *, sound: bool = False) -> None:
        """Whatever is found is right, or refused."""
        keys = np.concatenate([TRUE_KEYS, OUTSIDE_KEYS, self.more_keys])
        found = rows.lookup(keys)
        if found.shape != (len(keys),) or found.dtype != np.int64:
            raise Failure(f"lookup gave {found.dtype} {found.shape}")
        if (found[len(TRUE_KEYS) :][: len(OUTSIDE_KEYS)] >= 0).any():
            raise Failure("rows from outside of the store are found")
        there = np.flatnonzero(found >= 0)
        if not len(there):
            self.outcomes["missed"] += 1
            return
        with self.refusing():
            rows.prefetch(found[there])
        try:
            self.compare(keys[there], rows.gather(found[there]), rows.leaves)
        except StoreError:
            self.outcomes["refused"] += 1
            if sound:
                raise
            for at in np.array_split(there, 8):
                with self.refusing():
                    self.compare(keys[at], rows.gather(found[at]), rows.leaves)

    def compare(self, keys: np.ndarray, leaves: list[Leaf], specs: tuple[LeafSpec, ...]) -> None:
        if [(spec.shape, spec.ragged, spec.dtype) for spec in specs] != [(s.shape, s.ragged, s.dtype) for s in SPECS]:
            # Whoever may write about.json and its checksum may say that bytes are other numbers, to `existing` only.
            return
        pictures, texts = leaves
        if not isinstance(pictures, torch.Tensor) or not isinstance(texts, Ragged):
            raise Failure("leaves of another form")
        parts = texts.values.split(texts.lengths.tolist())
        for row, key in enumerate(keys):
            length = int(texts.lengths[row]).to_bytes(8, "little")
            found = [raw(pictures[row]), length + raw(parts[row])]
            if TRUTH.get(key.tobytes()) != found and not (self.believed and found in TRUTH.values()):
                raise Failure(f"another row was served for the key {key.tobytes().hex()}")
        self.outcomes["served"] += len(keys)

    def read_held(self) -> None:
        """One who has located rows before their segments were merged."""
        assert self.sample.held is not None
        watch.off()  # The pickle is ours.
        rows: Rows = pickle.loads(self.sample.held)
        watch.on(self.folder)
        keys = keys_of(range(len(self.sample.locations)))
        for at in range(0, len(keys), 5):
            with self.refusing():
                self.compare(keys[at : at + 5], rows.gather(self.sample.locations[at : at + 5]), rows.leaves)

    def verify(self) -> None:
        """What is damaged is set aside, and the rest is read without an error."""
        rows = open_store(self.folder).rows(FINGERPRINT, SPECS, ABOUT)
        report = rows.verify()
        self.outcomes["set aside"] += len(report.damaged)
        with self.refusing(), any_memory():
            rows.append(keys_of([29]), leaves_of([29]))
            rows.publish()
            self.outcomes["published"] += 1
        try:
            self.find(rows, sound=True)
            self.find(open_store(self.folder).rows(FINGERPRINT, SPECS, ABOUT), sound=True)
            if not rows.verify().ok:
                raise Failure("a second verify found more")
        except StoreError as error:
            raise Failure(f"after verify, which set {report.damaged} aside: {error}") from error


# -- what may not happen besides ---------------------------------------------------------------------------------------


class Watch:
    """Every path that Python opens or changes, and every pickle, while it is on."""

    _CHANGES = ("rename", "link", "symlink", "mkdir", "remove", "rmdir", "truncate", "chmod", "utime")
    _PATHS = frozenset(["open", *(f"os.{change}" for change in _CHANGES)])
    _LISTS = frozenset(["os.listdir", "os.scandir"])
    _NEVER = frozenset(["pickle.find_class", "exec", "os.system", "subprocess.Popen", "os.exec", "ctypes.dlopen"])

    def __init__(self) -> None:
        self._inside = ""
        self._busy = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def on(self, folder: Path) -> None:
        self._inside = os.path.realpath(folder)

    def off(self) -> None:
        self._inside = ""

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._inside or self._busy:
            return
        self._busy = True
        try:
            if event in self._NEVER and not self._is_import(event, arguments):
                self.seen.append(f"{event} {arguments!r:.200}")
            elif event in self._PATHS:
                self._look(event, arguments)
            elif event in self._LISTS:
                listed = f"/proc/self/fd/{arguments[0]}" if isinstance(arguments[0], int) else arguments[0]
                self._expect_inside(event, os.path.realpath(listed))
        finally:
            self._busy = False

    def _is_import(self, event: str, arguments: tuple[Any, ...]) -> bool:
        return event == "exec" and not arguments[0].co_filename.startswith((self._inside, "<"))

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        for path in paths:
            if not isinstance(path, (str, bytes, os.PathLike)):
                continue
            text = os.fsdecode(path)
            # Modules may be loaded on first use; an index that cannot be written is kept in a file without a name.
            if text == tempfile.gettempdir() or (text.endswith((".py", ".pyc", ".so")) and self._inside not in text):
                continue
            follows = event == "open" and not arguments[2] & os.O_NOFOLLOW
            if not os.path.isabs(text):
                # In a folder that was opened before, and looked at then.
                if follows or "/" in text or text in ("", "..", "."):
                    self.seen.append(f"{event} {text}")
                continue
            parent = os.path.realpath(os.path.dirname(text))
            self._expect_inside(event, os.path.realpath(text) if follows else os.path.join(parent, "x"))

    def _expect_inside(self, event: str, path: str) -> None:
        if path != self._inside and not path.startswith(self._inside + "/"):
            self.seen.append(f"{event} {path}")


watch: Watch


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Private memory may grow by `MEMORY` and no more: what is above fails to be had."""
    # RLIMIT_DATA counts what is private and may be written: no maps of files, no reserved addresses.
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


@contextlib.contextmanager
def any_memory() -> Iterator[None]:
    """Within `limited_memory`: what is written takes memory of its own."""
    limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


# -- one change after the other ----------------------------------------------------------------------------------------


class Fuzzing:
    """Runs changes in a folder.

    Args:
        folder: where the stores are written; ``store``, ``outside`` and, after a failure, ``failure`` in it.
        go_on: list failures and go on, instead of raising the first.
    """

    def __init__(self, folder: Path, *, go_on: bool = False) -> None:
        self.folder, self.go_on = folder, go_on
        self.failures: collections.Counter[str] = collections.Counter()
        self.store = folder / "store"
        self.samples = samples(folder / "sample" / "store")
        # What is held by one who located rows was found under another path.
        shutil.rmtree(folder / "sample")
        self.samples = samples(self.store)
        self.outside = folder / "outside"
        write_files(self.outside, outside_files(), self.outside)
        self.kinds: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        for sample in self.samples:
            # What is loaded on first use is loaded now. All of a sound store is served, or nothing would be tested.
            for way in WAYS:
                with contextlib.suppress(Failure):
                    self.open(dict(sample.files), sample, way, collections.Counter())
                counted = collections.Counter[str]()
                self.open(dict(sample.files), sample, way, counted)
                if counted["refused"] or counted["served"] < sample.rows:
                    raise Failure(f"the store {sample.name!r} is not sound to begin with: {counted}")

    def one(self, draw: random.Random) -> None:
        """One changed store, read in every way."""
        sample, way = draw.choice(self.samples), draw.choice(WAYS)
        files = dict(sample.files)
        change = Change(draw, files)
        kind = change.run()
        if draw.random() < 0.15 and any(isinstance(data, bytes) for data in files.values()):
            # What the first change has left may be nothing that a second can be made of.
            with contextlib.suppress(
                LookupError, ValueError, AssertionError, TypeError, AttributeError, RecursionError
            ):
                change.run()
        try:
            self.open(files, sample, way, self.outcomes, believed=bool(change.fitting))
        except Exception as error:
            place = self.keep(sample, kind, way, files, error, bool(change.fitting))
            if not self.go_on:
                raise
            self.note(error, place)
        self.kinds[kind] += 1

    def open(
        self,
        files: Files,
        sample: Sample,
        way: str,
        outcomes: collections.Counter[str],
        *,
        believed: bool = False,
    ) -> None:
        """Write the store and read it."""
        shutil.rmtree(self.store, ignore_errors=True)
        write_files(self.store / FINGERPRINT, files, self.outside)
        reading = Reading(self.store, sample, keys_in(files, sample), believed, outcomes)
        watch.seen.clear()
        with limited_memory():
            watch.on(self.store)
            try:
                reading.run(way)
            finally:
                watch.off()
        if watch.seen:
            raise Failure(f"while the store was read: {watch.seen[:3]}")

    def note(self, error: Exception, place: Path) -> None:
        """Count a failure by where it came from, and keep its files the first time."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        which = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error!s:.200}"
        which = re.sub(r"[0-9a-f]{32}|[^ ]*/|[0-9]{3,}", "*", which) if isinstance(error, Failure) else which[:60]
        self.failures[which] += 1
        if self.failures[which] == 1:
            print("".join(traceback.format_exception(error)[-8:]), (place / "failure.json").read_text(), flush=True)
            place.rename(self.folder / f"failure-{len(self.failures)}")

    def keep(self, sample: Sample, kind: str, way: str, files: Files, error: Exception, believed: bool) -> Path:
        """The files of a failure; the last one that Hypothesis tries is the smallest."""
        place = self.folder / "failure"
        shutil.rmtree(place, ignore_errors=True)
        write_files(place / FINGERPRINT, files, self.outside)
        changed = [name for name in {**files, **sample.files} if files.get(name) != sample.files.get(name)]
        words = {
            "sample": sample.name,
            "kind": kind,
            "way": way,
            "changed": sorted(changed),
            "error": repr(error)[:2000],
            "believed": believed,
        }
        (place / "failure.json").write_text(json.dumps(words, indent=2) + "\n")
        return place


def outside_files() -> Files:
    files: Files = {"z-000001.safetensors": segment_bytes(OUTSIDE), "about.json": b"{}"}
    files["probe.safetensors"] = joined({}, b"")
    files["manifests/outside.safetensors"] = next(
        data for name, data in samples_files().items() if name == "manifests/train.safetensors"
    )
    return files


def samples_files() -> Files:
    return read_files(GOLDEN / "format2" / FINGERPRINT)


def write_files(folder: Path, files: Files, outside: Path) -> None:
    whole = files.get(".")
    if isinstance(whole, Special):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(whole.target.replace("OUT", str(outside)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files):
        data, path = files[name], folder / name
        # A folder or a link where there was a file: what no longer fits below it is left out.
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError, OSError):
            if "/" in name:
                path.parent.mkdir(exist_ok=True)
                if path.parent.is_symlink():
                    continue
            if isinstance(data, bytes):
                path.write_bytes(data)
            elif data.kind == "link":
                path.symlink_to(data.target.replace("OUT", str(outside)))
            elif data.kind == "pipe":
                os.mkfifo(path)
            else:
                path.mkdir()


def keys_in(files: Files, sample: Sample) -> np.ndarray:
    """What stands in segments where keys stood: those that were changed may be asked for too."""
    found = [np.zeros((1, 16), np.uint8)]
    for name, data in files.items():
        before = sample.files.get(name)
        if isinstance(data, bytes) and isinstance(before, bytes) and data != before and name.endswith(".safetensors"):
            header, start = header_of(before)
            if "keys" in header and len(data) > start and header["keys"]["dtype"] == "U8":
                begin, end = header["keys"]["data_offsets"]
                part = data[start + begin : start + end]
                found.append(np.frombuffer(part[: len(part) // 16 * 16], np.uint8).reshape(-1, 16))
    return np.concatenate(found)


def fuzz(fuzzing: Fuzzing, count: int, seed: int) -> None:
    """Run so many changes; the first failure is made small and raised."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(st.randoms(use_true_random=False))
    def each(draw: random.Random) -> None:
        fuzzing.one(draw)

    each()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="how many changes")
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run")
    parser.add_argument("--folder", type=Path, default=None, help="where stores are written, best in memory")
    parser.add_argument("--go-on", action="store_true", help="list all failures, as they are, and make none small")
    parser.add_argument("--replay", type=Path, default=None, help="open the files of a failure once more")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    global watch
    watch = Watch()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-store-"))
    fuzzing = Fuzzing(folder.absolute(), go_on=options.go_on)
    if options.replay is not None:
        words = json.loads((options.replay / "failure.json").read_text())
        sample = next(sample for sample in fuzzing.samples if sample.name == words["sample"])
        files = read_files(options.replay / FINGERPRINT)
        fuzzing.open(files, sample, words["way"], fuzzing.outcomes, believed=words["believed"])
        print(f"nothing happened: {dict(fuzzing.outcomes)}")
        return
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}, files in {folder}", file=sys.stderr, flush=True)
    began, done = time.monotonic(), 0
    while done < options.count:
        part = min(CHUNK, options.count - done)
        fuzz(fuzzing, part, seed + done // CHUNK)
        done += part
        if options.count > CHUNK:
            print(f"{done} changes, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for which, count in fuzzing.failures.most_common():
        print(f"{count:6} {which}")
    told = {"changes": sum(fuzzing.kinds.values()), "kinds": fuzzing.kinds, "outcomes": fuzzing.outcomes}
    print(json.dumps({**told, "seconds": round(time.monotonic() - began, 1)}))
    if fuzzing.failures:
        sys.exit(1)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
