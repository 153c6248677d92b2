"""Splits that anybody can find again: what trains, what chooses a rate, what tells how well it went.

Names are put in the order of a SHA-256 of a seed and the name, and the first ones go to the first split. No generator
is asked, so the splits are the same on every machine and in every version of Python, and a name that is added later
moves few others.

*Similarity* holds out whole classes: of 196 car models, 98 are tested and never trained on, some of the others
choose the rate. *Classification* holds out a fifth of each class. *Pairs* hold out a fifth of all pairs, so that no
question and no answer is in two splits: pairs that share a text go together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchrecycle.errors import RecycleError

__all__ = ["SplitError", "Splits", "halves", "in_order", "split_by_class", "split_pairs", "split_within_classes"]

MOST_VALIDATION = 500
"""Objects that are enough to choose a rate; more would only take time after each epoch."""


class SplitError(RecycleError, ValueError):
    """There is too little of the data to train on some of it and to test on the rest."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Indices of objects; each object is in one split at most."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def _rank(name: str, seed: int) -> bytes:
    # A file name that is no UTF-8 has half surrogates in it.
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()


def in_order(names: Iterable[str], *, seed: int = 0) -> list[str]:
    """Distinct names in an order by chance that is always the same.

    >>> in_order("abcd")
    ['d', 'a', 'c', 'b']
    """
    return sorted(set(names), key=lambda name: _rank(name, seed))


