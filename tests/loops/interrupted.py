"""Started by torchrun with two restarts: rank 1 is killed amid filling, then amid training; then all ends well.

``torchrun --nproc-per-node 2 --max-restarts 2 interrupted.py FOLDER``
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from small import CUT, labels, pictures, residual
from torchrecycle import recycle
from torchrecycle.store import FolderStore

OBJECTS, BATCH, EPOCHS = 48, 4, 3
PREFIX = ("stem", "stages.0", "stages.1")
KILLED_AT_ITEM = 14
KILLED_AT_STEP = 8


class Deadly(Dataset[Any]):
    """A data set whose process is killed after so many items.

    Args:
        after: how many.
        seconds: each takes.
    """

    def __init__(self, after: int | None, seconds: float) -> None:
        self.seconds = seconds
        self.items = list(zip(pictures(OBJECTS), labels(OBJECTS).tolist(), strict=True))
        self.after, self.reads = after, 0

    def __len__(self) -> int:
        return OBJECTS

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        self.reads += 1
        if self.after is not None and self.reads > self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.items[index]


def step(wrapped: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    model.train()
    for module in model.modules():  # statistics of half a batch are no statistics of the whole one
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer.zero_grad()
    F.cross_entropy(wrapped(x), y).backward()
    optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def trained_alone() -> dict[str, torch.Tensor]:
    """What one process makes of it that nobody interrupts."""
    model = residual()
    for name in PREFIX:
        model.get_submodule(name).requires_grad_(False)
    data = Deadly(None, 0).items
    sampler = DistributedSampler(data, num_replicas=1, rank=0)  # pyright: ignore
    optimizer = optimizer_of(model)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, 2 * BATCH, sampler=sampler):  # pyright: ignore
            step(model, model, optimizer, x, y)
    return model.state_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # A place of its own for each attempt: at torchrun's, gloo may still find the address of a process that was killed.
    meeting = f"file://{folder / f'meeting{attempt}'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    # Slow enough that the other is stopped too before it has made up for the one that was killed.
    data = Deadly(16 + KILLED_AT_ITEM if (rank, attempt) == (1, 0) else None, 0.03 if attempt == 0 else 0)
    model = residual()
    # A segment for each batch, so that what is killed loses one at most.
    recycling = recycle(model, pictures(2), cut=CUT, store=FolderStore(folder / "store", segment_bytes=1))
    there = len(recycling.source.rows)
    sampler = DistributedSampler(data)
    dist.barrier()
    report = recycling.fill(data, batch_size=2)
    torch.save({"there": there, "computed": report.computed}, folder / f"filled{attempt}-{rank}.pt")
    loader = recycling.loader(data, batch_size=BATCH, sampler=sampler)
    wrapped, optimizer, first = DistributedDataParallel(model), optimizer_of(model), 0
    kept = folder / "checkpoint.pt"
    if kept.exists():
        checkpoint = torch.load(kept)
        wrapped.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"]
    steps = 0
    for epoch in range(first, EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            step(wrapped, model, optimizer, x, y)
            steps += 1
            if (rank, attempt, steps) == (1, 1, KILLED_AT_STEP):
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            state = {"model": wrapped.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, folder / "writing.pt")
            os.replace(folder / "writing.pt", kept)
        dist.barrier()
    found = {
        "first": first,
        "misses": recycling.stats.misses,
        "hits": recycling.stats.hits,
        "weights": model.state_dict(),
        "rows": len(recycling.source.rows),
    }
    recycling.detach()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
