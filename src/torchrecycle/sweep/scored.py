"""What a sweep was tested on, and what each of those objects contributed: ``scores.json`` beside ``results.json``.

Two sweeps of yesterday and today found R-precision 0.917 ± 0.006 and 0.925 ± 0.006 at 50 %. Is that chance? As two
separate tests it may well be: 0.008 ± 0.009. But both asked the same 894 photos, and what is hard for one is hard for
the other: photo by photo it is 0.008 ± 0.003, and it is not.

For that three things are kept which the results do not hold: a hash of the test objects, which belong together (the
photos of one car are hard or easy together), and what each contributed at each level under each seed. Beside that the
precision in which rows were kept. The file is of one sweep, told by the moment when it ended.

Objects are known by what they are before a model's own preprocessing: a picture's bytes or a text, and its class. So
two models that see 144 and 160 pixels of the same photos were tested on the same objects. Of data sets of a user's own
only the items are known as the model gets them: if they are the same, so are the objects; if not, nothing is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from torchrecycle.errors import KeyTypeError, RecycleError
from torchrecycle.keys import key
from torchrecycle.sweep.datasets import PictureObjects
from torchrecycle.sweep.estimates import difference
from torchrecycle.sweep.identity import seed_everything
from torchrecycle.sweep.journal import Journal
from torchrecycle.sweep.kept import ROWS, finite, write_whole
from torchrecycle.sweep.results import Estimate, SweepResult
from torchrecycle.sweep.task import Task
from torchrecycle.trace import random_state, set_random_state

__all__ = ["OWN", "SCORES", "Scored", "ScoresError", "keep_scored", "read_scored", "scored_of"]

SCORES = "scores.json"
FORMAT = 1
OWN = "the model's own"
"""In words, the precision of rows that are kept as the model computes them."""
Scores = Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
"""By level and metric, for each seed, what each object contributed, NaN where it was not asked."""


class ScoresError(RecycleError, ValueError):
    """A file of scores is damaged."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What the figures of a sweep come from, as far as it is known."""

    objects: str = ""
    """A hash of the test objects, whatever their order; empty if it is not known."""
    order: str = ""
    """A hash of the same in their order."""
    is_of_objects: bool = False
    """Whether they are known as they are before preprocessing; else by what the model gets."""
    precision: str = ""
    """Of kept rows, in words; empty if it is not known."""
    clusters: tuple[int, ...] | None = None
    """For each score, which ones are easy or hard together; None: each by itself."""
    scores: Scores = field(default_factory=dict, repr=False)

    def difference(self, other: Scored, level: str, metric: str) -> Estimate | None:
        """How much higher this one is at a level than the other one, object by object.

        None where that cannot be told: other objects or another order, or scores that are not known of each.
        """
        if not self.order or (self.order, self.is_of_objects) != (other.order, other.is_of_objects):
            return None
        mine, theirs = (each.scores.get(level, {}).get(metric, ()) for each in (self, other))
        counts = {len(seed) for seed in (*mine, *theirs)}
        if not mine or not theirs or len(counts) != 1 or self.clusters != other.clusters:
            return None
        (count,) = counts
        clusters = range(count) if self.clusters is None else self.clusters
        if count < 2 or len(clusters) != count or _asked(mine) != _asked(theirs):
            return None
        return difference(mine, theirs, clusters)


def _asked(scores: tuple[tuple[float, ...], ...]) -> set[tuple[bool, ...]]:
    """Which objects have a score."""
    return {tuple(math.isnan(score) for score in seed) for seed in scores}


# -- of a sweep that has ended -----------------------------------------------------------------------------------------


def scored_of(task: Task, result: SweepResult, *, precision: str | None = None) -> Scored:
    """What is known of it while the task is at hand. Objects of a user's own data set are read once.

    Args:
        task: that was swept.
        result: what came out.
        precision: of kept rows, as it was given to the sweep.
    """
    each, is_of_objects = _objects(task)
    scores = {
        one.level: {name: tuple(trial.scores[name] for trial in one.trials) for name in one.trials[0].scores}
        for one in result.levels
    }
    clusters = task.clusters()
    return Scored(
        objects=_digest(sorted(each)) if each else "",
        order=_digest(each) if each else "",
        is_of_objects=is_of_objects,
        precision=OWN if precision is None else precision,
        clusters=None if clusters is None else tuple(int(number) for number in clusters),
        scores=scores,
    )


