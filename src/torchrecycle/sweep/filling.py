"""Filling for several levels at once: what passes cost, what is kept, and what would be.

All levels are filled in one pass over each split: the deepest prefix runs once. Under ``max_bytes`` they may not fit
together; who is kept when is then told by `torchrecycle.sweep.turns`, from what the rows of each will take. The limit
is for the rows of this sweep: those of other models in the same store, hours of somebody's filling, are not counted
and never make room (`OwnRows`).
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from torchrecycle.errors import RecycleWarning, StoreError
from torchrecycle.fill import FillReport
from torchrecycle.recycling import Recycling, fill_many
from torchrecycle.store import LeafSpec, Rows, ShelfStore, Store, leaf_bytes, open_store
from torchrecycle.store.room import Room
from torchrecycle.store.rows import ShelfRows
from torchrecycle.store.shelf import Shelf
from torchrecycle.store.sizes import parse_bytes
from torchrecycle.sweep.records import Records
from torchrecycle.sweep.runner import Runner
from torchrecycle.sweep.task import Split, Task

__all__ = ["Filling", "OwnRows", "open_limited"]

SIZED = 512
"""Rows of which the size is looked at."""
ROW_BYTES = 24
"""What a row takes beside its leaves: a key and a checksum."""
FILES, FILE_BYTES = 1.02, 50_000
"""What files take beside their rows: manifests, headers, a probe."""


def open_limited(where: str | Path, max_bytes: int | str | None) -> Store:
    """The store of a sweep; with a limit, one that counts and evicts the rows of this sweep alone.

    Args:
        where: a folder, or ``memory://name``.
        max_bytes: of the rows of this sweep; None for no limit.

    Raises:
        StoreError: there is no store at that place, or an open one has another limit of its own.
    """
    store = open_store(where)
    if getattr(store, "max_bytes", None) is not None:
        return open_store(store, max_bytes)
    return OwnRows(store, None if max_bytes is None else parse_bytes(max_bytes))


class OwnRows(Store):
    """A store in which so many bytes may be taken by what is attached here, whatever else it holds.

    Args:
        store: without a limit of its own.
        max_bytes: of all files of the fingerprints that are its own; None for no limit.
    """

    def __init__(self, store: ShelfStore, max_bytes: int | None) -> None:
        self.url, self.max_bytes = store.url, max_bytes
        self.own: set[str] = set()
        """Fingerprints that are counted, and may make room for one another."""
        self._store = store

    def rows(self, fingerprint: str, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> Rows:
        self.own.add(fingerprint)
        rows = self._store.rows(fingerprint, leaves, about)
        assert isinstance(rows, ShelfRows)
        limit = self.max_bytes  # None takes back what an earlier sweep in the same memory had
        rows._shelf.room = None if limit is None else Room(self.url, self._own_shelves, limit)
        return rows

    def _own_shelves(self) -> dict[str, Shelf]:
        return {name: self._store._shelf(name) for name in self._store.fingerprints() if name in self.own}

    def existing(self, fingerprint: str) -> Rows:
        return self._store.existing(fingerprint)

    def fingerprints(self) -> list[str]:
        return self._store.fingerprints()


class Filling:
    """Fills what levels need, and knows what that cost.

    Args:
        task: whose splits.
        records: where the cost of a pass is kept.
        views: of each object of the training split; None for one.
        tell: told of each pass.
    """

    def __init__(self, task: Task, records: Records, views: int | None, tell: Callable[[str], None]) -> None:
        self.task, self.records, self.views, self.tell = task, records, views or 1, tell

    def fill(self, runners: Mapping[str, Runner]) -> None:
        """One pass over each split, for all of these levels."""
        if not runners:
            return
        names = {"train": "training"}
        for name, split in self.task.splits().items():
            report = self._fill_split(names.get(name, name), split, runners)
            self.tell(f"{names.get(name, name)} split: {report}")
        for runner in runners.values():
            runner.is_filled = True

    def _fill_split(self, name: str, split: Split, runners: Mapping[str, Runner]) -> FillReport:
        """What it cost is kept."""
        reports = _filled(runners, split.dataset, split.name, self.task.eval_arguments())
        together = _together(reports)
        if together.computed:
            cost = {"objects": together.objects, "computed": together.computed, "seconds": together.seconds}
            levels = [level for level, report in zip(runners, reports, strict=True) if report.computed]
            record = {"kind": "fill", "split": name, "levels": levels, "prefix_seconds": together.prefix_seconds}
            self.records.journal.write(f"fill-{time.time_ns()}", {**record, **cost, **self.records.facts})
        return together

    def seconds(self, level: str) -> float | None:
        """What filling the training split takes: reading and hashing of all objects, the prefix of those computed.

        None if most rows of the level were in the store already, so that nothing is known of it.
        """
        passes = self._passes(level)
        if not passes:
            return None
        total = {
            name: sum(one[name] for one in passes) for name in ("objects", "computed", "seconds", "prefix_seconds")
        }
        reading = (total["seconds"] - total["prefix_seconds"]) / total["objects"]
        objects = len(self.task.splits()["train"]) * self.views
        return objects * (reading + total["prefix_seconds"] / total["computed"])

    def together(self, level: str) -> frozenset[str]:
        """The levels that were filled in the same pass, itself among them; empty where nothing is known of it."""
        passes = [frozenset(record["levels"]) for record in self._passes(level)]
        return passes[0] if len(set(passes)) == 1 else frozenset()

    def _passes(self, level: str) -> list[dict[str, Any]]:
        """Those that computed most rows of a level: of a few rows, most is what comes before the first."""
        return [
            record
            for record in self.records.fills()
            if level in record["levels"] and 2 * record["computed"] >= record["objects"]
        ]

    def bytes_kept(self, runner: Runner) -> int:
        """Of the rows of this task's objects, whatever else the store holds; from some of them if they are many."""
        assert runner.recycling is not None
        loaders = [runner.evaluation_loader(split) for split in self.task.splits().values()]
        rows = torch.cat([torch.as_tensor(loader.dataset.locations).flatten() for loader in loaders]).unique()
        return round(len(rows[rows >= 0]) * _row_bytes(runner.recycling, rows))

    def expected_bytes(self, recycling: Recycling) -> int:
        """What the rows of a level will take, from those of a few objects, which are filled for it.

        Args:
            recycling: with a store in memory.
        """
        train, arguments = self.task.splits()["train"].dataset, self.task.eval_arguments()
        some = Subset(train, range(0, len(train), max(1, len(train) // self.task.evaluation_batch)))
        recycling.fill(some, **arguments)
        loader: Any = recycling.loader(some, **arguments)
        row = _row_bytes(recycling, torch.as_tensor(loader.dataset.locations).flatten())
        splits = self.task.splits()
        objects = sum(len(split) * (self.views if name == "train" else 1) for name, split in splits.items())
        return round(FILES * objects * row) + FILE_BYTES


def _row_bytes(recycling: Recycling, rows: torch.Tensor) -> float:
    """Mean bytes of a row, with what it takes beside its leaves; of those for which the store had room."""
    there = rows[rows >= 0]
    if not len(there):
        return 0.0
    some = there[:: max(1, len(there) // SIZED)]
    kept = sum(leaf_bytes(leaf) for leaf in recycling.source.rows.gather(some))
    return kept / len(some) + ROW_BYTES


def _filled(
    runners: Mapping[str, Runner], dataset: Any, name: str | None, arguments: Mapping[str, Any]
) -> list[FillReport]:
    """
    Raises:
        StoreError: the store took no more rows.
    """
    recyclings = [runner.recycling for runner in runners.values() if runner.recycling is not None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RecycleWarning)
        reports = fill_many(recyclings, dataset, name=name, **arguments)
    _refuse_missing_rows(reports, said)
    return reports


def _refuse_missing_rows(reports: Sequence[FillReport], said: Sequence[warnings.WarningMessage]) -> None:
    """A store that took no more rows ends a sweep: with some of them computed anew, its times would mean nothing."""
    words = [str(warning.message) for warning in said if warning.category is RecycleWarning]
    if any(report.missing for report in reports):
        error = StoreError(f"cannot write all rows: {' '.join(words)}")
        known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        error.errno = next((number for number in known if os.strerror(number) in str(error)), errno.ENOSPC)
        raise error
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _together(reports: Sequence[FillReport]) -> FillReport:
    """One pass over a data set as one report: bytes of all levels."""
    computed = max(report.computed for report in reports)
    written = sum(report.bytes_written for report in reports)
    missing = max(report.missing for report in reports)
    found = reports[0].objects - computed - missing
    return replace(reports[0], computed=computed, found=found, missing=missing, bytes_written=written)
