"""How much quicker is it, by model size and by machine?

    python experiments/speed.py

Article and paper say that larger models and weaker machines gain more. ResNet-18, 34, 50 and 152 at 224 px and three
sizes of BERT at 64 tokens, with random weights, which do not change the time, are trained and run in full and with 50 %
and 75 % of their blocks recycled, with one thread, with two, and on a GPU if there is one. All ways take turns, step by
step, so that a slow minute is everybody's; reported are medians. Beside each figure stands what the saved operations
alone would give: a cut that saves half of the FLOPs makes a training and an inference twice as quick at best.

A training step is reading a batch, forward, loss, backward and AdamW; a step of inference is reading and forward. What
is recycled is read from a store on the disk that holds all rows. Each model at each number of threads is kept in
``experiments/results/speed.json`` when it was measured, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kept import RESULTS, Kept  # pyright: ignore[reportMissingImports]
from torchrecycle import cuts, recycle
from torchrecycle.allocator import keep_freed_memory
from torchrecycle.sweep.environment import machine, versions

LEVELS = (0.5, 0.75)
CLASSES = 100


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and what an object of its is."""

    make: Callable[[], nn.Module]
    is_text: bool


def resnet(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=CLASSES)

    return make


def bert(layers: int, hidden: int, heads: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=layers,
                hidden_size=hidden,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
                num_labels=CLASSES,
            )
        )

    return make


SUBJECTS = {
    "ResNet-18": Subject(resnet("resnet18"), False),
    "ResNet-34": Subject(resnet("resnet34"), False),
    "ResNet-50": Subject(resnet("resnet50"), False),
    "ResNet-152": Subject(resnet("resnet152"), False),
    "MiniLM-L6": Subject(bert(6, 384, 12), True),
    "BERT-base": Subject(bert(12, 768, 12), True),
    "BERT-large": Subject(bert(24, 1024, 16), True),
}


class Objects(Dataset[dict[str, torch.Tensor]]):
    """Random pictures ``x [3, 224, 224]``, or texts ``input_ids [64]``; each with ``label []``."""

    def __init__(self, count: int, is_text: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        if is_text:
            tokens = torch.randint(1000, 30000, (count, 64), generator=generator)
            self.inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        else:
            self.inputs = {"x": torch.randn(count, 3, 224, 224, generator=generator)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**{name: values[index] for name, values in self.inputs.items()}, "label": self.labels[index]}


# -- ways to take a step -----------------------------------------------------------------------------------------------


class Way:
    """One model at work, a step at a time, over and over through its loader."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], loader: Any, device: torch.device) -> None:
        self.model, self.loader, self.device = model, loader, device
        self.optimizer = torch.optim.AdamW(parameters, 1e-5)
        self.batches: Iterator[Any] = iter(())

    def next(self) -> tuple[dict[str, Any], torch.Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        moved = {name: values.to(self.device) for name, values in batch.items()}
        return moved, moved.pop("label")

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        found: Any = self.model(**inputs)
        return found if isinstance(found, torch.Tensor) else found.logits

    def train(self) -> float:
        """Seconds of a step."""
        self.model.train()
        return self.timed(self.train_step)

    def train_step(self) -> None:
        inputs, labels = self.next()
        loss = F.cross_entropy(self.logits(inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> float:
        """Seconds of a step."""
        self.model.eval()
        return self.timed(lambda: self.logits(self.next()[0]).sum().item())

    def timed(self, step: Callable[[], Any]) -> float:
        self.synchronize()
        began = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median seconds of a step, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, step in ways.items():
            one = step()
            if number >= 2:
                seconds[name].append(one)
    return {name: statistics.median(each) for name, each in seconds.items()}


def measure(subject: Subject, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step in each way, and the share of the FLOPs that each cut saves."""
    objects = Objects(given.batch_size * given.batches, subject.is_text)
    arguments: dict[str, Any] = {"batch_size": given.batch_size}
    torch.manual_seed(0)
    example = {name: values[:2].to(device) for name, values in objects.inputs.items()}
    model = subject.make().to(device)
    ways = {"full": Way(model, list(model.parameters()), DataLoader(objects, **arguments), device)}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "levels": {}}
    table = cuts(subject.make().to(device), example)
    with tempfile.TemporaryDirectory() as folder:
        recyclings = []
        for level in LEVELS:
            other = subject.make().to(device)
            recycling = recycle(other, example, level=level, store=folder)
            recycling.fill(objects, **arguments)
            recyclings.append(recycling)
            loader = recycling.loader(objects, **arguments)
            ways[f"{level:.0%}"] = Way(other, list(recycling.parameters()), loader, device)
            cut = next(each for each in table if each.name == recycling.cut)
            found["levels"][f"{level:.0%}"] = {
                "cut": recycling.cut,
                "level": recycling.level,
                "flops_share": cut.flops_share,
                "bytes_per_object": cut.bytes_per_object,
            }
        training = in_turn({name: way.train for name, way in ways.items()}, given.rounds)
        inference = in_turn({name: way.infer for name, way in ways.items()}, given.rounds)
        found["full"] = {"training": training["full"], "inference": inference["full"]}
        for name, level in found["levels"].items():
            level |= {"training": training[name], "inference": inference[name]}
        for recycling in recyclings:
            recycling.detach()
    return found


def told(found: dict[str, Any]) -> str:
    parts = []
    for name, level in found["levels"].items():
        speed = {each: found["full"][each] / level[each] for each in ("training", "inference")}
        limit = 1 / (1 - level["flops_share"])
        parts.append(f"{name}: {speed['training']:.2f}, {speed['inference']:.2f} (FLOPs {limit:.2f})")
    return f"training, inference: {'; '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="batches that the data have")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--models", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.json")
    given = parser.parse_args()
    settings = {"batch_size": given.batch_size, "batches": given.batches, "rounds": given.rounds}
    settings["keeps_freed_memory"] = keep_freed_memory()
    kept = Kept(given.results, settings)
    places = [("cpu", threads) for threads in given.threads]
    places += [("cuda", torch.get_num_threads())] if torch.cuda.is_available() else []
    for name in given.models:
        for kind, threads in places:
            torch.set_num_threads(threads)
            device = torch.device(kind)
            where = machine(device)
            if f"{name}, {where}" not in kept:
                gc.collect()
                found = measure(SUBJECTS[name], device, given)
                about = {"model": name, "machine": where, "device": kind, "threads": threads}
                kept.keep(f"{name}, {where}", {**about, "date": f"{date.today()}", "versions": versions(), **found})
            print(f"{name}, {where}: {told(kept.measured[f'{name}, {where}'])}", flush=True)


if __name__ == "__main__":
    main()
