"""Two sweeps side by side: what differs between them, and at which level one is above the other.

A sweep of yesterday found R-precision 0.917 ± 0.006 at 50 %, one of today, with another loss, 0.936 ± 0.006:

    comparison = compare(read_result(Path("sweep-cars")), read_result(Path("sweep-cars-arcface")))
    comparison.pairs[1].difference("R-precision")  # Estimate(mean=0.019, error=0.0085): B is higher
    print(comparison.sentence)

A difference means something only if both were tested on the same objects. ``scores.json`` has a hash of them
(`torchrecycle.sweep.scored`). Where one of the two has no such file, since an older version wrote it, there is what the
pretrained model scores on them: the same model, with the same weights and settings, scores the same to the last bit if
the objects are the same, and otherwise if one of them is not. Where models or settings differ, the words for the data
and the sizes of the splits are all there is to go by. If the objects are others, no difference is told at all.

The error of a difference is told object by object where both have their scores: what is hard for one is hard for the
other, so it is smaller than that of two separate tests, ``sqrt(a^2 + b^2)``, which is told else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchrecycle.report.ran import recipe_in_words
from torchrecycle.report.words import count, duration, estimate, figure, megabytes, signed
from torchrecycle.sweep.kept import finite
from torchrecycle.sweep.results import Estimate, LevelResult, SweepResult, in_words
from torchrecycle.sweep.scored import OWN, Scored

__all__ = ["Comparison", "Difference", "Pair", "compare"]

SURE = 2.0
"""A difference of so many standard errors is held to be more than chance."""
NEAR = 0.1
"""Standard errors by which the same figure may differ on another machine, or with another version of a library."""
NOT_KNOWN = "not known"
"""Of what an older version has not written."""
OF_TRAINING = ("part of the training split", "rate", "rates", "head", "views", "most bytes kept")
"""Settings that change nothing of what the pretrained model scores."""

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not the same in both."""

    what: str
    a: str
    """Empty if A has nothing of the kind."""
    b: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One level, as each has it."""

    level: str
    a: LevelResult | None
    """None if A did not run it."""
    b: LevelResult | None

    @property
    def words(self) -> str:
        return in_words(self.level)

    def difference(self, metric: str) -> Estimate | None:
        """B less A; None if one of them has none. Its error is 0 where one of theirs is not known."""
        if self.a is None or self.b is None:
            return None
        return _less(self.b.quality.get(metric), self.a.quality.get(metric))


def _less(one: Estimate | None, other: Estimate | None) -> Estimate | None:
    if one is None or other is None:
        return None
    known = one.error > 0 and other.error > 0
    return Estimate(one.mean - other.mean, math.hypot(one.error, other.error) if known else 0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that is told of two sweeps."""

    a: SweepResult
    b: SweepResult
    metrics: tuple[str, ...]
    """Those that both have, the one that A goes by first."""
    is_same_test: bool | None
    """Whether both were tested on the same objects; None if it cannot be told. If not, no difference is told."""
    is_same_machine: bool
    """Whether seconds of one mean the same as seconds of the other: machine, threads and torch are the same."""
    warnings: tuple[str, ...]
    """What must be known before any figure is read, the gravest first."""
    differences: tuple[Difference, ...]
    pairs: tuple[Pair, ...]
    """Every level of either, from no recycling to all."""
    by_object: Mapping[tuple[str, str], Estimate] = field(default_factory=dict)
    """By level and metric, B less A, object by object; nothing where the scores of each are not known."""

    def difference(self, pair: Pair, metric: str) -> Estimate | None:
        """B less A at a level, object by object if it can be; None where there is none to be told."""
        if self.is_same_test is False:
            return None
        return self.by_object.get((pair.level, metric)) or pair.difference(metric)

    @property
    def how_sure(self) -> str:
        """In words, what the errors of differences are; empty if there are none."""
        told = [(pair, metric) for pair in self.pairs for metric in self.metrics if self.difference(pair, metric)]
        paired = [(pair, metric) for pair, metric in told if (pair.level, metric) in self.by_object]
        if not told:
            return ""
        if len(paired) == len(told):
            return "told object by object: both were tested on the same ones"
        separate = "that of two separate tests; object by object it would be smaller as a rule"
        if not paired:
            return f"{separate}, but what each object scored is not known of both, or not of the same ones in one order"
        levels = dict.fromkeys(pair.words for pair, _ in paired)
        return f"told object by object at {_and(list(levels))}, else {separate}"

    def untrained_difference(self, metric: str) -> Estimate | None:
        """The same of the pretrained models as they come, as of two separate tests: None too where they are one and the
        same model."""
        if self.is_same_test is False or _is_same_model(self.a, self.b):
            return None
        return _less(self.b.untrained.get(metric), self.a.untrained.get(metric))

    @property
    def sentence(self) -> str:
        """Where B is above A, and where below, in one sentence."""
        return _sentence(self)

    def to_json(self) -> dict[str, Any]:
        """Every figure, as JSON has it: what is not known is None."""
        return finite(
            {
                "sentence": self.sentence,
                "same_test_objects": self.is_same_test,
                "same_machine": self.is_same_machine,
                "warnings": list(self.warnings),
                "differences": [asdict(one) for one in self.differences],
                "metrics": list(self.metrics),
                "untrained": {
                    metric: _quality(
                        self.a.untrained[metric], self.b.untrained[metric], self.untrained_difference(metric)
                    )
                    for metric in self.metrics
                },
                "errors": self.how_sure,
                "levels": [_pair_to_json(self, pair) for pair in self.pairs],
                "recommended": {"a": self.a.recommendation.level, "b": self.b.recommendation.level},
            }
        )


