"""Who computes which rows, where several processes fill the same ones at once: claims, which are advice and no locks.

Eight processes start on the same 8,144 photos. Before a process computes a batch it appends the 64 keys to a file of
its own, ``<fingerprint>/claims/<writer>``, and reads what the others have appended to theirs. What a living process has
claimed it leaves to that one, and looks at the end whether it was published.

Two may claim a key in the same moment. So each looks once more after it has claimed: whoever appended last sees the
other. The one whose name comes last takes its claim back, and computes none of it. The other waits for that, a
twentieth of a second at most, and takes its own back if it does not come, since then its rival had not seen it and
computes. Of two claims one is always taken back, so that no row is computed twice while both live.

Nothing rests on it. A row that is computed twice is skipped by the index; a claim that is lost, torn or made up costs
some work or some waiting, and never a row. So nothing is waited for without an end:

* a file lives while it changes, as we see it: each writer touches its own every two seconds, from a thread, since one
  batch may take minutes. Clocks of two machines are never compared. Unchanged for ten seconds of our clock, its writer
  counts as dead, and its keys are for whoever comes first.
* a writer on the same machine, in the same space of process numbers, that has ended is dead at once: a fill that was
  killed and is started again does not wait for itself.
* a writer that lives and publishes none of what it has claimed is passed over: see `Claims.disregard`.

Each writer has its own file since no network file system promises that two can append to one. A file is 64 bytes that
say whose it is, and then records of 17: ``+`` or ``-``, and a key. It is removed at the end of the fill; that of a
killed process by a later fill.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import blake3
import numpy as np

from torchrecycle.store.about import ABOUT
from torchrecycle.store.contract import KEY_BYTES, Rows
from torchrecycle.store.shelf import FolderShelf

__all__ = ["CLAIMS", "Claims", "claims_of"]

CLAIMS = "claims"
"""The folder of a fingerprint in which they lie."""

BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 10.0
ASK_SECONDS = 0.2
"""How often it is asked whether a process still runs."""
YIELD_PAUSES = (0.0, 0.001, 0.003, 0.006, 0.01, 0.03)
"""Seconds between looks whether another takes its claim back."""
OLD_SECONDS = 3600.0

_NAME = re.compile(r"[0-9a-f]{16}")
_MAGIC = b"torchrecycle claims 1\n\0\0"
_HEAD_BYTES = 64
_RECORD_BYTES = 1 + KEY_BYTES
_READ_RECORDS = 2**16
_CLAIMED, _TAKEN_BACK = ord("+"), ord("-")
_NOWHERE = bytes(16)


def claims_of(rows: Rows) -> Claims:
    """The claims on some rows. In a store that is no folder nobody else fills, and all is ours."""
    shelf = getattr(rows, "_shelf", None)
    return Claims(rows, Path(shelf.url) if isinstance(shelf, FolderShelf) else None)


class Claims:
    """What this process, and what others, are about to compute of one fingerprint's rows.

    Nothing is written before the first key is claimed. What cannot be written (a full disk, a folder that is read-only)
    is left out without a word: then others do not know of us.
    """

    def __init__(self, rows: Rows, folder: Path | None) -> None:
        """Args:
        rows: the rows.
        folder: the folder in which they lie; None if nobody else can see them.
        """
        self.writer = secrets.token_hex(8)
        self._rows = rows
        self._parent = folder
        self._others: dict[str, _Other] = {}
        self._passed_over: set[str] = set()
        self._stamp: int | None = None
        self._own: _OwnFile | None = None
        self._silent = False

    def take(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Claim what is missing and not claimed.

        Args:
            keys: ``[n, 16]`` uint8, each once.

        Returns:
            Two ``[n]`` bools: which keys are ours to compute now, and which are another process's. What is neither has
            its row in the store.
        """
        if self._parent is None:
            return self._rows.lookup(keys) < 0, np.zeros(len(keys), dtype=bool)
        # In this order: what was claimed and is published meanwhile must not be found neither here nor there.
        self._look()
        held = self._held(keys)
        missing = self._rows.lookup(keys) < 0
        ours = missing & ~held
        if ours.any() and self._append(_CLAIMED, keys[ours]):
            self._look()
            kept = ours & ~self._contested(keys, ours)
            missing = self._rows.lookup(keys) < 0
            kept &= missing
            self._append(_TAKEN_BACK, keys[ours & ~kept])
            ours = kept
        return ours & missing, ~ours & missing

    def _contested(self, keys: np.ndarray, ours: np.ndarray) -> np.ndarray:
        """Which of our keys others have claimed in the same moment, and do not take back."""
        contested = np.zeros(len(keys), dtype=bool)
        contested[ours] = self._held(keys[ours])
        if not contested.any():
            return contested
        lost = contested.copy()
        lost[contested] = self._held(keys[contested], before=self.writer)
        # At once: whoever comes before us waits for it.
        self._append(_TAKEN_BACK, keys[lost])
        for pause in YIELD_PAUSES:
            if not (contested & ~lost).any():
                break
            time.sleep(pause)
            self._look()
            contested[contested] = self._held(keys[contested])
        return contested | lost

    def disregard(self, keys: np.ndarray) -> None:
        """Pass over whoever has claimed these keys, from now on: they live, but nothing comes of it."""
        wanted = {key.tobytes() for key in keys}
        self._passed_over |= {name for name, other in self._others.items() if not wanted.isdisjoint(other.keys)}

    def close(self) -> None:
        """Take our claims back; remove what dead processes have left."""
        if self._parent is None:
            return
        folder = self._parent / CLAIMS
        for name, other in self._others.items():
            if other.is_left_behind(self._own):
                with contextlib.suppress(OSError):  # a folder that is read-only, somebody else's file
                    (folder / name).unlink(missing_ok=True)
        if self._own is not None:
            self._own.close()
            self._own = None
        with contextlib.suppress(OSError):
            folder.rmdir()  # if we were the last

    # What others have claimed

    def _held(self, keys: np.ndarray, *, before: str | None = None) -> np.ndarray:
        """Which keys a living process has claimed; with `before`, one whose name comes before that."""
        holders = [
            other.keys
            for name, other in self._others.items()
            if other.keys and name not in self._passed_over and (before is None or name < before) and other.alive
        ]
        if not holders:
            return np.zeros(len(keys), dtype=bool)
        found = (any(key in held for held in holders) for key in (row.tobytes() for row in keys))
        return np.fromiter(found, dtype=bool, count=len(keys))

    def _look(self) -> None:
        """Read what was claimed since; where rows may have been published, let them be found."""
        names = self._names()
        ended = [name for name in self._others if name not in names]
        for name in ended:
            del self._others[name]
        stamp = _changed_at(self._parent)
        if ended or stamp != self._stamp:
            self._stamp = stamp
            self._rows.refresh()
            for other in self._others.values():
                other.keys = self._missing_of(other.keys)
        for name in names:
            self._read(name)

    def _names(self) -> set[str]:
        assert self._parent is not None
        folder = self._parent / CLAIMS
        own = None if self._own is None else self._own.path.name
        try:
            # A link could lead out of the store.
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                return set()
            return {name for name in os.listdir(folder) if _NAME.fullmatch(name) and name != own}
        except OSError:
            return set()

    def _read(self, name: str) -> None:
        assert self._parent is not None
        other = self._others.get(name)
        if other is None:
            other = self._others[name] = _Other()
        # Opened each time: a network file system asks its server then, and not at a mere look at the times.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with contextlib.suppress(OSError):
            descriptor = os.open(self._parent / CLAIMS / name, flags)
            try:
                for records in other.read(descriptor):
                    claimed = {key for kind, key in records if kind == _CLAIMED}
                    other.apply(records, self._missing_of(claimed))
            finally:
                os.close(descriptor)

    def _missing_of(self, keys: set[bytes]) -> set[bytes]:
        """Those that have no row yet: a claim on others is done with, and would only take memory."""
        if not keys:
            return keys
        listed = list(keys)
        found = self._rows.lookup(np.frombuffer(b"".join(listed), dtype=np.uint8).reshape(-1, KEY_BYTES)) >= 0
        return {key for key, there in zip(listed, found.tolist(), strict=True) if not there}

    # Our own

    def _append(self, kind: int, keys: np.ndarray) -> bool:
        """Write something down; whether others can read it."""
        assert self._parent is not None
        # A folder with claims and without about.json would be taken for something else than a part of a store.
        if self._silent or not len(keys) or not (self._parent / ABOUT).is_file():
            return False
        try:
            if self._own is None:
                self._own = self._opened()
            self._own.append(kind, keys)
        except OSError:
            self._silent = True
        return not self._silent

    def _opened(self) -> _OwnFile:
        assert self._parent is not None
        folder = self._parent / CLAIMS
        for _ in range(3):
            # The last of the others to end removes the folder, maybe just now.
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            with contextlib.suppress(FileNotFoundError):
                return _OwnFile(folder / self.writer)
        raise FileNotFoundError(str(folder))


