"""What a skipped call would have returned, as far as it can be known without computing it: its form.

A BERT layer that gave ``[2, 9, 384]`` for two texts of 9 tokens gives ``[64, 32, 384]`` for 64 texts of 32. The rule is
found by running the model at a few sizes and solving each dimension for one of four laws: fixed, ``k * batch``,
``tokens + c``, ``batch * (tokens + c)``, where the tokens are those of one of the model's sequences. A dimension that
follows by none of these (strided convolutions over time) is free: its size is looked up by a run at that length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from torchrecycle.absent import Absent
from torchrecycle.codec import dense_stride, stride_order

__all__ = ["Dim", "Size", "TensorForm", "TreeForm", "solve_tree"]

Size = tuple[int, ...]
"""Objects in a batch, then the length of each sequence (0 where the call has no mask for it)."""


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension as a law of the batch's size."""

    law: Literal["fixed", "batch", "tokens", "both", "free"]
    number: int
    """The value if fixed; the factor for ``batch``; the summand for ``tokens`` and ``both``."""
    sequence: int = 0
    """Which sequence's tokens, for ``tokens`` and ``both``."""

    def at(self, size: Size) -> int:
        batch = size[0]
        if self.law == "fixed":
            return self.number
        if self.law == "batch":
            return self.number * batch
        if self.law == "free":
            raise ValueError("a free dimension is known only from a run at that length")
        return (size[1 + self.sequence] + self.number) * (batch if self.law == "both" else 1)


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Shape, dtype and order in memory of a tensor of any batch."""

    dims: tuple[Dim, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def shape(self, size: Size) -> tuple[int, ...]:
        return tuple(dim.at(size) for dim in self.dims)

    @property
    def counts_objects(self) -> bool:
        """Whether a dimension counts the objects of the batch; else the tensor is the same for all of them."""
        return any(dim.law in ("batch", "both") for dim in self.dims)


@dataclass(frozen=True, slots=True)
class TreeForm:
    """The form of what a call returns: a nest of tensor forms, numbers that follow the size, and constants."""

    spec: Any
    leaves: tuple[Any, ...]
    """`TensorForm`, `Dim` (a number that follows the size) or a constant."""
    same_as: tuple[int, ...]
    """For each leaf the first leaf that is the same object."""

    @property
    def tensors(self) -> list[int]:
        """Positions of the leaves that are tensors, each object once."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, TensorForm) and self.same_as[i] == i]

    @property
    def rows(self) -> list[int]:
        """Those of `tensors` that have something for each object."""
        return [i for i in self.tensors if self.leaves[i].counts_objects]

    @property
    def shared(self) -> list[int]:
        """Those of `tensors` that are the same for all objects: tables of positions, biases."""
        return [i for i in self.tensors if not self.leaves[i].counts_objects]

    @property
    def free(self) -> bool:
        """Whether some size is only known from a run at that length."""
        dims = [dim for leaf in self.leaves if isinstance(leaf, TensorForm) for dim in leaf.dims]
        return any(dim.law == "free" for dim in (*dims, *(leaf for leaf in self.leaves if isinstance(leaf, Dim))))

    def absent(self, size: Size, device: torch.device, source: int) -> Any:
        """The nest with absent tensors."""
        made: list[Any] = []
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, TensorForm):
                shape = leaf.shape(size)
                made.append(
                    Absent(shape, leaf.dtype, device, [source], dense_stride(shape, leaf.order))
                    if self.same_as[i] == i
                    else made[self.same_as[i]]
                )
            else:
                made.append(leaf.at(size) if isinstance(leaf, Dim) else leaf)
        return pytree.tree_unflatten(made, self.spec)

    def filled(self, rows: Sequence[torch.Tensor], shared: Mapping[int, torch.Tensor], size: Size) -> Any:
        """The nest with these tensors: `rows` in their order, `shared` by position."""
        found = {**dict(zip(self.rows, rows, strict=True)), **shared}
        made = [
            found[self.same_as[i]] if isinstance(leaf, TensorForm) else leaf.at(size) if isinstance(leaf, Dim) else leaf
            for i, leaf in enumerate(self.leaves)
        ]
        return pytree.tree_unflatten(made, self.spec)

    def taken(self, output: Any) -> list[torch.Tensor]:
        """The inverse of `filled`: the `rows` of an output."""
        leaves = pytree.tree_leaves(output)
        return [leaves[i] for i in self.rows]

    def mismatch(self, output: Any, size: Size) -> str:
        """What an output holds besides its tensors that is not as here, in words; empty if nothing."""
        # Mapped first, as a trace does: a `torch.Size` becomes a tuple.
        leaves, spec = pytree.tree_flatten(pytree.tree_map(lambda leaf: leaf, output))
        if spec != self.spec:
            return "another nest"
        for position, (form, leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            if isinstance(form, TensorForm) != isinstance(leaf, torch.Tensor):
                return f"{_said(leaf)} where it gave {'a tensor' if isinstance(form, TensorForm) else _said(form)}"
            if isinstance(form, TensorForm):
                cast = torch.is_autocast_enabled(leaf.device.type)
                if leaf.dim() != len(form.dims) or (leaf.dtype != form.dtype and not cast):
                    return f"a tensor of {leaf.dim()} dimensions of {leaf.dtype}"
            elif isinstance(form, Dim):
                if form.law != "free" and leaf != form.at(size):
                    return f"{leaf} where {form.at(size)} was expected"
            elif leaf != form:
                return f"{_said(leaf)} where it gave {_said(form)}"
            first = next(i for i, other in enumerate(leaves) if other is leaf)
            if isinstance(leaf, torch.Tensor) and first != self.same_as[position]:
                return "one tensor in two places, or two where it gave one"
        return ""

    def taken_shared(self, output: Any) -> dict[int, torch.Tensor]:
        """What of an output is the same for all objects, by position."""
        leaves = pytree.tree_leaves(output)
        return {i: leaves[i] for i in self.shared}


def _said(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)[:40]


_CONSTANTS = (bool, str, bytes, float, type(None), torch.dtype, torch.device)


def solve_tree(outputs: Sequence[Any], sizes: Sequence[Size]) -> TreeForm | str:
    """The form behind what one call returned at several sizes, or in words why there is none."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    first, spec = flat[0]
    if any(other != spec for _, other in flat[1:]):
        return "it returns nests of different structure for batches of different size"
    leaves: list[Any] = []
    for position, _leaf in enumerate(first):
        form = _solve_leaf([one[position] for one, _ in flat], sizes)
        if isinstance(form, str):
            return form
        leaves.append(form)
    ids = [id(leaf) for leaf in first]
    same_as = [
        ids.index(one) if isinstance(leaf, torch.Tensor) else i
        for i, (one, leaf) in enumerate(zip(ids, first, strict=True))
    ]
    return TreeForm(spec, tuple(leaves), tuple(same_as))


def _solve_leaf(values: Sequence[Any], sizes: Sequence[Size]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if first.is_nested or first.layout is not torch.strided:
            return "it returns a nested or sparse tensor, of which no row can be taken"
        if any(not isinstance(v, torch.Tensor) or v.dim() != first.dim() or v.dtype != first.dtype for v in values):
            return "it returns tensors of different rank or dtype for batches of different size"
        dims = [_solve_dim([v.shape[i] for v in values], sizes) for i in range(first.dim())]
        if any(dim is None for dim in dims):
            return f"the shape of what it returns ({list(first.shape)}) follows the batch by no law that is known"
        return TensorForm(tuple(d for d in dims if d), first.dtype, _order(values))
    if isinstance(first, int) and not isinstance(first, bool):
        dim = _solve_dim(values, sizes) if all(isinstance(v, int) for v in values) else None
        return dim or "it returns numbers that follow the batch by no law that is known"
    if isinstance(first, _CONSTANTS):
        return first if all(v == first for v in values) else "it returns values that differ from batch to batch"
    return f"it returns an object of type {type(first).__name__}, which is no tensor and no nest of tensors"


def _order(values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The order in memory, from the sample with the fewest dimensions of size one (whose strides say nothing)."""
    return stride_order(max(values, key=lambda value: sum(size > 1 for size in value.shape)))


def _solve_dim(values: Sequence[int], sizes: Sequence[Size]) -> Dim | None:
    batch, lengths = sizes[0][0], sizes[0][1:]
    laws = [Dim("fixed", values[0])]
    if values[0] and values[0] % batch == 0:
        laws.append(Dim("batch", values[0] // batch))
    for number, tokens in enumerate(lengths):
        if tokens:
            laws.append(Dim("tokens", values[0] - tokens, number))
            if values[0] % batch == 0:
                laws.append(Dim("both", values[0] // batch - tokens, number))
    for law in laws:
        if all(law.at(size) == value for size, value in zip(sizes, values, strict=True)):
            return law
    return Dim("free", 0) if _is_free(values, sizes) else None


def _is_free(values: Sequence[int], sizes: Sequence[Size]) -> bool:
    """Whether it is the lengths alone that it follows, by whatever law."""
    by_length: dict[Size, int] = {}
    return len(set(sizes)) > 2 and all(
        by_length.setdefault(size[1:], value) == value for size, value in zip(sizes, values, strict=True)
    )
