"""What each level will take, from a handful of measured batches and before anything is filled.

930 photos of cars at 160 px through an EfficientNet-Lite0, two cores: eight batches of 64 at each level say in advance
what a sweep then measures in a quarter of an hour: that an epoch takes 25 s in full training, 21 s with half of the
blocks frozen and computed again, and 10 s from a store; that filling takes 13 s, which two epochs win back; and that
350 MB are kept.

Nothing is extrapolated from operations or from a machine's speed: each level is trained for some steps, by the task's
own ``fit``, on the task's own data, and what a batch took is multiplied by the number of batches. What would make such
a figure wrong, and what is done about it:

- *First batches are slow* (memory, kernels that are chosen, an optimiser's state, checksums of rows read for the first
  time): they do not count, and a prefix has run on batches of its size before filling is measured.
- *A step may take several batches*: an objective is seen for whole rounds of the same ones.
- *A short step drowns in noise* (a head's step takes 5 ms): the same batches come again until a second has been
  measured, and the middle half of the rounds counts. A step of several seconds is not repeated.
- *What an epoch costs once* (the frozen layers' bytes are hashed, workers start) is told from what each batch costs.
- *Order*: rows and objects are those of batches drawn as in training, so that texts are padded as they will be. Filling
  goes through a data set in its order, so it is measured on whole batches of that order, evenly spread.
- *A few batches may be longer than others*: of 30 batches of questions and answers, four steps had 104 tokens in the
  mean and all had 95, padding included, which made an epoch look 13 % longer. So where batches differ in size, further
  ones are read, for a second at most and not trained on, and time is counted by numbers in a batch.
- *What a pass costs once* (files that are written and waited for) is told from what each object costs by a pass over
  a single object.
- *Several levels are filled in one pass*, in which the deepest prefix runs once: that pass is what is measured and
  predicted. For a level alone, ask for that level alone.
- *The page cache*: a small store is read from memory, and so is the real one, if it fits into memory. If it does not,
  the disk is read without the cache, and what does not fit is counted at that speed.
- *Memory that is freed and given anew at each step* costs up to half of it, another part each minute. Nothing is done
  about it here: whoever owns the process may call `torchrecycle.keep_freed_memory`, and the commands do.
- *Files of objects that were never read* come slowly from a disk: all objects of the measured batches are read once
  before, as filling or a first epoch will have done.

Not counted are evaluations, which a sweep does not count either, and filling of other splits. What another process
takes from the machine meanwhile, nobody can predict.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

from torchrecycle.data.resident import free_bytes
from torchrecycle.errors import RecycleError, StoreError
from torchrecycle.fill import FillReport
from torchrecycle.progress import progress
from torchrecycle.recycling import Recycling, fill_many
from torchrecycle.store import Ragged, Store, leaf_bytes
from torchrecycle.store.speed import seconds_per_cold_byte, temporary_store
from torchrecycle.sweep.identity import seed_everything
from torchrecycle.sweep.levels import parse_levels
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Prediction
from torchrecycle.sweep.runner import attach
from torchrecycle.sweep.task import Task
from torchrecycle.sweep.trial import RunningTrial
from torchrecycle.trace import random_state, set_random_state

__all__ = ["PredictionError", "predict"]

STEPS = 8
"""Batches of a round."""
WARM = 2
"""Batches of the first round that do not count, if it is the only one."""
ENOUGH_SECONDS = 1.0
"""So much is measured of each thing, in whole rounds."""
MOST_ROUNDS = 50
ROW_BYTES = 24
"""What a row takes beside its leaves: a key and a checksum."""
SIZED = 512
"""Rows of which the size is looked at."""
MOST_SIZED = 400
"""Batches of which the size is looked at."""


class PredictionError(RecycleError, ValueError):
    """Nothing can be measured: the data are too few or no map, or the training did not use its loader."""


# -- time of batches ---------------------------------------------------------------------------------------------------


class _Enough(BaseException):
    """Ends a training that has been watched for long enough; no ``except Exception`` of a user's loop keeps it."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One pass over the batches that are measured: moments in seconds."""

    asked: float
    """When the loop asked for the first batch."""
    warm: float
    """When the first batches that may be slow were over."""
    end: float
    """When the loop had finished the last one."""
    fetches: tuple[float, ...]
    """How long the loop waited for each batch."""


