"""Does an order that reads the disk in blocks train as well as a full shuffle?

    python benchmarks/blocks.py --cars cars/

``cars/`` holds ``images.tar`` and ``labels.csv`` (file, class_id), the Stanford cars; weights come from the packages of
the extra ``demo``. The pictures lie in the store sorted by class, the worst case for an order that keeps neighbours
together. EfficientNet-Lite0 is cut at 75 % and the rest trained to tell the classes apart, with the same seeds, in a
full shuffle and in blocks whose window is 3 %, 12 % and 50 % of the data: 3 % is what a window of 128 MB is of 4 GB.
Beside them the order of the data itself, which shows what not mixing costs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch

from precision import cars  # pyright: ignore[reportMissingImports]
from torchrecycle import Recycling, recycle
from torchrecycle.data import BlockShuffleSampler
from torchrecycle.sweep import ObjectiveTask
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.fit import fit

RESULTS = Path(__file__).parent / "results"
BLOCK = 7
"""Pictures in a block: 1 MB of rows of 150 KB."""


def loader_of(task: ObjectiveTask, recycling: Recycling, order: str, seed: int) -> Any:
    recipe = task.recipe("75", recycling.level)
    arguments = task.loader_arguments(recipe, seed=seed)
    if order != "shuffled":
        arguments.pop("shuffle")
        generator = arguments.pop("generator")
        if order != "sorted":
            recycled = recycling.dataset(task.train.dataset, name=task.train.name)
            window = max(1, round(float(order) * len(task.train) / BLOCK))
            arguments["sampler"] = BlockShuffleSampler(recycled, block=BLOCK, window=window, generator=generator)
    return recycling.loader(task.train.dataset, name=task.train.name, **arguments)


def quality(task: ObjectiveTask, recycling: Recycling, order: str, seed: int) -> float:
    model = recycling.model
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    loader = loader_of(task, recycling, order, seed)
    fit(task, model, list(recycling.parameters()), loader, task.recipe("75", recycling.level), seed=seed)
    test = recycling.loader(task.test.dataset, name=task.test.name, **task.eval_arguments())
    found = task.evaluate(model, test, task.test).scores[task.objective.metric]
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not torch.equal(tensor, start[key]):
                tensor.copy_(start[key])
    return torch.tensor(found).nanmean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, required=True, help="a folder with images.tar and labels.csv")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the training split")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    given = parser.parse_args()
    task = cars(given.cars, given, "classify")
    orders = ["shuffled", "0.5", "0.12", "0.03", "sorted"]
    found: dict[str, list[float]] = {order: [] for order in orders}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        recycling = stack.enter_context(recycle(task.build_model(), task.example(), level=0.75, store=folder))
        for split in (task.train, task.test):
            print(recycling.fill(split.dataset, name=split.name, **task.eval_arguments()), flush=True)
        for seed in range(given.seeds):
            for order in orders:
                found[order].append(quality(task, recycling, order, seed))
                print(f"seed {seed}, {order}: {task.objective.metric} {found[order][-1]:.4f}", flush=True)
    results = {order: {"quality": statistics.mean(each), "seeds": each} for order, each in found.items()}
    settings = {name: getattr(given, name) for name in ("fraction", "epochs", "seeds", "size")}
    where = machine(torch.device("cpu"))
    about = {"date": f"{date.today():%Y-%m-%d}", "machine": where, "versions": versions(), "settings": settings}
    about |= {"metric": task.objective.metric, "objects": len(task.train), "block": BLOCK}
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"about": about, "results": results}, indent=2) + "\n"
    (RESULTS / f"blocks-{slug}-{about['date']}.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
