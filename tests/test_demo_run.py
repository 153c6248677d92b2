"""The demo as a user runs it: the command, its figures, a second run on the same store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from torchrecycle.cli import app
from torchrecycle.demo import run
from torchrecycle.demo.recipes import LEVELS
from torchrecycle.demo.run import LevelResult, TaskResult
from torchrecycle.demo.tasks import TextTask


def _level(level: str, cut: str | None, epoch: float, frozen: float | None) -> LevelResult:
    quality = {"R-precision": [0.70, 0.72]}
    recipe = {
        "epochs": 4,
        "batch_size": 64,
        "suffix_rate": 1e-3,
        "head_rate": 3e-3,
        "weight_decay": 0.01,
        "scale": 4.0,
    }
    fill = 5.0 if cut else 0.0
    return LevelResult(level, cut, quality, fill, epoch, 4 * epoch, frozen, 1_000_000 if cut else 0, recipe)


RESULT = TaskResult(
    task="images",
    title="Which emoji is it?",
    licences=("Pictures: some licence",),
    loss="softmax",
    metric="R-precision",
    train_objects=10,
    eval_objects=10,
    untrained={"R-precision": 0.6},
    filled=[],
    eval_fill_seconds=5.0,
    levels=[
        _level("full", None, 10.0, None),
        _level("50", "trunk.blocks.2", 2.0, 4.0),
        _level("75", "trunk.blocks.4", 1.0, 0.5),
        _level("head", "trunk", 0.1, 2.1),
    ],
    seconds=100.0,
)


def test_speed_ups_and_payback_are_what_their_names_say():
    levels = {level["level"]: level for level in RESULT.to_json()["levels"]}
    assert levels["50"]["speed_up"] == pytest.approx(40 / 8)
    assert levels["50"]["speed_up_with_filling"] == pytest.approx(40 / 13)
    assert levels["50"]["speed_up_against_frozen"] == pytest.approx(2)
    assert levels["50"]["epochs_until_paid"] == 3  # 5 seconds of filling, 2 saved in each epoch
    assert levels["75"]["epochs_until_paid"] is None  # the frozen prefix is quicker: it never pays
    assert RESULT.of("50").mean("R-precision") == pytest.approx(0.71)
    assert RESULT.of("50").spread("R-precision") == pytest.approx(0.01)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_shows_every_figure_whatever_the_width_of_the_terminal(width: int):
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in run._tables(RESULT, width):
        console.print(table)
    text = out.getvalue()
    for word in ("full training", "50 % recycled", "trunk.blocks.2", "0.710 ± 0.010", "untrained", "0.600", "never"):
        assert word in text
    assert "…" not in text
    for column in ("fill", "epoch", "total", "speed", "with", "filling", "frozen", "kept", "after"):
        assert column in text


def test_the_command_compares_all_levels_and_a_second_run_fills_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--quick", "--task", "texts", "--json", "--store", "kept"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    task = report["tasks"]["texts"]
    assert "Swedish Construction FAQ by Zaragoza AB, CC BY 4.0." in task["licences"][0]
    assert [level["level"] for level in task["levels"]] == list(LEVELS)
    for level in task["levels"]:
        assert len(level["quality"]["reciprocal rank"]) == 2
        assert level["epoch_seconds"] > 0
        assert (level["bytes_kept"] > 0) == (level["cut"] is not None)
    assert max(task["levels"][0]["quality"]["reciprocal rank"]) > task["untrained"]["reciprocal rank"]
    assert task["filled"][0].startswith("training half: filled 126 of 126")

    texts = TextTask.load(quick=True)
    store = Path("kept") / "texts"
    recyclings = [run._recycle(texts, level, store) for level in LEVELS if level != "full"]
    reports = run._fill(texts, recyclings)
    assert all(str(report).startswith("nothing to fill") for report in reports.values())


@pytest.mark.slow
def test_the_images_reach_the_quality_that_was_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run.run_demo(["images"], silent=True)
    task = report["tasks"]["images"]
    asked = {"full": 0.901, "50": 0.912, "75": 0.866, "head": 0.734}
    assert task["untrained"]["R-precision"] >= 0.727
    for level in task["levels"]:
        assert sum(level["quality"]["R-precision"]) / 2 >= asked[level["level"]]
