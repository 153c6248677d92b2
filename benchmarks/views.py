"""What does augmentation cost with recycling, and what does it bring: in pixels, as views, and in activations?

    python benchmarks/views.py --cars cars/
    python benchmarks/views.py --table docs/augmentation.md --plot docs/augmentation.svg

``cars/`` holds ``images.tar`` and ``labels.csv`` (file, class_id), the Stanford cars; weights come from the packages of
the extra ``demo``. EfficientNet-Lite0 is cut at 50 and at 75 % and the rest trained on a quarter of the photos of half
of the models, to find photos of models that it has never seen, by R-precision. All trainings of a level have the same
epochs, order of batches and start. They differ in what is augmented:

* nothing;
* the pixels, kept in 1, 2, 4 and 8 views: one view is a fixed augmentation. Of the whole picture, squeezed into a
  square as for the test, 60 to 100 % of the area are cut out, then a flip, and jitter of brightness, contrast and
  saturation (crops that are not squeezed as the test's pictures are lose 3 points and more to no augmentation);
* the pixels, live: each epoch reads, augments and runs the frozen layers anew;
* the activations, with nothing else and beside 4 views: what ``augment=`` of `recycle` does.

Each training is kept under ``benchmarks/results/`` when it ends, and a run that was stopped goes on there. What is kept
of the test photos' scores are their means by model, from which standard errors of differences are taken, object by
object: the objects of a model are one draw.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from precision import RESULTS, cars  # pyright: ignore[reportMissingImports]
from torchrecycle import Recycling, recycle
from torchrecycle.augment import Brightness, Contrast, Mixup, Noise
from torchrecycle.data import Views
from torchrecycle.sweep import ObjectiveTask, Split
from torchrecycle.sweep.environment import machine, versions
from torchrecycle.sweep.estimates import difference
from torchrecycle.sweep.fit import fit
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Estimate

LEVELS = (0.5, 0.75)
SETTINGS = ("size", "epochs", "seeds", "fraction", "tested", "crop", "jitter")
VIEWS = (1, 2, 4, 8)
BESIDE = 4
"""With how many views augmentations of activations are tried too."""

AUGMENTATIONS: dict[str, Callable[[], Any]] = {
    "brightness": lambda: Brightness(0.1, per="channel range"),
    "contrast": lambda: Contrast(0.4, per="channel"),
    "noise": lambda: Noise(0.3),
    "mixup": lambda: Mixup(1.0),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to augment."""

    name: str
    views: int | None
    """Of the augmented pixels; 0 for pixels as they are, None for live ones."""
    augment: str | None = None


def arms() -> list[Arm]:
    """All that is compared, those first that belong to a plot of quality against views."""
    found = [Arm("none", 0), *(Arm(f"{k} view{'s' if k > 1 else ''}", k) for k in VIEWS), Arm("live", None)]
    for views in (0, BESIDE):
        beside = f"{views} views, " if views else ""
        found += [Arm(f"{beside}{name}", views, name) for name in AUGMENTATIONS]
    return found


