"""Training at one level: AdamW, rates that rise and fall along a cosine, batch norm with the statistics it came with.

`fit` trains the given parameters in place and gives one `EpochPoint` for each epoch. It takes anything that gives
batches, recycled or not. Batch norm keeps its statistics also in what is trained: with 900 pictures to learn from,
their own are noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import EpochPoint
from torchrecycle.sweep.task import Task

__all__ = ["fit"]


def fit(
    task: Task,
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loader: Any,
    recipe: Recipe,
    *,
    seed: int,
    judge: Callable[[int], float | None] | None = None,
) -> list[EpochPoint]:
    """Train in place. The global generator, which dropout draws from, is seeded, and put back at the end.

    A loss or an output that is no longer finite ends the training: the last point then has a loss of NaN.

    Args:
        task: what is trained.
        model: made by it, with a child ``head``.
        parameters: what to train.
        loader: gives an epoch's batches each time it is iterated, and knows how many.
        recipe: rates and epochs.
        seed: of the loss's class vectors and of dropout.
        judge: told the epoch that has ended, gives the quality then, or None; its time does not count.

    Returns:
        one point for each epoch
    """
    objective = task.objective
    loss = objective.make_loss(task.dim, recipe, seed).to(task.device)
    optimizer = _optimizer(model, list(parameters), loss, recipe)
    rates = LambdaLR(optimizer, _schedule(recipe, recipe.epochs * objective.steps(loader)))
    points: list[EpochPoint] = []
    seconds = 0.0
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(1, recipe.epochs + 1):
            began = time.perf_counter()
            _train_mode(model)
            mean = _run_epoch(objective.losses(task.feed(model), loss, loader), optimizer, rates)
            seconds += time.perf_counter() - began
            quality = None
            try:
                if judge is not None and math.isfinite(mean):
                    quality = judge(epoch)
            except NotFiniteError:  # the last step of the epoch did it: no loss has seen it yet
                mean = math.nan
            points.append(EpochPoint(epoch, seconds, mean, quality))
            if not math.isfinite(mean):
                break
    return points


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _optimizer(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: nn.Module, recipe: Recipe
) -> torch.optim.Optimizer:
    heads = {id(parameter) for parameter in model.head.parameters()}  # pyright: ignore
    groups = [
        {"params": [p for p in parameters if id(p) in heads], "lr": recipe.head_rate},
        {"params": [p for p in parameters if id(p) not in heads], "lr": recipe.suffix_rate},
        {"params": list(loss.parameters()), "lr": recipe.class_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)


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