def compare(a: SweepResult, b: SweepResult, *, scored: tuple[Scored, Scored] | None = None) -> Comparison:
    """Two sweeps side by side.

    Args:
        a: the one that is compared with, such as the one of yesterday.
        b: the one that is asked about.
        scored: what is known of what each was tested on, as `torchrecycle.sweep.scored.read_scored` gives it.
    """
    known = scored or (Scored(), Scored())
    metrics = tuple(
        metric for metric in sorted(a.untrained, key=lambda name: name != a.metric) if metric in b.untrained
    )
    same, doubts = _same_test(a, b, metrics, known)
    is_same_machine = (a.ran.machine, a.ran.versions.get("torch")) == (b.ran.machine, b.ran.versions.get("torch"))
    return Comparison(
        a=a,
        b=b,
        metrics=metrics,
        is_same_test=same,
        is_same_machine=is_same_machine,
        warnings=tuple([*doubts, *_warnings(a, b, metrics, is_same_machine)]),
        differences=tuple(one for one in (*_facts(a, b), *_of_rows_and_objects(a, b, known)) if one.a != one.b),
        pairs=tuple(_pairs(a, b)),
        by_object=_by_object(a, b, metrics, known),
    )


def _by_object(
    a: SweepResult, b: SweepResult, metrics: tuple[str, ...], known: tuple[Scored, Scored]
) -> dict[tuple[str, str], Estimate]:
    both = [one.level for one in a.levels if any(one.level == other.level for other in b.levels)]
    found = {(level, metric): known[1].difference(known[0], level, metric) for level in both for metric in metrics}
    return {where: by for where, by in found.items() if by is not None}


def _pairs(a: SweepResult, b: SweepResult) -> Iterator[Pair]:
    own: dict[str, dict[Side, LevelResult]] = {}
    sides: tuple[tuple[Side, SweepResult], ...] = (("a", a), ("b", b))
    for side, result in sides:
        for one in result.levels:
            own.setdefault(one.level, {})[side] = one
    share = {level: _place(level, next(iter(held.values()))) for level, held in own.items()}
    for level in sorted(own, key=lambda level: share[level]):
        yield Pair(level, own[level].get("a"), own[level].get("b"))


def _place(level: str, one: LevelResult) -> float:
    return {"full": 0.0, "head": 1.0}.get(
        level, int(level) / 100 if level.isdecimal() and len(level) < 3 else one.share
    )


