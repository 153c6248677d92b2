"""Which calls are skipped, which run after all, and which outputs are kept, for one cut of one model.

BERT cut at ``encoder.layer.2``: ``embeddings``, ``encoder.layer.0`` and ``.1`` are skipped, ``encoder.layer.2`` is
kept, ``attention_mask`` stays real, since the suffix reads it. A Llama cut at ``layers.3``: the same, but
``rotary_emb`` runs after all, because what it gives reaches the later layers (a **side value**); a U-Net's skip
connection is kept as a further leaf instead, because computing it again costs what recycling saves.

`make_plan` finds this by trying: it runs the model with everything skipped, and whatever stops the run or reaches the
output has a source, which is mended the cheaper way. Where neither works the cut is refused in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchrecycle.absent import Absent, AbsentRead
from torchrecycle.bypass.forms import Dim, Size, TensorForm, TreeForm
from torchrecycle.bypass.inputs import Inputs
from torchrecycle.bypass.interceptor import (
    Action,
    Interceptor,
    Run,
    Step,
    Stopped,
    absent_sources,
    evaluating,
)
from torchrecycle.bypass.probes import Probes, training
from torchrecycle.bypass.sequences import Sequences
from torchrecycle.codec import Layout, stride_order
from torchrecycle.errors import CutError, RecycleError
from torchrecycle.trace import Call, Trace, random_state, set_random_state, undisturbed

__all__ = ["Plan", "Shared", "fails_without", "joined", "make_plan"]

CHEAP = 0.05
"""A call without parameters that takes less than this share of the prefix's time is run again rather than kept."""


# -- the plan ----------------------------------------------------------------------------------------------------------


Shared = dict[int, dict[int, torch.Tensor]]
"""Per kept step, its tensors that are the same for all objects, by position."""


@dataclass(slots=True)
class Plan:
    """How one model is run with its first calls skipped."""

    cut: str
    """The name of the cut; of a joint cut all names, joined by `` + ``."""
    cuts: tuple[Call, ...] = field(repr=False)
    """The calls whose output is kept, in the order in which they end."""
    steps: tuple[Step, ...]
    modules: dict[nn.Module, str] = field(repr=False)
    """Every module of `steps`, by name."""
    between: tuple[nn.Module, ...] = field(repr=False)
    """Of a joint cut, what runs after one cut and before another without leading to it."""
    mixed: frozenset[str]
    """Those of them that are called again after the cut (a shared activation function)."""
    forms: dict[int, TreeForm] = field(repr=False)
    """Per skipped or kept step, the form of what it returns."""
    layouts: tuple[Layout, ...]
    """Per leaf, how it becomes a row; what stands at padded places is found out by the proof."""
    sequences: Sequences
    read_before: frozenset[str]
    """The tensor inputs that the prefix reads: they make the key."""
    read_after: frozenset[str]
    """The tensor inputs that the suffix reads, or whose reading cannot be excluded."""
    example: Inputs = field(repr=False)
    """Two objects, to prove it with."""

    @property
    def kept(self) -> list[int]:
        """The numbers of the kept steps, in order."""
        return [step.number for step in self.steps if step.action == "keep"]

    def kept_names(self) -> list[tuple[int, str]]:
        """The kept steps as (number, name), in order."""
        return [(step.number, step.name) for step in self.steps if step.action == "keep"]

    @property
    def prefix_modules(self) -> list[nn.Module]:
        """The outermost modules that only the prefix calls."""
        return [module for module, name in self.modules.items() if name not in self.mixed]

    def size(self, inputs: Inputs) -> Size:
        """The size of a call's batch."""
        return self.sequences.size(inputs)

    @property
    def free(self) -> bool:
        """Whether some size is only known from a run at that length."""
        return any(self.forms[s.number].free for s in self.steps if s.action != "run")

    @property
    def shares(self) -> bool:
        """Whether something is kept that is the same for all objects."""
        return any(self.forms[number].shared for number in self.kept)

    def run(self, mode: Any, autocast: torch.dtype | None = None, **outputs: Any) -> Run:
        """A run that follows this plan."""
        return Run(mode, self.steps, self.modules, mixed=self.mixed, autocast=autocast, **outputs)

    def taken(self, captured: Mapping[int, Any]) -> list[torch.Tensor]:
        """The leaves of what a prefix run captured."""
        return [leaf for number in self.kept for leaf in self.forms[number].taken(captured[number])]

    def taken_shared(self, captured: Mapping[int, Any]) -> Shared:
        """What of a prefix run's output is the same for all objects."""
        return {number: self.forms[number].taken_shared(captured[number]) for number in self.kept}

    def filled(
        self, leaves: Sequence[torch.Tensor], shared: Shared, forms: Mapping[int, TreeForm], size: Size
    ) -> dict[int, Any]:
        """The inverse of `taken` and `taken_shared`: per kept step, what it returns.

        Args:
            leaves: what counts objects.
            shared: what does not.
            forms: those of this size, where some sizes are free.
            size: of the batch.
        """
        rest, made = list(leaves), {}
        for number in self.kept:
            count = len(self.forms[number].rows)
            made[number] = forms[number].filled(rest[:count], shared.get(number, {}), size)
            rest = rest[count:]
        return made


