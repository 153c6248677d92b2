"""Which task is it, and which model? What is finished is kept under the answer, also for the next process.

Of a user's own task: the content of its data sets, its other attributes, and the code of its class. A data set of a
known kind (a list, tensors, a Hugging Face data set, an image folder) is told by its content at once; of any other each
item is read once and hashed, as filling does it: 8,144 photos take a minute, and a photo edited under its old name is
noticed. Of a model, fresh from `build_model`: what `torchrecycle.fingerprint` tells of a prefix (classes, settings,
every weight and buffer, also those that no state dict holds), its configs, which parameters are trained and which are
one, and of the user's own classes their code and whatever else their modules hold: ``self.scale = 50`` is another model
than ``self.scale = 1``, and so is one whose `forward` was edited.

What cannot be told is refused, in words: two tasks taken for one would be a figure of the wrong task.
"""

from __future__ import annotations

import functools
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from torchrecycle.data import identity_of
from torchrecycle.data.state import NoLastingStateError, _is_of_a_library, lasting_state_of
from torchrecycle.errors import KeyTypeError
from torchrecycle.fingerprint import OF_ANY_MODULE, Watch, take_fingerprint
from torchrecycle.fingerprint import _is_of_a_library as _is_a_service
from torchrecycle.keys import key
from torchrecycle.progress import progress
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.task import Split, Task, refuse_the_same
from torchrecycle.trace import random_state, set_random_state

__all__ = ["digest_of", "identity_of_model", "identity_of_task", "seed_everything"]

_SPLITS = ("train", "validation", "test")


def identity_of_task(task: Task) -> str:
    """What tells a task from every other, also in another process: its own word for it, or what it consists of.

    Raises:
        SweepError: it cannot be told, or two of its splits are the same.
    """
    if task.identity is not None:
        return task.identity
    whose = type(task).__name__
    hasher = blake3(_state(type(task), f"the class {whose}").encode())
    own = getattr(type(task), "__recycle_state__", None)
    attributes = getattr(task, "__dict__", {}) if own is None else {"state": own(task)}
    for name, value in sorted(attributes.items()):
        if name not in _SPLITS:
            hasher.update(f"{name} {_state(value, f'{whose}.{name}')};".encode())
    contents = {name: _identity_of_split(split, f"{whose}.{name}") for name, split in task.splits().items()}
    refuse_the_same(contents, whose, "objects, or splits of one name,")
    for name, content in contents.items():
        hasher.update(f"{name} {content};".encode())
    return hasher.hexdigest(length=16)


def digest_of(identity: str) -> str:
    """Of one fixed length, and without words of the user's: 32 hexadecimal digits."""
    return blake3(identity.encode()).hexdigest(length=16)


def _state(value: Any, where: str) -> str:
    try:
        return lasting_state_of(value)
    except NoLastingStateError as error:
        raise SweepError(
            f"{where} cannot be told from another one in the next process ({error}), so that nothing finished could be "
            "kept for it: give the task an `identity` of your own, a text that changes with whatever it depends on"
        ) from error


def _identity_of_split(split: Split, where: str) -> str:
    known = identity_of(split.dataset, split.name)
    return known if known is not None else _identity_of_items(split.dataset, where)


def _identity_of_items(dataset: Any, where: str) -> str:
    """Every item, in order, under generators that are seeded alike each time."""
    hasher, state, index = blake3(), random_state(), 0
    try:
        seed_everything(0)
        with progress(f"reading {where}, to know which data these are", len(dataset), "objects") as shown:
            for index in range(len(dataset)):
                hasher.update(key(dataset[index]))
                shown.advance()
    except KeyTypeError as error:
        raise SweepError(
            f"{where}[{index}] cannot be told from another object ({error}): give Split(dataset, name=...) with a name "
            "that stands for these objects, transforms and targets"
        ) from error
    finally:
        set_random_state(state)
    return hasher.hexdigest(length=16)


