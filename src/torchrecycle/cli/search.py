"""``torchrecycle search``: the objects among a user's pictures or texts that are nearest to a query.

``torchrecycle search photos.tar --model cars-model/ --query red.jpg --index photos.index`` prints the ten pictures that
are nearest to one, and leaves a page of them. The index keeps the embeddings, so that the next search encodes what is
new.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from torchrecycle.cli.errors import Debug, OptionError, one_line_errors
from torchrecycle.cli.sweeps import Checkpoint, OutError, Pretrained, SkipBad
from torchrecycle.cli.words import as_utf8, left_out_line, telling
from torchrecycle.files.errors import count_of

if TYPE_CHECKING:
    from torchrecycle.cli.embedder import Embedder
    from torchrecycle.files.objects import Objects
    from torchrecycle.similarity.search import Found, IndexReport, SearchIndex

__all__ = ["search"]


def search(
    data: Data,
    model: AnyModel,
    query: Annotated[
        list[str],
        typer.Option(
            help="What to look for: a picture's file or its name in DATA, or a text; may be given again.",
            show_default=False,
        ),
    ],
    k: Annotated[int, typer.Option("-k", "--nearest", min=1, help="How many objects to find.")] = 10,
    index: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the embeddings in; the next search encodes only what is new."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A Qdrant server to keep the embeddings in, such as http://localhost:6333."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="That server's key.", envvar="QDRANT_API_KEY")] = None,
    collection: Annotated[str, typer.Option(help="The name of the embeddings there.")] = "objects",
    prune: Annotated[bool, typer.Option("--prune", help="Take out of the index what is no longer in DATA.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The page to write, an HTML file; search-DATA.html, here, if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with all that was found, instead of a table.")
    ] = False,
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
    """Find the pictures or texts that are nearest to a query, and write a page of them."""
    began = time.monotonic()
    reading = Reading(data, text, tuple(label or ()), labels, file_column, skip_bad)
    page = out if out is not None else Path(f"search-{telling(data)}.html")
    place = _Index(index, url, api_key, collection, prune)
    with one_line_errors(debug, place.kept, smaller="a smaller --batch or --size"):
        from torchrecycle.cli.embedder import Wish

        wish = Wish(model, checkpoint, pretrained, size, crop, tokens, batch, device)
        refuse_early(wish, reading)
        _refuse_page(page, data)
        place.refuse_early(data)
        with redirect_stdout(sys.stderr):
            queries = _queries(query, data)
            embedder, objects = prepared(wish, reading, leave_out=place.folders)
            introduce(embedder, objects)
            objects, answers, report = _searched(place, embedder, objects, queries, k, skip_bad)
            _say_report(report, objects, place)
        _show(answers, query, queries, objects, as_json)
        seconds = time.monotonic() - began
        _write_page(page, answers, query, queries, objects, embedder, report, seconds)
        print(f"The page: {page}", file=sys.stderr if as_json else sys.stdout, flush=True)


# -- the index ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Index:
    """Where embeddings are kept."""

    folder: Path | None
    url: str | None
    api_key: str | None
    name: str
    prune: bool

    @property
    def folders(self) -> list[Path]:
        return [self.folder] if self.folder is not None else []

    @property
    def kept_somewhere(self) -> bool:
        return self.folder is not None or self.url is not None

    @property
    def where(self) -> str:
        """In words."""
        return str(self.folder) if self.folder is not None else f"{self.name} on {self.url}"

    def kept(self) -> str:
        """What is left of a search that is stopped."""
        if self.folder is not None and self.folder.exists():
            return f"Kept: what was encoded, in {self.folder}; the same command goes on from there"
        if self.url is not None:
            return f"Kept: what was encoded, on {self.url}; the same command goes on from there"
        return "Nothing is kept; with --index FOLDER it is"

    def refuse_early(self, data: Path) -> None:
        """
        Raises:
            OptionError: two places are given, or the data's folder, or a place without an index to prune.
        """
        if self.folder is not None and self.url is not None:
            raise OptionError("--index and --url are both given: give one of them")
        if self.folder is not None and self.folder.resolve() == data.resolve():
            raise OptionError(f"--index {self.folder} is the data themselves: give another folder")
        if self.prune and not self.kept_somewhere:
            raise OptionError("--prune takes objects out of an index: name it with --index or --url")

    def load(self, embedder: Embedder) -> SearchIndex | None:
        """The index, if there is one."""
        from torchrecycle.similarity.collection import is_index
        from torchrecycle.similarity.search import MissingIndexError, OtherModelError, SearchIndex

        if self.url is None and (self.folder is None or not is_index(self.folder)):
            return None
        try:
            return SearchIndex.load(embedder, **self._options(embedder))
        except MissingIndexError:
            return None
        except OtherModelError as error:
            raise self._of_another_model(embedder) from error

    def fill(self, there: SearchIndex | None, embedder: Embedder, objects: Objects) -> SearchIndex:
        """Bring the index up to the data, or make one.

        Raises:
            OptionError: it holds objects that are not in the data, or is of another model.
        """
        from torchrecycle.similarity.search import OtherModelError, OtherObjectsError, index

        payloads, others = _payloads(objects), "remove" if self.prune else "refuse"
        try:
            if there is None:
                return index(embedder, objects.items, payloads=payloads, others=others, **self._options(embedder))
            there.update(objects.items, payloads, others=others)
            return there
        except OtherModelError as error:
            raise self._of_another_model(embedder) from error
        except OtherObjectsError as error:
            raise OptionError(
                f"{self.where} holds {count_of(error.count, 'object')} that {'is' if error.count == 1 else 'are'} not "
                "in the data: take them out with --prune, or give another --index or --collection"
            ) from error

    def _of_another_model(self, embedder: Embedder) -> OptionError:
        return OptionError(
            f"the index {self.where} was made by another model than this {embedder.name}, or with other weights, "
            "--size, --crop, --tokens or libraries: give those that made it, or another --index or --collection"
        )

    def _options(self, embedder: Embedder) -> dict[str, Any]:
        return {
            "path": self.folder,
            "url": self.url,
            "api_key": self.api_key,
            "name": self.name,
            "batch_size": CHUNK,
            "key": _key,
            "identity": embedder.identity,
        }


def _key(obj: Any) -> Any:
    """A text by itself, a picture by its file."""
    return obj if isinstance(obj, str) else obj.digest


def _payloads(objects: Objects) -> list[dict[str, Any]]:
    """What others who ask the index get beside each object."""
    own = [
        {"file": as_utf8(name)} if objects.kind == "images" else {"text": item, "place": name}
        for name, item in zip(objects.names, objects.items, strict=True)
    ]
    return [
        {**{column: _jsonable(cells[n]) for column, cells in objects.columns.items()}, **said}
        for n, said in enumerate(own)
    ]


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return None if value != value else as_utf8(value)


def _refuse_page(path: Path, data: Path) -> None:
    from torchrecycle.report.found_page import is_found_page

    refuse_out(path, ".html", data)
    if path.exists() and not is_found_page(path):
        raise OutError(f"{path} is there and is no page of a search: give another name with --out")


def _queries(said: Sequence[str], data: Path) -> list[Any]:
    """
    Raises:
        DataError: a picture is not there or cannot be decoded.
        OptionError: a text is empty.
    """
    from torchrecycle.files.objects import find_picture, kind_of

    empty = [one for one in said if not one.strip()]
    if empty:
        raise OptionError("--query is empty: give what to look for")
    return list(said) if kind_of(data) == "texts" else [find_picture(one, data) for one in said]


def _searched(
    place: _Index, embedder: Embedder, objects: Objects, queries: Sequence[Any], k: int, skip_bad: bool
) -> tuple[Objects, list[list[Found]], IndexReport]:
    there = place.load(embedder)
    try:
        objects = _whole(there, objects, skip_bad)
        there = place.fill(there, embedder, objects)
        assert there.report is not None
        return objects, there.search_all(queries, k, exact=True), there.report
    finally:
        if there is not None:
            there.close()


def _whole(there: SearchIndex | None, objects: Objects, skip_bad: bool) -> Objects:
    """Without pictures that cannot be decoded; those that the index holds were decoded before."""
    from torchrecycle.files.objects import whole_pictures

    if objects.kind == "texts":
        return objects
    held = there.holds(objects.items) if there is not None else [False] * len(objects)
    whole = whole_pictures(objects, [n for n, is_there in enumerate(held) if not is_there], skip_bad=skip_bad)
    for line in whole.left_out[len(objects.left_out) :]:
        typer.echo(f"  {left_out_line(line)}", err=True)
    return whole


# -- what is said and written ------------------------------------------------------------------------------------------


def _say_report(report: IndexReport, objects: Objects, place: _Index) -> None:
    noun = "picture" if objects.kind == "images" else "text"
    if place.kept_somewhere:
        new = f"{report.encoded:,} encoded" if report.encoded else "nothing to encode"
        checked = f" ({report.verified:,} encoded again, alike)" if report.verified else ""
        typer.echo(f"index: {place.where}, {count_of(report.found, noun)} there already{checked}, {new}", err=True)
    if report.removed:
        typer.echo(f"  {count_of(report.removed, noun)} taken out, no longer in the data", err=True)
    if report.repeated:
        typer.echo(f"  {count_of(report.repeated, noun)} with the content of another, which stands for both", err=True)


def _show(
    answers: Sequence[Sequence[Found]],
    said: Sequence[str],
    queries: Sequence[Any],
    objects: Objects,
    as_json: bool,
) -> None:
    if as_json:
        found = [
            {"query": one, "found": [_in_full(each, objects) for each in answer]}
            for one, answer in zip(said, answers, strict=True)
        ]
        print(json.dumps({"data": objects.where, "answers": found}, indent=2), flush=True)
        return
    for one, query, answer in zip(said, queries, answers, strict=True):
        _print_answer(one, query, answer, objects)


def _in_full(found: Found, objects: Objects) -> dict[str, Any]:
    n = found.number
    own = (
        {"file": objects.names[n]}
        if objects.kind == "images"
        else {"place": objects.names[n], "text": objects.items[n]}
    )
    labels = {name: _jsonable(column[n]) for name, column in objects.columns.items()}
    return {"score": found.score, "number": n, **own, "labels": labels}


def _print_answer(said: str, query: Any, answer: Sequence[Found], objects: Objects) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as RichText

    from torchrecycle.report.words import clean, shortened

    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else WIDE)
    texts = objects.kind == "texts"
    table = Table(
        title=RichText(f"nearest to {clean(shortened(said, 200))}"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", justify="right")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("text" if texts else "file", ratio=1, overflow="fold")
    for name in (*(["place"] if texts else []), *objects.columns):
        table.add_column(RichText(clean(name)), overflow="fold")
    for rank, one in enumerate(answer, start=1):
        n = one.number
        same = " (the same)" if _key(query) == _key(objects.items[n]) else ""
        name = shortened(objects.items[n], 200) if texts else objects.names[n]
        labels = [shortened(_cell(column[n]), 120) for column in objects.columns.values()]
        cells = [*([objects.names[n]] if texts else []), *labels]
        table.add_row(str(rank), f"{one.score:.3f}", *(RichText(clean(cell)) for cell in (name + same, *cells)))
    console.print(table)


WIDE = 120
"""Letters in a line that goes to no terminal."""


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _write_page(
    path: Path,
    answers: Sequence[Sequence[Found]],
    said: Sequence[str],
    queries: Sequence[Any],
    objects: Objects,
    embedder: Embedder,
    report: IndexReport,
    seconds: float,
) -> None:
    """
    Raises:
        OutError: it cannot be written.
    """
    from torchrecycle.report.found_page import Answer, FoundPage, Shown, picture_of, write_found_page
    from torchrecycle.report.words import duration

    pictures: dict[Any, str] = {}

    def picture(obj: Any) -> str:
        if obj.digest not in pictures:
            pictures[obj.digest] = picture_of(obj.image())
        return pictures[obj.digest]

    def found(one: Found, query: Any) -> Shown:
        n = one.number
        item = objects.items[n]
        return Shown(
            name=objects.names[n],
            text=item if objects.kind == "texts" else "",
            picture="" if objects.kind == "texts" else picture(item),
            details=tuple((name, cell) for name, column in objects.columns.items() if (cell := _cell(column[n]))),
            score=one.score,
            same=_key(query) == _key(item),
        )

    shown_answers = tuple(
        Answer(
            Shown(name=one, text=one) if objects.kind == "texts" else Shown(name=one, picture=picture(query)),
            tuple(found(each, query) for each in answer),
        )
        for one, query, answer in zip(said, queries, answers, strict=True)
    )
    noun = "picture" if objects.kind == "images" else "text"
    most = max(map(len, answers))
    sentence = f"Of {count_of(len(objects), noun)}, the {most:,} nearest to {_named(said, objects)}."
    left_out = "; ".join(left_out_line(line) for line in objects.left_out)
    facts = {
        "command": shlex.join(["torchrecycle", *_without_key(sys.argv[1:])]),
        "data": objects.where,
        "left out": left_out,
        "model": embedder.name,
        "weights": embedder.weights,
        "embeddings": f"{report.found:,} from the index, {report.encoded:,} encoded",
        "time": duration(seconds),
    }
    page = FoundPage(
        title=f"Search in {objects.where}",
        sentence=sentence,
        answers=shown_answers,
        facts=tuple((name, value) for name, value in facts.items() if value),
        random_weights=embedder.random,
        version=importlib.metadata.version("torchrecycle"),
        date=time.strftime("%Y-%m-%d %H:%M"),
    )
    try:
        write_found_page(path, page)
    except OSError as error:
        worded = OutError(f"cannot write {path}: {error.strerror or error}")
        worded.errno = error.errno
        raise worded from error


def _named(said: Sequence[str], objects: Objects) -> str:
    if len(said) > 1:
        return f"each of {count_of(len(said), 'query')}".replace("querys", "queries")
    return "a text" if objects.kind == "texts" else "a picture"


def _without_key(arguments: Sequence[str]) -> list[str]:
    """
    >>> _without_key(["--api-key", "secret", "--api-key=secret", "-k", "3"])
    ['--api-key', '***', '--api-key=***', '-k', '3']
    """
    hidden = list(arguments)
    for n, argument in enumerate(hidden):
        if n and hidden[n - 1] == "--api-key":
            hidden[n] = "***"
        elif argument.startswith("--api-key="):
            hidden[n] = "--api-key=***"
    return hidden
