"""Whatever a row depends on, if it changes, the row is not used: it is computed anew, or an error says why."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from small import CUT, SIDE, Counted, Residual, bert, labels, pictures, residual, tokenizer, write_pictures
from torchrecycle import (
    AutocastError,
    BatchError,
    CutError,
    RecycledTensor,
    Recycling,
    StaleActivationError,
    StoreError,
    recycle,
)

X, Y = pictures(16), labels(16)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def right(recycling: Recycling, loader: Any, dataset: Any) -> None:
    """The loader's batches give what the objects give, with the targets that the data set has now."""
    for (x, y), (raw, target) in zip(loader, DataLoader(dataset, batch_size=8), strict=True):
        assert isinstance(x, RecycledTensor)
        assert torch.equal(torch.as_tensor(y), torch.as_tensor(target))
        with torch.no_grad():
            torch.testing.assert_close(recycling.model(x), recycling.model(raw), rtol=1e-4, atol=1e-5)


# -- the model moves ---------------------------------------------------------------------------------------------------


def in_place(model: Residual) -> None:
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1


def a_buffer(model: Residual) -> None:
    model.stages[0].norm.running_mean[0] += 1


def through_data(model: Residual) -> None:
    model.stem.weight.data[0, 0, 0, 0] += 1


def through_numpy(model: Residual) -> None:
    model.stem.weight.detach().numpy()[0, 0, 0, 0] += 1


def another_parameter(model: Residual) -> None:
    model.stem.weight = nn.Parameter(model.stem.weight * 1.5, requires_grad=False)


def another_layer(model: Residual) -> None:
    model.stages[0].act = nn.GELU()


def an_attribute(model: Residual) -> None:
    model.stages[0].norm.eps = 0.5


def loaded(model: Residual) -> None:
    model.load_state_dict(residual(1).state_dict())


MOVES = [in_place, a_buffer, through_data, through_numpy, another_parameter, another_layer, an_attribute, loaded]


@pytest.mark.parametrize(("move", "workers"), [*((m, 0) for m in MOVES), (in_place, 1), (through_data, 1)])
def test_after_the_model_moved_the_next_iteration_fills_anew(move, workers, made):
    dataset = TensorDataset(X, Y)
    loader = made.loader(dataset, batch_size=8, num_workers=workers, persistent_workers=bool(workers))
    right(made, loader, dataset)
    old = made.fingerprint
    move(made.model)
    right(made, loader, dataset)
    assert made.fingerprint != old
    assert made.stats.misses >= 32


@pytest.mark.parametrize(("move", "name"), [(in_place, "stem.weight"), (a_buffer, "stages.0.norm.running_mean")])
def test_a_batch_that_was_held_while_the_model_moved_is_refused_by_name(move, name, made):
    x, _ = next(iter(made.loader(TensorDataset(X, Y), batch_size=8)))
    move(made.model)
    with pytest.raises(StaleActivationError, match=f"{name}.*Make a new iterator"):
        made.model(x)
    with pytest.raises(StaleActivationError, match=name):
        made.model(x)


def test_a_batch_from_before_a_new_fill_is_refused_by_fingerprint(made):
    loader = made.loader(TensorDataset(X, Y), batch_size=8)
    x, _ = next(iter(loader))
    through_data(made.model)
    next(iter(loader))
    with pytest.raises(StaleActivationError, match="holds rows of"):
        made.model(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_of_the_model_is_refused_and_leaves_the_prefix_frozen(dtype, made):
    loader = made.loader(TensorDataset(X, Y), batch_size=8)
    x, _ = next(iter(loader))
    made.model.to(dtype)
    with pytest.raises(StaleActivationError, match="stem"):
        made.model(x)
    with pytest.raises(BatchError, match="does not run on the example"):
        iter(loader)
    assert not made.model.stem.weight.requires_grad
    with pytest.raises(StaleActivationError):
        made.model(x)
    made.model.float()


@pytest.mark.parametrize("change", [{"precision": "float16"}, {"autocast": torch.bfloat16}, {"cut": "stages.0"}])
def test_other_settings_share_no_rows(change, tmp_path):
    settings = {"cut": CUT, "store": tmp_path / "store"}
    with recycle(residual(), X[:2], **settings) as one:
        one.fill(TensorDataset(X, Y))
    with recycle(residual(), X[:2], **{**settings, **change}) as other:
        assert other.fill(TensorDataset(X, Y)).computed == 16


def test_another_dtype_of_model_and_data_shares_no_rows(tmp_path):
    with recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store") as one:
        one.fill(TensorDataset(X, Y))
    half = X.bfloat16()
    with recycle(residual().bfloat16(), half[:2], cut=CUT, store=tmp_path / "store") as other:
        assert other.fill(TensorDataset(half, Y)).computed == 16


def test_another_head_on_the_same_trunk_finds_the_rows(tmp_path):
    with recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store") as one:
        one.fill(TensorDataset(X, Y))
    model = residual()
    model.head = nn.Linear(32, 7)
    model.stages[2] = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU())
    with recycle(model, X[:2], cut=CUT, store=tmp_path / "store") as other:
        assert other.fill(TensorDataset(X, Y)).computed == 0
        right(other, other.loader(TensorDataset(X, Y), batch_size=8), TensorDataset(X, Y))


