"""What the experiments that are sweeps have in common: arguments, seeds, and what is kept.

All experiments share a store, so that an object's activations are computed once for all of them. Each training is kept
when it ends, in ``experiments/results/NAME/journal/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kept import RESULTS  # pyright: ignore[reportMissingImports]
from torchrecycle.allocator import keep_freed_memory
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
    parser.add_argument("--levels", nargs="*", help="only these now; figures of the others are kept when they come")
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
    """Sweep; figures are kept in ``experiments/results/NAME/``."""
    keep_freed_memory()
    work = sweep(
        task.build_model,
        task,
        levels=given.levels or levels,
        store=given.store / "activations",
        results=RESULTS / name,
        seeds=range(given.seeds),
        command=_command(given),
        tell=lambda line: tell(f"{name}: {line}"),
    )
    result = work.result()
    print(f"{name}: {result.recommendation.sentence}", flush=True)
    return result


def _command(given: argparse.Namespace) -> str:
    """As it was typed, but for the places of data and store."""
    fraction = getattr(given, "fraction", 1.0)
    of = f" --fraction {fraction:g}" if fraction != 1 else ""
    return f"python experiments/{Path(sys.argv[0]).name}{of}"
