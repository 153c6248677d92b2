"""Reading a data set once for its keys and targets: what runs inside the workers at fill.

`Reading` is the collate function of the pass. For each batch it gives the user's batch, the leaves of each item that
the manifest keeps (an image that is a model input becomes its shape), and the user's own keys.
"""

from __future__ import annotations

import pickle
import random
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from torchrecycle.bypass import BatchRule
from torchrecycle.data import Generators, Template, Views
from torchrecycle.data.batches import path_of
from torchrecycle.data.known import items_of, user_key_of
from torchrecycle.data.state import state_of
from torchrecycle.errors import BatchError, RandomInputError
from torchrecycle.keys import tensor_row_keys

__all__ = ["Reading", "Watched", "seen_changing"]

MOST_CALLS = 10_000
"""So many calls within the reading of an item are looked at to name what changes."""


class Watched(Dataset[Any]):
    """The user's data set, each item read between two looks at the random generators; of `Views`, each under its seed.

    Args:
        base: map-style.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._generators: Generators | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": None}  # a worker has generators of its own

    def __len__(self) -> int:
        return len(self.base)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if isinstance(self.base, Views):
            return SeededItems(self.base.__getitems__(indices), self.base.seeds(indices))
        if self._generators is None:
            self._generators = Generators(self.base)
        before = self._generators.states()
        items = items_of(self.base, list(indices))
        drawn = self._generators.moved(before)
        if drawn:
            raise RandomInputError(
                f"reading the items {list(indices)[:3]} of the data set drew from {' and from '.join(drawn)}: a "
                f"random transform ({_suspects(self.base, indices)}) would be frozen at the moment of filling. Keep "
                "each object in several views, of which each epoch draws one: views=4, given to recycle() or to "
                "loader(), dataset() and fill(). Or take it out of the data set."
            )
        return items


class SeededItems(list[Any]):
    """Items of `Views`, with index and view of each."""

    def __init__(self, items: Iterable[Any], seeds: list[tuple[int, int]]) -> None:
        super().__init__(items)
        self.seeds = seeds


def _suspects(dataset: Any, indices: Sequence[int]) -> str:
    """What of a data set draws random numbers, by name."""
    found = _seen_drawing(dataset, indices[:4])
    for name in () if found else ("transform", "transforms", "target_transform"):
        transform = getattr(dataset, name, None)
        parts = getattr(transform, "transforms", [transform] if transform is not None else [])
        found += [type(part).__name__ for part in parts if "Random" in type(part).__name__]
    return ", ".join(dict.fromkeys(found)) or "a flip, a crop, dropout on the input"


def _name_of(frame: types.FrameType, dataset: Any) -> str | None:
    """What a call is called by its user: the object whose method it is, or the user's own function."""
    own = frame.f_locals.get("self")
    if own is dataset:
        return f"{type(own).__name__}.{frame.f_code.co_name}"
    if own is not None:
        return None if isinstance(own, random.Random) else type(own).__name__
    package = str(frame.f_globals.get("__name__")).split(".")[0]
    return None if package in _FUNCTIONS or package in sys.stdlib_module_names else frame.f_code.co_name


_FUNCTIONS = frozenset({"torch", "torchvision", "numpy", "PIL", "albumentations", "torchrecycle"})
"""Packages whose functions draw in the name of whoever calls them."""


