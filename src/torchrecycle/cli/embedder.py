"""A model by name or from a folder, as what makes embeddings of a user's pictures or texts.

``load_embedder("timm/resnet18", "images", ...)`` makes 512 numbers of each picture; a folder that ``sweep --save`` or
`SimilarityModel.save` wrote does as well. All embeddings are of length one, so that the dot product of two is their
cosine similarity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrecycle.cli.errors import OptionError
from torchrecycle.errors import RecycleError
from torchrecycle.files.objects import Kind
from torchrecycle.fingerprint import take_fingerprint
from torchrecycle.keys import key
from torchrecycle.models import ModelError, quiet_libraries

if TYPE_CHECKING:
    from torchrecycle.sweep import Trunk

__all__ = ["Embedder", "Wish", "load_embedder"]

TOKENS = 128
"""Of a text, at most, unless told."""
READERS = 8
"""So many pictures are decoded at once, if there are as many cores."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user says of a model."""

    model: str
    checkpoint: Path | None = None
    pretrained: bool = False
    size: int | None = None
    crop: bool = False
    tokens: int | None = None
    batch: int = 32
    device: str | None = None

    @property
    def chosen_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def details(self) -> dict[str, Any]:
        """The options that say what only a model by name can be told."""
        said = {
            "--checkpoint": self.checkpoint,
            "--pretrained": self.pretrained or None,
            "--size": self.size,
            "--crop": self.crop or None,
            "--tokens": self.tokens,
        }
        return {option: value for option, value in said.items() if value is not None}


