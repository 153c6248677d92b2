"""The stores there are, and the door to them.

``open_store("activations/")`` is a folder, made when the first row is written;
``open_store("memory://trial")`` lives as long as the process, and everybody in it who opens that name gets
the same one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

from torchrecycle.errors import StoreError
from torchrecycle.store.about import ABOUT, need_form
from torchrecycle.store.contract import LeafSpec, Store
from torchrecycle.store.holdings import OLD_SECONDS
from torchrecycle.store.index_file import INDEX
from torchrecycle.store.memory import MemoryShelf
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.room import Room
from torchrecycle.store.rows import (
    PROBE,
    PUBLISH_SECONDS,
    SEGMENT_BYTES,
    ShelfRows,
    check_fingerprint,
    is_fingerprint,
)
from torchrecycle.store.shelf import MANIFESTS, FolderShelf, Shelf, in_words
from torchrecycle.store.sizes import parse_bytes
from torchrecycle.store.upkeep import ShelfStore

_MEMORY = "memory://"
_REMOVED = ".removed-"


class FolderStore(ShelfStore):
    """A store in a folder. Opening and reading it write nothing, but when rows were last used.

    Args:
        folder: Where. It need not be there yet.
        segment_bytes: How many bytes of rows are gathered before they are published as one segment.
        publish_seconds: How long an appended row waits at most, if others are appended after it.
        max_bytes: How many bytes all files together may take: a number, or ``"200 GB"``. Publishing evicts what is
            least recently used, and is an error (``ENOSPC``) where what is there is in use.

    Raises:
        StoreError: There is something else than a store.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        segment_bytes: int = SEGMENT_BYTES,
        publish_seconds: float = PUBLISH_SECONDS,
        max_bytes: int | str | None = None,
    ) -> None:
        # Absolute, so that a worker or a later `chdir` still finds it.
        self._folder = Path(folder).expanduser().absolute()
        self.url = str(self._folder)
        self.segment_bytes = segment_bytes
        self._publish_seconds = publish_seconds
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes)
        with in_words(f"cannot open {self.url} as a store"):
            _refuse_other_things(self._folder)

    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> ShelfRows:
        shelf = self._limited(check_fingerprint(fingerprint))
        return ShelfRows(shelf, leaves, about, segment_bytes=self.segment_bytes, publish_seconds=self._publish_seconds)

    def existing(self, fingerprint: str) -> ShelfRows:
        return _existing(self._limited(check_fingerprint(fingerprint)))

    def fingerprints(self) -> list[str]:
        return [name for name in self._names() if _is_of_a_store(self._folder / name)]

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        with in_words(f"cannot list {self.url}"):
            return sorted(path.name for path in self._folder.iterdir() if _may_be_of_a_store(path))

    def _shelf(self, fingerprint: str, told: Callable[[str], None] | None = None) -> FolderShelf:
        return FolderShelf(self._folder / fingerprint, told=told)

    def _limited(self, fingerprint: str) -> FolderShelf:
        shelf = self._shelf(fingerprint)
        if self.max_bytes is not None:
            shelf.room = Room(self.url, self._shelves, self.max_bytes)
        return shelf

    def _shelves(self) -> dict[str, Shelf]:
        return {name: self._shelf(name) for name in self.fingerprints()}

    def _sweep(self, seconds: float | None = None) -> list[str]:
        seconds = OLD_SECONDS if seconds is None else seconds
        if not self._folder.is_dir():
            return []
        left = []
        with in_words(f"cannot remove what was left in {self.url}"):
            for path in self._folder.glob(f"{_REMOVED}*"):
                with suppress(FileNotFoundError):  # whoever began to remove it has gone on
                    if not path.is_symlink() and time.time() - path.stat().st_ctime > seconds:
                        shutil.rmtree(path, ignore_errors=True)
                        left += [str(path)] if path.exists() else []
        return left

    def _refuse_foreign(self, name: str) -> None:
        folder = self._folder / name
        with in_words(f"cannot list {folder}"):
            foreign = [] if folder.is_symlink() else _not_ours(folder)
        if foreign:
            raise StoreError(f"{folder} is no fingerprint's folder: it holds {_some(foreign)}. Nothing was removed")

    def __repr__(self) -> str:
        return f"FolderStore({self.url!r})"


def _existing(shelf: Shelf) -> ShelfRows:
    about, leaves = need_form(shelf)
    return ShelfRows(shelf, leaves, about)


_TAKEN = re.compile(r"[0-9a-f]{32}")
"""What fingerprints look like that `recycle` has taken."""


def _is_of_a_store(folder: Path) -> bool:
    # A link could lead out of the store.
    return is_fingerprint(folder.name) and not folder.is_symlink() and (_has_about(folder) or _has_rows(folder))


def _may_be_of_a_store(folder: Path) -> bool:
    """Also of a damaged one: a fingerprint's folder in which nothing is somebody else's, or a link in its place."""
    if not is_fingerprint(folder.name):
        return False
    return folder.is_symlink() or _has_about(folder) or (folder.is_dir() and not _holds_other_things(folder))


def _has_about(folder: Path) -> bool:
    """Whether it is a fingerprint's folder, going by its ``about.json``, or by its name if nobody else may look."""
    try:
        os.stat(folder / ABOUT)
    except PermissionError:  # another user's, made under ``umask 077``
        return _TAKEN.fullmatch(folder.name) is not None
    except OSError:
        return False
    return True


def _has_rows(folder: Path) -> bool:
    """Whether it is a fingerprint's folder that has lost its ``about.json``."""
    with suppress(OSError):
        return any(is_segment(path.name) for path in folder.iterdir()) and not _not_ours(folder)
    return False


