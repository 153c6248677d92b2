"""The experiments: the page says what the kept figures say, and the scripts run, on little data."""

from __future__ import annotations

import csv
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import small  # noqa: F401  (one thread)

ROOT = Path(__file__).parents[1]
SCRIPTS = ("kept", "tasks", "sweeps", "levels", "questions", "classification", "levers", "seconds", "tables")
SERVICES = ("queue", "bucket")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Modules by name, whose figures go to a folder of the test's."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def get(name: str) -> ModuleType:
        import importlib

        module = importlib.import_module(name)
        if hasattr(module, "RESULTS") and name != "tables":
            monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        return module

    yield get
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_the_page_says_what_the_kept_figures_say(scripts, tmp_path, monkeypatch):
    committed = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    page = tmp_path / "experiments.md"
    page.write_text(committed, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(page)])
    scripts("tables").main()
    assert page.read_text(encoding="utf-8") == committed
    for name in ("levels", "amount", "seconds", "speed"):
        assert f"](experiments-{name}.svg)" in committed
        assert (tmp_path / f"experiments-{name}.svg").stat().st_size > 1000


@pytest.fixture
def faq(tmp_path: Path) -> Path:
    """Two services with seventy questions each."""
    path = tmp_path / "faq.jsonl"
    with path.open("w", encoding="utf-8") as opened:
        for service in SERVICES:
            for number in range(70):
                question = f"How do I set option {number} of my {service}?"
                row = {"filename": f"{service}.html", "question": question, "answer": f"Say {service} {number}."}
                opened.write(f"{json.dumps(row)}\n")
    return path


def test_services_are_told_apart_by_their_questions(scripts, faq, tmp_path, monkeypatch, capsys):
    arguments = ["--faq", str(faq), "--store", str(tmp_path / "store"), "--seeds", "1", "--levels", "head"]
    monkeypatch.setattr(sys, "argv", ["classification.py", *arguments])
    scripts("sweeps")
    scripts("classification").main()
    found = json.loads((tmp_path / "results" / "classification" / "results.json").read_text())
    assert found["ran"]["command"] == "python experiments/classification.py"
    (level,) = found["levels"]
    assert level["level"] == "head"
    assert level["quality"]["accuracy"]["mean"] > 0.9
    assert "classification: " in capsys.readouterr().out


@pytest.fixture
def cars(tmp_path: Path) -> Path:
    """Eight models, each with a colour of its own, ten photos each."""
    from PIL import Image

    noise = np.random.default_rng(0)
    folder = tmp_path / "cars"
    folder.mkdir()
    with (folder / "labels.csv").open("w", newline="") as opened, tarfile.open(folder / "images.tar", "w") as tar:
        table = csv.writer(opened)
        table.writerow(["file", "class_id"])
        for number in range(80):
            model = number % 8
            colour = np.array([model & 1, model >> 1 & 1, model >> 2]) * 150
            path = tmp_path / f"{number:03}.png"
            Image.fromarray((colour + noise.integers(0, 100, (48, 48, 3))).astype(np.uint8)).save(path)
            tar.add(path, f"images/{path.name}")
            table.writerow([f"images/{path.name}", model])
    return folder


def test_a_lever_trains_what_it_says_and_is_told_by_photo(scripts, cars, tmp_path):
    levers = scripts("levers")
    task = scripts("tasks").cars(cars, size=64)

    def short(recipe: Any) -> Any:
        return replace(recipe, epochs=1, batch_size=16)

    by_name = {lever.name: lever for lever in levers.LEVERS}
    usual, taps = (replace(by_name[name], recipe=short) for name in ("as usual", "taps from the kept stages"))
    found = {lever.name: levers.trained(task, "75", lever, 0, tmp_path / "store") for lever in (usual, taps)}
    for one in found.values():
        assert 0 <= one["quality"] <= 1
        assert sum(one["counts"]) == len(task.test)
        mean = np.average(one["by_model"], weights=one["counts"])
        assert one["quality"] == pytest.approx(mean, abs=1e-5)
    assert [one["cut"] for one in found.values()] == ["trunk.blocks.4", "front"]


def test_figures_of_other_settings_are_not_gone_on_from(scripts, tmp_path):
    kept = scripts("kept").Kept
    kept(tmp_path / "some.json", {"fraction": 0.5}).keep("one", 1)
    assert "one" in kept(tmp_path / "some.json", {"fraction": 0.5})
    with pytest.raises(SystemExit, match="move the file away"):
        kept(tmp_path / "some.json", {"fraction": 1.0})
