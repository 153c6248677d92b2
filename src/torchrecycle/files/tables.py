"""CSV, TSV, JSON lines, JSON and Parquet -> rows that know their place.

``read_table(Path("reviews.csv"), ["text", "label"])`` gives 1,000 rows, of which the last says ``reviews.csv line
1,204`` of itself, since some texts run over two lines of the file. So a message about it leads an editor to it.

A table is read whole, and of its columns only those that were asked for are kept. Texts are UTF-8, with a byte order
mark or without (UTF-16 with one). A CSV may be separated by ``,``, ``;`` or tabs: the first under which the header has
the columns that were asked for. A TSV whose quotes do not pair is read as one without quoting, as many of them are.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrecycle.files.errors import DataError, LeftOut, examples, near, readable, shown

__all__ = ["TABLES", "Row", "is_nothing", "places", "read_table"]

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""The extensions that are read, in any case."""

MOST_COLUMNS = 8
"""So many columns are named where one is missing: they are what to choose from."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    values: dict[str, Any]
    """By column: text from CSV and TSV, any type from the others. None where there is nothing."""
    table: str
    """The file's name."""
    number: int
    """The line on which it begins, from 1, or its place among the rows."""
    unit: str
    """What ``number`` counts: ``line`` or ``row``."""

    @property
    def place(self) -> str:
        """``reviews.csv line 17``"""
        return f"{self.table} {self.unit} {self.number:,}"


def places(rows: Sequence[Row]) -> str:
    """Where some rows are, in words: ``reviews.csv lines 3, 17, 20 and 4 more``."""
    if len(rows) == 1:
        return rows[0].place
    return f"{rows[0].table} {rows[0].unit}s {examples([f'{row.number:,}' for row in rows])}"


def is_nothing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or only spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def read_table(
    path: Path, columns: Sequence[str], *, options: Sequence[str] = (), left_out: LeftOut | None = None
) -> list[Row]:
    """The rows of a table, with the columns that were asked for.

    Args:
        path: a file with one of the extensions in `TABLES`.
        columns: the names of the columns, without spaces at their ends.
        options: of each column, the option of the command line that names it, for messages.
        left_out: where rows go that cannot be read. None: they are an error.

    Returns:
        The rows in their order, at least one.

    Raises:
        DataError: if the file cannot be read, or has not these columns, or no rows.
    """
    path = Path(path)
    name, kind = shown(path.name), path.suffix.lower()
    with readable(path):
        if stat.S_ISDIR(path.stat().st_mode):
            raise DataError(f"{shown(path)} is a folder: expected a table ({examples(TABLES, len(TABLES))})")
    if kind not in _READERS:
        raise DataError(_unknown_kind(name, kind))
    wanted = _Wanted(name, list(columns), dict(zip(columns, options, strict=False)), left_out or LeftOut(False))
    rows = _READERS[kind](path, wanted)
    if not rows:
        left = f" ({'; '.join(wanted.left_out.lines)})" if wanted.left_out.lines else ""
        raise DataError(f"{name} has no rows: expected at least two{left}")
    return rows


