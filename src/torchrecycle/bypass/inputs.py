"""The inputs of a model's call under the names of its ``forward``.

``model(images)``, ``model(x=images)`` and ``model({"image": images})`` must mean the same input wherever it is looked
up: as ``x`` (and ``x.image``). `Inputs` holds one call's arguments in that form, and gives them back with some
replaced: pixels by an absent tensor, ids by a padded version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Inputs", "parameter_names"]


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """The names that positional arguments of ``model.forward`` have."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward written in C
        return ()
    return tuple(p.name for p in parameters if p.kind in positional)


class Inputs:
    """One call's arguments, by name.

    Args:
        names: what `parameter_names` gave.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    __slots__ = ("args", "kwargs", "names")

    def __init__(self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.names = tuple(names)
        self.args = tuple(args)
        self.kwargs = dict(kwargs)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Each argument that is no container, under its name; ``x.image`` for the entry of a dict ``x``."""
        for position, value in enumerate(self.args):
            yield from _walk(self.names[position] if position < len(self.names) else str(position), value)
        for name, value in self.kwargs.items():
            yield from _walk(name, value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.items() if isinstance(value, torch.Tensor)}

    def map(self, function: Callable[[str, Any], Any]) -> Inputs:
        """The same call with every argument replaced by ``function(name, argument)``."""
        args = [
            _rebuild(self.names[i] if i < len(self.names) else str(i), value, function)
            for i, value in enumerate(self.args)
        ]
        return Inputs(self.names, args, {name: _rebuild(name, value, function) for name, value in self.kwargs.items()})

    def replace(self, values: Mapping[str, Any]) -> Inputs:
        """The same call with the arguments of some names replaced."""
        return self.map(lambda name, value: values.get(name, value))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same call with every tensor replaced by ``function(tensor)``."""
        return self.map(lambda _, value: function(value) if isinstance(value, torch.Tensor) else value)

    def batch(self) -> int:
        """How many objects: the first dimension of the first tensor that has one."""
        return next((value.shape[0] for value in self.tensors().values() if value.dim()), 0)


def _walk(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value):
        for position, part in enumerate(value):
            yield from _walk(f"{name}.{position}", part)
    else:
        yield name, value


def _rebuild(name: str, value: Any, function: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _rebuild(f"{name}.{key}", part, function)) for key, part in value.items())
    if isinstance(value, Mapping):
        return {key: _rebuild(f"{name}.{key}", part, function) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value):
        parts = [_rebuild(f"{name}.{i}", part, function) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return function(name, value)
