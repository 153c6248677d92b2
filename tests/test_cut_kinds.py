"""Cuts of every kind: joint ones, the second call of a module, leaves that are no plain row, and a cut that moves.

What is kept and read back must give what the plain model gives: to the bit for the same batch, and within rounding for
objects that were computed in another one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrModel,
    ResNetConfig,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from small_models import WORDS, bert, images, resnet, texts
from torchrecycle import BatchError, CutError, RecycleWarning, recycle


def _items(batch: dict[str, torch.Tensor], order: list[int] | None = None) -> list[dict[str, torch.Tensor]]:
    """Its objects as a data set, which ``default_collate`` joins to the batch again."""
    count = len(next(iter(batch.values())))
    return [{name: tensor[i] for name, tensor in batch.items()} for i in order or range(count)]


def _unpadded(batch: dict[str, torch.Tensor], masks: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """Its objects without their padding: `masks` names the mask of each padded input."""
    return [
        {name: part[item[masks[name]].bool()] if name in masks else part for name, part in item.items()}
        for item in _items(batch)
    ]


class Pad:
    """A collate function that pads each input to the batch's longest, with `more` places on one side."""

    def __init__(self, side: str = "right", more: int = 0) -> None:
        self.side, self.more = side, more

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: self._join([item[name] for item in items]) for name in items[0]}

    def _join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        length = max(len(part) for part in parts) + self.more
        joined = parts[0].new_zeros(len(parts), length)
        for row, part in zip(joined, parts, strict=True):
            row[slice(0, len(part)) if self.side == "right" else slice(length - len(part), None)] = part
        return joined


# -- leaves that are no plain row --------------------------------------------------------------------------------------


def t5(**config: Any) -> T5Config:
    torch.manual_seed(0)
    return T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2, **config)


