"""Similarity learning on recycled layers: encoders, heads, losses, metrics and a trainer's model around them.

The names are those that users of Quaterion know (see ``docs/quaterion.md``). What needs Lightning, torchmetrics or
pytorch-metric-learning loads them when it is first asked for: ``from torchrecycle.similarity import pair_ranks`` loads
none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrecycle.similarity.cache import CacheConfig, CacheError, CacheType
    from torchrecycle.similarity.distances import Distance
    from torchrecycle.similarity.encoders import (
        CollateFnType,
        Encoder,
        EncoderError,
        MetaExtractorFnType,
        RecycledEncoder,
        SwitchEncoder,
        TensorInterchange,
        TextInputs,
    )
    from torchrecycle.similarity.evaluation import AttachedMetric, BaseSampler, Evaluator, GroupSampler, PairSampler
    from torchrecycle.similarity.fitting import Quaterion, evaluate, fit
    from torchrecycle.similarity.heads import (
        EmptyHead,
        EncoderHead,
        GatedHead,
        HeadError,
        ResidualHead,
        ResidualMlpHead,
        SequentialHead,
        SkipConnectionHead,
        SoftmaxEmbeddingsHead,
        StackedProjectionHead,
        SwitchHead,
        WideningHead,
    )
    from torchrecycle.similarity.loaders import (
        GroupBatches,
        GroupSimilarityDataLoader,
        PairSimilarityDataLoader,
        PairsSimilarityDataLoader,
        SimilarityDataLoader,
        SimilarityGroupDataset,
    )
    from torchrecycle.similarity.losses import (
        ArcFaceLoss,
        CenterLoss,
        CircleLoss,
        ContrastiveLoss,
        CosFaceLoss,
        CosineSoftmax,
        FastAPLoss,
        GroupLoss,
        LossError,
        LossTargetsError,
        MultipleNegativesRanking,
        MultipleNegativesRankingLoss,
        OnlineContrastiveLoss,
        PairwiseLoss,
        PytorchMetricLearningPairWrapper,
        PytorchMetricLearningWrapper,
        SimilarityLoss,
        SoftmaxLoss,
        TripletLoss,
        XbmError,
    )
    from torchrecycle.similarity.metrics import (
        Groups,
        NothingToAskError,
        Pairs,
        PairScores,
        measure,
        pair_ranks,
        pair_scores,
        r_precision,
        r_precision_of_each,
    )
    from torchrecycle.similarity.model import DEFAULT_ENCODER_KEY, MetricModel, SimilarityModel
    from torchrecycle.similarity.parts import SharedWeightsError
    from torchrecycle.similarity.retrieval import (
        RetrievalMAP,
        RetrievalMetric,
        RetrievalPrecision,
        RetrievalRecall,
        RetrievalReciprocalRank,
        RetrievalRPrecision,
    )
    from torchrecycle.similarity.samples import SimilarityGroupSample, SimilarityPairSample, SimilaritySample
    from torchrecycle.similarity.search import (
        Found,
        IndexReport,
        MissingIndexError,
        OtherModelError,
        OtherObjectsError,
        SearchError,
        SearchIndex,
        index,
    )
    from torchrecycle.similarity.teaching import NothingToLearnError
    from torchrecycle.similarity.trainable import TrainableModel, TrainStage
    from torchrecycle.similarity.xbm import XbmBuffer, XbmConfig, XbmDevice

_ROOMS = {
    "cache": "CacheConfig CacheError CacheType",
    "distances": "Distance",
    "encoders": "CollateFnType Encoder EncoderError MetaExtractorFnType RecycledEncoder SwitchEncoder "
    "TensorInterchange TextInputs",
    "evaluation": "AttachedMetric BaseSampler Evaluator GroupSampler PairSampler",
    "fitting": "Quaterion evaluate fit",
    "heads": "EmptyHead EncoderHead GatedHead HeadError ResidualHead ResidualMlpHead SequentialHead SkipConnectionHead "
    "SoftmaxEmbeddingsHead StackedProjectionHead SwitchHead WideningHead",
    "loaders": "GroupBatches GroupSimilarityDataLoader PairSimilarityDataLoader PairsSimilarityDataLoader "
    "SimilarityDataLoader SimilarityGroupDataset",
    "losses": "ArcFaceLoss CenterLoss CircleLoss ContrastiveLoss CosFaceLoss CosineSoftmax FastAPLoss GroupLoss "
    "LossError LossTargetsError MultipleNegativesRanking MultipleNegativesRankingLoss OnlineContrastiveLoss "
    "PairwiseLoss "
    "PytorchMetricLearningPairWrapper PytorchMetricLearningWrapper SimilarityLoss SoftmaxLoss TripletLoss XbmError",
    "metrics": "Groups NothingToAskError PairScores Pairs measure pair_ranks pair_scores r_precision "
    "r_precision_of_each",
    "parts": "SharedWeightsError",
    "model": "DEFAULT_ENCODER_KEY MetricModel SimilarityModel",
    "retrieval": "RetrievalMAP RetrievalMetric RetrievalPrecision RetrievalRecall RetrievalReciprocalRank "
    "RetrievalRPrecision",
    "samples": "SimilarityGroupSample SimilarityPairSample SimilaritySample",
    "search": "Found IndexReport MissingIndexError OtherModelError OtherObjectsError SearchError SearchIndex index",
    "teaching": "NothingToLearnError",
    "trainable": "TrainStage TrainableModel",
    "xbm": "XbmBuffer XbmConfig XbmDevice",
}
"""Where each name is. A room that needs a package of the extra `similarity` is loaded when it is asked for."""

_WHERE = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = list(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]

_OF_THE_EXTRA = ("pytorch_lightning", "pytorch_metric_learning", "torchmetrics", "qdrant_client")


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name in _OF_THE_EXTRA:
            message = f'{name} needs {error.name}: pip install "torchrecycle[similarity]"'
            raise ModuleNotFoundError(message, name=error.name) from error
        raise
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
