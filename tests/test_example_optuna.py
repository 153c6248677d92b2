"""The example of Optuna's trials on sixteen small pictures, as a user runs it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
import torch
from torch.utils.data import DataLoader

import small  # noqa: F401  (one thread)
from torchrecycle import recycle
from torchrecycle.demo.emoji import draw, toned_classes

EXAMPLE = Path(__file__).parents[1] / "examples" / "optuna_trials.py"
TRIALS = 6


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("optuna_trials", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["optuna_trials"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["optuna_trials"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four emoji in four skin tones each, 48 pixels wide, in folders by class."""
    folder = tmp_path_factory.mktemp("emoji")
    names = sorted(toned_classes())[10:14]
    for name in names:
        (folder / "photos" / name).mkdir(parents=True)
        for number, picture in enumerate([each for each in draw(folder, labels=names) if each.label == name][:4]):
            picture.image().resize((48, 48)).save(folder / "photos" / name / f"{number}.png")
    return folder / "photos"


@pytest.fixture
def run(
    example: ModuleType, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def go(*options: str, model: str = "torchvision/resnet18") -> str:
        asked = [str(photos), "--model", model, "--size", "32", "--epochs", "2", "--batch", "8"]
        example.main([*asked, "--trials", str(TRIALS), *options])
        return capsys.readouterr().out

    return go


def test_the_example_tells_the_best_of_its_trials(run):
    for printed in (run(), run("--ordinary")):
        assert "12 to train on, 4 to be asked about" in printed
        assert re.search(rf"the best of {TRIALS} trials, \d of them pruned: [01]\.\d+ of the others right", printed)
        assert re.search(r"^rate \S+  weight decay \S+  dropout \S+$", printed, re.MULTILINE)
        assert re.search(r"attaching and filling \d+\.\d s, the trials \d+\.\d s", printed)


def test_trials_over_one_fill_give_what_trials_on_full_forwards_give(example, photos, tmp_path):
    torch.manual_seed(0)
    trunk = example.load_trunk("torchvision/resnet18", "images", size=32)
    train, held_out, _ = example.split(example.find_pictures(photos), trunk, None)
    model = example.classifier(trunk, len(train.classes))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recycling = recycle(model, torch.stack([train[0][0], train[1][0]]), cut="0.layer2", store=tmp_path)

    def trials(first: DataLoader[Any], second: DataLoader[Any]) -> list[Any]:
        study = example.study_of(example.Objective(model, first, second, epochs=3), TRIALS)
        model.load_state_dict(start)
        return [(t.params, t.state, t.intermediate_values) for t in study.trials]

    loaders = recycling.loader(train, batch_size=8, shuffle=True), recycling.loader(held_out, batch_size=8)
    assert recycling.stats.misses == len(train) + len(held_out)
    got = trials(*loaders)
    assert recycling.stats.misses == len(train) + len(held_out), "all trials, and nothing was computed again"
    assert recycling.stats.hits >= TRIALS * 2 * (len(train) + len(held_out))
    with recycling.paused():
        assert got == trials(DataLoader(train, batch_size=8, shuffle=True), DataLoader(held_out, batch_size=8))
    assert any(state is optuna.trial.TrialState.COMPLETE for _, state, _ in got)
    assert len({round(params["rate"], 6) for params, _, _ in got}) == TRIALS


def test_what_cannot_be_is_said_in_one_line(run):
    with pytest.raises(SystemExit, match=r"error: cannot cut at '0\.layer9': the model has no module of that name"):
        run("--cut", "layer9")
