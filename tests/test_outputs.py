"""Memory for batches is used again, and never while somebody holds a tensor over it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

from torchrecycle.store import FolderStore, LeafSpec
from torchrecycle.store.mapping import MAPS
from torchrecycle.store.outputs import _POOL, LARGE_BYTES, empty
from torchrecycle.testing.store_contract import ABOUT, FINGERPRINT, keys_of

pytestmark = pytest.mark.skipif(not MAPS, reason="maps of our own are for Linux")

WIDTH = 1024


def large(rows: int = 256) -> torch.Tensor:
    assert rows * WIDTH * 8 >= LARGE_BYTES
    return empty(rows, WIDTH, torch.int64)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    gc.collect()
    _POOL.free.clear()


def test_a_batch_that_is_gone_makes_room_for_the_next():
    first = large()
    place = first.data_ptr()
    del first
    assert large().data_ptr() == place


def test_what_is_held_in_any_way_is_not_used_again():
    held = large()
    held.fill_(7)
    views = [held[5:9], held.view(torch.float32)[3], held.T]
    arrays = [held.numpy()[100:], np.asarray(held.numpy().T)]
    del held
    others = [large().fill_(9) for _ in range(8)]
    assert views[0].eq(7).all()
    assert views[1].view(torch.int64).eq(7).all()
    assert views[2].eq(7).all()
    assert all((array == 7).all() for array in arrays)
    assert len({other.data_ptr() for other in others}) == 8


def test_gradients_and_saved_tensors_hold_their_memory():
    weights = torch.ones(WIDTH, 1, requires_grad=True)
    batch = large().fill_(2).view(torch.int64).float()
    raw = large(512).fill_(3).view(torch.float64).view(512, WIDTH)
    raw.fill_(0.5)
    out = (raw.float() @ weights).sum() + (batch[:1] @ weights).sum()
    del raw, batch
    [large(512).fill_(-1) for _ in range(4)]
    out.backward()
    assert weights.grad is not None
    assert weights.grad[:, 0].eq(512 * 0.5 + 2).all()


def test_threads_that_take_and_give_never_share():
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            mine = large().fill_(number)
            other = large(300).fill_(-number)
            if not (mine.eq(number).all() and other.eq(-number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_waits_for_use_is_bounded():
    held = [large(4096) for _ in range(40)]  # 32 MB each
    del held
    gc.collect()
    assert sum(map(len, _POOL.free)) <= 512 * 2**20


def in_a_fork(told: Any) -> None:
    told.put((len(_POOL.free), int(KEPT[0][3, 3]), int(large().fill_(1).sum())))


KEPT: list[torch.Tensor] = []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_its_own():
    KEPT.append(large().fill_(5))
    large()
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    child = context.Process(target=in_a_fork, args=(told,))
    child.start()
    waiting, seen, total = told.get(timeout=60)
    child.join()
    assert (waiting, seen, total) == (0, 5, 256 * WIDTH)
    assert KEPT.pop().eq(5).all()


def anonymous() -> int:
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_anonymous_memory_stays_flat_over_many_batches(tmp_path: Any):
    spec = LeafSpec((48, 28, 28), False, torch.bfloat16)  # 75 KB
    rows = FolderStore(tmp_path).rows(FINGERPRINT, [spec], ABOUT)
    rows.append(keys_of(range(400)), [torch.zeros(400, 48, 28, 28, dtype=torch.bfloat16)])
    rows.publish()
    locations = rows.lookup(keys_of(range(400)))
    draw = np.random.default_rng(0)
    sizes = []
    for _ in range(300):
        batch = rows.gather(locations[draw.integers(0, 400, int(draw.integers(40, 129)))])
        sizes.append(anonymous())
        del batch
    assert max(sizes[100:]) - max(sizes[:100]) < 8 * 2**20
