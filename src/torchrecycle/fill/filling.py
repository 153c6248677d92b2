"""The pass itself: batches in, rows and manifests out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from torchrecycle.bypass import Bypass, Inputs, first_difference, relative_difference, take_rows
from torchrecycle.data import Manifest, RowSource, Template, absent_column, make_column
from torchrecycle.errors import BatchError, CutError, RandomInputError
from torchrecycle.fill.reading import AbsentLeaf, Reading, Watched
from torchrecycle.progress import progress
from torchrecycle.trace import random_state, set_random_state

__all__ = ["FillReport", "Fillable", "fill_pass"]

SAMPLES = 8
"""How many items are read twice before all are read: a flip of a coin passes with a chance of 1 in 256."""


@dataclass(frozen=True, slots=True)
class FillReport:
    """What one pass over a data set did."""

    objects: int
    """Items read."""
    found: int
    """Items whose row was in the store already, or came twice."""
    computed: int
    """Items that the prefix ran for."""
    bytes_written: int
    """Bytes added to the store."""
    seconds: float
    """Wall time of the pass."""
    prefix_seconds: float
    """The part of it that the prefix took."""

    def __str__(self) -> str:
        if not self.computed:
            return f"nothing to fill: all {self.objects:,} objects are in the store ({self.seconds:.1f} s)"
        return (
            f"filled {self.computed:,} of {self.objects:,} objects, {self.bytes_written / 1e6:,.1f} MB, in "
            f"{self.seconds:.1f} s ({self.prefix_seconds:.1f} s of it in the frozen layers)"
        )


class Fillable(Protocol):
    """What the pass needs of a recycling."""

    bypass: Bypass
    source: RowSource
    reference: list[torch.Tensor]

    @property
    def device(self) -> torch.device: ...

    def fingerprint_on(self, model: nn.Module) -> str: ...

    def prove_count(self, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None: ...


def fill_pass(
    recyclings: Sequence[Fillable],
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    collate_fn: Callable[[Sequence[Any]], Any] | None = None,
    user_key: Callable[[Any], Any] | None = None,
    key_name: str | None = None,
    loader_arguments: dict[str, Any] | None = None,
    title: str = "filling",
) -> list[tuple[FillReport, Manifest]]:
    """Read a data set once; compute and keep the rows that are missing, for each of the recyclings.

    Generators are as before afterwards. An interruption keeps what was computed.

    Args:
        recyclings: of one model, or of models with the same weights before their cuts.
        dataset: map-style.
        batch_size: objects per batch.
        num_workers: reading processes.
        collate_fn: the user's.
        user_key: from an item to whatever identifies it; content is hashed if None.
        key_name: the name of the preprocessing, with `user_key`.
        loader_arguments: more for the `DataLoader`.
        title: what the progress bar says.

    Raises:
        BatchError: the data set's batches do not fit the example.
        RandomInputError: an item is different each time it is read.
    """
    state = random_state()
    absent = frozenset.intersection(*(r.source.absent for r in recyclings))
    some = frozenset().union(*(r.source.absent for r in recyclings))
    reading = Reading(collate_fn, recyclings[0].source.rule, some, absent, user_key, key_name)
    try:
        _read_twice(dataset, reading, recyclings[0].source)
        fill = _Pass(recyclings, len(dataset))
        loader = DataLoader(
            Watched(dataset),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=reading,
            **(loader_arguments or {}),
        )
        with progress(title, len(dataset)) as shown:
            try:
                for batch, template, at, leaves, user_keys in loader:
                    fill.add(reading.rule(batch), template, at, leaves, user_keys)
                    shown.advance(len(leaves))
            finally:
                fill.publish()
        return fill.results()
    finally:
        set_random_state(state)


def _read_twice(dataset: Any, reading: Reading, source: RowSource) -> None:
    """Generators that cannot be reached leave no trace: read some items twice and compare."""
    count = len(dataset)
    indices = sorted({round(i * (count - 1) / (SAMPLES - 1)) for i in range(SAMPLES)})
    watched = Watched(dataset)
    first, second = watched.__getitems__(indices), watched.__getitems__(indices)
    batches = [reading.collate_fn(items) for items in (first, second)]
    keys = [source.keys(source.rule(batch)) for batch in batches]
    if not np.array_equal(keys[0], keys[1]):
        again = source.keys(source.rule(reading.collate_fn(second)))
        who = "collate function" if not np.array_equal(keys[1], again) else "data set"
        raise RandomInputError(
            f"the {who} gives other model inputs each time it is asked for the same item: a random transform would be "
            "frozen at the moment of filling. Take it out, or seed it by item."
        )
    difference = first_difference(*batches)
    if difference:
        raise RandomInputError(
            f"the data set gives other targets each time it is asked for the same item ({difference}): one draw would "
            "be frozen at the moment of filling. Draw them in the loop, or seed them by item."
        )


class _Pass:
    """Rows, keys and targets of one pass, for several cuts."""

    def __init__(self, recyclings: Sequence[Fillable], objects: int) -> None:
        self.recyclings = recyclings
        self.deepest = _deepest(recyclings)
        self.began = time.perf_counter()
        self.objects = objects
        self.prefix_seconds = 0.0
        self.computed = [0] * len(recyclings)
        self.written = [r.source.rows.bytes_written for r in recyclings]
        self.keys: list[list[np.ndarray]] = [[] for _ in recyclings]
        self.pending: list[set[bytes]] = [set() for _ in recyclings]
        self.leaves: list[list[Any]] = []
        self.contents: dict[bytes, bytes] = {}
        self.template: Template | None = None
        self.inputs_at: dict[int, str] = {}

    def add(
        self, inputs: Inputs, template: Template, at: dict[int, str], leaves: list[list[Any]], user_keys: Any
    ) -> None:
        """One batch."""
        if self.template is None:
            self.template, self.inputs_at = template, at
        elif template != self.template or at != self.inputs_at:
            raise BatchError(
                f"an item is of another form than the first: {template.paths()} instead of {self.template.paths()}. "
                "All items of a data set must be nests of the same form."
            )
        self._compare_arguments(inputs)
        if user_keys is not None:
            self._compare_contents(user_keys, self.recyclings[0].source.keys(inputs))
        self.leaves.extend(leaves)
        missing: list[list[int]] = []
        for number, recycling in enumerate(self.recyclings):
            keys = recycling.source.keys(inputs) if user_keys is None else user_keys
            self.keys[number].append(keys)
            missing.append(self._missing(number, recycling.source, keys))
        wanted = sorted(set().union(*missing))
        if wanted:
            self._compute(inputs, wanted, missing)

    def _compare_arguments(self, inputs: Inputs) -> None:
        """Arguments that are no tensors are part of the fingerprint, as the example has them."""
        plain = inputs.plain()
        for recycling in self.recyclings:
            expected = recycling.bypass.plan.example.plain()
            if repr(plain) != repr(expected):
                raise BatchError(
                    f"a batch calls the model with {plain} where the example has {expected}: rows computed with other "
                    "arguments would be kept under the example's. Make the recycling with an example of these."
                )

    def _compare_contents(self, user_keys: np.ndarray, contents: np.ndarray) -> None:
        """With keys of the user's, one key must be one object."""
        for user, content in zip(user_keys, contents, strict=True):
            if self.contents.setdefault(user.tobytes(), content.tobytes()) != content.tobytes():
                raise BatchError(
                    "key= gives the same key for two objects of the data set that differ, so that one would get the "
                    "row of the other. Give a key that tells every object from every other."
                )

    def _missing(self, number: int, source: RowSource, keys: np.ndarray) -> list[int]:
        found = source.rows.lookup(keys)
        pending = self.pending[number]
        missing = []
        for row in np.flatnonzero(found < 0).tolist():
            digest = keys[row].tobytes()
            if digest not in pending:
                pending.add(digest)
                missing.append(row)
        return missing

    def _compute(self, inputs: Inputs, wanted: list[int], missing: list[list[int]]) -> None:
        if len(wanted) < inputs.batch():
            inputs = take_rows(inputs, wanted)
        began = time.perf_counter()
        on_device = inputs.map_tensors(lambda tensor: tensor.to(self.recyclings[0].device))
        activations = self.deepest.run(on_device)
        for recycling, leaves in zip(self.recyclings, activations, strict=True):
            recycling.prove_count(on_device, leaves)
        self.prefix_seconds += time.perf_counter() - began
        place = {row: i for i, row in enumerate(wanted)}
        for number, recycling in enumerate(self.recyclings):
            if missing[number]:
                digests = self.keys[number][-1][missing[number]]
                self._append(
                    number,
                    recycling,
                    activations[number],
                    inputs,
                    [place[r] for r in missing[number]],
                    digests,
                )

    def _append(
        self,
        number: int,
        recycling: Fillable,
        activation: list[torch.Tensor],
        inputs: Inputs,
        rows: list[int],
        digests: np.ndarray,
    ) -> None:
        source = recycling.source
        if len(rows) < inputs.batch():
            index = torch.tensor(rows)
            dims = [layout.batch_dim for layout in source.layouts]
            activation = [
                leaf.index_select(dim, index.to(leaf.device)) for leaf, dim in zip(activation, dims, strict=True)
            ]
            inputs = take_rows(inputs, rows)
        source.rows.append(digests, source.encode(activation, inputs))
        self.computed[number] += len(rows)

    def publish(self) -> None:
        for recycling in self.recyclings:
            recycling.source.rows.publish()

    def results(self) -> list[tuple[FillReport, Manifest]]:
        seconds = time.perf_counter() - self.began
        return [(self._report(n, r, seconds), self._manifest(n, r)) for n, r in enumerate(self.recyclings)]

    def _report(self, number: int, recycling: Fillable, seconds: float) -> FillReport:
        computed = self.computed[number]
        written = recycling.source.rows.bytes_written - self.written[number]
        return FillReport(self.objects, self.objects - computed, computed, written, seconds, self.prefix_seconds)

    def _manifest(self, number: int, recycling: Fillable) -> Manifest:
        assert self.template is not None
        columns = []
        for position, path in enumerate(self.template.paths()):
            leaves = [one[position] for one in self.leaves]
            where = "item" + "".join(f"[{step!r}]" for step in path)
            if self.inputs_at.get(position) in recycling.source.absent:
                columns.append(absent_column([_form(leaf)[0] for leaf in leaves], _form(leaves[0])[1]))
            else:
                columns.append(make_column(leaves, where))
        keys = np.concatenate(self.keys[number])
        return Manifest(keys, self.template, tuple(columns), dict(self.inputs_at))


