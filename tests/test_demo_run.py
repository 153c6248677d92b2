"""The demo as a user runs it: the command, its figures, its page, a second run on the same store."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import small  # noqa: F401  (one thread)
from torchrecycle import recycle
from torchrecycle.cli import app
from torchrecycle.demo import run
from torchrecycle.demo.tasks import text_task
from torchrecycle.recycling import fill_many
from torchrecycle.sweep.run import LEVELS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    """What the first run says, with --json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = CliRunner().invoke(app, ["demo", "--quick", "--task", "texts", "--store", "kept", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_command_compares_all_levels(report: dict[str, Any]):
    assert report["quick"] is True
    task = report["tasks"]["texts"]
    assert "Swedish Construction FAQ by Zaragoza AB, CC BY 4.0." in task["ran"]["licences"][0]
    assert task["ran"]["command"] == "torchrecycle demo --quick --task texts"
    assert task["ran"]["random_weights"] is False
    assert task["ran"]["splits"] == {"train": 63, "test": 63}
    assert [level["level"] for level in task["levels"]] == list(LEVELS)
    assert [level["cut"] for level in task["levels"]] == [
        None,
        "trunk.encoder.layer.2",
        "trunk.encoder.layer.3",
        "pool",
    ]
    for level in task["levels"]:
        assert [trial["seed"] for trial in level["trials"]] == [0, 1]
        assert set(level["quality"]) == {"reciprocal rank", "precision@1"}
        assert level["quality"]["reciprocal rank"]["error"] > 0
        assert level["search"] == []
        assert level["epoch_seconds"] > 0
        assert (level["bytes_kept"] > 0) == (level["cut"] is not None)
        assert (level["fill_seconds"] > 0) == (level["cut"] is not None)
        assert (level["frozen_epoch_seconds"] is not None) == (level["cut"] is not None)


def test_training_is_better_than_nothing_and_the_figures_of_a_level_are_the_mean_of_its_seeds(report: dict[str, Any]):
    task = report["tasks"]["texts"]
    best = max(trial["quality"]["reciprocal rank"] for trial in task["levels"][0]["trials"])
    assert best > task["untrained"]["reciprocal rank"]["mean"] > 0.5
    for level in task["levels"]:
        for metric, estimate in level["quality"].items():
            mean = sum(trial["quality"][metric] for trial in level["trials"]) / 2
            assert estimate["mean"] == pytest.approx(mean, abs=1e-9)


def test_speed_ups_and_payback_are_what_their_names_say(report: dict[str, Any]):
    levels = {level["level"]: level for level in report["tasks"]["texts"]["levels"]}
    half, full = levels["50"], levels["full"]
    filling = half["total_seconds"] + half["fill_seconds"]
    assert half["speed_up"] == pytest.approx(full["total_seconds"] / half["total_seconds"])
    assert half["speed_up_with_filling"] == pytest.approx(full["total_seconds"] / filling)
    assert half["speed_up_against_frozen"] == pytest.approx(half["frozen_epoch_seconds"] / half["epoch_seconds"])
    assert levels["head"]["speed_up"] > 5  # its epochs cost next to nothing, though there are six times as many
    saved = half["frozen_epoch_seconds"] - half["epoch_seconds"]
    if saved > 0:
        paid = half["epochs_until_paid"]
        assert saved * paid >= half["fill_seconds"] * 0.999
        assert paid == 1 or saved * (paid - 1) < half["fill_seconds"]
    assert full["epochs_until_paid"] is None


def test_the_page_is_written_and_needs_no_other_file(report: dict[str, Any], home: Path):
    page = home / report["page"]
    assert page.name == "index.html"
    text = page.read_text(encoding="utf-8")
    assert len(text) > 50_000
    for word in ("Which answer belongs to the question?", "trunk.encoder.layer.2", "Zaragoza", "all-MiniLM-L6-v2"):
        assert word in re.sub("<[^>]*>", "", text)
    fetched = re.findall(r"(?:src|srcset|poster|data)=\"(?!data:)([^\"#]+)\"|url\((?!['\"]?(?:data:|#))([^)]+)\)", text)
    assert not [found for found in fetched if any(found)]
    assert not re.search(r"<link[^>]+href=\"(?!data:)", text)
    assert "@import" not in text


def test_a_second_run_on_the_same_store_fills_nothing(report: dict[str, Any], home: Path):
    segments = {path: path.stat().st_mtime_ns for path in (home / "kept").rglob("*.safetensors")}
    assert len(segments) >= 3
    task = text_task(quick=True)
    with ExitStack() as stack:
        recyclings = [
            stack.enter_context(recycle(task.build_model(), task.example(), cut=cut, store=home / "kept" / "texts"))
            for cut in task.cuts.values()
        ]
        for split in (task.train, task.test):
            for filled in fill_many(recyclings, split.dataset, **task.eval_arguments()):
                assert str(filled).startswith("nothing to fill")
                assert filled.found == 126
    assert {path: path.stat().st_mtime_ns for path in (home / "kept").rglob("*.safetensors")} == segments


def test_no_temporary_folder_is_left(report: dict[str, Any], home: Path):
    assert [path.name for path in (home / ".torchrecycle-demo").iterdir()] == ["report"]


@pytest.mark.slow
def test_the_images_reach_the_quality_that_was_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run.run_demo(["images"], silent=True)
    task = report["tasks"]["images"]
    asked = {"full": 0.901, "50": 0.912, "75": 0.866, "head": 0.734}
    assert task["untrained"]["R-precision"]["mean"] >= 0.727
    for level in task["levels"]:
        assert level["quality"]["R-precision"]["mean"] >= asked[level["level"]]
