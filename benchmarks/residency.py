"""Where should rows come from, and how near is a step to one of the suffix alone?

    python benchmarks/residency.py

ResNet-50 and ViT-B/16 at 224 px, BERT-base at 128 tokens, with random weights, which do not change the time. For each,
and for half of the blocks, three quarters and all of them recycled, an epoch is trained

* in full, from raw batches; the first such epoch of each model;
* with the same layers frozen, from raw batches and without a store;
* from rows on the disk, in memory, and on the GPU, from which the model gathers by itself;
* split by hand: the suffix alone, from tensors on the device, gathered with one ``index_select``.

A step is forward, loss, backward and SGD, under bfloat16 autocast on a GPU. All ways take turns, epoch by epoch, so
that a slow minute is everybody's; reported is the median of the epochs' mean step. On a GPU also the peak memory of
each way and what `offload` frees; and a profile of an epoch from the disk says which share of the copies to the GPU
runs beside kernels. On a CPU batches are smaller and steps fewer. ``--device``, ``--batch-size``, ``--steps``,
``--epochs`` and ``--models`` change what is done (figures of other models in the day's file stay); ``--check`` does
little of it, to see whether it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchrecycle import Recycling, recycle
from torchrecycle.bypass import noise, relative_difference
from torchrecycle.sweep.environment import machine, versions

RESULTS = Path(__file__).parent / "results"
LEVELS = {"50 %": 0.5, "75 %": 0.75, "head only": 1.0}
CLASSES = 100


# -- the models, and their suffixes split by hand ----------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model with its data, and how it is split by hand."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    """So many objects, by the names of the forward's arguments."""
    suffix: Callable[[Any, str], Callable[[torch.Tensor], torch.Tensor]]
    """Of a model and its cut: from activations to logits."""
    logits: Callable[[Any], torch.Tensor]


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=CLASSES)


def vit() -> nn.Module:
    import torchvision

    return torchvision.models.vit_b_16(num_classes=CLASSES)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig()
    config.num_labels = CLASSES
    return BertForSequenceClassification(config)


def pictures(count: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, 3, 224, 224)}


def photos(count: int) -> dict[str, torch.Tensor]:
    return {"input": torch.randn(count, 3, 224, 224)}


def texts(count: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1000, 30_000, (count, 128)),
        "attention_mask": torch.ones(count, 128, dtype=torch.int64),
    }


def resnet_suffix(model: Any, cut: str) -> Callable[[torch.Tensor], torch.Tensor]:
    names = ["layer1", "layer2", "layer3", "layer4", "avgpool"]
    rest = [getattr(model, name) for name in names[names.index(cut) + 1 :]]
    return nn.Sequential(*rest, nn.Flatten(1), model.fc)


def vit_suffix(model: Any, cut: str) -> Callable[[torch.Tensor], torch.Tensor]:
    norm = nn.Identity() if cut == "encoder.ln" else model.encoder.ln
    blocks = nn.Identity() if cut == "encoder.ln" else model.encoder.layers[number_of(cut) + 1 :]
    return lambda rows: model.heads(norm(blocks(rows))[:, 0])


