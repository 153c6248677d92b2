"""Batches that mix objects with a row and objects without: the same function as with all rows.

The misses are real: a disk that took no more rows, a folder that was deleted under its reader, a plain loader over a
data set of which the store knows a part.
"""

from __future__ import annotations

import copy
import pickle
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from small import CUT, Counted, bert, labels, pictures, residual
from small_models import WORDS, llama
from torchrecycle import (
    AutocastError,
    BatchError,
    DamagedRowError,
    RecycledTensor,
    RecycleWarning,
    Recycling,
    StaleActivationError,
    recycle,
)
from torchrecycle.errors import GoneRowsError
from torchrecycle.store import FolderStore

N = 24
X, Y = pictures(N), labels(N)
DATA = TensorDataset(X, Y)
KEPT = [i for i in range(N) if i % 3]
"""Two of three have rows, so that each batch of 8 is mixed."""

forks = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")


@contextmanager
def no_room() -> Iterator[None]:
    """Within this context no file can be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def keep_some(recycling: Recycling, dataset: Any, kept: Sequence[int] = KEPT, **arguments: Any) -> None:
    """Fill until the disk is full: only these items get rows, and the manifest has all."""
    arguments = {"batch_size": 8, **arguments}
    recycling.fill(Subset(dataset, kept), **arguments)
    with no_room(), pytest.warns(RecycleWarning, match="filling has ended"):
        report = recycling.fill(dataset, **arguments)
    assert report.missing == len(dataset) - len(kept)


def is_mixed(tensor: Any) -> bool:
    return isinstance(tensor, RecycledTensor) and 0 < len(tensor.misses) < tensor.rows


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def full(recycling: Recycling, *args: Any, **kwargs: Any) -> Any:
    """The reference: the whole model on the objects themselves, its prefix frozen."""
    with recycling.paused(), torch.no_grad():
        return recycling.model(*args, **kwargs)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- a store that took no more -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shuffle": True},
        {"num_workers": 2, "multiprocessing_context": "fork"},
        pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    ],
    ids=lambda case: str(case).partition(" at 0x")[0],
)
@forks
def test_a_partly_filled_data_set_gives_what_the_whole_model_gives(arguments, made):
    keep_some(made, DATA)
    misses = made.stats.misses
    torch.manual_seed(2)
    plain = list(DataLoader(DATA, batch_size=8, **arguments))
    loader = made.loader(DATA, batch_size=8, **arguments)
    torch.manual_seed(2)
    for (x, y), (mixed, targets) in zip(plain, loader, strict=True):
        assert is_mixed(mixed)
        assert torch.equal(targets, y)
        assert (mixed.shape, mixed.dtype) == (x.shape, x.dtype)
        with torch.no_grad():
            close(made.model(mixed), full(made, x))
    assert made.stats.hits == len(KEPT)
    assert made.stats.misses - misses == N - len(KEPT)


@pytest.mark.parametrize("missing", [[3], [0, 1], [7], list(range(7)), [0, 2, 4, 6]], ids=str)
def test_any_number_of_misses_at_any_place_is_computed(missing, made):
    data = TensorDataset(X[:8], Y[:8])
    keep_some(made, data, [i for i in range(8) if i not in missing])
    ((x, _),) = made.loader(data, batch_size=8)
    assert x.misses.tolist() == missing
    assert x.missing is not None
    assert torch.equal(x.missing, X[missing])
    with torch.no_grad():
        close(made.model(x), full(made, X[:8]))


def test_a_batch_of_misses_alone_is_the_users_own_batch(made):
    data = TensorDataset(X[:16], Y[:16])
    keep_some(made, data, list(range(8)))
    first, second = made.loader(data, batch_size=8)
    assert isinstance(first[0], RecycledTensor)
    assert type(second[0]) is torch.Tensor
    assert torch.equal(second[0], X[8:16])


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "float16", "int8"])
def test_misses_equal_to_the_bit_what_the_store_would_have_given(precision, tmp_path):
    """Filled in the groups in which they are computed here, all rows give the same output."""
    missing = [1, 4, 5]
    kept = [i for i in range(8) if i not in missing]
    data = TensorDataset(X[:8], Y[:8])
    outputs = []
    for name in ("whole", "part"):
        model = residual()
        with recycle(model, X[:2], cut=CUT, store=tmp_path / name, precision=precision) as recycling:
            if name == "whole":
                recycling.fill(Subset(data, kept), batch_size=8)
                recycling.fill(Subset(data, missing), batch_size=8)
            else:
                keep_some(recycling, data, kept)
            ((x, y),) = recycling.loader(data, batch_size=8)
            assert is_mixed(x) is (name == "part")
            output = model.train()(x)
            nn.functional.cross_entropy(output, y).backward()
            outputs.append([output.detach(), *(p.grad for p in recycling.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_gradients_of_the_suffix_are_those_of_the_whole_model_with_a_frozen_prefix(made):
    keep_some(made, DATA)
    model, reference = made.model, residual()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not name.startswith(("stem", "stages.0", "stages.1")))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for (x, y), start in zip(made.loader(DATA, batch_size=8), range(0, N, 8), strict=True):
        model.train()
        reference.train()
        for part in (reference.stem, reference.stages[0], reference.stages[1]):
            part.eval()
        for m, given, optimizer in zip((model, reference), (x, X[start : start + 8]), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(given), y).backward()
            optimizer.step()
        for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None and b.grad is not None:
                close(a.grad, b.grad)
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        close(a, b)


def test_only_the_items_without_rows_are_read_and_filling_is_not_tried_again(made):
    dataset = Counted([(X[i], int(Y[i])) for i in range(N)])
    keep_some(made, dataset)
    loader = made.loader(dataset, batch_size=8, shuffle=True)
    dataset.count()
    for _ in range(2):
        assert sum(len(x) for x, _ in loader) == N
        assert dataset.count() == N - len(KEPT)


def test_what_another_process_fills_meanwhile_is_found_at_the_next_iteration(made, tmp_path):
    keep_some(made, DATA)
    loader = made.loader(DATA, batch_size=8)
    assert all(is_mixed(x) for x, _ in loader)
    with recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store") as other:
        other.fill(DATA)
    for x, _ in loader:
        assert not len(x.misses)
    assert made.fill(DATA).computed == 0


def test_filling_again_after_there_is_room_gives_all_rows(made):
    keep_some(made, DATA)
    loader = made.loader(DATA, batch_size=8)
    assert made.fill(DATA).computed == N - len(KEPT)
    for x, _ in loader:
        assert not len(x.misses)


def test_predict_takes_hits_from_the_store_and_computes_the_others(made):
    keep_some(made, DATA)
    misses = made.stats.misses
    close(made.predict(DATA, batch_size=8), full(made, X))
    assert made.stats.hits == len(KEPT)
    assert made.stats.misses - misses == N - len(KEPT)


def test_a_check_compares_what_is_kept_of_a_batch(made):
    keep_some(made, DATA)
    report = made.check((X[:9], Y[:9]))
    assert (report.objects, report.found) == (9, 6)
    assert report.ok


def test_the_canary_passes_over_objects_without_rows(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path, verify_every=1)
    keep_some(recycling, DATA)
    assert sum(len(x) for x, _ in recycling.loader(DATA, batch_size=1)) == N


# -- forms of items and of collate functions ---------------------------------------------------------------------------


class Items(Dataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


FORMS: dict[str, tuple[Any, Any]] = {
    "tensors": (Items(lambda i: X[i]), X[:2]),
    "dicts": (Items(lambda i: {"x": X[i], "label": i, "name": f"n{i}"}), {"x": X[:2]}),
    "nested": (Items(lambda i: (X[i], {"a": [i, float(i)], "b": (f"name {i}", np.float32(i))})), X[:2]),
    "NumPy": (Items(lambda i: (X[i].numpy(), np.int64(i))), X[:2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_batch_has_the_form_and_the_targets_of_the_plain_one(form, tmp_path):
    dataset, example = FORMS[form]
    recycling = recycle(residual(), example, cut=CUT, store=tmp_path)
    keep_some(recycling, dataset)
    for plain, mixed in zip(DataLoader(dataset, batch_size=8), recycling.loader(dataset, batch_size=8), strict=True):
        assert describe(mixed) == describe(plain)
        given = recycling.source.rule(mixed)
        assert any(is_mixed(tensor) for tensor in given.tensors().values())
        with torch.no_grad():
            got = recycling.model(*given.args, **given.kwargs)
        want = recycling.source.rule(plain)
        close(got, full(recycling, *want.args, **want.kwargs))


def describe(batch: Any) -> Any:
    """A batch in words: all of it but the values of pixels."""
    if isinstance(batch, torch.Tensor):
        return list(batch.shape), batch.dtype, batch.tolist() if batch.dim() < 4 else None
    if isinstance(batch, dict):
        return {name: describe(part) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch), [describe(part) for part in batch]
    return batch


def to_arguments(items: Any) -> Any:
    return {"y": torch.tensor([item[1] for item in items]), "x": torch.stack([item[0] for item in items])}


def looks(items: Any) -> Any:
    """Reads pixels: of stand-ins it cannot."""
    assert float(items[0][0].mean()) < 100
    assert float(items[1][0].mean()) < 100
    return default_collate(items)


@pytest.mark.parametrize("collate_fn", [to_arguments, looks])
@pytest.mark.parametrize("workers", [0, 1])
@forks
def test_the_users_collate_function_gets_through(collate_fn, workers, tmp_path):
    example = {"x": X[:2]} if collate_fn is to_arguments else X[:2]
    recycling = recycle(residual(), example, cut=CUT, store=tmp_path)
    data = [(X[i], int(Y[i])) for i in range(N)]
    keep_some(recycling, data, collate_fn=collate_fn)
    plain = DataLoader(data, batch_size=8, collate_fn=collate_fn)  # pyright: ignore
    loader = recycling.loader(data, batch_size=8, collate_fn=collate_fn, num_workers=workers)
    for a, b in zip(plain, loader, strict=True):
        (x, y), (mixed, targets) = ((p["x"], p["y"]) if isinstance(p, dict) else p for p in (a, b))
        assert torch.equal(y, targets)
        assert is_mixed(mixed)
        with torch.no_grad():
            close(recycling.model(mixed), full(recycling, x))


def broken(items: Any) -> Any:
    if isinstance(items[0][0], RecycledTensor) or len(items) == 7:
        raise KeyError("no such thing")
    return default_collate(items)


def test_an_error_of_the_users_collate_function_on_items_themselves_is_his_own(made):
    keep_some(made, DATA, collate_fn=broken, batch_size=8)
    loader = made.loader(DATA, batch_size=7, collate_fn=broken)
    with pytest.raises(KeyError, match="no such thing"):
        list(loader)


def test_items_that_default_collate_joins_without_our_collate_function_are_gathered_by_the_model(made):
    keep_some(made, DATA)
    for batches in (DataLoader(made.dataset(DATA), batch_size=8), DataLoader(Alone(made.dataset(DATA)), batch_size=8)):
        for (x, y), start in zip(batches, range(0, N, 8), strict=True):
            assert is_mixed(x)
            assert torch.equal(y, Y[start : start + 8])
            with torch.no_grad():
                close(made.model(x), full(made, X[start : start + 8]))


class Alone(Dataset[Any]):
    """Asks for items one by one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Named(Dataset[Any]):
    def __init__(self, order: Sequence[int]) -> None:
        self.order = list(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return {"x": X[self.order[index]], "id": self.order[index]}


def id_of(item: Any) -> int:
    return item["id"]


def test_with_user_keys_batches_are_mixed_too(tmp_path):
    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path, key=id_of)
    recycling.fill(Named(KEPT), name="v1")
    dataset = Named(range(N))
    with no_room(), pytest.warns(RecycleWarning, match="filling has ended"):
        recycling.fill(dataset, name="v1")
    for batch in recycling.loader(dataset, name="v1", batch_size=8):
        assert is_mixed(batch["x"])
        with torch.no_grad():
            close(recycling.model(batch["x"]), full(recycling, X[batch["id"]]))


