"""Tasks that are ready: classes, similarity by groups, pairs, numbers, labels of tokens.

    task = Classification(train, test)                       # data sets of (image, class number), or of dicts
    sweep(lambda: timm.create_model("resnet18", pretrained=True, num_classes=10), task, store="activations/")

Any module will do: one of timm, a transformers ``*ForSequenceClassification`` or ``*ForTokenClassification``, an
``nn.Sequential``. They train as `torchrecycle.sweep.fit` does: AdamW with a rate for the last layer and one for those
before it, a cosine, batch norm with the statistics it came with.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchrecycle.data import identity_of
from torchrecycle.progress import progress
from torchrecycle.similarity.metrics import NotFiniteError
from torchrecycle.sweep.batches import PadBatch, called, divided, embedding_of, moved, scores_of
from torchrecycle.sweep.fit import train
from torchrecycle.sweep.objective_task import Feed
from torchrecycle.sweep.objectives import Classify, Matching, Similar
from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.recipes import USUAL, Recipe, usual_recipe
from torchrecycle.sweep.results import Kind
from torchrecycle.sweep.task import TARGETS, Evaluation, Split, Task
from torchrecycle.sweep.trial import RunningTrial
from torchrecycle.trace import random_state, set_random_state

__all__ = ["Classification", "Pairs", "Regression", "Similarity", "TokenLabelling"]


@dataclass(eq=False)
class _Ready(Task):
    """What the ready tasks share."""

    train: Any
    """A map-style data set of ``(input, target)`` or of dicts, or a `Split`."""
    test: Any
    """The same, of objects that training never sees."""
    _: KW_ONLY
    validation: Any = None
    """The same, to choose a rate on; without it, the usual one is taken."""
    target: str | None = None
    """Of dicts, the name of what is to be learned; ``labels``, ``label``, ``targets``, ``target`` or ``y`` if None."""
    epochs: int | None = None
    """Passes over the training split; five times as many for head only. As many as are usual if None."""
    batch_size: int | None = None
    """Objects in a step."""
    rate: float | None = None
    """Of the layers before the last one; where it is given, none is looked for."""
    head_rate: float | None = None
    """Of the last layer."""
    collate: Callable[[Any], Any] | None = None
    """As of a `DataLoader`. If None, tensors are stacked; of dicts, texts are padded behind to the longest one."""
    padding: int = 0
    """With what ``input_ids`` are padded: the tokenizer's padding id."""
    workers: int = 0
    """Processes that read."""
    recycling: Mapping[str, Any] = field(default_factory=dict)
    """See `Task.recycling`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "rate", "head_rate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise SweepError(f"{self._whose}({name}={value!r}): give a number above 0, or leave it out")
        self.evaluation_batch = min(64, self.batch_size or 64)
        if self.collate is None and self._has_dicts():
            self.collate = PadBatch(self.padding, self.target)

    def _has_dicts(self) -> bool:
        state = random_state()
        try:
            return isinstance(self.splits()["train"].dataset[0], Mapping)
        finally:
            set_random_state(state)

    @property
    def _whose(self) -> str:
        return type(self).__name__

    def __recycle_state__(self) -> Any:
        """What figures depend on, but the recipe, by which trainings are told apart anyway."""
        return {name: value for name, value in vars(self).items() if name not in _OF_NO_WEIGHT}

    # -- batches -------------------------------------------------------------------------------------------------------

    def inputs(self, batch: Any) -> Any:
        return divided(batch, self.target, self._whose)[0]

    def answer(self, model: nn.Module, batch: Any) -> tuple[Any, Any, Tensor]:
        """What the model says of a batch, the inputs, and the targets, on the model's device."""
        device = _device(model)
        inputs, target = divided(batch, self.target, self._whose)
        inputs = moved(inputs, device)
        return called(model, inputs), inputs, target.to(device)

    # -- training ------------------------------------------------------------------------------------------------------

    def recipe(self, level: str, share: float) -> Recipe:
        objects = len(self.splits()["train"]) // (2 if self.kind == "pairs" else 1)
        usual = usual_recipe(USUAL, level, share, objects, epochs=self.epochs, batch_size=self.batch_size)
        rate = usual.suffix_rate if self.rate is None or level == "head" else self.rate
        return replace(usual, suffix_rate=rate, head_rate=self.head_rate or usual.head_rate)

    def rate_is_given(self, level: str) -> bool:
        return (self.head_rate if level == "head" else self.rate) is not None

    def fit(self, model: nn.Module, loader: Any, trial: RunningTrial) -> None:
        """AdamW with the recipe's rates: one for the last layer of the model, one for those before it."""
        loss, recipe, last = self._make_loss(model, trial).to(_device(model)), trial.recipe, _last_layer(model)
        # At head only, a cut may leave more than the last layer to be trained.
        before = recipe.head_rate if trial.level == "head" else recipe.suffix_rate
        groups = [
            {"params": [p for p in trial.parameters if id(p) in last], "lr": recipe.head_rate},
            {"params": [p for p in trial.parameters if id(p) not in last], "lr": before},
            {"params": list(loss.parameters()), "lr": recipe.class_rate, "weight_decay": 0.0},
        ]
        train(model, groups, lambda: self._losses(model, loss, loader), self._steps(loader), trial)

    @abstractmethod
    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        """With whatever it learns itself."""

    def _losses(self, model: nn.Module, loss: nn.Module, loader: Any) -> Iterator[Tensor]:
        """The loss of each step of an epoch."""
        for batch in loader:
            output, inputs, target = self.answer(model, batch)
            yield loss(self._read(output, inputs), target)

    def _steps(self, loader: Any) -> int:
        """How many steps the batches of an epoch make."""
        return len(loader)

    def _read(self, output: Any, inputs: Any) -> Tensor:
        """What is looked at, of what the model says: its scores, if not overridden."""
        return scores_of(output, self._whose)

    def _all(self, model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
        """Whatever the model says of a split, and its targets."""
        found = []
        for batch in loader:
            output, inputs, target = self.answer(model, batch)
            found.append((self._read(output, inputs).float().cpu(), target.cpu()))
        outputs, targets = (torch.cat(part) for part in zip(*found, strict=True))
        _refuse_not_finite(outputs)
        return outputs, targets


_OF_NO_WEIGHT = frozenset(
    {"train", "test", "validation", "epochs", "batch_size", "rate", "head_rate", "evaluation_batch", "workers", "title"}
    | {"padding", "_groups", "_dims", "_sides"}
)
"""Attributes that are told by recipes, by the data sets and by `collate`, or that change no figure."""


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _last_layer(model: nn.Module) -> set[int]:
    """The parameters of the last module that has some of its own: of a ResNet its ``fc``, of a transformers classifier
    its ``classifier``."""
    last = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    return {id(parameter) for parameter in last[-1].parameters(recurse=False)} if last else set()


def _refuse_not_finite(outputs: Tensor) -> None:
    if not outputs.isfinite().all():
        raise NotFiniteError(
            "an output holds NaN or infinity: the training has diverged, or the weights that it began with hold some "
            "already"
        )


# -- classes -----------------------------------------------------------------------------------------------------------


class _CrossEntropy(nn.Module):
    """Cross-entropy that says what does not fit.

    Args:
        smoothing: share of each label that is spread over all classes.
        whose: the task's name.
    """

    def __init__(self, smoothing: float, whose: str) -> None:
        super().__init__()
        self.smoothing, self.whose = smoothing, whose

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            scores: ``[batch, classes]``, or ``[batch, tokens, classes]``.
            labels: ``[batch]``, or ``[batch, tokens]``; -100 is left out.
        """
        _refuse_other_classes(scores, labels, self.whose)
        flat = scores.reshape(-1, scores.shape[-1])
        return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=self.smoothing)


IGNORED = -100
"""The label of a token that is none: padding, or a part of a word."""


def _refuse_other_classes(scores: Tensor, labels: Tensor, whose: str) -> None:
    if scores.shape[:-1] != labels.shape:
        raise SweepError(
            f"{whose}: the model gives scores {tuple(scores.shape)} for targets {tuple(labels.shape)}: one row of "
            "scores for each target was expected"
        )
    if labels.is_floating_point():
        raise SweepError(f"{whose}: targets are {labels.dtype}, and class numbers were expected; see Regression")
    used = labels[labels != IGNORED]
    if len(used) and not 0 <= int(used.min()) <= int(used.max()) < scores.shape[-1]:
        raise SweepError(
            f"{whose}: there are targets from {int(used.min())} to {int(used.max())}, and the model has "
            f"{scores.shape[-1]} scores, for classes 0 to {scores.shape[-1] - 1}"
        )


@dataclass(eq=False)
class Classification(_Ready):
    """Which of the known classes is it? Targets are class numbers, from 0 on; the model gives a score for each.

    >>> from torch.utils.data import TensorDataset
    >>> train, test = (TensorDataset(torch.randn(8, 3), torch.tensor([0, 1] * 4)) for _ in range(2))
    >>> Classification(train, test, epochs=2).recipe("50", 0.5).epochs
    2
    """

    _: KW_ONLY
    title: str = "Which class is it?"
    smoothing: float = 0.0
    """The share of each label that is spread over all classes, 0 to 1."""
    metric = "accuracy"
    metrics = Classify.metrics
    loss = "cross-entropy"

    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        return _CrossEntropy(self.smoothing, self._whose)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation:
        outputs, labels = self._all(model, loader)
        _refuse_other_classes(outputs, labels, self._whose)
        objective = Classify([str(number) for number in range(outputs.shape[1])])
        return objective.evaluate(_as_it_is, [(outputs, labels)], Split(None), (), known=None)


def _as_it_is(batch: Any) -> Any:
    return batch


# -- similarity by groups ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Similarity(_Ready):
    """Which objects belong to the same group, of groups that were never trained on? Targets are group numbers; the
    model gives one vector for each object, of any length."""

    _: KW_ONLY
    title: str = "Which objects are alike?"
    loss_name: str | None = None
    """A class of pytorch-metric-learning; softmax over cosines to one learned vector per group if None."""
    metric = "R-precision"
    metrics = Similar.metrics

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss = Similar((), loss=self.loss_name).loss  # says at once if there is no such loss
        self._groups: list[int] | None = None
        self._dims: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def _labels(self) -> list[int]:
        if self._groups is None:
            self._groups = _targets(self.splits()["train"], self.target, self._whose)
        return self._groups

    def _objective(self) -> Similar:
        return Similar([str(group) for group in sorted(set(self._labels()))], loss=self.loss_name)

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        generator, split = torch.Generator().manual_seed(seed), Split(self.splits()["train"].dataset)
        labelled = replace(split, labels=tuple(self._labels())) if self._objective().compares else split
        return {**self._objective().loader_arguments(labelled, recipe, generator), **self._reading()}

    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        return self._objective().make_loss(self._dim(model), trial.recipe, trial.seed)

    def _dim(self, model: nn.Module) -> int:
        """How long a vector is: from a few objects, once for each model."""
        if model not in self._dims:
            was = model.training
            with torch.no_grad():
                inputs = moved(self.example(), _device(model))
                self._dims[model] = self._read(called(model.eval(), inputs), inputs).shape[1]
            model.train(was)
        return self._dims[model]

    def _read(self, output: Any, inputs: Any) -> Tensor:
        return F.normalize(embedding_of(output, inputs, self._whose), dim=-1)

    def _losses(self, model: nn.Module, loss: nn.Module, loader: Any) -> Iterator[Tensor]:
        known = torch.tensor(sorted(set(self._labels())), device=_device(model))
        for batch in loader:
            output, inputs, target = self.answer(model, batch)
            yield loss(self._read(output, inputs), torch.searchsorted(known, target))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation:
        outputs, labels = self._all(model, loader)
        if labels.is_floating_point():
            raise SweepError(f"{self._whose}: targets are {labels.dtype}, and whole numbers of groups were expected")
        return Similar(()).evaluate(_as_it_is, [(outputs, labels)], Split(None), (), known=None)

    def clusters(self) -> Sequence[int]:
        return _targets(self.splits()["test"], self.target, self._whose)


def _targets(split: Split, told: str | None, whose: str) -> list[int]:
    """The class of each object: what the data set says of itself, else of each item that is read."""
    said = split.labels or getattr(split.dataset, "targets", getattr(split.dataset, "labels", None))
    if said is not None and hasattr(said, "__len__") and len(said) == len(split):
        return [_class_number(label, index, whose) for index, label in enumerate(said)]
    found, state = [], random_state()
    try:
        with progress(f"{whose}: reading the groups", len(split), "objects") as shown:
            for index in range(len(split)):
                found.append(_class_number(_target(split.dataset[index], told), index, whose))
                shown.advance()
    finally:
        set_random_state(state)
    return found


def _target(item: Any, told: str | None) -> Any:
    if not isinstance(item, Mapping):
        return item[-1]
    return item.get(told or next((name for name in TARGETS if name in item), ""))


def _class_number(target: Any, index: int, whose: str) -> int:
    try:
        number = int(target)
        if number != float(target):
            raise ValueError
    except (TypeError, ValueError, RuntimeError) as error:
        raise SweepError(f"{whose}: the group of object {index} is {target!r}: give numbers of groups") from error
    return number


# -- pairs -------------------------------------------------------------------------------------------------------------


class _Sides(Dataset[Any]):
    """The sides of pairs: first all left ones, then all right ones, each with the number of its pair."""

    def __init__(self, pairs: Any, whose: str) -> None:
        self.pairs, self._name = pairs, whose

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        number = torch.tensor(index % len(self.pairs))
        item = self.pairs[int(number)]
        sides = tuple(item.values()) if isinstance(item, Mapping) else item
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise SweepError(f"{self._name}: pair {int(number)} is a {type(item).__name__}: give (left, right)")
        side = sides[index // len(self.pairs)]
        return {**side, "pair": number} if isinstance(side, Mapping) else (side, number)


@dataclass(eq=False)
class Pairs(_Ready):
    """Which right side belongs to the left one? Items are ``(left, right)``, each a tensor or a dict of model inputs;
    the model gives one vector for each side."""

    _: KW_ONLY
    title: str = "Which right side belongs to the left one?"
    loss_name: str | None = None
    """A class of pytorch-metric-learning; multiple negatives ranking, both ways, if None."""
    metric = "reciprocal rank"
    metrics = Matching.metrics

    def __post_init__(self) -> None:
        self.kind: Kind = "pairs"
        self._sides: dict[str, Split] = {}
        self.loss = Matching(loss=self.loss_name).loss
        if self.target is not None:
            raise SweepError(f"Pairs(target={self.target!r}): pairs are items (left, right), and have no target")
        super().__post_init__()
        self.target = "pair" if self.collate is not None and self._has_dicts() else None

    def splits(self) -> dict[str, Split]:
        for name, split in super().splits().items():
            known = self._sides.get(name)
            if known is None or known.dataset.pairs is not split.dataset:
                inner = identity_of(split.dataset, split.name)
                sides = _Sides(split.dataset, f"Pairs.{name}")
                self._sides[name] = Split(sides, name=None if inner is None else f"sides of {inner}")
        return dict(self._sides)

    def recipe(self, level: str, share: float) -> Recipe:
        # Cosines want a larger scale among the few others of a batch than among many classes.
        return replace(super().recipe(level, share), scale=SCALE)

    def loader_arguments(self, recipe: Recipe, *, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        arguments = Matching().loader_arguments(self.splits()["train"], recipe, generator)
        return {**arguments, **self._reading()}

    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        return Matching(loss=self.loss_name).make_loss(0, trial.recipe, trial.seed)

    def _read(self, output: Any, inputs: Any) -> Tensor:
        return F.normalize(embedding_of(output, inputs, self._whose), dim=-1)

    def _feed(self, model: nn.Module) -> Feed:
        def fed(batch: Any) -> tuple[Tensor, Tensor]:
            output, inputs, target = self.answer(model, batch)
            return self._read(output, inputs), target

        return fed

    def _losses(self, model: nn.Module, loss: nn.Module, loader: Any) -> Iterator[Tensor]:
        return Matching(loss=self.loss_name).losses(self._feed(model), loss, loader)

    def _steps(self, loader: Any) -> int:
        return len(loader) // 2

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation:
        return Matching().evaluate(self._feed(model), loader, Split(None), (), known=None)


SCALE = 20.0
"""What cosines of pairs are multiplied by, as sentence-transformers does."""


# -- numbers -----------------------------------------------------------------------------------------------------------


class _SquaredError(nn.Module):
    """The mean squared error, of outputs that fit their targets."""

    def __init__(self, whose: str) -> None:
        super().__init__()
        self.whose = whose

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(*_alike(outputs, targets, self.whose))


def _alike(outputs: Tensor, targets: Tensor, whose: str) -> tuple[Tensor, Tensor]:
    """Both as ``[batch, numbers]``.

    Raises:
        SweepError: they do not fit.
    """
    one, other = (value.reshape(len(value), -1).float() for value in (outputs, targets))
    if one.shape != other.shape:
        raise SweepError(
            f"{whose}: the model gives {tuple(outputs.shape)} for targets {tuple(targets.shape)}: one number for each "
            "target was expected"
        )
    return one, other


@dataclass(eq=False)
class Regression(_Ready):
    """How much is it? Targets are a number or several for each object, best of a spread around one; the model gives as
    many. Trained by the squared error, and judged by the share of the variance that it explains."""

    _: KW_ONLY
    title: str = "How much is it?"
    metric = "R2"
    metrics = {
        "R2": "the share of the targets' variance that is explained: 1 less the squared errors by the variance; of "
        "several numbers the mean, and below 0 if their mean would do better",
        "correlation": "Pearson's, between targets and what is said of them; of several numbers the mean",
    }
    loss = "squared error"

    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        return _SquaredError(self._whose)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation:
        outputs, targets = (each.double() for each in _alike(*self._all(model, loader), self._whose))
        spread = targets.var(0, correction=0)
        if not spread.gt(0).all():
            raise SweepError(f"{self._whose}: a number is the same for all {len(targets)} objects: nothing to explain")
        each = 1 - (outputs - targets).square() / spread
        ours, theirs = (
            (value - value.mean(0)) / value.std(0, correction=0).clamp(min=1e-12) for value in (outputs, targets)
        )
        scores = {"R2": each.mean(1), "correlation": (ours * theirs).mean(1)}
        return Evaluation(
            {name: float(value.mean()) for name, value in scores.items()},
            {name: tuple(value.tolist()) for name, value in scores.items()},
        )


# -- labels of tokens --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TokenLabelling(_Ready):
    """Which label has each token? Items are dicts with ``input_ids`` and ``labels`` of the same length, -100 for a
    token that is not asked; the model gives scores ``[batch, tokens, labels]``."""

    _: KW_ONLY
    title: str = "Which label has each token?"
    metric = "token accuracy"
    metrics = {
        "token accuracy": "share of the tokens whose label is told right",
        "mean recall": "the same for each label, then the mean over the labels: rare labels count as much",
    }
    loss = "cross-entropy of each token"

    def _make_loss(self, model: nn.Module, trial: RunningTrial) -> nn.Module:
        return _CrossEntropy(0.0, self._whose)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any) -> Evaluation:
        """Of each text its share in the figures, since the tokens of a text are hard or easy together."""
        text, right, labels, texts = [], [], [], 0
        for batch in loader:
            output, inputs, target = self.answer(model, batch)
            scores = self._read(output, inputs)
            _refuse_not_finite(scores)
            _refuse_other_classes(scores, target, self._whose)
            row, place = (target != IGNORED).nonzero(as_tuple=True)
            text.append(row.cpu() + texts)
            labels.append(target[row, place].cpu())
            right.append((scores[row, place].argmax(-1) == target[row, place]).cpu())
            texts += len(target)
        return _token_figures(torch.cat(text), torch.cat(right).double(), torch.cat(labels), texts, self._whose)


def _token_figures(text: Tensor, right: Tensor, labels: Tensor, texts: int, whose: str) -> Evaluation:
    """
    Args:
        text: of each token, whose it is.
        right: whether its label was told right.
        labels: of it.
        texts: how many there are.
        whose: the task's name.
    """
    if not len(labels):
        raise SweepError(f"{whose}: no token of the {texts} texts has a label: all are {IGNORED}")
    counts = labels.bincount().double()
    weights = len(labels) / (counts[labels] * (counts > 0).sum())
    scores = {}
    for name, each in {"token accuracy": right, "mean recall": right * weights}.items():
        scores[name] = torch.zeros(texts, dtype=torch.float64).index_add_(0, text, each) * texts / len(labels)
    return Evaluation(
        {name: float(each.mean()) for name, each in scores.items()},
        {name: tuple(each.tolist()) for name, each in scores.items()},
    )
