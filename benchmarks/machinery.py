"""What a recycled step costs beside the same step split by hand, in microseconds, and where they go.

The hard case is a head of two layers at batch 32: forward, backward and optimiser take some 300 microseconds there, so
that everything else shows. ``make bench-machinery`` takes our step and the hand-split one in turn, behind prefixes of
one layer, a ResNet-50 (267 tensors), a ViT of 12 blocks and a BERT of six, and then each part of ours by itself:

* *inputs*: the call's arguments by name, and the batch's rows found among them;
* *moved*: identity, version, dtype and place of each of the prefix's tensors;
* *signature*: ranks, dtypes, arguments, flags of the modules around the cut;
* *rows*: kept rows as the tensors that the model gives, and in its nests;
* *glue*: the forward up to the cut, its slots, and operations on absent tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import RESULTS, Pooled, VectorHead
from torchrecycle import Recycling, recycle
from torchrecycle.bypass import Inputs
from torchrecycle.sweep.environment import machine

GOAL = 150
"""Microseconds per step that the machinery may add."""


class Headed(nn.Module):
    """A trunk that gives vectors, and a head of two layers."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def resnet50() -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    trunk = torchvision.models.resnet50()
    trunk.fc = nn.Identity()
    return Headed(trunk, 2048), torch.randn(32, 3, 64, 64)


def vit() -> tuple[nn.Module, torch.Tensor]:
    import timm

    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    return Headed(trunk, 192), torch.randn(32, 3, 32, 32)


def bert() -> tuple[nn.Module, torch.Tensor]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1_536)
    return Headed(Pooled(BertModel(config, add_pooling_layer=False)), 384), torch.randint(1, 30_000, (32, 16))


def linear() -> tuple[nn.Module, torch.Tensor]:
    return VectorHead(), torch.randn(32, 64)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], str]] = {
    "one linear layer": (linear, "encoder"),
    "ResNet-50": (resnet50, "trunk"),
    "ResNet-50, inside": (resnet50, "trunk.avgpool"),
    "ViT of 12 blocks, inside": (vit, "trunk.norm"),
    "BERT of 6 layers": (bert, "trunk"),
}


def microseconds(call: Callable[[], Any], repeats: int = 200, rounds: int = 9) -> float:
    """Median over rounds of the mean over repeats; processor time, which other programs do not lengthen."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(repeats):
            call()
        times.append((time.process_time() - began) / repeats)
    return 1e6 * statistics.median(times)


def step(
    forward: Callable[[], torch.Tensor], parameters: list[nn.Parameter], targets: torch.Tensor
) -> Callable[[], Any]:
    """A training step: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(parameters, 1e-6)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(), targets).backward()
        optimizer.step()

    return run


def suffix_by_hand(model: nn.Module, cut: str, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What is left to run after the cut, without any of us."""
    head: Any = model.head
    if cut == "trunk.avgpool":
        return lambda: head(torch.flatten(rows, 1))
    if cut == "trunk.norm":
        return lambda: head(rows[:, 0])
    return lambda: head(rows)


def measure(make: Callable[[], tuple[nn.Module, torch.Tensor]], cut: str) -> dict[str, float]:
    """Our step, the hand-split one, and the parts of ours."""
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    targets = torch.arange(32) % 100
    with recycle(model, x[:2], cut=cut, store="memory://") as recycling:
        (batch,) = recycling.loader(list(x), batch_size=32)
        with torch.no_grad():
            rows = recycling.bypass.prefix(Inputs(("x",), (x,), {}))[0]
            by_hand = suffix_by_hand(model, cut, rows)
            assert torch.equal(model(batch), by_hand()), "the hand-split suffix is another function"
        parameters = list(recycling.parameters())
        ours, theirs = step(lambda: model(batch), parameters, targets), step(by_hand, parameters, targets)
        for warm_up in (ours, theirs):
            for _ in range(20):
                warm_up()
        pairs = [(microseconds(ours, 100, 1), microseconds(theirs, 100, 1)) for _ in range(15)]
        added = statistics.median(a - b for a, b in pairs)
        found = {"step": statistics.median(a for a, _ in pairs), "by hand": statistics.median(b for _, b in pairs)}
        return {**found, "added": added, **parts_of(recycling, batch, rows)}


def parts_of(recycling: Recycling, batch: Any, rows: torch.Tensor) -> dict[str, float]:
    """Each part by itself."""
    bypass = recycling.bypass
    given = recycling._rule(batch)
    names = recycling._names
    absent = given.map_tensors(
        lambda t: recycling._example.tensors()[next(iter(given.tensors()))][:1].expand(32, *t.shape[1:])
    )
    layout = bypass.plan.layouts[0]
    size = bypass.plan.size(given)
    leaves = [rows]
    with torch.no_grad():
        return {
            "inputs": microseconds(lambda: list(Inputs(names, (batch,), {}).items())),
            "moved": microseconds(recycling._refuse_moved),
            "signature": microseconds(lambda: bypass.signature(absent)),
            "rows": microseconds(lambda: (layout.to_model(rows), bypass._kept(absent, leaves, size, rows.device))),
            "glue": microseconds(lambda: bypass.glue(absent, leaves)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-results", action="store_true", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(make, cut) for name, (make, cut) in MODELS.items()}
    about = {
        "command": "make bench-machinery",
        "machine": machine(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{about['machine']}, one thread, torch {about['torch']}, Python {about['python']}, {about['date']}")
    print("microseconds per step, head of two layers at batch 32")
    columns = list(next(iter(results.values())))
    print(f"{'prefix':26}" + "".join(f"{column:>10}" for column in columns))
    for name, row in results.items():
        mark = "" if row["added"] <= GOAL else f"  over the goal of {GOAL}"
        print(f"{name:26}" + "".join(f"{row[column]:10.1f}" for column in columns) + mark)
    if not options.no_results:
        slug = re.sub(r"[^a-z0-9]+", "-", str(about["machine"]).lower()).strip("-")
        path = RESULTS / f"machinery-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        print(f"kept as {path.relative_to(RESULTS.parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
