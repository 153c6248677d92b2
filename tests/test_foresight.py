"""What is predicted of a sweep without a budget: when, how often, and that nothing else is changed by it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import small  # noqa: F401  (one thread)
from torchrecycle.report import write_page
from torchrecycle.sweep import Recipe, Sweep, SweepError, SweepResult, Task, sweep
from torchrecycle.sweep.foresight import Planned, cheap_rounds


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4)], nn.Linear(8, 2)
    )


class Signs(Task):
    """Is the first number above zero? Of its recipe's epochs, three are trained."""

    epochs = 3

    def __init__(self) -> None:
        self.train, self.test = (_objects(count, seed) for seed, count in enumerate((96, 32)))

    def recipe(self, level: str, share: float) -> Recipe:
        return Recipe(epochs=self.epochs, suffix_rate=1e-3, head_rate=1e-3, batch_size=8)

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        optimizer = torch.optim.AdamW(trial.parameters, lr=1e-3)
        for epoch in range(1, 4):
            loss = torch.tensor(0.0)
            model.train()
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not trial.ended(epoch, loss):
                break

    def evaluate(self, model: nn.Module, loader: Any) -> float:
        return sum(float((model(x).argmax(1) == y).sum()) for x, y in loader) / len(self.test)


class Long(Signs):
    epochs = 300


class Particular(Long):
    """Its `fit` takes a whole epoch of twelve batches and nothing else."""

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        if len(loader) != 12:
            raise ValueError(f"{len(loader)} batches")
        super().fit(model, loader, trial)


