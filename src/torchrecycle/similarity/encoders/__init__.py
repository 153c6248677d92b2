"""Encoders: from objects to what the head takes. Names are Quaterion's."""

from torchrecycle.similarity.encoders.base import Encoder, EncoderError
from torchrecycle.similarity.encoders.recycled import RecycledEncoder, TextInputs
from torchrecycle.similarity.encoders.switch import SwitchEncoder

__all__ = ["Encoder", "EncoderError", "RecycledEncoder", "SwitchEncoder", "TextInputs"]
