"""What may close the gap between a recycled level and full training? Each idea is one line, measured on similar cars.

    python experiments/levers.py --cars cars/

At 50 % and at 75 % recycled, all trainings have the same recipe, seed, order of batches and start, and one thing is
changed:

* head first, then the suffix with it (LP-FT, arXiv 2202.10054): three epochs in which the head alone is trained;
* rates per layer: each of the suffix's stages a rate of 0.7 times that of the next;
* batch norm in train mode: the suffix's own statistics, from the batches;
* a larger batch, at twice the rate;
* cached views: four augmented versions of each photo;
* augmented activations: contrast and mixup, as docs/augmentation.md describes them;
* taps: the head also sees the pooled outputs of the earlier stages, kept in the same rows, through a layer that begins
  at zero (Head2Toe, arXiv 2201.03529; Skip2-LoRA, arXiv 2410.21073).

Each training is kept in ``experiments/results/levers.json`` when it ends, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kept import RESULTS, Kept  # pyright: ignore[reportMissingImports]
from levels import RECIPES  # pyright: ignore[reportMissingImports]
from tasks import cars, device  # pyright: ignore[reportMissingImports]
from torchrecycle import Recycling, recycle
from torchrecycle.augment import Contrast, Mixup
from torchrecycle.sweep import ObjectiveTask, Recipe, RunningTrial, Settings
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.fit import train

VIEWS = 4
HEAD_EPOCHS = 3
DECAY = 0.7


@dataclass(frozen=True, slots=True)
class Lever:
    """What is done otherwise than as usual."""

    name: str
    head_first: int = 0
    """Epochs in which the head alone is trained, before the others."""
    decay: float = 1.0
    """Rate of a stage, of that of the next one."""
    batch_norm: bool = False
    """Whether it is in train mode."""
    recipe: Callable[[Recipe], Recipe] = lambda recipe: recipe
    views: int | None = None
    augment: Callable[[], Any] | None = None
    taps: bool = False


LEVERS = (
    Lever("as usual"),
    Lever(f"head first, {HEAD_EPOCHS} epochs", head_first=HEAD_EPOCHS),
    Lever(f"rates per layer, {DECAY} from stage to stage", decay=DECAY),
    Lever("batch norm in train mode", batch_norm=True),
    Lever(
        "batches of 128, twice the rate",
        recipe=lambda recipe: replace(recipe, batch_size=128, suffix_rate=2 * recipe.suffix_rate),
    ),
    Lever("half the rate", recipe=lambda recipe: replace(recipe, suffix_rate=recipe.suffix_rate / 2)),
    Lever(f"{VIEWS} cached views", views=VIEWS),
    Lever("activations: contrast", augment=lambda: Contrast(0.4, per="channel")),
    Lever("activations: mixup", augment=lambda: Mixup(1.0)),
    Lever("taps from the kept stages", taps=True),
)


# -- the model, divided so that earlier stages can be seen -------------------------------------------------------------


class Front(nn.Module):
    """Stem and first stages: ``(output [batch, dim, height, width], pooled [batch, dims])``, with the means of each
    stage's output."""

    def __init__(self, trunk: Any, stages: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(trunk.conv_stem, trunk.bn1)
        self.stages = nn.ModuleList(trunk.blocks[:stages])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, pooled = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            pooled.append(F.normalize(x.mean((2, 3)), dim=-1))
        return x, torch.cat(pooled, 1)


class Tapped(nn.Module):
    """The same encoder, whose head also sees the stages before the cut.

    Args:
        encoder: an `ImageEncoder` of EfficientNet-Lite0; its layers are taken over.
        stages: of the front, which is what is kept.
    """

    def __init__(self, encoder: Any, stages: int) -> None:
        super().__init__()
        trunk = encoder.trunk
        self.front = Front(trunk, stages)
        self.back = nn.Sequential(*trunk.blocks[stages:], trunk.conv_head, trunk.bn2)
        self.pool, self.head = encoder.pool, encoder.head
        with torch.no_grad():
            taps = sum(stage(x).shape[1] for stage, x in self._inputs())
        width = trunk.num_features
        self.mix = nn.Linear(taps, width, bias=False, device=device())
        nn.init.zeros_(self.mix.weight)

    def _inputs(self) -> Iterator[tuple[nn.Module, Tensor]]:
        x = self.front.stem(torch.zeros(1, 3, 32, 32, device=device()))
        for stage in self.front.stages:
            yield stage, x
            x = stage(x)

    def forward(self, images: Tensor) -> Tensor:
        x, taps = self.front(images)
        return F.normalize(self.head(self.pool(self.back(x)) + self.mix(taps)), dim=-1)


# -- one training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Epochs:
    """How some epochs are trained."""

    level: str
    recipe: Recipe
    seed: int
    batch_norm: bool
    """Whether it is in train mode."""


def groups_of(model: nn.Module, recycling: Recycling, recipe: Recipe, lever: Lever) -> list[dict[str, Any]]:
    """Parameters with their rates: the head's own, and the suffix's, less from stage to stage."""
    heads = {id(p) for name in ("head", "mix") for p in getattr(model, name, nn.Module()).parameters()}
    suffix = [p for p in recycling.parameters() if id(p) not in heads]
    names = {id(p): name for name, p in model.named_parameters()}
    stages: dict[str, list[nn.Parameter]] = {}
    for parameter in suffix:  # in running order: 'trunk.blocks.3.0.conv' is of the stage 'trunk.blocks.3'
        name = names[id(parameter)]
        stages.setdefault(".".join(name.split(".")[: 3 if "blocks" in name else 2]), []).append(parameter)
    found = [{"params": [p for p in recycling.parameters() if id(p) in heads], "lr": recipe.head_rate}]
    for back, stage in enumerate(reversed(list(stages))):
        found.append({"params": stages[stage], "lr": recipe.suffix_rate * lever.decay**back})
    return found


def run_epochs(
    task: ObjectiveTask, model: nn.Module, loss: nn.Module, groups: list[dict[str, Any]], loader: Any, how: Epochs
) -> list[float]:
    """Train as a sweep does; the seconds of each epoch."""
    vectors = {"params": list(loss.parameters()), "lr": how.recipe.class_rate, "weight_decay": 0.0}
    feed = task.feed(model)

    def losses() -> Iterator[Tensor]:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and how.batch_norm:
                module.train()
        return task.objective.losses(feed, loss, loader)

    parameters = tuple(parameter for group in groups for parameter in group["params"])
    trial = RunningTrial(how.level, int(how.level) / 100, how.recipe, how.seed, parameters)
    train(model, [*groups, vectors], losses, len(loader), trial)
    ends = [0.0, *(point.seconds for point in trial.curve)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


class Mixed(nn.Module):
    """A loss whose targets are mixed as the activations were."""

    def __init__(self, loss: nn.Module, mixup: Mixup) -> None:
        super().__init__()
        self.loss, self.mixup = loss, mixup

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.mixup.loss(self.loss, output, targets)


def trained(task: ObjectiveTask, level: str, lever: Lever, seed: int, store: Path) -> dict[str, Any]:
    """One training from the pretrained weights, and the mean score of the photos of each model that is tested."""
    recipe = lever.recipe(RECIPES[level])
    options: dict[str, Any] = {"store": store}
    augment = None if lever.augment is None else lever.augment()
    model, example = task.build_model(), task.example()
    if lever.taps:
        model = Tapped(model, {"50": 3, "75": 5}[level]).eval()
        options["cut"] = "front"
    else:
        options["level"] = int(level) / 100
    with recycle(model, example, augment=augment, **options) as recycling:
        loss = task.objective.make_loss(task.dim, recipe, seed).to(task.device)
        if isinstance(augment, Mixup):
            loss = Mixed(loss, augment)
        groups = groups_of(model, recycling, recipe, lever)
        arguments = task.loader_arguments(recipe, seed=seed)
        if lever.views:
            arguments["views"] = lever.views
        loader = recycling.loader(task.train.dataset, name=task.train.name, **arguments)
        how, first = Epochs(level, recipe, seed, lever.batch_norm), []
        if lever.head_first:
            alone = replace(how, recipe=replace(recipe, epochs=lever.head_first))
            first = run_epochs(task, model, loss, groups[:1], loader, alone)
        seconds = run_epochs(task, model, loss, groups, loader, how)
        recycling.augment = None
        found = tested(task, model, recycling)
    return {**found, "first_seconds": first, "epoch_seconds": statistics.median(seconds), "cut": recycling.cut}


def tested(task: ObjectiveTask, model: nn.Module, recycling: Recycling) -> dict[str, Any]:
    loader = recycling.loader(task.test.dataset, name=task.test.name, **task.eval_arguments())
    found = task.evaluate(model, loader, task.test).scores[task.objective.metric]
    each: dict[int, list[float]] = {}
    for label, score in zip(task.test.labels, found, strict=True):
        each.setdefault(label, []).append(score)
    ordered = [each[label] for label in sorted(each)]
    return {
        "quality": statistics.mean(found),
        "by_model": [round(statistics.mean(scores), 6) for scores in ordered],
        "counts": [len(scores) for scores in ordered],
    }


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, required=True, help="a folder with images.tar and labels.csv")
    parser.add_argument("--store", type=Path, default=Path(".experiments"), help="a folder for activations")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the training photos")
    given = parser.parse_args()
    kept = Kept(RESULTS / "levers.json", {"fraction": given.fraction})
    ran = {"machine": machine(device()), "versions": versions()}
    settings = Settings(fraction=given.fraction, skip_bad=True)
    plain, augmented = None, None
    for seed in range(given.seeds):
        for level in ("75", "50"):
            for lever in LEVERS:
                name = f"{level}, {lever.name}, {seed}"
                if name in kept:
                    continue
                if lever.views:
                    task = augmented = augmented or cars(given.cars, settings=replace(settings, views=lever.views))
                else:
                    task = plain = plain or cars(given.cars, settings=settings)
                one = trained(task, level, lever, seed, given.store / "activations")
                kept.keep(name, {"level": level, "name": lever.name, "seed": seed, **ran, **one})
                print(f"{name}: {one['quality']:.4f}, {one['epoch_seconds']:.1f} s an epoch", flush=True)


if __name__ == "__main__":
    main()
