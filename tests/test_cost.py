"""Where a model can be cut, which blocks it has, and what each cut costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, T5Config, T5Model

from small_models import bert, efficientnet, images, resnet, sequential, state_of, texts, vit
from torchrecycle import BatchError, Cut, CutError, cost, cuts, recycle
from torchrecycle.bypass import BatchRule, Probes, evaluating, example_inputs, parameter_names, sequences_of
from torchrecycle.cost import (
    CutPrediction,
    CutPredictions,
    Cuts,
    _block_names,
    _Remembering,
    blocks_of,
    choose_cut,
    level_of,
)
from torchrecycle.store import speed
from torchrecycle.trace import Trace, trace


def _probes(model: nn.Module, example: Any) -> Probes:
    inputs = example_inputs(model, BatchRule(parameter_names(model), example), example)
    return Probes.of(model, inputs, sequences_of(inputs, None))


def _two() -> dict[str, torch.Tensor]:
    return {name: part[:2] for name, part in texts().items()}


def _vit12_torchvision() -> nn.Module:
    sizes = dict(image_size=32, patch_size=8, num_layers=12, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    return torchvision.models.VisionTransformer(**sizes)


def _wrapped() -> nn.Module:
    backbone = resnet()
    backbone.avgpool = backbone.fc = nn.Identity()
    return nn.Sequential(
        backbone, nn.Unflatten(1, (512, 1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5)
    )


def _minilm() -> nn.Module:
    sizes = dict(vocab_size=60, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    return BertModel(BertConfig(**sizes, num_hidden_layers=6))


PINNED = {
    "resnet34": (
        lambda: torchvision.models.resnet34(num_classes=5),
        images(2, 64),
        {0.5: "layer2", 0.75: "layer3", 1: "avgpool"},
    ),
    "efficientnet-lite0": (efficientnet, images(2), {0.5: "blocks.2", 0.75: "blocks.4"}),
    "minilm": (_minilm, _two(), {0.5: "encoder.layer.2", 0.75: "encoder.layer.3"}),
    "bert classifier": (lambda: bert(6), _two(), {0.5: "bert.encoder.layer.2", 0.75: "bert.encoder.layer.3"}),
    "vit of timm": (lambda: vit(12), images(2), {0.5: "blocks.5", 0.75: "blocks.8"}),
    "vit of torchvision": (
        _vit12_torchvision,
        images(2),
        {0.5: "encoder.layers.encoder_layer_5", 0.75: "encoder.layers.encoder_layer_8"},
    ),
    "wrapped resnet": (_wrapped, images(2), {0.5: "0.layer2", 0.75: "0.layer3"}),
}


@pytest.mark.parametrize("name", PINNED)
def test_levels_are_pinned(name):
    make, example, pinned = PINNED[name]
    model = make()
    probes = _probes(model, example)
    assert {level: choose_cut(model, probes, level) for level in pinned} == pinned


def test_ties_go_to_less_recycling_and_tiny_levels_to_the_first_block():
    model = bert(6)
    probes = _probes(model, _two())
    assert level_of(model, probes.traces[0], "bert.encoder.layer.0") == pytest.approx(1 / 6, abs=1e-3)
    assert choose_cut(model, probes, 0.25) == "bert.encoder.layer.0"
    assert choose_cut(model, probes, 0.01) == "bert.encoder.layer.0"


@pytest.mark.parametrize("level", [0, -0.5, 1.01])
def test_a_level_outside_of_its_range_is_refused(level):
    with pytest.raises(CutError, match="outside of 0 to 1"):
        recycle(sequential(), torch.randn(2, 6), level=level, store="memory://")


def test_a_level_is_found_under_the_autocast_that_was_declared():
    with recycle(bert(), _two(), level=0.5, store="memory://cast", autocast=torch.bfloat16) as recycling:
        assert recycling.cut == "bert.encoder.layer.1"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert any(cut.valid for cut in cuts(resnet(), images(2)))


def test_level_one_recycles_all_but_the_head():
    for make, example in ((efficientnet, images(2)), (lambda: vit(4), images(2)), (resnet, images(2))):
        model = make()
        with recycle(model, example, level=1, store="memory://") as recycling:
            left = {name for name, p in model.named_parameters() if p.requires_grad}
        assert recycling.level == 1
        assert left <= {"classifier.weight", "classifier.bias", "head.weight", "head.bias", "fc.weight", "fc.bias"}


def test_blocks_are_the_outermost_longest_list():
    assert blocks_of(resnet()) == ["layer1", "layer2", "layer3", "layer4"]
    assert blocks_of(vit(4)) == [f"blocks.{i}" for i in range(4)]
    assert blocks_of(bert(3)) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert blocks_of(_wrapped()) == [f"0.layer{i}" for i in range(1, 5)]
    assert blocks_of(bert(2)) == [f"bert.encoder.layer.{i}" for i in range(2)]
    assert blocks_of(nn.Linear(2, 2)) == []
    assert blocks_of(timm.create_model("convnext_atto", num_classes=2)) == [f"stages.{i}" for i in range(4)]


def test_what_each_cut_of_a_resnet_saves_and_costs():
    model = resnet().train()
    before = state_of(model)
    found = cuts(model, images(2))
    assert state_of(model) == before
    named = {cut.name: cut for cut in found}
    assert list(named)[:4] == ["layer1", "layer2", "layer3", "layer4"]
    assert [named[f"layer{i}"].level for i in range(1, 5)] == [0.25, 0.5, 0.75, 1]
    assert [named[f"layer{i}"].bytes_per_object for i in range(1, 5)] == [
        4 * 64 * 64,
        4 * 128 * 16,
        4 * 256 * 4,
        4 * 512,
    ]
    assert named["layer2"].parameters == sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(("conv1", "bn1", "layer1", "layer2"))
    )
    shares = [cut.flops_share for cut in found]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert all(0 < cut.seconds_share <= 1 for cut in found)
    assert all(cut.valid and cut.leaves == 1 and not cut.reason for cut in found)


def test_cuts_of_texts_count_the_tokens_of_the_example():
    found = cuts(bert(2), _two())
    layer = next(cut for cut in found if cut.name == "bert.encoder.layer.0")
    assert layer.valid
    assert layer.bytes_per_object == 9 * 32 * 4


def test_cuts_are_a_sequence_that_prints_as_a_table():
    found = cuts(sequential(), torch.randn(4, 6))
    assert isinstance(found[0], Cut)
    assert len(found[:2]) == 2
    assert found[-1] is list(found)[-1]
    lines = repr(found).splitlines()
    assert lines[0].startswith("Sequential")
    assert len(lines) == len(found) + 2
    assert found._repr_html_().count("<tr>") == len(found) + 1


def test_a_cut_that_is_not_possible_says_why_in_the_table():
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> list[Any]:
            return [x.sum(0)]

    class Unpack(nn.Module):
        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
            return x[0][None].expand(3, -1)

    found = cuts(nn.Sequential(nn.Linear(4, 4), Mixing(), Unpack(), nn.Linear(4, 2)), torch.randn(3, 4))
    bad = next(cut for cut in found if cut.name == "1")
    assert not bad.valid
    assert "no row of each" in bad.reason
    assert bad.reason in repr(found)
    last = found[-1]
    assert not last.valid
    assert "nothing would be left to train" in last.reason or "row" in last.reason


def test_every_module_is_listed_if_asked():
    names = [cut.name for cut in cuts(resnet(), images(2), all=True)]
    assert {"conv1", "layer1.0.conv1", "layer4", "avgpool"} <= set(names)
    assert "layer1.0.relu" not in names  # called twice


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.randn(1, 6), "two or more"),
        (torch.randn(4, 5), "does not run on the example"),
        ("text", "tensor"),
        ((torch.randn(4, 6), torch.randn(3, 6)), "first dimensions"),
        ({}, "empty"),
    ],
)
def test_an_example_that_does_not_fit_is_an_error_in_words(example, words):
    with pytest.raises(BatchError, match=words):
        cuts(sequential(), example)


def test_a_vit_with_registers_and_another_pooling_can_be_cut_everywhere():
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = VisionTransformer(**sizes, reg_tokens=2, global_pool="avg", class_token=False)
    found = cuts(model, images(2))
    assert [cut.valid for cut in found if cut.name.startswith("blocks.")] == [True] * 3


# -- which rows are shown ----------------------------------------------------------------------------------------------


def _traced(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    with evaluating(model):
        return trace(model, args, kwargs)


def _stages(count: int) -> list[str]:
    return [f"stages.{number}" for number in range(count)]


ROWS = {
    "levit_128s": (_stages(3), 224),  # its stem is a list of seven
    "poolformer_s12": (_stages(4), 64),  # its head is a list of five
    "efficientvit_b0": (_stages(4), 64),  # its head holds three quarters of the parameters
    "nfnet_l0": (_stages(4), 64),
    "inception_v3": (["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a"], 96),
    "hrnet_w18_small": (["stage2", "stage3", "stage4"], 64),
    "twins_svt_small": (["blocks.0.0", "blocks.0.1", "blocks.1.0"], 224),  # lists of lists, which are not called
    "coat_tiny": (["serial_blocks1.0", "serial_blocks1.1", "serial_blocks2.0"], 224),
    "vgg11_bn": (
        ["features.3", "features.7", "features.10", "features.14"],
        64,
    ),  # conv, norm, act, pool: one row
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_are_what_a_user_would_call_the_blocks(name):
    first, size = ROWS[name]
    model = timm.create_model(name)
    traced = _traced(model, torch.randn(2, 3, size, size))
    names = _block_names(model, traced)
    assert names[: len(first)] == first
    assert len(names) <= 24
    ends = [traced.of(row)[0].end for row in names]
    assert ends == sorted(ends)


def test_an_encoder_and_a_decoder_share_the_levels():
    model = T5Model(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=60)).eval()
    ids = torch.randint(3, 60, (2, 7))
    traced = _traced(model, input_ids=ids, decoder_input_ids=ids)
    names = _block_names(model, traced)
    blocks = [f"{half}.block.{number}" for half in ("encoder", "decoder") for number in range(3)]
    assert [name for name in names if name in blocks] == blocks
    assert names.index("encoder.block.2") < names.index("encoder") < names.index("decoder.block.0")
    assert level_of(model, traced, "encoder") == 0.5


def test_blocks_that_are_called_twice_are_two_rows():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
            self.head = nn.Linear(4, 1)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.head(self.tower(left) * self.tower(right))

    model = Twice()
    traced = _traced(model, torch.randn(2, 4), torch.randn(2, 4))
    rows = [f"tower.{block}#{call}" for call in (1, 2) for block in range(3)]
    assert [name for name in _block_names(model, traced) if name in rows] == rows
    assert [level_of(model, traced, row) for row in rows] == pytest.approx([(i + 1) / 6 for i in range(6)], abs=1e-3)


def test_after_the_last_block_comes_what_changes_something():
    names = [cut.name for cut in cuts(vit(3), images(2))]
    assert names[:4] == ["blocks.0", "blocks.1", "blocks.2", "norm"]
    assert "blocks" not in names  # keeps and freezes what blocks.2 does
    assert "fc_norm" in names  # after it there is one row per image


# -- what one forward takes, and computing once ------------------------------------------------------------------------


def test_the_heading_says_what_the_shares_are_of():
    model = resnet()
    found = cuts(model, images(4))
    assert (found.objects, found.parameters) == (4, sum(p.numel() for p in model.parameters()))
    assert found.seconds > 0
    assert found.flops > 1e7
    assert repr(found).splitlines()[0].startswith("ResNet: 4.9 M parameters; a forward of 4 objects: ")


def test_the_nearest_cut_is_the_one_that_a_level_chooses():
    model = bert(6)
    found, probes = cuts(model, _two()), _probes(model, _two())
    for level in (0.25, 0.5, 0.6):
        nearest = found.nearest(level)
        assert nearest is not None
        assert nearest.name == choose_cut(model, probes, level)
    assert Cuts("Model", []).nearest(0.5) is None


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.convolutions += type(args[0]) is torch.Tensor and not args[0].is_meta  # no absent one
        return func(*args, **(kwargs or {}))


def _without_seconds(found: Cuts) -> list[tuple[Any, ...]]:
    return [(c.name, c.level, c.valid, c.reason, c.parameters, c.flops_share, c.bytes_per_object) for c in found]


def test_trying_every_cut_computes_each_convolution_once_and_finds_the_same(monkeypatch):
    model = resnet()
    own = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with _Counting() as counting:
        found = cuts(model, images(2), all=True)
    # Six forwards measure, and the cuts are tried on the example and on a few others made from it.
    assert own * 6 < counting.convolutions <= own * 12
    monkeypatch.setattr(cost, "_COSTLY", frozenset())
    with _Counting() as counting:
        plainly = cuts(model, images(2), all=True)
    assert counting.convolutions > own * 50
    assert _without_seconds(found) == _without_seconds(plainly)


def test_remembered_results_are_copies_for_these_operands_only():
    layer = nn.Conv2d(3, 4, 3)
    one, other = images(2), images(2) + 1
    with torch.no_grad():
        plain = layer(one), layer(other)
        with _Remembering(layer):
            layer(one).zero_()
            again = layer(one)
            operand = other.clone()
            first = layer(operand)
            operand.zero_()
            second = layer(other)
    assert torch.equal(again, plain[0])
    assert torch.equal(first, plain[1])
    assert torch.equal(second, plain[1])


def test_what_does_not_fit_is_computed_each_time(monkeypatch):
    monkeypatch.setattr(cost, "REMEMBERED", 10)
    layer = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    with torch.no_grad():
        with _Remembering(layer) as remembering:
            assert torch.equal(layer(x), layer(x))
    assert not any(remembering._known.values())


# -- does it pay -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _little_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "WRITTEN_BYTES", 2**20)
    monkeypatch.setattr(speed, "PROBE_BYTES", 2 * 2**20)
    monkeypatch.setattr(speed, "ENOUGH_SECONDS", 0.02)


@pytest.mark.usefixtures("_little_written")
def test_what_a_data_set_costs_at_each_cut_is_predicted_from_what_rows_of_its_size_take(tmp_path: Path):
    found = cuts(efficientnet(), images(4))
    predicted = found.predict(objects=1000, epochs=30, store=tmp_path)
    valid = [cut for cut in found if cut.valid]
    assert [one.cut for one in predicted] == [cut.name for cut in valid]
    assert [one.bytes_kept for one in predicted] == [1000 * cut.bytes_per_object for cut in valid]
    for one, cut in zip(predicted, valid, strict=True):
        assert one.computing_seconds == pytest.approx(1000 * cut.seconds_share * found.seconds / 4)
        assert one.fill_seconds > one.computing_seconds
        assert one.reading_seconds > 0
        assert one.seconds_saved == pytest.approx(30 * (one.computing_seconds - one.reading_seconds) - one.fill_seconds)
    assert predicted[-1].pays  # the whole trunk, for 5 KB
    assert not any(tmp_path.iterdir())
    lines = repr(predicted).splitlines()
    assert lines[0] == "EfficientNet, 1,000 objects, 30 epochs:"
    assert [line.split()[0] for line in lines[2:]] == [cut.name for cut in valid]
    assert predicted.of(valid[0].name) is predicted[0]
    with pytest.raises(KeyError, match=r"no valid cut 'blocks\.77'"):
        predicted.of("blocks.77")


class _Scale(nn.Module):
    """Costs next to nothing, and gives much."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.usefixtures("_little_written")
