"""Whatever happens to the process, the disk or the files: nothing half or wrong is ever read.

Each test does the thing itself: it kills, fills a disk, cuts a file, and then asks the one question of
`faults.truth`: is every row that comes back the true row of its key? 100 writers killed at moments that nobody chose
lose what they had not published, and nothing else. Run with ``-s`` for the figures that the docs give; they are also
in the report that ``--junit-xml`` writes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import TensorDataset

from faults.damage import (
    EVERYTHING,
    INDEX,
    SHARES,
    SIZES,
    Damage,
    Files,
    Outcome,
    draw_damage,
    is_segment,
    judge,
    put,
    read_documents,
    write_store,
)
from faults.disks import Ballast, read_only, small_disk, without_rights
from faults.killing import MANIFEST, PART, SCENARIOS, act_until, acts_of, write_for_ever
from faults.power import Disk
from faults.truth import (
    WORLDS,
    Reading,
    check_all_right,
    files_of,
    gather_all,
    keys_of,
    leaves_of,
    open_rows,
    read_all,
    segments_of,
    write,
)
from faults.workers import Gathering, first, read_in_threads, read_very_many, read_what_is_cut
from processes import forkserver_context
from small import CUT, labels, pictures, residual
from torchrecycle import DamagedRowError, RecycleWarning, Recycling, StoreError, recycle
from torchrecycle.store import FolderStore, LeafSpec, Rows, open_store

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
    context = forkserver_context()
    return context


def start(forkserver: Any, target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
    """A process, and the pipe by which it tells."""
    reader, writer = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=target, args=(*args, writer))
    process.start()
    writer.close()
    return process, reader


def all_told(reader: Any) -> list[Any]:
    """What a process has told until its end."""
    told = []
    with reader:
        while True:
            try:
                told.append(reader.recv())
            except EOFError:
                return told


KILLS = 100


def test_writers_killed_at_100_random_moments_lose_only_what_they_had_not_published(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    draw = random.Random(8)
    published, unsaid, gap = 0, 0, 0.005
    for seed in range(KILLS):
        # Ten writers one after the other in one store: each goes on among what the killed ones have left.
        folder = tmp_path / str(seed // 10)
        process, reader = start(forkserver, write_for_ever, str(folder), seed)
        first = last = reader.recv()
        # Any moment of the first publishes, on a machine of any speed.
        for _ in range(draw.randrange(4)):
            began = time.perf_counter()
            last = reader.recv()
            gap += (time.perf_counter() - began - gap) / 10
        time.sleep(draw.uniform(0, 2 * gap))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = max([last, *all_told(reader)])
        rows = open_rows(folder)
        assert rows.verify().ok, f"kill {seed}"
        check_all_right(rows, range(first, last))
        reading = read_all(rows, range(first, first + 4000))
        assert not reading.wrong, f"kill {seed}: {reading}"
        assert not reading.refused, f"kill {seed}: {reading.error}"
        published += last - first
        unsaid += len(reading.right) - (last - first)
    for number in range(KILLS // 10):
        rows = open_rows(tmp_path / str(number))
        everything = [
            n for seed in range(number * 10, number * 10 + 10) for n in range(seed * 100_000, seed * 100_000 + 30)
        ]
        write(rows, everything, step=100)
        check_all_right(open_rows(tmp_path / str(number)), everything)
    assert published > 5 * KILLS
    figure(kills=KILLS, rows_published_before=published, of_them_lost=0, published_but_not_yet_said=unsaid)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_writer_killed_at_any_call_of_the_system_leaves_all_of_a_file_or_nothing(
    tmp_path: Path, forkserver: Any, name: str, figure: Figure
):
    process, reader = start(forkserver, act_until, str(tmp_path / "whole"), name, 0)
    process.join()
    steps = all_told(reader)[-1]
    assert len(steps) > 15
    for step in steps:
        folder = tmp_path / "killed"
        process, reader = start(forkserver, act_until, str(folder), name, step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check_what_is_left(folder, name, done=max([0, *all_told(reader)]))
        shutil.rmtree(folder, ignore_errors=True)
    figure(kills=len(steps))


def check_what_is_left(folder: Path, name: str, done: int) -> None:
    """Assert that a scenario that was stopped after so many acts has lost nothing that was published."""
    published = SCENARIOS[name].published
    rows = open_rows(folder)
    report = rows.verify()
    assert report.ok, report
    check_all_right(rows, range(published[done]))
    # Of the publish that was under way, all rows are there or none.
    reading = read_all(rows, range(max(published)))
    assert not reading.wrong | reading.refused, reading
    assert len(reading.right) % PART == 0
    if name == "writing":
        check_version(rows, done)
    write(rows, range(max(published)))
    check_all_right(open_rows(folder), range(max(published)))


def check_version(rows: Rows, done: int) -> None:
    """The manifest is the last that was written, or the one that was under way."""
    manifest = rows.read_manifest(MANIFEST)
    version = -1 if manifest is None else int(manifest[0]["version"])
    assert done // 2 - 1 <= version <= (done + 1) // 2 - 1


# Power cuts


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_a_power_cut_keeps_of_what_was_not_synced_only_unpublished_rows_are_lost(
    tmp_path: Path, name: str, figure: Figure
):
    draw = random.Random(9)
    root = tmp_path / "written"
    root.mkdir()
    disk = Disk(root)
    with disk.watched():
        for act in SCENARIOS[name].acts(root):
            act()
            disk.done += 1
    states = 0
    for moment in disk.moments:
        for how in ("synced", "named", "drawn", "drawn"):
            folder = tmp_path / f"{states}"
            moment.left(folder, how, draw)
            check_what_is_left(folder, name, moment.done)
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


def test_merging_segments_on_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        write(open_rows(disk), range(60), step=6)
        ballast, store = Ballast(disk), FolderStore(disk)
        room, refusals = 0, 0
        while len(segments_of(disk)) > 1:
            held = open_rows(disk)
            locations = held.lookup(keys_of(range(60)))
            ballast.leave_pages(room)
            error = error_of(store.compact)
            assert error is None or error.errno == errno.ENOSPC, error
            check_all_right(open_rows(disk), range(60))
            assert gather_all(held, range(60), locations).right == set(range(60))
            assert not [path for path in disk.rglob("*") if ".tmp-" in path.name]
            refusals += error is not None
            room += 1
            ballast.free()
        assert refusals > 3
        assert open_rows(disk).verify().ok


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


def test_a_folder_of_somebody_else_is_read_and_what_is_not_allowed_is_an_error_in_words():
    # In no folder of pytest's, which nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(open_rows(folder), range(40), step=20)
        hidden = segments_of(folder)[1]
        with without_rights(folder):
            rows = open_rows(folder)
            check_all_right(rows, range(40))
            refused = [is_refused(act, errno.EACCES, set()) for act in acts_of(rows, start=100)]
            assert refused == [True] * len(refused)
        hidden.chmod(0)
        with without_rights(folder):
            error = read_all(open_rows(folder), range(40)).error
            assert re.match(rf"cannot (read|map) {hidden}: .*Permission denied", str(error))
        rows.publish()
        check_all_right(open_rows(folder), [*range(40), *range(100, 100 + 2 * PART)])


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
    told = all_told(reader)
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


@pytest.mark.slow
def test_seven_thousand_small_segments_leave_maps_for_the_rest_of_the_process(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    count, at_once = 7000, 500
    folder = tmp_path / WORLDS[0]
    folder.mkdir()
    for begin in range(0, count, at_once):  # apart, since a writer looks at all segments that are there
        part = tmp_path / "part"
        write(open_rows(part), range(begin, begin + at_once), step=1)
        for path in [*segments_of(part), part / WORLDS[0] / "about.json"]:
            path.rename(folder / path.name)
        shutil.rmtree(part)
    process, reader = start(forkserver, read_very_many, str(tmp_path), count)
    told = all_told(reader)
    process.join()
    assert process.exitcode == 0
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert told[0] < limit / 2
    figure(segments=count, maps=told[0], of_at_most=limit)


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("sound")
    write_store(folder)
    return files_of(folder)


OF_ANOTHER = [
    "a segment of another model",
    "two manifests swapped",
    "probes swapped",
    "about.json of two models swapped",
    "folders of two models swapped",
]
"""Damage whose files are sound by themselves, and lie where they do not belong."""


def test_of_1000_damages_none_is_served_and_what_is_sound_goes_on(tmp_path: Path, sound: Files, figure: Figure):
    fates = fates_of(tmp_path, sound, {kind: share for kind, share in SHARES.items() if kind not in OF_ANOTHER})
    assert not fates["served wrong"]
    assert fates["found by reading"] > 500
    figure(damages=fates.total(), **fates)


@pytest.mark.parametrize("kind", OF_ANOTHER)
def test_files_of_another_model_or_data_set_are_not_served(tmp_path: Path, sound: Files, kind: str, figure: Figure):
    fates = fates_of(tmp_path, sound, {kind: SHARES[kind]})
    assert not fates["served wrong"]
    figure(damages=fates.total(), **fates)


def fates_of(tmp_path: Path, sound: Files, shares: dict[str, int]) -> Counter[str]:
    """Damage a store so many times in each way: how often what became of it."""
    draw, total = random.Random(1000), Counter[str]()
    put(tmp_path, sound)
    for kind, share in shares.items():
        found = Counter[str]()
        for _ in range(share):
            damage = draw_damage(sound, kind, draw)
            put(tmp_path, damage.files, sound)
            found[fate_of(tmp_path, damage, sound)] += 1
            put(tmp_path, sound, files_of(tmp_path))
        print(f"\n{kind}: {dict(found)}", end="")
        total += found
    return total


def fate_of(folder: Path, damage: Damage, sound: Files) -> str:
    """What became of a damage; asserts that what it has not touched goes on."""
    outcome = judge(folder)
    if outcome.reading.wrong or outcome.documents_wrong:
        return "served wrong"
    assert_sound_files_stayed(folder, outcome, damage)
    if damage.kind in OF_ANOTHER and outcome.verify_error is not None:
        put(folder, sound, files_of(folder))  # whoever has exchanged folders or about.json puts them back
    elif outcome.verify_error is not None:
        restore_by_hand(folder, outcome.verify_error, damage, sound)
    after = read_all(open_rows(folder), EVERYTHING)
    assert not after.wrong | after.refused, (damage.what, after)
    untouched = [n for n in sound if is_segment(n) and n.startswith(WORLDS[0]) and n not in damage.touched]
    assert len(after.right) >= sum(rows_of(sound[name]) for name in untouched), (damage.what, after)
    if outcome.refused:
        return "found by reading"
    if outcome.set_aside or outcome.verify_error:
        return "found by verify"
    return "rows missing, as if never written" if after.missed else "harmless"


def assert_sound_files_stayed(folder: Path, outcome: Outcome, damage: Damage) -> None:
    """Only what was damaged is set aside."""
    assert outcome.set_aside <= damage.touched, f"{damage.what}: {outcome.set_aside} set aside"


def restore_by_hand(folder: Path, error: StoreError, damage: Damage, sound: Files) -> None:
    """Where verify cannot judge, it names the file, and what to do with it."""
    (name,) = (name for name in damage.touched if str(folder / name) in str(error))
    assert "restore it" in str(error) or "upgrade torchrecycle" in str(error) or "are asked for" in str(error), error
    if name in sound:
        (folder / name).write_bytes(sound[name])


def rows_of(segment: bytes) -> int:
    """How many rows a segment has."""
    return json.loads(segment[8 : 8 + int.from_bytes(segment[:8], "little")])["keys"]["shape"][0]


def test_a_flipped_bit_in_a_segment_of_many_blocks_is_found_and_the_other_blocks_are_read(tmp_path: Path):
    draw, count = random.Random(3), 3000
    write(open_rows(tmp_path), range(count))
    files = files_of(tmp_path)
    (name,) = (name for name in files if is_segment(name))
    assert len(files[name]) > 5 * 64 * 1024
    for _ in range(15):
        damage = draw_damage(files, "a bit of a row, a key or a sum", draw)
        put(tmp_path, damage.files, files)
        rows = open_rows(tmp_path)
        reading = read_all(rows, range(count))
        assert not reading.wrong, damage.what
        assert reading.refused or reading.error, damage.what
        assert len(reading.refused) == count or len(reading.right) > count / 2
        assert rows.verify().damaged == (str(tmp_path / name),)
        assert not len(rows)
        put(tmp_path, files, files_of(tmp_path))


TINY = (LeafSpec((4,), False, torch.int32),)
MANY = 200_064
"""A store of more than 200,000 keys has an index on disk."""


def tiny_leaves(numbers: np.ndarray, world: int) -> list[torch.Tensor]:
    return [torch.from_numpy(numbers)[:, None].int() * 2 + torch.arange(4, dtype=torch.int32) + world * 10**6]


def tiny_keys(numbers: np.ndarray) -> np.ndarray:
    """Keys as spread as hashes are, made faster."""
    halves = [numbers.astype(np.uint64) * np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)]
    return np.stack(halves, 1).view(np.uint8)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two models with 200,000 rows each in three segments, and the index of each."""
    folder = tmp_path_factory.mktemp("indexed")
    for world, fingerprint in enumerate(WORLDS):
        rows = FolderStore(folder).rows(fingerprint, TINY, {})
        for numbers in np.split(np.arange(MANY), 3):
            rows.append(tiny_keys(numbers), tiny_leaves(numbers, world))
            rows.publish()
        assert (folder / fingerprint / INDEX).is_file()
    return files_of(folder)


