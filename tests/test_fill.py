"""Filling computes what is missing and nothing else, resumes where it was stopped, and refuses what is random."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from faults.disks import Ballast, read_only, small_disk
from small import CUT, SIDE, Counted, Residual, labels, pictures, residual, write_pictures
from torchrecycle import (
    BatchError,
    CutError,
    RandomInputError,
    RecycleWarning,
    Recycling,
    StoreError,
    fill_many,
    recycle,
)
from torchrecycle.data import Manifest
from torchrecycle.fill import fill_pass, takes_no_more
from torchrecycle.store import FolderStore, LeafSpec

X, Y = pictures(30), labels(30)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


# -- what a report says ------------------------------------------------------------------------------------------------


def test_a_report_counts_what_was_found_and_what_was_computed(made):
    report = made.fill(TensorDataset(X, Y), batch_size=7)
    assert (report.objects, report.found, report.computed) == (30, 0, 30)
    assert report.bytes_written >= made.source.rows.nbytes >= 30 * 16 * 4 * 4 * 4
    assert 0 < report.prefix_seconds < report.seconds
    again = made.fill(TensorDataset(X, Y))
    assert (again.objects, again.found, again.computed, again.bytes_written) == (30, 30, 0, 0)
    assert "nothing to fill: all 30 objects" in str(again)
    assert (made.stats.misses, made.stats.bytes_written) == (30, report.bytes_written)


def test_duplicates_are_computed_once(made):
    report = made.fill(Subset(TensorDataset(X, Y), [0, 1, 0, 2, 1, 0, 2, 0]), batch_size=3)
    assert (report.found, report.computed) == (5, 3)
    assert len(made.source.rows) == 3


def test_of_a_data_set_that_grew_only_the_new_objects_are_computed(made):
    data = [(X[i], int(Y[i])) for i in range(10)]
    loader = made.loader(data, batch_size=4)
    list(loader)
    data.extend((X[i], int(Y[i])) for i in range(10, 14))
    assert sum(len(x) for x, _ in loader) == 14
    assert made.stats.misses == 14


@pytest.mark.parametrize("order", [list(range(29, -1, -1)), [5, 3, 3, 20]])
def test_another_order_or_subset_is_found(order, made):
    made.fill(TensorDataset(X, Y))
    assert made.fill(Subset(TensorDataset(X, Y), order)).computed == 0


def test_a_fill_leaves_generators_flags_and_modes_as_they_were(made):
    made.model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    made.fill(TensorDataset(X, Y), num_workers=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert all(module.training for module in made.model.modules())


# -- interruptions -----------------------------------------------------------------------------------------------------


class Breaking(Dataset[Any]):
    """Raises at one item."""

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        self.at, self.error = at, error

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            raise self.error()
        return X[index], int(Y[index])


@pytest.mark.parametrize("error", [lambda: ValueError("broken file"), KeyboardInterrupt], ids=["error", "Ctrl-C"])
def test_an_interrupted_fill_keeps_what_was_computed(error, made):
    with pytest.raises((ValueError, KeyboardInterrupt)):
        made.fill(Breaking(22, error), batch_size=4)
    report = made.fill(TensorDataset(X, Y), batch_size=4)
    assert (report.found, report.computed) == (20, 10)
    assert made.check((X, Y)).ok


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from faults.disks import Ballast, read_only, small_disk
from small import CUT, pictures, residual
from torchrecycle import recycle
from torchrecycle.store import FolderStore, LeafSpec

class Slow:
    def __len__(self):
        return 30
    def __getitem__(self, index):
        time.sleep(0.01)
        print(index, flush=True)
        return pictures(30)[index], index

if __name__ == "__main__":
    recycling = recycle(residual(), pictures(2), cut=CUT, store=FolderStore({store!r}, segment_bytes=4096))
    recycling.fill(Slow(), batch_size=2)
"""


def test_a_killed_fill_resumes(tmp_path):
    store = tmp_path / "store"
    code = KILLED.format(tests=str(Path(__file__).parent), store=str(store))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            if line.strip() == "24":
                break
        process.send_signal(signal.SIGKILL)
    recycling = recycle(residual(), X[:2], cut=CUT, store=FolderStore(store, segment_bytes=4096))
    assert recycling.source.rows.verify().ok
    report = recycling.fill(TensorDataset(X, Y))
    # Rows of 1 KB in segments of 4: at item 24, of which no segment is there yet, at least five had been published.
    assert 20 <= report.found < 30
    assert report.computed == 30 - report.found
    assert recycling.check((X, Y)).ok
    assert recycling.check((X, Y)).found == 30


