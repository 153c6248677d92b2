"""What a recycling offers: pausing, predicting, checking, detaching; and what it refuses, in words."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import CUT, bert, labels, pictures, residual, texts
from torchrecycle import (
    BatchError,
    CutError,
    RecycledTensor,
    Recycling,
    StaleActivationError,
    StoreError,
    recycle,
)
from torchrecycle.store import FORMAT_VERSION

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def outputs(recycling: Recycling, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([recycling.model(x) for x, _ in recycling.loader(DATA, batch_size=8, **arguments)])


# -- pausing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_workers": 1},
        {"num_workers": 1, "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
    ids=str,
)
def test_paused_loaders_give_raw_batches_and_the_same_outputs(arguments, made):
    loader = made.loader(DATA, batch_size=8, **arguments)
    with torch.no_grad():
        recycled = [made.model(x) for x, _ in loader]
        with made.paused():
            batches = list(loader)
            assert not any(isinstance(x, RecycledTensor) for x, _ in batches)
            assert torch.equal(torch.cat([x for x, _ in batches]), X)
            raw = [made.model(x) for x, _ in batches]
    assert all(torch.equal(a, b) for a, b in zip(recycled, raw, strict=True))
    assert all(isinstance(x, RecycledTensor) for x, _ in loader)


def test_the_environment_variable_switches_recycling_off(made, monkeypatch):
    want = outputs(made)
    hits = made.stats.hits
    monkeypatch.setenv("TORCHRECYCLE", "off")
    assert torch.equal(outputs(made), want)
    assert not any(isinstance(x, RecycledTensor) for x, _ in made.loader(DATA, batch_size=8))
    assert made.stats.hits == hits
    monkeypatch.delenv("TORCHRECYCLE")
    assert torch.equal(outputs(made), want)


def test_a_recycled_batch_in_a_pause_is_an_error_that_says_so(made):
    x, _ = next(iter(made.loader(DATA, batch_size=8)))
    with made.paused(), pytest.raises(BatchError, match="while recycling is off: it holds no objects"):
        made.model(x)


# -- predicting and checking -------------------------------------------------------------------------------------------


def test_predict_gives_what_a_plain_loop_gives_and_keeps_it(made):
    made.model.train()
    got = made.predict(DATA, batch_size=8)
    assert made.model.training
    assert (made.stats.misses, made.stats.hits) == (24, 24)
    assert torch.equal(made.predict(DATA, batch_size=8), got)
    assert made.stats.misses == 24
    made.detach()
    made.model.eval()
    with torch.no_grad():
        want = torch.cat([made.model(x) for x, _ in DataLoader(DATA, batch_size=8)])
    assert torch.equal(got, want)


def test_predict_runs_under_the_declared_autocast(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", autocast=torch.bfloat16)
    assert recycling.predict(DATA, batch_size=8).dtype is torch.bfloat16


def test_check_tells_kept_from_fresh(made):
    assert made.check((X, Y)).found == 0
    made.fill(TensorDataset(X[:10], Y[:10]), batch_size=10)
    report = made.check((X, Y))
    assert (report.objects, report.found) == (24, 10)
    assert report.ok
    assert "10 of 24 objects are kept" in str(report)
    with pytest.raises(BatchError, match="needs a raw batch"):
        made.check(next(iter(made.loader(DATA, batch_size=8))))


class Swapped(torch.utils.data.Dataset[Any]):
    """A data set whose content changes where nobody sees it: no name in its code leads to `SHIFT`."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return X[index] + globals()["SHIFT"], int(Y[index])


SHIFT = 0.0


def test_the_canary_raises_when_the_data_set_is_swapped_underneath(tmp_path, monkeypatch):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", verify_every=2)
    loader = recycling.loader(Swapped(), batch_size=8)
    assert len(list(loader)) == 3
    monkeypatch.setitem(globals(), "SHIFT", 1.0)
    with pytest.raises(StaleActivationError, match="differs from its kept row"):
        list(loader)


def test_stats_count_hits_misses_and_bytes(made):
    outputs(made)
    stats = made.stats
    assert (stats.hits, stats.misses) == (24, 24)
    assert stats.bytes_read == 24 * 16 * 4 * 4 * 4
    assert stats.bytes_written >= stats.bytes_read
    assert stats.prefix_seconds > 0
    assert stats.suffix_seconds > 0
    made.model(X[:5])
    assert stats.misses == 29


