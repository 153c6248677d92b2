"""``torchrecycle report``: what sweeps found, to be read once more.

``torchrecycle report compare sweep-cars sweep-cars-arcface --out compare.html`` puts two sweeps side by side: what
differs between them, and whether it made a difference at any level. Nothing is trained and no model is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrecycle.cli.errors import Debug, OptionError, one_line_errors

if TYPE_CHECKING:
    from torchrecycle.report.compare import Comparison
    from torchrecycle.sweep.results import SweepResult
    from torchrecycle.sweep.scored import Scored

__all__ = ["report_app"]

report_app = typer.Typer(
    help="What sweeps found, to be read once more and side by side.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@report_app.callback()
def report() -> None:
    """What sweeps found, to be read once more and side by side."""


@report_app.command("compare")
def compare_sweeps(
    a: Annotated[Path, typer.Argument(help="A sweep's folder, or its results.json.", metavar="A", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", metavar="B", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="A page to write, an HTML file; none if not given.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with every figure, instead of the table.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Two sweeps side by side: what differs, and at which level one is better, slower or larger than the other."""
    with one_line_errors(debug):
        from torchrecycle.report.compare import compare
        from torchrecycle.report.reading import read_result

        if out is not None:
            _refuse(out, a)
        results = read_result(a), read_result(b)
        comparison = compare(*results, scored=(_scored(a, results[0]), _scored(b, results[1])))
        if as_json:
            print(json.dumps({"a": {"from": _text(a)}, "b": {"from": _text(b)}, **comparison.to_json()}, indent=2))
        else:
            _show(comparison)
        if out is not None:
            _write(comparison, out, (_text(a), _text(b)))
            print(f"The page: {out}", file=sys.stderr if as_json else sys.stdout)


def _scored(where: Path, result: SweepResult) -> Scored:
    """What lies beside the results."""
    from torchrecycle.sweep.scored import read_scored

    return read_scored(where if where.is_dir() else where.parent, result)


def _refuse(out: Path, a: Path) -> None:
    """Before anything is printed.

    Raises:
        OptionError: the page cannot be written there.
    """
    from torchrecycle.cli.asking import refuse_out
    from torchrecycle.report.compare_page import is_comparison

    refuse_out(out, ".html", a)
    if out.exists() and not is_comparison(out):
        raise OptionError(f"{out} is there and is no page of a comparison: give another name with --out")


def _text(path: Path) -> str:
    from torchrecycle.cli.words import as_utf8

    return as_utf8(path)


def _show(comparison: Comparison) -> None:
    from rich.console import Console

    from torchrecycle.report.compare_table import print_comparison
    from torchrecycle.report.terminal import WIDE

    print_comparison(comparison, console=Console(width=None if sys.stdout.isatty() else WIDE, highlight=False))


def _write(comparison: Comparison, out: Path, names: tuple[str, str]) -> None:
    from torchrecycle.report.compare_page import write_comparison

    try:
        write_comparison(out, comparison, names=names)
    except OSError as error:
        raise OptionError(f"cannot write {out}: {error.strerror}") from error
