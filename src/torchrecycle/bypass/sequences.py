"""The sequences of a model's inputs: which mask tells the padding of which input.

``input_ids`` and ``attention_mask`` are one sequence; an encoder-decoder has a second, ``decoder_input_ids`` under
``decoder_attention_mask``. Two texts of 9 and 12 tokens are padded to 12; their rows keep 9 and 12 places.

Images of several sizes are padded likewise, under a ``pixel_mask`` ``[batch, height, width]``. Convolutions look across
the border, so that what they give depends on the padding: such rows are kept whole, for the padded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from torchrecycle.bypass.forms import Size
from torchrecycle.bypass.inputs import Inputs
from torchrecycle.errors import BatchError

__all__ = ["Sequences", "sequences_of"]

USUAL = ("attention_mask", "decoder_attention_mask")
"""Masks that are known by their names; others are named with ``mask=``."""
USUAL_SPATIAL = ("pixel_mask",)


@dataclass(frozen=True, slots=True)
class Sequences:
    """The masks of a model's inputs. False where there is none."""

    masks: tuple[str, ...] = ()
    """``[batch, tokens]``: one sequence each, numbered in this order."""
    spatial: tuple[str, ...] = ()
    """``[batch, height, width]``: two further numbers each."""
    bare: tuple[str, ...] = ()
    """Token ids ``[batch, tokens]`` without a mask, whose padding is not known: one further number each. Their rows are
    kept whole."""
    known: tuple[tuple[str, int | None], ...] = ()
    """Which sequence each input of the example follows: features ``[batch, 16]`` beside texts of 16 tokens do not, once
    the example has shown texts of another length."""

    def __bool__(self) -> bool:
        return bool(self.masks or self.spatial or self.bare)

    def fewer(self) -> Sequences:
        """Without those that are told least surely, where the model does not take other lengths."""
        if self.bare:
            return replace(self, bare=())
        return replace(self, spatial=()) if self.spatial else Sequences()

    def lengths(self, inputs: Inputs) -> tuple[int, ...]:
        """The padded length of each sequence, then height and width of images; 0 where the call has no such mask."""
        tensors = inputs.tensors()
        found = [tensors[mask].shape[1] if mask in tensors else 0 for mask in self.masks]
        for mask in self.spatial:
            found += tensors[mask].shape[1:] if mask in tensors else (0, 0)
        found += [tensors[name].shape[1] if name in tensors else 0 for name in self.bare]
        return tuple(found)

    def size(self, inputs: Inputs) -> Size:
        """The size of a call's batch."""
        return (inputs.batch(), *self.lengths(inputs))

    def of(self, name: str, shape: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> int | None:
        """The number of the sequence that an input of that shape follows in its second dimension, if any."""
        for own, number in self.known:
            if own == name:
                return number
        if len(shape) < 2:
            return None
        fits = [
            number
            for number, mask in enumerate(self.masks)
            if mask in tensors
            and (name == mask or tuple(shape[:2]) == tuple(tensors[mask].shape))
            and (_side(mask) or not _side(name))
        ]
        own = [number for number in fits if self.masks[number] == name]
        if own or len(fits) < 2:
            return (own or fits or [None])[0]
        # Two sequences that happen to be of one length are told by their names.
        named = [n for n in fits if _side(self.masks[n]) == _side(name)]
        return (named or fits)[0]

    def followers(self, inputs: Inputs) -> Iterator[tuple[str, int]]:
        """The tensor inputs that follow a sequence, each with its number."""
        tensors = inputs.tensors()
        for name, tensor in tensors.items():
            number = self.of(name, tensor.shape, tensors)
            if number is not None:
                yield name, number

    def padded_names(self, inputs: Inputs) -> set[str]:
        """The inputs that a collate function pads, and must see for that."""
        tensors = inputs.tensors()
        images = {n for n, t in tensors.items() for one in self.bare if self._accompanies(n, t, one, tensors)}
        images |= {n for n, t in tensors.items() for mask in self.spatial if _follows_image(t, tensors.get(mask))}
        return images | {name for name, _ in self.followers(inputs)}

    def padded(
        self,
        inputs: Inputs,
        which: int,
        tokens: int,
        side: str = "right",
        read_before: frozenset[str] | None = None,
        fill_with: Literal["zero", "largest", "first"] = "zero",
    ) -> Inputs:
        """The same call with `tokens` more padded places in one sequence.

        Args:
            inputs: a call.
            which: the number of the sequence.
            tokens: how many places more.
            side: ``"right"`` or ``"left"``.
            read_before: the inputs that the prefix reads; labels among the others are padded with -100.
            fill_with: what of each input to put at the padded places: 0, its largest value, or its first.
        """
        following = {name for name, number in self.followers(inputs) if number == which}

        def padded(name: str, value: Any) -> Any:
            if name not in following:
                return value
            fills = {
                "zero": lambda: 0,
                "largest": lambda: value.max().item(),
                "first": lambda: value.flatten()[0].item(),
            }
            fill: Any = fills[fill_with]()
            if read_before is not None and name not in read_before and _is_label(name, value):
                fill = IGNORED
            shape = (value.shape[0], tokens, *value.shape[2:])
            more = value.new_full(shape, 0 if name == self.masks[which] else fill)
            return torch.cat([value, more] if side == "right" else [more, value], dim=1)

        return inputs.map(padded)

    def resized(self, inputs: Inputs, lengths: Sequence[int]) -> Inputs:
        """The same call with its sequences of other lengths, all of it tokens: cut off, or zeros appended."""
        following = dict(self.followers(inputs))
        tensors = inputs.tensors()
        bare = {name: lengths[len(lengths) - len(self.bare) + n] for n, name in enumerate(self.bare)}

        def resized(name: str, value: Any) -> Any:
            for leader, length in bare.items():
                if length and name not in following and self._accompanies(name, value, leader, tensors):
                    return _resized(value, length)
            for number, mask in enumerate(self.spatial):
                height, width = lengths[len(self.masks) + 2 * number :][:2]
                if height and _follows_image(value, tensors.get(mask)):
                    return _resized_image(value, height, width, whole=name == mask)
            if name not in following or not lengths[following[name]]:
                return value
            length = lengths[following[name]]
            return value.new_ones((value.shape[0], length)) if name in self.masks else _resized(value, length)

        return inputs.map(resized)

    def _accompanies(self, name: str, value: Any, leader: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether an input has a place for each token of a sequence without a mask."""
        if not isinstance(value, torch.Tensor) or leader not in tensors or value.dim() < 2:
            return False
        return value.shape[:2] == tensors[leader].shape and _side(name) == _side(leader)

    def without_padding(self, inputs: Inputs) -> Inputs:
        """The same call with every place a token."""
        tensors = inputs.tensors()
        masks = (*self.masks, *self.spatial)
        return inputs.replace({mask: torch.ones_like(tensors[mask]) for mask in masks if mask in tensors})


def _resized(value: torch.Tensor, length: int) -> torch.Tensor:
    made = value.new_zeros((value.shape[0], length, *value.shape[2:]))
    made[:, : value.shape[1]] = value[:, :length]
    return made


def _follows_image(value: Any, mask: torch.Tensor | None) -> bool:
    return (
        isinstance(value, torch.Tensor) and mask is not None and value.dim() > 2 and value.shape[-2:] == mask.shape[1:]
    )


def _resized_image(value: torch.Tensor, height: int, width: int, *, whole: bool) -> torch.Tensor:
    if whole:
        return value.new_ones((*value.shape[:-2], height, width))
    made = value.new_zeros((*value.shape[:-2], height, width))
    made[..., : value.shape[-2], : value.shape[-1]] = value[..., :height, :width]
    return made


IGNORED = -100
"""What PyTorch's losses pass over."""


def _is_label(name: str, value: torch.Tensor) -> bool:
    return not value.is_floating_point() and any(word in name.lower() for word in ("label", "target", "tag"))


def _side(name: str) -> bool:
    return name.rpartition(".")[2].startswith("decoder")


def sequences_of(inputs: Inputs, mask: str | Sequence[str] | None) -> Sequences:
    """The sequences of a call: those named by `mask`, or the usual ones.

    Raises:
        BatchError: `mask` is no input, or no tensor ``[batch, tokens]`` of zeros and ones.
    """
    tensors = inputs.tensors()
    asked = () if mask is None else (mask,) if isinstance(mask, str) else tuple(mask)
    for name in asked:
        if name not in tensors:
            raise BatchError(f"mask='{name}' is no tensor input of the example, which has {list(tensors)}")
        if not _is_mask(tensors[name], asked=True):
            value = tensors[name]
            raise BatchError(
                f"mask='{name}' is {list(value.shape)}, {value.dtype}; it must be [batch, tokens] or [batch, height, "
                "width] of zeros and ones"
            )
    found = asked or tuple(n for n in (*USUAL, *USUAL_SPATIAL) if n in tensors and _is_mask(tensors[n], asked=False))
    flat = tuple(name for name in found if tensors[name].dim() == 2)
    made = Sequences(flat, tuple(name for name in found if name not in flat))
    following = dict(made.followers(inputs))
    bare = tuple(name for name, t in tensors.items() if name not in following and _is_tokens(name, t))
    return replace(made, bare=bare, known=tuple((name, following.get(name)) for name in tensors))


def _is_tokens(name: str, value: torch.Tensor) -> bool:
    return name.rpartition(".")[2] in ("input_ids", "decoder_input_ids") and value.dim() == 2


def _is_mask(value: torch.Tensor, *, asked: bool) -> bool:
    plain = value.dim() in (2, 3) and (asked or not value.is_floating_point())
    return plain and bool(((value == 0) | (value == 1)).all())
