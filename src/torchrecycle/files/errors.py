"""How a mistake in the user's data is told: in one readable line, or left out and said.

Of 300 pictures three are cut off. Without ``--skip-bad`` this is a `DataError`: ``cars cannot be used: 3 of 300
pictures cannot be decoded: a/1.jpg (...), ...``; with it, the same words become a line in ``left_out``, and the sweep
goes on with 297. `LeftOut` is the one place where this is decided.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchrecycle.errors import RecycleError

__all__ = ["DataError", "LeftOut", "count_of", "examples", "near", "readable", "shown"]

MOST_EXAMPLES = 3
LONGEST_NAME = 100


class DataError(RecycleError, ValueError):
    """The user's data are not what a sweep can use. The message is one line: what, where, and the next step."""


class LeftOut:
    """What a sweep goes on without, a line each.

    Args:
        skip_bad: whether what is bad is left out and said. Otherwise it is an error.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """Something is left out in any case, and no mistake."""
        self.lines.append(line)

    def bad(self, what: str, remedy: str) -> None:
        """Something is wrong with single files or rows, named in ``what``.

        Raises:
            DataError: without ``skip_bad``.
        """
        if not self.skip_bad:
            raise DataError(f"{what}. {remedy}, or go on without: --skip-bad")
        self.lines.append(f"{what}: left out")


def shown(name: object) -> str:
    """A name from the user's data as it can stand in one line.

    >>> shown("a/1.jpg")
    'a/1.jpg'
    >>> print(shown("two\\nlines"))
    'two\\nlines'
    """
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def examples(names: Iterable[object], most: int = MOST_EXAMPLES) -> str:
    """
    >>> examples("ab"), examples("abcdefg")
    ('a and b', 'a, b, c and 4 more')
    """
    words = [shown(name) for name in names]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most:,} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_of(number: int, noun: str) -> str:
    """
    >>> count_of(1, "picture"), count_of(8144, "class")
    ('1 picture', '8,144 classes')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def near(name: str, names: Sequence[str]) -> str | None:
    """The one of the names that was probably meant, or None.

    >>> near("Lable", ["file", "label"])
    'label'
    """
    lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), list(lower), n=1)
    inside = [other for other in names if min(len(name), len(other)) > 2 and _one_in_other(name, other)]
    return lower[found[0]] if found else inside[0] if inside else None


def _one_in_other(a: str, b: str) -> bool:
    return a.lower() in b.lower() or b.lower() in a.lower()


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Around whatever opens ``path``: what the system says becomes a `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(_not_there(Path(path))) from None
    except OSError as error:
        why = (error.strerror or str(error) or type(error).__name__).lower()
        # Below a folder, the system names the very file.
        raise DataError(f"cannot read {shown(error.filename or path)}: {shown(why)}") from None


def _not_there(path: Path) -> str:
    parent = path.absolute().parent
    try:
        beside = sorted(os.listdir(parent))
    except OSError:
        return f"{shown(path)} does not exist, nor does (or may be read) the folder {shown(parent)}"
    meant = near(path.name, beside)
    hint = f" Did you mean {shown(meant)}?" if meant else ""
    return f"{shown(path)} does not exist.{hint or f' Looked in {shown(parent)}'}"
