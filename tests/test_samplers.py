"""A fixed seed gives the same batches as without us: for each sampler, over epochs, in workers of each kind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from processes import forkserver_context
from small import CUT, labels, pictures, residual
from test_mix import close, full
from torchrecycle import RecycledTensor, Recycling, recycle

N = 23
X, Y = pictures(N), labels(N)
INDEX = torch.arange(N)
DATA = TensorDataset(X, Y, INDEX)
EPOCHS = 3

forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")


class GroupSampler(Sampler[int]):
    """Of each label so many, one label after the other, in an order of its own: as samplers of metric learning do."""

    def __init__(self, targets: torch.Tensor, each: int) -> None:
        self.targets, self.each = targets.tolist(), each

    def __len__(self) -> int:
        return len(set(self.targets)) * self.each

    def __iter__(self) -> Iterator[int]:
        for label in np.random.permutation(sorted(set(self.targets))).tolist():
            members = [index for index, target in enumerate(self.targets) if target == label]
            yield from random.sample(members, self.each)


class PairBatches(Sampler[list[int]]):
    """Batches of pairs of one label, drawn from torch's generator; it has no length."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(5):
            first = int(torch.randint(N, ()))
            second = (first + 4 * int(torch.randint(1, 5, ()))) % (N - 3)
            yield [first, second % N, first]


class Epochs(DistributedSampler[Any]):
    """One that needs `set_epoch`, and gets it from the test as from a trainer."""


def samplers() -> dict[str, dict[str, Any]]:
    return {
        "in order": {"batch_size": 4},
        "shuffled": {"batch_size": 4, "shuffle": True},
        "shuffled, last dropped": {"batch_size": 4, "shuffle": True, "drop_last": True},
        "generator": {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(9)},
        "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler([float(i % 5) for i in range(N)], 17)},
        "weighted, own generator": {
            "batch_size": 5,
            "sampler": WeightedRandomSampler([1.0] * N, 30, generator=torch.Generator().manual_seed(2)),
        },
        "subset": {"batch_size": 4, "sampler": SubsetRandomSampler(range(0, N, 2))},
        "with replacement": {"batch_size": 4, "sampler": RandomSampler(DATA, replacement=True, num_samples=40)},
        "fewer": {"batch_size": 4, "sampler": RandomSampler(DATA, num_samples=9)},
        "more than there are": {"batch_size": 4, "sampler": RandomSampler(DATA, num_samples=50)},
        "groups": {"batch_size": 6, "sampler": GroupSampler(Y, 3)},
        "pairs": {"batch_sampler": PairBatches()},
        "batches of a batch sampler": {"batch_sampler": BatchSampler(RandomSampler(DATA), 7, drop_last=True)},
        "rank 0 of 2": {"batch_size": 4, "sampler": Epochs(DATA, num_replicas=2, rank=0, seed=3)},
        "rank 1 of 2": {"batch_size": 4, "sampler": Epochs(DATA, num_replicas=2, rank=1, seed=3, drop_last=True)},
        "rank 1 of 3, in order": {"batch_size": 3, "sampler": Epochs(DATA, num_replicas=3, rank=1, shuffle=False)},
        "a list": {"batch_size": 4, "sampler": [3, 3, -1, 20, 3]},
        "single": {"batch_size": 1, "sampler": [4, 2]},
    }


@pytest.fixture
def made(tmp_path) -> Recycling:
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")
    recycling.fill(DATA)
    return recycling


def drawn(loader: Any, model: Any = None) -> tuple[list[Any], list[float]]:
    """The batches of three epochs from one seed, and what the generators draw afterwards."""
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    batches = []
    for epoch in range(EPOCHS):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            if model is not None:
                with torch.no_grad():
                    batch = [model(batch[0]), *batch]
            batches.append(batch)
    return batches, [float(torch.rand(())), random.random(), float(np.random.random())]


