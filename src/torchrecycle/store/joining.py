"""Rows of many segments -> one batch, segment by segment.

For what is not on the planes: a store in memory, segments of format 1, systems other than Linux. Each segment's rows
are copied from its map into their places in the batch: row by row if they are large, otherwise in one step, by way of a
copy where those places are no neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchrecycle.store.contract import Leaf, LeafSpec, Ragged
from torchrecycle.store.segment import Segment, carrier, ranges, uncarried

_LARGE = 16 * 1024
"""From this many bytes on, a copy of one row takes longer than starting it."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one segment contributes to a batch."""

    segment: Segment
    rows: np.ndarray
    """Which rows of it."""
    at: np.ndarray
    """Their places in the batch, ascending."""


def by_number(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The different numbers, ascending, and where each is."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    for at in np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        yield int(numbers[at[0]]), at


def join(specs: Sequence[LeafSpec], parts: Sequence[Part]) -> list[Leaf]:
    """One batch of all parts."""
    rows = sum(len(part.rows) for part in parts)
    return [
        _join_ragged(number, spec, parts, rows) if spec.ragged else _join_dense(number, spec, parts, rows)
        for number, spec in enumerate(specs)
    ]


def _join_dense(number: int, spec: LeafSpec, parts: Sequence[Part], rows: int) -> torch.Tensor:
    dtype, width = carrier(spec)
    out = torch.empty((rows, width), dtype=dtype)
    for part in parts:
        _place(part.segment.columns[number].values, part.rows, out, part.at)
    return uncarried(spec, out)


def _join_ragged(number: int, spec: LeafSpec, parts: Sequence[Part], rows: int) -> Ragged:
    bounds = [part.segment.columns[number].bounds(part.rows) for part in parts]
    lengths = np.empty(rows, dtype=np.int64)
    for part, (_, found) in zip(parts, bounds, strict=True):
        lengths[part.at] = found
    begins = np.cumsum(lengths) - lengths
    dtype, width = carrier(spec)
    out = torch.empty((int(lengths.sum()), width), dtype=dtype)
    for part, (starts, found) in zip(parts, bounds, strict=True):
        _place(part.segment.columns[number].values, ranges(starts, found), out, ranges(begins[part.at], found))
    return Ragged(uncarried(spec, out), torch.from_numpy(lengths))


def _place(values: torch.Tensor, rows: np.ndarray, out: torch.Tensor, at: np.ndarray) -> None:
    if not len(at):
        return
    # A segment in which a leaf is less well aligned has it in narrower integers.
    out = out.view(values.dtype)
    if out[0].nbytes >= _LARGE:
        source, target = values.numpy(), out.numpy()
        for row, place in zip(rows.tolist(), at.tolist(), strict=True):
            target[place] = source[row]
        return
    index = torch.from_numpy(rows)
    start, stop = int(at[0]), int(at[-1]) + 1
    if stop - start == len(at):
        torch.index_select(values, 0, index, out=out[start:stop])
    else:
        out.index_copy_(0, torch.from_numpy(at), values.index_select(0, index))