INDEX_DAMAGE = ["flip", "cut", "gone", "link", "other model's", "segment gone", "segments swapped", "segment new"]


@pytest.mark.parametrize("how", INDEX_DAMAGE)
def test_a_damaged_or_stale_index_is_worth_nothing_and_never_gives_another_row(
    tmp_path: Path, indexed: Files, how: str
):
    draw = random.Random(how)
    asked = np.array(sorted(draw.sample(range(MANY), 3000)))
    for number in range(12 if how == "flip" else 4):
        folder = tmp_path / f"{number}"
        put(folder, indexed)
        lost = damage_index(folder, how, draw)
        rows = FolderStore(folder).rows(WORLDS[0], TINY, {})
        try:
            assert served(rows, asked).sum() >= len(asked) * (MANY - lost) / MANY * 0.9
        except StoreError:
            if how not in ("segments swapped", "segment new"):
                raise
        report = rows.verify()
        assert {Path(name).name for name in report.damaged} <= {INDEX}
        after = FolderStore(folder).rows(WORLDS[0], TINY, {})
        assert served(after, asked).sum() >= len(asked) * (MANY - lost) / MANY * 0.9
        shutil.rmtree(folder)


def damage_index(folder: Path, how: str, draw: random.Random) -> int:
    """Damage an index, or make it stale. How many rows are lost by it."""
    path, segments = folder / WORLDS[0] / INDEX, segments_of(folder)
    data = path.read_bytes()
    if how == "flip":
        place = draw.choice([draw.randrange(len(data)), draw.randrange(len(data[:4096].rstrip()))])
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
    elif how == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif how == "gone":
        path.unlink()
    elif how == "link":
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    elif how == "other model's":
        shutil.copy(folder / WORLDS[1] / INDEX, path)
    elif how == "segment gone":
        draw.choice(segments).unlink()
        return MANY // 3
    elif how == "segments swapped":
        swap(*draw.sample(segments, 2))
    else:  # the same rows in another order, under the name that the index knows
        target = draw.choice(segments)
        numbers = np.split(np.arange(MANY), 3)[segments.index(target)][::-1].copy()
        rows = FolderStore(folder / "new").rows(WORLDS[0], TINY, {})
        rows.append(tiny_keys(numbers), tiny_leaves(numbers, 0))
        rows.publish()
        shutil.move(segments_of(folder / "new")[0], target)
        shutil.rmtree(folder / "new")
    return 0


