"""Activations to rows and back.

A BERT layer gives ``[64, 32, 384]`` for 64 texts padded to 32 tokens. A row is what belongs to one text: ``[12, 384]``
for 12 tokens, without the padding. `Layout.encode` takes a batch of activations apart into such rows, `Layout.decode`
puts them into the next batch, which may be padded to 20 or on the other side.

A row keeps the order in which the model's tensor lies in memory (channels-last stays so), since other strides can
change the last bits of what the suffix computes. `precision` is the only thing that a row may lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchrecycle.errors import BatchError

__all__ = ["PRECISIONS", "Layout", "dense_stride", "stride_order"]

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
    ragged_dim: int | None
    """Which of them counts the tokens of a sequence, if any; rows keep only the tokens of the object."""
    order: tuple[int, ...]
    """The model's dimensions from the outermost to the innermost in memory."""
    shape: tuple[int, ...]
    """Shape of a row in `permutation` order, without the ragged dimension."""
    dtype: torch.dtype
    """The model's own dtype."""
    kept: torch.dtype
    """The dtype in which it is kept."""

    @property
    def ragged(self) -> bool:
        return self.ragged_dim is not None

    @property
    def permutation(self) -> tuple[int, ...]:
        """The model's dimensions in the order of a row: objects, tokens, then the rest as it lies in memory."""
        first = [self.batch_dim] + ([] if self.ragged_dim is None else [self.ragged_dim])
        return (*first, *(dim for dim in self.order if dim not in first))

    def row_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that a row of a leaf of that shape has, without the ragged dimension."""
        return tuple(leaf_shape[dim] for dim in self.permutation[2 if self.ragged else 1 :])

    def to_rows(self, leaf: torch.Tensor) -> torch.Tensor:
        """The leaf as ``[batch, (tokens,) ...]`` in its kept dtype. May be a view of `leaf`.

        Raises:
            BatchError: the rows have another shape than those of the example.
        """
        rows = leaf.detach().permute(self.permutation)
        given = self.row_shape(leaf.shape)
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
        """``[batch, (tokens,) ...]`` as the model gives it: dtype, dimensions and strides. May be a view of `rows`."""
        rows = rows.to(self.dtype)
        inverse = [self.permutation.index(dim) for dim in range(self.dims)]
        leaf = rows.permute(inverse)
        stride = dense_stride(leaf.shape, self.order)
        if leaf.stride() == stride or leaf.numel() == 0:
            return leaf
        same = torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device)
        return same.copy_(leaf)

    def trim(self, rows: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the padding off: ``[batch, tokens, ...]`` to values ``[total, ...]`` and lengths ``[batch]``."""
        mask = mask.bool()
        return rows[mask], mask.sum(dim=1)

    def pad(self, values: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Put the padding back where `mask` ``[batch, tokens]`` has it: zeros at padded places.

        Raises:
            BatchError: the mask has another number of tokens than a row.
        """
        mask = mask.bool()
        expected = mask.sum(dim=1)
        if not torch.equal(expected, lengths.to(expected.device)):
            raise BatchError(
                f"the batch's mask has {expected.tolist()[:8]} tokens per object where its rows have "
                f"{lengths.tolist()[:8]}: the mask was changed after the rows were found"
            )
        rows = values.new_zeros((*mask.shape, *values.shape[1:]))
        rows[mask] = values
        return rows
