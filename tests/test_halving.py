"""Successive halving: the order of rates, who is stopped, who is chosen; once with a real model on real digits."""

from __future__ import annotations

import builtins
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import small  # noqa: F401  (one thread)
from torchrecycle.sweep import halving
from torchrecycle.sweep.halving import FACTORS, Halving, HalvingError, Tried, rungs, search_epochs

Quality = Callable[[float, int], float]
"""From a factor and an epoch to what it has come to."""


def _run(halving: Halving, quality: Quality) -> list[Tried]:
    while attempt := halving.ask():
        for epoch in range(1, halving.epochs + 1):
            if not attempt.report(epoch, quality(attempt.factor, epoch)):
                break
        halving.tell(attempt)
    return halving.tried


def _peak(at: float) -> Quality:
    """Better each epoch; best at a factor, worse the further from it."""
    return lambda factor, epoch: 0.5 + 0.01 * epoch - 0.1 * abs(math.log(factor / at))


def test_the_middle_comes_first_and_the_others_in_steps_of_three():
    tried = _run(Halving(epochs=3), _peak(1.0))
    assert [each.factor for each in tried] == [1.0, 3.0, 1 / 3, 9.0, 1 / 9] == list(FACTORS)
    assert [each.factor for each in _run(Halving(epochs=3, rates=2), _peak(1.0))] == [1.0, 3.0]


def test_who_is_worse_at_the_first_rung_ends_there_and_who_is_better_runs_through():
    halving = Halving(epochs=9)
    tried = _run(halving, _peak(3.0))
    assert [(each.epochs, each.state) for each in tried] == [
        (9, "finished"),  # the first has nobody to be compared with
        (9, "finished"),
        (1, "pruned"),
        (1, "pruned"),
        (1, "pruned"),
    ]
    assert sum(each.epochs for each in tried) == 21, "of 45 without halving: the figures of the module's docstring"
    assert halving.best() == tried[1]


def test_who_falls_behind_at_a_later_rung_ends_there():
    curves = {1.0: [0.3, 0.4, 0.6, 0.7, 0.8], 3.0: [0.4, 0.4, 0.5, 0.9, 0.9]}
    halving = Halving(epochs=5, rates=2)
    tried = _run(halving, lambda factor, epoch: curves[factor][epoch - 1])
    assert (tried[1].epochs, tried[1].state) == (3, "pruned")
    assert halving.best() == Tried(1.0, 5, 0.8, "finished")


def test_between_rungs_nothing_is_decided():
    """At epoch 2 the second rate is far behind; it is judged at epochs 1 and 3 only."""
    curves = {1.0: [0.3, 0.9, 0.4, 0.5], 3.0: [0.4, 0.1, 0.5, 0.6]}
    tried = _run(halving := Halving(epochs=4, rates=2), lambda factor, epoch: curves[factor][epoch - 1])
    assert [each.state for each in tried] == ["finished", "finished"]
    assert halving.best() == tried[1]
    assert rungs(4) == (1, 3, 4)


@pytest.mark.parametrize("first", [1.0, 3.0, 1 / 9])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_rate_that_diverges_ends_at_once_and_is_never_chosen(first: float, broken: float):
    """Also the first, which has nobody to be compared with, and also after it was the best of all."""

    def quality(factor: float, epoch: int) -> float:
        if factor == first:
            return 0.99 if epoch == 1 else broken
        return _peak(1 / 3)(factor, epoch)

    halving = Halving(epochs=5)
    tried = {each.factor: each for each in _run(halving, quality)}
    assert tried[first] == Tried(first, 2, None, "diverged")
    best = halving.best()
    assert best is not None
    assert best.factor != first
    assert best.quality is not None
    assert math.isfinite(best.quality)


def test_if_all_diverge_none_is_chosen():
    halving = Halving(epochs=5)
    tried = _run(halving, lambda factor, epoch: math.nan)
    assert [each.epochs for each in tried] == [1] * 5
    assert halving.best() is None
    assert not halving.is_outermost


def test_the_same_qualities_give_the_same_rates_and_equals_the_nearest_to_the_recipe():
    noise = torch.rand(5, 12, generator=torch.Generator().manual_seed(3)).tolist()
    runs = []
    for _ in range(3):
        torch.rand(7)  # whatever else has been drawn
        halving = Halving(epochs=12)
        runs.append((_run(halving, lambda factor, epoch: noise[FACTORS.index(factor)][epoch - 1]), halving.best()))
    assert runs[0] == runs[1] == runs[2]
    level = Halving(epochs=3)
    assert all(each.state == "finished" for each in _run(level, lambda factor, epoch: 0.5)), "an equal goes on"
    assert level.best() == Tried(1.0, 3, 0.5, "finished")


def test_what_was_stopped_for_time_is_chosen_only_if_nothing_finished():
    halving = Halving(epochs=9, rates=2)
    attempt = halving.ask()
    assert attempt is not None
    assert attempt.report(1, 0.2)
    assert attempt.report(2, 0.3)
    assert halving.tell(attempt, stopped=True) == Tried(1.0, 2, 0.3, "stopped")
    assert halving.best() == Tried(1.0, 2, 0.3, "stopped")
    second = halving.ask()
    assert second is not None
    for epoch in range(1, 10):
        second.report(epoch, 0.25)
    halving.tell(second)
    assert halving.best() == Tried(3.0, 9, 0.25, "finished")
    assert halving.ask() is None


