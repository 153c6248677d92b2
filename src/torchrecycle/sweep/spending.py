"""A sweep's budget at work: what is planned, what has been used, and whether there is time for more.

    spending = Spending(20 * 60.0, records, levels=("full", "50", "head"), ...)
    with spending.running():              # the clock runs; what is under way is stopped when time is up
        ...

Killed after 12 of 20 minutes, a sweep goes on with 8: the seconds used are kept in the journal while it runs, every
few seconds, together with what was predicted and planned. They are those of this task, these levels, seeds and recipes,
whatever the budget: who asks again with 30 minutes has 18 more. What another budget has finished is not planned anew
where there is no time for it.

What is optional (a further rate, a further seed) is started only if the first training of each level that is still to
come fits, too. A training that turns out to be slower than expected is stopped after an epoch, as soon as it cannot end
in time, and nothing is kept of it: with fewer epochs than its recipe has, it would be another training under its name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from torchrecycle.progress import watching
from torchrecycle.sweep.budget import (
    JUDGED,
    RESERVE,
    BudgetError,
    Clock,
    Cost,
    Plan,
    cost_of,
    duration_in_words,
    plan,
    plan_from_json,
)
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.records import MissingRecordError, Records
from torchrecycle.sweep.results import EpochPoint, Prediction

__all__ = ["Spending", "TimeIsUp"]

KEPT_EVERY = 3.0
"""Seconds after which what has been used is kept: so much may be lost where a process is killed."""
CLOSING, MOST_CLOSING = 0.03, 10.0
"""Of the budget, and in seconds: left to say what came out."""


class TimeIsUp(BaseException):
    """Ends what is under way; no ``except Exception`` of a user's loop keeps it. Never leaves a sweep."""


