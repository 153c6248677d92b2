"""A folder, a tar or a zip of pictures, with or without a table of labels -> pictures with classes, all of them whole.

Without a table, a picture's class is the folder that it lies in: ``cars/audi/2012/00001.jpg`` is an ``audi``. With
one, ``find_pictures(Path("cars/images.tar"), labels=Path("cars/labels.csv"), label_column="class_id")`` gives the
8,144 pictures that the table names, in 196 classes; of each, where in the tar its bytes are.

Whatever is wrong is found here and not after an hour of training: what is cheap to see first (columns, files that are
not there, classes with one member), then every picture is decoded once. It is told in one line, or, with
``skip_bad``, left out and said.
"""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from torchrecycle.files.decoding import decode, quiet
from torchrecycle.files.errors import DataError, LeftOut, count_of, examples, shown
from torchrecycle.files.labels import cells_of, check_column, keep_classes
from torchrecycle.files.listing import Listing, Piece, list_files, plain
from torchrecycle.files.tables import TABLES, Row, places, read_table
from torchrecycle.keys import key
from torchrecycle.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "PICTURES",
    "Asked",
    "Picture",
    "Pictures",
    "check_twice",
    "decoded",
    "digest_of",
    "find_pictures",
    "is_picture",
    "note_others",
    "note_passed_over",
    "resolve",
    "why_unreadable",
]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""The extensions of pictures, in any case."""

THREADS = 8
"""So many pictures are decoded at once, if there are as many cores."""

_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on disk and its class. It can be pickled, and read in any process that sees the same files."""

    name: str
    """Relative to the folder or archive, with ``/``."""
    label: str
    """Its class."""
    piece: Piece
    """Where its bytes are."""
    digest: bytes = b""
    """BLAKE3 of its bytes when it was checked; empty if it was not."""

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            DataError: if they are no longer there, or no longer what they were when the picture was checked: what is
                known of it, such as a row that is kept under this data set's name, would be of another picture.
        """
        try:
            data = self.piece.read()
        except Exception as error:
            raise DataError(f"cannot read {shown(self.name)}: {why_unreadable(error)}") from None
        if self.digest and digest_of(data) != self.digest:
            raise DataError(f"{shown(self.name)} was changed while it was in use. Start again: what is new is computed")
        return data

    def image(self) -> Image:
        """The picture in mode RGB, upright, and on white where it is transparent.

        Raises:
            DataError: if it cannot be decoded.
        """
        data = self.read()
        try:
            return decode(data)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"cannot decode {shown(self.name)}: {error}") from None


def digest_of(data: bytes) -> bytes:
    """What a picture is known by: 128 bits of BLAKE3 over its file."""
    return blake3(data).digest(length=16)


def why_unreadable(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return shown(str(error) or type(error).__name__)


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that a sweep learns from."""

    items: tuple[Picture, ...]
    """By name. Each class has two or more."""
    left_out: tuple[str, ...]
    """What was left out, a line each, for the user."""
    identity: str
    """Hash of the names, labels and content of all pictures, in hex."""
    where: str
    """In words: ``cars/images.tar, 8,144 pictures of 196 classes, labels from labels.csv``."""


