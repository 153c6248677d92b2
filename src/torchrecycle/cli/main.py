"""The command ``torchrecycle``: reads arguments, calls a room, prints.

``torchrecycle demo --quick`` compares four levels of recycling in a minute and a half; ``torchrecycle sweep images
photos/`` does so on the user's own pictures; ``torchrecycle search photos/ --model timm/resnet18 --query red.jpg``
finds the pictures most like one; ``torchrecycle cuts --model timm/resnet18`` shows where a model can be cut;
``torchrecycle report compare A B`` puts two sweeps side by side; ``torchrecycle store ls activations/`` lists what a
store holds, and keeps it in order.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrecycle.cli.embed import embed
from torchrecycle.cli.errors import Debug, OneLineGroup, one_line_errors
from torchrecycle.cli.report import report_app
from torchrecycle.cli.search import search
from torchrecycle.cli.store import store_app
from torchrecycle.cli.sweeps import sweep_app

__all__ = ["app"]

app = typer.Typer(
    cls=OneLineGroup,
    help="Layer recycling for PyTorch: compute the frozen first layers once, and train only the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(sweep_app, name="sweep")
app.add_typer(report_app, name="report")
app.add_typer(store_app, name="store")
app.command("embed")(embed)
app.command("search")(search)


class TaskName(str, Enum):
    """The tasks of the demo."""

    images = "images"
    texts = "texts"


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Less data and fewer epochs: 90 seconds on two cores.")
    ] = False,
    task: Annotated[TaskName | None, typer.Option(help="Only this task; both if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every figure.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="Where rows are kept. A second run with the same folder fills nothing.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the page is written; .torchrecycle-demo/report if not given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare full training with recycling 50 %, 75 % and all but the head, on images and on texts."""

    def kept() -> str:
        rows = f"Kept: what the frozen layers gave, in {store}" if store is not None else "Nothing is kept"
        return f"{rows}; the same command trains anew"

    with one_line_errors(debug, kept, smaller="--quick, or end other programs"):
        from torchrecycle.demo.run import run_demo

        names = [task.value] if task else [name.value for name in TaskName]
        report = run_demo(names, quick=quick, store=store, out=out, silent=as_json)
        if as_json:
            print(json.dumps(report, indent=2))


# -- cuts --------------------------------------------------------------------------------------------------------------


@app.command("cuts")
def show_cuts(
    model: Annotated[
        str, typer.Option(help="timm/NAME, torchvision/NAME, or a folder with a transformers config.json.")
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="A file of weights for this model.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of images, in pixels.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Objects in the example that is timed.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 32,
    every: Annotated[
        bool, typer.Option("--all", help="Every module that is called once, not only the blocks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every figure.")] = False,
    debug: Debug = False,
) -> None:
    """Where a model can be cut, what each cut saves and what it costs. Nothing is downloaded."""
    with one_line_errors(debug, smaller="a smaller --batch, --size or --tokens"):
        from torchrecycle.cost import cuts
        from torchrecycle.models import load_model

        with redirect_stdout(sys.stderr):  # what a library says while it makes a model is no part of the answer
            loaded = load_model(model, checkpoint=checkpoint, size=size, batch=batch, tokens=tokens)
            found = cuts(loaded.model, loaded.example, all=every)
        nearest = found.nearest(0.5)
        if as_json:
            print(json.dumps(_cuts_in_full(loaded, found, nearest), indent=2))
        else:
            _print_cuts(loaded, found, nearest)


def _cuts_in_full(loaded: Any, found: Any, nearest: Any) -> dict[str, Any]:
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


def _print_cuts(loaded: Any, found: Any, nearest: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
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
    console.print(_advice(nearest), markup=False, soft_wrap=True)


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


def _advice(nearest: Any) -> str:
    if nearest is None:
        return "No cut of these is valid; --all shows every module."
    return (
        f"Nearest to 50 %: {nearest.name} (level {nearest.level:.2f})\n"
        f"recycle(model, example, cut='{nearest.name}', store=...)"
    )


if __name__ == "__main__":
    app()
