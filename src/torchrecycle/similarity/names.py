"""Classes and functions by name: what a saved model calls them, and which of them a file may name.

``torchvision.models.resnet:BasicBlock`` is the class of a block, ``torch.nn.functional:gelu`` an activation. A file
comes from somewhere, so what it names is imported and then looked at, and never called because the file says so:

- a module's class must be a subclass of `torch.nn.Module`, and no wrapper that is made for one process;
- a ``__setstate__`` is called only if it is torch's own, of a layer: that of `torch.compile`'s wrapper calls what lies
  in its state;
- an attribute must not stand before a method: ``forward``, or ``to`` of a tensor, which loading calls;
- a function must do nothing but arithmetic (those of `torch.nn.functional`, of ``timm.layers``, of `math`), or be
  defined in a package that one of the model's own modules comes from;
- what is called with arguments that the file gives, a `functools.partial`, must be of the first kind, or a layer of
  torch, torchvision or timm, and so must its arguments: ``partial(torch.hub.load, "somebody/theirs")`` as an activation
  would run their code at the first forward;
- a constructor is called only of a class that derives from one of torchrecycle's and has a ``get_config_dict``: there
  are libraries whose modules have a method of that name, and load what their constructor is told.

Importing runs the top level of a module that is installed here. It is the one thing that a file can cause to run.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional
import torch.utils.checkpoint
from torch import nn

from torchrecycle.errors import RecycleError

__all__ = [
    "LARGE",
    "NameRefusedError",
    "find",
    "is_constructed",
    "is_layer",
    "is_plain",
    "is_pretrained",
    "is_shadow",
    "may_be_argument",
    "may_be_partial",
    "may_name_class",
    "may_name_function",
    "name_of",
    "package_of",
    "why_no_module",
    "why_only_here",
    "why_own_state",
]


class NameRefusedError(RecycleError, ValueError):
    """A name leads nowhere, or to something that a file may not name."""


def package_of(thing: Any) -> str:
    """The first part of the name of the module that a class or function is defined in."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


# -- names -------------------------------------------------------------------------------------------------------------


def name_of(thing: Any) -> str:
    """What `find` finds it by.

    Raises:
        NameRefusedError: under its name lies something else, or nothing: a lambda, a class made by a function.

    >>> name_of(nn.Linear), name_of(torch.nn.functional.gelu), name_of(torch.relu), name_of(max)
    ('torch.nn.modules.linear:Linear', 'torch.nn.functional:gelu', 'torch:relu', 'builtins:max')
    """
    name = f"{thing.__module__}:{thing.__qualname__}"
    if isinstance(thing, type):
        # A class of a function or of a notebook has a name that leads nowhere elsewhere. It is written, with a warning.
        if why_only_here(thing) or _resolved(name) is thing:
            return name
    else:
        found = _function_name(thing) or name
        if _resolved(found) is thing:
            return found
    raise NameRefusedError(f"{name} is not to be found under this name")


_PLACES = ("torch.nn.functional", "torch", "torch.nn.init", "math", "operator", "builtins")
_RENAMED = ("torch.special", "torch.fft", "torch.linalg")


def _function_name(thing: Any) -> str | None:
    """Torch's own functions do not say where they are to be found: `torch.special.erf` is called ``special_erf``."""
    word = thing.__name__
    for place in _PLACES:
        if getattr(sys.modules[place], word, None) is thing:
            return f"{place}:{word}"
    for place in _RENAMED:
        for word, found in vars(sys.modules[place]).items():
            if found is thing:
                return f"{place}:{word}"
    return None


def _resolved(name: str) -> Any:
    try:
        return find(name)
    except NameRefusedError:
        return None


def find(name: str) -> Any:
    """Import what a name names. Through classes only: ``torch.nn:functional.os`` leads nowhere.

    Raises:
        NameRefusedError: there is nothing of that name.
    """
    place, _, words = name.partition(":")
    if not place or not words:
        raise NameRefusedError(f"{name!r} is no name of a class or function, which is like 'torch.nn:Linear'")
    if "<locals>" in words:
        raise NameRefusedError(
            f"{words} of {place} was defined in a function, where no name leads to: define it at the top of a module, "
            "and save again"
        )
    try:
        found: Any = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported, and a script ends
        raise NameRefusedError(f"{place} cannot be imported ({type(error).__name__}: {error})") from error
    for word in words.split("."):
        if isinstance(found, types.ModuleType) and found.__name__ != place:
            raise NameRefusedError(f"{name} leads through another module, {found.__name__}")
        try:
            found = getattr(found, word)
        except Exception as error:
            hint = (
                ": it was defined in the script or notebook that saved it. Move it to the top of a module that can be "
                "imported, and save again"
            )
            raise NameRefusedError(f"{place} has no {words!r}{hint if place == '__main__' else ''}") from error
    return found