def halves(labels: Iterable[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Distinct labels in two halves, each sorted; the first gets the odd one.

    >>> halves(["a", "b", "c", "a"])
    (['a', 'c'], ['b'])
    """
    order = in_order(labels, seed=seed)
    middle = (len(order) + 1) // 2
    return sorted(order[:middle]), sorted(order[middle:])


def _members(names: Sequence[str], labels: Sequence[str], seed: int) -> dict[str, list[int]]:
    """The objects of each class, in an order by chance."""
    found: dict[str, list[int]] = {}
    for index in sorted(range(len(names)), key=lambda i: (_rank(names[i], seed), i)):
        found.setdefault(labels[index], []).append(index)
    return found


def _thinned(members: Sequence[int], fraction: float, least: int) -> Sequence[int]:
    return members[: max(least, math.ceil(fraction * len(members) - 1e-9))]


def split_by_class(names: Sequence[str], labels: Sequence[str], *, fraction: float = 1.0, seed: int = 0) -> Splits:
    """Whole classes are held out: half of them to test, a tenth to choose a rate.

    Args:
        names: of each object, distinct.
        labels: the class of each object.
        fraction: the share of each training class that is trained on, 0 to 1; what is tested stays the same.
        seed: of the order.

    Raises:
        SplitError: there are fewer than seven classes, or a class of one.
    """
    members = _members(names, labels, seed)
    if len(members) < 7:  # two to choose a rate, and of one class alone nothing is learned
        raise SplitError(
            f"similarity is tested on classes that were not trained on, which takes 7 classes or more, and there are "
            f"{len(members)}: add classes, or tell known classes apart with --task classify"
        )
    first, test = halves(members, seed=seed)
    validation: list[str] = []
    for label in in_order(first, seed=seed + 1)[: max(2, len(first) // 5)]:
        if len(validation) >= 2 and sum(len(members[each]) for each in [*validation, label]) > MOST_VALIDATION:
            break
        validation.append(label)
    train = [label for label in first if label not in validation]
    return Splits(
        train=tuple(sorted(i for label in train for i in _thinned(members[label], fraction, 2))),
        validation=tuple(sorted(i for label in validation for i in members[label])),
        test=tuple(sorted(i for label in test for i in members[label])),
    )


def split_within_classes(
    names: Sequence[str],
    labels: Sequence[str],
    *,
    fraction: float = 1.0,
    validation: bool = True,
    seed: int = 0,
) -> Splits:
    """A fifth of each class is held out to test, a tenth to choose a rate; one object of each at least.

    A class of two has one object to train and one to test. Of many classes, only some choose the rate.

    Args:
        names: of each object, distinct.
        labels: the class of each object; none has a single member.
        fraction: the share of what is left that is trained on, 0 to 1; what is tested stays the same.
        validation: whether there must be something to choose a rate on.
        seed: of the order.

    Raises:
        SplitError: there is one class only, or a class of one, or no class has three objects, so that none can choose
            a rate.
    """
    train: list[int] = []
    chosen: list[int] = []
    test: list[int] = []
    classes = _members(names, labels, seed)
    if len(classes) < 2:
        raise SplitError(f"there is nothing to tell apart in {len(classes)} class: add objects of other classes")
    most = max(1, MOST_VALIDATION // len(classes))
    for label in in_order(classes, seed=seed):
        members = classes[label]
        if len(members) < 2:
            raise SplitError(f"class {label!r} has one member, which cannot be trained on and tested on")
        held = max(1, round(0.2 * len(members)))
        choosing = min(most, max(1, round(0.1 * len(members)))) if len(members) > 2 else 0
        choosing = min(choosing, MOST_VALIDATION - len(chosen))
        test += members[:held]
        chosen += members[held : held + choosing]
        train += _thinned(members[held + choosing :], fraction, 1)
    if not chosen and validation:
        raise SplitError(
            "no class has three members or more, so that there is nothing to choose a rate on: add objects, or give a "
            "rate with --rate or --no-search"
        )
    return Splits(tuple(sorted(train)), tuple(sorted(chosen)), tuple(sorted(test)))


def split_pairs(left: Sequence[str], right: Sequence[str], *, fraction: float = 1.0, seed: int = 0) -> Splits:
    """A fifth of the pairs is held out to test, a tenth to choose a rate; no text is in two splits.

    Within a split each text is in one pair only, the first that has it: as an answer to something else, it would
    count as a wrong one.

    Args:
        left: a text of each pair.
        right: the other one.
        fraction: the share of what is left that is trained on, 0 to 1; what is tested stays the same.
        seed: of the order.

    Raises:
        SplitError: there are too few pairs, or nearly all of them hang together by texts that they share.
    """
    groups = _linked(left, right)
    count = sum(map(len, groups))
    sizes = {"test": round(0.2 * count), "validation": min(MOST_VALIDATION, round(0.1 * count))}
    parts: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    ordered = sorted(groups, key=lambda group: _rank(left[group[0]], seed))
    for group in ordered:
        # A group as large as a quarter of all can only be trained on.
        name = next(
            (n for n, size in sizes.items() if len(parts[n]) < size and len(group) <= max(1, size // 4)), "train"
        )
        parts[name] += group
    chosen = {name: _each_text_once(sorted(part), left, right) for name, part in parts.items()}
    train = sorted(_thinned(sorted(chosen["train"], key=lambda i: _rank(left[i], seed + 1)), fraction, 2))
    for name, part in (("test", chosen["test"]), ("choose a rate", chosen["validation"]), ("train", train)):
        if len(part) < 2:
            raise SplitError(
                f"{count} pairs are too few to {name} on some of them, with no text in two splits: there are "
                f"{len(groups)} groups of pairs that share a text, the largest of {max(map(len, groups))} pairs: add "
                "pairs of other texts"
            )
    return Splits(tuple(train), tuple(chosen["validation"]), tuple(chosen["test"]))


def _linked(left: Sequence[str], right: Sequence[str]) -> list[list[int]]:
    """Pairs that share a text, also by way of others, in one group (union-find)."""
    parent = list(range(len(left)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for index, texts in enumerate(zip(left, right, strict=True)):
        for text in texts:  # on whichever side: in data of paraphrases, what is left in one pair is right in another
            other = first.setdefault(text, index)
            parent[root(index)] = root(other)
    groups: dict[int, list[int]] = {}
    for index in range(len(left)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def _each_text_once(indices: Sequence[int], left: Sequence[str], right: Sequence[str]) -> list[int]:
    seen: set[str] = set()
    chosen = []
    for index in indices:
        if left[index] in seen or right[index] in seen:
            continue
        seen |= {left[index], right[index]}
        chosen.append(index)
    return chosen
