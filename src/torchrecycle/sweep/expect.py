"""What is full training expected to give, where it was not run? Told from the levels that were.

Half of the blocks recycled lifted R-precision from 0.11 to 0.31 +/- 0.01. Wherever both were measured, full training
gained 1.05 +/- 0.03 times as much as a level of 50 %, so that it is expected at 0.11 + 1.05 * 0.20 = 0.32 +/- 0.01. Of
head only it gained anything from 1.8 to 4 times as much: little can be said from that, and the error says so.

A curve through the levels' qualities would be the obvious way, and is worse: a line through 75 and 50 % is off by up to
90 % of the gain, since some tasks gain most before 75 % and others after it. What a level of one share keeps is
much the same on all, once no more than half is recycled. So the level nearest to full training speaks alone; the
others, whose factor spreads nineteen times as much and more, would add nothing.

Seconds come from measured steps where there are some (`torchrecycle.sweep.predict`); else from epochs in which the
prefix was computed without gradient: backward takes twice as long as forward, so that an epoch with a share s of the
network frozen is 1 - 2/3 s of a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torchrecycle.sweep.results import Estimate

__all__ = ["GAINS", "Gain", "expect_quality", "expect_seconds", "gain_over"]


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times as much as a level full training gains over the pretrained model."""

    share: float
    """Of the blocks that are recycled at that level, 0 to 1."""
    factor: float
    """Mean over the experiments in which both were run."""
    spread: float
    """Standard deviation between them: what the next one may be off by."""


GAINS = (Gain(0.0, 1.0, 0.0), Gain(0.5, 1.05, 0.03), Gain(0.75, 1.56, 0.55), Gain(1.0, 2.67, 1.01))
"""From four experiments, cars and questions twice each. Of full training's gain, 50 %, 75 % and head only kept 95, 81,
52 % on cars and 92, 42, 25 % on questions in what is published of Quaterion's layer recycling; 97, 73, 34 % and 98, 80,
54 % in ours (docs/experiments.md)."""


def gain_over(share: float) -> Gain:
    """What full training is expected to gain over a level of any share, on straight lines between the known ones.

    Args:
        share: of the blocks that are recycled, 0 to 1.

    >>> gain_over(0.5).factor, round(gain_over(0.25).factor, 3), round(gain_over(0.25).spread, 3)
    (1.05, 1.025, 0.015)
    """
    for before, after in pairwise(GAINS):
        if share <= after.share:
            part = (share - before.share) / (after.share - before.share)
            factor = before.factor + part * (after.factor - before.factor)
            return Gain(share, factor, before.spread + part * (after.spread - before.spread))
    return GAINS[-1]


def expect_quality(levels: Sequence[tuple[float, Estimate]], untrained: Estimate) -> Estimate | None:
    """The quality of full training, from the level that recycles least.

    With a gain g of that level, of standard error e, and a factor f of spread d, full training gains g f, with a
    standard error of ``sqrt((e f)^2 + (g d)^2)``: first order in both, which are independent.

    Args:
        levels: of each that was run, the share of the blocks that is recycled, and its quality.
        untrained: the pretrained model's, of the same metric.

    Returns:
        None if no level was run, or that level gained nothing: how much full training would gain is then not known,
        since a factor of nothing is nothing, and of a loss a greater loss. A metric that lies between 0 and 1 stays
        there.
    """
    if not levels:
        return None
    share, quality = min(levels, key=lambda each: each[0])
    over = gain_over(share)
    gain = quality.mean - untrained.mean
    if gain <= 0:
        return None
    mean = untrained.mean + gain * over.factor
    error = math.hypot(quality.error * over.factor, gain * over.spread)
    known = [untrained.mean, *(each.mean for _, each in levels)]
    if min(known) >= 0 and max(known) <= 1:
        mean = min(max(mean, 0.0), 1.0)
    return Estimate(mean, error)


BACKWARD = 2 / 3
"""Share of a training step that is backward, where every layer is trained: with respect to inputs and to weights, each
about as much as forward."""


def expect_seconds(
    epochs: int, *, full_epoch: float | None = None, frozen_epochs: Sequence[tuple[float, float]] = ()
) -> float | None:
    """Wall seconds of full training.

    Args:
        epochs: of full training's recipe.
        full_epoch: measured seconds of an epoch of it, if there are some; nothing else is then looked at.
        frozen_epochs: of each level that was run, the share of the blocks that is frozen, and the seconds of an epoch
            with them computed again.

    Returns:
        None if nothing was measured.

    >>> expect_seconds(4, full_epoch=62.0), expect_seconds(4, frozen_epochs=[(0.75, 31.0), (1.0, 20.0)])
    (248.0, 248.0)
    """
    if full_epoch is not None:
        return epochs * full_epoch
    if not frozen_epochs:
        return None
    share, seconds = min(frozen_epochs)
    return epochs * seconds / (1 - BACKWARD * share)
