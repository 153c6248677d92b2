"""Which answer belongs to the question? Texts for the demo: 503 pairs about building in Sweden, in English.

``{"q": "How long does it take to get a bygglov?", "a": "The statutory processing time is 10 weeks, ..."}``: all-MiniLM
as it comes finds the right one of 503 answers for 55.7 % of the questions. Swedish words that it has never seen
(bygglov, kontrollansvarig) are what training can teach it.

The data set is one of texts and not of pairs: an object is one text, its row is kept without padding, and a question
that is asked again is never computed again. `PairBatches` puts the texts of a step together: the questions of 32 pairs
are one batch, their answers the next. Two batches and two forwards, since a question has 12 tokens and an answer 57:
in one batch, two thirds of the question side would be padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from torchrecycle.demo.split import halves
from torchrecycle.demo.weights import package_folder, text_tokenizer

__all__ = ["Pair", "PairBatches", "PairTexts", "distinct", "load_pairs", "pad_texts", "split_pairs", "two_by_two"]

MAX_TOKENS = 256
"""What all-MiniLM-L6-v2 was trained with; the longest text here has 117."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


def load_pairs() -> list[Pair]:
    """All 503 pairs of the English file, in its order. Six questions are asked twice, with different answers."""
    folder = package_folder("zaragoza_construction_faq", "zaragoza-construction-faq")
    with open(folder / "data" / "faq-en.jsonl", encoding="utf-8") as lines:
        entries = [json.loads(line) for line in lines]
    return [Pair(entry["q"], entry["a"]) for entry in entries]


def split_pairs(pairs: Sequence[Pair], *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Two halves by question, in the given order: a question asked twice is in one half only."""
    first = set(halves((pair.question for pair in pairs), seed=seed)[0])
    return [p for p in pairs if p.question in first], [p for p in pairs if p.question not in first]


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each question: in training, a question's second answer would count as wrong."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.question, pair)
    return list(first.values())


class PairTexts(Dataset[dict[str, Tensor]]):
    """The texts of pairs, tokenised: first all questions, then all answers.

    An item is ``{"input_ids": [tokens], "attention_mask": [tokens], "pair": []}``; text ``i`` and text
    ``i + len(pairs)`` belong together.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        texts = [pair.question for pair in self.pairs] + [pair.answer for pair in self.pairs]
        ids = text_tokenizer()(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        self.ids = [torch.tensor(each) for each in ids]  # pyright: ignore

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        pair = torch.tensor(index % len(self.pairs))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pair": pair}


def pad_texts(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of texts, padded behind with 0 (MiniLM's padding token) to its longest."""
    return {
        "input_ids": pad_sequence([item["input_ids"] for item in items], batch_first=True),
        "attention_mask": pad_sequence([item["attention_mask"] for item in items], batch_first=True),
        "pair": torch.stack([item["pair"] for item in items]),
    }


class PairBatches(Sampler[list[int]]):
    """Batches of indices into `PairTexts`, by turns the questions of some pairs and their answers.

    A last batch of less than half the size is left out: with few others to tell it from, a pair teaches little.

    Args:
        pairs: How many pairs the data set has.
        batch_size: Pairs in a step, so texts in a batch.
        generator: Draws the order, anew for each iteration; the global one if none is given.
    """

    def __init__(self, pairs: int, *, batch_size: int, generator: torch.Generator | None = None) -> None:
        self.pairs, self.batch_size, self.generator = pairs, batch_size, generator

    def _steps(self) -> int:
        whole, rest = divmod(self.pairs, self.batch_size)
        return whole + (2 * rest >= self.batch_size)

    def __len__(self) -> int:
        return 2 * self._steps()

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.pairs, generator=self.generator)
        for questions in order.split(self.batch_size)[: self._steps()]:
            yield questions.tolist()
            yield (questions + self.pairs).tolist()


def two_by_two(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """
    >>> list(two_by_two("qaqa"))
    [('q', 'a'), ('q', 'a')]
    """
    each = iter(batches)
    return zip(each, each, strict=True)
