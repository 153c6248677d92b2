"""Where a model can be cut, which blocks it has, and what each cut costs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertModel

from small_models import bert, efficientnet, images, resnet, sequential, state_of, texts, vit
from torchrecycle import BatchError, Cut, CutError, cuts, recycle
from torchrecycle.bypass import BatchRule, Probes, example_inputs, parameter_names, sequences_of
from torchrecycle.cost import blocks_of, choose_cut, level_of


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
