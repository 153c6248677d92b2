"""A model with its rows: divided, proven, filled, and called.

What the folder of rows belongs to, and whether the prefix is still that, is told by `torchrecycle.recycling.drift`;
what is put away by `torchrecycle.recycling.away`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate, default_convert

from torchrecycle.absent import Absent, RecycledTensor
from torchrecycle.augment import apply, tell_skipped
from torchrecycle.bypass import (
    BatchRule,
    Bypass,
    Inputs,
    Interceptor,
    OffloadReport,
    Padding,
    Plan,
    Probes,
    compare_autocast,
    device_of,
    evaluating,
    example_inputs,
    first_difference,
    make_plan,
    noise,
    parameter_names,
    prove,
    prove_rows,
    relative_difference,
    run_or_explain,
    sequences_of,
    take_rows,
)
from torchrecycle.codec import PRECISIONS, SCALE, Layout
from torchrecycle.cost import choose_cut, level_of_plan
from torchrecycle.data import (
    KnownManifests,
    Manifest,
    Marks,
    RecycledCollate,
    RecycledDataset,
    RecycledLoader,
    RowSource,
    StreamLoader,
    Tally,
    compare_samplers,
    draws,
    in_blocks,
    is_stream,
    viewed,
)
from torchrecycle.data.collate import MixedCollate
from torchrecycle.data.resident import Residency, Residents, refuse_residency
from torchrecycle.errors import (
    BatchError,
    CutError,
    GoneRowsError,
    RandomInputError,
    RecycleError,
    RecycleWarning,
    StaleActivationError,
    StoreError,
)
from torchrecycle.fill import FillReport, Keeping, fill_pass, fill_stream, takes_no_more
from torchrecycle.fingerprint import settings_of
from torchrecycle.recycling.arguments import Options, refuse_arguments, refuse_no_function, refuse_views
from torchrecycle.recycling.away import Away
from torchrecycle.recycling.datasets import NAMELESS, refuse_for_streams, refuse_no_map_style
from torchrecycle.recycling.drift import Drift, Example, stale
from torchrecycle.recycling.probe import Probe
from torchrecycle.recycling.reports import CheckReport, Stats
from torchrecycle.store import LeafSpec, Rows
from torchrecycle.trace import undisturbed

__all__ = ["Recycling", "fill_many"]

MOST = 64
"""Batches larger than this are tried at this size."""

AUTOMATIC = ("int8", "bfloat16", "float16")
"""What ``precision="auto"`` tries before the activation's own, smallest first; of two of one size that which reaches
further."""

FAR_BELOW_FLOAT16 = 1000.0
"""Where the example has no larger numbers than this, no later object will have one that float16 cannot hold."""

RAW_BATCHES = 10
"""After so many raw batches in training, and no recycled one, a loop is told that nothing is recycled."""


class Recycling:
    """A model, a cut and a store at work. Made by `recycle`; a context manager that detaches at its end."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        attached = Interceptor.of(model)
        if attached is not None:
            attached.bring_back()
        self.model = model
        self._options = options
        self.store = options.store
        self.stats = Stats()
        self._names = parameter_names(model)
        self._rule = BatchRule(self._names, options.example, options.inputs)
        self._known = Example(take_rows(example_inputs(model, self._rule, options.example), [0, 1]))
        self._sequences = sequences_of(self._example, options.mask)
        self.looks_up = False
        """Whether raw batches are looked up in the store, object by object: for a loop that makes its batches where no
        loader or collate function of ours can stand (a trainer that cuts batches into smaller ones). It reads its data
        as without us, and the prefix runs only for objects that have no row. `fill` makes the rows."""
        self._augment = options.augment
        self._away = Away(model, lambda: self.bypass, lambda: self._drift.watch, self._others)
        self._resident: Residency | None = options.resident
        self.residents = Residents()
        """The copies of rows in memory and on the GPU that its loaders have now."""
        self._paused = 0
        self._warned = self._warned_of_unfrozen = False
        self._thawed: dict[str, nn.Parameter] = {}
        """What `recut` has given back to training."""
        self._marks = Marks()
        self._keeping = Keeping(self._look_again, self._wrote)
        self._raw_batches: int | None = 0
        self._raw_padded = 0
        self._attached = False
        self._precision: str | None = None
        self._manifests: KnownManifests
        self._cut: str | Sequence[str] | None = options.cut
        self.bypass: Bypass
        self.source: RowSource
        self._drift: Drift
        self._counts: set[int] = set()
        self._build()

    # -- building ------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Divide the model, prove it, and open its rows; nothing is left behind if that fails."""
        with torch.inference_mode(False):  # what is made here is used in training too
            self._divide()

    def _divide(self) -> None:
        device = device_of(self.model)
        self._known = Example(self._example.map_tensors(lambda tensor: tensor.to(device).clone()))
        self._precision = None if self._options.precision == "auto" else self._options.precision
        with self._cast():  # which decides on the dtype of what is kept
            probes = run_or_explain(self.model, lambda: Probes.of(self.model, self._example, self._sequences))
            if self._cut is None:
                assert self._options.level is not None
                self._cut = choose_cut(self.model, probes, self._options.level)
            plan = make_plan(probes, self._cut)
        traced = probes.traces[0]
        self._level = level_of_plan(self.model, traced, plan)
        self._sequences = plan.sequences
        self._counts = {2, 4}  # which the proof tries
        self.bypass = Bypass(self.model, plan, traced, autocast=self._options.autocast, share=self._options.share)
        self.bypass.attach(self)
        try:
            padding = self._prove()
            if self._precision is not None:  # only now: rounded rows would look as if padding mattered to them
                plan.layouts = tuple(layout.kept_in(PRECISIONS[self._precision]) for layout in plan.layouts)
            self.source = self._open(plan, padding)
            if self._options.precision == "auto":
                self._choose_precision(plan, padding)
            self._manifests = KnownManifests(self.source, self._options.key, self._form())
        except BaseException:
            self.bypass.detach(self)
            raise
        self._attached = True

    def _cast(self) -> torch.autocast:
        """Autocast as it was declared; none, if none was."""
        declared = self._options.autocast
        return torch.autocast(self.device.type, dtype=declared or torch.bfloat16, enabled=declared is not None)

    def _prove(self) -> Padding:
        bypass, example = self.bypass, self._example
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            with self._cast():
                self.model.eval()
                with torch.no_grad():
                    prove(bypass, example)
                padding = prove_rows(bypass)
                with undisturbed(self.model):
                    self._known.reference = [leaf.detach().clone() for leaf in bypass.prefix(example)]
                self.model.train()
                with torch.enable_grad():
                    self._prove_training(bypass, example)
        finally:
            for module, training in flags:
                module.training = training
        return padding

    def _prove_training(self, bypass: Bypass, example: Inputs) -> None:
        try:
            prove(bypass, example)
        except RecycleError:
            raise
        except Exception:
            # In training mode it asks for more (a detector for its targets). The call that brings them is proven first.
            return

    def _choose_precision(self, plan: Plan, padding: Padding) -> None:
        """Keep rows in the smallest precision that loses less of the example than another batch composition does."""
        with undisturbed(self.model):
            leaves = self.bypass.prefix(self._example)
        own = self.source.as_kept(leaves, self._example)
        composition = self._composition(own)
        for name in AUTOMATIC:
            layouts = tuple(layout.kept_in(PRECISIONS[name]) for layout in plan.layouts)
            smaller = [n for n, layout in enumerate(layouts) if layout.kept.itemsize < layout.dtype.itemsize]
            if not smaller or (name == "float16" and max(own[n].abs().max() for n in smaller) > FAR_BELOW_FLOAT16):
                continue
            # What is as small already stays as it is.
            layouts = tuple(after if n in smaller else plan.layouts[n] for n, after in enumerate(layouts))
            try:
                rounded = replace(self.source, layouts=layouts).rounded(leaves, self._example)
            except BatchError:  # beyond what it can hold
                continue
            if all(relative_difference(own[n], rounded[n]) < composition[n] for n in smaller):
                plan.layouts, self._precision = layouts, name
                self.source = self._open(plan, padding)
                return

    def _composition(self, rows: Sequence[torch.Tensor]) -> list[float]:
        """Of each leaf, the largest difference that a batch of another size makes to the rows of the example."""
        found = [0.0 for _ in rows]
        for numbers in ([0], [0, 1] * 2, [0, 1] * 8):
            objects = take_rows(self._example, numbers)
            try:
                others = self._fresh_rows(objects)
            except RecycleError:
                raise
            except Exception:  # a model that does not run on one object
                continue
            same = min(2, len(numbers))
            for n, (a, b) in enumerate(zip(rows, others, strict=True)):
                found[n] = max(found[n], relative_difference(a[:same], b[:same]))
        return found

    def _open(self, plan: Plan, padding: Padding) -> RowSource:
        key_inputs = [name for name in self._example.tensors() if name in plan.read_before]
        if not key_inputs:
            raise CutError(f"cannot cut at '{plan.cut}': nothing before it depends on the batch")
        self._settings = self._make_settings(plan, padding, key_inputs)
        self._drift = Drift(self.model, self.bypass, self._known, self._settings, self._warn_of_hook)
        row_bytes = self._row_bytes(plan)
        only_before = [name for name in key_inputs if name not in plan.read_after]
        absent = frozenset(n for n in only_before if 8 * self._input_bytes(n) >= row_bytes and not self._is_padded(n))
        rows = self._open_rows(plan)
        return RowSource(
            rows=rows,
            fingerprint=self._drift.fingerprint.hex,
            rule=self._rule,
            layouts=plan.layouts,
            sequences=self._sequences,
            padding=padding,
            key_inputs=tuple(key_inputs),
            absent=absent,
            carrier=(only_before or key_inputs)[0],
            user_keys=self._options.key is not None,
        )

    def _make_settings(self, plan: Plan, padding: Padding, key_inputs: Sequence[str]) -> dict[str, Any]:
        plain = list(self._example.plain().items())
        settings = settings_of(
            plan.cut,
            plan.layouts,
            precision=self._precision,
            autocast=self._options.autocast,
            inputs=key_inputs,
            padding=f"{padding.right} {padding.left}" if self._sequences else "",
            key="user" if self._options.key is not None else "content",
        )
        recipes = [layout.recipe for layout in plan.layouts if layout.scaled]
        scales = {"scales": recipes} if recipes else {}
        return {**settings, **scales, "arguments": repr(plain), "steps": [(s.name, s.action) for s in plan.steps]}

    def _row_bytes(self, plan: Plan) -> int:
        rows = map(Layout.to_rows, plan.layouts, self.reference)
        return sum(layout.row_bytes(row[0].numel()) for layout, row in zip(plan.layouts, rows, strict=True))

    def _is_padded(self, name: str) -> bool:
        """Whether an input is as long as the batch's longest object: its collate function must see it to pad it."""
        return name in self._sequences.padded_names(self._example)

    def _input_bytes(self, name: str) -> int:
        tensor = self._example.tensors()[name]
        return tensor[0].numel() * tensor.itemsize

    def _open_rows(self, plan: Plan) -> Rows:
        specs = []
        for layout in plan.layouts:
            specs.append(LeafSpec(shape=layout.shape, ragged=layout.ragged, dtype=layout.kept))
            if layout.scaled:
                specs.append(LeafSpec(shape=layout.scale_shape, ragged=False, dtype=SCALE))
            if layout.sized:
                specs.append(LeafSpec(shape=(len(layout.ragged_dims),), ragged=False, dtype=torch.int64))
        about = {
            "model": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "cut": plan.cut,
            "level": self._level,
            "precision": self._precision or "own",
            "autocast": str(self._options.autocast),
            "modules": {s.name: s.action for s in plan.steps},
            "key inputs": self._settings["inputs"],
            "covers": "class, extra_repr, plain attributes, and dtype, shape and bytes of every parameter and buffer "
            "of these modules, and of every other parameter and constant that they read",
            **self._drift.fingerprint.to_about(),
        }
        rows = self.store.rows(self._drift.fingerprint.hex, specs, about)
        self._probe().compare(rows, self.store.url)
        return rows

    def _form(self) -> Any:
        """What tells how model inputs are found in a batch; None where a function of the user's does."""
        example = self._options.example
        if self._options.inputs is not None:
            return None
        if isinstance(example, Mapping):
            return ["dict", *map(str, example)]
        return ["tuple", len(example)] if isinstance(example, (tuple, list)) else ["tensor"]

    # -- fingerprint ---------------------------------------------------------------------------------------------------

    def fingerprint_on(self, model: nn.Module) -> str:
        """The fingerprint that this cut has on another model with the same names; empty where it has not these."""
        return self._drift.fingerprint_on(model)

    def _look_again(self, *, trying: bool = False) -> list[str]:
        """Hash the prefix again, and at times run it again: the names of what has changed."""
        changed = self._drift.look_again(trying=trying)
        self._warn_of_unfrozen()
        if changed:
            self._keeping.drop()
        else:
            self._keeping.take()
        return changed

    def _warn_of_hook(self, module: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a hook on '{module}' does not fire for batches whose rows are kept, since the module is not called "
                "then; it fires at fill and for raw batches. Put it on a module after the cut, or run within "
                "recycling.paused().",
                RecycleWarning,
                stacklevel=2,
            )

    def _warn_of_unfrozen(self) -> None:
        """Once, where a loop unfreezes layers bit by bit and those before the cut are among them."""
        if self._warned_of_unfrozen or not self._attached:
            return
        asking = [name for name, parameter in self.bypass.prefix_parameters.items() if parameter.requires_grad]
        if asking:
            self._warned_of_unfrozen = True
            more = f" and {len(asking) - 1} more" if len(asking) > 1 else ""
            warnings.warn(
                f"'{asking[0]}'{more} before the cut '{self.cut}' were made to ask for a gradient after attaching, and "
                "none reaches them: what is recycled does not train. To train these layers, move the cut before them "
                "(recycling.recut(...)) or detach(); if they are to stay frozen, this may be ignored.",
                RecycleWarning,
                stacklevel=2,
            )

    def _refuse_moved(self) -> None:
        """At each forward: has the prefix moved since the rows were found?"""
        if self._drift.is_due():
            self._look_again()
        if self._drift.changed:
            raise StaleActivationError(stale(self._drift.changed))

    def _probe(self) -> Probe:
        return Probe(self.model, self.bypass, self._example, self._sequences)

    def _write_probe(self) -> None:
        self._probe().write(self.source.rows, self.source.key_inputs)

    # -- what it works with --------------------------------------------------------------------------------------------

    @property
    def cut(self) -> str:
        """The name of the module whose output is kept."""
        return self.bypass.plan.cut

    @property
    def level(self) -> float:
        """The share of the blocks that is recycled."""
        return self._level

    @property
    def precision(self) -> str:
        """How the rows' floating point numbers are kept: ``float32``, ``int8``; several where leaves differ."""
        kept = (layout.kept for layout in self.source.layouts if layout.dtype.is_floating_point)
        return ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in kept)) or "own"

    @property
    def fingerprint(self) -> str:
        """128 bits in hexadecimal: all that a row depends on besides its object."""
        return self.source.fingerprint

    @property
    def _example(self) -> Inputs:
        """Two objects."""
        return self._known.inputs

    @property
    def reference(self) -> list[torch.Tensor]:
        """What the prefix gave for them."""
        return self._known.reference

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def off(self) -> bool:
        """Whether the same code now runs without recycling: `paused`, ``TORCHRECYCLE=off``, or detached."""
        return bool(self._paused) or not self._attached or os.environ.get("TORCHRECYCLE", "").lower() == "off"

    @property
    def augment(self) -> Callable[[Any], Any] | None:
        """What changes activations in training mode; may be set at any time."""
        return self._augment

    @augment.setter
    def augment(self, augment: Callable[[Any], Any] | None) -> None:
        refuse_no_function(augment)
        if augment is not self._augment:
            tell_skipped(self._augment)  # what it says of its last batch is of no batch to come
        self._augment = augment

    @property
    def resident(self) -> Residency | None:
        """Where loaders gather rows from; may be set at any time, and holds from their next iteration on."""
        return self._resident

    @resident.setter
    def resident(self, resident: Residency | None) -> None:
        refuse_residency(resident)
        self._resident = resident

    @property
    def mixed_modules(self) -> set[nn.Module]:
        """Modules that are called on both sides of the cut."""
        return self.bypass.mixed_modules

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is left to train: all of the model's parameters but those of the prefix that ask for a gradient."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def __repr__(self) -> str:
        return (
            f"Recycling({type(self.model).__name__} cut at '{self.cut}', level {self.level:.2f}, "
            f"{len(self.source.rows):,} rows in {self.store.url})"
        )

    # -- the model's own call ------------------------------------------------------------------------------------------

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model: with rows, raw, or without recycling."""
        self.bypass.refuse_lost()
        if self._thawed and self.model.training and torch.is_grad_enabled():
            self._thawed = _unknown_to_ddp(self._thawed)
        if self.bypass.interceptor.offloaded is not None:
            args, kwargs = self._where_the_rest_is(args, kwargs)
        try:
            inputs = Inputs(self._names, args, kwargs, self._rule.lists)
        except BatchError:  # objects of several sizes: no row would be of one object alone, so nothing is recycled
            if self._augments():
                raise
            return self.bypass.full(Inputs(self._names, args, kwargs))
        carriers = {name: value for name, value in inputs.items() if isinstance(value, RecycledTensor)}
        if not carriers:
            return self.bypass.full(inputs) if self.off and not self._augments() else self._raw(inputs)
        first = next(iter(carriers.values()))
        fitting = [
            entry
            for entry in self.bypass.interceptor.entries
            if isinstance(entry, Recycling) and entry.fingerprint == first.fingerprint
        ]
        own = [entry for entry in fitting if entry.source.numbering == first.numbering]
        return next(iter(own or fitting), self)._recycled(inputs, carriers)

    def _raw(self, inputs: Inputs) -> Any:
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for name, tensor in inputs.tensors().items() if name in self.source.key_inputs
        ):
            raise BatchError("a model input asks for a gradient, which the frozen prefix does not give. Detach it.")
        if not torch.is_grad_enabled() and self.source.carrier not in inputs.tensors():
            return self.bypass.full(inputs)  # generate() has run its encoder before
        carriers = self._looked_up(inputs) if self.looks_up and not self.off else {}
        if carriers:
            return self._recycled(inputs.replace(carriers), carriers)
        self._prove_signature(inputs, lambda: take_rows(inputs, range(min(4, inputs.batch()))))
        if not self.off:
            self._count_raw()
        began = time.perf_counter()
        captured: dict[int, Any] = {}
        leaves = self.bypass.prefix(inputs, captured=captured)
        middle = time.perf_counter()
        if self._augments():  # sees what it would see of the store: no values at padded places, the rows' precision
            leaves = self._augmented(self.source.to_model(self.source.encoded(leaves, inputs)))
        output = self.bypass.suffix(inputs, leaves, shared=self.bypass.plan.taken_shared(captured))
        self.stats.misses += inputs.batch()
        self.stats.prefix_seconds += middle - began
        self.stats.suffix_seconds += time.perf_counter() - middle
        return output

    def _where_the_rest_is(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """A call's tensors on the suffix's device: a loop that asks the first parameter has been told another."""
        device = self.device
        return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))

    def _augments(self) -> bool:
        """Whether activations are to be changed in this forward; what changes them is told if not."""
        if self._augment is not None and not self.model.training:
            tell_skipped(self._augment)
        return self._augment is not None and self.model.training

    def _augmented(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert self._augment is not None
        objects = [(layout.batch_dim, layout.per_object) for layout in self.bypass.plan.layouts]
        return apply(self._augment, leaves, objects)

    def _looked_up(self, inputs: Inputs) -> Mapping[str, RecycledTensor]:
        """What takes the place of a raw batch's inputs; nothing where none of its objects has a row."""
        tensors = inputs.tensors()
        if self.source.user_keys or any(name not in tensors for name in self.source.key_inputs):
            return {}
        found = self.source.find(self.source.keys(inputs), inputs)
        if found is None:
            return {}
        return self.source.carriers(inputs, found[0], [leaf.to(self.device) for leaf in found[1]])

    def _count_raw(self) -> None:
        """Warn once where a training loop feeds raw batches, and never a recycled one."""
        if not (self.model.training and torch.is_grad_enabled()):
            return
        if self._raw_batches is None:
            self._tell_of_padding()
            return
        self._raw_batches += 1
        if self._raw_batches < RAW_BATCHES:
            return
        self._raw_batches = None
        if any(not (known.locations >= 0).any() for known in self._manifests._known):
            return  # these may well be of our loader: the store took no row of a data set
        warnings.warn(
            f"{RAW_BATCHES} training batches came with their objects and none with kept rows: nothing is recycled, and "
            f"the frozen layers up to '{self.cut}' run for every batch. Take the batches from "
            "recycling.loader(dataset, ...), with the arguments of your DataLoader, or give your trainer "
            "recycling.dataset(dataset) and recycling.collate(collate_fn). If raw batches are meant, filter this "
            "RecycleWarning.",
            RecycleWarning,
            stacklevel=2,
        )

    def _tell_of_padding(self) -> None:
        """Once, where many batches are raw since their rows were computed in batches of another padded length."""
        padding = self.source.padding
        if not padding.because or padding.right or padding.left:
            return
        self._raw_padded += 1
        if self._raw_padded == RAW_BATCHES:
            warnings.warn(
                f"{RAW_BATCHES} training batches came with their objects: rows of this model depend on the padding "
                f"({padding.because}), so that an object's is found only in a batch that is padded to the length at "
                "which it was computed. Pad all objects to one length (padding='max_length'); where an output is named "
                "that the loop does not need, switch it off (a cache of transformers: model.config.use_cache = False) "
                "before recycle().",
                RecycleWarning,
                stacklevel=2,
            )

    def _recycled(self, inputs: Inputs, carriers: Mapping[str, RecycledTensor]) -> Any:
        if self.model.training:
            self._raw_batches = None
        self._refuse_other_rows(next(iter(carriers.values())).fingerprint)
        main = self._compare_carriers(carriers)
        self._refuse_moved()
        if main.locations.dim() == 0:
            raise BatchError("a single item came where a batch was expected: collate items into a batch first")
        given = inputs.replace({n: v.value if v.value is not None else _absent(n, v) for n, v in carriers.items()})
        with self._away.borrowed():
            self._prove_count_of_rows(main.rows)
        misses = main.misses
        hits = main.rows - len(misses)
        rows = main.leaves
        if rows is None and (hits or not len(misses)):
            rows = tuple(_moved(leaf, main.device) for leaf in self._gathered(main, given))
        self._compare_witnesses(main, given)
        with self._away.borrowed():
            self._prove_signature(given, lambda: self._some_of(given))
        if rows is not None:
            self.stats.bytes_read += sum(leaf.numel() * leaf.itemsize for leaf in rows) * hits // max(1, main.rows)
        if len(misses):
            rows = self.source.merged(rows, misses, self._rows_of_misses(misses, given, carriers))
        assert rows is not None
        leaves = self.source.to_model(rows)
        began = time.perf_counter()
        if self._augments():
            leaves = self._augmented(leaves)
        output = self.bypass.suffix(given, leaves)
        self.stats.suffix_seconds += time.perf_counter() - began
        self.stats.hits += hits
        self.stats.misses += len(misses)
        return output

    def _gathered(self, main: RecycledTensor, given: Inputs) -> list[torch.Tensor]:
        """Rows of a batch that holds none: they are on the model's device, or it was collated without our function."""
        if main.numbering != self.source.numbering:
            raise StaleActivationError(
                "this batch tells where its rows are, and was made by another recycling, or before this one was "
                "divided anew: the same places may hold other objects now. Make a new iterator of the loader."
            )
        try:
            return self.source.gather(
                main.locations, given, lambda locations: self.residents.gather(locations, main.numbering)
            )
        except GoneRowsError as error:
            raise GoneRowsError(
                f"{error}. Collate with recycling.collate(...), which reads objects whose rows have left, or make the "
                "data set again: recycling.dataset(...)."
            ) from error

    def _rows_of_misses(
        self, misses: torch.Tensor, given: Inputs, carriers: Mapping[str, RecycledTensor]
    ) -> list[torch.Tensor]:
        """The rows of a batch's objects that have none, computed, as the store would have given them.

        Args:
            misses: which objects, ascending.
            given: the call, with absent tensors for inputs that did not come along.
            carriers: these, with what came of them.
        """
        came = {name: value.missing for name, value in carriers.items() if value.value is None}
        objects = take_rows(given, misses.tolist()).replace(came)
        count = len(misses)
        if any(value is None or len(value) != count for value in came.values()):
            raise BatchError(
                f"a batch has {count} objects without a row, and not what the prefix reads of them: collate the items "
                "of recycling.dataset(...) with recycling.collate(...)"
            )
        if count == 1:  # as one of two: a forward may take another way for a single object
            objects = take_rows(objects, [0, 0])
        self._prove_signature(objects, lambda: take_rows(objects, range(min(4, objects.batch()))))
        began = time.perf_counter()
        leaves = self.bypass.prefix(objects)
        seconds = time.perf_counter() - began
        self.stats.prefix_seconds += seconds
        self.prove_count(objects, leaves)
        if self._keeping.on and self._keeping.refused is None:
            self._hold(objects, leaves, seconds)
        return [rows[:count] for rows in self.source.encoded(leaves, objects)]

    def _hold(self, objects: Inputs, leaves: list[torch.Tensor], seconds: float) -> None:
        """Keep rows that a forward of the user's has computed, under the content that it has read."""
        # His code has run since the prefix was hashed, and may have written where no counter sees it.
        cheap = self._drift.hash_seconds < 0.1 * seconds
        changed = self._look_again() if cheap else self._drift.try_again()
        if changed:
            raise StaleActivationError(stale(changed))
        self._keeping.hold(self.source, self.source.keys(objects), self.source.encode(leaves, objects))

    def _wrote(self, nbytes: int) -> None:
        self.stats.bytes_written += nbytes

    def _compare_carriers(self, carriers: Mapping[str, RecycledTensor]) -> RecycledTensor:
        """The one that carries the rows. All must stand for the same objects, each for its own input."""
        names = {self.source.carrier, *self.source.absent}
        main = carriers.get(self.source.carrier)
        for name in names | carriers.keys():
            other = carriers.get(name)
            if (
                main is None
                or other is None
                or name not in names
                or other.input_name != name
                or other.fingerprint != main.fingerprint
                or not (other is main or torch.equal(other.locations, main.locations))
            ):
                raise StaleActivationError(
                    f"the model input '{name}' does not belong to the same objects as the kept rows: it was replaced, "
                    "reordered or put in another place between loader and model. Change it in the data set."
                )
        assert main is not None
        for name, carrier in carriers.items():
            cast = carrier.lossy_cast()
            if cast is not None:
                raise BatchError(
                    f"the model input '{name}' was cast from {cast[0]} to {cast[1]} between loader and model. Its kept "
                    "rows were computed from what the data set gives, without that cast. Cast in the data set, before "
                    "the rows are made."
                )
        return main

    def _compare_witnesses(self, main: RecycledTensor, given: Inputs) -> None:
        tensors = given.tensors()
        for name, witness in main.witnesses.items():
            if name not in tensors or not torch.equal(witness, tensors[name]):
                raise StaleActivationError(
                    f"the model input '{name}' is not the one that the kept rows were computed with: it was changed "
                    "between loader and model, or belongs to other objects. Change it in the data set, before the "
                    "rows are made."
                )
        missing = [name for name in self.source.key_inputs if name not in tensors]
        if missing:
            raise BatchError(f"the model is called without {missing}, which the rows were computed with")

    def _prove_signature(self, inputs: Inputs, sample: Callable[[], Inputs]) -> None:
        signature = self.bypass.signature(inputs)
        if signature in self.bypass.proven:
            return
        call = sample()
        self._compare_rows(call)
        prove(self.bypass, call)
        self.bypass.proven.add(signature)

    def prove_count(self, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
        """Are the rows of a batch what two of its objects give alone? Asked once per number of objects.

        A forward may take another way for large batches (chunks), or for a single object.

        Raises:
            CutError: they are not.
        """
        count = inputs.batch()
        if count in self._counts:
            return
        some = [0, min(1, count - 1)]
        with undisturbed(self.model):
            alone = self.bypass.prefix(take_rows(inputs, some))
        self._compare_counts(count, leaves, some, alone, [0, 1])

    def _prove_count_of_rows(self, objects: int) -> None:
        """The same where a batch holds no objects, with the example's; up to `MOST`, for want of memory."""
        count = min(objects, MOST)
        if count in self._counts:
            return
        many = [row % 2 for row in range(count)]
        self._drift.follow()
        with undisturbed(self.model):
            leaves = self.bypass.prefix(take_rows(self._example, many))
        self._compare_counts(count, self.reference, many, leaves, list(range(count)))

    def _compare_counts(self, count: int, one: Any, its: list[int], other: Any, others: list[int]) -> None:
        for layout, *leaves in zip(self.bypass.plan.layouts, one, other, strict=True):
            a, b = (
                layout.to_rows(leaf).index_select(0, torch.tensor(index, device=leaf.device))
                for leaf, index in zip(leaves, (its, others), strict=True)
            )
            if a.shape != b.shape or relative_difference(a, b) > noise(layout.dtype, a.device):
                raise CutError(
                    f"cannot cut at '{self.cut}': what the prefix gives for an object in a batch of {count} is not "
                    "what it gives in a batch of 2, so it cannot be kept for the object. The forward takes another "
                    "way for such batches; cut before it."
                )
        self._counts.add(count)

    def _compare_rows(self, call: Inputs) -> None:
        """Other arguments or flags must not change the rows."""
        self._drift.follow()
        example = self._example.tensors()
        news = [name for name in call.tensors() if name not in example]
        for name in news:
            if self.bypass.prefix_reads(call, name):
                raise CutError(
                    f"the model is called with '{name}', which the prefix reads and the example does not have: the "
                    "kept rows were computed without it. Make the recycling with an example that has it."
                )
        with undisturbed(self.model):
            kept = {name: tensor for name, tensor in call.tensors().items() if name not in example}
            same = call.replace({n: t for n, t in example.items() if n in call.tensors()})
            same = same.replace({n: t[: self._example.batch()] for n, t in kept.items() if t.dim()})
            if any(t.dim() and t.shape[0] != self._example.batch() for t in same.tensors().values()):
                return  # fewer objects than the example: nothing to compare with
            fresh = self.bypass.prefix(same)
            for listed in same.with_lists_changed():
                with contextlib.suppress(TypeError, ValueError, RuntimeError, KeyError, AssertionError):
                    other = self.bypass.prefix(listed)
                    if first_difference(fresh, other):
                        fresh = other
        difference = first_difference(self.reference, fresh)
        if difference:
            raise StaleActivationError(
                "an argument or a flag of the model (see its config and attributes) was changed since the recycling "
                f"was made, and it changes what the prefix computes ({difference}). Put it back, or make another "
                "recycling."
            )

    def _some_of(self, inputs: Inputs) -> Inputs:
        """A few objects of a call to prove its signature with: its own, if all of their inputs came along."""
        if any(isinstance(tensor, Absent) for tensor in inputs.tensors().values()):
            return self._example_like(inputs)
        return take_rows(inputs, range(min(4, inputs.batch())))  # labels of tokens are as long as the batch's texts

    def _example_like(self, inputs: Inputs) -> Inputs:
        """The example's values in a call of this form; of inputs that the example has not, the first rows."""
        example = self._example.tensors()
        count = min(inputs.batch(), self._example.batch())
        inputs = take_rows(inputs, range(count))

        def value(name: str, given: Any) -> Any:
            if not isinstance(given, torch.Tensor):
                return given
            if given.dim() == 0:
                return given
            if name in example:
                return example[name][:count].to(device=given.device, dtype=given.dtype)
            return given.detach()

        return inputs.map(value)

    # -- rows for whoever runs the suffix by himself -------------------------------------------------------------------

    @property
    def keeps_one_tensor(self) -> bool:
        """Whether the cut gives one tensor with a row of one shape for each object, and nothing else is kept: then
        `activation` takes the place of a recycled batch."""
        plan = self.bypass.plan
        if len(plan.kept) != 1 or len(plan.layouts) != 1 or plan.layouts[0].ragged or plan.layouts[0].scaled:
            return False
        form = plan.forms[plan.kept[0]]
        return len(form.leaves) == 1 and bool(form.rows) and pytree.tree_structure(torch.empty(0)) == form.spec

    def activation(self, rows: torch.Tensor, fingerprint: str) -> torch.Tensor:
        """What the cut gives for some objects, made of their kept rows; the forward around the cut is not run.

        Args:
            rows: ``[batch, ...]`` as `RowSource.gather` gives them, on any device. May be handed on as they are.
            fingerprint: of the recycling that they were found by.

        Raises:
            BatchError: recycling is off, so that rows are not to be used.
            StaleActivationError: the prefix has moved since.
            AutocastError: autocast is not what the rows were made under.
        """
        self._refuse_other_rows(fingerprint)
        compare_autocast(self._options.autocast, rows.device.type)
        self._refuse_moved()
        self.stats.hits += len(rows)
        self.stats.bytes_read += rows.numel() * rows.itemsize
        leaf = self.bypass.plan.layouts[0].to_model(rows)
        return self._augmented([leaf])[0] if self._augments() else leaf

    def _refuse_other_rows(self, fingerprint: str) -> None:
        if self.off:
            raise BatchError(
                "a recycled batch came while recycling is off: it holds no objects. Make a new iterator of the "
                "loader within recycling.paused(), which then reads the data set."
            )
        if fingerprint != self.source.fingerprint:
            raise StaleActivationError(
                f"this batch holds rows of {fingerprint}, but the model's prefix now is "
                f"{self.source.fingerprint}. Make a new iterator of the loader: it fills anew."
            )

    # -- data sets -----------------------------------------------------------------------------------------------------

    def fill(
        self,
        dataset: Any,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        name: str | None = None,
        views: int | None = None,
    ) -> FillReport:
        """Compute and keep the rows of a data set that the store does not have. Resumes where it was stopped.

        Args:
            dataset: map-style; its items as for the user's own `DataLoader`. An iterable one is read to its end.
            batch_size: objects per prefix run.
            num_workers: processes that read the data set.
            collate_fn: the user's.
            name: the user's name for the data set with its transforms and targets; then it is not read again while the
                name stays.
            views: see `recycle`; what was given there if None. With more of them than before, what is new is computed.
        """
        arguments = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate_fn}
        return fill_many([self], dataset, name=name, views=views, **arguments)[0]

    def dataset(
        self,
        dataset: Any,
        *,
        collate_fn: Callable[[Any], Any] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        name: str | None = None,
        views: int | None = None,
    ) -> RecycledDataset:
        """The same data set reading rows instead of objects, for any trainer that takes a data set.

        What is missing is filled now. Give the trainer ``recycling.collate(collate_fn)`` beside it.

        Args:
            dataset: map-style. An iterable one is handed back as it is, since its rows are found by content, in the
                collate function; what is missing is then kept as the model computes it.
            collate_fn: the user's, needed here where items alone do not make a batch (tokenised texts of any length).
            batch_size: objects per prefix run at fill.
            num_workers: reading processes at fill.
            name: see `fill`.
            views: see `fill`. Which view of an object comes is drawn when it is asked for.
        """
        if is_stream(dataset):
            self._take_stream(name, views)
            return dataset
        arguments = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate_fn}
        return self._wrapped(dataset, name, arguments, views)

    def _wrapped(
        self, dataset: Any, name: str | None, fill_arguments: dict[str, Any], views: int | None
    ) -> RecycledDataset:
        refuse_no_map_style(dataset)
        views = self._options.views if views is None else views
        refuse_views(views)
        if self._options.key is not None and name is None:
            raise BatchError(NAMELESS)
        wrapped = RecycledDataset(dataset, self, views)
        wrapped.name = name
        wrapped.fill_arguments = fill_arguments
        self.renew(wrapped, made=True)
        return wrapped

    def collate(self, collate_fn: Callable[[Any], Any] | None = None) -> RecycledCollate:
        """The collate function for items of `dataset`; the user's own is called inside of it.

        It goes along with this recycling: within `paused` batches come as they are, and after `recut` with the rows of
        the new cut. Workers have what they were started with.
        """
        return MixedCollate(collate_fn, None if self.off else self.source, self._marks, self)

    def _collate(self, collate_fn: Callable[[Any], Any] | None) -> MixedCollate:
        """That of a loader of ours, which gives it the rows at each iteration."""
        return MixedCollate(collate_fn, None if self.off else self.source, self._marks)

    def loader(
        self, dataset: Any, *, name: str | None = None, views: int | None = None, **arguments: Any
    ) -> RecycledLoader:
        """A `DataLoader` whose batches hold rows: same type, keys and order as without us, for the same seed.

        Objects without a row (the store takes no more, or has evicted theirs meanwhile) are read and come in the same
        batch; the model computes them with its next call, which gives what it would give with all rows.

        Args:
            dataset: map-style. What the store lacks of it is filled now, with a progress bar. An iterable one is read
                and keyed in every epoch, in its own order: what the store lacks comes as it is, and the rows that the
                model computes of it are kept. ``batch_size=None`` is for one that gives batches.
            name: see `fill`; not for an iterable data set.
            views: see `recycle`; what was given there if None. An epoch has one view of each object, and while the
                recycling is off, objects are read as they come.
            **arguments: of ``torch.utils.data.DataLoader``; ``shuffle`` may also be ``"blocks"``, a random order for
                disks and networks that read neighbours faster than single rows: see `BlockShuffleSampler`. Memory is
                pinned, if not said otherwise, where the model is on a GPU.
        """
        collate_fn = arguments.pop("collate_fn", None)
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn={collate_fn!r} is no function")
        size = arguments.get("batch_size", 1)
        if is_stream(dataset):
            self._take_stream(name, views)
            return self._stream_loader(dataset, collate_fn, arguments)
        if size is None:
            raise BatchError(
                "batch_size=None gives single items or the data set's own batches, in which rows have no place: give "
                "batch_size=, or batch_sampler= for batches of your own."
            )
        refuse_no_map_style(dataset)
        compare_samplers(dataset, arguments)
        reading = {
            "batch_size": size if "batch_size" in arguments and isinstance(size, int) else 64,
            "num_workers": arguments.get("num_workers", 0),
            "collate_fn": collate_fn,
            "loader_arguments": {
                n: arguments[n] for n in ("multiprocessing_context", "worker_init_fn") if n in arguments
            },
        }
        wrapped = self._wrapped(dataset, name, reading, views)
        # Rows are copied to the device beside the computing only from pinned memory.
        arguments.setdefault("pin_memory", self.device.type == "cuda")
        return RecycledLoader(wrapped, collate_fn=self._collate(collate_fn), **in_blocks(wrapped, arguments))

    def _stream_loader(self, dataset: Any, collate_fn: Any, arguments: dict[str, Any]) -> Any:
        gives_batches = arguments.get("batch_size", 1) is None
        collate = self._collate(collate_fn or (default_convert if gives_batches else None))
        arguments.setdefault("pin_memory", self.device.type == "cuda")
        loader = StreamLoader(dataset, collate_fn=collate, **arguments)
        loader.owner, loader.tally = self, Tally(type(dataset).__name__)
        return loader

    def _take_stream(self, name: str | None, views: int | None) -> None:
        """From now on rows of iterable data sets are found and kept."""
        refuse_for_streams(self._options.key, name, self._options.views if views is None else views)
        self._marks.on = self._keeping.on = True
        self._keeping.refused = None

    def renew_stream(self, tally: Tally) -> None:
        """An epoch of an iterable data set begins: look whether the prefix is what it was, and what is in the store."""
        if self.off:
            return
        self._renew_prefix()
        self._keeping.on = not tally.useless
        self._keeping.publish(self.source)
        self.source.rows.refresh()
        tally.begin(self.source, self._keeping.kept)
        self._away.put()

    def end_of_stream(self, tally: Tally) -> None:
        """An epoch of an iterable data set has ended, or was broken off: what it has computed can be found."""
        if self.off:
            return
        self._keeping.publish(self.source)
        if self._keeping.refused is None:
            tally.judge(self._keeping.kept)

    def predict(self, dataset: Any, batch_size: int = 64, **arguments: Any) -> Any:
        """What the model gives for every object, in order: hits from the store, misses computed and kept.

        Runs in eval mode without gradient; training flags are as before afterwards. One view of each object: give a
        data set that draws nothing.

        Args:
            dataset: map-style.
            batch_size: objects per forward.
            **arguments: of ``torch.utils.data.DataLoader``.

        Returns:
            The model's output for all objects: tensors joined along the batch, on the CPU; nests of them likewise.
            Where outputs of batches differ in length, a list with one output per batch.
        """
        outputs = []
        with evaluating(self.model), self._cast(), self._read_once():
            for batch in self.loader(dataset, batch_size=batch_size, **{"views": 1, **arguments}):
                inputs = self._rule(batch).map_tensors(lambda tensor: tensor.to(self.device))
                output = self.model(*inputs.args, **inputs.kwargs)
                outputs.append(
                    pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, output)
                )
        return _joined(outputs)

    @contextmanager
    def _read_once(self) -> Iterator[None]:
        """Rows that are read once are copied nowhere, unless that is asked for."""
        before = self._resident
        self._resident = before or "disk"
        try:
            yield
        finally:
            self._resident = before

    def keys(self, batch: Any) -> np.ndarray:
        """The keys under which the rows of a raw batch's objects are kept: ``store.forget(key)`` erases one.

        Args:
            batch: as the user's own loader gives it.

        Returns:
            ``[batch, 16]`` uint8.

        Raises:
            BatchError: the batch is recycled itself, or its data set has user keys.
        """
        return self.source.keys(self._raw_inputs(batch, "keys() hashes"))

    def _raw_inputs(self, batch: Any, what: str) -> Inputs:
        inputs = self._rule(batch)
        if any(isinstance(tensor, RecycledTensor) for tensor in inputs.tensors().values()):
            raise BatchError(f"{what} what the objects give: it needs a raw batch, from your own loader")
        if self._options.key is not None:
            raise BatchError("with key=, a batch does not tell the keys of its objects; use verify_every=")
        return inputs

    def check(self, batch: Any) -> CheckReport:
        """Compare the kept rows of a raw batch's objects with fresh ones.

        Raises:
            BatchError: the batch is recycled itself, or its data set has user keys.
        """
        inputs = self._raw_inputs(batch, "check() compares rows with")
        located = self.source.find(self.source.keys(inputs), inputs)
        found = np.flatnonzero(located[0] >= 0) if located is not None else np.empty(0, dtype=np.int64)
        leaves = self._fresh_leaves(inputs)
        fresh = self.source.as_kept(leaves, inputs)
        alone = [self._fresh_rows(take_rows(inputs, [row])) for row in range(inputs.batch())]
        composition = max(
            (
                relative_difference(leaf[r : r + 1], alone[r][n])
                for n, leaf in enumerate(fresh)
                for r in range(len(leaf))
            ),
            default=0.0,
        )
        difference = 0.0
        if located is not None:
            index = torch.from_numpy(found)
            kept = self.source.decode(located[1])
            difference = max(
                relative_difference(a.index_select(0, index), b.index_select(0, index))
                for a, b in zip(fresh, kept, strict=True)
            )
        precision = max(map(relative_difference, fresh, self.source.rounded(leaves, inputs)), default=0.0)
        return CheckReport(inputs.batch(), len(found), difference, composition, precision)

    def _fresh_leaves(self, inputs: Inputs) -> list[torch.Tensor]:
        with undisturbed(self.model):
            return self.bypass.prefix(inputs.map_tensors(lambda tensor: tensor.to(self.device)))

    def _fresh_rows(self, inputs: Inputs) -> list[torch.Tensor]:
        """Rows of a raw batch as they would be kept, zeros at padded places, before any loss of precision."""
        return self.source.as_kept(self._fresh_leaves(inputs), inputs)

    # -- renewing ------------------------------------------------------------------------------------------------------

    def renew(self, dataset: RecycledDataset, *, made: bool = False) -> None:
        """Let a data set have the rows of the model as it is now; fills what is missing.

        Args:
            dataset: made by `dataset`.
            made: whether it was made just now: then the manifest is looked at more closely.
        """
        if self.off:
            return
        self._renew_prefix()
        known = self._manifests.of(dataset, lambda: self._fill(dataset), made=made)
        dataset.renew(known.manifest, known.locations, self.source, known.views)
        self._away.put()
        if dataset.resident is not None and dataset.resident.given is not known.locations:
            dataset.take_resident(None)  # before another one takes memory
        dataset.take_resident(
            self.residents.of(self._resident, self.source.rows, known.locations, self.source.numbering, self.device)
        )

    def _renew_prefix(self) -> None:
        """Divide the model anew if its prefix is not what it was."""
        self.bypass.interceptor.refuse_lost(self.bypass.plan.modules)
        if self.bypass.replaced() or self._look_again(trying=True):
            self._drift.refuse_reset()
            self._rebuild()

    def _fill(self, dataset: RecycledDataset) -> None:
        fill_many([self], dataset.base, name=dataset.name, views=dataset.asked_views, **dataset.fill_arguments)

    def recut(self, cut: str | Sequence[str] | None = None, *, level: float | None = None) -> Recycling:
        """Move the cut in the middle of a training: progressive freezing, or its opposite.

        Every parameter stays the object that it is, so that an optimiser keeps the state of what still trains. What is
        frozen now has no gradient, and optimisers pass it over; what is thawed trains again if the optimiser has it
        (make it of all of ``model.parameters()``, or add a group). Loaders go on: their next iteration fills the rows
        of the new cut. Rows of the old one stay in the store.

        Args:
            cut: as in `recycle`.
            level: in place of `cut`.

        Returns:
            This recycling.

        Raises:
            CutError: the model cannot be divided there; then everything is as before.
        """
        if (cut is None) == (level is None):
            raise CutError("give either recut('layer3') or recut(level=0.75). See cuts(model, example).")
        if not self._attached:
            raise CutError("this recycling has been detached: make a new one with recycle(model, example, cut=...)")
        refuse_arguments(
            self.model, cut, level, self.store, self._options.autocast, None, None, self._options.verify_every
        )
        self._keeping.publish(self.source)
        before = self.bypass.prefix_parameters
        self._rebuild(replace(self._options, cut=cut, level=level))
        self._thawed |= {name: p for name, p in before.items() if name not in self.bypass.prefix_parameters}
        return self

    def _rebuild(self, options: Options | None = None) -> None:
        """Divide the model anew, since the prefix or the cut has moved, and open the rows that belong to it now."""
        self._away.take_back()
        before = dict(self.__dict__)
        if options is not None:
            self._options, self._cut = options, options.cut
        self.bypass.detach(self)
        self._attached = False
        try:
            self._build()
        except BaseException:
            # As it was: the prefix stays frozen, and each forward says that its rows are stale.
            self.__dict__.update(before)
            self.bypass.attach(self)
            raise

    def _add_to_stats(self, report: FillReport) -> None:
        self.stats.misses += report.computed
        self.stats.bytes_written += report.bytes_written
        self.stats.prefix_seconds += report.prefix_seconds

    def keep_manifest(
        self,
        dataset: Any,
        name: str | None,
        collate_fn: Any,
        manifest: Manifest,
        *,
        asked_views: int = 1,
        views: int = 1,
    ) -> None:
        """Remember what was read of a data set, in this process and, if its identity allows, beside the rows.

        Args:
            dataset: the user's.
            name: the user's for it.
            collate_fn: the user's.
            manifest: of so many views.
            asked_views: how many views were asked for.
            views: how many there are.
        """
        self._manifests.keep(dataset, name, collate_fn, manifest, asked_views=asked_views, views=views)

    def watched(self, batches: Iterator[Any], loader: RecycledLoader) -> Iterator[Any]:
        """The batches, with one object in so many computed afresh and compared."""
        every = self._options.verify_every
        return self._with_canary(batches, loader, every) if every and not self.off else batches

    def _with_canary(self, batches: Iterator[Any], loader: RecycledLoader, every: int) -> Iterator[Any]:
        dataset = loader.dataset
        assert isinstance(dataset, RecycledDataset)
        for number, batch in enumerate(batches):
            if number % every == 0:
                self._canary(dataset, (number // every * 7919) % len(dataset.locations))
            yield batch

    def _canary(self, dataset: RecycledDataset, place: int) -> None:
        if dataset.locations[place] < 0:  # computed afresh in any case
            return
        with self._manifests.reading(dataset.base):
            collate_fn = dataset.fill_arguments.get("collate_fn") or default_collate
            inputs = self._rule(collate_fn(list(dataset.read([place]))))
        try:
            gathered = self.source.gather(dataset.locations[place : place + 1], inputs)
        except GoneRowsError:
            dataset.look_again()
            return
        kept = self.source.decode(gathered)
        fresh = self._fresh_rows(inputs)
        for layout, a, b in zip(self.bypass.plan.layouts, fresh, kept, strict=True):
            difference = relative_difference(a, b)
            if difference > max(noise(layout.kept), noise(layout.dtype, self.device)):
                index, view = place % len(dataset), place // len(dataset)
                seen = f" in view {view}" if dataset.views > 1 else ""
                raise StaleActivationError(
                    f"item {index}{seen} of the data set gives an activation that differs from its kept row by "
                    f"{difference:.2g} of its size: the data set or the model is not what it was when the rows were "
                    f"made. Remove the store's folder {self.fingerprint} and fill again."
                )

    # -- putting the prefix away ---------------------------------------------------------------------------------------

    def offload(self, folder: str | os.PathLike[str] | None = None) -> OffloadReport:
        """Free the memory that the prefix takes on the model's device, where all rows are kept.

        What only skipped layers read goes to the memory of the CPU; of a model on the CPU into a mapped file, so that
        the system can drop it. It comes back by itself where the prefix runs (a miss, a raw batch, a pause), and is
        put away again at the next iteration of a loader. `onload` is the inverse, and `detach` does it, too.

        Every parameter stays the object that it is: optimisers, ``state_dict`` and checkpoints go on working. Those of
        the prefix say another device meanwhile: a ``deepcopy`` needs ``.to(device)``, and DDP is put around the model
        before.

        Args:
            folder: for the mapped file, which has no name there; the store's if it is one on a disk, else the system's
                for temporary files.

        Returns:
            What was moved.

        Raises:
            CutError: this recycling has been detached.
            StoreError: there is no room for the file.
        """
        if not self._attached:
            raise CutError("this recycling has been detached: there is no prefix to put away")
        return self._away.ask([self.store.url, tempfile.gettempdir()] if folder is None else [os.fspath(folder)])

    def onload(self) -> None:
        """Have the prefix back on the model's device, for good: the inverse of `offload`."""
        self._away.end()

    def _others(self) -> Iterator[Bypass]:
        """What divides the model for its other recyclings."""
        for entry in self.bypass.interceptor.entries:
            if isinstance(entry, Recycling) and entry is not self:
                yield entry.bypass

    # -- pausing and detaching -----------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[Recycling]:
        """Within this context the same code runs without recycling: loaders read objects, the model runs in full.

        The prefix stays frozen, so that both compute the same.
        """
        self._paused += 1
        try:
            yield self
        finally:
            self._paused -= 1

    def detach(self) -> None:
        """Leave the model as it was, plus what it has learned: slots and ``requires_grad`` as before."""
        if self._attached:
            self._keeping.publish(self.source)
            self.onload()
            self._attached = False
            tell_skipped(self._augment)
            self.bypass.detach(self)

    def __recycle_state__(self) -> Any:
        """What a data set or a collate function that leads here depends on."""
        return self.model

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a Recycling cannot be copied or pickled, since it is tied to its model and to its store at work. Copy or "
            "save the model (the copy is a plain one), and call recycle() on it. Keep a Recycling out of modules that "
            "are copied."
        )

    def __enter__(self) -> Recycling:
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()


def _moved(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and not leaf.is_cuda:  # from pinned memory, so that the copy runs beside the computing
        return leaf.pin_memory().to(device, non_blocking=True)
    return leaf.to(device)


def _unknown_to_ddp(thawed: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What is still to be looked at: nothing, once a forward under DDP has been seen to average all of it.

    DDP looks at what asks for a gradient when it is put around a model, and never averages what was frozen then.

    Raises:
        CutError: something of that trains now, and the ranks would go apart in silence.
    """
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    asking = {name: parameter for name, parameter in thawed.items() if parameter.requires_grad}
    if wrapper is None or not asking:
        return thawed
    averaged = {id(p) for bucket in wrapper.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
    unknown = [name for name, parameter in asking.items() if id(parameter) not in averaged]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CutError(
            f"'{unknown[0]}'{more} train since recut(), and were frozen when DistributedDataParallel was put around "
            "the model: it does not average their gradients, and each process would train them by itself. Wrap the "
            "model anew after recut(): model = DistributedDataParallel(wrapped.module)."
        )
    return {}


def _absent(name: str, tensor: RecycledTensor) -> Absent:
    return Absent(tensor.shape, tensor.dtype, tensor.device, [name])


def _joined(outputs: list[Any]) -> Any:
    if not outputs:
        return outputs
    flat = [pytree.tree_flatten(output) for output in outputs]
    leaves = []
    for parts in zip(*(one for one, _ in flat), strict=True):
        if isinstance(parts[0], torch.Tensor) and parts[0].dim():
            if len({part.shape[1:] for part in parts}) > 1:
                return outputs
            leaves.append(torch.cat(parts))
        else:
            leaves.append(torch.stack(parts) if isinstance(parts[0], torch.Tensor) else parts[0])
    return pytree.tree_unflatten(leaves, flat[0][1])


def fill_many(
    recyclings: Sequence[Recycling],
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    name: str | None = None,
    loader_arguments: dict[str, Any] | None = None,
    views: int | None = None,
) -> list[FillReport]:
    """Fill several cuts in one pass over a data set: the deepest prefix runs once, and the others are taken on its way.

    Args:
        recyclings: of one model, or of models with the same weights before their cuts.
        dataset: map-style.
        batch_size: objects per prefix run.
        num_workers: reading processes.
        collate_fn: the user's.
        name: see `Recycling.fill`.
        loader_arguments: further ones of the `DataLoader` that reads: ``worker_init_fn``.
        views: see `Recycling.fill`.

    Returns:
        One report per recycling, in order.

    Raises:
        CutError: the cuts do not lie one behind the other, or their models differ before them.
    """
    if isinstance(recyclings, Recycling):
        raise TypeError("recyclings is one recycling: give a list, fill_many([a, b], dataset), or call a.fill(dataset)")
    if not recyclings:
        raise BatchError("fill_many needs at least one recycling")
    first = recyclings[0]
    asked = first._options.views if views is None else views
    refuse_views(asked)
    if views is None and any(recycling._options.views != asked for recycling in recyclings):
        raise BatchError("these recyclings were made with different views=: give fill_many one for all, views=4")
    if is_stream(dataset):
        refuse_for_streams(first._options.key, name, asked)
    else:
        refuse_no_map_style(dataset)
    refused: dict[int, StoreError] = {}
    for number, recycling in enumerate(recyclings):
        if not recycling._attached:
            raise BatchError("a recycling that has been detached cannot be filled")
        if recycling._options.key is not None and name is None:
            raise BatchError(NAMELESS)
        if (
            recycling._options.key is not first._options.key
            or recycling._manifests.form != first._manifests.form
            or (recycling._options.inputs is not first._options.inputs)
        ):
            raise BatchError(
                "recyclings that are filled in one pass must have the same key=, inputs= and form of example"
            )
        recycling._renew_prefix()
        try:
            recycling._write_probe()
        except StoreError as error:
            if not takes_no_more(error):
                raise
            refused[number] = error
    title = "filling " + ", ".join(f"'{r.cut}'" for r in recyclings)
    if is_stream(dataset):
        reports = fill_stream(
            recyclings,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            loader_arguments=loader_arguments,
            title=title,
            refused=refused,
        )
        for recycling, report in zip(recyclings, reports, strict=True):
            recycling._add_to_stats(report)
        return reports

    def one_pass(count: int) -> list[tuple[FillReport, Manifest]]:
        return fill_pass(
            recyclings,
            viewed(dataset, count),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            user_key=first._options.key,
            key_name=name,
            loader_arguments=loader_arguments,
            title=title,
            refused=refused,
        )

    kept = asked if asked > 1 and draws(dataset) else 1
    try:
        results = one_pass(kept)
    except RandomInputError:
        if kept == asked:
            raise
        kept = asked  # few items drew nothing, and another did
        results = one_pass(kept)
    reports = []
    for recycling, (report, manifest) in zip(recyclings, results, strict=True):
        recycling.keep_manifest(dataset, name, collate_fn, manifest, asked_views=asked, views=kept)
        recycling._add_to_stats(report)
        reports.append(report)
    return reports
