"""Rows that were appended and are not published yet: copies, in memory, in the pieces in which they came.

Appending 64 rows of 200 KB copies 13 MB. Once 256 MB wait they are handed to a thread that writes them, while the next
ones gather: so two segments at most are in memory. If writing fails they wait again, and the next call raises it.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from torchrecycle.store.contract import Leaf, LeafSpec, Ragged
from torchrecycle.store.publisher import Publisher
from torchrecycle.store.segment import Batch, leaf_bytes, ranges

BLOCK_BYTES = 32 * 2**20
_ALIGNED = 64


class Waiting:
    """What one process has appended, what of it is being written, and under which names it publishes."""

    def __init__(self, leaves: int) -> None:
        self.pid = os.getpid()
        self._writer = secrets.token_hex(8)
        self._published = 0
        self._publisher = Publisher()
        self._leaves = leaves
        self._flying: tuple[str, Batch, set[bytes]] | None = None
        """Name, rows and keys of the segment that is being written in a thread."""
        self._keys: list[torch.Tensor] = []
        self._arena = Arena()
        self.clear()

    def clear(self) -> int:
        """Forget the rows that wait; how many they were."""
        rows = sum(map(len, self._keys))
        self.nbytes = 0
        self._since: float | None = None
        self._seen: set[bytes] = set()
        self._arena.release()
        self._keys = []
        self._pieces: list[list[Leaf]] = [[] for _ in range(self._leaves)]
        return rows

    def seconds(self) -> float:
        """How long the oldest row has waited."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def new(self, keys: np.ndarray, absent: np.ndarray) -> np.ndarray:
        """Which of these keys are absent from the store, do not wait already, and come for the first time."""
        flying = self._flying[2] if self._flying else ()
        found: dict[bytes, int] = {}
        for number in np.flatnonzero(absent).tolist():
            key = keys[number].tobytes()
            if key not in self._seen and key not in flying:
                found.setdefault(key, number)
        return np.fromiter(found.values(), dtype=np.int64, count=len(found))

    def add(self, keys: np.ndarray, leaves: Sequence[Leaf], rows: np.ndarray) -> None:
        """Add copies of these rows, given by their numbers in ascending order."""
        keys, copies = np.ascontiguousarray(keys[rows]), [copied(leaf, rows, self._arena) for leaf in leaves]
        self._since = time.monotonic() if self._since is None else self._since
        self._seen.update(key.tobytes() for key in keys)
        self._keys.append(torch.from_numpy(keys))
        for pieces, leaf in zip(self._pieces, copies, strict=True):
            pieces.append(leaf)
        self.nbytes += keys.nbytes + sum(map(leaf_bytes, copies))

    def batch(self) -> Batch:
        """All rows, to be written."""
        return Batch(self._keys, self._pieces)

    def next_name(self) -> str:
        """A name for a segment that nobody else uses."""
        self._published += 1
        return f"{self._writer}-{self._published:06d}.safetensors"

    # In a thread

    @property
    def busy(self) -> bool:
        """Whether a segment is being written at this moment."""
        return self._publisher.busy

    def start(self, write: Callable[[str, Batch], int]) -> None:
        """Hand all rows over to a thread that writes them; `written` must have been asked for the ones before.

        Args:
            write: writes a segment of this name, and gives its bytes.
        """
        name, batch = self.next_name(), self.batch()
        self._flying = name, batch, self._seen
        self.clear()
        self._publisher.start(lambda: write(name, batch))

    def written(self) -> tuple[str, int] | None:
        """Name and bytes of the segment that a thread has written, once it is done; None if there is none.

        What the thread has raised is raised here, and its rows wait again.
        """
        if self._flying is None:
            return None
        try:
            nbytes = self._publisher.finish()
        except BaseException:
            if self._publisher.idle:  # and not this waiting interrupted
                self._come_back()
            raise
        name, self._flying = self._flying[0], None
        assert nbytes is not None
        return name, nbytes

    def _come_back(self) -> None:
        assert self._flying is not None
        _, batch, seen = self._flying
        self._flying = None
        self._seen |= seen
        self._keys = [*batch.keys, *self._keys]
        self._pieces = [[*first, *then] for first, then in zip(batch.leaves, self._pieces, strict=True)]
        self.nbytes += sum(keys.nbytes for keys in batch.keys) + sum(
            leaf_bytes(leaf) for pieces in batch.leaves for leaf in pieces
        )


