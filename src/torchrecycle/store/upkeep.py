"""Keeping a store in order, the same for folders and for memory: `ShelfStore`, which both kinds are.

    store = open_store("activations/")
    for holding in store.ls():              # what is in it
        print(holding.model, holding.cut, holding.rows, holding.nbytes)
    store.verify()                          # read everything; what is damaged is set aside
    store.compact()                         # few large segments instead of many small ones, while others read
    store.evict("20 GB")                    # the least recently used goes
    store.diff("3f9c", "a07b")              # why was this a miss?
    store.forget(key)                       # erase an object
    store.rm("3f9c")                        # away with one fingerprint

``torchrecycle store`` on the command line is these, one to one. Reading never does any of it by itself: what is
damaged, old or double stays until somebody says so. A fingerprint may be shortened to as many letters as tell it from
the others.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from torchrecycle.errors import StoreError
from torchrecycle.progress import progress
from torchrecycle.store.about import need_form
from torchrecycle.store.contract import Store, VerifyReport
from torchrecycle.store.difference import Difference, Side, difference_of
from torchrecycle.store.forgetting import ForgetReport, Forgotten, as_keys, forget_on
from torchrecycle.store.holdings import Details, Holding, Leftover, holding_of, leftovers_of
from torchrecycle.store.merging import CompactReport, compact_shelf
from torchrecycle.store.numbered import is_segment
from torchrecycle.store.room import EvictReport, evict_shelves
from torchrecycle.store.rows import SEGMENT_BYTES, ShelfRows
from torchrecycle.store.shelf import MANIFESTS, Shelf
from torchrecycle.store.sizes import parse_bytes

__all__ = ["ShelfStore", "Verified"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found under one fingerprint."""

    fingerprint: str
    report: VerifyReport | None
    """What was read and what was set aside; None if it could not be opened."""
    problem: str
    """Why not; empty if it could."""
    leftovers: tuple[Leftover, ...]
    """Files that no reader needs: of killed writers, claims, and what was set aside, now or before."""

    @property
    def ok(self) -> bool:
        """Whether all of it could be read and nothing was damaged."""
        return self.report is not None and self.report.ok

    def __str__(self) -> str:
        return self.problem if self.report is None else str(self.report)


