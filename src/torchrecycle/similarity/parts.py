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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.similarity import names
from torchrecycle.similarity.saving import ModelFolderError, new_folder, read_json, write_json

__all__ = [
    "SharedWeightsError",
    "class_of_folder",
    "class_to_write",
    "has_own",
    "has_own_load",
    "load_part",
    "must_not_share",
    "read_parts",
    "save_part",
    "saved_parts",
]

_Part = TypeVar("_Part", bound=nn.Module)


class SharedWeightsError(RecycleError, ValueError):
    """Two parts hold the same weights, and each would be loaded with its own."""


def has_own(part: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the class of a part has a ``save`` or ``load`` other than its base."""
    return any(_function(type(part), name) is not _function(base, name) for name in ("save", "load"))


def has_own_load(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class has a ``load`` other than another class."""
    return _function(kind, "load") is not _function(base, "load")


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
    return class_to_write(kind, said=(folder / "module.json").exists())  # by save_module


def class_to_write(kind: type, *, said: bool = False) -> str:
    """The name that a class is found by.

    Args:
        kind: the class.
        said: whether it was warned before that only this process finds it.

    Raises:
        ModelFolderError: it is not to be found under its name.
    """
    try:
        name = names.name_of(kind)
    except names.NameRefusedError as error:
        raise ModelFolderError(
            f"the class {error}: loading would not find it. Define it at the top of a module"
        ) from error
    why = names.why_only_here(kind)
    if why is not None and not said:
        warnings.warn(
            f"this model can be loaded in this process only: {name} {why}. Move it to the top of a module that can be "
            "imported, and save again",
            RecycleWarning,
            stacklevel=5,
        )
    return name


def must_not_share(parts: Mapping[str, nn.Module]) -> None:
    """See that no weights are in two parts: each is written by itself, and what is tied would be two.

    Weights that are not trained give the same after loading, and only take more memory: that is a warning.

    Raises:
        SharedWeightsError: weights that are trained are in two parts.
    """
    held: dict[tuple[Any, ...], tuple[str, str]] = {}
    frozen: list[str] = []
    for part, module in parts.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            first, other = held.setdefault(_place(tensor), (part, name))
            if first == part:
                continue
            if tensor.requires_grad:
                raise SharedWeightsError(
                    f"{part} and {first} share weights, {name} and {other}, and each part is saved by itself: loaded, "
                    "they would be two, and train apart. Hold them in one part only (let the head take a copy, "
                    "copy.deepcopy(layer)), or freeze them, requires_grad_(False)"
                )
            frozen.append(f"{name} of {part} and {other} of {first}")
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        warnings.warn(
            f"{frozen[0]}{more} are the same numbers, and each part is saved by itself: loaded, they are two with the "
            "same values. The outputs are the same; should they be trained or changed later, tie them again",
            RecycleWarning,
            stacklevel=3,
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta or not tensor.numel() or tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr()


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


def class_of_folder(folder: Path, name: str, expected: type[_Part]) -> type[_Part]:
    """The class that a folder is to be loaded by.

    Raises:
        ModelFolderError: there is no such class here, or it is another one than expected.
    """
    try:
        kind = names.find(name)
    except names.NameRefusedError as error:
        raise ModelFolderError(f"{folder} is to be loaded by the class {name}, which is not here: {error}") from error
    if not isinstance(kind, type) or not issubclass(kind, expected):
        raise ModelFolderError(f"{folder} is to be loaded by {name}, which is no {expected.__name__}")
    return kind


def load_part(folder: Path, name: str, expected: type[_Part]) -> _Part:
    """Let the class of a part read it.

    Args:
        folder: where it was saved.
        name: of its class.
        expected: what that must be.

    Raises:
        ModelFolderError: there is no such class here, or it is another one.
    """
    kind = class_of_folder(folder, name, expected)
    part: Any = kind.load(str(folder))  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(part, expected):
        raise ModelFolderError(f"{name}.load gives a {type(part).__name__}: it is to give the {expected.__name__}")
    return part
