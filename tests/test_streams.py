"""Iterable data sets: the batches of a plain loader, with rows found by content, and kept as they are computed."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from small import CUT, bert, labels, pictures, residual
from test_mix import close, full, no_room
from torchrecycle import BatchError, RecycledTensor, RecycleWarning, Recycling, StaleActivationError, fill_many, recycle

N = 22
X, Y = pictures(N), labels(N)

forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")


class Stream(IterableDataset[Any]):
    """Items in order, split among workers; in another order in each epoch if told so."""

    def __init__(self, make: Callable[[int], Any] | None = None, *, count: int = N, shuffle: bool = False) -> None:
        self.make, self.count, self.shuffle = make, count, shuffle
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.count))
        if self.shuffle:
            random.Random(self.epoch).shuffle(order)
        self.epoch += 1
        worker = get_worker_info()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        for index in order:
            yield self.make(index) if self.make else (X[index], Y[index])


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


def as_dict(index: int) -> Any:
    return {"x": X[index], "label": int(Y[index]), "name": f"number {index}"}


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def compare(recycling: Recycling, plain: Any, recycled: Any, inputs: Any = lambda batch: batch[0]) -> tuple[int, int]:
    """Same targets in the same order, and what the whole model gives; how many objects, and how many had a row."""
    objects = found = 0
    for a, b in zip(plain, recycled, strict=True):
        x = inputs(b)
        assert isinstance(x, RecycledTensor)
        rest = [(a[k], b[k]) for k in a] if isinstance(a, dict) else list(zip(a, b, strict=True))
        for want, got in rest:
            if got is not x:
                assert type(want) is type(got)
                assert torch.equal(want, got) if isinstance(want, torch.Tensor) else want == got
        assert x.shape == inputs(a).shape
        objects, found = objects + x.rows, found + x.rows - len(x.misses)
        with torch.no_grad():
            close(recycling.model(x), full(recycling, inputs(a)))
    return objects, found


# -- the same batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_size": 4, "drop_last": True},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "prefetch_factor": 3},
        pytest.param({"num_workers": 2, "multiprocessing_context": "spawn", "drop_last": True}, marks=pytest.mark.slow),
        pytest.param(
            {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
@forks
def test_a_stream_gives_the_plain_batches_and_is_found_in_the_second_epoch(arguments, made):
    arguments = {"batch_size": 5, **arguments}
    plain = DataLoader(Stream(shuffle=True), **arguments)
    loader = made.loader(Stream(shuffle=True), **arguments)
    dropped = arguments.get("drop_last", False)
    for epoch in range(3):
        objects, found = compare(made, plain, loader)
        if not dropped:
            assert (objects, found) == (N, N if epoch else 0)
        elif epoch:  # what was dropped before may come now
            assert found > objects // 2
    if not dropped:
        assert made.stats.misses == N
        assert made.stats.hits == 2 * N
        assert made.stats.bytes_written > 0


@forks
@pytest.mark.parametrize("persistent", [False, True])
def test_rows_in_memory_are_found_by_workers_too(persistent):
    recycling = recycle(residual(), X[:2], cut=CUT, store=f"memory://streams-{persistent}")
    arguments: Any = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    plain = DataLoader(Stream(), batch_size=5, **arguments)
    loader = recycling.loader(Stream(), batch_size=5, **arguments)
    assert [compare(recycling, plain, loader) for _ in range(3)] == [(N, 0), (N, N), (N, N)]


@pytest.mark.parametrize("sized", [False, True])
def test_a_stream_has_the_length_that_it_has_without_us(sized, made):
    dataset = (Sized if sized else Stream)()
    plain, loader = DataLoader(dataset, batch_size=4), made.loader(dataset, batch_size=4)
    if sized:
        assert len(loader) == len(plain)
    else:
        for one in (plain, loader):
            with pytest.raises(TypeError, match="has no len"):
                len(one)
    assert loader.dataset is dataset


def test_items_may_be_dicts_and_go_through_the_users_collate_function(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")

    def collate(items: Any) -> Any:
        return {"x": torch.stack([item["x"] for item in items]), "names": [item["name"] for item in items]}

    for collate_fn in (None, collate):
        plain = DataLoader(Stream(as_dict), batch_size=6, collate_fn=collate_fn)
        loader = recycling.loader(Stream(as_dict), batch_size=6, collate_fn=collate_fn)
        assert compare(recycling, plain, loader, lambda batch: batch["x"])[0] == N
    assert recycling.stats.hits == N


@pytest.mark.parametrize("collated", [False, True])
def test_a_stream_may_give_batches_itself(collated, made):
    def batch_of(index: int) -> Any:
        return X[3 * index : 3 * index + 3], Y[3 * index : 3 * index + 3]

    collate = (lambda batch: list(batch)) if collated else None
    plain = DataLoader(Stream(batch_of, count=7), batch_size=None, collate_fn=collate)
    loader = made.loader(Stream(batch_of, count=7), batch_size=None, collate_fn=collate)
    assert compare(made, plain, loader) == (21, 0)
    assert compare(made, plain, loader) == (21, 21)
    with pytest.raises(BatchError, match="batch_size=None gives single items"):
        made.loader(TensorDataset(X, Y), batch_size=None)


@forks
def test_a_worker_init_fn_sees_the_users_own_data_set(made):
    def split(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        info.dataset.count = 5 + worker  # the idiom of torch's documentation

    class Whole(Stream):
        def __iter__(self) -> Iterator[Any]:
            return ((X[index], Y[index]) for index in range(self.count))

    arguments: Any = {"num_workers": 2, "worker_init_fn": split, "multiprocessing_context": "fork", "batch_size": 4}
    assert compare(made, DataLoader(Whole(), **arguments), made.loader(Whole(), **arguments))[0] == 11


def test_the_random_state_after_an_epoch_is_that_after_a_plain_one(made):
    class Drawing(Stream):
        def __iter__(self) -> Iterator[Any]:
            for index in torch.randperm(N).tolist():
                yield X[index], Y[index]

    torch.manual_seed(5)
    want = [y for _, y in DataLoader(Drawing(), batch_size=4)], torch.rand(3)
    loader = made.loader(Drawing(), batch_size=4)
    for _ in range(2):
        torch.manual_seed(5)
        got = []
        for x, y in loader:
            got.append(y)
            with torch.no_grad():
                made.model(x)
        assert all(map(torch.equal, got, want[0]))
        assert torch.equal(torch.rand(3), want[1])


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_hugging_face_data_set_with_its_shuffle_buffer(workers, tmp_path):
    import datasets

    def stream() -> Any:
        table = datasets.Dataset.from_dict({"x": X.numpy(), "label": Y.tolist()})
        return table.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=7).with_format("torch")

    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    ours, theirs = stream(), stream()
    arguments: Any = {"batch_size": 5, "num_workers": workers}
    if workers:
        arguments["multiprocessing_context"] = "fork"
    loader, plain = recycling.loader(ours, **arguments), DataLoader(theirs, **arguments)
    orders = []
    for epoch in range(3):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert compare(recycling, plain, loader, lambda batch: batch["x"]) == (N, N if epoch else 0)
        orders.append(torch.cat([batch["label"] for batch in plain]).tolist())
    assert orders[0] != orders[1]


# -- training, predicting, filling -------------------------------------------------------------------------------------


def train(model: nn.Module, batches: Any, settle: Callable[[], None], epochs: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            model.train()
            settle()
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["loader", "dataset and collate"])
def test_training_on_a_stream_gives_the_losses_of_the_frozen_reference(how, tmp_path):
    model = residual()
    reference = copy.deepcopy(model)
    frozen = [reference.stem, reference.stages[0], reference.stages[1]]
    for part in frozen:
        part.requires_grad_(False)
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    stream = Stream(shuffle=True)
    if how == "loader":
        batches: Any = recycling.loader(stream, batch_size=5)
    else:
        batches = DataLoader(recycling.dataset(stream), batch_size=5, collate_fn=recycling.collate())
    got = train(model, batches, lambda: None)
    want = train(reference, DataLoader(Stream(shuffle=True), batch_size=5), lambda: [m.eval() for m in frozen] and None)
    assert got == pytest.approx(want, rel=1e-3, abs=1e-5)
    # A loader that is not ours does not say when an epoch begins: its first batch does, and is computed once more.
    assert recycling.stats.misses <= N + (0 if how == "loader" else 5)
    recycling.detach()
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@forks
def test_with_a_loader_of_ones_own_rows_are_kept_and_found_by_its_workers(made):
    stream, collate = made.dataset(Stream()), made.collate()
    loader = DataLoader(
        stream, batch_size=5, collate_fn=collate, num_workers=2, multiprocessing_context="fork", persistent_workers=True
    )
    plain = DataLoader(Stream(), batch_size=5, num_workers=2, multiprocessing_context="fork")
    found = [compare(made, plain, loader)[1] for _ in range(4)]
    assert found[0] == 0
    assert found[3] == N
    assert made.stats.misses < 3 * N


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_accelerate_takes_a_loader_over_a_stream(made):
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(made.loader(Stream(), batch_size=5))
    for epoch in range(3):
        for (x, y), (plain, want) in zip(loader, DataLoader(Stream(), batch_size=5), strict=True):
            assert isinstance(x, RecycledTensor)
            assert torch.equal(y, want)
            with torch.no_grad():
                close(made.model(x), full(made, plain))
        assert made.stats.hits >= epoch * N - 10  # it reads a batch ahead of the model
    assert made.stats.hits > N


def test_predict_computes_keeps_and_finds(made):
    want = full(made, X)
    for hits in (0, N):
        close(made.predict(Stream(), batch_size=4), want)
        assert made.stats.hits == hits
    assert made.stats.misses == N


@pytest.mark.parametrize("workers", [0, 2])
@forks
def test_a_stream_can_be_filled_before(workers, made):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    report = made.fill(Stream(), batch_size=4, num_workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert (report.objects, report.computed, report.found, report.missing) == (N, N, 0, 0)
    report = made.fill(Stream(shuffle=True))
    assert (report.computed, report.found) == (0, N)
    assert compare(made, DataLoader(Stream(), batch_size=4), made.loader(Stream(), batch_size=4)) == (N, N)
    assert compare(made, DataLoader(TensorDataset(X, Y)), made.loader(TensorDataset(X, Y))) == (N, N)
    assert made.stats.misses == N


def test_several_cuts_are_filled_from_a_stream_in_one_pass(tmp_path):
    model = residual()
    recyclings = [
        recycle(copy.deepcopy(model), X[:2], cut=cut, store=tmp_path / "store") for cut in ("stages.0", "stages.1")
    ]
    reports = fill_many(recyclings, Stream(), batch_size=5)
    assert [report.computed for report in reports] == [N, N]
    for recycling in recyclings:
        assert compare(recycling, DataLoader(Stream()), recycling.loader(Stream())) == (N, N)


def test_texts_of_any_length_are_found_without_their_padding(tmp_path):
    generator = torch.Generator().manual_seed(2)
    lengths = [3 + index * 7 % 11 for index in range(N)]
    ids = [torch.randint(5, 500, (length,), generator=generator) for length in lengths]

    def collate(items: Any) -> Any:
        longest = max(len(item[0]) for item in items)
        padded = torch.stack([nn.functional.pad(item[0], (0, longest - len(item[0]))) for item in items])
        return {"input_ids": padded, "attention_mask": (padded != 0).long(), "n": [item[1] for item in items]}

    example = {k: v for k, v in collate([(ids[0], 0), (ids[1], 1)]).items() if k != "n"}
    recycling = recycle(bert(), example, level=0.5, store=tmp_path / "store")
    for shuffle in (False, True):  # other batches, so other padding
        stream = Stream(lambda index: (ids[index], index), shuffle=shuffle)
        for batch in recycling.loader(stream, batch_size=4, collate_fn=collate):
            plain = collate([(ids[n], n) for n in batch["n"]])
            arguments = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in (batch, plain)]
            with torch.no_grad():
                got = recycling.model(**arguments[0]).logits
                close(got, full(recycling, **arguments[1]).logits)
    assert (recycling.stats.misses, recycling.stats.hits) == (N, N)


def test_known_and_new_objects_come_in_one_batch(made):
    made.fill(TensorDataset(X[::2], Y[::2]))
    objects, found = compare(made, DataLoader(Stream(), batch_size=5), made.loader(Stream(), batch_size=5))
    assert (objects, found) == (N, N // 2)
    assert compare(made, DataLoader(Stream(), batch_size=5), made.loader(Stream(), batch_size=5)) == (N, N)


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_a_store_that_takes_no_more_is_told_once_and_training_goes_on(made):
    loader = made.loader(Stream(), batch_size=5)
    with no_room():
        with pytest.warns(RecycleWarning, match="no more rows of the stream are kept.*Free some space"):
            assert compare(made, DataLoader(Stream(), batch_size=5), loader) == (N, 0)
        for _ in range(2):  # warnings are errors here
            assert compare(made, DataLoader(Stream(), batch_size=5), loader) == (N, 0)
    # A new loader tries again.
    loader = made.loader(Stream(), batch_size=5)
    assert [compare(made, DataLoader(Stream(), batch_size=5), loader)[1] for _ in range(2)] == [0, N]


def test_filling_a_stream_into_a_full_store_says_how_many_have_rows(made):
    with no_room(), pytest.warns(RecycleWarning, match=f"0 of {N} objects of 'stages.1' have rows"):
        report = made.fill(Stream(), batch_size=5)
    assert report.missing == N


class Flipping(Stream):
    def __iter__(self) -> Iterator[Any]:
        for index in range(N):
            yield X[index] + torch.rand(()), Y[index]


def run(recycling: Recycling, loader: Any) -> None:
    for x, _ in loader:
        with torch.no_grad():
            recycling.model(x)


def test_a_stream_that_never_comes_again_is_told_once_and_keeps_no_more(made):
    loader = made.loader(Flipping(), batch_size=5)
    run(made, loader)
    assert len(made.source.rows) == N
    words = rf"of {N} objects that the Flipping gave after its first epoch of {N}, 0 were found again.*augment=.*views="
    with pytest.warns(RecycleWarning, match=words):
        run(made, loader)
    rows = len(made.source.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(made, loader)
        run(made, loader)
    assert len(made.source.rows) == rows


def test_a_stream_that_is_broken_off_or_has_new_data_among_old_is_not_told_so(made):
    loader = made.loader(Stream(shuffle=True), batch_size=2)
    for _ in range(6):  # an epoch of three steps
        for step, (x, _) in enumerate(loader):
            with torch.no_grad():
                made.model(x)
            if step == 2:
                break
    assert made.stats.hits > 0


def test_what_asks_for_an_index_is_refused_in_words(made, tmp_path):
    with pytest.raises(BatchError, match=r"name='train' keeps what was read of a map-style data set.*Leave name= out"):
        made.loader(Stream(), name="train")
    with pytest.raises(ValueError, match="shuffle"):
        made.loader(Stream(), shuffle=True)
    keyed = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "keyed", key=lambda item: 1)
    for call in (keyed.loader, keyed.dataset, keyed.fill):
        with pytest.raises(BatchError, match=r"key=\.\.\.\) and an iterable data set do not go together"):
            call(Stream())


def test_views_of_a_stream_are_refused_in_words(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", views=2)
    for call in (recycling.loader, recycling.dataset, recycling.fill):
        with pytest.raises(BatchError, match=r"views=2 draws one of the augmented versions of an object by its index"):
            call(Stream())


def test_paused_a_stream_gives_its_objects(made):
    loader = made.loader(Stream(), batch_size=5)
    with made.paused():
        for (x, _), (want, _) in zip(loader, DataLoader(Stream(), batch_size=5), strict=True):
            assert torch.equal(x, want)
    assert compare(made, DataLoader(Stream(), batch_size=5), loader) == (N, 0)


# -- never the row of another ------------------------------------------------------------------------------------------


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_after_the_model_moved_the_next_epoch_has_the_rows_of_now(workers, made):
    arguments: Any = {"batch_size": 5, "num_workers": workers, "persistent_workers": bool(workers)}
    if workers:
        arguments["multiprocessing_context"] = "fork"
    loader, plain = made.loader(Stream(), **arguments), DataLoader(Stream(), **arguments)
    compare(made, plain, loader)
    with torch.no_grad():
        made.model.stem.weight.mul_(1.5)
    assert compare(made, plain, loader) == (N, 0)
    assert compare(made, plain, loader) == (N, N)


@pytest.mark.parametrize("when", ["seen by a counter", "behind the counters", "behind them and put back"])
def test_rows_that_are_computed_while_the_prefix_moves_are_not_kept(when, made):
    stem = made.model.stem.weight
    before = stem.detach().clone()

    def train_and_write() -> None:
        for step, (x, _) in enumerate(made.loader(Stream(), batch_size=5)):
            if step == 1 and when == "seen by a counter":
                with torch.no_grad():
                    stem.mul_(1.5)
            elif step == 1:
                stem.detach().numpy()[:] *= 1.5
            try:
                with torch.no_grad():
                    made.model(x)
            finally:
                if when == "behind them and put back":
                    stem.detach().numpy()[:] = before.numpy()

    with pytest.raises(StaleActivationError, match="moved"):
        train_and_write()
    stem.detach().numpy()[:] = before.numpy()
    fresh = recycle(residual(), X[:2], cut=CUT, store=made.store)
    assert fresh.fingerprint == made.fingerprint
    for start in range(0, N, 2):
        assert fresh.check((X[start : start + 2], None)).ok


def test_a_change_that_the_example_does_not_show_keeps_no_row(tmp_path):
    """One word's embedding, which the example has not, is written over where no counter sees it.

    Each forward is taken to be much faster than hashing, so that only the example is run again with it.
    """
    ids = torch.randint(5, 500, (12, 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 501

    class Texts(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([{"input_ids": one} for one in ids])

    def made() -> Recycling:
        return recycle(bert(), {"input_ids": torch.full((2, 6), 7)}, level=0.5, store=tmp_path / "store")

    recycling = made()
    table = recycling.model.bert.embeddings.word_embeddings.weight.detach().numpy()
    before = table.copy()
    for step, batch in enumerate(recycling.loader(Texts(), batch_size=4)):
        recycling._drift.hash_seconds = 3600.0  # as measured at its last hash
        if step == 1:
            table[501] = table[502]
        with torch.no_grad():
            recycling.model(**batch)
    table[:] = before
    recycling.detach()
    fresh = made()
    assert fresh.fingerprint == recycling.fingerprint
    for one in ids:
        assert fresh.check({"input_ids": one[None].expand(2, -1)}).ok


def test_inputs_that_were_changed_after_the_loader_are_computed_as_they_are(made):
    """All of a batch's objects are at hand in the first epoch, so a loop may compute with them."""
    loader = made.loader(Stream(), batch_size=5)
    for (x, _), (plain, _) in zip(loader, DataLoader(Stream(), batch_size=5), strict=True):
        with torch.no_grad():
            close(made.model(x.flip(3)), full(made, plain.flip(3)))
            close(made.model(x * 0.5), full(made, plain * 0.5))
    assert len(made.source.rows) == 0
    run(made, loader)
    with pytest.raises(BatchError, match="reads the values of a batch input"):
        next(iter(loader))[0] * 0.5


