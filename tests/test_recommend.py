"""The recommendation: which level, and the sentence that says so, with its reason and how sure it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import small  # noqa: F401  (one thread)
from torchrecycle.sweep.estimates import estimate
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.recommend import ExpectedFull, recommend
from torchrecycle.sweep.results import EpochPoint, Estimate, LevelResult, Trial

UNTRAINED = 0.2
OBJECTS = 200
CLUSTERS = tuple(range(OBJECTS))


def _scores(mean: float, noise: float = 0.014, seed: int = 0) -> tuple[float, ...]:
    """Of each object; all of them have exactly this mean and this deviation."""
    drawn = np.random.default_rng(seed).normal(0, 1, OBJECTS)
    return tuple(((drawn - drawn.mean()) / drawn.std() * noise + mean).tolist())


def _level(
    level: str, mean: float, seconds: float, *, fill: float = 0.0, kept: int = 0, noise: float = 0.014, seed: int = 0
) -> LevelResult:
    scores = _scores(mean, noise, seed + sum(map(ord, level)))
    recipe = Recipe(epochs=1, suffix_rate=1e-3, head_rate=1e-3)
    curve = (EpochPoint(1, seconds, 1.0, mean),)
    trial = Trial(level, "final", 0, recipe, curve, {"accuracy": mean}, {"accuracy": scores})
    return LevelResult(
        level=level,
        cut=None if level == "full" else f"trunk.at{level}",
        share=0.5,
        trained_parameters=1,
        quality={"accuracy": estimate([scores], CLUSTERS)},
        trials=(trial,),
        search=(),
        fill_seconds=fill,
        frozen_epoch_seconds=None,
        bytes_kept=kept,
    )


def _recommend(*levels: LevelResult, **options: Any) -> Any:
    return recommend(levels, _scores(UNTRAINED), "accuracy", CLUSTERS, **options)


def test_half_is_recommended_where_it_keeps_what_training_gains():
    found = _recommend(
        _level("full", 0.600, 100.0),
        _level("50", 0.595, 30.0, fill=10.0, kept=73_500_000),
        _level("head", 0.355, 1.0, fill=10.0, kept=1_000),
    )
    assert found.level == "50"
    assert found.sentence == (
        "Recycle 50 % (cut `trunk.at50`): accuracy 0.595 ± 0.001 against 0.600 ± 0.001 for full training, "
        "2.5 times faster, 73.5 MB; head only would lose 0.24."
    )
    assert found.verdicts == {
        "full": "best, but takes longer",
        "50": "recommended: keeps 99 % of the gain",
        "head": "keeps 39 % of the gain",
    }


def test_head_only_is_recommended_where_it_is_as_good():
    found = _recommend(_level("full", 0.6, 100.0), _level("50", 0.6, 30.0), _level("head", 0.59, 1.0, fill=4.0))
    assert found.level == "head"
    assert found.sentence.startswith("Train the head only (cut `trunk.athead`): accuracy 0.590")
    assert "20.0 times faster, nothing kept; it keeps 98 % of the gain, and none was quicker." in found.sentence
    assert "would lose" not in found.sentence
    assert found.verdicts["50"] == "keeps 100 % of the gain, but takes longer"


def test_full_training_is_recommended_where_all_others_lose_too_much():
    found = _recommend(_level("full", 0.6, 100.0), _level("50", 0.5, 30.0), _level("head", 0.3, 1.0))
    assert found.level == "full"
    assert found.sentence == "Train the whole network: accuracy 0.600 ± 0.001; 50 % would lose 0.10."
    assert found.verdicts == {
        "full": "recommended: best",
        "50": "keeps 75 % of the gain",
        "head": "keeps 25 % of the gain",
    }


def test_a_level_that_is_slower_with_filling_is_not_recommended_for_its_quicker_epochs():
    found = _recommend(_level("full", 0.6, 100.0), _level("50", 0.6, 30.0, fill=80.0))
    assert found.level == "full"


def test_full_training_that_is_quicker_than_filling_says_what_would_have_been_enough():
    found = _recommend(
        _level("full", 0.600, 10.0), _level("50", 0.596, 8.0, fill=7.0), _level("75", 0.400, 4.0, fill=2.0)
    )
    assert found.level == "full"
    assert found.sentence == (
        "Train the whole network: accuracy 0.600 ± 0.001; 50 % keeps 99 % of the gain, but takes 1.5 times as long, "
        "filling included."
    )


def test_where_nothing_is_gained_the_pretrained_model_is_to_be_taken_as_it_is():
    found = _recommend(_level("full", 0.202, 100.0, noise=0.1), _level("head", 0.19, 1.0, noise=0.1))
    assert found.level is None
    assert found.sentence.startswith("Take the pretrained model as it is: accuracy 0.200 ± 0.001, and no level")
    assert "the best, full training, by +0.002 ± 0.00" in found.sentence
    assert set(found.verdicts.values()) == {"not better than the pretrained model as it is"}
    worse = _recommend(_level("full", 0.1, 100.0, noise=0.0001))  # also where that is sure
    assert worse.level is None
    assert "by -0.100" in worse.sentence


def test_ninety_per_cent_is_enough_only_where_the_rest_is_less_than_its_error():
    sure = _recommend(_level("full", 0.6, 100.0), _level("50", 0.57, 30.0))
    assert sure.level == "full"
    noisy = _recommend(_level("full", 0.6, 100.0, noise=0.4), _level("50", 0.57, 30.0, noise=0.4))
    assert noisy.level == "50"
    assert _recommend(_level("full", 0.6, 100.0, noise=0.4), _level("50", 0.55, 30.0, noise=0.4)).level == "full"


def test_a_level_that_is_quicker_and_better_than_one_that_is_good_enough_is_good_enough():
    """The one is within the noise of the best, and the other is not, though it loses less."""
    full = _level("full", 0.6, 100.0)
    noisy = _level("75", 0.562, 50.0, noise=0.6)
    sure = _level("50", 0.57, 30.0)
    assert recommend([full, noisy], _scores(UNTRAINED), "accuracy", CLUSTERS).level == "75"
    found = recommend([full, sure, noisy], _scores(UNTRAINED), "accuracy", CLUSTERS)
    assert found.level == "50"
    assert "lose -" not in found.sentence


def test_without_full_training_the_best_level_is_what_others_are_held_against():
    found = _recommend(_level("50", 0.6, 30.0, kept=5_000), _level("75", 0.599, 10.0, kept=2_500))
    assert found.level == "75"
    assert found.sentence == (
        "Recycle 75 % (cut `trunk.at75`): accuracy 0.599 ± 0.001 against 0.600 ± 0.001 for 50 %, 2.5 kB; it keeps "
        "100 % of the gain, and none was quicker."
    )
    assert "times faster" not in found.sentence
    alone = _recommend(_level("75", 0.6, 10.0, kept=900))
    assert alone.sentence == "Recycle 75 % (cut `trunk.at75`): accuracy 0.600 ± 0.001, 900 bytes."


def test_of_levels_that_are_equal_the_quicker_is_taken():
    same = _level("full", 0.6, 10.0)
    other = replace(_level("50", 0.6, 5.0), trials=(replace(same.trials[0], curve=(EpochPoint(1, 5.0, 1.0, 0.6),)),))
    assert _recommend(same, other).level == "50"
    assert _recommend(other, same).level == "50"


def test_the_sentence_has_two_decimals_where_more_would_be_noise():
    """As the issue has it: the level, its figure and its error, full training's, time, bytes, and the reason."""
    noise = 0.01 * (OBJECTS - 1) ** 0.5
    found = _recommend(
        _level("full", 0.32, 120.0, noise=noise),
        _level("50", 0.31, 40.0, fill=10.0, kept=1_200_000_000, noise=noise),
        _level("75", 0.28, 20.0, fill=10.0, noise=noise),
    )
    assert found.sentence == (
        "Recycle 50 % (cut `trunk.at50`): accuracy 0.31 ± 0.01 against 0.32 ± 0.01 for full training, 2.4 times "
        "faster, 1.2 GB; 75 % would lose 0.03."
    )


