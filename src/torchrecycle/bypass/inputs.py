"""The inputs of a model's call under the names of its ``forward``.

``model(images)``, ``model(x=images)`` and ``model({"image": images})`` must mean the same input wherever it is looked
up: as ``x`` (and ``x.image``). `Inputs` holds one call's arguments in that form, and gives them back with some
replaced: pixels by an absent tensor, ids by a padded version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchrecycle.errors import BatchError

__all__ = ["Inputs", "Listed", "parameter_names"]


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """The names that positional arguments of ``model.forward`` have."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward written in C
        return ()
    return tuple(p.name for p in parameters if p.kind in positional)


class Listed:
    """An argument that is a list with one entry per object: of images, which are joined, or of anything else.

    Args:
        entries: as the model takes them.

    Raises:
        BatchError: they are tensors of several sizes.
    """

    __slots__ = ("entries", "joined", "kind")

    def __init__(self, entries: Sequence[Any], joined: torch.Tensor | None = None) -> None:
        self.kind: Any = type(entries)
        self.entries = entries
        self.joined = joined
        if joined is None and isinstance(entries[0], torch.Tensor):
            sizes = sorted({tuple(entry.shape) for entry in entries})
            if len(sizes) > 1:
                raise BatchError(
                    f"the objects of a batch have the sizes {list(map(list, sizes))}: what the first layers give for "
                    "one would depend on how far the others pad it. Bring all to one size in the data set."
                )
            self.joined = torch.stack(list(entries))

    def unwrapped(self) -> Any:
        """As the model takes it."""
        return self.kind(self.joined.unbind(0)) if self.joined is not None else self.entries

    def with_joined(self, joined: Any) -> Listed:
        """The same with other tensors."""
        made = copy.copy(self)
        made.joined = joined
        return made

    def changed(self) -> Listed:
        """Its entries with other numbers in them."""
        made = copy.copy(self)
        made.entries = self.kind([_rebuild("", entry, _other_number) for entry in self.entries])
        return made

    def take(self, index: Sequence[int]) -> Listed:
        """Some of its entries, in that order."""
        made = copy.copy(self)
        made.entries = self.kind([self.entries[i] for i in index])
        made.joined = None if self.joined is None else _rows(self.joined, index)
        return made


