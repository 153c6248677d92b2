"""An encoder at work on kept rows.

`EncoderStage.attach(encoder, samples, ...)` wraps an encoder in a module whose only child it is, and recycles that:
cut at the encoder itself if it is frozen, so that nothing of it runs for an object whose row is kept, or within it, if
it is a `RecycledEncoder`. All that makes rows trustworthy (keys by content, fingerprint, proof, store) is `recycle`'s.

What an encoder takes is made by its collate function of a list of objects: a tensor of images, a dict of padded token
ids. A key is of one object, so `EncoderInputs` is a data set of single objects, each collated by itself; that this
gives the same as collating it with others is compared for some of them. Of a pair, the left object and the right one
are two items.

A batch then carries, in place of an encoder's inputs, `KeptRows` (the encoder's output itself) where it is one tensor
of one shape, or `FlatInputs` with a `RecycledTensor` in it where the rest of a model runs on after the cut, or lengths
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchrecycle.data import RecycledDataset, RowSource, Template
from torchrecycle.data.dataset import Fetched
from torchrecycle.data.source import TRIES
from torchrecycle.errors import BatchError, GoneRowsError
from torchrecycle.fingerprint import OF_ANY_MODULE
from torchrecycle.keys import key
from torchrecycle.recycling import Recycling, recycle
from torchrecycle.similarity.cache import CacheError
from torchrecycle.similarity.loaders import group_number, objects_of
from torchrecycle.similarity.samples import SimilarityGroupSample
from torchrecycle.store import Store

__all__ = ["EncoderInputs", "EncoderStage", "FlatInputs", "InputForm", "KeptRows"]

USUAL_MASKS = ("attention_mask", "decoder_attention_mask", "pixel_mask")


# -- what an encoder takes, as named tensors ---------------------------------------------------------------------------


class FlatInputs(dict[str, Any]):
    """An encoder's inputs as named tensors, ``{"input_ids": ..., "attention_mask": ...}``; of a tensor ``input``."""