def find_pictures(
    where: Path,
    *,
    labels: Path | None = None,
    file_column: str = "file",
    label_column: str = "label",
    skip_bad: bool = False,
    leave_out: Sequence[Path] = (),
) -> Pictures:
    """The pictures of a folder, a tar or a zip, each decoded once to see that it is whole.

    Args:
        where: the folder or archive. Without ``labels``, it holds one folder per class; a single folder around all of
            them is seen through.
        labels: a table that names the pictures, relative to ``where`` or to the table's own folder, or by a name that
            occurs once. Pictures that it does not name are left out.
        file_column: the table's column with the names.
        label_column: its column with the classes.
        skip_bad: whether pictures that are not there or cannot be decoded, classes with fewer than two pictures, and
            rows without a name or a class are left out. Otherwise each is an error.
        leave_out: folders that hold no data even where they lie among the pictures, such as that of the results. They
            need not be there.

    Raises:
        DataError: if anything is not as described. One line, which names the first three places.
    """
    where, left_out = Path(where), LeftOut(skip_bad)
    listing = list_files(where, leave_out)
    note_passed_over(listing, left_out)
    if labels is None:
        named = _by_folder(listing, left_out)
        step = "Put the pictures in one folder per class, or give a table with --labels"
    else:
        named = _by_table(listing, Path(labels), file_column, label_column, left_out)
        step = "Name another column with --label-column, or add pictures of other classes"
    pictures = [Picture(name, label, listing.files[name]) for name, label in sorted(named.items())]
    pictures = _with_classes(pictures, left_out, where, step)
    whole = decoded(pictures, left_out)
    if len(whole) < len(pictures):
        whole = _with_classes(whole, left_out, where, step)
    return Pictures(tuple(whole), tuple(left_out.lines), _identity(whole), _in_words(where, whole, labels))


def note_passed_over(listing: Listing, left_out: LeftOut) -> None:
    """Say which folders were not looked into."""
    if listing.loops:
        left_out.note(f"{count_of(len(listing.loops), 'link')} to a folder around itself: {examples(listing.loops)}")
    if listing.results:
        count = count_of(len(listing.results), "folder")
        left_out.note(f"{count} with the results of a sweep: {examples(listing.results)}")


def _with_classes(pictures: Sequence[Picture], left_out: LeftOut, where: Path, step: str) -> list[Picture]:
    if not pictures:
        raise DataError(f"no picture is left of {shown(where)}: {'; '.join(left_out.lines)}")
    labels = [picture.label for picture in pictures]
    return [pictures[i] for i in keep_classes(labels, left_out, noun="picture", where=shown(where), step=step)]


def _identity(pictures: Iterable[Picture]) -> str:
    return key([(picture.name, picture.label, picture.digest) for picture in pictures]).hex()


def _in_words(where: Path, pictures: Sequence[Picture], labels: Path | None) -> str:
    # Two steps of the path: a page that is passed on need not tell the rest.
    place = "/".join(where.absolute().parts[-2:]).lstrip("/")
    classes = len({picture.label for picture in pictures})
    source = f", labels from {shown(labels.name)}" if labels else ""
    return f"{shown(place)}, {count_of(len(pictures), 'picture')} of {count_of(classes, 'class')}{source}"


def is_picture(name: str) -> bool:
    """
    >>> is_picture("cars/1.JPG"), is_picture("cars/labels.csv")
    (True, False)
    """
    return name.lower().endswith(PICTURES)


def _holds(names: Sequence[str]) -> str:
    """What a folder holds instead of pictures."""
    return f"it holds {count_of(len(names), 'file')}: {examples(names)}" if names else "it holds no files"


def check_twice(listing: Listing, names: Collection[str], left_out: LeftOut) -> None:
    """
    Raises:
        DataError: an archive holds two files of one of these names; with ``skip_bad``, the last is taken.
    """
    twice = sorted(name for name in set(listing.twice) if name in names)
    if twice:
        what = f"{shown(listing.where)} holds two files of one name: {examples(twice)}"
        if not left_out.skip_bad:
            left_out.bad(what, "Pack it anew")
        left_out.note(f"{what}: the last was taken")


# ------------------------------------------------------------------------------------------- classes by folder


def _by_folder(listing: Listing, left_out: LeftOut) -> dict[str, str]:
    """The class of each picture, where each class has a folder."""
    pictures = [name for name in listing.files if is_picture(name)]
    if not pictures:
        raise DataError(_no_pictures(listing))
    top = _seen_through(listing, pictures)
    inside = {name: name[len(top) :] for name in pictures if name.startswith(top)}
    labels = {name: rest.split("/")[0] for name, rest in inside.items() if "/" in rest}
    loose = [name for name in pictures if name not in labels]
    if not labels:
        raise DataError(_no_classes(listing, loose))
    _check_parts(listing, top, inside, set(labels.values()))
    if loose:
        left_out.note(f"{count_of(len(loose), 'picture')} in no class folder: {examples(loose)}")
    note_others(listing, left_out)
    _check_empty(listing, top, set(labels.values()), left_out)
    check_twice(listing, labels, left_out)
    return labels


