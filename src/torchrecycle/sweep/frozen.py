"""Seconds of an epoch with the prefix frozen and computed again, from some of its steps: the fair baseline.

An epoch of 1,000 photos in batches of 64 has 15 whole batches and one of 40. The first two steps, in which memory is
taken and kernels are chosen, took 2.1 s each, and the twelve after them 1.7: so an epoch takes 12 * 1.7 s / 768 objects
* 1,000 objects = 26.6 s. By batches, and with the first steps, it would have been 16 * 1.76 s = 28.1 s.

Before them comes a step with kept rows, which is not counted either. The first one after a level is attached takes
longer, since it is proven that the model computes the same with rows; it is taken here, so that no training's first
epoch looks longer for it than those of other seeds.

All of it is one call of the task's `fit`, which never sees more batches to an epoch than there are: a schedule may have
been made for so many. Where that leaves too few to be measured, a second epoch follows, all of which is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch

__all__ = ["FROZEN_STEPS", "LEAST_STEPS", "WARM_STEPS", "FrozenSteps", "epochs_of_frozen"]

FROZEN_STEPS = 12
"""Steps that are measured, at most."""
WARM_STEPS = 2
"""Steps before them, which may be slow."""
LEAST_STEPS = 6
"""Where fewer are left of an epoch, there is a second one."""


def epochs_of_frozen(steps: float) -> float:
    """How much is trained for it, in epochs.

    Args:
        steps: of an epoch.

    >>> epochs_of_frozen(60), epochs_of_frozen(12), epochs_of_frozen(4)
    (0.25, 1.0, 2.0)
    """
    if steps < 1 + WARM_STEPS + LEAST_STEPS:
        return 2.0
    return min(1.0, (1 + WARM_STEPS + FROZEN_STEPS) / steps)


class FrozenSteps:
    """A loader: in its first epoch a step with kept rows, some to get warm, and those that are measured. In a further
    one all are.

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
        whole = len(self._sizes)
        self._first = batches if kept is not None and whole > batches else 0
        left = whole - self._first
        self._warm = WARM_STEPS * batches if left > 2 * WARM_STEPS * batches else 0
        self._measured = min(FROZEN_STEPS * batches, left - self._warm)
        self.epochs = 2 if self._warm + self._measured < (WARM_STEPS + LEAST_STEPS) * batches else 1
        """How many are to be trained."""
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._paused = ExitStack()
        self._is_warm = False
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
        first, warm = (0, 0) if self._is_warm else (self._first, self._warm)
        self._is_warm = True
        if self._kept is not None and first:
            yield from islice(self._kept, first)
        with self._paused:
            self._paused.enter_context(self._pause())
            yield from self._watched(warm, len(self) - first)

    def close(self) -> None:
        """To be called at the end, also after an error: a loop that was left is not paused any more."""
        self._paused.close()

    def _watched(self, warm: int, count: int) -> Iterator[Any]:
        """So many batches, of which the first are not counted."""
        fetches: list[float] = []
        began = moment = self._now()
        for batch in islice(self._raw, count):
            fetches.append(time.perf_counter() - moment)
            yield batch
            if len(fetches) == warm:
                began = self._now()
            moment = time.perf_counter()
        took = self._now() - began
        # Workers start once in an epoch, however many batches it has.
        once = max(0.0, fetches[0] - statistics.mean(fetches[1:])) if len(fetches) > 1 else 0.0
        each = (took - (0.0 if warm else once)) / sum(self._sizes[warm:count])
        self.seconds = once + each * sum(self._sizes)

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


def _sizes(loader: Any) -> list[int]:
    """How many objects each batch of an epoch has; 1 each where nobody tells."""
    order: Iterable[Any] | None = getattr(loader, "batch_sampler", None)
    sizes = [] if order is None else [len(batch) for batch in order]
    return sizes if any(sizes) else [1] * len(loader)
