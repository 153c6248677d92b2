"""``torchrecycle sweep images | pairs | texts``: from a folder or a table to a recommendation and a page.

``torchrecycle sweep images photos/ --model timm/resnet18 --checkpoint resnet18.safetensors`` reads
``photos/class/*.jpg``, trains at four levels, and leaves a page, all figures and the kept rows in
``sweep-photos-resnet18/``. The same command goes on where it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from torchrecycle.cli.errors import Debug, OptionError, one_line_errors
from torchrecycle.cli.words import check_device, keep_memory, left_out_line, say_random, telling
from torchrecycle.errors import RecycleError, StoreError
from torchrecycle.files.marker import MARKER, MARKER_TEXT, is_marked

if TYPE_CHECKING:
    from torchrecycle.sweep import ObjectiveTask, Settings, Sweep, SweepPlan, SweepResult, Trunk

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


class HeadName(str, Enum):
    """What the head is made of."""

    linear = "linear"
    mlp = "mlp"


class Precision(str, Enum):
    """Of kept rows."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    auto = "auto"


Model = Annotated[
    str, typer.Option(help="timm/NAME, torchvision/NAME, or a folder with a transformers model.", show_default=False)
]
TextModel = Annotated[str, typer.Option(help="A folder with a transformers model of texts.", show_default=False)]
Checkpoint = Annotated[Path | None, typer.Option(help="A file of weights for this model: .safetensors, .pth, .bin.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Take the weights that timm or torchvision publish; may download them.")
]
Levels = Annotated[
    str, typer.Option(help="What to compare: full (training), head (only), and how many per cent are recycled.")
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Passes over the data at each level, five times as many for head only; a few if not given."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings at each level; two or more tell how much is chance.")]
Fraction = Annotated[
    float,
    typer.Option(help="Train on this share of what is there to train on, 0 to 1; what is tested stays the same."),
]
Batch = Annotated[int | None, typer.Option(min=2, help="Objects, or pairs, in a step of training.")]
Rate = Annotated[
    str | None,
    typer.Option(
        help="Learning rate of the pretrained layers, such as 3e-4, or of some levels, such as full=1e-4,50=3e-4; "
        "where none is given, one is looked for."
    ),
]
HeadRate = Annotated[float | None, typer.Option(help="Learning rate of the head, the new last layer.")]
Head = Annotated[HeadName, typer.Option(help="The head, the new last layer: one layer, linear, or two, mlp.")]
Loss = Annotated[
    str | None,
    typer.Option(
        help="The loss. For similarity and pairs the name of one of pytorch-metric-learning, such as SupConLoss or "
        "ArcFaceLoss; for classify cross-entropy or label-smoothing. Each task has its own if not given."
    ),
]
Search = Annotated[
    bool, typer.Option(help="Look for a rate at each level, on objects that are neither trained on nor tested.")
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="How numbers are kept: float16 takes half the room, int8 a quarter; auto takes the smallest that loses "
        "less than another batch size does. The model's own if not given."
    ),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(
        help="What the store may take, such as 20GB: levels that do not fit together take turns, and one that does not "
        "fit at all is trained without a store."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="How long it may take, such as 30m or 1h30m, all runs of this sweep together. A few batches are measured "
        "first; what has no time is left out, full training before all else, and what is expected of it is said. "
        "Stopped, it goes on with what is left; with a larger budget it does more. Unlimited if not given."
    ),
]
Views = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Train on augmented pictures (other parts of them, and mirrored), of which so many are kept for each; an "
        "epoch draws one. As they are if not given.",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for what the frozen layers give, used again by later runs; OUT/activations if not given."
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the page and the figures; sweep-DATA-MODEL, here, if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with every figure, instead of the table.")]
Save = Annotated[
    Path | None, typer.Option(help="Folder to keep the best model of the recommended level in, ready for use.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and say what it was.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that read the data; none, or up to 8 beside a graphics card.")
]
Device = Annotated[str | None, typer.Option(help="cpu, or cuda for a graphics card, which is taken if there is one.")]
Task_ = Annotated[
    What, typer.Option("--task", help="classify tells known classes apart; similarity finds new classes' objects.")
]
Tokens = Annotated[int | None, typer.Option(min=2, help="Tokens of a text, at most; 128 if not given.")]
Table = Annotated[Path, typer.Argument(help="A table: CSV, TSV, JSONL, JSON or Parquet.")]


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
    max_bytes: str | None = None
    views: int | None = None
    budget: str | None = None
    began: float = field(default_factory=time.monotonic)
    """When the command was, as `time.monotonic` tells it."""
    smaller: str = "or fewer --tokens"
    """What else than a smaller batch takes less memory."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.out is not None:
            return self.out
        model = telling(Path(self.model)) if Path(self.model).is_dir() else self.model.rpartition("/")[2]
        return Path(f"sweep-{telling(self.data)}-{model}")

    @property
    def rows(self) -> Path:
        """Where what the frozen layers give is kept."""
        return self.store if self.store is not None else self.folder / "activations"

    @property
    def folders(self) -> dict[str, Path]:
        """All that is written, by option."""
        save = {} if self.save is None else {"--save": self.save}
        return {"--out": self.folder, "--store": self.rows, **save}

    def plan(self, tell: Callable[[str], None]) -> SweepPlan:
        from torchrecycle.sweep import SweepPlan

        return SweepPlan(
            store=self.rows,
            results=self.folder,
            levels=self.levels.split(","),
            seeds=range(self.seeds),
            search=self.search,
            budget=self.budget,
            began=self.began,
            max_bytes=self.max_bytes,
            precision=self.precision.value if self.precision is not None else None,
            views=self.views,
            weights=self.folder / "weights" if self.save is not None else None,
            command=shlex.join(["torchrecycle", *sys.argv[1:]]),
            tell=tell,
        )


@sweep_app.command("images")
def sweep_images(
    where: Annotated[Path, typer.Argument(help="A folder, tar or zip: CLASS/PICTURE, or any with --labels.")],
    model: Model,
    labels: Annotated[Path | None, typer.Option(help="A table that names pictures and their classes.")] = None,
    file_column: Annotated[str, typer.Option(help="That table's column of pictures.")] = "file",
    label_column: Annotated[str, typer.Option(help="That table's column of classes.")] = "label",
    task: Task_ = What.classify,
    size: Annotated[
        int | None,
        typer.Option(min=16, help="Height and width that pictures get, in pixels; the model's own if not given."),
    ] = None,
    crop: Annotated[
        bool,
        typer.Option("--crop", help="Cut out the middle, as the model's own recipe does; else all is squeezed in."),
    ] = False,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    head: Head = HeadName.linear,
    loss: Loss = None,
    views: Views = None,
    search: Search = True,
    precision: PrecisionOption = None,
    max_bytes: MaxBytes = None,
    budget: Budget = None,
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
    settings = _settings(fraction, epochs, batch, rate, head_rate, head, loss, search, skip_bad, workers, device)
    settings["views"] = views
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
        max_bytes,
        views,
        budget=budget,
        smaller="or a smaller --size",
    )

    def make(settings: Settings) -> tuple[ObjectiveTask, Trunk]:
        from torchrecycle.files import find_pictures
        from torchrecycle.sweep import load_trunk, picture_task

        trunk = load_trunk(model, "images", checkpoint=checkpoint, size=size, pretrained=pretrained, crop=crop)
        pictures = find_pictures(
            where,
            labels=labels,
            file_column=file_column,
            label_column=label_column,
            skip_bad=skip_bad,
            leave_out=list(asked.folders.values()),
        )
        return picture_task(pictures, trunk, task.value, settings), trunk

    _run(asked, make, debug)


@sweep_app.command("texts")
def sweep_texts(
    table: Table,
    model: TextModel,
    text: Annotated[str, typer.Option(help="The column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="The column of classes.")] = "label",
    task: Task_ = What.classify,
    tokens: Tokens = None,
    checkpoint: Checkpoint = None,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    head: Head = HeadName.linear,
    loss: Loss = None,
    search: Search = True,
    precision: PrecisionOption = None,
    max_bytes: MaxBytes = None,
    budget: Budget = None,
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
    settings = _settings(
        fraction, epochs, batch, rate, head_rate, head, loss, search, skip_bad, workers, device, tokens
    )
    asked = _Asked(
        table,
        model,
        checkpoint,
        False,
        levels,
        seeds,
        search,
        precision,
        store,
        out,
        save,
        as_json,
        settings,
        max_bytes,
        budget=budget,
    )

    def make(settings: Settings) -> tuple[ObjectiveTask, Trunk]:
        from torchrecycle.files import find_texts
        from torchrecycle.sweep import load_trunk, text_task

        texts = find_texts(table, text=text, label=label, skip_bad=skip_bad)
        trunk = load_trunk(model, "texts", checkpoint=checkpoint)
        return text_task(texts, trunk, task.value, settings), trunk

    _run(asked, make, debug)


@sweep_app.command("pairs")
def sweep_pairs(
    table: Table,
    model: TextModel,
    left: Annotated[str, typer.Option(help="The column of one side: what is asked.")] = "question",
    right: Annotated[str, typer.Option(help="The column of the other side: what is to be found.")] = "answer",
    tokens: Tokens = None,
    checkpoint: Checkpoint = None,
    levels: Levels = "full,50,75,head",
    epochs: Epochs = None,
    seeds: Seeds = 1,
    fraction: Fraction = 1.0,
    batch: Batch = None,
    rate: Rate = None,
    head_rate: HeadRate = None,
    head: Head = HeadName.linear,
    loss: Loss = None,
    search: Search = True,
    precision: PrecisionOption = None,
    max_bytes: MaxBytes = None,
    budget: Budget = None,
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
    settings = _settings(
        fraction, epochs, batch, rate, head_rate, head, loss, search, skip_bad, workers, device, tokens
    )
    asked = _Asked(
        table,
        model,
        checkpoint,
        False,
        levels,
        seeds,
        search,
        precision,
        store,
        out,
        save,
        as_json,
        settings,
        max_bytes,
        budget=budget,
    )

    def make(settings: Settings) -> tuple[ObjectiveTask, Trunk]:
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
    rate: str | None,
    head_rate: float | None,
    head: HeadName,
    loss: str | None,
    search: bool,
    skip_bad: bool,
    workers: int | None,
    device: str | None,
    tokens: int | None = None,
) -> dict[str, Any]:
    return {
        "fraction": fraction,
        "epochs": epochs,
        "batch_size": batch,
        "rate": rate,
        "head_rate": head_rate,
        "head": head.value,
        "loss": loss,
        "search": search,
        "skip_bad": skip_bad,
        "workers": workers,
        "device": device,
        "tokens": tokens,
    }


# -- what all three do -------------------------------------------------------------------------------------------------


_SMALLER_BATCH = "a smaller --batch, by which training and testing both go"


def _run(asked: _Asked, make: Callable[[Settings], tuple[ObjectiveTask, Trunk]], debug: bool) -> None:
    with one_line_errors(debug, lambda: _kept(asked), smaller=f"{_SMALLER_BATCH}, {asked.smaller}"):
        _refuse_early(asked)
        from torchrecycle.sweep import Settings, Sweep
        from torchrecycle.sweep.kept import finite

        keep_memory()

        with redirect_stdout(sys.stderr) as stderr:  # what a library says is no part of the answer
            tell: Callable[[str], None] = lambda line: print(f"  {line}", flush=True, file=stderr)  # noqa: E731
            task, trunk = _made(make, Settings(**asked.settings))
            plan = asked.plan(tell)
            _introduce(task, plan, asked.folder)
            _begin(asked.folder)
            run = Sweep(task.build_model, task, plan)
            result = run.result()
        if asked.as_json:
            print(json.dumps(finite(result.to_json()), indent=2), flush=True)
        else:
            _show(result)
        page = _write(result, asked)
        print(f"The page: {page}", file=sys.stderr if asked.as_json else sys.stdout, flush=True)
        if asked.save is not None:
            with redirect_stdout(sys.stderr):
                _save(run, task, trunk, asked.save)
        if task.random_weights and asked.as_json:  # else the table has said it
            say_random(published=task.kind == "images")


def _made(make: Callable[[Settings], tuple[ObjectiveTask, Trunk]], settings: Settings) -> tuple[ObjectiveTask, Trunk]:
    """Random weights are the same in each run, or the next one would find nothing of what this one has kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(settings)


