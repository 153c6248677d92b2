"""Real models, small enough that a test takes milliseconds, each with a cut and its prefix as found by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import BasicBlock
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

WORDS = 60

torch.set_num_threads(1)  # models this small run faster so, and add in one order


def images(count: int = 8, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def texts(count: int = 8, tokens: int = 9, side: str = "right") -> dict[str, torch.Tensor]:
    """Token ids without 0, and a mask with padding on one side in all but the first text."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(1, WORDS, (count, tokens), generator=generator)
    lengths = torch.tensor([tokens - (i * 3) % (tokens - 3) for i in range(count)])
    place = torch.arange(tokens)[None, :]
    mask = place < lengths[:, None] if side == "right" else place >= tokens - lengths[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def sounds(count: int = 8, samples: int = 400) -> torch.Tensor:
    return torch.randn(count, samples, generator=torch.Generator().manual_seed(count))


def resnet() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def efficientnet() -> nn.Module:
    return timm.create_model("tf_efficientnet_lite0", num_classes=5)


def vit(depth: int = 4) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5, drop_rate=0.1
    )


def bert(layers: int = 4, **config: Any) -> BertForSequenceClassification:
    sizes = dict(vocab_size=WORDS, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=layers, num_labels=5, **config))


def llama_config(**config: Any) -> LlamaConfig:
    sizes = dict(vocab_size=WORDS, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
    return LlamaConfig(**{**sizes, "num_hidden_layers": 4, "pad_token_id": 0, "use_cache": False, **config})


def llama(**config: Any) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama_config(num_labels=5, **config))


def gpt2_config(**config: Any) -> GPT2Config:
    sizes = dict(vocab_size=WORDS, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    return GPT2Config(**{**sizes, "pad_token_id": 0, "use_cache": False, **config})


def gpt2() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(gpt2_config(num_labels=5))


def wav2vec2_config(**config: Any) -> Wav2Vec2Config:
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    ears = dict(conv_dim=(16, 16), conv_kernel=(5, 3), conv_stride=(3, 2), num_feat_extract_layers=2)
    places = dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, classifier_proj_size=16)
    return Wav2Vec2Config(**{**sizes, **ears, **places, "mask_time_prob": 0.0, "layerdrop": 0.0, **config})


def wav2vec2(**config: Any) -> Wav2Vec2ForSequenceClassification:
    return Wav2Vec2ForSequenceClassification(wav2vec2_config(num_labels=5, **config))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 5),
    )


@dataclass(frozen=True)
class Sample:
    """One model, where to cut it, and its prefix as a person would write it down."""

    name: str
    make: Callable[[], nn.Module]
    batch: Any
    cut: str
    prefix: Sequence[str]
    """The modules before the cut."""
    loose: Sequence[str] = ()
    """Parameters of the prefix that belong to none of them."""
    leaf: str = ""
    """A module deep in the prefix, whose calls are counted."""

    def model(self) -> nn.Module:
        torch.manual_seed(7)
        return self.make()

    def call(self, model: nn.Module, batch: Any = None) -> torch.Tensor:
        """The logits."""
        batch = self.batch if batch is None else batch
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        return output if isinstance(output, torch.Tensor) else output.logits

    def freeze_by_hand(self, model: nn.Module) -> None:
        """What recycling must equal: no gradient and eval mode for the prefix, written without torchrecycle."""
        for name in self.prefix:
            model.get_submodule(name).requires_grad_(False).eval()
        for name in self.loose:
            model.get_parameter(name).requires_grad_(False)


SAMPLES = [
    Sample(
        "resnet",
        resnet,
        images(),
        "layer2",
        ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"],
        leaf="layer1.0.conv1",
    ),
    Sample(
        "efficientnet",
        efficientnet,
        images(),
        "blocks.2",
        ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"],
        leaf="blocks.0.0.bn1",
    ),
    Sample(
        "vit",
        vit,
        images(),
        "blocks.1",
        ["patch_embed", "blocks.0", "blocks.1"],
        ["cls_token", "pos_embed"],
        "blocks.0.attn.qkv",
    ),
    Sample(
        "bert",
        bert,
        texts(),
        "bert.encoder.layer.1",
        ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"],
        leaf="bert.encoder.layer.0.output.dense",
    ),
    Sample(
        "llama",
        llama,
        texts(),
        "model.layers.1",
        ["model.embed_tokens", "model.layers.0", "model.layers.1"],
        leaf="model.layers.0.mlp.up_proj",
    ),
    Sample(
        "gpt2",
        gpt2,
        texts(),
        "transformer.h.1",
        ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h.0", "transformer.h.1"],
        leaf="transformer.h.0.attn.c_attn",
    ),
    Sample(
        "wav2vec2",
        wav2vec2,
        sounds(),
        "wav2vec2.encoder.layers.1",
        [
            "wav2vec2.feature_extractor",
            "wav2vec2.feature_projection",
            "wav2vec2.encoder.pos_conv_embed",
            "wav2vec2.encoder.layer_norm",
            "wav2vec2.encoder.dropout",
            "wav2vec2.encoder.layers.0",
            "wav2vec2.encoder.layers.1",
        ],
        leaf="wav2vec2.encoder.layers.0.attention.q_proj",
    ),
    Sample(
        "sequential",
        sequential,
        torch.randn(8, 6, generator=torch.Generator().manual_seed(3)),
        "2",
        ["0", "1", "2"],
        leaf="0",
    ),
]


def sample(name: str) -> Sample:
    return next(one for one in SAMPLES if one.name == name)


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything about a model that attaching could disturb, comparable."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: id(part) for key, part in value.items()}
        if isinstance(value, (list, set)):
            return [id(part) for part in value]
        return id(value)

    modules = [
        (
            name,
            type(part),
            part.training,
            {attribute: content(value) for attribute, value in part.__dict__.items()},
        )
        for name, part in model.named_modules()
    ]
    parameters = [(name, p.requires_grad, p._version) for name, p in model.named_parameters()]
    buffers = [(name, b.clone().tolist()) for name, b in model.named_buffers()]
    return [*modules, *parameters, *buffers]
