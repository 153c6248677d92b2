"""What do twenty trials of Optuna's cost over one fill, and what do twenty ordinary ones?

    python benchmarks/trials.py cars/                     # images.tar and labels.csv (file, class_id)

The trials are those of ``examples/optuna_trials.py``: EfficientNet-Lite0 with the weights of the extra ``demo``, the
first ten classes of the Stanford cars at 96 px, learning rate, weight decay and dropout suggested by TPE, up to four
epochs each, pruned by the median. They are run

* over one fill: attaching and filling are part of the time;
* frozen: the same trials with the same layers frozen, which decode the photos and run all layers in each epoch (with
  the same accuracies, unless a rounding tips one photo over);
* ordinary: nothing is frozen, nothing is kept.

The figures go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import optuna_trials as example  # pyright: ignore[reportMissingImports]

from torchrecycle import recycle
from torchrecycle.demo.weights import lite0_state
from torchrecycle.sweep.environment import machine, versions

RESULTS = Path(__file__).parent / "results"
WAYS = ("one fill", "frozen", "ordinary")


class Trials:
    """The model, the photos, and each way to try."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        weights = folder / "lite0.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, weights)
        self.trunk = example.load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=weights, size=asked.size)
        found = example.find_pictures(
            asked.cars / "images.tar", labels=asked.cars / "labels.csv", label_column="class_id"
        )
        self.train, self.held_out, _ = example.split(found, self.trunk, asked.classes)
        self.model: nn.Sequential = example.classifier(self.trunk, len(self.train.classes))
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def one_fill(self) -> dict[str, Any]:
        began = time.perf_counter()
        with self._attached() as recycling:
            batches = (
                recycling.loader(self.train, batch_size=self.asked.batch, shuffle=True),
                recycling.loader(self.held_out, batch_size=self.asked.batch),
            )
            filled = time.perf_counter() - began
            bytes_kept = recycling.stats.bytes_written
            return {"filling s": filled, "kept MB": bytes_kept / 1e6, **self._study(*batches, began=began)}

    def frozen(self) -> dict[str, Any]:
        with self._attached() as recycling, recycling.paused():
            return self._study(*self._plain())

    def ordinary(self) -> dict[str, Any]:
        return self._study(*self._plain())

    def _attached(self) -> Any:
        example_batch = torch.stack([self.train[0][0], self.train[1][0]])
        return recycle(self.model, example_batch, cut=f"0.{self.asked.cut}", store=self.folder / "activations")

    def _plain(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        return (
            DataLoader(self.train, batch_size=self.asked.batch, shuffle=True),
            DataLoader(self.held_out, batch_size=self.asked.batch),
        )

    def _study(self, *batches: DataLoader[Any], began: float | None = None) -> dict[str, Any]:
        began = time.perf_counter() if began is None else began
        study = example.study_of(example.Objective(self.model, *batches, self.asked.epochs), self.asked.trials)
        seconds = time.perf_counter() - began
        self.model.load_state_dict(self.start)
        epochs = sum(len(trial.intermediate_values) for trial in study.trials)
        pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
        return {
            "seconds": seconds,
            "epochs": epochs,
            "seconds per epoch": seconds / epochs,
            "pruned": pruned,
            "best accuracy": study.best_value,
            "best": study.best_params,
            "accuracies": [list(trial.intermediate_values.values()) for trial in study.trials],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--cut", default="blocks.4")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path, help="where to write the figures; benchmarks/results/ if not given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(asked, Path(folder))
        run: dict[str, Callable[[], dict[str, Any]]] = {
            "one fill": trials.one_fill,
            "frozen": trials.frozen,
            "ordinary": trials.ordinary,
        }
        print(f"{len(trials.train)} photos to train on, {len(trials.held_out)} to be asked about; {machine()}")
        figures = {}
        for way in asked.ways:
            figures[way] = run[way]()
            _show(way, figures[way])
    _write(asked, trials, figures)


def _show(way: str, found: dict[str, Any]) -> None:
    filling = (
        f", of which filling {found['filling s']:.1f} s, {found['kept MB']:.0f} MB" if "filling s" in found else ""
    )
    print(
        f"{way:10}{found['seconds']:8.1f} s for {found['epochs']} epochs of {len(found['accuracies'])} trials, "
        f"{found['pruned']} pruned; best {found['best accuracy']:.3f}{filling}",
        flush=True,
    )


def _write(asked: argparse.Namespace, trials: Trials, figures: dict[str, dict[str, Any]]) -> None:
    processor, _, threads = machine(torch.device("cpu")).partition(", ")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{processor} {threads}".lower()).strip("-")
    path = asked.json or RESULTS / f"trials-{slug}-{date.today()}.json"
    what = {name: getattr(asked, name) for name in ("classes", "trials", "epochs", "batch", "size", "cut")}
    content = {
        "command": "python benchmarks/trials.py cars/ " + " ".join(f"--{name} {value}" for name, value in what.items()),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "model": "tf_efficientnet_lite0",
        "photos": {"train": len(trials.train), "held out": len(trials.held_out)},
        **what,
        "ways": figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"kept: {path}")


if __name__ == "__main__":
    main()
