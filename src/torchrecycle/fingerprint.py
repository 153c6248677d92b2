"""The fingerprint: everything besides the object itself that a kept row depends on.

In this order it holds: the recipe's version; the cut, the kept leaves and the model inputs that make the key; the
precision; autocast; then for each module of the prefix its qualified name and class, its ``extra_repr()``, its plain
attributes (eps, stride: what tells timm's ``efficientnet_lite0`` from ``tf_efficientnet_lite0``, whose class and
weights' names are the same and whose outputs are not), and name, dtype, shape and bytes of every parameter, buffer and
constant that it may read. For a ResNet-34 cut at ``layer3`` that is 33 MB, hashed in some 10 ms.

It does not hold: the suffix and its config, the glue in the forward of the modules around the cut, versions of
libraries. Many heads share one trunk; what else changes the function is found by the probe that lies beside the rows.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from torchrecycle.codec import Layout
from torchrecycle.errors import CutError
from torchrecycle.keys import hash_threads

__all__ = ["FINGERPRINT_VERSION", "OF_ANY_MODULE", "Fingerprint", "Watch", "reset_statistics", "take_fingerprint"]

FINGERPRINT_VERSION = 1

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, enum.Enum)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """128 bits, and the digest of each part, to say what changed."""

    hex: str
    """32 hexadecimal digits: the name of the folder of rows."""
    parts: Mapping[str, str] = field(repr=False)
    """Digest by part: ``settings``, ``layer1.0.conv1`` (class and attributes), ``layer1.0.conv1.weight``."""
    words: Mapping[str, Sequence[str]] = field(repr=False, default_factory=dict)
    """Of parts that can be put into words, the words: ``eps=1e-05``, ``momentum=0.1`` of ``layer1.0.bn1``."""

    def difference(self, other: Fingerprint) -> list[str]:
        """The names of the parts in which two fingerprints differ."""
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        return [name for name in names if self.parts.get(name) != other.parts.get(name)]

    def to_about(self) -> dict[str, Any]:
        """The parts for ``about.json``, from which `torchrecycle.store` tells why one fingerprint is not another.

        Shortened to 64 bits of each digest and 120 letters of each word: 60 KB for a ResNet-50.
        """
        words = {name: "; ".join(map(_shortened, words)) for name, words in self.words.items()}
        return {"parts": {name: digest[:16] for name, digest in self.parts.items()}, "words": words}


_WORD = 120


def _shortened(word: str) -> str:
    return word if len(word) <= _WORD else f"{word[: _WORD - 3]}..."


def take_fingerprint(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, torch.Tensor],
    constants: Sequence[torch.Tensor],
    settings: Mapping[str, Any],
    written: frozenset[tuple[str, str]] = frozenset(),
    known: dict[str, tuple[Any, Any]] | None = None,
) -> Fingerprint:
    """Hash what the rows of one cut depend on.

    Args:
        modules: the outermost modules of the prefix, by qualified name; all below them count.
        parameters: parameters and buffers of the prefix that lie outside of these modules, by name.
        constants: tensors that the prefix reads and that are neither parameter, buffer nor input.
        settings: cut, precision, autocast, key inputs: plain values.
        written: attributes that the forward itself sets, as (module, attribute): a counter of calls is no setting.
        known: descriptions of earlier calls, by name; a module whose attributes are the same objects is not described
            again. Tensors always are: their bytes can change unseen.
    """
    known = {} if known is None else known
    whole = blake3(f"torchrecycle fingerprint {FINGERPRINT_VERSION}".encode())
    parts: dict[str, str] = {}
    words: dict[str, Sequence[str]] = {}

    def add(name: str, digest: str) -> None:
        parts[name] = digest
        whole.update(f"{len(name)}:{name}={digest};".encode())

    add("settings", blake3(repr(sorted(settings.items())).encode()).hexdigest())
    words["settings"] = [f"{name}={value!r}" for name, value in sorted(settings.items())]
    for name, module in _all_modules(modules):
        own = {attribute: v for attribute, v in module.__dict__.items() if (name, attribute) not in written}
        part = f"{name} ({type(module).__name__})"
        digest, words[part] = _known_description(name, module, own, known)
        add(part, digest)
        for tensor_name, tensor in _own_tensors(module, own):
            add(f"{name}.{tensor_name}", tensor_digest(tensor))
    for name, parameter in parameters.items():
        add(name, tensor_digest(parameter))
    for number, constant in enumerate(constants):
        add(f"constant {number}", tensor_digest(constant))
    return Fingerprint(whole.hexdigest(length=16), parts, words)


def settings_of(
    cut: str,
    layouts: Sequence[Layout],
    *,
    precision: str | None,
    autocast: torch.dtype | None,
    inputs: Sequence[str],
    padding: str,
    key: str = "",
) -> dict[str, Any]:
    """What of a recycling's settings enters its fingerprint."""
    leaves = [
        (
            lay.dims,
            lay.batch_dim,
            lay.ragged_dims,
            lay.ragged_by,
            lay.per_object,
            lay.fill,
            lay.order,
            lay.shape,
            str(lay.dtype),
            str(lay.kept),
        )
        for lay in layouts
    ]
    return {
        "cut": cut,
        "leaves": leaves,
        "precision": precision,
        "autocast": str(autocast),
        "inputs": sorted(inputs),
        "padding": padding,
        "key": key,
    }


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and bytes."""
    inner = _inner_tensors(tensor)
    if inner is not None:
        return blake3(f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}: {inner}".encode()).hexdigest()
    value = tensor.detach()
    if value.layout is not torch.strided or value.is_quantized:
        value = value.to_dense() if value.layout is not torch.strided else value.int_repr()
    flat = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    hasher = blake3(max_threads=hash_threads() if data.nbytes > 1 << 20 else 1)
    hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
    hasher.update(data)  # pyright: ignore (an array is a buffer)
    return hasher.hexdigest()


def _inner_tensors(tensor: torch.Tensor) -> str | None:
    """Of a tensor that wraps others (int8 weights with their scales), their digests; None if it wraps none.

    Raises:
        CutError: its bytes are not at hand.
    """
    if tensor.device.type == "meta":
        raise CutError(
            "the frozen weights are not there (device meta): they were offloaded or not loaded yet. Attach and fill "
            "while the model has its weights."
        )
    kind = type(tensor.data)
    if kind is torch.Tensor:
        return None
    if any(k.__name__ == "DTensor" for k in kind.__mro__):
        raise CutError(
            "fully_shard (FSDP2) has sharded frozen weights, so that no process has all of their bytes. Shard each "
            "module after the cut by itself, and neither the model nor what lies before the cut."
        )
    flatten = getattr(tensor.data, "__tensor_flatten__", None)
    if flatten is None:
        raise CutError(
            f"a frozen weight is a {kind.__module__}.{kind.__qualname__}, whose bytes cannot be looked at, so that a "
            "change would go unnoticed. Cut before it, or convert it to a plain tensor."
        )
    names, context = flatten()
    return f"{[(name, tensor_digest(getattr(tensor.data, name))) for name in names]} {context!r}"


def _all_modules(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    for outer, module in modules.items():
        for inner, part in module.named_modules():
            if part not in seen:
                seen.add(part)
                yield f"{outer}.{inner}" if inner else outer, part


def _own_tensors(module: nn.Module, own: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain tensor attributes of one module, without those of its children."""
    for table in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in table.items() if tensor is not None)
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            yield name, value


