"""In which order a process reads a data set at fill, where several train together.

Two processes that torchrun has started need the same manifest of 8,144 photos, so each reads all of them; computing is
what they share. Rank 0 reads 0, 2, 4, ... first and computes these 4,072, rank 1 the odd ones. Then each reads the
part of the other, which it finds computed or claimed. It reads that from its end: what the other has not come to by
then is computed here, and they meet in the middle of what is left. So a rank on a slower disk, or one that has died or
not started yet, holds nobody up, and a rank alone computes everything.

Nothing is sent between ranks, and none of them waits in a collective for another that has nothing to fill. Ranks whose
data sets differ, or whose store is a folder of their own machine, read in this order too; it is the claims in the store
(`torchrecycle.store.claims`) that tell what another computes, and the order only spares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import BatchSampler, Sampler

__all__ = ["Ranks", "ReadingOrder"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    """From 0 on."""
    world: int = 1
    """How many there are; 1 for a process alone."""

    @classmethod
    def present(cls) -> Ranks:
        """Of this process: as ``torch.distributed`` has it, if it was initialised, else as the launcher says in
        ``RANK`` and ``WORLD_SIZE``. What makes no sense there is no launcher's, and the process counts as alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found = cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        else:
            rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
            found = cls(int(rank), int(world)) if rank.isdecimal() and world.isdecimal() else cls()
        return found if 0 <= found.rank < found.world else cls()


class ReadingOrder(Sampler[list[int]]):
    """Batches of indices: those of this rank first, then the other ranks', each from its end.

    Args:
        count: items of the data set.
        batch_size: items per batch; none has items of two ranks.
        ranks: of this process.
    """

    def __init__(self, count: int, batch_size: int, ranks: Ranks) -> None:
        own, *others = (range((ranks.rank + step) % ranks.world, count, ranks.world) for step in range(ranks.world))
        self._parts = [own, *(part[::-1] for part in others)]
        self._batches = [BatchSampler(part, batch_size, drop_last=False) for part in self._parts]

    @property
    def own(self) -> int:
        """How many batches are this rank's."""
        return len(self._batches[0])

    def places(self) -> np.ndarray | None:
        """The index of each item in the order of reading, ``[count]`` int64; None if that is the data set's."""
        if len(self._parts) == 1:
            return None
        return np.concatenate([np.arange(part.start, part.stop, part.step, dtype=np.int64) for part in self._parts])

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(self._batches)