def test_training_the_suffix_keeps_the_rows(made):
    dataset = TensorDataset(X, Y)
    loader = made.loader(dataset, batch_size=8)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    made.model.train()
    for _ in range(3):
        for x, y in loader:
            nn.functional.cross_entropy(made.model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (made.stats.misses, made.stats.hits) == (16, 48)


def test_undeclared_autocast_is_refused(made):
    x, _ = next(iter(made.loader(TensorDataset(X, Y), batch_size=8)))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AutocastError, match=r"autocast=torch\.bfloat16"):
        made.model(x)


class Scaled(Residual):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


def test_a_patched_forward_around_the_prefix_is_found_by_the_probe(tmp_path, monkeypatch):
    def model() -> Scaled:
        torch.manual_seed(0)
        return Scaled().eval()

    with recycle(model(), X[:2], cut=CUT, store=tmp_path / "store") as one:
        one.fill(TensorDataset(X, Y))
    monkeypatch.setattr(Scaled, "scale", 2.0)
    with pytest.raises(StoreError, match="what it computes has changed: its probe differs by"):
        recycle(model(), X[:2], cut=CUT, store=tmp_path / "store")
    monkeypatch.setattr(Scaled, "scale", 1.0)
    recycle(model(), X[:2], cut=CUT, store=tmp_path / "store").detach()


# -- the objects change ------------------------------------------------------------------------------------------------


def folder_of(path: Path, side: int = SIDE) -> Any:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Resize, ToTensor

    return ImageFolder(path, Compose([Resize(side), ToTensor()]))


def test_another_resize_gives_other_rows(made, tmp_path):
    dataset = folder_of(write_pictures(tmp_path / "files", 12))
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    dataset.transform.transforms[0] = type(dataset.transform.transforms[0])(SIDE, interpolation=0)
    dataset.transform.transforms.insert(0, type(dataset.transform.transforms[0])(SIDE // 2))
    right(made, loader, dataset)
    assert made.stats.misses == 24 + 24  # and the raw batches that the rows are compared with


def test_an_attribute_set_on_a_transform_is_seen_between_two_iterations(made, tmp_path):
    from torchvision.transforms import Normalize

    dataset = folder_of(write_pictures(tmp_path / "files", 12))
    dataset.transform.transforms.append(Normalize([0.5] * 3, [0.5] * 3))
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    dataset.transform.transforms[-1].mean = [0.1] * 3
    right(made, loader, dataset)


def test_a_variable_in_a_transforms_closure_is_seen(made):
    factor = 1.0
    dataset = Counted([(X[i], i) for i in range(16)], lambda item: (item[0] * factor, item[1]))
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    factor = 2.0
    right(made, loader, dataset)
    factor = 3.0
    right(made, made.loader(dataset, batch_size=8), dataset)


def test_a_global_of_a_transform_is_seen(made, monkeypatch):
    dataset = Counted([(X[i], i) for i in range(16)], scaled)
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    right(made, loader, dataset)


FACTOR = 1.0


def scaled(item: Any) -> Any:
    return item[0] * FACTOR, item[1]


def test_an_edited_file_under_the_same_path_is_read_anew(made, tmp_path):
    files = write_pictures(tmp_path / "files", 12)
    dataset = folder_of(files)
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    first, second = dataset.samples[0][0], dataset.samples[1][0]
    shutil.copy(second, tmp_path / "spare")
    size = os.stat(first).st_size
    content = Path(second).read_bytes()[:size].ljust(size, b"\0")
    Path(first).write_bytes(content)
    right(made, loader, dataset)
    right(made, made.loader(folder_of(files), batch_size=8), dataset)


def relabel_tensor(dataset: Any) -> None:
    dataset.tensors[1][3] = 3 - dataset.tensors[1][3]


def relabel_list(dataset: Any) -> None:
    dataset[3] = (dataset[3][0], 9)


def relabel_folder(dataset: Any) -> None:
    dataset.samples[3] = (dataset.samples[3][0], 2)


def relabel_attribute(dataset: Any) -> None:
    dataset.items[3] = (dataset.items[3][0], 7)


def relabel_subset(dataset: Any) -> None:
    dataset.indices[3] = 0


def relabel_array(dataset: Any) -> None:
    dataset.items.labels[3] = 8


class WithArray:
    def __init__(self) -> None:
        self.labels = np.arange(16)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return X[index], self.labels[index]


RELABELS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], None]]] = {
    "tensor": (lambda _: TensorDataset(X, Y.clone()), relabel_tensor),
    "list": (lambda _: [(X[i], i) for i in range(16)], relabel_list),
    "folder": (lambda path: folder_of(write_pictures(path, 12)), relabel_folder),
    "attribute": (lambda _: Counted([(X[i], i) for i in range(16)]), relabel_attribute),
    "subset": (lambda _: Subset(TensorDataset(X, Y), list(range(12))), relabel_subset),
    "NumPy": (lambda _: Counted(WithArray()), relabel_array),
}


