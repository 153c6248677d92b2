"""Pretrained trunks by name: a model without its classifier, and what it was trained to see.

``timm/tf_efficientnet_lite0`` with a file of its ImageNet weights gives the model from pictures to 1,280 features, and
how pictures are resized, cropped and normalised for it. A folder of a transformers model gives its trunk and its
tokenizer or what its image processor says. Weights are random where none are given: that is said loudly, since a level
chosen with random weights says nothing about a pretrained model. Nothing is downloaded unless it is asked for
(`pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from torchrecycle.models import ModelError, load_model, published_weights
from torchrecycle.sweep.datasets import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from torchrecycle.sweep.encoders import FirstToken, MeanPool, PooledOutput

__all__ = ["Trunk", "load_trunk"]


@dataclass(frozen=True, slots=True)
class Trunk:
    """A pretrained model without its classifier."""

    name: str
    """As it was asked for; of a folder its last part, so that where it lies makes it no other model."""
    module: nn.Module = field(repr=False)
    """In eval mode. Of images it gives features, of texts a ``last_hidden_state``."""
    pool: nn.Module = field(repr=False)
    """What makes one vector of that."""
    dim: int
    """How long the vector is."""
    weights: str
    """Where the weights came from, in words."""
    random: bool
    """Whether they are random because none were given."""
    preprocessing: Preprocessing | None = None
    """Of pictures; None for texts."""
    tokenizer: Any = field(default=None, repr=False)
    """Of texts; None for pictures."""
    folder: Path | None = None
    """Where the config of a transformers model lies."""


def load_trunk(
    name: str,
    kind: str,
    *,
    checkpoint: Path | None = None,
    size: int | None = None,
    pretrained: bool = False,
    crop: bool = False,
) -> Trunk:
    """Make a trunk by name.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, or a folder of a transformers model.
        kind: ``images`` or ``texts``.
        checkpoint: a file of weights for exactly this model; those of its classifier do not matter.
        size: height and width of pictures, in pixels; what the model was made for if None.
        pretrained: let timm or torchvision take the weights that they publish, which may download them.
        crop: cut the middle out of a picture, as the model's own recipe says; else the whole is squeezed into a square,
            so that nothing at its border is lost.

    Raises:
        ModelError: there is no such model, it is not for objects of this kind, its library is not installed, or it does
            not take the weights or the size.
    """
    library = name.partition("/")[0] if not Path(name).is_dir() else "transformers"
    if kind == "texts" and library in ("timm", "torchvision"):
        raise ModelError(f"{name} is a model of images: for texts, give a folder with a transformers model")
    loaded = load_model(name, checkpoint=checkpoint, size=size, pretrained=pretrained, headless=True)
    module = loaded.model.eval()
    trunk = Trunk(
        name=_name_of(Path(name)) if library == "transformers" else name,
        module=module,
        pool=PooledOutput(),
        dim=0,
        weights="random, since none were given" if loaded.random else loaded.weights,
        random=loaded.random,
        folder=Path(name) if library == "transformers" else None,
    )
    if kind == "texts":
        trunk = _with_texts(trunk, loaded.example)
    else:
        trunk = _with_images(trunk, library, loaded.example)
        assert trunk.preprocessing is not None
        trunk = trunk if crop else replace(trunk, preprocessing=replace(trunk.preprocessing, crop=None))
    return replace(trunk, dim=_width(trunk, loaded.example))


def _name_of(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "model" else folder.name


def _width(trunk: Trunk, example: Any) -> int:
    with torch.no_grad():
        if trunk.tokenizer is not None:
            hidden = trunk.module(**example).last_hidden_state
            return trunk.pool(hidden, example["attention_mask"]).shape[-1]
        pooled = trunk.pool(trunk.module(_image_of(example)))
    if pooled.dim() != 2:
        raise ModelError(f"{trunk.name} gives {list(pooled.shape)} for two images, of which no vector can be made")
    return pooled.shape[-1]


# -- texts -------------------------------------------------------------------------------------------------------------


def _with_texts(trunk: Trunk, example: Any) -> Trunk:
    if not isinstance(example, Mapping) or set(example) != {"input_ids", "attention_mask"}:
        taken = ", ".join(example) if isinstance(example, Mapping) else "a tensor"
        raise ModelError(
            f"{trunk.name} is a {type(trunk.module).__name__}, which takes {taken}: for texts, give an encoder "
            "of texts "
            "that takes input_ids and attention_mask"
        )
    if not hasattr(trunk.module(**example), "last_hidden_state"):
        raise ModelError(f"{trunk.name} is a {type(trunk.module).__name__}, which gives no last_hidden_state to pool")
    assert trunk.folder is not None
    return replace(trunk, tokenizer=_tokenizer(trunk.folder), pool=_text_pool(trunk.folder))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the folder {folder} has no tokenizer that can be read ({type(error).__name__}): save it there with "
            "tokenizer.save_pretrained(folder)"
        ) from error
    # Of a folder without such files, transformers makes one that knows no word, and says nothing.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"the folder {folder} has no tokenizer (tokenizer.json, vocab.txt or the like), so that all texts would "
            "look alike: save it there with tokenizer.save_pretrained(folder)"
        )
    if tokenizer.pad_token_id is None:  # decoders: what stands at padded places is masked
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return tokenizer


_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
"""Of sentence-transformers. The last two are left out, since a sweep has a head there, and norms of its own."""
_OLD_KEY = "pooling_mode_"


def _text_pool(folder: Path) -> nn.Module:
    """As sentence-transformers says in the folder; the mean where it says nothing.

    Raises:
        ModelError: it says something that is not known here, and that must not be replaced unseen.
    """
    modules = _read_json(folder / "modules.json", [])
    kinds = {
        str(module.get("type")).rpartition(".")[2]: str(module.get("path"))
        for module in modules
        if isinstance(module, dict)
    }
    others = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if others:
        raise ModelError(
            f"the folder {folder} asks for {' and '.join(others)} after the model (modules.json), of which only "
            "pooling is known here: give a folder of a model without"
        )
    asked = _pooling(_read_json(folder / kinds.get("Pooling", "1_Pooling") / "config.json", {}))
    if asked in ([], ["mean"]):
        return MeanPool()
    if asked == ["cls"]:
        return FirstToken()
    raise ModelError(
        f"the folder {folder} asks for pooling by {' and '.join(asked)}, and only the mean (mean) and the first token "
        "(cls) are known here: give a folder of a model that was trained with one of these"
    )


def _pooling(said: Mapping[str, Any]) -> list[str]:
    """The names of what is asked for: of one key in newer versions, of a switch for each in older ones."""
    if "pooling_mode" in said:
        mode = said["pooling_mode"]
        return [mode] if isinstance(mode, str) else [str(each) for each in mode or ()]
    switched = [key for key, on in said.items() if key.startswith(_OLD_KEY) and on]
    return [key.removeprefix(_OLD_KEY).removesuffix("_tokens").removesuffix("_token") for key in switched]


_Json = TypeVar("_Json", dict[str, Any], list[dict[str, Any]])


def _read_json(path: Path, otherwise: _Json) -> _Json:
    """What is in the file, which must be of the kind of what is taken if there is none."""
    if not path.is_file():
        return otherwise
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    if not isinstance(said, type(otherwise)):
        kind = "an object" if isinstance(otherwise, dict) else "a list"
        raise ModelError(f"{path} holds {type(said).__name__}, and {kind} was expected")
    return said


# -- images ------------------------------------------------------------------------------------------------------------


def _image_of(example: Any) -> torch.Tensor:
    return next(iter(example.values())) if isinstance(example, Mapping) else example


def _with_images(trunk: Trunk, library: str, example: Any) -> Trunk:
    if isinstance(example, Mapping) and set(example) != {"pixel_values"}:
        raise ModelError(
            f"{trunk.name} is a {type(trunk.module).__name__}, which takes {', '.join(example)}: for pictures, give a "
            "model of images, or use the command for texts"
        )
    image = _image_of(example)
    if not isinstance(image, torch.Tensor) or image.dim() != 4 or image.shape[1] != 3:
        shape = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ModelError(f"{trunk.name} takes {shape} for two objects, and pictures are [2, 3, height, width]")
    if image.shape[2] != image.shape[3]:
        raise ModelError(
            f"{trunk.name} takes pictures of {image.shape[2]} times {image.shape[3]} pixels; only squares are "
            "known here"
        )
    if library == "torchvision" and not isinstance(trunk.module(image), torch.Tensor):
        raise ModelError(f"{trunk.name} is no model of one vector for each picture: give one for classification")
    return replace(trunk, preprocessing=_preprocessing(trunk, library, image.shape[-1]))


def _preprocessing(trunk: Trunk, library: str, size: int) -> Preprocessing:
    if library == "timm":
        config: Any = getattr(trunk.module, "pretrained_cfg", {})
        found = {name: config.get(name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
        squeezed = found["crop_mode"] == "squash" and found["crop_pct"] == 1.0
        return Preprocessing(
            size=size,
            mean=tuple(found["mean"] or IMAGENET_MEAN),
            std=tuple(found["std"] or IMAGENET_STD),
            interpolation=found["interpolation"] or "bicubic",
            crop=None if squeezed else found["crop_pct"] or 0.875,
        )
    if library == "torchvision":
        said = getattr(published_weights(trunk.name.partition("/")[2]), "transforms", None)
        options = getattr(said, "keywords", {})
        resize, crop = (_side(options.get(name, 0)) for name in ("resize_size", "crop_size"))
        mode = options.get("interpolation")
        return Preprocessing(
            size=size,
            mean=tuple(options.get("mean", IMAGENET_MEAN)),
            std=tuple(options.get("std", IMAGENET_STD)),
            interpolation=mode.value if mode is not None else "bilinear",
            crop=min(1.0, crop / (resize or 256)) if crop else 0.875,
        )
    assert trunk.folder is not None
    return _of_processor(_read_json(trunk.folder / "preprocessor_config.json", {}), size)


def _side(size: Any) -> int:
    """Of a number, of a list, or of what an image processor says, the shorter side; 0 if it says nothing."""
    if isinstance(size, Mapping):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    return int(size if isinstance(size, (int, float)) else min(size, default=0))


_PIL_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _of_processor(said: Mapping[str, Any], size: int) -> Preprocessing:
    """What a transformers image processor does; ImageNet's usual numbers where it says nothing."""
    normalised = said.get("do_normalize", True)
    return Preprocessing(
        size=size,
        mean=tuple(said.get("image_mean") or IMAGENET_MEAN) if normalised else (0.0, 0.0, 0.0),
        std=tuple(said.get("image_std") or IMAGENET_STD) if normalised else (1.0, 1.0, 1.0),
        interpolation=_PIL_MODES.get(said.get("resample", 3), "bicubic"),
        crop=_crop(said),
    )


def _crop(said: Mapping[str, Any]) -> float | None:
    """ConvNeXT's says a share, CLIP's cuts 224 pixels out of 224 and DeiT's out of 256, ViT's squeezes the picture."""
    size = said.get("size")
    if said.get("crop_pct"):
        return float(said["crop_pct"])
    if said.get("do_center_crop"):
        resized, cut = _side(size or 0), _side(said.get("crop_size") or 0)
        return min(1.0, cut / resized) if resized and cut else 0.875
    return None if isinstance(size, int) or (isinstance(size, Mapping) and "height" in size) else 1.0
