"""Metrics of a model: attached to its training, or evaluated over a whole data set.

    evaluator = Evaluator({"P@1": RetrievalPrecision(k=1), "MAP": RetrievalMAP()})
    evaluator.evaluate(samples, model)               # {"P@1": tensor(0.8312), "MAP": tensor(0.7007)}

20,000 photos are read and encoded a batch at a time; what stays in memory is their embeddings, 30 MB of 384 numbers.
They are ranked once for all metrics that rank alike. Asking takes the square of their number: where that is too much, a
sampler asks some objects, drawn by a seed, and still ranks all others for each, so that the figure has noise and no
bias: ``GroupSampler(1_000)``. (Ranking among a thousand objects only would find relatives more easily.)

A text, a number, a path, a tensor or an array that occurs in several pairs is one object: it is encoded once, and a
question that has two answers has two right ones. Other objects have no cheap identity; pairs that share one of them
want one subgroup, so that they are not taken for negatives of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics import Metric

from torchrecycle.errors import BatchError
from torchrecycle.keys import key
from torchrecycle.progress import progress
from torchrecycle.similarity.loaders import GroupBatches, group_number, pair_targets
from torchrecycle.similarity.metrics import Groups, Pairs, Relevance, askable, measure
from torchrecycle.similarity.retrieval import RetrievalMetric
from torchrecycle.similarity.samples import SimilarityGroupSample, SimilarityPairSample

__all__ = ["AttachedMetric", "BaseSampler", "Evaluator", "GroupSampler", "PairSampler"]


# -- in training -------------------------------------------------------------------------------------------------------

_STAGES = ("train", "validation", "test")


class AttachedMetric:
    """A metric that a `TrainableModel` computes while it is trained, and how it is logged: ``NAME_train``.

    Whatever it does not have itself, it takes from the metric: ``attached.compute()``, ``attached.k``.

    Args:
        name: under which it is logged.
        metric: with ``update(embeddings, **targets)``, ``compute()`` and ``reset()``.
        logger: whether loggers get it.
        prog_bar: whether the progress bar shows it.
        on_step: whether it is also computed for each batch by itself.
        on_epoch: whether it is computed over all batches of an epoch.
        stages: when it is computed, of ``"train"``, ``"validation"`` and ``"test"``; the first two unless given.
        **log_options: further arguments of ``LightningModule.log``.

    Raises:
        ValueError: there is no such stage, or it would never be logged.
    """

    def __init__(
        self,
        name: str,
        metric: Metric,
        logger: bool = True,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        *,
        stages: Sequence[str] | None = None,
        **log_options: Any,
    ) -> None:
        self._metric = metric
        self.name = name
        self.on_step = bool(on_step)
        self.on_epoch = True if on_epoch is None else on_epoch
        self.stages = _known_stages(stages)
        self.log_options: dict[str, Any] = {"logger": logger, "prog_bar": prog_bar, **log_options}
        if not (self.on_step or self.on_epoch):
            raise ValueError(f"the metric '{name}' is logged neither on_step nor on_epoch, so never")

    @property
    def metric(self) -> Metric:
        """The metric itself."""
        return self._metric

    def is_for(self, stage: str) -> bool:
        """Whether it is computed at a stage."""
        return stage in self.stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._metric(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # copy and pickle look for hooks: those of the metric would make a metric of this
        if name.startswith("__") or "_metric" not in self.__dict__:
            raise AttributeError(f"AttachedMetric has no attribute '{name}'")
        try:
            return getattr(self._metric, name)
        except AttributeError:
            raise AttributeError(
                f"neither AttachedMetric '{self.name}' nor its {type(self._metric).__name__} has an attribute '{name}'"
            ) from None


def _known_stages(stages: Sequence[str] | None) -> tuple[str, ...]:
    if stages is None:
        return _STAGES[:2]
    given = (stages,) if isinstance(stages, str) else tuple(stages)
    for stage in given:
        if stage not in _STAGES:
            raise ValueError(f"there is no stage {stage!r}: give some of {', '.join(map(repr, _STAGES))}")
    return given


# -- whom to ask -------------------------------------------------------------------------------------------------------


class BaseSampler:
    """Asks some of the objects only. Use one of its two kinds.

    Args:
        sample_size: how many objects to ask, of those that have a relative; all of them if it is -1 or larger than
            their number.
        encode_batch_size: objects that the model encodes at once; the evaluator's unless given.
        device: where embeddings are held and ranked; where the model leaves them unless given.
        log_progress: whether a bar or lines tell how far a long evaluation is.
        seed: draws whom to ask: the same objects at each call, so that two models are asked the same.
    """

    kind: str | None = None
    """What it samples, in words; None for anything."""

    def __init__(
        self,
        sample_size: int = -1,
        encode_batch_size: int | None = None,
        device: torch.device | str | None = None,
        log_progress: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        if sample_size != -1 and sample_size < 1:
            raise ValueError(f"sample_size={sample_size} asks nobody: give a number of objects, or -1 for all")
        self.sample_size = sample_size
        self.encode_batch_size = encode_batch_size
        self.device = device
        self.log_progress = log_progress
        self.seed = seed

    def draw(self, positions: Tensor) -> Tensor | None:
        """Some of the objects, in the order in which they are; None for all.

        Args:
            positions: ``[objects]``, of those that can be asked.
        """
        if self.sample_size == -1 or self.sample_size >= len(positions):
            return None
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(positions), generator=generator)[: self.sample_size]
        return positions[chosen.sort().values]


class GroupSampler(BaseSampler):
    """Asks some objects of data in groups; arguments as of `BaseSampler`."""

    kind = "groups"


class PairSampler(BaseSampler):
    """Asks some objects of data in pairs.

    Args:
        sample_size: how many objects to ask; all of them if it is -1 or larger than their number.
        distinguish: only left objects ask, and only right ones are ranked (True), or all ask all (False). Unless given,
            as each metric has it, which is False unless it was told otherwise.
        encode_batch_size: as of `BaseSampler`.
        device: as of `BaseSampler`.
        log_progress: as of `BaseSampler`.
        seed: as of `BaseSampler`.
    """

    kind = "pairs"

    def __init__(
        self,
        sample_size: int = -1,
        distinguish: bool | None = None,
        encode_batch_size: int | None = None,
        device: torch.device | str | None = None,
        log_progress: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(sample_size, encode_batch_size, device, log_progress, seed=seed)
        self.distinguish = distinguish


# -- samples, a batch at a time ----------------------------------------------------------------------------------------


def _batches(dataset: Any, batch_size: int, workers: int) -> Iterator[list[Any]]:
    """Samples of whatever holds some; the global random state stays as it is."""
    if isinstance(dataset, DataLoader):
        return iter(_of_samples(dataset))
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return iter(_loader(dataset, workers, batch_size=batch_size))
    if workers:
        raise BatchError(
            f"a {type(dataset).__name__} cannot be read by {workers} workers, as it has no __getitem__ and __len__: "
            "give num_workers=0, or a map-style data set"
        )
    return _chunks(iter(dataset), batch_size)


def _chunks(samples: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(samples, size)):
        yield chunk


def _of_samples(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same samples, each as it is, and in the order of the data set where the loader takes them all."""
    arguments: dict[str, Any] = {"worker_init_fn": loader.worker_init_fn, "batch_size": loader.batch_size or 1}
    if loader.num_workers:
        arguments["multiprocessing_context"] = loader.multiprocessing_context
    if isinstance(loader.batch_sampler, GroupBatches):  # draws some objects twice and others not at all
        arguments["batch_size"] = loader.batch_sampler.batch_size
    elif loader.batch_size is None and loader.batch_sampler is not None:  # a batch sampler of the user's own
        arguments |= {"batch_size": 1, "batch_sampler": loader.batch_sampler}
    elif not isinstance(loader.dataset, IterableDataset) and not _takes_all(loader.sampler):
        arguments["sampler"] = loader.sampler
    return _loader(loader.dataset, loader.num_workers, **arguments)


