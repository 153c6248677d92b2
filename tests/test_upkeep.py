"""Keeping a store in order: what lies there, merging, evicting, erasing, comparing, removing."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from faults import truth
from faults.disks import without_rights
from faults.workers import Gathering, first
from processes import forkserver_context
from torchrecycle import DamagedRowError, KeyTypeError, StoreError, recycle
from torchrecycle.fingerprint import take_fingerprint
from torchrecycle.store import FolderStore, LeafSpec, MemoryStore, Rows, open_store
from torchrecycle.store.holdings import OLD_SECONDS
from torchrecycle.store.merging import open_sources
from torchrecycle.store.room import Room
from torchrecycle.store.shelf import FolderShelf
from torchrecycle.store.sizes import parse_bytes
from torchrecycle.store.upkeep import ShelfStore
from torchrecycle.testing.store_contract import (
    ABOUT,
    FINGERPRINT,
    SPECS,
    assert_holds,
    assert_same,
    keys_of,
    leaves_of,
)

OTHER = "fedcba98" * 4
SMALL = 40_000
"""Bytes of rows in a full segment here: some 300 rows."""


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store", segment_bytes=SMALL)


@pytest.fixture(params=["folder", "memory"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> ShelfStore:
    if request.param == "memory":
        return MemoryStore(segment_bytes=SMALL)
    return FolderStore(tmp_path / "store", segment_bytes=SMALL)


def rows_of(store: ShelfStore, fingerprint: str = FINGERPRINT) -> Rows:
    return store.rows(fingerprint, SPECS, ABOUT)


def fill(rows: Rows, numbers: range, step: int = 1000) -> None:
    for start in range(numbers.start, numbers.stop, step):
        part = range(start, min(start + step, numbers.stop))
        rows.append(keys_of(part), leaves_of(part))
        rows.publish()


def fill_twice(store: ShelfStore, numbers: range, step: int) -> None:
    """Two writers that do not know of each other."""
    writers = [rows_of(store), rows_of(store)]
    for rows in writers:
        rows.lookup(keys_of([0]))
    for start in range(numbers.start, numbers.stop, step):
        part = range(start, min(start + step, numbers.stop))
        for rows in writers:
            rows.append(keys_of(part), leaves_of(part))
        for rows in writers:
            rows.publish()


def segments_of(folder: str | Path, fingerprint: str = FINGERPRINT) -> list[Path]:
    return sorted((Path(folder) / fingerprint).glob("*-*.safetensors"))


def age(path: Path, seconds: float) -> None:
    """Let a file be as old as that."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def flip_bit(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


# What lies there


def test_ls_says_what_is_kept(either: ShelfStore):
    rows = either.rows(FINGERPRINT, SPECS, {**ABOUT, "precision": "bfloat16"})
    fill(rows, range(20), step=5)
    rows.write_manifest("a" * 32, {"keys": torch.from_numpy(keys_of(range(20)))}, {"name": "train"})
    fill(rows_of(either, OTHER), range(3))
    held, other = either.ls()
    assert held.fingerprint == FINGERPRINT
    assert (held.model, held.cut, held.precision) == ("a small one", "layer2", "bfloat16")
    assert (held.rows, held.segments) == (20, 4)
    assert [str(one) for one in held.data_sets] == ["train (20)"]
    assert held.used is not None
    assert abs(held.used - time.time()) < 60
    assert not held.damaged
    assert not held.problem
    assert (other.fingerprint, other.rows, other.precision, other.data_sets) == (OTHER, 3, "?", ())


def test_ls_adds_up_all_files(store: FolderStore):
    fill(rows_of(store), range(20), step=5)
    files = [path for path in (Path(store.url) / FINGERPRINT).rglob("*") if path.is_file()]
    assert store.ls()[0].nbytes == sum(path.stat().st_size for path in files)


def test_ls_lists_also_what_cannot_be_read_and_says_why(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(20), step=5)
    rows.write_manifest("a" * 32, {"keys": torch.from_numpy(keys_of(range(20)))}, {})
    path = segments_of(store.url)[0]
    path.write_bytes(path.read_bytes()[:100])
    manifest = Path(rows.url) / "manifests" / f"{'a' * 32}.safetensors"
    manifest.write_bytes(b"nothing")
    fill(rows_of(store, OTHER), range(3))
    about = Path(store.url) / OTHER / "about.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 99'))
    held, newer = store.ls()
    assert held.rows == 15
    assert "is damaged" in held.problem
    assert str(held.data_sets[0]) == f"{'a' * 8} (not readable)"
    assert "upgrade torchrecycle" in newer.problem
    assert newer.rows == 0


def test_a_fingerprint_without_about_is_seen_until_a_fill_writes_it_anew(store: FolderStore):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(images, torch.arange(6))
    with recycle(small(), images, cut="act", store=store) as recycling:
        recycling.fill(dataset)
        about = Path(store.url) / recycling.fingerprint / "about.json"
    size = store.ls()[0].nbytes - about.stat().st_size
    about.unlink()
    for (held,) in (store.ls(), [store.stat(about.parent.name).holding]):
        assert (held.segments, held.nbytes) == (1, size)
        assert "no about.json: filling writes that anew" in held.problem
    (found,) = store.verify()
    assert not found.ok
    with recycle(small(), images, cut="act", store=store) as recycling:
        assert recycling.fill(dataset).computed == 0
    assert about.exists()
    about.unlink()
    assert store.evict(size).fits
    assert store.evict(0).fingerprints == (about.parent.name,)
    assert not store.ls()