# -- are they comparable -----------------------------------------------------------------------------------------------


def _same_test(
    a: SweepResult, b: SweepResult, metrics: tuple[str, ...], known: tuple[Scored, Scored]
) -> tuple[bool | None, list[str]]:
    """Whether both were tested on the same objects, and what is to be said of it."""
    other = _other_task(a, b)
    hashes = _same_hash(known)
    if hashes is False and not other:
        other = "by their hash, the objects of the test split are not the same, or have other classes"
    not_the_same = [f"Not the same task or test objects: {other}. Their figures say nothing about each other."]
    if not metrics:
        none = f"No metric in common: A has {', '.join(a.untrained)}, B has {', '.join(b.untrained)}."
        return False, [*(not_the_same if other else ()), none]
    if hashes is True and a.kind == b.kind:
        return True, []
    apart = _apart(a, b, metrics) if hashes is None and _scores_the_same(a, b, known) else None
    differ = all(one.objects for one in known)  # of a user's own data set: as another model or transform may read it
    if apart == 0 and not differ:
        return True, []
    if other:
        return False, not_the_same
    scores = f"{metrics[0]} {_exact(a.untrained[metrics[0]].mean)} in A and {_exact(b.untrained[metrics[0]].mean)} in B"
    if apart is not None and apart > NEAR:
        return False, [
            f"Not the same test objects: the same pretrained model, with the same settings, has {scores}. It was "
            "another split, or other files, or they were read in another way: their figures say nothing about each "
            "other."
        ]
    if (a.ran.data, a.title) != (b.ran.data, b.title):
        return None, [
            f"It cannot be told whether both were tested on the same objects: A is '{a.title}' of {a.ran.data}, B "
            f"'{b.title}' of {b.ran.data}. If they were not, the differences mean nothing."
        ]
    if differ:
        return None, [
            "It cannot be told whether both were tested on the same objects: what the models got of them is not the "
            "same, which may come from another way of reading them. If they were not, the differences mean nothing."
        ]
    if apart is not None:
        return True, [
            f"The same pretrained model has {scores}. So little comes from another machine, version or precision; or "
            "a few of the test objects are not the same."
        ]
    return True, [
        "That both were tested on the same objects is taken from the data's name and from how many there are: with "
        "another model, or with other settings, there is nothing that proves it" + _without_hash(known) + "."
    ]


def _same_hash(known: tuple[Scored, Scored]) -> bool | None:
    """Whether the test objects are the same by their hashes; None if that says nothing."""
    a, b = known
    if not a.objects or not b.objects or a.is_of_objects != b.is_of_objects:
        return None
    if a.objects == b.objects:
        return True
    return False if a.is_of_objects else None


def _without_hash(known: tuple[Scored, Scored]) -> str:
    lacking = [name for name, one in zip("AB", known, strict=True) if not one.objects]
    return f"; {' and '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no hash of them" if lacking else ""


def _other_task(a: SweepResult, b: SweepResult) -> str:
    """In words, what makes them two tasks; empty if nothing does for sure."""
    if a.kind != b.kind:
        return f"A is of {a.kind}, B of {b.kind}"
    tested = a.ran.splits.get("test"), b.ran.splits.get("test")
    if tested[0] != tested[1]:
        return f"A was tested on {_objects(tested[0])}, B on {_objects(tested[1])}"
    for name in ("split seed", "split"):
        one, other = a.ran.settings.get(name), b.ran.settings.get(name)
        if one != other:
            return f"the {name} is {one or 'not told'} in A and {other or 'not told'} in B"
    return ""


def _objects(number: int | None) -> str:
    return "nothing that is told" if number is None else count(number, "object")


def _is_same_model(a: SweepResult, b: SweepResult) -> bool:
    return (a.ran.model, a.ran.weights) == (b.ran.model, b.ran.weights)