def _holds_other_things(folder: Path) -> bool:
    """Whether something in it is not ours, or nobody can tell."""
    try:
        return bool(_not_ours(folder))
    except OSError:
        return True


def _refuse_other_things(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file, and a store is a folder: give another path, or move that file away")
    # A disk that is mounted there brings a lost+found.
    names = [path.name for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name != "lost+found"]
    if any(is_fingerprint(name) and _has_about(folder / name) for name in names):
        return
    # A writer that was killed in its first moments, or who writes while this is removed, leaves no about.json.
    foreign = [name for name in names if not (folder / name).is_dir() or _holds_other_things(folder / name)]
    if ABOUT in foreign:
        raise StoreError(f"{folder} holds one fingerprint. Its store is the folder around it: give {folder.parent}")
    if foreign:
        raise StoreError(
            f"{folder} is no store: it holds {_some(foreign)}, and "
            f"no <fingerprint>/{ABOUT}. Give an empty or a new folder, such as {folder / 'activations'}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + " ..." * (len(names) > 3)


_OURS = frozenset({ABOUT, INDEX, PROBE, MANIFESTS, "claims"})


def _not_ours(folder: Path) -> list[str]:
    """What is in a folder that this package does not write there."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not (
            path.name.startswith(".")
            or ".tmp-" in path.name
            or is_segment(path.name.removesuffix(".damaged"))
            or path.name.removesuffix(".damaged") in _OURS
        )
    )


class MemoryStore(ShelfStore):
    """A store in memory: it ends with the process.

    Workers read it: forked ones share its memory, spawned ones once it was moved to shared memory, which
    pickling through `torch.multiprocessing` does. What a worker appends stays in that worker.

    Args:
        url: What it is called in messages.
        segment_bytes: How many bytes of rows are gathered before they are published as one segment.
        publish_seconds: How long an appended row waits at most, if others are appended after it.
        max_bytes: See `FolderStore`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        publish_seconds: float = PUBLISH_SECONDS,
        max_bytes: int | str | None = None,
    ) -> None:
        self.url = url or f"{_MEMORY}unnamed-{secrets.token_hex(4)}"
        self._shelves: dict[str, MemoryShelf] = {}
        self.segment_bytes = segment_bytes
        self._publish_seconds = publish_seconds
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes)

    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> ShelfRows:
        name = check_fingerprint(fingerprint)
        shelf = self._shelves.setdefault(name, self._new_shelf(name))
        return ShelfRows(shelf, leaves, about, segment_bytes=self.segment_bytes, publish_seconds=self._publish_seconds)

    def existing(self, fingerprint: str) -> ShelfRows:
        return _existing(self._shelf(check_fingerprint(fingerprint)))

    def fingerprints(self) -> list[str]:
        return sorted(name for name, shelf in self._shelves.items() if ABOUT in shelf.files)

    def _names(self) -> list[str]:
        return sorted(name for name, shelf in self._shelves.items() if shelf.files)

    def _shelf(self, fingerprint: str, told: Callable[[str], None] | None = None) -> MemoryShelf:
        return self._shelves.get(fingerprint) or self._new_shelf(fingerprint)

    def _new_shelf(self, fingerprint: str) -> MemoryShelf:
        shelf = MemoryShelf(f"{self.url}/{fingerprint}")
        if self.max_bytes is not None:
            shelf.room = Room(self.url, lambda: self._shelves, self.max_bytes)
        return shelf

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"


_NAMED: dict[str, MemoryStore] = {}


@overload
def open_store(where: str | os.PathLike[str], max_bytes: int | str | None = None) -> ShelfStore: ...
@overload
def open_store(where: str | os.PathLike[str] | Store, max_bytes: int | str | None = None) -> Store: ...
def open_store(where: str | os.PathLike[str] | Store, max_bytes: int | str | None = None) -> Store:
    """The store at some place.

    Args:
        where: A folder, which need not be there yet; ``memory://name``, the same for everybody in this
            process; ``memory://``, a new one each time; or a `Store`, which is given back.
        max_bytes: How many bytes it may take, such as ``"200 GB"``: see `FolderStore`. Of a store that is open
            already, it cannot be said here.

    Raises:
        StoreError: There is something else than a store, or the place is of a kind that is not known.

    >>> import numpy as np, torch
    >>> spec = LeafSpec((2,), ragged=False, dtype=torch.float32)
    >>> rows = open_store("memory://").rows("f" * 32, [spec], about={"cut": "layer2"})
    >>> key = np.zeros((1, 16), dtype=np.uint8)
    >>> rows.append(key, [torch.tensor([[3.0, 4.0]])])
    >>> rows.lookup(key)
    array([-1])
    >>> rows.publish()
    >>> rows.gather(rows.lookup(key))
    [tensor([[3., 4.]])]
    """
    if isinstance(where, Store):
        _refuse_limit(where, max_bytes)
        return where
    text = os.fspath(where)
    if text == _MEMORY:
        return MemoryStore(max_bytes=max_bytes)
    if text in _NAMED:
        _refuse_limit(_NAMED[text], max_bytes)
        return _NAMED[text]
    if text.startswith(_MEMORY):
        return _NAMED.setdefault(text, MemoryStore(text, max_bytes=max_bytes))
    if "://" in text:
        raise StoreError(f"cannot open {text!r}: a store is a folder, or 'memory://name'")
    return FolderStore(text, max_bytes=max_bytes)


def _refuse_limit(store: Store, max_bytes: int | str | None) -> None:
    if max_bytes is not None and parse_bytes(max_bytes) != getattr(store, "max_bytes", None):
        raise StoreError(f"{store.url} is open already: give max_bytes={max_bytes!r} when it is made")
