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
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrecycle.errors import DamagedRowError, StoreError
from torchrecycle.store.container import Packed
from torchrecycle.store.mapping import MAPS, map_file

MANIFESTS = "manifests"

TOUCH_SECONDS = 3600.0
"""How exact "last used" is."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER = os.O_RDONLY | _NO_LINKS | getattr(os, "O_DIRECTORY", 0)
_QUIETLY = getattr(os, "O_NOATIME", 0)
_BY_DESCRIPTOR = os.open in os.supports_dir_fd and os.scandir in os.supports_fd


@dataclass(frozen=True, slots=True)
class FileStat:
    """What a shelf knows of a file without reading it."""

    nbytes: int
    """Its size."""
    used: float
    """When its rows were last looked up, or it was written: seconds since 1970, exact to an hour."""
    changed: float
    """When it was last written to: seconds since 1970."""


_IN_USE: dict[str, dict[str, float]] = {}
"""By shelf, the files that this process has written or whose rows it has looked up, and when it last said so."""


def in_use(url: str) -> set[str]:
    """The files of a shelf that this process has written, or whose rows it has looked up."""
    return set(_IN_USE.get(url, ()))


class Shelf(ABC):
    """Immutable files by name."""

    url: str

    owner: str
    """The fingerprint whose files these are; each says so."""

    maps = False
    """Whether what `read` gives are maps of files, which take no memory of their own."""

    room: Callable[[Shelf, int], None] | None = None
    """Called before so many bytes are written, where the store has a limit: makes room, or raises `StoreError`."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all files, sorted; those in a folder as ``folder/name``."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor | None:
        """The bytes of a file, not to be written into; None if there is no such file."""

    def version(self, name: str) -> tuple[int, ...] | None:
        """What changes when a file is replaced or written over; None where that does not happen, or it is not there."""
        return None

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

    @abstractmethod
    def stats(self) -> dict[str, FileStat]:
        """All files by name, those of other writers' half-written ones, claims and what was set aside among them."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are passed over. Whoever has one mapped goes on reading it."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything, in one step for whoever looks."""

    def touch(self, names: Iterable[str]) -> None:
        """Note that these segments' rows are looked up: they are in use here, and evicted last by others.

        Cheap enough for every lookup: each file is written down at most once an hour. Where that cannot be written
        (a read-only folder), nothing happens.
        """
        noted, now = _IN_USE.setdefault(self.url, {}), time.monotonic()
        for name in names:
            if now - noted.get(name, -TOUCH_SECONDS) >= TOUCH_SECONDS:
                noted[name] = now
                self._touch(name)

    @abstractmethod
    def _touch(self, name: str) -> None:
        """Write down that a file is used now."""

    @abstractmethod
    def date(self, name: str, used: float) -> None:
        """Let a file count as last used at some time, if that can be written down."""

    def _before_writing(self, name: str, nbytes: int) -> None:
        """To be called by `write` with a file's size."""
        if self.room is not None:
            self.room(self, nbytes)
        _IN_USE.setdefault(self.url, {})[name] = time.monotonic()


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

    def __init__(self, folder: Path, *, told: Callable[[str], None] | None = None) -> None:
        self.url, self.owner = str(folder), folder.name
        self._folder = folder
        self._told = told
        """Called with the name of each file that is read: for showing how far something is."""

    def names(self) -> list[str]:
        with in_words(f"cannot list {self.url}"):
            found = [name for name, is_folder in self._entries().items() if name != MANIFESTS or not is_folder]
            return sorted(found + [f"{MANIFESTS}/{name}" for name in self._entries(MANIFESTS)])

    def read(self, name: str) -> torch.Tensor | None:
        path = self._folder / name
        if self._told is not None:
            self._told(name)
        with in_words(f"cannot read {path}"):
            try:
                # A link could lead out of the folder, and opening a pipe would wait for ever.
                descriptor = self._open(name)
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

    def version(self, name: str) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._folder / name, follow_symlinks=False)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _open(self, name: str) -> int:
        """A descriptor of a file, to read it. No link is followed, but those above this shelf's folder."""
        folder, _, own = name.rpartition("/")
        with self._opened(folder) as place:
            path, at = (own, place) if _BY_DESCRIPTOR else (self._folder / name, None)
            try:
                # Reading it to verify or to merge is no use of it, and must not be taken for one.
                return os.open(path, os.O_RDONLY | _NO_LINKS | _QUIETLY, dir_fd=at)
            except PermissionError:  # somebody else's file
                return os.open(path, os.O_RDONLY | _NO_LINKS, dir_fd=at)

    @contextlib.contextmanager
    def _opened(self, folder: str = "") -> Iterator[Any]:
        """A descriptor of the folder, or of one in it; its path where there are no such descriptors."""
        path = self._folder / folder
        if not _BY_DESCRIPTOR:
            self._refuse_links(folder)
            yield path
            return
        with contextlib.ExitStack() as stack:
            place = None
            for step in [self._folder, *([folder] if folder else [])]:
                try:
                    place = os.open(step, _FOLDER, dir_fd=place)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        self._refuse_links(folder)
                    raise
                stack.callback(os.close, place)
            yield place

    def _refuse_links(self, folder: str = "") -> None:
        """Raise if the folder, or one in it, is a link: it could lead out of the store."""
        if self._folder.is_symlink():
            raise StoreError(
                f"{self._folder} is a symbolic link, which is not followed: remove it, with `torchrecycle store rm` "
                "or by hand. (The store's own folder may be one.)"
            )
        if folder and (self._folder / folder).is_symlink():
            raise _no_file(self._folder / folder)

    def _entries(self, folder: str = "") -> dict[str, bool]:
        """The names in the folder, or in one in it, and which of them are folders; nothing if there is none."""
        try:
            with self._opened(folder) as place, os.scandir(place) as entries:
                return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except DamagedRowError:
            return {}  # a link in place of a folder, which the list of the folder around it names

    def write(self, name: str, packed: Packed, *, keep: bool = False) -> None:
        path = self._folder / name
        self._before_writing(name, packed.nbytes)
        with in_words(f"cannot write {path}"):
            self._refuse_links(name.rpartition("/")[0])
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
            self._refuse_links(name.rpartition("/")[0])
            # Whoever else has verified at the same time may have been first.
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path.with_name(f"{path.name}.damaged"))
                _sync_folder(path.parent)

    # What is there, and taking it away

    def stats(self) -> dict[str, FileStat]:
        with in_words(f"cannot list {self.url}"):
            found = self._stats("")
            folders = [name for name, is_folder in self._entries().items() if is_folder]
            for folder in folders:
                found |= {f"{folder}/{name}": stat for name, stat in self._stats(folder).items()}
            return dict(sorted(found.items()))

    def _stats(self, folder: str) -> dict[str, FileStat]:
        found = {}
        for name, is_folder in self._entries(folder).items():
            with contextlib.suppress(FileNotFoundError):
                if not is_folder:
                    of = os.stat(self._folder / folder / name, follow_symlinks=False)
                    found[name] = FileStat(of.st_size, of.st_atime, of.st_mtime)
        return found

    def remove(self, names: Iterable[str]) -> None:
        folders = set()
        for name in names:
            path = self._folder / name
            with in_words(f"cannot remove {path}"), contextlib.suppress(FileNotFoundError):
                self._refuse_links(name.rpartition("/")[0])
                path.unlink()
                folders.add(path.parent)
        with in_words(f"cannot remove files of {self.url}"), contextlib.suppress(FileNotFoundError):
            for folder in folders:
                _sync_folder(folder)

    def clear(self) -> None:
        with in_words(f"cannot remove {self.url}"):
            if self._folder.is_symlink():
                self._folder.unlink()  # the link, and nothing of what it leads to
                return
            # Renamed first: who looks sees all of it or nothing, and what a kill leaves is no fingerprint any more.
            away = self._folder.with_name(f".removed-{self._folder.name}-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._folder, away)
                _sync_folder(away.parent)
                # It follows no links.
                shutil.rmtree(away)
                _sync_folder(away.parent)

    def _touch(self, name: str) -> None:
        with contextlib.suppress(OSError, StoreError):
            self._refuse_links()
            path, now = self._folder / name, time.time_ns()
            found = os.stat(path, follow_symlinks=False)
            if now - found.st_atime_ns >= TOUCH_SECONDS * 1e9 and stat.S_ISREG(found.st_mode):
                os.utime(path, ns=(now, found.st_mtime_ns))

    def date(self, name: str, used: float) -> None:
        with contextlib.suppress(OSError):
            path = self._folder / name
            written = os.stat(path, follow_symlinks=False).st_mtime_ns
            os.utime(path, ns=(round(used * 1e9), written), follow_symlinks=False)


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
