"""The two tasks of the demo, on data and weights that come in packages.

``image_task(quick=True)`` is 38 emoji to train on and 38 others to find; ``text_task()`` is 503 questions with their
answers, half of which train. Each level has a recipe and a cut of its own (`torchrecycle.demo.recipes`), so no rate is
looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torchrecycle.demo.emoji import (
    DEFAULT_FOLDER,
    PREPROCESSING,
    Picture,
    class_names,
    draw,
    drop_identical,
    emoji_objects,
    toned_classes,
)
from torchrecycle.demo.faq import Pair, distinct, load_pairs, pair_texts, split_pairs
from torchrecycle.demo.recipes import IMAGE_CUTS, IMAGE_RECIPES, TEXT_CUTS, TEXT_RECIPES, quicker
from torchrecycle.demo.weights import image_trunk, text_trunk
from torchrecycle.sweep.datasets import PadTexts, thumbnail
from torchrecycle.sweep.encoders import ImageEncoder, TextEncoder
from torchrecycle.sweep.objective_task import ObjectiveTask
from torchrecycle.sweep.objectives import Matching, Similar
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Sample
from torchrecycle.sweep.splits import halves
from torchrecycle.sweep.task import Split

__all__ = ["image_task", "text_task"]

QUICK = "quick: a quarter of the data and a third of the epochs, too little to rank the levels"


def _choosing(recipes: dict[str, Recipe], quick: bool) -> Callable[[str, float], Recipe]:
    return lambda level, share: quicker(recipes[level]) if quick else recipes[level]


def image_task(
    folder: Path = DEFAULT_FOLDER, *, quick: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> ObjectiveTask:
    """Which emoji is it? 299 emoji in six skin tones; half train, half are to be found.

    The pictures are drawn if they are not drawn yet.

    Args:
        folder: where pictures are kept
        quick: a quarter of the classes
        on_progress: see `torchrecycle.demo.emoji.draw`
    """
    labels = list(toned_classes())[:: 4 if quick else 1]
    pictures = drop_identical(draw(folder, labels=labels, on_progress=on_progress))
    train, test = (set(half) for half in halves(picture.label for picture in pictures))
    trained = [picture for picture in pictures if picture.label in train]
    return ObjectiveTask(
        kind="images",
        title="Which emoji is it?",
        train=_emoji_split(trained),
        validation=None,
        test=_emoji_split([picture for picture in pictures if picture.label in test]),
        objective=Similar(class_names(trained)),
        build=lambda head, unit: ImageEncoder(image_trunk(), head, unit=unit),
        dim=1280,
        collate=None,
        recipes=_choosing(IMAGE_RECIPES, quick),
        identity=f"OpenMoji 17.0.0, {len(pictures)} pictures, EfficientNet-Lite0",
        data=f"OpenMoji pictures: {len(class_names(pictures))} emoji in six skin tones",
        weights="ImageNet",
        model="EfficientNet-Lite0",
        left_out=(QUICK,) if quick else (),
        settings={"image size": f"{PREPROCESSING.size} px"},
        licences=(
            "Pictures: OpenMoji 17.0.0, the open-source emoji and icon project, CC BY-SA 4.0.",
            "Weights: EfficientNet-Lite0, trained on ImageNet, Apache-2.0.",
        ),
        cuts=IMAGE_CUTS,
    )


def _emoji_split(pictures: Sequence[Picture]) -> Split:
    data = emoji_objects(pictures)

    def sample(index: int) -> Sample:
        picture = pictures[index]
        return Sample(picture.label, picture.path.stem, thumbnail(picture.image()))

    return Split(data, labels=data.labels, sample=sample)


def text_task(*, quick: bool = False) -> ObjectiveTask:
    """Which answer belongs to the question? 503 pairs; half train, half are to be found.

    Args:
        quick: a quarter of the pairs
    """
    train, test = split_pairs(load_pairs()[:: 4 if quick else 1])
    return ObjectiveTask(
        kind="pairs",
        title="Which answer belongs to the question?",
        train=_pair_split(distinct(train)),
        validation=None,
        test=_pair_split(test),
        objective=Matching(),
        build=lambda head, unit: TextEncoder(text_trunk(), head, unit=unit),
        dim=384,
        collate=PadTexts(0),
        recipes=_choosing(TEXT_RECIPES, quick),
        identity=f"Swedish Construction FAQ 1.2.1, {len(train)} and {len(test)} pairs, all-MiniLM-L6-v2",
        data="Swedish Construction FAQ: 503 questions and their answers, in English",
        weights="sentence-transformers",
        model="all-MiniLM-L6-v2",
        left_out=(QUICK,) if quick else (),
        licences=(
            "Texts: Swedish Construction FAQ by Zaragoza AB, CC BY 4.0.",
            "Weights: all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0.",
        ),
        cuts=TEXT_CUTS,
    )


def _pair_split(pairs: Sequence[Pair]) -> Split:
    def sample(index: int) -> Sample:
        pair = pairs[index % len(pairs)]
        return Sample("question", pair.question) if index < len(pairs) else Sample("answer", pair.answer)

    return Split(pair_texts(pairs), sample=sample)
