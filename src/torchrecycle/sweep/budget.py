"""The best use of so much time: which levels, seeds, rates and epochs fit, and a clock that says when to stop.

Cars, three seeds, a budget of 20 minutes: an epoch is predicted to take 62 s in full training, 9 s at 50 %, 6 s at 75 %
and 0.4 s for the head, and five minutes go by before the first, until all splits are filled. Full training would need
16 minutes for one seed: it is the first to go, and is expected from the others (`torchrecycle.sweep.expect`). The
others with all seeds and five rates each take 15 minutes, filling included, which fits. Within 15 minutes two seeds
fit; within 10 one, without a search for rates; within 8 so much with two thirds of the epochs.

What is given up first is what the answer needs least: full training, which the others tell within a tenth of its gain;
then seeds, without which a figure is a bit less sure; then rates; then epochs, down to a quarter; only then levels, as
little of them as will do. Some of the time is held back, since what is predicted may be off by 15 %.

A plan is a function of what was predicted and of the whole budget, and not of what is left of it. A sweep that was
killed has the same plan again, finds in its journal what has ended, and goes on; the seconds used before count, since
the budget is for the whole sweep, and not for one run of it. Asked again with a larger budget it makes a larger plan,
if what is missing of that fits into what is left: with 34 of 38 seconds used, levels that are finished stay as they
are, and others are planned within the 4 that are left.

A clock keeps the plan: nothing is started that is not expected to fit into what is left, and what turns out to be
slower than expected is stopped in time.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrecycle.errors import RecycleError
from torchrecycle.sweep.frozen import epochs_of_frozen
from torchrecycle.sweep.halving import FACTORS, rungs, search_epochs
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Prediction, in_words

__all__ = [
    "RESERVE",
    "BudgetError",
    "Clock",
    "Cost",
    "Plan",
    "cost_of",
    "duration_in_words",
    "listed",
    "parse_budget",
    "plan",
    "plan_from_json",
]


class BudgetError(RecycleError, ValueError):
    """A budget is no time, or too short for anything."""


# -- durations ---------------------------------------------------------------------------------------------------------

_DURATION = re.compile(
    r"\s*(?:(?P<h>\d+(?:\.\d+)?)\s*h(?:ours?)?)?\s*(?:(?P<m>\d+(?:\.\d+)?)\s*m(?:in(?:utes?)?)?)?"
    r"\s*(?:(?P<s>\d+(?:\.\d+)?)\s*s(?:ec(?:onds?)?)?)?\s*",
    re.IGNORECASE,
)


def parse_budget(budget: str | float) -> float:
    """Seconds.

    Args:
        budget: seconds, or words with units: ``"30m"``, ``"1h30m"``, ``"90s"``, ``"1.5 h"``, ``"20 min"``. Who forgets
            the unit of 30 minutes would get nothing in 30 seconds.

    Raises:
        BudgetError: it is no duration, has no unit, or is not above zero.

    >>> parse_budget("30m"), parse_budget("1h30m"), parse_budget("90 s"), parse_budget(45)
    (1800.0, 5400.0, 90.0, 45.0)
    """
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        seconds = float(budget)
    else:
        seconds = _seconds_of(budget)
    if not (math.isfinite(seconds) and seconds > 0):
        raise BudgetError(f"a budget of {budget!r} leaves no time: give one above zero, such as 30m")
    return seconds


def _seconds_of(budget: object) -> float:
    found = _DURATION.fullmatch(budget) if isinstance(budget, str) else None
    if found is None or not any(found.groups()):
        if isinstance(budget, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", budget):
            given = budget.strip()
            raise BudgetError(f"a budget of '{given}' has no unit: give {given}m for minutes, {given}s for seconds")
        raise BudgetError(f"{budget!r} is no budget: give a time with its unit, such as 30m, 1h30m or 90s")
    hours, minutes, seconds = (float(found[unit] or 0) for unit in "hms")
    return 3600 * hours + 60 * minutes + seconds


def duration_in_words(seconds: float) -> str:
    """
    >>> duration_in_words(42.4), duration_in_words(119.7), duration_in_words(7330)
    ('42 s', '2 min', '2 h 3 min')
    """
    if round(seconds) < 100:
        return f"{round(seconds)} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


# -- what a level takes ------------------------------------------------------------------------------------------------

JUDGED = 6
"""How often a training is judged on the validation split."""
FORWARD = 0.5
"""Of the seconds of training on an object, at most so many are taken by judging one: forward without backward."""
AT_ONCE = 0.5
"""Seconds that an evaluation takes besides: figures, workers that start."""
ATTACHING = 3.0
"""Seconds until a level can begin: making a model, attaching it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a level takes, as it is predicted."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that are recycled, such as ``50``."""
    epochs: int
    """Of its recipe."""
    epoch_seconds: float
    """Wall seconds of an epoch of training."""
    judged_seconds: float
    """Of an evaluation on the validation split."""
    tested_seconds: float
    """Of one on the test split."""
    once_seconds: float
    """Besides all trainings, once: attaching, and the steps without a store."""
    searches: bool = True
    """Whether a rate is looked for."""

    def training_seconds(self, epochs: int) -> float:
        """Of one training that is reported, evaluations included."""
        return epochs * self.epoch_seconds + min(epochs, JUDGED) * self.judged_seconds + self.tested_seconds

    def attempt_seconds(self, epochs: int) -> float:
        """Of a rate that runs through all epochs of a search."""
        return epochs * self.epoch_seconds + len(rungs(epochs)) * self.judged_seconds

    def search_seconds(self, rates: int, epochs: int) -> float:
        """Of looking for a rate: two run through, the others end after an epoch."""
        if not self.searches or rates < 2:
            return 0.0
        return 2 * self.attempt_seconds(epochs) + (rates - 2) * (self.epoch_seconds + self.judged_seconds)

    def seconds(self, epochs: int, *, seeds: int, rates: int) -> float:
        """Of all that is done at the level."""
        search = self.search_seconds(rates, search_epochs(epochs, self.level))
        return self.once_seconds + search + seeds * self.training_seconds(epochs)