def make_plan(probes: Probes, cut: str | Sequence[str], *, precision: torch.dtype | None = None) -> Plan:
    """Find out how the model can be divided at `cut`.

    Args:
        probes: the model, run at several sizes.
        cut: the name of a module; ``block#2`` for its second call; several names for a joint cut.
        precision: the dtype in which floating point leaves are kept; their own if None.

    Raises:
        CutError: it cannot, with the reason.
    """
    model, traced = probes.model, probes.traces[0]
    calls = [_find(model, traced, name) for name in ([cut] if isinstance(cut, str) else cut)]
    if len({call.number for call in calls}) < len(calls):
        raise CutError(f"cannot cut at '{joined(cut)}': one place is named twice.")
    with undisturbed(model):
        planner = _Planner(probes, joined(cut), sorted(calls, key=lambda call: call.end))
        planner.mend()
        read_before, read_after = planner.readers()
        planner.compare_shared(read_before)
    return planner.plan(read_before, read_after, precision)


def joined(cut: str | Sequence[str]) -> str:
    """A cut's name in one string."""
    return cut if isinstance(cut, str) else " + ".join(cut)


def _find(model: nn.Module, traced: Trace, cut: str) -> Call:
    try:
        return traced.find(cut)
    except KeyError:
        raise CutError(_no_such_call(model, traced, cut, len(traced.of(cut)))) from None


def _no_such_call(model: nn.Module, traced: Trace, cut: str, times: int) -> str:
    module, _, number = cut.partition("#")
    if not module:
        return f"cannot cut at '{cut}', the model itself: nothing would be left to train. See cuts(model, example)."
    if times:
        return (
            f"cannot cut at '{cut}': the model calls it {times} times in one forward. Name one of the calls, "
            f"'{cut}#1' to '{cut}#{times}', or cut at a module around it. See cuts(model, example)."
        )
    if number:
        return (
            f"cannot cut at '{cut}': the model calls '{module}' {len(traced.of(module))} times in one forward. "
            f"'{module}#1' is its first call."
        )
    if cut in dict(model.named_modules()):
        return (
            f"cannot cut at '{cut}': the model never calls it for this example (a container such as ModuleList is not "
            f"called itself; its children are). Nearest: {_nearest(traced, cut)}. See cuts(model, example)."
        )
    return f"cannot cut at '{cut}': the model has no module of that name. Nearest: {_nearest(traced, cut)}."


