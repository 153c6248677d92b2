"""The interceptor: one forward of an unmodified model, of which the first calls are skipped.

In a ResNet-34 cut at ``layer2``, six modules carry a slot besides the model itself: ``conv1``, ``bn1``, ``relu``,
``maxpool``, ``layer1`` and ``layer2``. The model's slot begins a `Run` and ends it in ``finally``; the others ask the
run what to do: return an `Absent`, return the kept rows, run as usual, or stop. Which run it is lies in a
`ContextVar`, so that two threads can use one model.

A run follows its steps strictly: a call that comes out of turn (LayerDrop) is an error, never a guess.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchrecycle.absent import Absent, AbsentRead
from torchrecycle.errors import AutocastError, BatchError, CutError
from torchrecycle.trace import clear_slot, containers_of, is_compiled, is_sharded, set_slot, slot_of, written

__all__ = ["Interceptor", "Run", "Step", "Stopped", "compare_autocast", "evaluating", "frozen_call"]

Action = Literal["skip", "run", "keep"]
Mode = Literal["full", "prefix", "bypass", "glue"]


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one of the outermost calls up to the cut."""

    number: int
    """The call's number in the trace."""
    name: str
    """Its module's name."""
    action: Action
    """``skip``: it returns an absent tensor; ``run``: it runs after all; ``keep``: it returns kept rows."""
    wrote: bool = False
    """Whether it wrote into a list or a dict that it was given, for the example: then the proof has shown that nobody
    misses it."""


class Stopped(BaseException):
    """A prefix run has reached its cut. Not an `Exception`, since models contain ``except Exception``."""


@contextmanager
def evaluating(module: nn.Module, *, gradient: bool = False) -> Iterator[None]:
    """The module and all below it in eval mode and (unless told) without gradient; flags as before afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.__dict__["training"] = False
    try:
        with torch.set_grad_enabled(gradient):
            yield
    finally:
        for part in training:
            part.__dict__["training"] = True


def frozen_call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module of the prefix: eval mode, no gradient.

    Where nothing asks for a gradient, grad mode is left as it is: a view made without it could not be written later.
    """
    asks = any(parameter.requires_grad for parameter in module.parameters()) or any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, dict(kwargs)))
    )
    with evaluating(module, gradient=not asks and torch.is_grad_enabled()):
        return module._call_impl(*args, **kwargs)