def _takes_all(sampler: Any) -> bool:
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return isinstance(sampler, SequentialSampler)


def _loader(dataset: Any, workers: int, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(dataset, num_workers=workers, collate_fn=_as_they_are, generator=torch.Generator(), **arguments)


def _as_they_are(samples: list[Any]) -> list[Any]:
    return list(samples)


def _of_one_kind(batches: Iterable[list[Any]]) -> Iterator[tuple[type, list[Any]]]:
    """Batches and what they are of. Raises BatchError for anything else than samples of one kind."""
    kind: type | None = None
    seen = 0
    for batch in batches:
        for number, sample in enumerate(batch, start=seen):
            found = next((one for one in _KINDS if isinstance(sample, one)), None)
            if found is None:
                raise BatchError(
                    f"sample {number:,} is a {type(sample).__name__}: the data set gives SimilarityGroupSample, or "
                    "SimilarityPairSample"
                )
            if kind is not None and found is not kind:
                raise BatchError(
                    f"the data set gives {kind.__name__} and, as sample {number:,}, a {found.__name__}: evaluate the "
                    "two kinds one after the other"
                )
            kind = found
        seen += len(batch)
        if kind is not None:
            yield kind, batch
    if not seen:
        raise BatchError("the data set is empty, so there is nothing to evaluate on")


_KINDS = (SimilarityGroupSample, SimilarityPairSample)


# -- embeddings --------------------------------------------------------------------------------------------------------


class _Encodes(Protocol):
    def encode(self, objects: Any, /, batch_size: int = ..., *, to_numpy: Literal[False]) -> Any: ...


class _Embeddings:
    """Encodes objects once so many have come; keeps nothing but what they became."""

    def __init__(self, model: _Encodes, batch_size: int, device: torch.device | str | None) -> None:
        self.model, self.batch_size, self.device = model, batch_size, device
        self.waiting: list[Any] = []
        self.done: list[Tensor] = []
        self.count = 0
        self.known: dict[Any, int] = {}

    def add(self, obj: Any) -> int:
        """The position that the object's embedding will have."""
        self.waiting.append(obj)
        self.count += 1
        if len(self.waiting) >= self.batch_size:
            self._encode()
        return self.count - 1

    def add_once(self, obj: Any) -> int:
        """The same, where an object that came before keeps its position."""
        identity = _identity(obj)
        if identity is None:
            return self.add(obj)
        position = self.known.get(identity)
        if position is None:
            position = self.known[identity] = self.add(obj)
        return position

    def _encode(self) -> None:
        found = self.model.encode(self.waiting, batch_size=self.batch_size, to_numpy=False)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(self.waiting):
            shape = list(found.shape) if hasattr(found, "shape") else type(found).__name__
            raise BatchError(
                f"the model gives {shape} for {len(self.waiting)} objects: encode() gives one embedding for each, "
                f"[{len(self.waiting)}, dim]. Does the head end in vectors?"
            )
        self.done.append(found.detach() if self.device is None else found.detach().to(self.device))
        self.waiting = []

    def all(self) -> Tensor:
        if self.waiting:
            self._encode()
        return torch.cat(self.done)


def _identity(obj: Any) -> Any:
    """What is equal for equal objects, of the types for which equal means that a model cannot tell them apart.

    Not of a picture, whose orientation is no part of its pixels, nor of a dict, which has an order.
    """
    if type(obj) in (str, bytes, int) or isinstance(obj, PurePath):
        return type(obj), obj
    if type(obj) is Tensor or (type(obj) is np.ndarray and not obj.dtype.hasobject):
        return key(obj)
    return None


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A data set, encoded."""

    embeddings: Tensor
    """``[objects, dim]``"""
    groups: Tensor | None
    """``[objects]``, int64; of pairs None"""
    pairs: Tensor | None
    """``[pairs, 2]``, positions in `embeddings`; of groups None"""
    scores: Tensor | None
    """``[pairs]``, float32"""
    subgroups: Tensor | None
    """``[pairs]``, int64"""

    def relevance(self, distinguish: bool) -> Relevance:
        if self.pairs is None:
            assert self.groups is not None
            return Groups(self.groups)
        return Pairs(self.pairs, self.scores, self.subgroups, distinguish)

    def batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """As a loader would give it all at once: embeddings and targets."""
        if self.pairs is None or self.scores is None or self.subgroups is None:
            assert self.groups is not None
            return self.embeddings, {"groups": self.groups.to(self.embeddings.device)}
        embeddings = self.embeddings[self.pairs.T.flatten()]
        targets = pair_targets(self.scores, self.subgroups)
        return embeddings, {name: values.to(embeddings.device) for name, values in targets.items()}


def _encode(
    dataset: Any,
    model: _Encodes,
    *,
    batch_size: int,
    workers: int,
    device: torch.device | str | None,
    show: bool,
) -> _Encoded:
    groups: list[int] = []
    pairs: list[tuple[int, int]] = []
    told: list[tuple[float, int]] = []
    embeddings = _Embeddings(model, batch_size, device)
    with progress("evaluating", _samples_in(dataset) if show else 0, "samples") as shown:
        for kind, samples in _of_one_kind(_batches(dataset, batch_size, workers)):
            for sample in samples:
                if kind is SimilarityGroupSample:
                    groups.append(group_number(sample.group))
                    embeddings.add(sample.obj)
                else:
                    told.append((float(sample.score), group_number(sample.subgroup)))
                    pairs.append((embeddings.add_once(sample.obj_a), embeddings.add_once(sample.obj_b)))
            shown.advance(len(samples))
    found = embeddings.all()
    if groups:
        return _Encoded(found, torch.tensor(groups), None, None, None)
    scores, subgroups = zip(*told, strict=True)
    return _Encoded(found, None, torch.tensor(pairs), torch.tensor(scores), torch.tensor(subgroups))


def _samples_in(dataset: Any) -> int:
    """0 if nobody knows."""
    samples: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    return len(samples) if hasattr(samples, "__len__") else 0


# -- a whole data set --------------------------------------------------------------------------------------------------


class Evaluator:
    """Metrics over a whole data set.

    Args:
        metrics: by the names under which they are wanted; or one, or several, under the names of their classes. Their
            states are left alone.
        sampler: asks some objects only; all are asked unless given. Needed by those who know Quaterion only.
        batch_size: objects that are read and encoded at once.
        num_workers: processes that read the data set. A data loader keeps its own.

    Raises:
        ValueError: there is no metric, two have one name, or a number is none.
    """

    def __init__(
        self,
        metrics: Metric | AttachedMetric | Mapping[str, Any] | Sequence[Any],
        sampler: BaseSampler | None = None,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size={batch_size} and num_workers={num_workers}: give 1 or more, and 0 or more")
        self.metrics = _named(metrics)
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_workers = num_workers

    def evaluate(self, dataset: Any, model: _Encodes) -> dict[str, Tensor]:
        """Encode all objects, and measure.

        Args:
            dataset: of `SimilarityGroupSample` or of `SimilarityPairSample`: map-style, iterable, or a data loader over
                one, of which each sample is taken once. It is read once, a batch at a time.
            model: a `SimilarityModel`.

        Returns:
            each metric by its name: a scalar, unless its ``reduce_func`` says otherwise.

        Raises:
            BatchError: the data set is empty or holds something else than samples of one kind, or the model gives no
                embeddings.
            NothingToAskError: no object has both a relative and a negative.
            NotFiniteError: an embedding is not finite.
            ValueError: the sampler is for samples of the other kind, or a metric cannot be sampled.
        """
        sampler = self.sampler or BaseSampler()
        encoded = _encode(
            dataset,
            model,
            batch_size=sampler.encode_batch_size or self.batch_size,
            workers=self.num_workers,
            device=sampler.device,
            show=sampler.log_progress,
        )
        _check_sampler(sampler, encoded)
        return self._measured(encoded, sampler)

    def _measured(self, encoded: _Encoded, sampler: BaseSampler) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        alike: dict[tuple[Any, bool], dict[str, RetrievalMetric]] = {}
        for name, metric in self.metrics.items():
            if isinstance(metric, RetrievalMetric):
                told = sampler.distinguish if isinstance(sampler, PairSampler) else None
                distinguish = metric.distinguish if told is None else told
                alike.setdefault((metric.distance_metric_name, distinguish), {})[name] = metric
            else:
                results[name] = _of_other(name, metric, encoded, sampler)
        for (distance, distinguish), metrics in alike.items():
            relevance = encoded.relevance(distinguish)
            measures = {name: metric.measure for name, metric in metrics.items()}
            queries = sampler.draw(askable(relevance, len(encoded.embeddings)))
            figures = measure(encoded.embeddings, relevance, measures, distance=distance, queries=queries)
            for name, metric in metrics.items():
                results[name] = metric.reduce(figures[name][~figures[name].isnan()])
        return {name: results[name] for name in self.metrics}


def _named(metrics: Any) -> dict[str, Any]:
    """Metrics by name, each out of what attaches it."""
    if isinstance(metrics, Mapping):
        named = list(metrics.items())
    else:
        given = [metrics] if isinstance(metrics, (Metric, AttachedMetric)) else list(metrics)
        named = [(one.name if isinstance(one, AttachedMetric) else type(one).__name__, one) for one in given]
    if not named:
        raise ValueError("there is no metric to evaluate: give Evaluator({'P@1': RetrievalPrecision(k=1)})")
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two metrics have the name '{name}': give a dict, such as {{'P@1': RetrievalPrecision(k=1), 'P@5': "
                "RetrievalPrecision(k=5)}"
            )
    found = {name: one.metric if isinstance(one, AttachedMetric) else one for name, one in named}
    for name, metric in found.items():
        if not isinstance(metric, Metric):
            what = f"the class {metric.__name__}" if isinstance(metric, type) else f"a {type(metric).__name__}"
            raise ValueError(
                f"the metric '{name}' is {what}: give a torchmetrics.Metric with update(embeddings, **targets), such "
                "as RetrievalRPrecision()"
            )
    return found


def _check_sampler(sampler: BaseSampler, encoded: _Encoded) -> None:
    kind = "groups" if encoded.pairs is None else "pairs"
    if sampler.kind not in (None, kind):
        raise ValueError(
            f"the data set holds {kind}, and {type(sampler).__name__} samples {sampler.kind}: give a "
            f"{'GroupSampler' if kind == 'groups' else 'PairSampler'}"
        )


def _of_other(name: str, metric: Metric, encoded: _Encoded, sampler: BaseSampler) -> Tensor:
    """A metric that is not of this package: it gets everything as one batch, in a copy."""
    if sampler.sample_size != -1:
        raise ValueError(
            f"'{name}' is a {type(metric).__name__}, which cannot ask some objects only: evaluate it without "
            "sample_size, or derive it from RetrievalMetric"
        )
    embeddings, targets = encoded.batch()
    metric = metric.clone()
    metric.reset()
    metric.update(embeddings, **targets)
    return metric.compute()