def _seen_drawing(dataset: Any, indices: Sequence[int]) -> list[str]:
    """The innermost objects and functions in which generators move while these items are read once more."""
    generators = Generators(dataset)
    calls: list[list[Any]] = []
    """Of each call of Python that runs: the states when it began, and whether one within it has been named."""
    found: list[str] = []

    def look(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls.append([generators.states(), False])
        elif event == "return" and calls:
            before, named = calls.pop()
            if not named and generators.moved(before):
                name = _name_of(frame, dataset)
                if name is not None:
                    found.append(name)
                    named = True
            if calls:
                calls[-1][1] |= named

    others = sys.getprofile()
    with generators.undisturbed(), suppress(Exception):
        sys.setprofile(look)
        try:
            items_of(dataset, list(indices))
        finally:
            sys.setprofile(others)
    return found


def seen_changing(dataset: Any, index: int) -> str:
    """The innermost object or function that gives something else when this item is read a second time."""
    runs: list[list[tuple[str, str]]] = []

    def look(frame: types.FrameType, event: str, argument: Any) -> None:
        name = _name_of(frame, dataset) if event == "return" and argument is not None else None
        if name is not None and len(runs[-1]) < MOST_CALLS:
            with suppress(Exception):
                runs[-1].append((name, state_of(argument)))

    others = sys.getprofile()
    with Generators(dataset).undisturbed(), suppress(Exception):
        for _ in range(2):
            runs.append([])
            sys.setprofile(look)
            try:
                items_of(dataset, [index])
            finally:
                sys.setprofile(others)
    changed = (one[0] for one, other in zip(*runs, strict=False) if one[0] == other[0] and one[1] != other[1])
    return next(changed, f"{type(dataset).__name__}.__getitem__")


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
        self._generators: Generators | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": None}  # a worker has generators of its own

    def collated(self, items: Sequence[Any]) -> Any:
        """The user's batch of some items.

        Raises:
            RandomInputError: the collate function draws random numbers.
        """
        if self.collate_fn is default_collate:
            return default_collate(list(items))
        if self._generators is None:
            self._generators = Generators(self.collate_fn)
        before = self._generators.states()
        batch = self.collate_fn(list(items))
        drawn = self._generators.moved(before)
        if drawn:
            name = getattr(self.collate_fn, "__qualname__", type(self.collate_fn).__name__)
            raise RandomInputError(
                f"the collate function {name} drew from {' and from '.join(drawn)}: what it makes of an item would be "
                "frozen at the moment of filling. Draw in the data set's __getitem__, and keep several views of each "
                "object: views=4."
            )
        return batch

    def __call__(
        self, items: Sequence[Any]
    ) -> tuple[Any, Template, dict[int, str], list[list[Any]], np.ndarray | None]:
        batch = self.collated(items)
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
        return batch, template, at, Sent(leaves), self._user_keys(items)

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
        seeds = items.seeds if isinstance(items, SeededItems) else [None] * len(items)
        found = [user_key_of(item, self.key_name, self.user_key, seed) for item, seed in zip(items, seeds, strict=True)]
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


class Sent(list[list[Any]]):
    """Leaves of the items of a batch, which come out of a worker as an ordinary list that holds no file open.

    A tensor that a worker sends by itself is a file in shared memory, open as long as the tensor lives. The manifest's
    targets live to the end of the pass: a thousand items with one tensor each are as many open files as a process may
    have. So those of one shape travel together and are copied where they arrive, and all others travel by value.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, ([_together(list(column)) for column in zip(*self, strict=True)], len(self))


def _together(column: list[Any]) -> torch.Tensor | bytes:
    first = column[0]
    if all(_is_plain(leaf) and leaf.dtype == first.dtype and leaf.shape == first.shape for leaf in column):
        return torch.stack(column)
    return pickle.dumps(column, pickle.HIGHEST_PROTOCOL)


def _is_plain(leaf: Any) -> bool:
    return (
        type(leaf) is torch.Tensor
        and leaf.layout is torch.strided
        and leaf.device.type == "cpu"
        and not (leaf.requires_grad or leaf.is_quantized or leaf.is_conj() or leaf.is_neg())
    )


def _received(columns: list[torch.Tensor | bytes], items: int) -> list[list[Any]]:
    found = [
        list(column.clone().unbind(0)) if isinstance(column, torch.Tensor) else pickle.loads(column)
        for column in columns
    ]
    return [[column[item] for column in found] for item in range(items)]


class AbsentLeaf:
    """In place of an input that is not kept: its shape and dtype."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
