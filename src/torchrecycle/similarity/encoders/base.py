"""What an encoder is: objects -> model inputs -> what the head takes.

An encoder of texts turns ``["a text", "another"]`` into padded token ids by its collate function, in a worker process,
and these into vectors ``[2, 384]`` by its forward. It may also give feature maps ``[2, 256, 14, 14]``, token sequences
or a nest of tensors, if it is the only encoder and the head takes them. Names are Quaterion's, so that a class written
for it runs.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.utils.data import default_collate

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.saving import load_module, save_module

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CollateFnType", "Encoder", "EncoderError", "MetaExtractorFnType", "TensorInterchange", "must_be_names"]

TensorInterchange = Any
"""What a collate function gives: a tensor, or a nest with tensors in it."""
CollateFnType = Callable[[list[Any]], TensorInterchange]
MetaExtractorFnType = Callable[[list[Any]], list[dict[str, Any]]]


class EncoderError(RecycleError, ValueError):
    """An encoder gives something else than it says, or cannot be used as it is."""


class Encoder(nn.Module, ABC):
    """Base of the encoders."""

    @property
    @abstractmethod
    def trainable(self) -> bool:
        """Whether it is trained. One that is not is frozen and stays in eval mode, and what it gives can be kept."""

    @property
    @abstractmethod
    def embedding_size(self) -> int:
        """Width of the vectors that it gives; of maps or tokens, what the head is told of them."""

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """What the collate function gives -> vectors ``[batch, embedding_size]``, or what else the head takes.

        The first dimension of each tensor counts the objects.
        """

    def get_collate_fn(self) -> CollateFnType:
        """From a list of objects to what `forward` takes: `default_collate`, unless there is another.

        It is run in workers, so it should pickle: a function of a module, or a method if the encoder is not large.
        """
        return default_collate

    @classmethod
    def extract_meta(cls, batch: list[Any]) -> list[dict[str, Any]]:
        """A dict for each object of a list: empty ones, unless a class says more."""
        return [{} for _ in batch]

    def get_meta_extractor(self) -> MetaExtractorFnType:
        """From a list of objects to a dict for each, which the head is given: `extract_meta` unless overridden."""
        return self.extract_meta

    def says_meta(self) -> bool:
        """Whether a class says something of its objects."""
        own = type(self).get_meta_extractor is not Encoder.get_meta_extractor
        return own or getattr(self.extract_meta, "__func__", None) is not Encoder.extract_meta.__func__

    def disable_gradients_if_required(self) -> None:
        """Freeze the parameters of an encoder that is not trained. `SimilarityModel` calls it."""
        if not self.trainable:
            self.requires_grad_(False)

    def save(self, output_path: str | os.PathLike[str]) -> None:
        """Write the encoder into a folder, as `save_module` does. A class may write files of its own there instead.

        Args:
            output_path: new, empty, or one that holds a saved encoder.

        Raises:
            DescriptionError: the encoder holds something that is not saved; the message names it.
        """
        save_module(self, output_path)

    @classmethod
    def load(cls, input_path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written."""
        return load_module(input_path, expected=cls)


_Value = TypeVar("_Value")


def must_be_names(named: Mapping[str, _Value], what: str) -> dict[str, _Value]:
    """
    Raises:
        EncoderError: there is nothing, or a name cannot be one of a module and of a folder.
    """
    if not named:
        raise EncoderError(f"there is no {what.removeprefix('an ')}: give one or more")
    for name in named:
        whole = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("./\\:\0")
        if not whole or hasattr(nn.ModuleDict(), name):
            raise EncoderError(
                f"{name!r} cannot be the name of {what}: it names a module and a folder, so it is a word without dots, "
                "colons and slashes, and none that torch has for itself, as 'type' or 'keys'. Choose another one"
            )
    return dict(named)
