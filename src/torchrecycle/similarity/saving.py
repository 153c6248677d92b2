"""A module <-> a folder: `save_module` and `load_module`, without pickle.

A head of three blocks of a ResNet-34 and a `SkipConnectionHead`, 13.4 million parameters, becomes 54 MB in two files::

    module.json            format, versions, and what `describe` says: classes, attributes, names of tensors
    weights.safetensors    the tensors
    pretrained/0/          tokenizers and processors that it holds, as their own save_pretrained writes them

Loading gives the same outputs to the bit, in another process, and the same state dict, gradient and training flags. It
runs no code from the files, see `torchrecycle.similarity.names`. ``module.json`` holds a hash of the weights: the
weights of another training would fit, and give other embeddings without a word.

A folder appears under its name when it is whole. One that holds a saved module is replaced, another one is refused;
between two renames there is none under that name, and should the process end right there, the message of `load_module`
says where the one from before is. A save that is killed leaves a folder ``.NAME.saving-...`` beside it, which may be
deleted. Only one process may save into a folder at once.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from blake3 import blake3
from torch import Tensor, nn

from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.keys import hash_threads
from torchrecycle.similarity.description import Description, describe, dtype_name, is_dense
from torchrecycle.similarity.rebuilding import rebuild

__all__ = ["ModelFolderError", "force_to_disk", "load_module", "new_folder", "read_json", "save_module", "write_json"]

FORMAT = 1
KIND = "module"
ABOUT, WEIGHTS, PRETRAINED = "module.json", "weights.safetensors", "pretrained"

_Module = TypeVar("_Module", bound=nn.Module)


class ModelFolderError(RecycleError, OSError):
    """A folder is no saved model, or of another format, or damaged, or cannot be written."""


def save_module(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a module into a folder, so that `load_module` makes it again.

    Args:
        module: Any module: of torchvision, timm or transformers, of one's own. It stays as it is.
        folder: New or empty, or one that was written here before, which is replaced when the new one is whole.

    Raises:
        DescriptionError: the module holds something that cannot be written without pickle; the message names it.
        ModelFolderError: the folder holds something else, or cannot be written.
    """
    description, tensors, pretrained = describe(module)
    with new_folder(folder, about=ABOUT, kind=KIND, known=(ABOUT, WEIGHTS, PRETRAINED)) as staging:
        _write_weights(staging / WEIGHTS, description, tensors)
        for number, each in enumerate(pretrained):
            each.save_pretrained(staging / PRETRAINED / str(number))
        classes = [entry["class"] for entry in description.modules.values()]
        said = {"versions": _versions(_packages(classes)), "weights": _digest(staging / WEIGHTS)}
        body = {name: getattr(description, name) for name in _SECTIONS}
        write_json(staging / ABOUT, KIND, FORMAT, {**said, **body})


@overload
def load_module(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module: ...
@overload
def load_module(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", *, expected: type[_Module]
) -> _Module: ...
def load_module(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", *, expected: type[nn.Module] = nn.Module
) -> nn.Module:
    """Read what `save_module` has written.

    Args:
        folder: Where it was saved.
        device: Where its tensors are to lie.
        expected: The class that it is to be of.

    Returns:
        a module of its own: nothing of it is mapped from the files. Its gradient and training flags are as they were.

    Raises:
        ModelFolderError: there is no saved module, or of another format or class, or one of its files is damaged or of
            another save, or a class that it names is not there or may not be named.
    """
    folder = Path(folder)
    about = read_json(folder, ABOUT, KIND, FORMAT)
    try:
        description = Description(*(_section(folder, about, name) for name in _SECTIONS))
        tensors = _read_weights(folder / WEIGHTS, description, str(about["weights"]))
        module = rebuild(description, tensors, lambda number, kind: _read_pretrained(folder, number, kind))
    except ModelFolderError:
        raise
    except RecycleError as error:
        raise ModelFolderError(f"cannot load {folder}: {error}. It was written with {_written_with(about)}") from error
    except Exception as error:  # a damaged or hostile description can go wrong anywhere
        raise ModelFolderError(
            f"{folder / ABOUT} is damaged, or does not fit the classes that it names ({type(error).__name__}: {error})"
            f". It was written with {_written_with(about)}"
        ) from error
    if not isinstance(module, expected):
        raise ModelFolderError(
            f"{folder} holds a {type(module).__name__}, and is loaded as a {expected.__name__}: use "
            f"{type(module).__name__}.load or load_module"
        )
    _warn_of_versions(folder, about)
    return module.to(device)


_SECTIONS = {"modules": dict, "tensors": dict, "shared": list, "pretrained": list}


def _section(folder: Path, about: Mapping[str, Any], name: str) -> Any:
    found = about.get(name)
    if not isinstance(found, _SECTIONS[name]):
        raise ModelFolderError(f"{folder / ABOUT} does not say what its {name} are: it is damaged. Save again")
    return found


# -- weights -----------------------------------------------------------------------------------------------------------

_KNOWN_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)
"""What every version of safetensors knows. Others are written as their bytes."""


