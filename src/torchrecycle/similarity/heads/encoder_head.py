"""What every head is: from the embeddings of the encoders to the embedding that is compared.

An encoder of 384 numbers and one of 1,280 are joined to vectors of 1,664, so `configure_head` is given
``input_embedding_size=1664`` and returns a head that takes these. A head of one's own has an `output_size` and a
`transform`; dropout, checking, saving and loading come from here. Names, arguments and defaults are Quaterion's, so
that a class written for it runs.

Sizes are compared before torch does: its own message about mat1 and mat2 names neither head nor encoder.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.saving import load_module, save_module

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EncoderHead", "HeadError", "apply_head", "shown"]


class HeadError(RecycleError, ValueError):
    """A head does not fit what comes before it, or what it is told about itself."""


class EncoderHead(nn.Module):
    """Base of the heads: all that is trained where the encoders are frozen.

    Args:
        input_embedding_size: Width of what it takes: the sum of the encoders' `embedding_size`. None where it is not
            known, as of a `SequentialHead` that takes feature maps.
        dropout: Share of the input's numbers that training sets to nought, before `transform`.
        **kwargs: Ignored, as in Quaterion, whose heads hand on what they are given.
    """

    takes_vectors: bool = False
    """Whether the input's last dimension is what has the given width: ``[batch, dim]``, or ``[batch, tokens, dim]``.
    Else it may be any dimension but the first, as of feature maps ``[batch, dim, height, width]``."""

    def __init__(self, input_embedding_size: int | None, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__()
        self.input_embedding_size = None if input_embedding_size is None else _size(input_embedding_size)
        self._dropout_prob = dropout
        self.dropout: nn.Module = nn.Dropout(p=dropout) if dropout > 0.0 else nn.Identity()

    @property
    def output_size(self) -> int:
        """Width of the embeddings that come out."""
        raise NotImplementedError(f"{type(self).__name__} has no output_size: give it that property")

    def transform(self, input_vectors: Any) -> Tensor:
        """What this head does, after dropout.

        Args:
            input_vectors: ``[batch, input_embedding_size]``: what the encoders give, joined; of a single encoder,
                whatever it gives.

        Returns:
            embeddings ``[batch, output_size]``
        """
        raise NotImplementedError(f"{type(self).__name__} has no transform: give it that method")

    def forward(self, input_vectors: Any, meta: Sequence[dict[str, Any]] | None = None) -> Tensor:
        """Dropout, then `transform`.

        Args:
            input_vectors: as of `transform`.
            meta: what the encoders' meta extractors say of each object; only `SwitchHead` reads it.

        Raises:
            HeadError: the input is of another width than the head was made for.
        """
        self._must_fit(input_vectors)
        return self.transform(self.dropout(input_vectors))

    def _must_fit(self, input_vectors: Any) -> None:
        """
        Raises:
            HeadError: the input is of another width than the head was made for, or no tensor where one is needed.
        """
        if not isinstance(input_vectors, Tensor):
            if self.takes_vectors or isinstance(self.dropout, nn.Dropout):
                raise HeadError(
                    f"{type(self).__name__} takes a tensor, and got {shown(input_vectors)}: put a module before it, in "
                    "a SequentialHead, that makes one tensor of it"
                )
            return
        size, shape = self.input_embedding_size, input_vectors.shape
        if size is None or not shape:
            return
        fits = shape[-1] == size if self.takes_vectors else size in (shape[1:] or shape)
        if not fits:
            raise HeadError(f"{type(self).__name__} was made for inputs of width {size}{_and_got(size, shape)}")

    def get_config_dict(self) -> dict[str, Any]:
        """The constructor's arguments, of values that JSON knows: with them `load` makes the head again."""
        return {"input_embedding_size": self.input_embedding_size, "dropout": self._dropout_prob}

    def save(self, output_path: str | os.PathLike[str]) -> None:
        """Write the head into a folder, as `save_module` does: new, empty, or one that holds a saved head."""
        save_module(self, output_path)

    @classmethod
    def load(cls, input_path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written, as `load_module` does."""
        return load_module(input_path, expected=cls)


def _size(value: int) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise HeadError(f"input_embedding_size is {value!r}: it is to be a whole number from 1, or None if not known")
    return size


def _and_got(size: int, shape: Sequence[int]) -> str:
    got = f", and got {list(shape)}"
    if len(shape) == 4 and shape[1] == size:
        return f"{got}, which are feature maps. Put nn.AdaptiveAvgPool2d(1) and nn.Flatten() before it"
    width = shape[1] if len(shape) == 4 else shape[-1]
    return f"{got}. Make it with {width}, or let embedding_size of the encoder say what it gives"


def shown(value: Any) -> str:
    """What a value is, for messages.

    >>> import torch
    >>> shown(torch.zeros(2, 3)), shown((torch.zeros(1), 5)), shown("a text")
    ('[2, 3]', 'a tuple of 2', 'a str')
    """
    if isinstance(value, Tensor):
        return str(list(value.shape))
    many = isinstance(value, (tuple, list, dict))
    return f"a {type(value).__name__}{f' of {len(value)}' if many else ''}"


def apply_head(head: nn.Module, vectors: Any, meta: Sequence[dict[str, Any]] | None) -> Any:
    """Call a head, with meta if its forward takes it: of those written for early Quaterion it does not."""
    return head(vectors, meta=meta) if _takes_meta(type(head)) else head(vectors)


@functools.lru_cache(maxsize=256)
def _takes_meta(kind: type[nn.Module]) -> bool:
    return issubclass(kind, EncoderHead) and "meta" in inspect.signature(kind.forward).parameters
