"""A store of two models, and a thousand ways to damage it.

A `Damage` changes the files of a store, as a failing disk, a wrong ``mv`` or a careless copy would: one bit of what a
header describes, one bit anywhere, the end cut off, a page of zeros, two files that have changed their names, a file
that belongs to the other model. What it has touched is noted, so that everything else must still be there afterwards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from faults.truth import ABOUT, WORLDS, Reading, keys_of, open_rows, read_all, write
from torchrecycle.errors import StoreError
from torchrecycle.store import Rows, open_store

SIZES = (8, 8, 6, 11, 8)
"""Rows per segment; some are of one size, so that their files differ in nothing but content."""

EVERYTHING = range(sum(SIZES))
MANIFESTS = ("train", "valid")
INDEX = "index.safetensors"

Files = dict[str, bytes]
"""The files of a store by their path in it."""


def write_store(folder: Path) -> None:
    """A store of two models with the same keys: five segments, two manifests and a probe each."""
    for world in range(len(WORLDS)):
        rows, start = open_rows(folder, world), 0
        for size in SIZES:
            write(rows, range(start, start + size), world)
            start += size
        for number, name in enumerate(MANIFESTS):
            rows.write_manifest(name, *_manifest(world, number))
        rows.write_probe({"input": torch.arange(8.0) + world}, {"seed": str(world)})


def _manifest(world: int, number: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    targets = torch.arange(len(EVERYTHING)) * (number + 2) + world
    return {"keys": torch.from_numpy(keys_of(EVERYTHING)), "targets": targets}, {"name": MANIFESTS[number]}


def read_documents(rows: Rows, world: int) -> dict[str, int]:
    """How many manifests, probes and words about the model come right, how many wrong, and how many are refused."""
    counts = {"right": 0, "wrong": int(rows.about != ABOUT[world]), "refused": 0}
    expected = {name: _manifest(world, number) for number, name in enumerate(MANIFESTS)}
    expected[""] = {"input": torch.arange(8.0) + world}, {"seed": str(world)}
    for name, (tensors, metadata) in expected.items():
        try:
            found = rows.read_manifest(name) if name else rows.read_probe()
        except StoreError:
            counts["refused"] += 1
            continue
        if found is not None:
            same = found[1] == metadata and found[0].keys() == tensors.keys()
            same = same and all(torch.equal(found[0][key], tensors[key]) for key in tensors)
            counts["right" if same else "wrong"] += 1
    return counts


def put(folder: Path, files: Files, before: Files | None = None) -> None:
    """Make the files of a store these. Those that are there already and differ are written anew, not into."""
    for name, data in files.items():
        path = folder / name
        if before is not None and before.get(name) == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    for name in (before or {}).keys() - files.keys():
        (folder / name).unlink()


@dataclass(slots=True)
class Damage:
    """One way in which a store is damaged."""

    kind: str
    what: str
    """In words, with names and places."""
    files: Files
    """The store as it then is."""
    touched: set[str] = field(default_factory=set)
    """Files that are not what they were."""


def is_segment(name: str) -> bool:
    return name.count("/") == 1 and "-" in name.split("/")[1] and name.endswith(".safetensors")


def draw_damage(sound: Files, kind: str, draw: random.Random) -> Damage:
    """Damage of one kind, drawn from all the ways in which it may be done."""
    files = dict(sound)
    return Damage(kind, _KINDS[kind](files, draw), files, {n for n in {*files, *sound} if files.get(n) != sound.get(n)})


def _of(files: Files, draw: random.Random, world: int | None = 0, what: Callable[[str], bool] = is_segment) -> str:
    """The name of some file."""
    return draw.choice([n for n in sorted(files) if what(n) and (world is None or n.startswith(WORLDS[world]))])


def _two(files: Files, draw: random.Random) -> tuple[str, str]:
    one, other = draw.sample([n for n in sorted(files) if is_segment(n) and n.startswith(WORLDS[0])], 2)
    return one, other


def _flip(files: Files, name: str, place: int, draw: random.Random) -> str:
    data = bytearray(files[name])
    bit = draw.randrange(8)
    data[place] ^= 1 << bit
    files[name] = bytes(data)
    return f"bit {bit} of byte {place} of {name}"


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip_in_tensors(files: Files, draw: random.Random) -> str:
    name = _of(files, draw)
    data = files[name]
    start = _header_end(data)
    entries = json.loads(data[8:start])
    tensors = sorted(n for n in entries if n in ("keys", "sums") or n.startswith("leaf."))
    begin, end = entries[draw.choice(tensors)]["data_offsets"]
    return _flip(files, name, start + draw.randrange(begin, end), draw)


def _flip_in_header(files: Files, draw: random.Random) -> str:
    name = _of(files, draw)
    data = files[name]
    return _flip(files, name, draw.randrange(len(data[: _header_end(data)].rstrip())), draw)


def _flip_anywhere(files: Files, draw: random.Random) -> str:
    name = _of(files, draw)
    return _flip(files, name, draw.randrange(len(files[name])), draw)


def _flip_in(what: Callable[[str], bool]) -> Callable[[Files, random.Random], str]:
    def flipped(files: Files, draw: random.Random) -> str:
        name = _of(files, draw, what=what)
        data = files[name]
        # Half of them in the header's text, where there is one.
        said = len(data[: _header_end(data)].rstrip()) if name.endswith(".safetensors") else len(data)
        return _flip(files, name, draw.randrange(draw.choice([said, len(data)])), draw)

    return flipped


def _truncated(files: Files, draw: random.Random) -> str:
    name = _of(files, draw, what=lambda name: name.endswith(".safetensors"))
    left = draw.choice([draw.randrange(len(files[name])), len(files[name]) // 4096 * 4096, len(files[name]) - 1])
    files[name] = files[name][: min(left, len(files[name]) - 1)]
    return f"{name} cut to {len(files[name])} bytes"


def _longer(files: Files, draw: random.Random) -> str:
    name = _of(files, draw)
    files[name] += bytes(draw.choice([1, 8, 4096]))
    return f"zeros after the end of {name}"


def _zero_page(files: Files, draw: random.Random) -> str:
    name = _of(files, draw)
    start = draw.randrange(0, len(files[name]), 4096)
    length = len(files[name][start : start + 4096])
    files[name] = files[name][:start] + bytes(length) + files[name][start + length :]
    return f"zeros at {start} of {name}"


def _renamed_over(files: Files, draw: random.Random) -> str:
    one, other = _two(files, draw)
    files[other] = files.pop(one)
    return f"{one} renamed to {other}"


def _swapped(files: Files, draw: random.Random) -> str:
    one, other = _two(files, draw)
    files[one], files[other] = files[other], files[one]
    return f"{one} and {other} swapped"


def _copied(files: Files, draw: random.Random) -> str:
    name, other = _of(files, draw), draw.choice(["0-000001", "zz-000001"])
    files[f"{WORLDS[0]}/{other}.safetensors"] = files[name]
    return f"{name} copied to {other}"


def _from_the_other_model(files: Files, draw: random.Random) -> str:
    name = _of(files, draw, world=1)
    other = draw.choice([_of(files, draw), f"{WORLDS[0]}/0-000001.safetensors", f"{WORLDS[0]}/{name.split('/')[1]}"])
    files[other] = files[name]
    return f"{name} copied to {other}"


def _swapped_manifests(files: Files, draw: random.Random) -> str:
    one, other = draw.choice([(0, MANIFESTS[1]), (1, MANIFESTS[0])])
    names = f"{WORLDS[0]}/manifests/{MANIFESTS[0]}.safetensors", f"{WORLDS[one]}/manifests/{other}.safetensors"
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    return f"{names[0]} and {names[1]} swapped"


def _swapped_probes(files: Files, draw: random.Random) -> str:
    names = [f"{world}/probe.safetensors" for world in WORLDS]
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    return "probes swapped"


def _swapped_abouts(files: Files, draw: random.Random) -> str:
    names = [f"{world}/about.json" for world in WORLDS]
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    return "about.json of two models swapped"


def _swapped_folders(files: Files, draw: random.Random) -> str:
    before = dict(files)
    files.clear()
    for name, data in before.items():
        folder, _, rest = name.partition("/")
        files[f"{WORLDS[1 - WORLDS.index(folder)]}/{rest}"] = data
    return "the folders of two models swapped"


def _is_document(name: str) -> bool:
    return "/manifests/" in name or name.endswith("/probe.safetensors")


_KINDS: dict[str, Callable[[Files, random.Random], str]] = {
    "a bit of a row, a key or a sum": _flip_in_tensors,
    "a bit of a segment's header": _flip_in_header,
    "a bit anywhere in a segment": _flip_anywhere,
    "a bit of a manifest or probe": _flip_in(_is_document),
    "a bit of about.json": _flip_in(lambda name: name.endswith("about.json")),
    "a file cut short": _truncated,
    "a segment with bytes after its end": _longer,
    "a page of zeros": _zero_page,
    "a segment renamed to another's name": _renamed_over,
    "two segments swapped": _swapped,
    "a segment copied to a second name": _copied,
    "a segment of another model": _from_the_other_model,
    "two manifests swapped": _swapped_manifests,
    "probes swapped": _swapped_probes,
    "about.json of two models swapped": _swapped_abouts,
    "folders of two models swapped": _swapped_folders,
}

SHARES = {
    "a bit of a row, a key or a sum": 280,
    "a bit of a segment's header": 120,
    "a bit anywhere in a segment": 140,
    "a bit of a manifest or probe": 60,
    "a bit of about.json": 40,
    "a file cut short": 140,
    "a segment with bytes after its end": 20,
    "a page of zeros": 40,
    "a segment renamed to another's name": 40,
    "two segments swapped": 40,
    "a segment copied to a second name": 20,
    "a segment of another model": 20,
    "two manifests swapped": 10,
    "probes swapped": 10,
    "about.json of two models swapped": 10,
    "folders of two models swapped": 10,
}
"""How many of a thousand are of each kind."""


@dataclass(slots=True)
class Outcome:
    """What became of one damage."""

    reading: Reading
    """What was read right after it."""
    documents_wrong: int
    """Manifests and probes that came other than they were written."""
    refused: bool
    """Whether reading anything was refused."""
    set_aside: set[str]
    """What verify has set aside, by path in the store."""
    verify_error: StoreError | None
    """Why verify itself was refused."""


def judge(folder: Path) -> Outcome:
    """Read everything of world 0, opened afresh; then verify, by what is there and not by what we know of it."""
    try:
        rows = open_rows(folder)
    except StoreError as error:
        return Outcome(Reading(refused=set(EVERYTHING), error=error), 0, True, *_verified(folder))
    reading = read_all(rows, EVERYTHING)
    documents = read_documents(rows, 0)
    refused = bool(reading.refused) or bool(documents["refused"])
    return Outcome(reading, documents["wrong"], refused, *_verified(folder))


def _verified(folder: Path) -> tuple[set[str], StoreError | None]:
    try:
        report = open_store(folder).existing(WORLDS[0]).verify()
    except StoreError as error:
        return set(), error
    return {str(Path(name).relative_to(folder)) for name in report.damaged}, None