class ShelfStore(Store):
    """A store whose fingerprints lie on shelves, each by itself."""

    segment_bytes: int = SEGMENT_BYTES
    """How many bytes of rows make a full segment."""

    # What a kind of store must say

    @abstractmethod
    def _shelf(self, fingerprint: str, told: Callable[[str], None] | None = None) -> Shelf:
        """The shelf of a fingerprint, there or not, without a limit; `told` hears of each file that is read."""

    @abstractmethod
    def _names(self) -> list[str]:
        """The names under which something lies that may be a fingerprint, sound or not."""

    def _sweep(self, seconds: float | None = None) -> list[str]:
        """Remove what was left, for so long or an hour, by somebody who was killed while removing a fingerprint.

        Returns:
            What could not be removed.
        """
        return []

    # Which one is meant

    def resolve(self, name: str) -> str:
        """The fingerprint that begins with these letters.

        Raises:
            StoreError: None does, or several do.
        """
        return _the_one(name, self.fingerprints(), self.url)

    def _chosen(self, name: str | None) -> list[str]:
        return self.fingerprints() if name is None else [self.resolve(name)]

    # Looking

    def ls(self) -> list[Holding]:
        """What is kept, one entry for each fingerprint. Reads headers only, and writes nothing."""
        return [holding_of(name, self._shelf(name)).holding for name in self.fingerprints()]

    def stat(self, fingerprint: str) -> Details:
        """All that is known of one fingerprint without reading its rows.

        Raises:
            StoreError: There is none of that name.
        """
        name = self.resolve(fingerprint)
        return holding_of(name, self._shelf(name))

    def diff(self, a: str, b: str) -> Difference:
        """In what two fingerprints differ: the answer to "why was this a miss?".

        Raises:
            StoreError: One is not there, or cannot be read.
        """
        return difference_of(self._side(a), self._side(b))

    def _side(self, fingerprint: str) -> Side:
        name = self.resolve(fingerprint)
        return Side(name, *need_form(self._shelf(name)))

    # Keeping in order

    def verify(self, fingerprint: str | None = None) -> list[Verified]:
        """Read every row of one fingerprint or of all; segments in which anything is damaged are set aside.

        Shows how far it is, on stderr.

        Raises:
            StoreError: There is no such fingerprint.
        """
        chosen = self._chosen(fingerprint)
        segments = sum(map(self._count_segments, chosen))
        with progress("verifying", segments, "segments") as shown:

            def told(name: str) -> None:
                if is_segment(name) and shown.done < segments:
                    shown.advance()

            return [self._verified(one, told) for one in chosen]

    def _count_segments(self, fingerprint: str) -> int:
        with contextlib.suppress(StoreError):  # what cannot be listed is said where it is verified
            return sum(map(is_segment, self._shelf(fingerprint).names()))
        return 0

    def _verified(self, fingerprint: str, told: Callable[[str], None]) -> Verified:
        shelf = self._shelf(fingerprint, told)
        report, problem = None, ""
        leftovers: tuple[Leftover, ...] = ()
        try:
            form = need_form(shelf)
            # A link or a file in place of this folder.
            misplaced = [name for name in (MANIFESTS,) if name in shelf.names()]
            for name in misplaced:
                shelf.set_aside(name)
            report = ShelfRows(shelf, form[1], form[0]).verify()
            aside = tuple(f"{shelf.url}/{name}" for name in misplaced)
            report = replace(report, damaged=(*aside, *report.damaged))
        except StoreError as error:
            problem = str(error)
        with contextlib.suppress(StoreError):  # as above
            leftovers = tuple(leftovers_of(self._shelf(fingerprint).stats()))
        return Verified(fingerprint, report, problem, leftovers)

    def compact(
        self, fingerprint: str | None = None, *, told: Callable[[CompactReport], None] | None = None
    ) -> list[CompactReport]:
        """Merge small segments, and drop rows that came twice and what killed writers have left.

        Others may read and write meanwhile: who has an old segment open goes on reading it. Nothing is lost whenever
        this is killed, and several may do it at once. Needs room for one segment more than there is.

        Args:
            fingerprint: Which one; all if None.
            told: Called with each report as soon as there is one.

        Raises:
            DamagedRowError: A row does not match its checksum: `verify` first. The other fingerprints are done.
            StoreError: There is no such fingerprint; or one cannot be read or written. The others are done.
        """
        chosen = self._chosen(fingerprint)
        self._sweep()
        reports: list[CompactReport] = []
        problems: list[StoreError] = []
        for name in chosen:
            try:
                shelf = self._shelf(name)
                reports.append(compact_shelf(name, shelf, need_form(shelf)[1], self.segment_bytes))
            except StoreError as error:
                problems.append(error)
                continue
            if told is not None:
                told(reports[-1])
        if problems:
            raise problems[0]
        return reports

    def evict(self, max_bytes: int | str) -> EvictReport:
        """Remove the least recently used segments until the store takes no more than so many bytes.

        What was set aside as damaged goes first. A fingerprint of which no segment is left is removed entirely. Who
        reads the rows at this moment goes on reading, if the segment is open, and else computes them again.

        Args:
            max_bytes: Of all files together: a number, or ``"20 GB"``.
        """
        limit = parse_bytes(max_bytes)
        self._sweep()
        return evict_shelves({name: self._shelf(name) for name in self.fingerprints()}, limit)

    def forget(self, key: str | bytes | np.ndarray) -> ForgetReport:
        """Erase an object: its rows under every fingerprint, and the manifests that name it.

        See ``docs/privacy.md`` for what this does and what it cannot do. End the programs that use the store first:
        a process that holds the object computes and writes its row again.

        Args:
            key: The object's key, as 32 hexadecimal digits or 16 bytes; or ``[n, 16]`` uint8 for several objects.

        Raises:
            KeyTypeError: That is no key.
        """
        keys, done = as_keys(key), Forgotten()
        # What an `rm` was killed in the midst of holds rows as well, however young it is.
        done.problems += [f"{path} cannot be removed: remove it by hand" for path in self._sweep(seconds=-1.0)]
        for name in self._names():
            try:
                forget_on(name, self._shelf(name), keys, done)
            except StoreError as error:
                done.problems.append(str(error))
        return done.report()

    def rm(self, fingerprint: str) -> int:
        """Remove a fingerprint with everything in it, in one step for whoever looks.

        Also one whose ``about.json`` cannot be read. Of a symbolic link only the link is removed. Who reads its rows
        at this moment goes on, as far as they are open.

        Returns:
            How many bytes its files took.

        Raises:
            StoreError: There is none of that name, or it holds something that this package has not written.
        """
        name = _the_one(fingerprint, self._names(), self.url)
        self._refuse_foreign(name)
        try:
            nbytes = sum(stat.nbytes for stat in self._shelf(name).stats().values())
        except StoreError:  # a link
            nbytes = 0
        self._shelf(name).clear()
        return nbytes

    def _refuse_foreign(self, name: str) -> None:
        """Raise if it is no fingerprint's folder."""
        return


def _the_one(name: str, names: list[str], url: str) -> str:
    if name in names:
        return name
    found = [one for one in names if name and one.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
        raise StoreError(f"{len(found)} fingerprints of {url} begin with {name!r}: {some}. Give more letters")
    some = ", ".join(one[:12] for one in names[:5]) + ", ..." * (len(names) > 5)
    raise StoreError(f"no fingerprint of {url} is, or begins with, {name!r}: it holds {some or 'none'}")
