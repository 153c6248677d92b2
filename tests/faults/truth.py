"""Rows whose values follow from their number, and the one question that matters: is what was read true?

Row 7 of world 0 holds 24 numbers from 168 on and a text of 1 step; row 7 of world 1, another model, holds other ones
under the same key. So a row that was read under a wrong key, or from another fingerprint, or half, is seen by
comparing with the formula, and no copy of the data has to be kept beside the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from torchrecycle.errors import StoreError
from torchrecycle.store import FolderStore, Leaf, LeafSpec, Ragged, Rows

SPECS = (LeafSpec((24,), False, torch.float32), LeafSpec((3,), True, torch.bfloat16))
ABOUT = [{"cut": "layer2", "model": f"rows that follow from their number, world {world}"} for world in range(2)]
WORLDS = ("0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210")
"""The fingerprints of two models with rows of one form."""


def keys_of(numbers: Sequence[int]) -> np.ndarray:
    """``[n, 16]`` keys."""
    made = b"".join(hashlib.blake2b(int(number).to_bytes(8, "little"), digest_size=16).digest() for number in numbers)
    return np.frombuffer(bytearray(made), dtype=np.uint8).reshape(-1, 16)


def leaves_of(numbers: Sequence[int], world: int = 0) -> list[Leaf]:
    """What these rows hold in this world."""
    at = torch.tensor([int(number) for number in numbers], dtype=torch.int64)
    dense = (24 * at[:, None] + torch.arange(24)).float() + world / 2
    lengths = (at * 7 + world) % 6
    steps = torch.repeat_interleave(at % 97, lengths).bfloat16()
    return [dense, Ragged(torch.stack([steps, steps + 1, -steps], 1), lengths)]


def open_rows(folder: Path, world: int = 0, **arguments: float) -> Rows:
    """The rows of a world, opened afresh.

    Args:
        folder: The store's.
        world: Whose rows.
        **arguments: Of `FolderStore`.
    """
    return FolderStore(folder, **arguments).rows(WORLDS[world], SPECS, ABOUT[world])  # type: ignore[arg-type]


def write(rows: Rows, numbers: Sequence[int], world: int = 0, step: int | None = None) -> None:
    """Append and publish rows, so many to a segment."""
    step = step or len(numbers)
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        rows.append(keys_of(part), leaves_of(part, world))
        rows.publish()


@dataclass(slots=True)
class Reading:
    """What a store answered when it was asked for rows one by one."""

    right: set[int] = field(default_factory=set)
    """Numbers of rows that came as they were written."""
    wrong: set[int] = field(default_factory=set)
    """Numbers of rows that came otherwise: the one thing that must never be."""
    refused: set[int] = field(default_factory=set)
    """Numbers of rows that are there, and that reading refused with a `StoreError`."""
    missed: set[int] = field(default_factory=set)
    """Numbers of rows that lookup does not find."""
    error: StoreError | None = None
    """The last refusal; also of lookup itself, which then refuses every row."""

    def merge(self, other: Reading) -> None:
        """Add what another store answered."""
        for name in ("right", "wrong", "refused", "missed"):
            getattr(self, name).update(getattr(other, name))
        self.error = other.error or self.error


def read_all(rows: Rows, numbers: Sequence[int], world: int = 0) -> Reading:
    """Look rows up and gather them: all at once where that works, else each by itself."""
    reading = Reading()
    try:
        found = rows.lookup(keys_of(numbers))
    except StoreError as error:
        reading.refused, reading.error = set(numbers), error
        return reading
    reading.missed = {number for number, at in zip(numbers, found.tolist(), strict=True) if at < 0}
    there = [number for number in numbers if number not in reading.missed]
    _read(rows, there, found[found >= 0], world, reading)
    return reading


def gather_all(rows: Rows, numbers: Sequence[int], locations: np.ndarray, world: int = 0) -> Reading:
    """Gather rows by the locations that they had."""
    reading = Reading()
    _read(rows, numbers, locations, world, reading)
    return reading


def _read(rows: Rows, numbers: Sequence[int], locations: np.ndarray, world: int, reading: Reading) -> None:
    if not len(numbers):
        return
    try:
        leaves = rows.gather(locations)
    except StoreError as error:
        reading.error = error
        if len(numbers) == 1:
            reading.refused |= set(numbers)
            return
        middle = len(numbers) // 2
        _read(rows, numbers[:middle], locations[:middle], world, reading)
        _read(rows, numbers[middle:], locations[middle:], world, reading)
        return
    same = _same(leaves, leaves_of(numbers, world))
    reading.right |= {number for number, is_same in zip(numbers, same, strict=True) if is_same}
    reading.wrong |= {number for number, is_same in zip(numbers, same, strict=True) if not is_same}


def _same(found: Sequence[Leaf], expected: Sequence[Leaf]) -> list[bool]:
    """Which rows are the same to the bit."""
    columns = [list(zip(_bytes(one), _bytes(other), strict=True)) for one, other in zip(found, expected, strict=True)]
    return [all(one == other for one, other in row) for row in zip(*columns, strict=True)]


def _bytes(leaf: Leaf) -> list[bytes]:
    """Each row of a leaf as bytes; a ragged one by itself."""
    if isinstance(leaf, Ragged):
        return [
            part.contiguous().view(torch.uint8).numpy().tobytes() for part in leaf.values.split(leaf.lengths.tolist())
        ]
    return [row.tobytes() for row in leaf.contiguous().view(torch.uint8).numpy()]


def check_all_right(rows: Rows, numbers: Sequence[int], world: int = 0) -> None:
    """Assert that all of these rows are there and right."""
    reading = read_all(rows, numbers, world)
    assert reading.error is None, reading.error
    assert not reading.wrong, f"served wrong: {sorted(reading.wrong)}"
    assert not reading.missed, f"missing: {sorted(reading.missed)}"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a store by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def segments_of(folder: Path, world: int = 0) -> list[Path]:
    """The segments of a world: a writer's name, a number, the ending."""
    return sorted(path for path in (folder / WORLDS[world]).glob("*-*.safetensors") if path.is_file())