def _form(leaf: Any) -> tuple[tuple[int, ...], torch.dtype]:
    given = leaf if isinstance(leaf, (AbsentLeaf, torch.Tensor)) else torch.as_tensor(leaf)
    return tuple(given.shape), given.dtype


# -- many cuts in one prefix run ---------------------------------------------------------------------------------------


class _Single:
    def __init__(self, recycling: Fillable) -> None:
        self.bypass = recycling.bypass

    def run(self, inputs: Inputs) -> list[list[torch.Tensor]]:
        return [self.bypass.prefix(inputs)]


class _Several:
    """Runs the deepest prefix and taps the other cuts on the way."""

    def __init__(self, recyclings: Sequence[Fillable], deepest: int) -> None:
        self.recyclings, self.deepest = recyclings, deepest
        self.bypass = recyclings[deepest].bypass
        modules = dict(self.bypass.model.named_modules())
        self.places: list[list[tuple[nn.Module, int]]] = []
        for recycling in recyclings:
            plan, occurrences = recycling.bypass.plan, recycling.bypass.occurrences
            self.places.append([(modules[name], occurrences[n]) for n, name in plan.kept_names()])
        self.taps = frozenset(place for places in self.places for place in places)
        self._check()

    def run(self, inputs: Inputs) -> list[list[torch.Tensor]]:
        tapped: dict[tuple[nn.Module, int], Any] = {}
        modules = list({module for module, _ in self.taps})
        self.bypass.interceptor.slots(modules)
        try:
            self.bypass.prefix(inputs, self.taps, tapped)
        finally:
            self.bypass.interceptor.free(modules)
        results = []
        for recycling, places in zip(self.recyclings, self.places, strict=True):
            plan = recycling.bypass.plan
            results.append(plan.taken({n: tapped[place] for n, place in zip(plan.kept, places, strict=True)}))
        return results

    def _check(self) -> None:
        """Every other cut's rows are what its own model gives, for its own example."""
        for number, recycling in enumerate(self.recyclings):
            if recycling.bypass is self.bypass:
                continue
            if recycling.bypass.autocast != self.bypass.autocast:
                raise CutError("recyclings under different autocast cannot be filled in one pass")
            if recycling.fingerprint_on(self.bypass.model) != recycling.source.fingerprint:
                raise CutError(
                    f"the models of the cuts '{recycling.bypass.plan.cut}' and '{self.bypass.plan.cut}' have "
                    "different weights before the cut, so that their rows cannot be filled in one pass. Fill them "
                    "one by one."
                )
            found = self.run(recycling.bypass.plan.example)[number]
            if any(relative_difference(a, b) > 0 for a, b in zip(recycling.reference, found, strict=True)):
                raise CutError(
                    f"the models of the cuts '{recycling.bypass.plan.cut}' and '{self.bypass.plan.cut}' compute "
                    "different things before the cut, so that their rows cannot be filled in one pass. Fill them one "
                    "by one."
                )


def _deepest(recyclings: Sequence[Fillable]) -> _Single | _Several:
    if len(recyclings) == 1:
        return _Single(recyclings[0])
    for number, recycling in enumerate(recyclings):
        ends = recycling.bypass.ends
        last = max(ends[place] for place in _places(recycling))
        if all(place in ends and ends[place] <= last for other in recyclings for place in _places(other)):
            return _Several(recyclings, number)
    raise CutError("these cuts do not lie one behind the other, so that no prefix run passes all of them")


def _places(recycling: Fillable) -> list[tuple[str, int]]:
    """Name and occurrence of the calls whose output a recycling keeps as its cut."""
    return [(cut.name, cut.occurrence) for cut in recycling.bypass.plan.cuts]