def seed_everything(seed: int) -> None:
    """The generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# -- models ------------------------------------------------------------------------------------------------------------


def identity_of_model(model: nn.Module) -> str:
    """A hash of a fresh model, the same in another process: see the head of this module.

    A module whose class has ``__recycle_state__(self)`` is told by that, in place of its code and attributes.

    Raises:
        SweepError: a class, an attribute or a hook of the user's own cannot be told from another one.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise SweepError("build_model gives a TorchScript module, whose code cannot be looked at: give the eager one")
    hasher = blake3(take_fingerprint({"": model}, {}, (), {}, _of_compiling(model) | _places(model)).hex.encode())
    told: dict[type, str] = {}
    for name, module in model.named_modules():
        where = f"the model's {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        hasher.update(f"{name} {_own_state(module, where, told)};".encode())
    for said in (*_configs(model), *_hooks(model), *_parameters(model)):
        hasher.update(f"{len(said)}:{said};".encode())
    return hasher.hexdigest(length=16)


def _of_compiling(model: nn.Module) -> frozenset[tuple[str, str]]:
    """What `torch.compile` puts around a module, as (module, attribute): other objects each time, which change nothing
    of what it gives."""
    around = (each for each in model.named_modules() if type(each[1]).__module__.startswith("torch._dynamo"))
    return frozenset((f".{name}" if name else "", attribute) for name, module in around for attribute in vars(module))


def _places(model: nn.Module) -> frozenset[tuple[str, str]]:
    """Where models of transformers were loaded from, as (module, attribute): a copied folder holds the same model."""
    return frozenset(
        (f".{name}" if name else "", "name_or_path")
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "to_json_string") and "name_or_path" in vars(module)
    )


def _own_state(module: nn.Module, where: str, told: dict[type, str]) -> str:
    """Of what is no library's: the code of a module's class, and what it holds besides tensors and modules.

    Args:
        module: without its children.
        where: what it is called in an error.
        told: of the classes that were met before.
    """
    kind = type(module)
    own = getattr(kind, "__recycle_state__", None)
    if own is not None:
        return _model_state(own(module), where)
    if kind not in told:
        told[kind] = _model_state(kind, f"the class of {where}")
    is_users = not all(_is_of_a_library(base.__module__) for base in kind.__mro__)
    words = [told[kind]]
    for name, value in sorted(vars(module).items()):
        if name not in OF_ANY_MODULE and (_is_users_code(value) if not is_users else not isinstance(value, _ELSEWHERE)):
            words.append(f"{name} {_model_state(value, f'{name} of {where}')}")
    return " ".join(words)


_ELSEWHERE = (torch.Tensor, nn.Module, weakref.ReferenceType)
"""What is told by itself, or only points at something that is."""


def _is_users_code(value: Any) -> bool:
    """Whether it is a function that no library has made: a forward that was put in place of a library's."""
    function = _function_of(value)
    function = _function_of(function.func) if isinstance(function, functools.partial) else function
    return isinstance(function, types.FunctionType) and not _is_of_a_library(function.__globals__.get("__name__"))


def _function_of(value: Any) -> Any:
    """Of a module's method the function: the module is told by itself."""
    return value.__func__ if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module) else value


def _model_state(value: Any, where: str) -> str:
    if _is_a_service(value):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        return lasting_state_of(_function_of(value))
    except NoLastingStateError as error:
        raise SweepError(
            f"{where} cannot be told from another one in the next process ({error}), so that nothing finished could be "
            "kept for this model: keep it out of the model, or give the module's class a method "
            "__recycle_state__(self) that returns what its outputs depend on besides its weights"
        ) from error


def _configs(model: nn.Module) -> Iterator[str]:
    """Of transformers: each config once."""
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_json_string") and id(config) not in seen:
            seen.add(id(config))
            yield config.to_json_string()


def _hooks(model: nn.Module) -> Iterator[str]:
    """The user's own, in their order."""
    for name, hook in Watch({"": model}, ()).users_hooks():
        yield f"hook {name} {_model_state(hook, f'a hook on {name[1:] or type(model).__name__}')}"


def _parameters(model: nn.Module) -> Iterator[str]:
    """Which are trained, and which are one."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"{name} {first.setdefault(id(parameter), name)} {parameter.requires_grad}"
