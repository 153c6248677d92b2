"""The pass itself: batches in, rows and manifests out.

Of 8,144 photos each is read and hashed once, for the manifest, and the prefix runs for those that have no row. Where
eight processes fill at once, each claims a batch before it computes it and leaves to the others what they have claimed;
what one of them did not publish after all is read again at the end, and computed. Ranks of one training begin at
different items (`torchrecycle.fill.ranks`), and end with the same manifest.

When the disk is full after 5,000, the pass goes on reading, since training needs all keys and targets, and computes no
more: one warning says how many objects have rows. Rows that wait are dropped then, so that memory stays bounded.
"""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from torchrecycle.bypass import Bypass, Inputs, first_difference, relative_difference, take_rows
from torchrecycle.data import Manifest, RowSource, Template, Views, absent_column, make_column
from torchrecycle.data.views import some_of
from torchrecycle.errors import BatchError, CutError, RandomInputError, RecycleWarning, StoreError
from torchrecycle.fill.ranks import Ranks, ReadingOrder
from torchrecycle.fill.reading import AbsentLeaf, Reading, Watched, seen_changing
from torchrecycle.progress import progress
from torchrecycle.store.claims import claims_of
from torchrecycle.trace import random_state, set_random_state

__all__ = ["FillReport", "Fillable", "fill_pass", "takes_no_more"]

STUCK_SECONDS = 60.0
"""How long rows that a living process has claimed are waited for while none of them is published; it publishes twice in
that time."""

MANY = 100_000
"""From how many keys on those that have rows by now are forgotten."""

REFUSALS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full",
    errno.EFBIG: "is full",
    errno.EROFS: "cannot be written",
    errno.EACCES: "cannot be written",
    errno.EPERM: "cannot be written",
    errno.EMFILE: "cannot be written",
    errno.ENFILE: "cannot be written",
}
"""What a store that takes no more rows is, by the system's error. Any other error ends the pass."""


def takes_no_more(error: OSError) -> bool:
    """Whether a store is full or not to be written, so that filling ends and training goes on."""
    return error.errno in REFUSALS


@dataclass(frozen=True, slots=True)
class FillReport:
    """What one pass over a data set did."""

    objects: int
    """Items read."""
    found: int
    """Items whose row was in the store already, came twice, or was computed by another process meanwhile."""
    computed: int
    """Items that the prefix ran for, without those whose row the store did not take."""
    bytes_written: int
    """Bytes added to the store."""
    seconds: float
    """Wall time of the pass."""
    prefix_seconds: float
    """The part of it that the prefix took."""
    missing: int = 0
    """Items that have no row: the store took no more, or lost it meanwhile."""
    views: int = 1
    """In how many views each item was read. Each view counts as an item of its own."""

    def __str__(self) -> str:
        objects = f"{self.objects:,} objects"
        if self.views > 1:
            objects = f"{self.objects:,} views of {self.objects // self.views:,} objects"
        if not self.computed and not self.missing:
            return f"nothing to fill: all {objects} are in the store ({self.seconds:.1f} s)"
        text = (
            f"filled {self.computed:,} of {objects}, {self.bytes_written / 1e6:,.1f} MB, in "
            f"{self.seconds:.1f} s ({self.prefix_seconds:.1f} s of it in the frozen layers)"
        )
        return f"{text}; {self.missing:,} objects have no row" if self.missing else text