def cost_of(prediction: Prediction, recipe: Recipe, *, judged: int, tested: int, searches: bool = True) -> Cost:
    """What a level takes, from what was predicted of an epoch.

    Args:
        prediction: of the level.
        recipe: of the level.
        judged: objects of the validation split, or of what is judged on in its place.
        tested: objects of the test split.
        searches: whether a rate is looked for.
    """
    each = FORWARD * prediction.epoch_seconds / max(1, prediction.objects)
    once = ATTACHING
    if prediction.frozen_epoch_seconds is not None:
        once += prediction.frozen_epoch_seconds * epochs_of_frozen(prediction.objects / max(1, recipe.batch_size))
    return Cost(
        level=prediction.level,
        epochs=recipe.epochs,
        epoch_seconds=prediction.epoch_seconds,
        judged_seconds=AT_ONCE + judged * each,
        tested_seconds=AT_ONCE + tested * each,
        once_seconds=once,
        searches=searches,
    )


# -- the plan ----------------------------------------------------------------------------------------------------------

RATES = (len(FACTORS), 3, 1)
"""How many rates are tried: all, or the nearest three, or only the recipe's."""
SHORTEST = 0.25
"""Of a recipe's epochs, so many are trained at least before a level is given up for another."""
RESERVE = 0.15
"""Of the budget, held back: predictions may be off by so much."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done within a budget."""

    budget: float
    """Seconds."""
    levels: tuple[str, ...]
    """In the order in which they were given."""
    epochs: dict[str, int]
    """Of each of them, how many a training has."""
    seeds: tuple[int, ...]
    """Each level is trained with each."""
    rates: int
    """How many are tried at each level; 1 for the recipe's own, without a search."""
    seconds: float
    """What all of it is expected to take."""
    given_up: tuple[str, ...]
    """What is not done for want of time, in words; empty if all is done."""

    def __str__(self) -> str:
        """
        >>> print(Plan(1200.0, ("75", "head"), {"75": 5, "head": 30}, (0,), 5, 900.0, ("50 % recycled",)))
        within 20 min: 75 % recycled and head only, 1 seed, 5 rates each, in about 15 min; 50 % recycled is left out
        """
        rates = f"{self.rates} rates each" if self.rates > 1 else "no search for rates"
        parts = [
            listed(in_words(level) for level in self.levels),
            f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}",
        ]
        said = f"within {duration_in_words(self.budget)}: {', '.join([*parts, rates])}, in about "
        said += duration_in_words(self.seconds)
        verb = "is" if len(self.given_up) == 1 else "are"
        return said + (f"; {listed(self.given_up)} {verb} left out" if self.given_up else "")


def plan_from_json(record: Mapping[str, Any]) -> Plan:
    """The inverse of `dataclasses.asdict`."""
    lists = {name: tuple(record[name]) for name in ("levels", "seeds", "given_up")}
    return Plan(**{**record, **lists})


def listed(words: Iterable[str]) -> str:
    """In a row, as they are said; there is one at least.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to spend the time."""

    levels: tuple[Cost, ...]
    seeds: int
    rates: int
    share: float
    """Of each recipe's epochs."""

    def epochs(self, level: Cost) -> int:
        return max(1, round(self.share * level.epochs))

    def seconds(self) -> float:
        return sum(level.seconds(self.epochs(level), seeds=self.seeds, rates=self.rates) for level in self.levels)


