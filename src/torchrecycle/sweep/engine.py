"""The work of a sweep: each level trained from the same pretrained weights, judged on objects that none of them saw.

For a task, the rows of all levels are filled in one pass (the deepest prefix runs once). Then, from the most recycled
level to full training, a rate is looked for on the validation split, and the level is trained with it under each seed
and judged on the test split. Beside recycling stands the fair baseline: the same prefix frozen, but computed again.

Each training that ends is kept in a journal, and rows are in the store: a sweep that was killed goes on where it was,
and one that is asked for a second seed trains that one only.
"""

from __future__ import annotations

import math
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecycle.progress import progress
from torchrecycle.store import MemoryStore, Store, open_store
from torchrecycle.store.sizes import bytes_in_words, parse_bytes
from torchrecycle.sweep.environment import machine, now, versions
from torchrecycle.sweep.estimates import estimate
from torchrecycle.sweep.filling import Filling, groups_that_fit
from torchrecycle.sweep.identity import identity_of_model, identity_of_task, seed_everything
from torchrecycle.sweep.journal import found_from_json
from torchrecycle.sweep.levels import parse_levels
from torchrecycle.sweep.objective_task import ObjectiveTask
from torchrecycle.sweep.plan import SweepError, SweepPlan
from torchrecycle.sweep.rates import best_of, rate_of, search_order
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.recommend import recommend
from torchrecycle.sweep.records import FORMAT, MissingRecordError, Place, Purpose, Records
from torchrecycle.sweep.results import LevelResult, Ran, Sample, SweepResult, Trial, in_words
from torchrecycle.sweep.runner import Counted, First, Later, Runner, attach, evaluating
from torchrecycle.sweep.splits import in_order
from torchrecycle.sweep.task import Evaluation, Split, Task
from torchrecycle.sweep.trial import RunningTrial
from torchrecycle.trace import random_state, set_random_state

__all__ = ["Engine"]

POINTS = 6
"""How often the quality is measured during a training."""
QUERIES = 8
"""Objects of which is shown what they find."""
FROZEN_STEPS = 12
"""Steps by which an epoch without a store is timed."""