def _objects(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a second is measured of each thing, instead of a whole one."""
    monkeypatch.setattr(import_module("torchrecycle.sweep.predict"), "ENOUGH_SECONDS", 0.05)


def _sweep(home: Path, task: Task | None = None, *levels: str, **options: Any) -> Sweep:
    return sweep(build, task or Signs(), levels=levels or ("50", "head"), store=home / "rows", **options)


def _learned(result: SweepResult) -> list[Any]:
    """All that was learned and judged, and no seconds."""
    levels = [(level.level, level.cut, level.quality, level.bytes_kept) for level in result.levels]
    return [levels, [[p.loss for p in level.trials[0].curve] for level in result.levels], result.untrained]


def _trainings(home: Path) -> set[str]:
    """The keys of finished trainings."""
    kept = (home / "rows-sweep" / "journal").glob("*.json")
    return {path.stem for path in kept if json.loads(path.read_text())["kind"] == "trial"}


def _predicted(told: list[str]) -> list[str]:
    lines = [line.removeprefix("predicted: ") for line in told if line.startswith("predicted: ")]
    return [line.split(": ")[0].split(" (")[0] for line in lines]


def test_what_is_predicted_stands_beside_what_came_and_changes_nothing(tmp_path: Path):
    told: list[str] = []
    without = _sweep(tmp_path / "a", predict=False).result()
    result = _sweep(tmp_path / "b", predict=True, tell=told.append).result()
    assert (without.predictions, [level.predicted for level in without.levels]) == ((), [None, None])
    assert _predicted(told) == ["50 % recycled", "head only"]
    assert told.index(next(line for line in told if line.startswith("predicted"))) == 0, "before anything is filled"
    assert [level.predicted for level in result.levels] == list(result.predictions)
    assert [one.bytes_kept for one in result.predictions] == [level.bytes_kept for level in result.levels]
    assert _learned(result) == _learned(without)
    assert _trainings(tmp_path / "a") == _trainings(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.glob("b/*")) == ["rows", "rows-sweep"], "what was measured is gone"
    assert "Predicted, and what came" in write_page([result], tmp_path / "page", title="b").read_text()
    assert "Predicted, and what came" not in write_page([without], tmp_path / "other", title="a").read_text()


def test_what_was_predicted_is_known_to_the_next_run_and_a_further_level_is_measured_alone(tmp_path: Path):
    told: list[str] = []
    first = _sweep(tmp_path, predict=True).result()
    again = _sweep(tmp_path, predict=True, tell=told.append).result()
    assert again.predictions == first.predictions
    assert again.levels == first.levels
    assert _predicted(told) == []
    more = _sweep(tmp_path, None, "25", "50", "head", predict=True, seeds=(0, 1), tell=told.append).result()
    assert _predicted(told) == ["25 % recycled"]
    assert [one.level for one in more.predictions] == ["25", "50", "head"]
    assert more.predictions[1:] == first.predictions


def test_other_precisions_are_predicted_beside_the_sweeps_own(tmp_path: Path):
    first = _sweep(tmp_path, predict=True).result()
    told: list[str] = []
    task = Signs()
    result = _sweep(tmp_path / "more", task, "50", "head", predict=("float16", "int8"), tell=told.append).result()
    assert [(one.level, one.precision) for one in result.predictions] == [
        *[(level, None) for level in ("50", "head")],
        *[(level, precision) for level in ("50", "head") for precision in ("float16", "int8")],
    ]
    assert [level.predicted for level in result.levels] == list(result.predictions[:2])
    of = {(one.level, one.precision): one.bytes_kept for one in result.predictions}
    assert of["50", "int8"] < of["50", "float16"] < of["50", None] == first.of("50").bytes_kept
    assert _learned(result) == _learned(first)
    page = write_page([result], tmp_path / "page", title="more").read_text()
    assert "4 predictions of what was not run" in page
    assert _sweep(tmp_path / "more", predict=["float16", "int8"]).result().predictions == result.predictions


def test_of_what_is_finished_nothing_is_predicted_afterwards(tmp_path: Path):
    told: list[str] = []
    first = _sweep(tmp_path, predict=False).result()
    again = _sweep(tmp_path, predict=True, tell=told.append).result()
    assert _predicted(told) == []
    assert again.levels == first.levels


def test_it_is_measured_where_that_is_cheap_and_else_not(tmp_path: Path):
    told: list[str] = []
    _sweep(tmp_path / "short", Signs(), "50", tell=told.append).result()
    assert _predicted(told) == []
    result = _sweep(tmp_path / "long", Long(), "50", tell=told.append).result()
    assert _predicted(told) == ["50 % recycled"]
    assert result.levels[0].predicted is not None


def test_a_fit_that_cannot_be_measured_is_trained_with_all_the_same_unless_it_was_asked_for(tmp_path: Path):
    told: list[str] = []
    result = _sweep(tmp_path, Particular(), "50", tell=told.append).result()
    assert "nothing is predicted, since that raised ValueError: 8 batches" in told
    assert result.predictions == ()
    with pytest.raises(ValueError, match="8 batches"):
        _sweep(tmp_path / "asked", Particular(), "50", predict=True).result()


def test_a_budget_takes_what_is_known_and_cannot_do_without(tmp_path: Path):
    told: list[str] = []
    first = _sweep(tmp_path, predict=True).result()
    budget = _sweep(tmp_path, budget="10m", tell=told.append).result()
    assert _predicted(told) == ["full training"], "which was not asked for before"
    assert [(one.level, one.epoch_seconds) for one in budget.predictions[1:]] == [
        (one.level, one.epoch_seconds) for one in first.predictions
    ]
    with pytest.raises(SweepError, match=r"budget='10m' with predict=False: .*Leave one of them out"):
        _sweep(tmp_path, budget="10m", predict=False)
    with pytest.raises(SweepError, match=r"predict='int8': give True or False.*or a list"):
        _sweep(tmp_path, predict="int8")


def test_more_is_measured_the_more_is_planned_and_of_little_nothing():
    def rounds(epochs: int, *levels: str, steps: int = 15) -> int:
        return cheap_rounds([Planned(level, epochs, steps) for level in levels], 30)

    assert rounds(5, "full", "50", "75", "head") == 0
    assert 3 <= rounds(50, "full", "50", "75", "head") < rounds(500, "full", "50", "75", "head")
    assert rounds(500, "head") == 0, "an epoch of which costs nothing, and measuring it the frozen layers"
    assert cheap_rounds([Planned("head", 30, 10_000)], 10_000) > 3, "but of many objects, filling does"
