"""Batches for the zoo: taken apart into the items of a data set, collated again, padded on either side.

A dict of `input_ids` ``[3, 12]`` becomes three items of 12, 11 and 7 ids; `Padded("right")` collates any of them into a
batch, with 0 for ids and for the mask, as a tokenizer's collate function does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cases import Built
from torch import nn


def arguments(built: Built, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How the loop calls the model on a batch. Containers are copied: some models write into their dict."""
    if built.inputs is not None:
        args, kwargs = built.inputs(batch)
        return tuple(dict(a) if type(a) is dict else a for a in args), dict(kwargs)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    return tuple(batch), {}


def call(built: Built, model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, with the generators at the same place each time."""
    torch.manual_seed(7)
    np.random.seed(7)  # wav2vec2 and its kin mask spans of time by NumPy's
    random.seed(7)
    args, kwargs = arguments(built, copy_of(batch))
    return model(*args, **kwargs)


def copy_of(batch: Any) -> Any:
    """The same batch in memory of its own. Kept rows are not touched."""
    if type(batch) is torch.Tensor:
        return batch.clone()
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {name: copy_of(part) for name, part in batch.items()}
    return type(batch)(copy_of(part) for part in batch) if isinstance(batch, (tuple, list)) else batch


def items_of(batch: Any) -> list[Any]:
    """The objects of a batch, which `default_collate` makes into the same batch again."""
    if isinstance(batch, torch.Tensor):
        return [row.clone() for row in batch]
    if isinstance(batch, Mapping):
        names = list(batch)
        columns = [items_of(batch[name]) for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(batch, tuple):
        return list(zip(*(items_of(part) for part in batch), strict=True))
    return list(batch)  # a list of images


def ragged_items(built: Built, batch: Mapping[str, torch.Tensor], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The objects of a batch, each cut off after so many tokens."""
    return [
        {name: part[:length].clone() if name in built.padded else part for name, part in item.items()}
        for item, length in zip(items_of(batch), lengths, strict=True)
    ]


class Padded:
    """A collate function that pads on one side, as users write them.

    Args:
        names: the entries of an item that are as long as its sequence.
        side: ``"right"`` or ``"left"``.
    """

    def __init__(self, names: Sequence[str], side: str) -> None:
        self.names, self.side = tuple(names), side

    def __call__(self, items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(item[self.names[0]]) for item in items)
        return {
            name: torch.stack([self._pad(item[name], longest) if name in self.names else item[name] for item in items])
            for name in items[0]
        }

    def _pad(self, row: torch.Tensor, longest: int) -> torch.Tensor:
        more = row.new_zeros((longest - len(row), *row.shape[1:]))
        return torch.cat([row, more] if self.side == "right" else [more, row])


def collate_of(batch: Any) -> Callable[..., Any] | None:
    """What a loop needs besides `default_collate`: detectors take lists of images."""
    return list if isinstance(batch, list) else None
