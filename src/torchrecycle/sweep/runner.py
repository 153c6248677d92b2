"""One level at work: a model of its own, attached at its cut or not, its loaders, and the weights it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from torchrecycle.recycling import Recycling, recycle
from torchrecycle.store import Store
from torchrecycle.sweep.levels import share_of
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.task import Split, Task

__all__ = ["Counted", "Later", "Runner", "attach", "evaluating"]


class Runner:
    """A level with its model.

    Args:
        task: whose.
        level: its name.
        recycling: of the model; None where it is trained in full.
        model: with the weights to begin with.
    """

    def __init__(self, task: Task, level: str, recycling: Recycling | None, model: nn.Module) -> None:
        self.task, self.level, self.recycling, self.model = task, level, recycling, model
        self.trained = list(model.parameters() if recycling is None else recycling.parameters())
        self.is_filled = False
        self._paused = ExitStack()
        self._start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @property
    def share(self) -> float:
        return 0.0 if self.recycling is None else self.recycling.level

    def keep_nothing(self) -> None:
        """From here on the frozen layers are computed again: there is no room for what they give."""
        assert self.recycling is not None
        self._paused.enter_context(self.recycling.paused())

    def release(self) -> None:
        """Detach the model: nothing of it is needed any more, and the store may drop its rows for others."""
        self._paused.close()
        if self.recycling is not None:
            self.recycling.detach()

    def restart(self) -> None:
        """The pretrained weights again. What is as it was is not touched: the frozen part does not look changed."""
        with torch.no_grad():
            for name, tensor in self._state().items():
                if not torch.equal(tensor, self._start[name]):
                    tensor.copy_(self._start[name])

    def has_learned(self) -> bool:
        """Whether any weight is another than at the start."""
        return any(not torch.equal(tensor, self._start[name]) for name, tensor in self._state().items())

    def _state(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        if state.keys() != self._start.keys():
            other = sorted(state.keys() ^ self._start.keys())
            raise SweepError(
                f"{type(self.task).__name__}.fit has given the model other layers than it had "
                f"({', '.join(other[:3])}): do that in build_model, where each level begins"
            )
        return state

    def loader(self, split: Split, arguments: dict[str, Any]) -> Any:
        if self.recycling is None or self.recycling.off:
            return DataLoader(split.dataset, **arguments)
        return self.recycling.loader(split.dataset, name=split.name, **arguments)

    def training_loader(self, recipe: Recipe, seed: int) -> Any:
        return self.loader(self.task.splits()["train"], self.task.loader_arguments(recipe, seed=seed))

    def evaluation_loader(self, split: Split) -> Any:
        return self.loader(split, self.task.eval_arguments())


def attach(
    task: Task, model: nn.Module, level: str, cut: str | None, store: str | Store, options: Mapping[str, Any]
) -> Recycling:
    """Recycle a model at a level, at a cut if it is known.

    Args:
        task: for its example.
        model: its model.
        level: such as ``50``.
        cut: the module's name; the nearest valid one if None.
        store: where rows are kept.
        options: further ones of `recycle`.
    """
    place: dict[str, Any] = {"level": share_of(level)} if cut is None else {"cut": cut}
    parameter = next(model.parameters(), None)
    example = task.example() if parameter is None else _moved(task.example(), parameter.device)
    return recycle(model, example, store=store, **place, **{**task.recycling, **options})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    return tuple(_moved(each, device) for each in value) if isinstance(value, (tuple, list)) else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# -- loaders -----------------------------------------------------------------------------------------------------------


class Counted:
    """A loader that tells of each batch, and counts how often it is gone over."""

    def __init__(self, loader: Any, tell: Callable[[], None]) -> None:
        self._loader, self._tell = loader, tell
        self.epochs = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        for batch in self._loader:
            yield batch
            self._tell()

    def __getattr__(self, name: str) -> Any:
        """What else a user's loop asks of a loader: ``batch_size``, ``dataset``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class Later:
    """A loader that is made when it is asked for: most tasks never ask for that of the training split."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())
