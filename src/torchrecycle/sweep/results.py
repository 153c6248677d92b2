"""What a sweep found: frozen values that a page, a table or a JSON file is made of.

A `SweepResult` holds one `LevelResult` for each level, which holds one `Trial` for each seed and each rate that was
tried. A quality is an `Estimate`: 0.31 with a standard error of 0.01, which comes from the objects that were asked and
from the seeds (`torchrecycle.sweep.estimates`). What a level finds for a few objects is kept as `Found`, so that a
reader can see what a figure means.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchrecycle.sweep.recipes import Recipe

__all__ = [
    "EpochPoint",
    "Estimate",
    "Found",
    "LevelResult",
    "Prediction",
    "Ran",
    "Recommendation",
    "Sample",
    "SweepResult",
    "Trial",
    "in_words",
]

Kind = Literal["images", "texts", "pairs", "objects"]
"""What is looked at; `objects` is anything, of which nothing is shown."""


def in_words(level: str) -> str:
    """
    >>> in_words("full"), in_words("50"), in_words("head")
    ('full training', '50 % recycled', 'head only')
    """
    return {"full": "full training", "head": "head only"}.get(level, f"{level} % recycled")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and how sure it is."""

    mean: float
    """Over objects and seeds, 0 to 1."""
    error: float
    """Its standard error; 0 if nothing is known of it."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True, slots=True)
class EpochPoint:
    """Where a training stood after an epoch."""

    epoch: int
    """From 1."""
    seconds: float
    """Wall seconds of training so far, without filling and without evaluation."""
    loss: float
    """Mean over the steps of this epoch."""
    quality: float | None
    """The main metric on the validation split, 0 to 1; None if it was not measured after this epoch."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one model finds for one object of the test split."""

    query: int
    """The object: a key of `SweepResult.samples`."""
    nearest: tuple[int, ...]
    """The objects nearest to it, nearest first: keys of `SweepResult.samples`."""
    right: tuple[bool, ...]
    """Of each of them, whether it belongs to the query: of its class, or its own answer."""
    note: str
    """In words, what else there is to say: ``own answer ranked 3 of 251``, ``says Audi TT (83 %)``; may be empty."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One object, as it is shown."""

    title: str
    """Its class; of a pair, whether it is a question or an answer."""
    text: str
    """The text, or the picture's name."""
    picture: str = field(default="", repr=False)
    """A small JPEG, base64; empty for a text."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One training from the pretrained weights."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that are recycled, such as ``50``."""
    purpose: Literal["search", "final"]
    """Whether it looked for a rate, on the validation split, or is one of the trainings that are reported."""
    seed: int
    recipe: Recipe
    """What it was trained with."""
    curve: tuple[EpochPoint, ...]
    """One point for each epoch that ended: fewer than the recipe's for a search that was stopped early, or for a
    user's `fit` that does not tell of them."""
    quality: dict[str, float]
    """Per metric, 0 to 1: on the validation split for a search, on the test split for a final one."""
    scores: dict[str, tuple[float, ...]] = field(repr=False)
    """Per metric, what each object asked contributes, in the test split's order; empty for a search."""
    found: tuple[Found, ...] = field(default=(), repr=False)
    """What it finds for a few objects; final trials only."""
    untold_seconds: float = 0.0
    """Wall seconds of a `fit` that told of no epochs, as a whole."""
    untold_epochs: int = 0
    """How often such a `fit` went over its loader."""

    @property
    def seconds(self) -> float:
        """Wall seconds of training, without filling and without evaluation."""
        return self.curve[-1].seconds if self.curve else self.untold_seconds

    @property
    def epoch_seconds(self) -> float:
        """Mean wall seconds of an epoch."""
        return self.seconds / max(1, len(self.curve) or self.untold_epochs)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a level will take, from a handful of measured batches: before anything is filled."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that were asked to be recycled, such as ``50``."""
    cut: str | None
    """Name of the module whose output is kept; None for full training."""
    precision: str | None
    """Of kept rows; None for the activation's own."""
    objects: int
    """Of the training split: what is filled, and read in each epoch."""
    fill_seconds: float
    """Wall seconds of the pass that fills the training split; 0 for full training."""
    epoch_seconds: float
    """Wall seconds of an epoch: from the store, of full training, or without a store where there is no room for its
    rows."""
    frozen_epoch_seconds: float | None
    """The same with the same prefix frozen and computed again: no store. None for full training."""
    full_epoch_seconds: float | None
    """Wall seconds of an epoch of full training; None if it was not measured."""
    bytes_kept: int
    """Bytes in the store, all splits; 0 for full training."""
    steps: int
    """Measured batches that the figures come from."""

    @property
    def epochs_until_paid(self) -> int | None:
        """After how many epochs filling has paid against the frozen prefix; None if never, or for full training."""
        return _epochs_until_paid(self.fill_seconds, self.epoch_seconds, self.frozen_epoch_seconds)

    @property
    def pays(self) -> bool:
        """Whether reading is quicker than computing again; False for full training, which reads nothing."""
        return self.frozen_epoch_seconds is not None and self.epoch_seconds < self.frozen_epoch_seconds

    def __str__(self) -> str:
        """
        >>> one = Prediction("50", "layer2", None, 2036, 19.0, 9.0, 21.0, 62.0, 265_000_000, 8)
        >>> print(*str(one).split("; "), sep=chr(10))
        50 % recycled (cut 'layer2'): filling 19.0 s, an epoch 9.0 s, 21.0 s without a store, 265.0 MB
        pays after 2 epochs
        """
        if self.cut is None:
            return f"{in_words(self.level)}: an epoch {self.epoch_seconds:.1f} s"
        kept = f"{in_words(self.level)} (cut '{self.cut}'" + (f", {self.precision})" if self.precision else ")")
        parts = [f"filling {self.fill_seconds:.1f} s", f"an epoch {self.epoch_seconds:.1f} s"]
        if self.frozen_epoch_seconds is not None:
            parts.append(f"{self.frozen_epoch_seconds:.1f} s without a store")
        parts.append(f"{self.bytes_kept / 1e6:,.1f} MB")
        epochs = self.epochs_until_paid
        if epochs is None:
            paid = "reading is slower than computing again, so it never pays"
        else:
            paid = f"pays after {epochs} epoch{'s' * (epochs != 1)}"
        return f"{kept}: {', '.join(parts)}; {paid}"