# -- data --------------------------------------------------------------------------------------------------------------


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pictures of a task under random transforms: ``(image [3, size, size], label [])``.

    Args:
        objects: of a task of pictures.
        crop: the least share of the area that is cut out.
        jitter: of brightness, contrast and saturation.
    """

    def __init__(self, objects: Any, crop: float, jitter: float) -> None:
        from torchvision.transforms import v2

        given = objects.preprocessing
        if given.crop is not None:
            raise ValueError(f"pictures are cropped for the test ({given}): squeeze the augmented ones in the same way")
        side, how = round(1.25 * given.size), v2.InterpolationMode(given.interpolation)
        self.objects = objects
        self.transform = v2.Compose(
            [
                v2.Resize([side, side], interpolation=how),
                v2.RandomResizedCrop(given.size, scale=(crop, 1.0), ratio=(0.9, 1.1), interpolation=how),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(jitter, jitter, jitter),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(given.mean, given.std),
            ]
        )
        self.fixed = Views(self, 1)

    def __recycle_state__(self) -> Any:
        return self.objects, self.transform  # what is fixed is of this very data set

    def kept(self, views: int) -> dict[str, Any]:
        """What a loader takes, so that so many views are kept. One is none in the eyes of the library: a random
        transform would be frozen, which is what is to be measured here."""
        return {"dataset": self.fixed} if views == 1 else {"dataset": self, "views": views}

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.transform(self.objects.pictures[index].image().convert("RGB"))
        return image.as_subclass(torch.Tensor), torch.tensor(self.objects.labels[index])


def tested(task: ObjectiveTask, share: float) -> ObjectiveTask:
    """The task with the photos of a share of the models that are tested."""
    models = sorted(set(task.test.labels))
    kept = set(models[:: max(1, round(1 / share))])
    chosen = [i for i, label in enumerate(task.test.labels) if label in kept]
    labels = tuple(task.test.labels[i] for i in chosen)
    name = None if task.test.name is None else f"{task.test.name}, {len(kept)} models"
    return replace(task, test=Split(torch.utils.data.Subset(task.test.dataset, chosen), labels, name))


# -- one training ------------------------------------------------------------------------------------------------------


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """What trains within this context is as before afterwards."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if not torch.equal(tensor, start[name]):
                    tensor.copy_(start[name])


