"""Rows in a smaller precision: trained on, checked, found again, and never taken for those of another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from small import CUT, bert, labels, pictures, residual
from torchrecycle import Recycling, StaleActivationError, codec, recycle
from torchrecycle.codec import PRECISIONS
from torchrecycle.demo.weights import image_trunk, text_tokenizer, text_trunk
from torchrecycle.store import Ragged

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)
SMALLER = ["bfloat16", "float16", "int8"]
LOSS = {"float32": 0.0, "bfloat16": 2e-3, "float16": 3e-4, "int8": 1e-2}
"""Relative error that a row may have."""


def made(folder: Any, precision: str | None, model: nn.Module | None = None, **options: Any) -> Recycling:
    return recycle(model or residual(), X[:2], cut=CUT, store=folder, precision=precision, **options)


def prefix(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.stages[:2](model.stem(x))


def away(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def outputs(recycling: Recycling, data: Any = DATA, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        batches = recycling.loader(data, batch_size=8, **arguments)
        return torch.cat([recycling.model(x) for x, _ in batches])


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_int8_rows_are_a_quarter_and_their_scales_and_give_nearly_the_same_outputs(tmp_path):
    recycling = made(tmp_path, "int8")
    (x, _), *_ = recycling.loader(DATA, batch_size=24)
    codes, scales = x.leaves
    row = prefix(recycling.model, X)
    assert codes.dtype is torch.int8
    assert codes.shape == row.shape
    assert scales.shape == (24, 8)  # 16 places for each of 16 channels: two have a scale together
    assert codes.nbytes * 4 == row.nbytes
    assert recycling.source.rows.bytes_written >= codes.nbytes + scales.nbytes
    with torch.no_grad():
        assert 0 < away(recycling.model(x), recycling.model(X)) < LOSS["int8"]
    assert recycling.stats.bytes_read == codes.nbytes + scales.nbytes


@pytest.mark.parametrize("form", ["contiguous", "channels last", "halves"])
def test_int8_in_every_order_in_memory_and_dtype_of_the_model(form, tmp_path):
    model, data = residual(), X
    if form == "channels last":
        model, data = model.to(memory_format=torch.channels_last), X.contiguous(memory_format=torch.channels_last)
    if form == "halves":
        model, data = model.bfloat16(), X.bfloat16()
    recycling = recycle(model, data[:2], cut=CUT, store=tmp_path, precision="int8")
    got, want = outputs(recycling, TensorDataset(data, Y)), model(data).detach()
    assert got.dtype is want.dtype
    assert away(got.float(), want.float()) < (2e-2 if form == "halves" else LOSS["int8"])


def test_int8_rows_come_through_workers(tmp_path):
    recycling = made(tmp_path, "int8")
    assert torch.equal(outputs(recycling, num_workers=1), outputs(recycling))


def test_int8_batches_are_cut_and_joined_as_others_are(tmp_path):
    recycling = made(tmp_path, "int8")
    (x, _), *_ = recycling.loader(DATA, batch_size=24)
    with torch.no_grad():
        turned = torch.cat([x[8:], x[:8]])
        assert torch.equal(recycling.model(turned), recycling.model(x).roll(-8, 0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_which_only_some_rows_are_kept_gives_nearly_the_same_outputs(precision, tmp_path):
    recycling = made(tmp_path, precision)
    recycling.fill(TensorDataset(X[:16], Y[:16]))
    with torch.no_grad():
        got = recycling.model(recycling.source.place((X[8:], Y[8:]))[0])
        assert away(got, recycling.model(X[8:])) < max(LOSS[precision], 1e-6)


@pytest.mark.parametrize("precision", SMALLER)
def test_training_on_smaller_rows_learns_what_training_on_whole_ones_does(precision, tmp_path):
    losses = {}
    for name in ("float32", precision):
        recycling = made(tmp_path / name, name)
        optimizer = torch.optim.Adam(recycling.parameters(), 0.01)
        for _ in range(15):
            for x, y in recycling.loader(DATA, batch_size=8):
                loss = F.cross_entropy(recycling.model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            losses[name] = F.cross_entropy(recycling.model.eval()(X), Y).item()
    assert losses["float32"] < 1.2
    assert losses[precision] == pytest.approx(losses["float32"], abs=0.03)


class WithNumbers(nn.Module):
    """A cut that gives a map, whole numbers and whether."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.head = Several(), nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, order, positive = self.cut(x)
        return self.head(values.gather(1, order) * positive)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 40)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = self.layer(x)
        return values, values.argsort(1), values > 0


