"""What of a batch is model input: read off the example, or said by ``inputs=``.

The example ``images`` says that the batch, or its first element, is the input; ``(left, right)`` that the first two
are, as positional arguments; ``{"input_ids": ..., "attention_mask": ...}`` that these keys are, as keyword arguments.
Everything else in a batch is a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from torchrecycle.bypass.inputs import Inputs
from torchrecycle.bypass.interceptor import Interceptor, evaluating
from torchrecycle.errors import BatchError
from torchrecycle.trace import undisturbed

__all__ = ["BatchRule", "device_of", "example_inputs", "run_or_explain"]


class BatchRule:
    """Finds the model inputs of a batch. Pickles to workers, if `inputs` does.

    Args:
        names: the names of the positional parameters of the model's forward.
        example: the batch of the user's loop, or its inputs.
        inputs: ``batch -> (args, kwargs)``, in place of what the example says.
    """

    def __init__(
        self,
        names: Sequence[str],
        example: Any,
        inputs: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
    ) -> None:
        self.names = tuple(names)
        self._inputs = inputs
        self.lists: frozenset[str] = frozenset()
        """Model inputs that are a list with one tensor per object; found out by `example_inputs`."""
        self._keys = tuple(example) if isinstance(example, Mapping) else ()
        self._count = len(example) if isinstance(example, (tuple, list)) else 0
        if inputs is None and isinstance(example, (Mapping, tuple, list)) and not example:
            raise BatchError("the example is empty: give a batch of two objects or more, as your loop has it")
        if inputs is None and not isinstance(example, (torch.Tensor, Mapping, tuple, list)):
            raise BatchError(
                f"the example is a {type(example).__name__}; give the model inputs of a batch as your loop has them: a "
                "tensor, a tuple of positional arguments, a dict of keyword arguments, or pass inputs=lambda batch: "
                "(args, kwargs)"
            )

    def __call__(self, batch: Any) -> Inputs:
        """The model inputs of a batch.

        Raises:
            BatchError: the batch does not fit the example.
        """
        if self._inputs is not None:
            found = self._inputs(batch)
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
                raise BatchError(
                    f"inputs= gives a {type(found).__name__}; it must give (args, kwargs): a tuple and a dict, such as "
                    "lambda batch: ((batch[0],), {})"
                )
            args = found[0] if isinstance(found[0], (tuple, list)) else (found[0],)
            return Inputs(self.names, args, found[1], self.lists)
        if self._keys:
            return self._from_mapping(batch)
        if self._count:
            return self._from_sequence(batch)
        first = batch if isinstance(batch, torch.Tensor) else self._elements(batch, 1)[0]
        if not isinstance(first, torch.Tensor):
            raise BatchError(
                f"a batch begins with a {type(first).__name__} where the example is a tensor. If the model input is "
                "elsewhere in the batch, pass inputs=lambda batch: (args, kwargs)."
            )
        return Inputs(self.names, [first], {}, self.lists)

    def _from_mapping(self, batch: Any) -> Inputs:
        if not isinstance(batch, Mapping):
            raise BatchError(
                f"a batch is a {type(batch).__name__} where the example is a dict with the keys {list(self._keys)}"
            )
        missing = [name for name in self._keys if name not in batch]
        if missing:
            raise BatchError(
                f"a batch has no {missing}, which the example has; it has {list(batch)}. Make the recycling with an "
                "example of the same keys, or pass inputs=lambda batch: (args, kwargs)."
            )
        return Inputs(self.names, [], {name: batch[name] for name in self._keys}, self.lists)

    def _from_sequence(self, batch: Any) -> Inputs:
        return Inputs(self.names, self._elements(batch, self._count), {}, self.lists)

    def _elements(self, batch: Any, count: int) -> Sequence[Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) < count:
            held = f"{len(batch)} elements" if isinstance(batch, (tuple, list)) else f"type {type(batch).__name__}"
            raise BatchError(
                f"a batch of {held} came where the example asks for {count} or more in a tuple. Pass inputs=lambda "
                "batch: (args, kwargs) to say where the model inputs are."
            )
        return batch[:count]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies that was not put away; the CPU if it has none."""
    interceptor = Interceptor.of(model)
    offloaded = None if interceptor is None else interceptor.offloaded
    if offloaded is None:
        first = next(iter(model.parameters()), None)
        return torch.device("cpu") if first is None else first.device
    first = next((p for p in model.parameters() if id(p) not in offloaded.ids), None)
    return offloaded.last_home if first is None else first.device


def example_inputs(model: nn.Module, rule: BatchRule, example: Any) -> Inputs:
    """The example as the model is called with it, on the model's device.

    Raises:
        BatchError: it holds no tensor, fewer than two objects, or tensors that do not agree on their number.
    """
    unmade = next((n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if unmade is not None:
        raise BatchError(
            f"'{unmade}' has no shape yet (a lazy module): run the model once on a batch, then attach. What is tried "
            "here is undone, and a lazy module cannot be unmade."
        )
    listed = _lists_of(rule(example))
    if listed and not _runs(model, rule, example):
        rule.lists = listed
        if not _runs(model, rule, example):
            rule.lists = frozenset()
    inputs = rule(example)
    tensors = inputs.tensors()
    if not tensors:
        raise BatchError("the example holds no tensor: give a batch of two objects or more, as your loop has it")
    sizes = _sizes(inputs)
    if min(sizes.values()) < 2 or len(set(sizes.values())) > 1:
        raise BatchError(
            f"the example's tensors have the first dimensions {sizes}; each must count the objects of the batch, two "
            "or more. Only model inputs belong into the example, no targets."
        )
    device = device_of(model)
    return inputs.map_tensors(lambda tensor: tensor.detach().to(device))


def _sizes(inputs: Inputs) -> dict[str, int]:
    return {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in inputs.tensors().items()}


def _lists_of(inputs: Inputs) -> frozenset[str]:
    """The arguments that are lists of tensors: several inputs, or one input as a list of objects."""
    named = [(inputs.names[i] if i < len(inputs.names) else str(i), v) for i, v in enumerate(inputs.args)]
    return frozenset(
        name
        for name, value in (*named, *inputs.kwargs.items())
        if isinstance(value, (tuple, list)) and value and all(isinstance(part, torch.Tensor) for part in value)
    )


def _runs(model: nn.Module, rule: BatchRule, example: Any) -> bool:
    """Whether the example's tensors count the same objects, and the model runs on two of them."""
    device = device_of(model)
    try:
        inputs = rule(example)
        sizes = set(_sizes(inputs).values())
        if len(sizes) > 1 or min(sizes) < 2:
            return False
        two = inputs.take([0, 1]).map_tensors(lambda tensor: tensor.detach().to(device))
        with undisturbed(model), evaluating(model):
            model(*two.args, **two.kwargs)
    except Exception:  # the model's own, whatever it is; the reading that runs is the right one
        return False
    return True


def run_or_explain(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run the model on the example; its own error becomes one that says so."""
    try:
        return run()
    except (TypeError, RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if type(error).__module__.startswith("torchrecycle"):
            raise
        raise BatchError(
            f"{type(model).__name__} does not run on the example: {type(error).__name__}: {error}. The example is a "
            "batch as your loop gives it to the model: a tensor is the one input, a tuple positional arguments, a "
            "dict keyword arguments."
        ) from error
