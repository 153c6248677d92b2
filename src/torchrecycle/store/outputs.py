"""Memory for batches: taken from the system once, and used again when the batch before is gone.

A batch of 64 rows of 150 KB has 10 MB. Fresh memory of that size costs more than the copying: the system gives it page
by page, zeroed, and takes it back at once. So a batch lies in a map of our own with large pages, which goes into a pool
when the last tensor over it is gone. Training that holds two batches at a time uses the same two maps for ever, and the
C library's heap is not broken up: in workers it otherwise grows for hours.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import torch

from torchrecycle.store.mapping import MAPS

LARGE_BYTES = 2**20
"""Smaller batches come from the C library, which keeps memory of that size."""

_FREE_BYTES = 512 * 2**20
"""What waits for use at most."""

_LARGE_PAGE = 2 * 2**20
_STEPS = 8
"""Sizes between two powers of two, so that ragged batches fit into each other's places."""


class _Pool:
    """Maps that nobody uses."""

    def __init__(self) -> None:
        self.free: deque[mmap.mmap] = deque()

    def take(self, nbytes: int) -> mmap.mmap:
        for _ in range(len(self.free)):
            with suppress(IndexError):  # another thread was quicker
                found = self.free.popleft()
                if len(found) == nbytes:
                    return found
                self.free.append(found)
        made = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, ValueError):
            made.madvise(mmap.MADV_HUGEPAGE)
        return made

    def give(self, unused: mmap.mmap, pid: int) -> None:
        if pid != os.getpid():
            return  # a fork's copies are not worth keeping
        self.free.append(unused)
        while sum(map(len, list(self.free))) > _FREE_BYTES:
            with suppress(IndexError):
                self.free.popleft()


_POOL = _Pool()

if MAPS:
    os.register_at_fork(after_in_child=_POOL.free.clear)


def empty(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, width]``, to be written into. Its memory is used again when no tensor over it is left."""
    nbytes = rows * width * dtype.itemsize
    if not MAPS or nbytes < LARGE_BYTES:
        return torch.empty((rows, width), dtype=dtype)
    memory = _POOL.take(_rounded(nbytes))
    buffer = (ctypes.c_uint8 * nbytes).from_buffer(memory)
    weakref.finalize(buffer, _POOL.give, memory, os.getpid()).atexit = False
    return torch.from_numpy(np.frombuffer(memoryview(buffer), dtype=np.uint8)).view(dtype).view(rows, width)


def _rounded(nbytes: int) -> int:
    step = max(_LARGE_PAGE, 1 << max(0, nbytes.bit_length() - 1 - _STEPS.bit_length() + 1))
    return -(-nbytes // step) * step