def test_only_floating_point_leaves_are_scaled(tmp_path):
    torch.manual_seed(0)
    model, data = WithNumbers().eval(), torch.randn(12, 5)
    recycling = recycle(model, data[:4], cut="cut", store=tmp_path, precision="int8")
    (x, _), *_ = recycling.loader(TensorDataset(data, torch.arange(12)), batch_size=12)
    assert [leaf.dtype for leaf in x.leaves] == [torch.int8, torch.bfloat16, torch.int64, torch.bool]
    assert away(recycling.model(x), model(data)) < LOSS["int8"]
    assert recycling.precision == "int8"


# -- texts -------------------------------------------------------------------------------------------------------------


def some_texts(count: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.arange(9) < torch.tensor([9 - i * 5 % 8 for i in range(count)])[:, None]
    ids = torch.randint(1, 30_000, (count, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


class Texts(torch.utils.data.Dataset[Any]):
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = int(self.batch["attention_mask"][index].sum())
        return {name: tensor[index, :size] for name, tensor in self.batch.items()}


def padded(items: Any) -> dict[str, torch.Tensor]:
    return {
        name: nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True)
        for name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_texts_have_no_padding_in_any_precision(precision, tmp_path):
    batch = some_texts()
    recycling = recycle(bert(), batch, cut="bert.encoder.layer.1", store=tmp_path, precision=precision)
    recycling.fill(Texts(batch), collate_fn=padded, batch_size=4)
    inputs = recycling.source.rule(batch)
    locations = torch.from_numpy(recycling.source.rows.lookup(recycling.source.keys(inputs)))
    values, *scales = recycling.source.rows.gather(locations)
    assert isinstance(values, Ragged)
    assert values.lengths.tolist() == batch["attention_mask"].sum(1).tolist()
    assert values.values.dtype is PRECISIONS[precision]
    assert [tuple(one.shape) for one in scales if isinstance(one, torch.Tensor)] == (
        [(12, 32)] if precision == "int8" else []
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_texts_give_nearly_the_same_outputs_in_batches_of_other_lengths(precision, tmp_path):
    batch = some_texts()
    model = bert()
    recycling = recycle(model, batch, cut="bert.encoder.layer.1", store=tmp_path, precision=precision)
    with torch.no_grad():
        want = model(**batch).logits
        got = [model(**b).logits for b in recycling.loader(Texts(batch), batch_size=5, collate_fn=padded)]
    assert recycling.stats.hits == 12
    assert away(torch.cat(got), want) < max(2 * LOSS[precision], 1e-5)


# -- real weights ------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 3)


class OfPictures(Classifier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


class OfTexts(Classifier):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask[:, :, None].float()
        return self.head((hidden * shown).sum(1) / shown.sum(1))


def test_a_pretrained_network_of_pictures_trains_on_int8_rows(tmp_path):
    torch.manual_seed(0)
    model = OfPictures(image_trunk(), 1280).eval()
    smooth = F.interpolate(torch.randn(12, 3, 8, 8), size=64, mode="bicubic")
    data = TensorDataset(smooth, torch.arange(12) % 3)
    recycling = recycle(model, smooth[:4], cut="trunk.blocks.2", store=tmp_path, precision="int8")
    assert away(outputs(recycling, data), model(smooth)) < LOSS["int8"]
    report = recycling.check(smooth[:4])
    assert report.ok
    assert 4e-3 < report.precision < LOSS["int8"]
    learns(recycling, lambda: recycling.loader(data, batch_size=12))


def test_a_pretrained_network_of_texts_trains_on_int8_rows(tmp_path):
    torch.manual_seed(0)
    words = ["how do i keep rows", "a store is a folder", "the first layers of a network are frozen and kept"] * 2
    batch = dict(text_tokenizer()(words, padding=True, return_tensors="pt"))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = OfTexts(text_trunk(), 384).eval()
    recycling = recycle(model, batch, cut="trunk.encoder.layer.2", store=tmp_path, precision="int8")
    with torch.no_grad():
        (kept,) = recycling.loader(Texts(batch), batch_size=6, collate_fn=padded)
        assert away(model(**kept), model(**batch)) < 2 * LOSS["int8"]
    assert kept["input_ids"].leaves[1].shape == (6, 384)
    report = recycling.check(batch)
    assert report.ok
    assert report.precision < LOSS["int8"]  # a scale per token would lose twice as much
    loader = recycling.loader(Texts(batch), batch_size=6, collate_fn=padded)
    learns(recycling, lambda: [(b, torch.arange(6) % 3) for b in loader])


def learns(recycling: Recycling, batches: Any) -> None:
    optimizer = torch.optim.AdamW(recycling.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        for x, y in batches():
            output = recycling.model(**x) if isinstance(x, dict) else recycling.model(x)
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# -- what is checked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_check_tells_what_the_precision_alone_makes_and_is_content_with_it(precision, tmp_path):
    recycling = made(tmp_path, precision)
    recycling.fill(DATA)
    report = recycling.check(X)
    assert report.ok
    assert report.found == 24
    assert report.difference == pytest.approx(report.precision, rel=0.1, abs=1e-6)
    assert report.precision <= LOSS[precision]
    assert ("the precision of rows" in str(report)) == (precision != "float32")


def exchanged(recycling: Recycling) -> None:
    """Each row under the key of another object."""
    with torch.no_grad():
        rows = recycling.source.encode(
            recycling.bypass.prefix(recycling.source.rule(X.roll(1, 0))), recycling.source.rule(X)
        )
    recycling.source.rows.append(recycling.source.keys(recycling.source.rule(X)), rows)
    recycling.source.rows.publish()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_check_is_not_content_with_rows_of_other_objects(precision, tmp_path):
    recycling = made(tmp_path, precision)
    exchanged(recycling)
    report = recycling.check(X)
    assert report.found == 24
    assert not report.ok


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_canary_takes_rounding_for_no_damage_and_other_rows_for_it(precision, tmp_path):
    outputs(made(tmp_path / "right", precision, verify_every=1))
    wrong = made(tmp_path / "wrong", precision, verify_every=1)
    exchanged(wrong)
    with pytest.raises(StaleActivationError, match="differs from its kept row"):
        outputs(wrong)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_found_again_by_the_next_run(precision, tmp_path):
    want = outputs(made(tmp_path, precision))
    again = made(tmp_path, precision)
    assert torch.equal(outputs(again), want)
    assert again.stats.misses == 0


def test_rows_of_each_precision_and_recipe_have_a_fingerprint_of_their_own(tmp_path, monkeypatch):
    found = [made(tmp_path, name).fingerprint for name in [*PRECISIONS, None]]
    monkeypatch.setattr(codec, "SCALES_VERSION", codec.SCALES_VERSION + 1)
    found.append(made(tmp_path, "int8").fingerprint)
    monkeypatch.undo()
    monkeypatch.setattr(codec, "SHARED_BY", 64)
    found.append(made(tmp_path, "int8").fingerprint)
    assert len(set(found)) == len(found)


def test_an_unknown_precision_is_an_error_that_names_all(tmp_path):
    with pytest.raises(ValueError, match=r"'int4' is none of \['float32', 'bfloat16', 'float16', 'int8', 'auto'\]"):
        made(tmp_path, "int4")


def test_the_command_line_offers_every_precision():
    from torchrecycle.cli.sweeps import Precision

    assert [one.value for one in Precision] == [*PRECISIONS, "auto"]


def test_a_single_vector_for_each_object_is_kept_in_int8_too(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 3)).eval(), torch.randn(12, 6)
    recycling = recycle(model, data[:2], cut="0", store=tmp_path, precision="int8")
    assert not recycling.keeps_one_tensor  # but two: whole numbers and scales
    assert away(outputs(recycling, TensorDataset(data, torch.arange(12))), model(data)) < LOSS["int8"]


# -- auto --------------------------------------------------------------------------------------------------------------


class Wobbly(nn.Module):
    """A layer whose result depends on the size of the batch, as that of a matrix product does."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.layer = by, nn.Linear(6, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1 + self.by * (len(x) > 4))


def wobbly(by: float, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Wobbly(by), nn.Linear(64, 3)).eval().to(dtype)


def automatic(model: nn.Module, folder: Any, data: torch.Tensor) -> Recycling:
    return recycle(model, data[:2], cut="0", store=folder, precision="auto")


def test_auto_keeps_float32_where_the_model_computes_in_it(tmp_path):
    recycling = made(tmp_path, "auto")
    assert recycling.precision == "float32"
    assert recycling.fingerprint == made(tmp_path, None).fingerprint


def test_auto_keeps_bfloat16_where_autocast_gives_it(tmp_path):
    recycling = made(tmp_path, "auto", autocast=torch.bfloat16)
    assert recycling.precision == "bfloat16"
    assert recycling.fingerprint == made(tmp_path, None, autocast=torch.bfloat16).fingerprint


class Added(nn.Module):
    """Adds what the cut gives to what a layer makes of it: in 16 bits, if the cut gives 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.head((hidden + self.second(hidden)).cumsum(1))


def test_rows_under_autocast_come_back_in_the_dtype_that_autocast_gives(tmp_path):
    torch.manual_seed(0)
    model, data = Added().eval(), torch.randn(12, 6)
    recycling = recycle(model, data[:2], cut="first", store=tmp_path, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(recycling, TensorDataset(data, torch.arange(12)))
        with recycling.paused(), torch.no_grad():
            want = torch.cat([model(part) for part in data.split(8)])
    assert recycling.source.layouts[0].dtype is torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize(("by", "picked"), [(1e-5, "float32"), (5e-4, "float16"), (9e-4, "float16")])
def test_auto_takes_what_loses_less_than_another_batch_size_does(by, picked, tmp_path):
    data = torch.randn(12, 6)
    recycling = automatic(wobbly(by), tmp_path, data)
    assert recycling.precision == picked
    recycling.fill(TensorDataset(data, torch.arange(12)), batch_size=4)
    report = recycling.check(data[:8])
    assert report.precision <= by
    assert report.ok


@pytest.mark.parametrize(("by", "picked"), [(1e-3, "bfloat16"), (3e-2, "int8")])
def test_auto_goes_down_to_int8_only_where_batch_sizes_differ_by_more(by, picked, tmp_path):
    data = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert automatic(wobbly(by, torch.bfloat16), tmp_path, data).precision == picked


def test_auto_does_not_take_float16_for_numbers_near_its_end(tmp_path):
    data = torch.randn(12, 6) * 1e4
    assert automatic(wobbly(5e-4), tmp_path, data).precision == "float32"


def test_auto_learns_nothing_from_zeros(tmp_path):
    model = wobbly(9e-4)
    with torch.no_grad():
        model.get_parameter("0.layer.bias").zero_()
    assert automatic(model, tmp_path, torch.zeros(4, 6)).precision == "float32"


def test_auto_is_chosen_anew_where_the_cut_moves(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 6), Wobbly(9e-4), nn.Linear(64, 3)).eval()
    recycling = recycle(model, torch.randn(4, 6), cut="0", store=tmp_path, precision="auto")
    assert recycling.precision == "float32"
    assert recycling.recut("2").precision == "float16"


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_code_on_the_page_of_precisions_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "precision.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/precision.md", "exec"), space)
