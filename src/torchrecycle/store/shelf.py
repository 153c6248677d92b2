"""Where the files of one fingerprint lie: what knows a folder from a piece of memory.

A shelf knows names and bytes, and nothing of rows: ``about.json``, ``probe.safetensors``,
``3f9c2a61b7e0-000001.safetensors``, ``manifests/<identity>.safetensors``. So a store in memory holds the very
bytes that a folder would, passes the same tests, and copying one into the other is copying files. Another
kind of place (object storage) is another shelf.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch

from torchrecycle.errors import DamagedRowError, StoreError
from torchrecycle.store.container import Packed
from torchrecycle.store.mapping import MAPS, map_file

MANIFESTS = "manifests"

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class Shelf(ABC):
    """Immutable files by name."""

    url: str

    maps = False
    """Whether what `read` gives are maps of files, which take no memory of their own."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all files, sorted; those in a folder as ``folder/name``."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor | None:
        """The bytes of a file, not to be written into; None if there is no such file."""

    @abstractmethod
    def write(self, name: str, packed: Packed, *, keep: bool = False) -> None:
        """Write a file in one step: others see all of it or nothing, and a crash leaves all of it or nothing.

        Args:
            name: Its name, in ``[folder/]name`` form.
            packed: What to write.
            keep: Leave a file of that name as it is, instead of replacing it.
        """

    @abstractmethod
    def set_aside(self, name: str) -> None:
        """Rename a file to ``<name>.damaged``."""


@contextlib.contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `StoreError` that says what was being done; `errno` is kept."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        worded = StoreError(f"{doing}: {error.strerror or error}")
        worded.errno = error.errno
        raise worded from error


class FolderShelf(Shelf):
    """A folder. It is made when the first file is written."""

    maps = MAPS

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder

    def names(self) -> list[str]:
        with in_words(f"cannot list {self.url}"):
            return sorted(
                [path.name for path in _listed(self._folder)]
                + [f"{MANIFESTS}/{path.name}" for path in _listed(self._folder / MANIFESTS)]
            )

    def read(self, name: str) -> torch.Tensor | None:
        path = self._folder / name
        with in_words(f"cannot read {path}"):
            try:
                # A link could lead out of the folder, and opening a pipe would wait for ever.
                descriptor = os.open(path, os.O_RDONLY | _NO_LINKS)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):
                    raise _no_file(path) from None
                raise
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise _no_file(path)
                return _mapped(descriptor, path, found.st_size)
            finally:
                # A store has thousands of segments, and a map needs no open file.
                os.close(descriptor)

    def write(self, name: str, packed: Packed, *, keep: bool = False) -> None:
        path = self._folder / name
        with in_words(f"cannot write {path}"):
            _make_folder(path.parent)
            # Readers know files by their ending, so what a killed writer leaves is never read.
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
            try:
                with open(temporary, "xb") as file:
                    for chunk in packed.chunks:
                        file.write(chunk.data)
                    file.flush()
                    os.fsync(file.fileno())
                _put_in_place(temporary, path, keep)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def set_aside(self, name: str) -> None:
        path = self._folder / name
        with in_words(f"cannot set {path} aside"):
            # Whoever else has verified at the same time may have been first.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path.with_name(f"{path.name}.damaged"))
                _sync_folder(path.parent)


def _no_file(path: Path) -> DamagedRowError:
    return DamagedRowError(f"{path} is no plain file. Run `torchrecycle store verify`: it sets it aside")


def _mapped(descriptor: int, path: Path, nbytes: int) -> torch.Tensor:
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    if MAPS:
        return map_file(descriptor, nbytes)
    try:
        # Private, so that a stray write could never reach the file.
        return torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise StoreError(f"cannot map {path}: {error}") from error


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name != MANIFESTS]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _put_in_place(temporary: Path, path: Path, keep: bool) -> None:
    if keep:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links: the last of two writers in the same moment then wins.
            if not path.exists():
                os.replace(temporary, path)
                return
        temporary.unlink()
    else:
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot open a folder.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of a folder, and are safe without.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class MemoryShelf(Shelf):
    """A dict of byte tensors.

    Forked workers share its pages. Pickling through `torch.multiprocessing` moves the tensors into shared
    memory, in place, so that spawned workers share them too; views of them follow. What a worker writes stays
    in the worker.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, torch.Tensor] = {}

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> torch.Tensor | None:
        return self.files.get(name)

    def write(self, name: str, packed: Packed, *, keep: bool = False) -> None:
        if keep and name in self.files:
            return
        data = torch.empty(packed.nbytes, dtype=torch.uint8)
        view, start = data.numpy(), 0
        for chunk in packed.chunks:
            view[start : start + len(chunk)] = chunk
            start += len(chunk)
        self.files[name] = data

    def set_aside(self, name: str) -> None:
        self.files[f"{name}.damaged"] = self.files.pop(name)