class Biased(nn.Module):
    """Layers of attention that hand on ``[batch, heads, tokens, tokens]``: minus infinity where a key is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList(Attending() for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden, bias = self.embed(input_ids), attention_mask
        for layer in self.layers:
            hidden, bias = layer(hidden, bias)
        return hidden


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if bias.dim() == 2:
            apart = torch.arange(hidden.shape[1], dtype=torch.float32)
            hidden_by = torch.where(bias.bool(), 0.0, torch.finfo(torch.float32).min)
            slopes = torch.tensor([1.0, 0.5])[None, :, None, None]
            bias = (apart[:, None] - apart).abs() * -slopes + hidden_by[:, None, None]
        query = hidden.unflatten(2, (2, 4)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=bias)
        return hidden + self.mix(attended.transpose(1, 2).flatten(2)), bias


TEXT_MASKS = {"input_ids": "attention_mask", "attention_mask": "attention_mask"}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [Biased, lambda: T5EncoderModel(t5())], ids=["biased", "t5"])
def test_rows_are_kept_without_padding_and_padded_on_either_side(make, side):
    torch.manual_seed(0)
    model = make().eval()
    cut = "layers.1" if make is Biased else "encoder.block.1"
    with recycle(model, texts(2), cut=cut, store="memory://") as recycling:
        assert recycling.source.padding.right
        assert recycling.source.padding.left
        data = _unpadded(texts(6), TEXT_MASKS)
        recycling.fill(data, batch_size=2, collate_fn=Pad())
        misses = recycling.stats.misses
        collate = Pad(side, more=2)
        hit = next(iter(recycling.loader(data, batch_size=6, collate_fn=collate)))
        with torch.no_grad():
            got = _first_tensor(model(**hit))
        assert (recycling.stats.hits, recycling.stats.misses) == (6, misses)
    plain = collate(data)
    with torch.no_grad():
        want = _first_tensor(model(**plain))
    kept = plain["attention_mask"].bool()
    assert torch.allclose(want[kept], got[kept], atol=1e-5)


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_a_bias_between_tokens_is_kept_without_padding_in_both_dimensions_and_padded_with_what_hides():
    torch.manual_seed(0)
    with recycle(Biased().eval(), texts(2), cut="layers.1", store="memory://") as recycling:
        hidden, bias = recycling.source.layouts
        assert (len(hidden.ragged_dims), len(bias.ragged_dims)) == (1, 2)
        assert (hidden.fill, bias.fill) == (None, torch.finfo(torch.float32).min)


class Table(nn.Module):
    """Blocks that hand on a table of positions beside the hidden states, as rotary embeddings are."""

    def __init__(self, depends: bool = False, fixed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList(Step(depends, fixed) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden, table = self.embed(input_ids) * attention_mask[..., None], None
        for block in self.blocks:
            hidden, table = block(hidden, table)
        return hidden


class Step(nn.Module):
    def __init__(self, depends: bool, fixed: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.depends, self.fixed = depends, fixed

    def forward(self, hidden: torch.Tensor, table: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if table is None:
            table = torch.arange(1 if self.fixed else hidden.shape[1]).float()[None, :, None].cos().repeat(1, 1, 8)
            if self.depends:
                table = table * hidden.abs().max()
        return self.mix(hidden) if self.depends else self.mix(hidden + table), table


@pytest.mark.parametrize("fixed", [False, True])
def test_a_leaf_that_is_the_same_for_all_objects_is_kept_once_and_not_with_each(fixed):
    torch.manual_seed(0)
    model = Table(fixed=fixed).eval()
    data = _unpadded(texts(6), TEXT_MASKS)
    with recycle(model, texts(2), cut="blocks.0", store="memory://") as recycling:
        assert len(recycling.source.layouts) == 1
        for more in (0, 4):  # at another length it is made anew
            collate = Pad(more=more)
            hit = next(iter(recycling.loader(data, batch_size=6, collate_fn=collate)))
            with torch.no_grad():
                got, want = model(**hit), model(**collate(data))
            kept = collate(data)["attention_mask"].bool()
            assert torch.allclose(got[kept], want[kept], atol=1e-6)
        assert recycling.stats.hits == 12


def test_a_leaf_without_a_dimension_for_objects_that_depends_on_them_all_the_same_is_refused():
    torch.manual_seed(0)
    with pytest.raises(CutError, match="depends on them all the same"):
        recycle(Table(depends=True).eval(), texts(2), cut="blocks.0", store="memory://")


class Lengths(Table):
    """Hands on a table of the batch's longest text, which no text by itself has."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids) * attention_mask[..., None]
        table = attention_mask.sum(1).max() * torch.ones(1, input_ids.shape[1], 8)
        for block in self.blocks:
            hidden, table = block(hidden, table)
        return hidden


def test_a_table_that_depends_on_the_padding_of_the_batch_is_refused():
    torch.manual_seed(0)
    with pytest.raises(CutError, match="depends on"):
        recycle(
            Lengths(depends=True).eval(),
            {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6, dtype=torch.long)},
            cut="blocks.0",
            store="memory://",
        )


