"""What `recycle` is called with, and what of it is refused: each in words, before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchrecycle.bypass import Interceptor
from torchrecycle.data.resident import Residency
from torchrecycle.errors import CutError
from torchrecycle.store import Store
from torchrecycle.trace import is_sharded, slot_of

__all__ = ["Options", "refuse_arguments", "refuse_no_function", "refuse_views", "refuse_wrapped"]


def refuse_views(views: Any) -> None:
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"views={views!r} is no number of views: give a whole number from 1 on, such as 4")


def refuse_no_function(augment: Any) -> None:
    if isinstance(augment, type):
        raise TypeError(f"augment={augment.__name__} is a class: give an object of it, such as {augment.__name__}(0.2)")
    if augment is not None and not callable(augment):
        raise TypeError(f"augment={augment!r} is no function of a batch's activations, such as Brightness(0.2)")


def refuse_arguments(
    model: Any, cut: Any, level: Any, store: Any, autocast: Any, inputs: Any, key: Any, verify_every: Any
) -> None:
    """Arguments of a wrong type, each in words."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    names = [cut] if isinstance(cut, str) or cut is None else cut
    if not isinstance(names, (list, tuple)) or not names or not all(n is None or isinstance(n, str) for n in names):
        raise CutError(
            f"cut={cut!r} is neither the name of a module, such as 'layer2', nor a list of names. See cuts(model, "
            "example)."
        )
    if level is not None and (isinstance(level, bool) or not isinstance(level, (int, float))):
        raise CutError(f"level={level!r} is not a number from 0 to 1, such as 0.5")
    if not isinstance(store, (str, os.PathLike, Store)) or not str(store):
        raise TypeError(f"store={store!r} is no place for rows: give a folder, 'memory://name' or a Store")
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast={autocast!r} is no dtype of autocast: give torch.bfloat16, torch.float16 or None")
    for name, function in (("inputs", inputs), ("key", key)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} is no function")
    if isinstance(verify_every, bool) or not isinstance(verify_every, int) or verify_every < 0:
        raise ValueError(f"verify_every={verify_every!r} is no number of batches; 0 for never")


@dataclass(frozen=True, slots=True)
class Options:
    """What `recycle` was called with."""

    example: Any = field(repr=False)
    cut: str | Sequence[str] | None
    level: float | None
    store: Store
    precision: str | None
    autocast: torch.dtype | None
    inputs: Any
    mask: str | Sequence[str] | None
    key: Callable[[Any], Any] | None
    share: str
    verify_every: int
    views: int = 1
    augment: Callable[[Any], Any] | None = field(default=None, repr=False)
    resident: Residency | None = None


_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard (FSDP2)",
}


def refuse_wrapped(model: nn.Module) -> None:
    for kind in type(model).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            raise CutError(
                f"the model is wrapped in {_WRAPPERS[kind.__name__]} already: attach first, wrap after. "
                "recycle(model, ...), then wrap the same model."
            )
    sharded = next((name for name, module in model.named_modules() if is_sharded(module)), None)
    if sharded is not None:
        raise CutError(
            f"'{sharded}' is sharded with fully_shard (FSDP2) already: attach first, then shard each module after the "
            "cut by itself."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CutError("a ScriptModule runs outside of Python, where no call can be skipped: recycle the Python module")
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise CutError(
            "the model is compiled already: recycle the module that was given to torch.compile, and compile after"
        )
    taken = slot_of(model)
    if taken is not None and Interceptor.of(model) is None:
        if getattr(taken, "is_recycling", False):
            raise CutError(
                "this module is frozen by the recycling of a model around it: detach that first, or recycle a deepcopy"
            )
        raise CutError("the model has been compiled in place (model.compile()): attach first, compile after")
