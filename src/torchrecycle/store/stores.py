"""The stores there are, and the door to them.

``open_store("activations/")`` is a folder, made when the first row is written;
``open_store("memory://trial")`` lives as long as the process, and everybody in it who opens that name gets
the same one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrecycle.errors import StoreError
from torchrecycle.store.about import ABOUT, read_form
from torchrecycle.store.contract import LeafSpec, Store
from torchrecycle.store.memory import MemoryShelf
from torchrecycle.store.rows import (
    PUBLISH_SECONDS,
    SEGMENT_BYTES,
    ShelfRows,
    check_fingerprint,
    is_fingerprint,
)
from torchrecycle.store.shelf import FolderShelf, Shelf, in_words

_MEMORY = "memory://"


class FolderStore(Store):
    """A store in a folder. Opening and reading it write nothing.

    Args:
        folder: Where. It need not be there yet.
        segment_bytes: How many bytes of rows are gathered before they are published as one segment.
        publish_seconds: How long an appended row waits at most, if others are appended after it.

    Raises:
        StoreError: There is something else than a store.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        segment_bytes: int = SEGMENT_BYTES,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        # Absolute, so that a worker or a later `chdir` still finds it.
        self._folder = Path(folder).expanduser().absolute()
        self.url = str(self._folder)
        self._segment_bytes = segment_bytes
        self._publish_seconds = publish_seconds
        with in_words(f"cannot open {self.url} as a store"):
            _refuse_other_things(self._folder)

    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> ShelfRows:
        shelf = FolderShelf(self._folder / check_fingerprint(fingerprint))
        return ShelfRows(shelf, leaves, about, segment_bytes=self._segment_bytes, publish_seconds=self._publish_seconds)

    def existing(self, fingerprint: str) -> ShelfRows:
        return _existing(FolderShelf(self._folder / check_fingerprint(fingerprint)))

    def fingerprints(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        with in_words(f"cannot list {self.url}"):
            return sorted(path.name for path in self._folder.iterdir() if _is_of_a_store(path))

    def __repr__(self) -> str:
        return f"FolderStore({self.url!r})"


def _existing(shelf: Shelf) -> ShelfRows:
    found = read_form(shelf)
    if found is None:
        raise StoreError(f"{shelf.url} holds no rows: it has no {ABOUT}")
    about, leaves = found
    return ShelfRows(shelf, leaves, about)


def _is_of_a_store(folder: Path) -> bool:
    return is_fingerprint(folder.name) and (folder / ABOUT).is_file()


def _refuse_other_things(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file, and a store is a folder: give another path, or move that file away")
    foreign = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if any(_is_of_a_store(folder / name) for name in foreign):
        return
    # A writer that was killed in its first moments leaves folders without about.json.
    foreign = [name for name in foreign if not _is_barely_begun(folder / name)]
    if foreign:
        some = ", ".join(map(repr, foreign[:3])) + " ..." * (len(foreign) > 3)
        raise StoreError(
            f"{folder} is no store: it holds {some}, and "
            f"no <fingerprint>/{ABOUT}. Give an empty or a new folder, such as {folder / 'activations'}"
        )


def _is_barely_begun(folder: Path) -> bool:
    return folder.is_dir() and all(".tmp-" in path.name for path in folder.iterdir())


class MemoryStore(Store):
    """A store in memory: it ends with the process.

    Workers read it: forked ones share its memory, spawned ones once it was moved to shared memory, which
    pickling through `torch.multiprocessing` does. What a worker appends stays in that worker.

    Args:
        url: What it is called in messages.
        segment_bytes: How many bytes of rows are gathered before they are published as one segment.
        publish_seconds: How long an appended row waits at most, if others are appended after it.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self.url = url or f"{_MEMORY}unnamed-{secrets.token_hex(4)}"
        self._shelves: dict[str, MemoryShelf] = {}
        self._segment_bytes = segment_bytes
        self._publish_seconds = publish_seconds

    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> ShelfRows:
        name = check_fingerprint(fingerprint)
        shelf = self._shelves.setdefault(name, MemoryShelf(f"{self.url}/{name}"))
        return ShelfRows(shelf, leaves, about, segment_bytes=self._segment_bytes, publish_seconds=self._publish_seconds)

    def existing(self, fingerprint: str) -> ShelfRows:
        name = check_fingerprint(fingerprint)
        return _existing(self._shelves.get(name) or MemoryShelf(f"{self.url}/{name}"))

    def fingerprints(self) -> list[str]:
        return sorted(name for name, shelf in self._shelves.items() if ABOUT in shelf.files)

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r})"


_NAMED: dict[str, MemoryStore] = {}


def open_store(where: str | os.PathLike[str] | Store) -> Store:
    """The store at some place.

    Args:
        where: A folder, which need not be there yet; ``memory://name``, the same for everybody in this
        process;
            ``memory://``, a new one each time; or a `Store`, which is given back.

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
        return where
    text = os.fspath(where)
    if text == _MEMORY:
        return MemoryStore()
    if text.startswith(_MEMORY):
        return _NAMED.setdefault(text, MemoryStore(text))
    if "://" in text:
        raise StoreError(f"cannot open {text!r}: a store is a folder, or 'memory://name'")
    return FolderStore(text)
