"""What is expected of full training, against what came where it was run: the published figures, and real ones."""

from __future__ import annotations

import math

import pytest
import torch

from torchrecycle.sweep.expect import GAINS, expect_quality, expect_seconds, gain_over
from torchrecycle.sweep.results import Estimate

RUN = {
    "cars, R-precision, ours": (0.1071, {1.0: 0.1703, 0.75: 0.2414, 0.5: 0.2851, 0.0: 0.2911}),
    "questions, reciprocal rank, ours": (0.7744, {1.0: 0.7952, 0.75: 0.8048, 0.5: 0.8119, 0.0: 0.8127}),
    "cars, published shares of the gain": (0.0, {1.0: 0.52, 0.75: 0.81, 0.5: 0.95, 0.0: 1.0}),
    "questions, published shares of the gain": (0.0, {1.0: 0.25, 0.75: 0.42, 0.5: 0.92, 0.0: 1.0}),
}
"""The pretrained model and each level; ours are of docs/experiments.md."""


def _levels(found: dict[float, float], *shares: float, error: float = 0.0) -> list[tuple[float, Estimate]]:
    return [(share, Estimate(found[share], error)) for share in shares]


@pytest.mark.parametrize("name", RUN)
def test_from_half_recycled_full_training_is_told_within_a_tenth_of_its_gain(name: str):
    before, found = RUN[name]
    expected = expect_quality(_levels(found, 1.0, 0.75, 0.5), Estimate(before, 0.0))
    assert expected is not None
    gain = found[0.0] - before
    assert abs(expected.mean - found[0.0]) < 0.1 * gain
    assert abs(expected.mean - found[0.0]) < 2 * expected.error


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.75)])
def test_from_less_little_is_told_and_the_error_says_so(name: str, shares: tuple[float, ...]):
    before, found = RUN[name]
    expected = expect_quality(_levels(found, *shares), Estimate(before, 0.0))
    assert expected is not None
    half = expect_quality(_levels(found, 0.5), Estimate(before, 0.0))
    assert half is not None
    assert expected.error > 3 * half.error
    assert abs(expected.mean - found[0.0]) < 2 * expected.error


def test_the_factors_are_those_of_the_experiments():
    for share in (0.5, 0.75, 1.0):
        factors = torch.tensor([(found[0.0] - before) / (found[share] - before) for before, found in RUN.values()])
        known = next(each for each in GAINS if each.share == share)
        assert known.factor == pytest.approx(float(factors.mean()), abs=0.006)
        assert known.spread == pytest.approx(float(factors.std()), abs=0.006)


def test_the_error_is_that_of_drawn_gains_and_shares():
    """The formula against 200,000 draws."""
    expected = expect_quality([(0.5, Estimate(0.31, 0.01))], Estimate(0.11, 0.01))
    assert expected is not None
    generator = torch.Generator().manual_seed(0)
    gains, factors = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn = 0.11 + (0.20 + 0.01 * gains) * (1.05 + 0.03 * factors)
    assert expected.mean == pytest.approx(float(drawn.mean()), abs=0.001)
    assert expected.error == pytest.approx(float(drawn.std()), rel=0.02)
    assert f"{expected.mean:.2f} ± {expected.error:.2f}" == "0.32 ± 0.01"


def test_a_level_without_recycling_is_what_is_expected():
    assert expect_quality([(0.0, Estimate(0.4, 0.02)), (1.0, Estimate(0.1, 0.0))], Estimate(0.0, 0.0)) == Estimate(
        0.4, 0.02
    )
    assert gain_over(0.0).factor == 1.0
    factors = [gain_over(share / 20).factor for share in range(21)]
    assert factors == sorted(factors)


def test_without_levels_nothing_is_expected_and_without_gain_none():
    assert expect_quality([], Estimate(0.1, 0.0)) is None
    assert expect_quality([(0.5, Estimate(0.3, 0.02))], Estimate(0.3, 0.02)) is None
    assert expect_quality([(1.0, Estimate(0.75, 0.05))], Estimate(1.0, 0.0)) is None  # and not 2.67 times the loss


def test_a_share_stays_below_one_and_what_is_no_share_does_not():
    near = expect_quality([(0.5, Estimate(0.99, 0.001))], Estimate(0.2, 0.0))
    assert near is not None
    assert near.mean == 1.0
    negative = expect_quality([(0.5, Estimate(-0.2, 0.01))], Estimate(-3.0, 0.0))
    assert negative is not None
    assert negative.mean == pytest.approx(-3.0 + 2.8 * 1.05)
    assert math.isfinite(negative.error)


def test_seconds_come_from_measured_epochs_where_there_are_some():
    assert expect_seconds(4, full_epoch=62.0, frozen_epochs=[(0.5, 1.0)]) == 248.0
    assert expect_seconds(3, frozen_epochs=[(1.0, 10.0), (0.5, 20.0)]) == pytest.approx(90.0)
    assert expect_seconds(3) is None


@pytest.mark.slow
def test_seconds_of_full_training_are_told_from_frozen_ones_within_a_third():
    """A residual network whose halves cost the same, on a machine that others may use: the best of five."""
    import time

    from torch import nn

    def epoch(frozen: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(8)))
        for block in list(model)[:frozen]:
            block.requires_grad_(False)
        batch, took = torch.randn(32, 32, 24, 24), []
        for _ in range(5):
            began = time.perf_counter()
            model(batch).square().mean().backward()
            took.append(time.perf_counter() - began)
        return min(took)

    full, half = epoch(0), epoch(4)
    assert expect_seconds(1, frozen_epochs=[(0.5, half)]) == pytest.approx(full, rel=0.33)