def test_a_raw_batch_goes_the_same_way_as_a_recycled_one(made):
    with torch.no_grad():
        x, _ = next(iter(made.loader(DATA, batch_size=24)))
        made.fill(DATA)
        assert torch.allclose(made.model(X), made.model(x), atol=1e-6)
    made.model.train()
    made.model(X).sum().backward()
    trained = {name for name, p in made.model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("stages.2", "head")) for name in trained)


# -- detaching ---------------------------------------------------------------------------------------------------------


def looks(model: nn.Module) -> Any:
    return [
        (
            name,
            sorted(module.__dict__),
            module.training,
            [(n, p.requires_grad) for n, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("how", ["detach", "with", "exception", "loader broken off"])
def test_after_detaching_the_model_is_as_it_was(how, tmp_path):
    model = residual()
    model.head.weight.requires_grad_(False)
    before, weights = looks(model), copy.deepcopy(model.state_dict())
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    assert looks(model) != before
    if how == "exception":
        with pytest.raises(ZeroDivisionError), recycling:
            1 / len(outputs(recycling)[:0])
    elif how == "with":
        with recycling:
            outputs(recycling)
    else:
        if how == "loader broken off":
            iterator = iter(recycling.loader(DATA, batch_size=4))
            next(iterator)
        recycling.detach()
        recycling.detach()
    assert looks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_failed_recycle_leaves_the_model_as_it_was(tmp_path):
    model = residual()
    before = looks(model)
    for arguments in ({"cut": "nowhere"}, {"cut": ""}, {"cut": "head"}):
        with contextlib.suppress(CutError):
            recycle(model, X[:2], store=tmp_path / "store", **arguments).detach()
        assert looks(model) == before


def test_two_recyclings_on_one_model_each_serve_their_own_batches(tmp_path):
    model = residual()
    first = recycle(model, X[:2], cut="stages.0", store=tmp_path / "store")
    second = recycle(model, X[:2], cut="stages.1", store=tmp_path / "store")
    with torch.no_grad():
        want = model(X[:8])
        for one in (first, second):
            x, _ = next(iter(one.loader(DATA, batch_size=8)))
            assert torch.allclose(model(x), want, atol=1e-6)
    second.detach()
    assert torch.allclose(outputs(first)[:8], want, atol=1e-6)
    first.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_a_loader_of_a_detached_recycling_reads_the_objects(made):
    loader = made.loader(DATA, batch_size=8)
    made.detach()
    assert torch.equal(torch.cat([x for x, _ in loader]), X)


def test_copies_of_a_loader_and_its_data_set_give_the_same_batches(made):
    loader = made.loader(DATA, batch_size=8)
    for one in (copy.copy(loader), copy.deepcopy(loader)):
        assert one.dataset.owner is made
        for (a, u), (b, v) in zip(loader, one, strict=True):
            assert torch.equal(a.locations, b.locations)
            assert torch.equal(u, v)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, CutError, "give either cut='layer2' or level=0.5"),
        ({"cut": CUT, "level": 0.5}, CutError, "give either cut"),
        ({"cut": "stages.9"}, CutError, "no module of that name. Nearest: 'stages"),
        ({"cut": CUT, "precision": "float8"}, ValueError, "precision='float8' is none of"),
        ({"cut": CUT, "views": 0}, ValueError, "views=0 is no number of views"),
        ({"cut": CUT, "share": "maybe"}, ValueError, "neither 'refuse' nor 'freeze'"),
        ({"cut": CUT, "example": X[:1]}, BatchError, "two or more"),
        ({"cut": CUT, "example": (X[:2], Y[:2])}, BatchError, "does not run on the example"),
        ({"cut": CUT, "example": {"pictures": X[:2]}}, BatchError, "does not run on the example"),
        ({"cut": CUT, "example": X[:2, :1]}, BatchError, "does not run on the example: RuntimeError"),
        ({"cut": CUT, "example": "picture"}, BatchError, "the example is a str"),
        ({"cut": CUT, "example": []}, BatchError, "example"),
        ({"cut": CUT, "mask": "attention"}, BatchError, "mask='attention' is no tensor input"),
        ({"level": 2.0}, ValueError, "level"),
        ({"level": -0.5}, ValueError, "level"),
        ({"cut": CUT, "verify_every": -1}, ValueError, "verify_every"),
    ],
    ids=range(16),
)
def test_bad_arguments_are_refused_in_words(arguments, error, words, tmp_path):
    example = arguments.pop("example", X[:2])
    model = residual()
    before = looks(model)
    with pytest.raises(error, match=words):
        recycle(model, example, store=tmp_path / "store", **arguments)
    assert looks(model) == before


