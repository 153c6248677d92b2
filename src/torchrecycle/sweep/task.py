"""A task: what is learned from which data, and how good a model is at it.

Four members make one; all else has a default:

    class Colours(Task):
        def __init__(self, train, test):
            self.train, self.test = train, test

        def fit(self, model, loader, trial):
            optimizer = torch.optim.AdamW(trial.parameters, lr=trial.recipe.suffix_rate)
            for epoch in range(1, trial.recipe.epochs + 1):
                for images, labels in loader:
                    loss = F.cross_entropy(model(images), labels)
                    optimizer.zero_grad(); loss.backward(); optimizer.step()
                if not trial.ended(epoch, loss.detach()):
                    break

        def evaluate(self, model, loader):
            return sum(float((model(x).argmax(1) == y).sum()) for x, y in loader) / len(self.test)

`fit` and `evaluate` get the model that `build_model` gave and a loader of its batches, recycled or not: nothing in a
task knows about recycling. What is finished is kept under the task's identity, so a task's attributes are what it
depends on, and nothing that changes by itself.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.recipes import USUAL, Recipe, usual_recipe
from torchrecycle.sweep.results import Found, Kind, Sample
from torchrecycle.sweep.trial import RunningTrial

__all__ = ["Evaluation", "NotFiniteFigureError", "Split", "Task", "as_evaluation", "refuse_the_same"]


class NotFiniteFigureError(SweepError, NotFiniteError):
    """A task's `evaluate` gave NaN or infinity. While a rate is looked for, that rate has diverged."""