def _other_number(_: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value * 0.5 + 0.1 if value.is_floating_point() else value.flip(-1) if value.dim() else value + 1
    return value * 0.5 + 0.1 if isinstance(value, float) else value


def _changed(value: Any, change: Callable[[Listed], Listed]) -> Any:
    return change(value) if isinstance(value, Listed) and value.joined is None else value


def _rows(tensor: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    return tensor.index_select(0, torch.tensor(list(index), device=tensor.device))


class Inputs:
    """One call's arguments, by name.

    Args:
        names: what `parameter_names` gave.
        args: positional arguments.
        kwargs: keyword arguments.
        lists: the names of arguments that are a list of tensors, one per object: ``images`` of a detector. They are
            looked up as one tensor ``[batch, ...]``.
    """

    __slots__ = ("_args", "_kwargs", "_tensors", "_wrapped", "lists", "names")

    def __init__(
        self,
        names: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        lists: frozenset[str] = frozenset(),
    ) -> None:
        self.names = tuple(names)
        self.lists = lists
        self._args = [self._wrap(self._name(i), value) for i, value in enumerate(args)]
        self._kwargs = {name: self._wrap(name, value) for name, value in kwargs.items()}
        self._wrapped = any(isinstance(value, Listed) for value in (*self._args, *self._kwargs.values()))
        self._tensors: dict[str, torch.Tensor] | None = None

    def _name(self, position: int) -> str:
        return self.names[position] if position < len(self.names) else str(position)

    def _wrap(self, name: str, value: Any) -> Any:
        by_object = isinstance(value, (tuple, list)) and value and not hasattr(value, "_fields")
        if by_object and (name in self.lists or (isinstance(value[0], Mapping) and _holds_tensors(value))):
            return Listed(value)
        return value

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, as the model takes them."""
        return tuple(v.unwrapped() if isinstance(v, Listed) else v for v in self._args)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments, as the model takes them."""
        if not self._wrapped:
            return dict(self._kwargs)
        return {n: v.unwrapped() if isinstance(v, Listed) else v for n, v in self._kwargs.items()}

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each argument that is no container, under its name; ``x.image`` for the entry of a dict ``x``."""
        for position, value in enumerate(self._args):
            yield from _walk(self._name(position), value)
        for name, value in self._kwargs.items():
            yield from _walk(name, value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arguments that are tensors. Looked up once: not to be changed."""
        if self._tensors is None:
            self._tensors = {name: value for name, value in self.items() if isinstance(value, torch.Tensor)}
        return self._tensors

    def plain(self) -> dict[str, Any]:
        """The arguments that are the same for all objects: flags and numbers."""
        return {name: v for name, v in self.items() if not isinstance(v, (torch.Tensor, Listed))}

    def map(self, function: Callable[[str, Any], Any]) -> Inputs:
        """The same call with every argument replaced by ``function(name, argument)``."""
        made = self._blank()
        made._args = [_rebuild(self._name(i), value, function) for i, value in enumerate(self._args)]
        made._kwargs = {name: _rebuild(name, value, function) for name, value in self._kwargs.items()}
        return made

    def take(self, index: Sequence[int]) -> Inputs:
        """The same call for some of its objects, in that order."""

        def taken(value: Any) -> Any:
            if isinstance(value, Listed):
                return value.take(index)
            return _rows(value, index) if isinstance(value, torch.Tensor) and value.dim() else value

        made = self._blank()
        made._args = [_map_parts(value, taken) for value in self._args]
        made._kwargs = {name: _map_parts(value, taken) for name, value in self._kwargs.items()}
        return made

    def with_lists_changed(self) -> Iterator[Inputs]:
        """The same call with what is listed by object, and is no tensor, given to other objects, or changed."""
        values = (*self._args, *self._kwargs.values())
        if not any(isinstance(value, Listed) and value.joined is None for value in values):
            return
        for change in (lambda listed: listed.take(range(len(listed.entries))[::-1]), Listed.changed):
            made = self._blank()
            made._args = [_changed(value, change) for value in self._args]
            made._kwargs = {name: _changed(value, change) for name, value in self._kwargs.items()}
            yield made

    def _blank(self) -> Inputs:
        made = object.__new__(Inputs)
        made.names, made.lists, made._wrapped, made._tensors = self.names, self.lists, self._wrapped, None
        return made

    def replace(self, values: Mapping[str, Any]) -> Inputs:
        """The same call with the arguments of some names replaced."""
        return self.map(lambda name, value: values.get(name, value))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same call with every tensor replaced by ``function(tensor)``."""
        return self.map(lambda _, value: function(value) if isinstance(value, torch.Tensor) else value)

    def batch(self) -> int:
        """How many objects: the first dimension of the first tensor that has one."""
        return next((value.shape[0] for value in self.tensors().values() if value.dim()), 0)

    def entries(self, name: str) -> Sequence[Any]:
        """The objects of an argument that is a list of them."""
        where = {**{self._name(i): value for i, value in enumerate(self._args)}, **self._kwargs}
        return where[name].entries


def _holds_tensors(values: Sequence[Any]) -> bool:
    return any(isinstance(part, torch.Tensor) for value in values for part in value.values())


def _walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Listed):
        yield name, value if value.joined is None else value.joined
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value):
        for position, part in enumerate(value):
            yield from _walk(f"{name}.{position}", part)
    else:
        yield name, value


def _rebuild(name: str, value: Any, function: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, Listed):
        return value if value.joined is None else value.with_joined(function(name, value.joined))
    if isinstance(value, dict):
        return type(value)((key, _rebuild(f"{name}.{key}", part, function)) for key, part in value.items())
    if isinstance(value, Mapping):
        return {key: _rebuild(f"{name}.{key}", part, function) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value):
        parts = [_rebuild(f"{name}.{i}", part, function) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(name, value)


def _map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    return function(value) if isinstance(value, Listed) else _rebuild("", value, lambda _, part: function(part))
