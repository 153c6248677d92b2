"""What ``embed`` and ``search`` ask for alike: the data, the model and how they go together.

Whether the data are pictures or texts is told by their path alone (`torchrecycle.files.objects.kind_of`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrecycle.cli.errors import OptionError
from torchrecycle.cli.sweeps import OutError
from torchrecycle.cli.words import check_device, left_out_line, say_random
from torchrecycle.files.errors import count_of, shown

if TYPE_CHECKING:
    from torchrecycle.cli.embedder import Embedder, Wish
    from torchrecycle.files.objects import Objects

__all__ = [
    "CHUNK",
    "AnyModel",
    "Batch",
    "Crop",
    "Data",
    "Device",
    "FileColumn",
    "Label",
    "Labels",
    "Reading",
    "Size",
    "Text",
    "Tokens",
    "introduce",
    "prepared",
    "refuse_early",
    "refuse_out",
]

CHUNK = 256
"""Objects that are encoded and then kept together."""

Data = Annotated[
    Path,
    typer.Argument(
        help="Pictures: a folder, tar or zip. Texts: a table, CSV, TSV, JSONL, JSON or Parquet.", show_default=False
    ),
]
AnyModel = Annotated[
    str,
    typer.Option(
        help="timm/NAME, torchvision/NAME, a folder with a transformers model, one that sweep --save has written, or a "
        "saved SimilarityModel.",
        show_default=False,
    ),
]
Text = Annotated[str, typer.Option(help="The column of texts.")]
Labels = Annotated[Path | None, typer.Option(help="A table that names pictures; others are left out.")]
FileColumn = Annotated[str, typer.Option(help="That table's column of pictures.")]
Label = Annotated[
    list[str] | None,
    typer.Option(help="A column to keep beside each object; may be given again.", show_default=False),
]
Size = Annotated[
    int | None,
    typer.Option(min=16, help="Height and width that pictures get, in pixels; the model's own if not given."),
]
Crop = Annotated[
    bool, typer.Option("--crop", help="Cut out the middle, as the model's own recipe does; else all is squeezed in.")
]
Tokens = Annotated[int | None, typer.Option(min=2, help="Tokens of a text, at most; 128 if not given.")]
Batch = Annotated[int, typer.Option(min=1, help="Objects that the model sees at once.")]
Device = Annotated[
    str | None, typer.Option(help="The processor, cpu, or a graphics card, cuda, which is taken if there is one.")
]


@dataclass(frozen=True, slots=True)
class Reading:
    """What is said of the data."""

    data: Path
    text: str
    columns: tuple[str, ...]
    labels: Path | None
    file_column: str
    skip_bad: bool


def refuse_early(wish: Wish, reading: Reading) -> None:
    """Whatever needs no data and no model to be seen.

    Raises:
        OptionError: an option cannot be used.
    """
    from torchrecycle.files.objects import kind_of

    check_device(wish.device)
    if not wish.model.strip():
        raise OptionError(
            "--model is empty: give timm/NAME, torchvision/NAME, or a folder with a transformers or a saved model"
        )
    twice = [name for n, name in enumerate(reading.columns) if name in reading.columns[:n]]
    if twice:
        raise OptionError(f"--label {shown(twice[0])} is given twice: give each column once")
    if kind_of(reading.data) == "texts" and reading.labels is not None:
        raise OptionError(
            f"--labels names pictures, and {shown(reading.data)} is a table of texts: name its columns with --label"
        )


def prepared(wish: Wish, reading: Reading, leave_out: Sequence[Path] = ()) -> tuple[Embedder, Objects]:
    """The model and the data; the data first, since they are quicker to be wrong."""
    from torchrecycle.cli.embedder import load_embedder
    from torchrecycle.files.objects import find_objects

    objects = find_objects(
        reading.data,
        text=reading.text,
        labels=reading.labels,
        file_column=reading.file_column,
        columns=reading.columns,
        skip_bad=reading.skip_bad,
        leave_out=leave_out,
    )
    return load_embedder(wish, objects.kind), objects


def introduce(embedder: Embedder, objects: Objects) -> None:
    typer.echo(f"data: {objects.where}", err=True)
    for line in objects.left_out:
        typer.echo(f"  {left_out_line(line)}", err=True)
    cut = embedder.cut_off(objects.items) if objects.kind == "texts" else 0
    if cut:
        typer.echo(
            f"  {count_of(cut, 'text')} {'has' if cut == 1 else 'have'} more than {embedder.longest} tokens; what is "
            "beyond is not read",
            err=True,
        )
    typer.echo(f"model: {embedder.name}, weights {embedder.weights}", err=True)
    if embedder.random:
        say_random(published=objects.kind == "images")


def refuse_out(path: Path, suffix: str, data: Path) -> None:
    """
    Raises:
        OutError: it is a folder, of another kind, cannot be written, or is the data themselves.
    """
    if path.is_dir():
        raise OutError(f"--out {path} is a folder: give the name of a file that ends in {suffix}")
    if path.suffix.lower() != suffix:
        raise OutError(f"--out {path} does not end in {suffix}, which is what is written: give another name")
    if path.resolve() == data.resolve():
        raise OutError(f"--out {path} is the data themselves: give another name")
    there = next(each for each in path.absolute().parents if each.exists())
    if not there.is_dir():
        raise OutError(f"--out {path} cannot be written, since {there} is a file: give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutError(f"nothing can be written in {there}: give a name in another folder with --out")
