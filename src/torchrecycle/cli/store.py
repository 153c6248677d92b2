"""``torchrecycle store``: what a store holds, whether it is sound, and keeping it in order.

``torchrecycle store ls activations/`` lists what is there; ``verify`` reads every row and sets aside what is damaged;
``compact`` makes few large files of many small ones; ``evict --max-bytes 20GB`` and ``rm`` make room; ``diff`` says why
rows were computed again; ``forget`` erases an object. All are methods of `torchrecycle.store.FolderStore` as well.

Exit code 1 means that something is not as it should be: damaged rows were found, not all could be erased.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchrecycle.cli.errors import Debug, OptionError, one_line_errors
from torchrecycle.cli.words import ago, at_time, printable
from torchrecycle.errors import StoreError

if TYPE_CHECKING:
    from torchrecycle.store import CompactReport, FolderStore, LeafSpec
    from torchrecycle.store.holdings import Details, Holding

__all__ = ["store_app"]

store_app = typer.Typer(
    help="What a store holds, whether it is sound, and keeping it in order.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(help="The store's folder.", show_default=False, metavar="PATH")]
Fingerprint = Annotated[
    str, typer.Argument(help="A fingerprint, or its first letters.", show_default=False, metavar="FINGERPRINT")
]
OneOrAll = Annotated[
    str | None,
    typer.Argument(help="A fingerprint, or its first letters; all if not given.", metavar="FINGERPRINT"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON with every figure.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

SHORT = 12
"""Letters of a fingerprint in a table; that many are accepted too."""

MOST_SEGMENTS = 20
"""How many are listed one by one."""

WIDE = 200
"""Columns of a table in a file."""

NARROW = 110
"""On a terminal of fewer columns, data sets have a line of their own below the table."""

MOST_DATA_SETS = 2
"""How many are named in a table."""


def _opened(folder: Path) -> FolderStore:
    from torchrecycle.store import FolderStore

    if not folder.exists():
        raise StoreError(f"there is no folder {folder}")
    return FolderStore(folder)


def _size(nbytes: int) -> str:
    from torchrecycle.store.sizes import bytes_in_words

    return bytes_in_words(nbytes)


def _counted(number: int, what: str) -> str:
    from torchrecycle.store.sizes import counted

    return counted(number, what)


def _print_lines(lines: Iterable[str], *, err: bool = False) -> None:
    for line in lines:
        typer.echo(printable(line), err=err)


# -- looking -----------------------------------------------------------------------------------------------------------


@store_app.command("ls")
def list_store(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """One line for each fingerprint: model, cut, precision, rows, bytes, last used, data sets."""
    with one_line_errors(debug):
        holdings = _opened(folder).ls()
        if as_json:
            typer.echo(json.dumps([_holding_in_full(holding) for holding in holdings], indent=2))
        elif holdings:
            _print_holdings(holdings)
            _print_lines(
                [f"{holding.fingerprint[:SHORT]}: {holding.problem}" for holding in holdings if holding.problem]
            )
            _print_lines([_total(holdings)])
        else:
            _say_empty(folder)


def _say_empty(folder: Path) -> None:
    _print_lines([f"{folder} holds no rows yet"])


def _total(holdings: Sequence[Holding]) -> str:
    rows, nbytes = sum(holding.rows for holding in holdings), sum(holding.nbytes for holding in holdings)
    return f"{_counted(len(holdings), 'fingerprint')}, {_counted(rows, 'row')}, {_size(nbytes)}"


def _print_holdings(holdings: Sequence[Holding]) -> None:
    head = ("fingerprint", "model", "cut", "precision", "rows", "size", "last used", "data sets")
    narrow = _columns() < NARROW
    rows = [
        (
            holding.fingerprint[:SHORT],
            holding.model.rpartition(".")[2],
            holding.cut,
            holding.precision,
            f"{holding.rows:,}",
            _size(holding.nbytes),
            ago(holding.used),
            _data_sets(holding),
        )[: len(head) - narrow]
        for holding in holdings
    ]
    _print_table(head[: len(head) - narrow], rows, right=(4, 5))
    if narrow:
        lines = [(holding.fingerprint[:SHORT], _data_sets(holding)) for holding in holdings]
        _print_lines([f"{name}: {words}" for name, words in lines if words])


def _data_sets(holding: Holding) -> str:
    more = len(holding.data_sets) - MOST_DATA_SETS
    named = ", ".join(map(str, holding.data_sets[:MOST_DATA_SETS])) + f" and {more} more" * (more > 0)
    return named + _notes(holding)


def _columns() -> int:
    from rich.console import Console

    return Console().width if sys.stdout is not None and sys.stdout.isatty() else WIDE


def _notes(holding: Holding) -> str:
    notes = [f"{_counted(len(holding.damaged), 'damaged file')} set aside"] if holding.damaged else []
    notes += ["cannot be read in full, see below"] if holding.problem else []
    return f"{' ' if holding.data_sets and notes else ''}{'; '.join(f'({note})' for note in notes)}"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if sys.stdout is None:  # closed by whoever started this
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, name in enumerate(head):
        # What would be shortened in the middle is useless; names of models and data sets may go over several lines.
        fixed = position in right or name in ("fingerprint", "segment", "precision", "last used")
        table.add_column(name, justify="right" if position in right else "left", no_wrap=fixed, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _holding_in_full(holding: Holding) -> dict[str, Any]:
    return {**dataclasses.asdict(holding), "used": at_time(holding.used)}


@store_app.command("stat")
def stat_store(folder: Folder, fingerprint: OneOrAll = None, as_json: Json = False, debug: Debug = False) -> None:
    """Everything about one fingerprint: what it covers, the form of its rows, segments, sizes. Of all, the sums."""
    with one_line_errors(debug):
        store = _opened(folder)
        if fingerprint is None:
            holdings = store.ls()
            if as_json:
                sums = {"rows": sum(h.rows for h in holdings), "nbytes": sum(h.nbytes for h in holdings)}
                typer.echo(json.dumps({"fingerprints": len(holdings), **sums}, indent=2))
            else:
                _print_lines([_total(holdings)])
            return
        details = store.stat(fingerprint)
        if as_json:
            typer.echo(json.dumps(_details_in_full(details), indent=2))
        else:
            _print_details(details)


def _details_in_full(details: Details) -> dict[str, Any]:
    return {
        **_holding_in_full(details.holding),
        "about": details.about,
        "leaves": [{"shape": leaf.shape, "ragged": leaf.ragged, "dtype": str(leaf.dtype)} for leaf in details.leaves],
        "segments": [{**dataclasses.asdict(one), "used": at_time(one.used)} for one in details.segments],
        "leftovers": [dataclasses.asdict(left) for left in details.leftovers],
        "others": dict(details.others),
    }


def _print_details(details: Details) -> None:
    from torchrecycle.store.holdings import in_words

    holding = details.holding
    lines = [("fingerprint", holding.fingerprint), ("model", holding.model), ("cut", _cut(details))]
    lines += [("precision", holding.precision)]
    lines += [(name, _in_words(details.about.get(name))) for name in ("autocast", "key inputs")]
    lines += [("row", _leaf(leaf)) for leaf in details.leaves]
    lines += [
        ("rows", f"{holding.rows:,} in {_counted(holding.segments, 'segment')}, {_size(holding.nbytes)} with all else"),
        ("last used", ago(holding.used)),
        ("data sets", ", ".join(map(str, holding.data_sets)) or "none is written down"),
        ("other files", ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in details.others.items())),
        ("left over", in_words(details.leftovers)),
        ("covers", _covers(details)),
        ("problem", holding.problem),
    ]
    _print_lines([f"{name:<12} {words}" for name, words in lines if words])
    shown = sorted(details.segments, key=lambda one: -one.used)[:MOST_SEGMENTS]
    if shown:
        rows = [(o.name, _rows(o.rows), _size(o.nbytes), ago(o.used), "merged" * o.merged) for o in shown]
        typer.echo()
        _print_table(("segment", "rows", "size", "last used", ""), rows, right=(1, 2))
    more = len(details.segments) - len(shown)
    _print_lines([f"and {more} more, used longer ago"] if more else [])


def _rows(count: int) -> str:
    return "not readable" if count < 0 else f"{count:,}"


def _cut(details: Details) -> str:
    level = details.about.get("level")
    return f"{details.holding.cut} (level {level:.2f})" if isinstance(level, float) else details.holding.cut


def _leaf(leaf: LeafSpec) -> str:
    from torchrecycle.store.segment import row_bytes

    dtype = str(leaf.dtype).removeprefix("torch.")
    if leaf.ragged:
        return f"{dtype} {['length', *leaf.shape]}, {_size(row_bytes(leaf))} a step"
    return f"{dtype} {list(leaf.shape)}, {_size(row_bytes(leaf))}"


def _covers(details: Details) -> str:
    parts = details.about.get("parts")
    if not isinstance(parts, dict):
        return ""
    modules = sum(name.endswith(")") for name in parts)
    return f"{_counted(modules, 'module')}, {_counted(len(parts) - modules, 'tensor')} and settings; see about.json"


def _in_words(value: Any) -> str:
    if value in (None, "None"):
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@store_app.command("diff")
def diff_store(
    folder: Folder,
    a: Annotated[str, typer.Argument(help="A fingerprint, or its first letters.", show_default=False, metavar="A")],
    b: Annotated[str, typer.Argument(help="Another one.", show_default=False, metavar="B")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Why rows were computed again: in what two fingerprints differ."""
    with one_line_errors(debug):
        found = _opened(folder).diff(a, b)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        else:
            _print_lines(str(found).splitlines())


