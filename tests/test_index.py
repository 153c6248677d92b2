"""The index on disk and the planes: what is found is the row of its key, whatever became of the files."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchrecycle.errors import DamagedRowError, GoneRowsError, StoreError
from torchrecycle.store import FolderStore, LeafSpec, Ragged, Rows, looking
from torchrecycle.store.container import pack
from torchrecycle.store.index_file import INDEX, Listed, open_index, pack_index
from torchrecycle.store.mapping import MAPS
from torchrecycle.store.planes import SLOT, resident_bytes
from torchrecycle.store.rows import ShelfRows
from torchrecycle.store.segment import Batch, Origin, Segment, pack_segment
from torchrecycle.store.shelf import FolderShelf
from torchrecycle.testing.store_contract import ABOUT, FINGERPRINT, SPECS, assert_holds, keys_of, leaves_of

pytestmark = pytest.mark.skipif(not MAPS, reason="files are laid side by side on Linux only")


@pytest.fixture(autouse=True)
def _indexed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "IN_MEMORY", 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path, range(60))
    return tmp_path


def fill(folder: Path, numbers: range, step: int = 10) -> None:
    for start in range(numbers.start, numbers.stop, step):
        rows = rows_in(folder)
        part = range(start, min(start + step, numbers.stop))
        rows.append(keys_of(part), leaves_of(part))
        rows.publish()


def rows_in(folder: Path) -> ShelfRows:
    return FolderStore(folder).rows(FINGERPRINT, SPECS, ABOUT)


def segments(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / FINGERPRINT).glob("*-*.safetensors"))


def opened(rows: ShelfRows) -> int:
    return len(rows._segments._opened)


# -- the index ---------------------------------------------------------------------------------------------------------


def test_amid_a_long_fill_few_keys_are_outside_of_the_index(tmp_path: Path):
    rows = rows_in(tmp_path)
    outside = []
    for start in range(0, 600, 10):
        rows.append(keys_of(range(start, start + 10)), leaves_of(range(start, start + 10)))
        rows.publish()
        outside.append(len(rows._lookup._in_memory()) / (start + 10))
    assert (rows.lookup(keys_of(range(600))) >= 0).all()
    assert max(outside[30:]) <= 1 / 8


def test_a_store_with_a_current_index_is_opened_without_its_segments(folder: Path):
    rows_in(folder).lookup(keys_of([0]))
    assert (folder / FINGERPRINT / INDEX).exists()
    reader = rows_in(folder)
    assert (reader.lookup(keys_of(range(60))) >= 0).all()
    assert (reader.lookup(keys_of(range(60, 70))) == -1).all()
    covered = opened(reader)
    assert covered < 6, "segments that the index covers are opened when they are read"
    assert len(reader) == 60
    read = [rows_in(folder)._segments.read(path.name) for path in segments(folder)]
    assert reader.nbytes == sum(segment.nbytes for segment in read if segment is not None)
    assert_holds(reader, [*range(60), 7, 7, 3])
    assert opened(reader) == 6


def test_what_was_published_since_is_found_beside_the_index(folder: Path):
    rows_in(folder).lookup(keys_of([0]))
    before = (folder / FINGERPRINT / INDEX).stat().st_ino
    reader = rows_in(folder)
    assert_holds(reader, range(60))
    fill(folder, range(60, 65))
    assert reader.lookup(keys_of([62])).tolist() == [-1]
    reader.refresh()
    assert_holds(reader, range(65))
    assert (folder / FINGERPRINT / INDEX).stat().st_ino == before, "five keys are kept in memory"
    fill(folder, range(65, 200))
    assert_holds(rows_in(folder), range(200))
    assert (folder / FINGERPRINT / INDEX).stat().st_ino != before


def test_a_key_that_comes_twice_is_found_once(tmp_path: Path):
    # Two writers that do not know of each other.
    first, second = rows_in(tmp_path), rows_in(tmp_path)
    for rows in (first, second):
        rows.append(keys_of(range(40)), leaves_of(range(40)))
    first.publish()
    second.publish()
    fill(tmp_path, range(40, 80))
    reader = rows_in(tmp_path)
    assert_holds(reader, range(80))
    assert len(reader) == 80
    assert len(segments(tmp_path)) == 6


def test_keys_that_share_their_first_half_are_told_apart(tmp_path: Path):
    keys = np.zeros((90, 16), dtype=np.uint8)
    keys[:, 15] = np.random.default_rng(0).permutation(90)
    keys[45:, 0] = 255
    rows = FolderStore(tmp_path).rows(FINGERPRINT, [LeafSpec((1,), False, torch.uint8)], ABOUT)
    rows.append(keys, [torch.arange(90, dtype=torch.uint8)[:, None]])
    rows.publish()
    assert (tmp_path / FINGERPRINT / INDEX).exists()
    reader = FolderStore(tmp_path).existing(FINGERPRINT)
    found = reader.gather(reader.lookup(keys))[0]
    assert isinstance(found, torch.Tensor)
    assert found[:, 0].tolist() == list(range(90))
    other = keys.copy()
    other[:, 14] = 1
    assert (reader.lookup(other) == -1).all()


def test_many_parts_are_sorted_into_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchrecycle.store import index_file

    monkeypatch.setattr(index_file, "_AT_ONCE", 100)
    monkeypatch.setattr(index_file, "_CHUNK", 37)
    fill(tmp_path, range(3000), step=700)
    shelf = FolderShelf(tmp_path / FINGERPRINT)
    index = open_index("index", shelf.read(INDEX), owner=FINGERPRINT)  # pyright: ignore[reportArgumentType]
    assert (index.run.first[1:] >= index.run.first[:-1]).all()
    assert index.keys == len(index.run) <= 3000
    assert_holds(rows_in(tmp_path), range(3000))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other file"])
def test_a_damaged_index_is_worth_nothing_and_set_aside(folder: Path, damage: str):
    path = folder / FINGERPRINT / INDEX
    data = path.read_bytes()
    at = len(data) // 2
    changed = {
        "flip": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "cut": data[:at],
        "empty": b"",
        "other file": segments(folder)[0].read_bytes(),
    }[damage]
    path.unlink()
    path.write_bytes(changed)
    os.chmod(path, 0o444)
    assert_holds(rows_in(folder), range(60))
    path.unlink(missing_ok=True)
    path.write_bytes(changed)
    report = FolderStore(folder).existing(FINGERPRINT).verify()
    assert report.damaged == (f"{folder / FINGERPRINT}/{INDEX}",)
    assert_holds(rows_in(folder), range(60))


def test_every_byte_of_an_index_counts(folder: Path):
    """Of what is not padding: flipped, it is either noticed or says the same."""
    path = folder / FINGERPRINT / INDEX
    data, draw = bytearray(path.read_bytes()), np.random.default_rng(0)
    right = rows_in(folder).lookup(keys_of(range(60))) >= 0
    assert right.all()
    noticed = 0
    for at in [*range(0, 600, 7), *draw.integers(0, len(data), 200).tolist()]:
        flipped = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        flipped[at] ^= 1 << int(draw.integers(8))
        try:
            open_index("index", flipped, owner=FINGERPRINT)
        except StoreError:
            noticed += 1
    assert noticed == len(range(0, 600, 7)) + 200


def test_an_index_of_files_that_were_exchanged_serves_no_other_row(folder: Path):
    """The index says in which file a key is; a file that took its name holds another object's row there."""
    rows_in(folder).lookup(keys_of([0]))
    listed = open_index("index", FolderShelf(folder / FINGERPRINT).read(INDEX), owner=FINGERPRINT).segments  # pyright: ignore
    one, two = (folder / FINGERPRINT / entry.name for entry in listed[:2])
    aside = folder / FINGERPRINT / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    reader = rows_in(folder)
    exchanged = 0
    for number in range(60):
        try:
            assert_holds(reader, [number])
        except DamagedRowError as error:
            exchanged += "files were exchanged" in str(error)
    assert exchanged == 20
    report = FolderStore(folder).existing(FINGERPRINT).verify()
    assert report.damaged == (f"{folder / FINGERPRINT}/{INDEX}",), "the rows are sound, and the index is not of them"
    assert_holds(rows_in(folder), range(60))


