"""From a user's data and a trunk to a `Task`, with defaults for all that was not said.

8,144 photos of 196 car models and EfficientNet-Lite0 become a task of similarity: half of the classes to be trained on,
a tenth to choose a rate, the other half to test. `picture_task`, `text_task` and `pair_task` differ in what an object
is; what is learned is an `Objective`.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import nn

from torchrecycle.files import Pairs, Pictures, Texts
from torchrecycle.files.errors import LeftOut, count_of, shown
from torchrecycle.files.labels import keep_classes
from torchrecycle.keys import key
from torchrecycle.similarity.heads import HeadKind
from torchrecycle.sweep.datasets import PadTexts, PairTexts, PictureObjects, TextObjects, thumbnail, tokenised
from torchrecycle.sweep.encoders import ImageEncoder, TextEncoder
from torchrecycle.sweep.identity import identity_of_model
from torchrecycle.sweep.objective_task import Objective, ObjectiveTask
from torchrecycle.sweep.objectives import Classify, Matching, Similar
from torchrecycle.sweep.recipes import Recipe, usual_recipe
from torchrecycle.sweep.results import Sample
from torchrecycle.sweep.splits import Splits, split_by_class, split_pairs, split_within_classes
from torchrecycle.sweep.task import Split
from torchrecycle.sweep.trunks import Trunk

__all__ = ["Settings", "pair_task", "picture_task", "text_task"]

What = Literal["similarity", "classify"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set of a task; None takes the default."""

    fraction: float = 1.0
    """Share of the training split that is trained on, 0 to 1."""
    epochs: int | None = None
    """Passes over the training split; head only, whose epochs cost next to nothing, gets five times as many."""
    batch_size: int | None = None
    """Objects, or pairs, in a step."""
    rate: float | Mapping[str, float] | None = None
    """Learning rate of what is left of the trunk, or one for some levels; where it is given, none is looked for."""
    head_rate: float | None = None
    """Learning rate of the head."""
    search: bool = True
    """Whether something must be held out to choose a rate on."""
    skip_bad: bool = False
    """Whether objects that contradict each other, and classes of one, are left out; else they are an error."""
    head: HeadKind = "linear"
    """One layer, ``linear``, or two, ``mlp``."""
    loss: str | None = None
    """See `Classify`, `Similar` and `Matching`."""
    tokens: int | None = None
    """Of each text, at most."""
    views: int | None = None
    """Pictures are augmented in training if it is more than 1; the sweep is then told to keep so many of each."""
    workers: int | None = None
    """Processes that read; none on a processor, up to eight beside a graphics card."""
    device: str | None = None
    """``cpu``, ``cuda``; a graphics card if there is one."""


# -- recipes -----------------------------------------------------------------------------------------------------------


def _recipes(settings: Settings, base: dict[str, Recipe], objects: int) -> Callable[[str, float], Recipe]:
    """The recipe of each level: of those for ``full``, ``head`` and what lies between.

    Args:
        settings: what is not to be as usual.
        base: usual recipes.
        objects: that an epoch has; pairs count once.
    """

    def recipe(level: str, share: float) -> Recipe:
        usual = usual_recipe(base, level, share, objects, epochs=settings.epochs, batch_size=settings.batch_size)
        given, is_head = _rate(settings, level), level == "head"
        return replace(
            usual,
            suffix_rate=0.0 if is_head else usual.suffix_rate if given is None else given,
            head_rate=given if is_head and given is not None else settings.head_rate or usual.head_rate,
        )

    return recipe


def _rate(settings: Settings, level: str) -> float | None:
    """What was given for a level: one rate for all is that of the trunk, which the head's level does not train."""
    if isinstance(settings.rate, Mapping):
        return settings.rate.get(level, settings.head_rate if level == "head" else None)
    return settings.head_rate if level == "head" else settings.rate


_PICTURES = {
    "full": Recipe(epochs=4, suffix_rate=3e-4, head_rate=1e-3, scale=8.0),
    "between": Recipe(epochs=5, suffix_rate=3e-4, head_rate=1e-3, scale=8.0),
    "head": Recipe(epochs=30, suffix_rate=0.0, head_rate=3e-3, scale=8.0),
}
_SIMILAR = {
    "full": Recipe(epochs=8, suffix_rate=3e-4, head_rate=1e-3, scale=4.0),
    "between": Recipe(epochs=7, suffix_rate=3e-4, head_rate=1e-3, scale=4.0),
    "head": Recipe(epochs=12, suffix_rate=0.0, head_rate=1e-3, scale=4.0),
}
"""What was best on similar cars (docs/experiments.md): with a scale of 8 the training classes are learned by heart."""
_TEXTS = {
    "full": Recipe(epochs=3, suffix_rate=1e-4, head_rate=1e-3, batch_size=32, scale=20.0),
    "between": Recipe(epochs=4, suffix_rate=1e-4, head_rate=1e-3, batch_size=32, scale=20.0),
    "head": Recipe(epochs=20, suffix_rate=0.0, head_rate=1e-3, batch_size=32, scale=20.0),
}


