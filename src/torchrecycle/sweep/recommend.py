"""Which level should one take? The quickest that keeps what training gains, in one sentence with its reason.

    Recycle 50 % (cut `blocks.3`): R-precision 0.31 ± 0.01 against 0.32 ± 0.01 for full training, 2.4 times faster,
    1.2 GB; 75 % would lose 0.03.

Full training lifts R-precision from 0.11 to 0.32, so its gain is 0.21; 50 % recycled comes to 0.31 and keeps 95 % of
it, head only to 0.22 and keeps 52 %. A level is good enough if it keeps 95 % of the best level's gain over the
pretrained model, or 90 % where the rest is less than the standard error of the difference. Of those that are, the one
that takes least time is recommended, filling included. If no level is above the pretrained model by two standard
errors, training is not recommended at all.

Where full training was not run, the sentence says what is expected of it (`torchrecycle.sweep.expect`), as such; what
is good enough is then told from the levels that were run, since only those can be compared object by object. If full
training is expected to be quicker than the recommended level, and no worse, the sentence ends by saying to run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torchrecycle.sweep.estimates import difference, estimate
from torchrecycle.sweep.results import Estimate, LevelResult, Recommendation

__all__ = ["ExpectedFull", "recommend"]

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


@dataclass(frozen=True, slots=True)
class ExpectedFull:
    """What is expected of full training, where it was not run."""

    quality: Estimate
    """Of the metric that counts."""
    seconds: float | None
    """Wall seconds of all its epochs; None if nothing is known of them."""


def recommend(
    levels: Sequence[LevelResult],
    untrained: Sequence[float],
    metric: str,
    clusters: Sequence[int],
    *,
    pretrained: str = "the pretrained model as it is",
    expected: ExpectedFull | None = None,
) -> Recommendation:
    """Which level to take, and why.

    Args:
        levels: each with a final trial at least.
        untrained: what each object contributes with the pretrained model.
        metric: which of the figures counts.
        clusters: for each object, which ones belong together; see `torchrecycle.sweep.estimates`.
        pretrained: what one takes who does not train, in words.
        expected: of full training; not looked at if it was run.
    """
    scores = {level.level: [trial.scores[metric] for trial in level.trials] for level in levels}
    best = max(levels, key=lambda level: level.quality[metric].mean)
    gain = difference(scores[best.level], [untrained], clusters)
    against = [_compare(level, difference(scores[best.level], scores[level.level], clusters), gain) for level in levels]
    unsure = _unsure(levels, untrained)
    if gain.mean <= 2 * gain.error or gain.mean <= 0:
        return _nothing_gained(best, estimate([untrained], clusters), gain, metric, levels, pretrained, unsure)
    against = _also_what_is_better(against)
    chosen = min((each for each in against if each.is_enough), key=lambda each: each.seconds)
    return Recommendation(
        chosen.level.level,
        _sentence(chosen, against, best, metric, expected) + unsure,
        {each.level.level: _verdict(each, chosen, best) for each in against},
    )


def _unsure(levels: Sequence[LevelResult], untrained: Sequence[float]) -> str:
    """What is to be said where it is not known what each object contributes: then only seeds tell of chance."""
    if len(untrained) > 1:
        return ""
    seeds = min(len(level.trials) for level in levels)
    if seeds > 1:
        return (
            f" The errors are of {seeds} seeds only: what other objects would give is not known, since evaluate gives "
            "no scores of each object."
        )
    return (
        " How sure that is is not known: there is one seed, and evaluate gives no scores of each object. Give these, "
        "or three seeds, before you rely on a difference."
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
    unsure: str,
) -> Recommendation:
    chance = f" ± {gain.error:.3f}" if gain.error > 0 else ""
    sentence = (
        f"Take {pretrained}: {metric} {_figure(untrained, 3)}, and no level was better"
        f"{' by more than chance explains' if chance else ''} (the best, {best.words}, by {gain.mean:+.3f}{chance}); "
        "more epochs, more data or another rate may change that."
    )
    return Recommendation(None, sentence + unsure, {level.level: f"not better than {pretrained}" for level in levels})


def _sentence(
    chosen: _Against, against: Sequence[_Against], best: LevelResult, metric: str, expected: ExpectedFull | None
) -> str:
    level, reason = chosen.level, _reason(chosen, against)
    others = _beside(chosen, against, best, metric, expected)
    digits = _digits([level.quality[metric], *([] if others is None else [others.quality])])
    said = f"{_what(level)}: {metric} {_figure(level.quality[metric], digits)}"
    if others is not None:
        said += f" against {_figure(others.quality, digits)} {others.whose}"
        said += "" if others.seconds is None else f", {_times(others.seconds / chosen.seconds)}"
    if level.cut is not None:
        said += f", {_bytes(level.bytes_kept)}" if level.bytes_kept else ", nothing kept"
    said += f"; {reason}" if reason else ""
    if others is not None and _is_better_expected(chosen, metric, expected, others):
        said += "; full training is expected to be quicker and no worse: run it"
    return f"{said}."


def _is_better_expected(chosen: _Against, metric: str, expected: ExpectedFull | None, others: _Beside) -> bool:
    """Whether what is expected of full training, where it was not run, is against what was found to be the quickest."""
    return (
        expected is not None
        and others.quality is expected.quality
        and expected.seconds is not None
        and expected.seconds < chosen.seconds
        and expected.quality.mean >= chosen.level.quality[metric].mean
    )


def _what(level: LevelResult) -> str:
    if level.cut is None:
        return "Train the whole network"
    what = "Train the head only" if level.level == "head" else f"Recycle {_short(level)}"
    return f"{what} (cut `{level.cut}`)"


def _short(level: LevelResult) -> str:
    return level.words.removesuffix(" recycled")


@dataclass(frozen=True, slots=True)
class _Beside:
    """What a recommended level is held against."""

    quality: Estimate
    whose: str
    seconds: float | None
    """None where it would say nothing."""


def _beside(
    chosen: _Against, against: Sequence[_Against], best: LevelResult, metric: str, expected: ExpectedFull | None
) -> _Beside | None:
    """Full training; what is expected of it, if it was not run; the best level, if nothing is expected."""
    full = next((each.level for each in against if each.level.cut is None), None)
    if chosen.level is full:
        return None
    if full is not None:
        return _Beside(full.quality[metric], "for full training", full.total_seconds)
    if expected is not None:
        return _Beside(expected.quality, "expected of full training", expected.seconds)
    return None if best is chosen.level else _Beside(best.quality[metric], f"for {_short(best)}", None)


def _reason(chosen: _Against, against: Sequence[_Against]) -> str:
    """What the next quicker level would lose: the reason not to go further. If none is quicker, what is kept. Of full
    training, why nothing is recycled though something may be."""
    slower = [each for each in against if each is not chosen and each.is_enough]
    if chosen.level.cut is None and slower:
        nearest = min(slower, key=lambda each: each.seconds)
        times = f"{nearest.seconds / chosen.seconds:.1f} times as long"
        return (
            f"{_short(nearest.level)} keeps {_per_cent(nearest.kept)} of the gain, but takes {times}, filling included"
        )
    quicker = [each for each in against if each.seconds < chosen.seconds and not each.is_enough]
    if quicker:
        nearest = min(quicker, key=lambda each: each.lost.mean)
        return f"{_short(nearest.level)} would lose {_amount(nearest.lost.mean - chosen.lost.mean)}"
    others = [each for each in against if each is not chosen]
    if not others:
        return ""
    if chosen.lost.mean <= 0:
        return "no other level was better, and none was quicker"
    return f"it keeps {_per_cent(chosen.kept)} of the gain, and none was quicker"


def _per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _digits(figures: Sequence[Estimate]) -> int:
    """Two decimals, where all errors are a hundredth at least; else three. Of an error of 0 nothing is known."""
    return 2 if all(figure.error >= 0.0095 for figure in figures) else 3


def _figure(figure: Estimate, digits: int) -> str:
    """
    >>> _figure(Estimate(0.3124, 0.0113), 2), _figure(Estimate(0.3, 0.0), 3)
    ('0.31 ± 0.01', '0.300')
    """
    return f"{figure.mean:.{digits}f} ± {figure.error:.{digits}f}" if figure.error > 0 else f"{figure.mean:.{digits}f}"


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 0.0095 else f"{value:.3f}"


def _times(factor: float) -> str:
    """
    >>> _times(2.43), _times(0.5)
    ('2.4 times faster', '2.0 times slower')
    """
    return f"{factor:.1f} times faster" if factor >= 1 else f"{1 / factor:.1f} times slower"


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
    words = "best" if each.level is best else f"keeps {_per_cent(max(0.0, each.kept))} of the gain"
    if each is chosen:
        return f"recommended: {words}"
    if each.is_enough:
        return f"{words}, but takes longer"
    return words
