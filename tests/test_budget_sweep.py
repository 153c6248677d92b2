"""Whole sweeps with a budget, of small real models: they end in time, go on when killed, and say what was left out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import small
from processes import killed_at
from torchrecycle.cli import app
from torchrecycle.sweep import Recipe, Sweep, SweepError, SweepPlan, Task, halving
from torchrecycle.sweep.budget import BudgetError
from torchrecycle.sweep.halving import FACTORS, HalvingError, rungs, search_epochs
from torchrecycle.sweep.rates import rate_of, scaled
from torchrecycle.sweep.results import Trial

SLOWER = {"seconds": 0.0}
"""What each step takes longer. Not of the task, so that it is the same task."""


def _objects(count: int, seed: int) -> TensorDataset:
    """Pictures of four classes, each with a colour of its own under noise."""
    labels = torch.arange(count) % 4
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[labels]
    noise = torch.randn(count, 3, small.SIDE, small.SIDE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(noise + 0.6 * colours[:, :, None, None], labels)


class Colours(Task):
    """Which of four colours is it?"""

    title = "Which colour?"
    metric = "accuracy"

    def __init__(self, *, epochs: int = 3, rate: float = 3e-3, steep: int = 1, tells: bool = True) -> None:
        self.train, self.validation, self.test = (_objects(count, seed) for seed, count in enumerate((64, 40, 60)))
        self.epochs, self.rate, self.steep, self.tells = epochs, rate, steep, tells

    def recipe(self, level: str, share: float) -> Recipe:
        return Recipe(epochs=self.epochs, suffix_rate=self.rate, head_rate=self.rate, batch_size=16)

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        rate = min(1e37, max(1e-6, 3e-3 * (rate_of(trial.recipe, trial.level) / 3e-3) ** self.steep))
        optimizer = torch.optim.AdamW(trial.parameters, lr=rate)
        for epoch in range(1, trial.recipe.epochs + 1):
            loss = torch.tensor(0.0)
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                time.sleep(SLOWER["seconds"])
            if self.tells and not trial.ended(epoch, loss):
                break

    def evaluate(self, model: nn.Module, loader: Any) -> float:
        return sum(float((model(images).argmax(1) == labels).sum()) for images, labels in loader) / len(loader.dataset)


@pytest.fixture(autouse=True)
def quick_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a second is measured of each thing, instead of a whole one."""
    monkeypatch.setattr(import_module("torchrecycle.sweep.predict"), "ENOUGH_SECONDS", 0.05)
    monkeypatch.setitem(SLOWER, "seconds", 0.0)


def _sweep(home: Path, budget: str | float | None, task: Task | None = None, **options: Any) -> Sweep:
    plan = SweepPlan(store=home / "store", results=home, budget=budget, **{"levels": ("full", "50", "head"), **options})
    return Sweep(small.residual, task or Colours(), plan)


def _learned(trial: Trial) -> Any:
    """All of a trial but the seconds."""
    return repr(replace(trial, curve=tuple(replace(point, seconds=0.0) for point in trial.curve)))


def _trials(levels: Any) -> list[Trial]:
    return [trial for level in levels for trial in (*level.search, *level.trials)]


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_are_found_by_halving_and_are_the_same_each_time(tmp_path: Path):
    """Without a budget; of full training, which is not run, it is said what is expected."""
    results = [_sweep(tmp_path / name, None, levels=("50", "head")).result() for name in "ab"]
    assert [_learned(a) for a in _trials(results[0].levels)] == [_learned(b) for b in _trials(results[1].levels)]
    result = results[0]
    for level in result.levels:
        short = replace(level.trials[0].recipe, epochs=search_epochs(3, level.level))
        middle = Colours().recipe(level.level, level.share)
        asked = [replace(scaled(middle, level.level, factor), epochs=3) for factor in FACTORS]
        assert [trial.recipe for trial in level.search] == asked
        assert all(len(trial.curve) in rungs(short.epochs) for trial in level.search)
        whole = [trial for trial in level.search if len(trial.curve) == 3]
        best = max(whole, key=lambda trial: trial.quality["accuracy"])
        assert rate_of(level.trials[0].recipe, level.level) == rate_of(best.recipe, level.level)
        assert level.search[0] in whole
    assert any(len(trial.curve) == 1 for level in result.levels for trial in level.search), "some were left"
    assert result.expected_full is not None
    assert result.expected_full_seconds is not None
    assert "expected of full training" in result.recommendation.sentence