def test_of_full_training_that_was_not_run_it_is_said_what_is_expected():
    levels = (_level("50", 0.595, 30.0, fill=10.0, kept=73_500_000), _level("head", 0.355, 1.0, fill=10.0))
    expected = ExpectedFull(Estimate(0.62, 0.02), 100.0)
    found = _recommend(*levels, expected=expected)
    assert found.level == "50"
    assert found.sentence == (
        "Recycle 50 % (cut `trunk.at50`): accuracy 0.595 ± 0.001 against 0.620 ± 0.020 expected of full training, "
        "2.5 times faster, 73.5 MB; head only would lose 0.24."
    )
    unknown = _recommend(*levels, expected=replace(expected, seconds=None))
    assert "expected of full training, 73.5 MB;" in unknown.sentence
    measured = _recommend(_level("full", 0.6, 100.0), *levels, expected=expected)
    assert "against 0.600 ± 0.001 for full training" in measured.sentence, "what was measured needs no expectation"


def test_full_training_that_is_expected_to_be_quicker_and_no_worse_is_to_be_run():
    levels = (_level("50", 0.595, 30.0, fill=70.0), _level("head", 0.355, 1.0, fill=70.0))
    quicker = ExpectedFull(Estimate(0.62, 0.02), 40.0)
    found = _recommend(*levels, expected=quicker)
    assert found.sentence.endswith(
        ", 2.5 times slower, nothing kept; head only would lose 0.24; full training is expected to be quicker and no "
        "worse: run it."
    )
    for other in (Estimate(0.5, 0.02), 40.0), (Estimate(0.62, 0.02), 400.0), (Estimate(0.62, 0.02), None):
        assert "run it" not in _recommend(*levels, expected=ExpectedFull(*other)).sentence
    measured = _recommend(_level("full", 0.3, 10.0), *levels, expected=quicker)
    assert "run it" not in measured.sentence, "what was measured needs no expectation"


