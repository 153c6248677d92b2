"""A reviewer's attacks, kept as tests: whatever changes behind a recycling's back, it is right or it refuses."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import small_models
from small import CUT, labels, pictures, residual, write_pictures
from torchrecycle import RecycledTensor, RecycleError, Recycling, cuts, fill_many, recycle
from torchrecycle.data.state import state_of

X, Y = pictures(16), labels(16)
DATA = TensorDataset(X, Y)


@pytest.fixture
def made(tmp_path) -> Recycling:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store")


def outputs(model: nn.Module, loader: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in loader])


def full(recycling: Recycling, raw: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), recycling.paused():
        return recycling.model(raw)


def right_or_refused(recycling: Recycling, model: nn.Module, loader: Any, raw: torch.Tensor) -> None:
    """A loader's outputs are what the whole model gives for the objects, or they are refused."""
    model.eval()
    want = full(recycling, raw)
    try:
        got = outputs(model, loader)
    except RecycleError:
        return
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def right_or_refused_after(recycling: Recycling, change: Callable[[Any], Any], dataset: TensorDataset) -> None:
    """The same, where the rows were made before a change that changes what the model computes."""
    raw = dataset.tensors[0]
    model = recycling.model.eval()
    loader = recycling.loader(dataset, batch_size=len(raw))
    torch.testing.assert_close(outputs(model, loader), full(recycling, raw), rtol=1e-4, atol=1e-5)
    before = full(recycling, raw)
    with torch.no_grad():
        change(model)
    assert not torch.allclose(full(recycling, raw), before, rtol=1e-3, atol=1e-3)
    right_or_refused(recycling, model, loader, raw)


# -- what the model's own forward reads before the cut -----------------------------------------------------------------


class Glue(nn.Module):
    """A model whose own forward prepares the pictures, with a buffer and with settings of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.cfg = {"g": 1.0}
        self.space = SimpleNamespace(g=1.0)
        self.nested = [[1.0], [2.0, [1.0]]]
        self.body = residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body((x - self.mean) * self.cfg["g"] * self.space.g * self.nested[1][1][0])


class Placed(nn.Module):
    """A vision transformer in small, whose places are a fixed buffer of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.register_buffer("mean", torch.randn(1, 16, 16))
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.mean).mean(1))


def glue() -> Glue:
    return Glue().eval()


def placed() -> Placed:
    torch.manual_seed(0)
    return Placed().eval()


ROOTS = {glue: "body.stages.1", placed: "blocks.0"}


def attached(make: Callable[[], nn.Module], store: Path) -> Recycling:
    return recycle(make(), X[:2], cut=ROOTS[make], store=store)


def through_copy(model: Any) -> None:
    model.mean.copy_(torch.randn(model.mean.shape, generator=torch.Generator().manual_seed(5)))


def through_fill(model: Any) -> None:
    model.mean.fill_(2.0)


def through_data(model: Any) -> None:
    model.mean.data[..., 0] = 2.0


@pytest.mark.parametrize("make", ROOTS)
@pytest.mark.parametrize("change", [through_copy, through_fill, through_data])
def test_a_buffer_of_the_root_that_is_read_before_the_cut_and_changes_is_noticed(change, make, tmp_path):
    right_or_refused_after(attached(make, tmp_path / "store"), change, DATA)


def test_a_buffer_of_the_root_that_is_a_thousandth_off_gives_another_fingerprint(tmp_path):
    with attached(glue, tmp_path / "store") as first:
        first.fill(DATA)
    again = attached(glue, tmp_path / "store")
    assert again.fingerprint == first.fingerprint
    again.detach()
    model = glue()
    model.mean.fill_(0.001)
    other = recycle(model, X[:2], cut=ROOTS[glue], store=tmp_path / "store")
    assert other.fingerprint != first.fingerprint


def a_dict(model: Any) -> None:
    model.cfg["g"] = 3.0


def a_namespace(model: Any) -> None:
    model.space.g = 3.0


def a_nested_list(model: Any) -> None:
    model.nested[1][1][0] = 3.0


