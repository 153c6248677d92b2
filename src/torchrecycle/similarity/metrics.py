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

from torchrecycle.errors import RecycleError

__all__ = ["NotFiniteError", "PairScores", "pair_ranks", "pair_scores", "r_precision", "r_precision_of_each"]


class NotFiniteError(RecycleError, ValueError):
    """An output of a model holds NaN or infinity, so no figure can be made of it."""


@torch.no_grad()
def r_precision_of_each(embeddings: Tensor, labels: Tensor, *, block: int = 1024) -> Tensor:
    """The share of relatives among each object's R nearest neighbours, R being how many relatives it has.

    Args:
        embeddings: ``[objects, dim]``, of any length: cosines are compared.
        labels: ``[objects]``, integers
        block: Objects compared with all others at a time: memory is ``block * objects`` numbers.

    Returns:
        ``[objects]``, float64, 0 to 1; NaN for an object without a relative, which is a neighbour of others but is not
        asked itself.

    Raises:
        ValueError: no object has a relative, so there is nothing to measure.
        NotFiniteError: an embedding is not finite.
    """
    unit = _unit(embeddings)
    _, group, sizes = labels.unique(return_inverse=True, return_counts=True)
    relatives = sizes[group] - 1
    asked = relatives.nonzero().squeeze(1)
    if not len(asked):
        raise ValueError("r_precision needs at least one label that two objects share, and there is none")
    most = int(relatives.max())
    shares = torch.full((len(labels),), torch.nan, dtype=torch.float64, device=labels.device)
    for rows in asked.split(block):
        similar = unit[rows] @ unit.T
        similar[torch.arange(len(rows)), rows] = -torch.inf  # an object is no neighbour of itself
        nearest = similar.topk(most, dim=1).indices
        hit = group[nearest] == group[rows, None]
        counted = torch.arange(most, device=hit.device) < relatives[rows, None]
        shares[rows] = (hit & counted).sum(1).double() / relatives[rows]
    return shares


def _unit(embeddings: Tensor) -> Tensor:
    """Of length one. What is not finite has no neighbours, and a ranking of it would be a figure about nothing."""
    if not embeddings.isfinite().all():
        raise NotFiniteError(
            "an embedding holds NaN or infinity, so there is nothing to rank: the training has diverged, or the "
            "weights that it began with hold some already"
        )
    return F.normalize(embeddings, dim=-1)


def r_precision(embeddings: Tensor, labels: Tensor, *, block: int = 1024) -> float:
    """The mean of `r_precision_of_each` over all objects that have a relative.

    Args:
        embeddings: ``[objects, dim]``, of any length: cosines are compared.
        labels: ``[objects]``, integers
        block: Objects compared with all others at a time.

    Raises:
        ValueError: no object has a relative, so there is nothing to measure.
        NotFiniteError: an embedding is not finite.
    """
    return float(r_precision_of_each(embeddings, labels, block=block).nanmean())


@dataclass(frozen=True, slots=True)
class PairScores:
    """How well answers are found from their questions."""

    precision_at_1: float
    """share of questions, 0 to 1, whose own answer is ranked first"""
    reciprocal_rank: float
    """mean of 1/rank of the own answer, 0 to 1"""


@torch.no_grad()
def pair_ranks(queries: Tensor, answers: Tensor, *, block: int = 1024) -> Tensor:
    """Where each query's own answer comes when all answers are ranked by cosine; the best rank is 1.

    An answer exactly as similar as the own one counts as ranked before it, so an encoder that gives the same
    embedding for everything ranks every answer last.

    Args:
        queries: ``[pairs, dim]``
        answers: ``[pairs, dim]``, row i belongs to query i
        block: Queries compared with all answers at a time.

    Returns:
        ``[pairs]``, integers from 1

    Raises:
        ValueError: the two sides differ in length or are empty.
        NotFiniteError: an embedding is not finite.
    """
    if len(queries) != len(answers) or not len(queries):
        raise ValueError(f"each query needs an answer: came {len(queries)} queries and {len(answers)} answers")
    left, right = _unit(queries), _unit(answers)
    ranks = []
    for start in range(0, len(left), block):
        similar = left[start : start + block] @ right.T
        rows = torch.arange(len(similar), device=similar.device)
        own = similar[rows, rows + start]
        ranks.append((similar >= own[:, None]).sum(1))
    return torch.cat(ranks)


def pair_scores(queries: Tensor, answers: Tensor, *, block: int = 1024) -> PairScores:
    """How well `pair_ranks` says that answers are found; an encoder that gives one embedding for everything scores
    1/pairs and not 1.

    Args:
        queries: ``[pairs, dim]``
        answers: ``[pairs, dim]``, row i belongs to query i
        block: Queries compared with all answers at a time.

    Raises:
        ValueError: the two sides differ in length or are empty.
        NotFiniteError: an embedding is not finite.
    """
    ranks = pair_ranks(queries, answers, block=block).double()
    return PairScores(float((ranks == 1).double().mean()), float((1 / ranks).mean()))