def misfit(leaf: Leaf, spec: LeafSpec, rows: int) -> str | None:
    """Why a leaf is not of this form, or None."""
    if isinstance(leaf, Ragged) != spec.ragged:
        return "its rows are ragged, and this leaf is a tensor" if spec.ragged else "its rows are not ragged"
    if isinstance(leaf, Ragged):
        lengths = leaf.lengths
        if lengths.dtype != torch.int64 or tuple(lengths.shape) != (rows,):
            return f"lengths are int64 [{rows}], not {lengths.dtype} {list(lengths.shape)}"
        if (lengths < 0).any() or int(lengths.sum()) != len(leaf.values):
            return f"the lengths add up to {int(lengths.sum())}, and {len(leaf.values)} values came"
        return _misfit(leaf.values, spec, len(leaf.values))
    return _misfit(leaf, spec, rows)


def _misfit(tensor: torch.Tensor, spec: LeafSpec, rows: int) -> str | None:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != (rows, *spec.shape):
        expected = f"{spec.dtype} {[rows, *spec.shape]}"
        return f"{tensor.dtype} {list(tensor.shape)} came, and {expected} was expected"
    return None


# -- memory ------------------------------------------------------------------------------------------------------------


class Arena:
    """Memory for copies of rows, in maps of its own and apart from the heap.

    On the heap they would take the places that a prefix's large intermediates have left and come back for: a ResNet at
    batch 64 then faulted 200,000 pages in for each batch, in place of 90,000, and the holes between what was published
    stayed with the process. A map goes back to the system when the last tensor in it goes.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor that nobody else has, with anything in it."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        if self._block is None or self._used + nbytes > len(self._block):
            self._block, self._used = _block(max(nbytes, BLOCK_BYTES)), 0
        flat = torch.frombuffer(self._block, dtype=torch.uint8, count=nbytes, offset=self._used)
        self._used += -(-nbytes // _ALIGNED) * _ALIGNED
        return flat.view(dtype).view(tuple(shape))

    def release(self) -> None:
        """Use no more of the block that was begun."""
        self._block = None


def _block(nbytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    # Private, or a forked worker would hold on to it, and its pages would be no anonymous memory. No huge pages: the
    # system may stop to make room for one, which took 2 to 10 times as long as small ones do.
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def copied(leaf: Leaf, rows: np.ndarray, arena: Arena) -> Leaf:
    """Copies of some rows, in ascending order, contiguous and on the CPU."""
    if not isinstance(leaf, Ragged):
        return _copied(leaf, rows, arena)
    lengths = leaf.lengths.detach().cpu().numpy()
    starts = np.cumsum(lengths) - lengths
    steps = ranges(starts[rows], lengths[rows])
    return Ragged(_copied(leaf.values, steps, arena), torch.from_numpy(lengths[rows]))


def _copied(tensor: torch.Tensor, rows: np.ndarray, arena: Arena) -> torch.Tensor:
    tensor = tensor.detach()
    out = arena.empty((len(rows), *tensor.shape[1:]), tensor.dtype)
    if len(rows) == len(tensor):
        return out.copy_(tensor)
    if out.numel():
        # As bytes, since not every dtype can be picked from.
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().view(len(tensor), -1).view(torch.uint8)
        torch.index_select(flat, 0, torch.from_numpy(rows), out=out.view(len(rows), -1).view(torch.uint8))
    return out