@pytest.mark.parametrize("kind", RELABELS)
@pytest.mark.parametrize("new_loader", [False, True])
def test_a_relabelled_target_is_seen(kind, new_loader, made, tmp_path):
    make, relabel = RELABELS[kind]
    dataset = make(tmp_path / "files")
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    relabel(dataset)
    right(made, made.loader(dataset, batch_size=8) if new_loader else loader, dataset)


def test_labels_replaced_many_times_are_those_of_now(made):
    dataset = [(X[i], 0.5) for i in range(16)]
    loader = made.loader(dataset, batch_size=16)
    for value in np.linspace(0.6, 0.9, 10).tolist():
        dataset[5] = (X[5], value)
        ((_, y),) = list(loader)
        assert y[5].item() == value


def test_targets_of_hugging_face_data_are_those_of_now(tmp_path):
    import datasets

    recycling = recycle(residual(), {"x": X[:2]}, cut=CUT, store=tmp_path / "store")
    plain = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()}).with_format("torch")
    changed = plain.map(lambda item: {"y": 9 - item["y"]})
    for dataset in (plain, changed, plain):
        got = torch.cat([batch["y"] for batch in recycling.loader(dataset, batch_size=8)])
        assert torch.equal(got, torch.as_tensor(dataset["y"][:]))
    assert recycling.stats.misses == 16
    recycling.loader(plain.with_transform(lambda b: {"x": [torch.tensor(x) + 1 for x in b["x"]]}), batch_size=8)
    assert recycling.stats.misses == 32


def test_a_data_set_at_the_address_of_an_older_one_is_another(made):
    for shift in range(20):
        dataset = [(X[i] if shift % 2 else X[i] * 2, shift) for i in range(4)]
        (batch,) = list(made.loader(dataset, batch_size=4))
        assert batch[1].tolist() == [shift] * 4
        with torch.no_grad():
            want = made.model(torch.stack([x for x, _ in dataset]))
            torch.testing.assert_close(made.model(batch[0]), want, rtol=1e-4, atol=1e-5)
    assert len(made._manifests._known) <= 16


def test_a_data_set_that_changed_while_a_trainer_holds_it_is_refused(made):
    data = [(X[i], i) for i in range(8)]
    loader = DataLoader(made.dataset(data), batch_size=4, collate_fn=made.collate())
    list(loader)
    data.insert(0, (X[15], 15))
    with pytest.raises(StaleActivationError, match=r"has 9 items where its rows were found for 8"):
        list(loader)


def test_a_store_that_was_emptied_underneath_is_filled_again(tmp_path):
    dataset = TensorDataset(X, Y)
    one = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")
    right(one, one.loader(dataset, batch_size=8), dataset)
    one.detach()
    shutil.rmtree(tmp_path / "store")
    other = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")
    right(other, other.loader(dataset, batch_size=8), dataset)
    assert other.stats.misses >= 16
    # Open files outlive their names: what is attached goes on.
    shutil.rmtree(tmp_path / "store")
    right(other, other.loader(dataset, batch_size=8), dataset)


# -- between loader and model ------------------------------------------------------------------------------------------


