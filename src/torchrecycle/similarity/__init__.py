"""Similarity learning: losses that pull together what belongs together, and metrics that say how well it worked."""

from torchrecycle.similarity.losses import CosineSoftmax, MultipleNegativesRanking
from torchrecycle.similarity.metrics import PairScores, pair_ranks, pair_scores, r_precision, r_precision_of_each

__all__ = [
    "CosineSoftmax",
    "MultipleNegativesRanking",
    "PairScores",
    "pair_ranks",
    "pair_scores",
    "r_precision",
    "r_precision_of_each",
]
