"""What one model of the zoo is: how to build it, what to feed it, and what its batches look like.

A case is cheap to list and expensive to make: `Case("timm", "vit_tiny_patch16_224", make, "vision_transformer")` costs
nothing until `make()` builds the model with random weights under a fixed seed. So a thousand cases can be listed in
every worker, and each is built in one of them. `Built.batch(4)` gives four objects as a training loop has them;
`Built.batch(3, tokens=11)` three others of another length, from another seed if told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Built:
    """A model with random weights, and how batches for it are made."""

    model: nn.Module
    """The model; its training flag is as it was built."""
    batch: Callable[..., Any]
    """`batch(objects, *, tokens=None, seed=0)`: what a loop gives to the model: a tensor, a tuple (positional), a dict
    (keywords), or a list of images for torchvision's detectors. Nothing is padded: masks are all ones."""
    tokens: int | None = None
    """The usual length of a sequence; None where the model has no sequence."""
    padded: tuple[str, ...] = ()
    """Entries of the dict whose dimension 1 is the sequence, and which may be padded (with 0, the mask with 0)."""
    mask: str | None = "attention_mask"
    """The mask among `padded`, if any."""
    mask_input: str | None = None
    """The mask's name as a model input, for `recycle(mask=...)`, where it is not `attention_mask`."""
    inputs: Callable[[Any], tuple[tuple, dict]] | None = None
    """For `recycle(inputs=...)`, where a batch does not say by its shape what is model input."""


@dataclass(frozen=True, slots=True)
class Case:
    """One model of a library."""

    library: str
    """"torchvision", "timm", "transformers", "sentence-transformers" or "diffusers"."""
    name: str
    """The model's name in its library."""
    make: Callable[[], Built]
    """Builds it under a fixed seed. It may raise: then the case is recorded as untested, with the error."""
    module: str = ""
    """timm: the architecture module; transformers: the family ("text encoder", ...); else empty."""