class Featured(nn.Module):
    """A text and sixteen numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.numbers = nn.Embedding(WORDS, 8), nn.Embedding(WORDS, 8)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        about = self.numbers(numbers).sum(1, keepdim=True)
        mask = attention_mask[..., None]
        hidden = self.first((self.embed(input_ids) + about) * mask)
        return self.last((hidden * mask).sum(1))


def _beside(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    texts_alone = [{name: part for name, part in item.items() if name != "numbers"} for item in items]
    return {**Pad()(texts_alone), "numbers": torch.stack([item["numbers"] for item in items])}


def test_numbers_that_are_as_many_as_the_tokens_of_a_batch_by_chance_count_in_full():
    torch.manual_seed(0)
    model = Featured().eval()
    example = {**texts(2), "numbers": torch.arange(32).reshape(2, 16)}
    text = torch.randint(1, WORDS, (5,))
    items = [{"input_ids": text, "attention_mask": torch.ones(5, dtype=torch.long), "numbers": torch.arange(16)}]
    items += [{**items[0], "numbers": torch.arange(16).flip(0) * torch.tensor([1] * 5 + [2] * 11)}]
    items[1]["numbers"][:5] = torch.arange(5)  # they differ only where the text has ended
    items += [
        {
            "input_ids": torch.randint(1, WORDS, (16,)),
            "attention_mask": torch.ones(16, dtype=torch.long),
            "numbers": torch.arange(16),
        }
    ]
    with torch.no_grad():
        want = model(**_beside(items))
    with recycle(model, example, cut="first", store="memory://") as recycling:
        recycling.fill(items, batch_size=3, collate_fn=_beside)
        (batch,) = recycling.loader(items, batch_size=3, collate_fn=_beside)
        with torch.no_grad():
            assert torch.allclose(model(**batch), want, atol=1e-5)
        assert recycling.stats.hits == 3


class Clip(nn.Module):
    """Each frame of a clip through one network, then all frames of a clip together."""

    def __init__(self, tiled: bool = False) -> None:
        super().__init__()
        self.frame = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6, 2)
        self.tiled = tiled

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        frames = clip.transpose(0, 1) if self.tiled else clip
        maps = self.frame(frames.flatten(0, 1)).mean((2, 3)).unflatten(0, frames.shape[:2])
        return self.head(maps.mean(0 if self.tiled else 1))


def test_frames_that_lie_in_the_dimension_of_the_objects_are_kept_with_their_object():
    torch.manual_seed(0)
    model = Clip().eval()
    clips = torch.randn(5, 3, 3, 12, 12)
    with recycle(model, clips[:2], cut="frame.1", store="memory://") as recycling:
        assert recycling.source.layouts[0].per_object == 3
        recycling.fill(list(clips), batch_size=5)
        hit = next(iter(recycling.loader(list(clips.flip(0)), batch_size=5)))
        with torch.no_grad():
            assert torch.equal(model(hit), model(clips.flip(0)))
        assert recycling.stats.hits == 5


def test_frames_that_lie_there_before_their_objects_are_refused():
    torch.manual_seed(0)
    with pytest.raises(CutError, match="depends on the other objects"):
        recycle(Clip(tiled=True).eval(), torch.randn(2, 3, 3, 12, 12), cut="frame.1", store="memory://")


# -- two sequences -----------------------------------------------------------------------------------------------------


def bart() -> BartModel:
    torch.manual_seed(0)
    sizes = {
        f"{half}_{name}": n
        for half in ("encoder", "decoder")
        for name, n in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(vocab_size=WORDS, d_model=16, max_position_embeddings=40, use_cache=False, **sizes)
    return BartModel(config).eval()


def _pairs(count: int) -> dict[str, torch.Tensor]:
    question, answer = texts(count, 9), texts(count + 1, 7)
    return {**question, **{f"decoder_{name}": part[:count] for name, part in answer.items()}}


PAIR_MASKS = {
    n: f"{side}attention_mask" for side in ("", "decoder_") for n in (f"{side}input_ids", f"{side}attention_mask")
}


@pytest.mark.parametrize("make", [bart, lambda: T5Model(t5(use_cache=False)).eval()], ids=["bart", "t5"])
def test_a_cut_in_the_decoder_keeps_rows_that_follow_two_sequences(make):
    model = make()
    cut = "decoder.layers.0" if make is bart else "decoder.block.1"
    data = _unpadded(_pairs(6), PAIR_MASKS)
    with recycle(model, _pairs(2), cut=cut, store="memory://") as recycling:
        followed = {by for layout in recycling.source.layouts for by in layout.ragged_by}
        assert followed == {0, 1}
        recycling.fill(data, batch_size=2, collate_fn=Pad())
        collate = Pad(more=3)
        hit = next(iter(recycling.loader(data, batch_size=6, collate_fn=collate)))
        with torch.no_grad():
            got = model(**hit).last_hidden_state
        assert recycling.stats.hits == 6
    plain = collate(data)
    with torch.no_grad():
        want = model(**plain).last_hidden_state
    kept = plain["decoder_attention_mask"].bool()
    assert torch.allclose(want[kept], got[kept], atol=1e-5)


# -- images of several sizes -------------------------------------------------------------------------------------------


def detr() -> DetrModel:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    backbone = ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage4"], **sizes)
    layers = {
        f"{half}_{name}": n
        for half in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return DetrModel(DetrConfig(backbone_config=backbone, d_model=16, num_queries=5, **layers)).eval()


def _pad_images(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Images ``[3, height, width]`` of any size, padded to the largest, and where they are."""
    height, width = (max(item.shape[dim] for item in items) for dim in (1, 2))
    pixels, mask = torch.zeros(len(items), 3, height, width), torch.zeros(len(items), height, width, dtype=torch.long)
    for row, item in enumerate(items):
        pixels[row, :, : item.shape[1], : item.shape[2]] = item
        mask[row, : item.shape[1], : item.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


@pytest.mark.parametrize("cut", ["backbone.model.encoder.stages.1", "encoder.layers.0"])
def test_images_of_several_sizes_are_kept_for_the_size_to_which_they_were_padded(cut):
    model = detr()
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 64), (64, 40), (96, 64), (50, 64), (96, 64), (70, 30)]
    photos = [torch.randn(3, *size, generator=generator) for size in sizes]
    batches = [photos[:2], photos[2:4], photos[4:]]
    with torch.no_grad():
        want = [model(**_pad_images(batch)).last_hidden_state for batch in batches]
    with recycle(model, _pad_images(photos[:2]), cut=cut, store="memory://") as recycling:
        loader = recycling.loader(photos, batch_size=2, collate_fn=_pad_images)
        with torch.no_grad():
            got = [model(**batch).last_hidden_state for batch in loader]
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert recycling.stats.hits == 6
        with torch.no_grad():  # padded further, it is another row: computed, not taken
            other = [photos[1], photos[2]]
            mixed = next(iter(recycling.loader(other, batch_size=2, collate_fn=_pad_images)))
            got_mixed, hits = model(**mixed).last_hidden_state, recycling.stats.hits
    assert hits == 8
    with torch.no_grad():
        assert torch.allclose(got_mixed, model(**_pad_images(other)).last_hidden_state, atol=1e-4)