def test_a_fingerprint_that_only_its_owner_may_read_does_not_close_the_store_to_others():
    # In no folder of pytest's, which nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        mine, private = FINGERPRINT, "0" * 32
        for fingerprint in (mine, private):
            fill(rows_of(FolderStore(name), fingerprint), range(10))
        with without_rights(Path(name)):
            assert [held.problem for held in FolderStore(name).ls()] == ["", ""]
        Path(name, "photos").mkdir()
        with without_rights(Path(name), private, "photos"):
            store = FolderStore(name)
            assert_holds(rows_of(store, mine), range(10))
            hidden, held = store.ls()
            assert (hidden.fingerprint, held.rows) == (private, 10)
            assert hidden.problem.endswith(f"{private}: Permission denied")
            assert [found.ok for found in store.verify()] == [False, True]
            assert "Permission denied" in store.forget(keys_of([77])).problems[0]
            for refused in (lambda: store.evict(0), lambda: store.rm(private), lambda: store.compact(private)):
                with pytest.raises(StoreError, match=f"{private}.*Permission denied"):
                    refused()
            with pytest.raises(StoreError, match="no fingerprint of"):
                store.rm("photos")
        Path(name, mine).rename(Path(name, "old"))
        with without_rights(Path(name), private, "photos"):
            assert FolderStore(name).fingerprints() == [private, "old"]


def test_a_disk_of_its_own_is_a_store_from_the_start():
    with tempfile.TemporaryDirectory() as name:
        Path(name, "lost+found").mkdir()
        with without_rights(Path(name), "lost+found"):
            assert FolderStore(name).ls() == []


def test_stat_tells_everything_of_one(store: FolderStore):
    fill(rows_of(store), range(20), step=5)
    (Path(store.url) / FINGERPRINT / "x-1.safetensors.tmp-7-ab").write_bytes(b"half")
    details = store.stat(FINGERPRINT[:5])
    assert details.about == ABOUT
    assert details.leaves == SPECS
    assert sorted(segment.rows for segment in details.segments) == [5, 5, 5, 5]
    assert not any(segment.merged for segment in details.segments)
    assert [(left.kind, left.nbytes) for left in details.leftovers] == [("half-written", 4)]
    assert set(details.others) == {"about.json"}


def test_a_fingerprint_may_be_shortened_while_it_is_the_only_one(store: FolderStore):
    for name in ("abcd1", "abcd2", "abcd"):
        fill(rows_of(store, name), range(3))
    assert store.resolve("abcd1") == "abcd1"
    assert store.resolve("abcd") == "abcd"
    with pytest.raises(StoreError, match=r"3 fingerprints of .* begin with 'abc': abcd, abcd1, abcd2. Give more"):
        store.stat("abc")
    with pytest.raises(StoreError, match=r"no fingerprint of .* is, or begins with, 'x': it holds abcd, abcd1"):
        store.stat("x")
    with pytest.raises(StoreError, match="no fingerprint"):
        store.rm("")


def test_looking_writes_nothing(store: FolderStore):
    fill(rows_of(store), range(20), step=5)
    files = list(Path(store.url).rglob("*"))
    for path in files:
        age(path, 50_000)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_atime_ns) for path in files if path.is_file()]
    store.ls()
    store.stat(FINGERPRINT)
    store.diff(FINGERPRINT, FINGERPRINT)
    assert all(one.ok for one in store.verify())
    assert sorted(Path(store.url).rglob("*")) == sorted(files)
    assert [(path, path.stat().st_mtime_ns, path.stat().st_atime_ns) for path, _, _ in before] == before


# Verifying


def test_verify_goes_over_all_and_names_leftovers(store: FolderStore):
    fill(rows_of(store), range(20), step=5)
    fill(rows_of(store, OTHER), range(3))
    flip_bit(segments_of(store.url)[0])
    half = Path(store.url) / OTHER / "x-1.safetensors.tmp-7-ab"
    half.write_bytes(b"half")
    age(half, 2 * OLD_SECONDS)
    claims = Path(store.url) / OTHER / "claims"
    claims.mkdir()
    (claims / ("0" * 16)).write_bytes(b"claim")
    wrong, sound = store.verify()
    assert not wrong.ok
    assert wrong.report is not None
    assert (len(wrong.report.damaged), wrong.report.rows) == (1, 15)
    assert [left.kind for left in wrong.leftovers] == ["damaged"]
    assert sound.ok
    assert [(left.kind, left.is_dead) for left in sound.leftovers] == [("claim", False), ("half-written", True)]
    assert [one.ok for one in store.verify()] == [True, True]
    assert [one.fingerprint for one in store.verify(OTHER[:4])] == [OTHER]


def test_verify_sets_a_link_in_place_of_the_manifests_aside(store: FolderStore, tmp_path: Path):
    rows = rows_of(store)
    fill(rows, range(3))
    (tmp_path / "outside").mkdir()
    link = Path(rows.url) / "manifests"
    link.symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(StoreError, match="manifests is no plain file"):
        rows.read_manifest("train")
    (found,) = store.verify()
    assert found.report is not None
    assert found.report.damaged == (str(link),)
    rows.write_manifest("train", {"keys": torch.from_numpy(keys_of(range(3)))}, {})
    assert rows.read_manifest("train") is not None
    assert not list((tmp_path / "outside").iterdir())


def test_verify_says_of_an_unreadable_about_what_to_do(store: FolderStore):
    fill(rows_of(store), range(3))
    (Path(store.url) / FINGERPRINT / "about.json").write_text("{")
    (found,) = store.verify()
    assert not found.ok
    assert "about.json is not readable" in str(found)