# -- plain loaders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@forks
def test_of_a_plain_batch_some_rows_are_found_by_content(workers, made):
    made.fill(Subset(DATA, KEPT))
    misses = made.stats.misses
    loader = DataLoader(DATA, batch_size=8, collate_fn=made.collate(), num_workers=workers)
    for (x, y), start in zip(loader, range(0, N, 8), strict=True):
        assert is_mixed(x)
        assert torch.equal(y, Y[start : start + 8])
        with torch.no_grad():
            close(made.model(x), full(made, X[start : start + 8]))
    assert (made.stats.hits, made.stats.misses - misses) == (len(KEPT), N - len(KEPT))


def test_a_plain_batch_of_which_no_row_is_found_stays_as_it_is(made):
    made.fill(Subset(DATA, [0, 1]))
    x, _ = made.collate()([DATA[i] for i in (5, 6, 7)])
    assert type(x) is torch.Tensor
    assert torch.equal(x, X[5:8])


# -- texts -------------------------------------------------------------------------------------------------------------


def token_ids(index: int) -> list[int]:
    """A text of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(1, WORDS, (3 + index * 5 % 9,), generator=generator).tolist()


TEXTS = [{"input_ids": token_ids(i), "labels": i % 2} for i in range(N)]


def pad_right(items: Any) -> dict[str, torch.Tensor]:
    return _padded(items, left=False)


def pad_left(items: Any) -> dict[str, torch.Tensor]:
    return _padded(items, left=True)


def by_length(items: Any) -> dict[str, torch.Tensor]:
    return pad_right(sorted(items, key=lambda item: len(item["input_ids"])))


def _padded(items: Any, *, left: bool) -> dict[str, torch.Tensor]:
    longest = max(len(item["input_ids"]) for item in items)
    ids, mask = torch.zeros(len(items), longest, dtype=torch.long), torch.zeros(len(items), longest, dtype=torch.long)
    for row, item in enumerate(items):
        count = len(item["input_ids"])
        place = slice(longest - count, None) if left else slice(count)
        ids[row, place], mask[row, place] = torch.tensor(item["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def text_model(pad: Any = pad_right, **arguments: Any) -> Recycling:
    example = pad(TEXTS[:2])
    del example["labels"]
    if pad is pad_left:
        return recycle(llama().eval(), example, cut="model.layers.1", **arguments)
    return recycle(bert(), example, cut="bert.encoder.layer.1", **arguments)


@pytest.mark.parametrize("pad", [pad_right, pad_left, by_length])
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_texts_without_rows_are_computed_among_those_with_rows(pad, precision, tmp_path):
    recycling = text_model(pad, store=tmp_path, precision=precision)
    keep_some(recycling, TEXTS, collate_fn=pad)
    tolerance = 2e-2 if precision else 1e-5
    plain = list(DataLoader(TEXTS, batch_size=6, collate_fn=pad))  # pyright: ignore
    for a, b in zip(plain, recycling.loader(TEXTS, batch_size=6, collate_fn=pad), strict=True):
        assert is_mixed(b["input_ids"])
        assert all(torch.equal(a[n], b[n].value if n == "input_ids" else b[n]) for n in a)
        with torch.no_grad():
            got = recycling.model(**b)
        want = full(recycling, **a)
        torch.testing.assert_close(got.logits, want.logits, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.loss, want.loss, rtol=tolerance, atol=tolerance)
    assert recycling.stats.hits == len(KEPT)


def test_texts_whose_tokens_the_manifest_has_are_not_read_again(tmp_path):
    recycling = text_model(store=tmp_path)
    dataset = Counted(TEXTS)
    keep_some(recycling, dataset, collate_fn=pad_right)
    loader = recycling.loader(dataset, batch_size=24, collate_fn=pad_right)
    dataset.count()
    (batch,) = loader
    assert is_mixed(batch["input_ids"])
    assert dataset.count() == 0
    with torch.no_grad():
        close(recycling.model(**batch).logits, full(recycling, **pad_right(TEXTS)).logits)


def test_a_mask_that_was_changed_is_noticed_for_a_mixed_batch_too(tmp_path):
    recycling = text_model(store=tmp_path)
    keep_some(recycling, TEXTS, collate_fn=pad_right)
    batch = next(iter(recycling.loader(TEXTS, batch_size=6, collate_fn=pad_right)))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with pytest.raises(StaleActivationError, match="'attention_mask' is not the one"):
        recycling.model(**batch)


# -- kinds of cuts -----------------------------------------------------------------------------------------------------


class Clip(nn.Module):
    """Each frame of a clip through one network, then all frames of a clip together."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        maps = self.frame(clip.flatten(0, 1)).mean((2, 3)).unflatten(0, clip.shape[:2])
        return self.head(maps.mean(1))