class Engine:
    """One sweep; its methods are in the order in which they are called.

    Args:
        build_model: gives the pretrained model, the same weights each time.
        task: what is learned.
        plan: which levels, where, and how often.
    """

    def __init__(self, build_model: Callable[[], nn.Module], task: Task, plan: SweepPlan) -> None:
        _refuse_switched_off()
        self.task, self.plan, self._build = task, plan, build_model
        self.levels = parse_levels(plan.levels)
        self.splits = task.splits()
        self.judged = self.splits.get("validation", self.splits["test"])
        self.began = time.perf_counter()
        self._store: Store | None = None
        self._without_room: list[str] = []
        self._has_told = False
        self._model_identity: str | None = None
        self._model_name, self._device = task.model, task.device
        queries = _queries(task, self.splits["test"])
        self.records = Records(plan.journal, self._facts(), queries)
        self.filling = Filling(task, self.records, plan.views, plan.tell)

    def _facts(self) -> dict[str, Any]:
        identity = self._identity()
        facts = {
            "format": FORMAT,
            "task": identity,
            "precision": self.plan.precision,
            "workers": self.task.workers,
            "machine": machine(self._device),
            "versions": {name: version for name, version in versions().items() if name not in ("python", "numpy")},
        }
        if self.plan.views not in (None, 1):
            facts["views"] = self.plan.views
        return facts

    def _identity(self) -> str:
        """Of the task and of the model that is trained."""
        if isinstance(self.task, ObjectiveTask) and self._build == self.task.build_model:
            return self.task.identity  # which tells its model too
        model = self.build()
        self._model_identity = identity_of_model(model)
        self._model_name = self._model_name or type(model).__name__
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return f"{identity_of_task(self.task)} {self._model_identity}"

    def build(self) -> nn.Module:
        """The model with its first weights, under seeded generators.

        Raises:
            SweepError: it is none, or has other weights than the last time.
        """
        with _seeded(0):
            model = self._build()
        if not isinstance(model, nn.Module):
            raise SweepError(f"build_model gave a {type(model).__name__}, and not a torch.nn.Module")
        if self.task.device is not None:
            model.to(self.task.device)
        if self._model_identity is not None and identity_of_model(model) != self._model_identity:
            raise SweepError(
                "build_model gives another model each time, so that levels would not begin alike: give the same "
                "architecture and weights, such as copy.deepcopy of one model"
            )
        return model.eval()

    def rows(self) -> Iterator[LevelResult]:
        """Each level as it is finished, the most recycled first."""
        task, plan = self.task, self.plan
        todo = [level for level in self.levels if not self._is_done(level)]
        with ExitStack() as stack:
            groups = self._groups([level for level in todo if level != "full"])
            runners = self._begun(groups[0], stack) if groups else {}
            self._untrained(runners.get("head"))
            for level in reversed(self.levels):
                if level not in todo:
                    plan.tell(f"{in_words(level)}: was finished before")
                    yield self._level(level)
                    continue
                if level != "full" and level not in runners:
                    runners.update(self._begun(next(group for group in groups if level in group), stack))
                runner = runners.pop(level, None) or Runner(task, level, None, self.build())
                self._run(level, runner)
                runner.release()
                yield self._level(level)

    def _is_done(self, level: str) -> bool:
        try:
            place = self.records.place(level)
            list(self._trials(level, place, None))
            if place.cut is not None:
                self._frozen_epoch(level, self.task.recipe(level, place.share), None)
        except MissingRecordError:
            return False
        return True

    # -- attaching and filling -----------------------------------------------------------------------------------------

    def attach(self, levels: Sequence[str], stack: ExitStack, *, alone: bool = False) -> dict[str, Runner]:
        """A model of its own for each recycled level, so that all are filled in one pass."""
        runners: dict[str, Runner] = {}
        cuts = {} if alone else {place.cut: level for level, place in self._places(levels).items()}
        for level in levels:
            if level == "full":
                continue
            runners[level] = self._attached(level, self.build(), self.task.cuts.get(level), stack)
            recycling = runners[level].recycling
            assert recycling is not None
            if recycling.cut in cuts:
                raise SweepError(
                    f"levels {cuts[recycling.cut]} and {level} would both be cut at '{recycling.cut}', the nearest "
                    "valid cut: leave one of them out with --levels, and see torchrecycle cuts --model "
                    f"{self._model_name}"
                )
            cuts[recycling.cut] = level
        return runners

    def _places(self, others: Sequence[str]) -> dict[str, Place]:
        """Of recycled levels but these, as far as they are known."""
        found = {}
        for level in self.levels:
            if level not in others and level != "full":
                with suppress(MissingRecordError):
                    found[level] = self.records.place(level)
        return found

    def _attached(self, level: str, model: nn.Module, cut: str | None, stack: ExitStack) -> Runner:
        if self._store is None:
            self._store = open_store(self.plan.store, self.plan.max_bytes)
        recycling = attach(self.task, model, level, cut, self._store, self._options())
        stack.callback(recycling.detach)
        return Runner(self.task, level, recycling, model)

    def _options(self) -> dict[str, Any]:
        views = {} if self.plan.views is None else {"views": self.plan.views}
        return {"precision": self.plan.precision, **views}

    def _tell_of_others(self, runners: Mapping[str, Runner]) -> None:
        recyclings = [runner.recycling for runner in runners.values() if runner.recycling is not None]
        ours = {place.fingerprint for place in self._places(list(runners)).values()}
        others = set(recyclings[0].store.fingerprints()) - ours - {each.fingerprint for each in recyclings}
        if others:
            self.plan.tell(
                f"the store {self.plan.store} holds rows of {len(others)} other models or cuts too: they are not "
                "used, and left as they are"
            )

    def _groups(self, levels: Sequence[str]) -> list[list[str]]:
        """Which levels are filled together, the most recycled first."""
        if self.plan.max_bytes is None or not levels:
            return [list(levels)] if levels else []
        limit, sizes = parse_bytes(self.plan.max_bytes), {}
        for level in reversed(levels):
            with ExitStack() as stack:
                recycling = attach(
                    self.task, self.build(), level, self.task.cuts.get(level), MemoryStore(), self._options()
                )
                stack.callback(recycling.detach)
                sizes[level] = self.filling.expected_bytes(recycling)
        groups, self._without_room = groups_that_fit(sizes, limit)
        for level in self._without_room:
            self.plan.tell(
                f"{in_words(level)}: its rows would take {bytes_in_words(sizes[level])}, and the store may take "
                f"{bytes_in_words(limit)}: its frozen layers are computed again instead"
            )
        return [*groups, *([level] for level in self._without_room)]

    def _begun(self, group: Sequence[str], stack: ExitStack) -> dict[str, Runner]:
        """Levels attached and filled; one without room is attached only."""
        runners = self.attach([level for level in self.levels if level in group], stack)
        if group[0] in self._without_room:
            runners[group[0]].keep_nothing()
        else:
            if not self._has_told:
                self._tell_of_others(runners)
                self._has_told = True
            self.filling.fill(runners)
        return runners

    # -- the pretrained model ------------------------------------------------------------------------------------------

    def _untrained(self, head: Runner | None) -> None:
        """How good the pretrained model is, from the rows of the head's level if they are there."""
        try:
            self.records.untrained()
        except MissingRecordError:
            pass
        else:
            return
        with _seeded(0):
            model = self.task.untrained(self.build)
        runner = Runner(self.task, "untrained", None, model)
        with ExitStack() as stack:
            if head is not None and head.recycling is not None and head.is_filled:
                runner = self._attached("head", model, head.recycling.cut, stack)
            known = Later(lambda: runner.evaluation_loader(self.splits["train"]))
            found = self._evaluated(runner, self.splits["test"], known=known, what="the pretrained model")
        self.plan.tell("the pretrained model: " + _figures(found.quality))
        self.records.keep_untrained(asdict(found))

    def _evaluated(
        self, runner: Runner, split: Split, *, known: Any = None, shown: bool = True, what: str = ""
    ) -> Evaluation:
        """
        Args:
            runner: whose model.
            split: on which.
            known: of an untrained model, the batches of the training split.
            shown: whether what it finds is wanted.
            what: for the progress line; empty for none.
        """
        loader, queries = runner.evaluation_loader(split), self.records.queries if shown else ()
        with ExitStack() as stack:
            stack.enter_context(evaluating(runner.model))
            if what:
                line = stack.enter_context(progress(what, len(loader), "batches"))
                loader = Counted(loader, line.advance)
            found = self.task.judged(runner.model, loader, split, queries, known)
        return found

    @property
    def metric(self) -> str:
        """Which figure stands for the quality: the task's, or the first one that it gave."""
        return self.task.metric or next(iter(self.records.untrained()["quality"]))

    # -- a level -------------------------------------------------------------------------------------------------------

    def _run(self, level: str, runner: Runner) -> None:
        """All that a level still needs, told of and kept."""
        place = self._place(level, runner)
        if place.cut is not None:
            self._frozen_epoch(level, self.task.recipe(level, place.share), runner)
        for trial in self._trials(level, place, runner):
            self.plan.tell(_told(trial, self.metric))

    def _place(self, level: str, runner: Runner) -> Place:
        is_kept = runner.recycling is None or not runner.recycling.off
        try:
            place = self.records.place(level)
        except MissingRecordError:
            pass
        else:
            if place.is_kept == is_kept:
                return place
        count = sum(parameter.numel() for parameter in runner.trained)
        recycling = runner.recycling
        if recycling is None:
            place = Place(None, 0.0, count, 0, None)
        else:
            kept = self.filling.bytes_kept(runner) if is_kept else 0
            place = Place(recycling.cut, recycling.level, count, kept, recycling.fingerprint, is_kept)
        self.records.keep_place(level, place)
        return place

    def _frozen_epoch(self, level: str, recipe: Recipe, runner: Runner | None) -> float:
        """Seconds of an epoch with the prefix computed again, from its first steps.

        Raises:
            MissingRecordError: it was not measured, and there is no runner.
        """
        recipe = replace(recipe, epochs=1)
        try:
            return self.records.frozen_seconds(level, recipe)
        except MissingRecordError:
            if runner is None:
                raise
        assert runner.recycling is not None
        with runner.recycling.paused():
            loader = First(runner.training_loader(recipe, 0), FROZEN_STEPS * _batches_of_a_step(self.task))
            with progress(f"{in_words(level)}, no store", len(loader), "steps") as shown, _seeded(0):
                trial = RunningTrial(level, runner.share, recipe, 0, tuple(runner.trained))
                self.task.fit(runner.model, Counted(loader, shown.advance), trial)
                whole = trial.seconds
        runner.restart()
        measured = trial.curve[-1].seconds if trial.curve else whole
        seconds = measured * loader.whole / len(loader)
        self.records.keep_frozen_seconds(level, recipe, seconds)
        return seconds

    def _trials(self, level: str, place: Place, runner: Runner | None) -> Iterator[Trial]:
        """All trainings of a level, in order; without a runner they must all be in the journal.

        Raises:
            MissingRecordError: one is not, and there is no runner.
        """
        recipe = self.task.recipe(level, place.share)
        if self.plan.search and "validation" in self.splits and not self.task.rate_is_given(level):
            tried: list[Trial] = []
            for candidate in search_order(recipe, level, tried):
                tried.append(self._trial(level, place, candidate, 0, "search", runner))
                yield tried[-1]
            recipe = best_of(tried, recipe, self.metric)
        for seed in self.plan.seeds:
            yield self._trial(level, place, recipe, seed, "final", runner)

    def _trial(
        self, level: str, place: Place, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner | None
    ) -> Trial:
        try:
            return self.records.trial(level, place, recipe, seed, purpose)
        except MissingRecordError:
            if runner is None:
                raise
        return self.train_and_keep(place, recipe, seed, purpose, runner)

    def train_and_keep(self, place: Place, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner) -> Trial:
        """One training, kept in the journal, and its weights if they are asked for."""
        trial = self._train(recipe, seed, purpose, runner)
        key = self.records.trial_key(runner.level, place, recipe, seed, purpose)
        if self.plan.weights is not None and purpose == "final":
            _keep_weights(runner.model, self.plan.weights / f"{key}.safetensors")
        self.records.keep_trial(key, trial)
        return trial

    def _train(self, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner) -> Trial:
        level, metric = runner.level, self.metric
        runner.restart()
        asked = _epochs_to_judge(recipe.epochs) if purpose == "final" else {recipe.epochs}

        def judge(epoch: int) -> float | None:
            if epoch not in asked:
                return None
            return self._evaluated(runner, self.judged, shown=False).quality[metric]

        running, epochs = self._fitted(recipe, seed, purpose, runner, judge)
        curve, untold = running.curve, (running.seconds, epochs)
        diverged = bool(curve) and not math.isfinite(curve[-1].loss)
        told: dict[str, Any] = {} if curve else {"untold_seconds": untold[0], "untold_epochs": untold[1]}
        if purpose == "search":
            quality = 0.0 if diverged else curve[-1].quality if curve else None
            if quality is None:  # of a fit that tells of no epochs, or stopped by itself
                quality = self._evaluated(runner, self.judged, shown=False).quality[metric]
            return Trial(level, purpose, seed, recipe, curve, {metric: quality}, {}, **told)
        if diverged:
            raise SweepError(
                f"{in_words(level)} diverged at a rate of {rate_of(recipe, level):g}: the loss was no finite "
                f"number in epoch {curve[-1].epoch}. Give a lower --rate, or let the sweep look for one"
            )
        found = self._evaluated(runner, self.splits["test"])
        return Trial(level, purpose, seed, recipe, curve, found.quality, _scores(found), found.found, **told)

    def _fitted(
        self, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner, judge: Callable[[int], float | None]
    ) -> tuple[RunningTrial, int]:
        """What became of it, and how often it went over its loader.

        Raises:
            SweepError: nothing was trained.
        """
        level, whose = runner.level, type(self.task).__name__
        what = f"{in_words(level)}, " + (
            f"seed {seed}" if purpose == "final" else f"looking for a rate, {rate_of(recipe, level):g}"
        )
        loader = runner.training_loader(recipe, seed)
        with progress(what, recipe.epochs * len(loader), "batches") as shown, _seeded(seed):
            batches = Counted(loader, shown.advance)
            running = RunningTrial(level, runner.share, recipe, seed, tuple(runner.trained), judge=judge)
            self.task.fit(runner.model, batches, running)
            running.stop_clock()
        if not batches.epochs:
            raise SweepError(f"{whose}.fit has trained nothing: it never went over the loader that it was given")
        if not runner.has_learned() and not (running.curve and not math.isfinite(running.curve[-1].loss)):
            raise SweepError(
                f"{whose}.fit has trained nothing: after {batches.epochs} epochs of {in_words(level)} each weight is "
                "what it was. Give trial.parameters to the optimizer, and call its step()"
            )
        return running, batches.epochs

    # -- the result ----------------------------------------------------------------------------------------------------

    def result(self, levels: Sequence[LevelResult]) -> SweepResult:
        """Of all levels, from no recycling to all."""
        task, untrained, metric = self.task, self.records.untrained(), self.metric
        scores = _scores(Evaluation(untrained["quality"], untrained["scores"]))
        clusters = self._clusters(len(scores[metric]))
        before = found_from_json(untrained["found"])
        shown = [*before, *(found for level in levels for trial in level.trials for found in trial.found)]
        return SweepResult(
            kind=task.kind,
            title=task.title,
            metric=metric,
            metrics={name: task.metrics.get(name, name) for name in scores},
            curve_split="validation" if "validation" in self.splits else "test",
            untrained={name: estimate([each], clusters) for name, each in scores.items()},
            untrained_found=before,
            levels=tuple(levels),
            recommendation=recommend(levels, scores[metric], metric, clusters, pretrained=task.pretrained),
            seeds=tuple(self.plan.seeds),
            samples=self._samples(sorted({i for found in shown for i in (found.query, *found.nearest)})),
            ran=self._ran(levels),
        )

    def _clusters(self, scores: int) -> Sequence[int]:
        """
        Raises:
            SweepError: the task has them for another number of scores.
        """
        clusters = self.task.clusters() if scores > 1 else None
        if clusters is not None and len(clusters) != scores:
            raise SweepError(
                f"{type(self.task).__name__}.clusters() gives {len(clusters)} of them for {scores} scores of the test "
                "split: give one for each score"
            )
        return range(scores) if clusters is None else clusters

    def _level(self, level: str) -> LevelResult:
        place = self.records.place(level)
        trials = list(self._trials(level, place, None))
        final = tuple(trial for trial in trials if trial.purpose == "final")
        frozen = None if place.cut is None else self._frozen_epoch(level, self.task.recipe(level, place.share), None)
        epoch = statistics.mean(trial.epoch_seconds for trial in final)
        fill = 0.0 if frozen is None or not place.is_kept else self.filling.seconds(level)
        if fill is None and frozen is not None:  # what an epoch without a store takes longer is the prefix
            fill = max(0.0, frozen - epoch)
        return LevelResult(
            level=level,
            cut=place.cut,
            share=place.share,
            trained_parameters=place.trained_parameters,
            quality={
                name: estimate([trial.scores[name] for trial in final], self._clusters(len(final[0].scores[name])))
                for name in final[0].scores
            },
            trials=final,
            search=tuple(trial for trial in trials if trial.purpose == "search"),
            fill_seconds=fill or 0.0,
            frozen_epoch_seconds=frozen,
            bytes_kept=place.bytes_kept,
        )

    def _samples(self, indices: Sequence[int]) -> dict[int, Sample]:
        sample = self.splits["test"].sample
        return {} if sample is None else {index: sample(index) for index in indices}

    def _ran(self, levels: Sequence[LevelResult]) -> Ran:
        task = self.task
        per = 2 if task.kind == "pairs" else 1
        trained = sum(level.search_seconds + sum(t.seconds for t in level.trials) for level in levels)
        return Ran(
            command=self.plan.command,
            model=self._model_name,
            weights=task.weights,
            random_weights=task.random_weights,
            data=task.data or type(self.splits["train"].dataset).__name__,
            splits={name: len(split) // per for name, split in self.splits.items()},
            left_out=tuple(task.left_out),
            loss=task.loss,
            settings={**task.settings, **self._said()},
            licences=tuple(task.licences),
            machine=machine(self._device),
            versions=versions(),
            date=now(),
            seconds=max(time.perf_counter() - self.began, trained + max(level.fill_seconds for level in levels)),
        )

    def _said(self) -> dict[str, str]:
        """What of the plan was not left as usual."""
        said = {}
        if self.plan.views not in (None, 1):
            said["views"] = f"{self.plan.views} of each object that is trained on"
        if self.plan.max_bytes is not None:
            said["most bytes kept"] = bytes_in_words(parse_bytes(self.plan.max_bytes))
        return said


# -- small things ------------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators begin with a seed, and are put back at the end."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


def _queries(task: Task, test: Split) -> tuple[int, ...]:
    """Objects of the test split, drawn by chance and always the same; of pairs, their left texts."""
    if test.sample is None:
        return ()
    count = len(test) // (2 if task.kind == "pairs" else 1)
    return tuple(sorted(int(name) for name in in_order(map(str, range(count)))[:QUERIES]))


def _epochs_to_judge(epochs: int) -> set[int]:
    """
    >>> sorted(_epochs_to_judge(3)), sorted(_epochs_to_judge(30))
    ([1, 2, 3], [5, 10, 15, 20, 25, 30])
    """
    return {math.ceil(epochs * step / POINTS) for step in range(1, POINTS + 1)}


def _scores(found: Evaluation) -> dict[str, tuple[float, ...]]:
    """Per metric what each object contributes; the figure itself where nothing is known of objects."""
    return {name: tuple(found.scores.get(name, (value,))) for name, value in found.quality.items()}


def _refuse_switched_off() -> None:
    if os.environ.get("TORCHRECYCLE", "").lower() == "off":
        raise SweepError(
            "TORCHRECYCLE=off is set, and a sweep measures what recycling gains: unset it. Full training and an "
            "epoch without a store are measured anyway"
        )


def _batches_of_a_step(task: Task) -> int:
    return 2 if task.kind == "pairs" else 1


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


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _told(trial: Trial, metric: str) -> str:
    if trial.purpose == "search":
        return f"{in_words(trial.level)}: rate {rate_of(trial.recipe, trial.level):g} gives {metric} " + (
            f"{trial.quality[metric]:.3f} on the validation split"
        )
    return (
        f"{in_words(trial.level)}, seed {trial.seed}: {_figures(trial.quality)}, {trial.epoch_seconds:.2f} s per epoch"
    )