class Run:
    """One forward under way.

    Args:
        mode: ``full``: all runs, the prefix frozen; ``prefix``: up to the cut, outputs captured; ``bypass``: the prefix
            skipped; ``glue``: the prefix skipped, up to the cut.
        steps: the outermost calls up to the cut, in order.
        modules: the module of each name in `steps`.
        absent: per step number, the output tree of absent tensors that a skipped call returns.
        kept: per step number, the output tree that a kept call returns (``bypass``).
        autocast: what the rows are made under: a dtype, or None for no autocast.
        taps: further calls whose output a prefix run writes down, as (module, occurrence), for other cuts.
    """

    __slots__ = (
        "_in_run",
        "_times",
        "absent",
        "at_cut",
        "autocast",
        "captured",
        "compares_autocast",
        "forms",
        "kept",
        "mixed",
        "mode",
        "modules",
        "position",
        "restored",
        "size",
        "steps",
        "tapped",
        "taps",
    )

    def __init__(
        self,
        mode: Mode,
        steps: Sequence[Step],
        modules: Mapping[nn.Module, str],
        *,
        mixed: frozenset[str] = frozenset(),
        absent: Mapping[int, Any] | None = None,
        kept: Mapping[int, Any] | None = None,
        autocast: torch.dtype | None = None,
        taps: frozenset[tuple[nn.Module, int]] = frozenset(),
    ) -> None:
        self.mode = mode
        self.steps = steps
        self.modules = modules
        self.mixed = mixed
        self.absent = absent or {}
        self.kept = kept or {}
        self.autocast = autocast
        self.position = 0
        self.captured: dict[int, Any] = {}
        self.taps = taps
        self.tapped: dict[tuple[nn.Module, int], Any] = {}
        self._times: dict[nn.Module, int] = {}
        self._in_run = False
        self.restored: dict[int, list[nn.Module]] = {}
        """Per step number, the modules around it that are in training mode again once it has ended."""
        self.compares_autocast = mode == "bypass"
        """Whether autocast at the cut must be what was declared."""
        self.at_cut: Callable[[], None] | None = None
        """Called when the last step has ended."""
        self.forms: Mapping[int, Any] = {}
        """Per step number, what a prefix run compares its output with besides values."""
        self.size: Any = ()

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a slotted module does within this run."""
        name = self.modules.get(module)
        if name is None or self._in_run:  # of another recycling of this model, or within a call that runs
            return self._tap(module, module._call_impl(*args, **kwargs))
        if self.position == len(self.steps):
            return self._after_the_cut(name, module, args, kwargs)
        step = self.steps[self.position]
        if step.name != name:
            if name in self.mixed:  # a use of it by what lies between two cuts
                return self._tap(module, module._call_impl(*args, **kwargs))
            raise CutError(
                f"the model called '{name}' where '{step.name}' was expected before the cut: it does not run its "
                "layers in the same order each time (LayerDrop, or a branch on a value). Switch that off, or cut "
                "before it."
            )
        self.position += 1
        last = self.position == len(self.steps)
        if last and self.compares_autocast:
            self._compare_autocast(args, kwargs)
        if last and self.mode == "glue":
            raise Stopped
        output = self._output(step, module, args, kwargs)
        for around in self.restored.get(step.number, ()):
            around.__dict__["training"] = True
        if last and self.at_cut is not None:
            self.at_cut()
        if self.mode == "prefix" and last:
            raise Stopped
        return output

    def _output(self, step: Step, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.mode in ("bypass", "glue") and step.action == "keep":
            return _own_containers(self.kept[step.number])
        if self.mode in ("bypass", "glue") and step.action == "skip":
            return _own_containers(self.absent[step.number])
        given = containers_of(args, kwargs) if self.forms else []
        output = self._tap(module, self._frozen(step, module, args, kwargs))
        if self.forms and step.action != "run":
            self._compare_form(step, output, given)
        if self.mode == "prefix" and step.action == "keep":
            self.captured[step.number] = _own_containers(output)
        return output

    def _compare_form(self, step: Step, output: Any, given: Sequence[tuple[Any, Any]]) -> None:
        """What a skipped or kept call gives besides values must be what it gave for the example."""
        form = self.forms.get(step.number)
        found = "" if form is None else form.mismatch(output, self.size)
        if not found and not step.wrote and written(given):
            found = "it wrote into a container that it was given"
        if found:
            raise BatchError(
                f"for this batch '{step.name}', which is skipped where rows are kept, gives something else besides "
                f"values than for the example: {found}. What comes after it may act on that. Make the recycling with "
                "an example like this batch (with padding, say), or cut before it."
            )

    def _tap(self, module: nn.Module, output: Any) -> Any:
        if self.taps:
            place = (module, self._times.get(module, 0))
            self._times[module] = place[1] + 1
            if place in self.taps:
                self.tapped[place] = output
        return output

    def _frozen(self, step: Step, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._in_run = True
        try:
            output = frozen_call(module, args, kwargs)
        except AbsentRead as stop:
            raise AbsentRead(stop.reason, stop.sources | {("run", step.number)}) from stop
        finally:
            self._in_run = False
        if self.mode == "bypass":
            sources = absent_sources(output)
            if sources:
                reason = f"'{step.name}' cannot run without what was skipped before it"
                raise AbsentRead(reason, sources | {("run", step.number)})
        return output

    def _after_the_cut(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name not in self.mixed:
            raise CutError(
                f"the model called '{name}' once more after the cut, which it did not do for the example: '{name}' "
                "belongs to the frozen prefix. Give an example that shows this use, or cut elsewhere."
            )
        return module._call_impl(*args, **kwargs)

    def _compare_autocast(self, *seen: Any) -> None:
        leaves = pytree.tree_leaves((self.kept.get(self.steps[-1].number), seen))
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        if device is not None:
            compare_autocast(self.autocast, device)


def compare_autocast(declared: torch.dtype | None, device: str) -> None:
    """Is autocast around the forward what the rows were made under?

    Raises:
        AutocastError: it is not.
    """
    ambient = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if ambient != declared:
        raise AutocastError(
            f"the forward runs under autocast {_words(ambient)}, but the rows were made under {_words(declared)}. "
            f"Declare it: recycle(..., autocast={ambient})."
        )


def _own_containers(tree: Any) -> Any:
    """The same leaves in lists and dicts of its own: a model may append to what a layer gave."""
    return tree if isinstance(tree, torch.Tensor) else pytree.tree_map(lambda leaf: leaf, tree)


def _words(dtype: torch.dtype | None) -> str:
    return "none" if dtype is None else str(dtype)


def absent_sources(tree: Any, depth: int = 0) -> frozenset[Any]:
    """Where the absent tensors in a nest would have come from; empty if there are none.

    Looks into the attributes of objects that PyTorch does not know as nests, too.
    """
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Absent):
            found |= leaf.sources or {("unknown", 0)}
        elif hasattr(leaf, "__dict__") and depth < 3 and not isinstance(leaf, (torch.Tensor, nn.Module, type)):
            found |= absent_sources(vars(leaf), depth + 1)
    return frozenset(found)


class Turns:
    """Many threads may run a model at once, or one that changes its flags for a moment, alone.

    A prefix run in training mode switches every module to eval; a suffix that another thread runs meanwhile would lose
    its dropout in silence.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}
        self._alone: int | None = None

    @contextmanager
    def take(self, alone: Callable[[], bool]) -> Iterator[None]:
        """Wait for one's turn; within it, the same thread may take more.

        Args:
            alone: whether nobody else may run meanwhile; asked when no flag is switched by another thread.
        """
        me = threading.get_ident()
        with self._changed:
            first = me not in self._running  # else within its own turn
            if first:
                self._changed.wait_for(lambda: self._alone is None and not (self._others(me) and alone()))
            if first and alone():
                self._alone = me
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                    self._alone = None if self._alone == me else self._alone
                self._changed.notify_all()

    def _others(self, me: int) -> bool:
        return any(thread != me for thread in self._running)


