"""What of a batch is model input, and what is to be learned; what of a model's answer are scores or an embedding.

A batch of ``(images, labels)``: the model is called with the images. A batch that is a dict with ``labels``: the model
is called with its other entries by name, as transformers have it. What a model answers may be a tensor, a ModelOutput,
a dict or a tuple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.sweep.plan import SweepError
from torchrecycle.sweep.task import TARGETS

__all__ = ["PadBatch", "called", "divided", "embedding_of", "moved", "scores_of", "target_name"]


def target_name(batch: Mapping[str, Any], told: str | None, whose: str) -> str:
    """Under which name a dict holds what is to be learned.

    Raises:
        SweepError: under none that is known.
    """
    if told is not None:
        if told not in batch:
            raise SweepError(f"{whose}: a batch has no {told!r}, only {', '.join(map(repr, batch))}: give target=")
        return told
    found = next((name for name in TARGETS if name in batch), None)
    if found is None:
        raise SweepError(
            f"{whose}: a batch has {', '.join(map(repr, batch))}, and none of them is named {', '.join(TARGETS)}: give "
            "target='the name of what is to be learned'"
        )
    return found


def divided(batch: Any, told: str | None, whose: str) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch.

    Args:
        batch: ``(input, target)``, ``(one, other, target)``, or a dict.
        told: the name of the target in a dict, if it was given.
        whose: the task's name, for errors.

    Raises:
        SweepError: it is neither.
    """
    if isinstance(batch, Mapping):
        name = target_name(batch, told, whose)
        return {key: value for key, value in batch.items() if key != name}, _tensor(batch[name], whose)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return inputs, _tensor(batch[-1], whose)
    raise SweepError(
        f"{whose}: a batch is a {type(batch).__name__}, and (input, target) or a dict with 'labels' was expected: give "
        "such items, or collate= that makes such batches of them"
    )


def _tensor(target: Any, whose: str) -> Tensor:
    if isinstance(target, Tensor):
        return target
    raise SweepError(
        f"{whose}: the targets of a batch are a {type(target).__name__}, and a tensor was expected: give numbers as "
        "the targets of items"
    )


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, and whatever holds them; all else is as it was."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(each, device) for name, each in value.items()}
    return type(value)(moved(each, device) for each in value) if isinstance(value, (tuple, list)) else value


def called(model: nn.Module, inputs: Any) -> Any:
    """What a model answers: a dict is given by names, a tuple in its order."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def scores_of(output: Any, whose: str) -> Tensor:
    """The scores in an answer: itself, its ``logits``, or its first tensor.

    Raises:
        SweepError: there are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = output if isinstance(output, Tensor) else logits
    if found is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        found = output[0]
    if not isinstance(found, Tensor):
        raise SweepError(f"{whose}: the model gives a {type(output).__name__} without logits: give one that has scores")
    return found


def embedding_of(output: Any, inputs: Any, whose: str) -> Tensor:
    """One vector for each object, ``[batch, dim]``: what the model gives, its ``sentence_embedding``, or the mean of
    its last hidden state over the tokens that are no padding.

    Raises:
        SweepError: the model gives nothing of the kind.
    """
    named = output if isinstance(output, Mapping) else {}
    found = output if isinstance(output, Tensor) else named.get("sentence_embedding")
    hidden = getattr(output, "last_hidden_state", named.get("last_hidden_state"))
    if found is None and isinstance(hidden, Tensor):
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        weight = torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden.dtype)
        found = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    if not isinstance(found, Tensor) or found.dim() != 2:
        came = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise SweepError(f"{whose}: the model gives {came}, and one vector for each object was expected: [batch, dim]")
    return found


class PadBatch:
    """A collate function for items that are dicts: texts padded behind to the longest of the batch, all else stacked.

    A mask of the padding comes with them, if the items have none.

    Args:
        padding: of ``input_ids``.
        target: the name of what is to be learned, padded with -100; the known names if None.
    """

    def __init__(self, padding: int = 0, target: str | None = None) -> None:
        self.padding, self.target = padding, target

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        items = [self._masked(item) for item in items]
        return {name: self._joined(name, [torch.as_tensor(item[name]) for item in items]) for name in items[0]}

    def _masked(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        if "input_ids" not in item or "attention_mask" in item:
            return item
        return {**item, "attention_mask": torch.ones(len(item["input_ids"]), dtype=torch.long)}

    def _joined(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() != 1 or len({len(tensor) for tensor in tensors}) == 1:
            return torch.stack(tensors)
        is_target = name == self.target if self.target is not None else name in TARGETS
        fill = self.padding if name == "input_ids" else -100 if is_target else 0
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