class _Watched:
    """A loader that gives a few batches again and again, and notes how long the loop takes for them.

    It raises `_Enough` when a further round is asked for that is not needed.

    Args:
        loader: of these batches.
        device: whose work is waited for before a moment is noted.
        advance: told of each batch.
        most: rounds that count, at most.
    """

    def __init__(self, loader: Any, device: torch.device, advance: Callable[[], None], most: int = MOST_ROUNDS) -> None:
        self._loader, self._advance, self._most = loader, advance, most
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.rounds: list[_Round] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        """What else a user's loop asks of a loader: ``batch_size``, ``dataset``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        if self.is_enough():
            raise _Enough
        asked = moment = self._now()
        warm, fetches = math.nan, []
        try:
            for batch in self._loader:
                fetches.append(time.perf_counter() - moment)
                yield batch
                self._advance()
                if len(fetches) == WARM:
                    warm = self._now()
                moment = time.perf_counter()
        finally:  # also where the loop leaves before the end
            if fetches:
                self.rounds.append(_Round(asked, warm, self._now(), tuple(fetches)))

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def is_enough(self) -> bool:
        """Whether no further round is needed."""
        rounds = self._counted()
        measured = sum(each.end - each.asked for each in rounds)
        return bool(rounds) and (measured >= ENOUGH_SECONDS or len(rounds) >= self._most)

    def _counted(self) -> list[_Round]:
        """All rounds but the first; the first one, from where it is warm, if that is long enough by itself."""
        if not self.rounds:
            return []
        first, *others = self.rounds
        if not others and len(first.fetches) > 2 * WARM and first.end - first.warm >= ENOUGH_SECONDS:
            return [replace(first, asked=first.warm, fetches=first.fetches[WARM:])]
        return others

    def epoch_seconds(self, batches: float, weights: Sequence[float] = ()) -> float:
        """Wall seconds of an epoch of so many batches.

        Args:
            batches: of the epoch.
            weights: of each batch of a round, how long it takes against the mean of the epoch; 1 if not given.

        Raises:
            PredictionError: the loop has not used its loader for long enough.
        """
        counted = self._counted() or self.rounds
        if not counted:
            raise PredictionError(
                "fit(model, loader, trial) has not asked its loader for a batch, so that nothing could be measured: "
                "iterate over the loader once for each epoch"
            )
        starts = [max(0.0, each.fetches[0] - statistics.mean(each.fetches[1:] or each.fetches)) for each in counted]
        each_batch = [
            (one.end - one.asked - start) / _weight(weights, len(one.fetches))
            for one, start in zip(counted, starts, strict=True)
        ]
        between = [later.asked - one.end for one, later in zip(self.rounds, self.rounds[1:], strict=False)]
        once = statistics.median(starts) + (statistics.median(between) if between else 0.0)
        return once + batches * _middle(each_batch)


def _weight(weights: Sequence[float], fetched: int) -> float:
    """Of the last batches of a round: those that count, or all that a loop took that left before the end."""
    if not weights:
        return fetched
    skipped = WARM if fetched == len(weights) - WARM else 0
    return sum(weights[skipped : skipped + fetched])


def _middle(values: Sequence[float]) -> float:
    """Mean of the middle half: one that stood still changes nothing, and what often happens counts.

    >>> _middle([9.0, 1.0, 2.0, 3.0]), _middle([1.0, 3.0]), _middle([5.0, 1.0, 2.0])
    (2.5, 2.0, 2.0)
    """
    left_out = len(values) // 4 if len(values) > 3 else (len(values) - 1) // 2
    return statistics.mean(sorted(values)[left_out : len(values) - left_out])


# -- which batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sample:
    """A few batches of an epoch."""

    batches: tuple[tuple[int, ...], ...]
    """Indices into the training split."""
    epoch: float
    """How many batches of their size an epoch has."""
    further: tuple[tuple[int, ...], ...]
    """Those after them, as far as they may be looked at."""
    arguments: dict[str, Any]
    """What else a loader takes."""


_ORDER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")
"""Arguments of a loader that say which objects are in a batch."""


def _sample(dataset: Any, arguments: dict[str, Any], steps: int) -> _Sample:
    """The first batches of an epoch: an even number, since some objectives take two to a step."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise PredictionError(
            f"the training split is a {type(dataset).__name__}, which gives objects in its own order: a prediction "
            "needs a map-style data set, with __len__ and __getitem__"
        )
    if len(dataset) < 4:
        raise PredictionError(f"the training split has {len(dataset)} objects, and four are the least to predict from")
    order = DataLoader(dataset, **arguments).batch_sampler
    if order is None:
        raise PredictionError("a loader with batch_size=None gives single objects: nothing says what a batch is")
    drawn = iter(order)
    batches = tuple(tuple(batch) for batch in islice(drawn, steps + steps % 2))
    further = tuple(tuple(batch) for batch in islice(drawn, MOST_SIZED))
    size = statistics.mean(len(batch) for batch in batches)
    rest = {name: value for name, value in arguments.items() if name not in _ORDER}
    return _Sample(batches, _objects_of(order) / size, further, rest)