class Fillable(Protocol):
    """What the pass needs of a recycling."""

    bypass: Bypass
    source: RowSource

    @property
    def reference(self) -> list[torch.Tensor]: ...

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
    refused: Mapping[int, StoreError] | None = None,
) -> list[tuple[FillReport, Manifest]]:
    """Read a data set once; compute and keep the rows that are missing, for each of the recyclings.

    Generators are as before afterwards. An interruption keeps what was computed. What other processes are computing at
    the same time is left to them, and waited for at the end.

    Args:
        recyclings: of one model, or of models with the same weights before their cuts.
        dataset: map-style; `Views` of one to keep several of each item.
        batch_size: objects per batch.
        num_workers: reading processes.
        collate_fn: the user's.
        user_key: from an item to whatever identifies it; content is hashed if None.
        key_name: the name of the preprocessing, with `user_key`.
        loader_arguments: more for the `DataLoader`.
        title: what the progress bar says.
        refused: recyclings, by their number, whose store took not even a probe, and its error: nothing is computed for
            them, and the same warning tells of it.

    Returns:
        For each recycling what was done, and the manifest of the data set: of all its items, also where the store took
        no more rows, of which a `RecycleWarning` tells.

    Raises:
        BatchError: the data set's batches do not fit the example.
        RandomInputError: an item is different each time it is read, also under the same seed; or it draws random
            numbers, and is not read under one; or the collate function draws.
        StoreError: the store cannot be read, or not be written for another reason than want of space or permission.
    """
    state = random_state()
    absent = frozenset.intersection(*(r.source.absent for r in recyclings))
    some = frozenset().union(*(r.source.absent for r in recyclings))
    reading = Reading(collate_fn, recyclings[0].source.rule, some, absent, user_key, key_name)

    def batches(order: ReadingOrder | BatchSampler) -> Iterable[Any]:
        arguments = {**(loader_arguments or {}), "batch_sampler": order}
        return DataLoader(Watched(dataset), num_workers=num_workers, collate_fn=reading, **arguments)

    fill: _Pass | None = None
    try:
        _read_twice(dataset, reading, recyclings[0].source)
        for recycling in recyclings:
            # Rows that we know of may have left the store since.
            recycling.source.rows.refresh()
        order = ReadingOrder(len(dataset), batch_size, Ranks.present())
        fill = _Pass(recyclings, len(dataset), refused or {}, order.places())
        fill.views = dataset.count if isinstance(dataset, Views) else 1
        with progress(title, len(dataset)) as shown:
            try:
                for number, (batch, template, at, leaves, user_keys) in enumerate(batches(order)):
                    if number == order.own:  # the others come to these soon
                        fill.publish()
                    fill.add(reading.rule(batch), template, at, leaves, user_keys)
                    shown.advance(len(leaves))

                def read_again(indices: list[int]) -> Iterable[tuple[Inputs, np.ndarray | None]]:
                    chosen = BatchSampler(indices, batch_size, drop_last=False)
                    return ((reading.rule(batch), user) for batch, _, _, _, user in batches(chosen))

                fill.take_over(read_again)
            finally:
                fill.publish()
        return fill.results()
    finally:
        if fill is not None:
            fill.close()
        set_random_state(state)


def _read_twice(dataset: Any, reading: Reading, source: RowSource) -> None:
    """Generators that cannot be reached leave no trace: read some items twice and compare.

    A flip of a coin passes with a chance of 1 in 256.
    """
    indices = some_of(len(dataset))
    watched = Watched(dataset)
    first, second = watched.__getitems__(indices), watched.__getitems__(indices)
    batches = [reading.collated(items) for items in (first, second)]
    keys = [source.keys(source.rule(batch)) for batch in batches]
    step = "Draw from the global generators, or from one that the data set holds, so that views= can seed it"
    if not np.array_equal(keys[0], keys[1]):
        Watched(dataset).__getitems__(indices)  # a generator that was made at first use is there now, and is named
        again = source.keys(source.rule(reading.collated(second)))
        if not np.array_equal(keys[1], again):
            who, step = "collate function", "Draw in the data set's __getitem__ instead, and keep several views="
        else:
            base, objects = (dataset.base, len(dataset.base)) if isinstance(dataset, Views) else (dataset, len(dataset))
            item = indices[int((keys[0] != keys[1]).any(1).argmax())] % objects
            who = f"data set, a {type(base).__name__} (in {seen_changing(base, item)}),"
        seeded = " under the same seed" if isinstance(dataset, Views) else ""
        raise RandomInputError(
            f"the {who} gives other model inputs each time it is asked for the same item{seeded}, and no generator "
            f"that can be reached has moved: one draw would be frozen at the moment of filling. {step}; or take it out."
        )
    difference = first_difference(*batches)
    if difference:
        raise RandomInputError(
            f"the data set gives other targets each time it is asked for the same item ({difference}): one draw would "
            f"be frozen at the moment of filling. {step}; or draw them in the loop."
        )


