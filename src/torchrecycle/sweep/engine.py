"""The work of a sweep: each level trained from the same pretrained weights, judged on objects that none of them saw.

For a task, the rows of all levels are filled in one pass (the deepest prefix runs once). Then, from the most recycled
level to full training, a rate is looked for on the validation split, and the level is trained with it under each seed
and judged on the test split. Beside recycling stands the fair baseline: the same prefix frozen, but computed again.

Each training that ends is kept in a journal, and rows are in the store: a sweep that was killed goes on where it was,
and one that is asked for a second seed trains that one only.

Where that is cheap against what is planned, a few batches are measured first, and it is said what each level will take.
With a budget, what is done is planned from that (`torchrecycle.sweep.budget`); what has no time is left out and said to
be. Full training that was not run is expected from the others.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecycle.progress import progress
from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.store import MemoryStore, Store
from torchrecycle.store.sizes import parse_bytes
from torchrecycle.sweep.budget import Plan, duration_in_words, parse_budget
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.filling import Filling, OwnRows, open_limited
from torchrecycle.sweep.foresight import LEAST_ROUNDS, Foresight, Planned, cheap_rounds, planned_epochs
from torchrecycle.sweep.frozen import FrozenSteps
from torchrecycle.sweep.halving import FACTORS, Attempt, Halving, require_optuna, rungs, search_epochs
from torchrecycle.sweep.identity import identity_of_model, identity_of_task, seed_everything
from torchrecycle.sweep.levels import parse_levels, share_of
from torchrecycle.sweep.materialise import Candidate, candidates
from torchrecycle.sweep.objective_task import ObjectiveTask
from torchrecycle.sweep.outcome import Outcome, Work, scores_of
from torchrecycle.sweep.plan import SweepError, SweepPlan
from torchrecycle.sweep.rates import chosen, diverged, rate_of, report, scaled, settle
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.records import FORMAT, MissingRecordError, Place, Purpose, Records
from torchrecycle.sweep.results import (
    EpochPoint,
    LevelResult,
    Prediction,
    SweepResult,
    Trial,
    in_words,
)
from torchrecycle.sweep.runner import Counted, Later, Runner, attach, evaluating
from torchrecycle.sweep.spending import Spending, TimeIsUp
from torchrecycle.sweep.splits import in_order
from torchrecycle.sweep.task import Evaluation, Split, Task
from torchrecycle.sweep.trial import RunningTrial
from torchrecycle.sweep.turns import Turns, fit_together, turns_from_json, turns_of
from torchrecycle.trace import random_state, set_random_state

__all__ = ["Engine"]

POINTS = 6
"""How often the quality is measured during a training."""
QUERIES = 8
"""Objects of which is shown what they find."""


_HOW_TO_GIVE_A_RATE = "(`rate` and `head_rate` of a task, or its `recipe`; --rate of the command.)"


class _NoTimeError(Exception):
    """A training was not started, or not ended, since the budget does not allow it."""


class _DivergedError(SweepError):
    """A training came to no finite number. It ends its level, and no other."""


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
        self.seeds, self.rates = tuple(plan.seeds), len(FACTORS)
        self.splits = task.splits()
        self.judged = self.splits.get("validation", self.splits["test"])
        self.began = time.perf_counter()
        self._store: Store | None = None
        self._turns = Turns((tuple(reversed(self.levels)),))
        self._has_told = False
        self._earlier: dict[str, Plan] = {}
        self._diverged: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._model_identity: str | None = None
        self._model_name, self._device = task.model, task.device
        queries = _queries(task, self.splits["test"])
        self.records = Records(plan.journal, self._facts(), queries)
        self.filling = Filling(task, self.records, plan.views, plan.tell)
        self.foresight = Foresight(self.build, task, plan, self.records)
        self.outcome = Outcome(task, plan, self.records, self.filling)
        if any(self._searches(level) for level in self.levels):
            require_optuna()
        self.spending = self._spending()

    def _spending(self) -> Spending | None:
        if self.plan.budget is None:
            return None
        recipes = {level: asdict(self.task.recipe(level, share_of(level))) for level in self.levels}
        asked = {"levels": list(self.levels), "seeds": list(self.seeds), "search": self.plan.search, "recipes": recipes}
        if self.plan.max_bytes is not None:
            asked["max_bytes"] = parse_bytes(self.plan.max_bytes)
        gone = 0.0 if self.plan.began is None else time.monotonic() - self.plan.began
        gone = max(gone, time.perf_counter() - self.began)
        return Spending(parse_budget(self.plan.budget), self.records, asked, used=gone)

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
        """Each level as it is finished, the most recycled first.

        Raises:
            BudgetError: it was too short for any level.
        """
        if self.spending is None:
            yield from self._rows()
            return
        work = self._rows()
        try:
            while True:
                with self.spending.running():  # what a user does with a row takes nothing of the budget
                    row = next(work, None)
                if row is None:
                    return
                yield row
        except TimeIsUp:
            raise self.spending.used_up() from None
        finally:
            work.close()

    def _rows(self) -> Generator[LevelResult, None, None]:
        self._decide()
        found, self._diverged = 0, {}
        self._turns = Turns((tuple(reversed(self.levels)),))
        todo = [level for level in self.levels if not self._is_done(level) and self._has_time(level)]
        with ExitStack() as stack:
            runners = self._prepared(todo, stack)
            for level in self._order:
                if level in todo:
                    self._finish(level, todo, runners, stack)
                elif words := self._lost(level):
                    self._tell_lost(level, words)
                elif self._is_done(level):
                    self.plan.tell(f"{in_words(level)}: was finished before")
                if self._has_row(level) if self.spending is not None else level not in self._diverged:
                    found += 1
                    yield self._level(level)
        if not found and self._diverged:
            raise SweepError(" ".join(self._diverged.values()))
        if self.spending is not None and not found:
            raise self.spending.used_up()

    def _tell_lost(self, level: str, words: str) -> None:
        self._diverged[level] = words
        self.plan.tell(words)

    def _lost(self, level: str) -> str | None:
        """How a level has diverged, as the journal has it; None if it has not."""
        try:
            list(self._trials(level, self.place(level), None, whole=False))
        except _DivergedError as error:
            return str(error)
        except MissingRecordError:
            return None
        return None

    @property
    def _order(self) -> tuple[str, ...]:
        """In which levels are trained: those that are kept at once one after another, full training last."""
        recycled = tuple(level for level in self._turns.order if level != "full")
        return (*recycled, *(level for level in self.levels if level == "full"))

    def _prepared(self, todo: list[str], stack: ExitStack) -> dict[str, Runner]:
        """What comes before the first level; where time is up meanwhile, nothing is left to do."""
        runners: dict[str, Runner] = {}
        try:
            recycled = [level for level in todo if level != "full"]
            if recycled:
                self._turns = self._turns_taken()
                runners = self._begun(next(level for level in self._order if level in recycled), recycled, stack)
            self._untrained(runners.get("head"))
        except TimeIsUp:
            self.plan.tell("the budget is used up; what is filled is kept")
            todo.clear()
        return runners

    def _finish(self, level: str, todo: Sequence[str], runners: dict[str, Runner], stack: ExitStack) -> None:
        """All that a level still needs, as far as there is time."""
        runner = runners.pop(level, None)
        try:
            if self._has_time(level):
                if level != "full" and runner is None:
                    runners.update(self._begun(level, todo, stack))
                    runner = runners.pop(level)
                runner = runner or Runner(self.task, level, None, self.build())
                self._run(level, runner)
        except _DivergedError as error:
            self._tell_lost(level, str(error))
        except TimeIsUp:
            self.plan.tell(f"{in_words(level)}: the budget is used up; of what was under way nothing is kept")
        finally:
            if runner is not None:
                runner.release()

    # -- what is predicted, and the budget -----------------------------------------------------------------------------

    def _decide(self) -> None:
        """What will be done, and what it will take."""
        spending, plan = self.spending, self.plan
        if spending is None:
            self._foresee()
            return
        self.foresight.recall(self.levels)
        if spending.plan is not None:
            return
        spending.predicted(lambda: self._without_room(self._measured_for_budget()))
        recipes = {level: self.task.recipe(level, share_of(level)) for level in self.levels}
        decided = spending.decide(
            recipes,
            {level: self._searches(level) for level in self.levels},
            objects={name: len(split) for name, split in self.splits.items()},
            seeds=self.seeds,
            rates=self.rates,
            is_finished=self._is_finished_under,
            is_whole=self._is_whole_under,
        )
        self.seeds, self.rates = decided.seeds, decided.rates
        self._earlier = {
            level: one
            for one in spending.earlier
            for level in one.levels
            if level in self.levels and one != decided and self._is_finished_under(one, level)
        }
        self.levels = tuple(level for level in self.levels if level in decided.levels or level in self._earlier)
        used = spending.before
        plan.tell(str(decided) + (f"; {duration_in_words(used)} of it were used before" if used >= 1 else ""))

    @contextmanager
    def _under(self, plan: Plan) -> Iterator[None]:
        """As if another plan were followed: that of another budget."""
        spending, before = self.spending, (self.seeds, self.rates)
        assert spending is not None
        own = spending.plan
        spending.plan, self.seeds, self.rates = plan, plan.seeds, plan.rates
        try:
            yield
        finally:
            spending.plan, (self.seeds, self.rates) = own, before

    def _is_finished_under(self, plan: Plan, level: str) -> bool:
        with self._under(plan):
            return self._has_own_row(level)

    def _is_whole_under(self, plan: Plan, level: str) -> bool:
        with self._under(plan):
            return self._is_whole(level)

    def _measured_for_budget(self) -> tuple[Prediction, ...]:
        return self.foresight.measure(("full", *(level for level in self.levels if level != "full")))

    def _without_room(self, predictions: Sequence[Prediction]) -> tuple[Prediction, ...]:
        """The same where a level whose rows have no room fills nothing, and computes its frozen layers in each
        epoch."""
        return tuple(
            each
            if each.frozen_epoch_seconds is None or self._is_to_be_kept(each.level)
            else replace(each, epoch_seconds=each.frozen_epoch_seconds, fill_seconds=0.0, bytes_kept=0)
            for each in predictions
        )

    def _foresee(self) -> None:
        """Without a budget: what is still to be done is predicted, if that is wanted or cheap."""
        if self.plan.predict is False:
            return
        unknown = self.foresight.recall(self.levels)
        todo = [level for level in self.levels if level in unknown and not self._is_done(level)]
        if not todo:
            return
        if self.plan.predict:
            self.foresight.measure(todo)
        elif rounds := cheap_rounds([self._planned(level) for level in todo], self._batches_filled()):
            self._measure_if_possible(todo, rounds)

    def _measure_if_possible(self, levels: Sequence[str], rounds: int | None = None) -> None:
        """Nobody has asked for it: a `fit` that cannot be measured can be trained with all the same."""
        try:
            self.foresight.measure(levels, rounds)
        except Exception as error:
            self.plan.tell(f"nothing is predicted, since that raised {type(error).__name__}: {error}")

    def _planned(self, level: str) -> Planned:
        recipe = self._recipe(level, share_of(level))
        rates = self.rates if self._searches(level) else 1
        epochs = planned_epochs(recipe, level, seeds=len(self.seeds), rates=rates)
        return Planned(level, epochs, math.ceil(len(self.splits["train"]) / max(1, recipe.batch_size)))

    def _batches_filled(self) -> float:
        views = {"train": self.plan.views or 1}
        objects = sum(len(split) * views.get(name, 1) for name, split in self.splits.items())
        return objects / self.task.evaluation_batch

    def _has_time(self, level: str) -> bool:
        """Whether a level may be begun; said, if not."""
        spending = self.spending
        if spending is None or spending.plan is None or spending.level_fits(level, spending.plan.epochs[level]):
            return True
        self.plan.tell(f"{in_words(level)}: left out, since {duration_in_words(spending.left)} are too little for it")
        return False

    def _later(self, level: str) -> list[str]:
        """Levels that come after one and are not finished."""
        return [each for each in self._order[self._order.index(level) + 1 :] if not self._is_done(each)]

    def _recipe(self, level: str, share: float) -> Recipe:
        """How a level is trained if no other rate is found: the task's, with fewer epochs where time is short."""
        recipe = self.task.recipe(level, share)
        if self.spending is None or self.spending.plan is None:
            return recipe
        return replace(recipe, epochs=min(recipe.epochs, self.spending.plan.epochs.get(level, recipe.epochs)))

    def _searches(self, level: str) -> bool:
        """Whether a rate is looked for."""
        return self.plan.search and "validation" in self.splits and not self.task.rate_is_given(level)

    # -- what is finished ----------------------------------------------------------------------------------------------

    def place(self, level: str) -> Place:
        """Where a level is cut, as it is asked for now: with rows that are kept, or without.

        Raises:
            MissingRecordError: it was not attached so yet.
        """
        return self.records.place(level, is_kept=self._is_to_be_kept(level))

    def _is_to_be_kept(self, level: str) -> bool:
        """Whether its rows are, under what is asked now: whatever a finished training was asked with."""
        if level == "full":
            return True  # it has none
        if _is_switched_off():
            return False
        return self.plan.max_bytes is None or self._size(level) <= parse_bytes(self.plan.max_bytes)

    def _size(self, level: str) -> int:
        """Bytes that the rows of a recycled level will take, from a few; looked at once, and then known."""
        if level in self._sizes:
            return self._sizes[level]
        cut = self.task.cuts.get(level)
        facts = {"kind": "size", "level": level, **({} if cut is None else {"cut": cut})}
        try:
            size = self.records.known(**facts)["bytes"]
        except MissingRecordError:
            with ExitStack() as stack:
                recycling = attach(self.task, self.build(), level, cut, MemoryStore(), self._options())
                stack.callback(recycling.detach)
                size = self.filling.expected_bytes(recycling)
            self.records.write({"bytes": size}, **facts)
        self._sizes[level] = size
        return size

    def _has_row(self, level: str) -> bool:
        """Whether there is anything to be told of a level: of what is planned now, or of an earlier plan."""
        return level in self._earlier or self._has_own_row(level)

    def _has_own_row(self, level: str) -> bool:
        """Whether there are a training and what it is compared with."""
        try:
            place = self.place(level)
            if place.cut is not None:
                self._frozen_epoch(level, self.task.recipe(level, place.share), None)
            return any(trial.purpose == "final" for trial in self._known_trials(level, place))
        except (MissingRecordError, _DivergedError):
            return False

    def _known_trials(self, level: str, place: Place) -> list[Trial]:
        """Those in the journal: all of them, unless there was no time for some.

        Raises:
            MissingRecordError: one is not there.
        """
        return list(self._trials(level, place, None, whole=self.spending is None))

    def _is_done(self, level: str) -> bool:
        """Whether nothing is to be done at a level."""
        return not self._is_planned(level) or self._is_whole(level)

    def _is_planned(self, level: str) -> bool:
        """Whether it is of what is planned now, and not shown from an earlier plan alone."""
        return self.spending is None or self.spending.plan is None or level in self.spending.plan.levels

    def _is_whole(self, level: str) -> bool:
        try:
            place = self.place(level)
            list(self._trials(level, place, None))
            if place.cut is not None:
                self._frozen_epoch(level, self.task.recipe(level, place.share), None)
        except MissingRecordError:
            return False
        except _DivergedError:
            return True  # it would again
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
                    "valid cut: leave one of them out (levels=..., or --levels of the command), and see cuts(model, "
                    f"example), or torchrecycle cuts --model {self._model_name}"
                )
            cuts[recycling.cut] = level
        return runners

    def _places(self, others: Sequence[str]) -> dict[str, Place]:
        """Of recycled levels but these, as far as they are known: with rows or without, they are cut alike."""
        found: dict[str, Place] = {}
        for level in self.levels:
            for is_kept in (True, False) if level not in others and level != "full" else ():
                with suppress(MissingRecordError):
                    found.setdefault(level, self.records.place(level, is_kept=is_kept))
        return found

    def _attached(self, level: str, model: nn.Module, cut: str | None, stack: ExitStack) -> Runner:
        if self._store is None:
            self._store = open_limited(self.plan.store, self.plan.max_bytes)
        recycling = attach(self.task, model, level, cut, self._store, self._options())
        stack.callback(recycling.detach)
        return Runner(self.task, level, recycling, model)

    def _options(self) -> dict[str, Any]:
        views = {} if self.plan.views is None else {"views": self.plan.views}
        return {"precision": self.plan.precision, **views}

    def _tell_of_others(self, runners: Mapping[str, Runner]) -> None:
        recyclings = [runner.recycling for runner in runners.values() if runner.recycling is not None]
        ours = {place.fingerprint for place in self._places(list(runners)).values() if place.fingerprint}
        others = set(recyclings[0].store.fingerprints()) - ours - {each.fingerprint for each in recyclings}
        if isinstance(self._store, OwnRows):  # which may drop those of its own levels for others
            self._store.own.update(ours)
        if others:
            limited = "" if self.plan.max_bytes is None else ", and not counted in the bytes that may be taken"
            self.plan.tell(
                f"the store {self.plan.store} holds rows of {len(others)} other models or cuts too: they are not "
                f"used, and left as they are{limited}"
            )

    def _turns_taken(self) -> Turns:
        """Which levels are kept at once, of all that were asked for: the same again after a sweep was killed."""
        recycled = [level for level in self._order if level != "full"]
        if self.plan.max_bytes is None:
            return Turns((tuple(recycled),))
        limit = parse_bytes(self.plan.max_bytes)
        facts = {"levels": recycled, "max_bytes": limit, "epochs": {x: self._planned(x).epochs for x in recycled}}
        if self.plan.predict is False:
            facts["predict"] = False
        try:
            turns = turns_from_json(self.records.known(kind="turns", **facts)["turns"])
        except MissingRecordError:
            turns = self._decided_turns(recycled, limit)
            self.records.write({"turns": asdict(turns)}, kind="turns", **facts)
        for line in turns.said:
            self.plan.tell(line)
        return turns

    def _decided_turns(self, levels: Sequence[str], limit: int) -> Turns:
        """
        Args:
            levels: the most recycled first.
            limit: bytes that the store may take.
        """
        sizes = {level: self._size(level) for level in levels}
        return turns_of(sizes, limit, None if fit_together(sizes, limit) else self._candidates(levels))

    def _candidates(self, levels: Sequence[str]) -> tuple[Candidate, ...] | None:
        """What the rows of each level save over the planned epochs; None if that is not known."""
        if self.plan.predict is False:
            return None
        self._measure_if_possible(list(reversed(levels)), LEAST_ROUNDS)
        known = self.foresight.of(list(reversed(levels)))
        if len(known) < len(levels):
            return None
        return candidates(known, {level: self._planned(level).epochs for level in levels}, nested=False)

    def _begun(self, level: str, todo: Sequence[str], stack: ExitStack) -> dict[str, Runner]:
        """A level and those that are kept with it, attached and filled; one without room is attached only."""
        turns = self._turns
        group = next((group for group in turns.groups if level in group), (level,))
        runners = self.attach([each for each in self.levels if each in group and each in todo], stack)
        if level in turns.too_large:
            runners[level].keep_nothing()
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
            began = time.perf_counter()
            found = self.task.judged(runner.model, loader, split, queries, known)
            seconds = time.perf_counter() - began
        if self.spending is not None and (runner.level != "untrained" or runner.recycling is not None):
            level = None if runner.level == "untrained" else runner.level
            self.spending.evaluated(level, on_test=shown, seconds=seconds)
        return found

    # -- a level -------------------------------------------------------------------------------------------------------

    def _run(self, level: str, runner: Runner) -> None:
        """All that a level still needs, told of and kept."""
        place = self._place(level, runner)
        if place.cut is not None:
            self._frozen_epoch(level, self.task.recipe(level, place.share), runner)
        for trial in self._trials(level, place, runner):
            self.plan.tell(_told(trial, self.outcome.metric))

    def _place(self, level: str, runner: Runner) -> Place:
        is_kept = runner.recycling is None or not runner.recycling.off
        with suppress(MissingRecordError):
            return self.records.place(level, is_kept=is_kept)
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
        seconds = self._frozen_steps(level, recipe, runner)
        self.records.keep_frozen_seconds(level, recipe, seconds)
        return seconds

    def _frozen_steps(self, level: str, recipe: Recipe, runner: Runner) -> float:
        recycling, batches = runner.recycling, _batches_of_a_step(self.task)
        assert recycling is not None
        kept = runner.training_loader(recipe, 0) if runner.is_filled and not recycling.off else None
        with recycling.paused():
            raw = runner.training_loader(recipe, 0)
        device = next((parameter.device for parameter in runner.model.parameters()), torch.device("cpu"))
        steps = FrozenSteps(raw, kept, recycling.paused, batches=batches, device=device)
        try:
            with progress(f"{in_words(level)}, no store", steps.epochs * len(steps), "batches") as shown, _seeded(0):
                short = replace(recipe, epochs=steps.epochs)
                trial = RunningTrial(level, runner.share, short, 0, tuple(runner.trained))
                self.task.fit(runner.model, Counted(steps, shown.advance), trial)
        finally:
            steps.close()
        runner.restart()
        return steps.seconds or trial.seconds  # a fit may have left its loader before the end

    def _trials(self, level: str, place: Place, runner: Runner | None, *, whole: bool = True) -> Iterator[Trial]:
        """All trainings of a level, in order; without a runner they must all be in the journal.

        Args:
            level: whose.
            place: where it is cut.
            runner: trains those that are missing, as far as there is time.
            whole: whether all of them must be there, if there is no runner.

        Raises:
            MissingRecordError: one is not, and there is no runner.
        """
        recipe = self._recipe(level, place.share)
        if self._searches(level) and self.rates > 1:
            recipe = yield from self._search(level, place, recipe, runner, whole)
        for number, seed in enumerate(self.seeds):
            try:
                yield self._final(level, place, recipe, seed, runner, optional=number > 0)
            except (_NoTimeError, MissingRecordError) as error:
                if isinstance(error, MissingRecordError) and whole:
                    raise
                return

    def _search(
        self, level: str, place: Place, recipe: Recipe, runner: Runner | None, whole: bool
    ) -> Generator[Trial, None, Recipe]:
        """Trainings that look for a rate; returns the recipe with the one that was found."""
        short = replace(recipe, epochs=search_epochs(recipe.epochs, level))
        halving, before = Halving(epochs=short.epochs, rates=self.rates), []
        while (attempt := halving.ask()) is not None:
            candidate = scaled(short, level, attempt.factor)
            try:
                trial = self._tried(place, candidate, tuple(before), attempt, recipe.epochs, level, runner)
            except (_NoTimeError, MissingRecordError) as error:
                if isinstance(error, MissingRecordError) and whole:
                    raise
                halving.tell(attempt, stopped=True)
                break
            settle(attempt, trial, self.outcome.metric)
            halving.tell(attempt)
            before.append(rate_of(candidate, level))
            yield trial
        self._refuse_diverged(halving, level, recipe)
        return chosen(halving.best(), recipe, level)

    def _refuse_diverged(self, halving: Halving, level: str, recipe: Recipe) -> None:
        if halving.tried and all(tried.state == "diverged" for tried in halving.tried):
            rates = [rate_of(scaled(recipe, level, tried.factor), level) for tried in halving.tried]
            raise _DivergedError(
                f"{in_words(level)} diverged at all rates that were tried, from {min(rates):g} to {max(rates):g}: the "
                "loss or an output was no finite number. Is there NaN in the data or in the weights? Else give a lower "
                f"rate. {_HOW_TO_GIVE_A_RATE}"
            )

    def _tried(
        self,
        place: Place,
        recipe: Recipe,
        before: Sequence[float],
        attempt: Attempt,
        epochs: int,
        level: str,
        runner: Runner | None,
    ) -> Trial:
        """A training with a rate, after those with others."""
        key = self.records.trial_key(level, place, recipe, 0, "search", tried=list(before))
        with suppress(MissingRecordError):
            return self.records.trial(key)
        if runner is None:
            raise MissingRecordError
        spending = self.spending
        if spending is not None and not spending.attempt_fits(level, epochs, recipe.epochs, self._later(level)):
            self.plan.tell(f"{in_words(level)}: no time for further rates after {len(before)}")
            raise _NoTimeError
        trial = self._train(recipe, 0, "search", runner, attempt)
        self.records.keep_trial(key, trial)
        return trial

    def _final(
        self, level: str, place: Place, recipe: Recipe, seed: int, runner: Runner | None, *, optional: bool
    ) -> Trial:
        """A training that is reported.

        Args:
            level: whose.
            place: where it is cut.
            recipe: with the rate that was found.
            seed: of the training.
            runner: trains it if it is not in the journal.
            optional: whether there is one with another seed already, so that other levels come before it.
        """
        key = self.records.trial_key(level, place, recipe, seed, "final")
        with suppress(MissingRecordError):
            return self.records.trial(key)
        if words := self.records.diverged(key):
            raise _DivergedError(words)
        if runner is None:
            raise MissingRecordError
        later = self._later(level) if optional else ()
        if self.spending is not None and not self.spending.training_fits(level, recipe.epochs, later):
            self.plan.tell(f"{in_words(level)}: no time for seed {seed}")
            raise _NoTimeError
        try:
            return self.train_and_keep(place, recipe, seed, "final", runner)
        except _DivergedError as error:
            self.records.keep_diverged(key, str(error))
            raise

    def train_and_keep(self, place: Place, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner) -> Trial:
        """One training, kept in the journal, and its weights if they are asked for."""
        trial = self._train(recipe, seed, purpose, runner)
        key = self.records.trial_key(runner.level, place, recipe, seed, purpose)
        if self.plan.weights is not None and purpose == "final":
            _keep_weights(runner.model, self.plan.weights / f"{key}.safetensors")
        self.records.keep_trial(key, trial)
        return trial

    def _train(
        self, recipe: Recipe, seed: int, purpose: Purpose, runner: Runner, attempt: Attempt | None = None
    ) -> Trial:
        """
        Args:
            recipe: with its rate.
            seed: of the training.
            purpose: whether it is judged on the validation split at rungs, or on the test split at the end.
            runner: whose model is trained, from its first weights.
            attempt: of a search, to be told of each rung.

        Raises:
            SweepError: a training that is to be reported has diverged, which ends its level.
        """
        level, metric = runner.level, self.outcome.metric
        runner.restart()
        asked = set(rungs(recipe.epochs)) if purpose == "search" else _epochs_to_judge(recipe.epochs)

        def judge(epoch: int) -> float | None:
            if epoch not in asked:
                return None
            return self._evaluated(runner, self.judged, shown=False).quality[metric]

        running, epochs = self._fitted(recipe, seed, purpose, runner, judge, attempt)
        curve, untold = running.curve, (running.seconds, epochs)
        told: dict[str, Any] = {} if curve else {"untold_seconds": untold[0], "untold_epochs": untold[1]}
        if attempt is not None:
            return self._searched(Trial(level, purpose, seed, recipe, curve, {}, {}, **told), runner)
        if curve and not math.isfinite(curve[-1].loss):
            raise self._diverging(level, recipe, seed, f"the loss was no finite number in epoch {curve[-1].epoch}")
        try:
            found = self._evaluated(runner, self.splits["test"])
        except NotFiniteError as error:
            raise self._diverging(level, recipe, seed, f"what it gives for the test split: {error}") from error
        return Trial(level, purpose, seed, recipe, curve, found.quality, scores_of(found), found.found, **told)

    def _diverging(self, level: str, recipe: Recipe, seed: int, how: str) -> _DivergedError:
        rate = rate_of(recipe, level)
        if self._searches(level) and self.rates > 1:
            what_to_do = "That was the rate that did best on the validation split, with seed 0: give a lower one."
        else:
            what_to_do = "Give a lower rate, or let the sweep look for one on a validation split."
        return _DivergedError(
            f"{in_words(level)} diverged at a rate of {rate:g} with seed {seed}: {how}. {what_to_do} "
            f"{_HOW_TO_GIVE_A_RATE}"
        )

    def _searched(self, trial: Trial, runner: Runner) -> Trial:
        """With its quality on the validation split; 0 for one that has diverged, which its curve says."""
        if diverged(trial):
            return replace(trial, quality={self.outcome.metric: 0.0})
        quality = trial.curve[-1].quality if trial.curve else None
        if quality is not None:
            return replace(trial, quality={self.outcome.metric: quality})
        try:  # of a fit that tells of no epochs, or stopped by itself
            found = self._evaluated(runner, self.judged, shown=False)
        except NotFiniteError:
            epoch = len(trial.curve) + 1
            lost = EpochPoint(epoch, trial.seconds, math.nan, None)
            return replace(trial, curve=(*trial.curve, lost), quality={self.outcome.metric: 0.0})
        return replace(trial, quality={self.outcome.metric: found.quality[self.outcome.metric]})

    def _fitted(
        self,
        recipe: Recipe,
        seed: int,
        purpose: Purpose,
        runner: Runner,
        judge: Callable[[int], float | None],
        attempt: Attempt | None,
    ) -> tuple[RunningTrial, int]:
        """What became of it, and how often it went over its loader.

        Raises:
            SweepError: nothing was trained.
            _NoTimeError: it could not end in time.
        """
        level, whose, spending = runner.level, type(self.task).__name__, self.spending
        what = f"{in_words(level)}, " + (
            f"seed {seed}" if purpose == "final" else f"looking for a rate, {rate_of(recipe, level):g}"
        )
        late: list[EpochPoint] = []

        def go_on(point: EpochPoint) -> bool:
            wanted = attempt is None or report(attempt, point)
            if wanted and spending is not None and not spending.can_end(level, point, recipe.epochs):
                late.append(point)
            return wanted and not late

        loader = runner.training_loader(recipe, seed)
        with progress(what, recipe.epochs * len(loader), "batches") as shown, _seeded(seed):
            batches = Counted(loader, shown.advance)
            running = RunningTrial(level, runner.share, recipe, seed, tuple(runner.trained), judge=judge, go_on=go_on)
            self.task.fit(runner.model, batches, running)
            running.stop_clock()
        if spending is not None:
            spending.measured(level, running.seconds / max(1, len(running.curve) or batches.epochs))
        if late:
            self.plan.tell(
                f"{what}: stopped after epoch {late[0].epoch} of {recipe.epochs}, since it is slower than expected; "
                "nothing is kept of it"
            )
            raise _NoTimeError
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
        plan = None if self.spending is None else self.spending.plan
        diverged = tuple(self._diverged.values())
        work = Work(self._model_name, self._device, self.began, self.seeds, self._predictions, plan, diverged)
        return self.outcome.result(levels, work)

    def _level(self, level: str) -> LevelResult:
        if level in self._earlier and not self._has_own_row(level):
            with self._under(self._earlier[level]):
                return self._row(level)
        return self._row(level)

    def _row(self, level: str) -> LevelResult:
        place = self.place(level)
        frozen = None if place.cut is None else self._frozen_epoch(level, self.task.recipe(level, place.share), None)
        predicted = next((each for each in self._predictions if each.level == level), None)
        filled, expected = self.filling.together(level), self.foresight.together(level)
        return self.outcome.level(
            level,
            place,
            self._known_trials(level, place),
            frozen,
            predicted,
            filled_as_predicted=not filled or not expected or filled == expected,
        )

    @property
    def _predictions(self) -> tuple[Prediction, ...]:
        own = self.foresight.of(self.levels) if self.spending is None else self.spending.predictions
        return (*self._without_room(own), *self.foresight.others(self.levels))


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


def _is_switched_off() -> bool:
    return os.environ.get("TORCHRECYCLE", "").lower() == "off"


def _refuse_switched_off() -> None:
    if _is_switched_off():
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
        what = f"{in_words(trial.level)}: rate {rate_of(trial.recipe, trial.level):g}"
        if diverged(trial):
            return f"{what} diverges"
        epochs = len(trial.curve) or trial.untold_epochs
        short = (
            "" if epochs >= trial.recipe.epochs else f", and was left after {epochs} of {trial.recipe.epochs} epochs"
        )
        return f"{what} gives {metric} {trial.quality[metric]:.3f} on the validation split{short}"
    return (
        f"{in_words(trial.level)}, seed {trial.seed}: {_figures(trial.quality)}, {trial.epoch_seconds:.2f} s per epoch"
    )
