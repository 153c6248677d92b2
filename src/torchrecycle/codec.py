"""Activations to rows and back.

A BERT layer gives ``[64, 32, 384]`` for 64 texts padded to 32 tokens. A row is what belongs to one text: ``[12, 384]``
for 12 tokens, without the padding. `Layout.encode` takes a batch of activations apart into such rows, `Layout.decode`
puts them into the next batch, which may be padded to 20 or on the other side. A leaf may follow sequences in several
dimensions (attention biases ``[64, 8, 32, 32]``).

A row keeps the order in which the model's tensor lies in memory (channels-last stays so), since other strides can
change the last bits of what the suffix computes. `precision` is the only thing that a row may lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrecycle.errors import BatchError

__all__ = ["PRECISIONS", "Layout", "dense_stride", "places", "stride_order"]

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The names that `precision=` takes."""


def stride_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost in memory; ties in their own order."""
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim)))


def dense_stride(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of that shape without gaps whose dimensions lie in memory in that order."""
    stride, step = [0] * len(shape), 1
    for dim in reversed(order):
        stride[dim] = step
        step *= max(shape[dim], 1)
    return tuple(stride)


@dataclass(frozen=True, slots=True)
class Layout:
    """How one leaf of an activation lies in the model, and how in a row."""

    dims: int
    """Number of dimensions in the model."""
    batch_dim: int
    """Which of them counts the objects."""
    ragged_dims: tuple[int, ...]
    """Which of them follow the length of a sequence, in ascending order; rows keep only the places of the object. With
    `per_object` over one, counted after the batch dimension has been taken apart."""
    order: tuple[int, ...]
    """The model's dimensions from the outermost to the innermost in memory, likewise."""
    shape: tuple[int, ...]
    """Shape of a row in `permutation` order, without the ragged dimensions."""
    dtype: torch.dtype
    """The model's own dtype."""
    kept: torch.dtype
    """The dtype in which it is kept."""
    ragged_by: tuple[int, ...] = ()
    """Per ragged dimension the number of the sequence that it follows, or -1 where it follows by no known law."""
    per_object: int = 1
    """How many places of the batch dimension belong to one object: the frames of a clip."""
    fill: float | None = None
    """What stands at padded places; zeros if None."""

    @property
    def ragged(self) -> bool:
        return bool(self.ragged_dims)

    @property
    def free(self) -> bool:
        """Whether the size of a ragged dimension is only known from the rows themselves."""
        return -1 in self.ragged_by

    @property
    def sized(self) -> bool:
        """Whether a row's number of places does not tell its sizes, which are kept beside it."""
        return self.free and len(self.ragged_dims) > 1

    @property
    def _is_row(self) -> bool:
        """Whether the model's dimensions come in a row's own order."""
        return (
            self.batch_dim == 0
            and not self.ragged_dims
            and self.per_object == 1
            and self.order == tuple(range(len(self.order)))
        )

    @property
    def permutation(self) -> tuple[int, ...]:
        """The model's dimensions in the order of a row: objects, ragged ones, then the rest as it lies in memory."""
        first = (self.batch_dim, *self.ragged_dims)
        return (*first, *(dim for dim in self.order if dim not in first))

    def row_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that a row of a leaf of that shape has, without the ragged dimensions."""
        shape = list(leaf_shape)
        if self.per_object > 1:
            shape[self.batch_dim : self.batch_dim + 1] = [shape[self.batch_dim] // self.per_object, self.per_object]
        return tuple(shape[dim] for dim in self.permutation[1 + len(self.ragged_dims) :])

    def to_rows(self, leaf: torch.Tensor) -> torch.Tensor:
        """The leaf as ``[batch, (ragged,)* ...]`` in its kept dtype. May be a view of `leaf`.

        Raises:
            BatchError: the rows have another shape than those of the example.
        """
        given = self.row_shape(leaf.shape)
        rows = leaf.detach()
        if self.per_object > 1:
            rows = rows.unflatten(self.batch_dim, (-1, self.per_object))
        rows = rows.permute(self.permutation)
        if given != self.shape:
            raise BatchError(
                f"a row of shape {list(given)} came where {list(self.shape)} was expected: the objects of this batch "
                "have another size than those of the example. Bring all objects to one size, or make another "
                "recycling with an example of this size."
            )
        kept = rows.to(self.kept)
        if kept.dtype != rows.dtype and bool((rows.isfinite() & ~kept.isfinite()).any()):
            raise BatchError(
                f"a row holds values up to {rows.abs().max().item():.3g}, which {self.kept} cannot: use "
                "precision='bfloat16' or keep the activation's own"
            )
        return kept

    def to_model(self, rows: torch.Tensor) -> torch.Tensor:
        """``[batch, (ragged,)* ...]`` as the model gives it: dtype, dimensions, strides. May be a view of `rows`."""
        if self._is_row and rows.dtype is self.dtype and rows.is_contiguous():
            return rows
        rows = rows.to(self.dtype)
        inverse = [self.permutation.index(dim) for dim in range(len(self.permutation))]
        leaf = rows.permute(inverse)
        stride = dense_stride(leaf.shape, self.order)
        if leaf.stride() != stride and leaf.numel():
            leaf = torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device).copy_(leaf)
        return leaf.flatten(self.batch_dim, self.batch_dim + 1) if self.per_object > 1 else leaf

    def trim(self, rows: torch.Tensor, *masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the padding off: ``[batch, ragged..., ...]`` to values ``[total, ...]`` and lengths ``[batch]``.

        Args:
            rows: what `to_rows` gives.
            *masks: per ragged dimension ``[batch, size]``, one where a place is kept.
        """
        mask = places(masks)
        return rows[mask], mask.flatten(1).sum(dim=1)

    def pad(self, values: torch.Tensor, lengths: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """Put the padding back where the masks have it. The inverse of `trim`.

        Raises:
            BatchError: a mask has another number of tokens than a row.
        """
        mask = places(masks)
        expected = mask.flatten(1).sum(dim=1)
        if not torch.equal(expected, lengths.to(expected.device)):
            raise BatchError(
                f"the batch's mask has {expected.tolist()[:8]} places per object where its rows have "
                f"{lengths.tolist()[:8]}: the mask was changed after the rows were found"
            )
        shape = (*mask.shape, *values.shape[1:])
        rows = values.new_zeros(shape) if self.fill is None else values.new_full(shape, self.fill)
        rows[mask] = values
        return rows


def places(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which places of several ragged dimensions are kept: ``[batch, a]`` and ``[batch, b]`` give ``[batch, a, b]``."""
    kept = masks[0].bool()
    for mask in masks[1:]:
        kept = kept.unsqueeze(-1) & mask.bool().reshape(len(mask), *[1] * (kept.dim() - 1), -1)
    return kept
