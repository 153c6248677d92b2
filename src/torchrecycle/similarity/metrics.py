"""How good are embeddings at finding what belongs together? Two answers, one for classes and one for pairs.

*R-precision*, for objects with a class: an emoji in six skin tones has R = 5 relatives; of its 5 nearest neighbours,
the share that are relatives; the mean over all objects. 1.0 means that every class lies in a clump of its own.

*Precision@1 and reciprocal rank*, for pairs: rank all answers for a question; how often is its own first, and what is
the mean of 1/rank.

Similarities are computed a block of rows at a time, so that 100,000 objects ask for 1,000 x 100,000 numbers at once and
not for their square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PairScores", "pair_scores", "r_precision"]


@torch.no_grad()
def r_precision(embeddings: Tensor, labels: Tensor, *, block: int = 1024) -> float:
    """Mean share of relatives among each object's R nearest neighbours, R being how many relatives it has.

    Objects without a relative are neighbours of others but are not asked themselves.

    Args:
        embeddings: ``[objects, dim]``, of any length: cosines are compared.
        labels: ``[objects]``, integers
        block: Objects compared with all others at a time: memory is ``block * objects`` numbers.

    Raises:
        ValueError: no object has a relative, so there is nothing to measure.
    """
    unit = F.normalize(embeddings, dim=-1)
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    relatives = sizes[group] - 1
    asked = relatives.nonzero().squeeze(1)
    if not len(asked):
        raise ValueError("r_precision needs at least one label that two objects share, and there is none")
    most = int(relatives.max())
    total = 0.0
    for rows in asked.split(block):
        similar = unit[rows] @ unit.T
        similar[torch.arange(len(rows)), rows] = -torch.inf  # an object is no neighbour of itself
        nearest = similar.topk(most, dim=1).indices
        hit = group[nearest] == group[rows, None]
        counted = torch.arange(most, device=hit.device) < relatives[rows, None]
        total += float(((hit & counted).sum(1).double() / relatives[rows]).sum())
    return total / len(asked)


@dataclass(frozen=True, slots=True)
class PairScores:
    """How well answers are found from their questions."""

    precision_at_1: float
    """share of questions, 0 to 1, whose own answer is ranked first"""
    reciprocal_rank: float
    """mean of 1/rank of the own answer, 0 to 1"""


@torch.no_grad()
def pair_scores(queries: Tensor, answers: Tensor, *, block: int = 1024) -> PairScores:
    """Rank all answers for each query by cosine.

    An answer exactly as similar as the own one counts as ranked before it, so an encoder that gives the same
    embedding for everything scores 1/pairs and not 1.

    Args:
        queries: ``[pairs, dim]``
        answers: ``[pairs, dim]``, row i belongs to query i
        block: Queries compared with all answers at a time.

    Raises:
        ValueError: the two sides differ in length, or are empty.
    """
    if len(queries) != len(answers) or not len(queries):
        raise ValueError(
            f"pair_scores needs an answer for each query: came {len(queries)} queries and {len(answers)} answers"
        )
    left, right = F.normalize(queries, dim=-1), F.normalize(answers, dim=-1)
    first, reciprocal = 0, 0.0
    for start in range(0, len(left), block):
        similar = left[start : start + block] @ right.T
        rows = torch.arange(len(similar), device=similar.device)
        own = similar[rows, rows + start]
        rank = (similar >= own[:, None]).sum(1)
        first += int((rank == 1).sum())
        reciprocal += float((1.0 / rank.double()).sum())
    return PairScores(first / len(left), reciprocal / len(left))