def test_an_index_of_segments_that_left_gives_misses(folder: Path):
    rows_in(folder).lookup(keys_of([0]))
    listed = open_index("index", FolderShelf(folder / FINGERPRINT).read(INDEX), owner=FINGERPRINT).segments  # pyright: ignore
    (folder / FINGERPRINT / listed[0].name).unlink()
    reader = rows_in(folder)
    found = reader.lookup(keys_of(range(60))) >= 0
    assert found.sum() == 50
    assert_holds(reader, np.flatnonzero(found).tolist())
    assert len(reader) == 50


def test_a_folder_that_cannot_be_written_is_indexed_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / FINGERPRINT / INDEX).unlink(missing_ok=True)

    def refuse(self: FolderShelf, name: str, packed: Any, *, keep: bool = False) -> None:
        raise StoreError(f"cannot write {name}: Read-only file system")

    monkeypatch.setattr(FolderShelf, "write", refuse)
    reader = rows_in(folder)
    assert_holds(reader, range(60))
    assert len(reader._lookup._in_memory()) == 0, "no key is kept in memory"
    assert not (folder / FINGERPRINT / INDEX).exists()


def test_an_index_of_a_newer_format_says_upgrade(folder: Path):
    path = folder / FINGERPRINT / INDEX
    path.write_bytes(path.read_bytes().replace(b'"torchrecycle.format":"2"', b'"torchrecycle.format":"9"', 1))
    with pytest.raises(StoreError, match="upgrade torchrecycle"):
        rows_in(folder).lookup(keys_of([0]))