@pytest.mark.parametrize("precision", [None, "int8"])
def test_clips_of_several_frames_are_mixed(precision, tmp_path):
    torch.manual_seed(0)
    model = Clip().eval()
    clips = torch.randn(8, 3, 3, 12, 12)
    recycling = recycle(model, clips[:2], cut="frame.1", store=tmp_path, precision=precision)
    data = list(clips)
    keep_some(recycling, data, [0, 1, 4, 6, 7])
    (x,) = recycling.loader(data, batch_size=8)
    assert x.misses.tolist() == [2, 3, 5]
    tolerance = 1e-2 if precision else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(x), full(recycling, clips), rtol=tolerance, atol=tolerance)


class Towers(nn.Module):
    """Two images, each through a tower of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.b = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (self.a(left).mean((2, 3)) * self.b(right).mean((2, 3))).sum(1)


@pytest.fixture
def towers(tmp_path) -> tuple[Recycling, Any, list[Any]]:
    torch.manual_seed(0)
    left, right = pictures(8, 3), pictures(8, 4)
    recycling = recycle(Towers().eval(), (left[:2], right[:2]), cut=["a.1", "b.1"], store=tmp_path)
    data = list(zip(left, right, strict=True))
    keep_some(recycling, data, [0, 1, 4, 6, 7])
    (batch,) = recycling.loader(data, batch_size=8)
    return recycling, batch, [left, right]


def test_a_joint_cut_of_two_towers_is_mixed(towers):
    recycling, batch, (left, right) = towers
    assert all(is_mixed(part) for part in batch)
    with torch.no_grad():
        close(recycling.model(*batch), full(recycling, left, right))


@pytest.mark.parametrize("order", [[0, 1, 3, 2, 4, 5, 6, 7], [0, 1, 2, 5, 4, 3, 6, 7]], ids=str)
def test_inputs_of_misses_that_were_put_in_another_order_are_noticed(order, towers):
    """Also where a miss changes places with a miss."""
    recycling, (left, right), _ = towers
    with pytest.raises(StaleActivationError, match="same objects"):
        recycling.model(left, right[order])
    with torch.no_grad():
        close(recycling.model(left[order], right[order]), recycling.model(left, right)[order])


class Album(nn.Module):
    """Takes a list with one image for each object, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = residual()

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.inner(torch.stack(list(images)))