def _of_one_figure(level: str, *means: float) -> LevelResult:
    """Of a task whose evaluate gives a figure and nothing of each object."""
    whole = _level(level, means[0], 10.0)
    trials = tuple(
        replace(whole.trials[0], seed=seed, quality={"accuracy": mean}, scores={"accuracy": (mean,)})
        for seed, mean in enumerate(means)
    )
    return replace(whole, trials=trials, quality={"accuracy": estimate([[mean] for mean in means], [0])})


def test_where_nothing_is_known_of_each_object_it_is_said_that_the_error_is_not_known():
    one = recommend([_of_one_figure("full", 0.51), _of_one_figure("50", 0.5)], (0.5,), "accuracy", (0,))
    assert one.sentence.startswith("Train the whole network: accuracy 0.510; ")
    assert "How sure that is is not known: there is one seed, and evaluate gives no scores of each" in one.sentence
    none = recommend([_of_one_figure("full", 0.4)], (0.5,), "accuracy", (0,))
    assert none.sentence.startswith(
        "Take the pretrained model as it is: accuracy 0.500, and no level was better (the best, full training, by "
        "-0.100); "
    )
    assert "± 0.000" not in none.sentence
    assert "How sure that is is not known" in none.sentence
    several = recommend([_of_one_figure("full", 0.61, 0.6, 0.62)], (0.5,), "accuracy", (0,))
    assert several.sentence.startswith("Train the whole network: accuracy 0.610 ± 0.006")
    assert "The errors are of 3 seeds only: what other objects would give is not known" in several.sentence
    assert "not known" not in _recommend(_level("full", 0.6, 100.0)).sentence


def test_what_is_slower_than_full_training_is_said_to_be():
    slow = _level("full", 0.3, 10.0), _level("50", 0.6, 30.0, fill=10.0)
    assert ", 4.0 times slower, nothing kept; full training would lose 0.30." in _recommend(*slow).sentence