def _unknown_kind(name: str, kind: str) -> str:
    steps = {
        ".gz": "Unpack it with gunzip",
        ".zip": "Unpack it",
        ".xlsx": "Save it as CSV",
        ".xls": "Save it as CSV",
        ".txt": "If it is a table, rename it to what it is, e.g. .csv or .tsv",
    }
    ending = f"{kind} is no table that can be read" if kind else "it has no extension that tells what it is"
    step = f". {steps[kind]}" if kind in steps else ""
    return f"cannot read {name}: {ending}; known are {examples(TABLES, len(TABLES))}{step}"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of a table, and what to say where it does not have it."""

    table: str
    columns: list[str]
    options: dict[str, str]
    left_out: LeftOut

    def check(self, names: Sequence[str]) -> None:
        for column in self.columns:
            if column not in names:
                raise DataError(self._missing(column, names))
            if names.count(column) > 1:
                raise DataError(f"{self.table} has {names.count(column)} columns named {column!r}: rename all but one")

    def _missing(self, column: str, names: Sequence[str]) -> str:
        there = examples([repr(other) for other in names if other] or ["none"], MOST_COLUMNS)
        meant, option = near(column, [other for other in names if other]), self.options.get(column)
        did_you = f". Did you mean {meant!r}?" if meant else "."
        say = f" Name it with {option}" if option else ""
        return f"{self.table} has no column {column!r}: its columns are {there}{did_you}{say}"

    def row(self, values: dict[str, Any], number: int, unit: str) -> Row:
        return Row({column: values.get(column) for column in self.columns}, self.table, number, unit)

    def bad(self, rows: Sequence[tuple[int, str]], what: str, remedy: str, unit: str = "line") -> None:
        """Some rows cannot be read: their numbers, and of each why."""
        if rows:
            where = places([Row({}, self.table, number, unit) for number, _ in rows])
            self.left_out.bad(f"{where}: {what} ({rows[0][1]})", remedy)


# -------------------------------------------------------------------------------------------------------- text


def _decode(path: Path, table: str) -> str:
    with readable(path):
        data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, newline = "utf-16", "\n".encode("utf-16-le" if data[:1] == b"\xff" else "utf-16-be")
    else:
        encoding, newline = "utf-8-sig", b"\n"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(newline, 0, error.start) + 1
        raise DataError(
            f"{table} line {line:,} is not {encoding.removesuffix('-sig').upper()} (byte 0x{data[error.start]:02x}). "
            "Save the table as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{table} is empty: expected a header and rows")
    return text


# ------------------------------------------------------------------------------------------------ CSV and TSV


def _read_csv(path: Path, wanted: _Wanted) -> list[Row]:
    text = _decode(path, wanted.table)
    try:
        return _rows_of(text, wanted, delimiter=_delimiter(text, wanted.columns), strict=True)
    except csv.Error as error:
        raise _broken(wanted.table, error) from None


def _read_tsv(path: Path, wanted: _Wanted) -> list[Row]:
    text = _decode(path, wanted.table)
    try:
        return _rows_of(text, wanted, delimiter="\t", strict=True)
    except csv.Error:
        pass
    try:
        return _rows_of(text, wanted, delimiter="\t", quoting=csv.QUOTE_NONE)
    except csv.Error as error:
        raise _broken(wanted.table, error) from None


class _LineError(csv.Error):
    """What is wrong, and with which line."""


def _broken(table: str, error: csv.Error) -> DataError:
    return DataError(f"{table} {error}. A cell that holds quotes must be in quotes, with each of its own doubled")


def _delimiter(text: str, columns: Sequence[str]) -> str:
    header = text.lstrip().splitlines()[0]
    names = {mark: _split(header, mark) for mark in ",;\t"}
    for mark, cells in names.items():
        if set(columns) <= set(cells):
            return mark
    return next((mark for mark, cells in names.items() if len(cells) > 1), ",")


def _split(header: str, delimiter: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]


def _rows_of(text: str, wanted: _Wanted, **dialect: Any) -> list[Row]:
    with _long_cells():
        lines = list(_numbered(text, dialect))
    names = [cell.strip() for cell in lines[0][1]]
    wanted.check(names)
    rows, bad = [], []
    for number, cells in lines[1:]:
        if len(cells) == len(names):
            rows.append(wanted.row(dict(zip(names, cells, strict=True)), number, "line"))
        else:
            bad.append((number, f"{len(cells)} cells under a header of {len(names)}"))
    wanted.bad(bad, "not as many cells as columns", "A cell with the separator or a new line in it must be in quotes")
    return rows


def _numbered(text: str, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    begins = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _LineError(f"line {begins:,} cannot be split into cells ({error})") from None
        if any(cells):
            yield begins, cells
        begins = reader.line_num + 1


@contextmanager
def _long_cells() -> Iterator[None]:
    # The limit of 131,072 characters is one for the whole process.
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ------------------------------------------------------------------------------------------------------- JSON


def _read_json_lines(path: Path, wanted: _Wanted) -> list[Row]:
    # Not splitlines(): a text in JSON may hold other line ends, such as U+2028.
    return _json_lines(_decode(path, wanted.table), wanted)


def _json_lines(text: str, wanted: _Wanted) -> list[Row]:
    objects: list[tuple[int, dict[str, Any]]] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.append((number, _why(error)))
            continue
        if isinstance(value, dict):
            objects.append((number, value))
        else:
            bad.append((number, f"it is a {type(value).__name__}"))
    wanted.bad(bad, "no JSON object", 'Expected one object on each line, such as {"text": "...", "label": "..."}')
    return _from_objects(objects, wanted, "line")


def _why(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _from_objects(objects: Sequence[tuple[int, dict[str, Any]]], wanted: _Wanted, unit: str) -> list[Row]:
    if objects:
        wanted.check(list(dict.fromkeys(name for _, value in objects for name in value)))
    return [wanted.row(value, number, unit) for number, value in objects]


def _read_json(path: Path, wanted: _Wanted) -> list[Row]:
    text = _decode(path, wanted.table)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            return _json_lines(text, wanted)
        raise DataError(f"{wanted.table} is no JSON: {_why(error)}") from None
    if not isinstance(value, list):
        raise DataError(f"{wanted.table} holds a {type(value).__name__}: expected a list of objects")
    numbered: Iterable[tuple[int, Any]] = list(enumerate(value, 1))
    bad = [(number, f"it is a {type(entry).__name__}") for number, entry in numbered if not isinstance(entry, dict)]
    wanted.bad(bad, "no JSON object", "Expected a list of objects", "row")
    return _from_objects([entry for entry in numbered if isinstance(entry[1], dict)], wanted, "row")


# ---------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(path: Path, wanted: _Wanted) -> list[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"reading {wanted.table} needs pyarrow: pip install pyarrow") from None
    with readable(path):
        path.open("rb").close()
    try:
        with parquet.ParquetFile(path) as file:
            wanted.check(list(file.schema_arrow.names))
            table = file.read(columns=list(dict.fromkeys(wanted.columns)))
        columns = {name: table.column(name).to_pylist() for name in wanted.columns}
    except DataError:
        raise
    # pyarrow raises OSError and UnicodeDecodeError too where the bytes are broken.
    except (arrow.ArrowException, OSError, ValueError) as error:
        why = shown(" ".join(str(error).split()))
        raise DataError(f"{wanted.table} is no Parquet that can be read: {why}") from None
    return [
        wanted.row({name: values[index] for name, values in columns.items()}, index + 1, "row")
        for index in range(table.num_rows)
    ]


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