def served(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    """Which of the rows are found; asserts that each of them is right."""
    found = rows.lookup(tiny_keys(numbers))
    there = found >= 0
    (leaf,) = rows.gather(found[there])
    assert isinstance(leaf, torch.Tensor)
    assert torch.equal(leaf, tiny_leaves(numbers[there], 0)[0])
    return there


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_segment_that_cannot_be_opened_is_an_error_each_time_until_it_is_set_aside(
    tmp_path: Path, sound: Files, number: int
):
    put(tmp_path, sound)
    path = segments_of(tmp_path)[number]
    path.write_bytes(path.read_bytes()[:-1])
    rows = open_rows(tmp_path)
    for _ in range(3):
        reading = read_all(rows, EVERYTHING)
        assert reading.error is not None
        assert not reading.missed
    rows.verify()
    assert len(read_all(rows, EVERYTHING).right) == len(EVERYTHING) - SIZES[number]


WHILE_RUNNING = [
    "two segments swapped",
    "a segment renamed to another's name",
    "a segment of another model",
    "a file cut short",
    "a bit of a row, a key or a sum",
]


@pytest.mark.parametrize("kind", WHILE_RUNNING)
def test_files_that_change_their_names_while_a_process_runs_are_not_served_under_old_locations(
    tmp_path: Path, sound: Files, kind: str
):
    draw = random.Random(7)
    for number in range(25):
        folder = tmp_path / str(number)
        put(folder, sound)
        rows = open_rows(folder)
        locations = rows.lookup(keys_of(EVERYTHING))
        read = draw.sample(EVERYTHING, draw.choice([0, 5, 20]))
        assert gather_all(rows, read, locations[read]).right == set(read)
        # What a worker gets when it is spawned: names and numbers, and no map.
        copy = pickle.dumps(rows)
        damage = draw_damage(sound, kind, draw)
        put(folder, damage.files, sound)
        for reader in (rows, pickle.loads(copy)):
            reading = gather_all(reader, EVERYTHING, locations)
            assert not reading.wrong, f"{damage.what}: served {reading}"
            untouched = [name for name in sound if is_segment(name) and name not in damage.touched]
            assert reading.right or not untouched
            with contextlib.suppress(StoreError):
                reader.refresh()
            assert not read_all(reader, EVERYTHING).wrong, damage.what
        shutil.rmtree(folder)


@pytest.mark.parametrize("read_before", [0, len(EVERYTHING)])
def test_a_segment_written_over_in_place_is_not_served_after_a_refresh(tmp_path: Path, sound: Files, read_before: int):
    put(tmp_path, sound)
    rows = open_rows(tmp_path)
    locations = rows.lookup(keys_of(EVERYTHING))
    assert gather_all(rows, EVERYTHING[:read_before], locations[:read_before]).right == set(range(read_before))
    one, other = [path for path in segments_of(tmp_path) if rows_of(path.read_bytes()) == SIZES[0]][:2]
    time.sleep(0.02)  # a clock of files may be this coarse
    with open(other, "r+b") as file:  # as `cp` does: no new file, and never shorter than its map
        file.write(one.read_bytes())
    with contextlib.suppress(DamagedRowError):  # if the files are not of the same length
        rows.refresh()
    assert not read_all(rows, EVERYTHING).wrong
    assert not gather_all(rows, EVERYTHING, locations).wrong


def test_spawned_workers_serve_no_other_row_when_files_are_swapped_cut_and_deleted_under_them(tmp_path: Path):
    folder, size = tmp_path / "store", 6
    numbers = list(range(12 * size))
    write(open_rows(folder), numbers, step=size)
    write(open_rows(folder, world=1), numbers, world=1, step=size)
    rows = open_rows(folder)
    paths, others = segments_of(folder), segments_of(folder, world=1)
    loader = torch.utils.data.DataLoader(
        Gathering(rows, numbers, rows.lookup(keys_of(numbers))),
        batch_size=size,
        num_workers=2,
        prefetch_factor=1,
        multiprocessing_context="spawn",
        collate_fn=first,
    )
    # Between the lookup of the main process and the opening in a worker:
    swap(paths[1], paths[2])
    shutil.copy(others[3], paths[3])
    paths[4].unlink()
    readings = []
    for number, reading in enumerate(loader):
        readings.append(reading)
        if number == 5:  # at most two batches are on their way
            swap(paths[9], paths[10])
            shutil.rmtree(folder)
    assert not [reading.wrong for reading in readings if reading.wrong]
    right = [len(reading.right) == size for reading in readings]
    assert right[0]
    assert right[5]
    assert not any(right[1:5])  # what a worker had mapped before the folder went stays right
    assert all(reading.error for reading, is_right in zip(readings, right, strict=True) if not is_right)


def swap(one: Path, other: Path) -> None:
    """Let two files change their names."""
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def test_what_was_checked_once_is_not_checked_again(tmp_path: Path, figure: Figure):
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(num_classes=4), torch.randn(48, 3, 112, 112)
    data = TensorDataset(images, labels(48))
    with recycle(model, images[:2], cut="layer2", store=tmp_path) as filled:
        filled.fill(data)
    recycling = recycle(model, images[:2], cut="layer2", store=tmp_path)
    loader, rows = recycling.loader(data, batch_size=16, shuffle=True), recycling.source.rows
    seconds, verified = [], []
    for _ in range(2):
        began = time.perf_counter()
        for batch, targets in loader:
            torch.nn.functional.cross_entropy(model(batch), targets).backward()
        seconds.append(time.perf_counter() - began)
        verified.append(rows.verified_bytes)
    nbytes = 48 * 128 * 14 * 14 * 4
    assert nbytes <= verified[0] < 2 * nbytes
    assert verified[1] == verified[0]
    # What checking takes: the first pass of a fresh reader less a later one, beside an epoch of training.
    reader = open_store(tmp_path).existing(recycling.fingerprint)
    locations = reader.lookup(recycling.source.keys(recycling.source.rule(images)))
    passes = []
    for _ in range(4):
        began = time.perf_counter()
        for start in range(0, 48, 16):
            reader.gather(locations[start : start + 16])
        passes.append(time.perf_counter() - began)
    share = (passes[0] - min(passes)) / seconds[0]
    figure(percent_of_the_first_epoch=round(100 * share, 2), bytes_checked=verified[0], in_later_epochs=0)


def test_threads_gather_while_another_publishes_refreshes_and_verifies(tmp_path: Path, forkserver: Any, figure: Figure):
    process, reader = start(forkserver, read_in_threads, str(tmp_path))
    told = all_told(reader)
    process.join()
    assert process.exitcode == 0
    ((batches, wrong, errors),) = told
    assert not errors
    assert batches > 100
    assert wrong == 0
    figure(batches=batches)


# Links


@pytest.mark.parametrize(
    "name",
    [
        "segment",
        "about.json",
        "manifests/train.safetensors",
        "probe.safetensors",
        "manifests",
        pytest.param("", id="the whole fingerprint"),
    ],
)
def test_a_link_out_of_the_store_is_neither_read_nor_written_through(tmp_path: Path, name: str):
    folder, outside = tmp_path / "store", tmp_path / "outside"
    write_store(folder)
    path = segments_of(folder)[0] if name == "segment" else folder / WORLDS[0] / name
    path.rename(outside)
    path.symlink_to(outside, target_is_directory=outside.is_dir())
    before = content_of(outside)
    reading = Reading()
    refusal = error_of(lambda: reading.merge(read_all(open_rows(folder), EVERYTHING)))
    documents = Counter[str]()
    refusals = [refusal, error_of(lambda: documents.update(read_documents(open_rows(folder), 0)))]
    assert not reading.wrong
    assert not documents["wrong"]
    if name in ("", "about.json"):
        assert not reading.right
        assert any(refusals)
    elif name == "segment":
        assert len(reading.right) <= len(EVERYTHING) - SIZES[0]
    else:
        assert documents["right"] < 3
    # Whatever verifying and writing do, what is outside stays as it is, and so does the other model.
    for act in (
        lambda: open_store(folder).existing(WORLDS[0]).verify(),
        lambda: write(open_rows(folder), range(1000, 1010)),
        lambda: open_rows(folder).write_manifest("train", {"targets": torch.zeros(3)}, {}),
        lambda: open_rows(folder).write_manifest("other", {"targets": torch.zeros(3)}, {}),
        lambda: open_rows(folder).write_probe({"input": torch.zeros(3)}),
    ):
        error_of(act)
    assert content_of(outside) == before
    check_all_right(open_rows(folder, world=1), EVERYTHING, world=1)


@pytest.mark.parametrize("name", ["claims", "manifests", INDEX, "probe.safetensors", "about.json"])
def test_filling_writes_nothing_through_links(tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"somebody's")
    _, recycling = attached(tmp_path / "store")
    folder = tmp_path / "store" / recycling.fingerprint
    folder.mkdir(parents=True)
    (folder / name).symlink_to(outside / "file" if "." in name else outside)
    with contextlib.suppress(StoreError):
        recycling.fill(TensorDataset(X, Y), batch_size=BATCH)
    assert files_of(outside) == {"file": b"somebody's"}


def content_of(path: Path) -> dict[str, bytes] | bytes:
    """What a file holds, or the files of a folder."""
    return files_of(path) if path.is_dir() else path.read_bytes()


# Maps


def test_a_file_cut_under_a_map_ends_the_process_that_reads_it_and_harms_nobody_else(
    tmp_path: Path, forkserver: Any, figure: Figure
):
    write(open_rows(tmp_path), range(300), step=200)
    here, there = forkserver.Pipe()
    process = forkserver.Process(target=read_what_is_cut, args=(str(tmp_path), 300, there))
    process.start()
    there.close()
    assert here.recv() == 2
    cut = max(segments_of(tmp_path), key=lambda path: path.stat().st_size)
    os.truncate(cut, 4096)
    here.send("go on")
    process.join()
    told = all_told(here)
    # The system ends a process that reads a map behind the end of its file. Nothing can be said in words then.
    assert process.exitcode == -signal.SIGBUS or (process.exitcode == 0 and told[0][1] == 0)
    rows = open_rows(tmp_path)
    assert rows.verify().damaged == (str(cut),)
    reading = read_all(rows, range(300))
    assert len(reading.right) == 100
    assert len(reading.missed) == 200
    write(rows, range(300))
    check_all_right(open_rows(tmp_path), range(300))
    figure(ended_by=signal.Signals(-process.exitcode).name if process.exitcode else "an error in words")


# The whole stack: a model in training over a store that fails


X, Y = pictures(120), labels(120)
BATCH = 16


def attached(folder: Path, model: torch.nn.Module | None = None) -> tuple[torch.nn.Module, Recycling]:
    """A model whose rows of 1 KB lie in segments of 16."""
    model = residual() if model is None else model
    return model, recycle(model, X[:2], cut=CUT, store=FolderStore(folder, segment_bytes=16 * 1024))


def train_and_compare(model: torch.nn.Module, loader: Any, x: torch.Tensor, y: torch.Tensor) -> int:
    """One epoch with gradients. Asserts that each output is what the whole model gives; how many objects came."""
    seen = 0
    for images, targets in loader:
        outputs = model(images)
        torch.nn.functional.cross_entropy(outputs, targets).backward()
        part = slice(seen, seen + len(targets))
        assert torch.equal(targets, y[part])
        with torch.no_grad():
            assert torch.allclose(outputs, whole_model()(x[part]), atol=1e-5)
        seen += len(targets)
    return seen


def train_in_full(model: torch.nn.Module, recycling: Recycling, *, epochs: int = 1) -> None:
    """Epochs over the whole data set with one loader, each compared."""
    loader = recycling.loader(TensorDataset(X, Y), batch_size=BATCH)
    for _ in range(epochs):
        assert train_and_compare(model, loader, X, Y) == len(X)


@functools.cache
def whole_model() -> torch.nn.Module:
    """The same model, recycled by nobody."""
    return residual()


@pytest.mark.parametrize("room", [0, 3, 20, 40])
def test_a_full_disk_ends_filling_with_one_warning_and_training_goes_on(tmp_path: Path, room: int, figure: Figure):
    with small_disk(tmp_path / "disk") as disk:
        Ballast(disk).leave_pages(room)
        model, recycling = attached(disk / "store")
        with pytest.warns(RecycleWarning, match=r"No space left on device") as caught:
            train_in_full(model, recycling, epochs=2)
        assert len(caught) == 1, [str(warning.message) for warning in caught]
        figure(pages_free=room, hits=recycling.stats.hits, misses=recycling.stats.misses)
        recycling.detach()


def test_a_read_only_store_serves_what_it_has_and_what_it_lacks_is_computed(tmp_path: Path, figure: Figure):
    with small_disk(tmp_path / "disk") as disk:
        _, first_one = attached(disk / "store")
        first_one.fill(TensorDataset(X[:72], Y[:72]), batch_size=BATCH)
        with read_only(disk):
            model, recycling = attached(disk / "store")
            with pytest.warns(RecycleWarning, match=r"Read-only file system") as caught:
                train_in_full(model, recycling, epochs=2)
            assert len(caught) == 1, [str(warning.message) for warning in caught]
            assert recycling.stats.hits >= 2 * 72
            figure(hits=recycling.stats.hits, misses=recycling.stats.misses)
            recycling.detach()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_deleted_while_it_is_read_never_changes_what_the_model_gives(tmp_path: Path, workers: int):
    model, recycling = attached(tmp_path)
    recycling.fill(TensorDataset(X, Y), batch_size=BATCH)
    arguments = {"multiprocessing_context": "spawn", "prefetch_factor": 1} if workers else {}
    loader = recycling.loader(TensorDataset(X, Y), batch_size=BATCH, num_workers=workers, **arguments)

    def deleting() -> Iterator[Any]:
        for number, batch in enumerate(loader):
            yield batch
            if number == 1:
                shutil.rmtree(tmp_path / recycling.fingerprint)

    # An error in words, or an epoch that goes on.
    with contextlib.suppress(StoreError):
        assert train_and_compare(model, deleting(), X, Y) == len(X)
    train_in_full(model, recycling)


def test_what_was_deleted_under_a_loader_is_filled_anew(tmp_path: Path):
    model, recycling = attached(tmp_path)
    train_in_full(model, recycling)
    shutil.rmtree(tmp_path / recycling.fingerprint)
    train_in_full(model, recycling, epochs=2)
    assert len(recycling.source.rows) == len(X)
    assert len(recycle(residual(), X[:2], cut=CUT, store=tmp_path).source.rows) == len(X)


def test_damage_found_in_training_is_an_error_that_verify_mends(tmp_path: Path):
    attached(tmp_path)[1].fill(TensorDataset(X, Y), batch_size=BATCH)
    model, recycling = attached(tmp_path)
    path = sorted((tmp_path / recycling.fingerprint).glob("*-*.safetensors"))[2]
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(DamagedRowError, match="store verify"):
        train_in_full(model, recycling)
    assert recycling.source.rows.verify().damaged == (str(path),)
    train_in_full(model, recycling)
    assert recycling.stats.misses == 16


def test_folders_of_two_models_that_have_changed_their_names_are_refused(tmp_path: Path):
    folders = []
    for seed in range(2):
        _, recycling = attached(tmp_path, residual(seed))
        recycling.fill(TensorDataset(X, Y))
        folders.append(tmp_path / recycling.fingerprint)
    swap(*folders)
    with pytest.raises(StoreError, match=r"what it computes has changed|belongs to"):
        train_in_full(*attached(tmp_path))


def test_manifests_of_two_data_sets_that_have_changed_their_names_give_no_wrong_target(tmp_path: Path):
    other = Y.clone()
    other[1] = (other[1] + 1) % 4  # where a new loader does not look
    _, recycling = attached(tmp_path)
    for targets in (Y, other):
        recycling.fill(TensorDataset(X, targets))
    manifests = list((tmp_path / recycling.fingerprint / "manifests").iterdir())
    swap(*manifests)
    model, recycling = attached(tmp_path)
    with contextlib.suppress(StoreError):
        train_in_full(model, recycling)


def test_a_data_set_that_grew_fills_what_is_new_and_another_order_or_a_subset_nothing(tmp_path: Path):
    computed = []
    for x, y in (
        (X[:80], Y[:80]),
        (X, Y),
        (X.flip(0), Y.flip(0)),
        (X[7:90:3], Y[7:90:3]),
        (torch.cat([X[50:], X[:50]]), torch.cat([Y[50:], Y[:50]])),
    ):
        model, recycling = attached(tmp_path)  # as a new process would
        computed.append(recycling.fill(TensorDataset(x, y), batch_size=BATCH).computed)
        assert train_and_compare(model, recycling.loader(TensorDataset(x, y), batch_size=BATCH), x, y) == len(x)
        recycling.detach()
    assert computed == [80, 40, 0, 0, 0]
