"""A model of texts, trained and saved by torchrecycle. This file loads it, and needs torchrecycle no more.

In a shell:

    python load.py "a text"               its classes with their probabilities, or the first numbers of its embedding
    python load.py "a text" "another"     of a model that gives embeddings: how alike the two are, from -1 to 1

In Python, in this folder:

    from load import classify, embed, load
    model = load()
    classify(model, ["a text"])           # [{"sport": 0.93, "politics": 0.07}]
    embed(model, ["a text"])              # a tensor [1, dim] of length one

``config.json`` says what the model is and how it was trained; ``model.safetensors`` holds its weights, ``trunk`` the
tokenizer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer

HERE = Path(__file__).parent
FORMAT = 1
"""Of config.json, as this file reads it."""
BATCH = 32
"""Texts that the model sees at once."""


# -- the model ---------------------------------------------------------------------------------------------------------


class ResidualHead(nn.Module):
    """``x + linear(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class ResidualMlpHead(nn.Module):
    """``x + mlp(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = make_head("mlp", dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def make_head(kind: str, dim: int, out: int) -> nn.Module:
    """From features ``[batch, dim]`` to ``[batch, out]``; its weights are random."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))
    heads = {"residual": ResidualHead, "residual mlp": ResidualMlpHead}
    return heads[kind](dim) if kind in heads else nn.Linear(dim, out)


class Encoder(nn.Module):
    """Token ids ``[batch, tokens]`` to class scores ``[batch, classes]``, or to embeddings of length one."""

    def __init__(self, trunk: nn.Module, head: nn.Module, config: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.config = config
        self.tokenizer = tokenizer

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head reads: ``[batch, dim]``."""
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config["pooling"] == "first token":
            return hidden[:, 0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.head(self.features(input_ids, attention_mask))
        return F.normalize(out, dim=-1) if self.config["unit"] else out


def load(folder: Path = HERE) -> Encoder:
    """The trained model, in eval mode, on the processor.

    Args:
        folder: where config.json, model.safetensors and trunk are.
    """
    config = read_config(Path(folder))
    dim, classes, inside = config["features"], config["classes"], Path(folder) / "trunk"
    head = make_head(config["head"], dim, dim if classes is None else len(classes))
    trunk = AutoModel.from_config(AutoConfig.from_pretrained(inside, local_files_only=True))
    tokenizer = AutoTokenizer.from_pretrained(inside, local_files_only=True)
    model = Encoder(trunk, head, config, tokenizer)
    load_model(model, str(Path(folder) / "model.safetensors"))
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so the model was not saved to its end: save it again")
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["format"] != FORMAT:
        raise ValueError(f"{file} is of format {config['format']}, and this load.py reads {FORMAT}: save both again")
    return config


# -- texts -------------------------------------------------------------------------------------------------------------


def to_tokens(model: Encoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """What the model takes: ids and a 0/1 mask ``[batch, tokens]``, padded behind, on its device."""
    listed = model.tokenizer(list(texts), truncation=True, max_length=model.config["tokens"])["input_ids"]
    ids = [torch.tensor(each) for each in listed]
    padded = pad_sequence(ids, batch_first=True, padding_value=model.config["padding"])
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    device = next(model.parameters()).device
    return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


# -- answers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: Encoder, texts: Sequence[str]) -> Tensor:
    """Embeddings of length one, ``[texts, dim]``: the dot product of two says how alike they are.

    Of a model that tells classes, they are the features that its head reads.

    Args:
        model: what `load` gives.
        texts: of any length; what is longer than the model was trained on is cut off.
    """
    read = model if model.config["unit"] else lambda **inputs: F.normalize(model.features(**inputs), dim=-1)
    return torch.cat([read(**to_tokens(model, texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)])


@torch.no_grad()
def classify(model: Encoder, texts: Sequence[str]) -> list[dict[str, float]]:
    """Of each text the probability of each class, the likeliest first.

    Args:
        model: what `load` gives.
        texts: of any length; what is longer than the model was trained on is cut off.
    """
    if model.config["what"] != "classify":
        raise ValueError("this model gives embeddings and tells no classes: use embed(model, texts)")
    found = []
    for i in range(0, len(texts), BATCH):
        for row in model(**to_tokens(model, texts[i : i + BATCH])).softmax(1):
            order = row.argsort(descending=True, stable=True).tolist()
            found.append({model.config["classes"][n]: float(row[n]) for n in order})
    return found


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.exit('Usage: python load.py "a text" ["another" ...]')
    model = load()
    if model.config["what"] == "classify":
        for text, classes in zip(arguments, classify(model, arguments), strict=True):
            print(text)
            for label, probability in list(classes.items())[:5]:
                print(f"  {probability:6.1%}  {label}")
        return
    first, *others = embed(model, arguments)
    for text, other in zip(arguments[1:], others, strict=True):
        print(f"cosine similarity of '{arguments[0]}' and '{text}': {float(first @ other):.4f}")
    if not others:
        print(f"{arguments[0]}: {len(first)} numbers, the first: " + " ".join(f"{n:.4f}" for n in first[:8].tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
