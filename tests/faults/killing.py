"""Writers that are killed: at a moment that nobody chose, and at each call that they make of the system.

`write_for_ever` publishes until somebody kills it, and says over a pipe what has been published. `act_until` makes
the same calls each time, counts those of the system (open, write, fsync, rename), and kills itself with SIGKILL after
the one that it was told: so all of them are tried, also those between which no timer ever hits.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faults.truth import keys_of, leaves_of, open_rows, write
from torchrecycle.store import FolderStore, Rows, open_store

PART = 6
"""How many rows `acts_of` publishes at a time."""

MANIFEST = "train"


def write_for_ever(folder: str, seed: int, told: Any) -> None:
    """Append and publish small segments. Told: the number of the first row, then where each publish ended."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    start = seed * 100_000
    told.send(start)
    rows = open_rows(Path(folder), segment_bytes=draw.choice([600, 3000]))
    while True:
        numbers = range(start, start + draw.randrange(1, 12))
        start = numbers.stop
        if draw.random() < 0.7:
            write(rows, numbers)
            told.send(start)
        else:
            rows.append(keys_of(numbers), leaves_of(numbers))


def acts_of(rows: Rows, *, start: int = 0, world: int = 0) -> list[Callable[[], None]]:
    """All kinds of writing: rows, a manifest, further rows, another manifest in its place, a probe.

    Args:
        rows: Of a world.
        start: The number of the first row.
        world: Which one.
    """

    def manifest(version: int) -> None:
        rows.write_manifest(MANIFEST, {"version": torch.tensor([version])}, {})

    return [
        lambda: write(rows, range(start, start + PART), world),
        lambda: manifest(0),
        lambda: write(rows, range(start + PART, start + 2 * PART), world),
        lambda: manifest(1),
        lambda: rows.write_probe({"input": torch.arange(3.0)}, {}),
    ]


def _merging(folder: Path) -> list[Callable[[], Any]]:
    """Small segments merged into one, and again with a further one."""
    store, rows = open_store(folder), open_rows(folder)
    assert isinstance(store, FolderStore)
    return [
        lambda: write(rows, range(PART)),
        lambda: write(rows, range(PART, 2 * PART)),
        store.compact,
        lambda: write(rows, range(2 * PART, 3 * PART)),
        store.compact,
    ]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Acts, one after the other."""

    acts: Callable[[Path], list[Callable[[], Any]]]
    """On the store in some folder."""
    published: tuple[int, ...]
    """How many rows are safe when so many acts have returned."""


SCENARIOS = {
    "writing": Scenario(lambda folder: acts_of(open_rows(folder)), (0, PART, PART, 2 * PART, 2 * PART, 2 * PART)),
    "merging": Scenario(_merging, (0, PART, 2 * PART, 2 * PART, 3 * PART, 3 * PART)),
}


def act_until(folder: str, name: str, step: int, told: Any) -> None:
    """Play a scenario; killed after one call of the system, or never if `step` is 0.

    Told: how many acts have returned, after each; at the end, after which calls the files were not what they were
    before.
    """
    torch.set_num_threads(1)
    acts = SCENARIOS[name].acts(Path(folder))
    steps = _Steps(step, Path(folder))
    after_each_call(steps.seen)
    for number, act in enumerate(acts):
        act()
        told.send(number + 1)
    after_each_call(None)
    told.send(steps.changing)


class _Steps:
    """Counts the returns of calls of the system."""

    def __init__(self, last: int, folder: Path) -> None:
        self.changing: list[int] = []
        """The calls after which a kill leaves what it leaves after no other."""
        self._count, self._last = 0, last
        self._folder, self._files = folder, [("", 0)]

    def seen(self, frame: Any, event: str, called: Any) -> None:
        # What is there before a call is what is there after the one before.
        if event != "c_return" or not is_of_the_system(called):
            return
        self._count += 1
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._last:
            files = sorted((str(path), path.lstat().st_size) for path in self._folder.rglob("*"))
            if files != self._files:
                self._files = files
                self.changing.append(self._count)


def after_each_call(seen: Callable[[Any, str, Any], None] | None) -> None:
    """Let a function see each call in this thread, and in those that are started from now on."""
    threading.setprofile(seen)
    sys.setprofile(seen)


LOOKING = {"fspath", "stat", "lstat", "getpid", "urandom", "scandir", "listdir", "fileno", "isatty", "read", "readinto"}
"""Calls that change no file: after them there is what was there before."""


def is_of_the_system(called: Any) -> bool:
    """Whether a C function works on files: those of ``os``, and the methods of open files and maps."""
    if getattr(called, "__name__", "") in LOOKING:
        return False
    owner = getattr(called, "__self__", None)
    names = {getattr(called, "__module__", None), type(owner).__module__, getattr(owner, "__name__", None)}
    return bool(names & {"posix", "_io", "io", "mmap"})