def _kept(asked: _Asked) -> str:
    """What is left of a sweep that is stopped. Never fails, and imports nothing: an import may be what was stopped."""
    finished = sum(map(_is_training, (asked.folder / "journal").glob("*.json")))
    found = [f"{finished} finished training{'' if finished == 1 else 's'} in {asked.folder}"] if finished else []
    found += [f"what the frozen layers gave, in {asked.rows}"] if asked.rows.is_dir() else []
    if not found:
        return "Nothing had been computed yet"
    return f"Kept: {' and '.join(found)}; the same command goes on from there"


def _is_training(record: Path) -> bool:
    try:
        return json.loads(record.read_text(encoding="utf-8")).get("kind") == "trial"
    except (OSError, ValueError, AttributeError):
        return False


# -- what can be refused before anything that takes time ---------------------------------------------------------------


def _refuse_early(asked: _Asked) -> None:
    """Whatever needs no data and no model to be seen.

    Raises:
        RecycleError: an option cannot be used, or a folder.
    """
    from torchrecycle.store import open_store
    from torchrecycle.sweep.budget import parse_budget
    from torchrecycle.sweep.halving import require_optuna
    from torchrecycle.sweep.run import parse_levels

    _check_numbers(asked.settings)
    _check_bytes(asked.max_bytes)
    if asked.budget is not None:
        parse_budget(asked.budget)
    if asked.search and asked.settings["rate"] is None:
        require_optuna()
    parse_levels(asked.levels.split(","))
    check_device(asked.settings["device"])
    if not asked.model.strip():
        raise OptionError("--model is empty: give timm/NAME, torchvision/NAME, or a folder with a transformers model")
    _refuse_one_for_two({"the data": asked.data, **asked.folders})
    _refuse_other_things(asked.folder)
    _refuse_unwritable(asked.folder, "--out")
    open_store(asked.rows)
    _refuse_unwritable(asked.rows, "--store")
    if asked.save is not None:
        _refuse_other_models(asked.save)
        _refuse_unwritable(asked.save, "--save")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutError('the page has plots, which need matplotlib: pip install "torchrecycle[sweep]"')