# -- keeping in order --------------------------------------------------------------------------------------------------


@store_app.command("verify")
def verify_store(folder: Folder, fingerprint: OneOrAll = None, debug: Debug = False) -> None:
    """Check every row. Damaged segments are set aside, so that their rows are computed again."""
    with one_line_errors(debug):
        from torchrecycle.store.holdings import in_words

        found = _opened(folder).verify(fingerprint)
        if not found:
            _say_empty(folder)
        for one in found:
            _print_lines(f"{one.fingerprint}  {one}".splitlines())
            words = in_words(one.leftovers)
            _print_lines([f"  lying there: {words}"] if words else [])
        left = [left for one in found for left in one.leftovers if left.is_dead]
        if any(one.kind != "damaged" for one in left):
            _print_lines([f"`torchrecycle store compact {folder}` removes what killed processes left"])
        if any(one.kind == "damaged" for one in left):
            _print_lines(["*.damaged is read by nobody and may be deleted; `torchrecycle store evict` takes it first"])
    if not all(one.ok for one in found):
        raise typer.Exit(1)


@store_app.command("compact")
def compact_store(folder: Folder, fingerprint: OneOrAll = None, debug: Debug = False) -> None:
    """Merge small segments, drop rows that came twice and what killed writers left. Others may read meanwhile."""

    def kept() -> str:
        return "Nothing is lost; the same command goes on from there"

    def told(report: CompactReport) -> None:
        _print_lines([f"{report.fingerprint}  {report}"])

    with one_line_errors(debug, kept):
        store = _opened(folder)
        if fingerprint is None and not store.fingerprints():
            _say_empty(folder)
        store.compact(fingerprint, told=told)


