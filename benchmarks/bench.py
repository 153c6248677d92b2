"""How close is an epoch from the store to the physical limit: the same suffix, split by hand, trained from RAM tensors?

``make bench`` prints ratios taken in one run, the two sides in turn, and keeps them under ``benchmarks/results/``:

* an epoch of a ResNet-34 cut at ``layer3`` (192 px, batch 64), from disk;
* an epoch of a head on 8,000 vectors of 384 numbers (batch 256), from disk, behind one frozen linear layer;
* the same behind a BERT of MiniLM's size, whose 91 MB are hashed at each iteration;
* filling, against a plain pass of the same prefix without gradient over the same loader;
* microseconds that the machinery adds to one step.

Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchrecycle import recycle
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"


# -- the two models, and their suffixes split by hand ------------------------------------------------------------------


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet34(num_classes=100)


def resnet_prefix(model: Any) -> nn.Module:
    return nn.Sequential(
        model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2, model.layer3
    ).eval()


def resnet_suffix(model: Any) -> nn.Module:
    return nn.Sequential(model.layer4, model.avgpool, nn.Flatten(1), model.fc)


def bert_like_minilm() -> nn.Module:
    """A BERT of MiniLM's size, with random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30_522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1_536,
    )
    return BertModel(config, add_pooling_layer=False)


class TextHead(nn.Module):
    """A frozen BERT of MiniLM's size, and a head of two layers on its pooled vector of 384 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Pooled(bert_like_minilm())
        self.head = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 100))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids))


class VectorHead(nn.Module):
    """One frozen linear layer and the same head: what is left is the machinery alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 384)
        self.head = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class Pooled(nn.Module):
    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids).last_hidden_state.mean(1)


# -- measuring ---------------------------------------------------------------------------------------------------------


def train(model: Callable[..., Any], parameters: Iterable[nn.Parameter], batches: Iterable[Any]) -> Callable[[], float]:
    """One epoch as a function that gives its seconds."""
    optimizer = torch.optim.AdamW(list(parameters), 1e-4)

    def epoch() -> float:
        began = time.perf_counter()
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


class FromRam:
    """Shuffled batches of two RAM tensors, by hand."""

    def __init__(self, rows: torch.Tensor, targets: torch.Tensor, batch_size: int) -> None:
        self.rows, self.targets, self.batch_size = rows, targets, batch_size

    def __iter__(self) -> Any:
        for index in torch.randperm(len(self.rows)).split(self.batch_size):
            yield self.rows.index_select(0, index), self.targets.index_select(0, index)


def in_turn(ours: Callable[[], float], limit: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians of both and of the ratio, after a warm-up, the sides in turn."""
    ours(), limit()
    pairs = [(ours(), limit()) for _ in range(rounds)]
    return {
        "seconds": statistics.median(a for a, _ in pairs),
        "limit_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratio_min": min(a / b for a, b in pairs),
        "ratio_max": max(a / b for a, b in pairs),
        "rounds": rounds,
    }


def rows_of(loader: DataLoader[Any], layouts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of a recycled loader as the model gets them, and the targets."""
    kept, targets = [], []
    for x, y in loader:
        kept.append(layouts[0].to_model(x.leaves[0]))
        targets.append(y)
    return torch.cat(kept), torch.cat(targets)


def bench_resnet(objects: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(objects, 3, 192, 192), torch.randint(0, 100, (objects,)))
    model, plain = resnet(), resnet()
    plain.load_state_dict(model.state_dict())
    prefix, suffix = resnet_prefix(plain), resnet_suffix(plain).train()

    def plain_pass() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for x, _ in DataLoader(data, batch_size=64):
                prefix(x)
        return time.perf_counter() - began

    number = iter(range(1_000))

    def fill() -> float:
        with recycle(model, data.tensors[0][:2], cut="layer3", store=folder / f"fill-{next(number)}") as recycling:
            began = time.perf_counter()
            recycling.fill(data, batch_size=64)
            return time.perf_counter() - began

    filling = in_turn(fill, plain_pass, rounds)
    recycling = recycle(model, data.tensors[0][:2], cut="layer3", store=folder / "epoch")
    model.train()
    loader = recycling.loader(data, batch_size=64, shuffle=True)
    rows, targets = rows_of(recycling.loader(data, batch_size=64), recycling.source.layouts)
    ours = train(model, recycling.parameters(), loader)
    limit = train(suffix, suffix.parameters(), FromRam(rows, targets, 64))
    return {"epoch, ResNet-34 cut at layer3": in_turn(ours, limit, rounds), "fill, ResNet-34 to layer3": filling}


def bench_head(objects: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    targets = torch.randint(0, 100, (objects,))
    small = TensorDataset(torch.randn(objects, 64), targets)
    large = TensorDataset(torch.randint(0, 30_000, (objects, 8)), targets)
    results = {}
    for name, model, data in (("", VectorHead(), small), (" behind BERT", TextHead(), large)):
        recycling = recycle(model, data.tensors[0][:2], cut="encoder", store=folder / f"head{len(results)}")
        model.train()
        loader = recycling.loader(data, batch_size=256, shuffle=True)
        rows, labels = rows_of(recycling.loader(data, batch_size=256), recycling.source.layouts)
        suffix = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 100))
        ours = train(model, recycling.parameters(), loader)
        limit = train(suffix, suffix.parameters(), FromRam(rows, labels, 256))
        results[f"epoch, head on 8,000 vectors{name}"] = in_turn(ours, limit, 5 * rounds)
        batch, _ = next(iter(recycling.loader(data, batch_size=32)))
        results[f"forward, head at batch 32{name}"] = bench_step(model, suffix, batch, rows[:32])
    return results


def bench_step(model: nn.Module, suffix: nn.Module, batch: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """Microseconds that the machinery adds to one forward."""

    def repeated(call: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            for _ in range(300):
                call()
            return (time.perf_counter() - began) / 300

        return run

    measured = in_turn(repeated(lambda: model(batch)), repeated(lambda: suffix(rows)), 9)
    measured["added_microseconds"] = 1e6 * (measured["seconds"] - measured["limit_seconds"])
    return measured


# -- results -----------------------------------------------------------------------------------------------------------

GOALS = {
    "epoch, ResNet-34 cut at layer3": 1.05,
    "epoch, head on 8,000 vectors": 1.25,
    "fill, ResNet-34 to layer3": 1.15,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=512, help="images (the vectors are always 8,000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-results", action="store_true", help="only print")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        results = bench_head(8_000, options.rounds, Path(folder))
        results |= bench_resnet(options.objects, options.rounds, Path(folder))
    about = {
        "command": "make bench",
        "arguments": vars(options),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{about['machine']}, torch {about['torch']}, Python {about['python']}, {about['date']}")
    print(f"{'':42}{'ours':>10}{'limit':>10}{'ratio':>8}  {'min to max':>14}  goal")
    for name, row in results.items():
        added = f"adds {row['added_microseconds']:.0f} us" if "added_microseconds" in row else ""
        goal = f"at most {GOALS[name]}" if name in GOALS else added
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        times = f"{1e3 * row['seconds']:8.2f}ms{1e3 * row['limit_seconds']:8.2f}ms"
        print(f"{name:42}{times}{row['ratio']:8.3f}  {spread:>14}  {goal}")
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
        path = RESULTS / f"bench-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        print(f"kept as {path.relative_to(Path(__file__).parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
