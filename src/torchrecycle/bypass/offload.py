"""The prefix put away: its weights wait where memory is cheap, and come back by themselves when they are needed.

Of a ViT-L/16 cut at its twelfth block half of the 1.2 GB of weights are only read where an object has no row. After
filling that is never, so `Offloaded.put_away` moves them from the GPU to pinned memory of the CPU; the GPU's 0.6 GB
are the suffix's then. A miss, or another way to call the model, brings them back (25 ms over a PCIe bus), and the next
iteration of a loader puts them away again. A model on the CPU has its prefix in a mapped file, where reading brings
pages back one by one and the system may drop them at any time.

What moves are the parameters that only the skipped modules read: `Parameter` objects stay, and only their ``.data`` is
exchanged, as ``module.to()`` does. So optimisers, ``state_dict``, checkpoints and names go on working. Parameters that
lie in one storage (tied weights, the flat weights of an LSTM) move with it, or stay with it. Buffers stay: DDP sends
them around in each forward, and they are a thousandth of the whole.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from torchrecycle.bypass.plan import Plan
from torchrecycle.errors import StoreError

__all__ = ["OffloadReport", "Offloaded", "only_in_prefix"]

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems whose files are memory."""


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """What `Recycling.offload` has moved."""

    parameters: int
    """How many numbers."""
    nbytes: int
    """How many bytes are free on the device now."""
    source: str
    """The device that they came from."""
    place: str
    """Where they are now."""

    def __str__(self) -> str:
        if not self.parameters:
            return f"nothing to move from {self.source}: no parameter is read by skipped layers alone"
        return (
            f"moved {self.parameters:,} parameters ({self.nbytes / 1e6:,.1f} MB) of the frozen layers from "
            f"{self.source} to {self.place}"
        )


def only_in_prefix(model: nn.Module, plan: Plan, read_on_hits: Iterable[torch.Tensor]) -> list[nn.Parameter]:
    """The parameters that nobody reads where all rows are kept.

    Args:
        model: the root.
        plan: of the cut.
        read_on_hits: what the forward reads though the prefix is skipped.
    """
    run_after_all = {step.name for step in plan.steps if step.action == "run"}
    outer = [module for module in plan.prefix_modules if plan.modules[module] not in run_after_all]
    inside = {part for module in outer for part in module.modules()}
    elsewhere = {id(p) for m in model.modules() if m not in inside for p in m._parameters.values() if p is not None}
    kept = elsewhere | {id(tensor) for tensor in read_on_hits}
    found = {id(p): p for m in inside for p in m._parameters.values() if p is not None and id(p) not in kept}
    stays = _storages(t for t in (*model.parameters(), *model.buffers()) if id(t) not in found)
    return [p for p in found.values() if _movable(p) and _storage(p) not in stays]


def _movable(parameter: nn.Parameter) -> bool:
    plain = type(parameter.data) is torch.Tensor and parameter.layout is torch.strided
    return plain and parameter.device.type != "meta" and parameter.numel() > 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    found = set()
    for tensor in tensors:
        with suppress(RuntimeError, NotImplementedError):  # wrappers have none of their own
            found.add(_storage(tensor))
    return found


class Watching(Protocol):
    """Sees whether tensors were written or moved, as `Watch` does."""

    def moved(self) -> bool:
        """Whether any was since the last `renew`."""
        ...

    def renew(self) -> None:
        """Take the present state as the one to compare with."""
        ...


