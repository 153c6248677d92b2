"""From a batch to its rows: keys, places in the store, leaves.

`RowSource` is what workers need of a recycling, and pickles without the model: how inputs make keys, where the rows
lie, how padding is put back. `place` turns a batch of 64 texts into the same batch with a `RecycledTensor` in it. Of
3 texts without a row that tensor holds what the prefix reads, and the model's next call computes them: what
`encoded` makes of these activations is what the store would have given, to the bit.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from torchrecycle.absent import RecycledTensor
from torchrecycle.bypass import BatchRule, Inputs, Padding, Sequences, positions
from torchrecycle.codec import Layout
from torchrecycle.data.batches import path_of, with_leaf
from torchrecycle.data.resident import Resident
from torchrecycle.errors import BatchError, GoneRowsError
from torchrecycle.keys import tensor_row_keys
from torchrecycle.store import Leaf, Ragged, Rows

__all__ = ["RowSource", "own_numbers"]

TRIES = 3
"""How often keys are looked up again when rows leave the store at that very moment; then objects are read."""


def own_numbers(keys: np.ndarray) -> torch.Tensor:
    """What stands for the location of an object without a row: negative, and the object's own.

    Args:
        keys: ``[n, 16]`` uint8.
    """
    first = np.ascontiguousarray(keys[:, :8]).view(np.int64).reshape(-1)
    return torch.from_numpy(first | np.iinfo(np.int64).min)


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where the rows of one recycling come from."""

    rows: Rows = field(repr=False)
    fingerprint: str
    rule: BatchRule = field(repr=False)
    layouts: tuple[Layout, ...]
    sequences: Sequences
    padding: Padding
    key_inputs: tuple[str, ...]
    """The model inputs that the prefix reads, in the order of the call: the content of a key."""
    absent: frozenset[str]
    """Those that are left out of recycled batches: read by the prefix only, and large."""
    carrier: str
    """The input in whose place a batch carries the rows."""
    user_keys: bool = False
    """Whether keys come from the user's function, so that a batch does not tell them."""
    numbering: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Whose locations are meant: other `Rows` of the same fingerprint may number its rows in another way."""

    # -- keys ----------------------------------------------------------------------------------------------------------

    def positions(self, inputs: Inputs) -> list[torch.Tensor | None]:
        """Which places of each sequence a row keeps, ``[batch, tokens]``; None for a mask that the call has not."""
        tensors = inputs.tensors()
        masks = (tensors.get(mask) for mask in self.sequences.masks)
        return [None if mask is None else positions(mask, self.padding) for mask in masks]

    def key_tensors(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """The tensors that make the key.

        Raises:
            BatchError: one is missing or no tensor.
        """
        found = inputs.tensors()
        missing = [name for name in self.key_inputs if name not in found]
        if missing:
            raise BatchError(
                f"the batch has no tensor for the model input {missing}, which the example has. Lists of numbers "
                "become tensors in the data set or in the collate function; a Hugging Face data set's do with "
                ".with_format('torch')."
            )
        return {name: found[name] for name in self.key_inputs}

    def keys(self, inputs: Inputs) -> np.ndarray:
        """The key of each object, ``[batch, 16]`` uint8: content of the inputs that the prefix reads, unpadded."""
        tensors = self.key_tensors(inputs)
        kept = self.positions(inputs)
        masks = {}
        for name, number in self.sequences.followers(inputs):
            own = kept[number]
            if name in tensors and own is not None:
                masks[name] = own.to(torch.uint8)
        return tensor_row_keys(tensors, masks)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def encode(self, leaves: Sequence[torch.Tensor], inputs: Inputs) -> list[Leaf]:
        """The activation of a batch as rows, on the CPU. `gather` and `to_model` are the inverse."""
        return self._encode(leaves, inputs, torch.device("cpu"))

    def _encode(self, leaves: Sequence[torch.Tensor], inputs: Inputs, device: torch.device) -> list[Leaf]:
        kept = self.positions(inputs)
        rows: list[Leaf] = []
        for layout, leaf in zip(self.layouts, leaves, strict=True):
            dense = layout.to_rows(leaf).to(device)
            if layout.ragged:
                values, lengths = layout.trim(dense, *self._masks(layout, kept, dense.shape, device))
                parts = layout.quantise(values, lengths) if layout.scaled else (values,)
                rows.append(Ragged(parts[0], lengths))
            else:
                parts = layout.quantise(dense) if layout.scaled else (dense.contiguous(),)
                rows.append(parts[0])
            rows.extend(parts[1:])
            if layout.sized:
                sizes = torch.tensor(dense.shape[1 : 1 + len(layout.ragged_dims)], device=device)
                rows.append(sizes.expand(len(dense), -1).contiguous())
        return rows

    def encoded(self, leaves: Sequence[torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
        """The activation of a batch as `gather` would give it, without the store and on its own device."""
        return self.padded(self._encode(leaves, inputs, leaves[0].device), inputs)

    def gather(
        self, locations: torch.Tensor, inputs: Inputs, copied: Callable[[torch.Tensor], list[Leaf] | None] | None = None
    ) -> list[torch.Tensor]:
        """The rows at these places, ``[batch, (ragged,)* ...]`` in kept dtype, padded as the batch is.

        Of scaled leaves the whole numbers, and after them their scales: see `decode`. Zeros where a location is
        negative; one at least is not.

        Args:
            locations: ``[batch]`` int64.
            inputs: of the batch.
            copied: asked first, as `Resident.gather`; where it has not all of them, they come from the store.

        Raises:
            GoneRowsError: a row has left the store: look the keys up again.
        """
        at = (locations >= 0).nonzero()[:, 0]
        if len(at) == len(locations):
            return self.padded(self._gather(locations, copied), inputs)
        found = self.padded(self._gather(locations[at], copied), inputs, at)
        return [
            leaf.new_zeros((len(locations), *leaf.shape[1:])).index_copy_(0, at.to(leaf.device), leaf) for leaf in found
        ]

    def _gather(
        self, locations: torch.Tensor, copied: Callable[[torch.Tensor], list[Leaf] | None] | None
    ) -> Sequence[Leaf]:
        found = None if copied is None else copied(locations)
        return self.rows.gather(locations) if found is None else found

    def padded(self, rows: Sequence[Leaf], inputs: Inputs, at: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Rows as the store has them, or as `encode` gives them, padded as the batch is.

        Args:
            rows: of the batch's objects.
            inputs: of the batch.
            at: which of its objects they are of, if not of all.
        """
        kept = self.positions(inputs)
        if at is not None:
            kept = [None if mask is None else mask.index_select(0, at.to(mask.device)) for mask in kept]
        gathered = iter(rows)
        dense = []
        for layout in self.layouts:
            leaf = next(gathered)
            if isinstance(leaf, Ragged):
                sizes = next(gathered) if layout.sized else leaf.lengths[:, None]
                assert isinstance(sizes, torch.Tensor)
                if layout.free and bool((sizes != sizes[:1]).any()):
                    raise BatchError(
                        f"the rows of this batch have the sizes {sizes.tolist()[:4]}: objects of one batch must have "
                        "been computed at one padded length"
                    )
                shape = (len(sizes), *(sizes[0].tolist() if len(sizes) else ()))
                masks = self._masks(layout, kept, shape, leaf.values.device)
                leaf = layout.pad(leaf.values, leaf.lengths, *masks)
            dense.append(leaf)
            if layout.scaled:
                dense.append(next(gathered))
        return dense

    def merged(
        self, gathered: Sequence[torch.Tensor] | None, at: torch.Tensor, others: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """What `gather` gave, with what `encoded` gave at the places of objects without a row.

        Args:
            gathered: of the batch; None if none of its objects has a row.
            at: which objects have none, ascending.
            others: of these.
        """
        if gathered is None:
            return others
        for rows, other in zip(gathered, others, strict=True):
            if rows.shape[1:] != other.shape[1:]:
                raise BatchError(
                    f"the rows of this batch are {list(rows.shape[1:])}, and what is computed for the objects without "
                    f"one is {list(other.shape[1:])}: objects of one batch must have been computed at one padded length"
                )
        return [
            rows.index_copy(0, at.to(rows.device), other.to(rows.device))
            for rows, other in zip(gathered, others, strict=True)
        ]

    def decode(self, gathered: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `gather` gives, one for each leaf of the activation: whole numbers times their scales."""
        parts = iter(gathered)
        return [
            layout.dequantise(next(parts), next(parts)) if layout.scaled else next(parts) for layout in self.layouts
        ]

    def to_model(self, gathered: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `gather` gives, as the model's own leaves. May be views."""
        return [layout.to_model(rows) for layout, rows in zip(self.layouts, self.decode(gathered), strict=True)]

    def rounded(self, leaves: Sequence[torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
        """The activation of a batch as `decode` will give it, without the store."""
        return self.decode(self.padded(self.encode(leaves, inputs), inputs))

    def as_kept(self, leaves: Sequence[torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
        """The activation of a batch as `decode` gives it, before any loss of precision."""
        kept = self.positions(inputs)
        dense = []
        for layout, leaf in zip(self.layouts, leaves, strict=True):
            whole = replace(layout, kept=leaf.dtype)
            rows = whole.to_rows(leaf).cpu()
            if layout.ragged:
                masks = self._masks(layout, kept, rows.shape, rows.device)
                rows = whole.pad(*whole.trim(rows, *masks), *masks)
            dense.append(rows)
        return dense

    def _masks(
        self, layout: Layout, kept: Sequence[torch.Tensor | None], shape: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """Per ragged dimension, which of its places are kept: all of them, where it follows by no known law."""
        masks = []
        for at, by in enumerate(layout.ragged_by):
            mask = torch.ones(shape[0], shape[1 + at], dtype=torch.bool) if layout.free else kept[by]
            if mask is None:
                raise BatchError(
                    f"the batch has no '{self.sequences.masks[by]}', without which the padding of its rows is unknown"
                )
            masks.append(mask.to(device))
        return masks

    # -- batches -------------------------------------------------------------------------------------------------------

    def place(self, batch: Any, locations: torch.Tensor | None = None, resident: Resident | None = None) -> Any:
        """The batch with its rows in place of its inputs; the batch itself where none of its objects has a row.

        Args:
            batch: as the user's collate function gives it.
            locations: where the rows are, if that is known; else found by stand-ins or by content.
            resident: the rows' copy, if there is one.

        Raises:
            GoneRowsError: rows have left the store since they were found, if that was not now.
        """
        inputs = self.rule(batch)
        if locations is not None:
            return self.fill_in(batch, inputs, locations, resident=resident)
        tensors = inputs.tensors()
        stand_ins = [t for t in tensors.values() if isinstance(t, RecycledTensor)]
        if stand_ins:
            locations = stand_ins[0].locations
            if any(not torch.equal(t.locations, locations) for t in stand_ins[1:]):
                raise BatchError("the collate function ordered the inputs of a batch in different ways")
            return self.fill_in(batch, inputs, locations, resident=resident)
        if self.user_keys:
            return batch
        keys = self.keys(inputs)
        if resident is not None:
            found = self.rows.lookup(keys)
            locations = torch.from_numpy(np.where(found < 0, own_numbers(keys).numpy(), found))
            if (found >= 0).any() and resident.has(locations):
                return self.fill_in(batch, inputs, locations, resident=resident)
        found = self.find(keys, inputs)
        return batch if found is None else self.fill_in(batch, inputs, *found)

    def find(self, keys: np.ndarray, inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Locations and rows of a batch by its keys, as of `gather`; None where no object has a row."""
        for _ in range(TRIES):
            found = self.rows.lookup(keys)
            locations = torch.from_numpy(np.where(found < 0, own_numbers(keys).numpy(), found))
            if not (found >= 0).any():
                return None
            try:
                return locations, self.gather(locations, inputs)
            except GoneRowsError:
                self.rows.refresh()
        return None

    def fill_in(
        self,
        batch: Any,
        inputs: Inputs,
        locations: torch.Tensor,
        leaves: list[torch.Tensor] | None = None,
        *,
        resident: Resident | None = None,
    ) -> Any:
        """The batch with these rows in it.

        Args:
            batch: as the user's collate function gives it.
            inputs: of the batch.
            locations: where the rows are, ``[batch]`` int64; negative for objects without one.
            leaves: the rows, as of `gather`, if they have been gathered.
            resident: the rows' copy, if there is one.
        """
        for name, recycled in self.carriers(inputs, locations, leaves, resident=resident).items():
            if name in inputs.lists:
                for entry, one in zip(inputs.entries(name), recycled.unbind(0), strict=True):
                    batch = self._put(batch, name, entry, one)
            else:
                batch = self._put(batch, name, inputs.tensors()[name], recycled)
        return batch

    def carriers(
        self,
        inputs: Inputs,
        locations: torch.Tensor,
        leaves: list[torch.Tensor] | None = None,
        *,
        resident: Resident | None = None,
    ) -> dict[str, RecycledTensor]:
        """What takes the place of model inputs where rows are at hand: that which carries them first.

        Args:
            inputs: of a batch.
            locations: where the rows are, ``[batch]`` int64; negative for objects without one.
            leaves: the rows, as of `gather`, if they have been gathered.
            resident: the rows' copy: if it is on the model's device, rows are left to the model's next call.
        """
        tensors = inputs.tensors()
        misses = (locations < 0).nonzero()[:, 0]
        waits = resident is not None and resident.late and resident.has(locations)
        if leaves is None and len(misses) < len(locations) and not waits:
            leaves = self.gather(locations, inputs, None if resident is None else resident.gather)
        made: dict[str, RecycledTensor] = {}
        for name in [self.carrier, *sorted(self.absent - {self.carrier})]:
            given = tensors[name]
            if isinstance(given, RecycledTensor):
                value, missing = given.value, given.missing
            elif name in self.absent:
                value, missing = None, given.index_select(0, misses.to(given.device)) if len(misses) else None
            else:
                value, missing = given, None
            made[name] = RecycledTensor(  # pyright: ignore[reportCallIssue]
                given.shape,
                given.dtype,
                locations=locations,
                fingerprint=self.fingerprint,
                numbering=self.numbering,
                input_name=given.input_name if isinstance(given, RecycledTensor) else name,
                leaves=leaves if name == self.carrier else None,
                value=value,
                missing=missing,
                witnesses=self.witnesses(tensors) if name == self.carrier else None,
                device=given.device,
            )
        return made

    def _put(self, batch: Any, name: str, given: Any, recycled: Any) -> Any:
        path = path_of(batch, given)
        if path is None:
            raise BatchError(
                f"inputs= makes a new tensor for '{name}'; it must hand on the batch's own, so that the rows can take "
                "its place"
            )
        return with_leaf(batch, path, recycled)

    def witnesses(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of the other inputs that the rows were found under."""
        others = (name for name in self.key_inputs if name != self.carrier and name not in self.absent)
        return {name: tensors[name].clone() for name in others if not isinstance(tensors[name], RecycledTensor)}
