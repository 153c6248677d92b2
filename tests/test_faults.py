"""Whatever happens to the process, the disk or the files: nothing half or wrong is ever read.

Each test does the thing itself: it kills, fills a disk, cuts a file, and then asks the one question of
`faults.truth`: is every row that comes back the true row of its key? 100 writers killed at moments that nobody chose
lose what they had not published, and nothing else. Run with ``-s`` for the figures that the docs give; they are also
in the report that ``--junit-xml`` writes.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.killing import MANIFEST, PART, acts_of, write_for_ever, write_until
from faults.power import Disk
from faults.truth import check_all_right, open_rows, read_all, write
from torchrecycle.store import Rows

Figure = Callable[..., None]


@pytest.fixture
def figure(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Figure:
    """Say a figure for the docs."""

    def say(**values: object) -> None:
        for name, value in values.items():
            record_property(name, value)
        print(f"\n{request.node.name}: {json.dumps(values)}")

    return say


# Killed writers


@pytest.fixture(scope="module")
def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrecycle.store", "faults.killing"])
    return context


def start(forkserver: Any, target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
    """A process, and the pipe by which it tells."""
    reader, writer = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=target, args=(*args, writer))
    process.start()
    writer.close()
    return process, reader


def all_told(reader: Any) -> list[int]:
    """What a process has told until its end."""
    told = []
    with reader:
        while True:
            try:
                told.append(reader.recv())
            except EOFError:
                return told


KILLS = 100
FEW_PUBLISHES = 0.04
"""Seconds in which a writer publishes some ten small segments."""


def test_writers_killed_at_100_random_moments_lose_only_what_they_had_not_published(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    draw = random.Random(8)
    published, lost_names, halves = 0, 0, 0
    for seed in range(KILLS):
        # Ten writers one after the other in one store: each goes on among what the killed ones have left.
        folder = tmp_path / str(seed // 10)
        process, reader = start(forkserver, write_for_ever, str(folder), seed)
        first = reader.recv()
        time.sleep(draw.uniform(0, FEW_PUBLISHES))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = max([first, *all_told(reader)])
        rows = open_rows(folder)
        assert rows.verify().ok, f"kill {seed}"
        check_all_right(rows, range(first, last))
        reading = read_all(rows, range(first, first + 4000))
        assert not reading.wrong, f"kill {seed}: {reading}"
        assert not reading.refused, f"kill {seed}: {reading.error}"
        published += last - first
        lost_names += len(reading.right) - (last - first)
        halves += sum(".tmp-" in path.name for path in folder.rglob("*"))
    for number in range(KILLS // 10):
        rows = open_rows(tmp_path / str(number))
        everything = [
            n for seed in range(number * 10, number * 10 + 10) for n in range(seed * 100_000, seed * 100_000 + 30)
        ]
        write(rows, everything, step=100)
        check_all_right(open_rows(tmp_path / str(number)), everything)
    assert published > 10 * KILLS
    figure(kills=KILLS, rows_published_before=published, of_them_lost=0, published_but_not_yet_said=lost_names)


def test_a_writer_killed_at_any_call_of_the_system_leaves_all_of_a_file_or_nothing(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    process, reader = start(forkserver, write_until, str(tmp_path / "whole"), 0)
    process.join()
    steps = -all_told(reader)[-1]
    assert steps > 40
    for step in range(1, steps + 1):
        folder = tmp_path / "killed"
        process, reader = start(forkserver, write_until, str(folder), step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = max([0, *all_told(reader)])
        rows = open_rows(folder)
        assert rows.verify().ok, f"killed at step {step}"
        check_all_right(rows, published_of(done))
        # Of the publish that was under way, all rows are there or none.
        reading = read_all(rows, range(2 * PART))
        assert not reading.wrong | reading.refused, f"killed at step {step}: {reading}"
        assert len(reading.right) % PART == 0
        check_version(rows, done)
        write(rows, range(2 * PART))
        check_all_right(open_rows(folder), range(2 * PART))
        shutil.rmtree(folder, ignore_errors=True)
    figure(steps=steps)


def published_of(done: int) -> range:
    """The rows that so many of `acts_of` have published."""
    return range(PART * min(2, (done + 1) // 2))


def check_version(rows: Rows, done: int) -> None:
    """The manifest is the last that was written, or the one that was under way."""
    manifest = rows.read_manifest(MANIFEST)
    version = -1 if manifest is None else int(manifest[0]["version"])
    assert done // 2 - 1 <= version <= (done + 1) // 2 - 1


# Power cuts


def test_whatever_a_power_cut_keeps_of_what_was_not_synced_only_unpublished_rows_are_lost(
    tmp_path: Path, figure: Figure
):
    draw = random.Random(9)
    root = tmp_path / "written"
    root.mkdir()
    disk = Disk(root)
    with disk.watched():
        for act in acts_of(open_rows(root)):
            act()
            disk.done += 1
    assert disk.done == 5
    states = 0
    for number, moment in enumerate(disk.moments):
        for how in ("synced", "named", "drawn", "drawn", "drawn"):
            folder = tmp_path / f"{number}-{states}"
            moment.left(folder, how, draw)
            rows = open_rows(folder)
            report = rows.verify()
            assert report.ok, f"moment {number}, {how}: {report}"
            check_all_right(rows, published_of(moment.done))
            reading = read_all(rows, range(2 * PART))
            assert not reading.wrong | reading.refused, f"moment {number}, {how}: {reading}"
            assert len(reading.right) % PART == 0
            check_version(rows, moment.done)
            write(rows, range(2 * PART))
            check_all_right(open_rows(folder), range(2 * PART))
            states += 1
            shutil.rmtree(folder)
    # The test of the test: many moments have something that is written and not yet safe.
    unsafe = sum(any(m.synced.get(file) != content for file, content in m.contents.items()) for m in disk.moments)
    unnamed = sum(any(len(listings) > 1 for listings in m.listings.values()) for m in disk.moments)
    assert unsafe > 15
    assert unnamed > 20
    figure(moments=len(disk.moments), with_bytes_not_synced=unsafe, with_names_not_synced=unnamed, states=states)
