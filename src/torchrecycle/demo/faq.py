"""Which answer belongs to the question? Texts for the demo: 503 pairs about building in Sweden, in English.

``{"q": "How long does it take to get a bygglov?", "a": "The statutory processing time is 10 weeks, ..."}``: all-MiniLM
as it comes finds the right one of 503 answers for 55.7 % of the questions. Swedish words that it has never seen
(bygglov, kontrollansvarig) are what training can teach it.

Half of the questions train, the other half evaluate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchrecycle.demo.weights import package_folder, text_tokenizer
from torchrecycle.sweep.datasets import PairTexts, tokenised
from torchrecycle.sweep.splits import halves

__all__ = ["Pair", "distinct", "load_pairs", "pair_texts", "split_pairs"]

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


def pair_texts(pairs: Sequence[Pair]) -> PairTexts:
    """The texts of pairs, tokenised: first all questions, then all answers."""
    tokenizer = text_tokenizer()
    questions = tokenised(tokenizer, [pair.question for pair in pairs], tokens=MAX_TOKENS)
    return PairTexts(questions, tokenised(tokenizer, [pair.answer for pair in pairs], tokens=MAX_TOKENS))