def refuse_other_dtypes(inputs: Inputs, example: Inputs, names: Iterable[str]) -> None:
    """Whole numbers where the example has floating point ones are another function of the model, or none.

    Raises:
        BatchError: an input is such.
    """
    found, expected = inputs.tensors(), example.tensors()
    for name in names:
        if name in found and found[name].dtype.is_floating_point != expected[name].dtype.is_floating_point:
            raise BatchError(
                f"the model input '{name}' is {found[name].dtype} in a batch of the data set, and "
                f"{expected[name].dtype} in the example: the frozen layers are given what the data set gives. If the "
                "loop converts it, do that in the data set; else make the recycling with an example as the data set "
                "gives it."
            )


class _Pass:
    """Rows, keys and targets of one pass, for several cuts."""

    def __init__(
        self,
        recyclings: Sequence[Fillable],
        objects: int,
        refused: Mapping[int, StoreError],
        places: np.ndarray | None = None,
    ) -> None:
        self.recyclings = recyclings
        self.places = places
        """The index of each item in the order of reading, if that is not the data set's."""
        self.deepest = _deepest(recyclings)
        self.began = time.perf_counter()
        self.objects = objects
        self.views = 1
        self.prefix_seconds = 0.0
        self.computed = [0] * len(recyclings)
        self.written = [r.source.rows.bytes_written for r in recyclings]
        self.keys: list[list[np.ndarray]] = [[] for _ in recyclings]
        self.pending: list[set[bytes]] = [set() for _ in recyclings]
        """Keys that were computed, and may have no row yet."""
        self.deferred: list[dict[bytes, int]] = [{} for _ in recyclings]
        """Keys that another process has claimed, and an item that has each."""
        self.forget_at = [MANY] * len(recyclings)
        self.claims = [claims_of(r.source.rows) for r in recyclings]
        self.refused = [refused.get(number) for number in range(len(recyclings))]
        """Why a store takes no more rows."""
        self.slowest = 0.0
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
        first = len(self.leaves)
        self.leaves.extend(leaves)
        keys = self._keys(inputs, user_keys)
        for number, ours in enumerate(keys):
            self.keys[number].append(ours)
        self._compute(inputs, keys, [self._missing(number, ours, first) for number, ours in enumerate(keys)])

    def _keys(self, inputs: Inputs, user_keys: np.ndarray | None) -> list[np.ndarray]:
        return [r.source.keys(inputs) if user_keys is None else user_keys for r in self.recyclings]

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
            refuse_other_dtypes(inputs, recycling.bypass.plan.example, recycling.source.key_inputs)

    def _compare_contents(self, user_keys: np.ndarray, contents: np.ndarray) -> None:
        """With keys of the user's, one key must be one object."""
        for user, content in zip(user_keys, contents, strict=True):
            if self.contents.setdefault(user.tobytes(), content.tobytes()) != content.tobytes():
                raise BatchError(
                    "key= gives the same key for two objects of the data set that differ, so that one would get the "
                    "row of the other. Give a key that tells every object from every other."
                )

    def _missing(self, number: int, keys: np.ndarray, first: int) -> list[int]:
        """Which rows of a batch are missing and ours to compute; `first` is the item that the batch begins with."""
        if self.refused[number] is not None:
            return []
        pending, deferred = self.pending[number], self.deferred[number]
        new: dict[bytes, int] = {}
        for row in np.flatnonzero(self.recyclings[number].source.rows.lookup(keys) < 0).tolist():
            digest = keys[row].tobytes()
            if digest not in pending and digest not in deferred:
                new.setdefault(digest, row)
        if not new:
            return []
        rows = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        ours, theirs = self.claims[number].take(keys[rows])
        pending.update(keys[row].tobytes() for row in rows[ours])
        deferred.update((keys[row].tobytes(), self._index(first + row)) for row in rows[theirs].tolist())
        self._forget_found(number)
        return rows[ours].tolist()

    def _index(self, number: int) -> int:
        """Which item of the data set was the so manieth that was read."""
        return number if self.places is None else int(self.places[number])

    def _forget_found(self, number: int) -> None:
        """Of millions of keys, only those that have no row yet need to be remembered."""
        if len(self.pending[number]) + len(self.deferred[number]) < self.forget_at[number]:
            return
        pending, deferred = self._without_row(number, self.pending[number]), self.deferred[number]
        self.pending[number] = set(pending)
        self.deferred[number] = {digest: deferred[digest] for digest in self._without_row(number, deferred)}
        self.forget_at[number] = max(MANY, 2 * (len(self.pending[number]) + len(self.deferred[number])))

    def _without_row(self, number: int, digests: Iterable[bytes]) -> list[bytes]:
        listed = list(digests)
        found = self.recyclings[number].source.rows.lookup(_as_keys(listed)) >= 0
        return [digest for digest, there in zip(listed, found.tolist(), strict=True) if not there]

    def _compute(self, inputs: Inputs, keys: list[np.ndarray], missing: list[list[int]]) -> None:
        """Run the prefix for those rows of a batch that any of the recyclings misses."""
        wanted = sorted(set().union(*missing))
        if not wanted:
            return
        if len(wanted) < inputs.batch():
            inputs = take_rows(inputs, wanted)
        began = time.perf_counter()
        on_device = inputs.map_tensors(lambda tensor: tensor.to(self.recyclings[0].device))
        activations = self.deepest.run(on_device)
        for recycling, leaves in zip(self.recyclings, activations, strict=True):
            recycling.prove_count(on_device, leaves)
        seconds = time.perf_counter() - began
        self.prefix_seconds += seconds
        self.slowest = max(self.slowest, seconds)
        place = {row: i for i, row in enumerate(wanted)}
        for number, rows in enumerate(missing):
            if rows:
                self._append(number, activations[number], inputs, [place[row] for row in rows], keys[number][rows])

    def _append(
        self, number: int, activation: list[torch.Tensor], inputs: Inputs, rows: list[int], digests: np.ndarray
    ) -> None:
        source = self.recyclings[number].source
        if len(rows) < inputs.batch():
            index = torch.tensor(rows)
            dims = [layout.batch_dim for layout in source.layouts]
            activation = [
                leaf.index_select(dim, index.to(leaf.device)) for leaf, dim in zip(activation, dims, strict=True)
            ]
            inputs = take_rows(inputs, rows)
        self.computed[number] += len(rows)
        leaves = source.encode(activation, inputs)
        self._write(number, lambda: source.rows.append(digests, leaves))

    # -- the store takes no more ---------------------------------------------------------------------------------------

    def publish(self) -> None:
        for number, recycling in enumerate(self.recyclings):
            self._write(number, recycling.source.rows.publish)

    def _write(self, number: int, write: Callable[[], None]) -> None:
        """Append or publish. A store that takes no more gets no more."""
        if self.refused[number] is not None:
            return
        try:
            write()
        except StoreError as error:
            if not takes_no_more(error):
                raise
            self.refused[number] = error
            self.computed[number] -= self.recyclings[number].source.rows.discard()
            self.pending[number].clear()
            self.deferred[number].clear()
            self.claims[number].close()  # others may have more room

    def close(self) -> None:
        """Take back what was claimed. The rows that wait are published before, or others would compute them again."""
        for claims in self.claims:
            claims.close()

    # -- several processes ---------------------------------------------------------------------------------------------

    def take_over(self, read: Callable[[list[int]], Iterable[tuple[Inputs, np.ndarray | None]]]) -> None:
        """Wait for the rows that others had claimed; compute those that they have not published after all.

        Args:
            read: the batches of these items once more: inputs, and the user's keys.
        """
        waited, left, pause = time.monotonic(), -1, 0.02
        while True:
            self.publish()
            taken = [self._take(number) for number in range(len(self.recyclings))]
            indices = sorted({index for ours in taken for index in ours.values()})
            for inputs, user_keys in read(indices) if indices else ():
                self._compute_taken(inputs, user_keys, taken)
            if not any(self.deferred):
                return
            if indices:
                continue
            now, count = time.monotonic(), sum(map(len, self.deferred))
            if count != left:
                waited, left, pause = now, count, 0.02
            elif now - waited > max(STUCK_SECONDS, 4 * self.slowest):
                for claims, deferred in zip(self.claims, self.deferred, strict=True):
                    claims.disregard(_as_keys(list(deferred)))
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def _take(self, number: int) -> dict[bytes, int]:
        """Claim of the deferred keys those that have no row and whose process has ended, with an item of each."""
        deferred = self.deferred[number]
        if not deferred:
            return {}
        self.recyclings[number].source.rows.refresh()
        listed = list(deferred)
        ours, theirs = self.claims[number].take(_as_keys(listed))
        self.deferred[number] = {listed[at]: deferred[listed[at]] for at in np.flatnonzero(theirs).tolist()}
        return {listed[at]: deferred[listed[at]] for at in np.flatnonzero(ours).tolist()}

    def _compute_taken(self, inputs: Inputs, user_keys: np.ndarray | None, taken: list[dict[bytes, int]]) -> None:
        """Of items that were read again, compute what was taken. Of an item that is another by now, nothing is."""
        self._compare_arguments(inputs)
        if user_keys is not None:
            self._compare_contents(user_keys, self.recyclings[0].source.keys(inputs))
        keys = self._keys(inputs, user_keys)
        missing: list[list[int]] = []
        for number, ours in enumerate(keys):
            digests = [key.tobytes() for key in ours]
            missing.append([row for row, digest in enumerate(digests) if taken[number].pop(digest, None) is not None])
            if self.refused[number] is not None:
                missing[-1] = []
        self._compute(inputs, keys, missing)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def results(self) -> list[tuple[FillReport, Manifest]]:
        """Reports and manifests, after the last row was published."""
        self._sort()
        seconds = time.perf_counter() - self.began
        manifests = [self._manifest(number, recycling) for number, recycling in enumerate(self.recyclings)]
        reports = [self._report(number, manifest.keys, seconds) for number, manifest in enumerate(manifests)]
        self._warn_of_refusal(reports)
        return list(zip(reports, manifests, strict=True))

    def _sort(self) -> None:
        """What was read, in the order of the data set."""
        if self.places is None:
            return
        order = np.argsort(self.places)
        self.leaves = [self.leaves[at] for at in order.tolist()]
        self.keys = [[np.concatenate(parts)[order]] for parts in self.keys]
        self.places = None

    def _report(self, number: int, keys: np.ndarray, seconds: float) -> FillReport:
        rows, computed = self.recyclings[number].source.rows, self.computed[number]
        written = rows.bytes_written - self.written[number]
        if self.refused[number] is not None:
            rows.refresh()
        missing = int((rows.lookup(keys) < 0).sum())
        found = max(0, self.objects - computed - missing)
        return FillReport(self.objects, found, computed, written, seconds, self.prefix_seconds, missing, self.views)

    def _warn_of_refusal(self, reports: Sequence[FillReport]) -> None:
        full = [number for number, error in enumerate(self.refused) if error is not None and reports[number].missing]
        if not full:
            return
        error = self.refused[full[0]]
        assert error is not None
        assert error.errno is not None
        state = REFUSALS[error.errno]
        what = ", ".join(
            f"{report.objects - report.missing:,} of {report.objects:,} objects of '{self._cut(number)}' have rows"
            for number, report in ((number, reports[number]) for number in full)
        )
        missing = max(reports[number].missing for number in full)
        step = "Free some space" if state == "is full" else "Make it writable"
        warnings.warn(
            f"the store {state}, and filling has ended: {what}; the {missing:,} others are computed each time they are "
            f"used. {step}, or give store= another place, and fill again. ({error})",
            RecycleWarning,
            stacklevel=4,
        )

    def _cut(self, number: int) -> str:
        return ", ".join(cut.name for cut in self.recyclings[number].bypass.plan.cuts)

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


def _as_keys(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)


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
