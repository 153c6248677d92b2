"""Whatever happens to the process, the disk or the files: nothing half or wrong is ever read.

Each test does the thing itself: it kills, fills a disk, cuts a file, and then asks the one question of
`faults.truth`: is every row that comes back the true row of its key? 100 writers killed at moments that nobody chose
lose what they had not published, and nothing else. Run with ``-s`` for the figures that the docs give; they are also
in the report that ``--junit-xml`` writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.disks import Ballast, read_only, small_disk
from faults.killing import MANIFEST, PART, acts_of, write_for_ever, write_until
from faults.power import Disk
from faults.truth import (
    WORLDS,
    Reading,
    check_all_right,
    gather_all,
    keys_of,
    leaves_of,
    open_rows,
    read_all,
    segments_of,
    write,
)
from torchrecycle.errors import StoreError
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


# Full disks


@pytest.mark.parametrize("what", ["pages", "files"])
def test_a_full_disk_is_an_error_at_any_point_and_writing_goes_on_when_there_is_room(
    tmp_path: Path, what: str, figure: Figure
):
    with small_disk(tmp_path / "disk") as disk:
        write(open_rows(disk), range(40), step=20)
        ballast = Ballast(disk)
        leave = ballast.leave_pages if what == "pages" else ballast.leave_files
        room, refused, stopped_at = 0, 1, set()
        while refused:
            leave(room)
            rows = open_rows(disk, world=1)
            acts = acts_of(rows, world=1)
            refused = sum(is_refused(act, errno.ENOSPC, stopped_at) for act in acts)
            check_all_right(open_rows(disk), range(40))
            left = [path for path in (disk / WORLDS[1]).rglob("*") if path.is_file()]
            assert not [path for path in left if ".tmp-" in path.name]
            assert rows.verify().ok
            ballast.free()
            rows.publish()
            check_all_right(rows, range(2 * PART), world=1)
            check_all_right(open_rows(disk, world=1), range(2 * PART), world=1)
            for act in acts:
                act()
            check_version(rows, len(acts))
            shutil.rmtree(disk / WORLDS[1])
            room += 1
        assert room > 4
        # Each kind of file was the one for which there was no room.
        assert {"about.json", "manifests", "probe.safetensors"} <= stopped_at
        assert any(SEGMENT.fullmatch(name) for name in stopped_at)
        figure(kind=what, sizes_of_the_room_tried=room)


SEGMENT = re.compile(r"[A-Za-z0-9]+-[0-9]+\.safetensors")


def is_refused(act: Callable[[], None], number: int, files: set[str]) -> bool:
    """Whether an act is refused, in words and with this error number; for the sake of which file, added to a set."""
    found = error_of(act)
    if found is None:
        return False
    assert found.errno == number, found
    path = re.match(r"cannot write (.+): ", str(found))
    assert path, found
    files |= {Path(path[1]).name, Path(path[1]).parent.name}
    return True


def error_of(act: Callable[[], Any]) -> StoreError | None:
    """The refusal of an act, if it is refused."""
    try:
        act()
    except StoreError as error:
        return error
    return None


# Folders that cannot be written to


def test_a_read_only_folder_is_read_and_writing_to_it_is_an_error_in_words(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        write(open_rows(disk), range(40), step=20)
        for act in acts_of(open_rows(disk)):
            act()
        with read_only(disk):
            rows = open_rows(disk)
            check_all_right(rows, range(40))
            assert rows.verify().ok
            check_version(rows, 4)
            for world, acts in ((0, acts_of(rows, start=100)), (1, acts_of(open_rows(disk, world=1), world=1))):
                files: set[str] = set()
                refused = [is_refused(act, errno.EROFS, files) for act in acts]
                # A probe that is there already stays, so there is nothing to write.
                assert refused[:4] == [True] * 4, world
            check_all_right(rows, range(40))
        rows.publish()
        check_all_right(open_rows(disk), [*range(40), *range(100, 100 + 2 * PART)])


def test_damage_in_a_read_only_folder_is_an_error_and_not_served(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        write(open_rows(disk), range(40), step=20)
        path = segments_of(disk)[0]
        path.write_bytes(path.read_bytes()[:-1])
        with read_only(disk):
            rows = open_rows(disk)
            with pytest.raises(StoreError, match=r"cannot set .* aside: Read-only file system") as caught:
                rows.verify()
            assert caught.value.errno == errno.EROFS
            assert not read_all(rows, range(40)).wrong


# Folders that go away


@pytest.mark.parametrize("what", ["fingerprint", "store"])
@pytest.mark.parametrize("read_before", [0, 20, 40])
def test_a_folder_deleted_under_a_reader_gives_no_other_row(tmp_path: Path, what: str, read_before: int):
    folder = tmp_path / "store"
    write(open_rows(folder), range(40), step=8)
    rows = open_rows(folder)
    locations = rows.lookup(keys_of(range(40)))
    check_all_right(rows, range(read_before))
    copy = pickle.dumps(rows)
    shutil.rmtree(folder / WORLDS[0] if what == "fingerprint" else folder)
    for reader in (rows, pickle.loads(copy)):
        reading = gather_all(reader, range(40), locations)
        assert not reading.wrong
        # What is mapped is still there, and the rest is an error that says what to do.
        assert reading.right >= set(range(read_before)) if reader is rows else True
        assert reading.error is None or "ook the" in str(reading.error), reading.error
    rows.refresh()
    assert (rows.lookup(keys_of(range(40))) == -1).all()
    write(rows, range(40))
    check_all_right(rows, range(40))
    check_all_right(open_rows(folder), range(40))


# File descriptors


def read_with_few_descriptors(folder: str, told: Any) -> None:
    """Told: open files before and after reading, with a limit of eight more; then what happens when none is left."""
    before = len(os.listdir("/proc/self/fd"))
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, highest + 8))
    rows = open_rows(Path(folder))
    check_all_right(rows, range(SEGMENTS))
    told.send(len(os.listdir("/proc/self/fd")) - before)
    used = []
    with contextlib.suppress(OSError):
        while True:
            used.append(os.open("/dev/null", os.O_RDONLY))
    known, fresh = read_all(rows, range(SEGMENTS)), Reading()
    errors = [error_of(lambda: fresh.merge(read_all(open_rows(Path(folder)), range(SEGMENTS)))), fresh.error]
    rows.append(keys_of([SEGMENTS]), leaves_of([SEGMENTS]))
    errors = [str(error) for error in (*errors, error_of(rows.publish)) if error]
    for descriptor in used:
        os.close(descriptor)
    rows.publish()
    check_all_right(rows, range(SEGMENTS + 1))
    told.send((len(known.right), len(known.wrong | fresh.wrong), errors))


SEGMENTS = 300


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the open files of Linux")
def test_hundreds_of_segments_are_read_with_eight_free_file_descriptors_and_none_is_an_error_in_words(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    write(open_rows(tmp_path), range(SEGMENTS), step=1)
    process, reader = start(forkserver, read_with_few_descriptors, str(tmp_path))
    told: list[Any] = all_told(reader)
    process.join()
    assert process.exitcode == 0
    more, (right, wrong, errors) = told
    assert more == 0
    assert right == SEGMENTS
    assert wrong == 0
    # A new reader or the writer, if not both.
    assert errors
    assert all("Too many open files" in error for error in errors), errors
    figure(segments=SEGMENTS, descriptors_kept_open=more)
