"""Is the store as fast as memory, and as the disk where the rows are not in memory?

``make bench-store`` writes 4 GB of rows of each of four sizes (one at a time; 1.5 KB, 150 KB, 770 KB, and ragged ones
of 20 to 512 steps), reads random batches of 64 and 256 of them, and compares within one process, in turn:

* warm: `Rows.gather` with `torch.index_select` on a tensor in memory that holds the same rows, out of place, with the
  same number of threads; for ragged rows on the joined values, the numbers of the steps worked out in both;
* cold, after the files' pages were dropped (`posix_fadvise`; that they are gone is checked): with ``pread`` of the same
  bytes one by one, and with reading the files from end to end; ours in random order, with reading ahead in a thread,
  and in shuffled blocks. *First* is the first epoch of a process, which compares checksums, *later* the ones after it;
* LMDB, a TensorDict memory map, a Hugging Face `Dataset`, HDF5 and one ``.pt`` file per object, each with the same rows
  and in its own fast way, warm and cold. What each gives is compared with the rows, to the bit.

Then memory over 50 epochs with persistent workers, an index of ten million keys, and the share of the first epoch that
checksums take. Figures stand beside the goals of the store.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from torchrecycle.data import BlockShuffleSampler, RecycledDataset
from torchrecycle.data import order as reading
from torchrecycle.store import Leaf, LeafSpec, Ragged, Rows, open_store, planes
from torchrecycle.store.mapping import release
from torchrecycle.store.segment import Segment
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"
FINGERPRINT = "bench"
GIGABYTE = 10**9
MEGABYTE = 10**6
BATCHES = (64, 256)
COLD_ROWS = 100_000
"""So many rows are read at most in a cold pass: of 1.5 KB each, that takes the disk some seconds."""
FILES_OF_PT = 2_000
"""So many ``.pt`` files are written at most: one per object takes long."""


@dataclass(frozen=True)
class Size:
    """A kind of rows."""

    name: str
    spec: LeafSpec
    lengths: tuple[int, int] | None = None
    """The shortest and the longest, if they are ragged."""
    warm_goal: float = 0.8
    """Of the speed of memory."""


SIZES = [
    Size("1.5 KB", LeafSpec((384,), ragged=False, dtype=torch.float32), warm_goal=0.5),
    Size("150 KB", LeafSpec((96, 28, 28), ragged=False, dtype=torch.bfloat16)),
    Size("770 KB", LeafSpec((512, 768), ragged=False, dtype=torch.bfloat16)),
    Size("ragged", LeafSpec((768,), ragged=True, dtype=torch.bfloat16), lengths=(20, 512)),
]


# -- rows --------------------------------------------------------------------------------------------------------------


class Data:
    """Rows in memory: what is written everywhere, and what everything is compared with."""

    def __init__(self, size: Size, gb: float, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.size = size
        self.unit = math.prod(size.spec.shape) * size.spec.dtype.itemsize
        total = int(gb * GIGABYTE) // self.unit
        if size.lengths is None:
            self.lengths = np.ones(total, dtype=np.int64)
        else:
            low, high = size.lengths
            self.lengths = draw.integers(low, high + 1, 2 * total // (low + high))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.count = len(self.lengths)
        self.keys = draw.integers(0, 256, (self.count, 16), dtype=np.uint8)
        self.values = self._values(int(self.lengths.sum()), draw)
        self.nbytes = self.values.numel() * self.values.dtype.itemsize

    def _values(self, units: int, draw: np.random.Generator) -> torch.Tensor:
        """Random bytes, the same again and again, with the number of each unit in its first four."""
        some = torch.from_numpy(draw.integers(0, 100, 32 * 2**20, dtype=np.uint8))
        flat = torch.empty(units * self.unit, dtype=torch.uint8)
        for start in range(0, len(flat), len(some)):
            part = flat[start : start + len(some)]
            part.copy_(some[: len(part)])
        numbers = torch.arange(units, dtype=torch.int32).view(torch.uint8).view(units, 4)
        flat.view(units, self.unit)[:, :4] = numbers
        return flat.view(self.size.spec.dtype).view(units, *self.size.spec.shape)

    def steps(self, index: np.ndarray) -> torch.Tensor:
        """The numbers of the units of some rows."""
        lengths = self.lengths[index]
        before = np.cumsum(lengths) - lengths
        return torch.from_numpy(np.repeat(self.starts[index] - before, lengths) + np.arange(lengths.sum()))

    def batch(self, index: np.ndarray) -> torch.Tensor:
        """Rows as torch gives them from memory: of ragged ones, the joined values."""
        which = torch.from_numpy(index) if self.size.lengths is None else self.steps(index)
        return torch.index_select(self.values, 0, which)

    def row(self, number: int) -> torch.Tensor:
        """One row, not copied: of those that are not ragged ``[1, ...]``."""
        return self.values[self.starts[number] : self.starts[number] + self.lengths[number]]

    def nbytes_of(self, index: np.ndarray) -> int:
        return int(self.lengths[index].sum()) * self.unit

    def chunks(self, nbytes: int = 64 * MEGABYTE) -> Iterator[range]:
        """Ranges of rows of about so many bytes."""
        step = max(1, nbytes * self.count // self.nbytes)
        for start in range(0, self.count, step):
            yield range(start, min(start + step, self.count))

    def units_of(self, rows: range) -> torch.Tensor:
        return self.values[self.starts[rows.start] : self.starts[rows.stop - 1] + self.lengths[rows.stop - 1]]


class Kept:
    """Rows on disk, in one of the ways there are."""

    name: str
    limit: int | None = None
    """How many rows are written at most."""

    def __init__(self, data: Data, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.count = min(data.count, self.limit or data.count)

    def write(self) -> None:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def batch(self, index: np.ndarray) -> torch.Tensor:
        """Rows as one tensor: of ragged ones, the joined values."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all maps."""

    def out(self, index: np.ndarray) -> torch.Tensor:
        units = int(self.data.lengths[index].sum())
        return torch.empty((units, *self.data.size.spec.shape), dtype=self.data.size.spec.dtype)


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class Ours(Kept):
    """This library's store."""

    name = "torchrecycle"

    def write(self) -> None:
        rows = open_store(self.folder).rows(FINGERPRINT, [self.data.size.spec], {})
        for part in self.data.chunks():
            units = self.data.units_of(part)
            lengths = torch.from_numpy(self.data.lengths[part.start : part.stop])
            leaf: Leaf = units if self.data.size.lengths is None else Ragged(units, lengths)
            rows.append(self.data.keys[part.start : part.stop], [leaf])
        rows.publish()

    def open(self) -> None:
        self.rows: Rows = open_store(self.folder).rows(FINGERPRINT, [self.data.size.spec], {})
        self.locations = torch.from_numpy(self.rows.lookup(self.data.keys))

    def batch(self, index: np.ndarray) -> torch.Tensor:
        (leaf,) = self.rows.gather(self.locations[torch.from_numpy(index)])
        return leaf.values if isinstance(leaf, Ragged) else leaf

    def close(self) -> None:
        del self.rows
        gc.collect()

    def let_go(self) -> None:
        """Keep the maps and what is known to be sound, without any page."""
        segments: Any = self.rows._segments  # pyright: ignore
        for segment in segments._opened.values():
            release(segment.data)
        segments.planes.release()

    def dataset(self) -> RecycledDataset:
        """What orders and reading ahead are made for."""
        dataset = RecycledDataset(range(self.data.count), None)
        dataset.locations = self.locations
        dataset.source = SimpleNamespace(rows=self.rows)  # pyright: ignore
        return dataset

    def segments(self) -> list[Path]:
        return sorted(p for p in (self.folder / FINGERPRINT).iterdir() if re.fullmatch(r"\w+-\d+.safetensors", p.name))

    def places(self) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """The segments' files; for each row, in which one it is, and at which byte."""
        files, starts, counts = self.segments(), [], []
        for path in files:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            entry = header["leaf.0" if self.data.size.lengths is None else "leaf.0.values"]
            starts.append(8 + length + entry["data_offsets"][0])
            counts.append(header["keys"]["shape"][0])
        first = np.cumsum(counts) - counts
        number = np.repeat(np.arange(len(files)), counts)
        before = self.data.starts - self.data.starts[first[number]]
        return files, number, np.array(starts)[number] + before * self.data.unit


