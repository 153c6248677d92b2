"""What the experiments that are sweeps have in common: arguments, seeds, and what is kept.

All experiments on one data set share a store, so that an object's activations are computed once for all of them, and a
journal under ``experiments/results/journal/``, which keeps each training when it ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kept import RESULTS  # pyright: ignore[reportMissingImports]
from torchrecycle.sweep import ObjectiveTask, Recipe, SweepResult, sweep

__all__ = ["arguments", "given_recipes", "run"]

LEVELS = ("full", "50", "75", "head")


def arguments(description: str | None, data: str, what: str) -> argparse.ArgumentParser:
    """A parser with what all of them take.

    Args:
        description: of the experiment.
        data: the option that names the data.
        what: that option's help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(data, type=Path, required=True, help=what)
    parser.add_argument("--store", type=Path, default=Path(".experiments"), help="a folder for activations")
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def given_recipes(task: ObjectiveTask, recipes: dict[str, Recipe]) -> ObjectiveTask:
    """The task with these recipes for its levels, around whose rates a better one is looked for."""
    return replace(task, recipes=lambda level, share: recipes[level])


def run(
    name: str,
    task: ObjectiveTask,
    given: argparse.Namespace,
    *,
    levels: Sequence[str] = LEVELS,
    tell: Callable[[str], None] = print,
) -> SweepResult:
    """Sweep, and keep the figures in ``experiments/results/NAME.json``."""
    work = sweep(
        task.build_model,
        task,
        levels=levels,
        store=given.store / "activations",
        results=RESULTS,
        seeds=range(given.seeds),
        command=f"python experiments/{name}.py",
        tell=lambda line: tell(f"{name}: {line}"),
    )
    result = work.result()
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_finite(result.to_json()), indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {result.recommendation.sentence}", flush=True)
    return result


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