@dataclass(frozen=True)
class Embedder:
    """Objects to embeddings."""

    name: str
    """Of the model, as it was asked for; of a folder its last part."""
    weights: str
    """Where they came from, in words."""
    random: bool
    """Whether they are random because none were given."""
    identity: str
    """What tells it from every other, preprocessing included, in hex."""
    batch: int
    """Objects that it sees at once."""
    read: Callable[[Any], Any] = field(repr=False)
    """From an object to what is collected in a batch; for pictures it runs in threads."""
    run: Callable[[list[Any]], Tensor] = field(repr=False)
    """From a batch of that to ``[batch, dim]``."""
    longest: int | None = None
    """Tokens of a text that are read; None where that is not known."""
    length: Callable[[str], int] | None = field(default=None, repr=False)
    """How many tokens a text has, up to one more than are read."""

    def encode(self, objects: Sequence[Any], batch_size: int = 0) -> np.ndarray:
        """Embeddings ``[objects, dim]`` of length one, on the processor. While a batch runs, the next is read."""
        parts = [objects[begin : begin + self.batch] for begin in range(0, len(objects), self.batch)]
        rows = [self.run(batch).float().cpu().numpy() for batch in _read_ahead(self.read, parts)]
        return np.concatenate(rows)

    def cut_off(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than what is read of them."""
        if self.length is None or self.longest is None:
            return 0
        return sum(self.length(text) > self.longest for text in texts)


def _read_ahead(read: Callable[[Any], Any], parts: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    pool = ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1))
    try:
        waiting = [pool.submit(read, obj) for obj in parts[0]]
        for following in [*parts[1:], []]:
            ready = [each.result() for each in waiting]
            waiting = [pool.submit(read, obj) for obj in following]
            yield ready
    finally:
        # Also on Ctrl-C, where the rest must not be waited for.
        pool.shutdown(wait=True, cancel_futures=True)


def load_embedder(wish: Wish, kind: Kind) -> Embedder:
    """
    Args:
        wish: which model.
        kind: of the objects that it is to take.

    Raises:
        ModelError: there is no such model, or it is not for objects of this kind.
        OptionError: an option says what a saved model says itself.
    """
    folder = Path(wish.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in each run, or an index would be of another model
        if folder.is_dir() and _is_similarity_model(folder):
            return _of_similarity_model(wish, folder, kind)
        if folder.is_dir() and _is_swept(folder):
            return _of_swept(wish, folder, kind)
        return _of_trunk(wish, kind)


def _refuse_details(wish: Wish, folder: Path) -> None:
    details = wish.details()
    if details:
        option = next(iter(details))
        raise OptionError(f"{option} is said by the saved model in {folder} itself: leave it out")


def _identity(module: nn.Module, *more: Any) -> str:
    return key((take_fingerprint({"model": module}, {}, [], {}).hex, more), where="the model").hex()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")


# -- a pretrained model ------------------------------------------------------------------------------------------------


def _of_trunk(wish: Wish, kind: Kind) -> Embedder:
    from torchrecycle.sweep import load_trunk
    from torchrecycle.sweep.encoders import ImageEncoder, TextEncoder

    options: dict[str, Any] = {"checkpoint": wish.checkpoint}
    if kind == "images":
        options |= {"size": wish.size, "pretrained": wish.pretrained, "crop": wish.crop}
    _refuse_of_other_kind(wish, kind)
    trunk = load_trunk(wish.model, kind, **options)
    nothing = nn.Identity()
    module = (
        ImageEncoder(trunk.module, nothing, unit=True)
        if kind == "images"
        else TextEncoder(trunk.module, nothing, unit=True, pool=trunk.pool)
    )
    module.eval().to(wish.chosen_device)
    return _of_pictures(wish, trunk, module) if kind == "images" else _of_texts(wish, trunk, module)


def _refuse_of_other_kind(wish: Wish, kind: Kind) -> None:
    others = ("--size", "--crop", "--pretrained") if kind == "texts" else ("--tokens",)
    wrong = [option for option in others if option in wish.details()]
    if wrong:
        held, what = ("texts", "pictures") if kind == "texts" else ("pictures", "texts")
        raise OptionError(f"{wrong[0]} is for {what}, and the data are {held}: leave it out")


def _of_pictures(wish: Wish, trunk: Trunk, module: nn.Module) -> Embedder:
    assert trunk.preprocessing is not None
    transform, device = trunk.preprocessing.transform(), wish.chosen_device

    @torch.inference_mode()
    def run(batch: list[Tensor]) -> Tensor:
        return module(torch.stack(batch).to(device))

    return Embedder(
        name=trunk.name,
        weights=trunk.weights,
        random=trunk.random,
        identity=_identity(module, "pictures", repr(trunk.preprocessing)),
        batch=wish.batch,
        read=lambda picture: transform(picture.image()),
        run=run,
    )


def _of_texts(wish: Wish, trunk: Trunk, module: nn.Module) -> Embedder:
    tokenizer, device = trunk.tokenizer, wish.chosen_device
    config: Any = trunk.module.config
    most = min(int(tokenizer.model_max_length), int(getattr(config, "max_position_embeddings", 512)))
    tokens = min(wish.tokens or TOKENS, most)

    def ids(text: str, longest: int = tokens) -> list[int]:
        return tokenizer(text, truncation=True, max_length=longest)["input_ids"]

    @torch.inference_mode()
    def run(batch: list[list[int]]) -> Tensor:
        rows = [torch.tensor(each) for each in batch]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in rows], batch_first=True)
        return module(padded.to(device), mask.to(device))

    return Embedder(
        name=trunk.name,
        weights=trunk.weights,
        random=trunk.random,
        identity=_identity(module, "texts", tokens, _tokenizer_identity(tokenizer)),
        batch=wish.batch,
        read=ids,
        run=run,
        longest=tokens,
        length=lambda text: len(ids(text, tokens + 1)),
    )


_SPELLINGS = (
    "A Text, with CAPITALS; accents: é ü ñ",
    "  two  spaces\nand a line",
    "数字 123 кириллица 🙂",
    "un-hyphen'd e.g. U.S.",
)


def _tokenizer_identity(tokenizer: Any) -> str:
    """Its words, and what it makes of texts that tokenizers treat in different ways."""
    spelled = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in _SPELLINGS]
    return key((dict(tokenizer.get_vocab()), spelled)).hex()


# -- what a sweep has saved --------------------------------------------------------------------------------------------


def _is_swept(folder: Path) -> bool:
    from torchrecycle.sweep.save import MARK, SCRIPT

    if not (folder / SCRIPT).is_file():
        return False
    with (folder / SCRIPT).open(encoding="utf-8", errors="replace") as script:
        return MARK in script.readline()


def _of_swept(wish: Wish, folder: Path, kind: Kind) -> Embedder:
    _refuse_details(wish, folder)
    with quiet_libraries():
        if kind == "images":
            from torchrecycle.sweep.servable import load_images as script
        else:
            from torchrecycle.sweep.servable import load_texts as script
        model = _loaded(folder, kind, script)
    model.to(wish.chosen_device)
    saved: Any = script

    @torch.inference_mode()
    def run_pictures(batch: list[Tensor]) -> Tensor:
        return _unit(model, torch.stack(batch).to(wish.chosen_device))

    @torch.inference_mode()
    def run_texts(batch: list[str]) -> Tensor:
        return saved.embed(model, batch)

    pictures = kind == "images"
    trained = model.config.get("trained", {})
    longest = model.config.get("tokens")
    return Embedder(
        name=folder.resolve().name,
        weights=f"trained by a sweep on {trained.get('data', 'data of its own')}",
        random=False,
        identity=_identity(model, "swept", "" if pictures else _tokenizer_identity(model.tokenizer)),
        batch=wish.batch,
        read=(lambda picture: model.transform(picture.image())) if pictures else str,
        run=run_pictures if pictures else run_texts,
        longest=longest,
        length=None if pictures else lambda text: len(_ids(model.tokenizer, text, longest + 1)),
    )


def _ids(tokenizer: Any, text: str, longest: int) -> list[int]:
    return tokenizer(text, truncation=True, max_length=longest)["input_ids"]


def _loaded(folder: Path, kind: Kind, script: Any) -> Any:
    try:
        config = script.read_config(folder)
        held: Kind = "images" if config["kind"] == "images" else "texts"
        if held == kind:
            return script.load(folder)
    except Exception as error:  # whatever a damaged folder leads to
        raise ModelError(f"the saved model in {folder} cannot be loaded ({_one_line(error)}): save it again") from error
    raise ModelError(_of_other_kind(folder, held, kind))


def _of_other_kind(folder: Path, held: Kind, kind: Kind) -> str:
    names = {"images": "pictures", "texts": "texts"}
    return f"the model in {folder} is one of {names[held]}, and the data are {names[kind]}: give another --model"


def _unit(model: Any, pixels: Tensor) -> Tensor:
    """As `load_images.embed` does: of a model that tells classes, what its head reads."""
    return model(pixels) if model.config["unit"] else F.normalize(model.features(pixels), dim=-1)


# -- a similarity model ------------------------------------------------------------------------------------------------


def _is_similarity_model(folder: Path) -> bool:
    from torchrecycle.similarity.model import ABOUT

    return (folder / ABOUT).is_file()


def _of_similarity_model(wish: Wish, folder: Path, kind: Kind) -> Embedder:
    from torchrecycle.similarity import SimilarityModel

    _refuse_details(wish, folder)
    with quiet_libraries():
        model = SimilarityModel.load(folder, device=wish.chosen_device)

    def run(batch: list[Any]) -> Tensor:
        try:
            return F.normalize(torch.from_numpy(model.encode(batch, batch_size=wish.batch)).float(), dim=-1)
        except RecycleError:
            raise
        except Exception as error:  # encoders and collate functions are the user's own
            taken = "pictures of PIL" if kind == "images" else "texts"
            raise ModelError(
                f"the similarity model in {folder} does not encode {taken} ({_one_line(error)}): its encoders must "
                "take them, by their get_collate_fn"
            ) from error

    return Embedder(
        name=folder.resolve().name,
        weights="of a saved similarity model",
        random=False,
        identity=_identity(model, "similarity model"),
        batch=wish.batch,
        read=(lambda picture: picture.image()) if kind == "images" else str,
        run=run,
    )
