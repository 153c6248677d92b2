"""The store: the contract on both kinds, crashes, damage, hostile files, the golden stores of both formats."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from processes import forkserver_context
from torchrecycle.errors import DamagedRowError, RecycleError, StoreError
from torchrecycle.store import FolderStore, LeafSpec, MemoryStore, Ragged, Rows, Store, open_store
from torchrecycle.store.container import unpack
from torchrecycle.store.index import Index
from torchrecycle.testing import StoreContract
from torchrecycle.testing.store_contract import (
    ABOUT,
    FINGERPRINT,
    SPECS,
    assert_holds,
    assert_same,
    keys_of,
    leaves_of,
)

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
"""Python 3.12 warns of forking a process with threads, which is what a `DataLoader` does on Linux."""

GOLDEN = {version: Path(__file__).parent / "golden" / f"format{version}" for version in (1, 2)}
NEWEST = max(GOLDEN)


class TestFolderStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return FolderStore(tmp_path / "activations")

    def another(self, store: Store) -> Store:
        return open_store(store.url)

    def flip_bit(self, store: Store, fingerprint: str) -> None:
        flip_bit(segments_of(Path(store.url) / fingerprint)[0], "leaf.0", 5)


class TestMemoryStore(StoreContract):
    def make_store(self, tmp_path: Path) -> Store:
        return open_store(f"memory://{tmp_path}")

    def another(self, store: Store) -> Store:
        return open_store(store.url)

    def flip_bit(self, store: Store, fingerprint: str) -> None:
        assert isinstance(store, MemoryStore)
        files = store._shelves[fingerprint].files
        name = min(name for name in files if is_segment(name))
        files[name][place_of(files[name].numpy().tobytes(), "leaf.0") + 5] ^= 1


def is_segment(name: str) -> bool:
    return name.endswith(".safetensors") and "-" in name and "/" not in name


def segments_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_segment(path.name))


def place_of(data: bytes, tensor: str) -> int:
    start = 8 + int.from_bytes(data[:8], "little")
    return start + json.loads(data[8:start])[tensor]["data_offsets"][0]


def flip_bit(path: Path, tensor: str, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[place_of(data, tensor) + byte] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "activations")


@pytest.fixture
def rows(store: FolderStore) -> Rows:
    return store.rows(FINGERPRINT, SPECS, ABOUT)


def fill(rows: Rows, numbers: range, step: int = 1000) -> None:
    for start in range(numbers.start, numbers.stop, step):
        part = range(start, min(start + step, numbers.stop))
        rows.append(keys_of(part), leaves_of(part))
        rows.publish()


def again(rows: Rows) -> Rows:
    folder = Path(rows.url)
    return FolderStore(folder.parent).rows(folder.name, rows.leaves, {})


# The golden store


def golden_rows(version: int = NEWEST) -> Rows:
    return FolderStore(GOLDEN[version]).rows(FINGERPRINT, SPECS, {})


@pytest.mark.parametrize("version", GOLDEN)
def test_the_golden_store_of_each_format_is_read(version: int):
    rows = golden_rows(version)
    assert rows.about == ABOUT
    assert len(rows) == 12
    assert_holds(rows, [*range(12), 3])
    assert rows.verify().ok
    manifest, probe = rows.read_manifest("train"), rows.read_probe()
    assert manifest is not None
    assert probe is not None
    assert manifest[0]["keys"].numpy().tolist() == keys_of(range(12)).tolist()
    assert manifest[0]["targets"].tolist() == [number % 3 for number in range(12)]
    assert manifest[1] == {"name": "train"}
    assert probe[0]["input"].tolist() == [0, 1, 2, 3]
    assert probe[1] == {"seed": "0"}


def test_the_golden_store_is_what_is_written_today_to_the_byte(store: FolderStore, rows: Rows):
    write_golden(rows)
    written = {path.relative_to(store.url): path.read_bytes() for path in Path(store.url).rglob("*") if path.is_file()}
    newest = GOLDEN[NEWEST]
    golden = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    assert sorted(written.values()) == sorted(golden.values())
    assert sum(map(len, golden.values())) < 50_000


def test_a_store_of_format_1_goes_on_in_format_2(tmp_path: Path):
    shutil.copytree(GOLDEN[1], tmp_path / "activations")
    rows = FolderStore(tmp_path / "activations").rows(FINGERPRINT, SPECS, {})
    fill(rows, range(20))
    assert_holds(rows, [*range(20), 3, 19])
    assert_holds(again(rows), [*range(20), 3, 19])
    assert len(segments_of(Path(rows.url))) == 2


def write_golden(rows: Rows) -> None:
    fill(rows, range(12))
    targets = torch.tensor([number % 3 for number in range(12)])
    rows.write_manifest("train", {"keys": torch.from_numpy(keys_of(range(12))), "targets": targets}, {"name": "train"})
    rows.write_probe({"input": torch.arange(4.0)}, {"seed": "0"})


# The file format


def test_safetensors_itself_reads_a_segment(rows: Rows):
    fill(rows, range(5))
    (path,) = segments_of(Path(rows.url))
    found = safetensors.torch.load_file(path)
    pads = {name for name in found if name.startswith("pad.")}
    assert set(found) - pads == {"keys", "sums", "leaf.0", "leaf.1.values", "leaf.1.offsets"}
    assert all(place_of(path.read_bytes(), name) % 4096 == 0 for name in set(found) - pads)
    assert found["keys"].numpy().tolist() == keys_of(range(5)).tolist()
    assert found["sums"].shape == (1, 16)
    assert found["sums"].dtype == torch.uint8
    pictures, texts = leaves_of(range(5))
    assert isinstance(texts, Ragged)
    lengths = found["leaf.1.offsets"].diff()
    assert_same([found["leaf.0"], Ragged(found["leaf.1.values"], lengths)], [pictures, texts])
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "uint8",
        "int8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (8,), (0,), (2, 3)], ids=str)
def test_any_dtype_and_shape_comes_back_to_the_bit(store: FolderStore, dtype: str, shape: tuple[int, ...]):
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    specs = [LeafSpec(shape, False, kind), LeafSpec((3,), False, torch.uint8), LeafSpec((1,), True, kind)]
    numbers = range(7)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (7, *shape, kind.itemsize), generator=generator)
    dense = raw.to(torch.uint8).view(kind).view(7, *shape)
    values = torch.randint(0, 2, (6, kind.itemsize), generator=generator).to(torch.uint8).view(kind)
    leaves = [
        dense,
        torch.arange(21, dtype=torch.uint8).view(7, 3),
        Ragged(values, torch.tensor([1, 0, 2, 0, 0, 3, 0])),
    ]
    rows = store.rows("a" * 32, specs, {})
    rows.append(keys_of(numbers), leaves)
    rows.publish()
    assert_same(rows.gather(rows.lookup(keys_of(numbers))), leaves)
    # The second time in several segments of odd lengths, whose leaves are aligned differently.
    apart = store.rows("b" * 32, specs, {})
    for start, stop, begin, end in [(0, 3, 0, 3), (3, 4, 3, 3), (4, 7, 3, 6)]:
        part = [leaf[start:stop] for leaf in leaves[:2] if isinstance(leaf, torch.Tensor)]
        ragged = Ragged(values[begin:end], torch.tensor([1, 0, 2, 0, 0, 3, 0][start:stop]))
        apart.append(keys_of(numbers)[start:stop], [*part, ragged])
        apart.publish()
    assert_same(apart.gather(apart.lookup(keys_of(numbers))), leaves)


def test_large_rows_of_many_segments_come_back_to_the_bit(store: FolderStore):
    rows = store.rows("a" * 32, [LeafSpec((9001,), False, torch.float16)], {})
    values = torch.randn(20, 9001, generator=torch.Generator().manual_seed(0)).half()
    for start in range(0, 20, 6):
        rows.append(keys_of(range(20))[start : start + 6], [values[start : start + 6]])
        rows.publish()
    order = np.random.default_rng(1).permutation(20)
    assert_same(rows.gather(rows.lookup(keys_of(range(20)))[order]), [values[order]])


def test_about_is_written_for_people(rows: Rows):
    fill(rows, range(1))
    text = (Path(rows.url) / "about.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert len(found.pop("blake3")) == 32
    assert found.pop("fingerprint") == FINGERPRINT
    assert found == {
        "format": 2,
        "leaves": [
            {"shape": [3, 4], "ragged": False, "dtype": "F32"},
            {"shape": [5], "ragged": True, "dtype": "BF16"},
        ],
        "about": ABOUT,
    }
    assert text.count("\n") > 10


# What is no store, or not for us


def test_a_file_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"is a file, and a store is a folder"):
        open_store(tmp_path / "file")


def test_a_folder_of_other_things_is_no_store(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(StoreError, match=r"is no store: it holds 'photos'.*new folder"):
        open_store(tmp_path)


def test_an_empty_folder_a_new_one_and_a_barely_begun_one_are_stores(tmp_path: Path):
    for where in (tmp_path, tmp_path / "new" / "deep"):
        assert open_store(where).fingerprints() == []
    (tmp_path / FINGERPRINT).mkdir()
    (tmp_path / FINGERPRINT / "about.json.tmp-1-ab").write_text("{")
    (tmp_path / ".gitignore").write_text("*")
    rows = open_store(tmp_path).rows(FINGERPRINT, SPECS, ABOUT)
    fill(rows, range(3))
    assert_holds(again(rows), range(3))


def test_reading_writes_nothing(tmp_path: Path, store: FolderStore, rows: Rows):
    assert rows.lookup(keys_of([1])).tolist() == [-1]
    assert rows.read_probe() is None
    assert rows.verify().ok
    assert store.fingerprints() == []
    assert list(tmp_path.iterdir()) == []
    fill(rows, range(3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_holds(again(rows), range(3))
    assert again(rows).verify().ok
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_newer_format_says_upgrade(rows: Rows):
    fill(rows, range(3))
    about = Path(rows.url) / "about.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(StoreError, match=r"format 3; this version reads 2; upgrade torchrecycle"):
        again(rows)


def test_a_segment_of_a_newer_format_is_neither_read_nor_set_aside(rows: Rows):
    fill(rows, range(3))
    (path,) = segments_of(Path(rows.url))
    path.write_bytes(path.read_bytes().replace(b'"torchrecycle.format":"2"', b'"torchrecycle.format":"3"', 1))
    for read in (lambda: again(rows).lookup(keys_of([1])), lambda: again(rows).verify()):
        with pytest.raises(StoreError, match=r"format 3; this version reads 2; upgrade torchrecycle") as caught:
            read()
        assert not isinstance(caught.value, DamagedRowError)
    assert path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": true, "leaves": [], "about": {}}'])
def test_an_about_that_is_not_readable_is_an_error_with_the_next_step(rows: Rows, text: str):
    fill(rows, range(3))
    (Path(rows.url) / "about.json").write_text(text)
    with pytest.raises(StoreError, match=r"about\.json is not readable .*restore it, or delete"):
        again(rows)


def test_a_place_of_an_unknown_kind_is_an_error():
    with pytest.raises(StoreError, match="a store is a folder, or 'memory://name'"):
        open_store("ftp://somewhere/else")


def test_a_memory_store_is_shared_by_name_and_fresh_without():
    assert open_store("memory://one") is open_store("memory://one")
    assert open_store("memory://one") is not open_store("memory://two")
    assert open_store("memory://") is not open_store("memory://")
    store = open_store("memory://one")
    assert open_store(store) is store


# Publishing


def test_a_full_buffer_is_published_by_itself(tmp_path: Path):
    rows = FolderStore(tmp_path, segment_bytes=1000).rows(FINGERPRINT, SPECS, ABOUT)
    for number in range(32):
        rows.append(keys_of([number]), leaves_of([number]))
    # A row is some 90 bytes, so eleven of them fill a segment.
    assert len(rows) == 22
    assert len(segments_of(Path(rows.url))) == 2
    rows.publish()
    assert_holds(rows, range(32))


def test_a_row_that_has_waited_is_published_with_the_next(tmp_path: Path):
    rows = FolderStore(tmp_path, publish_seconds=0.05).rows(FINGERPRINT, SPECS, ABOUT)
    rows.append(keys_of([0]), leaves_of([0]))
    assert len(rows) == 0
    time.sleep(0.06)
    rows.append(keys_of([1]), leaves_of([1]))
    assert len(rows) == 2


def test_a_full_disk_is_an_error_in_words_and_the_rows_still_wait(rows: Rows):
    fill(rows, range(4))
    rows.append(keys_of(range(4, 200)), leaves_of(range(4, 200)))
    before = sorted(Path(rows.url).iterdir())
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # The nearest to a full disk that needs no disk: the system refuses to let the file grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot write .*File too large") as caught:
            rows.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert sorted(Path(rows.url).iterdir()) == before
    rows.publish()
    assert_holds(again(rows), range(200))


def test_an_interrupted_publish_leaves_no_file_and_keeps_the_rows(rows: Rows, monkeypatch: pytest.MonkeyPatch):
    fill(rows, range(4))
    rows.append(keys_of([4]), leaves_of([4]))
    before = sorted(Path(rows.url).iterdir())

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rows.publish()
    assert sorted(Path(rows.url).iterdir()) == before
    rows.publish()
    assert_holds(again(rows), range(5))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the open files of Linux")
def test_many_segments_keep_no_file_open(rows: Rows):
    fill(rows, range(40), step=1)
    before = len(os.listdir("/proc/self/fd"))
    reader = again(rows)
    assert_holds(reader, range(40))
    assert len(os.listdir("/proc/self/fd")) <= before


# Crashes and other processes


def write_for_ever(folder: str, seed: int, told: Any) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    rows = FolderStore(folder, segment_bytes=draw.choice([500, 3000])).rows(FINGERPRINT, SPECS, ABOUT)
    start = seed * 10_000
    while True:
        count = draw.randrange(1, 12)
        rows.append(keys_of(range(start, start + count)), leaves_of(range(start, start + count)))
        if draw.random() < 0.5:
            rows.publish()
            told.send(start + count)
        start += count


@pytest.fixture(scope="module")
def forkserver() -> Any:
    context = forkserver_context()
    return context


def test_a_killed_writer_loses_only_unpublished_rows(tmp_path: Path, forkserver: Any):
    draw = random.Random(0)
    published: list[int] = []
    for seed in range(10):
        reader, writer = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=write_for_ever, args=(str(tmp_path), seed, writer))
        process.start()
        writer.close()
        last = reader.recv()
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                last = reader.recv()
        except EOFError:
            pass
        published += range(seed * 10_000, last)
        rows = open_store(tmp_path).rows(FINGERPRINT, SPECS, ABOUT)
        assert rows.verify().ok
        assert_holds(rows, published)
    # Whatever else is there was published just before the end, and is right too.
    everything = [number for seed in range(10) for number in range(seed * 10_000, seed * 10_000 + 2000)]
    found = np.flatnonzero(rows.lookup(keys_of(everything)) >= 0)
    there = [everything[at] for at in found]
    assert len(there) == len(rows)
    assert_holds(rows, there)
    wanted = range(2000)
    resumed = open_store(tmp_path).rows(FINGERPRINT, SPECS, ABOUT)
    fill(resumed, wanted)
    assert_holds(again(resumed), wanted)


def write_some(folder: str, numbers: list[int], step: int) -> None:
    torch.set_num_threads(1)
    rows = FolderStore(folder).rows(FINGERPRINT, SPECS, ABOUT)
    for start in range(0, len(numbers), step):
        rows.append(keys_of(numbers[start : start + step]), leaves_of(numbers[start : start + step]))
        rows.publish()


def test_two_processes_write_at_once(tmp_path: Path, forkserver: Any):
    numbers = list(range(300))
    parts = [numbers[:200], numbers[100:]]
    processes = [forkserver.Process(target=write_some, args=(str(tmp_path), part, 7)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = open_store(tmp_path).rows(FINGERPRINT, SPECS, ABOUT)
    assert len(rows) == 300
    assert_holds(rows, numbers)
    assert rows.verify().ok


class GatheringDataset(torch.utils.data.Dataset):
    """What a recycled data set does in a worker: gather by the locations of the main process."""

    def __init__(self, rows: Rows, locations: np.ndarray) -> None:
        self.rows = rows
        self.locations = locations

    def __len__(self) -> int:
        return len(self.locations)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        pictures, texts = self.rows.gather(self.locations[numbers])
        return [(numbers, pictures, texts.values, texts.lengths, self.rows.verified_bytes)]


def first(items: list[Any]) -> Any:
    return items[0]


@FORKS
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_workers_gather_by_the_same_locations(tmp_path: Path, method: str, kind: str):
    store = FolderStore(tmp_path) if kind == "folder" else MemoryStore()
    rows = store.rows(FINGERPRINT, SPECS, ABOUT)
    fill(rows, range(16), step=5)
    late = store.rows(FINGERPRINT, SPECS, ABOUT)
    fill(late, range(16, 20))
    rows.refresh()
    locations = rows.lookup(keys_of(range(20)))
    dataset = GatheringDataset(rows, locations)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=6, shuffle=True, num_workers=1, multiprocessing_context=method, collate_fn=first
    )
    seen: list[int] = []
    for numbers, pictures, values, lengths, _ in loader:
        assert_same([pictures, Ragged(values, lengths)], leaves_of(numbers))
        seen += numbers
    assert sorted(seen) == list(range(20))
    # A memory store has moved into shared memory for its workers, and this process's views with it.
    assert_holds(rows, range(20))
    assert_holds(late, range(16, 20))


@FORKS
def test_forked_workers_share_what_was_verified(rows: Rows):
    fill(rows, range(20))
    locations = rows.lookup(keys_of(range(20)))
    loader = torch.utils.data.DataLoader(
        GatheringDataset(rows, locations),
        batch_size=5,
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=first,
    )
    assert max(batch[-1] for batch in loader) > 0
    assert max(batch[-1] for batch in loader) == 0
    rows.gather(locations)
    assert rows.verified_bytes == 0


@FORKS
def test_a_forked_worker_does_not_publish_what_its_parent_appended(rows: Rows):
    fill(rows, range(3))
    rows.append(keys_of([3]), leaves_of([3]))
    before = rows.bytes_written
    child = os.fork()
    if not child:
        rows.publish()
        os._exit(rows.bytes_written > before)
    assert os.waitpid(child, 0)[1] == 0
    rows.publish()
    assert_holds(again(rows), range(4))


# Damage


@pytest.mark.parametrize("tensor", ["keys", "sums", "leaf.0", "leaf.1.values", "leaf.1.offsets"])
def test_a_flipped_bit_anywhere_is_found_and_set_aside(rows: Rows, tensor: str):
    fill(rows, range(8))
    fill(rows, range(8, 12))
    damaged = max(segments_of(Path(rows.url)), key=lambda path: path.stat().st_size)
    flip_bit(damaged, tensor, 9)
    report = again(rows).verify()
    assert report.damaged == (str(damaged),)
    assert not damaged.exists()
    assert damaged.with_name(f"{damaged.name}.damaged").exists()
    reader = again(rows)
    assert (reader.lookup(keys_of(range(12))) >= 0).tolist() == [False] * 8 + [True] * 4
    fill(reader, range(12))
    assert_holds(again(rows), range(12))


@pytest.mark.parametrize("left", [0, 5, 1000, 4096, -1])
def test_a_truncated_segment_is_an_error_until_it_is_set_aside(rows: Rows, left: int):
    fill(rows, range(8))
    fill(rows, range(8, 12))
    path = segments_of(Path(rows.url))[0]
    path.write_bytes(path.read_bytes()[:left])
    reader = again(rows)
    with pytest.raises(DamagedRowError, match=r"is damaged.*store verify"):
        reader.lookup(keys_of([1]))
    assert reader.verify().damaged == (str(path),)
    found = np.flatnonzero(reader.lookup(keys_of(range(12))) >= 0).tolist()
    assert len(found) in (4, 8)
    assert_holds(reader, found)


def test_a_damaged_manifest_or_probe_is_an_error_until_it_is_set_aside(rows: Rows):
    write_golden(rows)
    for path, read in [
        (Path(rows.url) / "manifests" / "train.safetensors", lambda: rows.read_manifest("train")),
        (Path(rows.url) / "probe.safetensors", rows.read_probe),
    ]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(data)
        with pytest.raises(DamagedRowError, match=r"does not match its checksum"):
            read()
        assert rows.verify().damaged == (str(path),)
        assert read() is None
    assert_holds(rows, range(12))


def test_a_link_is_not_followed(tmp_path: Path, rows: Rows):
    fill(rows, range(3))
    (path,) = segments_of(Path(rows.url))
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedRowError, match="no plain file"):
        again(rows).lookup(keys_of([1]))


def test_what_another_process_set_aside_is_a_miss_after_a_refresh(rows: Rows):
    fill(rows, range(8))
    held = rows.lookup(keys_of(range(8)))
    assert_same(rows.gather(held[:2]), leaves_of(range(2)))
    (path,) = segments_of(Path(rows.url))
    # Written anew, as the map of the other process shows what is done to the file itself.
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    flip_bit(path, "leaf.0", 5)
    assert not again(rows).verify().ok
    rows.refresh()
    assert (rows.lookup(keys_of(range(8))) == -1).all()
    assert len(rows) == 0
    assert rows.nbytes == 0


# Hostile files


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WRONG_HEADERS = {
    "overlap": {"a": entry("U8", [16], 0, 16), "b": entry("U8", [8], 8, 16)},
    "gap": {"a": entry("U8", [4], 0, 4), "b": entry("U8", [8], 8, 16)},
    "too short": {"a": entry("U8", [8], 0, 8)},
    "too long": {"a": entry("U8", [24], 0, 24)},
    "not aligned": {
        "a": entry("U8", [4], 0, 4),
        "b": entry("I64", [1], 4, 12),
        "c": entry("U8", [4], 12, 16),
    },
    "another size": {"a": entry("F32", [3], 0, 16)},
    "backwards": {"a": entry("U8", [-16], 16, 0)},
    "empty and huge": {"a": entry("U8", [16], 0, 16), "b": entry("U8", [0, 2**61, 2**61], 16, 16)},
    "true": {"a": entry("U8", [True, 16], 0, 16)},
    "unknown dtype": {"a": entry("F128", [1], 0, 16)},
    "further field": {"a": entry("U8", [16], 0, 16) | {"path": "/etc/passwd"}},
    "no object": {"a": [1, 2, 3]},
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_header_that_contradicts_itself_or_the_file_is_an_error(name: str):
    text = json.dumps({"__metadata__": {"torchrecycle.format": "1"}, **WRONG_HEADERS[name]}).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    data = bytearray(len(text).to_bytes(8, "little") + text + bytes(range(16)))
    with pytest.raises(DamagedRowError, match=r"file is damaged: .*store verify"):
        unpack(torch.frombuffer(data, dtype=torch.uint8), "file", owner="us")


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """A segment in which the header, or where it ends, or the length of the file is not what it was."""
    start = 8 + int.from_bytes(data[:8], "little")
    kind = draw(st.sampled_from(["bytes", "entry", "swap", "length", "size", "text"]))
    if kind == "bytes":
        found = bytearray(data)
        text_end = data[:start].rstrip().__len__()
        for _ in range(draw(st.integers(1, 4))):
            found[draw(st.integers(0, text_end - 1))] = draw(st.integers(0, 255))
        return bytes(found)
    if kind == "length":
        length = draw(
            st.one_of(st.integers(0, 2**64 - 1), st.integers(0, len(data)), st.sampled_from([start - 16, start]))
        )
        return length.to_bytes(8, "little") + data[8:]
    if kind == "size":
        return data[: draw(st.integers(0, len(data)))] + b"\0" * draw(st.integers(0, 9))
    if kind == "text":
        texts = [
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"null",
            b"\xff\xfe",
            b'{"keys":1,"keys":2}',
            b"1" * 6000,
            b"NaN",
        ]
        text = draw(st.sampled_from(texts))
        return len(text).to_bytes(8, "little") + text + data[start:]
    header = json.loads(data[8:start])
    names = sorted(name for name in header if name != "__metadata__")
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    if kind == "swap" and draw(st.booleans()):
        header[name], header[other] = header[other], header[name]
    elif kind == "swap":
        header[name][field], header[other][field] = header[other][field], header[name][field]
    else:
        sizes = st.one_of(st.integers(-2, 20), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 2**31, 2**63 - 1]))
        values = st.one_of(
            st.lists(sizes, max_size=4),
            st.sampled_from(["F32", "U8", "I64", "BF16", "F128", "", None, True, 1.5, [1e9, 2], {}, [True, True]]),
        )
        header[name][field] = draw(values)
        if draw(st.booleans()):
            header[name]["data_offsets"] = [draw(sizes), draw(sizes)]
    text = json.dumps(header).encode()
    text += b" " * (start - 8 - len(text))
    return len(text).to_bytes(8, "little") + text + data[start:]


def test_a_hostile_header_is_an_error_or_harmless(tmp_path: Path):
    source = FolderStore(tmp_path / "source").rows(FINGERPRINT, HOSTILE, ABOUT)
    expected = hostile_leaves()
    source.append(keys_of(range(6)), expected)
    source.publish()
    (path,) = segments_of(Path(source.url))
    original = path.read_bytes()
    outcomes = {"error": 0, "right": 0, "missing": 0}

    @settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(original))
    def check(data: bytes) -> None:
        # A new file each time: the old one is still mapped.
        path.unlink()
        path.write_bytes(data)
        try:
            reader = again(source)
            found = reader.lookup(keys_of(range(6)))
            there = np.flatnonzero(found >= 0)
            leaves = reader.gather(found[there])
        except RecycleError:
            outcomes["error"] += 1
            return
        assert_same(leaves, [leaf[there] for leaf in expected[:2]] + [ragged_part(expected[2], there)])
        outcomes["right" if len(there) else "missing"] += 1

    check()
    assert outcomes["error"] > 200, outcomes
    assert outcomes["right"] > 3, outcomes


HOSTILE = (
    LeafSpec((4,), False, torch.uint8),
    LeafSpec((4,), False, torch.uint8),
    LeafSpec((2,), True, torch.int64),
)
"""Two leaves of one form, so that a header can swap them without any size being wrong."""


def hostile_leaves() -> list[Any]:
    dense = torch.arange(24, dtype=torch.uint8).view(6, 4)
    return [dense, 100 + dense, Ragged(torch.arange(14).view(7, 2), torch.tensor([1, 0, 3, 1, 2, 0]))]


def ragged_part(leaf: Ragged, there: np.ndarray) -> Ragged:
    parts = leaf.values.split(leaf.lengths.tolist())
    return Ragged(torch.cat([leaf.values[:0], *[parts[at] for at in there]]), leaf.lengths[there])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(place=st.integers(0, 2**20), value=st.integers(0, 255))
def test_any_byte_of_a_golden_segment_changed_is_an_error_or_harmless(place: int, value: int):
    (path,) = segments_of(GOLDEN[NEWEST] / FINGERPRINT)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    # Half of them in the data, half in the part of the header that says something.
    place = start + place // 2 % (len(data) - start) if place % 2 else place // 2 % len(data[:start].rstrip())
    data[place] = value
    store = MemoryStore()
    rows = store.rows(FINGERPRINT, SPECS, ABOUT)
    store._shelves[FINGERPRINT].files["x-1.safetensors"] = torch.frombuffer(data, dtype=torch.uint8)
    try:
        found = rows.lookup(keys_of(range(12)))
        there = np.flatnonzero(found >= 0).tolist()
        if there:
            assert_same(rows.gather(found[there]), leaves_of(there))
    except RecycleError:
        pass


# The index


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=8), st.integers(1, 6))
def test_the_index_is_a_dict_that_keeps_the_first(batches: list[list[int]], halves: int):
    def keys(numbers: list[int]) -> np.ndarray:
        made = np.zeros((len(numbers), 16), dtype=np.uint8)
        made[:, 0] = [255 - number % halves for number in numbers]
        made[:, 12] = numbers
        return made

    index, oracle, location = Index(), {}, 0
    for batch in batches:
        index.add(keys(batch), np.arange(location, location + len(batch)))
        for number in batch:
            oracle.setdefault(number, location)
            location += 1
    asked = list(range(42))
    assert index.find(keys(asked)).tolist() == [oracle.get(number, -1) for number in asked]
    assert len(index) == len(oracle)


def test_a_million_keys_that_share_their_first_half_are_found_quickly():
    keys = np.zeros((1_000_000, 16), dtype=np.uint8)
    keys[:, 12:] = np.arange(1_000_000, dtype=">u4").view(np.uint8).reshape(-1, 4)
    index = Index()
    index.add(keys, np.arange(1_000_000))
    started = time.perf_counter()
    assert index.find(keys[5::1000]).tolist() == list(range(5, 1_000_000, 1000))
    assert time.perf_counter() - started < 0.5


def test_pickling_says_nothing_of_what_was_read(rows: Rows):
    fill(rows, range(4))
    rows.gather(rows.lookup(keys_of(range(4))))
    assert rows.bytes_read > 0
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.bytes_read == copy.bytes_written == copy.verified_bytes == 0


def test_a_ragged_leaf_of_nothing_is_refused():
    with pytest.raises(StoreError, match="holds no values"):
        LeafSpec((3, 0), True, torch.float32)
    assert LeafSpec([3, 0], False, torch.float32).shape == (3, 0)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"cannot keep torch\.complex128"):
        MemoryStore().rows(FINGERPRINT, [LeafSpec((2,), False, torch.complex128)], {})
