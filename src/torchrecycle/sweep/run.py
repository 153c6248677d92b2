"""The sweep: each level trained from the same pretrained weights, judged on objects that none of them saw.

For a task, the rows of all levels are filled in one pass (the deepest prefix runs once). Then, from the most recycled
level to full training, a rate is looked for on the validation split, and the level is trained with it under each seed
and judged on the test split. Beside recycling stands the fair baseline: the same prefix frozen, but computed again.

Each training that ends is kept in a `Journal`, and rows are in the store: a sweep that was killed goes on where it was,
and one that is asked for a second seed trains that one only.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from torchrecycle.errors import RecycleError, RecycleWarning, StoreError
from torchrecycle.fill import FillReport
from torchrecycle.progress import progress
from torchrecycle.recycling import Recycling, fill_many, recycle
from torchrecycle.store import leaf_bytes
from torchrecycle.sweep.environment import machine, now, versions
from torchrecycle.sweep.estimates import estimate
from torchrecycle.sweep.fit import fit
from torchrecycle.sweep.journal import Journal, found_from_json, trial_from_json
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.recommend import recommend
from torchrecycle.sweep.results import LevelResult, Ran, Sample, SweepResult, Trial, in_words
from torchrecycle.sweep.splits import in_order
from torchrecycle.sweep.task import Split, Task

__all__ = ["LEVELS", "BestWeights", "SweepError", "SweepPlan", "best_weights", "parse_levels", "sweep"]

LEVELS = ("full", "50", "75", "head")
FORMAT = 1
"""Of the records: part of each key, so that those of another version are not looked at."""
POINTS = 6
"""How often the quality is measured during a training."""
QUERIES = 8
"""Objects of which is shown what they find."""
SIZED = 512
"""Rows of which the size is looked at."""
ROW_BYTES = 24
"""What a row takes beside its leaves: a key and a checksum."""
FROZEN_STEPS = 12
"""Steps by which an epoch without a store is timed."""


class SweepError(RecycleError, ValueError):
    """A sweep cannot be run as asked, or a training in it has diverged."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """How a task is swept."""

    store: str | Path
    """Where rows are kept: a folder, or ``memory://name``."""
    journal: Path
    """The folder where finished trainings are kept."""
    levels: Sequence[str] = LEVELS
    """``full``, ``head``, or how many per cent of the blocks are recycled."""
    seeds: Sequence[int] = (0,)
    search: bool = True
    """Whether a rate is looked for, at each level; else the recipe's is taken."""
    precision: str | None = None
    """Of kept rows; see `recycle`."""
    weights: Path | None = None
    """A folder where the trained weights of each final training are kept; None keeps none."""
    command: str = "sweep(...)"
    """What is said of how it was called."""
    tell: Callable[[str], None] = field(default=lambda line: None, repr=False)
    """Told of what has ended, a line at a time."""


def sweep(task: Task, plan: SweepPlan) -> SweepResult:
    """Train and judge a task at each level. What is in the journal is not done again.

    Args:
        task: data, model and objective.
        plan: which levels, where, and how often.

    Raises:
        SweepError: a level is none, or a training diverges.
        CutError: a level has no valid cut.
    """
    return _Sweep(task, plan).run()


@dataclass(frozen=True, slots=True)
class BestWeights:
    """The weights of one training of a sweep, and which it was."""

    level: LevelResult
    trial: Trial
    file: Path
    """Of safetensors: the state dict of what `Task.build_model` makes."""


def best_weights(task: Task, plan: SweepPlan, result: SweepResult) -> BestWeights:
    """The seed that did best on the test split, at the recommended level; at the best one if none is recommended.

    Args:
        task: as it was swept.
        plan: the same, with a folder for weights.
        result: what came out.
    """
    level = (
        result.of(result.recommendation.level)
        if result.recommendation.level is not None
        else max(result.levels, key=lambda each: each.quality[result.metric].mean)
    )
    trial = max(level.trials, key=lambda each: each.quality[result.metric])
    return _Sweep(task, plan).best_weights(level, trial)


