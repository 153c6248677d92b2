"""Activations to rows and back.

A BERT layer gives ``[64, 32, 384]`` for 64 texts padded to 32 tokens. A row is what belongs to one text: ``[12, 384]``
for 12 tokens, without the padding. `Layout.to_rows` and `Layout.trim` take a batch of activations apart into such rows,
`Layout.pad` and `Layout.to_model` put them into the next batch, which may be padded to 20 or on the other side. A leaf
may follow sequences in several dimensions (attention biases ``[64, 8, 32, 32]``).

A row keeps the order in which the model's tensor lies in memory (channels-last stays so), since other strides can
change the last bits of what the suffix computes. `precision` is the only thing that a row may lose.

With ``precision="int8"`` a row is two leaves: whole numbers from -127 to 127, and the scales that they are multiples
of, one for each channel of the row: ``[12, 384]`` int8 beside ``[384]`` bfloat16. A channel is a feature of a token, or
one plane of a map. Middle layers of transformers have a few channels which are several times as large as the others, in
every token (of MiniLM's 384 it is number 99): a scale per token would be theirs alone, and the row would lose 1.6 %
where a scale per channel loses 0.5 % (``benchmarks/precision.py``, ``docs/precision.md``). Where few values would share
a scale (a pooled vector), some neighbouring channels have one together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torchrecycle.errors import BatchError

__all__ = ["PRECISIONS", "Layout", "dense_stride", "places", "stride_order"]

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
"""The names that `precision=` takes, besides ``auto``."""

SCALE = torch.bfloat16
"""The dtype of scales. It reaches as far as float32, and what its 8 bits lose is made up by the whole numbers."""
SHARED_BY = 32
"""So many values at least share a scale, if there are as many: a scale takes the room of two of them."""
_SMALLEST = 2.0**-149
"""Of float32: a scale is nothing only where all values are."""
SCALES_VERSION = 1
"""Enters the fingerprint of rows with scales: another way to find them makes other rows."""


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
    def scaled(self) -> bool:
        """Whether a row is whole numbers and their scales, which are a further leaf of it."""
        return self.kept is torch.int8 and self.dtype.is_floating_point

    def kept_in(self, dtype: torch.dtype) -> Layout:
        """The same leaf kept in another dtype, as far as that suits it.

        Only floating point numbers change, and no masks, whose padded places are filled with the least number of their
        own dtype. Whole numbers with scales do not suit attention biases, whose minus infinities stand at places of two
        sequences, nor single numbers, nor what has 8 bits already.
        """
        if not self.dtype.is_floating_point or self.fill is not None:
            return self
        unsuited = len(self.ragged_dims) > 1 or not (self.ragged or self.shape) or 0 in self.shape
        if dtype is torch.int8 and (unsuited or self.dtype.itemsize == 1):
            return self
        return replace(self, kept=dtype)

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
        """The leaf as ``[batch, (ragged,)* ...]`` in its kept dtype; in its own, if it is to be scaled. May be a view
        of `leaf`.

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
        if self.scaled:
            return rows
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

    # -- whole numbers and scales --------------------------------------------------------------------------------------

    @property
    def _shared(self) -> tuple[tuple[int, ...], int, int]:
        """Of rows that are not ragged: the dimensions over which values share a scale, the dimension of channels, and
        how many neighbouring channels share one.

        Channels are the model's last dimension (tokens, vectors), or the first of a map ``[channels, height, width]``;
        of ``[height, width, channels]`` it is told by its two sides, which are alike.
        """
        own = {self.batch_dim, self.batch_dim + 1} if self.per_object > 1 else {self.batch_dim}
        at = [self.permutation.index(dim) for dim in range(len(self.permutation)) if dim not in own]
        at = at or [1]
        sizes = [self.shape[dim - 1] for dim in at]
        last = len(at) < 3 or sizes[-3] == sizes[-2] != sizes[-1]
        channels = at[-1] if last else at[0]
        shared = tuple(dim for dim in at if dim != channels)
        wanted = math.ceil(SHARED_BY / math.prod(self.shape[dim - 1] for dim in shared))
        size = self.shape[channels - 1]
        block = next((n for n in range(min(wanted, size), size) if size % n == 0), size)
        return shared, channels, block

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of a row's scales."""
        if self.ragged:
            return self.shape
        shared, channels, block = self._shared
        sizes = [size // block if dim == channels else size for dim, size in enumerate(self.shape, 1)]
        return tuple(size for dim, size in enumerate(sizes, 1) if dim not in shared)

    @property
    def recipe(self) -> tuple[object, ...]:
        """How scales are found: what of it changes rows."""
        return (SCALES_VERSION, str(SCALE), self.scale_shape, () if self.ragged else self._shared)

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of so many values."""
        return values * self.kept.itemsize + (math.prod(self.scale_shape) * SCALE.itemsize if self.scaled else 0)

    def quantise(self, rows: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as whole numbers and scales: each value within half a scale, or a whole one at the end of its dtype.

        The scale is the largest magnitude that shares it, divided by 127 and rounded up to `SCALE`; values are divided
        by it and rounded to the nearest whole number, ties to the even one.

        Args:
            rows: ``[batch, ...]`` as of `to_rows`; if ragged, ``[total, ...]`` as of `trim`.
            lengths: ``[batch]`` of `trim`, if ragged.

        Returns:
            int8 of the shape of `rows`, and the scales ``[batch, *scale_shape]``.

        Raises:
            BatchError: a value is infinite or no number, or beyond float32.
        """
        rows = rows.to(_computed_in(self.dtype))
        if lengths is not None:
            of_row = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
            at = of_row.reshape(-1, *[1] * len(self.shape)).expand_as(rows)
            largest = rows.new_zeros(len(lengths), *self.shape)
            # a tenth of the time of segment_reduce
            scales = self._scales(largest.scatter_reduce_(0, at, rows.abs(), "amax"))
            return _codes(rows, scales.index_select(0, of_row), self.dtype), scales
        shared, channels, block = self._shared
        grouped = rows.unflatten(channels, (-1, block))
        over = (*(dim + (dim > channels) for dim in shared), channels + 1)
        scales = self._scales(grouped.abs().amax(over, keepdim=True))
        codes = _codes(grouped, scales, self.dtype).flatten(channels, channels + 1)
        return codes.contiguous(), scales.reshape(-1, *self.scale_shape)

    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The inverse of `quantise`: ``[batch, (ragged,) ...]`` in the model's dtype, zeros at padded places.

        Args:
            codes: ``[batch, (ragged,) ...]`` int8; of ragged rows as `pad` gives them.
            scales: ``[batch, *scale_shape]``
        """
        computed = _computed_in(self.dtype)
        scales = scales.to(computed)
        if self.ragged:
            return codes.to(computed).mul_(scales.unsqueeze(1)).to(self.dtype)
        shared, channels, block = self._shared
        for dim in sorted(shared):
            scales = scales.unsqueeze(dim)
        if block == 1:
            return codes.to(computed).mul_(scales).to(self.dtype)
        values = codes.to(computed).unflatten(channels, (-1, block)).mul_(scales.unsqueeze(channels + 1))
        return values.flatten(channels, channels + 1).to(self.dtype)

    def _scales(self, largest: torch.Tensor) -> torch.Tensor:
        if not bool(largest.isfinite().all()):
            raise BatchError(
                "a row holds infinities or what is no number (NaN), for which int8 has no place: keep the activation's "
                "own precision, or use 'bfloat16'"
            )
        scales = _rounded_up((largest / 127).clamp_min(_SMALLEST).where(largest > 0, 0))
        if not bool(scales.isfinite().all()):
            raise BatchError(
                f"a row holds values up to {largest.max().item():.3g}, which int8 with scales of {SCALE} cannot: keep "
                "the activation's own precision"
            )
        return scales

    # -- padding -------------------------------------------------------------------------------------------------------

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
        shape = (1, *values.shape[1:])
        padding = values.new_zeros(shape) if self.fill is None else values.new_full(shape, self.fill)
        kept = mask.flatten().to(values.device)
        numbers = kept.cumsum(0).mul_(kept)  # 0 for padding; half the time of writing values where the mask is
        return torch.cat([padding, values]).index_select(0, numbers).view(*mask.shape, *values.shape[1:])


def places(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which places of several ragged dimensions are kept: ``[batch, a]`` and ``[batch, b]`` give ``[batch, a, b]``."""
    kept = masks[0].bool()
    for mask in masks[1:]:
        kept = kept.unsqueeze(-1) & mask.bool().reshape(len(mask), *[1] * (kept.dim() - 1), -1)
    return kept


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rounded_up(positive: torch.Tensor) -> torch.Tensor:
    """To the next `SCALE` that is not smaller, so that no value is beyond 127 scales."""
    single = positive.float()
    single = torch.where(single < positive, single.nextafter(single.new_tensor(math.inf)), single)
    return ((single.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).to(SCALE)


def _codes(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers of scales; where 127 of them are beyond what the dtype holds, one less."""
    scales = scales.to(values.dtype)
    codes = (values / scales.where(scales > 0, 1)).round_()
    end = torch.finfo(dtype).max
    if bool((scales > end / 127).any()):
        most = (end / scales).floor_().clamp_(max=127)
        codes = codes.clamp(-most, most)
    return codes.to(torch.int8)
