"""Halves that anybody can find again: one trains, the other evaluates.

Labels are put in the order of a SHA-256 of a seed and their name, and the first half trains. No generator is asked, so
the halves are the same on every machine and in every version of Python, and a label added later moves few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["halves"]


def halves(labels: Iterable[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Distinct labels in two halves, each sorted; the first gets the odd one.

    >>> halves(["a", "b", "c", "a"])
    (['a', 'c'], ['b'])
    """
    order = sorted(set(labels), key=lambda label: hashlib.sha256(f"{seed}:{label}".encode()).digest())
    middle = (len(order) + 1) // 2
    return sorted(order[:middle]), sorted(order[middle:])
