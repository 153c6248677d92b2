"""A model and an example for it, by name: what the command line needs and a user's own code has.

``timm/resnet18`` gives the model with random weights and two random images of 224 px; a folder with a transformers
``config.json`` gives that model and two texts of 32 random ids, or images, or sounds, as its ``main_input_name`` says.
Where a model can be cut depends on no weight, so none are downloaded; that they are random is said. Every mistake is a
`ModelError` that names what came and what would do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrecycle.errors import RecycleError

__all__ = ["Loaded", "ModelError", "load_model", "published_weights", "quiet_libraries"]

RANDOM = "random, since none were given; for cuts they do not matter"


class ModelError(RecycleError, ValueError):
    """No model can be made of that name, file or size."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model by name, with an example that it runs on."""

    name: str
    """As it was asked for."""
    model: nn.Module = field(repr=False)
    example: Any = field(repr=False)
    """A tensor, a tuple of tensors or a dict of tensors."""
    weights: str
    """Where they come from, in words."""
    random: bool = False
    """Whether they are random because none were given."""

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of the example, by name."""
        if isinstance(self.example, torch.Tensor):
            return {"input": list(self.example.shape)}
        named = (
            self.example.items()
            if isinstance(self.example, dict)
            else ((f"input {number}", part) for number, part in enumerate(self.example, 1))
        )
        return {name: list(tensor.shape) for name, tensor in named}


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    size: int | None = None,
    batch: int = 2,
    tokens: int = 32,
    pretrained: bool = False,
    headless: bool = False,
) -> Loaded:
    """Make a model and an example that it runs on.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, or a folder with the ``config.json`` of a transformers model.
        checkpoint: a file of weights (``.safetensors``, or what `torch.save` made of a state dict) for exactly this
            model.
        size: height and width of images, in pixels; what the model was made for if None.
        batch: objects in the example.
        tokens: tokens of each text in the example.
        pretrained: let timm or torchvision take the weights that they publish, which may download them.
        headless: without the layer that tells the classes of the data set that the model was trained on; then a file of
            weights may hold another such layer, or none.

    Raises:
        ModelError: there is no such model, its library is not installed, or it does not take the weights or the size.
    """
    library, _, rest = name.partition("/")
    if pretrained and checkpoint is not None:
        raise ModelError("give either a file of weights or --pretrained, not both")
    published = pretrained and library in ("timm", "torchvision")
    weights = f"published by {library}" if published else RANDOM
    with quiet_libraries():
        if library == "timm" and rest:
            model, example = _from_timm(rest, size, batch, published)
        elif library == "torchvision" and rest:
            model, example = _from_torchvision(rest, size, batch, published)
        elif Path(name).is_dir():
            model, example, weights = _from_folder(Path(name), size, batch, tokens)
        else:
            raise ModelError(_no_such_library(name))
        if checkpoint is not None:
            _load_weights(name, model, checkpoint, _classifier(model, library) if headless else ())
            weights = f"from {checkpoint.name}"
        if headless:
            _take_head_off(model, library)
        _must_run(name, model, example, size)
    return Loaded(name, model, example, weights, weights == RANDOM)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings that libraries give while they are imported and a model is made."""
    noisy = logging.getLogger("torch.utils._pytree")  # torch about torchao, which transformers imports
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(before)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name:
            raise
        raise ModelError(f"{name} is not installed: pip install {name}") from error


def _no_such_library(name: str) -> str:
    library, slash, rest = name.partition("/")
    expected = "expected timm/NAME, torchvision/NAME, or a folder with the config.json of a transformers model"
    near = difflib.get_close_matches(library, ["timm", "torchvision"], n=1) if slash and rest else []
    if near:
        return f"'{library}' is no library of models: {expected}. Did you mean {near[0]}/{rest}?"
    return f"there is no folder '{name}': {expected}"


