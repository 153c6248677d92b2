"""A folder of parts, each written by its own ``save`` and read by its class's ``load``.

A `SimilarityModel` of a picture and a text encoder is ``encoders/picture/``, ``encoders/text/``, ``head/`` and a
``model.json`` that says of which class each is. So a class that keeps files of its own, a vocabulary or the folder of a
transformer, is asked to write and to read them; what has no such methods is written by `save_module`.

Which class that is, ``model.json`` says; it must be one of encoders or heads. What such a method does with its files is
its own affair: one that unpickles them trusts whoever wrote them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from torchrecycle.errors import RecycleWarning
from torchrecycle.similarity import names
from torchrecycle.similarity.saving import ModelFolderError, new_folder, read_json, write_json

__all__ = ["has_own", "load_part", "read_parts", "save_part", "saved_parts"]

_Part = TypeVar("_Part", bound=nn.Module)


def has_own(part: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the class of a part has a ``save`` or ``load`` other than its base."""
    return any(_function(type(part), name) is not _function(base, name) for name in ("save", "load"))


def _function(kind: type, name: str) -> Any:
    found = getattr(kind, name)
    return getattr(found, "__func__", found)  # of a classmethod


@contextmanager
def saved_parts(
    output_path: str | os.PathLike[str], about: str, kind: str, version: int, known: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder for parts, which takes its name when the block has ended well, and a dict that is written into it.

    Args:
        output_path: as of `new_folder`.
        about: name of the JSON file that the dict becomes.
        kind: what the folder is.
        version: of the format.
        known: names of the folders within.
    """
    body: dict[str, Any] = {}
    with new_folder(output_path, about=about, kind=kind, known=(about, *known)) as folder:
        yield folder, body
        write_json(folder / about, kind, version, body)


def save_part(part: Any, folder: Path) -> str:
    """Let a part write itself into a new folder. Gives the name of its class."""
    kind = type(part)
    folder.mkdir(parents=True)
    part.save(str(folder))
    if not folder.is_dir():
        raise ModelFolderError(
            f"{kind.__name__}.save was given a folder that is there, and has removed it: write into it"
        )
    try:
        name = names.name_of(kind)
    except names.NameRefusedError as error:
        raise ModelFolderError(
            f"the class {error}: loading would not find it. Define it at the top of a module"
        ) from error
    why = names.why_only_here(kind)
    if why is not None and not (folder / "module.json").exists():  # else it was said by save_module
        warnings.warn(
            f"this model can be loaded in this process only: {name} {why}. Move it to the top of a module that can be "
            "imported, and save again",
            RecycleWarning,
            stacklevel=4,
        )
    return name


def read_parts(folder: Path, about: str, kind: str, version: int, keys: Sequence[str]) -> dict[str, Any]:
    """What `saved_parts` has written into its JSON file.

    Raises:
        ModelFolderError: there is none, or of another format, or it lacks one of the keys.
    """
    found = read_json(folder, about, kind, version)
    for key in keys:
        names_of_parts = found.get(key)
        classes = names_of_parts.values() if isinstance(names_of_parts, dict) else [names_of_parts]
        if not all(isinstance(name, str) for name in classes):
            raise ModelFolderError(f"{folder / about} does not say what its {key} is: it is damaged. Save again")
    return found


def load_part(folder: Path, name: str, expected: type[_Part]) -> _Part:
    """Let the class of a part read it.

    Args:
        folder: where it was saved.
        name: of its class.
        expected: what that must be.

    Raises:
        ModelFolderError: there is no such class here, or it is another one.
    """
    try:
        kind = names.find(name)
    except names.NameRefusedError as error:
        raise ModelFolderError(f"{folder} is to be loaded by the class {name}, which is not here: {error}") from error
    if not isinstance(kind, type) or not issubclass(kind, expected):
        raise ModelFolderError(f"{folder} is to be loaded by {name}, which is no {expected.__name__}")
    part: Any = kind.load(str(folder))  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(part, expected):
        raise ModelFolderError(f"{name}.load gives a {type(part).__name__}: it is to give the {expected.__name__}")
    return part