def _objects_of(order: Any) -> int:
    """How many objects come in an epoch."""
    if type(order) is BatchSampler and hasattr(order.sampler, "__len__"):
        objects = len(order.sampler)  # pyright: ignore
        return objects - objects % order.batch_size if order.drop_last else objects
    return sum(len(batch) for batch in order)


class _Part:
    """The objects of a sample as a data set of their own, with its batches."""

    def __init__(self, dataset: Any, sample: _Sample) -> None:
        self.indices = sorted({index for batch in sample.batches for index in batch})
        place = {index: number for number, index in enumerate(self.indices)}
        self.dataset = Subset(dataset, self.indices)
        self.batches = [[place[index] for index in batch] for batch in sample.batches]
        self._arguments = sample.arguments
        self._whole, self._sample = dataset, sample
        self._numbers: list[int] = []
        self._weights: tuple[float, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {**self._arguments, "batch_sampler": self.batches}

    def read(self) -> None:
        """Read all objects once, so that their files are where they will be from the second epoch on."""
        if not self._numbers:
            self._numbers = [_numbers(batch) for batch in DataLoader(self.dataset, **self.arguments())]

    def weights(self) -> tuple[float, ...]:
        """Of each batch, how many numbers it has against the mean of an epoch's batches of as many objects.

        All 1 where objects are of one size. Else further batches are read, until a second has gone by: an even number,
        since a step may take a short one and a long one.
        """
        if not self._weights:
            self.read()
            self._weights = self._weighed(self._numbers, [len(batch) for batch in self.batches])
        return self._weights

    def _weighed(self, numbers: Sequence[int], objects: Sequence[int]) -> tuple[float, ...]:
        each = {of_batch / count for of_batch, count in zip(numbers, objects, strict=True)}
        if len(each) == 1:  # whether a batch has fewer objects than others is counted elsewhere
            return (1.0,) * len(numbers)
        mean = self._mean_numbers(sum(numbers), sum(objects)) * statistics.mean(objects)
        return tuple(of_batch / mean for of_batch in numbers)

    def _mean_numbers(self, numbers: float, objects: int) -> float:
        """Per object, of all batches that are looked at."""
        arguments = {**self._sample.arguments, "batch_sampler": [list(batch) for batch in self._sample.further]}
        began, read, pair = time.perf_counter(), 0, (0, 0)
        for indices, batch in zip(self._sample.further, DataLoader(self._whole, **arguments), strict=False):
            pair, read = (pair[0] + _numbers(batch), pair[1] + len(indices)), read + 1
            if read % 2 == 0:
                numbers, objects, pair = numbers + pair[0], objects + pair[1], (0, 0)
                if time.perf_counter() - began > ENOUGH_SECONDS:
                    break
        return numbers / objects


def _numbers(batch: Any) -> int:
    """How many a batch holds, with its padding.

    >>> _numbers({"ids": torch.ones(2, 7), "more": (torch.ones(2), "text")})
    16
    """
    if isinstance(batch, torch.Tensor):
        return batch.numel()
    if isinstance(batch, Mapping):
        return sum(map(_numbers, batch.values()))
    return sum(map(_numbers, batch)) if isinstance(batch, (tuple, list)) else 0


# -- levels at work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Level:
    """One level with its model, attached or not."""

    level: str
    model: nn.Module
    recycling: Recycling | None
    recipe: Recipe
    sample: _Sample
    part: _Part

    def trial(self, go_on: Callable[[Any], bool]) -> RunningTrial:
        """What the task's ``fit`` is given; its clock begins now."""
        share = 0.0 if self.recycling is None else self.recycling.level
        trained = tuple(self.model.parameters() if self.recycling is None else self.recycling.parameters())
        return RunningTrial(self.level, share, self.recipe, 0, trained, go_on=go_on)

    def loader(self) -> Any:
        """Of the sample's batches: of rows, or of objects where nothing is recycled."""
        if self.recycling is None or self.recycling.off:
            return DataLoader(self.part.dataset, **self.part.arguments())
        return self.recycling.loader(self.part.dataset, **self.part.arguments())


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured of a recycled level at one precision."""

    cut: str
    epoch: float
    frozen: float
    nbytes: int
    steps: int


class _Measuring:
    """Measures levels of one task.

    Args:
        build_model: see `predict`.
        task: see `predict`.
        steps: batches of a round.
        views: of each object of the training split.
        advance: told of each batch.
        rounds: that count of each thing, at most.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        task: Task,
        steps: int,
        views: int | None,
        advance: Callable[[], None],
        rounds: int = MOST_ROUNDS,
    ) -> None:
        self.build_model, self.task, self.steps, self.advance = build_model, task, steps, advance
        self.rounds = rounds
        self.splits = task.splits()
        self.data = self.splits["train"].dataset
        self.objects = len(self.data)
        self.options = {} if views is None else {"views": views}
        self.frozen: dict[str, float] = {}
        """Seconds of an epoch without a store: the same at each precision."""
        self._filled = Subset(self.data, [])
        """Batches in the split's order that filling is measured by."""
        self._parts: dict[tuple[tuple[int, ...], ...], _Part] = {}
        """Of each sample the data set, the same for all levels: it is read once to be filled."""

    def full(self, *, read: bool) -> tuple[float, int]:
        """Seconds of an epoch of full training, and the batches that this comes from.

        Args:
            read: whether the objects of the batches are to be read once before.
        """
        level = self._level("full", self._model(), None)
        if read:
            level.part.read()
        return self._epoch(level, level.loader()), len(level.sample.batches)

    def recycled(
        self, levels: Sequence[str], precision: str | None, store: Store, free: int
    ) -> tuple[float, dict[str, _Measured]]:
        """Seconds of the pass that fills all of these levels, and what was measured of each."""
        with ExitStack() as stack:
            attached = {level: self._attached(level, precision, store, stack) for level in levels}
            by_cut = {each.recycling.cut: each for each in attached.values() if each.recycling is not None}
            self._measure_frozen(attached.values())  # first: prefix runs of a new size are slow
            fill, views = self._fill_seconds(list(by_cut.values()))
            return fill, {level: self._measured(each, store, free, views) for level, each in attached.items()}

    def _measure_frozen(self, levels: Iterable[_Level]) -> None:
        for level in levels:
            if level.level in self.frozen or level.recycling is None:
                continue
            level.part.read()
            with level.recycling.paused():
                self.frozen[level.level] = self._epoch(level, level.loader())

    def _attached(self, level: str, precision: str | None, store: Store, stack: ExitStack) -> _Level:
        model = self._model()
        options = {"precision": precision, **self.options}
        recycling = attach(self.task, model, level, self.task.cuts.get(level), store, options)
        stack.callback(recycling.detach)
        return self._level(level, model, recycling)

    def _model(self) -> nn.Module:
        seed_everything(0)  # so that a new head, or a trunk with random weights, is the same each time
        model = self.build_model()
        return (model if self.task.device is None else model.to(self.task.device)).eval()

    def _level(self, level: str, model: nn.Module, recycling: Recycling | None) -> _Level:
        share = 0.0 if recycling is None else recycling.level
        recipe = replace(self.task.recipe(level, share), epochs=self.rounds + 1)
        sample = _sample(self.data, self.task.loader_arguments(recipe, seed=0), self.steps)
        part = self._parts.setdefault(sample.batches, _Part(self.data, sample))
        return _Level(level, model, recycling, recipe, sample, part)

    def _measured(self, level: _Level, store: Store, free: int, views: int) -> _Measured:
        recycling = level.recycling
        assert recycling is not None
        loader = level.loader()
        others = recycling.loader(self._filled, **self.task.eval_arguments())
        known = [torch.as_tensor(each.dataset.locations).flatten() for each in (loader, others)]  # pyright: ignore
        row, is_ragged = _row_of(recycling, torch.cat(known))
        epoch = self._epoch(level, loader, weighed=is_ragged)
        late = _late_seconds(store, row, self.objects, self.objects * views, free)
        kept = row * sum(len(split) * (views if name == "train" else 1) for name, split in self.splits.items())
        steps = len(level.sample.batches)
        return _Measured(recycling.cut, max(epoch, late), self.frozen[level.level], round(kept), steps)

    def _epoch(self, level: _Level, loader: Any, *, weighed: bool = True) -> float:
        """Seconds of an epoch, from training for a few batches.

        Args:
            level: which.
            loader: of these batches.
            weighed: whether larger ones take longer: not those of rows that are all of one size.
        """
        device = next((parameter.device for parameter in level.model.parameters()), torch.device("cpu"))
        watched = _Watched(loader, device, self.advance, self.rounds)
        seed_everything(0)
        with suppress(_Enough):
            self.task.fit(level.model, watched, level.trial(lambda point: not watched.is_enough()))
        return watched.epoch_seconds(level.sample.epoch, level.part.weights() if weighed else ())

    # -- filling -------------------------------------------------------------------------------------------------------

    def _fill_seconds(self, levels: Sequence[_Level]) -> tuple[float, int]:
        """Seconds of the pass over the training split that fills all of these, and in how many views each object is
        kept; what is trained on next is filled.

        First an object that does not count, then one that says what a pass costs by itself, then whole batches of the
        split's own order, evenly spread; last the others of those that are trained on.
        """
        arguments = self.task.eval_arguments()
        size, count = arguments["batch_size"], self.objects
        self._pass(levels, Subset(self.data, [count - 1]), arguments)
        one = self._pass(levels, Subset(self.data, [count - 2]), arguments)
        self._filled = Subset(self.data, _spread(count, size, self.steps))
        several = self._pass(levels, self._filled, arguments)
        for part in {id(level.part): level.part for level in levels}.values():
            self._pass([level for level in levels if level.part is part], part.dataset, arguments)
        return _seconds_of_pass(one, several, count * several.views), several.views

    def _pass(self, levels: Sequence[_Level], objects: Subset[Any], arguments: dict[str, Any]) -> FillReport:
        """One pass over some objects, as one over several levels.

        Raises:
            StoreError: the store did not take the rows.
        """
        recyclings = [level.recycling for level in levels if level.recycling is not None]
        reports = fill_many(recyclings, objects, **arguments)
        if any(report.missing for report in reports):
            raise StoreError(
                f"{max(report.missing for report in reports):,} rows of {len(objects):,} measured objects could not be "
                "written: make room, or give another store_folder"
            )
        self.advance()
        return replace(reports[0], computed=max(report.computed for report in reports))


