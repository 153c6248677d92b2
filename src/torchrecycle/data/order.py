"""In which order rows are read, and reading them ahead.

Disks and networks that read neighbours fast and single rows slowly are given *blocks*: 1 MB of rows that lie next to
each other, in random order, and within a window of 128 of them every row at random. A store of 4 GB has four thousand
blocks; a batch of 64 comes from some fifty of them, and the next epoch puts other blocks together. What is smaller than
a window is shuffled as a whole.

While a batch is trained, a thread reads the next ones and compares them with their checksums. It does so only where
the order of an epoch is known without asking the sampler more often than `DataLoader` would: random numbers are drawn
in the order in which they would be without us. And it does so only as long as there is something to do: rows that are
in the system's memory and were compared need no thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from torchrecycle.data.dataset import RecycledDataset
from torchrecycle.errors import BatchError
from torchrecycle.store import Rows
from torchrecycle.store.mapping import blocks_read

__all__ = ["BlockShuffleSampler", "ReadAhead", "draws_at_once", "in_blocks"]

_BLOCK_BYTES = 2**20
_BLOCKS = 128
"""How many blocks a data set has at least, if it has so many objects."""

_WINDOW_BYTES = 128 * 2**20
"""What is mixed, and how far is read ahead."""

_IDLE = 16
"""Where nothing had to be read, so many portions pass before the disk is asked again."""


class BlockShuffleSampler(Sampler[int]):
    """A random order that reads the disk in blocks: blocks at random, then shuffled within a window of them.

    ``recycling.loader(dataset, shuffle="blocks")`` makes one. Each object comes once in an epoch. The order follows
    from the seed and from where the rows lie: after `compact`, or in another store, the same seed gives another one.

    Args:
        dataset: of ``recycling.dataset(...)``; its rows' places are looked at when an epoch begins.
        block: objects in a block; 1 MB of rows if None, and less for small data sets.
        window: how many blocks are mixed with each other; 128 MB of rows if None.
        generator: draws the order; torch's own if None.

    Raises:
        BatchError: A number that is not positive, or another data set.
    """

    def __init__(
        self,
        dataset: RecycledDataset,
        *,
        block: int | None = None,
        window: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(dataset, RecycledDataset):
            raise BatchError(
                f"blocks are of rows, and a {type(dataset).__name__} has none: give what recycling.dataset(...) gave"
            )
        if min(1 if number is None else number for number in (block, window)) < 1:
            raise BatchError(f"a block and a window have at least one in them, not block={block}, window={window}")
        self._dataset, self._block, self._window, self._generator = dataset, block, window, generator

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        # As `RandomSampler` does: one number of the global generator decides an epoch.
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self._generator).item())
        return iter(self._order(torch.Generator().manual_seed(seed)).tolist())

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        count = len(self._dataset)
        # The rows of each view lie in the order of the objects, so that those of the first stand for all.
        locations = self._dataset.locations[:count]
        # Objects without a row come last in the order of places, in blocks of their own.
        places = torch.argsort(locations, stable=True) if len(locations) == count else torch.arange(count)
        block, window_of = self.sizes()
        blocks = list(places.split(block))
        drawn = torch.randperm(len(blocks), generator=generator).tolist()
        windows = []
        for start in range(0, len(drawn), window_of):
            window = torch.cat([blocks[number] for number in drawn[start : start + window_of]])
            windows.append(window[torch.randperm(len(window), generator=generator)])
        return torch.cat(windows) if windows else places

    def sizes(self) -> tuple[int, int]:
        """How many objects are in a block now, and how many blocks in a window."""
        row = _row_bytes(self._dataset)
        block = self._block or max(1, min(_BLOCK_BYTES // row, len(self._dataset) // _BLOCKS))
        return block, self._window or max(1, _WINDOW_BYTES // (row * block))


def in_blocks(dataset: RecycledDataset, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `DataLoader`, with a sampler in the place of ``shuffle="blocks"``.

    Raises:
        BatchError: Another word than that, or blocks beside another order.
    """
    shuffle = arguments.get("shuffle")
    if not isinstance(shuffle, str):
        return arguments
    if shuffle != "blocks":
        raise BatchError(f"shuffle={shuffle!r} is none of True, False and 'blocks'")
    others = [name for name in ("sampler", "batch_sampler") if arguments.get(name) is not None]
    if others:
        raise BatchError(f"blocks are an order of their own: leave out {' and '.join(others)}, or shuffle='blocks'")
    rest = {name: value for name, value in arguments.items() if name != "shuffle"}
    return {**rest, "sampler": BlockShuffleSampler(dataset, generator=arguments.get("generator"))}


