"""Which rate, weight decay and dropout? Twenty trials of Optuna's over one fill.

    python examples/optuna_trials.py photos/ --pretrained                                    # photos/CLASS/*.jpg
    python examples/optuna_trials.py images.tar --labels labels.csv --label-column class_id --classes 10 --pretrained

What the layers up to ``--cut`` give for a photo is the same in every trial, since they are frozen: it is computed once,
before the first. Each trial begins with the same weights, trains what lies after the cut and a new classifier on three
quarters of the photos, and is asked about the others after each epoch; the median of the trials before it decides
whether it goes on. Optuna and the loop know nothing of rows: they see a `DataLoader` and the model.

``--ordinary`` runs the same trials without recycling, for comparison: each decodes the photos in each epoch, and runs
all layers.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchrecycle import recycle
from torchrecycle.cli.words import say_random
from torchrecycle.errors import RecycleError
from torchrecycle.files.pictures import Picture, find_pictures
from torchrecycle.sweep.trunks import Trunk, load_trunk


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """Photos and the numbers of their classes."""

    def __init__(self, pictures: Sequence[Picture], classes: Sequence[str], transform: Any) -> None:
        self.pictures, self.classes, self.transform = pictures, list(classes), transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = self.pictures[index]
        return self.transform(picture.image()), self.classes.index(picture.label)


def classifier(trunk: Trunk, classes: int) -> nn.Sequential:
    """A pretrained model with dropout and a new linear layer."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.0), nn.Linear(trunk.dim, classes))
    return nn.Sequential(trunk.module, trunk.pool, head)


class Objective:
    """One trial: train with what Optuna suggests, and say how good it became.

    Args:
        model: as `classifier` makes it. Each trial begins with the weights that it has now.
        train: gives the batches of one epoch.
        held_out: gives those that the trial is judged by.
        epochs: of a trial that is not pruned.
    """

    def __init__(self, model: nn.Sequential, train: DataLoader[Any], held_out: DataLoader[Any], epochs: int) -> None:
        self.model, self.train, self.held_out, self.epochs = model, train, held_out, epochs
        self.start = copy.deepcopy(model.state_dict())

    def __call__(self, trial: optuna.Trial) -> float:
        rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
        decay = trial.suggest_float("weight decay", 1e-4, 1e-1, log=True)
        dropout = trial.suggest_float("dropout", 0.0, 0.5)
        torch.manual_seed(0)
        self.model.load_state_dict(self.start)
        self.model[-1][0].p = dropout  # pyright: ignore[reportIndexIssue]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
        accuracy = 0.0
        for epoch in range(self.epochs):
            self._train(optimizer)
            accuracy = self._accuracy()
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        for photos, labels in self.train:
            loss = F.cross_entropy(self.model(photos), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        right = sum(int((self.model(photos).argmax(1) == labels).sum()) for photos, labels in self.held_out)
        return right / len(self.held_out.dataset)  # pyright: ignore[reportArgumentType]


def study_of(objective: Objective, trials: int) -> optuna.Study:
    """The same trials each time, as far as they give the same accuracies."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    study.optimize(objective, n_trials=trials)
    return study


def split(found: Any, trunk: Trunk, classes: int | None) -> tuple[Photos, Photos, str]:
    """Photos to train on, every fourth to be asked about, and a name for both and their preprocessing."""
    assert trunk.preprocessing is not None
    names = sorted({picture.label for picture in found.items})[:classes]
    pictures = [picture for picture in found.items if picture.label in names]
    transform = trunk.preprocessing.transform()
    held_out = pictures[::4]
    train = [picture for number, picture in enumerate(pictures) if number % 4]
    name = f"{found.identity}, {len(names)} classes, {trunk.preprocessing}"
    return Photos(train, names, transform), Photos(held_out, names, transform), name


def run(asked: argparse.Namespace) -> optuna.Study:
    """Load, fill, try, and tell."""
    trunk = load_trunk(asked.model, "images", checkpoint=asked.checkpoint, size=asked.size, pretrained=asked.pretrained)
    if trunk.random:
        say_random(published=True)
    found = find_pictures(asked.where, labels=asked.labels, label_column=asked.label_column, leave_out=[asked.store])
    train, held_out, name = split(found, trunk, asked.classes)
    print(f"{found.where}: {len(train):,} to train on, {len(held_out):,} to be asked about")
    model = classifier(trunk, len(train.classes))
    loading: dict[str, Any] = {"batch_size": asked.batch, "num_workers": asked.workers}
    began = time.perf_counter()
    if asked.ordinary:
        batches = DataLoader(train, shuffle=True, **loading), DataLoader(held_out, **loading)
    else:
        example = torch.stack([train[0][0], train[1][0]])
        recycling = recycle(model, example, cut=f"0.{asked.cut}", store=asked.store)
        batches = (
            recycling.loader(train, shuffle=True, name=f"{name}, train", **loading),
            recycling.loader(held_out, name=f"{name}, held out", **loading),
        )
    filled = time.perf_counter()
    study = study_of(Objective(model, *batches, asked.epochs), asked.trials)
    ended = time.perf_counter()
    pruned = sum(trial.state is optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(
        f"the best of {len(study.trials)} trials, {pruned} of them pruned: {study.best_value:.3f} of the others right"
    )
    print("  ".join(f"{what} {value:.3g}" for what, value in study.best_params.items()))
    print(f"attaching and filling {filled - began:.1f} s, the trials {ended - filled:.1f} s")
    return study


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("where", type=Path, help="a folder, tar or zip: CLASS/PHOTO, or any with --labels")
    add("--labels", type=Path, help="a table that names photos, in its column 'file', and their classes")
    add("--label-column", default="label", help="that table's column of classes")
    add("--classes", type=int, help="use so many of the classes only, for a first try")
    add("--model", default="torchvision/resnet34", help="timm/NAME or torchvision/NAME")
    add("--checkpoint", type=Path, help="a file of weights for this model")
    add("--pretrained", action="store_true", help="the weights that timm or torchvision publish; may download them")
    add("--cut", default="layer3", help="the module of the model whose output is kept")
    add("--size", type=int, help="height and width of photos, in pixels; the model's own if not given")
    add("--trials", type=int, default=20)
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32, help="photos in a step")
    add("--store", type=Path, default=Path("activations"), help="folder for what the frozen layers give")
    add("--workers", type=int, default=0, help="processes that read photos")
    add("--ordinary", action="store_true", help="without recycling: all layers run, and train, in each trial")
    try:
        run(parser.parse_args(arguments))
    except RecycleError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