def why_only_here(thing: Any) -> str | None:
    """Why another process cannot find a class or function, in words; None if it can."""
    if "<locals>" in getattr(thing, "__qualname__", ""):
        return "is defined in a function"
    return "is defined in the script or notebook that is run" if thing.__module__ == "__main__" else None


# -- what a file may name ----------------------------------------------------------------------------------------------

_ARITHMETIC = {
    "builtins": {"abs", "divmod", "len", "max", "min", "pow", "round", "sorted", "sum"},
    "operator": {
        "add",
        "and_",
        "eq",
        "floordiv",
        "ge",
        "gt",
        "le",
        "lt",
        "matmul",
        "mod",
        "mul",
        "ne",
        "neg",
        "not_",
        "or_",
        "pow",
        "sub",
        "truediv",
        "xor",
    },
    "torch.utils.checkpoint": {"checkpoint"},
}
_ARITHMETIC_ROOMS = (
    "timm.layers",
    "timm.data.auto_augment",
    "torchvision.ops",
    "transformers.activations",
    "transformers.pytorch_utils",
)
_LAYER_ROOMS = ("torch.nn", "torchvision.ops", "torchvision.models", "timm.layers", "timm.models")
LARGE = frozenset({"builtins", "torch", "torchvision", "timm", "transformers"})
"""Packages of which only the functions above may be named: others of theirs load and download."""
_PLAIN_ROOMS = (
    "torchvision.transforms",
    "torchvision.models",
    "torchvision.ops",
    "timm.data",
    "timm.models",
    "timm.layers",
)
_PLAIN_TYPES = (bool, bytes, complex, dict, float, frozenset, int, list, object, set, slice, str, tuple, type(None))


def is_layer(thing: Any) -> bool:
    """Whether it is a class of modules."""
    return isinstance(thing, type) and issubclass(thing, nn.Module)


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def why_no_module(thing: type[nn.Module]) -> str | None:
    """Why modules of a class are not written and not read, in words; None if they are."""
    if issubclass(thing, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return (
            "whose code was made from another module: save that other one, or write it with torch.jit.save or "
            "torch.export.save in a save(path) of the encoder's own"
        )
    for base in thing.__mro__:
        kind = base.__name__
        if base.__module__.startswith("torch.") and kind in (*_WRAPPERS, "FullyShardedDataParallel"):
            inner = f": save what it wraps, `{_WRAPPERS[kind]}`" if kind in _WRAPPERS else ""
            return f"which is made for this process{inner}"
    return None


_STATE_ROOMS = ("torch.nn.modules", "timm.layers")


def why_own_state(thing: type[nn.Module]) -> str | None:
    """Why the ``__setstate__`` of a class is not called with what a file says, in words; None if it is.

    Those of torch's layers add what older versions did not have. Another one may call what lies in its state.
    """
    found: Any = inspect.getattr_static(thing, "__setstate__")
    if isinstance(found, types.FunctionType) and _is_within(found.__module__, _STATE_ROOMS):
        return None
    owner = next((base for base in thing.__mro__ if "__setstate__" in vars(base)), thing)
    if owner is nn.Module:  # also where a library has wrapped it: every module's, and no class's own
        return None
    return f"{owner.__name__} has a __setstate__ of its own, which is not called with what a file says"


_METHODS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    classmethod,
    staticmethod,
    functools.partialmethod,
)


def is_shadow(thing: type, name: str) -> bool:
    """Whether an attribute of an object stands before a method or slot of its class, and is taken in its stead.

    >>> is_shadow(nn.Linear, "forward"), is_shadow(nn.Linear, "in_features"), is_shadow(torch.Tensor, "to")
    (True, False, True)
    """
    return isinstance(inspect.getattr_static(thing, name, None), _METHODS)


def may_name_class(thing: Any, packages: Set[str]) -> bool:
    """Whether an attribute may hold a class: of modules, of tensors, of plain values, or of the model's packages."""
    if not isinstance(thing, type):
        return False
    kinds = (nn.Module, torch.Tensor, torch.autograd.Function, enum.Enum)
    return issubclass(thing, kinds) or thing in _PLAIN_TYPES or is_plain(thing, packages)