class Offloaded:
    """The parameters of one prefix, which are here or away. `put_away` and `bring_back` are inverses.

    Args:
        parameters: what may be away.
        home: says where the rest of the model is.
        folder: for the mapped file of a model on the CPU; or several, of which the first that is on a disk is taken.
        watch: is told that a move is no change.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        home: Callable[[], torch.device],
        folder: Sequence[str],
        watch: Callable[[], Watching],
    ) -> None:
        self.parameters = list(parameters)
        self.ids = frozenset(map(id, self.parameters))
        self.away = False
        """Whether they are elsewhere than the rest of the model, so that a prefix run needs them back."""
        self.last_home = home()
        self._home, self._folder, self._watch = home, folder, watch
        self._lock = threading.RLock()
        self._file: _File | None = None

    def put_away(self, spared: frozenset[int] | None = None) -> OffloadReport:
        """Free the memory that they take on the model's device.

        Args:
            spared: ids of those that must stay, since another recycling of the model reads them.

        Raises:
            StoreError: there is no room for the file.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.last_home = home = self._home()
            chosen = [p for p in self.parameters if not spared or id(p) not in spared]
            quiet = not self._watch().moved()
            place = self._to_file(chosen) if home.type == "cpu" else self._to_cpu(chosen, home)
            if quiet:
                self._watch().renew()
            storages = {_storage(p): p.untyped_storage().nbytes() for p in chosen}
            return OffloadReport(sum(p.numel() for p in chosen), sum(storages.values()), str(home), place)

    def _to_cpu(self, chosen: Sequence[nn.Parameter], home: torch.device) -> str:
        here = [p for p in chosen if p.device == home]
        for group in _groups(here):
            # Waits for the copy: the memory is given back at once.
            _exchange(group, _pinned(group[0].untyped_storage().nbytes(), home))
        self.away = self.away or bool(here)
        self._file = None
        return "the CPU"

    def _to_file(self, chosen: Sequence[nn.Parameter]) -> str:
        outside = [p for p in chosen if p.device.type == "cpu" and (self._file is None or not self._file.holds(p))]
        if outside:
            groups = _groups(outside)
            file = _File([group[0].untyped_storage().nbytes() for group in groups], _folder_on_disk(self._folder))
            for group, room in zip(groups, file.rooms, strict=True):
                _exchange(group, room)
            # What an earlier file holds stays there: its map lives as long as a tensor over it does.
            self._file = file if self._file is None else self._file.joined(file)
            _give_back_memory()
        if self._file is not None:
            self._file.drop()
        return "a mapped file" if self._file is not None else "the CPU"

    def bring_back(self, *, for_good: bool = False) -> None:
        """Have them where the rest of the model is.

        Args:
            for_good: also out of a mapped file, in which they can be read as they are.
        """
        if not (self.away or for_good):
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            home = self._home()
            quiet = not self._watch().moved()
            there = [p for p in self.parameters if p.device != home or (for_good and self._in_file(p))]
            for group in _groups(there):
                nbytes = group[0].untyped_storage().nbytes()
                # In the order of the stream: what reads them on it waits for the copy, and nobody else does.
                _exchange(group, torch.empty(nbytes, dtype=torch.uint8, device=home), non_blocking=home.type == "cuda")
            self.away = False
            if for_good:
                self._file = None
            if quiet and there:
                self._watch().renew()

    def _in_file(self, parameter: nn.Parameter) -> bool:
        return self._file is not None and self._file.holds(parameter)


def _groups(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that lie in one storage, together."""
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(_storage(parameter), []).append(parameter)
    return list(groups.values())


def _exchange(group: Sequence[nn.Parameter], room: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy a storage's bytes to another, and let its parameters be of that."""
    old = group[0].untyped_storage()
    room.copy_(torch.empty(0, dtype=torch.uint8, device=old.device).set_(old), non_blocking=non_blocking)
    storage = room.untyped_storage()
    for parameter in group:
        made = torch.empty(0, dtype=parameter.dtype, device=room.device)
        parameter.data = made.set_(storage, parameter.storage_offset(), parameter.size(), parameter.stride())


def _pinned(nbytes: int, home: torch.device) -> torch.Tensor:
    """Memory of the CPU that the GPU reads by itself; any other where there is none to be had."""
    if home.type == "cuda":
        with suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


# -- a file in the place of memory -------------------------------------------------------------------------------------


class _File:
    """Rooms in a mapped file that has no name, and is gone with the last tensor over it.

    Args:
        sizes: of the rooms, in bytes.
        folder: where it takes space.

    Raises:
        StoreError: there is not enough of it.
    """

    def __init__(self, sizes: Sequence[int], folder: str) -> None:
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _take_space(file.fileno(), total)
                self._map = mmap.mmap(file.fileno(), total)
        except OSError as error:
            raise StoreError(
                error.errno or errno.EIO,
                f"no {total / 1e6:,.1f} MB for the frozen layers in {folder}: {error.strerror or error}. Give another "
                "place: offload(folder=...)",
            ) from error
        self.rooms = [
            torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
            for size, start in zip(sizes, starts, strict=True)
        ]
        first = self.rooms[0].data_ptr() if self.rooms else 0
        self._ranges = [(first, first + total)]
        self._earlier: list[_File] = []

    def joined(self, later: _File) -> _File:
        """A later file, together with this one."""
        later._earlier = [*self._earlier, self]
        return later

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter lies in it."""
        at = _storage(parameter)
        return any(low <= at < high for file in (self, *self._earlier) for low, high in file._ranges)

    def drop(self) -> None:
        """Let go of its pages: they come back when they are read."""
        for file in (self, *self._earlier):
            file._map.flush()
            if hasattr(mmap, "MADV_DONTNEED"):
                file._map.madvise(mmap.MADV_DONTNEED)


def _take_space(descriptor: int, nbytes: int) -> None:
    """Writing to a map of a file for which there is no room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def _folder_on_disk(folders: Sequence[str]) -> str:
    there = [folder for folder in folders if os.path.isdir(folder)]
    found = next((folder for folder in there if _kind_of(folder) not in _IN_MEMORY), None)
    if found is None:
        raise StoreError(
            f"none of {list(folders)} is a folder on a disk, so that a file there would take memory, too. Give one: "
            "offload(folder=...)"
        )
    return found


def _kind_of(folder: str) -> str:
    """The file system that a folder is on; empty where that is not known."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    with suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, where, system = line.split()[:3]
            where = where.replace("\\040", " ")
            inside = path == where or path.startswith(where.rstrip("/") + "/")
            if inside and len(where) >= len(best):
                best, kind = where, system
    return kind


def _give_back_memory() -> None:
    """Have the C library return what was freed to the system."""
    if sys.platform == "linux":
        trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
