"""The command ``torchrecycle``: reads arguments, calls a room, prints.

``torchrecycle demo --quick`` compares four levels of recycling in a minute and a half; ``torchrecycle sweep images
photos/`` does so on the user's own pictures; ``torchrecycle search photos/ --model timm/resnet18 --query red.jpg``
finds the pictures most like one; ``torchrecycle cuts --model timm/resnet18`` shows where a model can be cut,
and with ``--objects 8144`` what each cut then costs and saves;
``torchrecycle report compare A B`` puts two sweeps side by side; ``torchrecycle store ls activations/`` lists what a
store holds, and keeps it in order.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from torchrecycle.cli.cuts import show_cuts
from torchrecycle.cli.embed import embed
from torchrecycle.cli.errors import Debug, OneLineGroup, one_line_errors
from torchrecycle.cli.report import report_app
from torchrecycle.cli.search import search
from torchrecycle.cli.store import store_app
from torchrecycle.cli.sweeps import sweep_app
from torchrecycle.cli.words import keep_memory

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
app.command("cuts")(show_cuts)
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

        keep_memory()
        names = [task.value] if task else [name.value for name in TaskName]
        report = run_demo(names, quick=quick, store=store, out=out, silent=as_json)
        if as_json:
            print(json.dumps(report, indent=2))


if __name__ == "__main__":
    app()
