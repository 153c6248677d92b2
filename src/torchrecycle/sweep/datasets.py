"""The data sets of a sweep: what turns a file or a text into what a model takes.

`PictureObjects` decodes a picture and makes it what the model was trained to see; `TextObjects` holds tokenised texts.
An item is ``(image [3, size, size], label [])`` or ``{"input_ids": [tokens], "attention_mask": [tokens],
"label": []}``.

Pairs are a data set of texts and not of pairs: an object is one text, its row is kept without padding, and a question
that is asked again is never computed again. `PairBatches` puts the texts of a step together: the questions of 32 pairs
are one batch, their answers the next. Two batches and two forwards, since a question has 12 tokens and an answer 57:
in one batch, two thirds of the question side would be padding.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

__all__ = [
    "PadTexts",
    "PairBatches",
    "PairTexts",
    "PictureObjects",
    "Preprocessing",
    "Readable",
    "TextObjects",
    "thumbnail",
    "tokenised",
    "two_by_two",
]


THUMBNAIL = 112
"""Pixels of the longer side of a picture that is shown."""


class Readable(Protocol):
    """A picture that can be opened, such as `torchrecycle.files.Picture`."""

    def image(self) -> Any: ...


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a picture to what a model takes: the whole of it squeezed into a square, or its middle; then normalised."""

    size: int
    """Height and width of what the model takes, in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, of numbers from 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    """``bicubic``, ``bilinear``, ``nearest``, ``lanczos``, ``box`` or ``hamming``, as PIL does it."""
    crop: float | None = 0.875
    """Which share of the resized picture's shorter side is cut out; None takes the whole picture, squeezed."""

    def _resized(self) -> int | list[int]:
        """The shorter side, or both."""
        return [self.size, self.size] if self.crop is None else int(self.size / self.crop)

    def __str__(self) -> str:
        side = self._resized()
        how = f"{side} px, the middle {self.size}" if isinstance(side, int) else f"{self.size} times {self.size} px"
        mean, std = (", ".join(f"{n:.3g}" for n in each) for each in (self.mean, self.std))
        return f"{self.interpolation} to {how}, mean {mean}, deviation {std}"

    def transform(self, *, augmented: bool = False) -> Any:
        """A torchvision transform from a PIL image to a tensor ``[3, size, size]``.

        Args:
            augmented: 60 to 100 % of the picture, mirrored every other time, as torch's generator draws it.
        """
        from torchvision import transforms

        how = transforms.InterpolationMode(self.interpolation)
        cut_out = [transforms.Resize(self._resized(), interpolation=how), transforms.CenterCrop(self.size)]
        if augmented:
            side = round(1.25 * self.size)  # so that a part of it is no enlarged one
            cut_out = [
                transforms.Resize([side, side] if self.crop is None else side, interpolation=how),
                transforms.RandomResizedCrop(self.size, scale=(0.6, 1.0), ratio=(0.9, 1.1), interpolation=how),
                transforms.RandomHorizontalFlip(),
            ]
        return transforms.Compose([*cut_out, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])


class PictureObjects(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and class numbers: ``(image [3, size, size], label [])``.

    Args:
        pictures: what can be opened.
        labels: the class number of each.
        preprocessing: what is done to each picture.
        augmented: whether each reading gives another part of it.
    """

    def __init__(
        self,
        pictures: Sequence[Readable],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        *,
        augmented: bool = False,
    ) -> None:
        self.pictures = tuple(pictures)
        self.labels = tuple(labels)
        self.preprocessing = preprocessing
        self._transform = preprocessing.transform(augmented=augmented)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self.pictures[index].image()), torch.tensor(self.labels[index])


def thumbnail(image: Any) -> str:
    """A PIL image as it is shown: a small JPEG, base64. The image is shrunk in place."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")


# -- texts -------------------------------------------------------------------------------------------------------------


def tokenised(tokenizer: Any, texts: Sequence[str], *, tokens: int) -> list[Tensor]:
    """The ids of each text, cut off after so many tokens."""
    return [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]]


def _text_item(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TextObjects(Dataset[dict[str, Tensor]]):
    """Texts and class numbers: ``{"input_ids": [tokens], "attention_mask": [tokens], "label": []}``.

    Args:
        ids: of each text, see `tokenised`.
        labels: the class number of each.
    """

    def __init__(self, ids: Sequence[Tensor], labels: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self.labels = tuple(labels)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**_text_item(self.ids[index]), "label": torch.tensor(self.labels[index])}


class PairTexts(Dataset[dict[str, Tensor]]):
    """The texts of pairs: first all left ones, then all right ones.

    An item is ``{"input_ids": [tokens], "attention_mask": [tokens], "pair": []}``; text ``i`` and text ``i + pairs``
    belong together.

    Args:
        left: ids of each pair's left text, see `tokenised`.
        right: of its right text.
    """

    def __init__(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        self.pairs = len(left)
        self.ids = (*left, *right)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**_text_item(self.ids[index]), "pair": torch.tensor(index % self.pairs)}


class PadTexts:
    """A collate function: texts padded behind to the longest of the batch, all else stacked.

    Args:
        padding: the tokenizer's padding id.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: self._joined(name, [item[name] for item in items]) for name in items[0]}

    def _joined(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name not in ("input_ids", "attention_mask"):
            return torch.stack(tensors)
        fill = self.padding if name == "input_ids" else 0
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


class PairBatches(Sampler[list[int]]):
    """Batches of indices into `PairTexts`, by turns the left texts of some pairs and their right ones.

    A last batch of less than half the size is left out, unless it is the only one: with few others to tell it from, a
    pair teaches little.

    Args:
        pairs: How many pairs the data set has.
        batch_size: Pairs in a step, so texts in a batch.
        generator: Draws the order, anew for each iteration; the global one if none is given.
    """

    def __init__(self, pairs: int, *, batch_size: int, generator: torch.Generator | None = None) -> None:
        self.pairs, self.batch_size, self.generator = pairs, batch_size, generator

    def _steps(self) -> int:
        whole, rest = divmod(self.pairs, self.batch_size)
        return max(1, whole + (2 * rest >= self.batch_size))

    def __len__(self) -> int:
        return 2 * self._steps()

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.pairs, generator=self.generator)
        for left in order.split(self.batch_size)[: self._steps()]:
            yield left.tolist()
            yield (left + self.pairs).tolist()


def two_by_two(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """
    >>> list(two_by_two("qaqa"))
    [('q', 'a'), ('q', 'a')]
    """
    each = iter(batches)
    return zip(each, each, strict=True)
