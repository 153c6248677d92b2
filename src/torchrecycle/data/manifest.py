"""The manifest: which key belongs to which index of a data set, with the targets.

It is what lets an epoch run without reading the data set: 8,144 keys of 16 bytes, one column of labels. It outlives the
process only for data sets whose identity covers objects *and* targets in full (`identity_of`); for any other it serves
this process, as long as `state_of` finds the data set unchanged, and the next run reads every item once.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from torchrecycle.data.columns import Column, Template
from torchrecycle.errors import KeyTypeError
from torchrecycle.keys import key

__all__ = ["Manifest", "identity_of", "quick_state_of", "state_of"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Keys and targets of one data set, in its order."""

    keys: np.ndarray = field(repr=False)
    """``[items, 16]`` uint8."""
    template: Template
    """The nest that each item is."""
    columns: tuple[Column, ...] = field(repr=False)
    """Per leaf of the template, its values; stand-ins for inputs that are not kept."""
    inputs: Mapping[int, str]
    """Which leaf is which model input, by position, where the batch has it at the same place as the item."""

    def __len__(self) -> int:
        return len(self.keys)

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and metadata for a safetensors file. `from_tensors` is the inverse."""
        tensors = {"keys": torch.from_numpy(self.keys)}
        words = []
        for number, column in enumerate(self.columns):
            words.append([column.kind, column.dtype])
            for part in ("values", "offsets", "shapes"):
                value = getattr(column, part)
                if value is not None:
                    tensors[f"column.{number}.{part}"] = value.contiguous()
        inputs = {str(position): name for position, name in self.inputs.items()}
        about = {"template": self.template.to_json(), "columns": words, "inputs": inputs}
        return tensors, {"about": json.dumps(about)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Manifest:
        """What `to_tensors` gave, read back."""
        about = json.loads(metadata["about"])
        columns = []
        for number, (kind, dtype) in enumerate(about["columns"]):
            parts = [tensors.get(f"column.{number}.{part}") for part in ("values", "offsets", "shapes")]
            if parts[0] is None:
                raise ValueError(f"column {number} has no values")
            columns.append(Column(kind, parts[0], parts[1], parts[2], dtype))
        keys = tensors["keys"].numpy()
        if any(len(column) != len(keys) for column in columns):
            raise ValueError("a column of a manifest is of another length than its keys")
        inputs = {int(position): name for position, name in about["inputs"].items()}
        return cls(keys, Template.from_json(about["template"]), tuple(columns), inputs)


# -- which data set is it ----------------------------------------------------------------------------------------------


def identity_of(dataset: Any, name: str | None = None) -> str | None:
    """What tells this data set, its transforms and its targets from every other, also in another process.

    None where that cannot be known: then the manifest serves this process only.

    Args:
        dataset: map-style.
        name: the user's own name for it, transforms and targets included.
    """
    if name is not None:
        return key(("named", name, len(dataset))).hex()
    parts = _identity(dataset)
    return None if parts is None else key(parts).hex()


def _identity(dataset: Any) -> Any:
    kind = type(dataset)
    if kind in (list, tuple):
        return _content(("list", dataset))
    if kind is TensorDataset:
        return _content(("tensors", dataset.tensors))
    if kind is Subset:
        inner = _identity(dataset.dataset)
        return None if inner is None else _content(("subset", inner, list(dataset.indices)))
    if kind is ConcatDataset:
        inner = [_identity(part) for part in dataset.datasets]
        return None if None in inner else ("concatenated", inner)
    if kind.__module__ == "datasets.arrow_dataset" and kind.__name__ == "Dataset":
        return _hugging_face(dataset)
    if kind.__module__ == "torchvision.datasets.folder" and kind.__name__ in ("ImageFolder", "DatasetFolder"):
        return _image_folder(dataset)
    return None


def _content(value: Any) -> Any:
    try:
        return key(value)
    except KeyTypeError:
        return None


def _hugging_face(dataset: Any) -> Any:
    shape = dataset.format
    if shape["type"] == "custom":  # a Python function makes the items
        return None
    words = [shape["type"] or "python", sorted(shape["columns"]), shape["output_all_columns"]]
    options = _content(shape["format_kwargs"])
    return None if options is None else ("hugging face", dataset._fingerprint, words, options, len(dataset))


def _image_folder(dataset: Any) -> Any:
    from torchvision.datasets.folder import default_loader

    transforms = _transform(dataset.transform), _transform(dataset.target_transform)
    if None in transforms or dataset.loader is not default_loader:
        return None
    files = []
    for path, label in dataset.samples:
        stat = os.stat(path)
        files.append((str(path), label, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return ("image folder", transforms, files)


_KNOWN_TRANSFORMS = ("torchvision.transforms.", "timm.data.transforms")


def _transform(transform: Any) -> Any:
    """A transform in words, if it consists of torchvision's and timm's own classes; else None."""
    if transform is None:
        return "none"
    kind = type(transform)
    if not f"{kind.__module__}.".startswith(_KNOWN_TRANSFORMS) or kind.__name__ == "Lambda":
        return None
    words: list[Any] = [f"{kind.__module__}.{kind.__qualname__}"]
    for name, value in sorted(vars(transform).items()):
        plain = _transform_part(value)
        if plain is None:
            return None
        words.append((name, plain))
    return words


def _transform_part(value: Any) -> Any:
    if isinstance(value, (list, tuple)) or (isinstance(value, dict) and not value):
        parts = [_transform_part(part) for part in value]
        return None if None in parts else parts
    if type(value).__module__.startswith(_KNOWN_TRANSFORMS) and not isinstance(value, type) and hasattr(value, "__dict__"):
        import enum

        return f"{value!r}" if isinstance(value, enum.Enum) else _transform(value)
    if isinstance(value, (torch.dtype, types.FunctionType, types.BuiltinFunctionType, type)):
        module = getattr(value, "__module__", "torch") or "torch"
        known = isinstance(value, torch.dtype) or module.startswith(("torch", "timm.")) and "<" not in value.__qualname__
        return str(value) if isinstance(value, torch.dtype) else f"{module}.{value.__qualname__}" if known else None
    content = _content(value)
    return None if content is None else content.hex()


# -- has it changed since, in this process -----------------------------------------------------------------------------


def state_of(*objects: Any) -> str:
    """A digest of the present state of objects, as far as it can be seen: for one process, and for good.

    Follows attributes, containers, functions with what they close over and the globals that they name. What it cannot
    look into counts by identity. It finds a relabelled target, a swapped transform, a changed variable in a closure.
    """
    hasher = blake3()
    seen: dict[int, int] = {}
    for one in objects:
        _digest(one, hasher, seen, 0)
    return hasher.hexdigest(length=16)


_DEPTH = 6


def _digest(value: Any, hasher: Any, seen: dict[int, int], depth: int) -> None:
    if id(value) in seen:
        hasher.update(f"again {seen[id(value)]};".encode())
        return
    content = _content(value) if not isinstance(value, (dict, list, tuple, set)) or depth > 0 else None
    if content is not None:
        hasher.update(content)
        return
    seen[id(value)] = len(seen)
    kind = type(value)
    hasher.update(f"{kind.__module__}.{kind.__qualname__};".encode())
    if depth > _DEPTH:
        hasher.update(f"id {id(value)};".encode())
    elif isinstance(value, Mapping):
        for name, part in value.items():
            hasher.update(f"{name!r}:".encode())
            _digest(part, hasher, seen, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        hasher.update(f"{len(value)}:".encode())
        for part in value:
            _digest(part, hasher, seen, depth + 1)
    elif isinstance(value, types.FunctionType):
        _digest_function(value, hasher, seen, depth)
    elif isinstance(value, (types.ModuleType, type)):
        hasher.update(f"{getattr(value, '__qualname__', value.__name__)};".encode())
    elif isinstance(value, types.MethodType):
        _digest(value.__func__, hasher, seen, depth + 1)
        _digest(value.__self__, hasher, seen, depth + 1)
    elif kind.__module__ == "datasets.arrow_dataset":
        hasher.update(f"{value._fingerprint} {len(value)};".encode())
        _digest(value.format, hasher, seen, depth + 1)
    elif hasattr(value, "__dict__"):
        _digest(dict(vars(value)), hasher, seen, depth + 1)
    else:
        hasher.update(f"id {id(value)};".encode())


def _digest_function(function: types.FunctionType, hasher: Any, seen: dict[int, int], depth: int) -> None:
    code = function.__code__
    hasher.update(code.co_code)
    hasher.update(repr([c for c in code.co_consts if not isinstance(c, types.CodeType)]).encode())
    for cell in function.__closure__ or ():
        try:
            _digest(cell.cell_contents, hasher, seen, depth + 1)
        except ValueError:  # an empty cell
            hasher.update(b"empty;")
    _digest(function.__defaults__, hasher, seen, depth + 1)
    for name in code.co_names:
        if name in function.__globals__:
            _digest(function.__globals__[name], hasher, seen, depth + 2)


def quick_state_of(dataset: Any) -> tuple[Any, ...]:
    """A look at whether a data set may have changed that costs microseconds: identities and versions, no content."""
    parts: list[Any] = [id(dataset), len(dataset)]
    attributes = vars(dataset) if hasattr(dataset, "__dict__") else {"": dataset}
    for value in attributes.values():
        parts.append(_quick(value, 0))
    return tuple(parts)


def _quick(value: Any, depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.data_ptr(), value.shape
    if isinstance(value, (list, tuple)) and depth < 2:
        if any(isinstance(part, (torch.Tensor, list, tuple)) for part in value[:1]) and len(value) < 10_000:
            return tuple(_quick(part, depth + 1) for part in value)
        return hash(tuple(map(id, value)))
    if isinstance(value, np.ndarray):
        return id(value), value.shape, value.__array_interface__["data"][0]
    return id(value)
