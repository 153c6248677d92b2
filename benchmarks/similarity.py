"""How close is similarity learning through Lightning's trainer, from disk, to the same head trained by hand from RAM?

``make bench-similarity`` takes epochs of a head on 8,000 vectors of 384 numbers, behind a frozen encoder, with triplet
loss and hard mining, at batches of 256 and 32, in turn:

* ours: `torchrecycle.similarity.fit` with ``pytorch_lightning.Trainer``, rows from a folder;
* the limit: a loop by hand over tensors in RAM, with the same head, loss, optimiser and order;
* Lightning alone: the same trainer over a loader that gives slices of tensors in RAM, so that what is left of the
  distance is ours.

The head is one `SkipConnectionHead`, the loss `TripletLoss(mining="hard")`. Weights are random: they do not change the
time. Memory is what the resident size of a process grows by while it fills ten times as many rows and reads them once.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset

from torchrecycle.similarity import (
    CacheConfig,
    Encoder,
    GroupSimilarityDataLoader,
    SimilarityGroupSample,
    SkipConnectionHead,
    TrainableModel,
    TripletLoss,
    fit,
)
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"
OBJECTS, INPUT, DIM, GROUPS = 8000, 64, 384, 400
GOAL = 1.4


class Vectors(Dataset[SimilarityGroupSample]):
    """8,000 objects in 400 groups."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(OBJECTS, INPUT, generator=generator)
        self.groups = torch.randint(0, GROUPS, (OBJECTS,), generator=generator)

    def __len__(self) -> int:
        return OBJECTS

    def __getitem__(self, index: int) -> SimilarityGroupSample:
        return SimilarityGroupSample(self.values[index], int(self.groups[index]))


class FrozenEncoder(Encoder):
    """From 64 numbers to 384."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(INPUT, DIM), nn.Tanh(), nn.Linear(DIM, DIM))

    @property
    def trainable(self) -> bool:
        return False

    @property
    def embedding_size(self) -> int:
        return DIM

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layers(batch)


def make_head() -> SkipConnectionHead:
    torch.manual_seed(1)
    return SkipConnectionHead(DIM)


class Timed(TrainableModel):
    """Takes the time of each epoch from its first batch to its end."""

    def __init__(self, store: str) -> None:
        self.store = store
        self.seconds: list[float] = []
        super().__init__()

    def configure_encoders(self) -> Encoder:
        return FrozenEncoder()

    def configure_head(self, input_embedding_size: int) -> SkipConnectionHead:
        return make_head()

    def configure_loss(self) -> TripletLoss:
        return TripletLoss(mining="hard")

    def configure_caches(self) -> CacheConfig:
        return CacheConfig(save_dir=self.store, batch_size=256)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.head.parameters(), 1e-3)

    def on_train_epoch_start(self) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)


class Plain(pl.LightningModule):
    """The head alone, as anybody would write it for Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = make_head(), TripletLoss(mining="hard")
        self.seconds: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows, groups = batch
        return self.loss(embeddings=self.head(rows), groups=groups)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.head.parameters(), 1e-3)

    on_train_epoch_start = Timed.on_train_epoch_start
    on_train_epoch_end = Timed.on_train_epoch_end


class Slices:
    """Batches of tensors in RAM."""

    def __init__(self, rows: torch.Tensor, groups: torch.Tensor, batch_size: int) -> None:
        self.rows, self.groups, self.batch_size = rows, groups, batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.randperm(len(self.rows)).split(self.batch_size):
            yield self.rows[index], self.groups[index]


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def ours(store: str, batch_size: int, epochs: int) -> list[float]:
    model = Timed(store)
    fit(model, trainer(epochs), GroupSimilarityDataLoader(Vectors(), batch_size=batch_size, shuffle=True))
    return model.seconds


