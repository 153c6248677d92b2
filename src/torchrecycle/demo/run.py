"""The demo: four levels of recycling compared on two tasks, by quality, seconds and bytes.

For each task the rows of all levels are filled in one pass (the deepest prefix runs once), then each level is trained
from the same pretrained weights under two seeds and evaluated on classes or pairs that it never saw. Beside recycling
stand full training and the fair baseline: the same prefix frozen, but computed again in every epoch.

A level's total is the time of all of its epochs; levels may need different numbers of them, as their recipes say.
"""

from __future__ import annotations

import math
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from torchrecycle.demo.emoji import DEFAULT_FOLDER
from torchrecycle.demo.recipes import LEVELS, Level, Recipe
from torchrecycle.demo.tasks import ImageTask, Task, TextTask
from torchrecycle.fill import FillReport
from torchrecycle.progress import progress
from torchrecycle.recycling import Recycling, fill_many, recycle

__all__ = ["LevelResult", "TaskResult", "run_demo"]

SEEDS = (0, 1)
LOSSES = {
    "images": "softmax over cosines to one learned vector per training class",
    "texts": "multiple negatives ranking, both ways",
}
NAMES = {"full": "full training", "50": "50 % recycled", "75": "75 % recycled", "head": "head only"}


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level of one task."""

    level: str
    """``full``, ``50``, ``75`` or ``head``."""
    cut: str | None
    """Name of the module whose output is kept; None for full training."""
    quality: dict[str, list[float]]
    """Per metric, one figure per seed, 0 to 1."""
    fill_seconds: float
    """Wall seconds of the pass that filled the training half, for all levels at once; 0 for full training."""
    epoch_seconds: float
    """Mean wall seconds of an epoch."""
    total_seconds: float
    """Wall seconds of all epochs of one training, mean over the seeds, without filling."""
    frozen_epoch_seconds: float | None
    """Wall seconds of an epoch with the same prefix frozen and computed again: no store."""
    bytes_kept: int
    """Bytes in the store for this level, both halves."""
    recipe: dict[str, Any]
    """What it was trained with."""

    def mean(self, metric: str) -> float:
        return statistics.mean(self.quality[metric])

    def spread(self, metric: str) -> float:
        """Half of the range over the seeds."""
        return (max(self.quality[metric]) - min(self.quality[metric])) / 2

    @property
    def epochs_until_paid(self) -> int | None:
        """After how many epochs filling has paid against the frozen prefix; None if never."""
        if self.frozen_epoch_seconds is None:
            return None
        saved = self.frozen_epoch_seconds - self.epoch_seconds
        return max(1, math.ceil(self.fill_seconds / saved)) if saved > 0 else None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """All levels of one task."""

    task: str
    title: str
    licences: tuple[str, ...]
    loss: str
    """The loss that it was trained with, in words."""
    metric: str
    """The metric that stands for the quality."""
    train_objects: int
    eval_objects: int
    untrained: dict[str, float]
    """Quality of the pretrained model as it comes."""
    filled: list[str]
    """What filling the two halves did, in words."""
    eval_fill_seconds: float
    levels: list[LevelResult]
    seconds: float
    """Wall seconds of the whole task."""

    def of(self, level: str) -> LevelResult:
        return next(result for result in self.levels if result.level == level)

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        full = self.of("full")
        levels = []
        for result in self.levels:
            figures = asdict(result)
            figures["epochs_until_paid"] = result.epochs_until_paid
            figures["speed_up"] = full.total_seconds / result.total_seconds
            figures["speed_up_with_filling"] = full.total_seconds / (result.total_seconds + result.fill_seconds)
            frozen = result.frozen_epoch_seconds
            figures["speed_up_against_frozen"] = frozen / result.epoch_seconds if frozen else None
            levels.append(figures)
        return {**asdict(self), "levels": levels}


def run_demo(
    names: Sequence[str], *, quick: bool = False, store: Path | None = None, silent: bool = False
) -> dict[str, Any]:
    """Run the tasks of these names, print what comes out, and return every figure.

    Args:
        names: ``images``, ``texts``.
        quick: less data and fewer epochs.
        store: where rows are kept; a temporary folder if None.
        silent: print nothing on stdout.
    """
    tell: Callable[[Any], None] = (lambda _: None) if silent else _print
    began = time.perf_counter()
    with _store_folder(store) as folder:
        results = [_run_task(_load(name, quick), folder / name, tell) for name in names]
    return {
        "quick": quick,
        "machine": machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": time.perf_counter() - began,
        "tasks": {result.task: result.to_json() for result in results},
    }


@contextmanager
def _store_folder(store: Path | None) -> Iterator[Path]:
    if store is not None:
        yield store
        return
    DEFAULT_FOLDER.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="activations-", dir=DEFAULT_FOLDER))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load(name: str, quick: bool) -> Task:
    if name == "texts":
        return TextTask.load(quick=quick)
    with progress("drawing", 1, "pictures") as shown:

        def drawn(done: int, total: int) -> None:
            shown.total = total
            shown.advance(done - shown.done)

        return ImageTask.load(quick=quick, on_progress=drawn)


def machine() -> str:
    """The processor and the threads in use, in words."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1] if found else name
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


