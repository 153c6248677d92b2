"""Memory that a step frees stays with the process: on a processor, steps take what their arithmetic takes.

A training step of EfficientNet-Lite0 on 64 photos of 160 px frees maps of 52 MB and more, and takes them again. glibc
gives a block above 32 MB back to the system when it is freed, and the next step's block is new: 330,000 pages in each
step, which the system clears one by one, and a virtual machine's host as well. On two cores of one, such a step took
1.4 to 2.3 s, another time in each minute; with memory kept it takes 1.1 s, and the same within 1 %. Recycled levels
have smaller maps, so full training was slowed more than they, and what was predicted was not what came.

What is freed is used again and not given back until the process ends, so that a process keeps the most that it has had.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of mallopt(3)."""
_PAD = 64 << 20
"""The heap grows by so many bytes more than it must."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that is freed, for as long as it runs. The commands that measure time do so.

    It takes effect under glibc. Whoever chose an allocator or tuned it (``LD_PRELOAD``, ``GLIBC_TUNABLES``, or
    ``MALLOC_MMAP_MAX_`` and its like) keeps what they chose.

    Returns:
        Whether it is so.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or os.environ.get("LD_PRELOAD") or os.environ.get("GLIBC_TUNABLES") or platform.libc_ver()[0] != "glibc":
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        never = -1
        # A block of its own is given back at once. Without such blocks the heap's end would be, but for the threshold.
        return all([mallopt(_TRIM_THRESHOLD, never), mallopt(_TOP_PAD, _PAD), mallopt(_MMAP_MAX, 0)])
    return False
