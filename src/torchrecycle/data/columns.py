"""Items of a data set without their inputs, column by column.

A data set of 8,144 pairs (image, label) becomes one column for the label and a stand-in for the image; a batch of 64
is then one ``index_select`` on the label column. What comes out is what went in: a Python ``int`` stays one, a string
stays a string, a NumPy array an array. `Template.split` takes an item apart, `Template.join` puts it together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from torchrecycle.errors import BatchError

__all__ = ["Column", "Template", "make_column"]

Path = tuple[Any, ...]


# -- the shape of an item ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Template:
    """The nest that each item is: containers, with leaves numbered in order."""

    kind: str
    """``leaf``, ``dict``, ``tuple``, ``list`` or ``other`` (a container of another class)."""
    keys: tuple[Any, ...] = ()
    parts: tuple[Template, ...] = ()
    make: Any = field(default=None, compare=False)
    """For ``other``: the class of the container."""

    @classmethod
    def of(cls, item: Any) -> Template:
        """The template of an item. Lists of numbers count as leaves."""
        if isinstance(item, Mapping):
            kind = "dict" if type(item) is dict else "other"
            return cls(kind, tuple(item), tuple(cls.of(part) for part in item.values()), type(item))
        if isinstance(item, tuple):
            kind = "tuple" if type(item) is tuple else "other"
            return cls(kind, tuple(range(len(item))), tuple(cls.of(part) for part in item), type(item))
        if isinstance(item, list) and not _is_plain_list(item):
            return cls("list", tuple(range(len(item))), tuple(cls.of(part) for part in item), list)
        return cls("leaf")

    def split(self, item: Any) -> list[Any]:
        """The leaves of an item.

        Raises:
            BatchError: the item is another nest.
        """
        if self.kind == "leaf":
            return [item]
        keys = tuple(item) if isinstance(item, Mapping) else tuple(range(len(item))) if _is_sequence(item) else None
        if keys is None or set(keys) != set(self.keys) or len(keys) != len(self.keys):
            raise BatchError(
                f"an item has the entries {keys} where the first item has {self.keys}: items must be alike"
            )
        return [leaf for key, part in zip(self.keys, self.parts, strict=True) for leaf in part.split(item[key])]

    def join(self, leaves: Sequence[Any], *, collated: bool = False) -> Any:
        """The inverse of `split`; with `collated`, the containers that ``default_collate`` makes of them."""
        made, rest = self._join(list(leaves), collated)
        assert not rest
        return made

    def _join(self, leaves: list[Any], collated: bool) -> tuple[Any, list[Any]]:
        if self.kind == "leaf":
            return leaves[0], leaves[1:]
        parts = []
        for part in self.parts:
            made, leaves = part._join(leaves, collated)
            if collated and part.kind == "leaf" and isinstance(made, list) and not self._is_mapping:
                made = tuple(made)  # as default_collate leaves strings
            parts.append(made)
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True)), leaves
        if self.kind == "other":
            return self._make_other(parts), leaves
        return (parts if self.kind == "list" or collated else tuple(parts)), leaves

    @property
    def _is_mapping(self) -> bool:
        return self.kind == "dict" or (self.kind == "other" and issubclass(self.make, Mapping))

    def _make_other(self, parts: list[Any]) -> Any:
        if issubclass(self.make, tuple):
            return self.make(*parts) if hasattr(self.make, "_fields") else self.make(parts)
        made = dict(zip(self.keys, parts, strict=True))
        if issubclass(self.make, defaultdict):  # what it makes for further keys cannot be kept
            return self.make(None, made)
        return self.make(made)

    def paths(self, at: Path = ()) -> list[Path]:
        """The path of each leaf, in order."""
        if self.kind == "leaf":
            return [at]
        return [path for key, part in zip(self.keys, self.parts, strict=True) for path in part.paths((*at, key))]

    @property
    def is_plain(self) -> bool:
        """Whether it holds only dicts with string keys, tuples and lists, so that it can be written as JSON."""
        named = self.kind != "dict" or all(isinstance(key, str) for key in self.keys)
        return self.kind != "other" and named and all(part.is_plain for part in self.parts)

    def to_json(self) -> Any:
        return [self.kind, list(self.keys), [part.to_json() for part in self.parts]]

    @classmethod
    def from_json(cls, value: Any) -> Template:
        kind, keys, parts = value
        if kind not in ("leaf", "dict", "tuple", "list"):
            raise BatchError(f"a manifest names a container of kind {kind!r}, which it cannot hold")
        return cls(kind, tuple(keys), tuple(cls.from_json(part) for part in parts))


def _is_sequence(item: Any) -> bool:
    return isinstance(item, (tuple, list))


def _is_plain_list(value: Any) -> bool:
    """A list (of lists) of numbers, strings or None: one leaf."""
    return isinstance(value, list) and all(
        _is_plain_list(part) if isinstance(part, list) else isinstance(part, (bool, int, float, str, type(None)))
        for part in value
    )


_READ: dict[str, Any] = {"str": str, "str_": np.str_, "json": json.loads}
"""From the text of an item, by the column's kind, to its leaf."""