# -- one task ----------------------------------------------------------------------------------------------------------


def _run_task(task: Task, store: Path, tell: Callable[[Any], None]) -> TaskResult:
    began = time.perf_counter()
    objects = f"{len(task.train_dataset):,} objects to train on, {len(task.eval_dataset):,} others to evaluate"
    tell(f"\n[bold]{task.title}[/]  {objects}")
    for licence in task.licences:
        tell(f"  {licence}")
    recyclings = {level: _recycle(task, level, store) for level in LEVELS if level != "full"}
    try:
        filled = _fill(task, list(recyclings.values()))
        for half, report in filled.items():
            tell(f"  {half} half: {report}")
        untrained = _evaluate(task, recyclings["head"])
        tell(f"  untrained: {_figures(untrained)}")
        results = []
        for level in reversed(LEVELS):
            result = _run_level(task, level, recyclings.get(level), filled["training"].seconds)
            results.append(result)
            tell(f"  {NAMES[level]}: {_quality(result)}, {result.epoch_seconds:.2f} s per epoch")
    finally:
        for recycling in recyclings.values():
            recycling.detach()
    done = TaskResult(
        task=task.name,
        title=task.title,
        licences=task.licences,
        loss=LOSSES[task.name],
        metric=task.metric,
        train_objects=len(task.train_dataset),
        eval_objects=len(task.eval_dataset),
        untrained=untrained,
        filled=[f"{half} half: {report}" for half, report in filled.items()],
        eval_fill_seconds=filled["evaluation"].seconds,
        levels=results[::-1],
        seconds=time.perf_counter() - began,
    )
    for table in _tables(done, _console().width):
        tell(table)
    for line in _notes(done):
        tell(line)
    if task.quick:
        tell("  quick: a quarter of the data and a third of the epochs, too little to rank the levels")
    return done


def _recycle(task: Task, level: Level, store: Path) -> Recycling:
    cut = task.recipe(level).cut
    return recycle(task.build_model(), task.example(), cut=cut, store=store)


def _fill(task: Task, recyclings: Sequence[Recycling]) -> dict[str, FillReport]:
    """Fill both halves for all levels, in one pass each."""
    arguments = task.eval_arguments()
    halves = {"training": task.train_dataset, "evaluation": task.eval_dataset}
    return {half: _together(fill_many(recyclings, data, **arguments)) for half, data in halves.items()}


def _together(reports: Sequence[FillReport]) -> FillReport:
    """One pass over a data set as one report: bytes of all levels."""
    computed = max(report.computed for report in reports)
    written = sum(report.bytes_written for report in reports)
    return replace(reports[0], computed=computed, found=reports[0].objects - computed, bytes_written=written)


def _evaluate(task: Task, recycling: Recycling) -> dict[str, float]:
    return task.evaluate(recycling.model, recycling.loader(task.eval_dataset, **task.eval_arguments()))


def _run_level(task: Task, level: Level, recycling: Recycling | None, fill_seconds: float) -> LevelResult:
    recipe = task.recipe(level)
    model = task.build_model() if recycling is None else recycling.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = list(model.parameters() if recycling is None else recycling.parameters())
    quality: dict[str, list[float]] = {}
    seconds: list[list[float]] = []
    frozen = None
    if recycling is not None:
        with recycling.paused():  # one epoch of the same code, the prefix computed again
            frozen = _fit(task, model, trained, replace(recipe, epochs=1), recycling, 0, f"{NAMES[level]}, no store")[0]
    for seed in SEEDS:
        model.load_state_dict(start)
        seconds.append(_fit(task, model, trained, recipe, recycling, seed, f"{NAMES[level]}, seed {seed}"))
        for metric, value in _evaluated(task, model, recycling).items():
            quality.setdefault(metric, []).append(value)
    return LevelResult(
        level=level,
        cut=recipe.cut,
        quality=quality,
        fill_seconds=0.0 if recycling is None else fill_seconds,
        epoch_seconds=statistics.mean(second for one in seconds for second in one),
        total_seconds=statistics.mean(sum(one) for one in seconds),
        frozen_epoch_seconds=frozen,
        bytes_kept=0 if recycling is None else recycling.source.rows.nbytes,
        recipe=asdict(recipe),
    )


