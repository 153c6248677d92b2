"""A task made of an objective: data in three splits, a pretrained trunk with a head, and what is to be learned of it.

`ObjectiveTask` joins a `Split` for training, one for choosing a rate and one for testing with an `Objective`, which
says how a batch becomes a loss and how good a model is. It builds its model itself, since the objective decides on the
head:

    sweep(task.build_model, task, store="activations/")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.heads import ResidualHead
from torchrecycle.sweep.fit import train
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Kind
from torchrecycle.sweep.task import Evaluation, Split, Task
from torchrecycle.sweep.trial import RunningTrial

__all__ = ["Feed", "Objective", "ObjectiveTask"]


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
class ObjectiveTask(Task):
    """Data, a model and an objective."""

    kind: Kind = field()
    title: str = field()
    """What is asked, for a heading."""
    train: Split = field()
    validation: Split | None = field()
    """What a rate is chosen on; None if recipes are given."""
    test: Split = field()
    """Objects that training never sees."""
    objective: Objective = field()
    build: Callable[[nn.Module, bool], nn.Module] = field(repr=False)
    """From a head, and whether what it gives is made of length one, to the pretrained model with that head: the same
    weights each time, in an object of its own."""
    dim: int = field()
    """How long the features are that the head takes."""
    collate: Callable[[Sequence[Any]], Any] | None = field(repr=False)
    recipes: Callable[[str, float], Recipe] = field(repr=False)
    """From a level, such as ``50``, and the share of the blocks that is recycled, to how it is trained by default."""
    identity: str = field()  # pyright: ignore[reportIncompatibleVariableOverride]
    """What tells it from every other task: data, weights, splits and settings, as a hash or in words."""
    data: str = field()
    """The data set, in words."""
    weights: str = field()
    """Where the model's weights came from, in words."""
    model: str = field()
    """The model's name."""
    random_weights: bool = False
    left_out: tuple[str, ...] = ()
    """What of the data is not used, a line each."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Whatever else was set, by name."""
    licences: tuple[str, ...] = ()
    """Whose data and weights these are, a line each, to be printed."""
    given_rates: Callable[[str], bool] = field(default=lambda level: False, repr=False)
    """Whether a level's rate was given, so that none is looked for."""
    cuts: Mapping[str, str] = field(default_factory=dict)
    """Levels with the module to cut at; the nearest valid cut for any other."""
    evaluation_batch: int = 64
    """Objects in a batch that is filled or evaluated."""
    workers: int = 0
    """Processes that read."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    metric: str | None = field(init=False, default=None)
    metrics: Mapping[str, str] = field(init=False, default_factory=dict)
    loss: str = field(init=False, default="")
    pretrained: str = field(init=False, default="")

    def __post_init__(self) -> None:
        for name in ("metric", "metrics", "loss", "pretrained"):  # what the objective says of itself
            object.__setattr__(self, name, getattr(self.objective, name))

    # -- the model -----------------------------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """The pretrained model with the objective's head: the same each time."""
        return self._built(lambda: self.objective.make_head(self.dim), self.objective.unit)

    def build_untrained(self) -> nn.Module:
        """The pretrained model as it comes: its embeddings, of length one."""
        return self._built(lambda: ResidualHead(self.dim), True)

    def untrained(self, build_model: Callable[[], nn.Module]) -> nn.Module:
        return self.build_untrained()

    def _built(self, make_head: Callable[[], nn.Module], unit: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build(make_head(), unit).to(self.device).eval()

    # -- how it is trained ---------------------------------------------------------------------------------------------

    def recipe(self, level: str, share: float) -> Recipe:
        return self.recipes(level, share)

    def rate_is_given(self, level: str) -> bool:
        return self.given_rates(level)

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

    def fit(self, model: nn.Module, loader: Any, trial: RunningTrial) -> None:
        """AdamW with the recipe's rates; the head has one of its own.

        Args:
            model: made by `build_model`, with a child ``head``.
            loader: of the training split.
            trial: see `Task.fit`.
        """
        objective, recipe = self.objective, trial.recipe
        loss = objective.make_loss(self.dim, recipe, trial.seed).to(self.device)
        heads = {id(parameter) for parameter in model.head.parameters()}  # pyright: ignore
        groups = [
            {"params": [p for p in trial.parameters if id(p) in heads], "lr": recipe.head_rate},
            {"params": [p for p in trial.parameters if id(p) not in heads], "lr": recipe.suffix_rate},
            {"params": list(loss.parameters()), "lr": recipe.class_rate, "weight_decay": 0.0},
        ]
        feed = self.feed(model)
        train(model, groups, lambda: objective.losses(feed, loss, loader), objective.steps(loader), trial)

    # -- how it is judged ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        split: Split | None = None,
        *,
        queries: Sequence[int] = (),
        known: Iterable[Any] | None = None,
    ) -> Evaluation:
        """Figures of merit, 0 to 1. Leaves the model in eval mode.

        Args:
            model: made by `build_model` or `build_untrained`.
            loader: the batches of the whole split in its order.
            split: which; the test split if None.
            queries: objects for which to tell what is nearest.
            known: for `build_untrained`, the batches of the training split; None for `build_model`.
        """
        model.eval()
        return self.objective.evaluate(self.feed(model), loader, split or self.test, queries, known=known)

    def judged(
        self, model: nn.Module, loader: Any, split: Split, queries: Sequence[int], known: Iterable[Any] | None
    ) -> Evaluation:
        return self.evaluate(model, loader, split, queries=queries, known=known)

    def clusters(self) -> tuple[int, ...]:
        return self.objective.clusters(self.test)