_KINDS = ("tensor", "ndarray", "numpy", "int", "float", "bool", "bytes", "absent", *_READ)

# -- columns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One leaf of all items."""

    kind: str
    """``tensor``, ``ndarray``, ``numpy``, ``int``, ``float``, ``bool``, ``bytes``, ``str``, ``json`` or ``absent``
    (an input that
    was not kept: `shapes` and `dtype` of its stand-in)."""
    values: torch.Tensor = field(repr=False)
    """``[items, ...]`` where all are of one shape, else all one after the other, flat."""
    offsets: torch.Tensor | None = field(default=None, repr=False)
    """Where each item begins in `values`, ``[items + 1]``, if they differ in shape."""
    shapes: torch.Tensor | None = field(default=None, repr=False)
    """The shape of each, ``[items, dims]``, if they differ."""
    dtype: str = ""

    def __len__(self) -> int:
        if self.offsets is not None:
            return len(self.offsets) - 1
        return len(self.values)

    def refuse_other_forms(self, items: int, where: str) -> None:
        """Compare all that a column says of itself with what must be.

        Args:
            items: how many the data set has.
            where: for messages.

        Raises:
            ValueError: something is not as `make_column` makes it.
        """
        if self.values.dim() < 1 or len(self) != items:
            raise ValueError(f"{where} is of another length than the {items} keys")
        if self.kind not in _KINDS or (self.kind == "absent") != isinstance(
            getattr(torch, self.dtype, None), torch.dtype
        ):
            raise ValueError(f"{where} is of kind {self.kind!r} and dtype {self.dtype!r}")
        if self.kind in ("bytes", *_READ) and (self.offsets is None or self.values.dtype != torch.uint8):
            raise ValueError(f"{where} is of kind {self.kind!r} and no text")
        if self.kind in ("int", "float", "bool", "numpy") and (self.values.dim() != 1 or self.offsets is not None):
            raise ValueError(f"{where} is of kind {self.kind!r} and holds no numbers")
        if self.kind == "absent" and (self.values.dim() != 2 or self.values.dtype != torch.int64):
            raise ValueError(f"{where} holds no shapes")
        if self.offsets is not None:
            self._refuse_other_offsets(self.offsets, where)

    def _refuse_other_offsets(self, offsets: torch.Tensor, where: str) -> None:
        sizes = offsets.diff()
        if offsets.dtype != torch.int64 or offsets.dim() != 1 or int(offsets[0]) != 0 or bool((sizes < 0).any()):
            raise ValueError(f"{where} has offsets that do not ascend from 0")
        if self.values.dim() != 1 or int(offsets[-1]) != len(self.values):
            raise ValueError(f"{where} has {len(self.values)} values, and its offsets end at {int(offsets[-1])}")
        if self.shapes is not None:
            shapes = self.shapes
            if (
                shapes.dtype != torch.int64
                or shapes.dim() != 2
                or len(shapes) != len(sizes)
                or bool((shapes < 0).any())
            ):
                raise ValueError(f"{where} has no shape for each item")
            if not torch.equal(shapes.prod(dim=1), sizes):
                raise ValueError(f"{where} has shapes of other sizes than its items")

    def __getitem__(self, index: int) -> Any:
        """The leaf of one item, as it was. A collate function may write into it."""
        if self.kind == "absent":
            return tuple(self.values[index].tolist())
        if self.kind in ("int", "float", "bool"):
            return self.values[index].item()
        if self.kind in ("bytes", *_READ):
            content = bytes(self._piece(index).numpy())
            return content if self.kind == "bytes" else _READ[self.kind](content.decode())
        piece = self._piece(index).clone()
        if self.kind == "tensor":
            return piece
        return piece.numpy() if self.kind == "ndarray" else piece.numpy()[()]

    def _piece(self, index: int) -> torch.Tensor:
        if self.offsets is None:
            return self.values[index]
        piece = self.values[self.offsets[index] : self.offsets[index + 1]]
        return piece if self.shapes is None else piece.reshape(self.shapes[index].tolist())

    def batch(self, index: torch.Tensor) -> Any:
        """What ``default_collate`` gives for these items, or None where only the items themselves can tell."""
        if self.kind in ("bytes", "str", "str_"):
            return [self[i] for i in index.tolist()]
        if self.offsets is None and self.kind in ("tensor", "ndarray", "numpy", "int", "float", "bool"):
            return self.values.index_select(0, index)
        return None