@dataclass(frozen=True)
class InputForm:
    """The nest that an encoder's collate function makes."""

    encoder: str
    """The encoder's name, for messages."""
    template: Template
    names: tuple[str, ...]
    """Per leaf of the nest."""
    texts: frozenset[str]
    """Leaves that are lists of strings, one for each object: an encoder that tokenises by itself."""
    constants: Mapping[str, Any]
    """Leaves that are neither: the same for all objects."""

    @classmethod
    def of(cls, encoder: str, collated: Any) -> InputForm:
        """The form of a collated batch.

        Raises:
            CacheError: it holds no tensor.
        """
        template = Template.of(collated)
        names = tuple(".".join(map(str, path)) or "input" for path in template.paths())
        leaves = dict(zip(names, template.split(collated), strict=True))
        texts = frozenset(name for name, leaf in leaves.items() if _is_texts(leaf))
        constants = {n: leaf for n, leaf in leaves.items() if not isinstance(leaf, Tensor) and n not in texts}
        if len(constants) == len(leaves) or len(leaves) < len(template.paths()):
            found = ", ".join(f"{name}: {type(leaf).__name__}" for name, leaf in leaves.items())
            raise CacheError(
                f"the collate function of the encoder '{encoder}' gives neither tensors nor a list of texts ({found}), "
                "so that nothing tells by content which row belongs to an object. Let get_collate_fn() do what turns "
                "objects into tensors, or leave the encoder out of the cache: CacheConfig(mapping={...: "
                "CacheType.NONE})."
            )
        return cls(encoder, template, names, texts, constants)

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors that a batch consists of."""
        names = [name for name in self.names if name not in self.constants]
        return [part for name in names for part in (_parts_of(name) if name in self.texts else (name,))]

    def flat(self, collated: Any) -> FlatInputs:
        """The tensors of a batch by name.

        Raises:
            BatchError: the nest is another than the first, or has other constants.
        """
        leaves = dict(zip(self.names, self.template.split(collated), strict=True))
        for name in self.texts:
            if not _is_texts(leaves[name]):
                raise BatchError(
                    f"the collate function of the encoder '{self.encoder}' gives {leaves[name]!r:.80} as '{name}' "
                    "where the first batch has a list of texts"
                )
            leaves |= dict(zip(_parts_of(name), _as_bytes(leaves.pop(name)), strict=True))
        for name, leaf in leaves.items():
            if (name in self.constants) is isinstance(leaf, Tensor) or (
                name in self.constants and repr(leaf) != repr(self.constants[name])
            ):
                raise BatchError(
                    f"the collate function of the encoder '{self.encoder}' gives {leaf!r:.80} as '{name}' where the "
                    f"first batch has {self.constants.get(name, 'a tensor')!r:.80}: a row kept under the one is not "
                    "valid for the other"
                )
        return FlatInputs((name, leaves[name]) for name in self.tensors)

    def nest(self, flat: Mapping[str, Any]) -> Any:
        """The inverse of `flat`."""
        return self.template.join([self._leaf(name, flat) for name in self.names])

    def _leaf(self, name: str, flat: Mapping[str, Any]) -> Any:
        if name in self.texts:
            return _as_texts(*(flat[part] for part in _parts_of(name)))
        return self.constants[name] if name in self.constants else flat[name]

    def single(self, collated: Any) -> FlatInputs:
        """The tensors of a batch of one object, without the dimension that counts objects."""
        flat = self.flat(collated)
        for name, tensor in flat.items():
            if tensor.dim() == 0 or len(tensor) != 1:
                raise BatchError(
                    f"the collate function of the encoder '{self.encoder}' gives '{name}' as {list(tensor.shape)} for "
                    "one object: its first dimension must count the objects"
                )
        return FlatInputs((name, tensor[0]) for name, tensor in flat.items())

    def masks(self) -> list[str]:
        """The tensors that tell padding, by their usual names."""
        return [name for name in self.tensors if name.rpartition(".")[2] in USUAL_MASKS]


def _is_texts(leaf: Any) -> bool:
    return isinstance(leaf, list) and bool(leaf) and all(isinstance(one, str) for one in leaf)


def _parts_of(name: str) -> tuple[str, str]:
    return f"{name}.bytes", f"{name}.attention_mask"


def _as_bytes(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as their bytes ``[texts, longest]``, and which of them are no padding. `_as_texts` is the inverse."""
    encoded = [torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.int64) for text in texts]
    masks = [torch.ones(len(one), dtype=torch.int64) for one in encoded]
    whole, mask = (torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (encoded, masks))
    return whole, mask


def _as_texts(whole: Tensor, mask: Tensor) -> list[str]:
    rows = zip(whole.cpu(), mask.cpu().bool(), strict=True)
    return [_as_text(bytes((row[kept] % 256).tolist())) for row, kept in rows]


def _as_text(encoded: bytes) -> str:
    try:
        return encoded.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # what depends on an object alone is found out with any other bytes in its place
        return encoded.decode("utf-8", "replace")


# -- single objects as items -------------------------------------------------------------------------------------------

KEY = " key"
TARGETS = (" group",), (" score", " subgroup")
"""Names of what an item holds besides the encoder's inputs: no collate function gives names with a blank in front."""


class EncoderInputs(Dataset[dict[str, Any]]):
    """What one encoder takes, object by object, with the targets of the object's sample.

    Args:
        samples: the data set of samples.
        kind: the class of the samples. Of pairs, items are all left objects and then all right ones.
        collate: the encoder's.
        form: what it gives.
        extractor: from an object to what identifies it, if not its content.
    """

    def __init__(
        self,
        samples: Any,
        kind: type,
        collate: Callable[[list[Any]], Any],
        form: InputForm,
        extractor: Callable[[Any], Any] | None = None,
    ) -> None:
        self.samples, self.kind, self.collate, self.form, self.extractor = samples, kind, collate, form, extractor

    @property
    def in_groups(self) -> bool:
        """Whether the samples are single objects in groups."""
        return self.kind is SimilarityGroupSample

    def __len__(self) -> int:
        return len(self.samples) * (1 if self.in_groups else 2)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        count = len(self.samples)
        read = {number: self.samples[number] for number in dict.fromkeys(index % count for index in indices)}
        return [self._item(read[index % count], index >= count) for index in indices]

    def _item(self, sample: Any, is_right: bool) -> dict[str, Any]:
        found = objects_of([sample], self.kind)
        obj = found[is_right]
        item: dict[str, Any] = dict(self.form.single(self.collate([obj])))
        for name, tensor in item.items():
            item[name] = tensor.detach().cpu()
        if self.in_groups:
            item[" group"] = group_number(sample.group)
        else:
            item[" score"], item[" subgroup"] = float(sample.score), group_number(sample.subgroup)
        if self.extractor is not None:
            item[KEY] = key(self.extractor(obj), where="key extractor").hex()
        return item

    def __recycle_state__(self) -> Any:
        return self.samples, _state_of_function(self.collate), _state_of_function(self.extractor)


