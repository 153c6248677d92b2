"""Processes that fill the same rows share the work: no lock, hardly any row twice, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from processes import forkserver_context
from small import CUT, Counted, labels, pictures, residual
from torchrecycle import Recycling, recycle
from torchrecycle.fill import filling
from torchrecycle.store import FolderStore, MemoryStore, Rows, claims, open_store
from torchrecycle.store.claims import CLAIMS, Claims, claims_of
from torchrecycle.testing.store_contract import ABOUT, FINGERPRINT, SPECS, keys_of, leaves_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by a fork server")


def rows_in(folder: Path) -> Rows:
    rows = FolderStore(folder).rows(FINGERPRINT, SPECS, ABOUT)
    rows.write_probe({"input": torch.zeros(1)})  # as recycle() does: claims are for a folder that is a store's
    return rows


def publish(rows: Rows, numbers: range) -> None:
    rows.append(keys_of(numbers), leaves_of(numbers))
    rows.publish()


def taken(one: Claims, numbers: range) -> tuple[list[int], list[int]]:
    """Which of these keys are ours, and which another's."""
    ours, theirs = one.take(keys_of(numbers))
    return [n for n, own in zip(numbers, ours, strict=True) if own], [
        n for n, other in zip(numbers, theirs, strict=True) if other
    ]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Claims, Claims]]:
    """Two writers of one folder; the name of the first comes first."""
    one, other = claims_of(rows_in(tmp_path)), claims_of(rows_in(tmp_path))
    one.writer, other.writer = "0" * 16, "f" * 16
    yield one, other
    one.close()
    other.close()


def claimed(numbers: Sequence[int]) -> bytes:
    """The records of a file that claims these keys."""
    return b"".join(b"+" + key.tobytes() for key in keys_of(numbers))


def claim_files(folder: Path) -> list[Path]:
    found = folder / FINGERPRINT / CLAIMS
    return sorted(found.iterdir()) if found.is_dir() else []


# -- one after the other -----------------------------------------------------------------------------------------------


def test_what_one_has_claimed_another_leaves_to_it(both):
    one, other = both
    assert taken(one, range(4)) == ([0, 1, 2, 3], [])
    assert taken(other, range(2, 6)) == ([4, 5], [2, 3])
    assert taken(one, range(4, 7)) == ([6], [4, 5])


def test_what_is_published_is_found_and_never_claimed_again(both, tmp_path):
    one, other = both
    taken(one, range(4))
    assert taken(other, range(4)) == ([], [0, 1, 2, 3])
    publish(rows_in(tmp_path), range(3))
    assert taken(other, range(4)) == ([], [3])


def test_rows_of_a_writer_that_came_and_went_between_two_looks_are_found(both, tmp_path):
    one, other = both
    assert taken(one, range(2)) == ([0, 1], [])
    taken(other, range(2, 4))
    publish(other._rows, range(2, 4))
    other.close()
    assert taken(one, range(6)) == ([0, 1, 4, 5], [])


def test_rows_that_are_published_between_our_look_and_our_claim_are_found(both, monkeypatch):
    one, other = both
    taken(other, range(2))
    append = one._append

    def late(kind: int, keys: np.ndarray) -> bool:
        if not other._rows.lookup(keys_of([2]))[0] >= 0:
            publish(other._rows, range(2, 4))
            other.close()
        return append(kind, keys)

    monkeypatch.setattr(one, "_append", late)
    assert taken(one, range(2, 6)) == ([4, 5], [])


def test_what_a_writer_takes_back_is_for_the_next(both):
    one, other = both
    taken(one, range(4))
    one.close()
    assert taken(other, range(4)) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize("first", [True, False])
def test_of_two_that_claim_in_the_same_moment_just_one_computes(first, both, monkeypatch):
    one, other = both if first else both[::-1]
    append = one._append

    def too_late(kind: int, keys: np.ndarray) -> bool:
        """Between our look and our claim the other claims, looks, sees nothing and computes."""
        monkeypatch.setattr(one, "_append", append)
        assert taken(other, range(3)) == ([0, 1, 2], [])
        return append(kind, keys)

    monkeypatch.setattr(one, "_append", too_late)
    assert taken(one, range(4)) == ([3], [0, 1, 2])
    publish(other._rows, range(3))
    assert taken(one, range(4)) == ([3], [])