def _spread(count: int, size: int, batches: int) -> list[int]:
    """Indices of whole batches, evenly spread over the order of a data set.

    >>> _spread(10, 2, 2), _spread(5, 2, 9)
    ([0, 1, 4, 5], [0, 1, 2, 3, 4])
    """
    there = max(1, math.ceil(count / size))
    chosen = [there * number // batches for number in range(batches)] if batches < there else range(there)
    return [index for batch in chosen for index in range(batch * size, min(count, (batch + 1) * size))]


def _seconds_of_pass(one: FillReport, several: FillReport, objects: int) -> float:
    """Seconds of a pass over all objects from one over some, and one over a single object, which costs next to what any
    pass costs.

    Reading and hashing are counted for each object that was read, the prefix for each that it ran for.

    Args:
        one: of a pass over a single object.
        several: of one over more; views count as objects.
        objects: how many there are; likewise.
    """
    besides, rest = one.seconds - one.prefix_seconds, several.seconds - several.prefix_seconds
    reading = max(0.0, rest - besides) / max(1, several.objects - one.objects)
    once = max(0.0, besides - one.objects * reading)
    return once + objects * (reading + several.prefix_seconds / max(1, several.computed))


# -- the store ---------------------------------------------------------------------------------------------------------


def _row_of(recycling: Recycling, locations: torch.Tensor) -> tuple[float, bool]:
    """Mean bytes of a row, with what it takes beside its leaves, and whether rows differ in length."""
    there = locations[locations >= 0].unique()
    some = there[:: max(1, len(there) // SIZED)]
    leaves = recycling.source.rows.gather(some)
    kept = sum(map(leaf_bytes, leaves))
    return kept / len(some) + ROW_BYTES, any(isinstance(leaf, Ragged) for leaf in leaves)


def _late_seconds(store: Store, row: float, read: int, kept: int, free: int) -> float:
    """Seconds in which an epoch's rows come from the disk, as far as they do not fit into memory. Reading ahead of the
    training, a loader hides them behind it or is held up by them.

    Args:
        store: on the disk.
        row: bytes of a row.
        read: rows of an epoch.
        kept: rows among which they are: those of other views, too.
        free: bytes of memory.
    """
    folder = getattr(store, "url", "")
    if row * kept <= free or "://" in folder:
        return 0.0
    missing = row * read * (1 - free / (row * kept))
    return missing * seconds_per_cold_byte(folder, max(1, round(row)))


# -- all levels --------------------------------------------------------------------------------------------------------


def predict(
    build_model: Callable[[], nn.Module],
    task: Task,
    levels: Iterable[str | float],
    *,
    precisions: Sequence[str | None] = (None,),
    steps: int = STEPS,
    store_folder: str | Path | None = None,
    views: int | None = None,
    rounds: int = MOST_ROUNDS,
) -> tuple[Prediction, ...]:
    """What each level will take: seconds of filling and of an epoch, bytes, and when filling has paid.

    Each level is trained for a few batches with the task's own ``fit``, recycled from a small store, frozen without a
    store, and in full; the models are thrown away, and the generators are as before.

    Args:
        build_model: gives the pretrained model, the same weights each time.
        task: data and training. Nothing is evaluated.
        levels: as for `sweep`. Filling is predicted as one pass for all of them.
        precisions: of kept rows, see `recycle`; full training is predicted once.
        steps: how many batches a round has; more of them make a figure surer, and take longer.
        store_folder: a folder on the disk where the store will be; a temporary one in it is removed at the end. The
            system's folder for temporary files if None; ``memory://`` for a store in memory.
        views: in how many augmented versions each object of the training split is kept; see `recycle`.
        rounds: how often the same batches are measured at most, where a second has not gone by; one before, which is
            slow, does not count.

    Returns:
        From no recycling to all, and of each level the precisions in the order given.

    Raises:
        PredictionError: there is too little to measure.
        CutError: a level has no valid cut.
        StoreError: the rows of a few batches cannot be written.
    """
    names = parse_levels(levels)
    if steps < 2 * WARM:
        raise PredictionError(f"steps={steps}: at least {2 * WARM} batches are measured")
    if rounds < 1:
        raise PredictionError(f"rounds={rounds}: at least one round of batches is measured")
    state = random_state()
    try:
        with progress("measuring a few batches", None, "batches") as shown:
            measuring = _Measuring(build_model, task, steps, views, shown.advance, rounds)
            return _predicted(measuring, names, precisions, store_folder)
    finally:
        set_random_state(state)


def _predicted(
    measuring: _Measuring, names: Sequence[str], precisions: Sequence[str | None], store_folder: str | Path | None
) -> tuple[Prediction, ...]:
    recycled = [name for name in names if name != "full"]
    free = free_bytes(torch.device("cpu"))
    found: list[Prediction] = []
    for precision in precisions if recycled else ():
        with temporary_store(store_folder) as store:
            fill, measured = measuring.recycled(recycled, precision, store, free)
        found += [
            Prediction(
                level=level,
                cut=one.cut,
                precision=precision,
                objects=measuring.objects,
                fill_seconds=fill,
                epoch_seconds=one.epoch,
                frozen_epoch_seconds=one.frozen,
                full_epoch_seconds=None,
                bytes_kept=one.nbytes,
                steps=one.steps,
            )
            for level, one in measured.items()
        ]
    found.sort(key=lambda each: names.index(each.level))
    if "full" not in names:
        return tuple(found)
    seconds, batches = measuring.full(read=not recycled)
    full = Prediction(
        level="full",
        cut=None,
        precision=None,
        objects=measuring.objects,
        fill_seconds=0.0,
        epoch_seconds=seconds,
        frozen_epoch_seconds=None,
        full_epoch_seconds=seconds,
        bytes_kept=0,
        steps=batches,
    )
    return (full, *(replace(each, full_epoch_seconds=seconds) for each in found))