# -- lists of objects --------------------------------------------------------------------------------------------------


def detector() -> nn.Module:
    torch.manual_seed(0)
    make = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return make(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96)


def _photos(count: int, size: int = 64) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size)))


TARGET = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}


def _apart(items: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*items, strict=True))


def test_a_detector_takes_a_list_of_images_and_in_training_mode_its_targets_beside_them():
    model = detector().eval()
    photos = _photos(4)
    with torch.no_grad():
        want = model(photos)
    data = [(photo, TARGET) for photo in photos]
    with recycle(model, (photos,), cut="backbone.body.8", store="memory://") as recycling:
        (batch,) = recycling.loader(data, batch_size=4, collate_fn=_apart)
        with torch.no_grad():
            for given in (batch[0], photos):
                got = model(list(given))
                assert all(torch.equal(a[name], b[name]) for a, b in zip(want, got, strict=True) for name in a)
        assert recycling.stats.hits == 4
        losses = []
        for given in (batch, _apart(data)):
            model.zero_grad()
            torch.manual_seed(1)
            found = model.train()(*map(list, given))
            sum(found.values()).backward()
            losses.append({name: loss.item() for name, loss in found.items()})
            assert model.backbone.body["8"].block[0][0].weight.grad is None
            assert model.backbone.body["9"].block[0][0].weight.grad is not None
        assert losses[0] == losses[1]
        assert recycling.stats.hits == 8


def test_images_of_several_sizes_in_one_list_are_computed_and_not_recycled():
    model = detector().eval()
    mixed = [*_photos(2), *_photos(1, 80)]
    with torch.no_grad():
        want = model(mixed)
    with recycle(model, (_photos(2),), cut="backbone.body.8", store="memory://") as recycling:
        with torch.no_grad():
            got = model(mixed)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(want, got, strict=True) for name in a)
        with pytest.raises(BatchError, match="Bring all to one size"):
            recycling.fill([(photo, TARGET) for photo in mixed], batch_size=3, collate_fn=_apart)