def _scores_the_same(a: SweepResult, b: SweepResult, known: tuple[Scored, Scored]) -> bool:
    """Whether the pretrained models are one, asked in one way: then they score the same on the same objects."""
    if a.ran.random_weights or b.ran.random_weights or not _is_same_model(a, b):
        return False
    if _precision(a, known[0]) != _precision(b, known[1]):  # from rows that are rounded, it may well score otherwise
        return False
    one, other = (
        {name: value for name, value in result.ran.settings.items() if name not in OF_TRAINING} for result in (a, b)
    )
    return one == other


def _precision(result: SweepResult, known: Scored) -> str:
    """Of the rows that were kept, from wherever it is told."""
    if known.precision:
        return known.precision
    told = {
        one.predicted.precision or OWN for one in result.levels if one.predicted is not None and one.cut is not None
    }
    if told:
        return ", ".join(sorted(told))
    if "precision" in result.ran.settings:
        return result.ran.settings["precision"]
    if result.ran.command.startswith(("torchrecycle sweep ", "torchrecycle demo")):
        given = re.search(r"\s--precision[\s=]+(\w+)", result.ran.command)
        return given[1] if given else OWN
    return NOT_KNOWN


def _apart(a: SweepResult, b: SweepResult, metrics: tuple[str, ...]) -> float | None:
    """By how many standard errors the pretrained model's figures differ, at most; infinite where no error is known, and
    None where a figure is not, so that nothing is proven by it."""
    most = 0.0
    for metric in metrics:
        one, other = a.untrained[metric], b.untrained[metric]
        for x, y in ((one.mean, other.mean), (one.error, other.error)):
            if not (math.isfinite(x) and math.isfinite(y)):
                return None
            if not math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12):
                most = max(most, abs(x - y) / one.error if one.error > 0 else math.inf)
    return most


def _exact(value: float) -> str:
    return figure(value, 4)


def _warnings(a: SweepResult, b: SweepResult, metrics: tuple[str, ...], is_same_machine: bool) -> Iterator[str]:
    if a.to_json() == b.to_json():
        yield "A and B are the same results."
    for name, result in (("A", a), ("B", b)):
        if result.ran.random_weights:
            yield f"The weights of {name} are random: its figures say nothing about a pretrained model."
    if metrics and a.metric != b.metric:
        yield f"A goes by {a.metric} and B by {b.metric}; what is shown first is {metrics[0]}."
    if not is_same_machine:
        yield "Not the same machine or torch: seconds of one say nothing about those of the other."


# -- what differs ------------------------------------------------------------------------------------------------------


def _facts(a: SweepResult, b: SweepResult) -> Iterator[Difference]:
    """Everything by name, whether it differs or not."""
    for what, of in _OF_A_RESULT.items():
        yield Difference(what, of(a), of(b))
    for what, one, other in (
        ("meaning of", a.metrics, b.metrics),
        ("objects to", {f"{name} on": f"{n:,}" for name, n in a.ran.splits.items()},
         {f"{name} on": f"{n:,}" for name, n in b.ran.splits.items()}),
        ("", a.ran.settings, b.ran.settings),
        ("cut of", _cuts(a), _cuts(b)),
        ("training of", _recipes(a), _recipes(b)),
        ("version of", a.ran.versions, b.ran.versions),
    ):  # fmt: skip
        yield from _by_name(what, one, other)


def _of_rows_and_objects(a: SweepResult, b: SweepResult, known: tuple[Scored, Scored]) -> Iterator[Difference]:
    yield Difference("precision of kept rows", _precision(a, known[0]), _precision(b, known[1]))
    if _same_hash(known) is not True:
        yield Difference("hash of the test objects", *(one.objects or NOT_KNOWN for one in known))


