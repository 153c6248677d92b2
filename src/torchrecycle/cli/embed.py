"""``torchrecycle embed``: the embedding of each of a user's pictures or texts, as a Parquet file.

``torchrecycle embed photos/ --model timm/resnet18 --checkpoint resnet18.safetensors --out photos.parquet`` writes a row
for each picture: its name in the column ``file``, and 512 numbers in ``embedding``. Of a table of texts, the column of
texts keeps its name. Rows are written in groups of 1,024, so that a million of them need no more memory than these.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from torchrecycle.cli.asking import (
    CHUNK,
    AnyModel,
    Batch,
    Crop,
    Data,
    Device,
    FileColumn,
    Label,
    Labels,
    Reading,
    Size,
    Text,
    Tokens,
    introduce,
    prepared,
    refuse_early,
    refuse_out,
)
from torchrecycle.cli.errors import Debug, one_line_errors
from torchrecycle.cli.sweeps import Checkpoint, OutError, Pretrained, SkipBad
from torchrecycle.cli.words import as_utf8
from torchrecycle.files.errors import count_of, shown

if TYPE_CHECKING:
    from torchrecycle.cli.embedder import Embedder
    from torchrecycle.files.objects import Objects

__all__ = ["embed"]

ROWS = 1024
"""Of a row group of Parquet: so many are held in memory."""


def embed(
    data: Data,
    model: AnyModel,
    out: Annotated[Path, typer.Option(help="The Parquet file to write.", show_default=False)],
    text: Text = "text",
    label: Label = None,
    labels: Labels = None,
    file_column: FileColumn = "file",
    size: Size = None,
    crop: Crop = False,
    tokens: Tokens = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    batch: Batch = 32,
    skip_bad: SkipBad = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Write the embedding of each picture or text to a Parquet file, in the order of the data."""
    reading = Reading(data, text, tuple(label or ()), labels, file_column, skip_bad)
    with one_line_errors(debug, lambda: "Nothing was written", smaller="a smaller --batch or --size"):
        from torchrecycle.cli.embedder import Wish
        from torchrecycle.files.objects import whole_pictures

        wish = Wish(model, checkpoint, pretrained, size, crop, tokens, batch, device)
        refuse_early(wish, reading)
        refuse_out(out, ".parquet", data)
        with redirect_stdout(sys.stderr):  # what a library says is no part of the answer
            embedder, objects = prepared(wish, reading)
            if objects.kind == "images":
                objects = whole_pictures(objects, range(len(objects)), skip_bad=skip_bad)
            introduce(embedder, objects)
            dim = _write_parquet(out, embedder, objects, text)
        print(f"{out}: {count_of(len(objects), 'embedding')} of {dim:,} numbers")


# -- the file ----------------------------------------------------------------------------------------------------------


def _write_parquet(out: Path, embedder: Embedder, objects: Objects, text: str) -> int:
    """A row for each object, in groups. What was there stays whole until all is written.

    Returns:
        How long an embedding is.

    Raises:
        OutError: two columns have one name, or pyarrow is not installed, or it cannot be written.
    """
    arrow, parquet = _arrow()
    from torchrecycle.progress import progress

    named = {text if objects.kind == "texts" else "file": objects.items if objects.kind == "texts" else objects.names}
    for name in objects.columns:
        if name in named or name == "embedding":
            raise OutError(f"--label {shown(name)} has the name of a column that is written anyway: rename it")
    arrays = {name: _array(arrow, column) for name, column in {**named, **objects.columns}.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = out.with_name(f".{out.name}-{os.getpid()}.part")
    writer, dim = None, 0
    try:
        with progress("encoding", len(objects)) as told:
            for begin in range(0, len(objects), ROWS):
                rows = _embedded(embedder, objects, begin, told.advance)
                if writer is None:
                    dim = rows.shape[1]
                    writer = parquet.ParquetWriter(begun, _schema(arrow, arrays, dim, embedder))
                flat = arrow.array(rows.reshape(-1))
                columns = [array.slice(begin, len(rows)) for array in arrays.values()]
                writer.write_table(
                    arrow.Table.from_arrays(
                        [*columns, arrow.FixedSizeListArray.from_arrays(flat, dim)], schema=writer.schema
                    )
                )
        assert writer is not None
        writer.close()
        os.replace(begun, out)
    except OSError as error:
        worded = OutError(f"cannot write {out}: {error.strerror or error}")
        worded.errno = error.errno
        raise worded from error
    finally:
        if writer is not None and writer.is_open:
            writer.close()
        begun.unlink(missing_ok=True)
    return dim


def _embedded(embedder: Embedder, objects: Objects, begin: int, advance: Callable[[int], None]) -> Any:
    parts = []
    for start in range(begin, min(begin + ROWS, len(objects)), CHUNK):
        some = objects.items[start : min(start + CHUNK, begin + ROWS)]
        rows = embedder.encode(some)
        for place, row in enumerate(rows):
            if not np.isfinite(row).all():
                raise OutError(f"the embedding of {shown(objects.names[start + place])} holds NaN or infinity")
        parts.append(rows)
        advance(len(some))
    return np.concatenate(parts)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise OutError('writing Parquet needs pyarrow: pip install "torchrecycle[similarity]"') from None
    return arrow, parquet


def _array(arrow: Any, column: Sequence[Any]) -> Any:
    """Of the type that the cells have; as texts where they have several."""
    try:
        return arrow.array(list(column))
    except (arrow.ArrowException, TypeError, ValueError):
        return arrow.array([None if cell is None else as_utf8(cell) for cell in column], type=arrow.string())


def _schema(arrow: Any, arrays: dict[str, Any], dim: int, embedder: Embedder) -> Any:
    said = {
        "model": embedder.name,
        "weights": embedder.weights,
        "identity": embedder.identity,
        "random weights": embedder.random,
        "length": "one",
        "torchrecycle": importlib.metadata.version("torchrecycle"),
    }
    columns = [(name, array.type) for name, array in arrays.items()]
    schema = arrow.schema([*columns, ("embedding", arrow.list_(arrow.float32(), dim))])
    return schema.with_metadata({"torchrecycle": json.dumps(said)})
