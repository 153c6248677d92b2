"""Losses on embeddings: one file each. What they have in common, and what they refuse, is in `base`.

What is pytorch-metric-learning's is loaded when such a loss is made.
"""

from torchrecycle.similarity.losses.arcface import ArcFaceLoss
from torchrecycle.similarity.losses.base import (
    GroupLoss,
    KnownGroupsLoss,
    LossError,
    LossTargetsError,
    PairwiseLoss,
    SimilarityLoss,
    XbmError,
)
from torchrecycle.similarity.losses.by_name import learns_classes, loss_by_name
from torchrecycle.similarity.losses.center import CenterLoss
from torchrecycle.similarity.losses.circle import CircleLoss
from torchrecycle.similarity.losses.contrastive import ContrastiveLoss
from torchrecycle.similarity.losses.cosface import CosFaceLoss
from torchrecycle.similarity.losses.cosine_softmax import CosineSoftmax
from torchrecycle.similarity.losses.fast_ap import FastAPLoss
from torchrecycle.similarity.losses.multiple_negatives_ranking import (
    MultipleNegativesRanking,
    MultipleNegativesRankingLoss,
)
from torchrecycle.similarity.losses.online_contrastive import OnlineContrastiveLoss
from torchrecycle.similarity.losses.softmax import SoftmaxLoss
from torchrecycle.similarity.losses.triplet import TripletLoss
from torchrecycle.similarity.losses.wrapper import PytorchMetricLearningPairWrapper, PytorchMetricLearningWrapper

__all__ = [
    "ArcFaceLoss",
    "CenterLoss",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CosineSoftmax",
    "FastAPLoss",
    "GroupLoss",
    "KnownGroupsLoss",
    "LossError",
    "LossTargetsError",
    "MultipleNegativesRanking",
    "MultipleNegativesRankingLoss",
    "OnlineContrastiveLoss",
    "PairwiseLoss",
    "PytorchMetricLearningPairWrapper",
    "PytorchMetricLearningWrapper",
    "SimilarityLoss",
    "SoftmaxLoss",
    "TripletLoss",
    "XbmError",
    "learns_classes",
    "loss_by_name",
]