def test_a_training_that_tells_of_nothing_but_its_end_is_never_pruned():
    halving = Halving(epochs=5)
    while attempt := halving.ask():
        attempt.report(5, _peak(3.0)(attempt.factor, 5))
        halving.tell(attempt)
    assert [each.state for each in halving.tried] == ["finished"] * 5
    best = halving.best()
    assert best is not None
    assert best.factor == 3.0


def test_the_outermost_rate_is_told_as_such():
    halving = Halving(epochs=3)
    _run(halving, _peak(27.0))
    assert halving.is_outermost
    inner = Halving(epochs=3)
    _run(inner, _peak(3.0))
    assert not inner.is_outermost


def test_misuse_is_refused_in_words():
    halving = Halving(epochs=3, rates=2)
    attempt = halving.ask()
    assert attempt is not None
    with pytest.raises(HalvingError, match=r"tell\(attempt\) what became"):
        halving.ask()
    attempt.report(2, 0.5)
    with pytest.raises(HalvingError, match="epoch 2 was told after epoch 2"):
        attempt.report(2, 0.5)
    halving.tell(attempt)
    with pytest.raises(HalvingError, match="told already"):
        halving.tell(attempt)
    worse = halving.ask()
    assert worse is not None
    assert not worse.report(1, 0.1) or not worse.report(3, 0.1)
    with pytest.raises(HalvingError, match="that was pruned at epoch"):
        worse.report(9, 0.9)
    for wrong in ({"epochs": 3, "rates": 6}, {"epochs": 3, "rates": 0}, {"epochs": 0}):
        with pytest.raises(HalvingError, match="were asked for"):
            Halving(**wrong)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(halving, "find_spec", lambda name: None)
    with pytest.raises(HalvingError, match=r'pip install "torchrecycle\[sweep\]".*search=False'):
        Halving(epochs=3)


def test_optuna_is_loaded_when_a_search_begins_and_stays_as_loud_as_it_was(capfd: pytest.CaptureFixture[str]):
    import optuna

    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(Halving(epochs=3), _peak(1.0))
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("epochs", "searched"), [(1, 1), (2, 2), (3, 3), (5, 3), (9, 3), (20, 7), (30, 10)])
def test_a_search_takes_a_third_of_the_epochs_or_three(epochs: int, searched: int):
    assert search_epochs(epochs, "50") == searched
    assert search_epochs(epochs, "head") == epochs  # they cost next to nothing


# -- a real model ------------------------------------------------------------------------------------------------------


class _Digits:
    """Handwritten digits, 8 pixels wide, and a network of 1,500 numbers."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels)
        self.train, self.judged = slice(0, 300), slice(300, 600)

    def fit(self, rate: float, epochs: int, ended: Callable[[int, float], bool]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for epoch in range(1, epochs + 1):
            for batch in torch.arange(300).split(25):
                loss = F.cross_entropy(model(self.images[batch]), self.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                said = model(self.images[self.judged])
            right = float((said.argmax(1) == self.labels[self.judged]).double().mean())
            if not ended(epoch, right if said.isfinite().all() else math.nan):
                return

    def search(self, rate: float, epochs: int) -> Halving:
        halving = Halving(epochs=epochs)
        while attempt := halving.ask():
            self.fit(rate * attempt.factor, epochs, attempt.report)
            halving.tell(attempt)
        return halving


def test_on_real_digits_halving_finds_what_the_whole_grid_does_in_fewer_epochs():
    digits, epochs = _Digits(), 9
    whole = {}
    for factor in FACTORS:
        digits.fit(0.05 * factor, epochs, lambda epoch, quality, at=factor: whole.update({at: quality}) or True)
    found = digits.search(0.05, epochs)
    best = found.best()
    assert best is not None
    assert best.quality == pytest.approx(max(whole.values()), abs=0.02)
    assert max(whole.values()) > 0.7
    assert sum(each.epochs for each in found.tried) < 0.7 * epochs * len(FACTORS)
    assert found.tried == digits.search(0.05, epochs).tried, "to the bit"


def test_on_real_digits_a_rate_that_diverges_is_left():
    digits = _Digits()
    halving = Halving(epochs=4)
    while attempt := halving.ask():
        digits.fit(1e9 * attempt.factor**12, 4, attempt.report)  # from 3e20 to 3e-3
        halving.tell(attempt)
    states = {each.factor: each.state for each in halving.tried}
    assert states[1.0] == states[3.0] == states[9.0] == "diverged"
    best = halving.best()
    assert best is not None
    assert best.factor < 1


def test_the_module_does_not_load_optuna(monkeypatch: pytest.MonkeyPatch):
    """Whoever never looks for a rate needs none."""
    real = builtins.__import__

    def refuse(name: str, *rest, **named):
        assert name.split(".")[0] != "optuna"
        return real(name, *rest, **named)

    spec = importlib.util.spec_from_file_location("halving_once_more", halving.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    monkeypatch.setattr(builtins, "__import__", refuse)
    spec.loader.exec_module(again)
    assert again.rungs(9) == (1, 3, 9)
