"""Budgets: times in words, what is given up for want of time and in which order, and the clock."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrecycle.sweep.budget import (
    RESERVE,
    BudgetError,
    Clock,
    Cost,
    Plan,
    cost_of,
    duration_in_words,
    parse_budget,
    plan,
)
from torchrecycle.sweep.halving import search_epochs
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Prediction

# -- times -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("30m", 1800),
        ("1h30m", 5400),
        ("1h 30m 5s", 5405),
        ("90s", 90),
        ("1.5h", 5400),
        ("20 min", 1200),
        (" 2 Hours ", 7200),
        ("45 sec", 45),
        (45, 45),
        (0.5, 0.5),
    ],
)
def test_a_budget_is_seconds_or_words_with_units(words: str | float, seconds: float):
    assert parse_budget(words) == seconds


@pytest.mark.parametrize("words", ["", " ", "soon", "30x", "m", "30m1h", "-5m", "1,5h", "1h1h", True, None, "٣m٣"])
def test_what_is_no_time_is_refused_with_an_example(words: object):
    with pytest.raises(BudgetError, match=r"is no budget: give a time with its unit, such as 30m, 1h30m or 90s"):
        parse_budget(words)  # pyright: ignore[reportArgumentType]


def test_a_forgotten_unit_is_asked_for():
    with pytest.raises(BudgetError, match=r"a budget of '30' has no unit: give 30m for minutes, 30s for seconds"):
        parse_budget("30")


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, "0m", "0s"])
def test_a_budget_without_time_is_refused(budget: str | float):
    with pytest.raises(BudgetError, match="leaves no time"):
        parse_budget(budget)


def test_times_are_said_in_words():
    assert [duration_in_words(seconds) for seconds in (0.2, 99.4, 101, 3600, 7200, 7260)] == [
        "0 s",
        "99 s",
        "2 min",
        "60 min",
        "2 h",
        "2 h 1 min",
    ]


# -- plans -------------------------------------------------------------------------------------------------------------

CARS = {"full": (4, 62.0), "50": (5, 9.0), "75": (5, 6.0), "head": (30, 0.4)}
"""Epochs and seconds of one, at each level."""
FROZEN = {"full": None, "50": 21.0, "75": 19.0, "head": 17.0}
BEFORE = 280.0
"""Predicting, and filling three splits."""


def _costs(**options: bool) -> list[Cost]:
    return [
        cost_of(
            Prediction(level, None, None, 2036, 75.0, seconds, FROZEN[level], 62.0, 10**8, 8),
            Recipe(epochs, 3e-4, 1e-3),
            judged=500,
            tested=4072,
            **options,
        )
        for level, (epochs, seconds) in CARS.items()
    ]


def _plan(minutes: float, seeds: int = 3, **options: bool) -> Plan:
    return plan(_costs(**options), 60 * minutes, seeds=range(seeds), once=BEFORE)


def test_with_time_for_all_all_is_done():
    found = _plan(120)
    assert found.levels == ("full", "50", "75", "head")
    assert found.seeds == (0, 1, 2)
    assert found.rates == 5
    assert found.epochs == {level: epochs for level, (epochs, _) in CARS.items()}
    assert found.given_up == ()


def test_full_training_goes_first_then_seeds_then_rates_then_epochs():
    """The figures of the module's docstring."""
    twenty, fifteen, ten, eight = (_plan(minutes) for minutes in (20, 15, 10, 8))
    for found in (twenty, fifteen, ten, eight):
        assert found.levels == ("50", "75", "head")
        assert "full training" in found.given_up
    assert (len(twenty.seeds), twenty.rates, twenty.epochs["50"]) == (3, 5, 5)
    assert (len(fifteen.seeds), fifteen.rates, fifteen.epochs["50"]) == (2, 5, 5)
    assert (len(ten.seeds), ten.rates, ten.epochs["50"]) == (1, 1, 5)
    assert (len(eight.seeds), eight.rates, eight.epochs["50"], eight.epochs["head"]) == (1, 1, 3, 21)
    assert twenty.given_up == ("full training",)
    assert fifteen.given_up == ("full training", "1 of 3 seeds")
    assert ten.given_up == ("full training", "2 of 3 seeds", "the search for rates")
    assert eight.given_up == ("full training", "2 of 3 seeds", "the search for rates", "31 % of the epochs")
    assert str(twenty) == (
        "within 20 min: 50 % recycled, 75 % recycled and head only, 3 seeds, 5 rates each, in about "
        "15 min; full training is left out"
    )


def test_three_rates_come_before_none():
    found = [_plan(seconds / 60, 1) for seconds in range(400, 1000, 5)]
    assert {each.rates for each in found} == {1, 3, 5}
    assert [each.rates for each in found] == sorted(each.rates for each in found)