def apart(items: Any) -> Any:
    return [x for x, _ in items], torch.tensor([y for _, y in items])


def test_inputs_that_are_a_list_of_objects_are_mixed(tmp_path):
    model = Album().eval()
    recycling = recycle(model, ([X[0], X[1]],), cut="inner.stages.1", store=tmp_path)
    data = [(X[i], int(Y[i])) for i in range(N)]
    keep_some(recycling, data, collate_fn=apart)
    for (images, y), start in zip(recycling.loader(data, batch_size=8, collate_fn=apart), range(0, N, 8), strict=True):
        assert [bool(len(image.misses)) for image in images] == [i % 3 == 0 for i in range(start, start + 8)]
        assert torch.equal(y, Y[start : start + 8])
        with torch.no_grad():
            close(model(images), full(recycling, list(X[start : start + 8])))


# -- what trainers do to a batch ---------------------------------------------------------------------------------------

MOVES = {
    "slice": (lambda t: t[2:7], range(2, 7)),
    "only hits": (lambda t: t[1:3], range(1, 3)),
    "only a miss": (lambda t: t[3:4], [3]),
    "index": (lambda t: t[[6, 0, 0, 3, 1]], [6, 0, 0, 3, 1]),
    "mask": (lambda t: t[torch.arange(8) % 2 == 0], [0, 2, 4, 6]),
    "flip": (lambda t: t.flip(0), range(7, -1, -1)),
    "chunk": (lambda t: t.chunk(3)[1], range(3, 6)),
    "split": (lambda t: t.split([1, 4, 3])[1], range(1, 5)),
    "cat": (lambda t: torch.cat([t[5:], t[:4]]), [5, 6, 7, 0, 1, 2, 3]),
    "cat of hits and misses": (lambda t: torch.cat([t[1:3], t[3:4], t[4:6]]), range(1, 6)),
    "items": (lambda t: default_collate([t[4], t[3], t[0]]), [4, 3, 0]),
    "unbind": (lambda t: torch.stack(t.unbind(0)[::2]), [0, 2, 4, 6]),
    "pickle": (lambda t: pickle.loads(pickle.dumps(t)), range(8)),
    "deepcopy": (lambda t: copy.deepcopy(t), range(8)),
    "to": (lambda t: t.to("cpu", non_blocking=True, copy=True), range(8)),
    "clone": (lambda t: t.clone().detach().contiguous(), range(8)),
    "half and back": (lambda t: t.half().float(), range(8)),
    "channels last": (lambda t: t.to(memory_format=torch.channels_last), range(8)),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Recycling, RecycledTensor]:
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path_factory.mktemp("store"))
    keep_some(recycling, DATA)
    x, _ = next(iter(recycling.loader(DATA, batch_size=8)))
    return recycling, x