def test_an_index_cannot_name_what_is_no_segment(folder: Path):
    """A name is a file of this folder that looks like a segment, whatever an index says."""
    shelf = FolderShelf(folder / FINGERPRINT)
    (path, *_) = segments(folder)
    segment = rows_in(folder)._segments.read(path.name)
    assert segment is not None
    outside = folder / "outside-000001.safetensors"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    (folder / FINGERPRINT / INDEX).unlink(missing_ok=True)
    for name in ("../../outside-000001.safetensors", "/etc/passwd", path.name):
        entry = Listed(name, segment.digest, segment.rows, segment.nbytes)
        shelf.write(INDEX, pack_index([(entry, segment)], owner=FINGERPRINT))
        found = rows_in(folder).lookup(segment.keys.numpy().copy())
        assert (found == -1).all()


# -- rows that moved ---------------------------------------------------------------------------------------------------


def merge(folder: Path, *, dropped: tuple[int, ...] = ()) -> None:
    """What compaction does: all segments into one, which says where each row was."""
    shelf = FolderShelf(folder / FINGERPRINT)
    old = [(path.name, rows_in(folder)._segments.read(path.name)) for path in segments(folder)]
    keys, leaves, came = [], [[] for _ in SPECS], []
    without = {key.tobytes() for key in keys_of(dropped)}
    for number, (_, segment) in enumerate(old):
        assert segment is not None
        for row in range(segment.rows):
            if segment.keys[row].numpy().tobytes() in without:
                continue
            keys.append(segment.keys[row : row + 1])
            for pieces, leaf in zip(leaves, segment.slice(row, row + 1), strict=True):
                pieces.append(leaf)
            came.append((number, row))
    origin = Origin(
        tuple((name, segment.digest) for name, segment in old if segment is not None),
        torch.tensor(came, dtype=torch.int64).to(torch.uint32),
    )
    shelf.write("merged-000001.safetensors", pack_segment(SPECS, Batch(keys, leaves), owner=FINGERPRINT, origin=origin))
    for name, _ in old:
        (folder / FINGERPRINT / name).unlink()


