"""What is predicted from a few batches: the arithmetic by a clock turned by hand, the rest on real trainings."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import small
from torchrecycle.errors import RandomInputError
from torchrecycle.fill import FillReport
from torchrecycle.store import open_store
from torchrecycle.sweep import Recipe, RunningTrial, Task
from torchrecycle.sweep.predict import PredictionError, predict

module = importlib.import_module("torchrecycle.sweep.predict")  # the package gives the function under this name

CPU = torch.device("cpu")


class _Clock:
    """Seconds pass when it is told so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


class _Batches:
    """A loader whose batches take a known time each, and whose epochs take one to begin."""

    def __init__(self, clock: _Clock, count: int, *, fetch: float, start: float = 0.0) -> None:
        self.clock, self.count, self.fetch, self.start = clock, count, fetch, start

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.clock.pass_by(self.start)
        for number in range(self.count):
            self.clock.pass_by(self.fetch)
            yield number


def _watched(clock: _Clock, loader: _Batches, step: Callable[[int, int], float], *, rounds: int = 99) -> Any:
    """A loop that takes `step(round, batch)` seconds for a batch, watched."""
    watched = module._Watched(loader, CPU, lambda: None)
    try:
        for number in range(rounds):
            for batch in watched:
                clock.pass_by(step(number, batch))
    except module._Enough:
        pass
    return watched


def test_a_slow_first_round_does_not_count(clock: _Clock):
    loader = _Batches(clock, 8, fetch=0.01)
    watched = _watched(clock, loader, lambda round, batch: 0.5 if round == 0 and batch < 2 else 0.04)
    assert watched.epoch_seconds(100) == pytest.approx(100 * 0.05)
    assert len(watched.rounds) == 4  # three of 0.4 seconds are more than one second


def test_long_steps_are_not_repeated_and_the_first_two_do_not_count(clock: _Clock):
    loader = _Batches(clock, 8, fetch=0.1)
    watched = _watched(clock, loader, lambda round, batch: 9.0 if batch < 2 else 1.9)
    assert len(watched.rounds) == 1
    assert watched.epoch_seconds(32) == pytest.approx(32 * 2.0)


def test_what_an_epoch_costs_once_is_not_multiplied(clock: _Clock):
    loader = _Batches(clock, 8, fetch=0.01, start=0.3)
    watched = _watched(clock, loader, lambda round, batch: 0.04)
    assert watched.epoch_seconds(100) == pytest.approx(0.3 + 100 * 0.05)


def test_what_a_loop_does_between_epochs_counts_once(clock: _Clock):
    watched = module._Watched(_Batches(clock, 8, fetch=0.01), CPU, lambda: None)

    def loop() -> None:
        while True:
            for _ in watched:
                clock.pass_by(0.04)
            clock.pass_by(0.7)

    with pytest.raises(module._Enough):
        loop()
    assert watched.epoch_seconds(10) == pytest.approx(0.7 + 10 * 0.05)


def test_steps_of_two_batches_are_seen_for_whole_rounds(clock: _Clock):
    """Questions take 10 ms, answers 50, as the loop takes both and then trains."""
    loader = _Batches(clock, 8, fetch=0.0)
    watched = _watched(clock, loader, lambda round, batch: 0.05 if batch % 2 else 0.01)
    assert watched.epoch_seconds(40) == pytest.approx(20 * 0.06)


def test_time_is_counted_by_what_is_in_a_batch(clock: _Clock):
    """Four batches have twice as much as an epoch's mean, and four half: by number, it would be a quarter more."""
    weights = [2.0, 0.5, 2.0, 0.5, 2.0, 0.5, 2.0, 0.5]
    watched = _watched(clock, _Batches(clock, 8, fetch=0.0), lambda round, batch: 0.04 * weights[batch])
    assert watched.epoch_seconds(100, weights) == pytest.approx(100 * 0.04)
    slow = _watched(clock, _Batches(clock, 8, fetch=0.0), lambda round, batch: 9.0 if batch < 2 else weights[batch])
    assert len(slow.rounds) == 1
    assert slow.epoch_seconds(100, weights) == pytest.approx(100.0), "the first two do not count"


