"""What a store promises, whatever it is made of: in a folder, in memory, or something that you bring.

ResNet-18 cut at ``layer2`` gives 128 x 28 x 28 numbers for an image: one row of 200 KB in bfloat16. A store
keeps such rows under a 16-byte key and gives 64 of them back as one tensor, at the speed at which memory can
be copied. The rows of one prefix lie under its fingerprint; `Store.rows` opens them.

The promise has two halves, since an epoch has: `Rows.lookup` turns keys into *locations* once, when a loader
is made, and `Rows.gather` turns locations into tensors, for each batch. A location is a plain integer, neighbours
lie next to each other, and a whole epoch's plan is one int64 array that pickles to workers for nothing.

`torchrecycle.testing.StoreContract` is this page as tests: inherit it to test a store of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrecycle.errors import StoreError
from torchrecycle.store.sizes import bytes_in_words, counted

FORMAT_VERSION = 2
"""The version of the file format that this release writes, and the newest that it reads."""

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """The form of one leaf of a row, as it is kept.

    Raises:
        StoreError: For a ragged leaf whose shape has a zero in it: its length would be backed by no bytes.
    """

    shape: tuple[int, ...]
    """The shape of one row, without the ragged dimension."""

    ragged: bool
    """Whether rows differ in length: a row then is ``[length, *shape]``."""

    dtype: torch.dtype
    """The dtype as kept, which may be narrower than the activation's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.ragged and 0 in self.shape:
            raise StoreError(f"a ragged leaf of shape {self.shape} holds no values: leave it out of what is kept")


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths, one after the other and without padding."""

    values: torch.Tensor
    """``[total, *shape]``: all rows, joined along their first dimension."""

    lengths: torch.Tensor
    """``[rows]`` int64: how much of ``values`` belongs to each row."""


Leaf = torch.Tensor | Ragged
"""Rows of one leaf: a tensor ``[rows, *shape]``, or a `Ragged`."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `Rows.verify` found."""

    segments: int
    """How many segments were read."""

    rows: int
    """How many rows of them are sound and still there."""

    nbytes: int
    """How many bytes were read."""

    damaged: tuple[str, ...]
    """The files that were set aside, by the names that they had."""

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged."""
        return not self.damaged

    def __str__(self) -> str:
        found = f"{counted(self.segments, 'segment')}, {counted(self.rows, 'sound row')}, "
        found += f"{bytes_in_words(self.nbytes)} read"
        if self.ok:
            return f"{found}: nothing damaged"
        aside = "\n".join(f"  {name}" for name in self.damaged)
        return f"{found}; damaged and set aside, to be computed again:\n{aside}"


class Rows(ABC):
    """The rows of one fingerprint.

    One thread at a time may append, publish, refresh or verify; any number may gather meanwhile. Any number
    of processes may do all of it at once. A `Rows` pickles to workers, and survives a fork, with the same
    locations; rows that were appended and not yet published stay with the process that appended them.
    """

    url: str
    """Where the rows lie, for messages."""

    leaves: tuple[LeafSpec, ...]
    """The leaves of a row, in order."""

    about: dict[str, Any]
    """What the fingerprint covers, in words, as it was first written."""

    bytes_read: int
    """Bytes of rows that `gather` has given out in this process."""

    bytes_written: int
    """Bytes that were published through this object in this process."""

    verified_bytes: int
    """Bytes of rows whose checksums this object has compared in this process."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of keys that `lookup` finds."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of the published segments' data."""

    @abstractmethod
    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """Where the rows of these keys are.

        Args:
            keys: ``[n, 16]`` uint8.

        Returns:
            ``[n]`` int64 locations, ascending in the order of the files, and -1 where there is no such row. They
            are this object's own and hold while it lives, in its copies in workers too. They mean
            nothing elsewhere.
        """

    @abstractmethod
    def gather(self, locations: np.ndarray | torch.Tensor) -> list[Leaf]:
        """The rows at these locations, in this order; a location may occur more than once.

        The checksum of a row is compared when it is first gathered in this process or in one that it was
        forked from.

        Args:
            locations: ``[n]`` int64, from `lookup`.

        Returns:
            One `Leaf` for each of `leaves`: fresh tensors, which the caller may keep and write into.

        Raises:
            DamagedRowError: A row does not match its checksum. `verify` sets its segment aside.
            GoneRowsError: A row has left the store since it was looked up.
            StoreError: A location that `lookup` has not given, -1 among them.
        """

    def prefetch(self, locations: np.ndarray | torch.Tensor) -> None:
        """Have rows read from the disk, and compared with their sums, that `gather` will soon be asked for.

        To be called in a thread. May do nothing.

        Args:
            locations: ``[n]`` int64, from `lookup`; neighbours are read in one piece.
        """
        return

    @abstractmethod
    def append(self, keys: np.ndarray, leaves: Sequence[Leaf]) -> None:
        """Add rows; those whose key is already there, or comes twice, are skipped.

        What is given is copied. The rows wait in memory, where no `lookup` finds them, until they are
        published: by `publish`, or by itself once they fill a segment or the oldest has waited for half a
        minute. The latter may go on in a thread: then the rows are found from a later `append` or `publish` on.

        Args:
            keys: ``[n, 16]`` uint8.
            leaves: One `Leaf` of n rows for each of `self.leaves`, of that shape and dtype, on any device.

        Raises:
            BatchError: The leaves are not of the form that this store keeps. Nothing was added.
            StoreError: Publishing by itself, now or since the last call, has failed: see `publish`. What was
                given waits with the others.
        """

    @abstractmethod
    def publish(self) -> None:
        """Make the waiting rows visible to everybody, this object included, and safe from a crash.

        Raises:
            StoreError: The disk is full, or writing is not allowed (`errno` says which). Nothing half-written
                is left, and the rows still wait: free some space and publish again, or `discard` them.
        """

    def discard(self) -> int:
        """Drop the rows that wait, after publishing has failed; how many they were.

        A store in which rows never wait longer than `append` takes has nothing to drop.
        """
        return 0

    @abstractmethod
    def refresh(self) -> None:
        """See what other writers have published since. Locations already given keep their meaning."""

    def overwritten(self) -> bool:
        """Whether files of rows were written over since they were opened; these are then known no more.

        Nothing that keeps to the rules does so. It is looked for where an epoch begins.
        """
        return False

    @abstractmethod
    def verify(self) -> VerifyReport:
        """Read every row of every segment, and set aside the segments in which anything is damaged.

        A segment that is set aside is renamed to ``*.damaged`` and no longer read: its keys are misses from
        then on, to be computed again, and locations in it are errors. Damaged manifests and probes are set
        aside likewise.
        """

    @abstractmethod
    def read_manifest(self, identity: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """The tensors and metadata written under this name, or None. They are the caller's own."""

    @abstractmethod
    def write_manifest(self, identity: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Keep tensors and metadata under a name; what was there is replaced in one step.

        Args:
            identity: A name of letters, digits, ``.``, ``_`` and ``-``: a hash of whatever identifies the
            data set.
        """

    @abstractmethod
    def read_probe(self) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """The probe of this fingerprint, or None. The tensors are the caller's own."""

    @abstractmethod
    def write_probe(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep the probe of this fingerprint. If there is one already, that one stays."""


class Store(ABC):
    """Rows under their fingerprints."""

    url: str
    """What `open_store` opens it by."""

    @abstractmethod
    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> Rows:
        """The rows of one fingerprint. Nothing is written before the first row, manifest or probe is.

        Args:
            fingerprint: A name of letters, digits, ``_`` and ``-``.
            leaves: The form of a row.
            about: What the fingerprint covers, in words, for people: JSON values. The first writer's is kept.

        Raises:
            StoreError: The rows kept there are of another form or of a newer format.
        """

    @abstractmethod
    def existing(self, fingerprint: str) -> Rows:
        """The rows of a fingerprint that is there, in the form that they have: for looking at and verifying.

        Raises:
            StoreError: There is none of that name, or it is of a newer format.
        """

    @abstractmethod
    def fingerprints(self) -> list[str]:
        """The fingerprints under which something is kept, sorted."""
