"""What does it cost that freed memory goes back to the system? Steps of full training, both ways.

    python benchmarks/allocator.py

A network of pictures (EfficientNet-Lite0, 64 pictures of 160 px) and one of texts (six layers of 384, 32 texts of 20 to
256 tokens), with random weights, each in a process of its own that keeps freed memory or does not, in turn: seconds of
a step, the quickest and the slowest ten of them, pages that the system gave in a step, and the most memory
that the process had. Results go to ``benchmarks/results/``, unless ``--no-results``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecycle.allocator import keep_freed_memory
from torchrecycle.sweep.environment import machine, versions

RESULTS = Path(__file__).parent / "results"
WARM = 12
"""Steps that do not count: memory is taken in them."""


def pictures() -> tuple[nn.Module, Iterator[Any], Callable[[Any], torch.Tensor]]:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    return model, iter(lambda: torch.randn(64, 3, 160, 160), None), lambda batch: model(batch)


def texts() -> tuple[nn.Module, Iterator[Any], Callable[[Any], torch.Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    model = BertModel(config, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(1)

    def batch() -> torch.Tensor:
        length = int(torch.randint(20, 256, (), generator=generator))
        return torch.randint(1000, 30000, (32, length), generator=generator)

    return model, iter(batch, None), lambda batch: model(input_ids=batch).last_hidden_state


def work(name: str, steps: int, *, keeping: bool) -> dict[str, Any]:
    """Steps of full training in this process."""
    kept = keep_freed_memory() if keeping else False
    torch.manual_seed(0)
    model, batches, forward = {"pictures": pictures, "texts": texts}[name]()
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-5)
    seconds, pages = [], 0
    for number, batch in zip(range(WARM + steps), batches, strict=False):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        loss = forward(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
            pages += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    tenths = [statistics.mean(seconds[at : at + 10]) for at in range(0, steps - 9, 10)]
    return {
        "kept": kept,
        "step_seconds": statistics.mean(seconds),
        "quickest_ten": min(tenths),
        "slowest_ten": max(tenths),
        "pages_per_step": round(pages / steps),
        "most_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="that count, of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--no-results", action="store_true", help="only print")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        print(json.dumps(work(given.work[0], given.steps, keeping=given.work[1] == "kept")))
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(given.rounds):
        for name in ("pictures", "texts"):
            for way in ("given back", "kept"):
                command = [sys.executable, __file__, "--steps", str(given.steps), "--work", name, way]
                one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                found.setdefault(name, {}).setdefault(way, []).append(one)
                print(
                    f"{name}, {way}: {one['step_seconds']:.3f} s a step (by tens, {one['quickest_ten']:.3f} to "
                    f"{one['slowest_ten']:.3f}), {one['pages_per_step']:,} pages, {one['most_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )
    if not given.no_results:
        about = {
            "machine": machine(),
            "versions": versions(),
            "date": date.today().isoformat(),
            "load": os.getloadavg(),
        }
        slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
        path = RESULTS / f"allocator-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "steps": given.steps, "found": found}, indent=2) + "\n")
        print(f"kept: {path.name}")


if __name__ == "__main__":
    main()