def _nearest(traced: Trace, cut: str) -> str:
    import difflib

    names = [call.name for call in traced.calls if call.name]
    inside = [name for name in names if cut and name.startswith(f"{cut}.") and "." not in name[len(cut) + 1 :]]
    found = inside[-3:] or difflib.get_close_matches(cut, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(f"'{name}'" for name in found)


def fails_without(cut: str, error: Exception) -> str:
    """What to say where the model fails only if its prefix is skipped."""
    return (
        f"cannot cut at '{cut}': with the layers before it skipped, the model fails with {type(error).__name__}: "
        f"{error}. A "
        "skipped layer (or a hook on it) leaves something behind that a later one looks for. See cuts(model, example)."
    )


class _Planner:
    """Tries a cut, and mends what stops it."""

    def __init__(self, probes: Probes, name: str, cuts: Sequence[Call]) -> None:
        self.probes = probes
        self.model = probes.model
        self.inputs = probes.inputs
        self.name = name
        self.cuts = cuts
        self.before = self._calls_before()
        self.modules = {call.module: call.name for call in self.before}
        self.forms: dict[int, TreeForm | str] = {call.number: probes.form(call) for call in self.before}
        self.actions: dict[int, Action] = {call.number: self._first_action(call) for call in self.before}
        self.mixed = frozenset(self._called_again())
        self.interceptor = Interceptor.of(self.model) or Interceptor(self.model)
        self.prefix_seconds = max(cuts[-1].seconds[1], 1e-9)
        for cut in cuts:
            why = self._why_unkeepable(cut)
            if why:
                raise CutError(f"cannot cut at '{cut.name}': {why}. See cuts(model, example).")
        self.captured = self._capture(self.inputs)

    def _calls_before(self) -> list[Call]:
        """The outermost calls that lead to the cuts, in order."""
        traced = self.probes.traces[0]
        found = {call.number: call for cut in self.cuts for call in traced.outermost_until(cut)}
        around = {call.number for cut in self.cuts for call in traced.ancestors(cut)}
        for cut in self.cuts[:-1]:
            after = [call for call in found.values() if call.begin > cut.end]
            around |= self._derived_from(cut, after)
        lost = [cut.name for cut in self.cuts if cut.number in around]
        if lost:
            raise CutError(
                f"cannot cut at '{self.name}': '{lost[0]}' is computed from what another of these cuts gives. A joint "
                "cut takes cuts that lie side by side, such as one in each tower; of cuts behind each other, take the "
                "last."
            )
        return sorted((c for n, c in found.items() if n not in around), key=lambda call: call.number)

    def _derived_from(self, cut: Call, calls: Sequence[Call]) -> set[int]:
        """Which of these calls are computed from what `cut` gives: it is left out, and seen where it is missed."""
        found: set[int] = set()
        times: dict[nn.Module, int] = {}
        numbers = {(call.module, call.occurrence): call.number for call in calls}

        def leave_out(module: nn.Module, args: Any, output: Any) -> Any:
            place = (module, times.get(module, 0))
            times[module] = place[1] + 1
            if place == (cut.module, cut.occurrence):
                return pytree.tree_map(lambda leaf: _absent_from(leaf, cut.number), output)
            if place in numbers and absent_sources(output):
                found.add(numbers[place])
            return None

        with undisturbed(self.model), evaluating(self.model):
            for module in {cut.module, *(call.module for call in calls)}:
                module.register_forward_hook(leave_out)
            try:
                self.model._call_impl(*self.inputs.args, **self.inputs.kwargs)
            except AbsentRead as stop:
                raise CutError(
                    f"cannot cut at '{self.name}': what comes after '{cut.name}' cannot be told from what leads to the "
                    f"other cuts ({stop.reason}). See cuts(model, example)."
                ) from stop
        return found

    def _first_action(self, call: Call) -> Action:
        if any(call is cut for cut in self.cuts):
            return "keep"
        return "run" if isinstance(self.forms[call.number], str) else "skip"

    def _called_again(self) -> Iterator[str]:
        own = {call.number for call in self.before}
        for call in self.probes.traces[0].calls:
            inside = any(a.number in own for a in self.probes.traces[0].ancestors(call))
            if call.number not in own and call.module in self.modules and not inside:
                yield call.name

    def _between(self) -> Iterator[nn.Module]:
        traced = self.probes.traces[0]
        around = {call.number for cut in self.cuts for call in traced.ancestors(cut)}
        own = {call.number for call in self.before} | around
        for call in traced.calls:
            if call.parent in around and call.number not in own and call.begin < self.cuts[-1].end:
                yield call.module

    def _why_unkeepable(self, call: Call) -> str:
        form = self.forms[call.number]
        if isinstance(form, str):
            return form
        if not form.tensors:
            return "its output holds no tensor"
        if not form.rows and any(call is cut for cut in self.cuts):
            return "its output has no dimension that counts the objects of the batch, so it is no row of each"
        for position in form.rows:
            dims = form.leaves[position].dims
            if any(d.law == "both" for d in dims):
                return "its output lays objects and tokens into one dimension"
            if sum(d.law == "batch" for d in dims) > 1:
                return "its output has two dimensions that count the objects of the batch"
        return ""

    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(call.number, call.name, self.actions[call.number], call.wrote) for call in self.before)

    @contextmanager
    def _running(self, run: Run, *, in_training: bool = False) -> Iterator[None]:
        modules = list(self.modules)
        self.interceptor.slots(modules)
        mode = training(self.model) if in_training else evaluating(self.model)
        try:
            with self.interceptor.running(run), mode:
                yield
        finally:
            self.interceptor.free(modules)

    def _run(self, mode: Any, steps: Sequence[Step], **outputs: Any) -> Run:
        return Run(mode, steps, self.modules, mixed=self.mixed, **outputs)

    def _capture(self, inputs: Inputs) -> dict[int, Any]:
        """What every call up to the cut returns; those without a form too."""
        steps = tuple(Step(call.number, call.name, "keep") for call in self.before)
        run = self._run("prefix", steps)
        with self._running(run):
            _until_stopped(self.model, inputs)
        return run.captured

    def _bypass(self, inputs: Inputs, *, in_training: bool = False) -> None:
        """One run as planned.

        Raises:
            AbsentRead: something that is not there was read, or reached the output.
        """
        size = self.probes.sizes[0]
        device = next(iter(self.inputs.tensors().values())).device
        skipped = [call for call in self.before if self.actions[call.number] == "skip"]
        absent = {c.number: self.probes.form_here(c).absent(size, device, c.number) for c in skipped}  # pyright: ignore
        kept = {n: self.captured[n] for n, a in self.actions.items() if a == "keep"}
        run = self._run("bypass", self.steps(), absent=absent, kept=kept)
        run.autocast = _ambient_autocast(device.type)
        with self._running(run, in_training=in_training):
            output = self.model._call_impl(*inputs.args, **inputs.kwargs)
        sources = absent_sources(output)
        if sources:
            raise AbsentRead("what a skipped layer would have computed reaches the output of the model", sources)

    def mend(self) -> None:
        """Skip all that can be skipped; run or keep what a later part of the model needs."""
        while True:
            try:
                self._bypass(self.inputs)
                return self._mend_training()
            except AbsentRead as stop:
                self._mend(stop)
            except RecycleError:
                raise
            except Exception as error:  # the model itself has run well before
                raise CutError(fails_without(self.name, error)) from error

    def _mend_training(self) -> None:
        """In training mode, a head on the way may read what is skipped (GoogLeNet's auxiliary ones).

        Raises:
            AbsentRead: it does.
        """
        if not self.probes.other_in_training:
            return
        state = random_state()
        try:
            self._bypass(self.inputs, in_training=True)
        except Exception:
            return  # it asks for targets, or drops layers at random: the proof has the last word
        finally:
            set_random_state(state)

    def _mend(self, stop: AbsentRead) -> None:
        runs = [s[1] for s in stop.sources if isinstance(s, tuple) and s[0] == "run"]
        calls = sorted(runs or [s for s in stop.sources if isinstance(s, int)])
        for number in calls:
            now = self.actions[number]
            call = next(call for call in self.before if call.number == number)
            keepable = not self._why_unkeepable(call)
            if now == "skip" and (not keepable or self._is_cheap(call)):
                self.actions[number] = "run"
            elif now in ("skip", "run") and keepable:
                self.actions[number] = "keep"
            else:
                raise CutError(
                    f"cannot cut at '{self.name}': {stop.reason}. It comes from '{call.name}', which can neither "
                    f"run without the prefix nor be kept ({self._why_unkeepable(call)}). See cuts(model, example)."
                )
        if not calls:
            raise CutError(f"cannot cut at '{self.name}': {stop.reason}. See cuts(model, example).")

    def _is_cheap(self, call: Call) -> bool:
        if next(call.module.parameters(), None) is not None:
            return False
        form = self.forms[call.number]
        if isinstance(form, TreeForm) and not form.rows:  # a table of positions
            return True
        return call.seconds[1] - call.seconds[0] < CHEAP * self.prefix_seconds

    def readers(self) -> tuple[frozenset[str], frozenset[str]]:
        """The tensor inputs that are read before the cut, and those that are read after it."""
        tensors = self.inputs.tensors()
        before = frozenset(name for name in tensors if self._prefix_reads(name))
        after = {name for name in tensors if name not in before or self._suffix_reads([name])}
        gone = [name for name in tensors if name not in after]
        if gone and self._suffix_reads(gone):  # each alone can be spared, all of them together cannot
            after |= set(gone)
        return before, frozenset(after)

    def _without(self, names: Sequence[str]) -> Inputs:
        tensors = self.inputs.tensors()
        return self.inputs.replace({name: Absent.like(tensors[name], [name]) for name in names})

    def _prefix_reads(self, name: str) -> bool:
        run = self._run("prefix", self.steps())
        try:
            with self._running(run):
                _until_stopped(self.model, self._without([name]))
        except (AbsentRead, Exception):
            return True
        return bool(absent_sources(list(run.captured.values())))

    def _suffix_reads(self, names: Sequence[str]) -> bool:
        try:
            self._bypass(self._without(names))
        except (AbsentRead, Exception):
            return True
        return False

    def compare_shared(self, read_before: frozenset[str]) -> None:
        """What has no dimension for objects must not depend on them.

        Raises:
            CutError: it does.
        """
        forms = {n: form for n, form in self.forms.items() if self.actions[n] == "keep" and isinstance(form, TreeForm)}
        if not any(form.shared for form in forms.values()):
            return
        tried = 0
        for other in self._other_contents(read_before):
            try:
                others = self._capture(other)
            except RecycleError:
                raise
            except Exception:  # it takes no such content (images at the places of words)
                continue
            tried += 1
            for number, form in forms.items():
                one, other = (form.taken_shared(captured[number]).values() for captured in (self.captured, others))
                if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True)):
                    name = next(call.name for call in self.before if call.number == number)
                    raise CutError(
                        f"cannot cut at '{self.name}': what '{name}' gives has a part without a dimension that counts "
                        "the objects of the batch, and it depends on them all the same, so it belongs to none of "
                        "them. See cuts(model, example)."
                    )

        if not tried:
            raise CutError(
                f"cannot cut at '{self.name}': a part of what is kept has no dimension that counts the objects of the "
                "batch, and the model runs on no other content than the example's, so that it cannot be tried whether "
                "that part depends on it. See cuts(model, example)."
            )

    def _other_contents(self, read_before: frozenset[str]) -> Iterator[Inputs]:
        """The example with other content of the same form: turned, one object twice, padded."""
        for change in (_turned, _first_twice, _last_twice):
            yield self.inputs.map(lambda name, value, c=change: c(value) if name in read_before else value)
        for mask in self.probes.sequences.masks:
            for rows in ([0], [0, 1]):
                padded = self.inputs.tensors()[mask].clone()
                padded[rows, -1] = 0
                yield self.inputs.replace({mask: padded})

    def plan(self, before: frozenset[str], after: frozenset[str], precision: torch.dtype | None) -> Plan:
        forms = {n: form for n, form in self.forms.items() if isinstance(form, TreeForm)}
        kept = [call.number for call in self.before if self.actions[call.number] == "keep"]
        captured = self.captured
        layouts = [
            _layout(form, leaf, precision, self.probes.sequences)
            for number in kept
            for form, leaf in _leaf_forms(forms[number], forms[number].taken(captured[number]))
        ]
        return Plan(
            cut=self.name,
            cuts=tuple(self.cuts),
            steps=self.steps(),
            modules=dict(self.modules),
            between=tuple(self._between()),
            mixed=self.mixed,
            forms=forms,
            layouts=tuple(layouts),
            sequences=self.probes.sequences,
            read_before=before,
            read_after=after,
            example=self.inputs,
        )


