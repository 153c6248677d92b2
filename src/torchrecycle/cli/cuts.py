"""``torchrecycle cuts``: where a model can be cut; with a data set's size, what each cut would cost and save.

``torchrecycle cuts --model timm/vit_tiny_patch16_224 --objects 8144 --epochs 30 --precision own --precision int8``
tells for each cut how many bytes are kept, what filling takes, what an epoch's frozen layers take computed and read,
and after how many epochs filling has paid. Where reading is slower than computing again, it says so.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrecycle.cli.errors import Debug, OptionError, one_line_errors
from torchrecycle.cli.words import keep_memory

if TYPE_CHECKING:
    from torchrecycle.report.cut_costs import CutCost

__all__ = ["show_cuts"]

EPOCHS = 10
"""How often a data set is gone through, if nobody says."""
BATCH, TRAINING_BATCH = 2, 16
"""Objects in the example: two are enough to find cuts, but are slow for their number."""


class KeptAs(str, Enum):
    """Of rows."""

    own = "own"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


def show_cuts(
    model: Annotated[
        str, typer.Option(help="timm/NAME, torchvision/NAME, or a folder with a transformers config.json.")
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="A file of weights for this model.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of images, in pixels.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Objects in the example that is timed; {BATCH} if not given, and {TRAINING_BATCH} with --objects.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 32,
    every: Annotated[
        bool, typer.Option("--all", help="Every module that is called once, not only the blocks.")
    ] = False,
    objects: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many objects your data set has: then it is predicted what keeping them costs and saves at each "
            "cut.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How often you go through them, with --objects; {EPOCHS} if not given.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        list[KeptAs] | None,
        typer.Option(
            help="In which precision rows are kept, with --objects; may be given several times. own is the model's.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Where rows would be kept, with --objects: how fast that disk is is measured there. The system's "
            "folder for temporary files if not given."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every figure.")] = False,
    debug: Debug = False,
) -> None:
    """Where a model can be cut, what each cut saves and what it costs. Nothing is downloaded."""
    with one_line_errors(debug, smaller="a smaller --batch, --size or --tokens"):
        _refuse_without_objects(objects, {"--epochs": epochs, "--precision": precision, "--store": store})
        from torchrecycle.cost import cuts
        from torchrecycle.models import load_model

        with redirect_stdout(sys.stderr):  # what a library says while it makes a model is no part of the answer
            batch = batch or (TRAINING_BATCH if objects else BATCH)
            loaded = load_model(model, checkpoint=checkpoint, size=size, batch=batch, tokens=tokens)
            found = cuts(loaded.model, loaded.example, all=every)
            costs = [] if objects is None else _costs(loaded, found, objects, epochs or EPOCHS, precision, store)
        nearest = found.nearest(0.5)
        if as_json:
            told = {} if objects is None else {"predictions": [cost.to_json() for cost in costs]}
            print(json.dumps({**_in_full(loaded, found, nearest), **told}, indent=2))
        else:
            _print_cuts(loaded, found)
            if objects is not None:
                _print_costs(costs, objects, store)
            _console().print(_advice(nearest, costs), markup=False, soft_wrap=True)


def _refuse_without_objects(objects: int | None, others: dict[str, Any]) -> None:
    """
    Raises:
        OptionError: an option says nothing without the size of a data set.
    """
    given = [name for name, value in others.items() if value]
    if objects is None and given:
        raise OptionError(f"{given[0]} says nothing without the size of a data set: give --objects N too")


def _costs(
    loaded: Any, found: Any, objects: int, epochs: int, precision: Sequence[KeptAs] | None, store: Path | None
) -> list[CutCost]:
    from torchrecycle.report.cut_costs import OWN, predict_cut_costs

    keep_memory()
    names = list(dict.fromkeys(one.value for one in precision or ())) or [OWN]
    return predict_cut_costs(
        loaded.model,
        loaded.example,
        found,
        objects=objects,
        epochs=epochs,
        precisions=names,
        store=None if store is None else _there(store),
    )


def _there(store: Path) -> Path:
    """The folder, or the one above it that is there: nothing is made where nothing is kept.

    Raises:
        OptionError: it is a file.
    """
    there = next(each for each in (store.absolute(), *store.absolute().parents) if each.exists())
    if not there.is_dir():
        raise OptionError(f"--store {store} cannot be a folder, since {there} is a file: give another one")
    return there


def _in_full(loaded: Any, found: Any, nearest: Any) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "class": found.model,
        "weights": loaded.weights,
        "example": loaded.shapes(),
        "objects": found.objects,
        "seconds": found.seconds,
        "flops": found.flops,
        "parameters": found.parameters,
        "nearest_to_half": nearest.name if nearest else None,
        "cuts": [dataclasses.asdict(cut) for cut in found],
    }


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def _print_cuts(loaded: Any, found: Any) -> None:
    from rich.table import Table

    console = _console()
    words = [
        found.heading(),
        "example: " + ", ".join(f"{name} {shape}" for name, shape in loaded.shapes().items()),
        f"weights: {loaded.weights}",
    ]
    console.print("\n".join(words), markup=False, soft_wrap=True)
    reasons = list(dict.fromkeys(cut.reason for cut in found if not cut.valid))
    rows = [_cut_cells(cut, reasons) for cut in found]
    widths = [max(len(cell) for cell in column) for column in zip(_HEAD[1:], *(row[1:] for row in rows), strict=True)]
    left = max(console.width - sum(widths) - 2 * len(widths), 12)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, head in enumerate(_HEAD):
        table.add_column(head, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        table.add_row(_shortened(row[0], left), *row[1:], style=None if row[-1].isdigit() else "dim")
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"no {number}: {reason}", markup=False, style="dim")


_HEAD = ("cut", "level", "frozen", "FLOPs", "time", "bytes/object", "kept")


def _cut_cells(cut: Any, reasons: Sequence[str]) -> tuple[str, ...]:
    shares = f"{cut.flops_share:.0%}", f"{cut.seconds_share:.0%}"
    if not cut.valid:
        return cut.name, f"{cut.level:.2f}", "", *shares, "", f"no {reasons.index(cut.reason) + 1}"
    kept = f"{cut.bytes_per_object:,}", f"{cut.leaves}"
    return cut.name, f"{cut.level:.2f}", f"{cut.parameters:,}", *shares, *kept


def _shortened(name: str, width: int) -> str:
    """The name without its middle: its beginning says where, its end which."""
    if len(name) <= width:
        return name
    end = (width - 2) * 2 // 3
    return f"{name[: width - 2 - end]}..{name[-end:]}"


def _print_costs(costs: Sequence[CutCost], objects: int, store: Path | None) -> None:
    from rich.console import Console

    from torchrecycle.report.cut_costs import cut_cost_tables
    from torchrecycle.report.terminal import WIDE

    # Without a terminal a table is as wide as it needs to be, so that a log shows all of it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    console.print(f"\npredicted for {objects:,} objects of the example's size:", markup=False, soft_wrap=True)
    for table in cut_cost_tables(costs, console.width):
        console.print(table)
    where = "the folder for temporary files" if store is None else store
    console.print(
        "computed, read: what the frozen layers take in an epoch, computed each time or read from a store\n"
        "not counted: to train what comes after the cut, which takes the same either way\n"
        f"measured: a forward of the example, and rows of that size on the disk of {where}",
        markup=False,
        soft_wrap=True,
        style="dim",
    )


def _advice(nearest: Any, costs: Sequence[CutCost] = ()) -> str:
    from torchrecycle.report.cut_costs import slow_cuts

    if nearest is None:
        return "No cut of these is valid; --all shows every module."
    words = (
        f"Nearest to 50 %: {nearest.name} (level {nearest.level:.2f})\n"
        f"recycle(model, example, cut='{nearest.name}', store=...)"
    )
    slow = [cost.precision for cost in slow_cuts(costs) if cost.cut == nearest.name]
    if not slow:
        return words
    kept = "" if slow == ["own"] else f" kept as {', '.join(slow)}"
    return f"{words}\nReading{kept} is slower there than computing again: freeze it without a store, or cut elsewhere"
