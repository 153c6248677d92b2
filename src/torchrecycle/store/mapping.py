"""Files as memory, and many of them side by side.

After shuffling, 64 rows of a store of 4 GB lie in all of its 16 segments. Gathered segment by segment that is 16
calls, which for rows of 1.5 KB take ten times as long as the copying. So segments are laid next to each other in one
reserved range of addresses, each at a multiple of the row's size: to torch the whole store is then one tensor, and a
batch one `torch.index_select`.

The range takes addresses and no memory. Python's own `mmap` keeps a file descriptor open for each map and cannot
choose a place, so this asks the C library; where that is not Linux's, `maps` is False, and batches are gathered
segment by segment.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

PAGE = mmap.PAGESIZE

MAPS = sys.platform == "linux" and sys.maxsize > 2**32 and PAGE == 4096
"""Whether files can be laid side by side on this machine. Segments are aligned to pages of 4,096 bytes."""

_NO_ACCESS = 0
_MAY_MOVE, _MOVE_TO = 1, 2
_WILL_NEED, _DONT_NEED, _POPULATE = 3, 4, 22
_PIECE = 512 * 1024
_OF_A_FILE = 2
"""A segment also has a map of its marks."""
_OF_A_PIECE = 2
"""What is between two pieces of a plane counts as a map too."""


def _c_library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.mmap.argtypes = [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    library.mremap.argtypes = [address, size, size, ctypes.c_int, address]
    library.munmap.argtypes = [address, size]
    library.madvise.argtypes = [address, size, ctypes.c_int]
    library.mmap.restype = library.mremap.restype = address
    return library


_C = _c_library() if MAPS else None


def _checked(address: int | None) -> int:
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


_MAPS: set[int] = set()
"""Where maps of files begin."""


class _Count:
    """How many maps this process has, as far as they are ours, and how many the system allows it."""

    def __init__(self) -> None:
        self.maps = 0
        self.allowed = 65_530
        try:
            with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
                self.allowed = int(file.read())
        except (OSError, ValueError):
            pass

    def add(self, maps: int, share: float) -> None:
        """Count further ones, of which all together may be a share of what the system allows.

        Raises:
            OSError: They would be more: at the system's limit, any library in this process would run out of memory.
        """
        if self.maps + maps > share * self.allowed:
            words = (
                f"{self.maps:,} pieces of files are mapped, and the system allows a process {self.allowed:,}. Merge "
                "the segments with `torchrecycle store compact`, or raise vm.max_map_count"
            )
            raise OSError(errno.ENOMEM, words)
        self.maps += maps


_COUNT = _Count()


def _give_back(mapped: _Mapped) -> None:
    assert _C is not None
    _MAPS.discard(mapped.address)
    _COUNT.maps -= mapped.maps
    _C.munmap(mapped.address, mapped.nbytes)


class _Mapped:
    """A range of addresses, given back when the last tensor over it is gone."""

    def __init__(self, address: int, nbytes: int, maps: int = 0) -> None:
        self.address, self.nbytes, self.maps = address, nbytes, maps

    def tensor(self) -> torch.Tensor:
        """``[nbytes]`` uint8, not to be written into. To be called once."""
        buffer = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        # The process's end gives addresses back by itself, and tensors may live until then.
        weakref.finalize(buffer, _give_back, self).atexit = False
        return torch.from_numpy(np.frombuffer(memoryview(buffer), dtype=np.uint8))


def map_file(descriptor: int, nbytes: int) -> torch.Tensor:
    """``[nbytes]`` uint8: the bytes of an open file, which may be closed afterwards.

    Raises:
        OSError: The file cannot be mapped.
    """
    assert _C is not None
    _COUNT.add(_OF_A_FILE, 0.8)
    # Shared, since only such a map can be laid at a second place; it is for reading, so nothing reaches the file.
    try:
        address = _checked(_C.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0))
    except OSError:
        _COUNT.maps -= _OF_A_FILE
        raise
    _MAPS.add(address)
    return _Mapped(address, nbytes, _OF_A_FILE).tensor()


def release(data: torch.Tensor) -> None:
    """Let go of the pages of a mapped file: they stay in the system's cache, and come back when they are read."""
    # A tensor in memory would lose its content; of a map, only whole pages can be given.
    if _C is not None and data.data_ptr() in _MAPS:
        _C.madvise(data.data_ptr(), data.numel() * data.element_size(), _DONT_NEED)


class Plane:
    """A reserved range of addresses that shows bytes of many maps.

    Args:
        nbytes: How many bytes of addresses.
        blank: Whether zeros are read where nothing was shown. Else reading there ends the process: who reads must
            know what is there.

    Raises:
        OSError: So many are not to be had.
    """

    def __init__(self, nbytes: int, *, blank: bool = False) -> None:
        assert _C is not None
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        access = mmap.PROT_READ if blank else _NO_ACCESS
        self._mapped = _Mapped(_checked(_C.mmap(None, nbytes, access, flags, -1, 0)), nbytes)
        self.bytes = self._mapped.tensor()
        """``[nbytes]`` uint8."""

    def show(self, data: torch.Tensor, at: int) -> None:
        """Show bytes of a map at some place: no copy, and they stay when the map's own tensors are gone.

        Args:
            data: Contiguous bytes in what `map_file` gave, or in a shared map of Python's, beginning at a page.
            at: Where, a multiple of the page size.
        """
        assert _C is not None
        source, nbytes = data.data_ptr(), data.numel() * data.dtype.itemsize
        if source % PAGE or at % PAGE or not 0 <= at <= self._mapped.nbytes - nbytes:
            raise ValueError(f"{nbytes} bytes at {source:#x} cannot be shown at {at}")
        _COUNT.add(_OF_A_PIECE, 0.3)
        self._mapped.maps += _OF_A_PIECE
        # An old size of 0 leaves the map where it is and makes a second one of the same pages: see mremap(2).
        _checked(_C.mremap(source, 0, nbytes, _MAY_MOVE | _MOVE_TO, self._mapped.address + at))

    def release(self) -> None:
        """Let go of all pages: they stay in the system's cache of files, and come back when they are read."""
        assert _C is not None
        _C.madvise(self._mapped.address, self._mapped.nbytes, _DONT_NEED)

    def read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Have these bytes read from the disk, all at once, and wait for them; but for those that were not shown."""
        assert _C is not None
        pages = [(self._mapped.address + start // PAGE * PAGE, self._mapped.address + stop) for start, stop in ranges]
        for start, stop in pages:
            # The system forgets what is more than its disk takes at a time.
            for piece in range(start, stop, _PIECE):
                _C.madvise(piece, min(_PIECE, stop - piece), _WILL_NEED)
        for start, stop in pages:
            _C.madvise(start, stop - start, _POPULATE)


def blocks_read() -> int:
    """How many blocks of 512 bytes this thread has had read from disks; 0 where that is not known."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