def test_a_rate_that_diverges_is_left_and_not_chosen_though_it_is_the_recipe_s(tmp_path: Path):
    """The trainings' rates are 3e-3 times the 75th power of the factor, from 1e-6 to 1e37."""
    told: list[str] = []
    task = Colours(rate=9e-3, steep=75)
    result = _sweep(tmp_path, None, task, levels=("50",), tell=told.append).result()
    level = result.of("50")
    lost = [trial for trial in level.search if not math.isfinite(trial.curve[-1].loss)]
    assert {round(trial.recipe.suffix_rate / 3e-3) for trial in lost} == {3, 9, 27}
    assert level.search[0] in lost
    assert all(len(trial.curve) == 1 for trial in lost)
    assert level.trials[0].recipe.suffix_rate == 3e-3
    assert sum(line.endswith("diverges") for line in told) == 3


def test_if_all_rates_diverge_that_is_said(tmp_path: Path):
    with pytest.raises(
        SweepError, match=r"50 % recycled diverged at all rates that were tried, from 3.3e\+33 to 2.7e\+35"
    ):
        _sweep(tmp_path, None, Colours(rate=3e34), levels=("50",)).result()


def test_without_optuna_a_search_is_refused_at_once_and_the_rest_works(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(halving, "find_spec", lambda name: None)
    with pytest.raises(HalvingError, match=r'pip install "torchrecycle\[sweep\]"'):
        _sweep(tmp_path, None)
    assert not (tmp_path / "store").exists()
    assert _sweep(tmp_path, None, levels=("head",), search=False).result().levels


# -- budgets -----------------------------------------------------------------------------------------------------------


def _left_out(told: list[str]) -> str:
    return next(line for line in told if line.startswith("within "))


def test_a_sweep_with_a_budget_ends_within_it_and_goes_on_with_a_larger_one(tmp_path: Path):
    told: list[str] = []
    began = time.monotonic()
    run = _sweep(tmp_path, "25s", tell=told.append)
    first = run.result()
    assert time.monotonic() - began < 25
    used = run._engine.spending.used  # pyright: ignore
    assert used < 25
    assert [level.level for level in first.levels] in (["head"], ["50", "head"])
    assert "full training" in _left_out(told)
    assert {each.level for each in first.predictions} == {"full", "50", "head"}
    assert all(level.predicted is not None for level in first.levels)
    assert first.expected_full is not None
    assert first.ran.settings["budget"].startswith("within 25 s: ")
    json.dumps(first.to_json())

    told.clear()
    again = _sweep(tmp_path, "25s", tell=told.append)
    second = {level.level: level.trials[0] for level in again.result().levels}
    assert all(second[level.level] == level.trials[0] for level in first.levels), "not trained again"
    assert not any(line.startswith("predicted") for line in told), "measured once"
    assert again._engine.spending.before == pytest.approx(used, abs=3)  # pyright: ignore

    told.clear()
    larger = _sweep(tmp_path, "30m", tell=told.append)
    whole = larger.result()
    assert [level.level for level in whole.levels] == ["full", "50", "head"]
    assert all(len(level.search) == 5 for level in whole.levels)
    assert "of it were used before" in _left_out(told)
    assert whole.expected_full is None
    assert "for full training" in whole.recommendation.sentence or whole.recommendation.level in (None, "full")


def _slow_down(told: list[str], seconds: float) -> Any:
    """From when the plan is made, each step takes longer than it was measured to."""

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("within "):
            SLOWER["seconds"] = seconds

    return tell


@pytest.mark.slow
def test_a_training_that_turns_out_to_be_too_slow_is_stopped_and_nothing_is_kept_of_it(tmp_path: Path):
    told: list[str] = []
    began = time.monotonic()
    with pytest.raises(
        BudgetError, match=r"left no time to train one level.*for the whole sweep, earlier runs included"
    ):
        _sweep(tmp_path, "30s", levels=("head",), tell=_slow_down(told, 1.5)).result()
    assert time.monotonic() - began < 30
    assert any("stopped after epoch 1 of 3" in line or "no time for" in line for line in told)
    SLOWER["seconds"] = 0.0
    assert _sweep(tmp_path, "10m", levels=("head",)).result().levels[0].trials[0].recipe.epochs == 3


@pytest.mark.slow
def test_a_training_that_tells_of_nothing_is_stopped_when_time_is_up(tmp_path: Path):
    told: list[str] = []
    began = time.monotonic()
    with pytest.raises(BudgetError, match="left no time"):
        _sweep(
            tmp_path, "20s", Colours(tells=False), levels=("head",), search=False, tell=_slow_down(told, 3.0)
        ).result()
    assert time.monotonic() - began < 24  # a step takes three
    assert "head only: the budget is used up; of what was under way nothing is kept" in told


@pytest.mark.parametrize("budget", [0.5, "1s"])
def test_a_budget_in_which_nothing_can_be_measured_is_refused(budget: str | float, tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(BudgetError, match=r"left no time to train one level|is too short: the least"):
        _sweep(tmp_path, budget, levels=("head",)).result()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("budget", ["30", "soon", -1])
def test_what_is_no_budget_is_refused_before_anything_is_done(budget: str | float, tmp_path: Path):
    with pytest.raises(BudgetError):
        _sweep(tmp_path, budget)
    assert not list(tmp_path.iterdir())


def sweep_to_be_killed(home: str) -> None:
    """What the killed process runs."""
    SLOWER["seconds"] = 0.05
    _sweep(Path(home), "90s", levels=("50", "head"), tell=lambda line: print(line, flush=True)).result()


@pytest.mark.slow
def test_a_sweep_with_a_budget_that_was_killed_goes_on_with_what_is_left(tmp_path: Path):
    code = "import sys; from test_budget_sweep import sweep_to_be_killed; sweep_to_be_killed(*sys.argv[1:])"
    killed_at("head only, seed 0", code, tmp_path)
    told: list[str] = []
    SLOWER["seconds"] = 0.05
    run = _sweep(tmp_path, "90s", levels=("50", "head"), tell=told.append)
    spending = run._engine.spending
    assert spending is not None
    before = spending.before
    assert before > 1
    began = time.monotonic()
    result = run.result()
    assert before + time.monotonic() - began < 90
    assert spending.used < 90
    assert "of it were used before" in _left_out(told)
    assert "head only: was finished before" in told
    assert not any(line.startswith("predicted") for line in told)
    assert [level.level for level in result.levels] == ["50", "head"]


# -- the command -------------------------------------------------------------------------------------------------------

runner = CliRunner(env={"COLUMNS": "100"})


def test_the_command_refuses_a_budget_without_a_unit_in_one_line(tmp_path: Path):
    asked = [
        str(small.write_pictures(tmp_path / "pictures")),
        "--model",
        "timm/test_resnet",
        "--out",
        str(tmp_path / "out"),
    ]
    found = runner.invoke(app, ["sweep", "images", *asked, "--budget", "30"])
    assert found.exit_code == 2
    assert found.stderr == "torchrecycle: a budget of '30' has no unit: give 30m for minutes, 30s for seconds\n"


@pytest.mark.slow
def test_the_command_ends_within_its_budget_and_recommends_a_level(tmp_path: Path):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    small.write_pictures(folder, count=60, side=32)
    asked = ["sweep", "images", str(folder), "--model", "timm/test_resnet", "--size", "32", "--out", str(out)]
    command = [sys.executable, "-c", "import torchrecycle_command; torchrecycle_command.main()"]
    began = time.monotonic()
    found = subprocess.run([*command, *asked, "--budget", "2m"], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert time.monotonic() - began < 120
    assert "within 2 min: " in found.stderr
    kept = json.loads((out / "results.json").read_text())
    assert kept["ran"]["settings"]["budget"].startswith("within 2 min")
    assert kept["recommendation"]["sentence"]
    assert (out / "index.html").is_file()