OF_ANY_MODULE = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "_is_hf_initialized"}
"""The attributes that are no setting of a module's own."""


_FIXED = (*_PLAIN, type, types.BuiltinFunctionType, torch.Tensor, nn.Module)
"""What cannot change without being another object; tensors and modules are looked at by themselves."""


def _known_description(
    name: str, module: nn.Module, own: Mapping[str, Any], known: dict[str, tuple[Any, Any]]
) -> tuple[str, Sequence[str]]:
    """A module's description, its digest and its lines; from memory, if its attributes are the very same objects."""
    kind = module.__class__
    values = [kind, kind.forward, *(value for attribute, value in own.items() if attribute not in OF_ANY_MODULE)]
    if not all(isinstance(value, _FIXED) for value in values[2:]):  # may be written in place
        return _digested(_describe(module, own))
    place = f"{name} "
    before = known[place][0] if place in known else ()
    if len(before) != len(values) or any(a is not b for a, b in zip(before, values, strict=True)):
        known[place] = (values, _digested(_describe(module, own)))
    return known[place][1]


def _digested(description: str) -> tuple[str, Sequence[str]]:
    return blake3(description.encode()).hexdigest(), description.split("\n")


def _describe(module: nn.Module, own: Mapping[str, Any]) -> str:
    """Class, ``extra_repr`` and plain attributes, in words."""
    kind = type(module)
    lines = [f"{kind.__module__}.{kind.__qualname__}", module.extra_repr()]
    if not isinstance(kind.forward, types.FunctionType) or kind.forward.__name__ != "forward":
        lines.append(f"forward is {_plain(kind.forward)}")  # patched from outside
    for name, value in sorted(own.items()):
        if name not in OF_ANY_MODULE and name not in _WITHOUT_EFFECT and (plain := _plain(value)) is not None:
            lines.append(f"{name}={plain}")
    return "\n".join(lines)


