"""Encoders and a head as one model: objects -> embeddings, and a folder of it.

``SimilarityModel({"photo": photos, "text": texts}, head).encode(products)`` gives each product to both encoders, which
take of it what is theirs, and their vectors of 1,280 and 384 numbers, joined in the order of the names, to a head for
1,664. The model is the same whether rows are recycled or not: what recycles stands in `_stages`, which is no part of
the model and of none of its copies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.description import OWN, STATE_HOOKS, describe_values, must_be_without_hooks
from torchrecycle.similarity.encoders.base import Encoder, EncoderError, must_be_names
from torchrecycle.similarity.heads.encoder_head import EncoderHead, HeadError, apply_head, shown
from torchrecycle.similarity.parts import (
    class_of_folder,
    class_to_write,
    has_own_load,
    load_part,
    must_not_share,
    read_parts,
    save_part,
    saved_parts,
)
from torchrecycle.similarity.rebuilding import read_values
from torchrecycle.similarity.saving import ModelFolderError

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

__all__ = ["DEFAULT_ENCODER_KEY", "MetricModel", "SimilarityModel", "merge_meta"]

DEFAULT_ENCODER_KEY = "default"
"""The name of an encoder that comes alone."""

FORMAT = 1
KIND = "similarity model"
ABOUT, ENCODERS, HEAD = "model.json", "encoders", "head"

Meta = Sequence[dict[str, Any]]


class SimilarityModel(nn.Module):
    """Encoders and a head.

    Encoders that are not trainable are frozen here, and stay in eval mode when the model is put in training mode.

    Args:
        encoders: One, or several by name.
        head: What makes embeddings of what they give.

    Raises:
        EncoderError: what comes is no encoder, or a name cannot be one of a module and of a folder.
        HeadError: what comes is no head, or it takes another width than the encoders give.
    """

    def __init__(self, encoders: Encoder | Mapping[str, Encoder], head: EncoderHead) -> None:
        super().__init__()
        self._put_together(encoders, head)

    def _put_together(self, encoders: Encoder | Mapping[str, Encoder], head: EncoderHead) -> None:
        named = _by_name(encoders)
        _must_fit(named, head)
        self.encoders = nn.ModuleDict(named)
        self.head = head
        self._stages: dict[str, Any] = {}
        for encoder in named.values():
            encoder.disable_gradients_if_required()
        self.train(self.training)

    @classmethod
    def get_encoders_output_size(cls, encoders: Encoder | Mapping[str, Encoder]) -> int:
        """Width of what the encoders give together: the sum of their `embedding_size`."""
        return sum(encoder.embedding_size for encoder in _by_name(encoders).values())

    def train(self, mode: bool = True) -> Self:
        """Set training mode; encoders that are not trainable stay in eval mode."""
        super().train(mode)
        for encoder in self._named_encoders().values():
            if not encoder.trainable:
                encoder.eval()
        return self

    def _named_encoders(self) -> dict[str, Encoder]:
        found: Any = dict(self.encoders)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Copies, pickles and saved models are plain: what recycles belongs to this object alone.
        return {**super().__getstate__(), "_stages": {}}

    # -- from objects to inputs

    def get_collate_fn(self) -> Callable[[list[Any]], dict[str, dict[str, Any]]]:
        """From a list of objects to ``{"data": {encoder: inputs}, "meta": {encoder: [dict, ...]}}``.

        Pickles to workers if the encoders' collate functions do. Only encoders that say something of their
        objects are in "meta".
        """
        collates = {name: encoder.get_collate_fn() for name, encoder in self._named_encoders().items()}
        return ModelCollate(collates, self.meta_extractors())

    def meta_extractors(self) -> dict[str, Callable[[list[Any]], list[dict[str, Any]]]]:
        """Of the encoders that have one of their own, the meta extractor."""
        return {
            name: encoder.get_meta_extractor()
            for name, encoder in self._named_encoders().items()
            if encoder.says_meta()
        }

    # -- from inputs to embeddings

    def forward(self, batch: Mapping[str, Mapping[str, Any]]) -> Tensor:
        """
        Args:
            batch: as `get_collate_fn` makes it; "meta" may be missing.

        Returns:
            embeddings ``[batch, head.output_size]``

        Raises:
            EncoderError: an encoder gives something else than it says, or what cannot be joined.
            HeadError: the head does not fit what it gets, or gives something else than it says.
        """
        data = batch.get("data") if isinstance(batch, Mapping) else None
        if not isinstance(data, Mapping) or not set(self.encoders) <= set(data):
            raise EncoderError(
                f"a SimilarityModel takes what its get_collate_fn() makes of objects, {{'data': {{name: inputs}}}} "
                f"with inputs of {', '.join(map(repr, self.encoders))}, and got {shown(batch)}: use encode(objects)"
            )
        outputs = {name: self._encode(name, data[name]) for name in sorted(self.encoders)}
        for name, output in outputs.items():
            self._must_be_as_said(name, output)
        joined = self._joined(outputs)
        embeddings = apply_head(self.head, joined, merge_meta(batch.get("meta") or {}))
        self._must_be_embeddings(embeddings, joined)
        return embeddings

    def _encode(self, name: str, inputs: Any) -> Any:
        """What an encoder gives; or what stands for it, where its rows are recycled."""
        stage = self._stages.get(name)
        return self.encoders[name](inputs) if stage is None else stage(inputs)

    def _must_be_as_said(self, name: str, output: Any) -> None:
        size = self._named_encoders()[name].embedding_size
        if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] != size:
            raise EncoderError(
                f"the encoder '{name}' ({type(self.encoders[name]).__name__}) gives vectors of {output.shape[1]} "
                f"numbers, and its embedding_size is {size}: let that say what it gives"
            )

    def _joined(self, outputs: Mapping[str, Any]) -> Any:
        if len(outputs) == 1:
            return next(iter(outputs.values()))
        for name, output in outputs.items():
            if not isinstance(output, Tensor) or output.dim() != 2:
                raise EncoderError(
                    f"the encoder '{name}' ({type(self.encoders[name]).__name__}) gives {shown(output)}, and what "
                    "several encoders give is joined: each must give one tensor [batch, embedding_size]. Pool in the "
                    "encoder"
                )
        if len({len(output) for output in outputs.values()}) > 1:
            said = ", ".join(f"'{name}' {len(output)}" for name, output in outputs.items())
            raise EncoderError(f"the encoders give other numbers of vectors for the same objects: {said}")
        return torch.cat(list(outputs.values()), dim=1)

    def _must_be_embeddings(self, embeddings: Any, given: Any) -> None:
        size: Any = self.head.output_size
        rows = len(given) if isinstance(given, Tensor) and given.dim() else None
        fits = isinstance(embeddings, Tensor) and embeddings.dim() == 2 and embeddings.shape[1] == size
        if not fits or (rows is not None and len(embeddings) != rows):
            raise HeadError(
                f"the head ({type(self.head).__name__}) gives {shown(embeddings)} of {shown(given)}: expected one "
                f"vector for each object, [{'batch' if rows is None else rows}, {size}], as its output_size says"
            )

    # -- inference

    @overload
    def encode(self, objects: Any, batch_size: int = 32, to_numpy: Literal[True] = True) -> np.ndarray[Any, Any]: ...
    @overload
    def encode(self, objects: Any, batch_size: int = 32, *, to_numpy: Literal[False]) -> Tensor: ...
    @overload
    def encode(self, objects: Any, batch_size: int, to_numpy: Literal[False]) -> Tensor: ...
    def encode(self, objects: Any, batch_size: int = 32, to_numpy: bool = True) -> Any:
        """Embeddings of objects, in eval mode and without gradient.

        Args:
            objects: A list or tuple of objects, a data set or an iterator of them; anything else is one object.
            batch_size: How many go through the model at once.
            to_numpy: Give NumPy arrays; else tensors on the model's device. NumPy has no bfloat16: it gets float32.

        Returns:
            embeddings ``[objects, head.output_size]``; of one object that was given by itself, ``[head.output_size]``.
            The caller may keep and change them.

        Raises:
            EncoderError: an encoder does not give one row for each object, or something else than it says.
        """
        if batch_size < 1:
            raise EncoderError(f"batch_size is {batch_size}: it is to be 1 or more")
        many = _is_many(objects)
        first = next(self.parameters(), next(self.buffers(), torch.empty(0)))
        collate, parts = self.get_collate_fn(), []
        with _eval_mode(self), torch.no_grad():
            for some in _batches(objects if many else [objects], batch_size):
                batch = collate(some)
                found = self({**batch, "data": _moved(batch["data"], first.device)}).detach()
                if len(found) != len(some):
                    raise EncoderError(
                        f"{len(some)} objects came out as {len(found)} embeddings: an encoder or its collate function "
                        "does not give one row for each object"
                    )
                parts.append(_as_numpy_can(found).cpu() if to_numpy else found)
        size: Any = self.head.output_size
        joined = torch.cat(parts) if parts else torch.empty(0, size, device="cpu" if to_numpy else first.device)
        result = joined if many else joined[0]
        return result.numpy() if to_numpy else result

    # -- in a folder

    def save(self, output_path: str | os.PathLike[str]) -> None:
        """Write the model into a folder, each encoder and the head by its own `save`.

        Of a derived class, the attributes are written as well, if they are plain values.

        Args:
            output_path: New, empty, or one that holds a saved similarity model, which is replaced when the new one is
                whole.

        Raises:
            DescriptionError: a part holds something that cannot be written without pickle, or the model has hooks; the
                message names it.
            SharedWeightsError: two parts hold the same weights, and train them.
            ModelFolderError: the folder holds something else, or cannot be written.
            EncoderError: a class derived from `SimilarityModel` has layers besides encoders and head.
        """
        more = [*set(self._modules) - {"encoders", "head"}, *self._parameters, *self._buffers]
        if more:
            raise EncoderError(
                f"{type(self).__name__} has {', '.join(sorted(more))} besides encoders and head, and only these are "
                "saved: make it part of the head, or give the class a save and load of its own"
            )
        _must_be_without_any_hooks(self)
        must_not_share({**{f"the encoder '{n}'": each for n, each in self.encoders.items()}, "the head": self.head})
        own = {name: value for name, value in vars(self).items() if name not in OWN | {"_stages"}}
        with saved_parts(output_path, ABOUT, KIND, FORMAT, (ENCODERS, HEAD)) as (folder, about):
            about["class"] = class_to_write(type(self))
            about["attributes"], about["shared"] = describe_values(own, type(self))
            about["torch"] = torch.__version__
            about["encoders"] = {
                name: save_part(encoder, folder / ENCODERS / name) for name, encoder in self.encoders.items()
            }
            about["head"] = save_part(self.head, folder / HEAD)

    @classmethod
    def load(cls, input_path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` has written, each part by the `load` of its class.

        The constructor of a derived class is not called: it may take what no file says. Its attributes are set.

        Args:
            input_path: The folder.
            device: Where the model is to lie.

        Returns:
            the model, in eval mode, of the class that was saved.

        Raises:
            ModelFolderError: there is no saved model, or of another format, or a class that is not here, or damaged, or
                it was saved as another class than this one or one derived from it.
        """
        folder = Path(input_path)
        about = read_parts(folder, ABOUT, KIND, FORMAT, ("class", "encoders", "head"))
        kind: Any = class_of_folder(folder, str(about["class"]), SimilarityModel)
        if not issubclass(kind, cls):
            raise ModelFolderError(
                f"{folder} holds a {kind.__name__}, and is loaded as a {cls.__name__}: use {kind.__name__}.load or "
                "SimilarityModel.load"
            )
        if has_own_load(kind, cls):
            return kind.load(input_path, device)
        model = _empty_model(folder, kind, about)
        classes = about["encoders"] if isinstance(about["encoders"], dict) else {}
        try:
            must_be_names(classes, "an encoder")
        except EncoderError as error:
            raise ModelFolderError(f"{folder / ABOUT} is damaged: {error}") from error
        encoders = {name: load_part(folder / ENCODERS / name, kind, Encoder) for name, kind in classes.items()}
        head = load_part(folder / HEAD, str(about["head"]), EncoderHead)
        SimilarityModel._put_together(model, encoders, head)
        return model.to(device).eval()