@pytest.mark.parametrize("name", MOVES)
def test_after_a_move_of_trainers_each_object_gives_what_it_gave(name, mixed):
    recycling, x = mixed
    move, at = MOVES[name]
    moved = move(x)
    assert isinstance(moved, RecycledTensor)
    assert moved.shape == (len(at), *X.shape[1:])
    assert moved.misses.tolist() == [place for place, i in enumerate(at) if i % 3 == 0]
    with torch.no_grad():
        close(recycling.model(moved), full(recycling, X[list(at)]))


def test_mixed_batches_of_several_loaders_are_joined(mixed):
    recycling, x = mixed
    hits, _ = next(iter(recycling.loader(Subset(DATA, KEPT[:4]), batch_size=4)))
    joined = torch.cat([hits, x, hits])
    assert isinstance(joined, RecycledTensor)
    assert joined.misses.tolist() == [4, 7, 10]
    with torch.no_grad():
        close(recycling.model(joined), full(recycling, X[[*KEPT[:4], *range(8), *KEPT[:4]]]))


def test_values_of_objects_that_were_read_are_at_hand_and_those_of_kept_rows_are_not(mixed):
    _, x = mixed
    assert torch.equal(x[3:4] + 0, X[3:4])
    assert torch.equal(x[0] + 0, X[0])
    assert "2 kept rows" in repr(x[1:4])
    assert "1 objects without a row" in repr(x[1:4])
    with pytest.raises(BatchError, match="not loaded"):
        x.sum()