@store_app.command("evict")
def evict_store(
    folder: Folder,
    max_bytes: Annotated[
        str, typer.Option(help="What the store may take: 20GB, '500 MB', 1.5GiB.", show_default=False)
    ],
    debug: Debug = False,
) -> None:
    """Remove the least recently used rows until the store is small enough."""

    def kept() -> str:
        return "What was evicted before is gone; the same command goes on from there"

    with one_line_errors(debug, kept):
        report = _opened(folder).evict(max_bytes)
        _print_lines([str(report), *(f"  removed entirely: {name}" for name in report.fingerprints)])
    if not report.fits:
        raise typer.Exit(1)


@store_app.command("forget")
def forget_in_store(
    folder: Folder,
    keys: Annotated[
        list[str],
        typer.Argument(
            help="Keys of objects, 32 hexadecimal digits each. docs/privacy.md says how to get them.",
            metavar="KEY",
            show_default=False,
        ),
    ],
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Erase objects: their rows under every fingerprint, and the manifests that name them."""

    def kept() -> str:
        return "Not all of it is erased; the same command goes on from there"

    with one_line_errors(debug, kept):
        import numpy as np

        from torchrecycle.store.forgetting import as_keys

        found = np.concatenate([as_keys(key) for key in keys])
        store = _opened(folder)
        objects = _counted(len(found), "object")
        _ask(f"Erase {objects} from {folder}, and the manifests of the data sets that hold it?", yes)
        report = store.forget(found)
        _print_lines(str(report).splitlines())
    if not report.ok:
        raise typer.Exit(1)


@store_app.command("rm")
def remove_from_store(folder: Folder, fingerprint: Fingerprint, yes: Yes = False, debug: Debug = False) -> None:
    """Remove a fingerprint with all of its rows."""

    def kept() -> str:
        compact = f"`torchrecycle store compact {folder}` takes away what is left of it after an hour"
        return f"If `ls` lists it, it is whole; else {compact}"

    with one_line_errors(debug, kept):
        store = _opened(folder)
        _ask(f"Remove {_described(store, fingerprint)}?", yes)
        nbytes = store.rm(fingerprint)
        _print_lines([f"removed, {_size(nbytes)}"])


def _described(store: FolderStore, fingerprint: str) -> str:
    try:
        holding = store.stat(fingerprint).holding
    except StoreError:  # a link, or one that cannot be opened: `rm` says which, or refuses
        return fingerprint
    return printable(
        f"{holding.fingerprint} ({holding.model} cut at {holding.cut}: {holding.rows:,} rows, {_size(holding.nbytes)})"
    )


def _ask(question: str, yes: bool) -> None:
    """Go on if the answer is yes.

    Raises:
        OptionError: nobody is there to answer.
        typer.Exit: the answer is no.
    """
    if yes:
        return
    try:
        sure = typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)
        raise OptionError("nothing was removed, since nobody answered: give --yes") from None
    if not sure:
        typer.echo("nothing was removed")
        raise typer.Exit(1)
