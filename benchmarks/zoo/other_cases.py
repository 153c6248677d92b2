"""A SentenceTransformer as a whole, and diffusion models: a UNet with and without text, a DiT, an autoencoder.

The sentence encoder is a small BERT with a tokenizer of its own, written to a temporary folder, since
sentence-transformers only loads from folders; its forward takes one dict and hands it on from module to module.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Built, Case
from torchvision_cases import images

WORDS = 60


def cases() -> Iterator[Case]:
    """All of them."""
    yield Case("sentence-transformers", "mean pooling", partial(_sentences, "mean"), "text encoder")
    yield Case("sentence-transformers", "first token, dense, normalised", partial(_sentences, "cls"), "text encoder")
    yield Case("diffusers", "UNet2DModel", _unet, "UNet")
    yield Case("diffusers", "UNet2DConditionModel", _unet_with_text, "UNet")
    yield Case("diffusers", "DiTTransformer2DModel", _dit, "DiT")
    yield Case("diffusers", "AutoencoderKL", partial(_autoencoder, whole=True), "autoencoder")
    yield Case("diffusers", "AutoencoderKL, encoder", partial(_autoencoder, whole=False), "autoencoder")


# -- sentence-transformers ---------------------------------------------------------------------------------------------


def _sentences(pooling: str) -> Built:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS + 5,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
        Path(folder, "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        BertTokenizer(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        encoder = Transformer(folder)
    heads = [Dense(32, 16), Normalize()] if pooling == "cls" else []
    model = SentenceTransformer(modules=[encoder, Pooling(32, pooling), *heads], device="cpu")
    return Built(
        model,
        _texts,
        tokens=12,
        padded=("input_ids", "attention_mask"),
        mask_input="input.attention_mask",  # the entry of the dict that is the first argument
        inputs=lambda batch: ((dict(batch),), {}),
    )


def _texts(objects: int, *, tokens: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(5, WORDS, (objects, tokens or 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- diffusers ---------------------------------------------------------------------------------------------------------


def _noisy(objects: int, *, tokens: int | None = None, seed: int = 0, name: str, shape: Any, **more: Any) -> Any:
    """Noisy images, the step of each, and what else the model is told."""
    generator = torch.Generator().manual_seed(200 + seed)
    batch = {name: images(objects, seed=seed, shape=shape)}
    batch["timestep"] = torch.randint(0, 1000, (objects,), generator=generator)
    if "classes" in more:
        batch["class_labels"] = torch.randint(0, more["classes"], (objects,), generator=generator)
    if "text" in more:
        batch["encoder_hidden_states"] = torch.randn(objects, *more["text"], generator=generator)
    return batch


def _unet() -> Built:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    return Built(model, partial(_noisy, name="sample", shape=(3, 16, 16)))


def _unet_with_text() -> Built:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    return Built(model, partial(_noisy, name="sample", shape=(4, 16, 16), text=(6, 24)))


def _dit() -> Built:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=6, sample_size=8, num_embeds_ada_norm=10
    )
    return Built(model, partial(_noisy, name="hidden_states", shape=(4, 8, 8), classes=10))


def _autoencoder(*, whole: bool) -> Built:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
    )
    return Built(model if whole else model.encoder, partial(images, shape=(3, 32, 32)))
