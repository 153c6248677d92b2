"""A description of a module -> the module: the inverse of `describe`.

Whoever wrote the description may be a stranger, so nothing in it is called. Classes and functions are found by name and
must be of the kinds that `torchrecycle.similarity.names` lets pass; a module is an empty object of its class whose
attributes are set, and none of them stands before a method. Code of the classes themselves runs in two places: the
``__setstate__`` of torch's layers, and the constructor of a class that derives from torchrecycle's and has a
``get_config_dict``. What is refused in saving is refused here as well: a file need not come from `describe`.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.torch_version import TorchVersion

from torchrecycle.errors import RecycleError
from torchrecycle.similarity import names
from torchrecycle.similarity.description import (
    OWN,
    STATE_HOOKS,
    Description,
    dtype_name,
    is_own_forward,
    join,
    shown,
    slots_of,
)
from torchrecycle.similarity.names import NameRefusedError

__all__ = ["RebuildError", "read_values", "rebuild"]


class RebuildError(RecycleError, ValueError):
    """What was described cannot be made again: its class has changed since."""


def rebuild(
    description: Description, tensors: Mapping[str, Tensor], pretrained: Callable[[int, type], Any]
) -> nn.Module:
    """The module that was described.

    Args:
        description: as `describe` gives it; it may come from a stranger.
        tensors: by name; the module keeps them.
        pretrained: gives the tokenizer or processor of a number, which is of a class.

    Raises:
        NameRefusedError: it names something that is not there, or that a file may not name.
        RebuildError: a constructor does not make what was described.
        KeyError, TypeError, ValueError, ...: it is not of the form that `describe` gives.
    """
    return _Reader(description, tensors, pretrained).read()


def read_values(values: Mapping[str, Any], shared: list[Any], owner: type) -> dict[str, Any]:
    """The attributes that `describe_values` has written, of an object of a class.

    Raises:
        NameRefusedError: they name something that is not there, or that a file may not name, or stand before a method.
        KeyError, TypeError, ValueError, ...: they are not of the form that `describe_values` gives.
    """
    reader = _Reader(Description({}, {}, shared), {}, _no_tokenizer)
    reader.packages = {names.package_of(owner)}
    _must_be_attributes(owner, values)
    return {name: reader.value(node) for name, node in values.items()}


def _no_tokenizer(number: int, kind: type) -> Any:
    raise NameRefusedError(f"a {kind.__name__} is no plain value")


class _Reader:
    def __init__(
        self, description: Description, tensors: Mapping[str, Tensor], pretrained: Callable[[int, type], Any]
    ) -> None:
        self.description = description
        self.given = tensors
        self.load_pretrained = pretrained
        self.classes = {path: _module_class(entry["class"]) for path, entry in description.modules.items()}
        self.packages = {names.package_of(kind) for kind in self.classes.values()}
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self._shared: dict[int, Any] = {}
        self._pretrained: dict[int, Any] = {}

    def read(self) -> nn.Module:
        entries = self.description.modules
        for path, entry in entries.items():
            if "config" not in entry:
                self.modules[path] = _empty(self.classes[path])
        for path, entry in entries.items():
            if "config" in entry:
                self._construct(path, entry)
        parts = {path: entry for path, entry in entries.items() if "config" not in entry}
        for path, entry in parts.items():
            self._fill(self.modules[path], entry)
        for path, entry in parts.items():
            self._set_attributes(path, self.modules[path], entry)
        for name, spec in self.description.tensors.items():
            _must_be_attributes(type(self.tensor(name)), spec.get("attributes", {}))
            for attribute, value in spec.get("attributes", {}).items():
                vars(self.tensor(name))[attribute] = self.value(value)
        return self.modules[""]

    def _construct(self, path: str, entry: Mapping[str, Any]) -> None:
        """Let a constructor make a module, and give it the tensors."""
        kind = self.classes[path]
        if not names.is_constructed(kind):
            raise NameRefusedError(
                f"{entry['class']} is no class whose constructor a file may call: those derive from torchrecycle's "
                "Encoder or EncoderHead, and have a get_config_dict"
            )
        with torch.random.fork_rng(devices=[]):
            module = kind(**{name: self.value(value) for name, value in entry["config"].items()})
        self.modules |= {join(path, name): each for name, each in module.named_modules()}
        for what in ("parameters", "buffers"):
            made = dict(getattr(module, f"named_{what}")(remove_duplicate=False))
            told = entry[what]
            if made.keys() != told.keys():
                raise RebuildError(_other_tensors(path, kind, made.keys() - told.keys(), told.keys() - made.keys()))
            for name, tensor in made.items():
                self._give(module, what, name, tensor, told[name])
        for name, training in entry["training"].items():
            module.get_submodule(name).training = training

    def _give(self, module: nn.Module, what: str, name: str, made: Tensor, key: str) -> None:
        given = self.given[key]
        if made.shape != given.shape or made.dtype != given.dtype:
            raise RebuildError(
                f"{type(module).__name__} makes {name} of shape {list(made.shape)} ({dtype_name(made.dtype)}), and "
                f"what was saved is {list(given.shape)} ({dtype_name(given.dtype)}): its class has changed since"
            )
        owner, _, last = name.rpartition(".")
        if key in self.tensors:  # tied to what another module holds
            getattr(module.get_submodule(owner), f"_{what}")[last] = self.tensors[key]
            return
        with torch.no_grad():
            made.copy_(given)
        made.requires_grad_(self.description.tensors[key].get("trained", False))
        self.tensors[key] = made

    def _fill(self, module: nn.Module, entry: Mapping[str, Any]) -> None:
        state = vars(module)
        state["training"] = entry["training"]
        for what in ("parameters", "buffers"):
            for name, key in entry.get(what, {}).items():
                state[f"_{what}"][name] = None if key is None else self.tensor(key)
        state["_non_persistent_buffers_set"].update(entry.get("not persistent", ()))
        for name, path in entry.get("children", {}).items():
            state["_modules"][name] = None if path is None else self.modules[path]

    def _set_attributes(self, path: str, module: nn.Module, entry: Mapping[str, Any]) -> None:
        told = entry.get("attributes", {})
        _must_be_attributes(type(module), {n: node for n, node in told.items() if not is_own_forward(n, node, path)})
        attributes = {name: self.value(value) for name, value in told.items()}
        module.__setstate__({**vars(module), **attributes})
        for kind, hooks in entry.get("hooks", {}).items():
            if kind not in STATE_HOOKS:
                raise NameRefusedError(f"{kind} is no hook on a state dict, and no other is read from a file")
            for hook in hooks:
                _register(module, kind, self._method(*hook["method"]), hook["with module"])
        if "parametrized" in entry:
            parametrize._inject_new_class(module)
            for name in entry["parametrized"]:
                if inspect.getattr_static(self.classes[path], name, None) is not None:
                    raise NameRefusedError(
                        f"{name} of {entry['class']} is no parameter: its class has one of that name"
                    )
                parametrize._inject_property(module, name)

    def tensor(self, key: str) -> Tensor:
        """A tensor by name: always the same object, so that what was tied is tied."""
        if key not in self.tensors:
            spec = self.description.tensors[key]
            same = spec.get("same")
            value = self.given[key] if same is None else self.tensor(same).detach()
            trained = spec.get("trained", False)
            parameter = spec.get("parameter", False)
            self.tensors[key] = nn.Parameter(value, trained) if parameter else value.requires_grad_(trained)
        return self.tensors[key]

    # -- values

    def value(self, node: Any, number: int | None = None) -> Any:
        """What a node stands for; `number` is its place in the table of what several hold."""
        if isinstance(node, list):
            out: list[Any] = self._remember(number, [])
            out += [self.value(each) for each in node]
            return out
        if not isinstance(node, dict):
            return node
        tag = next(iter(node), "")
        if not tag.startswith("$"):
            found: dict[str, Any] = self._remember(number, {})
            found |= {key: self.value(each) for key, each in node.items()}
            return found
        if len(node) != 1 or tag not in _READ:
            raise NameRefusedError(f"{', '.join(node)} is no kind of value that this version reads")
        return _READ[tag](self, node[tag], number)

    def _remember(self, number: int | None, value: Any) -> Any:
        if number is not None:
            self._shared[number] = value
        return value

    def _from_table(self, index: int, number: int | None) -> Any:
        if index not in self._shared:
            value = self.value(self.description.shared[index], index)
            self._shared[index] = value
        return self._shared[index]

    def _dict(self, pairs: Any, number: int | None, kind: Callable[[], Any]) -> Any:
        out = self._remember(number, kind())
        for key, each in pairs:
            out[self.value(key)] = self.value(each)
        return out

    def _class(self, name: str) -> type:
        found = names.find(name)
        if not names.may_name_class(found, self.packages):
            raise NameRefusedError(f"{name} is no class of modules or plain values")
        return found

    def _function(self, name: str) -> Any:
        found = names.find(name)
        if not names.may_name_function(name, found, self.packages):
            raise NameRefusedError(f"{name} is no function that a saved model may name")
        return found

    def _partial(self, inner: Any) -> Any:
        (name,) = inner[0].values()
        func = names.find(name)
        if not names.may_be_partial(name, func):
            raise NameRefusedError(f"{name} is no layer or function that a saved model may give arguments")
        args, keywords = self.value(inner[1]), self.value(inner[2])
        if not names.may_be_argument([args, keywords]):
            raise NameRefusedError(f"{name} is given what a file may not give to a layer or function")
        return functools.partial(func, *args, **keywords)

    def _method(self, path: str, name: str) -> types.MethodType:
        module = self.modules[path]
        # Not looked up on the module: a property of that name would be called.
        found = None if name.startswith("__") else inspect.getattr_static(type(module), name, None)
        if not isinstance(found, types.FunctionType):
            raise NameRefusedError(f"{name} is no method of {path or 'the module'}")
        return types.MethodType(found, module)

    def _enum(self, inner: Any) -> enum.Enum:
        kind = names.find(inner[0])
        if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
            raise NameRefusedError(f"{inner[0]} is no enum")
        return kind[inner[1]]

    def _namedtuple(self, inner: Any) -> Any:
        kind = names.find(inner[0])
        if not isinstance(kind, type) or not issubclass(kind, tuple) or not hasattr(kind, "_fields"):
            raise NameRefusedError(f"{inner[0]} is no named tuple")
        return tuple.__new__(kind, [self.value(each) for each in inner[1]])

    def _object(self, inner: Any, number: int | None) -> Any:
        kind = names.find(inner[0])
        if not isinstance(kind, type) or not names.is_plain(kind, self.packages):
            raise NameRefusedError(f"{inner[0]} is no class of plain values")
        out = self._remember(number, object.__new__(kind))
        slots = {slot for base in kind.__mro__ for slot in slots_of(base)}
        for name, value in inner[1].items():
            if name in slots:
                object.__setattr__(out, name, self.value(value))
            else:
                vars(out)[name] = self.value(value)
        return out

    def _pretrained_of(self, index: int) -> Any:
        if index not in self._pretrained:
            name = self.description.pretrained[index]
            kind = names.find(name)
            if not isinstance(kind, type) or not names.is_pretrained(kind):
                raise NameRefusedError(f"{name} is no tokenizer or processor of transformers")
            self._pretrained[index] = self.load_pretrained(index, kind)
        return self._pretrained[index]


_READ: dict[str, Callable[[_Reader, Any, int | None], Any]] = {
    "$shared": _Reader._from_table,
    "$float": lambda reader, inner, number: float(inner),
    "$complex": lambda reader, inner, number: complex(float(inner[0]), float(inner[1])),
    "$bytes": lambda reader, inner, number: bytes.fromhex(inner),
    "$slice": lambda reader, inner, number: slice(*inner),
    "$range": lambda reader, inner, number: range(*inner),
    "$version": lambda reader, inner, number: TorchVersion(inner),
    "$size": lambda reader, inner, number: torch.Size(inner),
    "$dtype": lambda reader, inner, number: _of_torch(inner, torch.dtype),
    "$memory_format": lambda reader, inner, number: _of_torch(inner, torch.memory_format),
    "$layout": lambda reader, inner, number: _of_torch(inner, torch.layout),
    "$device": lambda reader, inner, number: torch.device(inner),
    "$tuple": lambda reader, inner, number: tuple(reader.value(each) for each in inner),
    "$set": lambda reader, inner, number: {reader.value(each) for each in inner},
    "$frozenset": lambda reader, inner, number: frozenset(reader.value(each) for each in inner),
    "$dict": lambda reader, inner, number: reader._dict(inner, number, dict),
    "$ordered": lambda reader, inner, number: reader._dict(inner, number, OrderedDict),
    "$defaultdict": lambda reader, inner, number: reader._dict(
        inner[1], number, lambda: defaultdict(reader.value(inner[0]))
    ),
    "$enum": lambda reader, inner, number: reader._enum(inner),
    "$module": lambda reader, inner, number: reader.modules[inner],
    "$tensor": lambda reader, inner, number: reader.tensor(inner),
    "$array": lambda reader, inner, number: reader.tensor(inner).numpy(),
    "$number": lambda reader, inner, number: np.dtype(inner[0]).type(reader.value(inner[1])),
    "$partial": lambda reader, inner, number: reader._partial(inner),
    "$class": lambda reader, inner, number: reader._class(inner),
    "$function": lambda reader, inner, number: reader._function(inner),
    "$method": lambda reader, inner, number: reader._method(*inner),
    "$path": lambda reader, inner, number: Path(inner),
    "$namedtuple": lambda reader, inner, number: reader._namedtuple(inner),
    "$object": lambda reader, inner, number: reader._object(inner, number),
    "$pretrained": lambda reader, inner, number: reader._pretrained_of(inner),
}


def _of_torch(name: str, kind: type) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, kind):
        raise NameRefusedError(f"torch has no {kind.__name__} {name}")
    return found


def _module_class(name: str) -> type[nn.Module]:
    found = names.find(name)
    if not names.is_layer(found):
        raise NameRefusedError(f"{name} is no class of modules")
    why = names.why_no_module(found)
    if why is not None:
        raise NameRefusedError(f"{name} is a class {why}")
    return found


def _must_be_attributes(kind: type, told: Mapping[str, Any]) -> None:
    """
    Raises:
        NameRefusedError: one of them is what every module has, or stands before a method of the class.
    """
    refused = [name for name in told if name in OWN or names.is_shadow(kind, name)]
    if refused:
        raise NameRefusedError(f"{', '.join(refused)} of {names.name_of(kind)} is no attribute that a file may set")


def _empty(kind: type[nn.Module]) -> nn.Module:
    """An object of a class whose constructor is not called: it has what every module has, and nothing else."""
    why = names.why_own_state(kind)
    if why is not None:
        raise NameRefusedError(why)
    try:
        module: Any = object.__new__(kind)
    except TypeError as error:
        raise NameRefusedError(f"{names.name_of(kind)} has no objects: {error}") from error
    vars(module).update(vars(nn.Module()))
    return module


def _register(module: nn.Module, kind: str, method: types.MethodType, told: bool) -> None:
    register = {
        "_state_dict_hooks": lambda: nn.Module._register_state_dict_hook(module, method),
        "_state_dict_pre_hooks": lambda: nn.Module.register_state_dict_pre_hook(module, method),
        "_load_state_dict_pre_hooks": lambda: nn.Module._register_load_state_dict_pre_hook(
            module, method, with_module=told
        ),
        "_load_state_dict_post_hooks": lambda: nn.Module.register_load_state_dict_post_hook(module, method),
    }
    register[kind]()


def _other_tensors(path: str, kind: type, new: Any, gone: Any) -> str:
    said = [f"has {', '.join(sorted(new))}, which was not saved"] if new else []
    said += [f"lacks {', '.join(sorted(gone))}"] if gone else []
    return f"{shown(path)}, made by {kind.__name__}(**config), {' and '.join(said)}: its class has changed since"
