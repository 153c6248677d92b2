"""Heads: from what the encoders give to the embedding that is compared. Names and arguments are Quaterion's."""

from torchrecycle.similarity.heads.empty_head import EmptyHead
from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError
from torchrecycle.similarity.heads.gated_head import GatedHead
from torchrecycle.similarity.heads.residual import (
    HeadKind,
    ResidualHead,
    ResidualMlpHead,
    class_head,
    embedding_head,
)
from torchrecycle.similarity.heads.sequential_head import SequentialHead
from torchrecycle.similarity.heads.skip_connection_head import SkipConnectionHead
from torchrecycle.similarity.heads.softmax_head import SoftmaxEmbeddingsHead, SoftmaxHead
from torchrecycle.similarity.heads.stacked_projection_head import StackedProjectionHead
from torchrecycle.similarity.heads.switch_head import SwitchHead
from torchrecycle.similarity.heads.widening_head import WideningHead

__all__ = [
    "EmptyHead",
    "EncoderHead",
    "GatedHead",
    "HeadError",
    "HeadKind",
    "ResidualHead",
    "ResidualMlpHead",
    "SequentialHead",
    "SkipConnectionHead",
    "SoftmaxEmbeddingsHead",
    "SoftmaxHead",
    "StackedProjectionHead",
    "SwitchHead",
    "WideningHead",
    "class_head",
    "embedding_head",
]
