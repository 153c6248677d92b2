"""Encoders: from objects to what the head takes. Names are Quaterion's."""

from torchrecycle.similarity.encoders.base import (
    CollateFnType,
    Encoder,
    EncoderError,
    MetaExtractorFnType,
    TensorInterchange,
)
from torchrecycle.similarity.encoders.recycled import RecycledEncoder, TextInputs
from torchrecycle.similarity.encoders.switch import SwitchEncoder

__all__ = [
    "CollateFnType",
    "Encoder",
    "EncoderError",
    "MetaExtractorFnType",
    "RecycledEncoder",
    "SwitchEncoder",
    "TensorInterchange",
    "TextInputs",
]
