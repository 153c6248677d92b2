"""Time beside quality: full training, the same prefix frozen without a store, and recycled, in one run.

    python experiments/seconds.py --cars cars/ --faq cloud_faq_dataset.jsonl

For both tasks, an epoch of each way is timed in turns: full training with a plain loader; 50 % and 75 % and all but the
head frozen, computed again each time; the same recycled, from a store on the disk. What filling takes is measured from
an empty store, all levels by themselves. A part of the training data is enough: the time of an epoch is proportional to
its steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from kept import RESULTS, Kept  # pyright: ignore[reportMissingImports]
from levels import RECIPES as OF_CARS  # pyright: ignore[reportMissingImports]
from questions import RECIPES as OF_QUESTIONS  # pyright: ignore[reportMissingImports]
from tasks import cars, device, questions  # pyright: ignore[reportMissingImports]
from torchrecycle import recycle
from torchrecycle.allocator import keep_freed_memory
from torchrecycle.sweep import ObjectiveTask, Recipe, RunningTrial, Settings
from torchrecycle.sweep.environment import machine, versions

LEVELS = {"50": 0.5, "75": 0.75, "head": 1.0}


def epoch(task: ObjectiveTask, model: Any, parameters: Any, loader: Any, level: str, recipe: Recipe) -> float:
    """Seconds of one."""
    trial = RunningTrial(level, 0.0, replace(recipe, epochs=1), 0, tuple(parameters))
    task.fit(model, loader, trial)
    return trial.curve[-1].seconds


def measure(task: ObjectiveTask, recipes: dict[str, Recipe], rounds: int) -> dict[str, Any]:
    """Seconds of an epoch in each way, and of filling, of the training split."""
    full = task.build_model()
    plain = DataLoader(task.train.dataset, **task.loader_arguments(recipes["full"], seed=0))
    ways: dict[str, Callable[[], float]] = {
        "full": lambda: epoch(task, full, full.parameters(), plain, "full", recipes["full"])
    }
    found: dict[str, Any] = {"objects": len(task.train), "epochs": recipes["full"].epochs, "levels": {}}
    with tempfile.TemporaryDirectory() as folder:
        for level, share in LEVELS.items():
            model = task.build_model()
            recycling = recycle(model, task.example(), level=share, store=folder)
            report = recycling.fill(task.train.dataset, name=task.train.name, **task.eval_arguments())
            arguments = task.loader_arguments(recipes[level], seed=0)
            loader = recycling.loader(task.train.dataset, name=task.train.name, **arguments)
            again = DataLoader(task.train.dataset, **task.loader_arguments(recipes[level], seed=0))

            def recycled(model=model, recycling=recycling, loader=loader, level=level) -> float:
                return epoch(task, model, recycling.parameters(), loader, level, recipes[level])

            def frozen(model=model, recycling=recycling, loader=again, level=level) -> float:
                with recycling.paused():
                    return epoch(task, model, recycling.parameters(), loader, level, recipes[level])

            ways |= {f"{level} recycled": recycled, f"{level} frozen": frozen}
            found["levels"][level] = {
                "cut": recycling.cut,
                "epochs": recipes[level].epochs,
                "fill": report.seconds,
                "bytes": report.bytes_written,
            }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                one = way()
                if number:  # the first round warms up
                    seconds[name].append(one)
    for level, each in found["levels"].items():
        each |= {way: statistics.median(seconds[f"{level} {way}"]) for way in ("recycled", "frozen")}
    return {**found, "full": statistics.median(seconds["full"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--faq", type=Path, help="JSONL with question and answer")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the training data")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    measured_with = {"fraction": given.fraction, "rounds": given.rounds, "keeps_freed_memory": keep_freed_memory()}
    kept = Kept(RESULTS / "seconds.json", measured_with)
    settings = Settings(fraction=given.fraction, skip_bad=True)
    about = {"machine": machine(device()), "date": f"{date.today()}", "versions": versions()}
    tasks: dict[str, tuple[Callable[[], ObjectiveTask], dict[str, Recipe]]] = {}
    if given.cars is not None:
        tasks["similar cars"] = lambda: cars(given.cars, settings=settings), OF_CARS
    if given.faq is not None:
        tasks["questions"] = lambda: questions(given.faq, settings=settings), OF_QUESTIONS
    for name, (make, recipes) in tasks.items():
        if f"{name}, {about['machine']}" not in kept:
            found = measure(make(), recipes, given.rounds)
            kept.keep(f"{name}, {about['machine']}", {"task": name, **about, **found})


if __name__ == "__main__":
    main()
