"""The demo: four levels of recycling compared on two tasks, by quality, seconds and bytes.

It is a sweep (`torchrecycle.sweep`) of two tasks whose data and weights come in packages, with recipes that were found
before and two seeds. Nothing is taken from an earlier run but the rows of a store that is named.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrecycle.demo.emoji import DEFAULT_FOLDER
from torchrecycle.demo.tasks import image_task, text_task
from torchrecycle.progress import progress
from torchrecycle.report import print_table, write_page
from torchrecycle.report.terminal import WIDE
from torchrecycle.sweep import ObjectiveTask, Sweep, SweepPlan, SweepResult

__all__ = ["run_demo"]

SEEDS = (0, 1)


def run_demo(
    names: Sequence[str],
    *,
    quick: bool = False,
    store: Path | None = None,
    out: Path | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Run the tasks of these names, print what comes out, write the page, and return every figure.

    Args:
        names: ``images``, ``texts``.
        quick: less data and fewer epochs.
        store: where rows are kept; a temporary folder if None.
        out: where the page is written; a folder beside the drawn pictures if None.
        silent: print nothing on stdout.
    """
    tell: Callable[[str], None] = (lambda _: None) if silent else lambda line: print(f"  {line}", flush=True)
    began = time.perf_counter()
    results: dict[str, SweepResult] = {}
    with _temporary() as folder:
        for name in names:
            task = _load(name, quick)
            if not silent:
                _introduce(task)
            plan = SweepPlan(
                store=(store or folder / "activations") / name,
                results=folder,
                seeds=SEEDS,
                search=False,
                command="torchrecycle demo" + (" --quick" if quick else "") + f" --task {name}",
                tell=tell,
            )
            results[name] = Sweep(task.build_model, task, plan).result()
            if not silent:
                print_table(results[name], console=_console())
    page = write_page(
        list(results.values()),
        out or DEFAULT_FOLDER / "report",
        title="torchrecycle: what recycling layers gains and costs",
    )
    if not silent:
        print(f"\nThe page: {page}")
    return {
        "quick": quick,
        "seconds": time.perf_counter() - began,
        "page": str(page),
        "tasks": {name: result.to_json() for name, result in results.items()},
    }


@contextmanager
def _temporary() -> Iterator[Path]:
    DEFAULT_FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=DEFAULT_FOLDER))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load(name: str, quick: bool) -> ObjectiveTask:
    if name == "texts":
        return text_task(quick=quick)
    with progress("drawing", 1, "pictures") as shown:

        def drawn(done: int, total: int) -> None:
            shown.total = total
            shown.advance(done - shown.done)

        return image_task(quick=quick, on_progress=drawn)


def _console() -> Any:
    from rich.console import Console

    # Without a terminal a table is as wide as it needs to be, so that a log shows all of it.
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _introduce(task: ObjectiveTask) -> None:
    per = 2 if task.kind == "pairs" else 1
    what = "pairs" if task.kind == "pairs" else "objects"
    print(f"\n{task.title}  {len(task.train) // per:,} {what} to train on, {len(task.test) // per:,} others to test")
    for licence in task.licences:
        print(f"  {licence}")
