"""Reading a data set once for its keys and targets: what runs inside the workers at fill.

`Reading` is the collate function of the pass. For each batch it gives the user's batch, the leaves of each item that
the manifest keeps (an image that is a model input becomes its shape), and the user's own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from torchrecycle.bypass import BatchRule
from torchrecycle.data import Template
from torchrecycle.data.batches import path_of
from torchrecycle.errors import BatchError, RandomInputError
from torchrecycle.keys import key
from torchrecycle.trace import random_state

__all__ = ["Reading", "Watched"]


class Watched(Dataset[Any]):
    """The user's data set, each item read between two looks at the random generators."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        before = random_state()
        fetch = getattr(self.base, "__getitems__", None)
        items = list(fetch(list(indices))) if fetch else [self.base[i] for i in indices]
        self._compare(before, indices)
        return items

    def _compare(self, before: tuple[Any, ...], indices: Sequence[int]) -> None:
        after = random_state()
        drawn = []
        if before[0] != after[0]:
            drawn.append("Python's random")
        if before[1] is not None and after[1] is not None and not _same_numpy(before[1], after[1]):
            drawn.append("NumPy's")
        if not torch.equal(before[2], after[2]):
            drawn.append("torch's")
        if drawn:
            raise RandomInputError(
                f"reading the items {list(indices)[:3]} of the data set drew from {' and '.join(drawn)} generator: a random "
                f"transform ({_suspects(self.base)}) would be frozen at the moment of filling. Take it out of the data set."
            )


def _same_numpy(a: Any, b: Any) -> bool:
    return a[0] == b[0] and np.array_equal(a[1], b[1]) and a[2:] == b[2:]


def _suspects(dataset: Any) -> str:
    """The data set's transforms that look random, by name."""
    found = []
    for name in ("transform", "transforms", "target_transform"):
        transform = getattr(dataset, name, None)
        parts = getattr(transform, "transforms", [transform] if transform is not None else [])
        found += [type(part).__name__ for part in parts if "Random" in type(part).__name__]
    return ", ".join(found) or "a flip, a crop, dropout on the input"


class Reading:
    """Items to (batch, leaves per item, user keys).

    Args:
        collate_fn: the user's, or None for ``default_collate``.
        rule: finds the model inputs of a batch.
        absent: the model inputs that recycled batches leave out.
        user_key: an item to whatever identifies it, or None.
        key_name: the name of the preprocessing, which enters a user key.
    """

    def __init__(
        self,
        collate_fn: Callable[[Sequence[Any]], Any] | None,
        rule: BatchRule,
        absent: frozenset[str],
        user_key: Callable[[Any], Any] | None = None,
        key_name: str | None = None,
    ) -> None:
        self.collate_fn = collate_fn or default_collate
        self.rule = rule
        self.absent = absent
        self.user_key = user_key
        self.key_name = key_name

    def __call__(self, items: Sequence[Any]) -> tuple[Any, Template, dict[int, str], list[list[Any]], np.ndarray | None]:
        batch = self.collate_fn(items)
        inputs = self.rule(batch)
        tensors = inputs.tensors()
        if not tensors:
            raise BatchError("no model input of a batch is a tensor; pass inputs=lambda batch: (args, kwargs)")
        for name, tensor in tensors.items():
            if tensor.dim() == 0 or tensor.shape[0] != len(items):
                raise BatchError(
                    f"the model input '{name}' is {list(tensor.shape)} for {len(items)} items: its first dimension must "
                    "count the objects of the batch"
                )
        template = Template.of(items[0])
        places = {path: position for position, path in enumerate(template.paths())}
        at = {}
        for name, tensor in tensors.items():
            path = path_of(batch, tensor)
            if path in places:
                at[places[path]] = name
        leaves = [self._leaves(template, at, item, row, tensors) for row, item in enumerate(items)]
        return batch, template, at, leaves, self._user_keys(items)

    def _leaves(
        self, template: Template, at: dict[int, str], item: Any, row: int, tensors: dict[str, torch.Tensor]
    ) -> list[Any]:
        """The item's leaves; a tensor input that is left out of batches as its shape."""
        leaves = template.split(item)
        for position, name in at.items():
            if name in self.absent:
                leaves[position] = self._shape(leaves[position], tensors[name][row], name)
        return leaves

    def _shape(self, leaf: Any, given: torch.Tensor, name: str) -> Any:
        tensor = leaf if isinstance(leaf, torch.Tensor) else torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else None
        if tensor is None or tensor.shape != given.shape or not torch.equal(tensor, given.cpu()):
            function = getattr(self.collate_fn, "__qualname__", type(self.collate_fn).__name__)
            raise BatchError(
                f"the collate function {function} computes the model input '{name}' from the items; with recycling it would "
                "have nothing to compute from. Do this work in the data set's __getitem__, so that it is part of the object."
            )
        return AbsentLeaf(tuple(given.shape), given.dtype)

    def _user_keys(self, items: Sequence[Any]) -> np.ndarray | None:
        if self.user_key is None:
            return None
        found = [key((self.key_name, self.user_key(item)), where="key(item)") for item in items]
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16).copy()


class AbsentLeaf:
    """In place of an input that is not kept: its shape and dtype."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
