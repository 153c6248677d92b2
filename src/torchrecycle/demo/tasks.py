"""A task of the demo: data, a pretrained model, how to train it, and how to tell whether it has learned.

``ImageTask.load(quick=True)`` is 38 emoji to train on and 38 others to find; ``task.fit(model, ...)`` takes anything
that gives batches, so one and the same code trains from a plain `DataLoader` and from a recycled one. What a loader
needs comes from `loader_arguments`, which both take alike:

    arguments = task.loader_arguments(recipe, seed=0)
    raw = DataLoader(task.train_dataset, **arguments)
    recycled = recycling.loader(task.train_dataset, **arguments)

Nothing here knows about recycling.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from torchrecycle.demo.emoji import DEFAULT_FOLDER, EmojiPictures, draw, drop_identical, toned_classes
from torchrecycle.demo.faq import PairBatches, PairTexts, distinct, load_pairs, pad_texts, split_pairs, two_by_two
from torchrecycle.demo.models import ImageEncoder, TextEncoder
from torchrecycle.demo.recipes import IMAGE_RECIPES, TEXT_RECIPES, Level, Recipe, quicker
from torchrecycle.demo.split import halves
from torchrecycle.demo.weights import image_trunk, text_trunk
from torchrecycle.similarity import CosineSoftmax, MultipleNegativesRanking, pair_scores, r_precision

__all__ = ["EpochReport", "ImageTask", "Task", "TextTask"]

EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What `Task.fit` tells after each epoch."""

    epoch: int
    """from 1"""
    epochs: int
    """how many there will be"""
    seconds: float
    """that this one took, reading included"""
    loss: float
    """mean over its steps"""


@dataclass(frozen=True)
class Task(ABC):
    """One task. Concrete ones say how to build a model, a batch and a loss; training is the same for all."""

    train_dataset: Any
    """map-style, what is trained on"""
    eval_dataset: Any
    """map-style, classes or pairs that training never sees"""
    quick: bool
    """less data and fewer epochs, for a first look"""

    name: ClassVar[str]
    """one word, as on the command line"""
    title: ClassVar[str]
    """the question that the task asks"""
    licences: ClassVar[tuple[str, ...]]
    """whose data and weights these are, a line each, to be printed"""
    metric: ClassVar[str]
    """which of the figures that `evaluate` gives stands for the quality"""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The pretrained model with a head that does nothing yet: the same each time."""

    @abstractmethod
    def example(self) -> Any:
        """A small batch of model inputs."""

    @abstractmethod
    def recipe(self, level: Level) -> Recipe:
        """How to train at a level."""

    @abstractmethod
    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        """What a loader over the training data set takes; a new generator each time."""

    @abstractmethod
    def eval_arguments(self) -> dict[str, Any]:
        """What a loader over the evaluation data set takes: in order, also good to fill with."""

    @abstractmethod
    def _loss(self, model: nn.Module, recipe: Recipe, seed: int) -> nn.Module: ...

    @abstractmethod
    def _losses(self, model: nn.Module, loss: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The loss of each step of an epoch."""

    @abstractmethod
    def _steps(self, batches: Sized) -> int:
        """How many those are."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Figures of merit, 0 to 1. Leaves the model in eval mode.

        Args:
            model: the encoder
            batches: the whole evaluation data set in its order
        """

    def fit(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        loader: Any,
        recipe: Recipe,
        *,
        seed: int,
        on_epoch: Callable[[EpochReport], None] | None = None,
    ) -> list[float]:
        """Train in place.

        Batch norm keeps the statistics of ImageNet, also in what is trained: with 900 pictures to learn from, its own
        are noise. The global generator, which dropout draws from, is seeded, and put back at the end.

        Args:
            model: an encoder with a child ``head``
            parameters: what to train
            loader: gives an epoch's batches each time it is iterated, and knows how many
            recipe: rates and epochs
            seed: of the loss's class vectors and of dropout
            on_epoch: told after each epoch

        Returns:
            seconds of each epoch, reading included
        """
        loss = self._loss(model, recipe, seed)
        optimizer = _optimizer(model, list(parameters), loss, recipe)
        rates = LambdaLR(optimizer, _schedule(recipe, recipe.epochs * self._steps(loader)))
        seconds = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for epoch in range(1, recipe.epochs + 1):
                began = time.perf_counter()
                _train_mode(model)
                mean = _run_epoch(self._losses(model, loss, loader), optimizer, rates)
                seconds.append(time.perf_counter() - began)
                if on_epoch is not None:
                    on_epoch(EpochReport(epoch, recipe.epochs, seconds[-1], mean))
        return seconds


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _optimizer(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: nn.Module, recipe: Recipe
) -> torch.optim.Optimizer:
    heads = {id(parameter) for parameter in model.head.parameters()}  # pyright: ignore
    groups = [
        {"params": [p for p in parameters if id(p) in heads], "lr": recipe.head_rate},
        {"params": [p for p in parameters if id(p) not in heads], "lr": recipe.suffix_rate},
        {"params": list(loss.parameters()), "lr": recipe.class_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, recipe.warm_up * steps))
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