def test_where_reading_is_slower_than_computing_again_it_says_so(tmp_path: Path):
    model = nn.Sequential(_Scale(), nn.Linear(50_000, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    found = cuts(model, torch.randn(8, 50_000))
    slow = found.predict(objects=10_000, epochs=100, store=tmp_path, memory=0)
    assert not slow.of("0").pays
    assert slow.of("0").epochs_until_paid is None
    line = next(line for line in repr(slow).splitlines() if line.startswith("0 "))
    assert line.endswith("never: reading is slower than computing again")
    plenty = found.predict(objects=10_000, epochs=100, store=tmp_path, memory=10**12)
    assert plenty.of("0").reading_seconds < slow.of("0").reading_seconds


def test_filling_has_paid_when_what_epochs_save_is_more():
    one = CutPrediction("layer2", 0.5, 100, 3, 10**6, fill_seconds=7.0, computing_seconds=5.0, reading_seconds=1.0)
    assert (one.epochs_until_paid, one.seconds_saved, one.pays) == (2, 5.0, True)
    once = replace(one, epochs=1)
    assert once.seconds_saved == -3.0
    assert "not yet: after 2 epochs" in repr(CutPredictions("ResNet", [once]))
    assert "after 2 epochs, and saves 5 s" in repr(CutPredictions("ResNet", [one]))
    assert repr(CutPredictions("ResNet", [])) == "ResNet: there is no valid cut to keep the rows of"


@pytest.mark.parametrize("arguments", [{"objects": 0}, {"objects": 10, "epochs": 0}])
def test_a_prediction_for_no_objects_or_epochs_is_refused(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match="at least 1 of each"):
        Cuts("ResNet", [], objects=2).predict(**arguments)