def lightning(rows: torch.Tensor, groups: torch.Tensor, batch_size: int, epochs: int) -> list[float]:
    model = Plain()
    trainer(epochs).fit(model, Slices(rows, groups, batch_size))
    return model.seconds


def by_hand(rows: torch.Tensor, groups: torch.Tensor, batch_size: int, epochs: int) -> list[float]:
    head, loss = make_head().train(), TripletLoss(mining="hard")
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    seconds = []
    for _ in range(epochs):
        began = time.perf_counter()
        for index in torch.randperm(len(rows)).split(batch_size):
            optimizer.zero_grad()
            loss(head(rows[index]), groups[index]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def compare(batch_size: int, store: str, *, rounds: int, epochs: int) -> dict[str, Any]:
    data = Vectors()
    with torch.no_grad():
        rows = FrozenEncoder().eval()(data.values)
    sides: dict[str, Callable[[], list[float]]] = {
        "hand": lambda: by_hand(rows, data.groups, batch_size, epochs),
        "lightning": lambda: lightning(rows, data.groups, batch_size, epochs),
        "ours": lambda: ours(store, batch_size, epochs),
    }
    taken: dict[str, list[list[float]]] = {name: [] for name in sides}
    ours(store, batch_size, 1)  # fills
    for _ in range(rounds):
        for name, side in sides.items():
            taken[name].append(side()[1:])  # the first epoch allocates

    def median(name: str) -> float:
        return statistics.median(second for each in taken[name] for second in each)

    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(taken["ours"], taken["hand"], strict=True)]
    return {
        "batch_size": batch_size,
        **{f"{name}_ms": round(1e3 * median(name), 1) for name in sides},
        "ratio": round(median("ours") / median("hand"), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "lightning_ratio": round(median("lightning") / median("hand"), 2),
        "goal": GOAL,
    }


def fill_memory(store: str) -> dict[str, float]:
    """How much the resident memory of a process grows while it fills 123 MB of rows, in MB."""
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1]); import similarity as b; import torch; "
        "import torchrecycle.similarity.fitting\n"
        "def size(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        "b.OBJECTS = 512; b.ours(sys.argv[2] + '-before', 256, 1)  # what is allocated once\n"
        "b.OBJECTS = 80_000; seen = [size()]; ended = []\n"
        "def look():\n"
        "    while not ended: seen.append(size()); time.sleep(0.01)\n"
        "thread = threading.Thread(target=look); thread.start(); model = b.Timed(sys.argv[2])\n"
        "b.fit(model, b.trainer(1), b.GroupSimilarityDataLoader(b.Vectors(), batch_size=256))\n"
        "ended.append(1); thread.join(); print(seen[0], max(seen))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), store]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    before, after = (float(number) for number in out[-2:])
    return {"rows_mb": round(80_000 * DIM * 4 / 1e6, 1), "grown_mb": round(after - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in (256, 32):
            one = compare(batch_size, f"{folder}/{batch_size}", rounds=arguments.rounds, epochs=arguments.epochs)
            found.append(one)
            print(
                f"batch {batch_size}: ours {one['ours_ms']} ms, by hand {one['hand_ms']} ms: {one['ratio']} "
                f"({one['ratio_range'][0]} to {one['ratio_range'][1]}, goal {GOAL}); Lightning alone "
                f"{one['lightning_ms']} ms: {one['lightning_ratio']}",
                flush=True,
            )
        memory = fill_memory(f"{folder}/memory")
    print(f"filling {memory['rows_mb']} MB of rows and training on them: memory grows by {memory['grown_mb']} MB")
    result = {
        "command": "make bench-similarity",
        "date": str(date.today()),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pl.__version__,
        "threads": torch.get_num_threads(),
        "epochs": found,
        "fill": memory,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", machine().partition(", ")[0].lower()).strip("-")
    name = f"similarity-{slug}-{torch.get_num_threads()}-threads-{date.today()}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to benchmarks/results/{name}")


if __name__ == "__main__":
    main()
