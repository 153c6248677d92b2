"""``torchrecycle sweep images | pairs | texts``: from a folder or a table to a recommendation and a page.

``torchrecycle sweep images photos/ --model timm/resnet18 --checkpoint resnet18.safetensors`` reads
``photos/class/*.jpg``, trains at four levels, and leaves a page, all figures and the kept rows in
``sweep-photos-resnet18/``. The same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrecycle.cli.errors import Debug, one_line_errors
from torchrecycle.errors import RecycleError

if TYPE_CHECKING:
    from torchrecycle.sweep import Settings, SweepPlan, SweepResult, Task, Trunk

__all__ = ["OutError", "sweep_app"]

sweep_app = typer.Typer(
    help="Which level is right for your own pictures or texts? Trains at each, and writes a page that recommends one.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OutError(RecycleError, OSError):
    """The folder for the results holds something else, or cannot be written."""


class What(str, Enum):
    """What is learned."""

    similarity = "similarity"
    classify = "classify"


class Precision(str, Enum):
    """Of kept rows."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Option(help="timm/NAME, torchvision/NAME, or a folder with a transformers model.", show_default=False)
]
Checkpoint = Annotated[Path | None, typer.Option(help="A file of weights for this model: .safetensors, .pth, .bin.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="The weights that timm or torchvision publish: may download them.")
]
Levels = Annotated[str, typer.Option(help="Which levels: full, head, and per cent of the blocks that are recycled.")]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the data, at each level; five times as many for head only.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings at each level.")]
Fraction = Annotated[
    float, typer.Option(help="Train on this share of the training split only; what is tested stays the same.")
]
Batch = Annotated[int | None, typer.Option(min=2, help="Objects, or pairs, in a step.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate of the trunk; without it, one is looked for.")]
HeadRate = Annotated[float | None, typer.Option(help="Learning rate of the head.")]
Search = Annotated[bool, typer.Option(help="Look for a rate at each level, on a validation split.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Of kept rows; the model's own if not given.")]
StoreOption = Annotated[Path | None, typer.Option(help="Where rows are kept; OUT/activations if not given.")]
Out = Annotated[Path | None, typer.Option(help="Where page and figures go; sweep-DATA-MODEL if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with every figure.")]
Save = Annotated[Path | None, typer.Option(help="Keep the best model of the recommended level here.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and say what it was.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that read the data.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a graphics card if there is one.")]
Task_ = Annotated[
    What, typer.Option("--task", help="classify tells known classes apart; similarity finds new classes' objects.")
]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all three commands are asked for."""

    data: Path
    model: str
    checkpoint: Path | None
    pretrained: bool
    levels: str
    seeds: int
    search: bool
    precision: Precision | None
    store: Path | None
    out: Path | None
    save: Path | None
    as_json: bool
    settings: dict[str, Any]
    size: int | None = None

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.out is not None:
            return self.out
        data = self.data.resolve()
        stem = data.name.partition(".")[0] or "data"
        if data.is_file() and stem in ("images", "data", "train"):  # says nothing: its folder says more
            stem = data.parent.name or stem
        model = Path(self.model).resolve().name if Path(self.model).is_dir() else self.model.rpartition("/")[2]
        return Path(f"sweep-{stem}-{model}")

    def plan(self, tell: Callable[[str], None]) -> SweepPlan:
        from torchrecycle.sweep import SweepPlan

        return SweepPlan(
            store=self.store if self.store is not None else self.folder / "activations",
            journal=self.folder / "journal",
            levels=self.levels.split(","),
            seeds=range(self.seeds),
            search=self.search and self.settings["rate"] is None,
            precision=self.precision.value if self.precision is not None else None,
            weights=self.folder / "weights" if self.save is not None else None,
            command=shlex.join(["torchrecycle", *sys.argv[1:]]),
            tell=tell,
        )


@sweep_app.command("images")
def sweep_images(
    where: Annotated[Path, typer.Argument(help="A folder or tar: CLASS/PICTURE, or anything with --labels.")],
    model: Model,
    labels: Annotated[Path | None, typer.Option(help="A table that names pictures and their classes.")] = None,
    file_column: Annotated[str, typer.Option(help="Its column of pictures.")] = "file",
    label_column: Annotated[str, typer.Option(help="Its column of classes.")] = "label",
    task: Task_ = What.classify,
    size: Annotated[int | None, typer.Option(min=16, help="Pixels of a picture's side; the model's own.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    search: Search = True,
    precision: PrecisionOption = None,
    store: StoreOption = None,
    out: Out = None,
    save: Save = None,
    as_json: Json = False,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Pictures: in a folder for each class, or in a folder or tar with a table of their classes."""
    settings = _settings(fraction, epochs, batch, rate, head_rate, workers, device)
    asked = _Asked(
        where,
        model,
        checkpoint,
        pretrained,
        levels,
        seeds,
        search,
        precision,
        store,
        out,
        save,
        as_json,
        settings,
        size,
    )

    def make(settings: Settings) -> tuple[Task, Trunk]:
        from torchrecycle.files import find_pictures
        from torchrecycle.sweep import load_trunk, picture_task

        trunk = load_trunk(model, "images", checkpoint=checkpoint, size=size, pretrained=pretrained)
        pictures = find_pictures(
            where, labels=labels, file_column=file_column, label_column=label_column, skip_bad=skip_bad
        )
        return picture_task(pictures, trunk, task.value, settings), trunk

    _run(asked, make, debug)


@sweep_app.command("texts")
def sweep_texts(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL or Parquet.")],
    model: Model,
    text: Annotated[str, typer.Option(help="The column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    task: Task_ = What.classify,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of a text, at most; 128 if not given.")] = None,
    checkpoint: Checkpoint = None,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    search: Search = True,
    precision: PrecisionOption = None,
    store: StoreOption = None,
    out: Out = None,
    save: Save = None,
    as_json: Json = False,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Texts that have a class, in a table."""
    settings = _settings(fraction, epochs, batch, rate, head_rate, workers, device, tokens)
    asked = _Asked(
        table, model, checkpoint, False, levels, seeds, search, precision, store, out, save, as_json, settings
    )

    def make(settings: Settings) -> tuple[Task, Trunk]:
        from torchrecycle.files import find_texts
        from torchrecycle.sweep import load_trunk, text_task

        texts = find_texts(table, text=text, label=label, skip_bad=skip_bad)
        trunk = load_trunk(model, "texts", checkpoint=checkpoint)
        return text_task(texts, trunk, task.value, settings), trunk

    _run(asked, make, debug)


@sweep_app.command("pairs")
def sweep_pairs(
    table: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL or Parquet.")],
    model: Model,
    left: Annotated[str, typer.Option(help="The column of one side: what is asked.")] = "question",
    right: Annotated[str, typer.Option(help="The column of the other side: what is to be found.")] = "answer",
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of a text, at most; 128 if not given.")] = None,
    checkpoint: Checkpoint = None,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    search: Search = True,
    precision: PrecisionOption = None,
    store: StoreOption = None,
    out: Out = None,
    save: Save = None,
    as_json: Json = False,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Pairs of texts that belong together, in a table: questions and answers, titles and bodies."""
    settings = _settings(fraction, epochs, batch, rate, head_rate, workers, device, tokens)
    asked = _Asked(
        table, model, checkpoint, False, levels, seeds, search, precision, store, out, save, as_json, settings
    )

    def make(settings: Settings) -> tuple[Task, Trunk]:
        from torchrecycle.files import find_pairs
        from torchrecycle.sweep import load_trunk, pair_task

        pairs = find_pairs(table, left=left, right=right, skip_bad=skip_bad)
        trunk = load_trunk(model, "texts", checkpoint=checkpoint)
        return pair_task(pairs, trunk, settings), trunk

    _run(asked, make, debug)


def _settings(
    fraction: float,
    epochs: int | None,
    batch: int | None,
    rate: float | None,
    head_rate: float | None,
    workers: int | None,
    device: str | None,
    tokens: int | None = None,
) -> dict[str, Any]:
    if not 0 < fraction <= 1:
        raise typer.BadParameter(f"{fraction} is no share: give more than 0 and at most 1", param_hint="--fraction")
    for name, value in (("--rate", rate), ("--head-rate", head_rate)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise typer.BadParameter(f"{value} is no learning rate: give more than 0, such as 3e-4", param_hint=name)
    return {
        "fraction": fraction,
        "epochs": epochs,
        "batch_size": batch,
        "rate": rate,
        "head_rate": head_rate,
        "workers": workers,
        "device": device,
        "tokens": tokens,
    }


# -- what all three do -------------------------------------------------------------------------------------------------


def _run(asked: _Asked, make: Callable[[Settings], tuple[Task, Trunk]], debug: bool) -> None:
    with one_line_errors(debug, lambda: _kept(asked)):
        from torchrecycle.sweep import Settings, sweep
        from torchrecycle.sweep.run import parse_levels

        parse_levels(asked.levels.split(","))  # before anything that takes time
        _refuse_other_things(asked.folder)
        if asked.save is not None:
            _refuse_full_folder(asked.save)
        with redirect_stdout(sys.stderr) as stderr:
            tell: Callable[[str], None] = lambda line: print(f"  {line}", flush=True, file=stderr)  # noqa: E731
            task, trunk = make(Settings(**asked.settings))
            plan = asked.plan(tell)
            _introduce(task, plan, asked.folder)
            result = sweep(task, plan)
            page = _write(result, asked.folder)
            if asked.save is not None:
                _save(task, trunk, plan, result, asked.save)
        if asked.as_json:
            print(json.dumps(_finite(result.to_json()), indent=2))
        else:
            _show(result)
        print(f"The page: {page}", file=sys.stderr if asked.as_json else sys.stdout)


def _kept(asked: _Asked) -> str:
    """What is left of a sweep that is stopped."""
    from torchrecycle.sweep.journal import Journal

    finished = Journal(asked.folder / "journal").count("trial")
    store = asked.store if asked.store is not None else asked.folder / "activations"
    if not finished and not store.exists():
        return "Nothing had been computed yet"
    trainings = f"{finished} finished training{'' if finished == 1 else 's'}"
    return f"Kept are {trainings} in {asked.folder} and the rows in {store}; the same command goes on from there"


def _refuse_other_things(folder: Path) -> None:
    """A page of somebody else must not be written over."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutError(f"{folder} is a file, and the results are a folder: give another --out")
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if held and not {"journal", "activations"} & set(held):
        raise OutError(
            f"{folder} holds {', '.join(held[:3])}{' and more' * (len(held) > 3)}, and no results of a sweep: "
            "give a new "
            "folder with --out"
        )


def _refuse_full_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "load.py").is_file():
        raise OutError(f"{folder} is not an empty folder, and no saved model either: give another --save")


def _introduce(task: Task, plan: SweepPlan, folder: Path) -> None:
    per = 2 if task.kind == "pairs" else 1
    validation = f", {len(task.validation) // per:,} to choose a rate" if task.validation is not None else ""
    typer.echo(f"{task.data}", err=True)
    typer.echo(
        f"{task.model}, weights {task.weights}: {len(task.train) // per:,} to train on{validation}, "
        f"{len(task.test) // per:,} to test",
        err=True,
    )
    for line in task.left_out:
        typer.echo(f"left out: {line}", err=True)
    if task.random_weights:
        typer.secho(
            "THE WEIGHTS ARE RANDOM, since none were given: what comes out says nothing about a pretrained model. Give "
            "--checkpoint FILE, or --pretrained for the published ones.",
            err=True,
            bold=True,
            fg="red",
        )
    typer.echo(f"results: {folder}, rows: {plan.store}", err=True)


def _write(result: SweepResult, folder: Path) -> Path:
    from torchrecycle.report import write_page

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(result.to_json()), indent=2)
    temporary = folder / f".results-{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / "results.json")
    finally:
        temporary.unlink(missing_ok=True)
    return write_page([result], folder, title=f"{result.title} {result.ran.model}")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _show(result: SweepResult) -> None:
    from rich.console import Console

    from torchrecycle.report import print_table
    from torchrecycle.report.terminal import WIDE

    print_table(result, console=Console(width=None if sys.stdout.isatty() else WIDE, highlight=False))


def _save(task: Task, trunk: Trunk, plan: SweepPlan, result: SweepResult, folder: Path) -> None:
    from torchrecycle.sweep import best_weights, save_servable

    best = best_weights(task, plan, result)
    save_servable(folder, task, trunk, best)
    which = "the recommended level" if result.recommendation.level else "the best level, though none is recommended"
    typer.echo(f"saved: {best.level.words}, seed {best.trial.seed}, {which}, in {folder}", err=True)