# -- proofs ------------------------------------------------------------------------------------------------------------


def test_a_prefix_that_has_moved_is_noticed_for_a_mixed_batch(made):
    keep_some(made, DATA)
    x, _ = next(iter(made.loader(DATA, batch_size=8)))
    with torch.no_grad():
        made.model.stem.weight.mul_(1.5)
    with pytest.raises(StaleActivationError, match=r"stem\.weight"):
        made.model(x)


def test_a_mixed_batch_of_another_recycling_is_refused(made, tmp_path):
    keep_some(made, DATA)
    x, _ = next(iter(made.loader(DATA, batch_size=8)))
    other = recycle(residual(seed=1), X[:2], cut=CUT, store=tmp_path / "store")
    with pytest.raises(StaleActivationError, match="holds rows of"):
        other.model(x)


def test_misses_are_computed_under_the_declared_autocast_and_another_is_refused(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path, autocast=torch.bfloat16)
    keep_some(recycling, DATA)
    x, _ = next(iter(recycling.loader(DATA, batch_size=8)))
    with pytest.raises(AutocastError):
        recycling.model(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = recycling.model(x), full(recycling, X[:8])
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_prefix_is_in_eval_mode_and_draws_no_random_number_for_misses(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.5), nn.Linear(1568, 4)
    )
    recycling = recycle(model, X[:2], cut="2", store=tmp_path)
    keep_some(recycling, DATA)
    x, _ = next(iter(recycling.loader(DATA, batch_size=8)))
    statistics = copy.deepcopy(model[1].state_dict())
    outputs = []
    for given in (x, X[:8]):
        torch.manual_seed(5)
        outputs.append(model.train()(given).detach())
    close(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(statistics.values(), model[1].state_dict().values(), strict=True))


