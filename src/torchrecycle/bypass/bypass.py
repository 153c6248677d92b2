"""A cut model at work: run it up to its cut, from it on, or in full with the prefix frozen.

`Bypass` joins a model, the plan of one cut and the interceptor. Attached, it freezes the prefix's parameters, and its
three runs compute the same function to the bit: `full`, and `prefix` followed by `suffix`. That is proven for the
example at attach, and again for each new signature (other ranks, arguments or flags) before it is used.
"""

from __future__ import annotations

import bisect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecycle.absent import Absent, AbsentRead
from torchrecycle.bypass.example import device_of
from torchrecycle.bypass.forms import Size, TreeForm
from torchrecycle.bypass.inputs import Inputs, Listed
from torchrecycle.bypass.interceptor import Interceptor, Run, Stopped, absent_sources, evaluating
from torchrecycle.bypass.plan import Plan, Shared
from torchrecycle.bypass.probes import Probes, training
from torchrecycle.bypass.sequences import Sequences
from torchrecycle.errors import AutocastError, BatchError, CutError, StaleActivationError
from torchrecycle.trace import Trace, attributes_kept, random_state, set_random_state, undisturbed

__all__ = ["Bypass"]

SCALARS = (bool, int, float, str, type(None))


class Bypass:
    """One cut of one model. `attach` and `detach` are inverses.

    Args:
        model: the root.
        plan: what `make_plan` found.
        traced: the model's calls. What those around the cut do between their layers is not skipped, so their flags are
            part of a signature.
        autocast: the dtype under which the prefix runs, or None.
        share: ``"freeze"``: parameters that both halves read are frozen; ``"refuse"``: such a cut is refused.

    Raises:
        CutError: both halves read a parameter, and `share` is not ``"freeze"``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        traced: Trace,
        *,
        autocast: torch.dtype | None = None,
        share: str = "refuse",
    ) -> None:
        self.model = model
        self.plan = plan
        self.autocast = autocast
        self.clones = False
        """Whether the suffix writes into what is kept, so that copies must be handed out."""
        self.quiet = False
        """Whether the modules around the cut are in eval mode, too, until it is reached: their own forward drops
        something between the frozen layers in training mode (dropout after the embeddings, LayerDrop)."""
        self.proven: set[Any] = set()
        self.volatile: set[tuple[int, str]] = set()
        """Attributes that each forward changes: no flags."""
        self.interceptor = Interceptor.of(model) or Interceptor(model)
        self.attached = False
        around = {call.number: call.module for cut in plan.cuts for call in traced.ancestors(cut)}
        self._open = list(dict.fromkeys(around.values()))
        self._last_within = {
            module: cut.number for cut in plan.cuts for module in (call.module for call in traced.ancestors(cut))
        }
        self._prefix_parts = {part for module in plan.modules for part in module.modules()}
        run_after_all = {step.name for step in plan.steps if step.action == "run"}
        self._run_parts = {p for m, name in plan.modules.items() if name in run_after_all for p in m.modules()}
        self.written = traced.written
        """Attributes that the forward itself sets: no part of the fingerprint."""
        self.ends = {(call.name, call.occurrence): call.end for call in traced.calls}
        """When each call ends, in the order of running, by name and occurrence."""
        self.occurrences = {step.number: traced.calls[step.number].occurrence for step in plan.steps}
        self._absent_cache: dict[Any, dict[int, Any]] = {}
        self._forms: dict[Any, dict[int, TreeForm]] = {}
        self._shared: dict[Any, Shared] = {}
        self._is_free, self._shares = plan.free, plan.shares
        if not self._is_free:
            self._forms[self.shapes(plan.example)] = plan.forms
        self._share = share
        self._late: set[torch.Tensor] | None = None
        self._captured: dict[int, Any] = {}
        with self.slotted(), undisturbed(model):
            reads = _read_parameters(self)
        self.constants = reads.constants
        self.read_on_hits = reads.after | reads.glue
        """The parameters that a forward reads though the prefix is skipped."""
        self.buffers = reads.buffers
        """Names of buffers that the prefix reads, whichever module they belong to."""
        self.prefix_parameters, self.untouched = self._divide(reads, share)
        own = {id(p) for module in self._open for p in module.parameters(recurse=False)}
        unread = [name for name in self.untouched if id(model.get_parameter(name)) in own]
        self.sometimes = [name for name in unread if not self._trained_later(name)]
        """Parameters of the modules around the cut that the example does not use: other objects may (a token for what
        is missing), so that they count."""

    @property
    def mixed_modules(self) -> set[nn.Module]:
        """Modules that are called on both sides of the cut."""
        return {module for module, name in self.plan.modules.items() if name in self.plan.mixed}

    def _divide(self, reads: _Reads, share: str) -> tuple[dict[str, nn.Parameter], list[str]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._refuse_adapters()
        owned = {p for module in self.plan.prefix_modules for p in module.parameters()}
        before = owned | {p for p in reads.before if p in names}
        before |= _overlapping(before, names)
        shared = [names[p] for p in names if p in before and p in reads.after and self.interceptor.trains(p)]
        if shared and share != "freeze":
            raise CutError(
                f"cannot cut at '{self.plan.cut}': the layers before and after it share {_listed(shared)}, which "
                "would be frozen in one half and trained in the other. With recycle(..., share='freeze') it is "
                "frozen in both."
            )
        untouched = [name for p, name in names.items() if p not in before and p not in reads.after]
        return {names[p]: p for p in names if p in before}, untouched

    def _refuse_adapters(self) -> None:
        """An adapter is there to be trained, and before the cut it would not be."""
        for outer in self.plan.prefix_modules:
            for part in outer.modules():
                kinds = {k.__name__ for k in type(part).__mro__ if k.__module__.startswith("peft.")}
                if kinds & {"BaseTunerLayer", "ModulesToSaveWrapper"} and any(
                    self.interceptor.trains(p) for p in part.parameters()
                ):
                    where = self.plan.modules[outer]
                    raise CutError(
                        f"cannot cut at '{self.plan.cut}': '{where}' lies before it and holds an adapter "
                        f"({type(part).__name__} of PEFT, LoRA or the like), which would move if it were trained and "
                        "not learn if it were not. Put adapters on layers after the cut (layers_to_transform=, and "
                        "modules_to_save= with modules after it), or merge it first (merge_and_unload())."
                    )

    def _trained_later(self, name: str) -> bool:
        """Whether the suffix uses it in training mode (the embedding of what a wav2vec2 masks)."""
        parameter = self.model.get_parameter(name)
        if not self.interceptor.trains(parameter):
            return False
        if self._late is None:
            with self.slotted(), undisturbed(self.model), training(self.model):
                try:
                    leaves = [t.clone() for t in self.plan.taken(self._captured)]
                    self._late = _reads_after(self, self.plan.example, leaves)
                except (AbsentRead, Exception):  # it asks for targets
                    self._late = set()
        return parameter in self._late

    def refuse_late_reads(self, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
        """Does the suffix of this call, in the model's present mode, read a parameter that is frozen for the prefix?

        Raises:
            CutError: it does, and the parameter would silently not train.
        """
        if self._share == "freeze":
            return
        late = _reads_after(self, inputs, leaves)
        shared = [name for name, p in self.prefix_parameters.items() if p in late and self.interceptor.trains(p)]
        if shared:
            raise CutError(
                f"cannot cut at '{self.plan.cut}': in this call the layers after it read {_listed(shared)}, too, which "
                "are frozen with the layers before it. With recycle(..., share='freeze') they are frozen in both."
            )

    # -- attaching -----------------------------------------------------------------------------------------------------

    @contextmanager
    def slotted(self) -> Any:
        """The slots of the prefix modules, for the time of a probe."""
        modules = list(self.plan.modules)
        self.interceptor.slots(modules)
        try:
            yield
        finally:
            self.interceptor.free(modules)

    def attach(self, entry: Any) -> None:
        """Freeze the prefix and let the model's calls go to `entry`."""
        self.interceptor.slots(list(self.plan.modules))
        self._places = [self._place(module, name) for module, name in self.plan.modules.items() if name]
        self.interceptor.attach(entry)
        self.interceptor.freeze(self.prefix_parameters.values())
        self.attached = True

    def _place(self, module: nn.Module, name: str) -> tuple[dict[str, Any], str, nn.Module, str]:
        owner, _, key = name.rpartition(".")
        return self.model.get_submodule(owner)._modules, key, module, name

    def detach(self, entry: Any) -> None:
        """Undo `attach`."""
        self.attached = False
        now = {id(module): table.get(key) for table, key, module, _ in self._places}
        pairs = [(module, now.get(id(module), module)) for module in self.plan.prefix_modules]
        self.interceptor.thaw(self.prefix_parameters.values(), [(a, b) for a, b in pairs if b is not None])
        self.interceptor.detach(entry)
        self.interceptor.free(list(self.plan.modules))

    # -- running -------------------------------------------------------------------------------------------------------

    def full(self, inputs: Inputs) -> Any:
        """The ordinary forward, with the prefix in eval mode and without gradient."""
        run = self.plan.run("full")
        with self._turn(self._prefix_parts), self._quiet(run), self.interceptor.running(run):
            self.interceptor.bring_back()
            output = self.model._call_impl(*inputs.args, **inputs.kwargs)
        if run.position:  # else it was handed what the prefix gives, as generate() does after its encoder
            self._must_be_complete(run)
        return output

    def prefix(
        self,
        inputs: Inputs,
        taps: frozenset[tuple[nn.Module, int]] = frozenset(),
        tapped: dict[tuple[nn.Module, int], Any] | None = None,
        captured: dict[int, Any] | None = None,
    ) -> list[torch.Tensor]:
        """The activation's leaves as the model gives them; generators as before.

        Args:
            inputs: one call.
            taps: further calls, as (module, occurrence), whose output is written into `tapped`.
            tapped: takes what the taps saw.
            captured: takes what the kept calls returned, whole.
        """
        run = self.plan.run("prefix", self.autocast, taps=taps)
        run.forms, run.size = self._forms_for(inputs, self.shapes(inputs)), self.plan.size(inputs)
        device = _device(inputs)
        # Rows are made under the declared autocast, whatever is ambient. A forward may turn on another one by itself:
        # that of a model which Accelerate has prepared does.
        run.compares_autocast = True
        cast = torch.autocast(device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)
        with self._turn(self._prefix_parts, self.model):
            self.interceptor.bring_back()
            state = random_state()
            try:
                # What the glue writes into attributes is undone, since it runs again in the suffix.
                with attributes_kept(self._open), self.interceptor.running(run), evaluating(self.model), cast:
                    self.model._call_impl(*inputs.args, **inputs.kwargs)
            except Stopped:
                if tapped is not None:
                    tapped.update(run.tapped)
                if captured is not None:
                    captured.update(run.captured)
                # A view made without gradient could not be written by the suffix.
                return [_copied(leaf) if leaf._is_view() else leaf for leaf in self.plan.taken(run.captured)]
            finally:
                set_random_state(state)
        raise CutError(f"the forward ended before it reached '{self.plan.cut}'")

    def suffix(
        self,
        inputs: Inputs,
        leaves: Sequence[torch.Tensor],
        at_cut: Callable[[], None] | None = None,
        shared: Shared | None = None,
    ) -> Any:
        """The forward with the prefix skipped and `leaves` in place of what it gives.

        Args:
            inputs: one call.
            leaves: what `prefix` gives, or rows of a store.
            at_cut: called when the cut has been reached.
            shared: what the prefix run gave that is the same for all objects; looked up if left out.
        """
        size = self.plan.size(inputs)
        device = leaves[0].device
        if self.clones:
            leaves = [leaf.clone() for leaf in leaves]
        absent, kept = self._absent(inputs, size, device), self._kept(inputs, leaves, size, device, shared)
        run = self.plan.run("bypass", self.autocast, absent=absent, kept=kept)
        run.at_cut = at_cut
        try:
            with self._turn(self._run_parts), self._quiet(run), self.interceptor.running(run):
                output = self.model._call_impl(*inputs.args, **inputs.kwargs)
        except AbsentRead as stop:
            raise CutError(
                f"after the cut at '{self.plan.cut}' the model needs what was skipped: {stop.reason}. This did not "
                "happen for the example; make the recycling with an example like this batch."
            ) from stop
        self._must_be_complete(run)
        if absent_sources(output):
            raise CutError(f"what is skipped before '{self.plan.cut}' reaches the output of the model for this batch")
        return output

    def glue(self, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
        """Run what lies between the skipped calls, up to the cut.

        Raises:
            CutError: it does not lead to the cut.
        """
        size = self.plan.size(inputs)
        device = leaves[0].device
        absent, kept = self._absent(inputs, size, device), self._kept(inputs, leaves, size, device)
        run = self.plan.run("glue", absent=absent, kept=kept)
        try:
            with self._turn(self._run_parts), self._quiet(run), self.interceptor.running(run):
                self.model._call_impl(*inputs.args, **inputs.kwargs)
        except Stopped:
            return
        except AbsentRead as stop:
            raise CutError(f"before the cut at '{self.plan.cut}', {stop.reason}") from stop
        raise CutError(
            f"in training mode the forward may end before it reaches '{self.plan.cut}' (LayerDrop, or an early "
            "exit). Switch that off, or cut before it."
        )

    def refuse_lost(self) -> None:
        """At each forward: is the model still the one that was divided?

        Raises:
            CutError: a module of the prefix was compiled, sharded or replaced since.
        """
        self.interceptor.refuse_lost(self.plan.modules)
        name = self.replaced()
        if name:
            raise StaleActivationError(
                f"the frozen prefix has moved: '{name}' was replaced by another module since the rows were made. Make "
                "a new iterator of the loader: it fills anew."
            )

    def replaced(self) -> str:
        """The name of a module of the prefix in whose place there is another now; empty if there is none."""
        return next((name for table, key, module, name in self._places if table.get(key) is not module), "")

    def _is_loud(self) -> bool:
        """Whether flags must be switched for the time of a forward."""
        return self.quiet and any(module.training for module in self._open)

    @contextmanager
    def _quiet(self, run: Run) -> Iterator[None]:
        """The modules around the cut in eval mode until the run has reached it, if that is needed."""
        loud = [module for module in self._open if module.training] if self.quiet else []
        for module in loud:
            module.__dict__["training"] = False
            run.restored.setdefault(self._last_within[module], []).append(module)
        try:
            yield
        finally:
            for module in loud:
                module.__dict__["training"] = True

    def _turn(self, parts: Iterable[nn.Module], *more: nn.Module) -> Any:
        """One's turn among threads: alone where modules must be switched to eval mode for a moment."""
        return self.interceptor.turns.take(
            lambda: self._is_loud() or any([part.training for part in more]) or any([part.training for part in parts])
        )

    def _must_be_complete(self, run: Run) -> None:
        if run.position != len(run.steps):
            raise CutError(
                f"the model left out '{run.steps[run.position].name}' before the cut: it does not run its layers in "
                "the same order each time (LayerDrop, or a branch on a value). Switch that off, or cut before it."
            )

    def _absent(self, inputs: Inputs, size: Size, device: torch.device) -> dict[int, Any]:
        """What each skipped call returns for a batch of this size; made once per size."""
        shapes = self.shapes(inputs)
        token = (size, device, shapes)
        if token not in self._absent_cache:
            if len(self._absent_cache) >= 256:
                self._absent_cache.clear()
            forms = self._forms_for(inputs, shapes)
            skipped = [step.number for step in self.plan.steps if step.action == "skip"]
            self._absent_cache[token] = {n: forms[n].absent(size, device, n) for n in skipped}
        return self._absent_cache[token]

    def _kept(
        self,
        inputs: Inputs,
        leaves: Sequence[torch.Tensor],
        size: Size,
        device: torch.device,
        shared: Shared | None = None,
    ) -> dict[int, Any]:
        """What each kept call returns."""
        forms = self._forms_for(inputs, self.shapes(inputs)) if self._is_free else self.plan.forms
        if shared is None:
            kept = self._shared_at(inputs, size, device) if self._shares else {}
            shared = {n: {i: t.clone() for i, t in parts.items()} for n, parts in kept.items()}
        return self.plan.filled(leaves, shared, forms, size)

    def _shared_at(self, inputs: Inputs, size: Size, device: torch.device) -> Shared:
        """What kept calls return besides rows, which is the same for all objects: made once per length."""
        token = (size[1:], device, self.shapes(inputs), repr(inputs.plain()))
        if token not in self._shared:
            if len(self._shared) >= 256:
                self._shared.clear()
            like = self._like(inputs).map_tensors(lambda tensor: tensor.to(device))
            with undisturbed(self.model):
                captured: dict[int, Any] = {}
                self.prefix(like, captured=captured)
            shared = self.plan.taken_shared(captured)
            self._shared[token] = {n: {i: t.clone() for i, t in parts.items()} for n, parts in shared.items()}
        return self._shared[token]

    def _like(self, inputs: Inputs) -> Inputs:
        """Two objects of the example in a call of this form: at its lengths, with its arguments."""
        tensors = inputs.tensors()
        resized = self.plan.sequences.resized(self.plan.example, self.plan.sequences.lengths(inputs)).tensors()

        def value(name: str, given: Any) -> Any:
            if not isinstance(given, torch.Tensor) or not given.dim():
                return given
            own = resized.get(name)
            if own is not None and own.shape[1:] == given.shape[1:]:
                return own
            return torch.zeros((2, *given.shape[1:]), dtype=given.dtype, device=next(iter(resized.values())).device)

        return inputs.replace({name: value(name, tensors[name]) for name in tensors})

    def shapes(self, inputs: Inputs) -> tuple[Any, ...]:
        """The shapes of the tensor inputs, without the number of objects and of tokens."""
        tensors = inputs.tensors()
        sequences = self.plan.sequences
        shapes: list[Any] = []
        for name, tensor in tensors.items():
            if name in self.plan.read_before:
                follows = None if self._is_free else sequences.of(name, tensor.shape, tensors)
                rest = tensor.shape[1:] if follows is None else (f"tokens {follows}", *tensor.shape[2:])
                shapes.append((name, *rest))
        return tuple(shapes)

    def _forms_for(self, inputs: Inputs, shapes: tuple[Any, ...]) -> dict[int, TreeForm]:
        """The forms of what is skipped or kept, found by a run where the inputs have other shapes than the example."""
        if shapes not in self._forms:
            if len(self._forms) >= 256:
                self._forms.clear()
            like = self.plan.sequences.without_padding(self._like(inputs))
            sequences = Sequences() if self._is_free else self.plan.sequences
            self.interceptor.bring_back()
            probes = Probes.of(self.model, like.map_tensors(lambda t: t.to(self.device)), sequences)
            found: dict[int, TreeForm] = {}
            for step in self.plan.steps:
                call = probes.traces[0].calls[step.number]
                form = probes.form(call)
                if call.name != step.name or (isinstance(form, str) and step.action != "run"):
                    raise BatchError(
                        f"for inputs of the shapes {shapes} the model runs other layers before '{self.plan.cut}' "
                        "than for the example; make another recycling with an example of this size"
                    )
                if isinstance(form, TreeForm):
                    found[step.number] = form
            self._forms[shapes] = found
        return self._forms[shapes]

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def prefix_reads(self, inputs: Inputs, name: str) -> bool:
        """Whether what is kept depends on that tensor input."""
        without = inputs.replace({name: Absent.like(inputs.tensors()[name], [name])})
        captured: dict[int, Any] = {}
        try:
            with undisturbed(self.model):
                self.prefix(without, captured=captured)
        except AutocastError:
            raise
        except (AbsentRead, Exception):
            return True
        return bool(absent_sources(captured))

    # -- signatures ----------------------------------------------------------------------------------------------------

    def signature(self, inputs: Inputs) -> Any:
        """All that the path through the model may depend on besides values.

        Raises:
            BatchError: an argument is neither a tensor nor a plain value.
        """
        arguments = []
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                arguments.append((name, value.dtype, value.dim()))
            elif isinstance(value, Listed):
                arguments.append((name, Listed, tuple(value.entries[0])))
            elif isinstance(value, (*SCALARS, torch.dtype, torch.device)):
                arguments.append((name, type(value), value))
            elif isinstance(value, (tuple, list)) and all(isinstance(part, SCALARS) for part in value):
                arguments.append((name, type(value), tuple(value)))
            else:
                raise BatchError(
                    f"the model's argument '{name}' is a {type(value).__name__}; with recycling, arguments are "
                    "tensors, nests of tensors and plain values"
                )
        with self.interceptor.turns.take(bool):  # no flag is switched for a moment by another thread
            return tuple(arguments), self.shapes(inputs), torch.is_grad_enabled(), self.flags()

    def flags(self) -> tuple[Any, ...]:
        """The plain attributes of the modules around the cut and of their configs."""
        found: list[Any] = []
        for position, module in enumerate(self._open):
            found.extend(self._scalars(position, module.__dict__))
            config = module.__dict__.get("config")
            if config is not None and hasattr(config, "__dict__"):
                found.extend(self._scalars(position, config.__dict__))
        return tuple(found)

    def _scalars(self, position: int, attributes: dict[str, Any]) -> list[tuple[int, str, Any]]:
        volatile = self.volatile
        found = []
        for name, value in attributes.items():
            if name in _OF_ANY_MODULE or name in _INERT or (position, name) in volatile:
                continue
            if not isinstance(value, SCALARS):
                value = _in_words(value, 0)
                if value is None:
                    continue
            found.append((position, name, value))
        return found


_OF_ANY_MODULE = frozenset(nn.Module().__dict__) - {"training", "_forward_hooks", "_forward_pre_hooks"}


_INERT = frozenset({"pretrained_cfg", "default_cfg", "feature_info"})
"""What timm writes down about a model: long, and read by no forward."""


def _in_words(value: Any, depth: int) -> Any:
    """A nest of plain values, hooks, or a tensor's identity and version as something to compare; None for all else."""
    if isinstance(value, SCALARS):
        return (type(value).__name__, value)
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if depth > 3:
        return None
    if isinstance(value, dict):
        if not value:
            return None
        return tuple((str(name), _in_words(part, depth + 1)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_in_words(part, depth + 1) for part in value) if len(value) <= 256 else None
    if isinstance(value, types.FunctionType):
        return id(value)
    if isinstance(value, (nn.Module, type, types.ModuleType)) or not hasattr(value, "__dict__"):
        return None
    if type(value).__module__.partition(".")[0] in ("torch", "transformers"):  # configs are looked at by themselves
        return None
    return tuple((name, _in_words(part, depth + 1)) for name, part in vars(value).items())


def _copied(leaf: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps and all: other strides can change the last bits of what the suffix gives."""
    made = leaf.clone()
    if made.stride() == leaf.stride() or 0 in leaf.stride():
        return made
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def _overlapping(some: set[Any], all_parameters: Iterable[nn.Parameter]) -> set[Any]:
    """The other parameters that lie in the same memory: tied by ``nn.Parameter(other.data)``."""

    def place(p: Any) -> tuple[int, int] | None:
        return (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) if type(p) is nn.Parameter else None

    taken = sorted(found for p in some if (found := place(p)) and found[0])
    starts = [start for start, _ in taken]
    tied = set()
    for p in all_parameters:
        where = place(p)
        if where is None or not where[0] or p in some:
            continue
        at = bisect.bisect_left(starts, where[1])
        if at and taken[at - 1][1] > where[0]:
            tied.add(p)
    return tied


def _device(inputs: Inputs) -> torch.device:
    return next(iter(inputs.tensors().values())).device


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# -- who reads which parameter -----------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Sees each tensor that an operation is given, and on which side of the cut.

    The glue before the cut runs in a bypass run too; a parameter that it reads is the suffix's only if something that
    was made from it is used after the cut.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.before: set[torch.Tensor] = set()
        self.after: set[torch.Tensor] = set()
        self.glue: set[torch.Tensor] = set()
        """What is read before the cut though the prefix is skipped."""
        self.constants: list[torch.Tensor] = []
        self.run: Run | None = None
        """The bypass run under way; None in the prefix run."""
        self.buffers: list[str] = []
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self._known = {id(t) for t in (*model.parameters(), *model.buffers(), *inputs.tensors().values())}
        self._from: dict[int, frozenset[torch.Tensor]] = {id(p): frozenset([p]) for p in model.parameters()}
        self._made: dict[int, Any] = {}
        self._live: set[int] = set()
        self._between = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        parameters = frozenset().union(*(self._from.get(id(t), frozenset()) for t in given))
        if self._between or any(id(t) in self._live for t in given):
            self.after |= parameters
        elif self.run is None:
            self.before |= parameters
            self._note_constants(given)
        elif self.run._in_run:
            self.before |= parameters
        elif self.run.position == len(self.run.steps):
            self.after |= parameters
        else:
            self.glue |= parameters
        output = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._made[id(leaf)] = leaf  # held, so that its id is not given again
                if self.run is not None and parameters and not isinstance(leaf, Absent):
                    self._from[id(leaf)] = parameters
                if any(id(t) in self._live for t in given):
                    self._live.add(id(leaf))
        return output

    def apart(self, plan: Plan) -> None:
        """Of a joint cut, what lies between the first cut and the last is no prefix: it trains.

        It is known by the modules that run there, and, between them, by what is computed from a cut's output.
        """
        if len(plan.cuts) < 2:
            return
        for module in plan.between:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)
        for module in {cut.module for cut in plan.cuts}:
            module.register_forward_hook(self._follow)

    def _enter(self, *_: Any) -> None:
        self._between += 1

    def _leave(self, *_: Any) -> None:
        self._between -= 1

    def _follow(self, module: nn.Module, args: Any, output: Any) -> None:
        self.follow(output)

    def follow(self, tree: Any) -> None:
        """What is computed from these comes after a cut, even if another cut is still to come."""
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                self._made[id(leaf)] = leaf
                self._live.add(id(leaf))

    def _note_constants(self, given: Sequence[torch.Tensor]) -> None:
        for tensor in given:
            name = self._buffers.get(id(tensor))
            if name is not None and name not in self.buffers:
                self.buffers.append(name)
            if id(tensor) not in self._known and id(tensor) not in self._made:
                self._made[id(tensor)] = tensor
                self.constants.append(tensor)


def _read_parameters(bypass: Bypass) -> _Reads:
    """Run both halves on the example and write down which parameters each reads."""
    plan, inputs = bypass.plan, bypass.plan.example
    reads = _Reads(bypass.model, inputs)
    reads.apart(plan)
    size = plan.size(inputs)
    cast = _cast(bypass.autocast, _device(inputs))
    with reads, cast, evaluating(bypass.model):
        run = plan.run("prefix")
        state = random_state()
        try:
            with bypass.interceptor.running(run):
                bypass.model._call_impl(*inputs.args, **inputs.kwargs)
        except Stopped:
            pass
        set_random_state(state)
    captured = bypass._captured = run.captured
    leaves = plan.taken(captured)
    run = plan.run("bypass", bypass.autocast, kept=captured)
    run.absent = bypass._absent(inputs, size, leaves[0].device)
    reads.run = run
    if len(plan.cuts) > 1:
        reads.follow([captured[cut.number] for cut in plan.cuts])
    with reads, cast, evaluating(bypass.model), bypass.interceptor.running(run):
        bypass.model._call_impl(*inputs.args, **inputs.kwargs)
    return reads


def _reads_after(bypass: Bypass, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> set[torch.Tensor]:
    """The parameters that the suffix of a call reads, in the model's present mode."""
    plan = bypass.plan
    reads = _Reads(bypass.model, inputs)
    size, device = plan.size(inputs), leaves[0].device
    run = plan.run("bypass", bypass.autocast, kept=bypass._kept(inputs, leaves, size, device))
    run.absent = bypass._absent(inputs, size, device)
    reads.run = run
    with undisturbed(bypass.model), torch.no_grad():
        reads.apart(plan)
        if len(plan.cuts) > 1:
            reads.follow(leaves)
        with reads, bypass._quiet(run), bypass.interceptor.running(run):
            bypass.model._call_impl(*inputs.args, **inputs.kwargs)
    return reads.after


def _cast(dtype: torch.dtype | None, device: torch.device) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
