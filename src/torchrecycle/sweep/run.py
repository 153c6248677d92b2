"""Which level is right for a task? Train at each, and say what each gains and costs.

    for row in sweep(build_model, task, levels=("full", "50", "75", "head"), store="activations/"):
        print(row)

A `Sweep` does its work while it is gone over: head only comes first, after a minute, and full training last. What it
has finished is kept; the same call in the next process begins where this one was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchrecycle.sweep.budget import parse_budget
from torchrecycle.sweep.engine import Engine
from torchrecycle.sweep.journal import Journal
from torchrecycle.sweep.kept import keep_result, keep_row
from torchrecycle.sweep.levels import LEVELS, parse_levels, share_of
from torchrecycle.sweep.plan import SweepError, SweepPlan
from torchrecycle.sweep.results import LevelResult, SweepResult, Trial
from torchrecycle.sweep.runner import Runner
from torchrecycle.sweep.scored import keep_scored, scored_of
from torchrecycle.sweep.task import Task
from torchrecycle.trace import random_state, set_random_state

__all__ = ["LEVELS", "BestWeights", "Sweep", "SweepError", "SweepPlan", "parse_levels", "share_of", "sweep"]


@dataclass(frozen=True, slots=True)
class BestWeights:
    """The weights of one training of a sweep, and which it was."""

    level: LevelResult
    trial: Trial
    file: Path
    """Of safetensors: the state dict of what `build_model` makes."""


class Sweep:
    """A sweep that is run as its rows are asked for. Made by `sweep`, or from a plan.

    Going over it gives each level as it is finished, the most recycled first; a second time, the same rows at once.
    Whatever stops it, a `break` or an error, going over it again goes on from there. Levels for which a budget leaves
    no time give no row.

    Args:
        build_model: see `sweep`.
        task: see `sweep`.
        plan: all options of `sweep`.

    Raises:
        SweepError: see `sweep`.
    """

    def __init__(self, build_model: Callable[[], nn.Module], task: Task, plan: SweepPlan) -> None:
        _refuse_arguments(build_model, task, plan)
        self.task, self.plan = task, plan
        self.levels = parse_levels(plan.levels)
        self._engine = Engine(build_model, task, plan)
        self._rows: list[LevelResult] = []
        self._work: Generator[LevelResult] | None = None
        self._is_over = False
        self._result: SweepResult | None = None

    @property
    def rows(self) -> tuple[LevelResult, ...]:
        """What is finished, in the order in which it was."""
        return tuple(self._rows)

    def __iter__(self) -> Iterator[LevelResult]:
        given = 0
        while given < len(self._rows) or self._advance():
            yield self._rows[given]
            given += 1

    def _advance(self) -> bool:
        """Finish one more level, if there is one for which there is time."""
        if self._is_over:
            return False
        if self._work is None:
            self._work = self._all_rows()
        state = random_state()
        try:
            row = next(self._work, None)
        except BaseException:
            self._work = None  # a generator that raised is over; the next one finds what was finished
            raise
        finally:
            set_random_state(state)
        if row is None:
            self._is_over = True
            return False
        self._rows.append(row)
        return True

    def _all_rows(self) -> Generator[LevelResult]:
        """Those that were not given yet."""
        given = {row.level for row in self._rows}
        for row in self._engine.rows():
            keep_row(self.plan.folder, self._name, row)
            if row.level not in given:
                yield row

    @property
    def _name(self) -> str:
        return Journal.key(self._engine.records.facts)

    def close(self) -> None:
        """Let go of the models of a sweep that was left before its end; going over it again goes on."""
        if self._work is not None:
            self._work.close()
            self._work = None

    def result(self) -> SweepResult:
        """Everything, with a recommendation; what is not finished yet is finished now, and ``results.json`` written;
        beside it ``scores.json``, by which `report compare` tells two sweeps apart object by object.

        Raises:
            SweepError: a training diverged, or the task gave what cannot be used.
            CutError: a level has no valid cut.
        """
        if self._result is None:
            by_level = {row.level: row for row in self}
            self._result = self._engine.result([by_level[level] for level in self.levels if level in by_level])
            keep_result(self.plan.folder, self._result)
            scored = scored_of(self.task, self._result, precision=self.plan.precision)
            keep_scored(self.plan.folder, self._result, scored)
        return self._result

    def best_weights(self) -> BestWeights:
        """The seed that did best on the test split, at the recommended level; at the best one if none is recommended.

        It is trained once more if its weights were not kept then.

        Raises:
            SweepError: the plan has no folder for weights.
        """
        if self.plan.weights is None:
            raise SweepError("no weights are kept: give weights='a folder'")
        result = self.result()
        level = (
            result.of(result.recommendation.level)
            if result.recommendation.level is not None
            else max(result.levels, key=lambda each: each.quality[result.metric].mean)
        )
        trial = max(level.trials, key=lambda each: each.quality[result.metric])
        return _kept_weights(self._engine, level, trial, self.plan.weights)

    def __repr__(self) -> str:
        return f"Sweep({type(self.task).__name__}, {len(self._rows)} of {len(self.levels)} levels finished)"


def _kept_weights(engine: Engine, level: LevelResult, trial: Trial, folder: Path) -> BestWeights:
    place = engine.place(level.level)
    file = folder / f"{engine.records.trial_key(level.level, place, trial.recipe, trial.seed, 'final')}.safetensors"
    if not file.is_file():
        engine.plan.tell(f"{level.words}, seed {trial.seed}: trained once more, since its weights were not kept")
        with ExitStack() as stack:
            runners = engine.attach([level.level], stack, alone=True)
            if runners and place.is_kept:
                engine.filling.fill(runners)
            elif runners:
                runners[level.level].keep_nothing()
            runner = runners.get(level.level) or Runner(engine.task, level.level, None, engine.build())
            trial = engine.train_and_keep(place, trial.recipe, trial.seed, "final", runner)
    return BestWeights(level, trial, file)


def _refuse_arguments(build_model: Any, task: Any, plan: SweepPlan) -> None:
    if isinstance(build_model, nn.Module):
        raise SweepError(
            "build_model is a model, which the first level would train for all others: give a function that makes it, "
            "such as lambda: copy.deepcopy(model)"
        )
    if not callable(build_model):
        raise SweepError(f"build_model={build_model!r} is no function: give one that makes the pretrained model")
    if not isinstance(task, Task):
        raise SweepError(
            f"{task!r} is no task: derive its class from torchrecycle.sweep.Task, or take Classification, Similarity, "
            "Pairs, Regression or TokenLabelling"
        )
    if isinstance(plan.seeds, int) or not len(plan.seeds) or not all(isinstance(seed, int) for seed in plan.seeds):
        raise SweepError(f"seeds={plan.seeds!r}: give a list of whole numbers, one for each training: seeds=(0, 1, 2)")
    twice = sorted({seed for seed in plan.seeds if list(plan.seeds).count(seed) > 1})
    if twice:
        raise SweepError(
            f"seeds={tuple(plan.seeds)!r} has {', '.join(map(str, twice))} more than once, which would be one training "
            "counted as several: give each seed once"
        )
    if plan.views is not None and (not isinstance(plan.views, int) or plan.views < 1):
        raise SweepError(f"views={plan.views!r}: give how many augmented versions of an object are kept, 1 or more")
    if plan.predict not in (None, True, False) and not isinstance(plan.predict, (list, tuple)):
        raise SweepError(
            f"predict={plan.predict!r}: give True or False, None for where it is cheap, or a list of further precisions"
        )
    if plan.budget is not None:
        parse_budget(plan.budget)
        if plan.predict is False:
            raise SweepError(
                f"budget={plan.budget!r} with predict=False: what fits into a budget is planned from what is "
                "predicted. Leave one of them out"
            )


def sweep(
    build_model: Callable[[], nn.Module],
    task: Task,
    *,
    levels: Iterable[str | float] = LEVELS,
    store: str | Path,
    results: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    search: bool = True,
    budget: str | float | None = None,
    max_bytes: int | str | None = None,
    predict: bool | Sequence[str] | None = None,
    precision: str | None = None,
    views: int | None = None,
    weights: str | Path | None = None,
    command: str = "sweep(...)",
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Train and judge a task at each level. What is in the journal is not done again.

    Args:
        build_model: gives the pretrained model, the same weights each time. It is called under seeded generators, so a
            new head is the same each time; it is called for each level, so it should not download or convert.
        task: what is learned and how it is judged: `Classification`, `Similarity`, `Pairs`, `Regression`,
            `TokenLabelling`, or a `Task` of one's own.
        levels: ``full``, ``head``, or how many per cent of the blocks are recycled: ``"50"`` or 0.5. Full training is
            run last, and may be left out.
        store: where rows are kept: a folder, or ``memory://name``.
        results: the folder for what is finished; the store's name with ``-sweep`` behind it if None.
        seeds: a training each, at each level; two or more tell how much is chance.
        search: whether a rate is looked for at each level, on the validation split if there is one.
        budget: how long it may take, such as ``"30m"``: what is done is planned from a few measured batches. Full
            training is the first to be left out; it is then expected from the others. A sweep that was killed goes on
            with what is left of its budget, which is for the whole sweep; asked with a larger one, it does more.
        max_bytes: how many bytes the rows of this sweep may take in the store, such as ``"20 GB"``; rows of other
            models there are not counted, and stay. Of levels that do not fit together, those are kept first whose rows
            save most; the others take turns afterwards.
        predict: whether a few batches of each level are measured before anything is filled, so that it is known what it
            will take, and shown beside what came. None: where that takes a tenth of the planned work at most, and where
            a budget or ``max_bytes`` asks for it. Names of precisions, such as ``("bfloat16", "int8")``: at those, too,
            beside the sweep's own. The task's `fit` is then called beside the trainings.
        precision: of kept rows; see `recycle`.
        views: in how many augmented versions each object of the training split is kept; see `recycle`.
        weights: a folder where the trained weights of each final training are kept.
        command: what is said of how it was called.
        tell: told of what has ended, a line at a time; `print` will do.

    Raises:
        SweepError: something cannot be used, in words. A training that diverges, or a `fit` that trains nothing, is
            told of when it comes.
    """
    plan = SweepPlan(
        store=store,
        results=None if results is None else Path(results),
        levels=parse_levels(levels),
        seeds=seeds,
        search=search,
        budget=budget,
        max_bytes=max_bytes,
        predict=predict,
        precision=precision,
        views=views,
        weights=None if weights is None else Path(weights),
        command=command,
        tell=tell if tell is not None else lambda line: None,
    )
    return Sweep(build_model, task, plan)