def _state_of_function(function: Any) -> Any:
    """A function as it is now; of a module's method not the weights, which the fingerprint covers."""
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, nn.Module):
        return function
    parts = [(name, _settings_of(module), dict(module._buffers)) for name, module in owner.named_modules()]
    return function.__func__, parts


def _settings_of(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in vars(module).items() if name not in OF_ANY_MODULE}


def _kept_key(item: Mapping[str, Any]) -> str:
    return item[KEY]


# -- padding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PadInputs:
    """A collate function for the items of `EncoderInputs`: tensors stacked, padded as the encoder's own does.

    Learned by comparing what the encoder's collate function gives for two objects with what it gives for each alone.
    """

    form: InputForm
    padding: Mapping[str, tuple[bool, float]]
    """Per tensor whose length differs, whether it is padded on the left, and with which number."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: self._joined(name, [item[name] for item in items]) for name in items[0]}

    def _joined(self, name: str, parts: list[Any]) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts if isinstance(parts[0], str) else torch.tensor(parts)
        if len({part.shape for part in parts}) == 1:
            return torch.stack(parts)
        if name not in self.padding:
            raise BatchError(
                f"the objects of a batch give '{name}' of the encoder '{self.form.encoder}' in the shapes "
                f"{[list(part.shape) for part in parts[:4]]}, and how its collate function pads them is not known, "
                "since the first objects of the data set are all of one length. Let it pad to one length."
            )
        left, value = self.padding[name]
        whole = parts[0].new_full((len(parts), *np.max([part.shape for part in parts], axis=0)), value)
        for row, part in zip(whole, parts, strict=True):
            row[_region(part.shape, row.shape, left)] = part
        return whole

    @classmethod
    def learn(cls, form: InputForm, together: FlatInputs, alone: Sequence[FlatInputs]) -> PadInputs:
        """How a collate function pads.

        Args:
            form: of what it gives.
            together: for some objects.
            alone: for each of them by itself.

        Raises:
            CacheError: it gives something else for an object alone than among others.
        """
        padding: dict[str, tuple[bool, float]] = {part: (False, 0) for name in form.texts for part in _parts_of(name)}
        sides = {name: _sides(whole, [single[name] for single in alone]) for name, whole in together.items()}
        impossible = next((name for name, fitting in sides.items() if not fitting), None)
        if impossible is not None:
            raise CacheError(
                f"the collate function of the encoder '{form.encoder}' gives another '{impossible}' for an object "
                "alone than among others, so that a row could not be kept for the object. What depends on the batch "
                "belongs into the encoder or into the head."
            )
        told = {fitting[0] for fitting in sides.values() if len(fitting) == 1}
        for name, whole in together.items():
            for row, single in zip(whole, alone, strict=True):
                if single[name].shape != row.shape:
                    # Zeros among zeros fit on either side: then the others tell.
                    fitting = [side for side in sides[name] if side in told] if len(sides[name]) > 1 else sides[name]
                    if len(fitting) != 1:
                        raise CacheError(
                            f"on which side the collate function of the encoder '{form.encoder}' pads '{name}' cannot "
                            "be told from the first objects. Let it give an attention_mask, or pad to one length."
                        )
                    padding[name] = fitting[0], _filling(row, single[name], fitting[0], name, form)
        return cls(form, padding)


def _sides(whole: Tensor, alone: Sequence[Tensor]) -> list[bool]:
    """On which sides a tensor may be padded: False for the right one. Both, where nothing is padded."""
    return [
        side for side in (False, True) if all(_holds(row, part, side) for row, part in zip(whole, alone, strict=True))
    ]


def _region(small: Sequence[int], large: Sequence[int], left: bool) -> tuple[slice, ...]:
    return tuple(slice(b - a, b) if left else slice(0, a) for a, b in zip(small, large, strict=True))


def _holds(row: Tensor, part: Tensor, left: bool) -> bool:
    fits = row.dim() == part.dim() and all(a <= b for a, b in zip(part.shape, row.shape, strict=True))
    return fits and torch.equal(row[_region(part.shape, row.shape, left)], part)


def _filling(row: Tensor, part: Tensor, left: bool, name: str, form: InputForm) -> float:
    rest = torch.ones(row.shape, dtype=torch.bool)
    rest[_region(part.shape, row.shape, left)] = False
    values = row[rest].unique()
    if len(values) != 1:
        raise CacheError(
            f"the collate function of the encoder '{form.encoder}' pads '{name}' with several numbers "
            f"({values[:3].tolist()}), so that its padding cannot be taken off a row and put back. Pad with one number."
        )
    return values[0].item()


# -- rows in a batch ---------------------------------------------------------------------------------------------------


class KeptRows:
    """What an encoder gives for the objects of a batch, of kept rows: moves to a device and into pinned memory.

    Args:
        fingerprint: of the recycling that they were found by.
        rows: ``[batch, ...]``, or ``[batch]`` places in what waits on the device.
        waiting: under which name that waits; None where the rows came along.
    """

    __slots__ = ("fingerprint", "rows", "waiting")

    def __init__(self, fingerprint: str, rows: Tensor, waiting: str | None = None) -> None:
        self.fingerprint, self.rows, self.waiting = fingerprint, rows, waiting

    def _with(self, function: Callable[[Tensor], Tensor]) -> KeptRows:
        return KeptRows(self.fingerprint, function(self.rows), self.waiting)

    def to(self, *args: Any, **kwargs: Any) -> KeptRows:
        """The same on another device."""
        return self._with(lambda part: part.to(*args, **kwargs))

    def pin_memory(self) -> KeptRows:
        """The same in pinned memory."""
        return self._with(Tensor.pin_memory)

    def split(self, sizes: list[int]) -> list[KeptRows]:
        """The same in pieces."""
        return [KeptRows(self.fingerprint, rows, self.waiting) for rows in self.rows.split(sizes)]

    def __len__(self) -> int:
        return len(self.rows)


class StageRows:
    """Rows of one encoder for one data set: what a loader and its workers need of a stage.

    Args:
        recycled: single objects, as rows.
        pad: the collate function of single objects.
        whole: whether rows are the encoder's output itself, of one shape.
    """

    def __init__(self, recycled: RecycledDataset, pad: PadInputs, *, whole: bool) -> None:
        self.recycled, self.pad, self.whole = recycled, pad, whole
        self.waiting: str | None = None
        """Under which name the rows wait on the model's device, so that batches hold places only."""
        self.on_renewal: Callable[[StageRows], None] | None = None
        """Called at the beginning of each iteration; not in workers."""

    def fetch(self, positions: Tensor) -> Any:
        """The rows of some objects, or None if they are to be read: recycling is off, or rows are missing.

        Of an encoder that is cut within, objects without a row are read here, as long as one has a row.
        """
        for _ in range(TRIES):
            try:
                return self._kept(positions)
            except GoneRowsError:  # evicted or deleted since they were looked up
                self.recycled.look_again()
        return None

    def _kept(self, positions: Tensor) -> Any:
        recycled = self.recycled
        owner = recycled.owner
        if recycled.manifest is None or recycled.source is None or (recycled._raw if owner is None else owner.off):
            return None
        source = recycled.source
        if not self.whole:
            fetched = recycled.fetch(positions)
            return self._within(source, fetched) if isinstance(fetched, Fetched) else None
        locations = recycled.locations.index_select(0, positions)
        if bool((locations < 0).any()):
            return None
        if self.waiting is not None:
            return KeptRows(source.fingerprint, positions, self.waiting)
        (rows,) = source.rows.gather(locations)
        assert isinstance(rows, Tensor)
        return KeptRows(source.fingerprint, rows)

    def _within(self, source: RowSource, fetched: Fetched) -> FlatInputs:
        batch = fetched.batch()
        batch = self.pad(list(fetched)) if batch is None else batch
        placed = source.fill_in(batch, source.rule(batch), fetched.locations)
        return FlatInputs((name, placed[name]) for name in self.pad.form.tensors)

    def column(self, name: str, positions: Tensor) -> Tensor:
        """A target of some objects, from the manifest."""
        manifest = self.recycled.manifest
        assert manifest is not None
        return manifest.columns[manifest.template.keys.index(name)].batch(positions)

    def renew(self) -> None:
        """At the beginning of an iteration: do model, data set and rows still belong together?"""
        owner = self.recycled.owner
        if owner is not None:
            owner.renew(self.recycled)
        if self.on_renewal is not None:
            self.on_renewal(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_renewal": None}

    def ready(self) -> bool:
        """Whether the targets of all objects are known."""
        return self.recycled.manifest is not None and not self.recycled.owner.off


# -- an encoder at work ------------------------------------------------------------------------------------------------


class _Rooted(nn.Module):
    """An encoder with its inputs as keyword arguments, so that each has a name."""

    def __init__(self, encoder: nn.Module, form: InputForm) -> None:
        super().__init__()
        self.encoder = _OfTexts(encoder, form) if form.texts else encoder
        self._form = form

    def forward(self, **inputs: Any) -> Any:
        return self.encoder(inputs if self._form.texts else self._form.nest(inputs))


class _OfTexts(nn.Module):
    """An encoder that takes texts: these are read within it, where nothing is absent."""

    def __init__(self, encoder: nn.Module, form: InputForm) -> None:
        super().__init__()
        self.encoder = encoder
        self._form = form

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.encoder(self._form.nest(inputs))


class EncoderStage:
    """An encoder of which rows are kept. Made by `attach`; undone by `detach`.

    Args:
        name: the encoder's.
        encoder: a module from what its collate function gives to an output.
        form: what the collate function gives.
        pad: how it pads.
        recycling: of the encoder, wrapped.
        whole: whether all of the encoder is recycled.
    """

    def __init__(
        self, name: str, encoder: Any, form: InputForm, pad: PadInputs, recycling: Recycling, *, whole: bool
    ) -> None:
        self.name, self.encoder, self.form, self.pad, self.recycling = name, encoder, form, pad, recycling
        self._root = recycling.model
        self.whole = whole and recycling.keeps_one_tensor
        self._waiting: dict[str, Tensor] = {}

    @classmethod
    def attach(
        cls,
        name: str,
        encoder: Any,
        samples: Any,
        kind: type,
        *,
        store: str | Store,
        cut: str | None = None,
        level: float | None = None,
        extractor: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> EncoderStage:
        """Recycle an encoder.

        Args:
            name: the encoder's.
            encoder: the encoder.
            samples: a data set of samples, of which some are read.
            kind: the class of the samples.
            store: as for `recycle`.
            cut: a module of the encoder, by name; all of it if neither this nor `level` is given.
            level: in place of `cut`.
            extractor: from an object to what identifies it, if not its content.
            **options: more for `recycle`.

        Raises:
            CacheError: its collate function gives nothing that rows could be found by.
            CutError: it cannot be divided there.
        """
        collate = encoder.get_collate_fn()
        form, pad, example = _example_of(name, collate, samples, kind)
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        inside = cut is not None or level is not None
        if inside and form.texts:
            raise CacheError(
                f"the collate function of the encoder '{name}' gives texts, which its first layers tokenise: to cut a "
                "model within, let it tokenise. See TextInputs."
            )
        recycling = recycle(
            _Rooted(encoder, form).train(encoder.training),
            {tensor: value.to(device) for tensor, value in example.items()},
            cut=f"encoder.{cut}" if cut is not None else None if inside else "encoder",
            level=level,
            store=store,
            mask=form.masks() or None,
            key=None if extractor is None else _kept_key,
            **options,
        )
        return cls(name, encoder, form, pad, recycling, whole=not inside)

    def __call__(self, inputs: Any) -> Any:
        """The encoder's output, of rows or of objects."""
        if isinstance(inputs, KeptRows):
            return self.recycling.activation(self._rows(inputs), inputs.fingerprint)
        flat = inputs if isinstance(inputs, FlatInputs) else self.form.flat(inputs)
        self._root.training = self.encoder.training
        return self._root(**flat)

    def _rows(self, kept: KeptRows) -> Tensor:
        if kept.waiting is None:
            return kept.rows
        waiting = self._waiting[kept.waiting]
        return waiting.index_select(0, kept.rows.to(waiting.device))

    def wait(self, rows: StageRows, device: torch.device) -> None:
        """Bring all rows of a data set to a device, and have batches hold places only.

        The rows of one that has them there already are brought again only if they are others. Where rows are missing,
        none are brought.
        """
        recycled = rows.recycled
        if not self.whole or recycled.source is None:
            return
        name = f"{self.recycling.fingerprint} {id(rows)} {recycled.generation} {device}"
        if rows.waiting == name:
            return
        if rows.waiting is not None:
            del self._waiting[rows.waiting]
            rows.waiting = None
        if bool((recycled.locations < 0).any()):
            return
        try:
            (everything,) = recycled.source.rows.gather(recycled.locations)
        except GoneRowsError:
            recycled.look_again()
            return
        assert isinstance(everything, Tensor)
        self._waiting[name] = everything.to(device)
        rows.waiting = name

    def rows(
        self,
        samples: Any,
        kind: type,
        *,
        collate: Callable[[list[Any]], Any],
        extractor: Callable[[Any], Any] | None,
        name: str | None,
        batch_size: int,
        num_workers: int,
    ) -> StageRows:
        """The rows of a data set; what is missing is computed now."""
        items = EncoderInputs(samples, kind, collate, self.form, extractor)
        recycled = self.recycling.dataset(
            items, collate_fn=self.pad, batch_size=batch_size, num_workers=num_workers, name=name
        )
        return StageRows(recycled, self.pad, whole=self.whole)

    def detach(self) -> None:
        """Leave the encoder as it was."""
        self.recycling.detach()


SOME = 32
"""How many objects are looked at for two of different length."""


def _example_of(
    name: str, collate: Callable[[list[Any]], Any], samples: Any, kind: type
) -> tuple[InputForm, PadInputs, FlatInputs]:
    """Two objects, of different length if the first ones are, and how they are collated."""
    count = len(samples)
    places = dict.fromkeys(round(i * (count - 1) / (SOME - 1)) for i in range(SOME))
    objects: list[Any] = []
    alone: list[FlatInputs] = []
    form: InputForm | None = None
    for place in places:
        for obj in objects_of([samples[place]], kind):
            one = collate([obj])
            form = InputForm.of(name, one) if form is None else form
            objects.append(obj)
            alone.append(form.single(one))
        if len(alone) >= 2 and (_differ(alone) or not _has_tokens(alone[0])):
            break
    assert form is not None
    if len(objects) == 1:
        objects, alone = objects * 2, alone * 2
    other = next((n for n, one in enumerate(alone) if _differ([alone[0], one])), 1)
    together = form.flat(collate([objects[0], objects[other]]))
    return form, PadInputs.learn(form, together, [alone[0], alone[other]]), together


def _differ(singles: Sequence[FlatInputs]) -> bool:
    return any(one[name].shape != singles[0][name].shape for one in singles for name in one)


def _has_tokens(single: FlatInputs) -> bool:
    return any(not tensor.is_floating_point() and tensor.dim() == 1 for tensor in single.values())