# -- joint cuts --------------------------------------------------------------------------------------------------------

TOWERS = ["vision_model.encoder.layers.1", "text_model.encoder.layers.0"]


def clip() -> CLIPModel:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**small, "vocab_size": WORDS, "max_position_embeddings": 20, "eos_token_id": WORDS - 1, "bos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def _captioned(count: int) -> dict[str, torch.Tensor]:
    return {**texts(count), "pixel_values": images(count)}


def test_a_joint_cut_recycles_both_towers_and_trains_the_rest_of_both():
    model = clip()
    by_hand = copy.deepcopy(model)
    batch = _captioned(4)
    with torch.no_grad():
        want = model(**batch)
    with recycle(model, _captioned(2), cut=TOWERS, store="memory://") as recycling:
        assert recycling.cut == " + ".join(TOWERS)
        frozen = set(recycling.bypass.prefix_parameters)
        assert any(name.startswith("vision_model.encoder.layers.1.") for name in frozen)
        assert not any(
            name.startswith(("vision_model.encoder.layers.2", "text_model.encoder.layers.1")) for name in frozen
        )
        hit = next(iter(recycling.loader(_items(batch), batch_size=4)))
        with torch.no_grad():
            got = model(**hit)
        assert torch.equal(got.logits_per_image, want.logits_per_image)
        assert torch.equal(got.text_embeds, want.text_embeds)
        assert recycling.stats.hits == 4
        model.train()(**hit).logits_per_image.square().sum().backward()
        for name, parameter in by_hand.named_parameters():
            parameter.requires_grad_(name not in frozen)
        by_hand(**batch).logits_per_image.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, parameter in by_hand.named_parameters():
            assert (parameter.grad is None) == (gradients[name] is None), name
            assert parameter.grad is None or torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def test_the_level_of_a_joint_cut_is_the_mean_over_its_towers():
    with recycle(clip(), _captioned(2), cut=TOWERS, store="memory://") as recycling:
        assert recycling.level == pytest.approx((2 / 3 + 1 / 3) / 2, abs=0.01)


def test_a_joint_cut_of_layers_behind_each_other_is_refused_with_what_to_do():
    with pytest.raises(CutError, match="of cuts behind each other, take the last"):
        recycle(resnet(), images(2), cut=["layer1", "layer2"], store="memory://")


class Siamese(nn.Module):
    """One encoder for both texts of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (self.encoder(left) * self.encoder(right)).sum(1)


def test_a_joint_cut_of_one_encoder_that_is_called_twice_keeps_both_of_its_activations():
    torch.manual_seed(0)
    model = Siamese().eval()
    left, right = torch.randn(5, 6), torch.randn(5, 6)
    want = model(left, right)
    with recycle(model, (left[:2], right[:2]), cut=["encoder.1#1", "encoder.1#2"], store="memory://") as recycling:
        assert set(recycling.bypass.prefix_parameters) == {"encoder.0.weight", "encoder.0.bias"}
        hit = next(iter(recycling.loader(list(zip(left, right, strict=True)), batch_size=5)))
        assert torch.equal(model(*hit), want)
        assert recycling.stats.hits == 5


# -- modules called several times --------------------------------------------------------------------------------------


def albert() -> AlbertModel:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=WORDS,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    return AlbertModel(config, add_pooling_layer=False).eval()


LAYER = "encoder.albert_layer_groups.0"


def test_the_second_call_of_a_module_can_be_cut_where_its_parameters_are_frozen_in_both_halves():
    model = albert()
    batch = texts(4)
    with torch.no_grad():
        want = model(**batch).last_hidden_state
    with pytest.raises(CutError, match=r"share .*share='freeze'"):
        recycle(model, texts(2), cut=f"{LAYER}#2", store="memory://")
    with recycle(model, texts(2), cut=f"{LAYER}#2", store="memory://", share="freeze") as recycling:
        hit = next(iter(recycling.loader(_items(batch), batch_size=4)))
        with torch.no_grad():
            got = model(**hit).last_hidden_state
        assert recycling.stats.hits == 4
    kept = batch["attention_mask"].bool()
    assert torch.equal(got[kept], want[kept])


def test_a_module_that_is_called_several_times_must_be_named_with_the_call():
    with pytest.raises(CutError, match=rf"calls it 4 times .*'{LAYER}#1' to '{LAYER}#4'"):
        recycle(albert(), texts(2), cut=LAYER, store="memory://")
    with pytest.raises(CutError, match="4 times in one forward"):
        recycle(albert(), texts(2), cut=f"{LAYER}#5", store="memory://")


class Frozen(nn.Module):
    """A table of positions that all layers read, and nobody trains."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6), requires_grad=trained)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x + self.position)
        return x