def make_column(leaves: Sequence[Any], where: str) -> Column:
    """The column of one leaf of all items.

    Raises:
        BatchError: the leaves are of different types, or of a type that cannot be kept.
    """
    first = leaves[0]
    kinds = {type(leaf) for leaf in leaves}
    if all(isinstance(leaf, torch.Tensor) and not vars(leaf) for leaf in leaves):
        return _tensor_column("tensor", [leaf.detach().cpu() for leaf in leaves])
    if kinds == {np.ndarray} and first.dtype.kind in "biufc":
        return _tensor_column("ndarray", [torch.as_tensor(np.ascontiguousarray(leaf)) for leaf in leaves])
    if all(isinstance(leaf, np.generic) and leaf.dtype.kind in "biufc" for leaf in leaves) and len(kinds) == 1:
        return Column("numpy", torch.as_tensor(np.asarray(leaves)))
    if kinds in ({bool}, {float}) or (kinds == {int} and all(-(2**63) <= leaf < 2**63 for leaf in leaves)):
        return Column(first.__class__.__name__, default_collate(list(leaves)))
    if kinds in ({str}, {np.str_}):
        return _text_column(first.__class__.__name__, [leaf.encode() for leaf in leaves])
    if kinds == {bytes}:
        return _text_column("bytes", leaves)
    if kinds <= {bool, int, float, str, type(None), list} and all(_survives_json(leaf) for leaf in leaves):
        return _text_column("json", [json.dumps(leaf).encode() for leaf in leaves])
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise BatchError(
        f"{where} of the items is of type {names}, which cannot be kept beside the rows: targets are tensors, arrays, "
        "numbers, strings and nests of these. Convert it in the data set, or leave it out of the items."
    )


def _survives_json(leaf: Any) -> bool:
    """Whether it comes back as it was, types included (a NumPy number in a list would not)."""
    try:
        return repr(json.loads(json.dumps(leaf))) == repr(leaf)
    except TypeError:
        return False


def _tensor_column(kind: str, tensors: Sequence[torch.Tensor]) -> Column:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or len({tensor.dim() for tensor in tensors}) > 1:
        raise BatchError(
            f"a target is a tensor of different dtypes or ranks from item to item: {sorted(map(str, dtypes))}"
        )
    if len({tensor.shape for tensor in tensors}) == 1:
        return Column(kind, torch.stack(list(tensors)))
    sizes = torch.tensor([tensor.numel() for tensor in tensors])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    shapes = torch.tensor([tensor.shape for tensor in tensors])
    return Column(kind, torch.cat([tensor.reshape(-1) for tensor in tensors]), offsets, shapes)


def _text_column(kind: str, encoded: Sequence[bytes]) -> Column:
    sizes = torch.tensor([len(one) for one in encoded])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    joined = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8) if offsets[-1] else np.zeros(0, np.uint8)
    return Column(kind, torch.from_numpy(joined.copy()), offsets)


def absent_column(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Column:
    """The column of an input that is not kept: only its shapes."""
    return Column("absent", torch.tensor([list(shape) for shape in shapes]), dtype=str(dtype).removeprefix("torch."))