class Lmdb(Kept):
    """A value per row, read within one transaction into one tensor."""

    name = "LMDB"

    def write(self) -> None:
        import lmdb

        size = self.data.nbytes * 2 + 2**30
        with lmdb.open(str(self.folder), map_size=size, sync=False, writemap=False) as environment:
            for part in self.data.chunks():
                with environment.begin(write=True) as transaction:
                    for number in part:
                        key = number.to_bytes(8, "big")
                        transaction.put(key, flat(self.data.row(number)).data, append=True)
            environment.sync(True)

    def open(self) -> None:
        import lmdb

        self.environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False)

    def batch(self, index: np.ndarray) -> torch.Tensor:
        out = self.out(index)
        target, at = flat(out), 0
        with self.environment.begin(buffers=True) as transaction:
            for number in index.tolist():
                value: Any = transaction.get(number.to_bytes(8, "big"))
                found = np.frombuffer(value, np.uint8)
                target[at : at + len(found)] = found
                at += len(found)
        return out

    def close(self) -> None:
        self.environment.close()


class TensorDictMap(Kept):
    """A memory map of all values, read by indexing."""

    name = "TensorDict"

    def write(self) -> None:
        from tensordict import TensorDict

        TensorDict({"x": self.data.values}, batch_size=[len(self.data.values)]).memmap(str(self.folder))

    def open(self) -> None:
        from tensordict import TensorDict

        self.map = TensorDict.load_memmap(str(self.folder))

    def batch(self, index: np.ndarray) -> torch.Tensor:
        which = torch.from_numpy(index) if self.data.size.lengths is None else self.data.steps(index)
        return self.map[which]["x"]

    def close(self) -> None:
        del self.map
        gc.collect()