def may_name_function(name: str, thing: Any, packages: Set[str]) -> bool:
    """Whether an attribute may hold a function, to be called with what the model computes."""
    if is_arithmetic(name, thing):
        return True
    place = name.partition(":")[0]
    # Only where it is defined: else a module that imports `os.system` would lend its name to it.
    return isinstance(thing, types.FunctionType) and thing.__module__ == place and package_of(thing) in packages - LARGE


def may_be_partial(name: str, thing: Any) -> bool:
    """Whether it may be called with arguments from the file."""
    return is_arithmetic(name, thing) or (is_layer(thing) and _is_within(thing.__module__, _LAYER_ROOMS))


def may_be_argument(value: Any) -> bool:
    """Whether it may be an argument in a partial: what is called in there is as harmless as what calls it."""
    if isinstance(value, functools.partial):
        return may_be_argument([value.func, *value.args, *value.keywords.values()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(may_be_argument, value))
    if isinstance(value, dict):
        return all(map(may_be_argument, [*value, *value.values()]))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        try:
            return may_be_partial(name_of(value), value)
        except NameRefusedError:
            return False
    return not callable(value)


def is_constructed(thing: type) -> bool:
    """Whether a module of a class is made by its constructor, with what its ``get_config_dict`` has said."""
    ours = any(package_of(base) == "torchrecycle" for base in thing.__mro__)
    return ours and is_layer(thing) and callable(getattr(thing, "get_config_dict", None))


def is_arithmetic(name: str, thing: Any) -> bool:
    """Whether it is a function of numbers and tensors, which reads and writes nothing."""
    place, _, word = name.partition(":")
    if place in _ARITHMETIC:
        return word in _ARITHMETIC[place]
    if not isinstance(thing, (types.FunctionType, types.BuiltinFunctionType)):
        return False
    if _is_within(place, _ARITHMETIC_ROOMS):
        return thing.__module__ == place
    if word.startswith("_"):
        return False
    if place == "torch":
        # from_file opens a file, and makes one where there is none
        of_tensors = word != "from_file" and hasattr(getattr(torch._C, "_VariableFunctions"), word)  # noqa: B009
        return of_tensors or thing.__module__ == "torch.functional"
    if place in ("torch.nn.functional", "torch.nn.init"):
        own = (place, "torch._jit_internal") if isinstance(thing, types.FunctionType) else ("torch", "torch._C._nn")
        return thing.__module__ in own
    return place in ("torch.special", "torch.fft", "torch.linalg", "math") and isinstance(
        thing, types.BuiltinFunctionType
    )


def is_plain(thing: type, packages: Set[str]) -> bool:
    """Whether objects of a class are what their attributes are: dataclasses, configs, transforms of images, and what
    is defined with the model and says nothing to pickle."""
    if thing in (argparse.Namespace, types.SimpleNamespace) or _is_within(thing.__module__, _PLAIN_ROOMS):
        return True
    if issubclass(thing, (nn.Module, torch.Tensor)) or package_of(thing) not in packages | LARGE | {"torchrecycle"}:
        return False
    if dataclasses.is_dataclass(thing) or _is_transformers(thing, "PreTrainedConfig", "GenerationConfig"):
        return True
    return package_of(thing) in packages - LARGE and not any(_is_special(base) for base in thing.__mro__)


def _is_special(kind: type) -> bool:
    """Whether a class has a word in how its objects are copied, or does something when they go."""
    words = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__new__", "__del__")
    return kind is not object and (issubclass(kind, type) or any(word in vars(kind) for word in words))


def is_pretrained(thing: type) -> bool:
    """Whether objects of a class are written and read by ``save_pretrained`` and ``from_pretrained``: tokenizers,
    processors of images and sounds."""
    names = ("PreTrainedTokenizerBase", "ImageProcessingMixin", "FeatureExtractionMixin", "ProcessorMixin")
    return _is_transformers(thing, *names)


@functools.lru_cache(maxsize=512)
def _is_transformers(thing: type, *names: str) -> bool:
    return any(base.__module__.startswith("transformers.") and base.__name__ in names for base in thing.__mro__)


def _is_within(place: str, rooms: tuple[str, ...]) -> bool:
    return any(place == room or place.startswith(f"{room}.") for room in rooms)