def compare(recycling: Recycling, plain: Any, recycled: Any) -> None:
    """Labels and numbers are the plain ones, and what the model gives is what it gives of the plain inputs."""
    want, after = drawn(plain)
    got, ours = drawn(recycled, recycling.model)
    assert len(got) == len(want)
    for (output, stand_in, *rest), (x, *others) in zip(got, want, strict=True):
        assert isinstance(stand_in, RecycledTensor)
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert torch.equal(x, X[others[1]])
        close(output, full(recycling, x))
    assert ours == after


@pytest.mark.parametrize("name", samplers())
@pytest.mark.parametrize("how", ["loader", "data set and collate"])
def test_each_sampler_gives_the_plain_batches_over_several_epochs(name, how, made):
    if how == "loader":
        recycled: Any = made.loader(DATA, **samplers()[name])
    else:
        recycled = DataLoader(made.dataset(DATA), collate_fn=made.collate(), **samplers()[name])
    compare(made, DataLoader(DATA, **samplers()[name]), recycled)


FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


@forks
@pytest.mark.parametrize("name", ["shuffled", "generator", "groups", "pairs"])
@pytest.mark.parametrize("more", [{}, {"persistent_workers": True, "prefetch_factor": 3}], ids=["new", "persistent"])
def test_workers_give_the_plain_batches_of_each_sampler(name, more, made):
    arguments = {**FORK, **more}
    compare(
        made,
        DataLoader(DATA, **samplers()[name], **arguments),
        made.loader(DATA, **samplers()[name], **arguments),
    )


@forks
@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("context", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_another_kind_give_the_plain_batches(context, persistent, made):
    started = forkserver_context() if context == "forkserver" else context
    arguments: Any = {"num_workers": 1, "multiprocessing_context": started, "persistent_workers": persistent}
    # Workers that outlive an epoch draw their seed once: the plain ones do the same, and are quicker to fork.
    plain = {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True} if persistent else {}
    compare(
        made,
        DataLoader(DATA, batch_size=6, shuffle=True, **plain),
        made.loader(DATA, batch_size=6, shuffle=True, **arguments),
    )


@forks
def test_a_worker_init_fn_is_called_in_each_worker_at_filling_and_reading(tmp_path):
    started = torch.zeros(8, dtype=torch.int64).share_memory_()

    def begin(worker: int) -> None:
        started[worker] += 1
        random.seed(worker)

    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")
    arguments: Any = {**FORK, "batch_size": 5, "shuffle": True, "worker_init_fn": begin}
    recycled = recycling.loader(DATA, **arguments)
    assert started[:3].tolist() == [1, 1, 0]
    compare(recycling, DataLoader(DATA, batch_size=5, shuffle=True), recycled)
    assert started[:3].tolist() == [1 + EPOCHS, 1 + EPOCHS, 0]


def test_an_epoch_that_is_broken_off_leaves_the_order_of_the_next_as_it_is(made):
    def first_labels(loader: Any) -> list[list[int]]:
        torch.manual_seed(4)
        found = []
        for _ in range(4):
            for number, batch in enumerate(loader):
                found.append(batch[2].tolist())
                if number == 1:
                    break
        return found

    for name in ("shuffled", "generator", "weighted", "with replacement", "fewer"):
        plain = first_labels(DataLoader(DATA, **samplers()[name]))
        assert first_labels(made.loader(DATA, **samplers()[name])) == plain, name


def test_two_loaders_that_are_iterated_at_once_keep_their_orders(made):
    def interleaved(one: Any, other: Any) -> list[list[int]]:
        torch.manual_seed(4)
        found = []
        for a, b in zip(one, other, strict=False):
            found += [a[2].tolist(), b[2].tolist()]
        return found

    plain = [DataLoader(DATA, batch_size=4, shuffle=True) for _ in range(2)]
    recycled = [made.loader(DATA, batch_size=4, shuffle=True) for _ in range(2)]
    assert interleaved(*recycled) == interleaved(*plain)
