"""Sentence-Transformers: rows for a trainer that tokenises, joins and cuts its batches by itself.

    recycling = recycle_sentences(model, pairs, level=0.5, store="activations/")
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)    # as ever
    trainer.train()
    recycling.detach()

Of 100,000 pairs (anchor, positive) each text is tokenised and computed once, column by column, as the trainer's collate
function does it. The trainer itself takes no other data set than one of ``datasets``, and its losses do with the tokens
what they like: the multiple-negatives loss joins the columns after the first, its cached variant cuts a batch of 1,024
into pieces of 32, drops the padding that a piece does not need, and embeds each piece twice. No batch that carries rows
would come through that whole. Hence the rows are found where the tokens arrive in the end, at the model
(`Recycling.looks_up`): by the content of each text without its padding, which takes 10 microseconds.

The prefix lies in the first module of the model, ``model[0]``; pooling and whatever follows run as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchrecycle.errors import BatchError
from torchrecycle.recycling import Recycling, recycle
from torchrecycle.store import Store

__all__ = ["recycle_sentences"]

TEXTS = ("a short text", "a text that is longer than the other one, so that the other one has to be padded")
"""The example that a model is tried on."""


def recycle_sentences(
    model: Any,
    *datasets: Any,
    cut: str | Sequence[str] | None = None,
    level: float | None = None,
    store: str | os.PathLike[str] | Store,
    data_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    precision: str | None = None,
    autocast: torch.dtype | None = None,
) -> Recycling:
    """Freeze a ``SentenceTransformer`` up to a cut, and keep what that prefix computes for each text of the data sets.

    Trainer, arguments, data sets, losses and evaluators stay as they are. A text that is in none of the data sets, or
    that comes under another prompt, is computed in full, as without us.

    Args:
        model: a ``SentenceTransformer`` whose first module is a ``Transformer``.
        *datasets: what the trainer is given for training and evaluation: a map-style ``datasets.Dataset``, or a dict
            of them. Each column but the labels is filled.
        cut: the name of a module of ``model[0]``, such as ``"model.encoder.layer.2"``. See ``cuts(model[0], ...)``.
        level: in place of `cut`, the share of the blocks to recycle: 0.5 is the usual choice.
        store: see `torchrecycle.recycle`.
        data_collator: the trainer's, if it is not the usual one: ``trainer.data_collator``, where prompts or a router
            are used.
        batch_size: texts per prefix run at fill.
        precision: of kept rows; see `torchrecycle.recycle`.
        autocast: the dtype of the trainer's autocast, if it uses one (``bf16=True``: ``torch.bfloat16``).

    Returns:
        The recycling of ``model[0]``, filled; ``detach()`` it when training is done.

    Raises:
        TypeError: the model is none of Sentence-Transformers.
        CutError: it cannot be divided there, in words.
        BatchError: it takes no tokens, or a data set has no length.
    """
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    example = _example(model)
    collate = data_collator or SentenceTransformerDataCollator(preprocess_fn=model.preprocess)
    recycling = recycle(
        model[0],
        (example,),
        cut=cut,
        level=level,
        store=store,
        precision=precision,
        autocast=autocast,
        mask="features.attention_mask",
    )
    try:
        for dataset in datasets:
            for column, features in _columns(dataset, collate, tuple(example)):
                recycling.fill(column, batch_size=batch_size, collate_fn=features)
    except BaseException:
        recycling.detach()
        raise
    recycling.looks_up = True
    return recycling


def _example(model: Any) -> dict[str, torch.Tensor]:
    """Two texts as the model takes them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"model is a {type(model).__name__}, not a SentenceTransformer: use recycle(model, example, ...)"
        )
    first: nn.Module = model[0]
    if not isinstance(first, Transformer):
        raise BatchError(
            f"the model begins with a {type(first).__name__}: there are layers to recycle only in a Transformer"
        )
    features = model.preprocess(list(TEXTS))
    tokens = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    if not {"input_ids", "attention_mask"} <= tokens.keys() or any(len(value) != 2 for value in tokens.values()):
        shapes = {name: list(value.shape) for name, value in tokens.items()}
        raise BatchError(
            f"the model makes {shapes} of two texts: to tell them apart it takes input_ids and attention_mask "
            "[batch, tokens]. Load it without flattening (unpad_inputs=False), or with a text model first."
        )
    return {name: value.to(model.device) for name, value in tokens.items()}


def _columns(dataset: Any, collate: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, _Features]]:
    """Each column of a data set that the trainer makes model inputs of, and how it makes them."""
    parts = dataset.items() if isinstance(dataset, Mapping) else [(None, dataset)]
    for name, part in parts:
        if not hasattr(part, "select_columns") or not hasattr(part, "__len__"):
            raise BatchError(
                f"a {type(part).__name__} cannot be filled: give a map-style datasets.Dataset, or a dict of them, as "
                "the trainer gets it"
            )
        labels = {*getattr(collate, "valid_label_columns", ()), "dataset_name"}
        columns = [column for column in part.column_names if column not in labels]
        for column in columns:  # beside the others, since its place among them may tell its prompt
            yield part.select_columns(columns), _Features(collate, column, name, names)


class _Features:
    """The collate function of one column: what the trainer's makes of its texts, as the model takes them."""

    def __init__(self, collate: Any, column: str, dataset: str | None, names: tuple[str, ...]) -> None:
        self.collate, self.column, self.dataset, self.names = collate, column, dataset, names

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor]]:
        named = {} if self.dataset is None else {"dataset_name": self.dataset}
        batch = self.collate([{**named, **item} for item in items])
        return ({name: batch[f"{self.column}_{name}"] for name in self.names},)

    def __recycle_state__(self) -> Any:
        # It leads to the model through the tokenising method: one fill, one state.
        return id(self)