def bert_suffix(model: Any, cut: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if cut == "bert.pooler":
        return lambda rows: model.classifier(model.dropout(rows))
    layers = model.bert.encoder.layer[number_of(cut) + 1 :]

    def run(rows: torch.Tensor) -> torch.Tensor:
        for layer in layers:  # no padding, so no mask
            found = layer(rows)
            rows = found[0] if isinstance(found, tuple) else found
        return model.classifier(model.dropout(model.bert.pooler(rows)))

    return run


def number_of(cut: str) -> int:
    """Of ``encoder.layer.5`` the 5."""
    return int(re.findall(r"\d+", cut)[-1])


SUBJECTS = {
    "ResNet-50": Subject(resnet, pictures, resnet_suffix, lambda output: output),
    "ViT-B/16": Subject(vit, photos, vit_suffix, lambda output: output),
    "BERT-base": Subject(bert, texts, bert_suffix, lambda output: output.logits),
}


# -- one way of training -----------------------------------------------------------------------------------------------


class Way:
    """An epoch that can be run again and again, and how long its steps took."""

    def __init__(self, step: Callable[[Any], None], batches: Callable[[], Iterable[Any]], device: torch.device) -> None:
        self.step, self.batches, self.device = step, batches, device
        self.seconds: list[float] = []
        self.peak = 0

    def epoch(self, *, counts: bool = True) -> None:
        """Train once through, and note the mean of the steps, the loader's work included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began, steps = time.perf_counter(), 0
        for batch in self.batches():
            self.step(batch)
            steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device))
        if counts:
            self.seconds.append((time.perf_counter() - began) / steps)

    def told(self) -> dict[str, float]:
        """Milliseconds of a step, and the peak of the GPU's memory in MB."""
        found = {"step_ms": round(1000 * statistics.median(self.seconds), 2)}
        return {**found, "peak_mb": round(self.peak / 1e6)} if self.peak else found


def cast(device: torch.device) -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


class Training:
    """The parts that all ways share: data, and a step of a model or of its suffix."""

    def __init__(self, subject: Subject, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.subject, self.given, self.device = subject, given, torch.device(given.device)
        count = given.batch_size * given.steps
        self.inputs = subject.inputs(count)
        self.labels = torch.arange(count) % CLASSES
        self.names = list(self.inputs)
        self.data = TensorDataset(*self.inputs.values(), self.labels)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.subject.make().to(self.device).train()

    def example(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[:2] for tensor in self.inputs.values())

    def stepper(self, model: nn.Module) -> Callable[[Any], None]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)

        def step(batch: Any) -> None:
            *inputs, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            with cast(self.device):
                logits = self.subject.logits(model(*inputs))
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def raw(self, model: nn.Module) -> Way:
        loader = DataLoader(
            self.data, batch_size=self.given.batch_size, shuffle=True, pin_memory=self.device.type == "cuda"
        )
        return Way(self.stepper(model), lambda: loader, self.device)

    def recycled(self, recycling: Recycling, resident: Any) -> Way:
        loader = recycling.loader(self.data, batch_size=self.given.batch_size, shuffle=True)

        def turn() -> Iterable[Any]:
            recycling.resident = resident
            return loader

        return Way(self.stepper(recycling.model), turn, self.device)

    def by_hand(self, recycling: Recycling) -> Way:
        """The suffix of the recycling's own model, called without us, from tensors on the device."""
        rows = self._rows(recycling)
        model, labels = recycling.model, self.labels.to(self.device)
        suffix = self.subject.suffix(model, recycling.cut)
        self._compare(recycling, suffix, rows)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for index in torch.randperm(len(rows)).to(self.device).split(self.given.batch_size):
                yield rows.index_select(0, index), labels.index_select(0, index)

        def step(batch: Any) -> None:
            with cast(self.device):
                logits = suffix(batch[0])
            loss = F.cross_entropy(logits.float(), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Way(step, batches, self.device)

    def _compare(
        self, recycling: Recycling, suffix: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
    ) -> None:
        """Is it the same function?"""
        recycling.model.eval()
        with torch.no_grad(), cast(self.device):
            ours = self.subject.logits(
                recycling.model(*(tensor[:2].to(self.device) for tensor in self.inputs.values()))
            )
            theirs = suffix(rows[:2])
        recycling.model.train()
        allowed = noise(torch.bfloat16 if self.device.type == "cuda" else ours.dtype)
        if relative_difference(ours, theirs) > allowed:
            raise SystemExit(f"by hand the outputs differ by {relative_difference(ours, theirs):.2g} of their size")

    def _rows(self, recycling: Recycling) -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for batch in DataLoader(self.data, batch_size=self.given.batch_size):
                *inputs, _ = (tensor.to(self.device) for tensor in batch)
                parts += recycling.bypass.prefix(recycling._rule(tuple(inputs)))
        return torch.cat(parts)


# -- what is measured --------------------------------------------------------------------------------------------------


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """All ways of one model."""
    training = Training(SUBJECTS[name], given)
    ways: dict[str, Way] = {"full": training.raw(training.model())}
    told: dict[str, Any] = {}
    with ExitStack() as stack:
        run(ways, given)
        told["full"] = ways["full"].told()
        del ways["full"]
        for words, level in LEVELS.items():
            store = stack.enter_context(tempfile.TemporaryDirectory())
            told[words] = at_level(training, level, store, given)
            gc.collect()
            print(f"{name}, {words}: {told[words]}", flush=True)
    return told


def at_level(training: Training, level: float, store: str, given: argparse.Namespace) -> dict[str, Any]:
    device = training.device
    autocast = torch.bfloat16 if device.type == "cuda" else None
    recycling = recycle(
        training.model(), training.example(), level=level, store=store, autocast=autocast, resident="disk"
    )
    filled = recycling.fill(training.data, batch_size=given.batch_size)
    residents: list[Any] = ["disk", "ram", *(["cuda"] if device.type == "cuda" else [])]
    ways = {"frozen": training.raw(frozen(training, recycling))}
    ways |= {resident: training.recycled(recycling, resident) for resident in residents}
    ways["by hand"] = training.by_hand(recycling)
    run(ways, given)
    told: dict[str, Any] = {
        "cut": recycling.cut,
        "row_bytes": recycling.source.rows.nbytes // len(recycling.source.rows),
        "fill_seconds": round(filled.seconds, 2),
        **{way: ways[way].told() for way in ways},
    }
    if device.type == "cuda":
        told["copies_beside_kernels"] = overlap(ways["disk"])
    told["offload"] = str(recycling.offload())
    if device.type == "cuda":
        ways["cuda"].peak = 0
        ways["cuda"].epoch(counts=False)
        ways["cuda"].epoch(counts=False)
        told["offload_peak_mb"] = ways["cuda"].told()["peak_mb"]
    recycling.detach()
    return told


def frozen(training: Training, recycling: Recycling) -> nn.Module:
    """The model with the same layers frozen, as one does it without us: no gradient, and eval mode."""
    model = training.model()
    for name in recycling.bypass.prefix_parameters:
        model.get_parameter(name).requires_grad_(False)
    for name in dict.fromkeys(recycling.bypass.plan.modules.values()):
        model.get_submodule(name).eval()
    return model


def run(ways: dict[str, Way], given: argparse.Namespace) -> None:
    """One epoch to warm up, and then all in turn."""
    for way in ways.values():
        way.epoch(counts=False)
    for _ in range(given.epochs):
        for way in ways.values():
            way.epoch()


def overlap(way: Way) -> dict[str, float]:
    """Of an epoch's copies to the GPU, which share of their time ran beside kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        way.epoch(counts=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    kernels = intervals(events, lambda event: event.get("cat") == "kernel")
    copies = intervals(events, lambda event: event.get("cat") == "gpu_memcpy" and "HtoD" in event.get("name", ""))
    total = sum(stop - start for start, stop in copies)
    return {
        "copies": len(copies),
        "copies_ms": round(total / 1000, 3),
        "beside_kernels": round(shared(copies, kernels) / total, 3) if total else 0.0,
    }


def intervals(events: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> list[tuple[float, float]]:
    """Beginning and end of each event in microseconds, in order."""
    found = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if "dur" in e and wanted(e)]
    return sorted(found)


def shared(copies: Sequence[tuple[float, float]], kernels: Sequence[tuple[float, float]]) -> float:
    """For how long copies ran while at least one kernel did."""
    joined: list[list[float]] = []
    for start, stop in kernels:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return sum(max(0.0, min(stop, b) - max(start, a)) for start, stop in copies for a, b in joined)


# -- what is told ------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Milliseconds of a step, one line for each model and level."""
    ways = ["frozen", "disk", "ram", "cuda", "by hand"]
    lines = [["model", "recycled", "cut", "full", *ways]]
    for name, told in results.items():
        for level in LEVELS:
            if level in told:
                at = told[level]
                steps = [f"{at[way]['step_ms']:.1f}" if way in at else "-" for way in ways]
                lines.append([name, level, at["cut"].rpartition(".")[2], f"{told['full']['step_ms']:.1f}", *steps])
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch-size", type=int, default=64 if cuda else 4)
    parser.add_argument("--steps", type=int, default=32 if cuda else 3)
    parser.add_argument("--epochs", type=int, default=5 if cuda else 2)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--check", action="store_true", help="two objects, one step, nothing kept")
    given = parser.parse_args()
    if given.check:
        given.batch_size, given.steps, given.epochs = 2, 1, 1
    return given


def main() -> None:
    """Measure, print a table, and keep the figures."""
    given = arguments()
    device = torch.device(given.device)
    results: dict[str, Any] = {}
    for name in given.models:
        results[name] = measure(name, given)
    print(table(results))
    if given.check:
        return
    said = machine(device)
    text = {
        "command": "python benchmarks/residency.py",
        "date": date.today().isoformat(),
        "machine": said,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU was at hand",
        "versions": versions(),
        "batch_size": given.batch_size,
        "steps": given.steps,
        "epochs": given.epochs,
        "autocast": "bfloat16" if device.type == "cuda" else None,
        "results": results,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else said
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    slug = slug if device.type == "cuda" else f"amd-epyc-{torch.get_num_threads()}-threads" if "epyc" in slug else slug
    path = RESULTS / f"residency-{slug}-{date.today().isoformat()}.json"
    if path.exists():  # models that were not measured again stay
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[part] == text[part] for part in ("machine", "batch_size", "steps", "epochs"))
        text["results"] = {**before["results"], **results} if same else results
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