def _seen_through(listing: Listing, pictures: Sequence[str]) -> str:
    """The folder around the class folders, ending with ``/``, or nothing."""
    folders = {posixpath.dirname(name) for name in listing.files} | set(listing.folders)
    top = ""
    while True:
        below = {name[len(top) :].split("/")[0] for name in folders if name.startswith(top) and name > top}
        if len(below) != 1 or any("/" not in name[len(top) :] for name in pictures):
            return top
        deeper = f"{top}{below.pop()}/"
        rests = [name[len(deeper) :] for name in pictures]
        inner = {rest.split("/")[0] for rest in rests if "/" in rest}
        if not inner or (len(inner) == 1 and any("/" not in rest for rest in rests)):
            return top
        top = deeper


def _no_pictures(listing: Listing) -> str:
    names = sorted(listing.files)
    packed = [name for name in names if name.lower().endswith((".tar", ".zip", ".tgz", ".tar.gz"))]
    step = f" To use what is packed, give the file itself: {shown(listing.where / packed[0])}" if packed else ""
    return f"{shown(listing.where)} holds no pictures ({', '.join(PICTURES)}): {_holds(names)}.{step}".rstrip(".")


def _no_classes(listing: Listing, loose: Sequence[str]) -> str:
    tables = [name for name in sorted(listing.files) if name.lower().endswith(TABLES)]
    table = str(listing.where / tables[0]) if len(tables) == 1 and listing.where.is_dir() else "TABLE"
    return (
        f"{shown(listing.where)} holds {count_of(len(loose), 'picture')} and no class folders. Put the pictures in one "
        f"folder per class (DIR/class/*.jpg), or say their classes in a table: --labels {shown(table)}"
    )


def _check_parts(listing: Listing, top: str, inside: dict[str, str], labels: set[str]) -> None:
    if {label.lower() for label in labels} <= _PARTS and all(rest.count("/") > 1 for rest in inside.values()):
        names = sorted(labels)
        step = f"Give one of them: {shown(listing.where / top / names[-1])}"
        if not listing.where.is_dir():
            step = "Unpack it, and give one of them"
        raise DataError(
            f"{shown(listing.where)}: the folders {examples(names)} look like parts of a data set and not like "
            f"classes. {step}"
        )


def note_others(listing: Listing, left_out: LeftOut) -> None:
    """Say which files are no pictures."""
    others = sorted(name for name in listing.files if not is_picture(name))
    if others:
        left_out.note(f"{count_of(len(others), 'file')} without an extension of a picture: {examples(others)}")


def _check_empty(listing: Listing, top: str, labels: set[str], left_out: LeftOut) -> None:
    inside = {name[len(top) :] for name in (*listing.files, *listing.folders) if name.startswith(top)}
    folders = {name[len(top) :] for name in listing.folders if name.startswith(top)}
    classes = {name.split("/")[0] for name in inside if "/" in name or name in folders}
    empty = sorted(classes - labels - {""})
    if empty:
        first = [name for name in listing.files if name.startswith(f"{top}{empty[0]}/")]
        which = "the class folder" if len(empty) == 1 else f"{len(empty):,} class folders"
        what = f"{shown(listing.where)}: no pictures in {which} {examples(empty)} ({_holds(sorted(first))})"
        left_out.bad(what, "Add pictures or remove it")


# -------------------------------------------------------------------------------------------- classes by table