# -- making ------------------------------------------------------------------------------------------------------------


def _must_be_without_any_hooks(model: nn.Module) -> None:
    """
    Raises:
        DescriptionError: it has hooks that take part in the forward.
        EncoderError: it has hooks on its state dict.
    """
    must_be_without_hooks("", model)
    for kind in STATE_HOOKS:
        if getattr(model, kind):
            raise EncoderError(
                f"{type(model).__name__} has {kind[1:].replace('_', ' ')}, and hooks of the model itself are not "
                "saved: take them off (`handle.remove()`), or register them on an encoder or the head"
            )


def _empty_model(folder: Path, kind: type[nn.Module], about: Mapping[str, Any]) -> Any:
    """A model without its parts, whose constructor was not called.

    Raises:
        ModelFolderError: its attributes cannot be read, or are none that a file may set.
    """
    model: Any = object.__new__(kind)
    nn.Module.__init__(model)
    try:
        told = {"attributes": about["attributes"], "shared": about["shared"]}
        refused = {"encoders", "head", "_stages"} & told["attributes"].keys()
        if refused:
            raise EncoderError(f"{', '.join(refused)} is no attribute that a file may set")
        vars(model).update(read_values(told["attributes"], told["shared"], kind))
    except RecycleError as error:
        raise ModelFolderError(f"cannot load {folder}: {error}") from error
    except Exception as error:  # a damaged or hostile file can go wrong anywhere
        raise ModelFolderError(
            f"{folder / ABOUT} is damaged, or does not fit {kind.__name__} ({type(error).__name__}: {error})"
        ) from error
    return model


