"""Memory that a step frees stays with the process: on a processor, steps take what their arithmetic takes.

A training step of EfficientNet-Lite0 on 64 photos of 160 px frees maps of 52 MB and more, and takes them again. glibc
gives a block above 32 MB back to the system when it is freed, and the next step's block is new: 860,000 pages in each
step, which the system clears one by one, and a virtual machine's host as well. On two cores of one, 41 % of such a
step were the system's, at a price that changed from minute to minute, so that what was predicted was not what came
(``benchmarks/allocator.py``). Recycled levels have smaller maps: full training is slowed more than they.

What is freed is used again, where it fits, and not given back until the process ends. So a process grows to its peak
and some more: 8 to 20 % for one training, up to a quarter where batches and models of many sizes take turns.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

__all__ = ["keep_freed_memory", "keeps_freed_memory", "kept_bytes", "tuned_by"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3)."""
_PAD = 64 << 20
"""The heap grows by so many bytes more than it must."""

_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = ("glibc.malloc.mmap_", "glibc.malloc.trim_", "glibc.malloc.top_pad")

_keeps = False


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed, for as long as it runs. The commands that measure time do so.

    It takes effect under glibc; that of a process cannot be undone. Who has chosen an allocator (``LD_PRELOAD``), or
    when memory is given back (``MALLOC_TRIM_THRESHOLD_`` and the like), keeps what he chose: to switch this off, set
    ``MALLOC_MMAP_MAX_=65536``, which is glibc's own.

    Returns:
        Whether it is so.
    """
    global _keeps
    libc = _libc()
    if libc is None or tuned_by() is not None:
        return False
    never = -1
    # A block of its own is given back at once. Without such blocks the heap's end would be, but for the threshold.
    _keeps = all([libc.mallopt(_TRIM_THRESHOLD, never), libc.mallopt(_TOP_PAD, _PAD), libc.mallopt(_MMAP_MAX, 0)])
    return _keeps


def keeps_freed_memory() -> bool:
    """Whether this process does."""
    return _keeps


def tuned_by() -> str | None:
    """The variable by which the user says when memory is given back, or chooses another allocator; None if none does.

    >>> tuned_by() is None or tuned_by() in os.environ
    True
    """
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "LD_PRELOAD"
    if any(name in os.environ.get("GLIBC_TUNABLES", "") for name in _TUNABLES):
        return "GLIBC_TUNABLES"
    return next((name for name in _VARIABLES if name in os.environ), None)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")]


def kept_bytes() -> int:
    """How much memory is free within this process, to be used again before more is taken; 0 where none is kept."""
    libc = _libc() if _keeps else None
    if libc is None or not hasattr(libc, "mallinfo2"):  # before glibc 2.33
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    return int(libc.mallinfo2().fordblks)


@functools.cache
def _libc() -> Any | None:
    """Looked for once: `platform` reads the interpreter's file for it, and loaders ask what is free in each epoch."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