def _by_table(listing: Listing, table: Path, file_column: str, label_column: str, left_out: LeftOut) -> dict[str, str]:
    """The class of each picture that a table names."""
    options = ["--file-column", "--label-column"]
    rows = read_table(table, [file_column, label_column], options=options, left_out=left_out)
    fill = "Fill it in, or name another column with "
    cells = cells_of(rows, file_column, left_out, what="file name", remedy=f"{fill}--file-column")
    rows, files = [row for row, _ in cells], {id(row): cell for row, cell in cells}
    classes = cells_of(rows, label_column, left_out, what="class", remedy=f"{fill}--label-column")
    check_column([label for _, label in classes], label_column, "--label-column")
    asked = [Asked(row, files[id(row)], label) for row, label in classes]
    found = resolve(listing, table, asked, left_out)
    named = _once(found, left_out)
    check_twice(listing, named, left_out)
    rest = sorted(name for name in listing.files if is_picture(name) and name not in named)
    if rest and named:
        left_out.note(f"{count_of(len(rest), 'picture')} that {shown(table.name)} does not name: {examples(rest)}")
    return named


@dataclass(frozen=True, slots=True)
class Asked:
    """A picture that a row of the table names."""

    row: Row
    file: str
    label: str


def resolve(listing: Listing, table: Path, asked: Sequence[Asked], left_out: LeftOut) -> list[tuple[str, Asked]]:
    """Which file each row means."""
    names = _Names(listing, table)
    found, several, missing, elsewhere = [], [], [], []
    open_: list[Asked] = []
    for one in asked:
        matches = names.exact(one.file)
        found += [(name, one) for name in matches[:1]]
        if not matches:
            open_.append(one)
    taken = {name for name, _ in found}
    for one in open_:
        matches = names.by_end(one.file)
        free = [name for name in matches if name not in taken]
        if len(matches) > 1:
            several.append((one, matches))
        elif free:
            found.append((free[0], one))
            if not names.agrees(one.file, free[0]):
                elsewhere.append(f"{shown(one.file)} is {shown(free[0])}")
        else:
            missing.append(one)
    if several:
        one, matches = several[0]
        what = f"{places([one.row for one, _ in several])}: {shown(one.file)} may be any of {examples(matches)}"
        left_out.bad(what, f"Name files relative to {shown(listing.where)}")
    if missing:
        _miss(listing, missing, len(asked), left_out)
    if elsewhere:
        left_out.note(
            f"found by the last part of the name, in another folder: {examples(elsewhere)} (nothing left out)"
        )
    return found


def _miss(listing: Listing, missing: Sequence[Asked], total: int, left_out: LeftOut) -> None:
    table = missing[0].row.table
    there = next((name for name in sorted(listing.files) if is_picture(name)), None)
    holds = f"it holds, for example, {shown(there)}" if there else f"{_holds(sorted(listing.files))}"
    left_out.bad(
        f"{table} names {len(missing):,} of {count_of(total, 'file')} that {shown(listing.where)} does not hold: "
        f"{examples([one.file for one in missing])} ({holds})",
        "Correct the names, or name another column with --file-column",
    )


class _Names:
    """The files of a listing, by what a table may call them."""

    def __init__(self, listing: Listing, table: Path) -> None:
        self._files = {plain(name): name for name in listing.files}
        self._root = os.path.abspath(listing.where)
        self._beside = os.path.dirname(os.path.abspath(table))
        self._ends: dict[str, list[str]] = defaultdict(list)
        for name in self._files:
            base = posixpath.basename(name)
            self._ends[base].append(name)
            if is_picture(base):
                self._ends[posixpath.splitext(base)[0]].append(name)

    def exact(self, cell: str) -> list[str]:
        """The file of this name, relative to the root or to the table."""
        name = plain(cell)
        if name in self._files:
            return [self._files[name]]
        path = os.path.join(self._beside, cell.strip().replace("\\", "/"))
        try:
            relative = plain(os.path.relpath(path, self._root))
        except ValueError:
            # Another drive of Windows.
            return []
        return [self._files[relative]] if relative in self._files else []

    def by_end(self, cell: str) -> list[str]:
        """The files whose names end alike: in the folders too if there are any such, else in the last part."""
        matches = self._ends.get(posixpath.basename(plain(cell)), [])
        close = [name for name in matches if self.agrees(cell, name)]
        return [self._files[name] for name in close or matches]

    def agrees(self, cell: str, name: str) -> bool:
        """Whether one is the end of the other, with or without the extension."""
        asked, there = f"/{plain(cell)}", f"/{plain(name)}"
        if not is_picture(asked):
            there = posixpath.splitext(there)[0] if not there.endswith(asked) else there
        return asked.endswith(there) or there.endswith(asked)