class HuggingFace(Kept):
    """An Arrow file under a map, read as NumPy arrays; ragged rows are of its type for bytes."""

    name = "HF Dataset"

    def _kind(self) -> Any:
        return np.float32 if self.data.size.spec.dtype == torch.float32 else np.int16

    def _column(self, rows: range) -> Any:
        import pyarrow as pa

        if self.data.size.lengths is not None:
            return pa.array([flat(self.data.row(number)).tobytes() for number in rows], pa.large_binary())
        kind = self._kind()
        return pa.FixedSizeListArray.from_arrays(
            pa.array(flat(self.data.units_of(rows)).view(kind)), self.data.unit // np.dtype(kind).itemsize
        )

    def write(self) -> None:
        import pyarrow as pa

        self.folder.mkdir()
        column = self._column(range(1))
        schema = pa.schema([("x", column.type)])
        with pa.OSFile(str(self.folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            # Batches of 16 MB: it looks a row up by its batch.
            for part in self.data.chunks(16 * MEGABYTE):
                stream.write_batch(pa.record_batch([self._column(part)], schema=schema))

    def open(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        dataset = datasets.Dataset.from_file(str(self.folder / "rows.arrow"))
        if self.data.size.lengths is not None:
            self.dataset = dataset.with_format("arrow")
        else:
            # Without a dtype it would make 64 bits of each 16.
            self.dataset = dataset.with_format("numpy", dtype=self._kind())

    def batch(self, index: np.ndarray) -> torch.Tensor:
        found = self.dataset[index]["x"]
        out = self.out(index)
        if self.data.size.lengths is None:
            return torch.from_numpy(np.ascontiguousarray(found)).view(out.dtype).view(out.shape)
        target, at = flat(out), 0
        for value in found:
            piece = np.frombuffer(value.as_buffer(), np.uint8)
            target[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def close(self) -> None:
        del self.dataset
        gc.collect()


class Hdf5(Kept):
    """One data set, contiguous on disk; a batch is read in ascending order, and put back into its own."""

    name = "HDF5"

    def write(self) -> None:
        import h5py

        self.folder.mkdir()
        values = self.data.values.view(len(self.data.values), -1).view(torch.int16).numpy()
        with h5py.File(self.folder / "rows.h5", "w") as file:
            file.create_dataset("x", data=values)

    def open(self) -> None:
        import h5py

        self.file = h5py.File(self.folder / "rows.h5", "r")
        self.x: Any = self.file["x"]

    def batch(self, index: np.ndarray) -> torch.Tensor:
        out = self.out(index)
        target = out.view(len(out), -1).view(torch.int16).numpy()
        if self.data.size.lengths is None:
            wanted, places = np.unique(index, return_inverse=True)
            return torch.from_numpy(self.x[wanted][places]).view(out.dtype).view(out.shape)
        at = 0
        for number in index.tolist():
            start, length = int(self.data.starts[number]), int(self.data.lengths[number])
            self.x.read_direct(target, np.s_[start : start + length], np.s_[at : at + length])
            at += length
        return out

    def close(self) -> None:
        self.file.close()


class PtFiles(Kept):
    """``torch.save`` of each object, ``torch.load`` and ``torch.cat``."""

    name = ".pt files"
    limit = FILES_OF_PT

    def write(self) -> None:
        self.folder.mkdir()
        for number in range(self.count):
            torch.save(self.data.row(number).clone(), self.folder / f"{number}.pt")

    def open(self) -> None:
        return

    def batch(self, index: np.ndarray) -> torch.Tensor:
        return torch.cat([torch.load(self.folder / f"{number}.pt", weights_only=True) for number in index.tolist()])


OTHERS: list[type[Kept]] = [Lmdb, TensorDictMap, HuggingFace, Hdf5, PtFiles]


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def drop_pages(folder: Path) -> None:
    """Have the system forget the content of all files below: nobody may have pages of them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_from_disk() -> int:
    """Bytes that this process has had read from disks."""
    return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def draw_batches(draw: np.random.Generator, count: int, batch: int, batches: int) -> list[np.ndarray]:
    """Batches as in an epoch: no row comes twice in one."""
    return [draw.choice(count, min(batch, count), replace=False, shuffle=True) for _ in range(batches)]


def compare(kept: Kept, batches: Sequence[np.ndarray]) -> None:
    """Raise if what comes is not what was written, to the bit."""
    for index in batches:
        found, true = kept.batch(index), kept.data.batch(index)
        if found.dtype != true.dtype or not np.array_equal(flat(found.contiguous()), flat(true)):
            raise SystemExit(f"{kept.name} gives other rows than were written ({kept.data.size.name})")


def measure_warm(ways: Sequence[Kept], batch: int, rounds: int) -> list[dict[str, Any]]:
    """All of them and memory in turn: each one's share of memory's speed, and the first one's speed over each."""
    draw = np.random.default_rng(batch)
    data = ways[0].data
    reads: list[Callable[[np.ndarray], Any]] = [data.batch, *(kept.batch for kept in ways)]
    counts = [data.count, *(kept.count for kept in ways)]
    many = []
    for read, count in zip(reads, counts, strict=True):
        # Long enough to be timed, and no longer than it must.
        once = [seconds(lambda read=read, index=index: read(index)) for index in draw_batches(draw, count, batch, 3)]
        many.append(max(1, min(50, int(0.05 / max(min(once), 1e-6)))))
    speeds: list[list[float]] = [[] for _ in reads]
    for number in range(rounds):
        # Who comes first changes, so that nobody always finds the caches as the same other left them.
        for at in np.roll(np.arange(len(reads)), number).tolist():
            batches = draw_batches(draw, counts[at], batch, many[at])
            began = time.perf_counter()
            for index in batches:
                reads[at](index)
            taken = time.perf_counter() - began
            speeds[at].append(sum(map(data.nbytes_of, batches)) / taken)
    memory, *kept_speeds = speeds
    return [
        {
            "of_memory": spread([own / limit for own, limit in zip(found, memory, strict=True)]),
            "ours_over_it": spread([ours / own for ours, own in zip(kept_speeds[0], found, strict=True)]),
            "gb_per_second": statistics.median(found) / GIGABYTE,
            "memory_gb_per_second": statistics.median(memory) / GIGABYTE,
        }
        for found in kept_speeds
    ]


@dataclass
class Cold:
    """Reading from the disk: each pass over the same amount of bytes."""

    ours: Ours
    nbytes: int
    rounds: int

    def run(self, batch: int) -> dict[str, Any]:
        """Bytes per second of each way, in turn, as ratios of plain reading in the same round."""
        ways: dict[str, Callable[[int], float]] = {
            "pread": self.pread,
            "sequential": self.sequential,
            "random, first": lambda n: self.gathers(n, batch, "random", checked=False),
            "random, later": lambda n: self.gathers(n, batch, "random", checked=True),
            "read ahead, first": lambda n: self.gathers(n, batch, "ahead", checked=False),
            "read ahead, later": lambda n: self.gathers(n, batch, "ahead", checked=True),
            "blocks, first": lambda n: self.gathers(n, batch, "blocks", checked=False),
            "blocks, later": lambda n: self.gathers(n, batch, "blocks", checked=True),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.rounds):
            for name, way in ways.items():
                found[name].append(way(number))
        against = {name: "sequential" if name.startswith("blocks") else "pread" for name in ways}
        return {
            name: {
                "mb_per_second": statistics.median(values) / MEGABYTE,
                "of": against[name],
                "ratio": spread([mine / plain for mine, plain in zip(values, found[against[name]], strict=True)]),
            }
            for name, values in found.items()
        }

    def numbers(self, seed: int) -> np.ndarray:
        """Rows of so many bytes, in random order."""
        data = self.ours.data
        order = np.random.default_rng(seed).permutation(data.count)
        nbytes = np.cumsum(data.lengths[order]) * data.unit
        return order[: max(1, int(np.searchsorted(nbytes, self.nbytes)))]

    def pread(self, seed: int) -> float:
        files, number, places = self.ours.places()
        data, order = self.ours.data, self.numbers(seed)
        descriptors = [os.open(path, os.O_RDONLY) for path in files]
        target = memoryview(bytearray(int(data.lengths.max()) * data.unit))
        wanted = list(
            zip(number[order].tolist(), places[order].tolist(), (data.lengths[order] * data.unit).tolist(), strict=True)
        )
        drop_pages(self.ours.folder)

        def read() -> None:
            for file, place, length in wanted:
                os.preadv(descriptors[file], [target[:length]], place)

        taken, disk = cold_seconds(read)
        warn_if_warm("pread", disk, data.nbytes_of(order))
        for descriptor in descriptors:
            os.close(descriptor)
        return data.nbytes_of(order) / taken

    def sequential(self, seed: int) -> float:
        """Whole files one after the other, beginning with another one in each round."""
        files = self.ours.segments()
        files = files[seed % len(files) :] + files[: seed % len(files)]
        target, left = bytearray(2**20), self.nbytes
        drop_pages(self.ours.folder)

        def read() -> None:
            nonlocal left
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    while left > 0 and (got := file.readinto(target)):
                        left -= got

        taken, disk = cold_seconds(read)
        warn_if_warm("sequential", disk, self.nbytes - left)
        return (self.nbytes - left) / taken

    def gathers(self, seed: int, batch: int, order: str, *, checked: bool) -> float:
        data, ours = self.ours.data, self.ours
        ours.open()
        if checked:
            for part in data.chunks():
                ours.batch(np.arange(part.start, part.stop))
        dataset = ours.dataset()
        torch.manual_seed(seed)
        sampler = BlockShuffleSampler(dataset) if order == "blocks" else RandomSampler(dataset)
        batches: Any = BatchSampler(sampler, batch, drop_last=False)
        if order != "random":
            batches = reading.ReadAhead(batches, dataset)
        read = 0

        def run() -> None:
            nonlocal read
            for index in batches:
                numbers = np.array(index)
                ours.batch(numbers)
                read += data.nbytes_of(numbers)
                if read >= self.nbytes:
                    break

        ours.let_go()
        drop_pages(ours.folder)
        taken, disk = cold_seconds(run)
        # Opening the store, which is no part of an epoch, has read keys and sums.
        warn_if_warm(order, disk, int(0.9 * read))
        dataset.source = None
        reading._thread().submit(int).result()  # what it still reads is read now
        ours.close()
        return read / taken


def cold_seconds(read: Callable[[], None]) -> tuple[float, int]:
    """How long something takes, and how many bytes came from the disk."""
    before = read_from_disk()
    taken = seconds(read)
    return taken, read_from_disk() - before


def warn_if_warm(what: str, disk: int, nbytes: int) -> None:
    if disk < 0.9 * nbytes:
        print(
            f"  not cold ({what}): {disk / MEGABYTE:.0f} MB of {nbytes / MEGABYTE:.0f} MB came from the disk. The file "
            "system keeps pages, or is in memory",
            flush=True,
        )


def cold_of(kept: Kept, nbytes: int, batch: int, rounds: int, most: float) -> dict[str, Any]:
    """Random batches from the disk, by one of the others."""
    found, data = [], kept.data
    for number in range(rounds):
        drop_pages(kept.folder)
        kept.open()
        draw = np.random.default_rng(number)
        order, read, began = draw.permutation(kept.count), 0, time.perf_counter()
        for start in range(0, kept.count, batch):
            index = order[start : start + batch]
            kept.batch(index)
            read += data.nbytes_of(index)
            if read >= nbytes or time.perf_counter() - began > most:
                break
        found.append(read / (time.perf_counter() - began))
        kept.close()
    return {"mb_per_second": statistics.median(found) / MEGABYTE}


# -- one size of rows --------------------------------------------------------------------------------------------------


def measure_size(size: Size, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    data = Data(size, options.gb)
    print(f"\n{size.name}: {data.count} rows, {data.nbytes / GIGABYTE:.2f} GB", flush=True)
    result: dict[str, Any] = {"rows": data.count, "nbytes": data.nbytes, "row_nbytes": data.nbytes // data.count}
    ours = Ours(data, folder / "ours")
    result["write_gb_per_second"] = data.nbytes / seconds(ours.write) / GIGABYTE
    ours.open()
    result["checks"] = measure_checks(ours)
    compare(ours, draw_batches(np.random.default_rng(1), data.count, 256, 4))
    result["warm"] = {batch: measure_warm([ours], batch, options.rounds)[0] for batch in BATCHES}
    for batch, warm in result["warm"].items():
        say(f"warm, batch {batch}, of memory", warm["of_memory"], size.warm_goal, f"{warm['gb_per_second']:.2f} GB/s")
    ours.close()
    options.cold_nbytes = min(data.nbytes, int(options.cold_mb * MEGABYTE), COLD_ROWS * data.nbytes // data.count)
    cold = Cold(ours, options.cold_nbytes, options.cold_rounds)
    batches = () if options.warm_only else BATCHES[: 1 if options.quick else 2]
    result["cold"] = {batch: cold.run(batch) for batch in batches}
    for batch, ways in result["cold"].items():
        for name, way in ways.items():
            goal = {"blocks": 0.9, "random": 0.7, "read ahead": 0.7}.get(name.split(",")[0])
            rate = f"{way['mb_per_second']:.0f} MB/s"
            say(f"cold, batch {batch}, {name}, of {way['of']}", way["ratio"], goal, rate)
    if not options.ours_only:
        ours.open()
        touch_all(ours)
        kinds = [kind(data, folder / "other") for kind in OTHERS]
        result["others"] = {kept.name: measure_other(kept, ours, result["cold"], options) for kept in kinds}
        ours.close()
    return result


def touch_all(kept: Kept) -> None:
    """Have every row in memory, and what a first reading does done."""
    for start in range(0, kept.count, 64):
        kept.batch(np.arange(start, min(start + 64, kept.count)))


def measure_other(kept: Kept, ours: Ours, cold: dict[int, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Another way of keeping the same rows, in turn with ours and with memory."""
    try:
        kept.write()
        kept.open()
        compare(kept, draw_batches(np.random.default_rng(1), kept.count, 256, 2))
        touch_all(kept)
        found: dict[str, Any] = {"rows": kept.count, "warm": {}, "cold": {}}
        for batch in BATCHES:
            warm = found["warm"][batch] = measure_warm([ours, kept], batch, options.rounds)[1]
            over = warm["ours_over_it"]["median"]
            rate = f"{warm['gb_per_second']:.2f} GB/s; ours is {over:.2f} times as fast"
            rate += f"  goal ahead of it: {'met' if over > 1 else 'MISSED'}"
            say(f"{kept.name}, warm, batch {batch}, of memory", warm["of_memory"], None, rate)
        kept.close()
        for batch, ways in cold.items():
            it = found["cold"][batch] = cold_of(
                kept, options.cold_nbytes, batch, options.cold_rounds, options.cold_seconds
            )
            mine = {name: way["mb_per_second"] for name, way in ways.items() if "random" in name or "ahead" in name}
            best = max(mine, key=lambda name: mine[name])
            it["ours_over_it"] = mine[best] / it["mb_per_second"]
            print(
                f"  {f'{kept.name}, cold, batch {batch}':44} {it['mb_per_second']:.0f} MB/s; ours at random "
                f"{mine[best]:.0f} MB/s ({best})",
                flush=True,
            )
        return found
    finally:
        shutil.rmtree(kept.folder, ignore_errors=True)


def say(what: str, ratio: dict[str, float], goal: float | None, rest: str = "", *, ours: float | None = None) -> None:
    verdict = "" if goal is None else f"  goal {goal:.2f}: {'met' if ratio['median'] >= goal else 'MISSED'}"
    print(f"  {what:44} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})  {rest}{verdict}", flush=True)


def measure_checks(ours: Ours) -> dict[str, Any]:
    """What comparing checksums takes of the first epoch, and of the second: all rows at random, pages in memory."""
    spent, check = [0.0, 0.0], Segment.check

    def timed(self: Segment, rows: np.ndarray) -> int:
        began = time.perf_counter()
        found = check(self, rows)
        spent[0] += time.perf_counter() - began
        return found

    order = np.random.default_rng(5).permutation(ours.data.count)
    epochs = []
    Segment.check = timed  # pyright: ignore
    try:
        for _ in range(2):
            spent[0] = 0.0
            taken = seconds(lambda: [ours.batch(order[start : start + 64]) for start in range(0, len(order), 64)])
            epochs.append({"seconds": taken, "checking_seconds": spent[0], "share": spent[0] / taken})
    finally:
        Segment.check = check
    speed = ours.data.nbytes / max(epochs[0]["checking_seconds"], 1e-9) / GIGABYTE
    shares = [100 * epoch["share"] for epoch in epochs]
    print(
        f"  checksums: {speed:.1f} GB/s; {shares[0]:.0f} % of a first epoch that does nothing but gather from memory, "
        f"{shares[1]:.1f} % of the second",
        flush=True,
    )
    return {"gb_per_second": speed, "first": epochs[0], "second": epochs[1]}


# -- memory ------------------------------------------------------------------------------------------------------------


class Gathered(Dataset[Any]):
    """Batches of rows, in a `DataLoader`'s workers."""

    def __init__(self, count: int, read: Callable[[torch.Tensor], list[Leaf]]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, index: list[int]) -> list[Leaf]:
        return self.read(torch.tensor(index))


def first_leaf(leaves: list[Leaf]) -> Leaf:
    return leaves[0]


def processes() -> list[str]:
    """This process and its children."""
    return ["self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def anonymous_bytes() -> list[int]:
    """Anonymous memory of this process and each of its children."""
    found = []
    for pid in processes():
        status = Path(f"/proc/{pid}/status").read_text()
        found.append(1024 * int(status.partition("RssAnon:")[2].split()[0]))
    return found


def store_bytes() -> int:
    """How much of a store's files is mapped into this process and its children."""
    total, of_store = 0, False
    for pid in processes():
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                of_store = line.endswith(".safetensors")
            elif of_store and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """50 epochs with two persistent workers, whose maps may hold less than the store is large.

    Batches of some megabytes leave holes in the heap of the C library, whoever makes them: so the same loader over a
    tensor in memory stands beside it, and the store is judged where the library gives such blocks back at once.
    """
    size = SIZES[1]
    ours = Ours(Data(size, min(0.4, options.gb)), folder / "ours")
    ours.write()
    nbytes = ours.data.nbytes
    np.save(folder / "keys.npy", ours.data.keys)
    epochs = 10 if options.quick else 50
    found = {
        "ours, blocks given back": memory_child(folder, epochs, "ours", {"MALLOC_MMAP_THRESHOLD_": "1048576"}),
        "ours": memory_child(folder, epochs, "ours", {}),
        "a tensor in memory": memory_child(folder, epochs, "tensor", {}),
    }
    print(
        f"\nmemory: {epochs} epochs over {nbytes / MEGABYTE:.0f} MB, two persistent workers that may map "
        f"{nbytes / 4 / MEGABYTE:.0f} MB each"
    )
    for name, run in found.items():
        settled, last = sum(run["anonymous"][epochs // 5]), sum(run["anonymous"][-1])
        run["grown"] = last - settled
        line = f"  {name:44} anonymous memory of all processes {run['grown'] / MEGABYTE:+.1f} MB after epoch "
        line += f"{epochs // 5 + 1}; of the store at most {run['mapped'] / MEGABYTE:.0f} MB mapped"
        if name.endswith("given back"):
            # What is read while a process looks at its size: a batch, and 64 KB around each row.
            run["allowed"] = 2 * (nbytes // 4 + 2 * 64 * (nbytes // ours.data.count + 2 * 64 * 1024))
            run["met"] = run["grown"] < 8 * MEGABYTE and run["mapped"] <= run["allowed"]
            line += f"  goal flat, at most {run['allowed'] / MEGABYTE:.0f} MB: {'met' if run['met'] else 'MISSED'}"
        print(line, flush=True)
    return {"store_nbytes": nbytes, "runs": found}


def memory_child(folder: Path, epochs: int, kind: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-child", str(folder), "--epochs", str(epochs), "--kind", kind]
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def run_epochs(folder: Path, epochs: int, kind: str) -> None:
    """In a new process: the memory after each epoch, and the most of the store that was mapped."""
    torch.set_num_threads(1)
    keys, spec = np.load(folder / "keys.npy"), SIZES[1].spec
    rows = open_store(folder / "ours").rows(FINGERPRINT, [spec], {})
    locations = torch.from_numpy(rows.lookup(keys))
    if kind == "ours":
        bound = rows.nbytes // 4
        # Workers inherit it. By itself it is a quarter of the machine's memory, shared among them.
        planes.resident_bytes = lambda: bound  # pyright: ignore
        dataset = Gathered(len(keys), lambda index: rows.gather(locations[index]))
    else:
        values = torch.zeros((len(keys), *spec.shape), dtype=spec.dtype).fill_(1)
        dataset = Gathered(len(keys), lambda index: [values.index_select(0, index)])
    loader = DataLoader(
        dataset,
        batch_size=64,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        collate_fn=first_leaf,
        multiprocessing_context="fork",
    )
    anonymous, mapped = [], 0
    for _ in range(epochs):
        for number, _batch in enumerate(loader):
            if number % 16 == 0:
                mapped = max(mapped, store_bytes())
        anonymous.append(anonymous_bytes())
    print(json.dumps({"anonymous": anonymous, "mapped": mapped}))


# -- the index ---------------------------------------------------------------------------------------------------------


def measure_index(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ten million rows of eight bytes: opened, looked up, and opened without the index that lies there."""
    count = 500_000 if options.quick else options.keys
    spec = LeafSpec((1,), ragged=False, dtype=torch.float64)
    rows = open_store(folder / "many").rows(FINGERPRINT, [spec], {})
    draw = np.random.default_rng(0)
    began = time.perf_counter()
    for start in range(0, count, 250_000):
        keys = draw.integers(0, 256, (min(250_000, count - start), 16), dtype=np.uint8)
        rows.append(keys, [torch.arange(start, start + len(keys), dtype=torch.float64)[:, None]])
        if start % 1_000_000 == 750_000:
            rows.publish()
    rows.publish()
    written = time.perf_counter() - began
    del rows
    gc.collect()
    current = index_child(folder / "many", count)
    again = index_child(folder / "many", count)
    index = folder / "many" / FINGERPRINT / "index.safetensors"
    index.unlink(missing_ok=True)
    rebuilt = index_child(folder / "many", count)
    goals = {
        "opened when current": (again["open_seconds"], 1.0, "s"),
        "rebuilt": (rebuilt["open_seconds"], 30.0, "s"),
        "anonymous memory": (max(again["anonymous"], rebuilt["anonymous"]) / MEGABYTE, 200.0, "MB"),
        "256 keys looked up": (1e3 * again["lookup_seconds"], 1.0, "ms"),
    }
    print(f"\nindex: {count} keys, written in {written:.0f} s")
    for name, (value, goal, unit) in goals.items():
        # A small number of keys tells nothing about ten million.
        verdict = f"goal {goal:g} {unit}: {'met' if value <= goal else 'MISSED'}" if count >= 10_000_000 else ""
        print(f"  {name:44} {value:.3g} {unit}  {verdict}", flush=True)
    shutil.rmtree(folder / "many")
    found = {name: {"value": value, "goal": goal, "unit": unit} for name, (value, goal, unit) in goals.items()}
    return {
        "keys": count,
        "append_seconds": written,
        **found,
        "first_open": current,
        "second_open": again,
        "rebuild": rebuilt,
    }


def index_child(folder: Path, count: int) -> dict[str, float]:
    """In a new process, which has nothing in memory of its own."""
    command = [sys.executable, __file__, "--index-child", str(folder), "--keys", str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def open_index(folder: Path, count: int) -> None:
    before, peak, done = anonymous_bytes()[0], [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes()[0])

    watching = threading.Thread(target=watch, daemon=True)
    draw = np.random.default_rng(0)
    keys = draw.integers(0, 256, (min(count, 250_000), 16), dtype=np.uint8)
    kept = keys.nbytes
    spec = LeafSpec((1,), ragged=False, dtype=torch.float64)
    watching.start()
    began = time.perf_counter()
    rows = open_store(folder).rows(FINGERPRINT, [spec], {})
    found = rows.lookup(keys[:1])
    opened = time.perf_counter() - began
    (first,) = rows.gather(found)
    if len(rows) != count or not isinstance(first, torch.Tensor) or first.item() != 0.0:
        raise SystemExit(f"{len(rows)} keys are found, or another row")
    done.set()
    watching.join()
    times = []
    for _ in range(200):
        asked = keys[draw.choice(len(keys), 256, replace=False)]
        times.append(seconds(lambda asked=asked: rows.lookup(asked)))
    told = {
        "open_seconds": opened,
        "lookup_seconds": statistics.median(times),
        "anonymous": max(peak[0], anonymous_bytes()[0]) - before - kept,
    }
    print(json.dumps(told))


# -- results -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="of rows of each size")
    parser.add_argument("--cold-mb", type=float, default=1_000, help="read in each cold pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--cold-seconds", type=float, default=20.0, help="at most, in a cold pass of the others")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keys", type=int, default=10_000_000, help="in the index")
    parser.add_argument("--only", help="a part of a size's name, or 'memory' or 'index'")
    parser.add_argument("--ours-only", action="store_true", help="without the five others")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is meant")
    parser.add_argument("--warm-only", action="store_true", help="without reading from the disk")
    parser.add_argument("--quick", action="store_true", help="0.1 GB, three rounds: for a look")
    parser.add_argument("--no-results", action="store_true", help="only print")
    for hidden, kind in (("--index-child", Path), ("--memory-child", Path), ("--epochs", int), ("--kind", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.index_child is not None:
        open_index(options.index_child, options.keys)
        return
    if options.memory_child is not None:
        run_epochs(options.memory_child, options.epochs, options.kind)
        return
    if options.quick:
        options.gb, options.cold_mb, options.rounds, options.cold_rounds = 0.1, 40, 3, 1
        options.cold_seconds, PtFiles.limit = 2.0, 200
    torch.set_num_threads(options.threads)
    about = {
        "command": "make bench-store",
        "arguments": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "machine": machine(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{about['machine']}, torch {about['torch']}, Python {about['python']}, {about['date']}")
    results: dict[str, Any] = {}
    parts: list[tuple[str, Callable[[Path], Any]]] = [
        *((size.name, lambda folder, size=size: measure_size(size, folder, options)) for size in SIZES),
        ("memory", lambda folder: measure_memory(folder, options)),
        ("index", lambda folder: measure_index(folder, options)),
    ]
    for name, part in parts:
        if options.only is None or options.only in name:
            with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-store-") as folder:
                results[name] = part(Path(folder).absolute())
            gc.collect()
            if not options.no_results:
                keep(about, results)


def merged(before: Any, now: Any) -> Any:
    """Nests of dicts, of which the later values count."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return now
    return {**before, **{str(key): merged(before.get(str(key)), value) for key, value in now.items()}}


def keep(about: dict[str, Any], results: dict[str, Any]) -> None:
    """After each part: all of them take half an hour. What was not measured this time stays from earlier that day."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(about["machine"]).lower()).strip("-")
    path = RESULTS / f"store-{slug}-{about['date']}.json"
    if path.exists():
        results = merged(json.loads(path.read_text())["results"], results)
    path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    print(f"kept as {path.relative_to(RESULTS.parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
