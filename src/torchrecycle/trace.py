"""The order in which a model runs: one forward, watched.

`trace` runs a model once and writes down every module call with its beginning and end: in a ResNet-34, 91 calls, of
which ``layer2`` is number 40 and ends after 48 % of the time. From this list follow the cuts, what comes before each,
and what each saves.

A call is watched, and later skipped, in the instance slot ``module._compiled_call_impl``: ``Module.__call__`` consults
it before hooks and ``forward``, and ``__getstate__`` drops it, so that a ``deepcopy`` or a pickle of the model is
plain. Replacing ``module.forward`` would break both (a copy runs the original's weights), and a changed class breaks
parametrisation and FSDP2. It is a private slot of PyTorch: a contract test runs on each version that we declare.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchrecycle.errors import CutError

__all__ = [
    "Call",
    "Trace",
    "attributes_kept",
    "clear_slot",
    "containers_of",
    "is_compiled",
    "is_sharded",
    "set_slot",
    "slot_of",
    "trace",
    "undisturbed",
    "written",
]

SLOT = "_compiled_call_impl"


def is_compiled(module: nn.Module) -> bool:
    """Whether it was compiled, in place or as a wrapper: its code does not look at what happens inside."""
    slot = slot_of(module)
    in_place = slot is not None and not getattr(slot, "is_recycling", False)
    return in_place or (type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) governs its parameters: it swaps them in each forward."""
    return any(k.__name__ == "FSDPModule" and k.__module__.startswith("torch.") for k in type(module).__mro__)


def slot_of(module: nn.Module) -> Any:
    """What lies in the module's slot, or None."""
    return module.__dict__.get(SLOT)