def _once(found: Sequence[tuple[str, Asked]], left_out: LeftOut) -> dict[str, str]:
    """The class of each file, where rows that name one file agree."""
    by_name: dict[str, list[Asked]] = defaultdict(list)
    for name, one in found:
        by_name[name].append(one)
    again = [one.row for rows in by_name.values() for one in rows[1:] if one.label == rows[0].label]
    torn = {name: rows for name, rows in by_name.items() if len({one.label for one in rows}) > 1}
    if torn:
        name, rows = next(iter(torn.items()))
        other = next(one for one in rows if one.label != rows[0].label)
        more = f" and {len(torn) - 1:,} more files" if len(torn) > 1 else ""
        what = (
            f"{rows[0].row.table} gives {shown(name)} two classes, '{shown(rows[0].label)}' in {rows[0].row.unit} "
            f"{rows[0].row.number:,} and '{shown(other.label)}' in {other.row.unit} {other.row.number:,}{more}"
        )
        left_out.bad(what, "Correct the table")
    if again:
        left_out.note(
            f"{count_of(len(again), 'row')} that {'names' if len(again) == 1 else 'name'} a file again, "
            f"with the same class: {places(again)}"
        )
    return {name: rows[0].label for name, rows in by_name.items() if name not in torn}


# ---------------------------------------------------------------------------------------------------- decoding


def decoded(pictures: Sequence[Picture], left_out: LeftOut) -> list[Picture]:
    """The pictures that can be decoded: every one is tried."""
    with quiet():
        return with_digests(
            pictures,
            left_out,
            _checked,
            bar="checking pictures",
            cannot="cannot decode",
            remedy="Replace or remove what is broken",
        )


def with_digests(
    pictures: Sequence[Picture],
    left_out: LeftOut,
    read: Callable[[Picture], tuple[bytes, str | None]],
    *,
    bar: str,
    cannot: str,
    remedy: str,
) -> list[Picture]:
    """Pictures with their digests, read in threads.

    Args:
        pictures: all.
        left_out: told of those that have none.
        read: the digest of a picture, or why it has none.
        bar: what the progress bar says.
        cannot: what went wrong with those that have none, such as "cannot read".
        remedy: what to do about them.
    """
    whole, broken = [], []
    pool = ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1))
    try:
        with progress(bar, len(pictures), unit="pictures") as shown_:
            for picture, (digest, why) in zip(pictures, pool.map(read, pictures), strict=True):
                if why:
                    broken.append(f"{shown(picture.name)} ({why})")
                else:
                    whole.append(replace(picture, digest=digest))
                shown_.advance()
    finally:
        # Also on Ctrl-C, where the rest must not be waited for.
        pool.shutdown(wait=True, cancel_futures=True)
    if broken:
        what = f"{cannot} {len(broken):,} of {count_of(len(pictures), 'picture')}: {examples(broken)}"
        left_out.bad(what, remedy)
    return whole


def _checked(picture: Picture) -> tuple[bytes, str | None]:
    """The digest of a picture's bytes, and why it cannot be used, or None."""
    try:
        data = picture.piece.read()
        decode(data)
    except DataError:
        raise
    except Exception as error:
        return b"", why_unreadable(error)
    return digest_of(data), None