def _epochs_until_paid(fill: float, epoch: float, frozen: float | None) -> int | None:
    saved = 0.0 if frozen is None else frozen - epoch
    return max(1, math.ceil(fill / saved)) if saved > 0 else None


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level of a sweep."""

    level: str
    """``full``, ``head``, or the per cent of the blocks that were asked to be recycled, such as ``50``."""
    cut: str | None
    """Name of the module whose output is kept; None for full training."""
    share: float
    """The share of the blocks that is recycled, 0 to 1: what the cut that was found really is."""
    trained_parameters: int
    """How many numbers are trained, the head among them."""
    quality: dict[str, Estimate]
    """Per metric, on the test split."""
    trials: tuple[Trial, ...]
    """The final ones, one for each seed."""
    search: tuple[Trial, ...]
    """Those that looked for a rate; empty if it was given."""
    fill_seconds: float
    """Wall seconds of the pass that filled what is trained on, for all levels that were filled at once; 0 for full
    training, and where nothing is kept. Of rows that were in the store already: what a frozen epoch takes longer."""
    frozen_epoch_seconds: float | None
    """Wall seconds of an epoch with the same prefix frozen and computed again: no store. None for full training."""
    bytes_kept: int
    """Bytes in the store for this level, all splits."""
    predicted: Prediction | None = None
    """What was predicted of it before anything was filled; None if nothing was."""
    filled_as_predicted: bool = True
    """Whether the levels that were filled in the same pass are those for which filling was predicted. Not so where
    levels take turns: what was predicted is of a pass for all of them."""

    @property
    def is_kept(self) -> bool:
        """Whether its rows are; False for a level that has no room, and for full training."""
        return self.bytes_kept > 0

    @property
    def words(self) -> str:
        return in_words(self.level)

    @property
    def epoch_seconds(self) -> float:
        """Mean wall seconds of an epoch."""
        return statistics.mean(trial.epoch_seconds for trial in self.trials)

    @property
    def total_seconds(self) -> float:
        """Wall seconds of all epochs of one training, mean over the seeds, without filling."""
        return statistics.mean(trial.seconds for trial in self.trials)

    @property
    def search_seconds(self) -> float:
        """Wall seconds of looking for a rate."""
        return sum(trial.seconds for trial in self.search)

    @property
    def epochs_until_paid(self) -> int | None:
        """After how many epochs filling has paid against the frozen prefix; None if never, for full training, or where
        nothing is kept."""
        if not self.is_kept:
            return None
        return _epochs_until_paid(self.fill_seconds, self.epoch_seconds, self.frozen_epoch_seconds)

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self.quality.items())
        kept = f", {self.bytes_kept / 1e6:,.1f} MB" if self.bytes_kept else ""
        cut = f" (cut '{self.cut}')" if self.cut is not None else ""
        return f"{self.words}{cut}: {figures}, {self.epoch_seconds:.2f} s per epoch{kept}"

    def to_json(self) -> dict[str, Any]:
        """Every figure, but not what each object contributes."""
        figures = asdict(self)
        for trial in (*figures["trials"], *figures["search"]):
            del trial["scores"], trial["found"]
        figures["epoch_seconds"] = self.epoch_seconds
        figures["total_seconds"] = self.total_seconds
        figures["search_seconds"] = self.search_seconds
        figures["epochs_until_paid"] = self.epochs_until_paid
        figures["predicted"] = _with_verdict(self.predicted)
        return figures


def _with_verdict(prediction: Prediction | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    return {**asdict(prediction), "epochs_until_paid": prediction.epochs_until_paid, "pays": prediction.pays}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Which level to take."""

    level: str | None
    """None if none is better than the pretrained model."""
    sentence: str
    """Which level, with its figures, and why: one sentence."""
    verdicts: dict[str, str]
    """For each level, a few words: what is lost and won against the best."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What was run, so that it can be run again and be told from another run."""

    command: str
    """As it was typed; how it was called, from Python."""
    model: str
    """Its name."""
    weights: str
    """Where the weights came from, in words."""
    random_weights: bool
    """Whether they are random because none were given: then the figures say nothing about a pretrained model."""
    data: str
    """The data set, in words."""
    splits: dict[str, int]
    """How many objects (or pairs) each split has: ``train``, ``validation``, ``test``."""
    left_out: tuple[str, ...]
    """What of the data was left out, a line each."""
    loss: str
    """In words."""
    settings: dict[str, str]
    """Whatever else was set, by name: image size, precision, split seed."""
    licences: tuple[str, ...]
    """Whose data and weights these are, a line each, to be shown."""
    machine: str
    """Processor, threads, graphics card."""
    versions: dict[str, str]
    """Of Python, torch, torchrecycle and the libraries that the model comes from."""
    date: str
    """ISO, when the sweep ended, with the time zone."""
    seconds: float
    """Wall seconds that all trials and fills took, also those of earlier runs that were gone on from."""
    task: str = ""
    """32 hexadecimal digits that stand for data, preprocessing, question and model; empty in older files."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All levels of one task."""

    kind: Kind
    title: str
    """What is asked, for a heading: ``Which emoji is it?``"""
    metric: str
    """The metric that stands for the quality: a key of each `quality`."""
    metrics: dict[str, str]
    """Each metric with what it means, in one sentence."""
    curve_split: str
    """What the curves' quality was measured on: ``validation`` or ``test``."""
    untrained: dict[str, Estimate]
    """Quality of the pretrained model as it comes."""
    untrained_found: tuple[Found, ...] = field(repr=False)
    levels: tuple[LevelResult, ...]
    """From no recycling to all."""
    recommendation: Recommendation
    seeds: tuple[int, ...]
    samples: Mapping[int, Sample] = field(repr=False)
    """The objects that any `Found` names, by their index in the test split."""
    ran: Ran
    predictions: tuple[Prediction, ...] = ()
    """Of all levels and precisions that were measured for it, also of levels that were not run."""
    expected_full: Estimate | None = None
    """The quality that is expected of full training from the other levels, where it was not run."""
    expected_full_seconds: float | None = None
    """Wall seconds that full training is expected to take, all epochs, where it was not run."""

    def of(self, level: str) -> LevelResult:
        """
        Raises:
            KeyError: the sweep has no such level.
        """
        for result in self.levels:
            if result.level == level:
                return result
        raise KeyError(f"no level {level!r} in this sweep: it has {[each.level for each in self.levels]}")

    @property
    def full(self) -> LevelResult | None:
        """Full training, what speed-ups are against; None if it was not run."""
        return next((result for result in self.levels if result.level == "full"), None)

    def speed_up(self, level: str, *, filling: bool = False) -> float | None:
        """Total seconds of full training by those of the level; with filling, its seconds are added. None without
        full training, or where no time was measured."""
        full, one = self.full, self.of(level)
        seconds = one.total_seconds + (one.fill_seconds if filling else 0.0)
        return full.total_seconds / seconds if full is not None and seconds else None

    def speed_up_against_frozen(self, level: str) -> float | None:
        """Of an epoch, against one with the same prefix frozen and computed again; None where that was not measured."""
        one = self.of(level)
        frozen = one.frozen_epoch_seconds
        return frozen / one.epoch_seconds if frozen and one.epoch_seconds else None

    def _repr_html_(self) -> str:
        """As a notebook shows it: by the room above, which is loaded when it is first needed."""
        return importlib.import_module("torchrecycle.report").html_of(self)

    def to_json(self) -> dict[str, Any]:
        """Every figure, but not the samples and not what each object contributes."""
        levels = []
        for result in self.levels:
            figures = result.to_json()
            figures["speed_up"] = self.speed_up(result.level)
            figures["speed_up_with_filling"] = self.speed_up(result.level, filling=True)
            figures["speed_up_against_frozen"] = self.speed_up_against_frozen(result.level)
            levels.append(figures)
        whole = asdict(self)
        for name in ("samples", "untrained_found"):
            del whole[name]
        return {**whole, "levels": levels, "predictions": [_with_verdict(each) for each in self.predictions]}