def _padded(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    texts, labels = zip(*items, strict=True)
    return nn.utils.rnn.pad_sequence(list(texts), batch_first=True), torch.stack(labels)


def test_a_few_batches_that_are_longer_than_others_are_weighed_by_all_that_are_read():
    """The first batches are of long texts, as chance may have it."""
    texts = [torch.ones(12 if number < 6 else 4) for number in range(40)]
    data: Any = list(zip(texts, torch.zeros(40), strict=True))
    arguments = {"batch_size": 2, "collate_fn": _padded}
    part = module._Part(data, module._sample(data, arguments, 4))
    # Of 12 numbers and a label, or 4 and a label, where the mean is 5.2 and a label.
    assert part.weights() == pytest.approx([13 / 6.2] * 3 + [5 / 6.2])
    same = module._Part(data, module._sample(data[:6], arguments, 4))
    assert same.weights() == (1.0,) * 3, "where all are of one size, nothing more is read"


def test_one_round_that_stood_still_changes_nothing(clock: _Clock):
    loader = _Batches(clock, 8, fetch=0.01)
    watched = _watched(clock, loader, lambda round, batch: 0.5 if (round, batch) == (2, 3) else 0.01)
    assert watched.epoch_seconds(100) == pytest.approx(100 * 0.02)


def test_a_loop_that_ends_by_itself_is_predicted_from_what_it_did(clock: _Clock):
    watched = _watched(clock, _Batches(clock, 3, fetch=0.01), lambda round, batch: 0.01, rounds=1)
    assert watched.epoch_seconds(30) == pytest.approx(30 * 0.02)


def test_a_loop_that_leaves_its_epochs_early_is_predicted_from_the_batches_it_took(clock: _Clock):
    watched = module._Watched(_Batches(clock, 8, fetch=0.1), CPU, lambda: None)

    def loop() -> None:
        while True:
            for batch in watched:
                clock.pass_by(0.1)
                if batch == 3:
                    break

    with pytest.raises(module._Enough):
        loop()
    assert watched.epoch_seconds(10) == pytest.approx(10 * 0.2)


def test_a_loop_that_asks_for_no_batch_is_refused_in_words(clock: _Clock):
    with pytest.raises(PredictionError, match="has not asked its loader for a batch"):
        module._Watched(_Batches(clock, 8, fetch=0.1), CPU, lambda: None).epoch_seconds(10)


def test_no_except_exception_of_a_loop_keeps_it_going(clock: _Clock):
    watched = module._Watched(_Batches(clock, 8, fetch=0.1), CPU, lambda: None)

    def loop() -> None:
        for _ in range(99):
            with suppress(Exception):
                list(watched)

    with pytest.raises(module._Enough):
        loop()


# -- which batches -----------------------------------------------------------------------------------------------------


def _numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def test_measured_batches_are_drawn_as_those_of_an_epoch():
    data = _numbers(50)
    arguments = {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3), "num_workers": 0}
    sample = module._sample(data, arguments, 6)
    drawn = [index for batch in sample.batches for index in batch]
    assert [len(batch) for batch in sample.batches] == 6 * [4]
    assert len(set(drawn)) == 24
    assert drawn != sorted(drawn)
    assert sample.epoch == 12.5  # the last batch is half as large as the others
    assert sample.arguments == {"num_workers": 0}
    part = module._Part(data, sample)
    read = [tuple(batch[0].tolist()) for batch in DataLoader(part.dataset, **part.arguments())]
    assert read == list(sample.batches)


@pytest.mark.parametrize(
    ("arguments", "epoch"),
    [
        ({"batch_size": 4, "drop_last": True}, 12.0),
        ({"batch_sampler": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [1, 3]]}, 3.5),
        ({"batch_size": 4, "sampler": torch.utils.data.SubsetRandomSampler(range(20))}, 5.0),
    ],
)
def test_an_epoch_has_as_many_batches_as_its_order_has_objects(arguments: dict[str, Any], epoch: float):
    assert module._sample(_numbers(50), arguments, 2).epoch == epoch