def _until_stopped(model: nn.Module, inputs: Inputs) -> None:
    state = random_state()
    try:
        model._call_impl(*inputs.args, **inputs.kwargs)
    except Stopped:
        return
    finally:
        set_random_state(state)
    raise CutError("the forward ended before it reached the cut")


def _ambient_autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _absent_from(leaf: Any, source: int) -> Any:
    return Absent.like(leaf, [source]) if isinstance(leaf, torch.Tensor) else leaf


def _turned(value: Any) -> Any:
    """The objects in another order, and changed."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    turned = value.flip(0)
    return turned * 0.5 + 0.1 if turned.is_floating_point() else turned.flip(-1)


def _first_twice(value: Any) -> Any:
    return value[[0, 0]] if isinstance(value, torch.Tensor) and value.dim() else value


def _last_twice(value: Any) -> Any:
    return value[[1, 1]] if isinstance(value, torch.Tensor) and value.dim() else value


def _leaf_forms(form: TreeForm, leaves: Sequence[torch.Tensor]) -> list[tuple[TensorForm, torch.Tensor]]:
    return [(form.leaves[position], leaf) for position, leaf in zip(form.rows, leaves, strict=True)]


def _layout(form: TensorForm, leaf: torch.Tensor, precision: torch.dtype | None, sequences: Sequences) -> Layout:
    batch_dim = next(i for i, dim in enumerate(form.dims) if dim.law == "batch")
    per_object = form.dims[batch_dim].number
    moved = int(per_object > 1)  # later dimensions move when the frames of an object get one of their own
    ragged = {i + moved * (i > batch_dim): dim for i, dim in enumerate(form.dims) if dim.law in ("tokens", "free")}
    kept = precision if precision is not None and leaf.dtype.is_floating_point else leaf.dtype
    order = stride_order(leaf.unflatten(batch_dim, (-1, per_object))) if moved else form.order
    layout = Layout(
        leaf.dim(),
        batch_dim,
        tuple(ragged),
        order,
        (),
        leaf.dtype,
        kept,
        ragged_by=tuple(_sequence_of(dim, sequences) for dim in ragged.values()),
        per_object=per_object,
    )
    return replace(layout, shape=layout.row_shape(leaf.shape))


def _sequence_of(dim: Dim, sequences: Sequences) -> int:
    """The sequence whose places are places of the row, one to one; -1 for none."""
    one_to_one = dim.law == "tokens" and dim.number == 0 and dim.sequence < len(sequences.masks)
    return dim.sequence if one_to_one else -1
