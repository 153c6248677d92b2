"""Pictures or texts of which nothing is to be learned: to be embedded, or to be searched. They need no class.

``find_objects(Path("photos.tar"))`` gives 8,144 pictures by name; with ``labels=Path("labels.csv")`` those that the
table names, and of each what its columns say. ``find_objects(Path("faq.csv"), text="question", columns=["topic"])``
gives the texts of a table. What it is, pictures or texts, is told by the path alone: a table holds texts, and a
folder, a tar or a zip holds pictures.

Pictures are read once, for the digest by which each is known, and not decoded, so that a second search among them need
not decode 8,144 photos to learn that it knows them all; `whole_pictures` decodes those that are new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchrecycle.files.errors import DataError, LeftOut, count_of, shown
from torchrecycle.files.labels import cells_of, text_of
from torchrecycle.files.listing import Listing, WholeFile, list_files, plain
from torchrecycle.files.pictures import (
    PICTURES,
    Asked,
    Picture,
    check_twice,
    decoded,
    digest_of,
    is_picture,
    note_others,
    note_passed_over,
    resolve,
    why_unreadable,
    with_digests,
)
from torchrecycle.files.tables import TABLES, Row, places, read_table
from torchrecycle.files.texts import with_texts

__all__ = ["Objects", "find_objects", "find_picture", "kind_of", "whole_pictures"]

Kind = Literal["images", "texts"]

_ALMOST_TABLES = (".xlsx", ".xls", ".txt", ".ods")
"""Whoever gives one of these means a table: what is said of it is said by the reader of tables."""


@dataclass(frozen=True, slots=True)
class Objects:
    """Pictures or texts, with what is said of each."""

    kind: Kind
    items: tuple[Any, ...]
    """`Picture`, each with its digest, or ``str``."""
    names: tuple[str, ...]
    """Of pictures the file, relative to the folder or archive, of texts the place in the table: ``line 17``."""
    columns: dict[str, tuple[Any, ...]]
    """What was asked for beside them, by column: of each object what the table has, None where it has nothing."""
    left_out: tuple[str, ...]
    """What was left out, a line each, for the user."""
    where: str
    """In words: ``cars/images.tar, 8,144 pictures``."""

    def __len__(self) -> int:
        return len(self.items)

    def only(self, kept: Sequence[int], left_out: Sequence[str]) -> Objects:
        """Some of them, by number, and why the others are not there."""
        return replace(
            self,
            items=tuple(self.items[n] for n in kept),
            names=tuple(self.names[n] for n in kept),
            columns={name: tuple(column[n] for n in kept) for name, column in self.columns.items()},
            left_out=(*self.left_out, *left_out),
        )


def kind_of(where: Path) -> Kind:
    """Whether a path is that of pictures or of texts. Nothing is opened.

    >>> kind_of(Path("faq.jsonl")), kind_of(Path("photos.tar"))
    ('texts', 'images')
    """
    is_table = where.suffix.lower() in (*TABLES, *_ALMOST_TABLES)
    return "texts" if is_table and not where.is_dir() else "images"


def find_objects(
    where: Path,
    *,
    text: str = "text",
    labels: Path | None = None,
    file_column: str = "file",
    columns: Sequence[str] = (),
    skip_bad: bool = False,
    leave_out: Sequence[Path] = (),
) -> Objects:
    """The pictures of a folder, a tar or a zip, by name, or the texts of a table, in its order.

    Args:
        where: the folder, archive or table.
        text: the table's column of texts.
        labels: a table that names pictures; those that it does not name are left out.
        file_column: that table's column of names.
        columns: what else to take of either table.
        skip_bad: whether files that are not there or cannot be read, and rows without a text or a name, are left out.
            Otherwise each is an error.
        leave_out: folders that hold no data even where they lie among the pictures.

    Raises:
        DataError: anything is not as described, or there is nothing. One line, which names the first three places.
    """
    where, left_out = Path(where), LeftOut(skip_bad)
    if kind_of(where) == "texts":
        return _texts(where, text, columns, left_out)
    if columns and labels is None:
        raise DataError(
            f"column {columns[0]!r} is of no table: {shown(where)} holds pictures, and what is said of them is in a "
            "table that is named with --labels"
        )
    return _pictures(where, labels, file_column, columns, left_out, leave_out)


# -- texts -------------------------------------------------------------------------------------------------------------


def _texts(where: Path, text: str, columns: Sequence[str], left_out: LeftOut) -> Objects:
    options = ["--text", *("--label" for _ in columns)]
    rows = with_texts(read_table(where, [text, *columns], options=options, left_out=left_out), text, left_out)
    if not rows:
        raise DataError(f"no text is left of {shown(where.name)}: {'; '.join(left_out.lines)}")
    return Objects(
        kind="texts",
        items=tuple(str(text_of(row.values[text])) for row in rows),
        names=tuple(f"{row.unit} {row.number:,}" for row in rows),
        columns=_columns(rows, columns),
        left_out=tuple(left_out.lines),
        where=f"{shown(where.name)}, {count_of(len(rows), 'text')}",
    )


def _columns(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(row.values[name] for row in rows) for name in columns}


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(
    where: Path,
    labels: Path | None,
    file_column: str,
    columns: Sequence[str],
    left_out: LeftOut,
    leave_out: Sequence[Path],
) -> Objects:
    listing = list_files(where, leave_out)
    note_passed_over(listing, left_out)
    if labels is None:
        rows: dict[str, Row] = {}
        names = sorted(name for name in listing.files if is_picture(name))
        note_others(listing, left_out)
    else:
        rows = _named_by(listing, Path(labels), file_column, columns, left_out)
        names = sorted(rows)
    if not names:
        held = f"it holds {count_of(len(listing.files), 'file')}" if listing.files else "it holds no files"
        why = "; ".join(left_out.lines) or held
        raise DataError(f"{shown(where)} holds no pictures ({', '.join(PICTURES)}): {why}")
    check_twice(listing, names, left_out)
    pictures = with_digests(
        [Picture(name, "", listing.files[name]) for name in names],
        left_out,
        _read,
        bar="reading pictures",
        cannot="cannot read",
        remedy="Replace or remove them",
    )
    if not pictures:
        raise DataError(f"no picture is left of {shown(where)}: {'; '.join(left_out.lines)}")
    # Two steps of the path: a page that is passed on need not tell the rest.
    place = "/".join(where.absolute().parts[-2:]).lstrip("/")
    return Objects(
        kind="images",
        items=tuple(pictures),
        names=tuple(picture.name for picture in pictures),
        columns=_columns([rows[picture.name] for picture in pictures] if columns else [], columns),
        left_out=tuple(left_out.lines),
        where=f"{shown(place)}, {count_of(len(pictures), 'picture')}",
    )


def _named_by(
    listing: Listing, table: Path, file_column: str, columns: Sequence[str], left_out: LeftOut
) -> dict[str, Row]:
    """The row of each picture that a table names; the first where there are several."""
    options = ["--file-column", *("--label" for _ in columns)]
    rows = read_table(table, [file_column, *columns], options=options, left_out=left_out)
    fill = "Fill it in, or name another column with --file-column"
    cells = cells_of(rows, file_column, left_out, what="file name", remedy=fill)
    named: dict[str, Row] = {}
    again = []
    for name, one in resolve(listing, table, [Asked(row, cell, "") for row, cell in cells], left_out):
        if named.setdefault(name, one.row) is not one.row:
            again.append(one.row)
    if again:
        left_out.note(f"{count_of(len(again), 'row')} that names a file again: {places(again)}")
    return named


def _read(picture: Picture) -> tuple[bytes, str | None]:
    """The digest, or why there is none."""
    try:
        return digest_of(picture.piece.read()), None
    except Exception as error:
        return b"", why_unreadable(error)


def whole_pictures(objects: Objects, which: Sequence[int], *, skip_bad: bool) -> Objects:
    """The same without those that cannot be decoded.

    Args:
        objects: pictures.
        which: so many are decoded to see that they are whole, by number; the others are taken to be.
        skip_bad: whether what is broken is left out; otherwise it is an error.

    Raises:
        DataError: a picture is broken, or none is left.
    """
    left_out = LeftOut(skip_bad)
    whole = {picture.name for picture in decoded([objects.items[n] for n in which], left_out)}
    broken = {n for n in which if objects.names[n] not in whole}
    if not broken:
        return objects
    if len(broken) == len(objects):
        raise DataError(f"no picture is left: {'; '.join(left_out.lines)}")
    return objects.only([n for n in range(len(objects)) if n not in broken], left_out.lines)


def find_picture(said: str, where: Path) -> Picture:
    """A picture by its path, or by its name in a folder or archive.

    Args:
        said: by the user.
        where: the folder or archive.

    Raises:
        DataError: there is none, or it cannot be decoded.
    """
    path = Path(said)
    if path.is_file():
        found = Picture(said, "", WholeFile(said))
    elif path.is_dir():
        raise DataError(f"the query {shown(said)} is a folder: expected a picture")
    else:
        piece = list_files(where).files.get(plain(said))
        if piece is None:
            raise DataError(f"the query {shown(said)} does not exist: it is no file, and no picture in {shown(where)}")
        found = Picture(said, "", piece)
    found.image()
    return replace(found, digest=digest_of(found.read()))
