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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchrecycle.absent import Absent, AbsentRead
from torchrecycle.bypass.forms import Size, TensorForm, TreeForm, solve_tree
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
from torchrecycle.codec import Layout
from torchrecycle.errors import CutError, RecycleError
from torchrecycle.trace import Call, Trace, random_state, set_random_state, trace, undisturbed

__all__ = ["Plan", "Probes", "fails_without", "make_plan", "pad_inputs", "take_rows"]

CHEAP = 0.05
"""A call without parameters that takes less than this share of the prefix's time is run again rather than kept."""


# -- the example at several sizes --------------------------------------------------------------------------------------


def take_rows(inputs: Inputs, index: Sequence[int]) -> Inputs:
    """The same call for some of its objects, in that order."""
    picked = torch.tensor(list(index))
    return inputs.map_tensors(lambda t: t.index_select(0, picked.to(t.device)) if t.dim() else t)


def pad_inputs(
    inputs: Inputs,
    mask: str,
    tokens: int,
    side: str = "right",
    read_before: frozenset[str] | None = None,
    other_fill: bool = False,
) -> Inputs:
    """The same call with `tokens` more padded places.

    Args:
        inputs: a call.
        mask: the name of its mask.
        tokens: how many places more.
        side: ``"right"`` or ``"left"``.
        read_before: the inputs that the prefix reads; integers among the others are labels, padded with -100.
        other_fill: put the largest value of each input at the padded places instead of 0.
    """
    length = inputs.tensors()[mask].shape[1]

    def padded(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != length:
            return value
        fill: Any = value.max().item() if other_fill else 0
        if read_before is not None and name not in read_before and not value.is_floating_point():
            fill = -100
        shape = (value.shape[0], tokens, *value.shape[2:])
        more = value.new_full(shape, 0 if name == mask else fill)
        return torch.cat([value, more] if side == "right" else [more, value], dim=1)

    return inputs.map(padded)


@dataclass(frozen=True, slots=True)
class Probes:
    """One model run on its example at several sizes: what every plan for this model starts from."""

    model: nn.Module
    inputs: Inputs
    """The example: two rows of it."""
    mask: str | None
    sizes: tuple[Size, ...]
    traces: tuple[Trace, ...] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, mask: str | None) -> Probes:
        """Run the model in eval mode for two and for three objects, and with one and three tokens more."""
        two, three = take_rows(inputs, [0, 1]), take_rows(inputs, [0, 1, 0])
        tokens = two.tensors()[mask].shape[1] if mask else 0
        samples = [((2, tokens), two), ((3, tokens), three)]
        if mask:
            samples += [((2, tokens + more), pad_inputs(two, mask, more)) for more in (1, 3)]
        with evaluating(model):
            traces = [trace(model, sample.args, sample.kwargs) for _, sample in samples]
        return cls(model, two, mask, tuple(size for size, _ in samples), tuple(traces))

    def form(self, call: Call) -> TreeForm | str:
        """The form of what a call returns, or in words why it has none."""
        same = [trace.calls[call.number] for trace in self.traces if call.number < len(trace.calls)]
        if len(same) < len(self.traces) or any(c.name != call.name for c in same):
            return "the model runs other layers for a batch of another size"
        return solve_tree([c.output for c in same], self.sizes)


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model is run with its first calls skipped."""

    cut: str
    steps: tuple[Step, ...]
    modules: dict[nn.Module, str] = field(repr=False)
    """Every module of `steps`, by name."""
    mixed: frozenset[str]
    """Those of them that are called again after the cut (a shared activation function)."""
    forms: dict[int, TreeForm] = field(repr=False)
    """Per skipped or kept step, the form of what it returns."""
    layouts: tuple[Layout, ...]
    """Per leaf, how it becomes a row."""
    mask: str | None
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
        tensors = inputs.tensors()
        tokens = tensors[self.mask].shape[1] if self.mask and self.mask in tensors else 0
        return inputs.batch(), tokens

    def run(self, mode: Any, autocast: torch.dtype | None = None, **outputs: Any) -> Run:
        """A run that follows this plan."""
        return Run(mode, self.steps, self.modules, mixed=self.mixed, autocast=autocast, **outputs)

    def taken(self, captured: Mapping[int, Any]) -> list[torch.Tensor]:
        """The leaves of what a prefix run captured."""
        return [leaf for number in self.kept for leaf in self.forms[number].taken(captured[number])]

    def filled(self, leaves: Sequence[torch.Tensor], size: Size) -> dict[int, Any]:
        """The inverse of `taken`: per kept step, what it returns."""
        rest, made = list(leaves), {}
        for number in self.kept:
            count = len(self.forms[number].tensors)
            made[number] = self.forms[number].filled(rest[:count], size)
            rest = rest[count:]
        return made


def make_plan(probes: Probes, cut: str, *, precision: torch.dtype | None = None) -> Plan:
    """Find out how the model can be divided at `cut`.

    Args:
        probes: the model, run at several sizes.
        cut: the name of a module.
        precision: the dtype in which floating point leaves are kept; their own if None.

    Raises:
        CutError: it cannot, with the reason.
    """
    model = probes.model
    calls = probes.traces[0].of(cut)
    if not cut or len(calls) != 1:
        raise CutError(_no_such_call(model, probes.traces[0], cut, len(calls)))
    with undisturbed(model):
        planner = _Planner(probes, calls[0])
        planner.mend()
        read_before, read_after = planner.readers()
    return planner.plan(read_before, read_after, precision)


def _no_such_call(model: nn.Module, traced: Trace, cut: str, times: int) -> str:
    if not cut:
        return "cannot cut at '', the model itself: nothing would be left to train. See cuts(model, example)."
    if times:
        return (
            f"cannot cut at '{cut}': the model calls it {times} times in one forward, so that its output is no one "
            "place. Cut at a module around it, or before it. See cuts(model, example)."
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

    def __init__(self, probes: Probes, cut: Call) -> None:
        self.probes = probes
        self.model = probes.model
        self.inputs = probes.inputs
        self.cut = cut
        self.before = probes.traces[0].outermost_until(cut)
        self.modules = {call.module: call.name for call in self.before}
        self.forms: dict[int, TreeForm | str] = {call.number: probes.form(call) for call in self.before}
        self.actions: dict[int, Action] = {call.number: self._first_action(call) for call in self.before}
        self.mixed = frozenset(self._called_again())
        self.interceptor = Interceptor.of(self.model) or Interceptor(self.model)
        self.prefix_seconds = max(cut.seconds[1], 1e-9)
        self.unkeepable = self._why_unkeepable(cut)
        if self.unkeepable:
            raise CutError(f"cannot cut at '{cut.name}': {self.unkeepable}. See cuts(model, example).")
        self.captured = self._capture(self.inputs)

    def _first_action(self, call: Call) -> Action:
        if call is self.cut:
            return "keep"
        return "run" if isinstance(self.forms[call.number], str) else "skip"

    def _called_again(self) -> Iterator[str]:
        for call in self.probes.traces[0].calls:
            inside = any(a.module in self.modules for a in self.probes.traces[0].ancestors(call))
            if call.end > self.cut.end and call.module in self.modules and not inside:
                yield call.name

    def _why_unkeepable(self, call: Call) -> str:
        form = self.forms[call.number]
        if isinstance(form, str):
            return form + (self._about_the_mask() if "by no law" in form else "")
        if not form.tensors:
            return "its output holds no tensor"
        for position in form.tensors:
            dims = form.leaves[position].dims
            if not any(d.law == "batch" and d.number == 1 for d in dims):
                return "its output has no dimension that counts the objects of the batch, so it is no row of each"
            others = [d for d in dims if d.law != "fixed" and not (d.law == "batch" and d.number == 1)]
            if len(others) > 1 or any(d.law != "tokens" or d.number for d in others):
                return f"its output follows the length of the sequence in more than one way ({position}: {dims})"
            if sum(d.law == "batch" for d in dims) > 1:
                return "its output has two dimensions that count the objects of the batch"
        return ""

    def _about_the_mask(self) -> str:
        if self.probes.mask is None:
            return ""
        return (
            f" (the mask '{self.probes.mask}' counts {self.probes.sizes[0][1]} places, which the model shortens "
            "before the cut; rows of unequal length are kept only where one place of the mask is one of the row. "
            "Bring all objects to one length in the data set, and leave the mask out)"
        )

    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(call.number, call.name, self.actions[call.number]) for call in self.before)

    @contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        modules = list(self.modules)
        self.interceptor.slots(modules)
        try:
            with self.interceptor.running(run), evaluating(self.model):
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

    def _bypass(self, inputs: Inputs) -> None:
        """One run as planned.

        Raises:
            AbsentRead: something that is not there was read, or reached the output.
        """
        size = self.probes.sizes[0]
        device = next(iter(self.inputs.tensors().values())).device
        absent = {n: self.forms[n].absent(size, device, n) for n, a in self.actions.items() if a == "skip"}  # pyright: ignore
        kept = {n: self.captured[n] for n, a in self.actions.items() if a == "keep"}
        run = self._run("bypass", self.steps(), absent=absent, kept=kept)
        run.autocast = _ambient_autocast(device.type)
        with self._running(run):
            output = self.model._call_impl(*inputs.args, **inputs.kwargs)
        sources = absent_sources(output)
        if sources:
            raise AbsentRead("what a skipped layer would have computed reaches the output of the model", sources)

    def mend(self) -> None:
        """Skip all that can be skipped; run or keep what a later part of the model needs."""
        while True:
            try:
                return self._bypass(self.inputs)
            except AbsentRead as stop:
                self._mend(stop)
            except RecycleError:
                raise
            except Exception as error:  # the model itself has run well before
                raise CutError(fails_without(self.cut.name, error)) from error

    def _mend(self, stop: AbsentRead) -> None:
        runs = [s[1] for s in stop.sources if isinstance(s, tuple) and s[0] == "run"]
        calls = sorted(runs or [s for s in stop.sources if isinstance(s, int)])
        for number in calls:
            now = self.actions[number]
            call = next(call for call in self.before if call.number == number)
            keepable = not self._why_unkeepable(call)
            if now == "skip" and (self._is_cheap(call) or not keepable):
                self.actions[number] = "run"
            elif now in ("skip", "run") and keepable:
                self.actions[number] = "keep"
            else:
                raise CutError(
                    f"cannot cut at '{self.cut.name}': {stop.reason}. It comes from '{call.name}', which can neither "
                    f"run without the prefix nor be kept ({self._why_unkeepable(call)}). See cuts(model, example)."
                )
        if not calls:
            raise CutError(f"cannot cut at '{self.cut.name}': {stop.reason}. See cuts(model, example).")

    def _is_cheap(self, call: Call) -> bool:
        free = next(call.module.parameters(), None) is None
        return free and (call.seconds[1] - call.seconds[0]) < CHEAP * self.prefix_seconds

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

    def plan(self, before: frozenset[str], after: frozenset[str], precision: torch.dtype | None) -> Plan:
        forms = {n: form for n, form in self.forms.items() if isinstance(form, TreeForm)}
        kept = [call.number for call in self.before if self.actions[call.number] == "keep"]
        captured = self.captured
        layouts = [
            _layout(form, leaf, precision)
            for number in kept
            for form, leaf in _leaf_forms(forms[number], forms[number].taken(captured[number]))
        ]
        return Plan(
            cut=self.cut.name,
            steps=self.steps(),
            modules=dict(self.modules),
            mixed=self.mixed,
            forms=forms,
            layouts=tuple(layouts),
            mask=self.probes.mask,
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


def _leaf_forms(form: TreeForm, leaves: Sequence[torch.Tensor]) -> list[tuple[TensorForm, torch.Tensor]]:
    return [(form.leaves[position], leaf) for position, leaf in zip(form.tensors, leaves, strict=True)]


def _layout(form: TensorForm, leaf: torch.Tensor, precision: torch.dtype | None) -> Layout:
    batch_dim = next(i for i, dim in enumerate(form.dims) if dim.law == "batch")
    ragged_dim = next((i for i, dim in enumerate(form.dims) if dim.law == "tokens"), None)
    kept = precision if precision is not None and leaf.dtype.is_floating_point else leaf.dtype
    layout = Layout(leaf.dim(), batch_dim, ragged_dim, form.order, (), leaf.dtype, kept)
    shape = layout.row_shape(leaf.shape)
    return Layout(leaf.dim(), batch_dim, ragged_dim, form.order, shape, leaf.dtype, kept)