class Mixed(nn.Module):
    """A loss whose targets are mixed as the activations were."""

    def __init__(self, loss: nn.Module, mixup: Mixup) -> None:
        super().__init__()
        self.loss, self.mixup = loss, mixup

    def forward(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.mixup.loss(self.loss, output, targets)


def with_augment(task: ObjectiveTask, recycling: Recycling, arm: Arm) -> ObjectiveTask:
    """The task of an arm; the recycling augments from now on as the arm says."""
    augment = None if arm.augment is None else AUGMENTATIONS[arm.augment]()
    recycling.augment = augment
    if not isinstance(augment, Mixup):
        return task
    objective, plain = copy.copy(task.objective), task.objective

    def make_loss(dim: int, recipe: Recipe, seed: int) -> nn.Module:
        return Mixed(plain.make_loss(dim, recipe, seed), augment)

    objective.make_loss = make_loss
    return replace(task, objective=objective)


def trained(task: ObjectiveTask, recycling: Recycling, augmented: Augmented, arm: Arm, seed: int) -> dict[str, Any]:
    """One training from the pretrained weights: seconds of each epoch, and the mean score of each model tested."""
    model, level = recycling.model, f"{recycling.level:.0%}".removesuffix("%")
    own = with_augment(task, recycling, arm)
    recipe = own.recipe(level, recycling.level)
    arguments = own.loader_arguments(recipe, seed=seed)
    with ExitStack() as stack:
        stack.enter_context(put_back(model))
        if arm.views is None:
            stack.enter_context(recycling.paused())
            loader: Any = DataLoader(augmented, **arguments)
        elif arm.views:
            loader = recycling.loader(**augmented.kept(arm.views), **arguments)
        else:
            loader = recycling.loader(own.train.dataset, name=own.train.name, **arguments)
        points = fit(own, model, list(recycling.parameters()), loader, recipe, seed=seed)
        recycling.augment = None
        scores = tested_scores(task, recycling)
    ends = [0.0, *(point.seconds for point in points)]
    return {
        "epoch_seconds": [round(end - begin, 3) for begin, end in itertools.pairwise(ends)],
        "losses": [round(point.loss, 5) for point in points],
        "by_model": [round(score, 6) for score in scores],
    }


def tested_scores(task: ObjectiveTask, recycling: Recycling) -> list[float]:
    """The mean score of the photos of each model that is tested, in the order of the models' numbers."""
    loader = recycling.loader(task.test.dataset, name=task.test.name, **task.eval_arguments())
    found = task.evaluate(recycling.model, loader, task.test).scores[task.objective.metric]
    each: dict[int, list[float]] = {}
    for label, score in zip(task.test.labels, found, strict=True):
        each.setdefault(label, []).append(score)
    return [statistics.mean(each[label]) for label in sorted(each)]


def expanded(by_model: Sequence[float], counts: Sequence[int]) -> list[float]:
    """A score for each photo again. Means and standard errors over models are those of the photos' own scores."""
    return [score for score, count in zip(by_model, counts, strict=True) for _ in range(count)]


# -- all of it ---------------------------------------------------------------------------------------------------------


class Journal:
    """The results of a run, written after each step, and read again by one that goes on."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"about": about, "levels": {}}
        if path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            settings = {**about["settings"], "seeds": before["about"]["settings"]["seeds"]}  # more of them may come
            if before["about"]["settings"] != settings:
                raise SystemExit(f"{path} has results of other settings, {before['about']['settings']}: remove it")
            self.found = {**before, "about": {**before["about"], "settings": about["settings"]}}

    def level(self, level: float) -> dict[str, Any]:
        return self.found["levels"].setdefault(f"{level:g}", {"fill": {}, "arms": {}})

    def keep(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def fill(task: ObjectiveTask, recycling: Recycling, augmented: Augmented, found: dict[str, Any]) -> None:
    """Keep the rows of all arms, and what each costs.

    Views are added to those that are there, as a user does. From nothing, so many views take the reading of that pass
    and the computing of all until then.
    """
    arguments = task.eval_arguments()
    recycling.fill(task.test.dataset, name=task.test.name, **arguments)
    costs: dict[str, Any] = {}
    prefix = nbytes = 0.0
    for views in (0, *VIEWS):
        if views == 0:
            report = recycling.fill(task.train.dataset, name=task.train.name, **arguments)
            costs["0"] = cost(report.seconds, report.bytes_written)
            continue
        report = recycling.fill(**augmented.kept(views), **arguments)
        prefix, nbytes = prefix + report.prefix_seconds, nbytes + report.bytes_written
        costs[str(views)] = cost(report.seconds - report.prefix_seconds + prefix, nbytes)
        print(f"  {views} views: {report}", flush=True)
    found["fill"] = found["fill"] or costs  # of the first run: one that goes on measures it once more


def cost(seconds: float, nbytes: float) -> dict[str, Any]:
    return {"seconds": round(seconds, 2), "bytes": int(nbytes)}


class Side:
    """One level: a recycling whose rows are filled when the first training asks for them."""

    def __init__(
        self, task: ObjectiveTask, augmented: Augmented, level: float, journal: Journal, stack: ExitStack
    ) -> None:
        self.task, self.level, self.journal, self.stack = task, level, journal, stack
        self.found = journal.level(level)
        self.augmented = augmented
        self.recycling: Recycling | None = None

    def filled(self) -> Recycling:
        if self.recycling is None:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory())
            model, example = self.task.build_model(), self.task.example()
            self.recycling = self.stack.enter_context(recycle(model, example, level=self.level, store=folder))
            self.found |= {"cut": self.recycling.cut, "level": self.recycling.level}
            print(f"{self.level:.0%}, cut at {self.recycling.cut}", flush=True)
            fill(self.task, self.recycling, self.augmented, self.found)
            if "pretrained" not in self.found:
                self.found["pretrained"] = self.quality(tested_scores(self.task, self.recycling))
            self.journal.keep()
        return self.recycling

    def quality(self, by_model: Sequence[float]) -> float:
        return statistics.mean(expanded(by_model, self.journal.found["counts"]))

    def measure(self, arm: Arm, seed: int) -> None:
        """Train, if that was not done before."""
        done = self.found["arms"].setdefault(arm.name, {})
        if str(seed) in done:
            return
        recycling, began = self.filled(), time.perf_counter()
        one = trained(self.task, recycling, self.augmented, arm, seed)
        done[str(seed)] = one
        self.journal.keep()
        epoch, whole = statistics.median(one["epoch_seconds"]), time.perf_counter() - began
        words = f"{self.level:.0%}, seed {seed}, {arm.name}: {self.quality(one['by_model']):.4f}"
        print(f"{words}, {epoch:.1f} s an epoch, {whole:.0f} s", flush=True)


# -- what came of it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What one arm gave at one level."""

    arm: Arm
    quality: float
    better: Estimate | None
    """Than no augmentation, object by object."""
    fill_seconds: float
    epoch_seconds: float
    """The median over epochs and seeds."""
    epochs: int
    nbytes: int

    @property
    def total(self) -> float:
        return self.fill_seconds + self.epochs * self.epoch_seconds


def lines(results: dict[str, Any], level: dict[str, Any]) -> list[Line]:
    counts = results["counts"]
    clusters = [number for number, count in enumerate(counts) for _ in range(count)]

    def scores(name: str) -> list[list[float]]:
        return [expanded(one["by_model"], counts) for one in level["arms"][name].values()]

    found = []
    for arm in arms():
        if not level["arms"].get(arm.name):
            continue
        each = list(level["arms"][arm.name].values())
        quality = statistics.mean(statistics.mean(one) for one in scores(arm.name))
        better = None if arm.name == "none" else difference(scores(arm.name), scores("none"), clusters)
        costs = {"seconds": 0.0, "bytes": 0} if arm.views is None else level["fill"][str(arm.views)]
        epoch = statistics.median(second for one in each for second in one["epoch_seconds"])
        epochs = len(each[0]["epoch_seconds"])
        found.append(Line(arm, quality, better, costs["seconds"], epoch, epochs, costs["bytes"]))
    return found


def table(results: dict[str, Any]) -> str:
    """Both levels as Markdown."""
    parts = []
    for name, level in results["levels"].items():
        found = lines(results, level) if level["arms"] else []
        if not found:
            continue
        parts.append(
            f"**{float(name):.0%} recycled** (cut at `{level['cut']}`; the pretrained model as it is: "
            f"{level['pretrained']:.4f})\n"
        )
        parts.append("| augmentation | R-precision | better than none, points | fill, s | epoch, s | all, s | MB |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- |")
        for line in found:
            better = "" if line.better is None else f"{100 * line.better.mean:+.2f} ± {100 * line.better.error:.2f}"
            parts.append(
                f"| {line.arm.name} | {line.quality:.4f} | {better} | {line.fill_seconds:.0f} | "
                f"{line.epoch_seconds:.1f} | {line.total:.0f} | {line.nbytes / 1e6:,.0f} |"
            )
        parts.append("")
    return "\n".join(parts)


BEGIN, END = "<!-- benchmarks/views.py writes from here -->", "<!-- to here -->"


def write_table(path: Path, results: dict[str, Any], source: Path) -> None:
    """Into the page, between the marks; a page that is not there is made."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Augmentation\n\n{BEGIN}\n{END}\n"
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{path} has no place for the table: put '{BEGIN}' and '{END}' on lines of their own")
    before, rest = page.split(BEGIN)
    about = results["about"]
    settings = about["settings"]
    told = " ".join(f"--{name} {settings[name]:g}" for name in SETTINGS)
    link = f"../benchmarks/results/{source.name}"
    words = (
        f"`python benchmarks/views.py --cars cars/ {told}` on "
        f"{about['machine']}, {about['date']}: {results['objects']:,} photos are trained on, "
        f"{sum(results['counts']):,} of {len(results['counts'])} other models are looked for. The figures are kept in "
        f"[`benchmarks/results/{source.name}`]({link})."
    )
    path.write_text(f"{before}{BEGIN}\n\n{words}\n\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


COLOURS = {"0.5": "#1f6fb2", "0.75": "#c4561b"}


def plot(path: Path, results: dict[str, Any]) -> None:
    """Quality against the number of views, and against seconds, with what live augmentation and none give."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "torchrecycle", "font.size": 9}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_views, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, level in results["levels"].items():
        if not level["arms"]:
            continue
        found = {line.arm: line for line in lines(results, level) if line.arm.augment is None}
        of_views = [line for arm, line in found.items() if arm.views]
        colour, label = COLOURS.get(name, "#444444"), f"{float(name):.0%} recycled"
        errors = [line.better.error if line.better else 0.0 for line in of_views]
        counts = [line.arm.views for line in of_views]
        qualities = [line.quality for line in of_views]
        by_views.errorbar(counts, qualities, errors, color=colour, marker="o", capsize=2, label=label)
        seconds = [line.total for line in of_views]
        by_seconds.plot(seconds, qualities, color=colour, marker="o", label=label)
        for line in of_views:
            by_seconds.annotate(
                str(line.arm.views), (line.total, line.quality), textcoords="offset points", xytext=(4, 4)
            )
        for arm, line in found.items():
            if arm.views:
                continue
            style, mark = ("--", "s") if arm.views is None else (":", "x")
            by_views.axhline(line.quality, color=colour, linestyle=style, linewidth=1)
            by_seconds.plot([line.total], [line.quality], color=colour, marker=mark, linestyle="none")
    by_views.set_xscale("log", base=2)
    by_views.set_xticks(VIEWS, [str(count) for count in VIEWS])
    by_views.set_xlabel("views (dashed: live augmentation, dotted: none)")
    by_seconds.set_xlim(left=0)
    by_seconds.set_xlabel("seconds, filling and training (square: live, cross: none)")
    by_views.set_ylabel("R-precision of models never seen")
    by_views.legend(frameon=False)
    for axes in (by_views, by_seconds):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def latest() -> Path:
    found = sorted(RESULTS.glob("views-*.json"), key=lambda path: path.stem[-10:])
    if not found:
        raise SystemExit("there are no results yet: run benchmarks/views.py --cars cars/")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cars", type=Path, help="a folder with images.tar and labels.csv")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the training split")
    parser.add_argument("--tested", type=float, default=0.5, help="share of the models that are looked for")
    parser.add_argument("--crop", type=float, default=0.6, help="least share of the area of a random crop")
    parser.add_argument("--jitter", type=float, default=0.2, help="of brightness, contrast and saturation")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--results", type=Path, help="the file of results to go on with, or to show")
    parser.add_argument("--no-results", action="store_true", help="only print")
    parser.add_argument("--table", type=Path, help="write the tables into this page")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.cars is not None:
        run(given)
    elif given.table is None and given.plot is None:
        parser.error("give --cars to measure, or --table and --plot to show what was measured")
    if given.table is not None or given.plot is not None:
        source = given.results or latest()
        results = json.loads(source.read_text(encoding="utf-8"))
        if given.table is not None:
            write_table(given.table, results, source)
        if given.plot is not None:
            plot(given.plot, results)


def run(given: argparse.Namespace) -> None:
    settings = {name: getattr(given, name) for name in SETTINGS}
    where = machine(torch.device("cpu"))
    about = {"date": f"{date.today():%Y-%m-%d}", "machine": where, "versions": versions(), "settings": settings}
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    path = given.results or RESULTS / f"views-{slug}-{about['date']}.json"
    journal = Journal(None if given.no_results else path, about)
    task = tested(cars(given.cars, given), given.tested)
    journal.found |= {
        "metric": task.objective.metric,
        "objects": len(task.train),
        "counts": [task.test.labels.count(label) for label in sorted(set(task.test.labels))],
    }
    with ExitStack() as stack:
        augmented = Augmented(task.train.dataset, given.crop, given.jitter)
        sides = [Side(task, augmented, level, journal, stack) for level in LEVELS]
        for seed in range(given.seeds):
            for side in sides:
                for arm in arms():
                    side.measure(arm, seed)
    print(table(journal.found))


if __name__ == "__main__":
    main()
