"""Block-shuffled orders and reading ahead: each object once, mixed well, in the order of drawing without us."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from small import CUT, SIDE, residual
from torchrecycle import Recycling, recycle
from torchrecycle.data import BlockShuffleSampler, draws_at_once
from torchrecycle.data.order import ReadAhead, _Reading
from torchrecycle.errors import BatchError
from torchrecycle.store.rows import ShelfRows

CLASSES, EACH = 16, 64
COUNT = CLASSES * EACH


def objects() -> TensorDataset:
    """Sorted by class, as folders of pictures are: the worst case for a shuffle of neighbours."""
    torch.manual_seed(0)
    return TensorDataset(torch.randn(COUNT, 3, SIDE, SIDE), torch.arange(COUNT) // EACH, torch.arange(COUNT))


@pytest.fixture(scope="module")
def attached(tmp_path_factory: Any) -> Any:
    data = objects()
    made = recycle(residual(), data[:2][0], cut=CUT, store=tmp_path_factory.mktemp("order") / "activations")
    made.fill(data)
    return made, data


def indices(loader: DataLoader[Any]) -> list[list[int]]:
    return [batch[2].tolist() for batch in loader]


def joined(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_blocks_give_each_object_once_and_other_orders_each_epoch(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    loader = made.loader(data, batch_size=32, shuffle="blocks")
    epochs = [joined(indices(loader)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_same_seed_gives_the_same_blocks(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    orders = []
    for _ in range(2):
        torch.manual_seed(5)
        orders.append(indices(made.loader(data, batch_size=32, shuffle="blocks")))
    generator = torch.Generator().manual_seed(5)
    given = indices(made.loader(data, batch_size=32, shuffle="blocks", generator=generator))
    assert orders[0] == orders[1]
    assert sorted(joined(given)) == list(range(COUNT))


def classes_in_a_batch(batches: list[list[int]]) -> float:
    return float(np.mean([len({index // EACH for index in batch}) for batch in batches if len(batch) == 32]))


def test_blocks_mix_classes_nearly_as_well_as_a_full_shuffle(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    torch.manual_seed(1)
    full = np.mean([classes_in_a_batch(indices(made.loader(data, batch_size=32, shuffle=True))) for _ in range(8)])
    wrapped = made.dataset(data)
    whole, half, small = [], [], []
    for _ in range(8):
        whole.append(classes_in_a_batch(indices(made.loader(data, batch_size=32, shuffle="blocks"))))
        for window, found in ((64, half), (2, small)):
            sampler = BlockShuffleSampler(wrapped, block=8, window=window)
            found.append(classes_in_a_batch(list(BatchSampler(sampler, 32, False))))
    assert full > 13, "16 classes, 32 draws: 14 different ones are expected"
    assert np.mean(whole) > 0.98 * full, "what is smaller than a window is shuffled as a whole"
    assert np.mean(half) > 0.95 * full
    assert np.mean(small) < 0.5 * full, "a window of two blocks does not mix, or this test would show nothing"


def test_blocks_meet_other_neighbours_in_each_epoch(attached: tuple[Recycling, TensorDataset]):
    """Of the pairs that share a batch in one epoch, as many share one in the next as chance has it."""
    made, data = attached
    batches = BatchSampler(BlockShuffleSampler(made.dataset(data), block=8, window=64), 32, False)
    first, second = list(batches), list(batches)
    batch_of = {index: number for number, batch in enumerate(second) for index in batch}
    pairs = [(a, b) for batch in first for at, a in enumerate(batch) for b in batch[at + 1 :]]
    together = np.mean([batch_of[a] == batch_of[b] for a, b in pairs])
    assert together < 1.5 * 31 / (COUNT - 1)


def test_a_block_lies_together_on_the_disk(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    wrapped = made.dataset(data)
    order = list(BlockShuffleSampler(wrapped, block=16, window=4))
    for start in range(0, COUNT, 64):
        places = np.sort(wrapped.locations[torch.tensor(order[start : start + 64])].numpy()).reshape(4, 16)
        assert (np.diff(places, axis=1) == 1).all()


def test_what_is_no_recycled_data_set_has_no_blocks(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    with pytest.raises(BatchError, match=r"a TensorDataset has none: give what recycling.dataset"):
        BlockShuffleSampler(data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BatchError, match="window=0"):
        BlockShuffleSampler(made.dataset(data), window=0)
    with pytest.raises(BatchError, match="shuffle='bloks' is none of True, False and 'blocks'"):
        made.loader(data, shuffle="bloks")
    with pytest.raises(BatchError, match="blocks are an order of their own"):
        made.loader(data, shuffle="blocks", sampler=range(COUNT))


# -- reading ahead -----------------------------------------------------------------------------------------------------


class Unread:
    """A data set of rows in which nothing is to be had."""

    source = None

    def __init__(self, count: int) -> None:
        self.locations = torch.arange(count)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 1000])
def test_reading_ahead_gives_the_sampler_s_batches(count: int, drop_last: bool):
    for make in (
        lambda: SequentialSampler(range(count)),
        lambda: DistributedSampler(TensorDataset(torch.arange(count)), 2, 1),
    ):
        expected = list(BatchSampler(make(), 8, drop_last))
        assert list(ReadAhead(BatchSampler(make(), 8, drop_last), Unread(count))) == expected  # pyright: ignore


def test_random_numbers_are_drawn_when_they_would_be_without_us():
    """Of a generator that training draws from as well, the order of draws decides what is drawn."""

    def epochs(ahead: bool) -> list[Any]:
        generator = torch.Generator().manual_seed(3)
        sampler = BatchSampler(RandomSampler(objects(), num_samples=100, generator=generator), 8, False)
        batches = ReadAhead(sampler, Unread(100)) if ahead else sampler  # pyright: ignore
        return [[(batch, int(torch.randint(1000, (), generator=generator))) for batch in batches] for _ in range(3)]

    assert epochs(ahead=True) == epochs(ahead=False)


def test_a_sampler_that_draws_as_it_goes_is_not_read_ahead(attached: tuple[Recycling, TensorDataset]):
    made, data = attached
    assert not draws_at_once(BatchSampler(WeightedRandomSampler(torch.ones(9).tolist(), 9), 2, False))
    assert not draws_at_once(BatchSampler(RandomSampler(range(9), replacement=True), 2, False))
    assert draws_at_once(BatchSampler(BlockShuffleSampler(made.dataset(data)), 2, False))
    assert isinstance(made.loader(data, shuffle=True)._index_sampler, ReadAhead)
    weighted = made.loader(data, sampler=WeightedRandomSampler(torch.ones(COUNT).tolist(), COUNT))
    assert not isinstance(weighted._index_sampler, ReadAhead)


def test_rows_that_were_dropped_from_memory_are_read_before_they_are_gathered(attached: tuple[Recycling, Any]):
    made, data = attached
    wrapped = made.dataset(data)
    assert wrapped.source is not None
    rows = wrapped.source.rows
    assert isinstance(rows, ShelfRows)
    rows.gather(wrapped.locations)
    rows._segments.planes.release()
    for path in Path(rows.url).glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    reading = _Reading(wrapped)
    whole = [list(range(COUNT))]
    cold = reading.ask(whole)
    assert cold is not None
    assert cold.result() * 512 > rows.nbytes // 2 or not on_a_disk(Path(rows.url))
    warm = reading.ask(whole)
    assert warm is not None
    assert warm.result() == 0
    reading.wait(warm)
    assert [reading.ask(whole) is None for _ in range(17)] == [True] * 16 + [False], (
        "what is in memory is not asked for"
    )


def test_while_a_batch_is_trained_the_next_is_read(attached: tuple[Recycling, Any], monkeypatch: pytest.MonkeyPatch):
    made, data = attached
    wrapped = made.dataset(data)
    assert wrapped.source is not None
    rows, read = wrapped.source.rows, set[int]()

    def prefetch(locations: torch.Tensor) -> None:
        time.sleep(0.002)
        read.update(locations.tolist())
        rows.verified_bytes += 1  # so that reading seems of use

    monkeypatch.setattr(rows, "prefetch", prefetch)
    batches = list(BatchSampler(SequentialSampler(range(COUNT)), 8, False))
    ahead = ReadAhead(BatchSampler(SequentialSampler(range(COUNT)), 8, False), wrapped)
    for at, batch in enumerate(ahead):
        assert batch == batches[at]
        following = set(wrapped.locations[torch.tensor(batches[min(at + 1, len(batches) - 1)])].tolist())
        # Training goes on for as long as it takes; nobody asks for the next batch meanwhile. The last is drawn late.
        until = time.monotonic() + 10.0
        while at < len(batches) - 2 and not following <= read and time.monotonic() < until:
            time.sleep(0.001)
        assert at >= len(batches) - 2 or following <= read


def test_memory_is_pinned_where_the_model_is_on_a_gpu_if_nothing_else_is_said(attached: tuple[Recycling, Any]):
    made, data = attached
    assert made.loader(data, batch_size=8).pin_memory is False
    if torch.cuda.is_available():
        assert made.loader(data, batch_size=8, pin_memory=True).pin_memory is True
        made.model.cuda()
        try:
            made.resident = "disk"
            loader = made.loader(data, batch_size=8)
            assert loader.pin_memory is True
            assert next(iter(loader))[0].is_pinned()
        finally:
            made.resident = None
            made.model.cpu()


def on_a_disk(folder: Path) -> bool:
    """Whether dropping pages of a file there means reading it again: not on tmpfs."""
    found = os.stat(folder).st_dev
    return os.major(found) != 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_blocks_are_those_of_the_model(attached: tuple[Recycling, TensorDataset], workers: int):
    made, data = attached
    loader = made.loader(data, batch_size=64, shuffle="blocks", num_workers=workers)
    with torch.no_grad():
        for batch, _, index in loader:
            expected = residual()(data.tensors[0][index])
            torch.testing.assert_close(made.model(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_are_forked_while_rows_are_read_ahead(tmp_path: Path):
    """A lock that a thread holds at that moment would stay locked in the worker, which would wait for ever."""
    data = objects()
    made = recycle(residual(), data[:2][0], cut=CUT, store=tmp_path / "activations")
    made.fill(data)
    for _ in range(6):
        fresh = recycle(residual(), data[:2][0], cut=CUT, store=tmp_path / "activations")
        ahead = iter(fresh.loader(data, batch_size=8, shuffle=True))
        next(ahead)
        loader = fresh.loader(data, batch_size=64, num_workers=2, shuffle="blocks")
        assert sorted(joined(indices(loader))) == list(range(COUNT))
        fresh.detach()