def text_items(count: int = 8) -> list[dict[str, torch.Tensor]]:
    random.seed(0)
    made = []
    for i in range(count):
        ids = torch.tensor([101, *(1000 + 7 * i + j for j in range(3 + i % 4)), 102])
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def pad(items: Any) -> dict[str, torch.Tensor]:
    return {n: nn.utils.rnn.pad_sequence([i[n] for i in items], batch_first=True) for n in items[0]}


@pytest.fixture
def text(tmp_path) -> Recycling:
    return recycle(bert(), pad(text_items()[:3]), level=0.5, store=tmp_path / "store")


def test_a_mask_that_was_changed_after_the_loader_is_refused(text):
    batch = next(iter(text.loader(text_items(), batch_size=4, collate_fn=pad)))
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, 1] = 0
    with pytest.raises(StaleActivationError, match="'attention_mask' is not the one that the kept rows were computed"):
        text.model(**batch)


def test_a_mask_of_other_objects_is_refused(text):
    one, other = list(text.loader(text_items(), batch_size=4, collate_fn=pad))
    one["attention_mask"] = other["attention_mask"].flip(0)
    with pytest.raises((StaleActivationError, BatchError)):
        text.model(**one)


def test_an_input_that_the_example_has_not_is_refused_or_right(text):
    batch = next(iter(text.loader(text_items(), batch_size=4, collate_fn=pad)))
    types = torch.ones_like(batch["attention_mask"])
    with pytest.raises(CutError, match="'token_type_ids', which the prefix reads and the example does not have"):
        text.model(**batch, token_type_ids=types)
    with torch.no_grad():
        got = text.model(**batch, labels=torch.tensor([0, 1, 0, 1]))
        raw = pad(text_items()[:4])
        want = text.model(**raw, labels=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)


def test_token_types_in_the_example_are_part_of_the_key(tmp_path):
    items = [{**item, "token_type_ids": torch.zeros_like(item["input_ids"])} for item in text_items()]
    other = [{**item, "token_type_ids": torch.ones_like(item["input_ids"])} for item in text_items()]
    recycling = recycle(bert(), pad(items[:3]), level=0.5, store=tmp_path / "store")
    recycling.fill(items, collate_fn=pad)
    assert recycling.fill(other, collate_fn=pad).computed == 8
    batch = next(iter(recycling.loader(other, batch_size=8, collate_fn=pad)))
    with torch.no_grad():
        got = recycling.model(**batch).logits
        with recycling.paused():
            want = recycling.model(**pad(other)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_of_a_model_that_reads_padding_are_served_only_at_their_padded_length(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2000,
        n_embd=32,
        n_layer=4,
        n_head=2,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
        num_labels=2,
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2ForSequenceClassification(config).eval()

    def left(items: Any) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        return {n: torch.stack([nn.functional.pad(i[n], (longest - len(i[n]), 0)) for i in items]) for n in items[0]}

    items = text_items(12)
    recycling = recycle(model, left(items[:3]), level=0.5, store=tmp_path / "store")
    assert not recycling.source.padding.left
    loader = recycling.loader(items, batch_size=4, shuffle=True, collate_fn=left)
    served = 0
    for seed in range(3):
        torch.manual_seed(seed)
        for batch in loader:
            raw = {n: v.value if isinstance(v, RecycledTensor) else v for n, v in batch.items()}
            served += isinstance(batch["input_ids"], RecycledTensor)
            with torch.no_grad():
                got = recycling.model(**batch).logits
                with recycling.paused():
                    want = recycling.model(**raw).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert 0 < served < 9


def test_the_tokenizer_of_the_package_gives_one_key_to_one_text(tmp_path):
    tokens = tokenizer()
    data = [dict(tokens(text)) for text in ("a house", "a house by the sea", "a house")]
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokens)
    recycling = recycle(bert(), dict(collate(data)), level=0.5, store=tmp_path / "store")
    assert recycling.fill(data, collate_fn=collate).computed == 2


class Mutable(Dataset[Any]):
    """Holds its items in dicts, which a user may change in place."""

    def __init__(self) -> None:
        self.items = [{"x": X[i], "y": i} for i in range(16)]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return self.items[index]["x"], self.items[index]["y"]


def test_a_dict_that_was_changed_in_place_is_seen(made):
    dataset = Mutable()
    loader = made.loader(dataset, batch_size=8)
    right(made, loader, dataset)
    dataset.items[3]["y"] = 9
    right(made, loader, dataset)
    dataset.items[3]["x"] = X[0] * 3
    right(made, loader, dataset)