def _run_epoch(losses: Iterator[Tensor], optimizer: torch.optim.Optimizer, rates: LambdaLR) -> float:
    total = []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        total.append(loss.item())
    return sum(total) / len(total)


@dataclass(frozen=True)
class ImageTask(Task):
    """Which emoji is it? 299 emoji in six skin tones; half train, half are to be found."""

    name = "images"
    title = "Which emoji is it?"
    metric = "R-precision"
    licences = (
        "Pictures: OpenMoji 17.0.0, the open-source emoji and icon project, CC BY-SA 4.0.",
        "Weights: EfficientNet-Lite0, trained on ImageNet, Apache-2.0.",
    )

    @classmethod
    def load(
        cls,
        folder: Path = DEFAULT_FOLDER,
        *,
        quick: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> ImageTask:
        """Draw the pictures if they are not drawn yet, and split them.

        Args:
            folder: where pictures are kept
            quick: a quarter of the classes
            on_progress: see `torchrecycle.demo.emoji.draw`
        """
        labels = list(toned_classes())[:: 4 if quick else 1]
        pictures = drop_identical(draw(folder, labels=labels, on_progress=on_progress))
        train, evaluation = (set(half) for half in halves(picture.label for picture in pictures))
        return cls(
            train_dataset=EmojiPictures([p for p in pictures if p.label in train]),
            eval_dataset=EmojiPictures([p for p in pictures if p.label in evaluation]),
            quick=quick,
        )

    def build_model(self) -> ImageEncoder:
        with torch.random.fork_rng(devices=[]):
            return ImageEncoder(image_trunk(), dim=1280)

    def example(self) -> Tensor:
        return torch.stack([self.train_dataset[i][0] for i in (0, 6, 12, 18)])

    def recipe(self, level: Level) -> Recipe:
        return quicker(IMAGE_RECIPES[level]) if self.quick else IMAGE_RECIPES[level]

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {"batch_size": recipe.batch_size, "shuffle": True, "generator": generator}

    def eval_arguments(self) -> dict[str, Any]:
        return {"batch_size": EVALUATION_BATCH}

    def _loss(self, model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
        classes = len(self.train_dataset.classes)
        generator = torch.Generator().manual_seed(seed)
        return CosineSoftmax(classes, 1280, scale=recipe.scale, generator=generator)

    def _losses(self, model: nn.Module, loss: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
        for images, labels in batches:
            yield loss(model(images), labels)

    def _steps(self, batches: Sized) -> int:
        return len(batches)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        model.eval()
        found = [(model(images), labels) for images, labels in batches]
        embeddings, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return {"R-precision": r_precision(embeddings, labels)}


@dataclass(frozen=True)
class TextTask(Task):
    """Which answer belongs to the question? 503 pairs; half train, half are to be found."""

    name = "texts"
    title = "Which answer belongs to the question?"
    metric = "reciprocal rank"
    licences = (
        "Texts: Swedish Construction FAQ by Zaragoza AB, CC BY 4.0.",
        "Weights: all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0.",
    )

    @classmethod
    def load(cls, *, quick: bool = False) -> TextTask:
        """Read, split and tokenise the pairs.

        Args:
            quick: a quarter of the pairs
        """
        train, evaluation = split_pairs(load_pairs()[:: 4 if quick else 1])
        return cls(train_dataset=PairTexts(distinct(train)), eval_dataset=PairTexts(evaluation), quick=quick)

    def build_model(self) -> TextEncoder:
        with torch.random.fork_rng(devices=[]):
            return TextEncoder(text_trunk(), dim=384)

    def example(self) -> dict[str, Tensor]:
        pairs = len(self.train_dataset.pairs)
        batch = pad_texts([self.train_dataset[i] for i in (0, 1, pairs, pairs + 1)])
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def recipe(self, level: Level) -> Recipe:
        return quicker(TEXT_RECIPES[level]) if self.quick else TEXT_RECIPES[level]

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        pairs = len(self.train_dataset.pairs)
        batches = PairBatches(pairs, batch_size=recipe.batch_size, generator=generator)
        return {"batch_sampler": batches, "collate_fn": pad_texts}

    def eval_arguments(self) -> dict[str, Any]:
        return {"batch_size": EVALUATION_BATCH, "collate_fn": pad_texts}

    def _loss(self, model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
        return MultipleNegativesRanking(scale=recipe.scale)

    def _losses(self, model: nn.Module, loss: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
        for questions, answers in two_by_two(batches):
            yield loss(_embed(model, questions), _embed(model, answers))

    def _steps(self, batches: Sized) -> int:
        return len(batches) // 2

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        model.eval()
        embeddings = torch.cat([_embed(model, batch) for batch in batches])
        scores = pair_scores(*embeddings.chunk(2))
        return {"precision@1": scores.precision_at_1, "reciprocal rank": scores.reciprocal_rank}


def _embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
