"""Which objects of a batch are compared: whose group is the same, whose is another, and which are the hardest of each.

Groups ``0 0 1`` have two ordered pairs of one group, (0, 1) and (1, 0), and four of two: (0, 2), (1, 2), (2, 0), (2,
1). The *anchor* is the row, a *positive* is of its group, a *negative* of another. The hardest positive is the
farthest, the hardest negative the nearest.

Nothing here needs a gradient: what is chosen is chosen, and its distance is then taken from the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Hardest", "hardest", "masks"]


def masks(groups: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which columns are positives of each anchor, and which are negatives.

    Args:
        groups: ``[batch]``, of the anchors.
        others: ``[columns]``; if None, the columns are the anchors themselves, and none is its own positive.

    Returns:
        two of ``[batch, columns]``, bool
    """
    same = groups[:, None] == (groups if others is None else others)
    negative = ~same
    return same.fill_diagonal_(False) if others is None else same, negative


class Hardest(NamedTuple):
    """The hardest objects for each anchor, ``[batch]`` each."""

    positive: Tensor
    """Column of the farthest positive; any where there is none."""
    negative: Tensor
    """Column of the nearest negative; any where there is none."""
    has_positive: Tensor
    """Whether there is a positive."""
    has_negative: Tensor
    """Whether there is a negative."""


@torch.no_grad()
def hardest(distances: Tensor, positive: Tensor, negative: Tensor) -> Hardest:
    """The farthest positive and the nearest negative of each anchor.

    Args:
        distances: ``[batch, columns]``
        positive: ``[batch, columns]``, bool
        negative: ``[batch, columns]``, bool
    """
    farthest = distances.masked_fill(~positive, -torch.inf).max(1)
    nearest = distances.masked_fill(~negative, torch.inf).min(1)
    return Hardest(farthest.indices, nearest.indices, positive.any(1), negative.any(1))
