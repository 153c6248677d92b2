"""What a sweep knows to be finished: records in its journal, under keys of all that they depend on.

The facts of a sweep (format, task, precision, workers, machine, versions) are in each key, and with them what a record
is of: ``kind="trial", level="50", cut="layer2", seed=0, recipe=...``. A new option enters a key only where it is not at
its default, so that what was finished before it came is still known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torchrecycle.sweep.journal import Journal, trial_from_json
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Trial

__all__ = ["FORMAT", "MissingRecordError", "Place", "Purpose", "Records"]

FORMAT = 1
"""Of the records: part of each key, so that those of another version are not looked at."""

Purpose = Literal["search", "final"]


class MissingRecordError(Exception):
    """The journal does not have what a level needs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a level is cut."""

    cut: str | None
    share: float
    trained_parameters: int
    bytes_kept: int
    fingerprint: str | None
    is_kept: bool = True
    """Whether its rows are; else the prefix is computed again."""


def _place_facts(level: str, is_kept: bool) -> dict[str, Any]:
    return {"kind": "place", "level": level, **({} if is_kept else {"kept": False})}


class Records:
    """The journal of one sweep.

    Args:
        folder: of the journal.
        facts: what all of its records depend on.
        queries: objects of which is kept what they find.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], queries: Sequence[int]) -> None:
        self.journal, self.facts, self.queries = Journal(folder), dict(facts), list(queries)

    def key(self, **facts: Any) -> str:
        return Journal.key({**self.facts, **facts})

    def known(self, **facts: Any) -> dict[str, Any]:
        """
        Raises:
            MissingRecordError: there is no such record.
        """
        record = self.journal.read(self.key(**facts), facts["kind"])
        if record is None:
            raise MissingRecordError
        return record

    def write(self, record: Mapping[str, Any], **facts: Any) -> None:
        self.journal.write(self.key(**facts), {"kind": facts["kind"], **record})

    # -- what there are records of -------------------------------------------------------------------------------------

    def place(self, level: str, *, is_kept: bool = True) -> Place:
        """
        Args:
            level: which.
            is_kept: whether its rows are to be; bytes and times are those of such a place.

        Raises:
            MissingRecordError: there is no such record.
        """
        place = Place(**self.known(**_place_facts(level, is_kept))["place"])
        if place.is_kept != is_kept:  # of a journal in which both had one key
            raise MissingRecordError
        return place

    def keep_place(self, level: str, place: Place) -> None:
        self.write({"place": asdict(place)}, **_place_facts(level, place.is_kept))

    def untrained(self) -> dict[str, Any]:
        """An `Evaluation`, as a dict."""
        return self.known(kind="untrained", queries=self.queries)

    def keep_untrained(self, evaluation: Mapping[str, Any]) -> None:
        self.write(evaluation, kind="untrained", queries=self.queries)

    def frozen_seconds(self, level: str, recipe: Recipe) -> float:
        return self.known(kind="frozen", level=level, recipe=asdict(recipe))["seconds"]

    def keep_frozen_seconds(self, level: str, recipe: Recipe, seconds: float) -> None:
        self.write({"seconds": seconds}, kind="frozen", level=level, recipe=asdict(recipe))

    def trial(self, key: str) -> Trial:
        """
        Raises:
            MissingRecordError: there is no such record.
        """
        record = self.journal.read(key, "trial")
        if record is None:
            raise MissingRecordError
        return trial_from_json(record["trial"])

    def keep_trial(self, key: str, trial: Trial) -> None:
        self.journal.write(key, {"kind": "trial", "trial": asdict(trial)})

    def keep_diverged(self, key: str, words: str) -> None:
        """That the training of this key has, and at what: it would again."""
        self.write({"words": words}, kind="diverged", trial=key)

    def diverged(self, key: str) -> str | None:
        """In words; None if that is not known of it."""
        try:
            return self.known(kind="diverged", trial=key)["words"]
        except MissingRecordError:
            return None

    def trial_key(
        self, level: str, place: Place, recipe: Recipe, seed: int, purpose: Purpose, *, tried: list[float] | None = None
    ) -> str:
        """
        Args:
            level: of the training.
            place: where it is cut.
            recipe: of the training.
            seed: of the training.
            purpose: what it is for.
            tried: of a search, the rates that were tried before, by which it may have been stopped.
        """
        facts: dict[str, Any] = {"level": level, "cut": place.cut, "purpose": purpose, "seed": seed}
        if tried is not None:
            facts["tried"] = tried
        if not place.is_kept:
            facts["kept"] = False
        return self.key(kind="trial", **facts, recipe=asdict(recipe), queries=self.queries)

    def fills(self) -> Iterator[dict[str, Any]]:
        """What passes of this sweep's facts cost."""
        for record in self.journal.all("fill"):
            if all(record.get(name) == fact for name, fact in self.facts.items()):
                yield record