def test_reordered_and_sliced_batches_keep_each_object_with_its_row(made):
    for _ in range(2):
        for (x, _), (plain, _) in zip(
            made.loader(Stream(), batch_size=6), DataLoader(Stream(), batch_size=6), strict=True
        ):
            order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                close(made.model(x[order]), full(made, plain[order]))
                close(made.model(torch.cat([x[2:], x[:2]])), full(made, torch.cat([plain[2:], plain[:2]])))
    fresh = recycle(residual(), X[:2], cut=CUT, store=made.store)
    assert all(fresh.check((X[i : i + 2], None)).found == 2 for i in range(0, N, 2))
    assert all(fresh.check((X[i : i + 2], None)).ok for i in range(0, N, 2))


def test_a_stream_that_writes_into_its_last_item_gives_each_object_its_own_row(made):
    class Reusing(Stream):
        def __iter__(self) -> Iterator[Any]:
            buffer = np.empty(X[0].shape, np.float32)
            for index in range(N):
                buffer[:] = X[index].numpy()
                yield torch.from_numpy(buffer).clone() if index % 2 else torch.from_numpy(buffer.copy()), Y[index]

    for _ in range(2):
        compare(made, DataLoader(Stream(), batch_size=1), made.loader(Reusing(), batch_size=1))


def test_the_suffix_may_write_into_what_is_kept(tmp_path):
    """A ReLU in place behind the cut: what goes into the store is what came before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 14 * 14, 4)).eval()
    recycling = recycle(model, X[:2], cut="0", store=tmp_path / "store")
    for _ in range(2):
        compare(recycling, DataLoader(Stream(), batch_size=5), recycling.loader(Stream(), batch_size=5))
    assert recycling.stats.hits == N
    assert all(recycling.check(X[i : i + 2]).ok for i in range(0, N, 2))
