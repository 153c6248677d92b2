"""What does filling cost on top of the prefix itself: a plain pass without gradient over the same loader?

Filling reads each item between two looks at the random generators, hashes it, runs the prefix, keeps targets, hashes
the rows, writes them and waits for the disk. ``python benchmarks/filling.py`` fills a fresh folder store and runs the
plain pass in turn, within one process, for

* ResNet-34 at ``layer2``, images of 160 x 160, rows of 205 KB;
* a BERT of MiniLM's size (six layers of 384) at its third layer, 64 tokens, rows of 98 KB;

both at batch 64, with one thread and with two, and prints the ratio of each pair of runs. What is made once per model
(``recycle``, its proof) is not in it; looking whether items come out the same twice, the first batch's proof and the
last fsync are. Weights are random: they do not change the time.

Beside the ratio of wall times stands that of processor times, which others on the machine disturb less, and which does
not see what waits for the disk. Two more figures explain those: the peak of anonymous memory above that of the plain
pass, and the pages that each side faults in. glibc gives the top of its heap back to the system and takes it again,
several times in a batch or not at all, as the intermediates of the prefix happen to lie, which moves either side by a
fifth. With

    MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=8589934592 python benchmarks/filling.py

neither side does, and the ratio is that of the work alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bench import bert_like_minilm  # pyright: ignore[reportMissingImports]
from torchrecycle import recycle
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"
GOAL = 1.10
BATCH = 64


# -- the two models, and their prefixes by hand ------------------------------------------------------------------------


def resnet(objects: int) -> tuple[nn.Module, str, Callable[[torch.Tensor], Any], TensorDataset]:
    import torchvision

    model = torchvision.models.resnet34(num_classes=100)
    prefix = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2)
    data = TensorDataset(torch.randn(objects, 3, 160, 160), torch.randint(0, 100, (objects,)))
    return model, "layer2", prefix, data


class TextModel(nn.Module):
    """A BERT of MiniLM's size and a linear head on its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert_like_minilm()
        self.head = nn.Linear(384, 100)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bert(input_ids).last_hidden_state.mean(1))


def minilm(objects: int) -> tuple[nn.Module, str, Callable[[torch.Tensor], Any], TensorDataset]:
    model = TextModel()
    half = type(model.bert)(model.bert.config, add_pooling_layer=False)
    half.encoder.layer = model.bert.encoder.layer[:3]
    half.embeddings = model.bert.embeddings
    data = TensorDataset(torch.randint(0, 30_000, (objects, 64)), torch.randint(0, 100, (objects,)))
    return model, "bert.encoder.layer.2", half, data


# -- measuring ---------------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Anonymous memory of this process: what is no file's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status does not tell RssAnon: this benchmark needs Linux")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took."""

    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Processor time of all threads."""
    memory: int
    """Peak of anonymous bytes above those at its begin, looked at every 10 ms."""
    faults: int
    """Pages faulted in."""


def measured(run: Callable[[], Any]) -> tuple[Any, Cost]:
    """What a run gives, and what it took."""
    begin = anonymous_bytes()
    peak, done = [begin], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    faults, cpu, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time(), time.perf_counter()
    try:
        result = run()
    finally:
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        done.set()
        thread.join()
    return result, Cost(seconds, cpu, peak[0] - begin, faults)


def bench(name: str, make: Callable[..., Any], objects: int, rounds: int, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    model, cut, prefix, data = make(objects)
    model.eval()
    if isinstance(prefix, nn.Module):
        prefix.eval()

    def plain() -> None:
        with torch.no_grad():
            for x, _ in DataLoader(data, batch_size=BATCH):
                prefix(x)

    rows_bytes = 0

    def fill(number: int) -> tuple[Cost, float]:
        nonlocal rows_bytes
        where = folder / f"{name}-{number}"
        with recycle(model, data.tensors[0][:2], cut=cut, store=where) as recycling:
            report, cost = measured(lambda: recycling.fill(data, batch_size=BATCH))
            assert report.computed == objects
            rows_bytes = recycling.source.rows.nbytes
        shutil.rmtree(where)
        return cost, report.prefix_seconds

    plain()
    fill(-1)
    pairs: list[tuple[Cost, Cost]] = []
    prefixes = []
    for number in range(rounds):
        _, limit = measured(plain)
        cost, prefix_seconds = fill(number)
        pairs.append((cost, limit))
        prefixes.append(prefix_seconds / limit.seconds)
    ratios = [a.seconds / b.seconds for a, b in pairs]
    return {
        "seconds": statistics.median(a.seconds for a, _ in pairs),
        "limit_seconds": statistics.median(b.seconds for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "cpu_ratio": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs),
        "prefix_ratio": statistics.median(prefixes),
        "row_bytes": rows_bytes,
        "memory_above_plain": max(a.memory - b.memory for a, b in pairs),
        "faults": statistics.median(a.faults for a, _ in pairs),
        "limit_faults": statistics.median(b.faults for _, b in pairs),
        "rounds": rounds,
    }


# -- results -----------------------------------------------------------------------------------------------------------

MODELS = {"ResNet-34 to layer2, 160 px": resnet, "BERT of 6 layers to the third, 64 tokens": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--only", help="a part of a model's name")
    parser.add_argument("--no-results", action="store_true", help="only print")
    options = parser.parse_args()
    processor = machine()
    results = {}
    print(f"{'':51}{'fill':>8}{'plain':>9}{'ratio':>7}{'min to max':>14}   cpu  prefix    rows   memory  faults")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for title, make in MODELS.items():
                name = f"{title}, {threads} thread{'s' * (threads > 1)}"
                if options.only and options.only not in name:
                    continue
                row = results[name] = bench(
                    f"{make.__name__}-{threads}", make, options.objects, options.rounds, Path(folder)
                )
                print(
                    f"{name:51}{row['seconds']:7.2f}s{row['limit_seconds']:8.2f}s{row['ratio']:7.3f}"
                    f"{row['ratio_min']:6.2f} to {row['ratio_max']:.2f}"
                    f"{row['cpu_ratio']:7.3f}{row['prefix_ratio']:7.3f}"
                    f"{row['row_bytes'] / 1e6:5.0f} MB{row['memory_above_plain'] / 1e6:+6.0f} MB"
                    f"  {row['faults']:,.0f} to {row['limit_faults']:,.0f}",
                    flush=True,
                )
    about = {
        "command": "python benchmarks/filling.py",
        "arguments": vars(options),
        "machine": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "goal": GOAL,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    print(
        f"{about['machine']}, torch {about['torch']}, Python {about['python']}, {about['date']}; goal: at most {GOAL}"
    )
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
        path = RESULTS / f"filling-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        print(f"kept as {path.relative_to(Path(__file__).parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