def plan(
    costs: Sequence[Cost], budget: float, *, seeds: Sequence[int] = (0,), rates: int = len(FACTORS), once: float = 0.0
) -> Plan:
    """The best use of a budget.

    Args:
        costs: of each level that was asked for.
        budget: seconds, of the whole sweep.
        seeds: that were asked for; the first are kept.
        rates: at most so many are tried at each level; 1 for no search.
        once: seconds of what comes before any training: predicting, filling all splits, judging the pretrained model.

    Raises:
        BudgetError: not even the quickest level, for a single epoch, is expected to fit.
    """
    free = (1 - RESERVE) * budget - once
    whole = _Choice(tuple(costs), len(seeds), rates, 1.0)
    chosen = next((choice for choice in _choices(whole, free) if choice.seconds() <= free), None)
    if chosen is None:
        raise _too_short(whole, budget, once)
    return Plan(
        budget=budget,
        levels=tuple(level.level for level in chosen.levels),
        epochs={level.level: chosen.epochs(level) for level in chosen.levels},
        seeds=tuple(seeds[: chosen.seeds]),
        rates=chosen.rates,
        seconds=once + chosen.seconds(),
        given_up=_given_up(whole, chosen),
    )


def _choices(whole: _Choice, free: float) -> Iterator[_Choice]:
    """Ways to spend the time, the best first."""
    yield whole
    recycled = tuple(level for level in whole.levels if level.level != "full")
    choice = replace(whole, levels=recycled) if recycled else whole
    for seeds in range(whole.seeds, 0, -1):
        choice = replace(choice, seeds=seeds)
        yield choice
    for rates in RATES:
        if rates < whole.rates:
            choice = replace(choice, rates=rates)
            yield choice
    while True:
        yield from (replace(choice, share=share / 100) for share in range(99, round(100 * SHORTEST) - 1, -1))
        if len(choice.levels) == 1:
            break
        choice = replace(choice, levels=_without_one(choice, free))
    for level in (*choice.levels, *whole.levels):  # that only full training fits is rare, but can be
        for share in range(round(100 * SHORTEST), -1, -1):
            yield replace(choice, levels=(level,), share=share / 100)


def _without_one(choice: _Choice, free: float) -> tuple[Cost, ...]:
    """All levels but the least costly one that does it; but the most costly one, if none does."""

    def seconds(levels: tuple[Cost, ...]) -> float:
        return replace(choice, levels=levels, share=SHORTEST).seconds()

    fewer = [tuple(each for each in choice.levels if each is not level) for level in choice.levels]
    fit = [levels for levels in fewer if seconds(levels) <= free]
    return max(fit, key=seconds) if fit else min(fewer, key=seconds)


def _given_up(whole: _Choice, chosen: _Choice) -> tuple[str, ...]:
    kept = {level.level for level in chosen.levels}
    words = [in_words(level.level) for level in whole.levels if level.level not in kept]
    if chosen.seeds < whole.seeds:
        missing = whole.seeds - chosen.seeds
        words.append(f"{missing} of {whole.seeds} seeds")
    if chosen.rates < whole.rates:
        words.append(
            "the search for rates" if chosen.rates == 1 else f"{whole.rates - chosen.rates} of {whole.rates} rates"
        )
    if any(chosen.epochs(level) < level.epochs for level in chosen.levels):
        words.append(f"{1 - chosen.share:.0%} of the epochs".replace("%", " %"))
    return tuple(words)


def _too_short(whole: _Choice, budget: float, once: float) -> BudgetError:
    least = min(
        (replace(whole, levels=(level,), seeds=1, rates=1, share=0.0) for level in whole.levels), key=_Choice.seconds
    )
    seconds = (once + least.seconds()) / (1 - RESERVE)
    words = in_words(least.levels[0].level)
    return BudgetError(
        f"a budget of {duration_in_words(budget)} is too short: the least that could be done, one epoch of {words}, is "
        f"expected to take {duration_in_words(once + least.seconds())}, filling included. Give {_round_up(seconds)} or "
        "more, or fewer levels: the rows of each must be filled"
    )


def _round_up(seconds: float) -> str:
    """
    >>> _round_up(14.2), _round_up(95.0)
    ('15s', '2m')
    """
    return f"{5 * math.ceil(seconds / 5)}s" if seconds <= 60 else f"{math.ceil(seconds / 60)}m"


# -- the clock ---------------------------------------------------------------------------------------------------------


class Clock:
    """What is left of a budget. It stands until it is told to go.

    Args:
        budget: seconds, of the whole sweep.
        used: seconds of it that are gone.
        now: gives the time, in seconds from some moment.
    """

    def __init__(self, budget: float, used: float = 0.0, *, now: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._before, self._now = budget, used, now
        self._began: float | None = None

    def go(self) -> None:
        """Time counts from now on."""
        if self._began is None:
            self._began = self._now()

    def stop(self) -> None:
        """Time does not count until it goes again."""
        self._before, self._began = self.used, None

    @property
    def used(self) -> float:
        """Seconds."""
        return self._before + (0.0 if self._began is None else self._now() - self._began)

    @property
    def left(self) -> float:
        """Seconds, never below zero."""
        return max(0.0, self.budget - self.used)