# -- the store takes no more -------------------------------------------------------------------------------------------

MANY = TensorDataset(pictures(120), labels(120))


def kept_in(folder: Path, cut: str = CUT) -> Recycling:
    """Rows of 1 KB at `CUT` and of 8 KB at the stem, in segments of 16 KB; with a probe."""
    recycling = recycle(residual(), X[:2], cut=cut, store=FolderStore(folder, segment_bytes=16 * 1024))
    recycling._write_probe()
    return recycling


def with_row(recycling: Recycling, manifest: Manifest) -> int:
    return int((recycling.source.rows.lookup(manifest.keys) >= 0).sum())


@pytest.mark.parametrize("room", [0, 3, 20])
def test_a_full_disk_ends_filling_with_one_warning_and_a_whole_manifest(room, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        made = kept_in(disk / "store")
        ballast = Ballast(disk)
        ballast.leave_pages(room)
        counter = Counter(made.model.get_submodule("stem"))
        with pytest.warns(RecycleWarning, match=r"store is full.*objects of 'stages.1' have rows.*No space") as caught:
            [(report, manifest)] = fill_pass([made], MANY, batch_size=4)
        ran = counter.calls
        assert len(caught) == 1
        assert report.missing == 120 - with_row(made, manifest) == 120 - report.computed
        assert (report.missing == 120) == (room < 5)
        assert report.found == 0
        assert f"; {report.missing} objects have no row" in str(report)
        assert f"{report.computed} of 120 objects" in str(caught[0].message)
        # Batches of four that were computed, those of a segment that found no room, and the proof of a size.
        assert ran <= report.computed // 4 + 8 + 2
        assert manifest.columns[1].values.tolist() == labels(120).tolist()
        assert made.source.rows.discard() == 0
        assert not list(disk.glob("store/*/*.tmp-*"))
        assert not list(disk.glob("store/*/claims"))
        # With room again, what is missing is filled.
        ballast.free()
        [(again, _)] = fill_pass([made], MANY, batch_size=4)
        assert (again.found, again.computed, again.missing) == (report.computed, report.missing, 0)
        assert made.check((X, Y)).ok
        made.detach()


def test_a_store_that_cannot_be_written_ends_filling_too(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        made = kept_in(disk / "store")
        fill_pass([made], Subset(MANY, range(40)), batch_size=4)
        with read_only(disk), pytest.warns(RecycleWarning, match=r"cannot be written.*40 of 120.*Read-only") as caught:
            [(report, manifest)] = fill_pass([made], MANY, batch_size=4)
        assert len(caught) == 1
        assert (report.found, report.computed, report.missing) == (40, 0, 80)
        assert with_row(made, manifest) == 40
        made.detach()


def test_where_not_even_a_probe_found_room_nothing_is_computed_and_the_same_warning_tells(made):
    error = StoreError("cannot write the probe: No space left on device")
    error.errno = errno.ENOSPC
    assert takes_no_more(error)
    counter = Counter(made.model.get_submodule("stem"))
    with pytest.warns(RecycleWarning, match=r"store is full.*0 of 30 objects of 'stages.1' have rows.*the probe"):
        [(report, manifest)] = fill_pass([made], TensorDataset(X, Y), refused={0: error})
    assert (report.computed, report.missing, len(manifest)) == (0, 30, 30)
    assert counter.calls == 0


def test_a_fill_of_what_is_there_says_nothing_of_a_store_that_cannot_be_written(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        made = kept_in(disk / "store")
        fill_pass([made], MANY)
        with read_only(disk):
            [(report, _)] = fill_pass([made], MANY)
        assert (report.found, report.computed, report.missing) == (120, 0, 0)
        made.detach()


def test_several_cuts_on_a_full_disk_give_one_warning_that_names_each(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        model = residual()
        both = [
            recycle(model, X[:2], cut=cut, store=FolderStore(disk / "store", segment_bytes=16 * 1024))
            for cut in ("stem", CUT)
        ]
        for made in both:
            made._write_probe()
        Ballast(disk).leave_pages(30)
        with pytest.warns(RecycleWarning, match=r"'stem' have rows, \d+ of 120 objects of 'stages.1'") as caught:
            results = fill_pass(both, MANY, batch_size=4)
        assert len(caught) == 1
        for made, (report, manifest) in zip(both, results, strict=True):
            assert 0 < report.missing == 120 - with_row(made, manifest)
            made.detach()


def test_another_error_of_the_disk_is_an_error(tmp_path, monkeypatch):
    made = kept_in(tmp_path)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        fill_pass([made], MANY)


def test_a_store_that_fails_in_its_thread_ends_filling_too(tmp_path):
    """Segments of 1 MB and more are written in a thread, whose error comes out at the next batch."""
    with small_disk(tmp_path / "disk", pages=3 * 256 + 64) as disk:
        store = FolderStore(disk / "store", segment_bytes=2**20 + 2**19)
        made = recycle(residual(), X[:2], cut="stem", store=store)
        made._write_probe()
        many = TensorDataset(pictures(900), labels(900))
        with pytest.warns(RecycleWarning, match="store is full"):
            [(report, manifest)] = fill_pass([made], many, batch_size=30)
        # Rows of 8 KB: the first segment fitted, the second did not.
        assert 180 <= report.computed == with_row(made, manifest) == 900 - report.missing < 400
        made.detach()


# -- memory ------------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads what Linux tells of memory")
def test_rows_that_wait_take_two_segments_of_memory_at_most_and_leave_none(tmp_path):
    segment, piece = 16 * 2**20, 2 * 2**20
    store = FolderStore(tmp_path, segment_bytes=segment)
    rows = store.rows("f" * 32, [LeafSpec((piece // 64 // 4,), False, torch.float32)], {})
    one = torch.randn(64, piece // 64 // 4)
    given = torch.empty_like(one)  # so that this test takes no memory of its own
    keys = np.random.default_rng(0).integers(0, 255, (128 * 64, 16), dtype=np.uint8)
    rows.append(keys[:64], [one])
    rows.publish()
    before, peak = anonymous_bytes(), 0
    for start in range(64, len(keys), 64):
        rows.append(keys[start : start + 64], [torch.add(one, start, out=given)])
        peak = max(peak, anonymous_bytes() - before)
    rows.publish()
    assert len(rows) == len(keys)
    assert peak < 2 * segment + 2 * piece
    assert anonymous_bytes() - before < 2 * piece
    # 256 MB were written. Each row is where its key is.
    for start in (64, 64 * 60, len(keys) - 64):
        (found,) = rows.gather(rows.lookup(keys[start : start + 64]))
        assert torch.equal(found, one + start)


THREADED = """
import sys, torch, numpy as np
from torchrecycle.store import FolderStore, LeafSpec
rows = FolderStore(sys.argv[1], segment_bytes=2**21).rows("f" * 32, [LeafSpec((2**16,), False, torch.float32)], {})
keys = np.arange(10 * 16, dtype=np.uint8).reshape(10, 16)
for number in range(10):
    rows.append(keys[number : number + 1], [torch.full((1, 2**16), float(number))])
"""


def test_the_end_of_the_interpreter_waits_for_the_segment_that_is_being_written(tmp_path):
    subprocess.run([sys.executable, "-c", THREADED, str(tmp_path)], check=True)
    rows = FolderStore(tmp_path).existing("f" * 32)
    # Eight rows of 256 KB fill a segment; the two after them were published by nobody.
    assert len(rows) == 8
    assert rows.verify().ok


# -- another process ---------------------------------------------------------------------------------------------------

SECOND = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from torch.utils.data import TensorDataset
from small import *
from torchrecycle import recycle

reads = 0
def counting(kind):
    get = kind.__getitem__
    def read(self, index):
        global reads
        reads += len(index) if isinstance(index, list) else 1
        return get(self, index)
    kind.__getitem__ = read

class Own(torch.utils.data.Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        return pictures(12)[index], index

def make(kind):
    if kind == "tensors":
        counting(TensorDataset)
        return TensorDataset(pictures(12), labels(12)), pictures(2)
    if kind == "folder":
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import ToTensor
        counting(ImageFolder)
        dataset = ImageFolder({folder!r}, ToTensor())
        return dataset, torch.stack([ToTensor()(dataset.loader(path)) for path, _ in dataset.samples[:2]])
    if kind == "hugging face":
        import datasets
        dataset = datasets.Dataset.from_dict(dict(x=pictures(12).tolist(), y=list(range(12)))).with_format("torch")
        del datasets.Dataset.__getitems__
        counting(datasets.Dataset)
        return dataset, dict(x=pictures(2))
    counting(Own)
    return Own(), pictures(2)

if __name__ == "__main__":
    dataset, example = make({kind!r})
    recycling = recycle(residual(), example, cut=CUT, store={store!r})
    batches = list(recycling.loader(dataset, batch_size=4))
    targets = torch.cat([b["y"] if isinstance(b, dict) else b[1] for b in batches]).tolist()
    print(json.dumps([reads, recycling.stats.misses, targets]))
"""


@pytest.mark.parametrize("kind", ["tensors", "folder", "hugging face", "own"])
def test_a_second_process_reads_the_data_set_as_little_as_can_be_known(kind, tmp_path):
    import json

    folder = write_pictures(tmp_path / "files")
    code = SECOND.format(tests=str(Path(__file__).parent), kind=kind, store=str(tmp_path / "store"), folder=str(folder))
    found = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found.append(json.loads(out.stdout))
    (_, first_misses, first_targets), (reads, misses, targets) = found
    assert (first_misses, misses) == (12, 0)
    assert first_targets == targets
    # Read twice at 8 places, for random transforms, and then once each.
    assert reads == 12 + 16 if kind == "own" else reads <= 8


# -- random transforms -------------------------------------------------------------------------------------------------


class Hidden:
    """A generator where nobody finds it: in a closure of a C function."""

    def __init__(self) -> None:
        self.draw = map(np.random.default_rng(0).random, [1] * 10_000).__next__


GENERATORS: dict[str, Callable[[], Callable[[], float]]] = {
    "Python's random": lambda: random.random,
    "NumPy's": lambda: np.random.rand,
    "torch's": lambda: lambda: float(torch.rand(())),
    "a random generator that it holds": lambda: np.random.default_rng(0).random,
    "a random generator that it holds ": lambda: random.Random(0).random,
    "a random generator that it holds  ": lambda: np.random.RandomState(0).rand,
    "other model inputs each time": lambda: Hidden().draw,
}


class Flipped(Dataset[Any]):
    def __init__(self, draw: Callable[[], Any], target: bool = False) -> None:
        self.draw, self.target = draw, target

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        flip = float(np.asarray(self.draw()).reshape(-1)[0]) < 0.5
        if self.target:
            return X[index], int(flip)
        return X[index].flip(-1) if flip else X[index], int(Y[index])


@pytest.mark.parametrize("who", GENERATORS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_random_transform_is_refused_whatever_generator_it_draws_from(who, workers, made):
    with pytest.raises(RandomInputError, match=who.strip()):
        made.fill(Flipped(GENERATORS[who]()), num_workers=workers)
    assert len(made.source.rows) == 0


def test_a_private_generator_on_a_transform_is_found(made):
    class Transform:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def __call__(self) -> float:
            return 0.9 if self.rng.random() < 2 else 0.1

    with pytest.raises(RandomInputError, match="a random generator that it holds"):
        made.fill(Flipped(Transform()))


def test_random_targets_are_refused(made):
    with pytest.raises(RandomInputError, match="other targets each time"):
        made.fill(Flipped(Hidden().draw, target=True))


def test_random_torchvision_transforms_are_named(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

    folder = ImageFolder(write_pictures(tmp_path / "files"), Compose([RandomHorizontalFlip(), ToTensor()]))
    recycling = recycle(residual(), torch.zeros(2, 3, SIDE, SIDE), cut=CUT, store="memory://flip")
    with pytest.raises(RandomInputError, match=r"torch's generator.*RandomHorizontalFlip"):
        recycling.fill(folder)


# -- many cuts in one pass ---------------------------------------------------------------------------------------------

CUTS = ["stem", "stages.0", "stages", "stages.2"]


def rows_of(recycling: Recycling) -> list[torch.Tensor]:
    inputs = recycling.source.rule(X)
    return recycling.source.rows.gather(recycling.source.rows.lookup(recycling.source.keys(inputs)))


class Counter:
    """Counts a module's calls."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.filterwarnings("ignore:a hook on:torchrecycle.RecycleWarning")
@pytest.mark.parametrize("copies", [False, True])
def test_several_cuts_filled_in_one_pass_have_the_rows_of_separate_fills(copies, tmp_path):
    model = residual()
    alone = []
    for cut in CUTS:
        with recycle(model, X[:2], cut=cut, store=tmp_path / "alone") as one:
            one.fill(TensorDataset(X, Y), batch_size=8)
            alone.append(rows_of(one))
    models = [residual() if copies else model for _ in CUTS]
    together = [recycle(m, X[:2], cut=cut, store=tmp_path / "together") for m, cut in zip(models, CUTS, strict=True)]
    counters = [Counter(m.stem) for m in dict.fromkeys(models)]
    reads = Counted(TensorDataset(X, Y))
    before = [c.calls for c in counters]
    reports = fill_many(together, reads, batch_size=8)
    ran = [c.calls - b for c, b in zip(counters, before, strict=True)]
    # four batches of two sizes; and for each cut its probe, the comparison, two objects alone for each size, and the
    # counter's own hook tried once, and the prefix tried again before it is filled
    assert sum(ran) <= 4 + 6 * len(CUTS)
    assert reads.count() == 30 + 16
    assert [report.computed for report in reports] == [30] * len(CUTS)
    for recycling, rows in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows_of(recycling), rows, strict=True))
    assert [report.computed for report in fill_many(together, reads)] == [0] * len(CUTS)


def test_in_one_pass_each_cut_computes_only_what_it_lacks(tmp_path):
    model = residual()
    one, two = (recycle(model, X[:2], cut=cut, store=tmp_path / "store") for cut in ("stem", "stages.1"))
    one.fill(TensorDataset(X[:10], Y[:10]))
    two.fill(TensorDataset(X[5:20], Y[5:20]))
    reports = fill_many([one, two], TensorDataset(X, Y), batch_size=8)
    assert [report.computed for report in reports] == [20, 15]
    assert one.check((X, Y)).ok
    assert two.check((X, Y)).ok


def test_models_of_different_weights_are_not_filled_in_one_pass():
    one = recycle(residual(0), X[:2], cut="stem", store="memory://a")
    two = recycle(residual(1), X[:2], cut=CUT, store="memory://b")
    with pytest.raises(CutError, match=r"different weights before the cut.*one by one"):
        fill_many([one, two], TensorDataset(X, Y))


class Scaled(Residual):
    scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


def test_models_of_different_glue_are_not_filled_in_one_pass():
    torch.manual_seed(0)
    plain, scaled = Residual().eval(), Scaled().eval()
    scaled.load_state_dict(plain.state_dict())
    one = recycle(plain, X[:2], cut="stem", store="memory://c")
    two = recycle(scaled, X[:2], cut=CUT, store="memory://d")
    with pytest.raises(CutError, match="compute different things before the cut"):
        fill_many([one, two], TensorDataset(X, Y))


def test_what_differs_in_how_inputs_are_found_is_not_filled_in_one_pass():
    model = residual()
    one = recycle(model, X[:2], cut="stem", store="memory://e")
    two = recycle(model, X[:2], cut=CUT, store="memory://f", key=lambda item: item[1])
    with pytest.raises(BatchError, match="must have the same key="):
        fill_many([one, two], TensorDataset(X, Y), name="v1")
    with pytest.raises(BatchError, match="at least one recycling"):
        fill_many([], TensorDataset(X, Y))
    one.detach()
    with pytest.raises(BatchError, match="detached"):
        fill_many([one], TensorDataset(X, Y))


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_says_nothing_at_once_and_a_line_after_two_seconds(capsys, monkeypatch):
    from torchrecycle.progress import progress

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("filling", 100) as shown:
        shown.advance(10)
        assert capsys.readouterr().err == ""
        now[0] = 2.5
        shown.advance(10)
        assert capsys.readouterr().err == "filling: 20 of 100 objects, 2 s\n"
        now[0] = 5.0
        shown.advance(10)
        assert capsys.readouterr().err == ""
        now[0] = 13.0
        shown.advance(10)
        assert capsys.readouterr().err == "filling: 40 of 100 objects, 13 s\n"


# -- open files --------------------------------------------------------------------------------------------------------


class ManyTargets(Dataset[Any]):
    """Items with targets of many kinds: a number, a class, boxes of which each picture has another count, a text."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        boxes = torch.full((index % 3 + 1, 4), float(index), dtype=torch.bfloat16)
        target = {"class": torch.tensor(index), "boxes": boxes, "text": f"the {index}th", "place": (index, 0.5)}
        return X[index], {**target, "points": np.arange(index % 3)}


def separate(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items]), [target for _, target in items]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_targets_that_come_from_workers_hold_no_file_open_and_are_what_they_were(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    made = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        made.fill(ManyTargets(), batch_size=2, num_workers=1, collate_fn=separate)
        loader = made.loader(ManyTargets(), batch_size=len(X), collate_fn=separate)
        ((_, targets),) = loader
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for index, target in enumerate(targets):
        want = ManyTargets()[index][1]
        assert list(target) == list(want)
        assert torch.equal(target["class"], want["class"])
        assert target["boxes"].dtype is torch.bfloat16
        assert torch.equal(target["boxes"], want["boxes"])
        assert (target["text"], target["place"]) == (want["text"], want["place"])
        assert np.array_equal(target["points"], want["points"])