def test_a_parameter_that_nobody_trains_may_be_read_by_both_halves():
    x = torch.randn(4, 6)
    with pytest.raises(CutError, match="share 'position'"):
        recycle(Frozen(trained=True), x, cut="layers.1", store="memory://")
    model = Frozen(trained=False)
    with recycle(model, x, cut="layers.1", store="memory://") as first:
        assert "position" in first.bypass.prefix_parameters
    trained = Frozen(trained=True)
    with recycle(trained, x, cut="layers.1", store="memory://", share="freeze"):  # frozen by us alone
        with pytest.raises(CutError, match="share 'position'"):
            recycle(trained, x, cut="layers.0", store="memory://")
    assert trained.position.requires_grad


class Again(nn.Module):
    """Two layers that are called three times over, as one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.twice(x)
        return self.last(x)


def test_a_cut_inside_the_second_of_three_calls_of_one_module():
    torch.manual_seed(0)
    model = Again().eval()
    x = torch.randn(4, 6)
    want = model(x)
    with recycle(model, x, cut="twice.1#2", store="memory://", share="freeze") as recycling:
        (batch,) = recycling.loader(list(x), batch_size=4)
        assert torch.equal(model(batch), want)
        assert torch.equal(model(x), want)
        assert recycling.stats.hits == 4


class Appending(nn.Module):
    """Appends to the list that its first layer gave, and changes the dict of its second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Listing(), Naming(), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.first(x)
        named = self.second(parts[0])
        parts.append(named["y"])
        named["y"] = self.third(named["y"] + parts[-1])
        parts.append(named["y"])
        return torch.stack(parts)


class Listing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # pyright: ignore
        return [super().forward(x)]


class Naming(Listing):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # pyright: ignore
        return {"y": super().forward(x)[0]}


def test_a_model_that_changes_the_containers_which_its_layers_gave():
    torch.manual_seed(0)
    model = Appending().eval()
    x = torch.randn(4, 6)
    want = model(x)
    with recycle(model, x, cut="second", store="memory://") as recycling:
        (batch,) = recycling.loader(list(x), batch_size=4)
        for _ in range(3):
            assert torch.equal(model(batch), want)
        assert recycling.stats.hits == 12


@pytest.mark.parametrize("cut", ["text_model", "vision_model", "text_model.encoder.layers.1"])
def test_one_tower_alone_whose_output_the_model_changes_afterwards(cut):
    model = clip()
    batch = _captioned(4)
    with torch.no_grad():
        want = model(**batch)
    with recycle(model, _captioned(2), cut=cut, store="memory://") as recycling:
        (hit,) = recycling.loader(_items(batch), batch_size=4)
        with torch.no_grad():
            got = model(**hit)
        assert recycling.stats.hits == 4
    assert torch.equal(got.logits_per_image, want.logits_per_image)