def _evaluated(task: Task, model: nn.Module, recycling: Recycling | None) -> dict[str, float]:
    if recycling is not None:
        return _evaluate(task, recycling)
    return task.evaluate(model, DataLoader(task.eval_dataset, **task.eval_arguments()))


def _fit(
    task: Task,
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    recipe: Recipe,
    recycling: Recycling | None,
    seed: int,
    title: str,
) -> list[float]:
    """Seconds of each epoch."""
    arguments = task.loader_arguments(recipe, seed=seed)
    data = task.train_dataset
    loader = DataLoader(data, **arguments) if recycling is None else recycling.loader(data, **arguments)
    with progress(f"{task.name}: {title}", recipe.epochs * len(loader), "steps") as shown:
        return task.fit(model, trained, _Counted(loader, shown.advance), recipe, seed=seed)


class _Counted:
    """A loader that tells of each batch."""

    def __init__(self, loader: Any, tell: Callable[[], None]) -> None:
        self._loader, self._tell = loader, tell

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch
            self._tell()


# -- what is printed ---------------------------------------------------------------------------------------------------


WIDE = 150
"""Characters that the whole table asks for; on a narrower terminal it comes as two."""


def _console() -> Any:
    from rich.console import Console

    # Without a terminal a table is as wide as it needs to be, so that a log shows all of it.
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _print(what: Any) -> None:
    _console().print(what)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _quality(result: LevelResult) -> str:
    return ", ".join(f"{m} {result.mean(m):.3f} ± {result.spread(m):.3f}" for m in result.quality)


def _tables(done: TaskResult, width: int) -> list[Any]:
    """One table, or one for quality and one for time where the terminal is narrow."""
    quality = [("level", "left"), ("cut", "left"), *((metric, "right") for metric in done.untrained)]
    names = (
        "fill\ns",
        "epoch\ns",
        "total\ns",
        "speed\nup",
        "with\nfilling",
        "against\nfrozen",
        "MB\nkept",
        "paid\nafter",
    )
    costs = [(name, "right") for name in names]
    rows = [_row(result, done.of("full")) for result in done.levels]
    untrained = ["untrained", "", *(f"{value:.3f}" for value in done.untrained.values())]
    count = len(quality)
    if width >= WIDE:
        return [_table(done.title, [*quality, *costs], [untrained, *rows])]
    timed = [[row[0], *row[count:]] for row in rows]
    return [
        _table(done.title, quality, [untrained, *(row[:count] for row in rows)]),
        _table("", [("level", "left"), *costs], timed),
    ]


def _table(title: str, columns: Sequence[tuple[str, Any]], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.collapse_padding = True
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _row(result: LevelResult, full: LevelResult) -> list[str]:
    row = [NAMES[result.level], result.cut or ""]
    row += [f"{result.mean(m):.3f} ± {result.spread(m):.3f}" for m in result.quality]
    row += [
        f"{result.fill_seconds:.1f}" if result.cut else "",
        f"{result.epoch_seconds:.2f}",
        f"{result.total_seconds:.1f}",
    ]
    if result.frozen_epoch_seconds is None:
        return [*row, "1.0x", "1.0x", "", "", ""]
    paid = result.epochs_until_paid
    return [
        *row,
        f"{full.total_seconds / result.total_seconds:.1f}x",
        f"{full.total_seconds / (result.total_seconds + result.fill_seconds):.1f}x",
        f"{result.frozen_epoch_seconds / result.epoch_seconds:.1f}x",
        f"{result.bytes_kept / 1e6:,.1f}",
        "never" if paid is None else str(paid),
    ]


def _notes(done: TaskResult) -> Iterator[str]:
    yield "  speed-up: total seconds of full training, by those of the level, without and with filling"
    yield "  against frozen: an epoch with the same prefix frozen but computed again, by one from the store"
    yield "  fill: one pass fills all levels; paid after: so many epochs, against the frozen prefix"
    for result in done.levels:
        used = result.recipe
        rate = f"rate {used['suffix_rate']:g}, " if used["suffix_rate"] else ""
        yield (
            f"  used for {NAMES[result.level]}: {_count(used['epochs'], 'epoch')}, batch {used['batch_size']}, AdamW, "
            f"{rate}head {used['head_rate']:g}, weight decay {used['weight_decay']:g}, scale {used['scale']:g}"
        )
    yield f"  seeds {' and '.join(map(str, SEEDS))}; loss: {done.loss}"
    yield f"  {machine()}, torch {torch.__version__}; the whole task took {done.seconds:.0f} s"