def test_an_odd_number_of_batches_is_made_even_since_some_steps_take_two():
    assert len(module._sample(_numbers(50), {"batch_size": 4}, 5).batches) == 6


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (_Stream(), {"batch_size": 4}, "needs a map-style data set"),
        (_numbers(3), {"batch_size": 1}, "has 3 objects, and four are the least"),
        (_numbers(9), {"batch_size": None}, "batch_size=None gives single objects"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_words(data: Any, arguments: dict[str, Any], words: str):
    with pytest.raises(PredictionError, match=words):
        module._sample(data, arguments, 8)


# -- filling and reading -----------------------------------------------------------------------------------------------


def test_what_a_pass_costs_once_is_told_from_what_each_object_costs():
    """0.2 s for each pass, 2 ms to read an object, 5 ms for its prefix; 20 of 100 were in the store already."""
    one = FillReport(1, 0, 1, 0, 0.2 + 0.005, 0.005)
    several = FillReport(100, 20, 80, 0, 0.2 + 100 * 0.002 + 80 * 0.005, 80 * 0.005)
    assert module._seconds_of_pass(one, several, 10_000) == pytest.approx(0.2 + 10_000 * 0.007, rel=0.01)


def test_rows_that_fit_into_memory_come_at_the_speed_that_was_measured(tmp_path: Path):
    store = open_store(tmp_path / "store")
    assert module._late_seconds(store, 1000.0, 1000, 1000, free=1_000_000) == 0.0
    assert module._late_seconds(open_store("memory://"), 1000.0, 1000, 1000, free=0) == 0.0
    assert not (tmp_path / "store").exists()


def test_rows_that_do_not_fit_into_memory_come_at_the_speed_of_the_disk(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(module, "seconds_per_cold_byte", lambda folder, row: 1e-9 * row)
    store = open_store(tmp_path / "store")
    assert module._late_seconds(store, 100.0, 1000, 1000, free=0) == pytest.approx(0.01)
    assert module._late_seconds(store, 100.0, 1000, 1000, free=75_000) == pytest.approx(0.0025)
    # Of four views one is read in an epoch, but all of them want to be in memory.
    assert module._late_seconds(store, 100.0, 1000, 4000, free=100_000) == pytest.approx(0.0075)


# -- real trainings ----------------------------------------------------------------------------------------------------


class _Pictures(Dataset[Any]):
    """Pictures of 16 pixels that take a while to be read, as photos do."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.images, self.labels = small.pictures(count), small.labels(count)
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.seconds)
        return self.images[index], self.labels[index]


class _Colours(Task):
    """As a user writes one."""

    def __init__(self, count: int = 48, seconds: float = 0.0) -> None:
        self.train, self.test = _Pictures(count, seconds), _Pictures(8)

    def recipe(self, level: str, share: float) -> Recipe:
        return Recipe(epochs=2, suffix_rate=1e-3, head_rate=1e-3, batch_size=4)

    def fit(self, model: nn.Module, loader: Any, trial: RunningTrial) -> None:
        optimizer = torch.optim.SGD(trial.parameters, lr=trial.recipe.suffix_rate)
        for epoch in range(1, trial.recipe.epochs + 1):
            loss = torch.zeros(())
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not trial.ended(epoch, loss.item()):
                break

    def evaluate(self, model: nn.Module, loader: Any) -> float:
        raise AssertionError("a prediction evaluates nothing")


class _Deaf(_Colours):
    """Its fit tells of nothing, listens to nothing, and would go on for hours."""

    def fit(self, model: nn.Module, loader: Any, trial: RunningTrial) -> None:
        for _ in range(1_000_000):
            for images, labels in loader:
                with suppress(Exception):
                    F.cross_entropy(model(images), labels).backward()


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENOUGH_SECONDS", 0.05)


@pytest.mark.usefixtures("_brief")
def test_each_level_and_precision_is_predicted_and_nothing_is_left_behind(tmp_path: Path):
    state = torch.get_rng_state()
    found = predict(
        small.residual, _Colours(), (0.5, "full"), precisions=(None, "int8"), store_folder=tmp_path / "store"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert list((tmp_path / "store").iterdir()) == []
    assert [(one.level, one.cut, one.precision) for one in found] == [
        ("full", None, None),
        ("50", "stages.0", None),
        ("50", "stages.0", "int8"),
    ]
    full, half, eighth = found
    assert (full.fill_seconds, full.bytes_kept, full.frozen_epoch_seconds) == (0.0, 0, None)
    assert full.epoch_seconds == full.full_epoch_seconds == half.full_epoch_seconds
    assert all(one.objects == 48 and one.steps == 8 and one.epoch_seconds > 0 for one in found)
    # 16 channels of 8 times 8 numbers, a key and a checksum, for 48 objects and the 8 of the test split.
    assert half.bytes_kept == 56 * (16 * 8 * 8 * 4 + 24)
    assert eighth.bytes_kept < half.bytes_kept / 3
    assert half.frozen_epoch_seconds == eighth.frozen_epoch_seconds


@pytest.mark.usefixtures("_brief")
def test_a_fit_that_never_ends_is_stopped(tmp_path: Path):
    full, head = predict(small.residual, _Deaf(), "full,head", store_folder="memory://")
    assert 0 < head.epoch_seconds < 60
    assert 0 < full.epoch_seconds < 60


@pytest.mark.usefixtures("_brief")
def test_seconds_are_within_a_few_per_cent_of_those_that_come():
    """Objects take 20 ms each to be read, which other processes do not change: 40 of them take 0.8 s in each epoch that
    reads them, and in the pass that fills."""
    task = _Colours(40, seconds=0.02)
    full, half = predict(small.residual, task, ("full", "50"), store_folder="memory://")
    seconds = {level: _epoch(task, level) for level in ("full", "50")}
    assert full.epoch_seconds == pytest.approx(seconds["full"], rel=0.25)
    assert half.frozen_epoch_seconds == pytest.approx(seconds["full"], rel=0.25)
    assert half.fill_seconds == pytest.approx(0.8, rel=0.25)
    assert half.epoch_seconds < 0.4
    assert half.pays
    assert half.epochs_until_paid in (1, 2)


def _epoch(task: _Colours, level: str) -> float:
    """Seconds of an epoch of full training, as a plain loop has it."""
    model = small.residual()
    recipe = replace(task.recipe(level, 0.0), epochs=1)
    trial = RunningTrial(level, 0.0, recipe, 0, tuple(model.parameters()))
    task.fit(model, DataLoader(task.train, **task.loader_arguments(recipe, seed=1)), trial)
    return trial.curve[-1].seconds


@pytest.mark.usefixtures("_brief")
def test_what_is_cheap_to_compute_and_dear_to_read_does_not_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With no memory left for rows, each comes from the disk, here a slow one."""
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    monkeypatch.setattr(module, "seconds_per_cold_byte", lambda folder, row: 1e-4)
    (head,) = predict(small.residual, _Colours(), ["head"], store_folder=tmp_path)
    assert not head.pays
    assert "reading is slower than computing again" in str(head)


@pytest.mark.usefixtures("_brief")
def test_two_levels_at_one_cut_are_both_predicted():
    one, other = predict(small.residual, _Colours(), ("60", "70"), store_folder="memory://")
    assert (one.cut, other.cut) == ("stages.1", "stages.1")
    assert one.bytes_kept == other.bytes_kept


@pytest.mark.usefixtures("_brief")
def test_very_few_objects_are_enough(tmp_path: Path):
    (half,) = predict(small.residual, _Colours(5), ("50",), store_folder=tmp_path)
    assert half.steps == 2
    assert half.fill_seconds > 0


def test_too_few_batches_are_refused_in_words():
    with pytest.raises(PredictionError, match="steps=2: at least 4 batches are measured"):
        predict(small.residual, _Colours(), ("50",), steps=2)


class _Noisy(_Pictures):
    """Pictures with noise that is drawn anew each time."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = super().__getitem__(index)
        return image + 0.01 * torch.randn(image.shape), label


@pytest.mark.usefixtures("_brief")
def test_views_of_each_object_are_filled_and_kept():
    task = _Colours()
    task.train = _Noisy(48, 0.002)
    (half,) = predict(small.residual, task, ("50",), store_folder="memory://", views=3)
    assert half.objects == 48
    assert half.bytes_kept == (3 * 48 + 8) * (16 * 8 * 8 * 4 + 24)
    assert half.fill_seconds > 3 * 48 * 0.002
    with pytest.raises(RandomInputError, match="views=4"):
        predict(small.residual, task, ("50",), store_folder="memory://")