def _plain(value: Any, depth: int = 0) -> str | None:
    """A setting in words; None for what is none."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if depth > 4 or isinstance(value, (torch.Tensor, nn.Module, types.ModuleType)):
        return None
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _function(value, depth)
    if isinstance(value, (tuple, list)):
        parts = [_plain(part, depth + 1) for part in value]
    elif isinstance(value, (set, frozenset)):
        parts = sorted(str(_plain(part, depth + 1)) for part in value)
    elif isinstance(value, dict):
        parts = [_plain(part, depth + 1) for pair in value.items() for part in pair]
    elif hasattr(value, "__dict__") and not _is_of_a_library(value):
        parts = [_plain(part, depth + 1) for pair in sorted(vars(value).items()) for part in pair]
    else:
        return None
    return f"{type(value).__name__}({', '.join(map(str, parts))})"


def _function(value: Any, depth: int) -> str:
    """A function by its name, what it was made with, and, if it is the user's own, its code."""
    if isinstance(value, functools.partial):
        parts = (_plain(part, depth + 1) for part in (value.func, value.args, value.keywords))
        return f"partial({', '.join(map(str, parts))})"
    function = value.__func__ if isinstance(value, types.MethodType) else value
    if not isinstance(function, types.FunctionType):
        named = (
            f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        )
        return f"{named} {_plain(function, depth + 1)}" if isinstance(function, functools.partial) else named
    words = [f"{function.__module__}.{function.__qualname__}"]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            words.append(str(_plain(cell.cell_contents, depth + 1)))
    words.append(str(_plain(function.__defaults__ or (), depth + 1)))
    if function.__module__.partition(".")[0] not in _LIBRARIES:
        words.append(_code(function.__code__, depth))
    return " ".join(words)


def _code(code: types.CodeType, depth: int) -> str:
    """What a function does: its steps, the names that they look up (``relu``, ``tanh``), what is written in it."""
    constants = (
        _code(const, depth) if isinstance(const, types.CodeType) else _plain(const, depth + 1)
        for const in code.co_consts
    )
    return f"{blake3(code.co_code).hexdigest(length=8)} {code.co_names} {[str(constant) for constant in constants]}"


_LIBRARIES = frozenset(
    {"torch", "transformers", "timm", "torchvision", "diffusers", "sentence_transformers", "accelerate"}
)
"""Whose upgrade is found by the probe, and whose objects are configs and services, no settings of one layer."""


