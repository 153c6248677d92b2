"""Which level should one take? The quickest that keeps what training gains.

Full training lifts R-precision from 0.11 to 0.32, so its gain is 0.21; 50 % recycled comes to 0.31 and keeps 95 % of
it, head only to 0.22 and keeps 52 %. A level is good enough if it keeps 95 % of the best level's gain over the
pretrained model, or 90 % where the rest is less than the standard error of the difference. Of those that are, the one
that takes least time is recommended, filling included. If no level is above the pretrained model by two standard
errors, training is not recommended at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torchrecycle.sweep.estimates import difference, estimate
from torchrecycle.sweep.results import Estimate, LevelResult, Recommendation

__all__ = ["recommend"]

ENOUGH = 0.95
"""Share of the gain that a level must keep."""
ENOUGH_WITHIN_NOISE = 0.90
"""The same where what is lost is less than its standard error."""


@dataclass(frozen=True, slots=True)
class _Against:
    """One level against the best."""

    level: LevelResult
    lost: Estimate
    kept: float
    """Share of the best level's gain."""
    is_enough: bool

    @property
    def seconds(self) -> float:
        return self.level.total_seconds + self.level.fill_seconds


def recommend(
    levels: Sequence[LevelResult],
    untrained: Sequence[float],
    metric: str,
    clusters: Sequence[int],
    *,
    pretrained: str = "the pretrained model as it is",
) -> Recommendation:
    """Which level to take, and why.

    Args:
        levels: each with a final trial at least.
        untrained: what each object contributes with the pretrained model.
        metric: which of the figures counts.
        clusters: for each object, which ones belong together; see `torchrecycle.sweep.estimates`.
        pretrained: what one takes who does not train, in words.
    """
    scores = {level.level: [trial.scores[metric] for trial in level.trials] for level in levels}
    best = max(levels, key=lambda level: level.quality[metric].mean)
    gain = difference(scores[best.level], [untrained], clusters)
    against = [_compare(level, difference(scores[best.level], scores[level.level], clusters), gain) for level in levels]
    if gain.mean <= 2 * gain.error or gain.mean <= 0:
        return _nothing_gained(best, estimate([untrained], clusters), gain, metric, levels, pretrained)
    against = _also_what_is_better(against)
    chosen = min((each for each in against if each.is_enough), key=lambda each: each.seconds)
    return Recommendation(
        chosen.level.level,
        _sentence(chosen, against, best, metric),
        {each.level.level: _verdict(each, chosen, best) for each in against},
    )


def _compare(level: LevelResult, lost: Estimate, gain: Estimate) -> _Against:
    kept = 1 - lost.mean / gain.mean if gain.mean > 0 else 0.0
    return _Against(level, lost, kept, kept >= ENOUGH or (kept >= ENOUGH_WITHIN_NOISE and lost.mean <= lost.error))


def _also_what_is_better(against: Sequence[_Against]) -> list[_Against]:
    """A level that loses no more than one that is good enough is good enough, however sure its loss is."""
    most = max(each.lost.mean for each in against if each.is_enough)
    return [replace(each, is_enough=each.is_enough or each.lost.mean <= most) for each in against]


def _nothing_gained(
    best: LevelResult,
    untrained: Estimate,
    gain: Estimate,
    metric: str,
    levels: Sequence[LevelResult],
    pretrained: str,
) -> Recommendation:
    sentence = (
        f"Take {pretrained}: {metric} {untrained}, and no level was better by more than chance "
        "explains "
        f"(the best, {best.words}, by {gain.mean:+.3f} ± {gain.error:.3f}); more epochs, more data or another rate may "
        "change that."
    )
    return Recommendation(None, sentence, {level.level: f"not better than {pretrained}" for level in levels})


def _sentence(chosen: _Against, against: Sequence[_Against], best: LevelResult, metric: str) -> str:
    level = chosen.level
    if level.cut is None:
        what = "Train the whole network"
    elif level.level == "head":
        what = f"Train the head only (cut `{level.cut}`)"
    else:
        what = f"Recycle {level.level} % (cut `{level.cut}`)"
    parts = [f"{what}: {metric} {level.quality[metric]}"]
    full = next((each for each in against if each.level.cut is None), None)
    if full is not None and full is not chosen:
        parts[0] += f" against {full.level.quality[metric]} for full training"
        parts.append(_times(full.level.total_seconds / chosen.seconds))
    elif full is None and level is not best:
        parts[0] += f" against {best.quality[metric]} for {best.words}"
    if level.cut is not None:
        parts.append(f"{_bytes(level.bytes_kept)} kept")
    return ", ".join(parts) + _others(chosen, against) + "."


def _others(chosen: _Against, against: Sequence[_Against]) -> str:
    """What the next quicker level would lose: the reason not to go further."""
    quicker = [each for each in against if each.seconds < chosen.seconds and not each.is_enough]
    if not quicker:
        return ""
    nearest = min(quicker, key=lambda each: each.lost.mean)
    return f"; {nearest.level.words} would lose {_amount(nearest.lost.mean - chosen.lost.mean)}"


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 0.0095 else f"{value:.3f}"


def _times(factor: float) -> str:
    """
    >>> _times(2.43), _times(0.5)
    ('2.4 times faster, filling included', '2.0 times slower, filling included')
    """
    words = f"{factor:.1f} times faster" if factor >= 1 else f"{1 / factor:.1f} times slower"
    return f"{words}, filling included"


def _bytes(count: int) -> str:
    """
    >>> _bytes(1_234_000_000), _bytes(73_500_000), _bytes(900)
    ('1.2 GB', '73.5 MB', '900 bytes')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _verdict(each: _Against, chosen: _Against, best: LevelResult) -> str:
    words = "best" if each.level is best else f"keeps {max(0.0, each.kept):.0%} of the gain"
    if each is chosen:
        return f"recommended: {words}"
    if each.is_enough:
        return f"{words}, but takes longer"
    return words