def a_hook_on_a_layer(model: Any) -> None:
    model.body.stem.register_forward_hook(lambda module, args, output: output * 2)


def a_pre_hook_on_the_root(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


@pytest.mark.filterwarnings("ignore:a hook on:torchrecycle.RecycleWarning")
@pytest.mark.parametrize("change", [a_dict, a_namespace, a_nested_list, a_hook_on_a_layer, a_pre_hook_on_the_root])
def test_a_setting_or_a_hook_of_the_prefix_that_changes_while_attached_is_noticed(change, tmp_path):
    right_or_refused_after(attached(glue, tmp_path / "store"), change, DATA)


# -- weights that keep their sums --------------------------------------------------------------------------------------


def rolled_by_copy(model: Any) -> None:
    model[0].weight.copy_(model[0].weight.roll(2, 0))


def rolled_through_data(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.roll(2, 0)


def rolled_by_copy_through_data(model: Any) -> None:
    model[0].weight.data.copy_(model[0].weight.data.roll(2, 0))


@pytest.mark.parametrize("change", [rolled_by_copy, rolled_through_data, rolled_by_copy_through_data])
def test_a_large_identity_whose_rows_are_rolled_is_noticed(change, tmp_path):
    torch.manual_seed(0)
    wide = nn.Linear(1024, 1024, bias=False)
    nn.init.eye_(wide.weight)
    model = nn.Sequential(wide, nn.ReLU(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    data = TensorDataset(torch.randn(8, 1024), labels(8))
    right_or_refused_after(recycle(model, data.tensors[0][:2], cut="1", store=tmp_path / "store"), change, data)


# -- numbers out of range ----------------------------------------------------------------------------------------------


def test_activations_too_large_for_float16_are_refused_at_fill_and_bfloat16_is_named(tmp_path):
    model = residual()
    with torch.no_grad():
        model.stages[1].norm.weight.mul_(1e6)
        assert model.stages[:2](model.stem(X)).max() > 65504

    recycling = recycle(model, X[:2] * 1e-6, cut=CUT, store=tmp_path / "store", precision="bfloat16")
    assert outputs(model, recycling.loader(DATA, batch_size=8)).isfinite().all()
    recycling.detach()
    with pytest.raises(RecycleError, match="bfloat16"):
        recycle(model, X[:2], cut=CUT, store=tmp_path / "other", precision="float16").fill(DATA)


def test_a_picture_with_no_number_in_it_fills_and_is_read_back_with_the_same_outputs(made):
    raw = X.clone()
    raw[3, 0, 2, 2] = float("nan")
    loader = made.loader(TensorDataset(raw, Y), batch_size=8)
    want = full(made, raw)
    assert want[3].isnan().any()
    assert want[4:].isfinite().all()
    for _ in range(2):
        torch.testing.assert_close(outputs(made.model, loader), want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert made.stats.hits == 32


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_the_state_of_a_long_list_of_dicts_notices_one_label_near_its_end():
    items = [{"x": x, "label": 0} for x in torch.zeros(120_000, 4).unbind()]
    before = state_of(items)
    assert state_of(items) == before
    items[119_000]["label"] = 3
    assert state_of(items) != before


class Files(Dataset[Any]):
    """A data set of one's own that reads pictures from a list of paths."""

    def __init__(self, files: list[Any]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.files[index]) as picture:
            array = np.asarray(picture.convert("RGB")).copy()
        return torch.from_numpy(array).permute(2, 0, 1).float() / 255, index % 4


@pytest.mark.parametrize("new_loader", [True, False])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_that_is_overwritten_is_noticed_in_a_list_of_paths(kind, new_loader, made, tmp_path):
    from PIL import Image

    paths = sorted(write_pictures(tmp_path / "pictures").rglob("*.png"))
    dataset = Files([kind(path) for path in paths])
    loader = made.loader(dataset, batch_size=4)
    before = outputs(made.model, loader)

    Image.new("RGB", (16, 16)).save(paths[3])
    os.utime(paths[3], (1_000_000_000, 1_000_000_000))
    want = full(made, torch.stack([x for x, _ in dataset]))
    assert not torch.allclose(want, before, rtol=1e-3, atol=1e-3)
    if new_loader:
        loader = made.loader(dataset, batch_size=4)
    torch.testing.assert_close(outputs(made.model, loader), want, rtol=1e-4, atol=1e-5)


def test_a_loader_whose_recycling_is_gone_gives_the_objects(tmp_path):
    model = residual()
    recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    loader = recycling.loader(DATA, batch_size=8)
    assert all(isinstance(x, RecycledTensor) for x, _ in loader)
    recycling.detach()
    del recycling
    gc.collect()

    batches = [x for x, _ in loader]
    assert not any(isinstance(x, RecycledTensor) for x in batches)
    assert torch.equal(torch.cat(batches), X)
    assert torch.equal(outputs(model, loader), torch.cat([residual()(x) for x in batches]))


def test_one_key_for_different_objects_is_refused_at_fill(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", key=lambda item: int(item[1]))
    with pytest.raises(RecycleError, match="key="):
        recycling.fill(DATA, name="pictures", batch_size=8)


def test_one_key_for_different_objects_of_different_batches_is_refused_at_fill(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", key=lambda item: int(item[1]))
    with pytest.raises(RecycleError, match="key="):
        recycling.fill(DATA, name="pictures", batch_size=4)


def test_one_key_for_equal_objects_is_fine(tmp_path):
    recycling = recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", key=lambda item: int(item[1]))
    raw = X[Y]
    got = outputs(recycling.model, recycling.loader(TensorDataset(raw, Y), name="pictures", batch_size=8))
    torch.testing.assert_close(got, full(recycling, raw), rtol=1e-4, atol=1e-5)


# -- calls -------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = residual()

    def forward(self, x: torch.Tensor, t: float = 1.0) -> torch.Tensor:
        return self.body(x * t)


def test_an_argument_of_the_fill_that_the_example_had_otherwise_is_refused_by_name(tmp_path):
    example = (X[:2], Y[:2])

    def inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0],), {"t": 1.0 if batch is example else 3.0}

    recycling = recycle(Scaled().eval(), example, cut="body.stages.1", store=tmp_path / "store", inputs=inputs)
    with pytest.raises(RecycleError, match="'t'"):
        recycling.fill(DATA)


def test_a_text_that_is_all_padding_gives_the_logits_of_the_whole_model(tmp_path):
    torch.manual_seed(7)
    model = small_models.bert().eval()
    batch = small_models.texts()
    batch["attention_mask"][0] = 0
    example = {name: tensor[1:5] for name, tensor in batch.items()}
    items = [{name: tensor[i] for name, tensor in batch.items()} for i in range(8)]
    whole = copy.deepcopy(model)
    recycling = recycle(model, example, cut="bert.encoder.layer.1", store=tmp_path / "store")
    with torch.no_grad():
        for _ in range(2):
            (recycled,) = recycling.loader(items, batch_size=8)
            torch.testing.assert_close(model(**recycled).logits, whole(**batch).logits, rtol=0, atol=1e-5)


# -- inference mode ----------------------------------------------------------------------------------------------------


def train_an_epoch(recycling: Recycling) -> None:
    recycling.model.train()
    optimizer = torch.optim.SGD(recycling.parameters(), lr=0.01)
    before = recycling.model.head.weight.detach().clone()
    for x, y in recycling.loader(DATA, batch_size=8):
        optimizer.zero_grad()
        F.cross_entropy(recycling.model(x), y).backward()
        optimizer.step()
    assert not torch.equal(recycling.model.head.weight, before)


def test_predicting_in_inference_mode_gives_the_plain_outputs_and_training_after_it_works(made):
    want = full(made, X)
    with torch.inference_mode():
        got = made.predict(DATA, batch_size=8)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    train_an_epoch(made)


def test_a_batch_can_be_moved_in_inference_mode(made):
    want = full(made, X)
    with torch.inference_mode():
        got = torch.cat([made.model(x.to("cpu")) for x, _ in made.loader(DATA, batch_size=8)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_recycling_that_was_made_in_inference_mode_trains_outside_of_it(tmp_path):
    model = residual()
    with torch.inference_mode():
        recycling = recycle(model, X[:2], cut=CUT, store=tmp_path / "store")
    train_an_epoch(recycling)


# -- arguments of a wrong kind -----------------------------------------------------------------------------------------

WRONG = [
    ({"cut": ["a", 2]}, r"\bcut="),
    ({"cut": 2}, r"\bcut="),
    ({"cut": None, "level": "0.5"}, r"\blevel="),
    ({"cut": None, "level": True}, r"\blevel="),
    ({"verify_every": "a"}, r"\bverify_every="),
    ({"autocast": "bfloat16"}, r"\bautocast="),
    ({"autocast": torch.float32}, r"\bautocast="),
    ({"key": "id"}, r"\bkey="),
    ({"inputs": "x"}, r"\binputs="),
    ({"inputs": lambda batch: batch}, r"\binputs="),
    ({"inputs": lambda batch: (batch,)}, r"\binputs="),
    ({"store": ""}, r"\bstore="),
    ({"store": None}, r"\bstore="),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("arguments", "name"), WRONG, ids=[next(reversed(given)) for given, _ in WRONG])
def test_a_wrong_argument_of_recycle_is_refused_by_name(arguments, name, tmp_path):
    given = {"model": residual(), "example": X[:2], "cut": CUT, "store": tmp_path / "store", **arguments}
    with pytest.raises((RecycleError, TypeError, ValueError), match=name):
        recycle(**given)


def test_cuts_of_no_model_is_refused_by_name():
    with pytest.raises((RecycleError, TypeError, ValueError), match="model"):
        cuts(None, X[:2])  # type: ignore[arg-type]


def test_fill_many_of_one_recycling_without_a_list_is_refused_by_name(made):
    with pytest.raises((RecycleError, TypeError, ValueError), match="recyclings"):
        fill_many(made, DATA)


def test_a_loader_of_a_dict_is_refused_by_name(made):
    with pytest.raises((RecycleError, TypeError, ValueError), match="dict"):
        next(iter(made.loader({"x": X, "y": Y}, batch_size=2)))


def test_a_loader_whose_collate_fn_is_no_function_is_refused_by_name(made):
    with pytest.raises((RecycleError, TypeError, ValueError), match="collate_fn"):
        next(iter(made.loader(DATA, batch_size=2, collate_fn="x")))


class _Glue(nn.Module):
    """A forward that scales by a plain tensor, neither parameter nor buffer, before its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.c = torch.ones(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h(self.b(self.a(x * self.c)))


CONSTANT_CHANGES = {
    "in place": lambda m: m.c.mul_(2),
    "through .data": lambda m: m.c.data.mul_(2),
    "through NumPy": lambda m: m.c.numpy().__imul__(2),
    "replaced": lambda m: setattr(m, "c", torch.full((8,), 2.0)),
    "a layer replaced": lambda m: setattr(m, "a", nn.Linear(8, 8)),
    "a forward patched": lambda m: setattr(m.a, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("name", CONSTANT_CHANGES)
def test_a_constant_or_a_layer_changed_between_two_iterations_is_right_or_refused(name, tmp_path):
    torch.manual_seed(0)
    model, x = _Glue().eval(), torch.randn(16, 8)
    with torch.no_grad(), recycle(model, x[:2], cut="b", store=tmp_path / "store") as recycling:
        loader = recycling.loader(list(x), batch_size=8)
        before = torch.cat([model(batch) for batch in loader])
        CONSTANT_CHANGES[name](model)
        want = copy.deepcopy(model)(x)
        assert not torch.allclose(before, want, atol=1e-3)
        try:
            got = torch.cat([model(batch) for batch in loader])
        except RecycleError:
            return
        assert torch.allclose(got, want, atol=1e-6)
