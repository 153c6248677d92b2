"""Under `max_bytes`, what is kept first is what saves most, on real sweeps of a model whose last cut is the largest."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import small  # noqa: F401  (one thread)
from processes import killed_at
from torchrecycle.sweep import Recipe, Sweep, SweepResult, Task, sweep
from torchrecycle.sweep.filling import FILE_BYTES, FILES
from torchrecycle.sweep.materialise import Candidate, candidates, choose
from torchrecycle.sweep.turns import turns_of

LIMIT = 200_000
"""Bytes: 25 and 50 % take 57 kB each, files included, and head only 187 kB."""
EPOCHS = 10


class Dear(nn.Module):
    """Takes its time, however busy the machine is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return self.linear(x)


def build() -> nn.Module:
    """What is dear to compute comes first, and what is large at the end."""
    torch.manual_seed(0)
    return nn.Sequential(
        Dear(),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 256), nn.Tanh()),
        nn.Linear(256, 2),
    )


class Signs(Task):
    """Is the first number above zero?"""

    def __init__(self) -> None:
        self.train, self.test = (_objects(count, seed) for seed, count in enumerate((96, 32)))

    def recipe(self, level: str, share: float) -> Recipe:
        return Recipe(epochs=EPOCHS, suffix_rate=1e-3, head_rate=1e-3, batch_size=32)

    def fit(self, model: nn.Module, loader: Any, trial: Any) -> None:
        optimizer = torch.optim.AdamW(trial.parameters, lr=1e-3)
        for epoch in range(1, trial.recipe.epochs + 1):
            loss = torch.tensor(0.0)
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not trial.ended(epoch, loss):
                break

    def evaluate(self, model: nn.Module, loader: Any) -> float:
        return sum(float((model(x).argmax(1) == y).sum()) for x, y in loader) / len(self.test)


def _objects(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0] > 0).long())


def _sweep(home: Path, **options: Any) -> Sweep:
    return sweep(build, Signs(), levels=("25", "50", "head"), store=home / "rows", **options)


def _learned(result: SweepResult) -> list[Any]:
    """All that was learned and judged, and no seconds."""
    rows = [(level.level, level.cut, level.quality, level.bytes_kept) for level in result.levels]
    losses = [[point.loss for point in level.trials[0].curve] for level in result.levels]
    return [rows, losses, result.untrained]


def _passes(told: list[str]) -> int:
    return sum(line.startswith("training split: filled 96 of 96") for line in told)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Without a limit."""
    return _sweep(tmp_path_factory.mktemp("free")).result()


def test_what_saves_most_is_kept_first_and_not_what_comes_first(tmp_path: Path, free: SweepResult):
    told: list[str] = []
    run = _sweep(tmp_path, max_bytes=LIMIT, tell=told.append)
    order = [row.level for row in run]
    result = run.result()
    saved = candidates(result.predictions, dict.fromkeys(("25", "50", "head"), EPOCHS), nested=False)
    sized = [replace(one, bytes=round(FILES * one.bytes) + FILE_BYTES) for one in saved]
    kept = choose(sized, LIMIT)
    assert kept.levels == ("25", "50"), "which take less, and save as much each"
    assert sorted(order[: len(kept.levels)]) == list(kept.levels)
    assert order == ["50", "25", "head"], "where the order of the levels would begin with head only"
    assert _passes(told) == 2, "two are filled in one pass, and the third in its turn"
    (why,) = [line for line in told if "kept first" in line]
    assert "50 % recycled and 25 % recycled are kept first (114.6 kB of 200.0 kB)" in why
    assert f"{kept.seconds_saved:,.1f} s, filling deducted" in why
    assert "s per GB; head only takes turns afterwards" in why
    assert _learned(result) == _learned(free)


def test_all_that_fits_at_once_is_kept_at_once_and_nothing_is_measured_for_it(tmp_path: Path, free: SweepResult):
    told: list[str] = []
    result = _sweep(tmp_path, max_bytes=400_000, tell=told.append).result()
    assert _passes(told) == 1
    assert result.predictions == ()
    assert not any("kept first" in line for line in told)
    assert _learned(result) == _learned(free)


def test_where_nothing_is_to_be_predicted_the_most_recycled_come_first(tmp_path: Path, free: SweepResult):
    told: list[str] = []
    run = _sweep(tmp_path, max_bytes=LIMIT, predict=False, tell=told.append)
    assert [row.level for row in run] == ["head", "50", "25"]
    assert run.result().predictions == ()
    assert any("head only is kept first (186.8 kB of 200.0 kB), the most recycled; " in line for line in told)
    assert _learned(run.result()) == _learned(free)


def sweep_to_be_killed(home: str) -> None:
    """What the killed process runs."""
    _sweep(Path(home), max_bytes=LIMIT, tell=lambda line: print(line, flush=True)).result()


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_same_turns(tmp_path: Path, free: SweepResult):
    code = "import sys; from test_turns import sweep_to_be_killed; sweep_to_be_killed(sys.argv[1])"
    killed_at("50 % recycled, seed 0", code, tmp_path)
    told: list[str] = []
    run = _sweep(tmp_path, max_bytes=LIMIT, tell=told.append)
    assert [row.level for row in run] == ["50", "25", "head"]
    assert "50 % recycled: was finished before" in told
    assert not any(line.startswith("predicted") for line in told), "measured once"
    assert any(line.startswith("training split: nothing to fill") for line in told), "25 % was filled with 50 %"
    assert _passes(told) == 1, "head only"
    assert {each.level for each in run.result().predictions} == {"25", "50", "head"}
    assert _learned(run.result()) == _learned(free)


# -- which turns -------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 1000)
SAVED = st.floats(-5, 50, allow_nan=False)


@given(st.lists(st.tuples(SIZES, SAVED, st.integers(1, 30)), min_size=1, max_size=5), SIZES)
def test_each_level_has_one_turn_and_what_saves_most_has_the_first(levels: list[tuple[int, float, int]], limit: int):
    names = [str(number) for number in range(len(levels))]
    sizes = {name: size for name, (size, _, _) in zip(names, levels, strict=True)}
    saves = [Candidate(name, size, saved, epochs) for name, (size, saved, epochs) in zip(names, levels, strict=True)]
    turns = turns_of(sizes, limit, saves)
    assert sorted(turns.order) == names, "no level is dropped, and none comes twice"
    assert set(turns.too_large) == {name for name in names if sizes[name] > limit}
    assert all(sum(sizes[level] for level in group) <= limit for group in turns.groups)
    fitting = [one for one in saves if one.bytes <= limit]
    if sum(one.bytes for one in fitting) <= limit:
        assert len(turns.groups) <= 1
    elif best := choose(fitting, limit).levels:
        assert set(turns.groups[0]) == set(best)


def test_what_saves_nothing_comes_last_and_that_is_said():
    slow = [Candidate(level, 0, -1.0, 10) for level in ("50", "75", "head")]
    turns = turns_of({"head": 20, "75": 500, "50": 1000}, 1200, slow)
    assert turns.groups == (("head", "75"), ("50",))
    assert "the most recycled, since no rows save time; 50 % recycled takes turns afterwards" in turns.said[-1]
