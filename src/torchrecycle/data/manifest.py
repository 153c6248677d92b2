"""The manifest: which key belongs to which index of a data set, with the targets.

It is what lets an epoch run without reading the data set: 8,144 keys of 16 bytes, one column of labels. It outlives the
process only for data sets whose identity covers objects *and* targets in full (`identity_of`); for any other it serves
this process, as long as `state_of` (in ``state.py``) finds the data set unchanged, and the next run reads every item
once.
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
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from torchrecycle.data.columns import Column, Template
from torchrecycle.data.views import RECIPE, Views
from torchrecycle.errors import BatchError, KeyTypeError
from torchrecycle.keys import KEY_BYTES, key

__all__ = ["Manifest", "identity_of"]


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
        """What `to_tensors` gave, read back and believed in nothing that can be compared.

        Raises:
            ValueError: It is not of that form.
        """
        try:
            about = json.loads(metadata["about"])
            template = Template.from_json(about["template"])
            words = [(str(kind), str(dtype)) for kind, dtype in about["columns"]]
            inputs = {int(position): str(name) for position, name in about["inputs"].items()}
        except (KeyError, TypeError, AttributeError, RecursionError, BatchError) as error:
            raise ValueError(f"its words are not those of a manifest ({error!r})") from None
        keys = tensors.get("keys")
        if keys is None or keys.dtype != torch.uint8 or keys.dim() != 2 or keys.shape[1] != KEY_BYTES:
            raise ValueError("its keys are not [n, 16] bytes")
        if len(template.paths()) != len(words) or not set(inputs) <= set(range(len(words))):
            raise ValueError(f"its items have {len(template.paths())} leaves, and {len(words)} columns are there")
        columns = tuple(_read_column(tensors, number, *word) for number, word in enumerate(words))
        for number, column in enumerate(columns):
            column.refuse_other_forms(len(keys), f"column {number}")
        return cls(keys.numpy(), template, columns, inputs)


def _read_column(tensors: Mapping[str, torch.Tensor], number: int, kind: str, dtype: str) -> Column:
    values, offsets, shapes = (tensors.get(f"column.{number}.{part}") for part in ("values", "offsets", "shapes"))
    if values is None:
        raise ValueError(f"column {number} has no values")
    return Column(kind, values, offsets, shapes, dtype)


# -- which data set is it ----------------------------------------------------------------------------------------------


def identity_of(dataset: Any, name: str | None = None) -> str | None:
    """What tells this data set, its transforms and its targets from every other, also in another process.

    None where that cannot be known: then the manifest serves this process only.

    Args:
        dataset: map-style; several views of one are another than these of fewer.
        name: the user's own name for it, transforms and targets included.
    """
    if isinstance(dataset, Views):
        inner = identity_of(dataset.base, name)
        return None if inner is None else key(("views", RECIPE, dataset.count, inner)).hex()
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
    if not all(_is_in_the_table(dataset, name, feature) for name, feature in dataset.features.items()):
        return None
    words = [shape["type"] or "python", sorted(shape["columns"]), shape["output_all_columns"]]
    options = _content(shape["format_kwargs"])
    return None if options is None else ("hugging face", dataset._fingerprint, words, options, len(dataset))


def _is_in_the_table(dataset: Any, name: str, feature: Any) -> bool:
    """Whether a column's values lie in the table itself: an image may be a path, whose file the fingerprint leaves
    out."""
    if not _is_decoded(feature):
        return True
    column = dataset.data.column(name)
    if not hasattr(column.type, "get_field_index") or column.type.get_field_index("bytes") < 0:
        return False
    return all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)


def _is_decoded(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(_is_decoded(part) for part in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(_is_decoded(part) for part in feature)
    inner = getattr(feature, "feature", None)
    return (hasattr(feature, "decode_example") and type(feature).__name__ in _DECODED) or (
        inner is not None and _is_decoded(inner)
    )


_DECODED = frozenset({"Image", "Audio", "Video", "Pdf", "Nifti"})


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
    if (
        type(value).__module__.startswith(_KNOWN_TRANSFORMS)
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
    ):
        import enum

        return f"{value!r}" if isinstance(value, enum.Enum) else _transform(value)
    if isinstance(value, (torch.dtype, types.FunctionType, types.BuiltinFunctionType, type)):
        module = getattr(value, "__module__", "torch") or "torch"
        known = isinstance(value, torch.dtype) or (
            module.startswith(("torch", "timm.")) and "<" not in value.__qualname__
        )
        return str(value) if isinstance(value, torch.dtype) else f"{module}.{value.__qualname__}" if known else None
    content = _content(value)
    return None if content is None else content.hex()
