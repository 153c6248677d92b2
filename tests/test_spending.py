"""A budget at work: what is kept of it, what may still be started, and what is stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import TensorDataset

import small
from torchrecycle import recycle
from torchrecycle.progress import progress, watching
from torchrecycle.sweep.budget import BudgetError
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.records import Records
from torchrecycle.sweep.results import EpochPoint, Prediction
from torchrecycle.sweep.spending import CLOSING, Spending, TimeIsUp

ASKED: dict[str, object] = {"levels": ["full", "50", "head"], "seeds": [0]}
PREDICTED = (
    Prediction("full", None, None, 100, 0.0, 20.0, None, 20.0, 0, 8),
    Prediction("50", "b", None, 100, 3.0, 4.0, 9.0, 20.0, 10, 8),
    Prediction("head", "c", None, 100, 3.0, 1.0, 8.0, 20.0, 10, 8),
)
RECIPES = {level: Recipe(4, 1e-3, 1e-3) for level in ("full", "50", "head")}
OBJECTS = {"train": 100, "validation": 20, "test": 50}


def _spending(folder: Path, budget: float, *, asked: dict[str, object] = ASKED, decided: bool = True) -> Spending:
    spending = Spending(budget, Records(folder, {"task": "a task"}, ()), asked)
    if decided:
        spending.predicted(lambda: PREDICTED)
        spending.decide(RECIPES, dict.fromkeys(RECIPES, True), objects=OBJECTS, seeds=(0,), rates=5)
    return spending


def test_what_runs_have_used_is_kept_and_counts_whatever_the_budget(tmp_path: Path):
    first = _spending(tmp_path, 100.0, decided=False)
    with first.running():
        time.sleep(0.2)
    used = first.used
    assert 0.2 <= used < 2
    time.sleep(0.1)
    assert first.used == used, "between rows no time counts"
    assert _spending(tmp_path, 100.0, decided=False).used == used
    assert _spending(tmp_path, 500.0, decided=False).used == used
    assert _spending(tmp_path, 100.0, asked={**ASKED, "seeds": [0, 1]}, decided=False).used == 0.0
    with pytest.raises(ZeroDivisionError), _spending(tmp_path, 100.0, decided=False).running():
        _ = 1 / 0
    assert _spending(tmp_path, 100.0, decided=False).used > used, "also after an error"


def test_what_is_used_is_kept_while_it_runs_since_a_process_may_be_killed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torchrecycle.sweep.spending.KEPT_EVERY", 0.05)
    spending = _spending(tmp_path, 100.0, decided=False)
    with spending.running(), progress("at work", 3) as shown:
        for _ in range(3):
            time.sleep(0.06)
            shown.advance()
        assert _spending(tmp_path, 100.0, decided=False).used == pytest.approx(spending.used, abs=0.1)


def test_predictions_are_measured_once_and_the_plan_is_the_same_in_each_run(tmp_path: Path):
    first = _spending(tmp_path, 80.0)
    with first.running():
        time.sleep(0.1)
    second = Spending(80.0, Records(tmp_path, {"task": "a task"}, ()), ASKED)
    assert second.predicted(lambda: pytest.fail("measured again")) == PREDICTED
    again = second.decide(RECIPES, dict.fromkeys(RECIPES, True), objects=OBJECTS, seeds=(0,), rates=5)
    assert again == first.plan, "though less of the budget is left"
    assert again.levels == ("50", "head")
    assert second.used == first.used > 0.1


def test_time_that_is_up_stops_what_is_under_way_also_where_all_exceptions_are_caught(tmp_path: Path):
    spending = _spending(tmp_path, 0.3, decided=False)
    steps = []

    def loop() -> None:
        with progress("at work", 1000) as shown:
            for step in range(1000):
                try:
                    time.sleep(0.02)
                    shown.advance()
                    steps.append(step)
                except Exception:  # what a user's loop may have
                    pytest.fail("caught")

    with pytest.raises(TimeIsUp), spending.running():
        loop()
    assert 0 < len(steps) < 20
    assert spending.left == 0.0
    with progress("without a budget", 1) as shown:
        shown.advance()


def test_of_a_fill_that_is_stopped_the_rows_are_kept(tmp_path: Path):
    model, data = small.residual(), TensorDataset(small.pictures(40), small.labels(40))
    recycling = recycle(model, small.pictures(2), cut=small.CUT, store=tmp_path / "store")
    calls: Iterator[int] = iter(range(100))

    def stop() -> None:
        if next(calls) == 2:
            raise TimeIsUp

    with pytest.raises(TimeIsUp), watching(stop):
        recycling.fill(data, batch_size=8)
    report = recycling.fill(data, batch_size=8)
    assert (report.found, report.computed) == (24, 16)
    recycling.detach()


def test_what_is_optional_leaves_time_for_the_levels_to_come(tmp_path: Path):
    """At 50: 3.5 s of evaluations and attaching, and 16 s of training. At head only, 4 of training."""
    spending = _spending(tmp_path, 10_000.0)
    head, half = (spending.costs[level].training_seconds(4) for level in ("head", "50"))
    half += spending.costs["50"].once_seconds
    spending.budget = spending._clock.budget = (head + half + 1.0) / (1 - CLOSING)
    assert spending.training_fits("head", 4, later=["50"])
    assert not spending.training_fits("head", 4, later=["50", "full"])
    assert not spending.attempt_fits("head", 4, 3, later=["50"])
    assert spending.attempt_fits("head", 4, 3)
    assert spending.level_fits("50", 4)
    assert not spending.level_fits("full", 4)
    assert spending.level_fits("full", 1)


def test_a_training_that_gets_slower_is_seen_after_an_epoch(tmp_path: Path):
    spending = _spending(tmp_path, 60.0)
    assert spending.can_end("50", EpochPoint(1, 4.0, 1.0, None), 4)
    assert not spending.can_end("50", EpochPoint(1, 20.0, 1.0, None), 4)
    assert spending.can_end("50", EpochPoint(4, 80.0, 1.0, None), 4), "it has ended"
    assert spending.training_fits("50", 4)
    spending.measured("50", 20.0)
    assert not spending.training_fits("50", 4)


def test_a_budget_that_is_too_short_is_refused_with_what_was_predicted(tmp_path: Path):
    with pytest.raises(BudgetError, match="is too short: the least that could be done, one epoch of head only"):
        _spending(tmp_path, 8.0)
    used_up = str(_spending(tmp_path, 60.0).used_up())
    assert "the budget of 60 s left no time to train one level" in used_up
    assert "It is for the whole sweep, earlier runs included, which have used 0 s" in used_up


def test_what_judging_has_taken_counts_from_then_on(tmp_path: Path):
    spending = _spending(tmp_path, 80.0)
    assert spending.can_end("head", EpochPoint(1, 1.0, 1.0, None), 4)
    before = spending.costs["50"].training_seconds(4)
    spending.evaluated(None, on_test=True, seconds=3.0)
    assert spending.costs["50"].tested_seconds == 3.0
    assert spending.costs["50"].judged_seconds == pytest.approx(1.2), "of 20 objects, where 50 took 3 s"
    assert spending.costs["50"].training_seconds(4) > before + 2
    spending.evaluated("50", on_test=False, seconds=5.0)
    assert spending.costs["50"].judged_seconds == 5.0
    spending.evaluated("head", on_test=False, seconds=40.0)
    assert not spending.can_end("head", EpochPoint(1, 1.0, 1.0, None), 4), "of 80 s, with two evaluations to come"
