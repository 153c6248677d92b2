"""Seconds of an epoch with the prefix frozen and computed again, from some of its steps: the fair baseline.

An epoch of 930 photos in batches of 64 has 14 whole batches and one of 34. The first two steps, in which memory is
taken and kernels are chosen, took 2.1 s each, and the twelve after them 1.7: so an epoch takes 12 * 1.7 s / 768 objects
* 930 objects = 24.7 s. By batches, and with the first steps, it would have been 15 * 1.76 s = 26.4 s.

Before them comes a step with kept rows, which is not counted either. The first one after a level is attached takes
longer, since it is proven that the model computes the same with rows; it is taken here, so that no training's first
epoch looks longer for it than those of other seeds.

All of it is one call of the task's `fit`, for one epoch. It ends as any other: nothing raises in a user's loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice, repeat
from typing import Any

import torch

__all__ = ["FROZEN_STEPS", "WARM_STEPS", "FrozenSteps"]

FROZEN_STEPS = 12
"""Steps that are measured, at most."""
WARM_STEPS = 2
"""Steps before them, which may be slow."""


class FrozenSteps:
    """A loader for one epoch: a step with kept rows, some to get warm, and those that are measured.

    Args:
        raw: the loader of objects.
        kept: the loader of kept rows; None where there are none.
        pause: to be entered before objects come.
        batches: how many there are to a step.
        device: whose work is waited for before a moment is noted.
    """

    def __init__(
        self, raw: Any, kept: Any | None, pause: Callable[[], Any], *, batches: int, device: torch.device
    ) -> None:
        self._raw, self._kept, self._pause = raw, kept, pause
        self._sizes = _sizes(raw)
        self._measured = min(FROZEN_STEPS * batches, len(self._sizes))
        self._warm = WARM_STEPS * batches
        self._first = 0 if kept is None else min(batches, len(kept))
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._paused = ExitStack()
        self.seconds = 0.0
        """Of an epoch, once the loop has gone over it."""

    def __len__(self) -> int:
        return self._first + self._warm + self._measured

    def __getattr__(self, name: str) -> Any:
        """What else a user's loop asks of a loader: ``batch_size``, ``dataset``."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._raw, name)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from islice(self._kept, self._first)
        with self._paused:
            self._paused.enter_context(self._pause())
            yield from islice(chain.from_iterable(repeat(self._raw)), self._warm)
            yield from self._watched()

    def close(self) -> None:
        """To be called at the end, also after an error: a loop that was left is not paused any more."""
        self._paused.close()

    def _watched(self) -> Iterator[Any]:
        fetches: list[float] = []
        began = moment = self._now()
        for batch in islice(self._raw, self._measured):
            fetches.append(time.perf_counter() - moment)
            yield batch
            moment = time.perf_counter()
        took = self._now() - began
        # Workers start once in an epoch, however many batches it has.
        once = max(0.0, fetches[0] - statistics.mean(fetches[1:])) if len(fetches) > 1 else 0.0
        self.seconds = once + (took - once) * sum(self._sizes) / sum(self._sizes[: self._measured])

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


def _sizes(loader: Any) -> list[int]:
    """How many objects each batch of an epoch has; 1 each where nobody tells."""
    order: Iterable[Any] | None = getattr(loader, "batch_sampler", None)
    sizes = [] if order is None else [len(batch) for batch in order]
    return sizes if any(sizes) else [1] * len(loader)
