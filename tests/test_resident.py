"""Rows that stay in memory: the same to the bit, bounded, and never those of another object or of an old model."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchrecycle.data.resident as room
from small import CUT, bert, labels, pictures, residual, texts, tokenizer
from torchrecycle import BatchError, GoneRowsError, RecycledTensor, StaleActivationError, StoreError, recycle
from torchrecycle.data.resident import Resident, Residents
from torchrecycle.store import LeafSpec, Ragged, open_store

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)
NONE = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def made(tmp_path: Any, resident: Any = "ram", model: Any = None, **arguments: Any) -> Any:
    model = residual() if model is None else model
    return recycle(model, X[:2], cut=CUT, store=tmp_path / "store", resident=resident, **arguments)


def outputs(recycling: Any, data: Any = DATA, **arguments: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        loader = recycling.loader(data, batch_size=8, **arguments)
        return [recycling.model(x.to(recycling.device)) for x, _ in loader]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- a copy of rows ----------------------------------------------------------------------------------------------------

SPECS = [LeafSpec((3, 2), False, torch.float32), LeafSpec((4,), True, torch.int8), LeafSpec((), False, torch.int64)]


def filled(tmp_path: Any, count: int = 40) -> tuple[Any, np.ndarray]:
    """A store of rows of all kinds in several segments, and their locations in another order."""
    rows = open_store(tmp_path / "rows").rows("f", SPECS, {})
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (count, 16), dtype=np.uint8)
    for part in np.array_split(np.arange(count), 5):
        lengths = torch.from_numpy(generator.integers(0, 4, len(part)))
        values = torch.from_numpy(generator.integers(-128, 128, (int(lengths.sum()), 4), dtype=np.int8))
        dense = torch.from_numpy(generator.normal(size=(len(part), 3, 2)).astype(np.float32))
        rows.append(keys[part], [dense, Ragged(values, lengths), torch.from_numpy(part)])
        rows.publish()
    return rows, rows.lookup(keys[generator.permutation(count)])


def equal_leaves(a: Any, b: Any) -> bool:
    for one, other in zip(a, b, strict=True):
        if isinstance(one, Ragged):
            if not torch.equal(one.lengths, other.lengths):
                return False
            one, other = one.values, other.values
        if not torch.equal(one.cpu(), other.cpu()):
            return False
    return True


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_gives_what_the_store_gives(device, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PORTION_BYTES", 200)  # some rows at a time
    rows, locations = filled(tmp_path)
    twice = np.concatenate([locations, locations[:7], [-1, -5]])
    copy = Resident(rows, twice, torch.device(device), "numbering")
    assert len(copy) == 40
    for wanted in (locations, locations[[3, 3, 30]], locations[:0]):
        got = copy.gather(torch.from_numpy(wanted))
        assert got is not None
        assert equal_leaves(got, rows.gather(wanted))
    assert copy.has(torch.tensor([int(locations[0]), -7]))


def test_its_size_is_what_it_says(tmp_path):
    rows, locations = filled(tmp_path)
    copy = Resident(rows, locations, NONE, "numbering")
    leaves = copy.gather(torch.from_numpy(np.sort(locations)))
    assert leaves is not None
    tensors = [leaf.values if isinstance(leaf, Ragged) else leaf for leaf in leaves]
    assert copy.nbytes == sum(t.numel() * t.itemsize for t in tensors)
    assert "40 rows" in repr(copy)


@pytest.mark.parametrize("wrong", [[-1], [10**9], [0, 10**9]])
def test_a_location_that_it_lacks_is_no_row(wrong, tmp_path):
    rows, locations = filled(tmp_path)
    copy = Resident(rows, locations[:20], NONE, "numbering")
    assert copy.gather(torch.tensor(wrong)) is None
    for one in locations[20:]:
        assert copy.gather(torch.tensor([int(one)])) is None
        assert not copy.has(torch.tensor([int(one)]))


def test_an_empty_copy_has_nothing(tmp_path):
    rows, locations = filled(tmp_path)
    copy = Resident(rows, locations[:0], NONE, "numbering")
    assert copy.gather(torch.from_numpy(locations[:1])) is None
    assert copy.nbytes == 0


def test_in_another_process_it_knows_places_and_holds_no_rows(tmp_path):
    rows, locations = filled(tmp_path)
    copy = pickle.loads(pickle.dumps(Resident(rows, locations, NONE, "numbering")))
    assert copy.has(torch.from_numpy(locations))
    assert copy.gather(torch.from_numpy(locations)) is None


# -- in a loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "bfloat16", "int8"])
def test_the_forward_gathers_what_the_loader_would_have_given(precision, tmp_path):
    want = outputs(made(tmp_path, "disk", precision=precision))
    recycling = made(tmp_path, "ram", precision=precision)
    for x, _ in recycling.loader(DATA, batch_size=8):
        assert isinstance(x, RecycledTensor)
        assert x.leaves is None
    assert same(outputs(recycling), want)
    assert recycling.stats.misses == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": 2},
        {"num_workers": 1, "persistent_workers": True},
        pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
        {"shuffle": True},
        {"drop_last": True},
    ],
    ids=str,
)
def test_any_loader_gives_the_same(arguments, tmp_path):
    found = []
    for resident in ("disk", "ram"):
        recycling = made(tmp_path, resident)
        torch.manual_seed(0)
        loader = recycling.loader(DATA, batch_size=8, **arguments)
        with torch.no_grad():
            found.append([recycling.model(x) for _ in range(2) for x, _ in loader])
    assert same(*found)


def test_rows_that_wait_survive_what_a_loop_does_to_a_batch(tmp_path):
    recycling = made(tmp_path)
    want = torch.cat(outputs(made(tmp_path, "disk")))
    batches = [x for x, _ in recycling.loader(DATA, batch_size=8)]
    assert all(x.leaves is None for x in batches)
    whole = torch.cat(batches)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for got, expected in (
            (whole[order], want[order]),
            (whole[:5], want[:5]),
            (torch.cat(whole.split(7)[::-1]), torch.cat(want.split(7)[::-1])),
            (pickle.loads(pickle.dumps(whole)), want),
            (whole.to(torch.float64).to(torch.float32), want),
        ):
            torch.testing.assert_close(recycling.model(got), expected, rtol=1e-5, atol=1e-6)


def test_texts_of_several_lengths_are_padded_as_the_batch_is(tmp_path):
    tokens = tokenizer()
    data = [{**tokens(text), "labels": i % 2} for i, text in enumerate(texts(20))]

    def collate(items: list[Any]) -> Any:
        return tokens.pad(items, return_tensors="pt")

    example = {n: v for n, v in collate(data[:2]).items() if n != "labels"}
    found = []
    for resident in ("disk", "ram"):
        recycling = recycle(
            bert(), example, cut="bert.encoder.layer.1", store=tmp_path, precision="int8", resident=resident
        )
        torch.manual_seed(0)
        loader = recycling.loader(data, batch_size=6, collate_fn=collate, shuffle=True)
        batches = list(loader)
        carried = [t for t in batches[0].values() if isinstance(t, RecycledTensor)]
        assert (carried[0].leaves is None) == (resident == "ram")
        with torch.no_grad():
            found.append([recycling.model(**batch).logits for batch in batches])
        assert recycling.stats.hits == 20
    assert same(*found)


def test_two_loaders_of_one_data_set_share_a_copy_and_leave_it_when_they_go(tmp_path):
    recycling = made(tmp_path)
    one, two = recycling.loader(DATA, batch_size=8), recycling.loader(DATA, batch_size=4)
    other = recycling.loader(TensorDataset(X[:5], Y[:5]), batch_size=2)
    assert sorted(map(len, recycling.residents)) == [5, 24]
    batch = next(iter(one))[0]
    del one, two, other
    gc.collect()
    assert not list(recycling.residents)
    with torch.no_grad():  # a batch that has outlived its loader: from the store
        assert torch.equal(recycling.model(batch), outputs(made(tmp_path, "disk"))[0])


def test_the_attribute_holds_from_the_next_iteration_on(tmp_path):
    recycling = made(tmp_path, None)
    loader = recycling.loader(DATA, batch_size=8, num_workers=1, persistent_workers=True)
    assert next(iter(loader))[0].leaves is not None  # on the CPU nothing is copied by itself
    recycling.resident = "ram"
    assert all(x.leaves is None for x, _ in loader)
    recycling.resident = "disk"
    assert all(x.leaves is not None for x, _ in loader)
    del loader
    gc.collect()
    assert not list(recycling.residents)
    with pytest.raises(ValueError, match="none of 'disk', 'ram', 'cuda'"):
        recycling.resident = "gpu"
    with pytest.raises(ValueError, match="none of 'disk'"):
        made(tmp_path, "memory")


def test_objects_without_a_row_are_computed_beside_rows_that_wait(tmp_path):
    want = torch.cat(outputs(made(tmp_path, "disk")))
    recycling = made(tmp_path)
    loader = recycling.loader(DATA, batch_size=8)
    for key in recycling.keys((X[[1, 9]], Y[:2])):
        recycling.store.forget(key)
    fresh = recycling.dataset(DATA)
    fresh.locations = fresh.locations.clone()
    fresh.locations[[1, 9]] = -1
    loader = DataLoader(fresh, batch_size=8, collate_fn=recycling.collate())
    batches = [x for x, _ in loader]
    assert [len(x.misses) for x in batches] == [1, 1, 0]
    assert all(x.leaves is None for x in batches)
    with torch.no_grad():
        got = torch.cat([recycling.model(x) for x in batches])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_read_once_is_copied_only_where_that_is_asked_for(tmp_path, monkeypatch):
    asked: list[Any] = []
    make = Residents.of
    monkeypatch.setattr(Residents, "of", lambda self, word, *rest: asked.append(word) or make(self, word, *rest))
    recycling = made(tmp_path, None)
    want = recycling.predict(DATA)
    assert set(asked) == {"disk"}
    assert recycling.resident is None
    recycling.resident = "ram"
    assert torch.equal(recycling.predict(DATA), want)
    assert asked[-1] == "ram"


# -- how much ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_words_and_takes_no_memory(tmp_path, monkeypatch):
    outputs(made(tmp_path, "disk"))
    recycling = made(tmp_path)
    monkeypatch.setattr(room, "free_bytes", lambda device: 24 * 16 * 16 * 4 - 1)  # one byte too few
    with pytest.raises(StoreError, match=r"take 0\.00 GB, and cpu has 0\.00 GB free.*resident='disk'"):
        recycling.loader(DATA)
    monkeypatch.setattr(room, "free_bytes", lambda device: 100)
    monkeypatch.setattr(room, "_copied", lambda *arguments: pytest.fail("rows were copied"))
    with pytest.raises(StoreError, match=r"has 0\.00 GB free"):
        recycling.loader(DATA)
    assert not list(recycling.residents)


def test_ragged_rows_are_measured_before_they_are_copied(tmp_path, monkeypatch):
    rows, locations = filled(tmp_path)
    needed = Resident(rows, locations, NONE, "n").nbytes
    monkeypatch.setattr(room, "_copied", lambda *arguments: pytest.fail("rows were copied"))
    with pytest.raises(room.TooLarge):
        Resident(rows, locations, NONE, "n", most=needed - 1)


def test_by_itself_it_takes_a_quarter_of_a_gpu_and_nothing_of_a_cpu(tmp_path, monkeypatch):
    rows, locations = filled(tmp_path)
    needed = Resident(rows, locations, NONE, "n").nbytes
    asked: list[Any] = []

    def pretend(free: int) -> Any:
        """A GPU with so much free memory: what is decided, without the copying."""
        monkeypatch.setattr(room, "free_bytes", lambda device: free)
        monkeypatch.setattr(room, "_copied", lambda rows, where, lengths, device: asked.append(device) or [])
        return Residents().of(None, rows, locations, "n", torch.device("cuda", 0))

    assert pretend(4 * needed - 1) is None
    assert not asked
    copy = pretend(4 * needed)
    assert copy is not None
    assert copy.late
    assert asked == [torch.device("cuda", 0)]
    assert Residents().of(None, rows, locations, "n", NONE) is None
    assert Residents().of("disk", rows, locations, "n", torch.device("cuda", 0)) is None


def test_rows_in_memory_beside_a_gpu_are_gathered_by_the_loader(tmp_path):
    rows, locations = filled(tmp_path)
    copy = Residents().of("ram", rows, locations, "n", torch.device("cuda", 0))
    assert copy is not None
    assert copy.device == NONE
    assert not copy.late


def test_a_loader_gathers_from_a_copy_that_is_not_on_the_models_device(tmp_path, monkeypatch):
    want = outputs(made(tmp_path, "disk"))
    recycling = made(tmp_path)
    loader = recycling.loader(DATA, batch_size=8)
    dataset: Any = loader.dataset
    dataset.resident.late = False  # as beside a GPU
    monkeypatch.setattr(type(recycling.source.rows), "gather", lambda *arguments: pytest.fail("read from the store"))
    batches = list(DataLoader(dataset, batch_size=8, collate_fn=recycling.collate()))
    assert all(x.leaves is not None for x, _ in batches)
    with torch.no_grad():
        assert same([recycling.model(x) for x, _ in batches], want)


def test_cuda_is_refused_where_the_model_is_not_there(tmp_path):
    with pytest.raises(BatchError, match="resident='cuda' keeps rows beside the model, which is on cpu"):
        made(tmp_path, "cuda").loader(DATA)


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_a_store_that_grows_is_copied_anew(tmp_path):
    recycling = made(tmp_path)
    assert same(outputs(recycling), outputs(made(tmp_path, "disk")))
    more = TensorDataset(torch.cat([pictures(8, seed=9), X]), torch.cat([Y[:8], Y]))
    got = torch.cat(outputs(recycling, more))
    assert torch.equal(got, torch.cat(outputs(made(tmp_path, "disk"), more)))


class Changing(torch.utils.data.Dataset[Any]):
    """A data set whose objects can be exchanged under the same index."""

    def __init__(self) -> None:
        self.x, self.y = X.clone(), Y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def test_a_data_set_that_changes_gets_the_rows_of_its_new_objects(tmp_path):
    recycling = made(tmp_path)
    data = Changing()
    loader = recycling.loader(data, batch_size=8)
    with torch.no_grad():
        first = torch.cat([recycling.model(x) for x, _ in loader])
        data.x = data.x.flip(0)
        second = torch.cat([recycling.model(x) for x, _ in recycling.loader(data, batch_size=8)])
        again = torch.cat([recycling.model(x) for x, _ in loader])
    torch.testing.assert_close(second, first.flip(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(again, second)


def test_a_prefix_that_moves_gets_its_own_rows(tmp_path):
    recycling = made(tmp_path)
    loader = recycling.loader(DATA, batch_size=8)
    old = next(iter(loader))[0]
    before = outputs(recycling)
    with torch.no_grad():
        recycling.model.stem.weight.mul_(1.5)
        with pytest.raises(StaleActivationError):
            recycling.model(old)
        after = [recycling.model(x) for x, _ in loader]
        with recycling.paused():
            want = [recycling.model(x) for x in X.split(8)]
        with pytest.raises(StaleActivationError):
            recycling.model(old)
    assert not same(before, after)
    for a, b in zip(after, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(
        made.numbering == recycling.source.numbering for made in recycling.residents if made.gather(old.locations)
    )


def test_after_a_recut_and_back_an_old_batch_is_refused(tmp_path):
    recycling = made(tmp_path)
    old = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    recycling.recut("stages.0")
    with pytest.raises(StaleActivationError):
        recycling.model(old)
    recycling.recut(CUT)
    assert recycling.fingerprint == old.fingerprint
    with pytest.raises(StaleActivationError, match="made by another recycling"):
        recycling.model(old)
    assert same(outputs(recycling), outputs(made(tmp_path, "disk")))


def test_a_recycling_that_numbers_the_same_rows_otherwise_refuses_the_batch(tmp_path):
    first = made(tmp_path)
    other = TensorDataset(pictures(8, seed=5), Y[:8])
    outputs(first, other)
    outputs(first)
    batch = next(iter(first.loader(DATA, batch_size=8)))[0]
    first.detach()
    first.store.compact()
    second = made(tmp_path, model=first.model)
    want = outputs(second)  # opens the folder anew: other segments, other numbers
    assert second.fingerprint == batch.fingerprint
    with torch.no_grad(), pytest.raises(StaleActivationError, match="made by another recycling"):
        second.model(batch)
    with pytest.raises(BatchError, match="different recyclings"):
        torch.cat([batch, next(iter(second.loader(DATA, batch_size=8)))[0]])
    assert same(outputs(second), want)


def test_two_recyclings_of_one_model_and_one_cut_keep_their_batches_apart(tmp_path):
    model = residual()
    first = made(tmp_path / "a", model=model)
    outputs(first, TensorDataset(pictures(8, seed=5), Y[:8]))  # so that locations differ
    second = made(tmp_path / "b", model=model)
    a, b = (next(iter(r.loader(DATA, batch_size=8)))[0] for r in (first, second))
    assert a.fingerprint == b.fingerprint
    assert a.numbering != b.numbering
    with torch.no_grad():
        assert torch.equal(model(a), model(b))


def test_rows_merged_under_a_copy_stay_right(tmp_path):
    recycling = made(tmp_path)
    want = outputs(made(tmp_path, "disk"))
    outputs(recycling, TensorDataset(pictures(8, seed=5), Y[:8]))
    loader = recycling.loader(DATA, batch_size=8)
    with torch.no_grad():
        batches = [x for x, _ in loader]
        recycling.store.compact()
        assert same([recycling.model(x) for x in batches], want)
        assert same([recycling.model(x) for x, _ in loader], want)


def test_rows_evicted_under_a_copy_stay_right_and_are_computed_again_without_it(tmp_path):
    recycling = made(tmp_path)
    want = outputs(made(tmp_path, "disk"))
    loader = recycling.loader(DATA, batch_size=8)
    batches = [x for x, _ in loader]
    recycling.store.evict(0)
    with torch.no_grad():
        assert same([recycling.model(x) for x in batches], want)  # from the copy
        again = [recycling.model(x) for x, _ in loader]
    for a, b in zip(again, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(recycling.source.rows) == 24


def test_a_row_that_was_forgotten_is_served_by_no_loader_that_is_made_after(tmp_path):
    recycling = made(tmp_path)
    old = recycling.loader(DATA, batch_size=8)
    row = next(iter(old))[0].locations[:1]
    assert recycling.residents.gather(row, recycling.source.numbering) is not None
    recycling.store.forget(recycling.keys((X[:1], Y[:1]))[0])
    part = TensorDataset(X[1:], Y[1:])
    new = recycling.loader(part, batch_size=8)
    assert [len(copy) for copy in recycling.residents] == [23, 24]
    del old
    gc.collect()
    assert len(new) == 3
    assert recycling.residents.gather(row, recycling.source.numbering) is None


def test_damage_is_found_while_the_copy_is_made(tmp_path):
    outputs(made(tmp_path, "disk"))
    segment = next((tmp_path / "store").glob("*/*-*.safetensors"))
    data = bytearray(segment.read_bytes())
    data[-100] ^= 1
    segment.write_bytes(data)
    with pytest.raises(StoreError, match="verify"):
        made(tmp_path).loader(DATA)


def test_rows_gone_at_that_very_moment_leave_the_loader_to_the_store(tmp_path, monkeypatch):
    rows, locations = filled(tmp_path)

    def gone(*arguments: Any) -> Any:
        raise GoneRowsError("gone")

    monkeypatch.setattr(room, "_copied", gone)
    assert Residents().of("ram", rows, locations, "n", NONE) is None


def test_while_recycling_is_off_objects_are_read(tmp_path, monkeypatch):
    recycling = made(tmp_path)
    want = outputs(recycling)
    old = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    with recycling.paused():
        assert not any(isinstance(x, RecycledTensor) for x, _ in recycling.loader(DATA, batch_size=8))
        with pytest.raises(BatchError, match="while recycling is off"):
            recycling.model(old)
    monkeypatch.setenv("TORCHRECYCLE", "off")
    assert same(outputs(recycling), want)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("resident", ["disk", "ram", "cuda", None])
@pytest.mark.parametrize("workers", [0, 1])
def test_on_a_gpu_every_way_gives_the_same(resident, workers, tmp_path):
    model = residual().cuda()
    want = torch.cat(outputs(made(tmp_path, "disk", model)))
    recycling = made(tmp_path, resident, residual().cuda())
    got = torch.cat(outputs(recycling, num_workers=workers))
    assert torch.equal(got, want)
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    assert (batch.leaves is None) == (resident in ("cuda", None))


@GPU
def test_a_model_that_moves_to_the_gpu_has_its_rows_there_from_the_next_iteration_on(tmp_path):
    recycling = made(tmp_path, None)
    loader = recycling.loader(DATA, batch_size=8)
    assert next(iter(loader))[0].leaves is not None
    recycling.model.cuda()
    batch = next(iter(loader))[0]
    assert batch.leaves is None
    assert [copy.device.type for copy in recycling.residents] == ["cuda"]
    recycling.model(batch.cuda())