# -- what all tasks share ----------------------------------------------------------------------------------------------


def _device(settings: Settings) -> torch.device:
    return torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _workers(settings: Settings) -> int:
    if settings.workers is not None:
        return settings.workers
    return 0 if _device(settings).type == "cpu" else min(8, torch.get_num_threads())


def _content_of(trunk: Trunk) -> str:
    """A hash of the trunk: its name, its pooling, and all that tells its module from another one."""
    return key((trunk.name, type(trunk.pool).__name__, identity_of_model(trunk.module))).hex()


def _identity(*parts: Any) -> str:
    return blake3(repr(parts).encode()).hexdigest(length=16)


def _shared(trunk: Trunk, settings: Settings, identity: str) -> dict[str, Any]:
    return {
        "dim": trunk.dim,
        "identity": _identity(identity, _content_of(trunk), settings.fraction, settings.head, settings.loss),
        "model": trunk.name,
        "weights": trunk.weights,
        "random_weights": trunk.random,
        "device": _device(settings),
        "workers": _workers(settings),
        "evaluation_batch": min(64, settings.batch_size or 64),
        "given_rates": lambda level: _rate(settings, level) is not None,
    }


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Objects that have a class, each content once."""

    chosen: tuple[int, ...]
    """Indices of those that are used."""
    labels: tuple[str, ...]
    """Of them."""
    lines: tuple[str, ...]
    """What was left out, for the user."""


def _each_once(
    contents: Sequence[Any], labels: Sequence[str], names: Sequence[str], noun: str, settings: Settings
) -> _Labelled:
    """One object of each content: of two, one could be trained on and the other tested.

    Raises:
        DataError: two objects of one content are said to be of different classes, or a class has one member left.
    """
    left_out = LeftOut(settings.skip_bad)
    groups: dict[Any, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    torn = [group for group in groups.values() if len({labels[i] for i in group}) > 1]
    if torn:
        one, other = torn[0][0], next(i for i in torn[0] if labels[i] != labels[torn[0][0]])
        more = f", and so are {len(torn) - 1:,} more" if len(torn) > 1 else ""
        left_out.bad(
            f"two {noun}s are the same and have different classes: '{shown(names[one])}' is '{shown(labels[one])}' and "
            f"'{shown(names[other])}' is '{shown(labels[other])}'{more}",
            "Correct the classes",
        )
    kept = [group[0] for group in groups.values() if len({labels[i] for i in group}) == 1]
    repeated = sum(len(group) - 1 for group in groups.values() if len({labels[i] for i in group}) == 1)
    if repeated:
        left_out.note(f"{count_of(repeated, noun)} with the content of another of its class, which came before")
    of_kept = [labels[i] for i in kept]
    used = keep_classes(of_kept, left_out, noun=noun, where="what is left", step=f"Add {noun}s of other classes")
    chosen = tuple(kept[i] for i in used)
    return _Labelled(chosen, tuple(labels[i] for i in chosen), tuple(left_out.lines))


def _split_classes(what: What, names: Sequence[str], labels: Sequence[str], settings: Settings) -> Splits:
    if what == "similarity":
        return split_by_class(names, labels, fraction=settings.fraction)
    return split_within_classes(names, labels, fraction=settings.fraction, validation=settings.search)


def _objective(
    what: What, labels: Sequence[str], splits: Splits, settings: Settings
) -> tuple[Objective, dict[str, int]]:
    """What is learned, and the number of each class: for similarity, those of the training split come first."""
    if what == "classify":
        names = tuple(sorted(set(labels)))
        return Classify(names, head=settings.head, loss=settings.loss), {name: i for i, name in enumerate(names)}
    trained = sorted({labels[i] for i in splits.train})
    others = sorted(set(labels) - set(trained))
    return Similar(trained, head=settings.head, loss=settings.loss), {
        name: i for i, name in enumerate([*trained, *others])
    }


_TITLES = {
    ("images", "similarity"): "Which pictures are alike?",
    ("images", "classify"): "What is in the picture?",
    ("texts", "similarity"): "Which texts are alike?",
    ("texts", "classify"): "What kind of text is it?",
}


def _make_splits(
    splits: Splits, make: Callable[[Sequence[int]], Any], numbers: Sequence[int], name: str, sample: Any
) -> dict[str, Any]:
    """The three splits of objects that have a class; None for validation if there is nothing to choose a rate on."""
    parts: dict[str, Split | None] = {"validation": None}
    for part in ("train", "validation", "test"):
        indices = getattr(splits, part)
        if not indices:
            continue
        parts[part] = Split(
            dataset=make(indices),
            labels=tuple(numbers[i] for i in indices),
            name=f"{name} {_identity(indices, [numbers[i] for i in indices])}",
            sample=(lambda i, indices=indices: sample(indices[i])) if part == "test" else None,
        )
    return parts


# -- pictures ----------------------------------------------------------------------------------------------------------

AUGMENTED = "60 to 100 % of each picture, mirrored every other time"


def picture_task(pictures: Pictures, trunk: Trunk, what: What, settings: Settings = Settings()) -> ObjectiveTask:
    """Pictures that have a class.

    Args:
        pictures: as `torchrecycle.files.find_pictures` gives them.
        trunk: of images.
        what: ``classify`` tells known classes apart; ``similarity`` finds pictures of classes never trained on.
        settings: what is not to be as usual.

    Raises:
        SplitError: there are too few classes or pictures.
    """
    preprocessing = trunk.preprocessing
    assert preprocessing is not None
    contents = [picture.digest or picture.name for picture in pictures.items]
    names, labels = [p.name for p in pictures.items], [p.label for p in pictures.items]
    once = _each_once(contents, labels, names, "picture", settings)
    items, labels = [pictures.items[i] for i in once.chosen], once.labels
    splits = _split_classes(what, [picture.name for picture in items], labels, settings)
    objective, number = _objective(what, labels, splits, settings)
    numbers = [number[label] for label in labels]
    module = trunk.module

    def make(indices: Sequence[int], *, augmented: bool = False) -> PictureObjects:
        chosen, classes = [items[i] for i in indices], [numbers[i] for i in indices]
        return PictureObjects(chosen, classes, preprocessing, augmented=augmented)

    def sample(index: int) -> Sample:
        picture = items[index]
        return Sample(title=picture.label, text=picture.name, picture=thumbnail(picture.image()))

    identity = _identity(pictures.identity, preprocessing, what, _readers())
    parts = _make_splits(splits, make, numbers, identity, sample)
    if settings.views not in (None, 1):
        parts["train"] = replace(
            parts["train"],
            dataset=make(splits.train, augmented=True),
            name=f"{parts['train'].name} {AUGMENTED}",
        )
        identity = _identity(identity, AUGMENTED)
    return ObjectiveTask(
        kind="images",
        title=_TITLES["images", what],
        objective=objective,
        build=lambda head, unit: ImageEncoder(copy.deepcopy(module), head, unit=unit),
        collate=None,
        recipes=_recipes(settings, _SIMILAR if what == "similarity" else _PICTURES, len(splits.train)),
        data=pictures.where,
        left_out=(*pictures.left_out, *once.lines),
        settings={
            "image size": f"{preprocessing.size} px",
            "preprocessing": str(preprocessing),
            **({} if settings.views in (None, 1) else {"augmentation": AUGMENTED}),
            **_said(settings),
        },
        **parts,
        **_shared(trunk, settings, identity),
    )


def _readers() -> dict[str, str]:
    """What decodes and resizes: another version may give other numbers."""
    return {name: importlib.metadata.version(name) for name in ("pillow", "torchvision")}


def _said(settings: Settings) -> dict[str, str]:
    """What was not left as usual."""
    said = {"part of the training split": f"{settings.fraction:.0%}"} if settings.fraction != 1 else {}
    if settings.head != "linear":
        said["head"] = "two layers with GELU between"
    if isinstance(settings.rate, Mapping):
        said["rates"] = ", ".join(f"{level} {rate:g}" for level, rate in settings.rate.items()) + ", given"
    elif settings.rate is not None:
        said["rate"] = f"{settings.rate:g}, given"
    return said


# -- texts -------------------------------------------------------------------------------------------------------------


def _tokens(trunk: Trunk, settings: Settings) -> int:
    """As many as the model takes, but no more than 128 unless told."""
    most = min(int(trunk.tokenizer.model_max_length), int(getattr(trunk.module.config, "max_position_embeddings", 512)))
    return min(settings.tokens or 128, most)


def _text_builder(trunk: Trunk) -> Callable[[nn.Module, bool], nn.Module]:
    module, pool = trunk.module, trunk.pool
    return lambda head, unit: TextEncoder(copy.deepcopy(module), head, unit=unit, pool=copy.deepcopy(pool))


def text_task(texts: Texts, trunk: Trunk, what: What, settings: Settings = Settings()) -> ObjectiveTask:
    """Texts that have a class.

    Args:
        texts: as `torchrecycle.files.find_texts` gives them.
        trunk: of texts.
        what: ``classify`` tells known classes apart; ``similarity`` finds texts of classes never trained on.
        settings: what is not to be as usual.

    Raises:
        SplitError: there are too few classes or texts.
    """
    tokens = _tokens(trunk, settings)
    all_ids = tokenised(trunk.tokenizer, texts.texts, tokens=tokens)
    contents = [tuple(each.tolist()) for each in all_ids]  # what the model sees: upper case may be the same to it
    once = _each_once(contents, texts.labels, texts.texts, "text", settings)
    names, labels, ids = [texts.texts[i] for i in once.chosen], once.labels, [all_ids[i] for i in once.chosen]
    splits = _split_classes(what, names, labels, settings)
    objective, number = _objective(what, labels, splits, settings)
    numbers = [number[label] for label in labels]

    def make(indices: Sequence[int]) -> TextObjects:
        return TextObjects([ids[i] for i in indices], [numbers[i] for i in indices])

    def sample(index: int) -> Sample:
        return Sample(title=labels[index], text=names[index])

    identity = _identity(texts.identity, what, _all_ids(ids))
    return ObjectiveTask(
        kind="texts",
        title=_TITLES["texts", what],
        objective=objective,
        build=_text_builder(trunk),
        collate=PadTexts(trunk.tokenizer.pad_token_id),
        recipes=_recipes(settings, _TEXTS, len(splits.train)),
        data=texts.where,
        left_out=(*texts.left_out, *once.lines),
        settings={"tokens of a text": f"{tokens} at most", **_said(settings)},
        **_make_splits(splits, make, numbers, identity, sample),
        **_shared(trunk, settings, identity),
    )


def _all_ids(ids: Sequence[torch.Tensor]) -> str:
    """A hash of what the tokenizer made of all texts: which tokenizer it was, and of which version, follows from it."""
    return _identity([each.tolist() for each in ids])


def pair_task(pairs: Pairs, trunk: Trunk, settings: Settings = Settings()) -> ObjectiveTask:
    """Pairs of texts that belong together.

    Args:
        pairs: as `torchrecycle.files.find_pairs` gives them.
        trunk: of texts.
        settings: what is not to be as usual.

    Raises:
        SplitError: there are too few pairs.
    """
    objective = Matching(head=settings.head, loss=settings.loss)
    tokens = _tokens(trunk, settings)
    left, right = (tokenised(trunk.tokenizer, side, tokens=tokens) for side in (pairs.left, pairs.right))
    # What the model sees: texts that are one to the tokenizer are one text.
    spelled = [[" ".join(map(str, ids.tolist())) for ids in side] for side in (left, right)]
    splits = split_pairs(*spelled, fraction=settings.fraction)
    identity = _identity(pairs.identity, _all_ids([*left, *right]))

    def part(indices: Sequence[int], *, shown: bool = False) -> Split:
        def sample(i: int) -> Sample:
            side, title = (pairs.left, "left") if i < len(indices) else (pairs.right, "right")
            return Sample(title=title, text=side[indices[i % len(indices)]])

        data = PairTexts([left[i] for i in indices], [right[i] for i in indices])
        return Split(data, name=f"{identity} {_identity(indices)}", sample=sample if shown else None)

    used = sum(len(getattr(splits, name)) for name in ("train", "validation", "test"))
    unused = () if settings.fraction < 1 or used == len(pairs.left) else (_of_shared_texts(len(pairs.left), used),)
    return ObjectiveTask(
        kind="pairs",
        title="Which right text belongs to the left one?",
        train=part(splits.train),
        validation=part(splits.validation),
        test=part(splits.test, shown=True),
        objective=objective,
        build=_text_builder(trunk),
        collate=PadTexts(trunk.tokenizer.pad_token_id),
        recipes=_recipes(settings, _TEXTS, len(splits.train)),
        data=pairs.where,
        left_out=(*pairs.left_out, *unused),
        settings={"tokens of a text": f"{tokens} at most", **_said(settings)},
        **_shared(trunk, settings, identity),
    )


def _of_shared_texts(pairs: int, used: int) -> str:
    return (
        f"{pairs - used:,} of {pairs:,} pairs are not used: one of their texts is in another pair of the same "
        "split, and "
        "would count as a wrong answer"
    )
