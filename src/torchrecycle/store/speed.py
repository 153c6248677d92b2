"""How fast a place takes rows and gives them back: measured by a small store there, before anything is kept.

On a virtual disk, rows of 32 KB take 300 microseconds each to be hashed, written and waited for, and 9 to be gathered
again, in batches of 64 at random, from the page cache; from the disk itself it is 135. A prefix that is quicker than
that is not worth being kept.

Rows of a few hundred bytes cost by their number and large ones by their bytes, so that one speed in bytes a second is
wrong for both: it is measured with rows of the size that is asked for. A small store is read from the page cache,
and so is a large one that fits into memory; of what does not fit, every row comes at the disk's own speed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchrecycle.errors import StoreError
from torchrecycle.store.contract import LeafSpec, Rows, Store
from torchrecycle.store.stores import open_store

__all__ = ["Speed", "seconds_per_cold_byte", "speed_of", "temporary_store"]

WRITTEN_BYTES = 16 * 2**20
"""How much is written to be read again, in whole batches."""
MOST_BATCHES = 64
BATCH = 64
ENOUGH_SECONDS = 0.2
"""How long reading is measured."""
PROBE_BYTES = 64 * 2**20
"""How much is written to know how fast a disk is without the page cache."""
PAGE = 4096
"""What a disk gives at least."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of rows of one size."""

    row_bytes: int
    """Which size."""
    read_seconds: float
    """To gather a row that the page cache holds, one of a batch of 64 at random."""
    write_seconds: float
    """To hash a row, write it and wait for the disk, one of a segment."""


@contextmanager
def temporary_store(place: str | os.PathLike[str] | None = None) -> Iterator[Store]:
    """A store of its own at a place, gone afterwards with all that it holds.

    Args:
        place: a folder, made if it is not there, in which a new one is made for it; ``memory://``; the system's folder
            for temporary files if None.

    Raises:
        StoreError: nothing can be written there.
    """
    if place is not None and "://" in os.fspath(place):
        yield open_store("memory://")
        return
    try:
        if place is not None:
            Path(place).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".measured-", dir=place)
    except OSError as error:
        refused = StoreError(f"cannot write to {place}, to measure how fast it is: {error}. Give another store")
        refused.errno = error.errno
        raise refused from error
    try:
        yield open_store(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def speed_of(place: str | os.PathLike[str] | None, row_bytes: int) -> Speed:
    """How fast a place takes rows of a size and gives them back.

    Args:
        place: see `temporary_store`.
        row_bytes: of a row, at least 1.

    Raises:
        StoreError: nothing can be written there.
    """
    if row_bytes < 1:
        raise StoreError(f"row_bytes={row_bytes}: a row has one byte at least")
    batches = max(2, min(MOST_BATCHES, WRITTEN_BYTES // (row_bytes * BATCH)))
    with temporary_store(place) as store:
        spec = LeafSpec((row_bytes,), ragged=False, dtype=torch.uint8)
        rows = store.rows("0" * 32, [spec], about={"cut": "measured"})
        keys = np.frombuffer(secrets.token_bytes(16 * BATCH * batches), dtype=np.uint8).reshape(batches, BATCH, 16)
        write = _seconds_to_write(rows, keys, row_bytes)
        read = _seconds_to_read(rows, torch.from_numpy(rows.lookup(keys.reshape(-1, 16))))
    return Speed(row_bytes, read, write)


def _seconds_to_write(rows: Rows, keys: np.ndarray, row_bytes: int) -> float:
    batch = torch.frombuffer(bytearray(secrets.token_bytes(row_bytes * BATCH)), dtype=torch.uint8)
    leaf = batch.reshape(BATCH, row_bytes)
    began = time.perf_counter()
    for some in keys:
        rows.append(some, [leaf])
    rows.publish()
    return (time.perf_counter() - began) / (len(keys) * BATCH)


def _seconds_to_read(rows: Rows, locations: torch.Tensor) -> float:
    rows.gather(locations)  # compared with their checksums, which is done once in a process
    generator = torch.Generator().manual_seed(0)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < ENOUGH_SECONDS:
        for some in locations[torch.randperm(len(locations), generator=generator)].split(BATCH):
            rows.gather(some)
            count += len(some)
    return (time.perf_counter() - began) / count


def seconds_per_cold_byte(place: str | os.PathLike[str] | None, row_bytes: int) -> float:
    """How long a disk takes for a byte that is not in the page cache, in rows at random places.

    Args:
        place: a folder on that disk; made if it is not there. The system's folder for temporary files if None.
        row_bytes: of a row; a page is read at least.
    """
    piece = max(PAGE, row_bytes)
    folder = Path(tempfile.gettempdir() if place is None else place)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".measured-{secrets.token_hex(4)}.tmp"
    try:
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES // 2**20):
                file.write(secrets.token_bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return _seconds_of_pieces(file.fileno(), piece) * (piece / row_bytes)
    finally:
        path.unlink(missing_ok=True)


def _seconds_of_pieces(file: int, piece: int) -> float:
    """Per byte read, in pieces at random places."""
    read, began = 0, time.perf_counter()
    for place in torch.randperm(max(1, PROBE_BYTES // piece), generator=torch.Generator().manual_seed(0)).tolist():
        read += len(os.pread(file, piece, place * piece))
        if time.perf_counter() - began > 5 * ENOUGH_SECONDS:
            break
    return (time.perf_counter() - began) / max(1, read)
