"""Where a model can be cut, what each cut saves and what it costs.

For a ResNet-34 at 192 px: ``layer2`` freezes 1.3 million of 21.3 million parameters, saves half of the forward's time
and costs 294,912 bytes per object; ``layer3`` three quarters, at half the bytes. ``level=0.5`` asks for the valid cut
nearest to half of the blocks; blocks are the children of the outermost longest list of a model.

Whether that pays depends on how often the data set is gone through and on the disk: ``cuts(...).predict(objects=8144,
epochs=30, store="activations/")`` writes and reads some rows of each cut's size there, and says what filling, reading
and computing again take. What a training then takes in all, with the objects' own reading and the steps, is measured by
a sweep's prediction.

Each cut is tried by some six forwards, all of them on the same two objects. Costly operations are therefore computed
once and remembered with what they were given: a ViT-B/16 with its 14 rows takes 12 seconds of one core, not 38.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchrecycle.bypass import (
    BatchRule,
    Bypass,
    Inputs,
    Plan,
    Probes,
    device_of,
    evaluating,
    example_inputs,
    make_plan,
    parameter_names,
    run_or_explain,
    sequences_of,
)
from torchrecycle.errors import CutError
from torchrecycle.store.sizes import bytes_in_words, counted
from torchrecycle.store.speed import Speed, seconds_per_cold_byte, speed_of
from torchrecycle.trace import Call, Trace, trace

__all__ = [
    "Cut",
    "CutPrediction",
    "CutPredictions",
    "Cuts",
    "blocks_of",
    "choose_cut",
    "cuts",
    "level_of",
    "level_of_plan",
]


@dataclass(frozen=True, slots=True)
class Cut:
    """One place where a model can be divided."""

    name: str
    """Qualified name of the module whose output is kept."""
    level: float
    """Share of the blocks that is recycled: 0 none, 1 all."""
    valid: bool
    """Whether the model can be divided here."""
    reason: str
    """Why not; empty if it can."""
    parameters: int
    """Number of parameters that are frozen."""
    flops_share: float
    """Share of the forward's floating point operations that is saved, 0 to 1; counts what PyTorch's counter counts
    (matrix products, convolutions, attention)."""
    seconds_share: float
    """Share of the forward's measured time that is saved, 0 to 1."""
    bytes_per_object: int
    """Bytes kept per object, for objects of the example's size."""
    leaves: int
    """Number of tensors kept per object."""