def _is_of_a_library(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _LIBRARIES


_WITHOUT_EFFECT = frozenset({"gradient_checkpointing", "_gradient_checkpointing_func"})
"""Attributes that change what is remembered for backward, and no value."""

_HOOKING_LIBRARIES = frozenset({"torch", "transformers", "accelerate", "peft"})
"""Their hooks serve the forward that they belong to: weight norm, outputs that are recorded, moves between devices."""


# -- while attached ----------------------------------------------------------------------------------------------------


_VERSION, _DTYPE = operator.attrgetter("_version"), operator.attrgetter("dtype")
_WITH_STORAGE = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
"""Wrappers of other tensors (int8 weights) have none of their own; their bytes are hashed at each iteration."""


def reset_statistics(modules: Mapping[str, nn.Module], changed: Sequence[str]) -> str:
    """The name of a batch norm whose running statistics were set to 0 and 1; empty if there is none.

    Args:
        modules: those of the prefix, by name.
        changed: the parts of the fingerprint that are not what they were.
    """
    for name, module in _all_modules(modules):
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not isinstance(mean, torch.Tensor) or not isinstance(variance, torch.Tensor):
            continue
        moved = not {f"{name}.running_mean", f"{name}.running_var"}.isdisjoint(changed)
        if moved and not bool(mean.any()) and bool((variance == 1).all()):
            return name
    return ""


class Watch:
    """A cheap look at whether the prefix has moved: identity, version, dtype and place of each of its
    tensors, and the number of its hooks.

    A write through ``p.data`` or NumPy moves none of these; for that the bytes are hashed at every iteration.

    Args:
        modules: the outermost modules of the prefix.
        loose: parameters and buffers of the prefix outside of them, as (table of a module, name in it).
    """

    def __init__(self, modules: Mapping[str, nn.Module], loose: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        named = list(_all_modules(modules))
        parts = [module for _, module in named]
        self._named = named
        self._tables = [table for part in parts for table in (part._parameters, part._buffers) if table]
        self._children = [part._modules for part in parts if part._modules]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._loose = list(loose)
        self.renew()

    def _objects(self) -> list[Any]:
        """The tensors and the modules, held, so that no other gets the address of one that is gone."""
        tensors = [t for table in self._tables for t in table.values() if t is not None]
        tensors += [t for table, name in self._loose if (t := table.get(name)) is not None]
        self._tensors = tensors
        return tensors + [child for table in self._children for child in table.values()]

    @staticmethod
    def global_hooks() -> int:
        """Hooks that fire for every module of the process, those of a frozen layer included."""
        hooks = nn.modules.module
        return len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks)

    def _look(self, stored: Sequence[torch.Tensor]) -> list[Any]:
        """Of the tensors, what a write or a move changes."""
        return [
            *map(_VERSION, self._tensors),
            *map(_DTYPE, self._tensors),
            *map(torch.Tensor.data_ptr, stored),
            *self.hooks(),
        ]

    def hooks(self) -> list[int]:
        """The forward hooks on the prefix, by number: one that changes what a module gives changes the rows."""
        return [number for hooks in self._hooks for number in hooks] + [self.global_hooks()]

    def users_hooks(self) -> Iterator[tuple[str, Any]]:
        """The hooks of the user's own on the prefix, each with the name of its module: they do not fire on a hit."""
        for name, module in self._named:
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                for hook in getattr(module, kind).values():
                    function = getattr(hook, "func", hook)
                    origin = getattr(function, "__module__", None) or type(function).__module__
                    if origin.partition(".")[0] not in _HOOKING_LIBRARIES:
                        yield name, hook

    def moved(self) -> bool:
        """Whether any tensor was replaced, written or moved since the last `renew`."""
        now = self._objects()
        if len(now) != len(self._held) or not all(map(operator.is_, now, self._held)):
            return True
        return self._look(self._stored) != self._seen

    def renew(self) -> None:
        """Take the present state as the one to compare with."""
        self._held = self._objects()
        self._stored = [tensor for tensor in self._tensors if type(tensor) in _WITH_STORAGE]
        self._seen = self._look(self._stored)