@dataclass(frozen=True, slots=True)
class Split:
    """Some objects of a data set."""

    dataset: Any = field(repr=False)
    """Map-style: items are ``(image, label)`` or dicts of tensors. Of pairs, all left texts and then all right ones."""
    labels: tuple[int, ...] = ()
    """The class of each object; empty for pairs, and where nobody asks for it."""
    name: str | None = None
    """What tells it from every other, transforms and targets included; None if nothing does."""
    sample: Callable[[int], Sample] | None = field(default=None, repr=False)
    """An object as it is shown; None if nothing is to be shown."""

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model is on a split."""

    quality: dict[str, float]
    """Per metric; more is better: of a loss or an error, give the negative."""
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    """Per metric, what each object asked contributes: `quality` is their mean. By them it is told how sure a figure
    is; without them, only several seeds tell."""
    found: tuple[Found, ...] = field(default=(), repr=False)
    """What it finds for the objects that were asked for."""


TARGETS = ("labels", "label", "targets", "target", "y", "pair")
"""Names under which a batch that is a dict may hold what is to be learned."""


class Task(ABC):
    """What is learned, from which data, and how it is judged. See the head of this module for an example.

    `train` and `test`, and `validation` if a rate is to be looked for, are map-style data sets, or `Split`s with a name
    of their own; no two may be the same. Of each figure that `evaluate` gives more must be better, since levels and
    rates are chosen by it: of a loss or an error, give the negative.
    """

    train: Any
    test: Any
    """Objects that training never sees."""
    validation: Any = None
    """What a rate is chosen on; without it, the recipe's is taken."""

    kind: Kind = "objects"
    title: str = "How good is it at each level?"
    """What is asked, for a heading."""
    metric: str | None = None
    """Which figure stands for the quality; the first that `evaluate` gives, if None."""
    metrics: Mapping[str, str] = MappingProxyType({})
    """Figures with what they mean, in one sentence; those that are not named here are shown by their name."""
    identity: str | None = None
    """What tells the task from every other. If None, that is told from the content of its data sets, its attributes and
    its class's own code; where it cannot be told, a sweep is refused."""
    device: Any = None
    """Where the model is put; where `build_model` has put it, if None."""
    collate: Any = None
    """The loader's collate function."""
    workers: int = 0
    """Processes that read."""
    evaluation_batch: int = 64
    """Objects in a batch that is filled or evaluated."""
    cuts: Mapping[str, str] = MappingProxyType({})
    """Levels with the module to cut at; the nearest valid cut for any other."""
    recycling: Mapping[str, Any] = MappingProxyType({})
    """What else `recycle` is to be told: ``inputs=``, ``mask=``, ``autocast=``."""

    # What is said of it.
    model: str = ""
    weights: str = "as build_model gives them"
    random_weights: bool = False
    data: str = ""
    left_out: tuple[str, ...] = ()
    loss: str = "as the task's fit has it"
    settings: Mapping[str, str] = MappingProxyType({})
    licences: tuple[str, ...] = ()
    pretrained: str = "the model as it comes"
    """What one takes who does not train."""

    @abstractmethod
    def fit(self, model: nn.Module, loader: Any, trial: RunningTrial) -> Any:
        """Train in place.

        Args:
            model: what `build_model` gave, with its first weights.
            loader: gives an epoch's batches each time it is iterated.
            trial: parameters to train, recipe, seed; to be told of each epoch.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation | Mapping[str, float] | float:
        """Figures of merit, of which more is better: of a loss or an error, the negative. The model is in eval mode,
        and no gradients are kept.

        Args:
            model: trained or not.
            loader: the batches of a whole split, in its order.
        """

    # -- what may be overridden ----------------------------------------------------------------------------------------

    def recipe(self, level: str, share: float) -> Recipe:
        """How a level is trained if no other rate is found."""
        return usual_recipe(USUAL, level, share, len(self.splits()["train"]))

    def rate_is_given(self, level: str) -> bool:
        """Whether none is to be looked for at a level."""
        return False

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        """What a loader over the training split takes; a new generator each time."""
        generator = torch.Generator().manual_seed(seed)
        return {"batch_size": recipe.batch_size, "shuffle": True, "generator": generator, **self._reading()}

    def eval_arguments(self) -> dict[str, Any]:
        """What a loader over any split takes that gives it in its order, also good to fill with."""
        return {"batch_size": self.evaluation_batch, **self._reading()}

    def _reading(self) -> dict[str, Any]:
        return {"collate_fn": self.collate, "num_workers": self.workers}

    def inputs(self, batch: Any) -> Any:
        """What of a batch the model takes, as `recycle` wants its example: a tensor, a tuple, or a dict by names."""
        if isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name not in TARGETS}
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return batch[0] if isinstance(batch, (tuple, list)) and batch else batch

    def example(self) -> Any:
        """A small batch of model inputs, two objects of the training split and two others."""
        data = self.splits()["train"].dataset
        chosen = sorted({0, min(1, len(data) - 1), len(data) // 2, len(data) - 1})
        collate = self.collate or torch.utils.data.default_collate
        return self.inputs(collate([data[i] for i in chosen]))

    def clusters(self) -> Sequence[int] | None:
        """For each score of the test split, which ones are easy or hard together; None: each by itself."""
        return None

    # -- what the sweep asks -------------------------------------------------------------------------------------------

    def splits(self) -> dict[str, Split]:
        """``train``, ``validation`` (if there is one) and ``test``.

        Raises:
            SweepError: one that is needed is missing, empty or no map-style data set, or two are one.
        """
        found: dict[str, Split] = {}
        for name in ("train", "validation", "test"):
            given = getattr(self, name, None)
            if given is not None:
                found[name] = _as_split(self, name, given)
            elif name != "validation":
                raise SweepError(f"{type(self).__name__}.{name} is missing: give it a data set")
        refuse_the_same({name: id(split.dataset) for name, split in found.items()}, type(self).__name__, "data set")
        return found

    def untrained(self, build_model: Callable[[], nn.Module]) -> nn.Module:
        """The model that stands for no training."""
        return build_model()

    def judged(
        self, model: nn.Module, loader: Any, split: Split, queries: Sequence[int], known: Iterable[Any] | None
    ) -> Evaluation:
        """`evaluate`, as the sweep asks it.

        Args:
            model: in eval mode.
            loader: of the split.
            split: which.
            queries: objects for which to tell what is nearest.
            known: None for a trained model; of an untrained one, the batches of the training split.
        """
        return as_evaluation(self.evaluate(model, loader), type(self).__name__, self.metric)


def refuse_the_same(splits: Mapping[str, Any], whose: str, what: str) -> None:
    """Refuse a split that is another one, too.

    Args:
        splits: what tells each from the others, by name.
        whose: the task's name.
        what: they would have in common.

    Raises:
        SweepError: two are alike.
    """
    first: dict[Any, str] = {}
    for name, told in splits.items():
        other = first.setdefault(told, name)
        if other != name:
            why = _WHY_NOT[name]
            raise SweepError(f"{whose}: {other} and {name} are the same {what}: {why}. Give each objects of its own")


_WHY_NOT = {
    "test": "test must be objects that neither a training nor the choice of a rate has seen, or its figures say "
    "nothing of new ones",
    "validation": "a rate must be chosen on objects that no training has seen",
}


def _as_split(task: Task, name: str, given: Any) -> Split:
    split = given if isinstance(given, Split) else Split(given)
    where, data = f"{type(task).__name__}.{name}", split.dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SweepError(
            f"{where} is a {type(data).__name__}, which has no length or no items by index: a sweep goes over the same "
            "objects many times, and needs a map-style data set, with __len__ and __getitem__"
        )
    if not len(data):
        raise SweepError(f"{where} is empty: give it objects")
    return split


def as_evaluation(found: Any, whose: str, metric: str | None) -> Evaluation:
    """What a user's `evaluate` gave, in one form.

    Args:
        found: an `Evaluation`, figures by name, or one figure.
        whose: the name of the task, for errors.
        metric: the one that must be there, if any.

    >>> as_evaluation(0.5, "Mine", None).quality
    {'quality': 0.5}

    Raises:
        SweepError: it is none of these, a figure is no finite number or not the mean of its scores, or less of it is
            better.
    """
    if not isinstance(found, Evaluation):
        figures = found if isinstance(found, Mapping) else {metric or "quality": found}
        found = Evaluation({str(name): _figure(value, str(name), whose) for name, value in figures.items()})
    for name, value in found.quality.items():
        if not math.isfinite(_figure(value, name, whose)):
            raise NotFiniteFigureError(
                f"{whose}.evaluate gave {value} for {name}: give a finite number. Has the training diverged, or was "
                "nothing counted?"
            )
    for name, each in found.scores.items():
        if name not in found.quality:
            raise SweepError(f"{whose}.evaluate gave scores of {name}, but no quality of that name")
        if all(math.isnan(score) for score in each) or any(math.isinf(score) for score in each):
            raise SweepError(f"{whose}.evaluate gave scores of {name} of which none is a number, or one is infinite")
        _refuse_another_mean(found.quality[name], each, name, whose)
    if not found.quality or (metric is not None and metric not in found.quality):
        raise SweepError(
            f"{whose}.evaluate gave {', '.join(found.quality) or 'no figure'}, and not the metric "
            f"{metric or 'of the task'}: more is better, and one figure is needed"
        )
    _refuse_a_loss(found.quality, metric or next(iter(found.quality)), whose)
    return found


def _refuse_another_mean(value: Any, scores: Sequence[float], name: str, whose: str) -> None:
    asked = [float(score) for score in scores if not math.isnan(score)]
    mean = math.fsum(asked) / len(asked)
    if not math.isclose(float(value), mean, rel_tol=1e-3, abs_tol=1e-4):  # sums of float16 may be so far off
        raise SweepError(
            f"{whose}.evaluate gave {float(value):.4g} for {name}, and scores of it with a mean of {mean:.4g}: scores "
            f"are what each object contributes to the mean. Where {name} is no mean over objects, as F1 is none, leave "
            "its scores out and give several seeds"
        )


_LESS_IS_BETTER = frozenset(
    {"loss", "losses", "error", "errors", "err", "mse", "rmse", "mae", "nll", "wer", "cer", "perplexity", "entropy"}
)
"""Words in the names of figures of which less is better."""


def _refuse_a_loss(figures: Mapping[str, Any], metric: str, whose: str) -> None:
    """The figure that levels and rates are chosen by must not be a loss; below 0 it has been negated."""
    words = set(re.split(r"[^a-z]+", metric.lower()))
    if words & _LESS_IS_BETTER and not words & {"neg", "negative", "minus"} and float(figures[metric]) > 0:
        raise SweepError(
            f"{whose}.evaluate gave {metric} {float(figures[metric]):.4g}, by which levels and rates would be chosen, "
            f"and more is better: the highest {metric} would be called the best. Give its negative, or a figure of "
            "merit first, and others behind it"
        )


def _figure(value: Any, name: str, whose: str) -> float:
    try:
        if isinstance(value, (str, bytes, bool)) or value is None:
            raise TypeError
        if isinstance(value, Tensor):
            value = value.item()
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SweepError(
            f"{whose}.evaluate gave {value!r} for {name}, a {type(value).__name__}: give a number, a dict of numbers "
            "by metric, or an Evaluation"
        ) from error