def gather_in_worker(rows: Rows, locations: np.ndarray, told: Any) -> None:
    torch.set_num_threads(1)
    pictures, texts = rows.gather(locations)
    assert isinstance(pictures, torch.Tensor)
    assert isinstance(texts, Ragged)
    told.put((pictures.numpy().copy(), texts.lengths.numpy().copy()))


def test_locations_of_merged_segments_find_their_rows(folder: Path):
    reader, late = rows_in(folder), rows_in(folder)
    read = reader.lookup(keys_of(range(60)))
    reader.gather(read[:30])
    not_read = late.lookup(keys_of(range(60)))
    merge(folder)
    for rows, locations in ((reader, read), (late, not_read)):
        order = np.random.default_rng(0).permutation(60)
        pictures, texts = rows.gather(locations[order])
        expected, others = leaves_of(order.tolist())
        assert torch.equal(pictures, expected)  # pyright: ignore
        assert torch.equal(texts.values, others.values)  # pyright: ignore


def test_a_spawned_worker_finds_rows_that_were_merged_meanwhile(folder: Path):
    reader = rows_in(folder)
    locations = reader.lookup(keys_of(range(60)))
    merge(folder)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    worker = context.Process(target=gather_in_worker, args=(reader, locations[::-1].copy(), told))
    worker.start()
    pictures, _ = told.get(timeout=60)
    worker.join()
    assert (pictures[::-1] == leaves_of(range(60))[0].numpy()).all()  # pyright: ignore


def test_rows_that_were_dropped_in_merging_are_gone_and_the_others_are_not(folder: Path):
    reader = rows_in(folder)
    locations = reader.lookup(keys_of(range(60)))
    merge(folder, dropped=(5, 17))
    worker = pickle.loads(pickle.dumps(reader))  # with the names, and without what was opened
    kept = np.delete(np.arange(60), [5, 17])
    pictures, _ = worker.gather(locations[kept])
    assert torch.equal(pictures, leaves_of(kept.tolist())[0])  # pyright: ignore
    for at in (5, 17):
        with pytest.raises(GoneRowsError, match="Look the keys up again"):
            worker.gather(locations[at : at + 1])
    reader.refresh()
    assert (reader.lookup(keys_of(range(60))) >= 0).sum() == 58


def test_a_flipped_bit_in_where_rows_were_is_noticed(folder: Path):
    merge(folder)
    path = folder / FINGERPRINT / "merged-000001.safetensors"
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    origin = Segment("merged", data, SPECS, owner=FINGERPRINT).origin
    assert origin is not None
    data[origin.rows.storage_offset() * 4 + 12] ^= 1
    with pytest.raises(DamagedRowError, match=r"origin' is not readable \(it does not match its checksum"):
        Segment("merged", data, SPECS, owner=FINGERPRINT)


def test_rows_without_a_successor_are_gone_in_words(folder: Path):
    reader = rows_in(folder)
    locations = reader.lookup(keys_of(range(60)))
    for path in segments(folder):
        path.unlink()
    with pytest.raises(GoneRowsError, match=r"no longer there.*Look the keys up again"):
        pickle.loads(pickle.dumps(reader)).gather(locations)


def test_after_verifying_the_file_that_is_there_is_read_and_not_an_earlier_one(folder: Path):
    """A damaged file that was mapped, and a sound copy of it that took its name: only the copy was verified."""
    reader = rows_in(folder)
    locations = reader.lookup(keys_of(range(60)))
    reader.gather(locations[:1])
    copies = {path: path.read_bytes() for path in segments(folder)}
    for path, data in copies.items():
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        at = 8 + int.from_bytes(data[:8], "little") + header["leaf.0"]["data_offsets"][0]
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\xff" * 64)
    for path, data in copies.items():
        path.unlink()
        path.write_bytes(data)
    assert reader.verify().ok
    assert_holds(reader, range(60))
    for number in range(60):
        pictures, _ = reader.gather(locations[number : number + 1])
        assert torch.equal(pictures, leaves_of([number])[0])  # pyright: ignore


