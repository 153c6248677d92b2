"""What a sweep must not do silently: drop what others have filled, or show figures of what was asked before."""

from __future__ import annotations

import json
import math
import time
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import small  # noqa: F401  (one thread)
from torchrecycle.report.predicted import predicted_rows, predictions_sheet, slow_lines
from torchrecycle.store import open_store
from torchrecycle.sweep import Classification, SweepError, SweepResult, sweep
from torchrecycle.sweep.budget import BudgetError, Clock, Plan
from torchrecycle.sweep.kept import keep_row


def _made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 2))


def build() -> nn.Module:
    return _made(0)


def other() -> nn.Module:
    """The same with other weights."""
    return _made(5)


def _objects(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def make_task(**options: Any) -> Classification:
    return Classification(_objects(128, 0), _objects(64, 1), **{"epochs": 2, **options})


def _swept(home: Path, *levels: str, task: Any = None, model: Any = build, **options: Any) -> SweepResult:
    return sweep(model, task or make_task(), levels=levels or ("50",), store=home / "rows", **options).result()


def _bytes(store: Path) -> dict[str, int]:
    """Of the files under each fingerprint."""
    return {
        name: sum(path.stat().st_size for path in (store / name).rglob("*"))
        for name in open_store(store).fingerprints()
    }


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_rows_of_other_models_make_no_room_and_are_not_counted(tmp_path: Path):
    _swept(tmp_path, "25", "50", "75", results=tmp_path / "one")
    before = _bytes(tmp_path / "rows")
    told: list[str] = []
    options = {"model": other, "max_bytes": 80_000, "predict": False, "tell": told.append}
    result = _swept(tmp_path, "25", "50", results=tmp_path / "two", **options)
    (line,) = [line for line in told if "3 other models or cuts" in line]
    assert line.endswith("left as they are, and not counted in the bytes that may be taken")
    after = _bytes(tmp_path / "rows")
    assert {name: after[name] for name in before} == before, "that is true"
    own = sum(nbytes for name, nbytes in after.items() if name not in before)
    assert 0 < own <= 80_000, "of its own two levels one has made room for the other"
    assert all(level.bytes_kept for level in result.levels)


def test_what_was_finished_with_other_bytes_allowed_is_not_shown_as_what_is_asked(tmp_path: Path):
    """Whether a level's rows are kept is told from what is asked now, and its bytes and times are of that."""
    kept = _swept(tmp_path).levels[0]
    limited = _swept(tmp_path, max_bytes=1000).levels[0]
    assert kept.bytes_kept > 0
    assert (limited.bytes_kept, limited.fill_seconds) == (0, 0.0)
    assert limited.quality == kept.quality, "which rows change nothing of"
    assert limited.trials[0].seconds != kept.trials[0].seconds
    told: list[str] = []
    again = _swept(tmp_path, tell=told.append).levels[0]
    assert (again, told) == (kept, ["50 % recycled: was finished before"])
    told.clear()
    assert _swept(tmp_path, max_bytes=1000, tell=told.append).levels[0] == limited
    assert told == ["50 % recycled: was finished before"]
    first = _swept(tmp_path / "other", max_bytes=1000).levels[0]
    assert first.bytes_kept == 0
    assert _swept(tmp_path / "other").levels[0].bytes_kept == kept.bytes_kept
    fits = _swept(tmp_path / "other", max_bytes="1 GB", tell=told.append).levels[0]
    assert fits.bytes_kept == kept.bytes_kept
    assert told[1:] == ["50 % recycled: was finished before"]


# -- what is predicted beside what came --------------------------------------------------------------------------------


class Dear(nn.Module):
    """Takes its time, however busy the machine is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x * 1.0


def dear() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Dear()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(8, 2))


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a second is measured of each thing, instead of a whole one."""
    monkeypatch.setattr(import_module("torchrecycle.sweep.predict"), "ENOUGH_SECONDS", 0.05)


@pytest.mark.usefixtures("_brief")
def test_what_was_predicted_for_another_batch_size_is_measured_anew(tmp_path: Path):
    first = _swept(tmp_path, task=make_task(batch_size=64), predict=True).predictions
    again = _swept(tmp_path, task=make_task(batch_size=64, epochs=3), predict=True).predictions
    other_size = _swept(tmp_path, task=make_task(batch_size=4), predict=True).predictions
    assert again == first
    assert other_size[0].epoch_seconds > 2 * first[0].epoch_seconds, "32 steps, and not 2"


@pytest.mark.usefixtures("_brief")
def test_of_a_level_without_room_an_epoch_without_a_store_was_predicted(tmp_path: Path):
    result = _swept(tmp_path, model=dear, max_bytes=1000, predict=True)
    level, predicted = result.levels[0], result.levels[0].predicted
    assert predicted is not None
    assert predicted.epoch_seconds == predicted.frozen_epoch_seconds
    assert predicted.epoch_seconds == pytest.approx(level.epoch_seconds, rel=0.5), "from the store it were half of it"
    assert (predicted.fill_seconds, predicted.bytes_kept) == (level.fill_seconds, level.bytes_kept) == (0.0, 0)
    (row,), others = predicted_rows(result)
    assert row.verdict == "its rows are not kept, for want of room: an epoch without a store"
    assert others == slow_lines(result) == []
    assert level.epochs_until_paid is None


@pytest.mark.usefixtures("_brief")
def test_of_levels_that_were_filled_in_turns_filling_is_not_compared_with_one_pass_for_all(tmp_path: Path):
    options: dict[str, Any] = {"model": dear, "predict": True, "task": make_task(epochs=1)}
    turns = _swept(tmp_path / "turns", "25", "75", max_bytes=80_000, **options)
    at_once = _swept(tmp_path / "once", "25", "75", **options)
    for result, is_compared in ((turns, False), (at_once, True)):
        for row in predicted_rows(result)[0]:
            figures = {name: (predicted, came) for name, predicted, came in row.figures(result)}
            assert bool(figures["fill s"][0]) == bool(figures["paid after"][0]) == is_compared
            assert figures["fill s"][1]
            assert all(all(figures[name]) for name in ("epoch s", "frozen s", "MB kept"))
        sheet = predictions_sheet(result)
        assert sheet is not None
        at = sheet.header.index("fill_seconds predicted")
        assert all((cells[at] is not None) == is_compared for cells in sheet.rows)


@pytest.mark.usefixtures("_brief")
def test_a_budget_counts_an_epoch_without_a_store_where_rows_have_no_room(tmp_path: Path):
    options: dict[str, Any] = {"levels": ("50",), "budget": "10m"}
    runs = []
    for name, limit in (("kept", None), ("limited", 1000)):
        run = sweep(dear, make_task(), store=tmp_path / name, max_bytes=limit, **options)
        next(iter(run))
        spending = run._engine.spending
        assert spending is not None
        runs.append((spending.predictions[0], spending.predictions[-1]))
        run.close()
    assert runs[0][1].epoch_seconds < 0.8 * runs[0][1].frozen_epoch_seconds
    assert runs[1][1].epoch_seconds == runs[1][1].frozen_epoch_seconds
    assert (runs[1][1].fill_seconds, runs[0][1].fill_seconds > 0) == (0.0, True)


# -- budgets -----------------------------------------------------------------------------------------------------------


def _planned(level: str, epochs: int, budget: float) -> Plan:
    return Plan(budget, (level,), {level: epochs}, (0,), 1, 1.0, ())


def _budgeted(home: Path, budget: float, task: Classification | None = None) -> list[Any]:
    run = sweep(build, task or make_task(epochs=3), levels=("50", "head"), store=home / "rows", budget=budget)
    return [(row.level, row.trials[0].recipe.epochs) for row in run]


def _use(home: Path, budget: float, used: float) -> None:
    """As if so much of a budget had been used."""
    run = sweep(build, make_task(epochs=3), levels=("50", "head"), store=home / "rows", budget=budget)
    spending = run._engine.spending
    assert spending is not None
    spending._clock = Clock(budget, used)
    spending._keep()


@pytest.mark.usefixtures("_brief")
def test_a_slightly_larger_budget_never_gives_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 200 seconds 190 went to 50 %; of 204, head only would be planned, for which 14 are too little."""

    def chosen(costs: Any, budget: float, **options: Any) -> Plan:
        if budget in (200, 204, 300):
            return _planned("50", 2, budget) if budget == 200 else _planned("head", 15, budget)
        raise BudgetError("too short")

    monkeypatch.setattr(import_module("torchrecycle.sweep.spending"), "plan", chosen)
    assert _budgeted(tmp_path, 200) == [("50", 2)]
    _use(tmp_path, 200, 203)
    assert _budgeted(tmp_path, 204) == [("50", 2)], "which is finished"
    assert _budgeted(tmp_path, 200) == [("50", 2)]
    assert _budgeted(tmp_path, 300) == [("head", 15), ("50", 2)], "there is time for another level beside it"
    assert _budgeted(tmp_path, 300) == [("head", 15), ("50", 2)]


@pytest.mark.usefixtures("_brief")
def test_time_that_another_recipe_has_used_does_not_count(tmp_path: Path):
    run = sweep(build, make_task(), levels=("head",), store=tmp_path / "rows", budget=200)
    list(run)
    for options in ({"epochs": 3}, {"batch_size": 8}, {"head_rate": 1e-4}):
        other = sweep(build, make_task(**options), levels=("head",), store=tmp_path / "rows", budget=200)
        assert other._engine.spending is not None
        assert other._engine.spending.before == 0.0
    again = sweep(build, make_task(), levels=("head",), store=tmp_path / "rows", budget=300)
    assert again._engine.spending is not None
    assert again._engine.spending.before > 0


# -- results -----------------------------------------------------------------------------------------------------------


def test_sweeps_that_write_at_once_lose_no_line_and_a_torn_one_harms_no_other(tmp_path: Path):
    row = _swept(tmp_path, "full").levels[0]
    folder = tmp_path / "race"

    def write(name: str) -> None:
        for number in range(30):
            keep_row(folder, f"{name}-{number}", row)

    threads = [Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["sweep"] for line in lines} == {f"{name}-{i}" for name in "abc" for i in range(30)}
    assert len(lines) == 90
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"sweep": "killed wi')
    for _ in range(2):
        keep_row(folder, "later", row)
    added = (folder / "results.jsonl").read_text().splitlines()[90:]
    assert added[0] == '{"sweep": "killed wi'
    assert [json.loads(line)["sweep"] for line in added[1:]] == ["later"]


def test_a_seed_that_comes_twice_is_refused(tmp_path: Path):
    with pytest.raises(SweepError, match=r"seeds=\(0, 1, 0\) has 0 more than once.*give each seed once"):
        _swept(tmp_path, seeds=(0, 1, 0))
    assert not (tmp_path / "rows").exists()


class Breaks(Classification):
    """With seed 1, training of the head alone comes to no finite number."""

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        if trial.seed == 1 and trial.level == "head":
            trial.ended(1, sum(math.nan for _ in loader))
            return
        super().fit(model, loader, trial)


@pytest.mark.parametrize("search", [False, True])
def test_a_seed_that_diverges_ends_its_level_and_no_other(search: bool, tmp_path: Path):
    task = Breaks(_objects(128, 0), _objects(64, 1), validation=_objects(64, 2), epochs=2)
    options: dict[str, Any] = {"task": task, "seeds": (0, 1), "search": search}
    told: list[str] = []
    for _ in range(2):
        told.clear()
        result = _swept(tmp_path, "50", "head", tell=told.append, **options)
        assert [(row.level, len(row.trials)) for row in result.levels] == [("50", 2)]
        (line,) = [line for line in told if "diverged" in line]
        assert line.startswith("head only diverged at a rate of ")
        assert " with seed 1: the loss was no finite number in epoch 1. " in line
        assert ("let the sweep look for one" in line) == (not search), "which it did, with another seed"
        assert "--rate of the command" in line
        kept = json.loads((tmp_path / "rows-sweep" / "results.json").read_text())
        assert kept["ran"]["settings"]["diverged"] == line
    assert not any(line.startswith("head only, seed") for line in told), "nor is it trained again"
    assert _swept(tmp_path, "50", "head", **{**options, "seeds": (0,)}).of("head").trials
    with pytest.raises(SweepError, match="head only diverged at a rate of"):
        _swept(tmp_path, "head", **options)