def test_levels_go_last_and_as_little_of_them_as_will_do():
    costs = [
        Cost(level, 8, seconds, 0.0, 0.0, 0.0, False) for level, seconds in (("50", 10.0), ("75", 6.0), ("90", 5.0))
    ]
    # of 8 epochs two are left at least: 20, 12 and 10 seconds
    found = {budget: plan(costs, budget / (1 - RESERVE)) for budget in (43.0, 31.0, 21.0, 11.0)}
    assert found[43.0].levels == ("50", "75", "90")
    assert found[31.0].levels == ("50", "90"), "of those that do it, the least costly goes"
    assert found[21.0].levels == ("75",), "where one is too little, the most costly goes first"
    assert found[11.0].levels == ("90",)
    assert found[11.0].epochs == {"90": 2}
    assert found[11.0].given_up[:2] == ("50 % recycled", "75 % recycled")


def test_full_training_alone_is_not_given_up_for_nothing():
    full = [cost for cost in _costs() if cost.level == "full"]
    found = plan(full, 600.0)
    assert found.levels == ("full",)
    assert found.rates == 1


def test_a_search_that_is_not_asked_for_costs_nothing():
    assert _plan(13, searches=False).seconds < 0.85 * _plan(20).seconds
    assert plan(_costs(), 6000.0, rates=1).given_up == ()


def test_too_little_time_for_anything_is_refused_with_what_would_do():
    with pytest.raises(
        BudgetError, match=r"a budget of 3 min is too short: .* one epoch of head only, .* Give (\d+)m"
    ) as told:
        _plan(3)
    minutes = int(str(told.value).split("Give ")[1].split("m")[0])
    found = _plan(minutes)
    assert found.levels
    with pytest.raises(BudgetError):
        _plan(minutes - 1)


levels = st.lists(
    st.builds(
        Cost,
        level=st.just(""),
        epochs=st.integers(1, 40),
        epoch_seconds=st.floats(0.01, 100),
        judged_seconds=st.floats(0, 10),
        tested_seconds=st.floats(0, 10),
        once_seconds=st.floats(0, 10),
        searches=st.booleans(),
    ),
    min_size=1,
    max_size=5,
).map(lambda costs: [_named(cost, number) for number, cost in enumerate(costs)])


def _named(cost: Cost, number: int) -> Cost:
    names = ("full", "25", "50", "75", "head")
    return Cost(
        names[number],
        cost.epochs,
        cost.epoch_seconds,
        cost.judged_seconds,
        cost.tested_seconds,
        cost.once_seconds,
        cost.searches,
    )


def _seconds(found: Plan, costs: list[Cost]) -> float:
    """What a plan takes, added up once more."""
    total = 0.0
    for cost in costs:
        if cost.level in found.levels:
            epochs = found.epochs[cost.level]
            total += cost.once_seconds + cost.search_seconds(found.rates, search_epochs(epochs, cost.level))
            total += len(found.seeds) * cost.training_seconds(epochs)
    return total


@settings(deadline=None, max_examples=60)
@given(levels, st.floats(1, 10_000), st.integers(1, 4), st.integers(1, 5), st.floats(0, 100))
def test_a_plan_fits_into_its_budget_and_says_what_it_takes(
    costs: list[Cost], budget: float, seeds: int, rates: int, once: float
):
    try:
        found = plan(costs, budget, seeds=range(seeds), rates=rates, once=once)
    except BudgetError:
        least = min(cost.once_seconds + cost.training_seconds(1) for cost in costs)
        assert once + least > (1 - RESERVE) * budget - 1e-6
        return
    assert found.seconds == pytest.approx(once + _seconds(found, costs))
    assert found.seconds <= (1 - RESERVE) * budget + 1e-6
    assert found.levels
    assert 1 <= len(found.seeds) <= seeds
    assert 1 <= found.rates <= rates
    assert all(1 <= found.epochs[level] <= cost.epochs for cost in costs if (level := cost.level) in found.levels)
    done = found.levels == tuple(cost.level for cost in costs) and len(found.seeds) == seeds and found.rates == rates
    done = done and all(found.epochs[cost.level] == cost.epochs for cost in costs)
    assert bool(found.given_up) != done
    assert found == plan(costs, budget, seeds=range(seeds), rates=rates, once=once)


@settings(deadline=None, max_examples=60)
@given(levels, st.lists(st.floats(1, 10_000), min_size=2, max_size=4), st.integers(1, 4))
def test_more_time_never_gives_less(costs: list[Cost], budgets: list[float], seeds: int):
    found = []
    for budget in sorted(budgets):
        try:
            found.append(plan(costs, budget, seeds=range(seeds)))
        except BudgetError:
            assert not found, "what fits into less fits into more"
    for less, more in itertools.pairwise(found):
        if len(less.levels) == len(more.levels):
            assert (len(less.seeds), less.rates) <= (len(more.seeds), more.rates)


# -- the clock ---------------------------------------------------------------------------------------------------------


class _Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_was_used_before_counts():
    time = _Time()
    clock = Clock(60.0, used=35.0, now=time)
    time.now += 100
    assert clock.left == 25.0, "it stands until it is told to go"
    clock.go()
    time.now += 20
    assert (clock.used, clock.left) == (55.0, 5.0)
    clock.stop()
    time.now += 1000
    assert (clock.used, clock.left) == (55.0, 5.0), "while a user looks at a row, no time counts"
    clock.go()
    clock.go()
    time.now += 20
    assert (clock.used, clock.left) == (75.0, 0.0)
    assert Clock(90.0, used=clock.used, now=time).left == 15.0, "a larger budget goes on from there"