# -- rows that leave ---------------------------------------------------------------------------------------------------


def in_small_segments(folder: Path) -> Recycling:
    """Rows of 1 KB in segments of 4, each opened when it is first read."""
    return recycle(residual(), X[:2], cut=CUT, store=FolderStore(folder, segment_bytes=4 * 1024))


@pytest.fixture
def filled(tmp_path, monkeypatch) -> Recycling:
    # With an index on disk no segment is opened before it is read.
    monkeypatch.setattr("torchrecycle.store.looking.IN_MEMORY", 0)
    in_small_segments(tmp_path).fill(DATA, batch_size=4)
    return in_small_segments(tmp_path)


WORKERS = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}
SPAWNED = {"num_workers": 1, "multiprocessing_context": "spawn"}


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("all", {}),
        ("every third", {}),
        ("every third", {"collate_fn": default_collate}),
        ("all", WORKERS),
        ("every third", WORKERS),
        pytest.param("every third", SPAWNED, marks=pytest.mark.slow),
        pytest.param("all", SPAWNED, marks=pytest.mark.slow),
    ],
    ids=lambda case: str(case).partition(" at 0x")[0],
)
@forks
def test_rows_that_leave_after_they_were_found_are_computed_and_made_again_at_the_next_iteration(
    what, arguments, filled, tmp_path
):
    loader = filled.loader(DATA, batch_size=6, **arguments)
    drop(tmp_path / filled.fingerprint, what)
    kinds = []
    for (x, y), start in zip(loader, range(0, N, 6), strict=True):
        assert torch.equal(y, Y[start : start + 6])
        kinds.append("mixed" if is_mixed(x) else "hits" if isinstance(x, RecycledTensor) else "raw")
        with torch.no_grad():
            close(filled.model(x), full(filled, X[start : start + 6]))
    assert kinds == (["raw"] * 4 if what == "all" else ["mixed", "hits", "mixed", "hits"])
    assert not any(len(x.misses) for x, _ in loader)
    assert len(filled.source.rows) == N
    hits = filled.stats.hits
    with torch.no_grad():
        close(torch.cat([filled.model(x) for x, _ in loader]), full(filled, X))
    assert filled.stats.hits - hits == N


def test_a_copy_in_another_process_looks_its_own_keys_up_and_tells_of_it(filled, tmp_path):
    """What a worker does, without the worker."""
    dataset = filled.dataset(DATA)
    copied, collate = pickle.loads(pickle.dumps((dataset, filled.collate())))
    drop(tmp_path / filled.fingerprint, "every third")
    before = dataset.locations.clone()
    x, y = collate(copied.__getitems__(list(range(8))))
    assert is_mixed(x)
    assert torch.equal(y, Y[:8])
    assert copied.takes_losses()
    assert torch.equal(dataset.locations, before)  # locations are each process's own
    with torch.no_grad():
        close(filled.model(x), full(filled, X[:8]))


def test_where_objects_cannot_be_read_instead_rows_that_left_are_an_error_with_the_way_out(filled, tmp_path):
    dataset = filled.dataset(DATA)
    drop(tmp_path / filled.fingerprint, "all")
    x, _ = next(iter(DataLoader(dataset, batch_size=4)))
    with pytest.raises(GoneRowsError, match=r"Collate with recycling\.collate"):
        filled.model(x)
    with pytest.raises(GoneRowsError, match=r"one by one.*__getitems__"):
        next(iter(DataLoader(Alone(dataset), batch_size=4, collate_fn=filled.collate())))
    x, _ = next(iter(DataLoader(Alone(filled.dataset(DATA)), batch_size=4, collate_fn=filled.collate())))
    with torch.no_grad():
        close(filled.model(x), full(filled, X[:4]))


def test_a_damaged_row_stays_an_error(filled, tmp_path):
    path = sorted((tmp_path / filled.fingerprint).glob("*-*.safetensors"))[2]
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(DamagedRowError, match="store verify"):
        list(filled.loader(DATA, batch_size=6))