MetricModel = SimilarityModel
"""The name that older versions of Quaterion have for it."""


def _by_name(encoders: Encoder | Mapping[str, Encoder] | nn.ModuleDict) -> dict[str, Encoder]:
    """
    Raises:
        EncoderError: there are none, or something else than encoders, or a name cannot be one.
    """
    if isinstance(encoders, (Mapping, nn.ModuleDict)):
        named: dict[str, Any] = must_be_names(dict(encoders.items()), "an encoder")
    else:
        named = {DEFAULT_ENCODER_KEY: encoders}
    for name, encoder in named.items():
        if not isinstance(encoder, Encoder):
            raise EncoderError(
                f"the encoder '{name}' is {shown(encoder)}, and no Encoder: derive a class from Encoder whose forward "
                "calls it, or wrap a model, RecycledEncoder(model, cut='layer2', embedding_size=512)"
            )
    return named


def _must_fit(encoders: Mapping[str, Encoder], head: Any) -> None:
    """
    Raises:
        HeadError: it is no head, or takes another width than the encoders give.
    """
    if not isinstance(head, EncoderHead):
        raise HeadError(
            f"the head is {shown(head)}, and no EncoderHead: wrap it, SequentialHead(module, output_size=512)"
        )
    sizes = {name: encoder.embedding_size for name, encoder in encoders.items()}
    if head.input_embedding_size not in (None, sum(sizes.values())):
        several = f", together {sum(sizes.values())}" if len(sizes) > 1 else ""
        said = ", ".join(f"'{name}' gives {size} numbers" for name, size in sizes.items())
        raise HeadError(
            f"the head ({type(head).__name__}) was made for vectors of {head.input_embedding_size} numbers, and the "
            f"encoder{'s' if several else ''} {said}{several}: make it with {sum(sizes.values())}, which "
            "configure_head is given as input_embedding_size"
        )


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCollate:
    """From a list of objects to a batch of a `SimilarityModel`."""

    collates: Mapping[str, Callable[[list[Any]], Any]]
    """Per encoder."""
    metas: Mapping[str, Callable[[list[Any]], list[dict[str, Any]]]]
    """Per encoder that has one of its own."""

    def __call__(self, objects: list[Any]) -> dict[str, dict[str, Any]]:
        data = {name: collate(objects) for name, collate in self.collates.items()}
        return {"data": data, "meta": {name: meta(objects) for name, meta in self.metas.items()}}