class Branches(nn.Module):
    """Writes into the list that it is given, as HRNet's stages do, and gives a size, as MViT's embedding does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Size]:
        parts[0] = self.one(parts[0])
        parts[1] = self.two(parts[1])
        return [parts[0] + parts[1], parts[0] - parts[1]], parts[0].shape[1:]


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages, self.last = nn.ModuleList(Branches() for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x, x * 2]
        for stage in self.stages:
            parts, size = stage(parts)
        return self.last(parts[0] + parts[1]) * size[0]


def test_layers_that_write_into_the_list_that_they_are_given_and_give_a_size():
    torch.manual_seed(0)
    model = Branched().eval()
    x = torch.randn(4, 6)
    want = model(x)
    with recycle(model, x[:2], cut="stages.1", store="memory://") as recycling:
        (batch,) = recycling.loader(list(x), batch_size=4)
        for given in (batch, x, batch):
            assert torch.equal(model(given), want)
        assert recycling.stats.hits == 8


# -- moving the cut ----------------------------------------------------------------------------------------------------


def _step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()


def test_the_cut_moves_during_a_training_and_the_optimiser_keeps_the_state_of_what_still_trains():
    torch.manual_seed(0)
    model = resnet()
    data = list(images(4))
    by_hand = copy.deepcopy(model)
    mine, theirs = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, by_hand))
    recycling = recycle(model, images(2), cut="layer1", store="memory://")
    loader = recycling.loader(data, batch_size=4)
    for cut, frozen in (("layer1", 1), ("layer3", 3), ("layer2", 2)):
        assert recycling.cut == cut or recycling.recut(cut).cut == cut
        (batch,) = loader
        parts = [by_hand.conv1, by_hand.bn1, *(getattr(by_hand, f"layer{i}") for i in range(1, frozen + 1))]
        by_hand.train().requires_grad_(True)
        for part in parts:
            part.eval().requires_grad_(False)
        for parameter in by_hand.parameters():
            parameter.grad = None
        for _ in range(2):
            _step(model.train(), batch, mine)
            _step(by_hand, torch.stack(data), theirs)
        for name, parameter in by_hand.named_parameters():
            other = model.get_parameter(name)
            assert torch.allclose(parameter, other, atol=1e-5), (cut, name)
            assert len(theirs.state[parameter]) == len(mine.state[other]), name
    assert recycling.stats.hits == 24
    recycling.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_cut_that_cannot_be_moved_there_stays_where_it_is():
    model = resnet().eval()
    recycling = recycle(model, images(2), cut="layer2", store="memory://")
    fingerprint = recycling.fingerprint
    with pytest.raises(CutError, match="no module of that name"):
        recycling.recut("layer9")
    with pytest.raises(CutError, match="give either"):
        recycling.recut()
    assert (recycling.cut, recycling.fingerprint) == ("layer2", fingerprint)
    (batch,) = recycling.loader(list(images(4)), batch_size=4)
    with torch.no_grad():
        got = model(batch)
    recycling.detach()
    with torch.no_grad():
        assert torch.equal(model(images(4)), got)
    with pytest.raises(CutError, match="detached"):
        recycling.recut("layer1")


def test_a_batch_of_the_old_cut_is_refused_after_the_cut_has_moved():
    model = resnet()
    with recycle(model, images(2), cut="layer2", store="memory://") as recycling:
        (batch,) = recycling.loader(list(images(4)), batch_size=4)
        recycling.recut(level=0.75)
        assert recycling.cut == "layer3"
        with pytest.raises(Exception, match="Make a new iterator"):
            model(batch)


# -- hooks on what is skipped ------------------------------------------------------------------------------------------


def test_a_hook_on_a_skipped_module_is_warned_of_once():
    model = bert()
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.warns(RecycleWarning, match=r"a hook on 'bert\.encoder\.layer\.0' does not fire") as said:  # noqa: PT031
        recycling = recycle(model, texts(2), cut="bert.encoder.layer.1", store="memory://")
        model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: None)
        for _ in range(2):
            for batch in recycling.loader(_items(texts(4)), batch_size=4):
                model(**batch)
    assert len(said) == 1
    recycling.detach()


def test_a_hook_after_the_cut_fires_and_nothing_is_said():
    model = bert()
    seen: list[int] = []
    model.bert.encoder.layer[2].register_forward_hook(lambda *_: seen.append(1))
    with recycle(model, texts(2), cut="bert.encoder.layer.1", store="memory://") as recycling:
        (batch,) = recycling.loader(_items(texts(4)), batch_size=4)
        model(**batch)
        seen.clear()
        model(**batch)
    assert seen == [1]
