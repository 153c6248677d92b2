"""A task: data in three splits, a pretrained model, and what is to be learned of it.

`Task` joins a `Split` for training, one for choosing a rate and one for testing with an `Objective`, which says how a
batch becomes a loss and how good a model is. One and the same code trains from a plain `DataLoader` and from a recycled
one; nothing here knows about recycling:

    arguments = task.loader_arguments(recipe, seed=0)
    raw = DataLoader(task.train.dataset, **arguments)
    recycled = recycling.loader(task.train.dataset, **arguments)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads import ResidualHead
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Found, Kind, Sample

__all__ = ["Evaluation", "Objective", "Split", "Task"]


@dataclass(frozen=True, slots=True)
class Split:
    """Some objects of a data set."""

    dataset: Any = field(repr=False)
    """Map-style: items are ``(image, label)`` or dicts of tensors. Of pairs, all left texts and then all right ones."""
    labels: tuple[int, ...] = ()
    """The class of each object; empty for pairs."""
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
    """Per metric, 0 to 1."""
    scores: dict[str, tuple[float, ...]] = field(repr=False)
    """Per metric, what each object asked contributes: `quality` is their mean."""
    found: tuple[Found, ...] = field(default=(), repr=False)
    """What it finds for the objects that were asked for."""


class Objective(ABC):
    """What is learned, and how it is judged."""

    metric: str
    """Which of the figures stands for the quality."""
    metrics: dict[str, str]
    """Each figure with what it means, in one sentence."""
    loss: str
    """In words."""
    unit: bool
    """Whether the model's outputs are embeddings of length one."""
    pretrained: str = "the pretrained model as it is"
    """What one takes who does not train."""

    @abstractmethod
    def make_head(self, dim: int) -> nn.Module:
        """What stands on the trunk: the same each time."""

    @abstractmethod
    def make_loss(self, dim: int, recipe: Recipe, seed: int) -> nn.Module:
        """The loss, with whatever it learns itself."""

    def loader_arguments(self, split: Split, recipe: Recipe, generator: torch.Generator) -> dict[str, Any]:
        """What of a loader's arguments says which objects are in a batch: any, by chance, if not overridden."""
        return {"batch_size": recipe.batch_size, "shuffle": True, "generator": generator}

    def losses(self, feed: Feed, loss: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The loss of each step of an epoch: a batch is a step, unless an objective takes several."""
        for batch in batches:
            yield loss(*feed(batch))

    def steps(self, batches: Sized) -> int:
        """How many steps the batches of an epoch make."""
        return len(batches)

    @abstractmethod
    def evaluate(
        self, feed: Feed, batches: Iterable[Any], split: Split, queries: Sequence[int], *, known: Iterable[Any] | None
    ) -> Evaluation:
        """Figures of merit.

        Args:
            feed: runs the model on a batch.
            batches: the whole split in its order.
            split: which.
            queries: objects for which to tell what is nearest.
            known: None for a trained model; for the pretrained one, whose head does nothing, the batches of the
            training
                split, by which it may know the classes.
        """

    @abstractmethod
    def clusters(self, split: Split) -> tuple[int, ...]:
        """For each score, which ones are easy or hard together."""


Feed = Callable[[Any], tuple[Tensor, Tensor]]
"""Runs the model on a batch: its output, and the batch's targets, on the model's device."""


@dataclass(frozen=True)
class Task:
    """Data, a model and an objective."""

    kind: Kind
    title: str
    """What is asked, for a heading."""
    train: Split
    validation: Split | None
    """What a rate is chosen on; None if recipes are given."""
    test: Split
    """Objects that training never sees."""
    objective: Objective
    build: Callable[[nn.Module, bool], nn.Module] = field(repr=False)
    """From a head, and whether what it gives is made of length one, to the pretrained model with that head: the same
    weights each time, in an object of its own."""
    dim: int
    """How long the features are that the head takes."""
    collate: Callable[[Sequence[Any]], Any] | None = field(repr=False)
    recipe: Callable[[str, float], Recipe] = field(repr=False)
    """From a level, such as ``50``, and the share of the blocks that is recycled, to how it is trained by default."""
    identity: str
    """What tells it from every other task: data, weights, splits and settings, as a hash or in words."""
    data: str
    """The data set, in words."""
    weights: str
    """Where the model's weights came from, in words."""
    model: str
    """The model's name."""
    random_weights: bool = False
    left_out: tuple[str, ...] = ()
    """What of the data is not used, a line each."""
    settings: dict[str, str] = field(default_factory=dict)
    """Whatever else was set, by name."""
    licences: tuple[str, ...] = ()
    """Whose data and weights these are, a line each, to be printed."""
    rate_is_given: Callable[[str], bool] = field(default=lambda level: False, repr=False)
    """Whether a level's rate was given, so that none is looked for."""
    cuts: dict[str, str] = field(default_factory=dict)
    """Levels with the module to cut at; the nearest valid cut for any other."""
    evaluation_batch: int = 64
    """Objects in a batch that is filled or evaluated."""
    workers: int = 0
    """Processes that read."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def build_model(self) -> nn.Module:
        """The pretrained model with the objective's head: the same each time."""
        return self._built(lambda: self.objective.make_head(self.dim), self.objective.unit)

    def build_untrained(self) -> nn.Module:
        """The pretrained model as it comes: its embeddings, of length one."""
        return self._built(lambda: ResidualHead(self.dim), True)

    def _built(self, make_head: Callable[[], nn.Module], unit: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build(make_head(), unit).to(self.device).eval()

    def example(self) -> Any:
        """A small batch of model inputs, two objects of the training split and two others."""
        count = len(self.train)
        chosen = sorted({0, 1, count // 2, count - 1})
        batch = self._collated([self.train.dataset[i] for i in chosen])
        return self.inputs(batch)

    def _collated(self, items: Sequence[Any]) -> Any:
        if self.collate is not None:
            return self.collate(items)
        return torch.utils.data.default_collate(list(items))

    def inputs(self, batch: Any) -> Any:
        """What of a batch the model takes: a tensor, or a dict of them."""
        if isinstance(batch, dict):
            return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return batch[0].to(self.device)

    def feed(self, model: nn.Module) -> Feed:
        """What runs the model on a batch of a loader."""

        def fed(batch: Any) -> tuple[Tensor, Tensor]:
            inputs = self.inputs(batch)
            if isinstance(batch, dict):
                target = batch["pair"] if "pair" in batch else batch["label"]
                return model(**inputs), target.to(self.device)
            return model(inputs), batch[1].to(self.device)

        return fed

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        """What a loader over the training split takes; a new generator each time."""
        generator = torch.Generator().manual_seed(seed)
        return {**self.objective.loader_arguments(self.train, recipe, generator), **self._reading()}

    def eval_arguments(self) -> dict[str, Any]:
        """What a loader over any split takes that gives it in its order, also good to fill with."""
        return {"batch_size": self.evaluation_batch, **self._reading()}

    def _reading(self) -> dict[str, Any]:
        return {"collate_fn": self.collate, "num_workers": self.workers}

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        split: Split,
        *,
        queries: Sequence[int] = (),
        known: Iterable[Any] | None = None,
    ) -> Evaluation:
        """Figures of merit, 0 to 1. Leaves the model in eval mode.

        Args:
            model: made by `build_model` or `build_untrained`.
            batches: the whole split in its order.
            split: which.
            queries: objects for which to tell what is nearest.
            known: for `build_untrained`, the batches of the training split; None for `build_model`.
        """
        model.eval()
        return self.objective.evaluate(self.feed(model), batches, split, queries, known=known)
