"""The command ``torchrecycle``: reads arguments, calls a room, prints.

``torchrecycle demo --quick`` compares four levels of recycling in a minute and a half; ``torchrecycle store verify
activations/`` looks for damaged rows. What a user did wrong is one line on stderr and exit code 2; ``--debug`` shows
where it came from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from torchrecycle.errors import RecycleError, StoreError

__all__ = ["app"]

app = typer.Typer(
    help="Layer recycling for PyTorch: compute the frozen first layers once, and train only the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(help="What a store holds, and whether it is sound.", no_args_is_help=True)
app.add_typer(store_app, name="store")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class TaskName(str, Enum):
    """The tasks of the demo."""

    images = "images"
    texts = "texts"


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """A mistake is one line on stderr and exit code 2."""
    try:
        yield
    except RecycleError as error:
        if debug:
            raise
        typer.echo(f"torchrecycle: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("torchrecycle: stopped. What was computed is kept; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None


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
    debug: Debug = False,
) -> None:
    """Compare full training with recycling 50 %, 75 % and all but the head, on images and on texts."""
    with _one_line_errors(debug):
        from torchrecycle.demo.run import run_demo

        names = [task.value] if task else [name.value for name in TaskName]
        report = run_demo(names, quick=quick, store=store, silent=as_json)
        if as_json:
            print(json.dumps(report, indent=2))


# -- store -------------------------------------------------------------------------------------------------------------

Folder = Annotated[Path, typer.Argument(help="The store's folder.")]


def _each(folder: Path, show: Callable[[str, Any], None]) -> int:
    """Call `show` with every fingerprint of the store and its rows."""
    from torchrecycle.store import FolderStore

    if not folder.exists():
        raise StoreError(f"there is no folder {folder}")
    store = FolderStore(folder)
    found = store.fingerprints()
    for fingerprint in found:
        show(fingerprint, store.existing(fingerprint))
    return len(found)


@store_app.command("ls")
def list_store(folder: Folder, debug: Debug = False) -> None:
    """One line for each fingerprint: model, cut, precision, rows, bytes."""
    with _one_line_errors(debug):

        def show(fingerprint: str, rows: Any) -> None:
            about = rows.about
            words = f"{about.get('model', '?')} cut at {about.get('cut', '?')}, {about.get('precision', '?')} precision"
            print(f"{fingerprint}  {len(rows):>10,} rows  {rows.nbytes / 1e6:>10,.1f} MB  {words}")

        _each(folder, show)


@store_app.command("stat")
def stat_store(folder: Folder, debug: Debug = False) -> None:
    """How much the store holds in all."""
    with _one_line_errors(debug):
        totals = [0, 0]

        def add(fingerprint: str, rows: Any) -> None:
            totals[0] += len(rows)
            totals[1] += rows.nbytes

        count = _each(folder, add)
        print(f"{count} fingerprints, {totals[0]:,} rows, {totals[1] / 1e6:,.1f} MB")


@store_app.command("verify")
def verify_store(folder: Folder, debug: Debug = False) -> None:
    """Check every row. Damaged segments are set aside, so that their rows are computed again."""
    with _one_line_errors(debug):
        sound = []

        def verify(fingerprint: str, rows: Any) -> None:
            report = rows.verify()
            sound.append(report.ok)
            print(f"{fingerprint}  {report}")

        _each(folder, verify)
        if not all(sound):
            sys.exit(1)


if __name__ == "__main__":
    app()
