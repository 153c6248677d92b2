"""The files of one fingerprint in memory: the very bytes that a folder would hold."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from torchrecycle.store.container import Packed
from torchrecycle.store.shelf import FileStat, Shelf


class MemoryShelf(Shelf):
    """A dict of byte tensors.

    Forked workers share its pages. Pickling through `torch.multiprocessing` moves the tensors into shared
    memory, in place, so that spawned workers share them too; views of them follow. What a worker writes stays
    in the worker.
    """

    def __init__(self, url: str) -> None:
        self.url, self.owner = url, url.rpartition("/")[2]
        self.files: dict[str, torch.Tensor] = {}
        self._written: dict[str, float] = {}
        self._used: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # It would bring the other rows of the store along, to make room for what stays in the worker.
        return {name: value for name, value in self.__dict__.items() if name != "room"}

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> torch.Tensor | None:
        return self.files.get(name)

    def write(self, name: str, packed: Packed, *, keep: bool = False) -> None:
        if keep and name in self.files:
            return
        self._before_writing(name, packed.nbytes)
        data = torch.empty(packed.nbytes, dtype=torch.uint8)
        view, start = data.numpy(), 0
        for chunk in packed.chunks:
            view[start : start + len(chunk)] = chunk
            start += len(chunk)
        self.files[name] = data
        self._written[name] = self._used[name] = time.time()

    def set_aside(self, name: str) -> None:
        self.files[f"{name}.damaged"] = self.files.pop(name)

    def stats(self) -> dict[str, FileStat]:
        found = {}
        for name in self.names():
            written = self._written.get(name, 0.0)
            found[name] = FileStat(len(self.files[name]), self._used.get(name, written), written)
        return found

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.files.pop(name, None)

    def clear(self) -> None:
        self.files.clear()

    def _touch(self, name: str) -> None:
        self._used[name] = time.time()

    def date(self, name: str, used: float) -> None:
        self._used[name] = used
