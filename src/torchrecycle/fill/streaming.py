"""One pass over an iterable data set that computes the rows which are missing, before any training.

Nobody needs it: a loader over a stream keeps what training computes. It is for filling on another machine, or for
several cuts at once. Of 10,000 objects of which 4,000 have rows, all are read, and the prefix runs for 6,000.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, default_collate

from torchrecycle.bypass import Inputs
from torchrecycle.errors import StoreError
from torchrecycle.fill.filling import Fillable, FillReport, _Pass
from torchrecycle.progress import progress
from torchrecycle.trace import random_state, set_random_state

__all__ = ["fill_stream"]


def fill_stream(
    recyclings: Sequence[Fillable],
    dataset: Any,
    *,
    batch_size: int | None = 64,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    loader_arguments: dict[str, Any] | None = None,
    title: str = "filling",
    refused: Mapping[int, StoreError] | None = None,
) -> list[FillReport]:
    """Read a stream to its end; compute and keep the rows that are missing, for each of the recyclings.

    Generators are as before afterwards; what the stream itself counts is not. An interruption keeps what was computed.

    Args:
        recyclings: of one model, or of models with the same weights before their cuts.
        dataset: a ``torch.utils.data.IterableDataset``, which must come to an end.
        batch_size: objects per batch; None for a stream of batches.
        num_workers: reading processes.
        collate_fn: the user's.
        loader_arguments: more for the `DataLoader`.
        title: what the progress bar says.
        refused: as of `fill_pass`.

    Raises:
        BatchError: a batch does not fit the example.
        StoreError: the store cannot be read, or not be written for another reason than want of space or permission.
    """
    state = random_state()
    collate = collate_fn or (None if batch_size is None else default_collate)
    batches = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, **(loader_arguments or {})
    )
    filling: _Pass | None = None
    try:
        for recycling in recyclings:
            recycling.source.rows.refresh()
        filling = _Pass(recyclings, 0, refused or {})
        with progress(title, None) as shown:
            try:
                for batch in batches:
                    shown.advance(_add(filling, recyclings[0].source.rule(batch)))
                # What another process has claimed is waited for. What it leaves is not read again: it has no row then.
                filling.take_over(lambda indices: ())
            finally:
                filling.publish()
        return _reports(filling)
    finally:
        if filling is not None:
            filling.close()
        set_random_state(state)


def _add(filling: _Pass, inputs: Inputs) -> int:
    """One batch; how many objects it has."""
    filling._compare_arguments(inputs)
    first, objects = filling.objects, inputs.batch()
    filling.objects += objects
    keys = filling._keys(inputs, None)
    for number, ours in enumerate(keys):
        filling.keys[number].append(ours)
    filling._compute(inputs, keys, [filling._missing(number, ours, first) for number, ours in enumerate(keys)])
    return objects


def _reports(filling: _Pass) -> list[FillReport]:
    seconds = time.perf_counter() - filling.began
    reports = []
    for number, parts in enumerate(filling.keys):
        keys = np.concatenate(parts) if parts else np.empty((0, 16), np.uint8)
        reports.append(filling._report(number, keys, seconds))
    filling._warn_of_refusal(reports)
    return reports