def drop(folder: Path, what: str) -> None:
    if what == "all":
        shutil.rmtree(folder)
    else:
        for path in sorted(folder.glob("*-*.safetensors"))[::3]:
            path.unlink()


def test_of_a_plain_loader_rows_that_leave_are_computed(filled, tmp_path):
    assert (filled.source.rows.lookup(filled.source.keys(filled.source.rule(X))) >= 0).all()
    drop(tmp_path / filled.fingerprint, "every third")
    loader = DataLoader(DATA, batch_size=6, collate_fn=filled.collate())
    kinds = []
    for (x, _), start in zip(loader, range(0, N, 6), strict=True):
        kinds.append(is_mixed(x))
        with torch.no_grad():
            close(filled.model(x), full(filled, X[start : start + 6]))
    assert kinds == [True, False, True, False]


def test_the_canary_outlives_rows_that_leave(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrecycle.store.looking.IN_MEMORY", 0)
    in_small_segments(tmp_path).fill(DATA, batch_size=4)
    store = FolderStore(tmp_path, segment_bytes=4 * 1024)
    recycling = recycle(residual(), X[:2], cut=CUT, store=store, verify_every=1)
    loader = recycling.loader(DATA, batch_size=4)
    seen = 0
    drop(tmp_path / recycling.fingerprint, "all")
    for x, _ in loader:
        with torch.no_grad():
            close(recycling.model(x), full(recycling, X[seen : seen + 4]))
        seen += 4
    assert seen == N


# -- encoders of similarity learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, "model.stages.1"])
def test_of_an_encoder_whose_rows_leave_the_objects_are_computed(cut, tmp_path, monkeypatch):
    """Cut within, those without a row; of a whole encoder, all of the batch."""
    from torchrecycle.similarity import (
        GroupSimilarityDataLoader,
        RecycledEncoder,
        SimilarityGroupDataset,
        SimilarityGroupSample,
    )
    from torchrecycle.similarity.batches import ModelInputs, SampleBatches
    from torchrecycle.similarity.stages import EncoderStage

    monkeypatch.setattr("torchrecycle.store.looking.IN_MEMORY", 0)
    dataset = SimilarityGroupDataset([(picture, n % 6) for n, picture in enumerate(X)])
    loader = GroupSimilarityDataLoader(dataset, batch_size=6)

    def attached() -> tuple[EncoderStage, SampleBatches]:
        model = residual()
        model.head = nn.Identity()  # pyright: ignore
        encoder = RecycledEncoder(model, cut="stages.1", embedding_size=32).eval()
        collate = encoder.get_collate_fn()
        store = FolderStore(tmp_path, segment_bytes=512 if cut is None else 4 * 1024)
        stage = EncoderStage.attach("default", encoder, dataset, SimilarityGroupSample, store=store, cut=cut)
        rows = stage.rows(
            dataset, SimilarityGroupSample, collate=collate, extractor=None, name=None, batch_size=4, num_workers=0
        )
        inputs = ModelInputs({"default": collate}, {})
        pre_collate: Any = loader.collate_fn
        return stage, SampleBatches(dataset, SimilarityGroupSample, pre_collate, inputs, {"default": rows})

    attached()[0].detach()
    stage, batches = attached()
    drop(tmp_path / stage.recycling.fingerprint, "every third")
    reference = residual()
    reference.head = nn.Identity()  # pyright: ignore
    kinds = []
    for start in range(0, N, 6):
        features, targets = batches.__getitems__(list(range(start, start + 6)))
        given = features["data"]["default"]
        kinds.append(type(given).__name__)
        assert targets["groups"].tolist() == [n % 6 for n in range(start, start + 6)]
        with torch.no_grad():
            close(stage(given), reference(X[start : start + 6]))
    misses = stage.recycling.stats.misses
    assert kinds == (["FlatInputs"] * 4 if cut else ["Tensor", "KeptRows", "Tensor", "KeptRows"])
    assert misses == (8 if cut else 12)
    batches.rows["default"].renew()
    assert bool((batches.rows["default"].recycled.locations >= 0).all())