def set_slot(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function` be called in place of the module. `clear_slot` is its inverse."""
    module.__dict__[SLOT] = function


def clear_slot(module: nn.Module) -> None:
    """Undo `set_slot`: the module's ``__dict__`` is as before."""
    module.__dict__.pop(SLOT, None)


# -- leaving no trace --------------------------------------------------------------------------------------------------


def random_state() -> tuple[Any, ...]:
    """The states of Python's, NumPy's and torch's generators (with those of CUDA, if it was used)."""
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    )


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the model and the generators are as before: attributes, flags, buffers, gradients."""
    state = random_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with attributes_kept(model.modules()):
            yield
    finally:
        with torch.no_grad():
            for (
                buffer,
                value,
            ) in buffers:  # by value: batch norm moves its statistics without moving their version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_random_state(state)


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever runs inside, the modules have the same attributes afterwards, and their dicts, lists and sets the same
    content."""
    modules = list(modules)
    # Their parameters are swapped in each forward, by whoever keeps account of it.
    swapped = {part for module in modules if is_sharded(module) for part in module.modules()}
    kept = [(module, dict(module.__dict__), _containers(module)) for module in modules if module not in swapped]
    try:
        yield
    finally:
        for module, attributes, containers in kept:
            _put_back(module.__dict__, attributes)
            for container, content in containers:
                _refill(container, content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's dicts, lists and sets (parameters, hooks, caches), each with a copy of its content."""
    found = [value for value in module.__dict__.values() if isinstance(value, (dict, list, set))]
    return [(value, _copied(value)) for value in found]


def _copied(value: Any) -> Any:
    if type(value) in _PLAIN_CONTAINERS:
        return value.copy() if value else type(value)()
    return copy.copy(value)


_PLAIN_CONTAINERS = frozenset({dict, list, set, OrderedDict})


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Only what differs is touched: another thread may be running the model."""
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _refill(container: Any, content: Any) -> None:
    if _is_same(container, content):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _is_same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, set):
        return all(part in b for part in a)
    values = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    return (not isinstance(a, dict) or list(a) == list(b)) and all(x is y for x, y in values)


# -- the trace ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One call of one module within one forward."""

    number: int
    """Position in the order of beginning; the model's own call is 0."""
    name: str
    """Qualified name of the module: ``layer1.0.conv1``; the model itself is ``""``."""
    module: nn.Module = field(repr=False)
    occurrence: int
    """0 for the module's first call in this forward."""
    parent: int
    """Number of the call within which it happened; -1 for the model's own."""
    begin: int
    """Time of its beginning, counted in events (begins and ends)."""
    end: int = -1
    """Time of its end, in events."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """Beginning and end, in seconds since the model's call began."""
    flops: tuple[int, int] = (0, 0)
    """Floating point operations done before its beginning and before its end, if counted."""
    output: Any = field(default=None, repr=False)
    """What it returned."""
    wrote: bool = False
    """Whether it changed a dict or a list that it was given."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward: its calls in order of beginning, and what it returned."""

    calls: Sequence[Call]
    output: Any = field(repr=False)
    written: frozenset[tuple[str, str]] = field(default=frozenset(), repr=False)
    """Attributes that the forward itself sets, as (module, attribute): counters and caches, no settings."""

    def of(self, name: str) -> list[Call]:
        """The calls of the module of that name; of ``block#2`` its second call."""
        module, _, number = name.partition("#")
        calls = [call for call in self.calls if call.name == module]
        if not number:
            return calls
        return calls[int(number) - 1 : int(number)] if number.isdigit() and int(number) else []

    def ancestors(self, call: Call) -> list[Call]:
        """The calls around `call`, the innermost first."""
        around = []
        while call.parent >= 0:
            call = self.calls[call.parent]
            around.append(call)
        return around

    def find(self, cut: str) -> Call:
        """The one call that a cut's name means.

        Raises:
            KeyError: there is none, or there are several: then ``block#1``, ``block#2`` tell them apart.
        """
        calls = self.of(cut)
        if not cut or len(calls) != 1:
            raise KeyError(cut)
        return calls[0]

    def outermost_until(self, cut: Call) -> list[Call]:
        """The outermost calls that end no later than `cut`, in order; `cut` is the last."""
        around = {call.number for call in self.ancestors(cut)}
        return [call for call in self.calls if call.end <= cut.end and call.parent in around]


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    count_flops: bool = False,
    keep_outputs: bool = True,
) -> Trace:
    """Run the model once as it stands, without gradient, and write down every module call.

    The model and all generators are as before afterwards. Compiled modules are seen as a whole.

    Args:
        model: any module; its training flags are left as they are.
        args: positional inputs.
        kwargs: keyword inputs.
        count_flops: count floating point operations too (slows the run, so that its seconds mean nothing).
        keep_outputs: hold what each call returned.

    Raises:
        CutError: the model itself has been compiled, or is recycled already inside another trace.
    """
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = name
    if is_compiled(model):
        raise CutError(
            "the model itself has been compiled in place (model.compile()): compiled code ignores what happens to "
            "inner modules. Attach first, or compile only the modules after the cut."
        )
    recorder = _Recorder(names, count_flops, keep_outputs)
    args, kwargs = pytree.tree_map(_own_copy, (tuple(args), dict(kwargs)))  # a model may write into its input
    with undisturbed(model), torch.no_grad():
        for module in list(_watchable(model)):
            set_slot(module, recorder.slot(module))
        with recorder.counting():
            before = {module: dict(module.__dict__) for module in names}
            output = model(*args, **kwargs)
        written = {(names[m], attribute) for m, own in before.items() for attribute in _differing(own, m.__dict__)}
    return Trace(recorder.calls, output, frozenset(written))


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [name for name in {**before, **after} if before.get(name, missing) is not after.get(name, missing)]


def _watchable(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but those inside of a compiled one, whose code would not look at their slots."""
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if not is_compiled(module):
                stack.extend(module.children())


class _Recorder:
    def __init__(self, names: Mapping[nn.Module, str], count_flops: bool, keep_outputs: bool) -> None:
        self.calls: list[Call] = []
        self._names = names
        self._open: list[int] = []
        self._events = 0
        self._times: dict[nn.Module, int] = {}
        self._flops: Any = None
        self._count_flops = count_flops
        self._keep_outputs = keep_outputs
        self._started = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        if not self._count_flops:
            yield
            return
        self._flops = _Flops()
        with self._flops:
            yield

    def _now(self) -> tuple[float, int]:
        return time.perf_counter() - self._started, self._flops.total if self._flops else 0

    def slot(self, module: nn.Module) -> Callable[..., Any]:
        compiled = slot_of(module)
        run = module._call_impl if compiled is None or getattr(compiled, "is_recycling", False) else compiled

        @torch._dynamo.disable  # what is compiled around it must not trace into it
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.calls:
                self._started = time.perf_counter()
            occurrence = self._times.get(module, 0)
            self._times[module] = occurrence + 1
            parent = self._open[-1] if self._open else -1
            this = Call(len(self.calls), self._names[module], module, occurrence, parent, self._events)
            self.calls.append(this)
            self._events += 1
            self._open.append(this.number)
            given = containers_of(args, kwargs)
            began = self._now()
            try:
                output = run(*args, **kwargs)
            finally:
                self._open.pop()
                ended = self._now()
                this.seconds, this.flops = (began[0], ended[0]), (began[1], ended[1])
                this.end = self._events
                self._events += 1
            this.wrote = written(given)
            # A copy of its containers: the model may append to a list that a layer gave.
            this.output = pytree.tree_map(_itself if self._keep_outputs else _form_only, output)
            return output

        return call


class _Flops(TorchDispatchMode):
    """Counts what PyTorch's own counter counts, without its look at modules, which fails on parameters as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            self.total += count(*args, **kwargs, out_val=output)
        return output


def _own_copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def containers_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The dicts and lists that a call is given, each with a copy."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, (dict, list))]
    return [(value, copy.copy(value)) for value in found]


def written(given: Sequence[tuple[Any, Any]]) -> bool:
    """Whether one of these was changed since `containers_of` saw it."""
    return any(not _is_same(now, before) for now, before in given)


def _itself(leaf: Any) -> Any:
    return leaf


def _form_only(leaf: Any) -> Any:
    """A tensor's form without its value."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty(0, dtype=leaf.dtype, device=leaf.device).new_empty(()).expand(leaf.shape)
    return leaf
