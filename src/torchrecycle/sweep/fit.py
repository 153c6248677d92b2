"""Training at one level: AdamW, rates that rise and fall along a cosine, batch norm with the statistics it came with.

`train` trains groups of parameters in place and tells the trial of each epoch. It takes anything that gives losses, of
batches that are recycled or not. Batch norm keeps its statistics also in what is trained: with 900 pictures to learn
from, their own are noise. `fit` is one training of a task by itself, outside of any sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint
from torchrecycle.sweep.trial import RunningTrial

if TYPE_CHECKING:
    from torchrecycle.sweep.task import Task

__all__ = ["fit", "train"]


def fit(
    task: Task,
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loader: Any,
    recipe: Recipe,
    *,
    seed: int,
    level: str = "full",
    share: float = 0.0,
    judge: Callable[[int], float | None] | None = None,
) -> list[EpochPoint]:
    """Train in place, by the task's own `fit`.

    A loss or an output that is no longer finite ends the training: the last point then has a loss of NaN.

    Args:
        task: what is trained.
        model: of which it is.
        parameters: what to train.
        loader: gives an epoch's batches each time it is iterated, and knows how many.
        recipe: rates and epochs.
        seed: of the loss's class vectors and of dropout.
        level: what the trial is told that it is at.
        share: the same, as a share.
        judge: told the epoch that has ended, gives the quality then, or None; its time does not count.

    Returns:
        one point for each epoch that the task told of
    """
    trial = RunningTrial(level, share, recipe, seed, tuple(parameters), judge=judge)
    task.fit(model, loader, trial)
    return list(trial.curve)


def train(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    losses: Callable[[], Iterator[Tensor]],
    steps: int,
    trial: RunningTrial,
) -> None:
    """Train in place, until the recipe's epochs are over or the trial says to stop. The global generator, which dropout
    draws from, is seeded, and put back at the end.

    Args:
        model: set to train mode for each epoch, but for its batch norm.
        groups: parameters with their rates, as an optimizer takes them; empty ones are left out.
        losses: gives the loss of each step of an epoch.
        steps: how many an epoch has.
        trial: recipe and seed; told of each epoch. A loss of NaN ends it.
    """
    recipe = trial.recipe
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)
    rates = LambdaLR(optimizer, _schedule(recipe, recipe.epochs * steps))
    devices = {parameter.device for parameter in trial.parameters if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(trial.seed)
        for epoch in range(1, recipe.epochs + 1):
            _train_mode(model)
            if not trial.ended(epoch, _run_epoch(losses(), optimizer, rates)):
                break


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, recipe.warm_up * steps))
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def _run_epoch(losses: Iterator[Tensor], optimizer: torch.optim.Optimizer, rates: LambdaLR) -> float:
    total: list[float] = []
    for loss in losses:
        total.append(loss.item())
        if not math.isfinite(total[-1]):  # what it would do to the weights nobody wants to see
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return sum(total) / len(total)