def _by_name(what: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys([*a, *b]):
        if (what, name) == ("", "precision"):  # is told of both, also where only one of them has it here
            continue
        yield Difference(f"{what} {name}".strip(), a.get(name, ""), b.get(name, ""))


_OF_A_RESULT = {
    "kind": lambda result: result.kind,
    "task": lambda result: result.title,
    "metric": lambda result: result.metric,
    "model": lambda result: result.ran.model,
    "weights": lambda result: result.ran.weights,
    "data": lambda result: result.ran.data,
    "left out": lambda result: "; ".join(result.ran.left_out),
    "loss": lambda result: result.ran.loss,
    "levels": lambda result: ", ".join(one.words for one in result.levels),
    "seeds": lambda result: ", ".join(map(str, result.seeds)),
    "recommended": lambda result: in_words(result.recommendation.level) if result.recommendation.level else "no level",
    "machine": lambda result: result.ran.machine,
    "date": lambda result: result.ran.date.replace("T", " ", 1),
    "took": lambda result: duration(result.ran.seconds),
    "command": lambda result: result.ran.command,
}


def _cuts(result: SweepResult) -> dict[str, str]:
    return {one.words: one.cut for one in result.levels if one.cut is not None}


def _recipes(result: SweepResult) -> dict[str, str]:
    is_own = result.kind == "objects"
    return {one.words: recipe_in_words(one.trials[0].recipe, is_own=is_own) for one in result.levels}


# -- in words ----------------------------------------------------------------------------------------------------------


def _sentence(comparison: Comparison) -> str:
    if comparison.is_same_test is False:
        return "A and B cannot be compared: each stands for itself."
    metric = comparison.metrics[0]
    told = [(pair, comparison.difference(pair, metric)) for pair in comparison.pairs]
    known = [(pair, by) for pair, by in told if by is not None]
    if not known:
        return "A and B have no level in common: each stands for itself."
    sure = [(pair, by) for pair, by in known if by.error > 0 and abs(by.mean) > SURE * by.error]
    higher = [_by(pair, by) for pair, by in sure if by.mean > 0]
    lower = [_by(pair, by) for pair, by in sure if by.mean < 0]
    if not sure:
        each = ", ".join(_by(pair, by) for pair, by in known)
        return f"{metric} of B differs from that of A by no more than chance explains: {each}."
    parts = [f"higher at {_and(higher)}"] if higher else []
    parts += [f"lower at {_and(lower)}"] if lower else []
    rest = "; elsewhere it differs by no more than chance explains" if len(sure) < len(known) else ""
    return f"{metric} of B is {' and '.join(parts)} than that of A{rest}."


def _by(pair: Pair, by: Estimate) -> str:
    return f"{pair.words} ({signed(by)})"


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def recommended_in_words(result: SweepResult) -> str:
    """What a sweep recommends, with its figures: ``50 % recycled, 0.936 ± 0.006 in 31.6 s with 73.5 MB``."""
    level = result.recommendation.level
    if level is None:
        return "no level"
    if all(one.level != level for one in result.levels):
        return in_words(level)
    one = result.of(level)
    kept = f" with {megabytes(one.bytes_kept)} MB" if one.cut else ""
    took = duration(one.total_seconds + one.fill_seconds)
    return f"{one.words}, {estimate(one.quality[result.metric])} in {took}{kept}"


# -- as JSON -----------------------------------------------------------------------------------------------------------


def _quality(a: Estimate | None, b: Estimate | None, by: Estimate | None, is_paired: bool = False) -> dict[str, Any]:
    return {
        "a": None if a is None else asdict(a),
        "b": None if b is None else asdict(b),
        "difference": None if by is None else by.mean,
        "error": None if by is None or by.error == 0 else by.error,
        "object_by_object": is_paired,
    }


def _pair_to_json(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    return {
        "level": pair.level,
        "quality": {
            metric: _quality(
                pair.a.quality.get(metric) if pair.a else None,
                pair.b.quality.get(metric) if pair.b else None,
                comparison.difference(pair, metric),
                (pair.level, metric) in comparison.by_object,
            )
            for metric in comparison.metrics
        },
        "a": _costs_to_json(pair.a),
        "b": _costs_to_json(pair.b),
    }


def _costs_to_json(one: LevelResult | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "cut": one.cut,
        "share": one.share,
        "fill_seconds": one.fill_seconds,
        "epoch_seconds": one.epoch_seconds,
        "total_seconds": one.total_seconds,
        "frozen_epoch_seconds": one.frozen_epoch_seconds,
        "bytes_kept": one.bytes_kept,
        "seeds": [trial.seed for trial in one.trials],
    }