class Entry(Protocol):
    """What the model's own call goes to while it is recycled."""

    @property
    def mixed_modules(self) -> set[nn.Module]:
        """Modules that are called on both sides of the cut."""
        ...

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        ...


def stop_compiled_code_at_slots() -> None:
    """Have `torch.compile` leave its graph where a module within what it compiles has a slot.

    Dynamo asks such a module for hooks and for a forward of its own, finds none, and inlines its class's forward past
    the slot: the frozen layers would run in training mode, in silence (seen with torch 2.14). No public setting of one
    module tells it to stop; so its way of calling modules is wrapped, once in a process, and looks for our slots first.
    """
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

    inline: Any = UnspecializedNNModuleVariable.call_function
    if getattr(inline, "stops_at_slots", False):
        return

    @functools.wraps(inline)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        slot = slot_of(self.value)
        if getattr(slot, "is_recycling", False):  # a function that is not to be compiled: here the graph ends
            return VariableTracker.build(tx, slot).call_function(tx, list(args), kwargs)
        return inline(self, tx, args, kwargs)

    call_function.stops_at_slots = True  # pyright: ignore
    UnspecializedNNModuleVariable.call_function = call_function


_RUN: ContextVar[tuple[Any, Run] | None] = ContextVar("torchrecycle_run", default=None)