def _check_numbers(settings: dict[str, Any]) -> None:
    if not 0 < settings["fraction"] <= 1:
        raise OptionError(f"--fraction {settings['fraction']:g} is no share: give more than 0 and at most 1")
    if settings["rate"] is not None:
        settings["rate"] = _rates(settings["rate"])
    if settings["head_rate"] is not None:
        _checked_rate("--head-rate", settings["head_rate"])


def _check_bytes(said: str | None) -> None:
    from torchrecycle.store.sizes import parse_bytes

    if said is not None:
        try:
            parse_bytes(said)
        except StoreError as error:
            raise OptionError(f"--max-bytes: {error}") from error


def _rates(said: str) -> float | dict[str, float]:
    """One rate for all levels, or one for some.

    >>> _rates("3e-4"), _rates("full=1e-4, head=0.01")
    (0.0003, {'full': 0.0001, 'head': 0.01})
    """
    if "=" not in said:
        return _checked_rate("--rate", said)
    from torchrecycle.sweep.run import parse_levels

    rates = {}
    for part in said.split(","):
        level, _, rate = part.partition("=")
        (level,) = parse_levels([level or "?"])
        rates[level] = _checked_rate("--rate", rate)
    return rates


def _checked_rate(option: str, value: str | float) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise OptionError(f"{option} {value} is no learning rate: give more than 0, such as 3e-4 or full=1e-4,50=3e-4")
    return rate


