"""Reading a data set once for its keys and targets: what runs inside the workers at fill.

`Reading` is the collate function of the pass. For each batch it gives the user's batch, the leaves of each item that
the manifest keeps (an image that is a model input becomes its shape), and the user's own keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from torchrecycle.bypass import BatchRule
from torchrecycle.data import Template, generators_of
from torchrecycle.data.batches import path_of
from torchrecycle.data.known import items_of, user_key_of
from torchrecycle.errors import BatchError, RandomInputError
from torchrecycle.keys import tensor_row_keys
from torchrecycle.trace import random_state

__all__ = ["Reading", "Watched"]


class Watched(Dataset[Any]):
    """The user's data set, each item read between two looks at the random generators."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._private: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_private": None}  # a worker has generators of its own

    def __len__(self) -> int:
        return len(self.base)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if self._private is None:
            self._private = generators_of(self.base)
        before = random_state()
        private = [_state_of_generator(one) for one in self._private]
        items = items_of(self.base, list(indices))
        self._compare(before, indices)
        if [_state_of_generator(one) for one in self._private] != private:
            raise RandomInputError(
                f"reading the items {list(indices)[:3]} of the data set drew from a random generator that it holds: a "
                f"random transform ({_suspects(self.base)}) would be frozen at the moment of filling. Take it out of "
                "the data set."
            )
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
                f"reading the items {list(indices)[:3]} of the data set drew from {' and '.join(drawn)} generator: a "
                f"random transform ({_suspects(self.base)}) would be frozen at the moment of filling. Take it out of "
                "the data set."
            )


def _state_of_generator(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes().hex()
    if isinstance(generator, np.random.Generator):
        return repr(_whole(generator.bit_generator.state))
    state = generator.getstate() if isinstance(generator, random.Random) else generator.get_state()
    return repr(_whole(state))


def _whole(state: Any) -> Any:
    """With arrays as lists: what NumPy prints of a long one is not all of it."""
    if isinstance(state, dict):
        return {name: _whole(part) for name, part in state.items()}
    if isinstance(state, tuple):
        return tuple(_whole(part) for part in state)
    return state.tolist() if isinstance(state, np.ndarray) else state


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
        some: the model inputs that batches of at least one recycling leave out.
        absent: those that batches of all of them leave out.
        user_key: an item to whatever identifies it, or None.
        key_name: the name of the preprocessing, which enters a user key.
    """

    def __init__(
        self,
        collate_fn: Callable[[Sequence[Any]], Any] | None,
        rule: BatchRule,
        some: frozenset[str],
        absent: frozenset[str],
        user_key: Callable[[Any], Any] | None = None,
        key_name: str | None = None,
    ) -> None:
        self.collate_fn = collate_fn or default_collate
        self.rule = rule
        self.some, self.absent = some, absent
        self.user_key = user_key
        self.key_name = key_name

    def __call__(
        self, items: Sequence[Any]
    ) -> tuple[Any, Template, dict[int, str], list[list[Any]], np.ndarray | None]:
        batch = self.collate_fn(list(items))
        inputs = self.rule(batch)
        tensors = inputs.tensors()
        if not tensors:
            raise BatchError("no model input of a batch is a tensor; pass inputs=lambda batch: (args, kwargs)")
        for name, tensor in tensors.items():
            if tensor.dim() == 0 or tensor.shape[0] != len(items):
                raise BatchError(
                    f"the model input '{name}' is {list(tensor.shape)} for {len(items)} items: its first dimension "
                    "must count the objects of the batch"
                )
        template = Template.of(items[0])
        leaves = [template.split(item) for item in items]
        at = self._places(batch, template, leaves, tensors)
        for position, name in at.items():
            if name in self.absent:
                for row, one in enumerate(leaves):
                    one[position] = AbsentLeaf(tuple(tensors[name][row].shape), tensors[name].dtype)
        return batch, template, at, leaves, self._user_keys(items)

    def _places(
        self, batch: Any, template: Template, leaves: list[list[Any]], tensors: dict[str, torch.Tensor]
    ) -> dict[int, str]:
        """Which leaf of the items is which of the model inputs that batches leave out.

        At the same place as in the batch, or, where the collate function builds another nest, the leaf of that content.
        """
        places = {path: position for position, path in enumerate(template.paths())}
        at: dict[int, str] = {}
        for name in sorted(self.some):
            path = path_of(batch, tensors[name])
            there = None if path is None else places.get(path)
            candidates = range(len(places)) if there is None else [there]
            found = next((p for p in candidates if p not in at and _is_that(leaves, p, tensors[name])), None)
            if found is None:
                function = getattr(self.collate_fn, "__qualname__", type(self.collate_fn).__name__)
                raise BatchError(
                    f"the collate function {function} computes the model input '{name}' from the items; with "
                    "recycling it would have nothing to compute from. Do this work in the data set's __getitem__, so "
                    "that it is part of the object."
                )
            at[found] = name
        return at

    def _user_keys(self, items: Sequence[Any]) -> np.ndarray | None:
        if self.user_key is None:
            return None
        found = [user_key_of(item, self.key_name, self.user_key) for item in items]
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16).copy()


def _is_that(leaves: list[list[Any]], position: int, given: torch.Tensor) -> bool:
    """Whether each item's leaf at that position is its row of a model input."""
    for row, one in enumerate(leaves):
        leaf = one[position]
        tensor = (
            leaf if isinstance(leaf, torch.Tensor) else torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else None
        )
        if tensor is None or tensor.dtype != given.dtype or tensor.shape != given[row].shape:
            return False
        if torch.equal(tensor, given[row].cpu()):
            continue
        # A NaN is unequal to itself; its bytes are not.
        if tensor_row_keys({"": tensor[None]}).tobytes() != tensor_row_keys({"": given[row][None]}).tobytes():
            return False
    return True


class AbsentLeaf:
    """In place of an input that is not kept: its shape and dtype."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
