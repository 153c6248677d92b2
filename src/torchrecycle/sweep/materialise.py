"""What to keep where the store may not take all cuts: those that save most seconds over the planned epochs.

A sweep of a ViT-B/16 over 8,144 photos would keep 4.9 GB for 50 %, as much for 75 %, and 25 MB for head only; it may
keep 6 GB. For 50 and 75, six trainings of five epochs are planned each. The rows of 50 serve both: what lies between
the blocks 6 and 9 can be computed from them without the first six blocks. So 50 and head are kept, and 75 is trained
from the rows of 50, which saves two thirds of what its own would: 60 epochs of two thirds are more than 30 whole ones.

That is the materialisation problem of Nautilus (S. Nakandala, A. Kumar: Nautilus: An Optimized System for Deep Transfer
Learning over Evolving Training Datasets, SIGMOD 2022, section 4.2), for cuts that lie one behind the other. A set of
cuts K that fits saves

    sum over levels l of epochs(l) * max(0, max over b in K, b serves l, of saved(b))  -  max over b in K of fill(b)

where saved(b) is what reading the rows of b saves in an epoch against computing all again: the objects need not be
read, and the prefix of b does not run. It is the same for each level that b serves, since what comes after b is
computed either way. All that is kept is filled in one pass, in which the deepest prefix runs once: hence the max.

`choose` is exact: it tries a cut kept and not kept, and leaves a branch when even all that is left could not make it
the best. That takes no time for the handful of levels that a sweep has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrecycle.errors import RecycleError
from torchrecycle.sweep.results import Prediction

__all__ = ["Candidate", "Kept", "MaterialiseError", "candidates", "choose", "saved_by"]


class MaterialiseError(RecycleError, ValueError):
    """Candidates that contradict themselves or each other."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cut that could be kept."""

    level: str
    """Which: a name of its own among the candidates."""
    bytes: int
    """What its rows take in the store."""
    seconds_saved: float
    """By which an epoch with its rows is shorter than one with the same prefix computed again; negative where reading
    is slower."""
    epochs: float
    """How many epochs are planned with it, all trainings together."""
    fill_seconds: float = 0.0
    """Wall seconds of a pass that fills it alone."""
    after: tuple[str, ...] = ()
    """Levels from whose rows it can be computed without their prefix: cuts that lie before it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which cuts to keep, and what that gives."""

    levels: tuple[str, ...]
    """Those that are kept, in the order of the candidates."""
    read_from: dict[str, str | None]
    """For each candidate the kept level whose rows it is trained from: itself, one before it, or None where all is
    computed again."""
    bytes: int
    """What all that is kept takes."""
    seconds_saved: float
    """Over all planned epochs, less the pass that fills."""

    def __str__(self) -> str:
        """
        >>> print(choose([Candidate("50", 400, 2.0, 10), Candidate("75", 400, 3.0, 10, after=("50",))], 500))
        kept: 50 (400 B), which saves 40.0 s; 75 is computed from the rows of 50
        """
        from torchrecycle.store.sizes import bytes_in_words

        if not self.levels:
            return "nothing is kept: no cut saves time within the bytes allowed"
        parts = [
            f"kept: {', '.join(self.levels)} ({bytes_in_words(self.bytes)}), which saves {self.seconds_saved:.1f} s"
        ]
        for level, source in self.read_from.items():
            if source is None:
                parts.append(f"{level} is computed again")
            elif source != level:
                parts.append(f"{level} is computed from the rows of {source}")
        return "; ".join(parts)


def choose(cuts: Sequence[Candidate], max_bytes: int | None) -> Kept:
    """The cuts that together save most seconds over the planned epochs, within so many bytes.

    Of two sets that save as much, the one with fewer bytes is taken. A cut that saves nothing is not kept, also where
    there is room.

    Args:
        cuts: what could be kept, in any order.
        max_bytes: what may be kept; None for any amount.

    Raises:
        MaterialiseError: two candidates have one name, a number is none, or one is computed from a level that is no
            candidate.

    >>> half, head = Candidate("50", 400, 2.0, 10), Candidate("head", 100, 3.0, 90, after=("50",))
    >>> choose([half, head], 500).levels, choose([half, head], 450).levels, choose([half, head], 50).levels
    (('50', 'head'), ('head',), ())
    """
    _refuse_contradictions(cuts, max_bytes)
    room = math.inf if max_bytes is None else max_bytes
    order = sorted(range(len(cuts)), key=lambda number: -_promise(cuts[number]))
    best: tuple[float, int, tuple[int, ...]] = (0.0, 0, ())

    def search(at: int, kept: tuple[int, ...], used: int) -> None:
        nonlocal best
        chosen = [cuts[number] for number in kept]
        saved = saved_by(cuts, chosen)
        if (saved, -used) > (best[0], -best[1]):
            best = saved, used, kept
        most = _bound(cuts, chosen, [cuts[number] for number in order[at:]], room - used)
        if at == len(order) or most < best[0] or (most == best[0] and used >= best[1]):
            return
        number = order[at]
        if used + cuts[number].bytes <= room:
            search(at + 1, (*kept, number), used + cuts[number].bytes)
        search(at + 1, kept, used)

    search(0, (), 0)
    saved, used, numbers = best
    kept = [cuts[number] for number in sorted(numbers)]
    return Kept(tuple(cut.level for cut in kept), {cut.level: _source(cut, kept) for cut in cuts}, used, saved)