# Compacting


def test_compact_merges_small_segments_and_drops_what_came_twice(either: ShelfStore):
    fill_twice(either, range(300), step=40)
    reader = rows_of(either)
    before = reader.lookup(keys_of(range(300)))
    (report,) = either.compact()
    assert report.segments_before == 16
    assert report.segments < 5
    assert report.doubles == 300
    assert report.nbytes < report.nbytes_before / 2
    assert_holds(rows_of(either), range(300))
    assert rows_of(either).verify().rows == 300
    # Who had looked up before goes on, and so does who looks again.
    assert_same(reader.gather(before), leaves_of(range(300)))
    reader.refresh()
    assert_holds(reader, range(300))
    assert "nothing to do" in str(either.compact()[0])


def test_compact_leaves_full_segments_alone(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(600), step=300)
    full = segments_of(store.url)
    fill(rows, range(600, 700), step=20)
    (report,) = store.compact()
    assert report.segments == 3
    assert set(full) < set(segments_of(store.url))


def test_a_row_that_is_in_a_full_segment_is_dropped_from_a_small_one(store: FolderStore):
    late = rows_of(store)
    late.lookup(keys_of([0]))
    fill(rows_of(store), range(300))
    fill(late, range(250, 310))
    store.compact()
    assert sum(source.segment.rows for source in open_sources(FolderShelf(Path(late.url)), SPECS)) == 310
    assert_holds(rows_of(store), range(310))


def test_compact_removes_what_killed_writers_left_and_nothing_of_living_ones(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(5))
    folder = Path(rows.url)
    (folder / "claims").mkdir()
    (folder / "manifests").mkdir()
    names = ["x-1.safetensors.tmp-7-ab", "claims/0123456789abcdef", "manifests/t.safetensors.tmp-7-ab"]
    for name in names:
        (folder / name).write_bytes(b"left")
        age(folder / name, 2 * OLD_SECONDS)
    (folder / "y-1.safetensors.tmp-7-ab").write_bytes(b"at work")
    (folder / "z-1.safetensors.damaged").write_bytes(b"set aside")
    away = Path(store.url) / f".removed-{OTHER}-ab"
    away.mkdir()
    (report,) = store.compact(FINGERPRINT)
    assert sorted(report.leftovers) == sorted(names)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {
        "about.json",
        "y-1.safetensors.tmp-7-ab",
        "z-1.safetensors.damaged",
        segments_of(store.url)[0].name,
    }
    assert away.exists()  # just begun, maybe


def test_a_damaged_row_stops_compact_and_nothing_is_lost(store: FolderStore):
    fill(rows_of(store), range(60), step=10)
    flip_bit(segments_of(store.url)[3])
    before = segments_of(store.url)
    with pytest.raises(DamagedRowError, match="store verify"):
        store.compact()
    assert segments_of(store.url) == before
    store.verify()
    (report,) = store.compact()
    assert report.segments == 1
    assert len(rows_of(store)) == 50


def test_when_rows_were_last_used_outlives_compact(store: FolderStore):
    fill(rows_of(store), range(60), step=10)
    for number, path in enumerate(segments_of(store.url)):
        age(path, 100_000 + number)
    store.compact()
    (path,) = segments_of(store.url)
    assert abs(time.time() - path.stat().st_atime - 100_000) < 60


def test_locations_from_before_find_their_rows_in_a_segment_that_was_merged_twice_from_their_own(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(60), step=10)
    store.compact()
    reader = rows_of(store)
    found = reader.lookup(keys_of(range(60)))
    fill(rows, range(60, 80), step=10)
    store.compact()
    stranger = rows_of(store)
    assert len(segments_of(store.url)) == 1
    assert_same(reader.gather(found), leaves_of(range(60)))
    assert_holds(stranger, range(80))


def test_workers_that_open_segments_late_find_them_merged(tmp_path: Path):
    rows = truth.open_rows(tmp_path)
    numbers = list(range(120))
    truth.write(rows, numbers, step=10)
    loader = torch.utils.data.DataLoader(
        Gathering(rows, numbers, rows.lookup(truth.keys_of(numbers))),
        batch_size=10,
        shuffle=True,
        num_workers=2,
        prefetch_factor=1,
        multiprocessing_context="spawn",
        collate_fn=first,
    )
    right: set[int] = set()
    for at, reading in enumerate(loader):
        assert reading.error is None, reading.error
        right |= reading.right
        if at == 0:
            (report,) = FolderStore(tmp_path).compact()
            assert report.segments == 1
    assert right == set(numbers)


def compact_until_killed(folder: str, told: Any) -> None:
    torch.set_num_threads(1)
    told.send("ready")
    FolderStore(folder, segment_bytes=SMALL).compact()
    told.send("done")


@pytest.fixture(scope="module")
def forkserver() -> Any:
    context = forkserver_context()
    return context


def test_a_compact_that_is_killed_at_any_moment_loses_nothing(tmp_path: Path, forkserver: Any):
    draw = random.Random(0)
    killed = 0
    store = FolderStore(tmp_path, segment_bytes=SMALL)
    for attempt in range(5):
        numbers = range(attempt * 300, (attempt + 1) * 300)
        fill_twice(store, numbers, step=60)
        reader, writer = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=compact_until_killed, args=(str(tmp_path), writer))
        process.start()
        writer.close()
        assert reader.recv() == "ready"
        time.sleep(draw.uniform(0.002, 0.03))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert all(one.ok for one in store.verify())
        assert_holds(rows_of(store), range(numbers.stop))
    assert killed > 2
    (report,) = store.compact()
    assert rows_of(store).verify().rows == 1500
    assert_holds(rows_of(store), range(1500))
    assert report.segments < 15


