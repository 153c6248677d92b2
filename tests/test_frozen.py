"""An epoch without a store, timed by some of its steps: by a clock turned by hand, and in a real sweep."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import small
from torchrecycle import recycle
from torchrecycle.sweep.frozen import FROZEN_STEPS, WARM_STEPS, FrozenSteps, epochs_of_frozen

module = importlib.import_module("torchrecycle.sweep.frozen")

CPU = torch.device("cpu")


class _Clock:
    """Seconds pass when it is told so."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.paused = 0

    def __call__(self) -> float:
        return self.seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def _loader(objects: int, size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(objects)), batch_size=size)


def _trained(steps: FrozenSteps, clock: _Clock, *, each: float, slow: int = 0) -> list[int]:
    """A loop that takes so long for an object, ten times as long in the first batches; the sizes of its batches."""
    sizes = []
    for _ in range(steps.epochs):
        for (batch,) in steps:
            clock.seconds += each * len(batch) * (10 if len(sizes) < slow else 1)
            sizes.append(len(batch))
    return sizes


def test_first_steps_do_not_count_and_objects_do_instead_of_batches(clock: _Clock):
    """Seventeen batches of 64 and one of 12 are more than are measured."""
    steps = FrozenSteps(_loader(1100, 64), None, clock.pause, batches=1, device=CPU)
    sizes = _trained(steps, clock, each=0.01, slow=WARM_STEPS)
    assert sizes == [64] * (WARM_STEPS + FROZEN_STEPS)
    assert len(steps) == len(sizes)
    assert steps.seconds == pytest.approx(11.0)


def test_an_epoch_has_no_more_batches_than_there_are(clock: _Clock):
    """Else a schedule that was made for so many would raise."""
    kept, raw = _loader(92, 8), _loader(92, 8)
    steps = FrozenSteps(raw, kept, clock.pause, batches=1, device=CPU)
    assert (steps.epochs, len(steps)) == (1, len(raw)) == (1, 12)
    assert _trained(steps, clock, each=0.01, slow=1 + WARM_STEPS) == [8] * 12, "the one that is left out has 4"
    assert steps.seconds == pytest.approx(0.92)


def test_of_a_short_epoch_all_is_measured_after_it_has_been_run_through(clock: _Clock):
    steps = FrozenSteps(_loader(70, 64), None, clock.pause, batches=1, device=CPU)
    assert (steps.epochs, len(steps)) == (2, 2)
    assert _trained(steps, clock, each=0.01, slow=2) == [64, 6, 64, 6]
    assert steps.seconds == pytest.approx(0.7)


def test_steps_of_two_batches_stay_together(clock: _Clock):
    order = [[0, 1], [2], [3, 4], [5], [6, 7], [8]]
    raw = DataLoader(TensorDataset(torch.arange(9)), batch_sampler=order)
    kept = DataLoader(TensorDataset(torch.arange(9)), batch_sampler=order)
    steps = FrozenSteps(raw, kept, clock.pause, batches=2, device=CPU)
    assert _trained(steps, clock, each=0.01) == [2, 1] * 3 + [2, 1] * 3
    assert steps.seconds == pytest.approx(0.09)


@pytest.mark.parametrize("steps", [1, 4, 8, 9, 12, 15, 40])
def test_what_it_takes_is_known_before(steps: int, clock: _Clock):
    made = FrozenSteps(_loader(8 * steps, 8), _loader(8 * steps, 8), clock.pause, batches=1, device=CPU)
    assert epochs_of_frozen(steps) == pytest.approx(made.epochs * len(made) / steps)


def test_what_starts_once_in_an_epoch_is_not_multiplied(clock: _Clock):
    class Slow(DataLoader[Any]):
        def __iter__(self) -> Any:
            clock.seconds += 3.0
            return super().__iter__()

    steps = FrozenSteps(Slow(TensorDataset(torch.arange(240)), batch_size=8), None, clock.pause, batches=1, device=CPU)
    _trained(steps, clock, each=0.01)
    assert steps.seconds == pytest.approx(3.0 + 2.4)


def test_a_loop_that_was_left_is_not_paused_any_more(clock: _Clock):
    steps = FrozenSteps(_loader(64, 8), None, clock.pause, batches=1, device=CPU)
    batches = iter(steps)
    next(batches)
    assert clock.paused == 1
    steps.close()
    assert clock.paused == 0
    batches.close()  # pyright: ignore
    assert clock.paused == 0


def test_a_step_from_rows_comes_first_and_then_the_frozen_layers_run(tmp_path: Path):
    model, data = small.residual(), TensorDataset(small.pictures(24), torch.arange(24) % 4)
    with recycle(model, small.pictures(2), cut=small.CUT, store=tmp_path) as recycling:
        recycling.fill(data)
        kept = recycling.loader(data, batch_size=8)
        with recycling.paused():
            raw = recycling.loader(data, batch_size=8)
        steps = FrozenSteps(raw, kept, recycling.paused, batches=1, device=CPU)
        holds_rows = []
        for _ in range(steps.epochs):
            for images, _labels in steps:
                holds_rows.append(type(images) is not torch.Tensor)
                model(images)
        assert holds_rows == [True, *[False] * 5]
        assert not recycling.off
        assert steps.seconds > 0