def saved_by(cuts: Sequence[Candidate], kept: Sequence[Candidate]) -> float:
    """Seconds that keeping some cuts saves over the planned epochs of all, less the pass that fills them.

    Args:
        cuts: what is trained.
        kept: of these, what is kept.
    """
    return _gained(cuts, kept) - _filling(kept)


def _gained(cuts: Sequence[Candidate], kept: Sequence[Candidate]) -> float:
    return sum(cut.epochs * max((0.0, *(b.seconds_saved for b in kept if _serves(b, cut)))) for cut in cuts)


def _serves(kept: Candidate, cut: Candidate) -> bool:
    return kept.level == cut.level or kept.level in cut.after


def _source(cut: Candidate, kept: Sequence[Candidate]) -> str | None:
    """The kept level that saves an epoch of a cut most; its own, if another saves no more."""
    serving = [each for each in kept if _serves(each, cut) and each.seconds_saved > 0]
    best = max(serving, key=lambda each: (each.seconds_saved, each.level == cut.level), default=None)
    return None if best is None else best.level


def _bound(cuts: Sequence[Candidate], kept: Sequence[Candidate], left: Sequence[Candidate], room: float) -> float:
    """No less than the best that can come of what is kept with any of what is left: all of it that fits by itself,
    filled for nothing."""
    return _gained(cuts, [*kept, *(cut for cut in left if cut.bytes <= room)]) - _filling(kept)


def _filling(kept: Sequence[Candidate]) -> float:
    return max((cut.fill_seconds for cut in kept), default=0.0)


def _promise(cut: Candidate) -> float:
    """Seconds saved per byte: in this order, a good set is found early, and most branches are left at once."""
    return cut.epochs * cut.seconds_saved / max(1, cut.bytes)


def _refuse_contradictions(cuts: Sequence[Candidate], max_bytes: int | None) -> None:
    if max_bytes is not None and max_bytes < 0:
        raise MaterialiseError(f"max_bytes={max_bytes} is less than nothing: give bytes, or None for any amount")
    names = [cut.level for cut in cuts]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise MaterialiseError(f"two candidates are called '{double}': give each level a name of its own")
    for cut in cuts:
        numbers = cut.bytes, cut.seconds_saved, cut.epochs, cut.fill_seconds
        if not all(math.isfinite(number) for number in numbers) or min(cut.bytes, cut.epochs, cut.fill_seconds) < 0:
            raise MaterialiseError(
                f"'{cut.level}' has bytes={cut.bytes}, seconds_saved={cut.seconds_saved}, epochs={cut.epochs}, "
                f"fill_seconds={cut.fill_seconds}: finite numbers are expected, and only what is saved may be negative"
            )
        unknown = set(cut.after) - set(names)
        if unknown or cut.level in cut.after:
            raise MaterialiseError(
                f"'{cut.level}' is said to be computed from {sorted(unknown) or 'itself'}: `after` names other "
                f"candidates, of {names}"
            )


def candidates(
    predictions: Sequence[Prediction], epochs: Mapping[str, float], *, nested: bool = True
) -> tuple[Candidate, ...]:
    """What could be kept, from what was predicted: cuts of a model that lie one behind the other.

    Args:
        predictions: one for each level, from the least recycled to the most, at one precision; full training is left
            out, as it keeps nothing.
        epochs: for each level, how many are planned, all trainings together.
        nested: whether a level can be trained from the rows of a cut before it; else from its own alone.

    Raises:
        MaterialiseError: a level comes twice (choose a precision first), or has no epochs planned.
    """
    found: list[Candidate] = []
    for one in predictions:
        if one.frozen_epoch_seconds is None:
            continue
        if one.level not in epochs:
            raise MaterialiseError(f"no epochs are planned for '{one.level}': epochs has {sorted(epochs)}")
        saved = one.frozen_epoch_seconds - one.epoch_seconds
        before = tuple(cut.level for cut in found) if nested else ()
        found.append(Candidate(one.level, one.bytes_kept, saved, epochs[one.level], one.fill_seconds, before))
    return tuple(found)
