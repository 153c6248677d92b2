"""Under ``max_bytes``: which levels are filled together and kept at once, and in which order the others take turns.

The rows of head only take 20 MB, of 75 % 500 MB and of 50 % 1 GB, and the store may take 1.2 GB. Taken from the most
recycled on, head only and 75 % would be kept first, and 50 % afterwards, alone. But 30 epochs of 50 % are planned, and
each is 20 s shorter with its rows: head only and 50 % save most, so they are kept at once, and 75 % takes its turn when
both are trained.

What saves most seconds within the bytes allowed is told by `torchrecycle.sweep.materialise`, first of all levels, then
of what is left, and so on. Levels whose rows save nothing come last. A level that does not fit by itself has no turn:
it is trained with its prefix computed again. No order changes what a level learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecycle.store.sizes import bytes_in_words
from torchrecycle.sweep.budget import listed
from torchrecycle.sweep.materialise import Candidate, Kept, choose
from torchrecycle.sweep.results import in_words

__all__ = ["Turns", "fit_together", "in_turn", "turns_from_json", "turns_of"]


@dataclass(frozen=True, slots=True)
class Turns:
    """Who is in the store when."""

    groups: tuple[tuple[str, ...], ...]
    """Levels that are filled in one pass and trained one after another, the most recycled first; then the next ones
    take their place in the store."""
    too_large: tuple[str, ...] = ()
    """Levels that do not fit by themselves."""
    said: tuple[str, ...] = ()
    """What is kept, and why, in lines; empty where there is nothing to be said."""

    @property
    def order(self) -> tuple[str, ...]:
        """All levels, in the order in which they are trained."""
        return (*(level for group in self.groups for level in group), *self.too_large)


def turns_from_json(record: Mapping[str, Any]) -> Turns:
    """The inverse of `dataclasses.asdict`."""
    return Turns(tuple(map(tuple, record["groups"])), tuple(record["too_large"]), tuple(record["said"]))


def fit_together(sizes: Mapping[str, int], limit: int) -> bool:
    """Whether all levels that fit by themselves also fit at once.

    Args:
        sizes: bytes of each level.
        limit: bytes that the store may take.
    """
    return sum(size for size in sizes.values() if size <= limit) <= limit


def turns_of(sizes: Mapping[str, int], limit: int, candidates: Sequence[Candidate] | None) -> Turns:
    """Who is kept at once, and who afterwards.

    Args:
        sizes: bytes of each level, the most recycled first.
        limit: bytes that the store may take.
        candidates: what the rows of each level save, if that is known; else they come in the order of the sizes.

    >>> sizes = {"head": 20, "75": 500, "50": 1000, "25": 3000}
    >>> saves = [Candidate("50", 0, 20.0, 30), Candidate("75", 0, 25.0, 9), Candidate("head", 0, 30.0, 90)]
    >>> turns_of(sizes, 1200, saves).groups, turns_of(sizes, 1200, None).groups
    ((('head', '50'), ('75',)), (('head', '75'), ('50',)))
    """
    too_large = tuple(level for level, size in sizes.items() if size > limit)
    said = [
        f"{in_words(level)}: its rows would take {bytes_in_words(sizes[level])}, and the store may take "
        f"{bytes_in_words(limit)}: its frozen layers are computed again instead"
        for level in too_large
    ]
    fitting = {level: size for level, size in sizes.items() if size <= limit}
    if fit_together(sizes, limit):
        return Turns((tuple(fitting),) if fitting else (), too_large, tuple(said))
    chosen = _chosen(fitting, limit, candidates or ())
    grouped = [[level for level in fitting if level in kept.levels] for kept in chosen]
    rest = {level: size for level, size in fitting.items() if not any(level in group for group in grouped)}
    groups = [*grouped, *in_turn(rest, limit)]
    said.append(_why(chosen, groups, fitting, limit, candidates is not None))
    return Turns(tuple(map(tuple, groups)), too_large, tuple(said))


def _chosen(sizes: Mapping[str, int], limit: int, candidates: Sequence[Candidate]) -> list[Kept]:
    """What saves most, then what does of what is left, until nothing saves anything."""
    left = [_sized(one, sizes[one.level]) for one in candidates if one.level in sizes]
    chosen: list[Kept] = []
    while left:
        kept = choose(left, limit)
        if not kept.levels:
            break
        chosen.append(kept)
        left = [one for one in left if one.level not in kept.levels]
    return chosen


def _sized(one: Candidate, size: int) -> Candidate:
    """With the bytes by which it is told whether it fits, its files' included."""
    return Candidate(one.level, size, one.seconds_saved, one.epochs, one.fill_seconds)


def in_turn(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Levels that are filled together, in the order given, where nothing is known of what they save.

    Args:
        sizes: bytes of each level; none is above the limit.
        limit: bytes that the store may take.

    >>> in_turn({"head": 20, "75": 500, "50": 1000}, 1200)
    [['head', '75'], ['50']]
    """
    groups: list[list[str]] = []
    left = 0
    for level, size in sizes.items():
        if not groups or size > left:
            groups.append([])
            left = limit
        groups[-1].append(level)
        left -= size
    return groups


def _why(
    chosen: Sequence[Kept], groups: Sequence[Sequence[str]], sizes: Mapping[str, int], limit: int, is_known: bool
) -> str:
    """One line: what is kept at once, how much it saves, and who comes afterwards."""
    first, *later = groups
    used = sum(sizes[level] for level in first)
    both = len(first) > 1
    line = (
        f"the rows of all levels would take {bytes_in_words(sum(sizes.values()))}: "
        f"{listed(map(in_words, first))} {'are' if both else 'is'} kept first ({bytes_in_words(used)} of "
        f"{bytes_in_words(limit)})"
    )
    if chosen:
        saved = chosen[0].seconds_saved
        line += (
            f", since {'they save' if both else 'it saves'} most over the planned epochs: {saved:,.1f} s, filling "
            f"deducted, or {saved / max(1, used) * 1e9:,.0f} s per GB"
        )
    else:
        line += f", the most recycled{', since no rows save time' if is_known else ''}"
    after = [level for group in later for level in group]
    return f"{line}; {listed(map(in_words, after))} {'take' if len(after) > 1 else 'takes'} turns afterwards"