def _refuse_one_for_two(places: dict[str, Path]) -> None:
    seen: dict[Path, str] = {}
    for what, path in places.items():
        other = seen.setdefault(path.resolve(), what)
        if other != what:
            raise OutError(f"{what} {path} is the folder of {other} too: give another {what}")


def _refuse_other_things(folder: Path) -> None:
    """A page of somebody else must not be written over."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutError(f"{folder} is a file, and the results are a folder: give another --out")
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if held and not is_marked(folder):
        raise OutError(
            f"{folder} holds {', '.join(held[:3])}{' and more' * (len(held) > 3)}, and no results of a sweep: give a "
            "new folder with --out"
        )


def _refuse_other_models(folder: Path) -> None:
    """As saving does, but before the hours that training takes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _is_saved_model(folder):
        raise OutError(f"{folder} is not an empty folder, and no saved model either: give another --save")


def _is_saved_model(folder: Path) -> bool:
    from torchrecycle.sweep.save import MARK, SCRIPT

    if not (folder / SCRIPT).is_file():
        return False
    with (folder / SCRIPT).open(encoding="utf-8", errors="replace") as script:
        return MARK in script.readline()


def _refuse_unwritable(folder: Path, option: str) -> None:
    """Nothing is made here, so that a mistake in the data leaves no empty folder."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise OutError(f"{folder} cannot be made, since {there} is a file: give another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutError(f"nothing can be written in {there}: give a folder with {option} where it can")


# -- what is said and written ------------------------------------------------------------------------------------------


def _introduce(task: ObjectiveTask, plan: SweepPlan, folder: Path) -> None:
    per = 2 if task.kind == "pairs" else 1
    splits = [
        f"{len(split) // per:,} to {purpose}"
        for split, purpose in ((task.train, "train on"), (task.validation, "choose a rate"), (task.test, "test"))
        if split is not None
    ]
    typer.echo(f"data: {task.data}", err=True)
    typer.echo(f"  {', '.join(splits)}", err=True)
    for line in task.left_out:
        typer.echo(f"  {left_out_line(line)}", err=True)
    typer.echo(f"model: {task.model}, weights {task.weights}", err=True)
    if task.random_weights:
        say_random(published=task.kind == "images")
    typer.echo(f"results: {folder}; what the frozen layers give is kept in {plan.store}", err=True)
    other = _other_results(task, folder)
    if other is not None:
        typer.echo(f"  its page of {other} is replaced at the end: to keep both, give another --out", err=True)


def _other_results(task: ObjectiveTask, folder: Path) -> str | None:
    """Whose page is in the folder, if it is of other data, another question or another model."""
    from torchrecycle.report.reading import ResultsError, read_result
    from torchrecycle.sweep.identity import digest_of

    try:
        earlier = read_result(folder)
    except (ResultsError, OSError):
        return None  # none yet, or none that is worth keeping
    if earlier.ran.task == digest_of(task.identity):
        return None
    return f"another task ({earlier.ran.data}, {earlier.metric}, {earlier.ran.model})"


def _begin(folder: Path) -> None:
    """From here on the folder is known as ours, however the sweep ends."""
    try:
        _write_whole(folder / MARKER, MARKER_TEXT)
    except OSError as error:
        raise _unwritten(f"cannot write to {folder}", error) from error


def _unwritten(what: str, error: OSError) -> OutError:
    worded = OutError(f"{what}: {error.strerror}")
    worded.errno = error.errno
    return worded


def _write(result: SweepResult, asked: _Asked) -> Path:
    from torchrecycle.report import write_page

    folder = asked.folder
    try:
        return write_page([result], folder, title=f"{result.title} {result.ran.model}")
    except OSError as error:
        if error.errno is None:
            raise
        raise _unwritten(f"cannot write the page to {folder}", error) from error


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _show(result: SweepResult) -> None:
    from rich.console import Console

    from torchrecycle.report import print_table
    from torchrecycle.report.terminal import WIDE

    print_table(result, console=Console(width=None if sys.stdout.isatty() else WIDE, highlight=False))


def _save(run: Sweep, task: ObjectiveTask, trunk: Trunk, folder: Path) -> None:
    from torchrecycle.sweep import save_servable

    best, result = run.best_weights(), run.result()
    save_servable(folder, task, trunk, best)
    which = "the recommended level" if result.recommendation.level else "the best level, though none is recommended"
    typer.echo(f"saved: {best.level.words}, seed {best.trial.seed}, {which}, in {folder}", err=True)