class Interceptor:
    """The slots of one model, shared by all its recyclings. `attach` and `detach` are inverses.

    Args:
        model: the root.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._users: dict[nn.Module, int] = {}
        self._own: dict[nn.Module, Callable[..., Any]] = {}
        self._kinds: dict[nn.Module, type] = {}
        self._trained: dict[nn.Module, bool] = {}
        self._others: list[nn.Parameter] = []
        self.entries: list[Entry] = []
        """What the model's own call does; the last attached governs."""
        self._frozen: dict[nn.Parameter, list[Any]] = {}
        self.turns = Turns()
        self.offloaded: Any = None
        """The `Offloaded` of the recycling that has put its prefix away, if one has."""

    @staticmethod
    def of(model: nn.Module) -> Interceptor | None:
        """The interceptor that is attached to this model, if any."""
        return getattr(slot_of(model), "interceptor", None)

    def __recycle_state__(self) -> str:
        """A data set or a collate function that leads to the model is the same whether the model is recycled or not."""
        return "interceptor"

    def bring_back(self) -> None:
        """Have all parameters on one device: the prefix is about to run."""
        if self.offloaded is not None:
            self.offloaded.bring_back()

    def slots(self, modules: Sequence[nn.Module]) -> None:
        """Put a slot into each of the modules."""
        for module in modules:
            if module not in self._users:
                self._refuse_recycled(module)
            if module not in self._users and is_compiled(module):
                raise CutError(
                    f"a module before the cut ({type(module).__name__}) has been compiled: what is frozen is computed "
                    "once, and compiled code would not notice that it is skipped. Compile only what comes after the "
                    "cut."
                )
        for module in modules:
            self._users[module] = self._users.get(module, 0) + 1
            if self._users[module] == 1:
                self._set(module, self._slot(module))

    def _set(self, module: nn.Module, function: Callable[..., Any]) -> None:
        set_slot(module, function)
        self._own[module], self._kinds[module] = function, type(module)

    def _clear(self, module: nn.Module) -> None:
        del self._kinds[module]
        if slot_of(module) is self._own.pop(module):  # else the user has compiled it since, and keeps that
            clear_slot(module)

    def refuse_lost(self, modules: Mapping[nn.Module, str]) -> None:
        """At each forward: are the slots still there, or has somebody else put something into them?

        Raises:
            CutError: a module was compiled in place, sharded or replaced since.
        """
        own, kinds = self._own, self._kinds
        for module in (self.model, *modules):
            if slot_of(module) is not own.get(module) or (type(module) is not kinds.get(module) and is_sharded(module)):
                self._refuse_lost(module, modules.get(module, ""))

    def _refuse_lost(self, module: nn.Module, name: str) -> None:
        what = f"'{name}', which lies before the cut," if name else "the model"
        if is_sharded(module):
            raise CutError(
                f"{what} was sharded with fully_shard after attaching, so that frozen weights are no longer at hand. "
                "Shard each module after the cut by itself, and neither the model nor what lies before the cut."
            )
        raise CutError(
            f"{what} was compiled in place after attaching (module.compile()), and compiled code does not look whether "
            "it is skipped. Use torch.compile(model), or compile modules after the cut; set "
            "module._compiled_call_impl = None and attach again to undo it."
        )

    def _refuse_recycled(self, module: nn.Module) -> None:
        if getattr(slot_of(module), "is_recycling", False):
            raise CutError(
                f"a part of the model ({type(module).__name__}) is recycled by itself already: detach that recycling "
                "first, or cut the outer model after this part."
            )

    def free(self, modules: Sequence[nn.Module]) -> None:
        """Take the slots out again, where nobody else needs them."""
        for module in modules:
            self._users[module] -= 1
            if not self._users[module]:
                del self._users[module]
                self._clear(module)

    def attach(self, entry: Entry) -> None:
        """Let the model's own call go to `entry`."""
        if not self.entries:
            stop_compiled_code_at_slots()
            self._set(self.model, self._root_slot())
        self.entries.append(entry)

    def detach(self, entry: Entry) -> None:
        """Undo `attach`."""
        self.entries.remove(entry)
        if not self.entries:
            self._clear(self.model)

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """No gradient for these. `thaw` is the inverse.

        Their ``.grad`` is dropped: an optimiser made before would still move them by momentum or weight decay.
        """
        if not self._frozen:
            self._trained = {m: any(p.requires_grad for p in m.parameters(recurse=False)) for m in self.model.modules()}
        for parameter in parameters:
            self._frozen.setdefault(parameter, [parameter.requires_grad, 0])[1] += 1
            parameter.requires_grad_(False)
            parameter.grad = None
        self._others = self._others or [p for p in self.model.parameters() if p.requires_grad]

    def _frozen_since(self, thawed: Sequence[nn.Parameter]) -> bool:
        """Whether the user has frozen the whole model since, as PEFT does with what it is put around: all that went on
        training. Then what was frozen for him stays so."""
        others = [p for p in self._others if p not in self._frozen and not any(p is one for one in thawed)]
        return bool(others) and not any(p.requires_grad for p in others)

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether the user has it trained, a recycling aside."""
        return self._frozen[parameter][0] if parameter in self._frozen else parameter.requires_grad

    def thaw(self, parameters: Iterable[nn.Parameter], modules: Iterable[tuple[nn.Module, nn.Module]] = ()) -> None:
        """Undo `freeze`, where no other recycling of the model still needs them frozen, nor the user has frozen all.

        Args:
            parameters: what was frozen.
            modules: those of the prefix, and what is in their places now: parameters that took the place of frozen
                ones were made frozen, too.
        """
        parameters = list(parameters)
        stays = self._frozen_since(parameters)
        for module, now in modules if not stays else ():
            trained = any(self._trained.get(part, False) for part in module.modules())
            self._thaw_replaced(now, trained, {*map(id, parameters)})
        for parameter in parameters:
            before = self._frozen[parameter]
            before[1] -= 1
            if not before[1]:
                del self._frozen[parameter]
                parameter.requires_grad_(before[0] and not stays)
        if not self._frozen:
            self._others = []

    def _thaw_replaced(self, module: nn.Module, trained: bool, known: set[int]) -> None:
        trained = self._trained.get(module, trained)
        for parameter in module.parameters(recurse=False):
            plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
            if trained and plain and id(parameter) not in known and parameter not in self._frozen:
                parameter.requires_grad_(True)
        for child in module.children():
            self._thaw_replaced(child, trained, known)

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Within this context the slots ask `run`."""
        token = _RUN.set((self, run))
        try:
            yield
        finally:
            _RUN.reset(token)

    def _root_slot(self) -> Callable[..., Any]:
        # Compiled code does not look at the slots of inner modules, so the model's own call must stay outside of it.
        @torch._dynamo.disable
        def root(*args: Any, **kwargs: Any) -> Any:
            current = _RUN.get()
            if current is not None and current[0] is self:  # the model calls itself within its own forward
                return self.model._call_impl(*args, **kwargs)
            return self.entries[-1].enter(args, kwargs)

        root.interceptor = self  # pyright: ignore
        root.is_recycling = True  # pyright: ignore
        return root

    def _slot(self, module: nn.Module) -> Callable[..., Any]:
        @torch._dynamo.disable
        def slot(*args: Any, **kwargs: Any) -> Any:
            current = _RUN.get()
            if current is not None and current[0] is self:
                return current[1].call(module, args, kwargs)
            return self._outside(module, args, kwargs)

        slot.is_recycling = True  # pyright: ignore
        return slot

    def _outside(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A module of the prefix called outside of the model's own forward."""
        if self.entries and slot_of(self.model) is not self._own.get(self.model):
            self._refuse_lost(self.model, "")
        if any(isinstance(leaf, Absent) for leaf in pytree.tree_leaves((args, dict(kwargs)))):
            raise CutError(
                "a checkpoint region reaches across the cut: it computes the frozen layers again during backward, "
                "after the forward has returned, and would give wrong gradients. Checkpoint only after the cut."
            )
        self.bring_back()
        if any(module in entry.mixed_modules for entry in self.entries):
            return module._call_impl(*args, **kwargs)
        with self.turns.take(lambda: any(part.training for part in module.modules())):
            return frozen_call(module, args, kwargs)
