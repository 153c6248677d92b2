"""Results of sweeps as they come out, written by hand, for the tests of the report.

The figures of `images` and `pairs` are those of the demo of 2026-11-25 on two cores; the others are what may also
happen: a hostile text, one seed, no full training, no curve, no quality along the way, no samples, random weights.
"""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import (
    EpochPoint,
    Estimate,
    Found,
    LevelResult,
    Prediction,
    Ran,
    Recommendation,
    Sample,
    SweepResult,
    Trial,
)

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too' </style></title> [bold]=1+1"
LONG = (
    "How thick must the layer of mortar under a natural stone floor be, if the floor is heated and the stones are of "
    "unequal thickness?\nAt least thirty millimetres under the thinnest stone, and not more than seventy under the "
    "thickest; Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichenschlaufenhalterungsschraube included."
)


def ran(**changes: object) -> Ran:
    """The demo's images."""
    one = Ran(
        command="torchrecycle sweep images pictures/ --model timm/efficientnet_lite0 --checkpoint lite0.pth --levels "
        "full,50,75,head --seeds 2 --size 128 --out report",
        model="timm/efficientnet_lite0",
        weights="lite0.pth, all 238 tensors of the trunk",
        random_weights=False,
        data="pictures/: 1,794 pictures of 317 classes",
        splits={"train": 720, "validation": 180, "test": 894},
        left_out=("3 classes with one picture", "broken.jpg: cannot be decoded"),
        loss="softmax over cosines to one learned vector per training class",
        settings={"image size": "128 px", "precision": "float32", "split seed": "0"},
        licences=(
            "Pictures: OpenMoji 17.0.0, the open-source emoji and icon project, CC BY-SA 4.0 (https://openmoji.org).",
            "Weights: EfficientNet-Lite0, trained on ImageNet, Apache-2.0.",
        ),
        machine="AMD EPYC, 2 threads",
        versions={"python": "3.11.7", "torch": "2.14.1+cpu", "torchrecycle": "0.1.0", "timm": "1.0.15"},
        date="2026-11-25T18:05:12+00:00",
        seconds=263.11656289500024,
    )
    return replace(one, **changes)  # pyright: ignore[reportArgumentType]


def curve(epochs: int, epoch_seconds: float, start: float, end: float, seed: int) -> tuple[EpochPoint, ...]:
    """Quality nears its end, loss falls, both a little different from seed to seed."""
    points = []
    for epoch in range(1, epochs + 1):
        done = 1 - math.exp(-3.2 * epoch / epochs)
        wobble = 0.006 * math.sin(3.7 * epoch + 2 * seed)
        quality = start + (end - start) * done + wobble
        points.append(EpochPoint(epoch, epoch * epoch_seconds * (1 + 0.03 * seed), 2.4 - 1.9 * done + wobble, quality))
    return tuple(points)


def trial(
    level: str,
    seed: int,
    recipe: Recipe,
    quality: dict[str, float],
    epoch_seconds: float,
    start: float,
    found: tuple[Found, ...] = (),
) -> Trial:
    end = next(iter(quality.values())) - 0.01
    return Trial(
        level=level,
        purpose="final",
        seed=seed,
        recipe=recipe,
        curve=curve(recipe.epochs, epoch_seconds, start, end, seed),
        quality=quality,
        scores={metric: (1.0, 0.0, value) for metric, value in quality.items()},
        found=found,
    )


def search(level: str, recipe: Recipe, quality: dict[str, float], epoch_seconds: float) -> tuple[Trial, ...]:
    """Three rates; the middle one is the best."""
    tried = []
    for factor, loss in ((0.3, 0.02), (1.0, 0.0), (3.0, 0.05)):
        rates = replace(recipe, epochs=1, suffix_rate=recipe.suffix_rate * factor, head_rate=recipe.head_rate * factor)
        scored = {metric: value - 0.04 - loss for metric, value in quality.items()}
        one = trial(level, 0, rates, scored, epoch_seconds, 0.5)
        tried.append(replace(one, purpose="search", scores={}))
    return tuple(tried)


