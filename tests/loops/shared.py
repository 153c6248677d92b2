"""What the scripts that torchrun starts, and the test that compares with one process, have in common.

A ResNet-18 for pictures of 64 pixels, cut after its second stage, and a plain loop: SGD with momentum over a
`DistributedSampler`, so that two processes with batches of four see what one with batches of eight sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

CUT = "layer2"
PREFIX = ("conv1", "bn1", "layer1", "layer2")
PICTURES, BATCH = 24, 4


def pictures(count: int = PICTURES, seed: int = 1) -> list[tuple[torch.Tensor, int]]:
    """Pictures of noise, with labels."""
    noise = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return [(picture, number % 4) for number, picture in enumerate(noise)]


class Slow(Dataset[Any]):
    """A data set whose items take 10 ms each, as photos do, and which writes down what was read."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        self.read.append(index)
        return self.items[index]


def resnet(seed: int = 0) -> nn.Module:
    """With statistics that are not 0 and 1."""
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    model = resnet18(num_classes=4)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def freeze_by_hand(model: nn.Module) -> nn.Module:
    """What recycling is compared with."""
    for name in PREFIX:
        model.get_submodule(name).requires_grad_(False)
    return model


def training_mode(model: nn.Module, *, statistics: bool) -> None:
    """Training mode behind the cut; of batch norm too, if its statistics are to move."""
    model.train()
    for name in PREFIX:
        model.get_submodule(name).eval()
    if not statistics:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Of what is left to train."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.02, momentum=0.9, weight_decay=1e-3)


def train(
    wrapped: Any,
    model: nn.Module,
    loader: Any,
    sampler: DistributedSampler[Any],
    *,
    epochs: int = 2,
    accumulate: int = 1,
    statistics: bool = False,
    unsynchronised: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """A plain loop.

    Args:
        wrapped: what is called.
        model: what it wraps.
        loader: of batches.
        sampler: its own.
        epochs: how often.
        accumulate: batches for each step.
        statistics: whether those behind the cut move.
        unsynchronised: around the backward of batches after which there is no step.
    """
    optimizer = optimizer_of(model)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for number, (x, y) in enumerate(loader):
            training_mode(model, statistics=statistics)
            steps = (number + 1) % accumulate == 0 or number + 1 == len(loader)
            with nullcontext() if steps else unsynchronised():
                (F.cross_entropy(wrapped(x), y) / accumulate).backward()
            if steps:
                optimizer.step()
                optimizer.zero_grad()


def train_alone(*, accumulate: int = 1, world: int = 2) -> dict[str, torch.Tensor]:
    """What one process makes of batches as large as those of all ranks together, with the prefix frozen by hand."""
    model, data = freeze_by_hand(resnet()), pictures()
    sampler = DistributedSampler(data, num_replicas=1, rank=0)  # pyright: ignore
    train(model, model, DataLoader(data, world * BATCH, sampler=sampler), sampler, accumulate=accumulate)  # pyright: ignore
    return model.state_dict()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy, with what was sharded made whole: a call of all ranks."""
    state = model.state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()}  # pyright: ignore


def columns(manifest: Any) -> Iterator[Any]:
    """The values of a manifest's columns."""
    return (column.values for column in manifest.columns)