class Spending:
    """The budget of one sweep.

    Args:
        budget: seconds, of the whole sweep.
        records: where it is kept what has been used.
        asked: what tells this sweep from others of its task: levels, seeds, and whatever else changes what it takes.
        used: seconds of this run that are gone already.
    """

    def __init__(self, budget: float, records: Records, asked: dict[str, object], *, used: float = 0.0) -> None:
        self.budget, self._records, self._asked = budget, records, asked
        self.before = self._used_before()
        """Seconds that earlier runs have used."""
        self._clock = Clock(budget, self.before + used)
        self._kept_at = 0.0
        self.costs: dict[str, Cost] = {}
        self.predictions: tuple[Prediction, ...] = ()
        self._once = 0.0
        self._scale = 1.0
        self.plan: Plan | None = None
        self.earlier: tuple[Plan, ...] = ()

    # -- the clock -----------------------------------------------------------------------------------------------------

    def _used_before(self) -> float:
        try:
            return self._records.known(kind="clock", **self._asked)["used"]
        except MissingRecordError:
            return 0.0

    @property
    def used(self) -> float:
        """Seconds, of all runs."""
        return self._clock.used

    @property
    def left(self) -> float:
        """Seconds in which something can still be done."""
        return max(0.0, self._clock.left - min(MOST_CLOSING, CLOSING * self.budget))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The clock runs, and what is under way is stopped by `TimeIsUp` once nothing is left.

        At the end, also after an error, what has been used is kept.
        """
        self._clock.go()
        try:
            with watching(self.tick):
                yield
        finally:
            self._clock.stop()
            self._keep()

    def tick(self) -> None:
        """
        Raises:
            TimeIsUp: nothing is left.
        """
        if time.monotonic() - self._kept_at > KEPT_EVERY:
            self._keep()
        if self.left <= 0:
            raise TimeIsUp

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        self._records.write({"used": self.used}, kind="clock", **self._asked)

    # -- the plan ------------------------------------------------------------------------------------------------------

    def predicted(self, predict: Callable[[], tuple[Prediction, ...]]) -> tuple[Prediction, ...]:
        """What each level is predicted to take: measured once, and then known.

        Args:
            predict: measures it.
        """
        try:
            record = self._records.known(kind="predictions", **self._asked)
        except MissingRecordError:
            self.predictions = predict()
            told = [asdict(each) for each in self.predictions]
            self._once = self.used
            self._records.write({"predictions": told, "seconds": self._once}, kind="predictions", **self._asked)
        else:
            self.predictions = tuple(Prediction(**each) for each in record["predictions"])
            self._once = record["seconds"]
        return self.predictions

    def decide(
        self,
        recipes: dict[str, Recipe],
        searches: dict[str, bool],
        *,
        objects: dict[str, int],
        seeds: Sequence[int],
        rates: int,
        is_finished: Callable[[Plan, str], bool] = lambda plan, level: False,
        is_whole: Callable[[Plan, str], bool] = lambda plan, level: False,
    ) -> Plan:
        """The best use of the whole budget, from what was predicted: the same in each run.

        Where another budget has finished levels already, and there is no time to do better, they stay as they are, and
        the others are planned with what is left.

        Args:
            recipes: of each level that was asked for.
            searches: whether a rate is looked for there.
            objects: of each split.
            seeds: that were asked for.
            rates: at most so many are tried.
            is_finished: whether a level was trained as an earlier plan has it.
            is_whole: whether nothing is missing of it.

        Raises:
            BudgetError: it is too short for anything.
        """
        judged = objects.get("validation", objects["test"])
        self._scale = min(1.0, judged / max(1, objects["test"]))
        by_level = {each.level: each for each in self.predictions}
        self.costs = {
            level: cost_of(by_level[level], recipe, judged=judged, tested=objects["test"], searches=searches[level])
            for level, recipe in recipes.items()
        }
        self.earlier = self._earlier_plans()
        known = next((one for one in self.earlier if one.budget == self.budget), None)
        if known is not None:
            self.plan = known
            return known
        filling = max((by_level[level].fill_seconds for level in recipes), default=0.0)
        filling *= sum(objects.values()) / objects["train"]
        before = self._once + filling
        before += max(cost.tested_seconds for cost in self.costs.values())  # of the pretrained model

        def planned(levels: Iterable[str], budget: float, once: float) -> Plan:
            return plan([self.costs[level] for level in levels], budget, seeds=seeds, rates=rates, once=once)

        finished = {level for one in self.earlier for level in one.levels if is_finished(one, level)}
        if finished:
            self.plan = self._beside(finished, planned, before, filling, is_whole)
        else:
            self.plan = planned(self.costs, self.budget, before)
        kept = [asdict(one) for one in (*self.earlier, self.plan)]
        self._records.write({"plans": kept}, kind="plans", **self._asked)
        return self.plan

    def _earlier_plans(self) -> tuple[Plan, ...]:
        """What was planned with each budget, in the order in which they were given."""
        with suppress(MissingRecordError):
            return tuple(map(plan_from_json, self._records.known(kind="plans", **self._asked)["plans"]))
        return ()

    def _beside(
        self,
        finished: set[str],
        planned: Callable[[Iterable[str], float, float], Plan],
        before: float,
        filling: float,
        is_whole: Callable[[Plan, str], bool],
    ) -> Plan:
        """A plan for the whole budget, if there is time for what is missing of it; else one for the other levels."""
        with suppress(BudgetError):
            larger = planned(self.costs, self.budget, before)
            missing = [level for level in larger.levels if not is_whole(larger, level)]
            needed = sum(
                self.costs[level].seconds(larger.epochs[level], seeds=len(larger.seeds), rates=larger.rates)
                for level in missing
            )
            if not missing or needed + filling <= (1 - RESERVE) * self.left:
                return larger
        others = [level for level in self.costs if level not in finished]
        with suppress(BudgetError):
            if others:
                return replace(planned(others, self.left, filling), budget=self.budget)
        return replace(self.earlier[-1], budget=self.budget)

    def used_up(self) -> BudgetError:
        """What is said where not one level was trained."""
        return BudgetError(
            f"the budget of {duration_in_words(self.budget)} left no time to train one level. It is for the "
            f"whole sweep, earlier runs included, which have used {duration_in_words(self.used)} of it. What is filled "
            "and trained is kept: give a larger budget, and the sweep goes on from there"
        )

    # -- is there time for it? -----------------------------------------------------------------------------------------

    def measured(self, level: str, epoch_seconds: float) -> None:
        """What an epoch has really taken, which counts from now on."""
        if epoch_seconds > 0:
            self.costs[level] = replace(self.costs[level], epoch_seconds=epoch_seconds)

    def evaluated(self, level: str | None, *, on_test: bool, seconds: float) -> None:
        """What judging has really taken, which counts from now on.

        Args:
            level: of whose model; None for the pretrained one from the rows of the head, which no level undercuts.
            on_test: whether on the test split; else on what is judged on during a training.
            seconds: that it took.
        """
        for name, cost in self.costs.items():
            if level is None:
                tested, judged = max(cost.tested_seconds, seconds), max(cost.judged_seconds, self._scale * seconds)
                self.costs[name] = replace(cost, tested_seconds=tested, judged_seconds=judged)
            elif level == name:
                figure = {"tested_seconds": seconds} if on_test else {"judged_seconds": seconds}
                self.costs[name] = replace(cost, **figure)

    def training_fits(self, level: str, epochs: int, later: Sequence[str] = ()) -> bool:
        """Whether a training may be started.

        Args:
            level: at which.
            epochs: of it.
            later: levels that are to be trained afterwards: where it can be done without, their first trainings come
                before it.
        """
        return self.costs[level].training_seconds(epochs) + self._first_trainings(later) <= self.left

    def level_fits(self, level: str, epochs: int) -> bool:
        """Whether a level may be begun: its first training, and what comes before it."""
        cost = self.costs[level]
        return cost.once_seconds + cost.training_seconds(epochs) <= self.left

    def attempt_fits(self, level: str, epochs: int, search: int, later: Sequence[str] = ()) -> bool:
        """Whether a rate may be tried, so that the level's training and those of others still fit.

        Args:
            level: at which.
            epochs: of the training that comes after it.
            search: epochs of the attempt, if it runs through.
            later: levels that are to be trained afterwards.
        """
        cost = self.costs[level]
        needed = cost.attempt_seconds(search) + cost.training_seconds(epochs)
        return needed + self._first_trainings(later) <= self.left

    def _first_trainings(self, levels: Sequence[str]) -> float:
        assert self.plan is not None
        costs = [(self.costs[level], self.plan.epochs[level]) for level in levels]
        return sum(cost.once_seconds + cost.training_seconds(epochs) for cost, epochs in costs)

    def can_end(self, level: str, point: EpochPoint, epochs: int) -> bool:
        """Whether a training that stands there will end in time.

        Args:
            level: at which.
            point: where it stands.
            epochs: of it, in all.
        """
        cost, left = self.costs[level], epochs - point.epoch
        if left <= 0:
            return True
        judging = min(left, math.ceil(JUDGED * left / epochs)) * cost.judged_seconds
        return left * point.seconds / point.epoch + judging + cost.tested_seconds <= self.left