def merge_meta(meta: Mapping[str, Meta]) -> list[dict[str, Any]] | None:
    """One dict for each object, of what the encoders say about it; None if none says anything.

    Raises:
        EncoderError: they speak of other numbers of objects.

    >>> merge_meta({"photo": [{"a": 1}, {"a": 2}], "text": [{"b": 3}, {"b": 4}]})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
    """
    if not meta:
        return None
    if len({len(each) for each in meta.values()}) > 1:
        said = ", ".join(f"'{name}' {len(each)}" for name, each in meta.items())
        raise EncoderError(f"meta extractors must give one dict for each object, and gave: {said}")
    return [{key: value for part in parts for key, value in part.items()} for parts in zip(*meta.values(), strict=True)]


def _is_many(objects: Any) -> bool:
    """Whether these are objects, and not one; a named tuple is one, as a row of a table."""
    if isinstance(objects, tuple):
        return not hasattr(objects, "_fields")
    # A data set of Hugging Face is none of torch's.
    theirs = type(objects).__module__.partition(".")[0] == "datasets" and hasattr(objects, "__getitem__")
    return theirs or isinstance(objects, (list, Dataset, Iterator))


def _batches(objects: Any, size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for obj in _each(objects):
        some.append(obj)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _each(objects: Any) -> Iterable[Any]:
    """Of a data set by numbers: what it gives when iterated over may go on for ever."""
    if not isinstance(objects, Dataset) or isinstance(objects, IterableDataset):
        return objects
    counted: Any = objects
    return (counted[i] for i in range(len(counted)))


def _moved(value: Any, device: torch.device) -> Any:
    """Model inputs on a device; what has no device stays as it is."""
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, dict):
        moved = {key: _moved(each, device) for key, each in value.items()}
        return moved if type(value) is dict else type(value)(moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    return type(value)(_moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value


def _as_numpy_can(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has the flag that it had."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
