"""A model run on its example at several sizes: what every plan for it starts from.

For a BERT and two texts of 9 tokens these are a batch of two, one of three, and two texts of 10, 12 and 12 tokens, of
which the first two are padded: from the six runs follow the laws of every output's shape. A model that takes no other
lengths is run at two batch sizes alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from torchrecycle.bypass.forms import Size, TreeForm, solve_tree
from torchrecycle.bypass.inputs import Inputs
from torchrecycle.bypass.interceptor import evaluating
from torchrecycle.bypass.sequences import Sequences
from torchrecycle.errors import CutError
from torchrecycle.trace import Call, Trace, trace

__all__ = ["Probes", "take_rows", "training"]


def take_rows(inputs: Inputs, index: Sequence[int]) -> Inputs:
    """The same call for some of its objects, in that order."""
    return inputs.take(index)


@dataclass(frozen=True, slots=True)
class Probes:
    """One model run on its example at several sizes: what every plan for this model starts from."""

    model: nn.Module
    inputs: Inputs
    """The example: two rows of it."""
    sequences: Sequences
    sizes: tuple[Size, ...]
    traces: tuple[Trace, ...] = field(repr=False)
    other_in_training: bool = False
    """Whether it calls other modules in training mode: auxiliary heads, fewer layers."""

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, sequences: Sequences) -> Probes:
        """Run the model in eval mode for two and for three objects, and with sequences of other lengths.

        A model that takes no other length has no padding either: its masks are inputs like any other.
        """
        two, three = take_rows(inputs, [0, 1]), take_rows(inputs, [0, 1, 0])
        with evaluating(model):
            traces = [trace(model, sample.args, sample.kwargs) for sample in (two, three)]
            if inspect.isgenerator(traces[0].output):
                raise CutError(
                    f"{type(model).__name__}'s forward is a generator: its layers run when somebody asks for the next "
                    "value, after the call has returned, so that no call can be cut. Recycle the module inside of it."
                )
            longer, more = _at_other_lengths(model, two, sequences)
            while sequences and not longer:
                sequences = sequences.fewer()
                longer, more = _at_other_lengths(model, two, sequences)
        sizes = [sequences.size(sample) for sample in (two, three, *longer)]
        other = _names_in_training(model, two) not in (None, [call.name for call in traces[0].calls])
        return cls(model, two, sequences, tuple(sizes), (*traces, *more), other)

    def form(self, call: Call) -> TreeForm | str:
        """The form of what a call returns, or in words why it has none."""
        same = [trace.calls[call.number] for trace in self.traces if call.number < len(trace.calls)]
        if len(same) < len(self.traces) or any(c.name != call.name for c in same):
            return "the model runs other layers for a batch of another size"
        return solve_tree([c.output for c in same], self.sizes)

    def form_here(self, call: Call) -> TreeForm | str:
        """Its form at the example's lengths alone, at which no dimension is free."""
        return solve_tree([trace.calls[call.number].output for trace in self.traces[:2]], self.sizes[:2])


def _names_in_training(model: nn.Module, inputs: Inputs) -> list[str] | None:
    """What the model calls in training mode, in order; None if it asks for more than the example there."""
    with training(model):
        try:
            return [call.name for call in trace(model, inputs.args, inputs.kwargs, keep_outputs=False).calls]
        except Exception:  # a detector without targets
            return None


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """All of the model in training mode, without gradient; flags as before afterwards."""
    flags = [(part, part.training) for part in model.modules()]
    for part, _ in flags:
        part.__dict__["training"] = True
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.__dict__["training"] = flag


def _at_other_lengths(model: nn.Module, inputs: Inputs, sequences: Sequences) -> tuple[list[Inputs], list[Trace]]:
    """The model run with one and with three places more, of padding and of tokens; fewer, where more are too many."""
    samples, traces = [], []
    lengths = sequences.lengths(inputs)

    def changed(which: int, by: int) -> Inputs:
        return sequences.resized(inputs, [max(1, n + by * (at == which)) for at, n in enumerate(lengths)])

    for which in range(len(lengths)):
        if which < len(sequences.masks):
            more = [sequences.padded(inputs, which, 1), sequences.padded(inputs, which, 3), changed(which, 3)]
            attempts = (more, [changed(which, -1), changed(which, -3)])
        elif which >= len(lengths) - len(sequences.bare):
            attempts = ([changed(which, 1), changed(which, 3)], [changed(which, -1), changed(which, -3)])
        else:
            attempts = ([changed(which, 32), changed(which, 64)], [changed(which, -32), changed(which, -16)])
        for attempt in attempts:
            try:
                found = [trace(model, sample.args, sample.kwargs) for sample in attempt]
            except Exception:  # too long for its table of positions, say
                continue
            samples += attempt
            traces += found
            break
        else:
            return [], []
    return samples, traces