def _write_weights(file: Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        if "same" in description.tensors[name]:
            continue
        value = tensor.detach().cpu().contiguous()
        value = value if value.dtype in _KNOWN_DTYPES else value.reshape(-1).view(torch.uint8)
        start = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, and would write all of it for a part.
        if start in memory or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        memory.add(start)
        stored[name] = value
    try:
        save_file(stored, file)
    except SafetensorError as error:  # a full disk is one of these
        size = sum(value.nbytes for value in stored.values())
        raise OSError(f"{error}, in writing {size / 1e6:,.0f} MB") from error


def _read_weights(file: Path, description: Description, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    needed = {name: spec for name, spec in description.tensors.items() if "same" not in spec}
    try:
        with safe_open(file, framework="pt") as weights:
            held = set(weights.keys())
            if held != needed.keys():
                raise ModelFolderError(_other_names(file, needed.keys() - held, held - needed.keys()))
            found = {name: _as_saved(file, name, weights.get_tensor(name), spec) for name, spec in needed.items()}
    except FileNotFoundError as error:
        raise ModelFolderError(f"{file.parent} has lost its {file.name}: copy it there, or save again") from error
    except SafetensorError as error:
        raise ModelFolderError(f"{file} is damaged or cut off ({error}): copy it again, or save again") from error
    if _digest(file) != digest:
        raise ModelFolderError(
            f"{file} is not what was saved with the {ABOUT} beside it: it is damaged, or of another save. Copy both "
            "again, or save again"
        )
    return found


def _as_saved(file: Path, name: str, value: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """A tensor of its own memory, in the order of dimensions that it had."""
    dtype, shape = getattr(torch, spec["dtype"], None), list(spec["shape"])
    if not isinstance(dtype, torch.dtype):
        raise ModelFolderError(f"{file} holds numbers of {spec['dtype']}, which this torch does not know")
    if dtype not in _KNOWN_DTYPES:
        # a copy first: bytes in a file need not begin where a wider number may
        value = value.clone().view(dtype).reshape(shape)
    if list(value.shape) != shape or value.dtype != dtype:
        raise ModelFolderError(
            f"{name} in {file} is {list(value.shape)} of {dtype_name(value.dtype)}, and the model was saved with "
            f"{shape} of {spec['dtype']}: the file is of another model"
        )
    stride = spec.get("stride")
    if stride is not None and len(stride) == len(shape) and is_dense(shape, stride):
        return torch.empty_strided(shape, stride, dtype=dtype).copy_(value)
    # Not mapped: numbers in a file begin anywhere, and kernels add up in another order where they are not aligned.
    return value.clone()


def _other_names(file: Path, missing: Any, more: Any) -> str:
    said = [f"lacks {_some(missing)}"] if missing else []
    said += [f"holds {_some(more)}, which the model has not"] if more else []
    return f"{file} {' and '.join(said)}: it is of another model. Copy it again from where the model was saved"


def _some(names: Any) -> str:
    first = sorted(names)[:3]
    return f"{', '.join(first)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _digest(file: Path) -> str:
    return blake3(max_threads=hash_threads()).update_mmap(str(file)).hexdigest()


def _read_pretrained(folder: Path, number: int, kind: Any) -> Any:
    return kind.from_pretrained(folder / PRETRAINED / str(int(number)), local_files_only=True)


# -- versions ----------------------------------------------------------------------------------------------------------


def _packages(classes: list[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(":")[0].partition(".")[0] for name in classes))


def _versions(packages: list[str]) -> dict[str, str]:
    found = {package: getattr(sys.modules.get(package), "__version__", None) for package in ("torch", *packages)}
    return {package: version for package, version in found.items() if isinstance(version, str)}


def _our_version() -> str:
    return importlib.metadata.version("torchrecycle")


def _written_with(about: Mapping[str, Any]) -> str:
    written = {"torchrecycle": about.get("torchrecycle"), **about.get("versions", {})}
    return ", ".join(f"{package} {version}" for package, version in written.items())


def _warn_of_versions(folder: Path, about: Mapping[str, Any]) -> None:
    """Say so where a class was written part by part whose package has changed. Torch reads what older ones wrote."""
    parts = [entry["class"] for entry in about["modules"].values() if "config" not in entry]
    written, here = about["versions"], _versions(_packages(parts))
    other = [p for p in here if p in written and here[p] != written[p] and p not in ("torch", "torchrecycle")]
    if other:
        said = ", ".join(f"{package} {written[package]}, and here is {here[package]}" for package in other)
        warnings.warn(
            f"{folder} was saved with {said}: should a layer have changed between them, the outputs are others. "
            "Compare some, and save again",
            RecycleWarning,
            stacklevel=3,
        )


# -- folders -----------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, about: str, kind: str, known: Collection[str]) -> Iterator[Path]:
    """A folder to write into, which takes the given name when the block has ended well.

    Args:
        folder: the name. Nothing may be there, or an empty folder, or one that this function has made for the same
            `kind`, with nothing else in it: that one is replaced, and deleted.
        about: name of the JSON file that tells of what kind it is, as `write_json` writes it.
        kind: of what kind that is.
        known: names of all that belongs to it.

    Raises:
        ModelFolderError: there is something else, or it cannot be written.
    """
    path = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(path):
        raise ModelFolderError(
            f"{path} is or holds the current folder, which is not to be replaced: give one inside of it"
        )
    _must_be_free(path, about, kind, known)
    staging = path.with_name(f".{path.name}.saving-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                force_to_disk(file)
        _put_in_place(staging, path)
    except OSError as error:
        if isinstance(error, RecycleError):
            raise
        inside = ". Give a folder inside of it" if path.is_dir() else ""  # a mounted one cannot be renamed
        raise ModelFolderError(f"cannot save in {folder}: {error.strerror or error}{inside}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # is gone if all went well


def _must_be_free(path: Path, about: str, kind: str, known: Collection[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ModelFolderError(f"{path} is a file, and a model is saved as a folder: give another name")
    held = sorted(each.name for each in path.iterdir())
    others = [name for name in held if name not in known]
    if held and _kind(path / about) != kind:
        raise ModelFolderError(f"{path} holds {_some(held)}, and no saved {kind}: give a new or empty folder")
    if others:
        raise ModelFolderError(
            f"{path} holds {_some(others)} beside a saved {kind}, which saving would delete: give a new or empty folder"
        )


def _kind(file: Path) -> str | None:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about.get("kind") if isinstance(about, dict) else None


def _put_in_place(staging: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.replaced-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.rmdir()  # if it is empty
    replaced = path.exists()
    if replaced:
        path.rename(old)
    try:
        staging.rename(path)
    except BaseException:
        if replaced:
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def force_to_disk(file: Path) -> None:
    """Wait until what was written into a file would survive a loss of power."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def write_json(file: Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a JSON file that says of what kind and format it is."""
    about = {"format": version, "kind": kind, "torchrecycle": _our_version(), **body}
    file.write_text(json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(folder: Path, name: str, kind: str, version: int) -> dict[str, Any]:
    """Read what `write_json` has written.

    Raises:
        ModelFolderError: it is not there, or damaged, or of another kind or format.
    """
    file = folder / name
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFolderError(_why_nothing(folder, name, kind)) from error
    except OSError as error:
        raise ModelFolderError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{file} is damaged or cut off ({error}): copy it again, or save again") from error
    if not isinstance(about, dict) or about.get("kind") != kind:
        held = about.get("kind") if isinstance(about, dict) else None
        raise ModelFolderError(f"{file} is that of {f'a {held}' if held else 'something else'}, and not of a {kind}")
    found = about.get("format")
    if found != version:
        newer = isinstance(found, int) and found > version
        what = "install a newer torchrecycle" if newer else "save it again with this version"
        raise ModelFolderError(
            f"{folder} holds a {kind} of format {found}, written by torchrecycle {about.get('torchrecycle')}, and "
            f"torchrecycle {_our_version()} reads format {version}: {what}"
        )
    return about


def _why_nothing(folder: Path, name: str, kind: str) -> str:
    if not folder.exists():
        path = Path(os.path.realpath(folder))
        left = sorted(path.parent.glob(f".{glob.escape(path.name)}.replaced-*")) if path.parent.is_dir() else []
        hint = f". A save was interrupted: the model from before is {left[-1]}; give it its name back" if left else ""
        return f"there is no folder {folder}{hint}"
    held = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    if not folder.is_dir():
        return f"{folder} is a file, and a {kind} is saved as a folder"
    theirs = "config.json" in held and name not in held
    said = f" ({_some(held)})" if held else ", and nothing else"
    quaterion = (
        ". Should Quaterion have written it: it keeps modules as pickles. Make the same model here, load its weights "
        "into it, and save it"
    )
    return f"{folder} holds no {name}{said}: it is no saved {kind}{quaterion if theirs else ''}"
