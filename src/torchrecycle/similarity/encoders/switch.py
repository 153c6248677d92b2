"""Objects of different kinds in one space: pictures through one encoder, texts through another.

In a batch of three photos and two texts, each encoder sees its own objects only, and the vectors come out in the order
of the objects. With a `SwitchHead` behind it each kind has a head of its own as well. The class says what is what::

    class PhotosAndTexts(SwitchEncoder):
        @classmethod
        def encoder_selection(cls, record):
            return "text" if isinstance(record, str) else "photo"

    encoder = PhotosAndTexts({"photo": photo_encoder, "text": text_encoder})
"""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.encoders.base import Encoder, EncoderError, must_be_names
from torchrecycle.similarity.parts import has_own, load_part, read_parts, save_part, saved_parts

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SwitchEncoder"]

FORMAT = 1
KIND = "switch encoder"
ABOUT, OPTIONS = "switch.json", "options"


class SwitchEncoder(Encoder):
    """Several encoders, of which each object goes through one.

    Args:
        options: encoders by name, all of the same `embedding_size`.

    Raises:
        EncoderError: there are none, their sizes differ, or a name cannot be one of a module.
    """

    def __init__(self, options: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.options = nn.ModuleDict(must_be_names(dict(options), "an encoder"))
        for name, encoder in options.items():
            if not isinstance(encoder, Encoder):
                raise EncoderError(f"'{name}' is a {type(encoder).__name__}, and a SwitchEncoder is made of Encoders")
        sizes = {name: encoder.embedding_size for name, encoder in options.items()}
        if len(set(sizes.values())) != 1:
            said = ", ".join(f"'{name}' gives {size} numbers" for name, size in sizes.items()) or "there are none"
            raise EncoderError(
                f"the encoders of a SwitchEncoder must give vectors of one width, as they share a space: {said}. Put a "
                "linear layer into the others"
            )
        self._embedding_size = next(iter(sizes.values()))

    @classmethod
    @abstractmethod
    def encoder_selection(cls, record: Any) -> str:
        """The name of the encoder that an object goes through."""

    @property
    def trainable(self) -> bool:
        """Whether any of them is."""
        return any(encoder.trainable for encoder in self._encoders().values())

    @property
    def embedding_size(self) -> int:
        return self._embedding_size

    def _encoders(self) -> dict[str, Encoder]:
        found: Any = dict(self.options)
        return found

    def disable_gradients_if_required(self) -> None:
        """Freeze those that are not trained."""
        for encoder in self._encoders().values():
            encoder.disable_gradients_if_required()

    def train(self, mode: bool = True) -> Self:
        """Set training mode; encoders that are not trained stay in eval mode."""
        super().train(mode)
        for encoder in self._encoders().values():
            if not encoder.trainable:
                encoder.eval()
        return self

    def get_collate_fn(self) -> Callable[[list[Any]], Any]:
        """From objects to ``{"ordering": {name: numbers of objects}, "batches": {name: inputs}}``; an encoder that no
        object goes through is in neither."""
        collates = {name: encoder.get_collate_fn() for name, encoder in self._encoders().items()}
        return functools.partial(_collate, self.encoder_selection, collates)

    def get_meta_extractor(self) -> Callable[[list[Any]], list[dict[str, Any]]]:
        """Of each object ``{"encoder": name}``, which `SwitchHead` reads, and what its encoder's own extractor says."""
        extractors = {name: encoder.get_meta_extractor() for name, encoder in self._encoders().items()}
        return functools.partial(_extract, self.encoder_selection, extractors)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """
        Args:
            batch: as `get_collate_fn` makes it.

        Returns:
            vectors ``[batch, embedding_size]``, in the order of the objects.

        Raises:
            EncoderError: an encoder gives no vectors, or not one for each of its objects.
        """
        parts, numbers = [], []
        for name, inputs in batch["batches"].items():
            vectors, where = self.options[name](inputs), [int(i) for i in batch["ordering"][name]]
            if not isinstance(vectors, Tensor) or vectors.shape != (len(where), self._embedding_size):
                got = list(vectors.shape) if isinstance(vectors, Tensor) else f"a {type(vectors).__name__}"
                raise EncoderError(
                    f"'{name}' of a SwitchEncoder ({type(self.options[name]).__name__}) gives {got} for {len(where)} "
                    f"objects: expected one vector for each, [{len(where)}, {self._embedding_size}]"
                )
            parts.append(vectors)
            numbers += where
        if not parts:
            raise EncoderError("a SwitchEncoder got a batch without objects")
        joined = torch.cat(parts)
        return joined[torch.argsort(torch.tensor(numbers, device=joined.device))]

    def save(self, output_path: str | os.PathLike[str]) -> None:
        """Write all into a folder, encoders that have a `save` of their own by that, each into ``options/NAME``.

        Raises:
            EncoderError: there are such encoders, and the class has layers or attributes beside them.
        """
        if not any(has_own(encoder, Encoder) for encoder in self._encoders().values()):
            super().save(output_path)
            return
        more = vars(self).keys() - vars(nn.Module()).keys() - {"_embedding_size", "_compiled_call_impl"}
        more |= self._modules.keys() - {"options"} | self._parameters.keys() | self._buffers.keys()
        if more:
            raise EncoderError(
                f"{type(self).__name__} has {', '.join(sorted(more))} beside its encoders, of which some have a save "
                f"of their own: give {type(self).__name__} a save and load too"
            )
        with saved_parts(output_path, ABOUT, KIND, FORMAT, (OPTIONS,)) as (folder, about):
            about["training"] = self.training
            about["options"] = {
                name: save_part(each, folder / OPTIONS / name) for name, each in self._encoders().items()
            }

    @classmethod
    def load(cls, input_path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written, each encoder by the `load` of its class."""
        folder = Path(input_path)
        if not (folder / ABOUT).exists():
            return super().load(folder)
        about = read_parts(folder, ABOUT, KIND, FORMAT, ("options",))
        options = {name: load_part(folder / OPTIONS / name, kind, Encoder) for name, kind in about["options"].items()}
        made = cls(options)
        made.training = bool(about.get("training", True))
        return made


def _selected(select: Callable[[Any], str], records: list[Any], names: Mapping[str, Any]) -> dict[str, list[int]]:
    """The numbers of the objects by encoder.

    Raises:
        EncoderError: there is no such encoder.
    """
    found: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        name = select(record)
        if name not in names:
            raise EncoderError(
                f"encoder_selection gives {name!r} for object {i}, a {type(record).__name__}, and the encoders are "
                f"{', '.join(map(repr, names))}"
            )
        found.setdefault(name, []).append(i)
    return found


def _collate(
    select: Callable[[Any], str], collates: Mapping[str, Callable[[list[Any]], Any]], records: list[Any]
) -> dict[str, dict[str, Any]]:
    ordering = _selected(select, records, collates)
    batches = {name: collates[name]([records[i] for i in where]) for name, where in ordering.items()}
    return {"ordering": ordering, "batches": batches}


def _extract(
    select: Callable[[Any], str], extractors: Mapping[str, Callable[[list[Any]], Any]], records: list[Any]
) -> list[dict[str, Any]]:
    meta: list[dict[str, Any]] = [{} for _ in records]
    for name, where in _selected(select, records, extractors).items():
        for i, own in zip(where, extractors[name]([records[i] for i in where]), strict=True):
            meta[i] = {**own, "encoder": name}
    return meta
