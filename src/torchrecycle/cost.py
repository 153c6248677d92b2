"""Where a model can be cut, what each cut saves and what it costs.

For a ResNet-34 at 192 px: ``layer2`` freezes 1.3 million of 21.3 million parameters, saves half of the forward's time
and costs 294,912 bytes per object; ``layer3`` three quarters, at half the bytes. ``level=0.5`` asks for the valid cut
nearest to half of the blocks; blocks are the children of the outermost longest list of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchrecycle.bypass import (
    BatchRule,
    Bypass,
    Inputs,
    Probes,
    evaluating,
    example_inputs,
    make_plan,
    parameter_names,
    run_or_explain,
    sequences_of,
)
from torchrecycle.errors import CutError
from torchrecycle.trace import Call, Trace, trace

__all__ = ["Cut", "Cuts", "blocks_of", "choose_cut", "cuts", "level_of"]


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

    def __init__(self, model: str, found: Sequence[Cut]) -> None:
        self.model = model
        self._cuts = tuple(found)

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, at: int) -> Cut: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Cut]: ...
    def __getitem__(self, at: int | slice) -> Any:
        return self._cuts[at]

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
        return f"{self.model}: where it can be cut\n" + "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        head, *rows = ["".join(f"<td>{html.escape(value)}</td>" for value in row) for row in self._rows()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<table><caption>{html.escape(self.model)}: where it can be cut</caption>"
            f"<thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>"
        )


def cuts(model: nn.Module, example: Any, *, inputs: Any = None, mask: str | None = None, all: bool = False) -> Cuts:
    """Where a model can be cut, in running order, and what each cut saves and costs.

    The model is run some dozen times on two objects of the example and is as before afterwards.

    Args:
        model: any module, on any device.
        example: a batch of two objects or more, as the user's loop has it: a tensor, a tuple of positional arguments,
        or
            a dict of keyword arguments.
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
    names = _all_names(probes.traces[0]) if all else _block_names(model, probes.traces[0])
    found = [_cut(probes, measured, name) for name in names]
    return Cuts(type(model).__name__, found)


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


def _cut(probes: Probes, measured: _Measured, name: str) -> Cut:
    calls = probes.traces[0].of(name)
    number = calls[0].number
    timed, counted = measured.timed.calls, measured.counted.calls
    seconds = timed[number].seconds[1] / max(timed[0].seconds[1], 1e-9)
    flops = counted[number].flops[1] / max(counted[0].flops[1], 1)
    level = level_of(probes.model, probes.traces[0], name)
    try:
        plan = make_plan(probes, name)
        bypass = Bypass(probes.model, plan, probes.traces[0])
    except CutError as error:
        reason = str(error).removeprefix(f"cannot cut at '{name}': ").removesuffix(" See cuts(model, example).")
        return Cut(name, level, False, reason, 0, flops, seconds, _bytes(calls[0].output), 0)
    frozen = sum(parameter.numel() for parameter in bypass.prefix_parameters.values())
    rest = [
        p for n, p in probes.model.named_parameters() if n not in bypass.prefix_parameters and n not in bypass.untouched
    ]
    kept = sum(_row_bytes(layout, probes) for layout in plan.layouts)
    if not rest:
        reason = "nothing would be left to train after it"
        return Cut(name, level, False, reason, frozen, flops, seconds, kept, len(plan.layouts))
    return Cut(name, level, True, "", frozen, flops, seconds, kept, len(plan.layouts))


def _row_bytes(layout: Any, probes: Probes) -> int:
    numbers = 1
    for size in layout.shape:
        numbers *= size
    return numbers * layout.kept.itemsize * (probes.sizes[0][1] if layout.ragged else 1)


def _bytes(output: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) // 2


# -- blocks and levels -------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the blocks: children of the outermost longest ``Sequential``, ``ModuleList`` or list of stages.

    A list of stages is a row of siblings with one name and running numbers (``layer1`` to ``layer4``). A list in which
    one child holds over nine tenths of the parameters is a wrapper: the blocks are looked for inside of it.
    """
    lists = list(_lists(model, "", 3)) or list(_lists(model, "", 2))
    outermost = [one for one in lists if not any(_inside(one, other) for other in lists if other is not one)]
    return max(outermost, key=len, default=[])


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
        match = re.fullmatch(r"(\D+?)_?\d+", name)
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
    """The share of the blocks that has ended when the module of that name ends."""
    blocks = blocks_of(model)
    if not blocks:
        calls = traced.of(name)
        return round(calls[0].end / max(traced.calls[0].end, 1), 4)
    end = traced.of(name)[0].end
    ended = [block for block in blocks if (calls := traced.of(block)) and calls[-1].end <= end]
    return round(len(ended) / len(blocks), 4)


def _all_names(traced: Trace) -> list[str]:
    once = [call for call in traced.calls if call.name and len(traced.of(call.name)) == 1]
    return [call.name for call in sorted(once, key=lambda call: call.end)]


def _block_names(model: nn.Module, traced: Trace) -> list[str]:
    """The blocks, and what is called after them on the way to the head."""
    blocks = [name for name in blocks_of(model) if len(traced.of(name)) == 1]
    if not blocks:
        return [call.name for call in traced.calls if call.parent == 0 and len(traced.of(call.name)) == 1]
    last = max((traced.of(name)[0] for name in blocks), key=lambda call: call.end)
    around = traced.ancestors(last)
    numbers = {call.number for call in around}
    after = [c for c in traced.calls if c.end > last.end and c.name and (c.parent in numbers or c.number in numbers)]
    after = [c for c in after if len(traced.of(c.name)) == 1 and not _holds_the_end(c, traced)]
    return [*blocks, *(call.name for call in sorted(after, key=lambda call: call.end))]


def _holds_the_end(call: Call, traced: Trace) -> bool:
    """Whether nothing with parameters is called after it: then it is the head, or holds it."""
    return not any(
        later.begin > call.end and next(later.module.parameters(), None) is not None for later in traced.calls
    )


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
    levels = {name: level_of(model, traced, name) for name in names}
    reasons = []
    if level == 1:
        found = [cut for name in names if levels[name] == 1 and (cut := _valid(probes, name, reasons))]
        if found:
            return min(found, key=lambda cut: (-cut[1], cut[2]))[0]
    # Levels are rounded, so that a tie between 1/6 and 2/6 would be decided by the fourth digit.
    order = sorted(names, key=lambda name: (round(abs(levels[name] - level), 3), levels[name], names.index(name)))
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
        bypass = Bypass(probes.model, plan, probes.traces[0])
    except CutError as error:
        reasons.append(str(error))
        return None
    if len(bypass.prefix_parameters) + len(bypass.untouched) == len(list(probes.model.parameters())):
        reasons.append(f"nothing would be left to train after '{name}'")
        return None
    frozen = sum(parameter.numel() for parameter in bypass.prefix_parameters.values())
    return name, frozen, sum(_row_bytes(layout, probes) for layout in plan.layouts)
