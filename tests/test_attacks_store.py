"""Attacks on the store that went through once: each is a program that somebody may really run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from small import CUT, SIDE, residual
from torchrecycle import Recycling, recycle
from torchrecycle.store import FolderStore, LeafSpec, looking, open_store
from torchrecycle.testing.store_contract import ABOUT, FINGERPRINT, keys_of

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def filled(folder: Path) -> tuple[Recycling, TensorDataset]:
    """64 objects in two segments of equal size."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, SIDE, SIDE), torch.arange(64))
    made = recycle(residual(), data.tensors[0][:2], cut=CUT, store=folder)
    for half in (slice(0, 32), slice(32, 64)):
        made.fill(TensorDataset(data.tensors[0][half], data.tensors[1][half]))
    return made, data


def write_over(made: Recycling) -> None:
    """As ``cp`` and ``rsync --inplace`` do it: no new file, and the same length."""
    one, other = sorted(Path(made.source.rows.url).glob("*-*.safetensors"))[:2]
    assert one.stat().st_size == other.stat().st_size
    with one.open("r+b") as file:
        file.write(other.read_bytes())


def worst(made: Recycling, data: TensorDataset, batches: Any) -> float:
    plain = residual()
    with torch.no_grad():
        return max(float((made.model(x) - plain(data.tensors[0][at])).abs().max()) for x, at in batches)


@FORKS
@pytest.mark.parametrize("arguments", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "worker"])
def test_a_segment_written_over_in_place_is_not_served_in_the_next_epoch(tmp_path: Path, arguments: dict[str, Any]):
    made, data = filled(tmp_path / "activations")
    loader = made.loader(data, batch_size=16, shuffle=True, **arguments)
    assert worst(made, data, loader) < 1e-4
    time.sleep(0.02)
    write_over(made)
    assert worst(made, data, loader) < 1e-4
    assert worst(made, data, loader) < 1e-4


def test_a_segment_written_over_within_an_epoch_is_noticed_within_a_second(tmp_path: Path):
    made, data = filled(tmp_path / "activations")
    loader = made.loader(data, batch_size=8)
    assert worst(made, data, loader) < 1e-4
    batches = iter(loader)
    next(batches)
    write_over(made)
    time.sleep(1.1)
    assert worst(made, data, batches) < 1e-4


def epochs(loader: DataLoader[Any], generator: torch.Generator | None) -> list[Any]:
    seen = []
    for _ in range(3):
        for _, index in loader:
            seen.append((index.tolist(), int(torch.randint(1000, (), generator=generator))))
    return seen


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [8, 10, 64])
@pytest.mark.parametrize("own", [False, True], ids=["global", "generator"])
def test_the_order_is_the_one_without_us_in_each_epoch(
    order_of: tuple[Recycling, TensorDataset], own: bool, batch_size: int, drop_last: bool, workers: int
):
    """A sampler that is driven to its end draws from its generator once more, which decides the next epoch."""
    made, data = order_of
    found = []
    for make in (lambda **given: DataLoader(data, **given), lambda **given: made.loader(data, **given)):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(3) if own else None
        given: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last, "num_workers": workers}
        found.append(epochs(make(shuffle=True, generator=generator, **given), generator))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def order_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recycling, TensorDataset]:
    return filled(tmp_path_factory.mktemp("order") / "activations")


def test_forget_also_takes_what_an_rm_was_killed_in_the_midst_of(tmp_path: Path):
    store = open_store(tmp_path)
    rows = store.rows(FINGERPRINT, [LeafSpec((4,), False, torch.uint8)], ABOUT)
    rows.append(keys_of([1]), [torch.tensor([[86, 86, 85, 84]], dtype=torch.uint8)])
    rows.publish()
    left = tmp_path / f".removed-{FINGERPRINT}-1"
    (tmp_path / FINGERPRINT).rename(left)
    assert store.forget(keys_of([1])).ok
    assert not left.exists()


def open_both(folder: Path) -> int:
    rows = FolderStore(folder).existing(FINGERPRINT)
    model = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 2))  # 1.4 MB
    recycle(model, torch.randn(2, 600), cut="0", store="memory://")
    return int((rows.lookup(keys_of(range(60))) >= 0).sum())


def open_in_a_fork(folder: Path, told: Any) -> None:
    told.send(open_both(folder))


@FORKS
def test_a_forked_process_opens_an_index_and_a_model_that_its_parent_has_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The hasher's pool of threads is not there after a fork, and waiting for it would be for ever."""
    monkeypatch.setattr(looking, "IN_MEMORY", 20)
    rows = FolderStore(tmp_path).rows(FINGERPRINT, [LeafSpec((300_000,), False, torch.uint8)], ABOUT)
    rows.append(keys_of(range(60)), [torch.zeros(60, 300_000, dtype=torch.uint8)])
    rows.publish()
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        assert open_both(tmp_path) == 60
        here, there = context.Pipe()
        child = context.Process(target=open_in_a_fork, args=(tmp_path, there))
        child.start()
        try:
            assert here.poll(30)
            assert here.recv() == 60
        finally:
            child.kill()
            child.join()


def test_claims_that_cannot_be_removed_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, data = filled(tmp_path / "activations")
    claims = Path(made.source.rows.url) / "claims"
    claims.mkdir()
    (claims / ("0" * 16)).write_bytes(b"torchrecycle claims 1\n\0\0" + bytes(40))
    old = time.time() - 10**6
    os.utime(claims / ("0" * 16), (old, old))
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "claims" and self.name == "0" * 16:
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    more = TensorDataset(torch.cat([data.tensors[0], torch.randn(8, 3, SIDE, SIDE)]), torch.arange(72))
    assert made.fill(more).computed == 8


def test_rows_of_a_copied_fingerprint_folder_are_not_ours(tmp_path: Path):
    made, data = filled(tmp_path / "activations")
    other = recycle(residual(1), data.tensors[0][:2], cut=CUT, store=tmp_path / "activations")
    shutil.copytree(made.source.rows.url, tmp_path / "activations" / other.fingerprint, dirs_exist_ok=True)
    with pytest.raises(OSError, match="belongs to"):
        other.fill(data)
    assert np.allclose(made.model(data.tensors[0][:4]).detach(), residual()(data.tensors[0][:4]).detach(), atol=1e-4)