# -- planes ------------------------------------------------------------------------------------------------------------


def test_planes_that_grow_leave_what_was_given_out(tmp_path: Path):
    spec = LeafSpec((3,), False, torch.float32)
    rows = FolderStore(tmp_path).rows(FINGERPRINT, [spec], ABOUT)
    kept = []
    for number in range(40):
        rows.append(keys_of([number]), [torch.full((1, 3), float(number))])
        rows.publish()
        if number % 8 == 0:
            kept.append((number, rows.gather(rows.lookup(keys_of(range(number + 1))))[0]))
    for number, found in kept:
        assert isinstance(found, torch.Tensor)
        assert found[:, 0].tolist() == list(range(number + 1))
    assert rows._segments.planes._rows.capacity > 40 * SLOT


def test_a_location_that_no_lookup_gave_is_an_error_and_no_row(folder: Path):
    reader = rows_in(folder)
    found = reader.lookup(keys_of(range(60)))
    assert_holds(reader, range(60))
    for wrong in (-1, -2, -(2**40), found.max() + 1, SLOT - 1, SLOT * 6 + 5, 2**40, 2**62):
        with pytest.raises(StoreError, match="no such location"):
            reader.gather(np.array([found[0], wrong]))
    assert_holds(reader, range(60))


def test_without_addresses_batches_are_gathered_segment_by_segment(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from torchrecycle.store import planes

    def none_left(nbytes: int, *, blank: bool = False) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(planes, "Plane", none_left)
    reader = rows_in(folder)
    assert_holds(reader, [*range(60), 3, 59])
    reader.prefetch(reader.lookup(keys_of(range(60))))


def test_pages_are_let_go_and_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from torchrecycle.store import planes

    monkeypatch.setattr(planes, "resident_bytes", lambda: 1)
    reader = rows_in(folder)
    for _ in range(3):
        assert_holds(reader, [*range(60), 3, 59])


def test_a_process_may_hold_a_quarter_of_the_memory():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < resident_bytes() <= memory // 4


def test_file_descriptors_are_not_held(folder: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = rows_in(folder)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
        assert_holds(reader, range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pad_that_is_not_zero_is_damage(folder: Path):
    (path, *_) = segments(folder)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + 10 * 16 + 5] = 1  # behind the ten keys
    with pytest.raises(DamagedRowError, match="zeros, for alignment"):
        Segment("one", torch.frombuffer(data, dtype=torch.uint8), SPECS, owner=FINGERPRINT)
    assert b"".join(chunk.tobytes() for chunk in pack([], {}, owner="", aligned=True).chunks)


def test_threads_that_gather_and_read_ahead_while_segments_are_opened_get_their_rows(folder: Path):
    """Ragged rows are found by the first rows of their segments, which other threads add to meanwhile."""
    fill(folder, range(60, 300), step=5)
    everything = np.arange(300)
    wrong: list[int] = []
    for seed in range(6):
        reader = rows_in(folder)
        locations = reader.lookup(keys_of(range(300)))

        def read(number: int, reader: ShelfRows = reader, locations: np.ndarray = locations) -> None:
            draw = np.random.default_rng(number)
            for _ in range(60):
                some = draw.permutation(everything)[:7]
                if number % 2:
                    reader.prefetch(locations[some])
                pictures, texts = reader.gather(locations[some])
                expected, others = leaves_of(some.tolist())
                same = torch.equal(pictures, expected) and torch.equal(texts.values, others.values)  # pyright: ignore
                wrong.extend([] if same else some.tolist())

        threads = [threading.Thread(target=read, args=(8 * seed + number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
