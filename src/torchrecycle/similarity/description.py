"""A module -> a description of values that JSON knows, and the tensors that it names. The inverse is `rebuild`.

A `SequentialHead` of three blocks of a ResNet-34, pooling and a `SkipConnectionHead` is 31 modules: of each the
description holds class, attributes and children, and the names of its tensors, 18 KB in all. What `rebuild` makes of it
is a module of the same classes that gives the same outputs to the bit. No pickle, and no constructor is called: what
it was given (a function, an open file, a path that was valid there) is not known any more when a module is saved.

So a module comes back as it does from `copy.deepcopy`: an empty object of its class, whose attributes are set. A head,
or an encoder that has a ``get_config_dict``, is made by its constructor instead, if that gives the same module: then
its inside may change in a later version, and what is saved stays readable.

Values are written as they are if JSON knows them (None, bool, int, finite float, str, list, dict with plain keys), and
as ``{"$tuple": [...]}``, ``{"$dtype": "float32"}``, ``{"$module": "layers.0"}`` if not. What is held in several places,
as the config that all layers of a transformer share, is written once, under "shared".

What cannot be written is an error that names the attribute. Hooks that take part in the forward are refused as well:
they are functions that no name leads to, and without them the outputs would be others. Hooks that translate old
checkpoints are written if they are methods of the module, and else left out with a warning.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import math
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.torch_version import TorchVersion
from torch.utils.hooks import RemovableHandle

from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.similarity import names
from torchrecycle.similarity.names import NameRefusedError

__all__ = [
    "Description",
    "DescriptionError",
    "describe",
    "describe_values",
    "is_dense",
    "must_be_without_hooks",
    "slots_of",
]


class DescriptionError(RecycleError, TypeError):
    """A module holds something that cannot be written without pickle. The message names it, and the way out."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a module is, apart from the bytes of its tensors."""

    modules: dict[str, dict[str, Any]]
    """By path, ``""`` first: class, attributes, children, names of tensors."""
    tensors: dict[str, dict[str, Any]]
    """By name: shape, dtype, whether it is a parameter and trained."""
    shared: list[Any] = field(default_factory=list)
    """Values that are held in several places."""
    pretrained: list[str] = field(default_factory=list)
    """Classes of tokenizers and processors, which are written beside the description."""


def describe(module: nn.Module) -> tuple[Description, dict[str, Tensor], list[Any]]:
    """What a module is, its tensors by name, and the tokenizers and processors that it holds.

    The tensors are the module's own: on its device, and not copied.

    Raises:
        DescriptionError: it holds something that cannot be written.
    """
    writer = _Writer(module)
    shared = _Shared()
    body = shared.body({"modules": writer.write(), "tensors": writer.specs})
    if writer.only_here:
        _warn(writer.only_here)
    kinds = [names.name_of(type(each)) for each in writer.pretrained]
    return Description(**body, shared=shared.table, pretrained=kinds), writer.tensors, writer.pretrained


def describe_values(values: Mapping[str, Any], owner: type) -> tuple[dict[str, Any], list[Any]]:
    """Attributes of an object of a class, as values that JSON knows, and the table of what several hold.

    Raises:
        DescriptionError: one cannot be written, or is a module, a tensor or a tokenizer, or stands before a method.
    """
    writer = _Writer(nn.Module(), by_config=False)
    writer.packages, writer._owner = {names.package_of(owner)}, owner.__name__
    found: dict[str, Any] = {}
    for name, value in values.items():
        if names.is_shadow(owner, name):
            raise writer._refused(value, name, _before_a_method(owner, name))
        found[name] = writer.value(value, name)
        if writer.tensors or writer.pretrained or len(writer.queue) > 1:
            raise writer._refused(value, name, "beside its parts, only plain values are written: make it part of one")
    if writer.only_here:
        _warn(writer.only_here)
    shared = _Shared()
    return shared.body(found), shared.table