def _changed_at(folder: Path | None) -> int | None:
    """When a name was last added to a folder or taken out of it, as its file system tells."""
    try:
        return None if folder is None else os.stat(folder).st_mtime_ns
    except OSError:
        return None


# -- files -------------------------------------------------------------------------------------------------------------


class _Other:
    """What we have seen of the file of another writer."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        """What it has claimed, and had no row when we looked."""
        self._offset = _HEAD_BYTES
        self._head = b""
        self._seen: tuple[int, int] | None = None
        self._changed = time.monotonic()
        self._ended = False
        self._asked = 0.0

    @property
    def alive(self) -> bool:
        now = time.monotonic()
        if not self._ended and now - self._asked > ASK_SECONDS:
            self._asked, self._ended = now, self._has_ended()
        return not self._ended and now - self._changed < PATIENCE_SECONDS

    def read(self, descriptor: int) -> Iterator[list[tuple[int, bytes]]]:
        """What was written down since, some at a time: kind and key."""
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return
        now = found.st_mtime_ns, found.st_size
        if now != self._seen:
            self._seen, self._changed = now, time.monotonic()
        if len(self._head) < _HEAD_BYTES:
            self._head = os.read(descriptor, _HEAD_BYTES)
        if not self._head.startswith(_MAGIC):
            return
        while found.st_size - self._offset >= _RECORD_BYTES:
            os.lseek(descriptor, self._offset, os.SEEK_SET)
            whole = min(_READ_RECORDS, (found.st_size - self._offset) // _RECORD_BYTES) * _RECORD_BYTES
            data = os.read(descriptor, whole)
            whole = len(data) // _RECORD_BYTES * _RECORD_BYTES
            if not whole:
                return
            self._offset += whole
            yield [(data[at], data[at + 1 : at + _RECORD_BYTES]) for at in range(0, whole, _RECORD_BYTES)]

    def apply(self, records: list[tuple[int, bytes]], missing: set[bytes]) -> None:
        """Remember, of the keys that have no row, those that are claimed and not taken back."""
        for kind, key in records:
            if kind == _TAKEN_BACK:
                self.keys.discard(key)
            elif key in missing:
                self.keys.add(key)

    def _has_ended(self) -> bool:
        """Whether its process is known to be no more."""
        if len(self._head) < _HEAD_BYTES or not self._head.startswith(_MAGIC):
            return False
        host, pid, started = _whose(self._head)
        return host != _NOWHERE and host == _host() and _started(pid) != started

    def is_left_behind(self, own: _OwnFile | None) -> bool:
        """Whether the file can be removed: its writer has ended, or does not touch it any more."""
        if self._seen is None:
            return False
        if not self.alive:
            return True
        # Both times are of the file system of the store. This is for files that we saw too briefly to tell.
        return own is not None and own.touched_at() - self._seen[0] > OLD_SECONDS * 1e9


class _OwnFile:
    """Our claims, touched from a thread until they are closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head = _MAGIC + _host() + os.getpid().to_bytes(8, "little") + (_started(os.getpid()) or 0).to_bytes(8, "little")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, flags, 0o666)
        self._done = threading.Event()
        try:
            self._write(head.ljust(_HEAD_BYTES, b"\0"))
        except OSError:
            self.close()
            raise
        threading.Thread(target=self._beat, name="torchrecycle claims", daemon=True).start()

    def append(self, kind: int, keys: np.ndarray) -> None:
        self._write(np.insert(keys, 0, kind, axis=1).tobytes())

    def _write(self, data: bytes) -> None:
        if os.write(self._descriptor, data) != len(data):
            raise OSError("a part was written only: the disk is full")

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                return  # somebody took us for dead

    def touched_at(self) -> int:
        """Nanoseconds, by the clock of the file system."""
        with contextlib.suppress(OSError):
            os.utime(self.path)
            return os.stat(self.path).st_mtime_ns
        return 0

    def close(self) -> None:
        self._done.set()
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


# -- processes ---------------------------------------------------------------------------------------------------------


def _whose(head: bytes) -> tuple[bytes, int, int]:
    """Machine, process and its start."""
    at = len(_MAGIC)
    return (
        head[at : at + 16],
        int.from_bytes(head[at + 16 : at + 24], "little"),
        int.from_bytes(head[at + 24 : at + 32], "little"),
    )


def _host() -> bytes:
    """This boot of this machine and its space of process numbers, 16 bytes; zeros where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return blake3.blake3(boot + os.readlink("/proc/self/ns/pid").encode()).digest(length=16)
    except OSError:
        return _NOWHERE


def _started(pid: int) -> int | None:
    """When a process of this machine was started, in ticks since boot; None if there is none that runs."""
    try:
        # The second field is the program's name, in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
