"""Rows that were appended and are not published yet: copies, in memory, in the pieces in which they came."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence

import numpy as np
import torch

from torchrecycle.store.contract import Leaf, LeafSpec, Ragged
from torchrecycle.store.segment import Batch, leaf_bytes, ranges


class Waiting:
    """What one process has appended, and under which names it publishes."""

    def __init__(self, leaves: int) -> None:
        self.pid = os.getpid()
        self._writer = secrets.token_hex(8)
        self._published = 0
        self._leaves = leaves
        self.clear()

    def clear(self) -> None:
        """Forget the rows."""
        self.nbytes = 0
        self._since: float | None = None
        self._seen: set[bytes] = set()
        self._keys: list[torch.Tensor] = []
        self._pieces: list[list[Leaf]] = [[] for _ in range(self._leaves)]

    def seconds(self) -> float:
        """How long the oldest row has waited."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def new(self, keys: np.ndarray, absent: np.ndarray) -> np.ndarray:
        """Which of these keys are absent from the store, do not wait already, and come for the first time."""
        found: dict[bytes, int] = {}
        for number in np.flatnonzero(absent).tolist():
            key = keys[number].tobytes()
            if key not in self._seen:
                found.setdefault(key, number)
        return np.fromiter(found.values(), dtype=np.int64, count=len(found))

    def add(self, keys: np.ndarray, leaves: Sequence[Leaf]) -> None:
        """Add rows, which are ours to keep."""
        self._since = time.monotonic() if self._since is None else self._since
        self._seen.update(key.tobytes() for key in keys)
        self._keys.append(torch.from_numpy(keys))
        for pieces, leaf in zip(self._pieces, leaves, strict=True):
            pieces.append(leaf)
        self.nbytes += keys.nbytes + sum(map(leaf_bytes, leaves))

    def batch(self) -> Batch:
        """All rows, to be written."""
        return Batch(self._keys, self._pieces)

    def next_name(self) -> str:
        """A name for a segment that nobody else uses."""
        self._published += 1
        return f"{self._writer}-{self._published:06d}.safetensors"


def misfit(leaf: Leaf, spec: LeafSpec, rows: int) -> str | None:
    """Why a leaf is not of this form, or None."""
    if isinstance(leaf, Ragged) != spec.ragged:
        return "its rows are ragged, and this leaf is a tensor" if spec.ragged else "its rows are not ragged"
    if isinstance(leaf, Ragged):
        lengths = leaf.lengths
        if lengths.dtype != torch.int64 or tuple(lengths.shape) != (rows,):
            return f"lengths are int64 [{rows}], not {lengths.dtype} {list(lengths.shape)}"
        if (lengths < 0).any() or int(lengths.sum()) != len(leaf.values):
            return f"the lengths add up to {int(lengths.sum())}, and {len(leaf.values)} values came"
        return _misfit(leaf.values, spec, len(leaf.values))
    return _misfit(leaf, spec, rows)


def _misfit(tensor: torch.Tensor, spec: LeafSpec, rows: int) -> str | None:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != (rows, *spec.shape):
        expected = f"{spec.dtype} {[rows, *spec.shape]}"
        return f"{tensor.dtype} {list(tensor.shape)} came, and {expected} was expected"
    return None


def copied(leaf: Leaf, rows: np.ndarray) -> Leaf:
    """Copies of some rows, in ascending order, contiguous and on the CPU."""
    if not isinstance(leaf, Ragged):
        return _copied(leaf, rows)
    lengths = leaf.lengths.detach().cpu().numpy()
    starts = np.cumsum(lengths) - lengths
    steps = ranges(starts[rows], lengths[rows])
    return Ragged(_copied(leaf.values, steps), torch.from_numpy(lengths[rows]))


def _copied(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if len(rows) == len(tensor):
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    flat = tensor.cpu().contiguous().view(len(tensor), -1).view(torch.uint8) if tensor.numel() else tensor
    picked = flat.index_select(0, torch.from_numpy(rows))
    return picked.view(tensor.dtype).view(len(rows), *tensor.shape[1:])
