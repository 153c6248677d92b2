"""What two processes do to one recycled model: imported by the processes that a test spawns, hence nothing heavy here.

Each of two ranks has half of a batch of eight. Rank 0 writes down what happened and the weights at the end; the test
compares them with one process that had all eight. A worker lives here and not in the test file, since importing that
one takes a process several seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torchrecycle import CutError, recycle

CUT = "1"
PREFIX = ("0", "1")
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(8) % 3


def layers() -> nn.Sequential:
    """Five layers with statistics before the cut, and none after it, where each rank would have its own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """One step of training."""
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser of what is left to train, with momentum and weight decay."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1)


def trained_by_hand(steps: int) -> dict[str, torch.Tensor]:
    """What one process makes of the whole batch, with the prefix frozen by hand."""
    model = layers()
    for name in PREFIX:
        model.get_submodule(name).requires_grad_(False)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        model.train()
        for name in PREFIX:
            model.get_submodule(name).eval()
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model.state_dict()


def train_as_one_of_two(rank: int, folder: str) -> None:
    """Train in each of the ways, and let rank 0 save what came of it."""
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{root / 'meeting'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {
        "ddp": _trained(rank, root / "ddp", DistributedDataParallel),
        "fsdp2": _trained(rank, root / "fsdp2", _sharded_suffix),
        "ddp before": _refusal(DistributedDataParallel(layers()), f"module.{CUT}"),
        "fsdp2 before": _refusal(_sharded(layers()), CUT),
    }
    for part, name in (("the model", ""), ("the prefix", "0")):
        for batch in ("rows", "objects"):
            found[f"fsdp2 after, {part}, {batch}"] = _refusal_after(name, batch)
    if rank == 0:
        torch.save(found, root / "found.pt")
    dist.destroy_process_group()


def _sharded(module: nn.Module) -> nn.Module:
    """Between the processes, whose tensors are the CPU's also where there is a GPU."""
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def _sharded_suffix(model: nn.Module) -> nn.Module:
    for name in ("3", "5"):
        _sharded(model.get_submodule(name))
    return model


def _trained(rank: int, store: Path, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Attach, wrap, and train on rows, rows and objects, with a look in eval mode in between."""
    mine = slice(4 * rank, 4 * rank + 4)
    model = layers()
    recycling = recycle(model, X[:2], cut=CUT, store=store)
    loader = recycling.loader(list(zip(X[mine], Y[mine], strict=True)), batch_size=4)
    wrapped = wrap(model)
    optimizer = optimizer_of(model)
    for _ in range(2):
        for x, y in loader:
            step(wrapped, optimizer, x, y)
    with torch.no_grad():
        logits = [wrapped.eval()(x) for x, _ in loader]
    step(wrapped, optimizer, X[mine], Y[mine])
    hits = recycling.stats.hits
    recycling.detach()
    return {"hits": hits, "logits": logits, "weights": {n: _whole(t) for n, t in model.state_dict().items()}}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _refusal(wrapped: nn.Module, cut: str) -> str:
    try:
        recycle(wrapped, X[:2], cut=cut, store="memory://")
    except CutError as error:
        return str(error)
    return ""


def _refusal_after(name: str, batch: str) -> tuple[str, str]:
    """What the model says after a part of it has been sharded that holds frozen weights."""
    model = layers()
    with recycle(model, X[:2], cut=CUT, store="memory://") as recycling:
        (rows,) = recycling.loader(list(X), batch_size=8)
        _sharded(model.get_submodule(name))
        try:
            model(rows if batch == "rows" else X)
        except Exception as error:
            return type(error).__name__, str(error)
    return "nothing", ""