def level(
    name: str,
    cut: str | None,
    share: float,
    parameters: int,
    recipe: Recipe,
    quality: dict[str, tuple[float, float]],
    seconds: tuple[float, float, float | None],
    kept: int,
    start: float,
    found: tuple[Found, ...] = (),
    seeds: tuple[int, ...] = (0, 1),
) -> LevelResult:
    """`seconds` are those of filling, of an epoch, and of an epoch with a frozen prefix."""
    fill, epoch, frozen = seconds
    means = {metric: mean for metric, (mean, _) in quality.items()}
    off = {seed: 0.002 * (2 * at - 1) if len(seeds) > 1 else 0.0 for at, seed in enumerate(seeds)}
    return LevelResult(
        level=name,
        cut=cut,
        share=share,
        trained_parameters=parameters,
        quality={metric: Estimate(*both) for metric, both in quality.items()},
        trials=tuple(
            trial(name, seed, recipe, {m: v + off[seed] for m, v in means.items()}, epoch, start, found)
            for seed in seeds
        ),
        search=search(name, recipe, means, epoch),
        fill_seconds=fill,
        frozen_epoch_seconds=frozen,
        bytes_kept=kept,
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture(hue: float, shape: int, size: tuple[int, int] = (96, 96)) -> str:
    """A coloured shape on white, as a JPEG in base64."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, 0.85))
    pen = ImageDraw.Draw(image)
    width, height = size
    box = (width * 0.15, height * 0.15, width * 0.85, height * 0.85)
    if shape % 3 == 0:
        pen.ellipse(box, fill=(red, green, blue), outline="black", width=3)
    elif shape % 3 == 1:
        pen.rectangle(box, fill=(red, green, blue), outline="black", width=3)
    else:
        pen.polygon([(width / 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=(red, green, blue), outline="black")
    held = io.BytesIO()
    image.save(held, format="JPEG", quality=80)
    return base64.b64encode(held.getvalue()).decode("ascii")


CLASSES = ("round", "square", "pointed: a triangle with a rather long name")


def picture_samples() -> dict[int, Sample]:
    sizes = ((96, 96), (96, 64), (60, 96))
    return {
        at: Sample(CLASSES[at % 3], f"{CLASSES[at % 3].split(':')[0]}_{at:03}.jpg", picture(at / 40, at, sizes[at % 3]))
        for at in range(36)
    }


def found_pictures(wrong: int, note: bool = True) -> tuple[Found, ...]:
    """Six queries; of the five found for each, some are wrong."""
    found = []
    for query in range(6):
        own = [at for at in range(query + 3, 36, 3)]
        other = [at for at in range(query + 4, 36, 3)]
        missed = min(5, max(0, wrong - query % 3))
        right = tuple(at >= missed for at in range(5))
        nearest = tuple((own if ok else other)[at] for at, ok in enumerate(right))
        found.append(Found(query, nearest, right, f"says {CLASSES[query % 3]} (83 %)" if note else ""))
    return tuple(found)


def images(**changes: object) -> SweepResult:
    """All levels, two seeds, pictures."""
    metric = "R-precision"
    rates = Recipe(epochs=3, suffix_rate=1e-3, head_rate=1e-3)
    head = Recipe(epochs=40, suffix_rate=0.0, head_rate=3e-3)
    levels = (
        level("full", None, 0.0, 3_535_648, rates, {metric: (0.9167, 0.0061)}, (0.0, 21.0467, None), 0, 0.70,
              found_pictures(2)),
        level("50", "trunk.blocks.2", 3 / 7, 3_411_240, replace(rates, epochs=4), {metric: (0.93602, 0.0056)},
              (7.8218, 5.8571, 10.2114), 73_525_296, 0.71, found_pictures(0)),
        level("75", "trunk.blocks.4", 5 / 7, 2_935_464, replace(rates, epochs=5, batch_size=32),
              {metric: (0.92293, 0.0062)}, (7.8218, 2.4145, 7.7279), 51_480_624, 0.69, found_pictures(1)),
        level("head", "trunk", 1.0, 164_096, head, {metric: (0.88187, 0.0071)},
              (7.8218, 0.1361, 6.9951), 9_220_608, 0.66, found_pictures(3)),
    )  # fmt: skip
    result = SweepResult(
        kind="images",
        title="Which emoji is it?",
        metric=metric,
        metrics={metric: "Of the R pictures nearest to one whose class has R others, the share that are of its class"},
        curve_split="validation",
        untrained={metric: Estimate(0.73893, 0.0098)},
        untrained_found=found_pictures(4, note=False),
        levels=levels,
        recommendation=Recommendation(
            "50",
            "Take 50 % recycled: R-precision 0.936 ± 0.006 against 0.917 ± 0.006 of full training, in 31 s instead of "
            "63 s, for 74 MB on the disk.",
            {
                "full": "0.019 less than the best, and slowest",
                "50": "the best, twice as quick as full training",
                "75": "0.013 less, within two standard errors; 3.2 times as quick",
                "head": "0.054 less, 4.8 times as quick",
            },
        ),
        seeds=(0, 1),
        samples=picture_samples(),
        ran=ran(),
    )
    return replace(result, **changes)  # pyright: ignore[reportArgumentType]


# -- texts -------------------------------------------------------------------------------------------------------------

QUESTIONS = (
    "May a balcony of concrete be tiled in winter?",
    LONG,
    HOSTILE,
    "Wie lange muss Estrich trocknen, bevor Parkett verlegt wird?",
    "كم من الوقت يحتاج الإسمنت ليجف؟",
)


def text_samples() -> dict[int, Sample]:
    questions = {at: Sample("question", text) for at, text in enumerate(QUESTIONS)}
    answers = {
        at + 10: Sample("answer", f"It depends on the temperature, number {at}. {LONG if at % 2 else ''}")
        for at in range(8)
    }
    return {**questions, **answers}


def found_texts(rank: int) -> tuple[Found, ...]:
    right = (rank == 1, rank == 2, rank == 3)
    note = f"own answer ranked {rank} of 251"
    return tuple(Found(query, (10 + query, 11 + query, 12 + query), right, note) for query in range(len(QUESTIONS)))


def pairs(**changes: object) -> SweepResult:
    """Texts, two metrics, long and hostile ones among them."""
    first, second = "reciprocal rank", "precision@1"
    rates = Recipe(epochs=3, suffix_rate=1e-4, head_rate=1e-3, scale=20.0)
    levels = (
        level("full", None, 0.0, 22_713_216, rates, {first: (0.80417, 0.0151), second: (0.71912, 0.0197)},
              (0.0, 15.5276, None), 0, 0.76, found_texts(1)),
        level("50", "trunk.encoder.layer.2", 0.5, 5_470_848, replace(rates, epochs=4),
              {first: (0.79600, 0.0153), second: (0.70717, 0.0199)}, (4.0522, 7.9850, 11.9706), 52_859_568, 0.76,
              found_texts(2)),
        level("75", "trunk.encoder.layer.3", 4 / 6, 3_696_384, replace(rates, epochs=4),
              {first: (0.78769, 0.0154), second: (0.70518, 0.0199)}, (4.0522, 4.9711, 7.6100), 52_859_568, 0.75,
              found_texts(2)),
        level("head", "pool", 1.0, 147_840, replace(rates, epochs=20, suffix_rate=0.0),
              {first: (0.77086, 0.0156), second: (0.67928, 0.0205)}, (4.0522, 0.0503, 3.8850), 1_631_616, 0.74,
              found_texts(3)),
    )  # fmt: skip
    result = SweepResult(
        kind="pairs",
        title="Which answer belongs to the question?",
        metric=first,
        metrics={first: "Mean of 1 by the rank of the own answer", second: "How often the own answer is ranked first."},
        curve_split="test",
        untrained={first: Estimate(0.75632, 0.0159), second: Estimate(0.66135, 0.0209)},
        untrained_found=found_texts(3),
        levels=levels,
        recommendation=Recommendation(
            "full",
            "Take full training: reciprocal rank 0.804 ± 0.015; recycling 50 % loses 0.008, which is within the error, "
            "and takes 36 s instead of 47 s.",
            {"full": "the best", "50": "0.008 less, 1.3 times as quick", "75": "0.016 less", "head": "0.033 less"},
        ),
        seeds=(0, 1),
        samples=text_samples(),
        ran=ran(model="all-MiniLM-L6-v2", data="faq.jsonl: 1,000 pairs", left_out=(), settings={}, seconds=254.0),
    )
    return replace(result, **changes)  # pyright: ignore[reportArgumentType]


def hostile() -> SweepResult:
    """Whatever a user may name is an attack."""
    base = images()
    metric = HOSTILE
    levels = tuple(
        replace(
            one,
            cut=HOSTILE if one.cut else None,
            quality={metric: one.quality["R-precision"]},
            trials=tuple(replace(t, quality={metric: t.quality["R-precision"]}) for t in one.trials),
            search=tuple(replace(t, quality={metric: t.quality["R-precision"]}) for t in one.search),
        )
        for one in base.levels
    )
    return replace(
        base,
        title=HOSTILE,
        predictions=tuple(replace(prediction(one), cut=HOSTILE, precision=HOSTILE) for one in base.levels),
        metric=metric,
        metrics={metric: HOSTILE},
        untrained={metric: base.untrained["R-precision"]},
        levels=levels,
        recommendation=Recommendation("50", HOSTILE, dict.fromkeys(("full", "50", "75", "head"), f"={HOSTILE}")),
        samples={at: replace(one, title=HOSTILE, text=f"caf\udce9\x00{HOSTILE}") for at, one in base.samples.items()},
        untrained_found=tuple(replace(one, note=HOSTILE) for one in base.untrained_found),
        ran=ran(
            command=f"torchrecycle sweep images '{HOSTILE}'",
            model=HOSTILE,
            weights=HOSTILE,
            data=HOSTILE,
            left_out=(HOSTILE,),
            loss=HOSTILE,
            settings={HOSTILE: HOSTILE},
            licences=(HOSTILE,),
            machine=HOSTILE,
            versions={HOSTILE: HOSTILE},
        ),
    )


def two_levels() -> SweepResult:
    """Only half and head, one seed, no full training, rates given."""
    base = images()
    levels = tuple(replace(one, search=(), trials=one.trials[:1]) for one in base.levels if one.level in ("50", "head"))
    recommendation = Recommendation("50", "Take 50 % recycled.", {"50": "the best"})
    return replace(base, levels=levels, seeds=(0,), recommendation=recommendation)


def prediction(
    one: LevelResult, *, off: float = 0.96, objects: int = 720, precision: str | None = None, slow: bool = False
) -> Prediction:
    """What might have been said of a level before: a few per cent off."""
    frozen = one.frozen_epoch_seconds
    return Prediction(
        level=one.level,
        cut=one.cut,
        precision=precision,
        objects=objects,
        fill_seconds=off * one.fill_seconds,
        epoch_seconds=off * one.epoch_seconds,
        frozen_epoch_seconds=0.9 * off * one.epoch_seconds if slow else off * frozen if frozen else None,
        full_epoch_seconds=20.2,
        bytes_kept=round(one.bytes_kept / (4 if precision == "int8" else 1)),
        steps=8,
    )


def with_predictions() -> SweepResult:
    """Of each level; of half in two more precisions, and of a quarter, which was not run. At 75 % reading turned out
    to be slower than computing again, at head only it was predicted to be and was not."""
    base = images()
    levels = []
    for one in base.levels:
        if one.level == "75":
            one = replace(one, frozen_epoch_seconds=0.8 * one.epoch_seconds)
        levels.append(replace(one, predicted=prediction(one, slow=one.level == "head")))
    half, own = base.of("50"), tuple(one.predicted for one in levels if one.predicted is not None)
    quarter = replace(prediction(half, slow=True), level="25", cut="trunk.blocks.1")
    others = (prediction(half, precision="float16"), prediction(half, precision="int8", slow=True), quarter)
    return replace(base, levels=tuple(levels), predictions=(*own, *others))


def expecting_full() -> SweepResult:
    """Full training was not run, since there was no time for it; one seed."""
    base = with_predictions()
    levels = tuple(replace(one, trials=one.trials[:1]) for one in base.levels if one.level != "full")
    return replace(
        base,
        levels=levels,
        seeds=(0,),
        expected_full=Estimate(0.9214, 0.0123),
        expected_full_seconds=60.5,
        recommendation=Recommendation("50", "Take 50 % recycled: R-precision 0.936 ± 0.006.", {"50": "the best"}),
    )


def without_curves() -> SweepResult:
    """Trainings of which nothing was kept on the way; so no seconds are known."""
    return _with_curves(images(), lambda points: ())


def without_quality_on_the_way() -> SweepResult:
    """Only the loss was looked at."""
    return _with_curves(images(), lambda points: tuple(replace(at, quality=None) for at in points))


def with_quality_now_and_then() -> SweepResult:
    """Quality after each second epoch, and a loss that came apart."""
    return _with_curves(
        images(),
        lambda points: tuple(
            replace(at, quality=None if at.epoch % 2 else at.quality, loss=math.nan if at.epoch > 2 else at.loss)
            for at in points
        ),
    )


def _with_curves(
    result: SweepResult, change: Callable[[tuple[EpochPoint, ...]], tuple[EpochPoint, ...]]
) -> SweepResult:
    levels = tuple(
        replace(
            one,
            trials=tuple(replace(t, curve=change(t.curve)) for t in one.trials),
            search=tuple(replace(t, curve=change(t.curve)) for t in one.search),
        )
        for one in result.levels
    )
    return replace(result, levels=levels)


def without_samples() -> SweepResult:
    base = images()
    levels = tuple(replace(one, trials=tuple(replace(t, found=()) for t in one.trials)) for one in base.levels)
    return replace(base, samples={}, untrained_found=(), levels=levels)


def with_zero_errors() -> SweepResult:
    base = images()
    levels = tuple(
        replace(one, quality={metric: Estimate(value.mean, 0.0) for metric, value in one.quality.items()})
        for one in base.levels
    )
    return replace(base, levels=levels, untrained={m: Estimate(v.mean, 0.0) for m, v in base.untrained.items()})


def with_random_weights() -> SweepResult:
    return images(
        ran=ran(random_weights=True, weights="random, since none were given"),
        recommendation=Recommendation(None, "No level is better than the model as it comes.", {}),
    )


def everything() -> Mapping[str, SweepResult]:
    """Each by a name."""
    return {
        "images": images(),
        "pairs": pairs(),
        "hostile": hostile(),
        "two levels": two_levels(),
        "predictions": with_predictions(),
        "expecting full": expecting_full(),
        "no curves": without_curves(),
        "no quality on the way": without_quality_on_the_way(),
        "quality now and then": with_quality_now_and_then(),
        "no samples": without_samples(),
        "zero errors": with_zero_errors(),
        "random weights": with_random_weights(),
        "nothing is better": images(recommendation=Recommendation(None, "Take the model as it comes.", {})),
    }
