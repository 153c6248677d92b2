"""A model of pictures, trained and saved by torchrecycle. This file loads it, and needs torchrecycle no more.

In a shell:

    python load.py photo.jpg              its classes with their probabilities, or the first numbers of its embedding
    python load.py photo.jpg other.jpg    of a model that gives embeddings: how alike the two are, from -1 to 1

In Python, in this folder:

    from load import classify, embed, load
    model = load()
    classify(model, ["photo.jpg"])        # [{"cat": 0.93, "dog": 0.07}]
    embed(model, ["photo.jpg"])           # a tensor [1, dim] of length one

``config.json`` says what the model is and how it was trained; ``model.safetensors`` holds its weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_model
from torch import Tensor, nn
from torchvision import transforms

HERE = Path(__file__).parent
FORMAT = 1
"""Of config.json, as this file reads it."""
BATCH = 32
"""Pictures that the model sees at once."""

Picture = Image.Image | str | Path


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
    """Pictures ``[batch, 3, size, size]`` to class scores ``[batch, classes]``, or to embeddings of length one."""

    def __init__(self, trunk: nn.Module, head: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.config = config
        self.transform = make_transform(config["preprocessing"])

    def features(self, pixels: Tensor) -> Tensor:
        """What the head reads: ``[batch, dim]``."""
        output = self.trunk(pixels)
        if not isinstance(output, Tensor):
            pooled = getattr(output, "pooler_output", None)
            output = output.last_hidden_state if pooled is None else pooled
        if output.dim() == 4:  # [batch, dim, height, width]
            return output.flatten(2).mean(2)
        return output.mean(1) if output.dim() == 3 else output  # [batch, tokens, dim]

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.head(self.features(pixels))
        return F.normalize(out, dim=-1) if self.config["unit"] else out


def load(folder: Path = HERE) -> Encoder:
    """The trained model, in eval mode, on the processor.

    Args:
        folder: where config.json and model.safetensors are.
    """
    config = read_config(Path(folder))
    dim, classes = config["features"], config["classes"]
    head = make_head(config["head"], dim, dim if classes is None else len(classes))
    model = Encoder(make_trunk(config, Path(folder)), head, config)
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


def make_trunk(config: dict[str, Any], folder: Path) -> nn.Module:
    """The model that was trained on, without its classifier; its weights are random."""
    if config["library"] == "timm":
        import timm

        model: Any = timm.create_model(config["model"], pretrained=False, **config["options"])
        model.reset_classifier(0)
        return model
    if config["library"] == "torchvision":
        from torchvision.models import get_model

        model = get_model(config["model"], weights=None, **config["options"])
        *_, classifier = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        model.set_submodule(classifier, nn.Identity())
        return model
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.from_pretrained(folder / "trunk", local_files_only=True))


# -- pictures ----------------------------------------------------------------------------------------------------------


def make_transform(said: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """From an RGB picture to ``[3, size, size]``, as in training."""
    size, crop = said["size"], said["crop"]
    resized = [size, size] if crop is None else int(size / crop)
    return transforms.Compose(
        [
            transforms.Resize(resized, interpolation=transforms.InterpolationMode(said["interpolation"])),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(said["mean"], said["std"]),
        ]
    )


def open_picture(picture: Picture) -> Image.Image:
    """The picture in RGB, turned as its Exif tag says, on white where it is transparent."""
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as image:
            image.load()
            return open_picture(image)
    image = upright(picture)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(to_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken Exif data say nothing about how to turn; the pixels are whole
        return image


def to_eight_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 or 32 bits, or in floats, on the scale of its format."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F" and values.max() <= 1.0:
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    full = 255.0 if image.mode == "F" and values.max() <= 255.0 else max(65535.0, float(values.max()))
    return (values.clip(0) * (255.0 / full)).round().astype(np.uint8)


def to_pixels(model: Encoder, pictures: Sequence[Picture]) -> Tensor:
    """What the model takes: ``[batch, 3, size, size]``, on its device."""
    pixels = torch.stack([model.transform(open_picture(picture)) for picture in pictures])
    return pixels.to(next(model.parameters()).device)


# -- answers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: Encoder, pictures: Sequence[Picture]) -> Tensor:
    """Embeddings of length one, ``[pictures, dim]``: the dot product of two says how alike they are.

    Of a model that tells classes, they are the features that its head reads.

    Args:
        model: what `load` gives.
        pictures: of PIL, or paths.
    """
    read = model if model.config["unit"] else lambda pixels: F.normalize(model.features(pixels), dim=-1)
    return torch.cat([read(to_pixels(model, pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)])


@torch.no_grad()
def classify(model: Encoder, pictures: Sequence[Picture]) -> list[dict[str, float]]:
    """Of each picture the probability of each class, the likeliest first.

    Args:
        model: what `load` gives.
        pictures: of PIL, or paths.
    """
    if model.config["what"] != "classify":
        raise ValueError("this model gives embeddings and tells no classes: use embed(model, pictures)")
    found = []
    for i in range(0, len(pictures), BATCH):
        for row in model(to_pixels(model, pictures[i : i + BATCH])).softmax(1):
            order = row.argsort(descending=True, stable=True).tolist()
            found.append({model.config["classes"][n]: float(row[n]) for n in order})
    return found


def main(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        sys.exit("Usage: python load.py PICTURE [PICTURE ...]")
    model = load()
    try:
        pictures = [open_picture(name) for name in arguments]
    except OSError as error:  # also what PIL raises where a file holds no picture
        sys.exit(f"load.py: {error}")
    if model.config["what"] == "classify":
        for name, classes in zip(arguments, classify(model, pictures), strict=True):
            print(name)
            for label, probability in list(classes.items())[:5]:
                print(f"  {probability:6.1%}  {label}")
        return
    first, *others = embed(model, pictures)
    for name, other in zip(arguments[1:], others, strict=True):
        print(f"cosine similarity of {arguments[0]} and {name}: {float(first @ other):.4f}")
    if not others:
        print(f"{arguments[0]}: {len(first)} numbers, the first: " + " ".join(f"{n:.4f}" for n in first[:8].tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
