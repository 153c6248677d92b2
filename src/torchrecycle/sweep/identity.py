"""Which task is it, and which model? What is finished is kept under the answer, also for the next process.

Of a user's own task: the content of its data sets, its other attributes, and the code of its class. A data set of a
known kind (a list, tensors, a Hugging Face data set, an image folder) is told by its content at once; of any other each
item is read once and hashed, as filling does it: 8,144 photos take a minute, and a photo edited under its old name is
noticed. Of a model: its layers in words, its config, and every weight.

What cannot be told is refused, in words: two tasks taken for one would be a figure of the wrong task.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from torchrecycle.data import identity_of
from torchrecycle.data.state import NoLastingStateError, lasting_state_of
from torchrecycle.errors import KeyTypeError
from torchrecycle.keys import key
from torchrecycle.progress import progress
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.task import Split, Task
from torchrecycle.trace import random_state, set_random_state

__all__ = ["identity_of_model", "identity_of_task", "seed_everything"]

_SPLITS = ("train", "validation", "test")


def identity_of_task(task: Task) -> str:
    """What tells a task from every other, also in another process: its own word for it, or what it consists of.

    Raises:
        SweepError: it cannot be told.
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
    for name, split in task.splits().items():
        hasher.update(f"{name} {_identity_of_split(split, f'{whose}.{name}')};".encode())
    return hasher.hexdigest(length=16)


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


def identity_of_model(model: nn.Module) -> str:
    """A hash of a model: its layers with what they say of themselves, its config, its weights."""
    config: Any = getattr(model, "config", None)
    said = config.to_json_string() if hasattr(config, "to_json_string") else ""
    weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return key((type(model).__qualname__, str(model), said, weights)).hex()
