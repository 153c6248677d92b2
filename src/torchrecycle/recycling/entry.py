"""``recycle(model, example, level=0.5, store="activations/")``: arguments in, a `Recycling` out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from torchrecycle.codec import PRECISIONS
from torchrecycle.data.resident import Residency, refuse_residency
from torchrecycle.errors import CutError
from torchrecycle.recycling.arguments import (
    Options,
    refuse_arguments,
    refuse_no_function,
    refuse_views,
    refuse_wrapped,
)
from torchrecycle.recycling.attached import Recycling
from torchrecycle.store import Store, open_store

__all__ = ["recycle"]


def recycle(
    model: nn.Module,
    example: Any,
    *,
    cut: str | Sequence[str] | None = None,
    level: float | None = None,
    store: str | os.PathLike[str] | Store,
    precision: str | None = None,
    autocast: torch.dtype | None = None,
    inputs: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
    mask: str | Sequence[str] | None = None,
    key: Callable[[Any], Any] | None = None,
    views: int = 1,
    share: Literal["refuse", "freeze"] = "refuse",
    verify_every: int = 0,
    augment: Callable[[Any], Any] | None = None,
    resident: Residency | None = None,
) -> Recycling:
    """Freeze a model up to a cut, and keep what that prefix computes for each object.

    Args:
        model: any module. It stays the object that it was: same class, forward, hooks and ``state_dict``.
        example: a batch of two objects or more, as the user's loop has it: a tensor means that the batch, or its first
            element, is the model input; a tuple of n that the first n elements are; a dict that its keys are, as
            keyword arguments. All else in a batch is a target.
        cut: the name of the module whose output is kept; ``block#2`` for the second call of a module that is called
            several times; a list of names for a joint cut of parts that lie side by side, such as two towers. See
            `cuts`.
        level: in place of `cut`, the share of the blocks to recycle: 0.5 is the usual choice, 1 is head only.
        store: a folder (made when first written to), ``memory://name``, or a `Store`.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (with a scale for each row and channel)
            for kept rows; ``"auto"`` for the smallest of them whose error, on the example, stays below what another
            batch composition makes; the activation's own dtype if None.
        autocast: the dtype of the autocast that the loop uses around the model, if it does.
        inputs: ``batch -> (args, kwargs)``, in place of what the example says.
        mask: the name of the model input that tells padding, or several; ``attention_mask`` and
            ``decoder_attention_mask`` where they are.
        key: from a data set's item to whatever identifies it (a primary key, a path), in place of its content. Then
            ``name=`` must be given at `fill`, `loader` and `dataset`.
        views: in how many augmented versions each object is kept, made by the data set's own random transforms, each
            under a seed of object and view; an epoch draws one of each object, by ``torch.initial_seed()``. A data set
            that draws nothing has one. With 1, a random transform is refused.
        share: what to do with parameters that both halves read: refuse the cut, or freeze them.
        verify_every: every so many batches of a loader, one object is read and computed afresh and compared; 0 never.
        augment: changes the activations of each batch in training mode: a callable that takes what the cut gives for a
            batch (a tensor ``[batch, ...]``, or a list of them) and gives the same form back. See
            `torchrecycle.augment`. Without recycling (`paused`) it is called as well.
        resident: where loaders gather rows from: ``"disk"``: the files of the store; ``"ram"``: a copy in memory;
            ``"cuda"``: a copy on the model's GPU, from which the model gathers in its own call, so that batches hold
            no rows. If None: the GPU where the model is on one and a data set's rows fit a quarter of its free memory,
            else the disk. What does not fit is an error.

    The prefix is all that the model runs up to the cut: it is in eval mode and without gradient also under
    ``model.train()``, with what the modules around the cut do between its layers (dropout, LayerDrop).

    Raises:
        CutError: the model cannot be divided there, in words.
        BatchError: the model does not run on the example.
        StoreError: the folder is no store, or holds rows of a model that computes something else.
    """
    refuse_arguments(model, cut, level, store, autocast, inputs, key, verify_every)
    refuse_no_function(augment)
    refuse_residency(resident)
    if (cut is None) == (level is None):
        raise CutError("give either cut='layer2' or level=0.5. See cuts(model, example).")
    if precision is not None and precision not in (*PRECISIONS, "auto"):
        raise ValueError(f"precision={precision!r} is none of {[*PRECISIONS, 'auto']}")
    refuse_views(views)
    if share not in ("refuse", "freeze"):
        raise ValueError(f"share={share!r} is neither 'refuse' nor 'freeze'")
    refuse_wrapped(model)
    opened = open_store(store)
    return Recycling(
        model,
        Options(
            example,
            cut,
            level,
            opened,
            precision,
            autocast,
            inputs,
            mask,
            key,
            share,
            verify_every,
            views,
            augment,
            resident,
        ),
    )