def draws_at_once(batch_sampler: Any) -> bool:
    """Whether all random numbers of an epoch are drawn with its first batch, so that some may be drawn ahead."""
    if type(batch_sampler) is not BatchSampler:
        return False
    sampler = batch_sampler.sampler
    kinds = (SequentialSampler, DistributedSampler, BlockShuffleSampler)
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) in kinds


class ReadAhead:
    """The batches of a sampler, whose rows a thread reads before they are asked for.

    Args:
        batch_sampler: for which `draws_at_once` holds.
        dataset: whose rows they are.
    """

    def __init__(self, batch_sampler: Any, dataset: RecycledDataset) -> None:
        self._batches, self._dataset = batch_sampler, dataset

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Sequence[int]]:
        drawn, left = iter(self._batches), len(self._batches)
        reading = _Reading(self._dataset)
        ahead: deque[tuple[list[Sequence[int]], Future[int] | None]] = deque()
        largest = self._batches_in_portion()
        portion = largest if isinstance(self._batches.sampler, BlockShuffleSampler) else 1
        while ahead or left:
            # The last batch is drawn when it is asked for: a sampler that comes to its end draws again.
            while (left > 1 and len(ahead) < 2) or (left and not ahead):
                batches = list(itertools.islice(drawn, max(1, min(left - 1, portion))))
                left = left - len(batches) if batches else 0
                ahead.append((batches, reading.ask(batches)))
                portion = min(2 * portion, largest)
            batches, asked = ahead.popleft()
            reading.wait(asked)
            yield from batches
        # A sampler that is driven to its end may draw from its generator once more, as it would without us.
        yield from drawn

    def _batches_in_portion(self) -> int:
        """A window of blocks, so that they are read whole; else a good part of what may be read ahead."""
        sampler = self._batches.sampler
        objects = _WINDOW_BYTES // 4 // _row_bytes(self._dataset)
        if isinstance(sampler, BlockShuffleSampler):
            block, window = sampler.sizes()
            objects = block * window
        return max(1, objects // self._batches.batch_size)


class _Reading:
    """Reads rows in a thread while that leads to reading from the disk."""

    def __init__(self, dataset: RecycledDataset) -> None:
        self._dataset = dataset
        self._idle = 0
        """How many portions shall pass until the disk is asked again."""

    def ask(self, batches: Sequence[Sequence[int]]) -> Future[int] | None:
        """Begin to read the rows of these batches, if it seems of use."""
        source = self._dataset.source
        if self._idle or source is None or not batches:
            self._idle = max(0, self._idle - 1)
            return None
        index = torch.tensor([index for batch in batches for index in batch])
        if bool(((index < 0) | (index >= len(self._dataset))).any()):
            return None  # who asks for these items is told what is wrong
        locations = self._dataset.locations[self._dataset.peek(index)]
        return _thread().submit(_read, source.rows, locations[locations >= 0])

    def wait(self, asked: Future[int] | None) -> None:
        """Wait for what was asked for: nothing is read faster by gathering it now."""
        if asked is not None and not asked.result():
            self._idle = _IDLE


def _read(rows: Rows, locations: torch.Tensor) -> int:
    """Read rows, and say how much work that was: blocks of the disk, and bytes compared with checksums."""
    before = blocks_read() + rows.verified_bytes
    # Reading ahead is a service: what is wrong with the rows is said by those who gather them.
    with contextlib.suppress(Exception):
        rows.prefetch(locations)
    return blocks_read() + rows.verified_bytes - before


def _row_bytes(dataset: RecycledDataset) -> int:
    source = dataset.source
    return 1 if source is None else max(1, source.rows.nbytes // max(1, len(source.rows)))


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "torchrecycle-read-ahead")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread.cache_clear)