Purpose = Literal["search", "final"]


class _MissingRecord(Exception):
    """The journal does not have what a level needs."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a level is cut, as the journal keeps it."""

    cut: str | None
    share: float
    trained_parameters: int
    bytes_kept: int
    fingerprint: str | None


class _Runner:
    """One level at work: its model, attached or not, and what it trains."""

    def __init__(self, task: Task, level: str, recycling: Recycling | None, model: nn.Module) -> None:
        self.task, self.level, self.recycling, self.model = task, level, recycling, model
        self.trained = list(model.parameters() if recycling is None else recycling.parameters())
        self._start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def restart(self) -> None:
        """The pretrained weights again. What is as it was is not touched: the frozen part does not look changed."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if not torch.equal(tensor, self._start[name]):
                    tensor.copy_(self._start[name])

    def loader(self, split: Split, arguments: dict[str, Any]) -> Any:
        if self.recycling is None:
            return DataLoader(split.dataset, **arguments)
        return self.recycling.loader(split.dataset, name=split.name, **arguments)

    def evaluation_loader(self, split: Split) -> Any:
        return self.loader(split, self.task.eval_arguments())


class _Sweep:
    """One sweep; its methods are in the order in which they are called."""

    def __init__(self, task: Task, plan: SweepPlan) -> None:
        _refuse_switched_off()
        self.task, self.plan = task, plan
        self.levels = parse_levels(plan.levels)
        self.journal = Journal(plan.journal)
        self.began = time.perf_counter()
        self.facts = {
            "format": FORMAT,
            "task": task.identity,
            "precision": plan.precision,
            "workers": task.workers,
            "machine": machine(task.device),
            "versions": {name: version for name, version in versions().items() if name not in ("python", "numpy")},
        }
        self.queries = _queries(task)
        self.judged = task.validation if task.validation is not None else task.test

    def run(self) -> SweepResult:
        task, plan = self.task, self.plan
        todo = [level for level in self.levels if not self._is_done(level)]
        with ExitStack() as stack:
            runners = self._attach(todo, stack)
            self._tell_of_others([r.recycling for r in runners.values() if r.recycling is not None], todo)
            self._fill(runners)
            untrained = self._untrained(runners.get("head"))
            for level in reversed(self.levels):
                if level not in todo:
                    plan.tell(f"{in_words(level)}: was finished before")
                    continue
                runner = runners.pop(level, None) or _Runner(task, level, None, task.build_model())
                place = self._place(level, runner)
                if place.cut is not None:
                    self._frozen_epoch(level, self._recipe(level, place), runner)
                for trial in self._trials(level, place, runner):
                    plan.tell(_told(trial, task.objective.metric))
                if runner.recycling is not None:
                    runner.recycling.detach()
        return self._result(untrained)

    # -- the journal ---------------------------------------------------------------------------------------------------

    def _key(self, **facts: Any) -> str:
        return Journal.key({**self.facts, **facts})

    def _known(self, **facts: Any) -> dict[str, Any]:
        record = self.journal.read(self._key(**facts), facts["kind"])
        if record is None:
            raise _MissingRecord
        return record

    def _is_done(self, level: str) -> bool:
        try:
            place = self._known_place(level)
            list(self._trials(level, place, None))
            if place.cut is not None:
                self._frozen_epoch(level, self._recipe(level, place), None)
        except _MissingRecord:
            return False
        return True

    def _known_place(self, level: str) -> _Place:
        return _Place(**self._known(kind="place", level=level)["place"])

    # -- attaching and filling -----------------------------------------------------------------------------------------

    def _attach(self, levels: Sequence[str], stack: ExitStack, *, alone: bool = False) -> dict[str, _Runner]:
        """A model of its own for each recycled level, so that all are filled in one pass."""
        runners: dict[str, _Runner] = {}
        done = [] if alone else [level for level in self.levels if level not in levels and level != "full"]
        cuts = {self._known_place(level).cut: level for level in done}
        for level in levels:
            if level == "full":
                continue
            model = self.task.build_model()
            recycling = self._recycle(model, level, self.task.cuts.get(level))
            stack.callback(recycling.detach)
            if recycling.cut in cuts:
                raise SweepError(
                    f"levels {cuts[recycling.cut]} and {level} would both be cut at '{recycling.cut}', the "
                    "nearest valid "
                    f"cut: leave one of them out with --levels, and see torchrecycle cuts --model {self.task.model}"
                )
            cuts[recycling.cut] = level
            runners[level] = _Runner(self.task, level, recycling, model)
        return runners

    def _recycle(self, model: nn.Module, level: str, cut: str | None) -> Recycling:
        options: dict[str, Any] = {"store": self.plan.store, "precision": self.plan.precision}
        if cut is not None:
            return recycle(model, self.task.example(), cut=cut, **options)
        return recycle(model, self.task.example(), level=share_of(level), **options)

    def _tell_of_others(self, recyclings: Sequence[Recycling], todo: Sequence[str]) -> None:
        if not recyclings:
            return
        done = [level for level in self.levels if level not in todo]
        ours = {self._known_place(level).fingerprint for level in done} | {each.fingerprint for each in recyclings}
        others = set(recyclings[0].store.fingerprints()) - ours
        if others:
            self.plan.tell(
                f"the store {self.plan.store} holds rows of {len(others)} other models or cuts too: they are not "
                "used, and "
                "left as they are"
            )

    def _fill(self, runners: Mapping[str, _Runner]) -> None:
        if not runners:
            return
        splits = {"training": self.task.train, "validation": self.task.validation, "test": self.task.test}
        for name, split in splits.items():
            if split is not None:
                report = self._fill_split(name, split, runners)
                self.plan.tell(f"{name} split: {report}")

    def _fill_split(self, name: str, split: Split, runners: Mapping[str, _Runner]) -> FillReport:
        """One pass over a split, for all levels that are not done. What it cost is kept."""
        recyclings = [runner.recycling for runner in runners.values() if runner.recycling is not None]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", RecycleWarning)
            reports = fill_many(recyclings, split.dataset, name=split.name, **self.task.eval_arguments())
        _refuse_missing_rows(reports, said)
        together = _together(reports)
        if together.computed:
            cost = {"objects": together.objects, "computed": together.computed, "seconds": together.seconds}
            levels = [level for level, report in zip(runners, reports, strict=True) if report.computed]
            record = {"kind": "fill", "split": name, "levels": levels, "prefix_seconds": together.prefix_seconds}
            self.journal.write(f"fill-{time.time_ns()}", {**record, **cost, **self.facts})
        return together

    def _seconds_to_fill(self, level: str) -> float | None:
        """What filling the training split takes: reading and hashing of all objects, the prefix of those computed.

        None if most rows of the level were in the store already, so that nothing is known of it.
        """
        passes = [
            record
            for record in self.journal.all("fill")
            if level in record["levels"]
            and 2 * record["computed"] >= record["objects"]  # of a few rows, most is what comes before the first
            and all(record.get(name) == fact for name, fact in self.facts.items())
        ]
        if not passes:
            return None
        total = {
            name: sum(one[name] for one in passes) for name in ("objects", "computed", "seconds", "prefix_seconds")
        }
        reading = (total["seconds"] - total["prefix_seconds"]) / total["objects"]
        return len(self.task.train) * (reading + total["prefix_seconds"] / total["computed"])

    # -- the pretrained model ------------------------------------------------------------------------------------------

    def _untrained(self, head: _Runner | None) -> dict[str, Any]:
        """How good the pretrained model is, from the rows of the head's level if they are there."""
        task = self.task
        key = self._key(kind="untrained", queries=list(self.queries))
        record = self.journal.read(key, "untrained")
        if record is not None:
            return record
        runner = _Runner(task, "untrained", None, task.build_untrained())
        with ExitStack() as stack:
            if head is not None and head.recycling is not None:
                runner.recycling = stack.enter_context(self._recycle(runner.model, "head", head.recycling.cut))
            loader = runner.evaluation_loader(task.test)
            with progress("the pretrained model", len(loader), "batches") as shown:
                found = task.evaluate(
                    runner.model,
                    Counted(loader, shown.advance),
                    task.test,
                    queries=self.queries,
                    known=runner.evaluation_loader(task.train),
                )
        self.plan.tell("the pretrained model: " + _figures(found.quality))
        record = {"kind": "untrained", **asdict(found)}
        self.journal.write(key, record)
        return record

    # -- a level -------------------------------------------------------------------------------------------------------

    def _place(self, level: str, runner: _Runner) -> _Place:
        key = self._key(kind="place", level=level)
        record = self.journal.read(key, "place")
        if record is not None:
            return _Place(**record["place"])
        count = sum(parameter.numel() for parameter in runner.trained)
        recycling = runner.recycling
        if recycling is None:
            place = _Place(None, 0.0, count, 0, None)
        else:
            place = _Place(recycling.cut, recycling.level, count, self._bytes_kept(runner), recycling.fingerprint)
        self.journal.write(key, {"kind": "place", "place": asdict(place)})
        return place

    def _bytes_kept(self, runner: _Runner) -> int:
        """Of the rows of this task's objects, whatever else the store holds; from some of them if they are many."""
        recycling = runner.recycling
        assert recycling is not None
        splits = [split for split in (self.task.train, self.task.validation, self.task.test) if split is not None]
        rows = torch.cat([runner.evaluation_loader(split).dataset.locations for split in splits]).unique()
        rows = rows[rows >= 0]  # without those for which the store had no room
        if not len(rows):
            return 0
        some = rows[:: max(1, len(rows) // SIZED)]
        kept = sum(leaf_bytes(leaf) for leaf in recycling.source.rows.gather(some))
        return round(len(rows) * (kept / len(some) + ROW_BYTES))

    def _frozen_epoch(self, level: str, recipe: Recipe, runner: _Runner | None) -> float:
        """Seconds of an epoch with the prefix computed again, from its first steps.

        Raises:
            _MissingRecord: it was not measured, and there is no runner.
        """
        recipe = replace(recipe, epochs=1)
        key = self._key(kind="frozen", level=level, recipe=asdict(recipe))
        record = self.journal.read(key, "frozen")
        if record is not None:
            return record["seconds"]
        if runner is None:
            raise _MissingRecord
        assert runner.recycling is not None
        with runner.recycling.paused():
            loader = _First(self._training_loader(runner, recipe, 0), FROZEN_STEPS * _batches_of_a_step(self.task))
            with progress(f"{in_words(level)}, no store", len(loader), "steps") as shown:
                points = fit(self.task, runner.model, runner.trained, Counted(loader, shown.advance), recipe, seed=0)
        runner.restart()
        seconds = points[-1].seconds * loader.whole / len(loader)
        self.journal.write(key, {"kind": "frozen", "seconds": seconds})
        return seconds

    def _training_loader(self, runner: _Runner, recipe: Recipe, seed: int) -> Any:
        return runner.loader(self.task.train, self.task.loader_arguments(recipe, seed=seed))

    def _recipe(self, level: str, place: _Place) -> Recipe:
        """How the level is trained if no other rate is found."""
        return self.task.recipe(level, place.share)

    def _trials(self, level: str, place: _Place, runner: _Runner | None) -> Iterator[Trial]:
        """All trainings of a level, in order; without a runner they must all be in the journal.

        Raises:
            _MissingRecord: one is not, and there is no runner.
        """
        recipe = self._recipe(level, place)
        if self.plan.search and self.task.validation is not None and not self.task.rate_is_given(level):
            tried = []
            for candidate in search_order(recipe, level, tried):
                tried.append(self._trial(level, place, candidate, 0, "search", runner))
                yield tried[-1]
            recipe = _best_of(tried, recipe, self.task.objective.metric)
        for seed in self.plan.seeds:
            yield self._trial(level, place, recipe, seed, "final", runner)

    def _trial(
        self,
        level: str,
        place: _Place,
        recipe: Recipe,
        seed: int,
        purpose: Purpose,
        runner: _Runner | None,
    ) -> Trial:
        key = self._trial_key(level, place.cut, recipe, seed, purpose)
        record = self.journal.read(key, "trial")
        if record is not None:
            return trial_from_json(record["trial"])
        if runner is None:
            raise _MissingRecord
        return self._train_and_keep(level, recipe, seed, purpose, runner, key)

    def _train_and_keep(
        self, level: str, recipe: Recipe, seed: int, purpose: Purpose, runner: _Runner, key: str
    ) -> Trial:
        trial = self._train(level, recipe, seed, purpose, runner)
        if self.plan.weights is not None and purpose == "final":
            _keep_weights(runner.model, self.plan.weights / f"{key}.safetensors")
        self.journal.write(key, {"kind": "trial", "trial": asdict(trial)})
        return trial

    def _trial_key(self, level: str, cut: str | None, recipe: Recipe, seed: int, purpose: str) -> str:
        facts = {"kind": "trial", "level": level, "cut": cut, "purpose": purpose, "seed": seed}
        return self._key(**facts, recipe=asdict(recipe), queries=list(self.queries))

    def best_weights(self, level: LevelResult, trial: Trial) -> BestWeights:
        """The weights of a final training; it is done once more if they were not kept then."""
        assert self.plan.weights is not None
        key = self._trial_key(level.level, level.cut, trial.recipe, trial.seed, "final")
        file = self.plan.weights / f"{key}.safetensors"
        if not file.is_file():
            self.plan.tell(f"{level.words}, seed {trial.seed}: trained once more, since its weights were not kept")
            with ExitStack() as stack:
                runners = self._attach([level.level], stack, alone=True)
                self._fill(runners)
                runner = runners.get(level.level) or _Runner(self.task, level.level, None, self.task.build_model())
                trial = self._train_and_keep(level.level, trial.recipe, trial.seed, "final", runner, key)
        return BestWeights(level, trial, file)

    def _train(self, level: str, recipe: Recipe, seed: int, purpose: Purpose, runner: _Runner) -> Trial:
        task = self.task
        runner.restart()
        loader = self._training_loader(runner, recipe, seed)
        asked = _epochs_to_judge(recipe.epochs) if purpose == "final" else {recipe.epochs}
        what = f"{in_words(level)}, " + (
            f"seed {seed}" if purpose == "final" else f"looking for a rate, {_rate(recipe, level):g}"
        )

        def judge(epoch: int) -> float | None:
            if epoch not in asked:
                return None
            found = task.evaluate(runner.model, runner.evaluation_loader(self.judged), self.judged)
            return found.quality[task.objective.metric]

        with progress(what, recipe.epochs * len(loader), "batches") as shown:
            batches = Counted(loader, shown.advance)
            curve = fit(task, runner.model, runner.trained, batches, recipe, seed=seed, judge=judge)
        finite = math.isfinite(curve[-1].loss)
        if purpose == "search":
            quality = curve[-1].quality if finite and curve[-1].quality is not None else 0.0
            return Trial(level, purpose, seed, recipe, tuple(curve), {task.objective.metric: quality}, {})
        if not finite:
            raise SweepError(
                f"{in_words(level)} diverged at a rate of {_rate(recipe, level):g}: the loss was no finite "
                "number in epoch "
                f"{curve[-1].epoch}. Give a lower --rate, or let the sweep look for one"
            )
        found = task.evaluate(runner.model, runner.evaluation_loader(task.test), task.test, queries=self.queries)
        return Trial(level, purpose, seed, recipe, tuple(curve), found.quality, found.scores, found.found)

    # -- the result ----------------------------------------------------------------------------------------------------

    def _result(self, untrained: dict[str, Any]) -> SweepResult:
        task, plan = self.task, self.plan
        clusters = task.objective.clusters(task.test)
        levels = tuple(self._level(level, clusters) for level in self.levels)
        metric = task.objective.metric
        before = found_from_json(untrained["found"])
        shown = [*before, *(found for level in levels for trial in level.trials for found in trial.found)]
        return SweepResult(
            kind=task.kind,
            title=task.title,
            metric=metric,
            metrics=dict(task.objective.metrics),
            curve_split="validation" if task.validation is not None else "test",
            untrained={name: estimate([each], clusters) for name, each in untrained["scores"].items()},
            untrained_found=before,
            levels=levels,
            recommendation=recommend(
                levels, untrained["scores"][metric], metric, clusters, pretrained=task.objective.pretrained
            ),
            seeds=tuple(plan.seeds),
            samples=self._samples(sorted({i for found in shown for i in (found.query, *found.nearest)})),
            ran=self._ran(levels),
        )

    def _level(self, level: str, clusters: Sequence[int]) -> LevelResult:
        place = self._known_place(level)
        trials = list(self._trials(level, place, None))
        final = tuple(trial for trial in trials if trial.purpose == "final")
        frozen = None if place.cut is None else self._frozen_epoch(level, self._recipe(level, place), None)
        epoch = statistics.mean(trial.epoch_seconds for trial in final)
        fill = 0.0 if frozen is None else self._seconds_to_fill(level)
        if fill is None and frozen is not None:  # what an epoch without a store takes longer is the prefix
            fill = max(0.0, frozen - epoch)
        return LevelResult(
            level=level,
            cut=place.cut,
            share=place.share,
            trained_parameters=place.trained_parameters,
            quality={
                name: estimate([trial.scores[name] for trial in final], clusters)
                for name in self.task.objective.metrics
            },
            trials=final,
            search=tuple(trial for trial in trials if trial.purpose == "search"),
            fill_seconds=fill or 0.0,
            frozen_epoch_seconds=frozen,
            bytes_kept=place.bytes_kept,
        )

    def _samples(self, indices: Sequence[int]) -> dict[int, Sample]:
        sample = self.task.test.sample
        return {} if sample is None else {index: sample(index) for index in indices}

    def _ran(self, levels: Sequence[LevelResult]) -> Ran:
        task = self.task
        per = 2 if task.kind == "pairs" else 1
        splits = {"train": task.train, "validation": task.validation, "test": task.test}
        trained = sum(level.search_seconds + sum(t.seconds for t in level.trials) for level in levels)
        return Ran(
            command=self.plan.command,
            model=task.model,
            weights=task.weights,
            random_weights=task.random_weights,
            data=task.data,
            splits={name: len(split) // per for name, split in splits.items() if split is not None},
            left_out=task.left_out,
            loss=task.objective.loss,
            settings=task.settings,
            licences=task.licences,
            machine=machine(task.device),
            versions=versions(),
            date=now(),
            seconds=max(time.perf_counter() - self.began, trained + max(level.fill_seconds for level in levels)),
        )


# -- levels ------------------------------------------------------------------------------------------------------------


def parse_levels(levels: Sequence[str]) -> tuple[str, ...]:
    """Distinct levels from no recycling to all.

    >>> parse_levels(["head", "50", "full"])
    ('full', '50', 'head')

    Raises:
        SweepError: one is no level, or there is none.
    """
    found = [level.strip().removesuffix("%").strip() for level in levels if level.strip()]
    for level in found:
        if level not in ("full", "head") and not (level.isdigit() and 0 < int(level) < 100):
            raise SweepError(
                f"'{level}' is no level: give full, head, or how many per cent of the blocks are to be recycled, "
                "from 1 to "
                "99, such as --levels full,50,75,head"
            )
    if not found:
        raise SweepError("no level is given: --levels full,50,75,head")
    return tuple(sorted(set(found), key=share_of))


def share_of(level: str) -> float:
    """
    >>> share_of("full"), share_of("75"), share_of("head")
    (0.0, 0.75, 1.0)
    """
    return {"full": 0.0, "head": 1.0}[level] if level in ("full", "head") else int(level) / 100


# -- looking for a rate ------------------------------------------------------------------------------------------------


def search_order(recipe: Recipe, level: str, tried: Sequence[Trial]) -> Iterator[Recipe]:
    """Recipes to try, with a third of the epochs: the rate itself, three times it, a third of it, and one step further
    on the side that was better, if that was the outermost.

    Args:
        recipe: the default, in the middle.
        level: whose.
        tried: what came out, filled by the caller as it goes.
    """
    short = replace(recipe, epochs=max(1, round(recipe.epochs / 3)))
    for factor in (1.0, 3.0, 1 / 3):
        yield _scaled(short, level, factor)
    best = max(range(len(tried)), key=lambda i: next(iter(tried[i].quality.values())))
    if best:
        yield _scaled(short, level, (9.0, 1 / 9)[best - 1])


def _scaled(recipe: Recipe, level: str, factor: float) -> Recipe:
    """The rate that matters most at a level, times a factor: of what is left of the trunk, of the head where nothing
    is."""
    if level == "head":
        return replace(recipe, head_rate=float(f"{recipe.head_rate * factor:.2g}"))
    return replace(recipe, suffix_rate=float(f"{recipe.suffix_rate * factor:.2g}"))


def _rate(recipe: Recipe, level: str) -> float:
    return recipe.head_rate if level == "head" else recipe.suffix_rate


def _best_of(tried: Sequence[Trial], recipe: Recipe, metric: str) -> Recipe:
    best = max(tried, key=lambda trial: trial.quality[metric]).recipe
    return replace(best, epochs=recipe.epochs)


# -- small things ------------------------------------------------------------------------------------------------------


def _queries(task: Task) -> tuple[int, ...]:
    """Objects of the test split, drawn by chance and always the same; of pairs, their left texts."""
    if task.test.sample is None:
        return ()
    count = len(task.test) // (2 if task.kind == "pairs" else 1)
    return tuple(sorted(int(name) for name in in_order(map(str, range(count)))[:QUERIES]))


def _epochs_to_judge(epochs: int) -> set[int]:
    """
    >>> sorted(_epochs_to_judge(3)), sorted(_epochs_to_judge(30))
    ([1, 2, 3], [5, 10, 15, 20, 25, 30])
    """
    return {math.ceil(epochs * step / POINTS) for step in range(1, POINTS + 1)}


def _refuse_switched_off() -> None:
    if os.environ.get("TORCHRECYCLE", "").lower() == "off":
        raise SweepError(
            "TORCHRECYCLE=off is set, and a sweep measures what recycling gains: unset it. Full training and an "
            "epoch without a store are measured anyway"
        )


def _keep_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        save_model(model, str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _batches_of_a_step(task: Task) -> int:
    return 2 if task.kind == "pairs" else 1


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _told(trial: Trial, metric: str) -> str:
    if trial.purpose == "search":
        return f"{in_words(trial.level)}: rate {_rate(trial.recipe, trial.level):g} gives {metric} " + (
            f"{trial.quality[metric]:.3f} on the validation split"
        )
    return (
        f"{in_words(trial.level)}, seed {trial.seed}: {_figures(trial.quality)}, {trial.epoch_seconds:.2f} s per epoch"
    )


class Counted:
    """A loader that tells of each batch."""

    def __init__(self, loader: Any, tell: Callable[[], None]) -> None:
        self._loader, self._tell = loader, tell

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch
            self._tell()


class _First:
    """The first batches of a loader, as if there were no others."""

    def __init__(self, loader: Any, count: int) -> None:
        self._loader, self.whole = loader, len(loader)
        self._count = min(count, self.whole)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._count)