class _Stepping:
    """Runs two compacts in turns: each goes on after each of its writes and removals, in an order that is drawn."""

    def __init__(self, store: FolderStore, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
        self._then, self._deep = then, 0
        write, remove = FolderShelf.write, FolderShelf.remove

        def stepping_write(shelf: FolderShelf, name: str, packed: Any, **arguments: Any) -> None:
            write(shelf, name, packed, **arguments)
            self._step()

        def stepping_remove(shelf: FolderShelf, names: Any) -> None:
            for name in list(names):
                remove(shelf, [name])
                self._step()

        monkeypatch.setattr(FolderShelf, "write", stepping_write)
        monkeypatch.setattr(FolderShelf, "remove", stepping_remove)

    def _step(self) -> None:
        if self._deep < 2:
            self._deep += 1
            try:
                self._then()
            finally:
                self._deep -= 1


# Were it the name alone that decides, each of these would lose rows.
@pytest.mark.parametrize("seed", [81, 92, 93, 215])
def test_compacts_within_compacts_drop_no_last_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int):
    draw = random.Random(seed)
    # The order of names decides, so they are drawn as well.
    monkeypatch.setattr("secrets.token_hex", lambda nbytes: draw.randbytes(nbytes).hex())
    store = FolderStore(tmp_path, segment_bytes=SMALL)
    writers = [rows_of(store) for _ in range(3)]
    for rows in writers:
        rows.lookup(keys_of([0]))
    # Some are full, and are only written anew for what came twice.
    for rows in writers:
        start = draw.randrange(200)
        fill(rows, range(start, 700), step=draw.choice([150, 250, 400]))
    found = rows_of(store).lookup(keys_of(range(700)))
    wanted = np.flatnonzero(found >= 0).tolist()

    def another() -> None:
        if draw.random() < 0.4:
            store.compact()

    with monkeypatch.context() as patch:
        _Stepping(store, patch, another)
        store.compact()
    assert_holds(rows_of(store), wanted)
    store.compact()
    assert rows_of(store).verify().rows == len(wanted)


def test_compact_takes_little_memory(tmp_path: Path, forkserver: Any):
    reader, writer = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=peak_of_compact, args=(str(tmp_path), writer))
    process.start()
    writer.close()
    written, anonymous = reader.recv()
    process.join()
    assert written > 100 * 2**20
    assert anonymous < 20 * 2**20


def peak_of_compact(folder: str, told: Any) -> None:
    """Told: bytes that were merged, and bytes of anonymous memory that this took."""
    torch.set_num_threads(1)
    rows = FolderStore(folder).rows(FINGERPRINT, [LeafSpec((64, 1024), False, torch.float32)], {})
    for start in range(0, 480, 60):
        rows.append(keys_of(range(start, start + 60)), [torch.full((60, 64, 1024), float(start))])
        rows.publish()
    del rows
    limit = anonymous_bytes() + 20 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 20 * 2**20, -1))
    (report,) = FolderStore(folder).compact()
    assert report.segments == 1
    told.send((report.nbytes, max(0, anonymous_bytes() - limit + 20 * 2**20)))


def anonymous_bytes() -> int:
    return _status("RssAnon")


def data_bytes() -> int:
    return _status("VmData")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def test_a_store_of_format_1_is_listed_and_merged(tmp_path: Path):
    shutil.copytree(Path(__file__).parent / "golden" / "format1", tmp_path / "store")
    store = FolderStore(tmp_path / "store")
    (held,) = store.ls()
    assert (held.rows, held.segments, held.problem) == (12, 1, "")
    assert [str(one) for one in held.data_sets] == ["train (12)"]
    assert "does not say of which parts it is made" in store.diff(FINGERPRINT, FINGERPRINT).incomplete
    fill(rows_of(store), range(20))
    (report,) = store.compact()
    assert (report.segments_before, report.segments, report.doubles) == (2, 1, 0)
    assert_holds(rows_of(store), range(20))
    assert store.forget(keys_of([3])).rows == 1
    assert all(one.ok for one in store.verify())


# Evicting


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("500MB", 500_000_000), ("20 GB", 20_000_000_000), ("1.5GiB", 1_610_612_736), ("3k", 3000), ("17 B", 17), (5, 5)],
)
def test_sizes_are_read_as_people_write_them(text: str | int, nbytes: int):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "20 cows", "-5MB", "1e9", "5iB", "9" * 400, -1, True, None, 1.5])
def test_what_is_no_size_is_refused_in_words(text: Any):
    with pytest.raises(StoreError, match="is no size"):
        parse_bytes(text)


def test_evict_removes_what_is_least_recently_used(store: FolderStore):
    fill(rows_of(store), range(40), step=10)
    fill(rows_of(store, OTHER), range(40), step=10)
    mine, others = segments_of(store.url), segments_of(store.url, OTHER)
    ages = dict(zip([*mine, *others], [50, 80, 10, 70, 30, 60, 20, 40], strict=True))
    for path, hours in ages.items():
        age(path, 3600 * hours)
    total = sum(one.nbytes for one in store.ls())
    oldest = sorted(ages, key=lambda path: -ages[path])
    report = store.evict(total - sum(path.stat().st_size for path in oldest[:3]) + 100)
    assert report.segments == tuple(f"{path.parent.name}/{path.name}" for path in oldest[:3])
    assert report.fits
    assert report.nbytes == sum(one.nbytes for one in store.ls())
    assert not report.fingerprints
    assert [path.exists() for path in oldest] == [False] * 3 + [True] * 5
    assert all(one.ok for one in store.verify())
    assert "nothing to do" in str(store.evict("1 GB"))