def _warn(only_here: Mapping[str, str]) -> None:
    said = "; ".join(f"{name} {why}" for name, why in only_here.items())
    warnings.warn(
        f"this model can be loaded in this process only: {said}. Move it to the top of a module that can be imported, "
        "and save again",
        RecycleWarning,
        stacklevel=2,
    )


# -- writing -----------------------------------------------------------------------------------------------------------

OWN = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
"""What every module has, and what is written apart from the attributes."""
_RUN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Writer:
    """Writes the modules of one tree.

    Args:
        root: the outermost module.
        by_config: whether classes with a ``get_config_dict`` are made by their constructor.
    """

    def __init__(self, root: nn.Module, *, by_config: bool = True) -> None:
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.queue = list(root.named_modules())
        self.by_config = by_config
        self.packages = {names.package_of(_class_of(module)) for _, module in self.queue}
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[str, dict[str, Any]] = {}
        self.pretrained: list[Any] = []
        self.only_here: dict[str, str] = {}
        self._names_of_tensors: dict[int, str] = {}
        self._places: dict[tuple[Any, ...], str] = {}
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._owner = ""

    def write(self) -> dict[str, dict[str, Any]]:
        for path, module in self.queue:
            _must_be_plain_module(path, module)
            # First, so that a tensor has the name that it has in the state dict, whoever else holds it.
            self._own_tensors(path, module._parameters)
            self._own_tensors(path, module._buffers)
        written: dict[str, dict[str, Any]] = {}
        inside: list[str] = []
        for path, module in self.queue:  # grows while modules outside of the registry are found
            if any(path.startswith(prefix) for prefix in inside):
                continue
            self._owner = type(module).__name__
            entry = self._by_config(path, module) if self.by_config else None
            if entry is not None:
                inside.append(f"{path}." if path else "")
            written[path] = self._by_parts(path, module) if entry is None else entry
        return written

    def _by_parts(self, path: str, module: nn.Module) -> dict[str, Any]:
        why = names.why_own_state(type(module))
        if why is not None:
            raise DescriptionError(
                f"cannot save {shown(path)}: {why}. Give the encoder or head that it is part of a get_config_dict() "
                "that returns the arguments of its constructor, or a save(path) and load(path) of its own"
            )
        entry: dict[str, Any] = {"class": self._class_name(_class_of(module), path), "training": module.training}
        entry |= self._hooks(path, module)
        if parametrize.is_parametrized(module):
            entry["parametrized"] = list(module.parametrizations)  # pyright: ignore[reportArgumentType]
        entry["attributes"] = {
            name: self._attribute(path, module, name, value) for name, value in _state(path, module) if name not in OWN
        }
        entry["parameters"] = self._own_tensors(path, module._parameters)
        entry["buffers"] = self._own_tensors(path, module._buffers)
        entry["not persistent"] = sorted(module._non_persistent_buffers_set)
        entry["children"] = {n: None if m is None else self.paths[id(m)] for n, m in module._modules.items()}
        empty = ("attributes", "parameters", "buffers", "not persistent", "children")
        return {key: value for key, value in entry.items() if value or key not in empty}

    def _attribute(self, path: str, module: nn.Module, name: str, value: Any) -> Any:
        node, kind = self.value(value, join(path, name)), _class_of(module)
        if names.is_shadow(kind, name) and not is_own_forward(name, node, path):
            raise self._refused(value, join(path, name), _before_a_method(kind, name))
        return node

    def _own_tensors(self, path: str, own: Mapping[str, Tensor | None]) -> dict[str, str | None]:
        return {n: None if t is None else self.tensor(t, join(path, n)) for n, t in own.items()}

    def _hooks(self, path: str, module: nn.Module) -> dict[str, Any]:
        """
        Raises:
            DescriptionError: there are hooks that take part in the forward, or that change the state dict.
        """
        must_be_without_hooks(path, module)
        found = {kind: [*self._state_hooks(path, module, kind)] for kind in STATE_HOOKS}
        found = {kind: hooks for kind, hooks in found.items() if hooks}
        return {"hooks": found} if found else {}

    def _state_hooks(self, path: str, module: nn.Module, kind: str) -> Iterator[dict[str, Any]]:
        for wrapped in getattr(module, kind).values():
            hook = getattr(wrapped, "hook", wrapped)
            if isinstance(hook, types.MethodType) and id(hook.__self__) in self.paths:
                told = bool(getattr(wrapped, "with_module", False))
                yield {"method": self._method(hook, f"{shown(path)}.{kind}")["$method"], "with module": told}
            elif kind.startswith("_state_dict"):
                raise DescriptionError(
                    f"{shown(path)} has a hook that changes its state dict, {_title(hook)}, which no name leads to: "
                    f"make it a method of {type(module).__name__}, or take it off"
                )
            elif getattr(hook, "__module__", None) != "torch.nn.utils.parametrizations":  # which names old checkpoints
                warnings.warn(
                    f"{shown(path)} has a hook that looks at state dicts which are loaded, {_title(hook)}. It is not "
                    f"saved, since no name leads to it: the loaded model may not know old checkpoints. Make it a "
                    f"method of {type(module).__name__}",
                    RecycleWarning,
                    stacklevel=2,
                )

    # -- by the constructor

    def _by_config(self, path: str, module: nn.Module) -> dict[str, Any] | None:
        """The entry of a module that its constructor makes again, children included; None if it does not."""
        if not names.is_constructed(type(module)):
            return None
        inside = dict(module.named_modules(remove_duplicate=False))
        if any(self.paths[id(each)] != join(path, name) for name, each in inside.items()):
            return None  # held elsewhere as well
        config: Any = module.get_config_dict()  # pyright: ignore[reportCallIssue]
        if not isinstance(config, Mapping):
            raise DescriptionError(f"get_config_dict() of {type(module).__name__} gives {config!r}, and no dict")
        written = self._config(config, shown(path))
        why = "it holds a module, a tensor or a tokenizer" if written is None else _why_not_made(module, config)
        if why is not None:
            try:
                _Writer(module, by_config=False).write()
            except DescriptionError as error:
                raise DescriptionError(
                    f"{type(module).__name__}(**get_config_dict()) does not give {shown(path)} again ({why}): let it "
                    f"return all arguments of the constructor. Nor can it be written part by part: {error}"
                ) from error
            return None
        return {
            "class": self._class_name(type(module), path),
            "config": written,
            "training": {name: each.training for name, each in inside.items()},
            "parameters": self._inner_tensors(path, module.named_parameters(remove_duplicate=False)),
            "buffers": self._inner_tensors(path, module.named_buffers(remove_duplicate=False)),
        }

    def _config(self, config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """A constructor's arguments; None if they hold modules or tensors, which are not there when it is called."""
        other = _Writer(nn.Module(), by_config=False)
        other.packages, other._owner, other.only_here = self.packages, self._owner, self.only_here
        written = {name: other.value(each, f"{where}.get_config_dict()[{name!r}]") for name, each in config.items()}
        return None if other.tensors or other.pretrained or len(other.queue) > 1 else written

    def _inner_tensors(self, path: str, found: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
        return {name: self.tensor(tensor, join(path, name)) for name, tensor in found}

    # -- values

    def value(self, value: Any, where: str) -> Any:
        """What stands for a value in JSON.

        Raises:
            DescriptionError: nothing does.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if id(value) in self._memo:
            return self._memo[id(value)]
        plain = _SIMPLE.get(kind)
        if plain is not None:
            return plain(value)
        if kind in (list, dict, OrderedDict, defaultdict):
            return self._container(value, where)
        if kind in (tuple, set, frozenset):
            inner = [self.value(each, f"{where}[{i}]") for i, each in enumerate(value)]
            return {f"${kind.__name__}": inner if kind is tuple else sorted(inner, key=json.dumps)}
        return self._other(value, where)

    def _remember(self, value: Any, node: Any) -> Any:
        self._kept.append(value)  # else another value could come to lie at the same address
        self._memo[id(value)] = node
        return node

    def _container(self, value: Any, where: str) -> Any:
        if type(value) is list:
            node: Any = self._remember(value, [])
            node += [self.value(each, f"{where}[{i}]") for i, each in enumerate(value)]
            return node
        node = self._remember(value, {})
        pairs = [
            [self.value(key, f"{where} (a key)"), self.value(each, f"{where}[{key!r}]")] for key, each in value.items()
        ]
        if type(value) is dict and all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            node |= {key: each for key, each in pairs}
        elif type(value) is defaultdict:
            node |= {"$defaultdict": [self.value(value.default_factory, f"{where}.default_factory"), pairs]}
        else:
            node |= {"$dict" if type(value) is dict else "$ordered": pairs}
        return node

    def _other(self, value: Any, where: str) -> Any:
        if isinstance(value, enum.Enum):
            if value.name is None or type(value).__members__.get(value.name) is not value:
                raise self._refused(value, where, "a combination of enum members has no name")
            return {"$enum": [self._named(type(value), where), value.name]}
        if isinstance(value, nn.Module):
            return {"$module": self._module(value, where)}
        if isinstance(value, Tensor):
            return {"$tensor": self.tensor(value, where)}
        if isinstance(value, np.ndarray) and type(value) is np.ndarray and value.dtype != object:
            return {"$array": self._array(value, where)}
        if isinstance(value, (np.bool_, np.number)):
            return {"$number": [value.dtype.name, self.value(value.item(), where)]}
        if isinstance(value, functools.partial):
            return self._partial(value, where)
        if isinstance(value, type):
            return {"$class": self._class(value, where)}
        if isinstance(value, types.MethodType):
            return self._method(value, where)
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            return {"$function": self._function(value, where)}
        if isinstance(value, PurePath):
            return {"$path": str(value)}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields: Any = getattr(value, "_fields")  # noqa: B009
            inner = [self.value(each, f"{where}.{name}") for name, each in zip(fields, value, strict=True)]
            return {"$namedtuple": [self._named(type(value), where), inner]}
        return self._object(value, where)

    def _object(self, value: Any, where: str) -> Any:
        kind = type(value)
        if isinstance(value, RemovableHandle):
            why = "it takes a hook off, and hooks are not saved: call its remove() (transformers' "
            raise self._refused(value, where, f"{why}gradient_checkpointing_disable() does)")
        if names.is_pretrained(kind):
            self.pretrained.append(value)
            return self._remember(value, {"$pretrained": len(self.pretrained) - 1})
        if names.is_plain(kind, self.packages) and _has_no_state_of_its_own(kind):
            name = self._named(kind, where)
            node: dict[str, Any] = self._remember(value, {})
            state = {name: self.value(each, f"{where}.{name}") for name, each in _attributes(value)}
            node["$object"] = [name, state]
            return node
        raise self._refused(value, where)

    def _partial(self, value: functools.partial[Any], where: str) -> Any:
        func = value.func
        name = _safe_name(func)
        safe = name is not None and names.may_be_partial(name, func)
        if not safe or not names.may_be_argument([list(value.args), value.keywords]):
            why = "only layers of torch, torchvision and timm and functions of tensors may be given arguments by a file"
            raise self._refused(value, where, why)
        inner = [self.value(list(value.args), f"{where}.args"), self.value(dict(value.keywords), f"{where}.keywords")]
        return {"$partial": [{"$class" if isinstance(func, type) else "$function": name}, *inner]}

    def _class(self, value: type, where: str) -> str:
        if not names.may_name_class(value, self.packages):
            raise self._refused(value, where, "it is no class of modules or plain values")
        return self._named(value, where)

    def _function(self, value: Any, where: str) -> str:
        name = self._named(value, where)
        if not names.may_name_function(name, value, self.packages):
            package = names.package_of(value) or "outside"
            why = (
                f"of {package} only functions of tensors are named by a file"
                if package in names.LARGE
                else f"it comes from {package}, and so does none of the model's own modules"
            )
            raise self._refused(value, where, why)
        return name

    def _method(self, value: types.MethodType, where: str) -> Any:
        owner, name = value.__self__, value.__func__.__name__
        path = self.paths.get(id(owner))
        bound = getattr(owner, name, None) if path is not None and not name.startswith("__") else None
        of_class = inspect.getattr_static(type(owner), name, None) is value.__func__
        if not of_class or not isinstance(bound, types.MethodType):
            raise self._refused(value, where, "only methods of the model's own modules are written")
        return {"$method": [path, name]}

    def _module(self, module: nn.Module, where: str) -> str:
        """The path of a module; of one that no registry holds, as in a plain list, where it was found."""
        if id(module) not in self.paths:
            for path, each in module.named_modules():
                if id(each) not in self.paths:
                    _must_be_plain_module(where, each)
                    self.paths[id(each)] = join(where, path) if path else where
                    self.queue.append((self.paths[id(each)], each))
                    self.packages.add(names.package_of(_class_of(each)))
        return self.paths[id(module)]

    def _named(self, thing: Any, where: str) -> str:
        """The name of a class or function, which is remembered if only this process finds it."""
        try:
            name = names.name_of(thing)
        except NameRefusedError as error:
            raise self._refused(thing, where, "no name leads to it: define it at the top of a module") from error
        why = names.why_only_here(thing)
        if why is not None:
            self.only_here[name] = why
        return name

    def _class_name(self, kind: type, path: str) -> str:
        return self._named(kind, shown(path))

    def _refused(self, value: Any, where: str, why: str = "") -> DescriptionError:
        title = _title(value)
        return DescriptionError(
            f"cannot save {where} of a {self._owner}, {title}{f': {why}' if why else ', without pickle'}. Give the "
            "encoder or head that it is part of a get_config_dict() that returns the arguments of its constructor, or "
            "a save(path) and load(path) of its own"
        )

    # -- tensors

    def tensor(self, tensor: Tensor, where: str) -> str:
        """The name of a tensor; of one that several hold, the first place where it was found.

        Raises:
            DescriptionError: it is of a kind that has no bytes of its own.
        """
        if id(tensor) in self._names_of_tensors:
            return self._names_of_tensors[id(tensor)]
        _must_be_plain_tensor(tensor, where)
        while where in self.tensors:
            where += "'"
        spec: dict[str, Any] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        if isinstance(tensor, nn.Parameter):
            spec["parameter"] = True
        if tensor.requires_grad:
            spec["trained"] = True
        if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
            spec["stride"] = list(tensor.stride())
        same = self._same_memory(tensor, where)
        if same is not None:
            spec["same"] = same
        if tensor.__dict__:
            for name, value in tensor.__dict__.items():
                if names.is_shadow(type(tensor), name):
                    raise self._refused(value, f"{where}.{name}", _before_a_method(type(tensor), name))
            spec["attributes"] = {n: self.value(v, f"{where}.{n}") for n, v in tensor.__dict__.items()}
        self.specs[where] = spec
        self._names_of_tensors[id(tensor)] = where
        self.tensors[where] = tensor
        return where

    def _same_memory(self, tensor: Tensor, where: str) -> str | None:
        """The name of another tensor that is a view of the very same numbers."""
        if not tensor.numel():
            return None
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        found = self._places.setdefault(place, where)
        return None if found == where else found

    def _array(self, value: np.ndarray[Any, Any], where: str) -> str:
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise self._refused(value, where, f"torch has no tensor of {value.dtype}") from error
        self._kept.append(tensor)
        return self.tensor(tensor, where)


_SIMPLE: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: {"$complex": [repr(value.real), repr(value.imag)]},
    bytes: lambda value: {"$bytes": value.hex()},
    slice: lambda value: {"$slice": [value.start, value.stop, value.step]},
    range: lambda value: {"$range": [value.start, value.stop, value.step]},
    TorchVersion: lambda value: {"$version": str(value)},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": dtype_name(value)},
    torch.device: lambda value: {"$device": str(value)},
    torch.memory_format: lambda value: {"$memory_format": str(value).removeprefix("torch.")},
    torch.layout: lambda value: {"$layout": str(value).removeprefix("torch.")},
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def shown(path: str) -> str:
    return f"'{path}'" if path else "the module"


def _title(value: Any) -> str:
    """What a value is, without what it holds, which may be long or secret."""
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return f"a partial of {_title(value.func)}"
    if isinstance(value, types.MethodType):
        return f"the method {value.__qualname__}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return f"the function {value.__module__}.{value.__qualname__}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Its class; of a parametrised module, what it was before."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) and kind.__name__.startswith("Param") else kind


def must_be_without_hooks(path: str, module: nn.Module) -> None:
    """
    Raises:
        DescriptionError: there are hooks that take part in the forward.
    """
    for kind in _RUN_HOOKS:
        for hook in getattr(module, kind).values():
            raise DescriptionError(
                f"{shown(path)} ({type(module).__name__}) has a {kind[1:-1].replace('_', ' ')}, "
                f"{_title(hook)}, and hooks are not saved: the loaded model would give other outputs. Take it off "
                "(`handle.remove()`), or make it part of a forward; torch.nn.utils.weight_norm and spectral_norm "
                "work by hooks, and those of torch.nn.utils.parametrizations do not"
            )


def is_own_forward(name: str, node: Any, path: str) -> bool:
    """Whether an attribute is the forward that a module has chosen among its methods, as timm's FasterNet does."""
    method = node.get("$method") if isinstance(node, dict) else None
    return name == "forward" and isinstance(method, list) and method[:1] == [path]


def _before_a_method(kind: type, name: str) -> str:
    return f"it stands before {kind.__name__}.{name}, and a file may not say what is called in its stead"


def _safe_name(value: Any) -> str | None:
    try:
        return names.name_of(value)
    except (NameRefusedError, AttributeError):
        return None


def _state(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes, as the class itself gives them to pickle: an LSTM leaves out its weak references."""
    own = type(module).__getstate__ is not nn.Module.__getstate__ and not parametrize.is_parametrized(module)
    state = module.__getstate__() if own else vars(module)
    if not isinstance(state, Mapping):
        raise DescriptionError(
            f"cannot save {shown(path)}: __getstate__ of {type(module).__name__} gives {_title(state)}, and a module's "
            "state is a dict. Give it a get_config_dict()"
        )
    return iter(list(state.items()))


def _must_be_plain_module(path: str, module: nn.Module) -> None:
    """
    Raises:
        DescriptionError: it is a wrapper that is made for this process, or of a class that was made for it alone.
    """
    why = names.why_no_module(type(module))
    if why is not None:
        raise DescriptionError(f"cannot save {shown(path)}, a {type(module).__name__}, {why}")


def _must_be_plain_tensor(tensor: Tensor, where: str) -> None:
    """
    Raises:
        DescriptionError: it has no bytes, or others than its numbers.
    """
    kind = type(tensor)
    why = None
    if is_lazy(tensor):
        why = "has no shape yet: run the model once, so that its lazy layers are made"
    elif kind not in (Tensor, nn.Parameter):
        why = f"is a {kind.__module__}.{kind.__qualname__}: only plain tensors and parameters are saved"
    elif tensor.is_meta:
        why = "is on the meta device, and has no numbers: load the weights first"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        why = f"is a tensor of layout {tensor.layout}: only dense ones are saved"
    elif tensor.grad_fn is not None:
        why = "is the result of a computation with gradient: delete it, or keep its .detach()"
    elif tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        why = "has a hook on its gradient, and hooks are not saved: take it off"
    if why is not None:
        raise DescriptionError(f"cannot save the tensor {where}: it {why}")


def _has_no_state_of_its_own(kind: type) -> bool:
    """Whether an object of a class is what its attributes are, and no list or dict as well."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for base in type(value).__mro__:
        yield from ((name, getattr(value, name)) for name in slots_of(base) if hasattr(value, name))
    yield from list(getattr(value, "__dict__", {}).items())


def slots_of(kind: type) -> Sequence[str]:
    """The attributes that objects of a class keep outside of their dict."""
    slots = vars(kind).get("__slots__", ())
    found = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether numbers lie one beside the other, in whatever order of the dimensions: channels last.

    >>> is_dense((2, 3), (3, 1)), is_dense((2, 3), (1, 2)), is_dense((2, 3), (0, 1)), is_dense((2, 3), (6, 2))
    (True, True, False, False)
    """
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


# -- does its constructor make it again? -------------------------------------------------------------------------------


def _why_not_made(module: nn.Module, config: Mapping[str, Any]) -> str | None:
    """Why ``type(module)(**config)`` is not the module but for the numbers in its parameters and buffers; or None."""
    try:
        with torch.random.fork_rng(devices=[]):
            again = type(module)(**config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if type(again) is not type(module) or _outline(again) != _outline(module):
        return "it has other layers, or other sizes"
    first, second = (_Writer(each, by_config=False) for each in (module, again))
    for (path, one), (_, other) in zip(module.named_modules(), again.named_modules(), strict=True):
        before, after = (
            {name: value for name, value in _state(path, each) if name not in OWN} for each in (one, other)
        )
        for name in [*before, *after.keys() - before.keys()]:
            if name not in before or name not in after or not _alike(first, before[name], second, after[name]):
                return f"its {join(path, name)} is another"
    return None


def _outline(module: nn.Module) -> list[Any]:
    layers = [
        (name, type(each), each._non_persistent_buffers_set, [len(vars(each)[kind]) for kind in _RUN_HOOKS])
        for name, each in module.named_modules()
    ]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [*layers, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors)]


def _alike(first: _Writer, before: Any, second: _Writer, after: Any) -> bool:
    """Whether two attributes are the same, as far as one can tell of what cannot be written."""
    try:
        nodes = [writer.value(value, "it") for writer, value in ((first, before), (second, after))]
    except DescriptionError:
        return _alike_unwritten(first, before, second, after)
    shared = [_Shared() for _ in nodes]
    texts = [json.dumps([one.body(node), one.table]) for one, node in zip(shared, nodes, strict=True)]
    return texts[0] == texts[1] and all(
        _equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items() if name.startswith("it")
    )


def _alike_unwritten(first: _Writer, before: Any, second: _Writer, after: Any) -> bool:
    if type(before) is not type(after):
        return False
    if not isinstance(before, types.FunctionType):
        return True
    # Of a lambda the constructor makes a new one: the same code with the same values around it.
    values = [
        (each.__defaults__, each.__kwdefaults__, [cell.cell_contents for cell in each.__closure__ or ()])
        for each in (before, after)
    ]
    return before.__code__ == after.__code__ and _alike(first, values[0], second, values[1])


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())


# -- what several hold -------------------------------------------------------------------------------------------------


class _Shared:
    """Moves the nodes that lie in several places, or in themselves, into a table."""

    def __init__(self) -> None:
        self.table: list[Any] = []
        self._numbers: dict[int, int] = {}

    def body(self, root: Any) -> Any:
        for node in self._several(root):
            self._numbers[id(node)] = len(self.table)
            self.table.append(node)
        self.table = [self._inside(node) for node in self.table]
        return self._inside(root)

    @staticmethod
    def _several(root: Any) -> list[Any]:
        counts: dict[int, int] = {}
        found, stack = [], [root]
        while stack:
            node = stack.pop()
            if not isinstance(node, (list, dict)):
                continue
            counts[id(node)] = counts.get(id(node), 0) + 1
            if counts[id(node)] == 2:
                found.append(node)
            if counts[id(node)] == 1:
                stack += reversed(list(node.values()) if isinstance(node, dict) else node)
        return found

    def _place(self, node: Any) -> Any:
        number = self._numbers.get(id(node)) if isinstance(node, (list, dict)) else None
        return self._inside(node) if number is None else {"$shared": number}

    def _inside(self, node: Any) -> Any:
        if isinstance(node, dict):
            return {key: self._place(each) for key, each in node.items()}
        return [self._place(each) for each in node] if isinstance(node, list) else node
