"""Erasing what is kept of an object, everywhere in a store.

Somebody asks that their photo be deleted. An activation can be turned back into something like the photo (see
``docs/privacy.md``), so its rows must go too: at every cut, in every segment, with the manifests that hold its label.
Segments are immutable, so each that holds such a row is written anew without it, as `compact` does, and the old file is
unlinked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchrecycle.errors import DamagedRowError, KeyTypeError, StoreError
from torchrecycle.store.about import read_form
from torchrecycle.store.container import unpack
from torchrecycle.store.contract import KEY_BYTES, LeafSpec
from torchrecycle.store.holdings import leftovers_of
from torchrecycle.store.index_file import INDEX
from torchrecycle.store.mapping import release
from torchrecycle.store.merging import open_sources, rewrite
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.shelf import MANIFESTS, Shelf
from torchrecycle.store.sizes import counted

__all__ = ["ForgetReport", "as_keys", "forget_on"]

ROUNDS = 5
"""How often is looked again, since others may merge segments meanwhile."""

BUSY_SECONDS = 60.0
"""A half-written file that was written to within this time has a writer."""


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What `forget` has done."""

    rows: int
    """Rows that were erased: one for each cut that kept the object."""
    segments: tuple[str, ...]
    """Segments that held them, as ``fingerprint/name``; written anew without them."""
    manifests: tuple[str, ...]
    """Manifests that were removed, since they name the object and hold its targets, or cannot be read."""
    others: tuple[str, ...]
    """Further files that were removed, since they might hold its rows or its key: set aside, half-written, claims, the
    index."""
    problems: tuple[str, ...]
    """Where something of it may be left, and what to do."""

    @property
    def ok(self) -> bool:
        """Whether nothing is left."""
        return not self.problems

    def __str__(self) -> str:
        if not self.rows and not self.manifests:
            words = "no row and no manifest of it is here" if self.ok else "no row and no manifest of it was erased"
        else:
            words = f"{counted(self.rows, 'row')} erased, {counted(len(self.segments), 'segment')} written anew"
            words += f"; {counted(len(self.manifests), 'manifest')} removed" if self.manifests else ""
        words += f"; {counted(len(self.others), 'file')} removed that might have held it" if self.others else ""
        return "\n".join([words, *(f"  NOT DONE: {problem}" for problem in self.problems)])


@dataclass(slots=True)
class Forgotten:
    """What was done so far."""

    rows: int = 0
    segments: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def report(self) -> ForgetReport:
        return ForgetReport(
            self.rows,
            segments=tuple(self.segments),
            manifests=tuple(self.manifests),
            others=tuple(self.others),
            problems=tuple(self.problems),
        )


def as_keys(key: str | bytes | np.ndarray) -> np.ndarray:
    """``[n, 16]`` uint8 of whatever says a key.

    Raises:
        KeyTypeError: It is none.

    >>> as_keys("00" * 15 + "ff").tolist() == as_keys(bytes(15) + b"\\xff").tolist()
    True
    """
    with contextlib.suppress(ValueError):
        data = bytes.fromhex(key) if isinstance(key, str) else key
        found = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else np.asarray(data)
        if found.dtype == np.uint8 and found.size and found.shape[-1] == KEY_BYTES and found.ndim <= 2:
            return np.ascontiguousarray(found.reshape(-1, KEY_BYTES))
    raise KeyTypeError(
        f"{key!r} is no key: give 32 hexadecimal digits, {KEY_BYTES} bytes, or an array [{KEY_BYTES}] or "
        f"[n, {KEY_BYTES}] of uint8"
    )


def forget_on(fingerprint: str, shelf: Shelf, keys: np.ndarray, done: Forgotten) -> None:
    """Erase the rows of some keys from one shelf."""
    others = [name for name in shelf.stats() if name == INDEX]
    for left in leftovers_of(shelf.stats()):
        if left.kind == "half-written" and left.seconds < BUSY_SECONDS:
            done.problems.append(
                f"{shelf.url}/{left.name} is being written: end the programs that fill this store, and run this again"
            )
        else:
            others.append(left.name)
    shelf.remove(others)
    done.others += [f"{fingerprint}/{name}" for name in others]
    named = list(_manifests_naming(shelf, keys))
    shelf.remove(named)
    done.manifests += [f"{fingerprint}/{name}" for name in named]
    try:
        form = read_form(shelf)
        if form is None:
            raise StoreError(f"{shelf.url} has no about.json, so that its segments cannot be read: remove it")
        _forget_rows(fingerprint, shelf, form[1], keys, done)
    except StoreError as error:
        if any(map(is_segment, shelf.stats())):
            done.problems.append(str(error))


def _manifests_naming(shelf: Shelf, keys: np.ndarray) -> Iterator[str]:
    """The manifests that hold one of these keys, or of which that cannot be known."""
    for name in shelf.names():
        if name.startswith(f"{MANIFESTS}/") and name.endswith(".safetensors"):
            try:
                data = shelf.read(name)
                tensors = {} if data is None else unpack(data, f"{shelf.url}/{name}", owner=f"{shelf.owner}/{name}")[0]
                found = tensors["keys"].numpy()
                if found.shape[1:] != (KEY_BYTES,) or found.dtype != np.uint8 or _among(found, keys).any():
                    yield name
            except (DamagedRowError, KeyError):
                yield name


def _forget_rows(fingerprint: str, shelf: Shelf, specs: Sequence[LeafSpec], keys: np.ndarray, done: Forgotten) -> None:
    for _ in range(ROUNDS):
        held = False
        for source in open_sources(shelf, specs):
            source.keep[_among(source.segment.keys.numpy(), keys)] = False
            release(source.segment.data)
            if not source.keep.all():
                held = True
                rewrite(shelf, specs, [source])
                done.rows += len(source.keep) - source.kept
                done.segments.append(f"{fingerprint}/{source.name}")
        if not held:
            return
    raise StoreError(f"somebody writes it to {shelf.url} again and again: end the programs that use this store")


def _among(found: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of ``[n, 16]`` keys are among a few others."""
    same = np.zeros(len(found), dtype=np.bool_)
    columns = np.ascontiguousarray(found).view("<u8")
    for first, second in keys.view("<u8"):
        same |= (columns[:, 0] == first) & (columns[:, 1] == second)
    return same
