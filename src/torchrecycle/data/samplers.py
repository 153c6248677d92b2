"""Is a sampler made over the data set that it draws from?

A sampler gives numbers, and any number below 24 is an item of a data set of 24: `RandomSampler(validation)` in the
loader of the training set runs, and trains on whatever has these numbers. Most samplers tell over which data set they
were made, or how many items they count with. One that counts further than the data set goes is refused before training
begins; one that was made over another object is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, RandomSampler, SequentialSampler

from torchrecycle.errors import BatchError, RecycleWarning

__all__ = ["compare_samplers"]

DEPTH = 4
"""So many wrappers are looked through: a `Subset` of a `Subset` of a data set with transforms."""


def compare_samplers(dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Compare ``sampler`` and ``batch_sampler`` of a loader with its data set.

    Args:
        dataset: the user's.
        arguments: of the `DataLoader`.

    Raises:
        BatchError: one counts with more items than there are.
    """
    for sampler in _samplers(arguments):
        _refuse_beyond(sampler, len(dataset))
        other = getattr(sampler, "data_source", None)
        other = getattr(sampler, "dataset", None) if other is None else other
        counts = type(sampler) in _COUNTING and hasattr(other, "__len__")
        if other is None or other is dataset or not (counts or _is_data_set(other)):
            continue
        if len(other) > len(dataset):
            raise BatchError(
                f"the {type(sampler).__name__} draws from a {type(other).__name__} of {len(other)} items, and the "
                f"loader's data set, a {type(dataset).__name__}, has {len(dataset)}: it would ask for items that are "
                "not there, and for others than it means. Make the sampler over the data set of the loader."
            )
        if _is_data_set(other) and not _holds(dataset, other, DEPTH) and not _holds(other, dataset, DEPTH):
            warnings.warn(
                f"the {type(sampler).__name__} was made over another data set, a {type(other).__name__} of "
                f"{len(other)} items, than that of the loader, a {type(dataset).__name__} of {len(dataset)}. The "
                "batches are what its numbers mean in the loader's data set. If that is not meant, make the sampler "
                "over it.",
                RecycleWarning,
                stacklevel=3,
            )


def _samplers(arguments: Mapping[str, Any]) -> Iterator[Any]:
    """Those of the arguments, and those that they draw from."""
    left = [(arguments.get(name), 0) for name in ("sampler", "batch_sampler")]
    while left:
        sampler, depth = left.pop()
        if sampler is None or depth > DEPTH:
            continue
        yield sampler
        left += [(getattr(sampler, name, None), depth + 1) for name in ("sampler", "batch_sampler")]


def _refuse_beyond(sampler: Any, count: int) -> None:
    weights, indices = getattr(sampler, "weights", None), getattr(sampler, "indices", None)
    if isinstance(weights, torch.Tensor) and weights.dim() == 1 and len(weights) > count and weights[count:].any():
        raise BatchError(
            f"the {type(sampler).__name__} has {len(weights)} weights, and the data set has {count} items: it would "
            "draw items that are not there. Give one weight for each item of the data set of the loader."
        )
    if not isinstance(indices, (Sequence, np.ndarray, torch.Tensor)) or not len(indices):
        return
    try:
        largest = int(max(indices))
    except (TypeError, ValueError):  # a sampler of one's own, which means something else by that name
        return
    if largest >= count:
        raise BatchError(
            f"the {type(sampler).__name__} has the index {largest}, and the data set has {count} items: it would draw "
            "items that are not there. Give indices of the data set of the loader."
        )


_COUNTING = (RandomSampler, SequentialSampler, DistributedSampler)
"""Samplers that count what they were made over, whatever it is, and draw from these numbers."""


def _is_data_set(value: Any) -> bool:
    """And not the numbers of one, such as ``range(24)`` or a list of indices."""
    if isinstance(value, (Sequence, np.ndarray, torch.Tensor)) or not hasattr(value, "__len__"):
        return False
    return isinstance(value, Dataset) or hasattr(value, "__getitem__")


def _holds(outer: Any, inner: Any, depth: int) -> bool:
    """Whether a data set is made of another one."""
    if outer is inner:
        return True
    if not depth or not hasattr(outer, "__dict__"):
        return False
    for value in vars(outer).values():
        parts = value if isinstance(value, (list, tuple)) and len(value) <= 64 else [value]
        if any(part is inner or (_is_data_set(part) and _holds(part, inner, depth - 1)) for part in parts):
            return True
    return False