def test_a_store_that_is_none_is_refused_in_words(tmp_path):
    file = tmp_path / "file"
    file.write_text("no store")
    with pytest.raises(StoreError, match="file"):
        recycle(residual(), X[:2], cut=CUT, store=file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.docx").write_text("")
    with pytest.raises(StoreError, match="other"):
        recycle(residual(), X[:2], cut=CUT, store=other)


def test_a_store_of_a_newer_format_is_refused_in_words(tmp_path):
    store = tmp_path / "store"
    with recycle(residual(), X[:2], cut=CUT, store=store) as recycling:
        recycling.fill(DATA)
        about = store / recycling.fingerprint / "about.json"
    import json

    content = json.loads(about.read_text())
    name = next(n for n, v in content.items() if v == FORMAT_VERSION)
    about.write_text(json.dumps({**content, name: FORMAT_VERSION + 1}))
    with pytest.raises(StoreError, match=r"newer|version"):
        recycle(residual(), X[:2], cut=CUT, store=store)


def test_a_model_that_is_wrapped_already_is_refused(tmp_path):
    with pytest.raises(CutError, match="wrapped in DataParallel already: attach first, wrap after"):
        recycle(nn.DataParallel(residual()), X[:2], cut=CUT, store=tmp_path / "store")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(residual())
        with pytest.raises(CutError, match="wrapped in DistributedDataParallel already: attach first"):
            recycle(wrapped, X[:2], cut=CUT, store=tmp_path / "store")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(CutError, match="compiled already"):
        recycle(torch.compile(residual()), X[:2], cut=CUT, store=tmp_path / "store")


def test_inputs_says_where_the_model_inputs_are(tmp_path):
    recycling = recycle(
        residual(), (Y[:2], X[:2]), cut=CUT, store=tmp_path / "store", inputs=lambda batch: ((batch[1],), {})
    )
    y, x = next(iter(recycling.loader(TensorDataset(Y, X), batch_size=8)))
    assert isinstance(x, RecycledTensor)
    assert torch.equal(y, Y[:8])
    with torch.no_grad():
        assert torch.allclose(recycling.model(x), recycling.model(X[:8]), atol=1e-6)


class Two(nn.Module):
    """Two inputs of one shape, of which each half of a pair of data sets uses another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_another_inputs_function_on_the_same_data_set_has_its_own_rows(tmp_path):
    pair = TensorDataset(X, X.flip(-1))
    for place in (0, 1):
        model = Two()
        with recycle(
            model,
            (X[:2], X[:2]),
            cut=f"inner.{CUT}",
            store=tmp_path / "store",
            inputs=lambda batch, place=place: ((batch[place],), {}),
        ) as one:
            batch = next(iter(one.loader(pair, batch_size=8)))
            with torch.no_grad():
                assert torch.allclose(model(batch[place]), model(pair.tensors[place][:8]), atol=1e-6)


def test_texts_are_predicted_in_their_own_lengths(tmp_path):
    model = bert()
    ids = [torch.tensor([101, *range(1000, 1000 + len(text.split())), 102]) for text in texts(9)]
    data = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]

    def pad(items: Any) -> Any:
        return {n: nn.utils.rnn.pad_sequence([i[n] for i in items], batch_first=True) for n in items[0]}

    recycling = recycle(model, pad(data[:3]), level=0.5, store=tmp_path / "store")
    got = recycling.predict(data, batch_size=4, collate_fn=pad)["logits"]
    with recycling.paused(), torch.no_grad():
        want = torch.cat([model(**pad([item])).logits for item in data])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