def test_a_fingerprint_without_segments_is_removed_entirely(either: ShelfStore):
    rows = rows_of(either)
    fill(rows, range(40), step=10)
    rows.write_probe({"input": torch.zeros(3)})
    time.sleep(0.01)
    fill(rows_of(either, OTHER), range(40), step=10)
    report = either.evict(either.ls()[1].nbytes + 100)
    assert len(report.segments) == 4
    assert report.fingerprints == (FINGERPRINT,)
    assert either.fingerprints() == [OTHER]
    assert_holds(rows_of(either, OTHER), range(40))
    # Who used it fills anew.
    rows.refresh()
    fill(rows, range(3))
    assert_holds(rows_of(either), range(3))
    everything = either.evict(0)
    assert either.fingerprints() == []
    assert everything.fits


def test_looking_rows_up_is_using_them(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(40), step=10)
    segments = segments_of(store.url)
    for path in segments:
        age(path, 100_000)
    shelf = FolderShelf(Path(rows.url) / ".." / FINGERPRINT)  # of another process
    shelf.touch([segments[2].name])
    before = segments[2].stat()
    assert time.time() - before.st_atime < 60
    assert time.time() - before.st_mtime > 90_000
    age(segments[2], 100_000)
    shelf.touch([segments[2].name, "not-1.safetensors"])
    assert time.time() - segments[2].stat().st_atime > 90_000, "more than once an hour"
    total = sum(one.nbytes for one in store.ls())
    os.utime(segments[2])
    report = store.evict(total // 2)
    assert f"{FINGERPRINT}/{segments[2].name}" not in report.segments
    assert segments[2].exists()


def test_lookup_says_that_rows_are_used(store: FolderStore):
    fill(rows_of(store), range(40), step=10)
    for path in segments_of(store.url):
        age(path, 100_000)
    store = FolderStore(Path(store.url).parent / "store" / ".." / "store")
    rows_of(store).lookup(keys_of(range(10)))
    used = [time.time() - path.stat().st_atime < 60 for path in segments_of(store.url)]
    assert used.count(True) == 1


def test_damaged_files_and_those_of_killed_writers_are_evicted_first(store: FolderStore):
    rows = rows_of(store)
    fill(rows, range(40), step=10)
    aside = Path(rows.url) / "x-1.safetensors.damaged"
    aside.write_bytes(bytes(5000))
    total = sum(one.nbytes for one in store.ls())
    report = store.evict(total - 100)
    assert not report.segments
    assert not aside.exists()
    assert_holds(rows_of(store), range(40))


# A limit


def test_a_full_store_evicts_the_rows_of_other_fingerprints(tmp_path: Path):
    fill(rows_of(FolderStore(tmp_path), OTHER), range(40), step=10)
    for path in segments_of(tmp_path, OTHER):
        age(path, 7200)
    one = segments_of(tmp_path, OTHER)[0].stat().st_size
    store = FolderStore(tmp_path, max_bytes=7 * one)
    rows = rows_of(store)
    fill(rows, range(60), step=10)
    assert len(segments_of(tmp_path)) == 6
    assert store.fingerprints() == [FINGERPRINT]
    assert sum(held.nbytes for held in store.ls()) <= 7 * one
    assert_holds(rows, range(60))
    before = segments_of(tmp_path)
    with pytest.raises(StoreError, match=r"is full: .* more would exceed max_bytes=") as caught:
        fill(rows, range(60, 80), step=20)
    assert caught.value.errno == errno.ENOSPC
    assert segments_of(tmp_path) == before, "what this process has written is not evicted for its own next"
    assert_holds(rows, range(60))


def test_own_rows_of_an_earlier_run_go_if_they_are_not_looked_up(tmp_path: Path, forkserver: Any):
    process = forkserver.Process(target=fill_elsewhere, args=(str(tmp_path),))
    process.start()
    process.join()
    segments = segments_of(tmp_path)
    assert len(segments) == 4
    for path in segments:
        age(path, 7200)
    one = segments[0].stat().st_size
    store = FolderStore(tmp_path, max_bytes=5 * one)
    rows = rows_of(store)
    FolderShelf(Path(rows.url)).touch([segments[1].name])
    fill(rows, range(100, 130), step=10)
    assert segments[1].exists()
    assert sum(path.exists() for path in segments) == 1
    rows.refresh()
    assert_holds(rows, range(100, 130))
    assert sum(held.nbytes for held in store.ls()) <= 5 * one


def fill_elsewhere(folder: str) -> None:
    torch.set_num_threads(1)
    fill(rows_of(FolderStore(folder)), range(40), step=10)


def test_two_fingerprints_that_are_filled_in_turns_do_not_evict_each_other(tmp_path: Path):
    fill(rows_of(FolderStore(tmp_path / "size")), range(10))
    one = segments_of(tmp_path / "size")[0].stat().st_size
    store = FolderStore(tmp_path / "store", max_bytes=7 * one)
    turns = [rows_of(store), rows_of(store, OTHER)]

    def in_turns() -> None:
        for start in range(0, 100, 10):
            for rows in turns:
                fill(rows, range(start, start + 10))

    with pytest.raises(StoreError, match="is full"):
        in_turns()
    assert len(segments_of(store.url)) == len(segments_of(store.url, OTHER)) == 3
    # Who comes after them, alone, has all the room.
    last = rows_of(store, "c" * 32)
    fill(last, range(60), step=10)
    assert_holds(last, range(60))
    assert store.fingerprints() == ["c" * 32]


def test_a_store_in_memory_can_have_a_limit(tmp_path: Path):
    store = open_store("memory://", max_bytes="150kB")
    assert isinstance(store, MemoryStore)
    fill(rows_of(store, OTHER), range(40), step=10)
    time.sleep(0.01)
    with pytest.raises(StoreError, match="is full"):
        fill(rows_of(store), range(400), step=10)
    assert store.fingerprints() == [FINGERPRINT]
    assert sum(held.nbytes for held in store.ls()) <= 150_000


def test_a_limit_is_given_when_a_store_is_opened(tmp_path: Path):
    store = open_store(tmp_path, max_bytes="1 GB")
    assert isinstance(store, FolderStore)
    assert store.max_bytes == 10**9
    assert open_store(store, max_bytes=10**9) is store
    with pytest.raises(StoreError, match="is open already: give max_bytes"):
        open_store(store, max_bytes="2 GB")
    with pytest.raises(StoreError, match="is no size"):
        open_store(tmp_path, max_bytes="much")


def test_a_limit_goes_with_the_rows_to_other_processes(tmp_path: Path):
    rows = pickle.loads(pickle.dumps(rows_of(FolderStore(tmp_path, max_bytes=100))))
    with pytest.raises(StoreError, match="is full"):
        fill(rows, range(10))
    assert isinstance(rows._shelf.room, Room)


# Forgetting


def everywhere(store: FolderStore, needle: bytes) -> list[str]:
    """The files of a store that hold these bytes."""
    files = sorted(path for path in Path(store.url).rglob("*") if path.is_file())
    return [path.name for path in files if needle in path.read_bytes()]


def test_forget_erases_an_object_everywhere(store: FolderStore):
    for fingerprint in (FINGERPRINT, OTHER):
        rows = rows_of(store, fingerprint)
        fill(rows, range(40), step=10)
        for name, numbers in [("with", range(40)), ("without", range(20, 40))]:
            rows.write_manifest(name, {"keys": torch.from_numpy(keys_of(numbers))}, {})
    folder = Path(store.url) / OTHER
    key = keys_of([7])[0]
    held = next(path for path in segments_of(store.url) if key.tobytes() in path.read_bytes())
    (folder / "x-1.safetensors.damaged").write_bytes(held.read_bytes())
    (folder / "x-2.safetensors.tmp-7-ab").write_bytes(held.read_bytes())
    age(folder / "x-2.safetensors.tmp-7-ab", 120)
    (folder / "claims").mkdir()
    (folder / "claims" / ("a" * 16)).write_bytes(bytes(64) + key.tobytes())
    picture = leaves_of([7])[0]
    assert isinstance(picture, torch.Tensor)
    row = picture.numpy().tobytes()
    assert len(everywhere(store, key.tobytes())) == 7
    assert len(everywhere(store, row)) == 4
    reader = rows_of(store)
    before = reader.lookup(keys_of(range(40)))
    report = store.forget(key.tobytes().hex())
    assert report.ok
    assert report.rows == 2
    assert len(report.segments) == 2
    assert report.manifests == (f"{FINGERPRINT}/manifests/with.safetensors", f"{OTHER}/manifests/with.safetensors")
    assert len(report.others) == 3
    assert everywhere(store, key.tobytes()) == everywhere(store, row) == []
    others = [number for number in range(40) if number != 7]
    for fingerprint in (FINGERPRINT, OTHER):
        assert_holds(rows_of(store, fingerprint), others)
        assert rows_of(store, fingerprint).lookup(keys_of([7])).tolist() == [-1]
        assert rows_of(store, fingerprint).read_manifest("without") is not None
    assert_same(reader.gather(before[others]), leaves_of(others))
    assert all(one.ok for one in store.verify())
    assert "no row and no manifest of it is here" in str(store.forget(key))


def test_forget_takes_several_keys_and_works_in_memory():
    store = MemoryStore()
    fill(rows_of(store), range(10), step=5)
    assert store.forget(keys_of(range(5))).rows == 5
    assert store.forget(keys_of([9])[0].tobytes()).rows == 1
    assert (rows_of(store).lookup(keys_of(range(10))) >= 0).tolist() == [False] * 5 + [True] * 4 + [False]
    assert store.ls()[0].segments == 1


@pytest.mark.parametrize(
    "key", ["", "00", "zz" * 16, "00" * 17, b"short", np.zeros(16), np.zeros((0, 16), np.uint8), 5]
)
def test_what_is_no_key_is_refused_in_words(key: Any, store: FolderStore):
    with pytest.raises(KeyTypeError, match="is no key: give 32 hexadecimal digits"):
        store.forget(key)


def test_forget_says_what_it_could_not_do(store: FolderStore):
    fill(rows_of(store), range(10), step=5)
    fill(rows_of(store, OTHER), range(10), step=5)
    flip_bit(next(path for path in segments_of(store.url) if keys_of([2])[0].tobytes() in path.read_bytes()))
    writing = Path(store.url) / OTHER / "x-1.safetensors.tmp-7-ab"
    writing.write_bytes(b"somebody writes")
    report = store.forget(keys_of([2]))
    assert not report.ok
    assert report.rows == 1
    damaged, busy = report.problems
    assert "store verify" in damaged
    assert "is being written: end the programs that fill this store" in busy
    assert "NOT DONE" in str(report)
    store.verify()
    age(writing, 120)
    assert store.forget(keys_of([2])).ok
    assert not everywhere(store, keys_of([2])[0].tobytes())


def test_forget_says_nothing_of_what_it_could_not_look_for():
    with tempfile.TemporaryDirectory() as name:
        fill(rows_of(FolderStore(name)), range(10))
        with without_rights(Path(name)):
            report = FolderStore(name).forget(keys_of([2]))
        assert not report.ok
        assert "is here" not in str(report)
        assert str(report).startswith("no row and no manifest of it was erased")


def test_forget_touches_nothing_that_is_no_fingerprint(store: FolderStore, tmp_path: Path):
    fill(rows_of(store), range(10))
    (tmp_path / "outside").mkdir()
    places = [Path(store.url) / "photos", tmp_path / "outside"]
    (Path(store.url) / OTHER).symlink_to(places[1])
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "cat.jpg.damaged").write_bytes(b"cat")
        (place / "cat.jpg").write_bytes(b"cat")
    report = store.forget(keys_of([2]))
    assert report.rows == 1
    assert [len(list(place.iterdir())) for place in places] == [2, 2]
    assert "symbolic link" in report.problems[0]


