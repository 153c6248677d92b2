"""``results.json`` -> `SweepResult`: the inverse of `SweepResult.to_json`, for who looks at a sweep of yesterday.

    result = read_result(Path("sweep-cars-resnet18"))  # or its results.json
    result.of("50").quality["R-precision"]  # Estimate(mean=0.936, error=0.006)

A file holds every figure, but neither pictures nor what each object contributes; those come back empty. The classes of
`torchrecycle.sweep.results` are the format: a value is read by the type of its field, so a field with a default may be
missing (an older version wrote the file) and one that is not known is passed over (a newer one did). Whatever else is
not as it should be is an error that names the place: ``levels[2].bytes_kept``. JSON knows no NaN, so a number that has
to be there and is null is one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from torchrecycle.errors import RecycleError
from torchrecycle.files.marker import is_marked
from torchrecycle.report.words import shortened
from torchrecycle.sweep.kept import RESULT
from torchrecycle.sweep.results import SweepResult

__all__ = ["ResultsError", "read_result"]

_LEFT_OUT: dict[str, Any] = {"samples": {}, "untrained_found": [], "scores": {}, "found": []}
"""What `SweepResult.to_json` does not write."""


class ResultsError(RecycleError, ValueError):
    """A file or folder holds no results of a sweep, or not whole ones."""


def read_result(where: Path) -> SweepResult:
    """What a sweep found.

    Args:
        where: a ``results.json``, or the folder in which one lies.

    Raises:
        ResultsError: there is none, or it is none of a sweep, or parts of it are missing or wrong.
    """
    if not where.exists():
        raise ResultsError(f"there is no {where}: {_GIVE}")
    path = where / RESULT if where.is_dir() else where
    if not path.exists():
        stopped = f"its sweep has not ended, and goes on with the same command; or {_GIVE}"
        raise ResultsError(f"{where} holds no {RESULT}: {stopped if _is_of_a_sweep(where) else _GIVE}")
    try:
        return _result(_json(path))
    except _WrongError as wrong:
        raise ResultsError(f"{path} holds no whole results of a sweep: {wrong}") from None


def _is_of_a_sweep(folder: Path) -> bool:
    return is_marked(folder) or (folder / "journal").is_dir()


_GIVE = f"give the folder that torchrecycle sweep wrote to (its --out), or the {RESULT} in it"


class _WrongError(Exception):
    """Something is not as it should be, in words."""


def _json(path: Path) -> Any:
    """
    Raises:
        ResultsError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} is no JSON: {_GIVE}") from error


def _result(value: Any) -> SweepResult:
    if isinstance(value, dict) and "levels" not in value:
        held = ", ".join(shortened(str(name), 20) for name in list(value)[:3]) or "nothing"
        raise _WrongError(f"it holds {held}, and no levels")
    result = _made(SweepResult, value, "the file")
    _check(result)
    return result


def _check(result: SweepResult) -> None:
    """What the types do not say."""
    if not result.levels:
        raise _WrongError("it has no level")
    names = [one.level for one in result.levels]
    if len(set(names)) < len(names):
        raise _WrongError(f"a level is there twice: {', '.join(names)}")
    if result.metric not in result.untrained:
        raise _WrongError(f"untrained has no {shortened(result.metric, 40)}, which is the metric")
    for one in result.levels:
        if result.metric not in one.quality:
            raise _WrongError(f"level {one.level} has no {shortened(result.metric, 40)}, which is the metric")
        if not one.trials:
            raise _WrongError(f"level {one.level} has no training")


# -- by the types of the fields ----------------------------------------------------------------------------------------


def _made(kind: Any, value: Any, where: str) -> Any:
    """A value of a type, which may be a class of frozen fields, from what JSON holds of it."""
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        (other,) = [each for each in inner if each is not type(None)]
        return None if value is None else _made(other, value, where)
    if origin is Literal:
        return _of_kind(str, value, where)
    if origin is tuple:
        items = _of_kind(list, value, where)
        return tuple(_made(inner[0], each, f"{where}[{at}]") for at, each in enumerate(items))
    if origin in (dict, Mapping):
        pairs = _of_kind(dict, value, where)
        return {name: _made(inner[1], each, f"{where}[{name!r:.40}]") for name, each in pairs.items()}
    return _number(value, where) if kind is float else _of_kind(kind, value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    held = _of_kind(dict, value, where)
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        place = field.name if where == "the file" else f"{where}.{field.name}"
        if field.name in held:
            given[field.name] = _made(hints[field.name], held[field.name], place)
        elif field.name in _LEFT_OUT:
            given[field.name] = _made(hints[field.name], _LEFT_OUT[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _WrongError(f"{place} is missing")
    return kind(**given)


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return _of_kind(float, value, where)


_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "a yes or no",
}


def _of_kind(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        came = "null" if value is None else _WORDS.get(type(value), "something else")
        raise _WrongError(f"{where} is {came}, and should be {_WORDS.get(kind, 'something else')}")
    return value
