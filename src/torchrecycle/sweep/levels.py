"""Levels by name: ``full`` (0 % recycled), ``50``, ``75``, ``head`` (all of the trunk).

A name is what stands in tables, keys and options. A number from Python means the same: 0.5 is ``50``, 0 is ``full`` and
1 is ``head``. What was asked for is kept as the name; where the model is really cut is a matter of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchrecycle.sweep.plan import LEVELS, SweepError

__all__ = ["LEVELS", "parse_levels", "share_of"]


def parse_levels(levels: Iterable[str | float]) -> tuple[str, ...]:
    """Distinct levels from no recycling to all.

    Args:
        levels: names or shares; one text may hold several names, with commas between.

    >>> parse_levels(["head", "50", "full"]), parse_levels([0.75, 0.5]), parse_levels("50,head")
    (('full', '50', 'head'), ('50', '75'), ('50', 'head'))

    Raises:
        SweepError: one is no level, or there is none.
    """
    if isinstance(levels, str):
        levels = levels.split(",")
    elif not isinstance(levels, Iterable):
        raise SweepError(f"levels={levels!r} is one level: give several, such as levels=('full', '50', 'head')")
    found = {name for name in map(_name, levels) if name}
    if not found:
        raise SweepError("no level is given: --levels full,50,75,head")
    return tuple(sorted(found, key=share_of))


def _name(level: Any) -> str:
    if isinstance(level, (int, float)) and not isinstance(level, bool):
        if not 0 <= level <= 1:
            raise SweepError(f"{level!r} is no level: give the share that is recycled, from 0 to 1, or a name: '50'")
        return {0: "full", 100: "head"}.get(round(100 * level), f"{round(100 * level)}")
    if not isinstance(level, str):
        raise SweepError(f"{level!r} is no level: give 'full', 'head', '50' or 0.5")
    name = level.strip().removesuffix("%").strip()
    if name and name not in ("full", "head") and not (name.isdigit() and name.isascii() and 0 < int(name) < 100):
        raise SweepError(
            f"'{name}' is no level: give full, head, or how many per cent of the blocks are to be recycled, from 1 to "
            "99, such as --levels full,50,75,head"
        )
    return name


def share_of(level: str) -> float:
    """
    >>> share_of("full"), share_of("75"), share_of("head")
    (0.0, 0.75, 1.0)
    """
    return {"full": 0.0, "head": 1.0}[level] if level in ("full", "head") else int(level) / 100
