"""What a sweep has finished, kept trial by trial, so that a killed one goes on where it was.

A folder with one JSON file for each training that ended. Its name is a hash of all that the training depends on (data,
weights, splits, cut, rates, seed, machine, versions), so that a record of another sweep in the same folder is never
taken for one of this: it is not looked at. Files are written under another name and renamed, so that none is ever half
there.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from torchrecycle.errors import RecycleError
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint, Found, Trial

__all__ = ["Journal", "JournalError", "found_from_json", "trial_from_json"]


class JournalError(RecycleError, OSError):
    """A record of a finished training cannot be read or written."""


class Journal:
    """A folder of records. Making one writes nothing.

    Args:
        folder: where; made with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(facts: Mapping[str, Any]) -> str:
        """128 bits of all that a record depends on, as hexadecimal digits."""
        return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest(length=16)

    def read(self, key: str, kind: str) -> dict[str, Any] | None:
        """A record of a kind, such as ``trial``, or None if there is none.

        Raises:
            JournalError: the file cannot be read, or holds something else.
        """
        path = self.folder / f"{key}.json"
        record = self._read(path)
        if record is not None and record.get("kind") != kind:
            raise JournalError(f"{path} holds no record of a {kind}: delete it, and it is made anew")
        return record

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise JournalError(f"the record {path} cannot be read ({error}): delete it, and it is made anew") from error
        if not isinstance(record, dict):
            raise JournalError(f"the record {path} holds no record: delete it, and it is made anew")
        return record

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record; afterwards it survives a crash.

        Raises:
            JournalError: it cannot be written, such as on a full disk.
        """
        text = json.dumps(record)
        temporary = self.folder / f".{key}-{secrets.token_hex(4)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{key}.json")
        except OSError as error:
            worded = JournalError(f"cannot write to {self.folder}: {error.strerror}")
            worded.errno = error.errno  # by which it is told what to do about it
            raise worded from error
        finally:
            with suppress(OSError):  # where nothing can be written, nothing is there to be removed
                temporary.unlink(missing_ok=True)

    def all(self, kind: str) -> Iterator[dict[str, Any]]:
        """Every record of a kind, such as ``fill``."""
        for path in sorted(self.folder.glob("*.json")):
            record = self._read(path)
            if record is not None and record.get("kind") == kind:
                yield record

    def count(self, kind: str) -> int:
        """How many records of a kind there are."""
        return sum(1 for _ in self.all(kind))


def trial_from_json(record: Mapping[str, Any]) -> Trial:
    """The inverse of `dataclasses.asdict`."""
    return Trial(
        level=record["level"],
        purpose=record["purpose"],
        seed=record["seed"],
        recipe=Recipe(**record["recipe"]),
        curve=tuple(EpochPoint(**point) for point in record["curve"]),
        quality=record["quality"],
        scores={name: tuple(each) for name, each in record["scores"].items()},
        found=found_from_json(record["found"]),
        untold_seconds=record.get("untold_seconds", 0.0),
        untold_epochs=record.get("untold_epochs", 0),
    )


def found_from_json(records: Any) -> tuple[Found, ...]:
    """The inverse of `dataclasses.asdict`, for a list of them."""
    return tuple(Found(each["query"], tuple(each["nearest"]), tuple(each["right"]), each["note"]) for each in records)