class Cuts(Sequence[Cut]):
    """Cuts in running order. Prints as a table and shows itself in a notebook."""

    def __init__(
        self,
        model: str,
        found: Sequence[Cut],
        *,
        objects: int = 0,
        seconds: float = 0.0,
        flops: int = 0,
        parameters: int = 0,
    ) -> None:
        self.model = model
        self.objects = objects
        """Objects in the example, which `seconds` and `flops` are for."""
        self.seconds = seconds
        """Time of one forward in eval mode without gradient, the quickest of three: a cut saves its share of it."""
        self.flops = flops
        """Floating point operations of one forward."""
        self.parameters = parameters
        """Parameters of the whole model."""
        self._cuts = tuple(found)

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, at: int) -> Cut: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Cut]: ...
    def __getitem__(self, at: int | slice) -> Any:
        return self._cuts[at]

    def nearest(self, level: float) -> Cut | None:
        """The valid cut nearest to a level, ties to less recycling, as ``recycle(level=)`` chooses; None without any.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
            >>> cuts(model, torch.randn(2, 4)).nearest(0.5).name
            '1'
        """
        return min((cut for cut in self._cuts if cut.valid), key=lambda cut: _distance(cut.level, level), default=None)

    def predict(
        self, *, objects: int, epochs: int = 1, store: str | os.PathLike[str] | None = None, memory: int | None = None
    ) -> CutPredictions:
        """What keeping the rows of a data set costs and saves, at each valid cut, without a training step.

        Some rows of each cut's size are written to a temporary store on the store's disk, and read again. Computing is
        counted at the speed of the example's batch, so that one of the training's size says most.

        Args:
            objects: how many objects the data set has, of the example's size.
            epochs: how often it will be gone through, in training or inference.
            store: where rows would be kept: a folder, or ``memory://``; the system's folder for temporary files if
                None.
            memory: bytes of rows that the system can hold; all that the machine has if None. Of what is more, each row
                comes from the disk.

        Raises:
            ValueError: there are no objects or no epochs, or the example has no size.
            StoreError: nothing can be written there.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
            >>> found = cuts(model, torch.randn(2, 64)).predict(objects=1000, epochs=3, store="memory://")
            >>> found.of("1").bytes_kept
            256000
        """
        if objects < 1 or epochs < 1 or not self.objects:
            raise ValueError(
                f"objects={objects} and epochs={epochs} of an example of {self.objects} objects: at least 1 of each"
            )
        if memory is None:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        prefix = {cut.name: cut.seconds_share * self.seconds / self.objects for cut in self._cuts if cut.valid}
        speeds = {size: speed_of(store, size) for size in {cut.bytes_per_object for cut in self._cuts if cut.valid}}
        found = [
            CutPrediction(
                cut=cut.name,
                level=cut.level,
                objects=objects,
                epochs=epochs,
                bytes_kept=objects * cut.bytes_per_object,
                fill_seconds=objects * (prefix[cut.name] + speeds[cut.bytes_per_object].write_seconds),
                computing_seconds=objects * prefix[cut.name],
                reading_seconds=_reading_seconds(cut.bytes_per_object, objects, speeds, store, memory),
            )
            for cut in self._cuts
            if cut.valid
        ]
        return CutPredictions(self.model, found)

    def heading(self) -> str:
        """The model, its size, and what one forward takes."""
        if not self.objects:
            return self.model
        return (
            f"{self.model}: {_amount(self.parameters).strip()} parameters; a forward of {self.objects} objects: "
            f"{self.seconds * 1e3:,.{self.seconds < 0.1:d}f} ms, {_amount(self.flops)}FLOPs"
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield "cut", "level", "frozen", "FLOPs saved", "time saved", "bytes/object", "kept"
        for c in self._cuts:
            shares = f"{c.flops_share:.0%}", f"{c.seconds_share:.0%}"
            if c.valid:
                yield c.name, f"{c.level:.2f}", f"{c.parameters:,}", *shares, f"{c.bytes_per_object:,}", f"{c.leaves}"
            else:
                yield c.name, f"{c.level:.2f}", "no:", c.reason, "", "", ""

    def __repr__(self) -> str:
        rows = list(self._rows())
        widths = [max(len(row[i]) for row in rows if row[2] != "no:" or i < 2) for i in range(7)]
        lines = []
        for row in rows:
            if row[2] == "no:":
                lines.append(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  no: {row[3]}")
            else:
                lines.append(
                    "  ".join(
                        [f"{row[0]:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))]
                    )
                )
        return f"{self.heading()}; where it can be cut:\n" + "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        def row(cells: tuple[str, ...]) -> str:
            name, *others = (html.escape(cell) for cell in cells)
            if cells[2] == "no:":  # the reason has the room of all figures
                others = [others[0], f'<td colspan="5" style="text-align: left">no: {others[2]}</td>']
                return f'<tr><th scope="row">{name}</th><td>{others[0]}</td>{others[1]}</tr>'
            return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"

        head, *rows = self._rows()
        heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
        return (
            f"<table><caption>{html.escape(self.heading())}</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(map(row, rows))}</tbody></table>"
        )


@dataclass(frozen=True, slots=True)
class CutPrediction:
    """What keeping the rows of a data set costs and saves at one cut. What comes after the cut is the same either way,
    and not in any of these seconds; nor is the reading of the objects themselves, which rows save too."""

    cut: str
    """Name of the module whose output is kept."""
    level: float
    """Share of the blocks that is recycled."""
    objects: int
    """In the data set."""
    epochs: int
    """How often it is gone through."""
    bytes_kept: int
    """Bytes of all rows."""
    fill_seconds: float
    """To compute all rows and write them."""
    computing_seconds: float
    """To compute them again in an epoch."""
    reading_seconds: float
    """To read them in an epoch, at random."""

    @property
    def pays(self) -> bool:
        """Whether reading is quicker than computing again."""
        return self.reading_seconds < self.computing_seconds

    @property
    def epochs_until_paid(self) -> int | None:
        """After how many epochs filling has paid; None if never."""
        saved = self.computing_seconds - self.reading_seconds
        return max(1, math.ceil(self.fill_seconds / saved)) if saved > 0 else None

    @property
    def seconds_saved(self) -> float:
        """In all epochs, less filling; negative where it does not pay."""
        return self.epochs * (self.computing_seconds - self.reading_seconds) - self.fill_seconds


class CutPredictions(Sequence[CutPrediction]):
    """Predictions in running order. Prints as a table."""

    def __init__(self, model: str, found: Sequence[CutPrediction]) -> None:
        self.model = model
        self._found = tuple(found)

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, at: int) -> CutPrediction: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[CutPrediction]: ...
    def __getitem__(self, at: int | slice) -> Any:
        return self._found[at]

    def of(self, cut: str) -> CutPrediction:
        """
        Raises:
            KeyError: there is no such valid cut.
        """
        for one in self._found:
            if one.cut == cut:
                return one
        raise KeyError(f"no valid cut {cut!r}: there are {[one.cut for one in self._found]}")

    def __repr__(self) -> str:
        if not self._found:
            return f"{self.model}: there is no valid cut to keep the rows of"
        rows = [("cut", "level", "kept", "filling", "read in an epoch", "computed again", "it pays")]
        rows += [
            (
                one.cut,
                f"{one.level:.2f}",
                bytes_in_words(one.bytes_kept),
                f"{one.fill_seconds:.3g} s",
                f"{one.reading_seconds:.3g} s",
                f"{one.computing_seconds:.3g} s",
                _paid(one),
            )
            for one in self._found
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(
                [f"{row[0]:<{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(row[1:6], widths[1:], strict=True)), row[6]]
            )
            for row in rows
        ]
        first = self._found[0]
        return f"{self.model}, {first.objects:,} objects, {counted(first.epochs, 'epoch')}:\n" + "\n".join(lines)


def _paid(one: CutPrediction) -> str:
    after = one.epochs_until_paid
    if after is None:
        return "never: reading is slower than computing again"
    if one.seconds_saved < 0:
        return f"not yet: after {counted(after, 'epoch')}"
    return f"after {counted(after, 'epoch')}, and saves {one.seconds_saved:.3g} s"


def _reading_seconds(
    row_bytes: int, objects: int, speeds: Mapping[int, Speed], store: str | os.PathLike[str] | None, memory: int
) -> float:
    """Of an epoch: all rows from the page cache, and those that do not fit into memory from the disk before that."""
    missing = row_bytes * objects - memory
    cold = 0.0
    if missing > 0 and not (store is not None and "://" in os.fspath(store)):
        cold = missing * seconds_per_cold_byte(store, row_bytes)
    return objects * speeds[row_bytes].read_seconds + cold


def _amount(number: int) -> str:
    """``86,567,656`` as ``86.6 M``, ``512`` as ``512``; what it counts follows."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} "


def cuts(model: nn.Module, example: Any, *, inputs: Any = None, mask: str | None = None, all: bool = False) -> Cuts:
    """Where a model can be cut, in running order, and what each cut saves and costs.

    The model is run on the example four times, and some six times per cut on two objects of it, in which matrix
    products and convolutions are computed only once. It is as before afterwards.

    Args:
        model: any module, on any device.
        example: a batch of two objects or more, as the user's loop has it: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments.
        inputs: ``batch -> (args, kwargs)``, in place of what the example says.
        mask: the name of the input that tells padding; ``attention_mask`` where there is one.
        all: every module that is called once, instead of the blocks and what follows them.

    Raises:
        BatchError: the model does not run on the example.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(cut.name, cut.bytes_per_object) for cut in cuts(model, torch.randn(2, 4)) if cut.valid]
        [('0', 32), ('1', 32)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    rule = BatchRule(parameter_names(model), example, inputs)
    call = example_inputs(model, rule, example)
    probes = run_or_explain(model, lambda: Probes.of(model, call, sequences_of(call, mask)))
    measured = _measure(model, call)
    traced = probes.traces[0]
    names = _all_names(traced) if all else _block_names(model, traced)
    levels = _Levels(model, traced)
    with _Remembering(model):
        found = [_cut(probes, measured, levels, name) for name in names]
    whole = measured.counted.calls[0].flops[1], sum(parameter.numel() for parameter in model.parameters())
    return Cuts(
        type(model).__name__,
        found,
        objects=call.batch(),
        seconds=measured.timed.calls[0].seconds[1],
        flops=whole[0],
        parameters=whole[1],
    )


# -- computing once ----------------------------------------------------------------------------------------------------

REMEMBERED = 1 << 31
"""Bytes that may be held in operands and results; what comes later is computed each time."""

_COSTLY = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("convolution", "default"),
        ("addmm", "default"),
        ("mm", "default"),
        ("bmm", "default"),
        ("baddbmm", "default"),
        ("linear", "default"),
        ("_scaled_dot_product_flash_attention_for_cpu", "default"),
    )
    if hasattr(torch.ops.aten, name)
)
"""Operations that cost far more than to compare their operands: of a ResNet-50's time, convolutions take two thirds."""


class _Remembering(TorchDispatchMode):
    """Computes a costly operation once per operands, and gives copies of its result after that.

    Trying 200 cuts of a ResNet-50 runs the same convolutions on the same two images some thousand times. Operands are
    compared to the last bit, so that all runs see the same values as without.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Views of a parameter (a transposed weight) are new objects each time, but lie where it lies.
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._known: dict[Any, list[tuple[list[torch.Tensor], Any]]] = {}
        self._left = REMEMBERED

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _COSTLY:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(type(t) not in (torch.Tensor, nn.Parameter) or t.layout != torch.strided or t.is_meta for t in tensors):
            return func(*args, **kwargs)
        if "dropout_p" in kwargs or (func.name().startswith("aten::_scaled") and len(args) > 3 and args[3]):
            return func(*args, **kwargs)
        fixed = [t.untyped_storage().data_ptr() in self._weights for t in tensors]
        given = [t for t, is_weight in zip(tensors, fixed, strict=True) if not is_weight]
        described = iter([_describe(t, is_weight) for t, is_weight in zip(tensors, fixed, strict=True)])
        key = func, *(next(described) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        known = self._known.setdefault(key, [])
        for operands, result in known:
            if all(torch.equal(a, b) for a, b in zip(operands, given, strict=True)):
                return _copied(result)
        result = func(*args, **kwargs)
        self._left -= sum(t.nbytes for t in [*given, *pytree.tree_leaves(result)] if isinstance(t, torch.Tensor))
        if self._left >= 0:
            known.append(([t.clone() for t in given], _copied(result)))
        return result


def _describe(tensor: torch.Tensor, is_weight: bool) -> tuple[Any, ...]:
    form = tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
    return (*form, tensor.data_ptr()) if is_weight else form


def _copied(result: Any) -> Any:
    """Later layers may write into what they are given."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, result)


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    timed: Trace = field(repr=False)
    counted: Trace = field(repr=False)


def _measure(model: nn.Module, inputs: Inputs) -> _Measured:
    """One forward by the clock (the quickest of three) and one by the counter."""
    with evaluating(model):
        runs = [trace(model, inputs.args, inputs.kwargs, keep_outputs=False) for _ in range(3)]
        timed = min(runs, key=lambda run: run.calls[0].seconds[1])
        return _Measured(timed, trace(model, inputs.args, inputs.kwargs, count_flops=True, keep_outputs=False))


def _ambient_autocast(model: nn.Module) -> torch.dtype | None:
    device = device_of(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cut(probes: Probes, measured: _Measured, levels: _Levels, name: str) -> Cut:
    call = _calls(probes.traces[0], name)[0]
    number = call.number
    timed, counted = measured.timed.calls, measured.counted.calls
    seconds = timed[number].seconds[1] / max(timed[0].seconds[1], 1e-9)
    flops = counted[number].flops[1] / max(counted[0].flops[1], 1)
    level = levels.of(name)
    try:
        plan = make_plan(probes, name)
        bypass = Bypass(probes.model, plan, probes.traces[0], autocast=_ambient_autocast(probes.model))
    except CutError as error:
        reason = str(error).removeprefix(f"cannot cut at '{name}': ").removesuffix(" See cuts(model, example).")
        return Cut(name, level, False, reason, 0, flops, seconds, _bytes(call.output), 0)
    frozen = sum(parameter.numel() for parameter in bypass.prefix_parameters.values())
    rest = [
        p for n, p in probes.model.named_parameters() if n not in bypass.prefix_parameters and n not in bypass.untouched
    ]
    kept = _row_bytes(plan, probes)
    if not rest:
        reason = "nothing would be left to train after it"
        return Cut(name, level, False, reason, frozen, flops, seconds, kept, len(plan.layouts))
    return Cut(name, level, True, "", frozen, flops, seconds, kept, len(plan.layouts))


def _row_bytes(plan: Plan, probes: Probes) -> int:
    """Bytes kept per object, counted in what the kept calls gave for the example."""
    calls = probes.traces[0].calls
    leaves = [leaf for number in plan.kept for leaf in plan.forms[number].taken(calls[number].output)]
    objects = probes.sizes[0][0]
    return sum(
        leaf.numel() // objects * layout.kept.itemsize for leaf, layout in zip(leaves, plan.layouts, strict=True)
    )


def _bytes(output: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) // 2


# -- blocks and levels -------------------------------------------------------------------------------------------------


ROWS = 24
"""A list of more plain layers than this is shown by groups."""

WEIGHTY = 0.25
"""A list of blocks counts if it holds at least this share of the modules that the largest one holds."""


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the blocks: children of the outermost longest ``Sequential``, ``ModuleList`` or list of stages.

    A list of stages is a row of siblings with one name and running numbers (``layer1`` to ``layer4``, ``Mixed_5b`` to
    ``Mixed_7c``). A list in which one child holds over nine tenths of the parameters is a wrapper: the blocks are
    looked for inside of it. Stems and heads are lists too, but hold few modules. Where several lists hold many (an
    encoder and a decoder, two towers), the blocks of all of them count.
    """
    return [name for tower in _towers(model) for name in tower]


def _towers(model: nn.Module) -> list[list[str]]:
    """The lists of blocks; one for most models."""
    lists = list(_lists(model, "", 3)) or list(_lists(model, "", 2))
    outermost = [one for one in lists if not any(_inside(one, other) for other in lists if other is not one)]
    if not outermost:
        return []
    sizes = [sum(sum(1 for _ in model.get_submodule(name).modules()) for name in one) for one in outermost]
    largest = sizes.index(max(sizes))
    return [
        one
        for at, one in enumerate(outermost)
        if at == largest or (sizes[at] >= WEIGHTY * sizes[largest] and not _is_plain(model, one))
    ]


def _is_plain(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether half of them or more are single layers, as in VGG's features or a head of linear layers."""
    single = [next(model.get_submodule(name).children(), None) is None for name in names]
    return sum(single) >= len(names) / 2


def _lists(module: nn.Module, at: str, least: int) -> Iterator[list[str]]:
    """Every list of `least` blocks or more that the module holds, at any depth."""
    children = list(module.named_children())
    names = [f"{at}.{name}" if at else name for name, _ in children]
    if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(children) >= least and not _is_wrapper(children):
        yield names
    else:
        for stages in _stages(children, least):
            if not _is_wrapper(stages):
                yield [f"{at}.{name}" if at else name for name, _ in stages]
    for name, (_, child) in zip(names, children, strict=True):
        yield from _lists(child, name, least)


def _stages(children: Sequence[tuple[str, nn.Module]], least: int) -> Iterator[list[tuple[str, nn.Module]]]:
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, child in children:
        match = re.fullmatch(r"(\D*?)_?\d+[a-z]?", name)
        if match and next(child.children(), None) is not None:
            groups.setdefault(match[1], []).append((name, child))
    yield from (group for group in groups.values() if len(group) >= least)


def _is_wrapper(children: Sequence[tuple[str, nn.Module]]) -> bool:
    sizes = [sum(p.numel() for p in child.parameters()) for _, child in children]
    deep = [next(child.children(), None) is not None for _, child in children]
    return max(sizes) > 0.9 * sum(sizes) and deep[sizes.index(max(sizes))]


def _inside(inner: Sequence[str], outer: Sequence[str]) -> bool:
    return any(inner[0].startswith(f"{name}.") for name in outer)


def level_of(model: nn.Module, traced: Trace, name: str) -> float:
    """The share of the blocks that has ended when the cut is there."""
    return _Levels(model, traced).of(name)


def level_of_plan(model: nn.Module, traced: Trace, plan: Plan) -> float:
    """The share of the blocks that lies before the cut; of a joint cut, before any of its parts."""
    levels = _Levels(model, traced)
    return levels.of(plan.cut) if len(plan.cuts) == 1 else levels.before({step.number for step in plan.steps})


class _Levels:
    """The levels of many cuts of one model."""

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self._traced = traced
        blocks = [name for tower in _called_towers(model, traced) for name in tower]
        self._blocks = [call for block in blocks for call in _calls(traced, block)]
        self._ends = [call.end for call in self._blocks]

    def before(self, steps: set[int]) -> float:
        """The share of the blocks that are among these calls or within them."""
        within = [steps & {call.number, *(c.number for c in self._traced.ancestors(call))} for call in self._blocks]
        return round(sum(map(bool, within)) / max(len(within), 1), 4)

    def of(self, name: str) -> float:
        end = _calls(self._traced, name)[0].end
        if not self._ends:
            return round(end / max(self._traced.calls[0].end, 1), 4)
        return round(sum(other <= end for other in self._ends) / len(self._ends), 4)


def _calls(traced: Trace, name: str) -> list[Call]:
    """The calls that a cut's name means: of ``block`` all calls of that module, of ``block#2`` the second."""
    module, _, number = name.partition("#")
    calls = traced.of(module)
    return calls[int(number) - 1 : int(number)] if number else calls


def _called_towers(model: nn.Module, traced: Trace) -> list[list[str]]:
    """The lists of blocks in running order, without what this example does not run."""
    times = Counter(call.name for call in traced.calls)
    towers = [[name for block in tower for name in _called(model, times, block)] for tower in _towers(model)]
    return sorted((tower for tower in towers if tower), key=lambda tower: _calls(traced, tower[0])[0].begin)


def _called(model: nn.Module, times: Mapping[str, int], name: str) -> list[str]:
    """The block, or, since a ``ModuleList`` is not called itself, its children."""
    if times[name]:
        return [name]
    children = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    return [inner for child in children for inner in _called(model, times, child)]


def _all_names(traced: Trace) -> list[str]:
    times = Counter(call.name for call in traced.calls)
    once = [call for call in traced.calls if call.name and times[call.name] == 1]
    return [call.name for call in sorted(once, key=lambda call: call.end)]


def _block_names(model: nn.Module, traced: Trace) -> list[str]:
    """The blocks in running order, and what is called after each list of them: what stands before the head."""
    towers = [_calls_of(traced, _grouped(model, tower)) for tower in _called_towers(model, traced)]
    towers = [tower for tower in towers if tower]
    if not towers:
        return [_name(call, traced) for call in _topmost(traced)]
    names = []
    for tower, following in zip(towers, [*towers[1:], None], strict=True):
        until = min(call.begin for call in following) if following else traced.calls[0].end
        names += [_name(call, traced) for call in (*tower, *_after(traced, tower, until))]
    return names


def _calls_of(traced: Trace, names: Sequence[str]) -> list[Call]:
    """The calls of those modules in running order."""
    return sorted((call for name in names for call in _calls(traced, name)), key=lambda call: call.end)


def _name(call: Call, traced: Trace) -> str:
    """The name of a cut at that call."""
    return call.name if len(_calls(traced, call.name)) == 1 else f"{call.name}#{call.occurrence + 1}"


def _grouped(model: nn.Module, tower: Sequence[str]) -> Sequence[str]:
    """Of a long list of plain layers, those before the next layer with a weight: 8 of VGG-11's 29."""
    if len(tower) <= ROWS or not _is_plain(model, tower):
        return tower
    begins = [any(parameter.dim() > 1 for parameter in model.get_submodule(name).parameters()) for name in tower]
    return [name for name, begin in zip(tower, [*begins[1:], True], strict=True) if begin]


def _topmost(traced: Trace) -> list[Call]:
    """Where there is no list: the outermost calls; the largest is opened until there are three."""
    shown = [call for call in traced.calls if call.parent == 0]
    while 0 < len(shown) < 3:
        largest = max(shown, key=lambda call: call.end - call.begin)
        inner = [call for call in traced.calls if call.parent == largest.number]
        if not inner:
            break
        shown = [call for call in shown if call is not largest] + inner
    return sorted(shown, key=lambda call: call.end)


def _after(traced: Trace, tower: Sequence[Call], until: int) -> list[Call]:
    """What is called after the tower's last block, itself and around it, before `until` and the head."""
    last = tower[-1]
    numbers = {call.number for call in traced.ancestors(last)}
    around = [c for c in traced.calls if c.name and (c.parent in numbers or c.number in numbers)]
    after = [c for c in around if last.end < c.end < until and not _holds_the_end(c, traced)]
    shown = [last]
    for call in sorted(after, key=lambda call: call.end):
        if not _says_nothing_new(shown[-1], call, traced):
            shown.append(call)
    return shown[1:]


def _says_nothing_new(before: Call, call: Call, traced: Trace) -> bool:
    """Whether a cut there freezes and keeps the same as at `before`: the ``Sequential`` around the last block."""
    a, b = before.output, call.output
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype):
        return False
    between = [c for c in traced.calls if before.end < c.begin < call.end]
    return not any(next(c.module.parameters(), None) is not None for c in between)


def _holds_the_end(call: Call, traced: Trace) -> bool:
    """Whether nothing with parameters is called after it: then it is the head, or holds it."""
    return not any(
        later.begin > call.end and next(later.module.parameters(), None) is not None for later in traced.calls
    )


def _distance(level: float, wanted: float) -> tuple[float, float]:
    """Sorts levels by nearness, ties to less recycling. They are rounded, or the fourth digit would decide a tie."""
    return round(abs(level - wanted), 3), level


def choose_cut(model: nn.Module, probes: Probes, level: float) -> str:
    """The valid cut nearest to a level; ties to less recycling.

    Level 1 is head only: among what is called after the last block, the cut that freezes most, then the one that keeps
    the fewest bytes, then the first.

    Raises:
        CutError: no cut is valid, or `level` is outside of 0 to 1.
    """
    if not 0 < level <= 1:
        raise CutError(f"level={level} is outside of 0 to 1 (0 would be full training: do not recycle at all)")
    traced = probes.traces[0]
    names = _block_names(model, traced)
    found_levels = _Levels(model, traced)
    levels = {name: found_levels.of(name) for name in names}
    reasons = []
    if level == 1:
        found = [cut for name in names if levels[name] == 1 and (cut := _valid(probes, name, reasons))]
        if found:
            return min(found, key=lambda cut: (-cut[1], cut[2]))[0]
    order = sorted(names, key=lambda name: (*_distance(levels[name], level), names.index(name)))
    for name in order:
        if _valid(probes, name, reasons):
            return name
    raise CutError(
        f"{type(model).__name__} cannot be cut near level {level}: "
        + "; ".join(reasons[:3])
        + ". See cuts(model, example, "
        "all=True) for every module."
    )


def _valid(probes: Probes, name: str, reasons: list[str]) -> tuple[str, int, int] | None:
    """(name, parameters frozen, bytes per object) of a cut, or None with the reason noted."""
    try:
        plan = make_plan(probes, name)
        bypass = Bypass(probes.model, plan, probes.traces[0], autocast=_ambient_autocast(probes.model))
    except CutError as error:
        reasons.append(str(error))
        return None
    if len(bypass.prefix_parameters) + len(bypass.untouched) == len(list(probes.model.parameters())):
        reasons.append(f"nothing would be left to train after '{name}'")
        return None
    frozen = sum(parameter.numel() for parameter in bypass.prefix_parameters.values())
    return name, frozen, _row_bytes(plan, probes)