def test_many_that_claim_the_same_keys_at_once_never_compute_one_twice(tmp_path):
    rounds, batch, writers = 20, 16, 6
    start = threading.Barrier(writers)
    own: list[list[int]] = []
    lock = threading.Lock()

    def claim_all() -> None:
        one = claims_of(rows_in(tmp_path))
        mine: list[int] = []
        for number in range(rounds):
            start.wait()
            mine += taken(one, range(number * batch, (number + 1) * batch))[0]
        with lock:
            own.append(mine)
        start.wait()
        one.close()

    threads = [threading.Thread(target=claim_all) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    computed = [number for mine in own for number in mine]
    assert len(computed) == len(set(computed))
    # Now and then all who claim a key at once leave it to each other: it is taken at the end.
    assert len(computed) > rounds * batch // 2


def test_in_a_store_in_memory_all_is_ours():
    rows = MemoryStore().rows(FINGERPRINT, SPECS, ABOUT)
    publish(rows, range(2))
    for _ in range(2):
        assert taken(claims_of(rows), range(4)) == ([2, 3], [])


# -- files -------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_before_the_first_claim_and_nothing_is_left(tmp_path):
    rows = rows_in(tmp_path)
    publish(rows, range(4))
    before = sorted(path.name for path in Path(rows.url).rglob("*"))
    one = claims_of(rows)
    assert taken(one, range(4)) == ([], [])
    assert sorted(path.name for path in Path(rows.url).rglob("*")) == before
    assert taken(one, range(6)) == ([4, 5], [])
    assert [path.name for path in claim_files(tmp_path)] == [one.writer]
    assert rows.verify().ok
    assert open_store(tmp_path).fingerprints() == [FINGERPRINT]
    one.close()
    assert sorted(path.name for path in Path(rows.url).rglob("*")) == before


def test_a_folder_that_is_no_store_yet_gets_no_claims(tmp_path):
    rows = FolderStore(tmp_path).rows(FINGERPRINT, SPECS, ABOUT)
    assert taken(claims_of(rows), range(3)) == ([0, 1, 2], [])
    assert not list(tmp_path.iterdir())


def test_where_claims_cannot_be_written_all_goes_on_without(tmp_path):
    rows = rows_in(tmp_path)
    (Path(rows.url) / CLAIMS).write_text("no folder")
    one, other = claims_of(rows), claims_of(rows_in(tmp_path))
    assert taken(one, range(3)) == ([0, 1, 2], [])
    assert taken(other, range(3)) == ([0, 1, 2], [])
    one.close()
    assert (Path(rows.url) / CLAIMS).read_text() == "no folder"


def test_made_up_claims_are_no_claims_and_lead_nowhere(tmp_path):
    rows = rows_in(tmp_path)
    folder = Path(rows.url) / CLAIMS
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_bytes(claims._MAGIC.ljust(64, b"\0") + claimed(range(4)))
    (folder / ("1" * 16)).symlink_to(outside)
    os.mkfifo(folder / ("2" * 16))
    (folder / ("3" * 16)).write_bytes(os.urandom(300))
    (folder / ("4" * 16)).touch()
    (folder / ("5" * 16)).mkdir()
    (folder / "notes.txt").write_bytes(outside.read_bytes())
    torn = claims._MAGIC.ljust(64, b"\0") + claimed([3]) + claimed([2])[:9]
    (folder / ("6" * 16)).write_bytes(torn)
    one = claims_of(rows)
    assert taken(one, range(4)) == ([0, 1, 2], [3])
    one.close()
    assert outside.exists()
    assert (folder / "notes.txt").exists()


def test_a_large_file_of_claims_takes_the_memory_of_those_that_have_no_row(tmp_path):
    rows = rows_in(tmp_path)
    publish(rows, range(4))
    (Path(rows.url) / CLAIMS).mkdir()
    head = claims._MAGIC.ljust(64, b"\0")
    with open(Path(rows.url) / CLAIMS / ("1" * 16), "wb") as file:
        file.write(head + claimed(range(4)) * 100_000 + claimed([5]))
    one = claims_of(rows)
    assert taken(one, range(7)) == ([4, 6], [5])
    assert [len(other.keys) for other in one._others.values()] == [1]
    one.close()


# -- the dead and the stuck --------------------------------------------------------------------------------------------


def of_another_machine(folder: Path, numbers: range) -> Path:
    """A claim file as a process elsewhere has written it."""
    (folder / FINGERPRINT / CLAIMS).mkdir(exist_ok=True)
    path = folder / FINGERPRINT / CLAIMS / ("a" * 16)
    head = claims._MAGIC + b"m" * 16 + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(head.ljust(64, b"\0") + claimed(numbers))
    return path


def test_a_writer_elsewhere_lives_while_its_file_changes_as_we_see_it(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.3)
    rows = rows_in(tmp_path)
    path = of_another_machine(tmp_path, range(4))
    one = claims_of(rows)
    for hours in range(8):  # whatever its clock says
        os.utime(path, ns=(0, hours * 3600 * 10**9))
        assert taken(one, range(4)) == ([], [0, 1, 2, 3])
        time.sleep(0.1)
    time.sleep(0.3)
    assert taken(one, range(4)) == ([0, 1, 2, 3], [])
    one.close()
    assert not claim_files(tmp_path)


def test_an_old_file_that_was_seen_only_briefly_is_removed_too(tmp_path):
    rows = rows_in(tmp_path)
    path = of_another_machine(tmp_path, range(4))
    one = claims_of(rows)
    taken(one, range(4, 6))
    one.close()
    assert claim_files(tmp_path) == [path]
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    one = claims_of(rows)
    taken(one, range(4, 6))
    one.close()
    assert not claim_files(tmp_path)


def claim_and_wait(folder: str, numbers: range, told: Any) -> None:
    claims_of(rows_in(Path(folder))).take(keys_of(numbers))
    told.send("claimed")
    time.sleep(60)


@pytest.fixture(scope="module")
def server() -> Any:
    context = forkserver_context()
    return context


def test_a_killed_process_of_this_machine_is_dead_at_once(tmp_path, server):
    rows = rows_in(tmp_path)
    reader, writer = server.Pipe(duplex=False)
    process = server.Process(target=claim_and_wait, args=(str(tmp_path), range(4), writer))
    process.start()
    assert reader.recv() == "claimed"
    one = claims_of(rows)
    assert taken(one, range(4)) == ([], [0, 1, 2, 3])
    process.kill()
    process.join()
    time.sleep(claims.ASK_SECONDS)
    assert taken(one, range(4)) == ([0, 1, 2, 3], [])
    one.close()
    assert not claim_files(tmp_path)


def test_a_long_batch_does_not_look_like_death(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.4)
    one, other = claims_of(rows_in(tmp_path)), claims_of(rows_in(tmp_path))
    taken(one, range(4))
    for _ in range(5):
        assert taken(other, range(4)) == ([], [0, 1, 2, 3])
        time.sleep(0.2)
    one.close()
    other.close()


def test_a_writer_of_which_nothing_comes_can_be_passed_over(both):
    one, other = both
    taken(one, range(4))
    assert taken(other, range(4)) == ([], [0, 1, 2, 3])
    other.disregard(keys_of(range(2, 9)))
    assert taken(other, range(4)) == ([0, 1, 2, 3], [])


# -- one process fills beside a writer ---------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[tuple[Recycling, Claims, np.ndarray]]:
    """A recycling with a probe; another writer that has claimed the keys of items 8 to 15 of 32; those keys."""
    x = pictures(32)
    recycling = recycle(residual(), x[:2], cut=CUT, store=tmp_path)
    recycling._write_probe()
    keys = recycling.source.keys(recycling.source.rule(x))
    other = claims_of(FolderStore(tmp_path).existing(recycling.fingerprint))
    ours, _ = other.take(keys[8:16])
    assert ours.all()
    yield recycling, other, keys
    other.close()
    recycling.detach()


def test_what_a_living_writer_publishes_meanwhile_is_waited_for_and_not_computed(beside):
    recycling, other, keys = beside
    inputs = recycling.source.rule(pictures(32)[8:16])
    leaves = recycling.source.encode(recycling.bypass.prefix(inputs), inputs)

    def publish_later() -> None:
        time.sleep(1.0)
        other._rows.append(keys[8:16], leaves)
        other._rows.publish()

    thread = threading.Thread(target=publish_later)
    thread.start()
    data = Counted(TensorDataset(pictures(32), labels(32)))
    report = recycling.fill(data, batch_size=4)
    thread.join()
    assert (report.computed, report.found, report.missing) == (24, 8, 0)
    assert data.count() == 32 + 16  # and 16 to see whether they are the same twice
    assert recycling.check((pictures(32), labels(32))).ok


def test_what_a_writer_gives_up_is_read_again_and_computed(beside):
    recycling, other, _ = beside
    thread = threading.Timer(0.5, other.close)
    thread.start()
    data = Counted(TensorDataset(pictures(32), labels(32)))
    report = recycling.fill(data, batch_size=4)
    thread.join()
    assert (report.computed, report.found, report.missing) == (32, 0, 0)
    assert data.count() == 32 + 16 + 8
    assert recycling.check((pictures(32), labels(32))).ok


def test_a_living_writer_of_which_nothing_comes_is_not_waited_for_without_an_end(beside, monkeypatch):
    recycling, _, _ = beside
    monkeypatch.setattr(filling, "STUCK_SECONDS", 0.5)
    began = time.monotonic()
    report = recycling.fill(TensorDataset(pictures(32), labels(32)), batch_size=4)
    assert time.monotonic() - began > 0.5
    assert (report.computed, report.missing) == (32, 0)


# -- real processes fill at once ---------------------------------------------------------------------------------------

OBJECTS, BATCH = 400, 8


class Convolutions(nn.Module):
    """Some milliseconds for an image of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, padding=2, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().eval()


def images() -> torch.Tensor:
    return torch.randn(OBJECTS, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Told(Dataset[Any]):
    """Tells the highest item that was read."""

    def __init__(self, reached: Any) -> None:
        self.images, self.reached = images(), reached

    def __len__(self) -> int:
        return OBJECTS

    def __getitem__(self, index: int) -> Any:
        if index != OBJECTS - 1:  # which is read first, to see whether it is the same twice
            self.reached.value = max(self.reached.value, index)
        return self.images[index], index


def fill_at_once(folder: str, start: Any, reached: Any, told: Any) -> None:
    torch.set_num_threads(1)
    data = Told(reached)
    with recycle(convolutions(), data.images[:2], cut="body", store=FolderStore(folder)) as recycling:
        reached.value = 0
        start.wait()
        report = recycling.fill(data, batch_size=BATCH)
        told.send((report.computed, report.found, report.missing))


def run_at_once(server: Any, folder: Path, processes: int, *, kill: bool = False) -> list[tuple[int, int, int]]:
    """What those report that were not killed."""
    start = server.Barrier(processes)
    ends, running, reached = [], [], []
    for _ in range(processes):
        end, told = server.Pipe(duplex=False)
        reached.append(server.Value("q", 0))
        running.append(server.Process(target=fill_at_once, args=(str(folder), start, reached[-1], told)))
        running[-1].start()
        told.close()
        ends.append(end)
    if kill:
        while reached[0].value < OBJECTS // 3:
            time.sleep(0.002)
        os.kill(running[0].pid, signal.SIGKILL)
        running, ends = [running[0], *running[1:]], ends[1:]
    reports = [end.recv() for end in ends]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [-signal.SIGKILL if kill else 0, *[0] * (processes - 1)]
    return reports


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, torch.Tensor]:
    """Keys and rows as one process writes them."""
    return content(tmp_path_factory.mktemp("alone"), fill=True)


def content(folder: Path, *, fill: bool = False) -> tuple[np.ndarray, torch.Tensor]:
    data = images()
    with recycle(convolutions(), data[:2], cut="body", store=FolderStore(folder)) as recycling:
        if fill:
            assert recycling.fill(TensorDataset(data, torch.arange(OBJECTS)), batch_size=BATCH).computed == OBJECTS
        rows = recycling.source.rows
        keys = recycling.source.keys(recycling.source.rule(data))
        (leaf,) = rows.gather(rows.lookup(keys))
        assert isinstance(leaf, torch.Tensor)
        assert rows.verify().ok
        assert len(rows) == OBJECTS
        return keys, leaf


def assert_same_content(folder: Path, alone: tuple[np.ndarray, torch.Tensor]) -> None:
    keys, rows = content(folder)
    assert np.array_equal(keys, alone[0])
    # Batches are the same where nobody was killed; others differ in the last bits.
    assert torch.allclose(rows, alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kill", [False, True], ids=["all live", "one is killed"])
def test_processes_that_fill_at_once_compute_hardly_anything_twice(processes, kill, tmp_path, server, alone):
    reports = run_at_once(server, tmp_path, processes, kill=kill)
    computed = sum(computed for computed, _, _ in reports)
    print(f"\n{processes} processes computed {computed} rows of {OBJECTS}: {[own for own, _, _ in reports]}")
    assert computed <= 1.05 * OBJECTS
    assert kill or computed >= OBJECTS
    assert all(own + found == OBJECTS and not missing for own, found, missing in reports)
    assert_same_content(tmp_path, alone)
    assert not list(tmp_path.glob(f"*/{CLAIMS}"))