def _digest(each: list[bytes]) -> str:
    return blake3(b"".join(each)).hexdigest(length=16)


def _objects(task: Task) -> tuple[list[bytes], bool]:
    """A key of each test object, none if one cannot be told; and whether it is of the object, not of the model's
    input."""
    split = task.splits()["test"]
    if isinstance(split.dataset, PictureObjects):
        return [key(("picture", each.digest or each.name, each.label)) for each in _pictures(split.dataset)], True
    if split.sample is not None and task.kind in ("texts", "pairs"):
        samples = (split.sample(index) for index in range(len(split)))
        return [key(("text", each.title, each.text)) for each in samples], True
    state = random_state()
    try:
        seed_everything(0)
        return [key(split.dataset[index]) for index in range(len(split))], False
    except KeyTypeError:
        return [], False
    finally:
        set_random_state(state)


def _pictures(dataset: PictureObjects) -> Iterator[Any]:
    """With bytes and class: `torchrecycle.files.Picture`, or another that can be opened."""
    for number, (picture, label) in enumerate(zip(dataset.pictures, dataset.labels, strict=True)):
        yield _Shown(
            getattr(picture, "digest", b""), getattr(picture, "name", str(number)), getattr(picture, "label", label)
        )


@dataclass(frozen=True, slots=True)
class _Shown:
    """What tells a picture from another."""

    digest: bytes
    name: str
    label: Any


# -- the file ----------------------------------------------------------------------------------------------------------


def keep_scored(folder: Path, result: SweepResult, scored: Scored) -> None:
    """Write ``scores.json``.

    Raises:
        JournalError: it cannot be written.
    """
    record = {
        "format": FORMAT,
        "ended": result.ran.date,
        "objects": scored.objects,
        "order": scored.order,
        "is_of_objects": scored.is_of_objects,
        "precision": scored.precision,
        "clusters": scored.clusters,
        "scores": scored.scores,
    }
    write_whole(folder / SCORES, json.dumps(finite(record)))


def read_scored(folder: Path, result: SweepResult) -> Scored:
    """What is known of a sweep whose results lie in a folder; of one of an older version, next to nothing.

    Raises:
        ScoresError: the file is damaged.
    """
    path = folder / SCORES
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["ended"] == result.ran.date:
            return _scored(record)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScoresError(
            f"{path} is damaged: move it away, and the sweeps are compared without it, or run the sweep's command once "
            "more"
        ) from error
    return Scored(precision=_precision_in_journal(folder, result))


def _scored(record: Mapping[str, Any]) -> Scored:
    scores = {
        level: {
            metric: tuple(tuple(math.nan if score is None else float(score) for score in seed) for seed in seeds)
            for metric, seeds in metrics.items()
        }
        for level, metrics in record["scores"].items()
    }
    clusters = record["clusters"]
    return Scored(
        objects=str(record["objects"]),
        order=str(record["order"]),
        is_of_objects=bool(record["is_of_objects"]),
        precision=str(record["precision"]),
        clusters=None if clusters is None else tuple(int(number) for number in clusters),
        scores=scores,
    )


_OF_A_FILL = ("kind", "split", "levels", "prefix_seconds", "objects", "computed", "seconds")


def _precision_in_journal(folder: Path, result: SweepResult) -> str:
    """From what the passes of this very sweep were kept with; empty if it cannot be told."""
    try:
        lines = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines() if line]
        rows = [finite(one.to_json()) for one in result.levels]
        sweeps = {line["sweep"] for line in lines if _is_one_of(line["row"], rows)}
        for fill in Journal(folder / "journal").all("fill"):
            facts = {name: value for name, value in fill.items() if name not in _OF_A_FILL}
            if Journal.key(facts) in sweeps:
                return str(facts["precision"] or OWN)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # it is no more than a second chance
        pass
    return ""


def _is_one_of(row: Mapping[str, Any], rows: list[Any]) -> bool:
    """By its trainings: what else is told of a level has grown from version to version."""
    return any(_trainings(row) == _trainings(each) for each in rows)


def _trainings(row: Mapping[str, Any]) -> Any:
    return row["level"], [[trial[name] for name in ("seed", "recipe", "curve", "quality")] for trial in row["trials"]]