def _near(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f". Near: {', '.join(found)}" if found else ""


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _must_run(name: str, model: nn.Module, example: Any, size: int | None) -> None:
    """Libraries refuse a size in many ways, assertions among them.

    Raises:
        ModelError: the model does not run on its example.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example, dict):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:
        shapes = Loaded(name, model, example, "").shapes()
        asked = f" Leave --size {size} out, or take another." if size is not None else ""
        raise ModelError(f"{name} does not run on {_in_words(shapes)}: {_one_line(error)}.{asked}") from error
    finally:
        for module in training:
            module.training = True


def _in_words(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"


# -- timm --------------------------------------------------------------------------------------------------------------


def _from_timm(name: str, size: int | None, batch: int, published: bool) -> tuple[nn.Module, Any]:
    timm = _library("timm")
    if not timm.is_model(name):
        raise ModelError(f"timm has no model '{name}'{_near(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    usual = tuple(config.input_size) if config is not None else (3, 224, 224)
    # A model of one fixed size is made for the size that is asked for, where it can be.
    fixed = config is not None and config.fixed_input_size
    options = {"img_size": size} if size is not None and fixed and size != usual[1] else {}
    try:
        model = timm.create_model(name, pretrained=published, **options)
    except Exception as error:
        asked = f" for images of {size} px" if options else ""
        step = " Give a file with --checkpoint" if published else ""
        raise ModelError(f"timm/{name} cannot be made{asked}: {_one_line(error)}.{step}") from error
    return model, _normal(batch, usual[0], size or usual[1], size or usual[2])


# -- torchvision -------------------------------------------------------------------------------------------------------


def _from_torchvision(name: str, size: int | None, batch: int, published: bool) -> tuple[nn.Module, Any]:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise ModelError(f"torchvision has no model '{name}'{_near(name, models.list_models())}")
    builder = models.get_model_builder(name)
    kind = builder.__module__
    if ".detection" in kind:
        raise ModelError(
            f"torchvision/{name} is a detector: it takes a list of images, each of a size of its own, for which no "
            "example can be made by name. In Python, cut its backbone: cuts(model.backbone, images)"
        )
    if published:
        model = _with_published_weights(models, name)
    else:
        model = models.get_model(name, weights=None, **_without_downloads(builder))
    size = size or _usual_size(name)
    if ".optical_flow" in kind:
        return model, (_normal(batch, 3, size, size), _normal(batch, 3, size, size))
    frames = (16,) if ".video" in kind else ()
    return model, _normal(batch, 3, *frames, size, size)


def _with_published_weights(models: Any, name: str) -> nn.Module:
    try:
        return models.get_model(name, weights="DEFAULT")
    except Exception as error:
        raise ModelError(
            f"the published weights of torchvision/{name} cannot be had: {_one_line(error)}. Give a file with "
            "--checkpoint"
        ) from error


def published_weights(name: str) -> Any:
    """What torchvision says of the best weights that it publishes for a model; None if there are none."""
    models = _library("torchvision").models
    return getattr(models.get_model_weights(name), "DEFAULT", None)


def _without_downloads(builder: Callable[..., Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if builder.__name__ in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs takes ten seconds
    return options


def _usual_size(name: str) -> int:
    """What the published weights were made for; 224 where they say nothing of it."""
    default = published_weights(name)
    crop = getattr(default.transforms, "keywords", {}).get("crop_size", 224) if default is not None else 224
    return crop if isinstance(crop, int) else crop[0]


# -- transformers ------------------------------------------------------------------------------------------------------

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _from_folder(folder: Path, size: int | None, batch: int, tokens: int) -> tuple[nn.Module, Any, str]:
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"the folder {folder} has no config.json, so it is no transformers model; it holds {held}. "
            "Save one with model.save_pretrained(folder)"
        )
    transformers = _library("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if any((folder / name).is_file() for name in WEIGHTS):
            model, weights = transformers.AutoModel.from_pretrained(folder, local_files_only=True), "from the folder"
        else:
            model, weights = transformers.AutoModel.from_config(config), RANDOM
    except Exception as error:
        raise ModelError(f"transformers cannot make a model of {folder}: {_one_line(error)}.") from error
    if weights != RANDOM:
        _must_be_finite(f"the folder {folder}", model)
    # Some versions write it into what the config says of itself: where a model lies makes it no other one.
    model.config._name_or_path = ""
    # As in training: what a model remembers for generating is no part of what it learns from.
    model.config.use_cache = False
    return model, _example_for(model, size, batch, tokens), weights


def _example_for(model: Any, size: int | None, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    config, main = model.config, model.main_input_name
    taken = inspect.signature(model.forward).parameters
    names = [main] + [name for name in ("input_ids", "pixel_values") if name in taken and name != main]
    if "input_ids" in names and main != "input_ids" and not _part(config, "text_config"):
        names.remove("input_ids")
    if "pixel_values" in names and main != "pixel_values" and not _part(config, "vision_config"):
        names.remove("pixel_values")
    example: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in _MAKERS:
            raise ModelError(
                f"{type(model).__name__} takes '{name}', for which no example is known here. In Python: "
                "cuts(model, example)"
            )
        example.update(_MAKERS[name](config, size, batch, tokens))
    if "attention_mask" in example and "attention_mask" not in taken:
        del example["attention_mask"]
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        example["decoder_input_ids"] = _ids(config, batch, tokens)
    return example


def _part(config: Any, name: str) -> Any:
    """The config of one tower, or None."""
    return getattr(config, name, None)


def _ids(config: Any, batch: int, tokens: int) -> torch.Tensor:
    """Random ids inside of the vocabulary, none of which ends or pads a text."""
    text = config.get_text_config()
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    plain = torch.tensor([number for number in range(text.vocab_size) if number not in special])
    return plain[torch.randint(len(plain), (batch, tokens), generator=torch.Generator().manual_seed(0))]


def _texts(config: Any, size: int | None, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = _ids(config, batch, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(config: Any, size: int | None, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    vision = _part(config, "vision_config") or config
    usual = getattr(vision, "image_size", None) or 224
    height, width = (usual, usual) if isinstance(usual, int) else tuple(usual)[-2:]
    frames = getattr(vision, "num_frames", None)
    shape = (getattr(vision, "num_channels", 3), size or height, size or width)
    return {"pixel_values": _normal(batch, *([frames] if frames else []), *shape)}


def _sounds(config: Any, size: int | None, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """One second at 16 kHz; of a spectrogram, as many steps as the model takes."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and not hasattr(config, "conv_dim"):
        return {"input_values": _normal(batch, config.max_length, config.num_mel_bins)}
    return {"input_values": _normal(batch, 16_000)}


def _spectrograms(config: Any, size: int | None, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return {"input_features": _normal(batch, config.num_mel_bins, 2 * config.max_source_positions)}
    bins = getattr(config, "feature_projection_input_dim", None) or getattr(config, "num_mel_bins", 80)
    return {"input_features": _normal(batch, 100, bins)}


_MAKERS = {"input_ids": _texts, "pixel_values": _images, "input_values": _sounds, "input_features": _spectrograms}


# -- weights -----------------------------------------------------------------------------------------------------------


def _classifier(model: nn.Module, library: str) -> tuple[str, ...]:
    """The names of the layers that tell the classes of the data set that a model was trained on."""
    if library == "timm":
        said: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        return (said,) if isinstance(said, str) else tuple(said)
    if library == "torchvision":
        return tuple([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:])
    return ()


def _take_head_off(model: nn.Module, library: str) -> None:
    if library == "timm":
        model.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        return
    for name in _classifier(model, library):
        model.set_submodule(name, nn.Identity())


def _load_weights(name: str, model: nn.Module, file: Path, classifier: Sequence[str] = ()) -> None:
    """Put a file's weights into the model. Those of its classifier stay as they are if it is named.

    Raises:
        ModelError: the file cannot be read, is of another model, or holds NaN or infinity.
    """
    inside = tuple(f"{layer}." for layer in classifier)
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    state = {key: tensor for key, tensor in _read_weights(file).items() if not key.startswith(inside)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise ModelError(
            f"{file} is of another model than {name}: "
            f"{_first(missing, 'are missing in it')}; {_first(unexpected, 'are unexpected')}"
        )
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ModelError(
                f"{file} is of another model than {name}: '{key}' is {list(state[key].shape)} in it and "
                f"{list(tensor.shape)} in the model"
            )
    model.load_state_dict(state, strict=not classifier)  # what else might be missing has been named above
    _must_be_finite(str(file), model)


def _must_be_finite(where: str, model: nn.Module) -> None:
    """
    Raises:
        ModelError: a tensor holds NaN or infinity, so that all that comes out would.
    """
    weights = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        # Masks of attention are kept as such.
        if name not in weights and not (tensor.isnan() | (tensor == torch.inf)).any():
            continue
        what = "NaN" if tensor.isnan().any() else "infinity"
        raise ModelError(
            f"{where} holds {what} in '{name}', so that nothing could be learned from it: give weights of a training "
            "that went well"
        )


def _no_weights(file: Path, said: str) -> str:
    """In place of a page of PyTorch's about when a file may be trusted."""
    if "GLOBAL" in said:
        return (
            f"{file} holds more than weights, such as a whole model, which is not read since it could run any program: "
            "save the weights with torch.save(model.state_dict(), file)"
        )
    why = said.partition("WeightsUnpickler error:")[2].strip().partition("\n")[0].rstrip(".")
    because = f" ({why})" if why else ""
    return f"{file} cannot be read as a file of weights{because}: is it whole, and one that PyTorch wrote?"


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ModelError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(_no_weights(file, str(error))) from error
    except Exception as error:
        raise ModelError(f"{file} cannot be read as a file of weights: {_one_line(error)}") from error
    for inner in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(inner), dict):
            state = state[inner]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no state dict: save one with torch.save(model.state_dict(), file)")
    return {key.removeprefix("module."): value for key, value in state.items()}  # as saved from DataParallel


def _first(keys: Sequence[str], words: str) -> str:
    if not keys:
        return f"none {words}"
    more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
    return f"{', '.join(keys[:3])}{more} {words}"