# Comparing


class Small(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4, eps=eps)
        self.act = nn.ReLU()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.bn1(self.conv1(images)))).mean((2, 3))


def small(eps: float = 1e-5, change: float = 0.0) -> Small:
    torch.manual_seed(0)
    model = Small(eps)
    model.conv1.weight.data[0, 0, 0, 0] += change
    return model


def kept(store: FolderStore, model: nn.Module, **settings: Any) -> str:
    """The fingerprint under which the rows of a model are kept."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(images, torch.arange(4))
    with recycle(model, images, store=store, **{"cut": "act", **settings}) as recycling:
        recycling.fill(dataset, batch_size=2)
        return recycling.fingerprint


def test_diff_says_why_rows_were_missed(store: FolderStore):
    first_one = kept(store, small())
    other_weights = kept(store, small(change=0.5))
    assert len({first_one, other_weights}) == 2
    found = store.diff(first_one[:10], other_weights)
    assert found.lines == ("`conv1.weight` differs",)
    assert str(found) == f"{first_one} against {other_weights}:\n  `conv1.weight` differs"
    precise = kept(store, small(), precision="bfloat16")
    lines = store.diff(first_one, precise).lines
    assert lines == ("precision: float32 against bfloat16", "kept leaves: F32 [4, 6, 6] against BF16 [4, 6, 6]")
    assert store.diff(first_one, kept(store, small(eps=0.1))).lines == (
        "`bn1` (BatchNorm2d): eps is 1e-05 against 0.1",
    )
    elsewhere = kept(store, small(), cut="conv1")
    lines = store.diff(first_one, elsewhere).lines
    assert lines[0] == "cut: act against conv1"
    assert lines[-1] == f"only in {first_one}: `bn1 (BatchNorm2d)`, `bn1.weight`, `bn1.bias` and 4 more"
    assert str(store.diff(first_one, first_one)) == f"{first_one} is one and the same fingerprint"


def about_of(model: nn.Module, **settings: Any) -> dict[str, Any]:
    taken = take_fingerprint({"": model}, {}, [], {"cut": "act", "padding": "", **settings})
    return {"model": "Small", "cut": "act", "precision": "own", **taken.to_about()}


def test_diff_says_which_setting_of_a_module_differs(either: ShelfStore):
    for name, about in {
        "aaa": about_of(small()),
        "bbb": about_of(small(eps=1e-3)),
        "ccc": about_of(small(), padding="True False"),
        "ddd": {"model": "Small", "cut": "act", "precision": "bfloat16"},
    }.items():
        fill(either.rows(name, SPECS, about), range(3))
    assert either.diff("aaa", "bbb").lines == ("`.bn1` (BatchNorm2d): eps is 1e-05 against 0.001",)
    assert either.diff("aaa", "ccc").lines == ("setting padding is '' against 'True False'",)
    older = either.diff("aaa", "ddd")
    assert older.lines == ("precision: float32, bfloat16 against bfloat16",)
    assert older.incomplete == "ddd does not say of which parts it is made, so weights cannot be compared"
    assert older.incomplete in str(older)


def test_diff_of_two_precisions_is_for_people(store: FolderStore):
    a, b = kept(store, small()), kept(store, small(), precision="int8")
    lines = store.diff(a, b).lines
    assert lines[0] == "precision: float32 against int8"
    assert [line.partition(":")[0] for line in lines] == ["precision", "kept leaves"]


def test_diff_counts_what_is_too_much_to_print(store: FolderStore):
    names = [f"layer{number}.weight" for number in range(50)]
    for fingerprint, digest in [("aaa", "0" * 64), ("bbb", "1" * 64)]:
        fill(store.rows(fingerprint, SPECS, {"parts": dict.fromkeys(names, digest)}), range(3))
    found = store.diff("aaa", "bbb")
    assert len(found.lines) == 50
    assert str(found).splitlines()[-2:] == ["  `layer19.weight` differs", "  and 30 more"]


def test_diff_of_two_that_say_the_same_says_so(store: FolderStore):
    for fingerprint in ("aaa", "bbb"):
        fill(store.rows(fingerprint, SPECS, {"parts": {"x": "0"}}), range(3))
    assert "nothing that about.json tells differs" in str(store.diff("aaa", "bbb"))


# Removing


def test_rm_removes_a_fingerprint(either: ShelfStore):
    rows = rows_of(either)
    fill(rows, range(20), step=5)
    rows.write_manifest("train", {"keys": torch.from_numpy(keys_of(range(20)))}, {})
    fill(rows_of(either, OTHER), range(3))
    nbytes = either.ls()[0].nbytes
    held = rows.lookup(keys_of(range(20)))
    assert_same(rows.gather(held), leaves_of(range(20)))
    assert either.rm(FINGERPRINT[:6]) == nbytes
    assert either.fingerprints() == [OTHER]
    assert_same(rows.gather(held), leaves_of(range(20)))
    assert rows_of(either).lookup(keys_of([1])).tolist() == [-1]
    fill(rows_of(either), range(3))
    assert_holds(rows_of(either), range(3))


def test_rm_leaves_no_file(store: FolderStore):
    fill(rows_of(store), range(20), step=5)
    store.rm(FINGERPRINT)
    assert list(Path(store.url).iterdir()) == []


def test_rm_refuses_what_is_no_fingerprint(store: FolderStore, tmp_path: Path):
    fill(rows_of(store), range(3))
    photos = Path(store.url) / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    note = Path(store.url) / FINGERPRINT / "note.txt"
    note.write_text("mine")
    for name in ("photos", "..", "../store", ".", "nothing"):
        with pytest.raises(StoreError, match="no fingerprint of"):
            store.rm(name)
    with pytest.raises(StoreError, match=r"holds 'note.txt'. Nothing was removed"):
        store.rm(FINGERPRINT)
    note.unlink()
    store.rm(FINGERPRINT)
    assert [path.name for path in Path(store.url).iterdir()] == ["photos"]


def test_rm_takes_away_what_cannot_be_opened(store: FolderStore):
    fill(rows_of(store), range(3))
    (Path(store.url) / FINGERPRINT / "about.json").write_text("{")
    store.rm(FINGERPRINT)
    assert store._names() == []


def test_of_a_link_only_the_link_is_removed(store: FolderStore, tmp_path: Path):
    elsewhere = FolderStore(tmp_path / "elsewhere")
    fill(rows_of(elsewhere), range(3))
    fill(rows_of(store, OTHER), range(3))
    link = Path(store.url) / FINGERPRINT
    link.symlink_to(Path(elsewhere.url) / FINGERPRINT, target_is_directory=True)
    assert store.fingerprints() == [OTHER]
    for read in (lambda: rows_of(store), lambda: store.existing(FINGERPRINT)):
        with pytest.raises(StoreError, match="is a symbolic link, which is not followed: remove it"):
            read()
    assert store.rm(FINGERPRINT) == 0
    assert not link.is_symlink()
    assert_holds(rows_of(elsewhere), range(3))


def test_a_folder_in_which_a_link_leads_outside_loses_only_the_link(store: FolderStore, tmp_path: Path):
    fill(rows_of(store), range(3))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"somebody's")
    (Path(store.url) / FINGERPRINT / "manifests").symlink_to(outside)
    store.rm(FINGERPRINT)
    assert (outside / "file").read_bytes() == b"somebody's"


def test_the_stores_own_folder_may_be_a_link(store: FolderStore, tmp_path: Path):
    fill(rows_of(store), range(20), step=5)
    (tmp_path / "link").symlink_to(store.url, target_is_directory=True)
    linked = FolderStore(tmp_path / "link", segment_bytes=SMALL)
    assert_holds(rows_of(linked), range(20))
    linked.compact()
    assert_holds(rows_of(store), range(20))
    linked.rm(FINGERPRINT)
    assert store.fingerprints() == []


def test_what_a_killed_rm_left_is_swept_away_later(store: FolderStore, monkeypatch: pytest.MonkeyPatch):
    fill(rows_of(store), range(3))
    fill(rows_of(store, OTHER), range(3))
    with monkeypatch.context() as patch:
        patch.setattr("torchrecycle.store.shelf.shutil.rmtree", _killed)
        with pytest.raises(KeyboardInterrupt):
            store.rm(FINGERPRINT)
    assert store.fingerprints() == [OTHER]
    assert FolderStore(store.url).fingerprints() == [OTHER]
    assert len(list(Path(store.url).glob(".removed-*"))) == 1
    monkeypatch.setattr("torchrecycle.store.stores.OLD_SECONDS", 0.0)
    time.sleep(0.01)
    store.compact()
    assert not list(Path(store.url).glob(".removed-*"))


def _killed(path: Path) -> None:
    raise KeyboardInterrupt


def test_the_key_of_an_object_comes_from_a_batch_and_erases_it(store: FolderStore):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(images, torch.arange(6))
    with recycle(small(), images, cut="act", store=store) as recycling:
        assert recycling.fill(dataset, batch_size=2).computed == 6
        key = recycling.keys(images[4:5])
        report = store.forget(key)
        assert report.ok
        assert (report.rows, len(report.manifests)) == (1, 1)
        assert not everywhere(store, key.tobytes())
    with recycle(small(), images, cut="act", store=store) as recycling:
        rest = torch.utils.data.TensorDataset(images[[0, 1, 2, 3, 5]], torch.arange(5))
        assert recycling.fill(rest, batch_size=2).computed == 0
        assert recycling.fill(dataset, batch_size=2).computed == 1


@pytest.mark.parametrize("page", ["store", "privacy"])
def test_what_the_docs_show_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"model": nn.Sequential(OrderedDict(layer1=nn.Conv2d(3, 4, 3), layer2=nn.ReLU(), head=nn.Flatten()))}
    for block in blocks:
        exec(block, names)
