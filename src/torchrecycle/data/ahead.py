"""Rows on their way to the GPU while it computes.

64 rows of 400 KB take 1 ms over a PCIe bus. Copied in the stream in which the model runs, as a loop's ``.to(device)``
does, they wait for the step before to end, and the next step waits for them. So the loader copies what a batch carries
in a stream of its own, from pinned memory, as soon as the batch is made: Python is ahead of the GPU by then, and the
step before still computes. The loop's stream waits for the copy where it needs it, and nowhere else.

No batch is asked for earlier than without us, so that random numbers are drawn in the same order. A loop that waits for
the GPU in each step (``loss.item()``) has nothing to overlap with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchrecycle.absent import RecycledTensor
from torchrecycle.data.source import RowSource

__all__ = ["copied_ahead"]


def copied_ahead(batches: Iterator[Any], source: RowSource, device: torch.device) -> Iterator[Any]:
    """The batches, whose pinned rows are on their way to a GPU; as they come where it is none.

    Args:
        batches: of a loader.
        source: tells where model inputs are in a batch.
        device: of the model.
    """
    return _copied(batches, source, device) if device.type == "cuda" else batches


def _copied(batches: Iterator[Any], source: RowSource, device: torch.device) -> Iterator[Any]:
    stream = torch.cuda.Stream(device)
    for batch in batches:
        for tensor in source.rule(batch).tensors().values():
            if isinstance(tensor, RecycledTensor) and tensor.leaves and all(leaf.is_pinned() for leaf in tensor.leaves):
                tensor.leaves = _on_its_way(tensor.leaves, device, stream)
        yield batch


def _on_its_way(
    leaves: tuple[torch.Tensor, ...], device: torch.device, stream: torch.cuda.Stream
) -> tuple[torch.Tensor, ...]:
    with torch.cuda.stream(stream):
        copies = tuple(leaf.to(device, non_blocking=True) for leaf in leaves)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for copy in copies:  # the memory is the side stream's, which must not give it out again while it is read
        copy.record_stream(current)
    return copies
