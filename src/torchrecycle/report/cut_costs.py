"""What it costs and saves to keep the rows of a data set, at each cut and in each precision, before any are kept.

8,144 photos through a ViT-Tiny on one busy core: at ``blocks.5`` its frozen layers take 279 s of an epoch to compute
and 0.2 s to read; 1.2 GB are kept in float32, and 311 MB in int8. Behind a single ReLU it is the other way round:
reading is slower than computing again, and this says so.

`Cuts.predict` measures how fast the disk gives rows of a size. To that comes here what another precision changes: how
large a row then is, and what it takes to round it and to undo that, measured on the example's own rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchrecycle.bypass import BatchRule, Probes, evaluating, example_inputs, make_plan, parameter_names, sequences_of
from torchrecycle.codec import PRECISIONS, Layout
from torchrecycle.cost import CutPrediction, Cuts
from torchrecycle.errors import BatchError
from torchrecycle.report.grid import Head, fitting
from torchrecycle.report.words import clean, count, seconds
from torchrecycle.store.sizes import bytes_in_words

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["OWN", "CutCost", "cut_cost_tables", "predict_cut_costs", "slow_cuts"]

OWN = "own"
"""The precision in which the model computes."""
OBJECTS = 32
"""Rows that are rounded at once, as a loader's batch is."""
MOST_VALUES = 8_000_000
"""Numbers in them at most."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class CutCost:
    """One cut in one precision."""

    precision: str
    """``own``, or a name that `recycle` takes."""
    prediction: CutPrediction | None
    """None if the example's rows cannot be kept in it."""
    cut: str
    refused: str = ""
    """Why not, in words."""

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        one = self.prediction
        if one is None:
            return {"cut": self.cut, "precision": self.precision, "refused": self.refused}
        figures = {name: getattr(one, name) for name in ("cut", "level", "objects", "epochs", "bytes_kept")}
        figures |= {name: getattr(one, name) for name in ("fill_seconds", "reading_seconds", "computing_seconds")}
        figures |= {"pays": one.pays, "epochs_until_paid": one.epochs_until_paid, "seconds_saved": one.seconds_saved}
        return {"precision": self.precision, **figures}


def predict_cut_costs(
    model: nn.Module,
    example: Any,
    found: Cuts,
    *,
    objects: int,
    epochs: int = 1,
    precisions: Sequence[str] = (OWN,),
    store: str | Path | None = None,
    memory: int | None = None,
) -> list[CutCost]:
    """What each valid cut costs and saves in each precision; no model is trained.

    Args:
        model: that the cuts are of.
        example: that they were found with.
        found: what `cuts` gave for the two.
        objects: of the data set, each of the example's size.
        epochs: how often the data set is gone through.
        precisions: ``own``, or names that `recycle` takes.
        store: see `Cuts.predict`.
        memory: see `Cuts.predict`.

    Returns:
        Cuts in running order, and of each the precisions in the order given.

    Raises:
        ValueError: there is no such precision; or see `Cuts.predict`.
        StoreError: nothing can be written there.
    """
    unknown = [name for name in precisions if name != OWN and name not in PRECISIONS]
    if unknown:
        raise ValueError(f"precision {unknown[0]!r} is none of {[OWN, *PRECISIONS]}")
    valid = [cut for cut in found if cut.valid]
    rounded = {} if set(precisions) == {OWN} else _all_rounded(model, example, [cut.name for cut in valid], precisions)
    costs: dict[tuple[str, str], CutCost] = {}
    for precision in precisions:
        made = {cut.name: rounded.get((cut.name, precision), _Rounded(cut.bytes_per_object, 0.0, 0.0)) for cut in valid}
        fitting_cuts = [
            replace(cut, bytes_per_object=made[cut.name].nbytes) for cut in valid if not made[cut.name].refused
        ]
        sized = Cuts(found.model, fitting_cuts, objects=found.objects, seconds=found.seconds)
        for one in sized.predict(objects=objects, epochs=epochs, store=store, memory=memory):
            how = made[one.cut]
            slower = replace(
                one,
                fill_seconds=one.fill_seconds + objects * how.rounding,
                reading_seconds=one.reading_seconds + objects * how.undoing,
            )
            costs[one.cut, precision] = CutCost(precision, slower, one.cut)
        for name, how in made.items():
            if how.refused:
                costs[name, precision] = CutCost(precision, None, name, how.refused)
    return [costs[cut.name, precision] for cut in valid for precision in precisions]


# -- precisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rounded:
    """The rows of a cut in a precision."""

    nbytes: int
    """Of a row."""
    rounding: float
    """Seconds for a row."""
    undoing: float
    """Seconds to make of a row what the model gave."""
    refused: str = ""


def _all_rounded(
    model: nn.Module, example: Any, names: Sequence[str], precisions: Sequence[str]
) -> dict[tuple[str, str], _Rounded]:
    """By cut and precision, but for ``own``, where nothing is rounded."""
    inputs = example_inputs(model, BatchRule(parameter_names(model), example, None), example)
    with evaluating(model):
        probes = Probes.of(model, inputs, sequences_of(inputs, None))
        kept = {name: list(_kept(probes, name)) for name in names}
    return {
        (name, precision): _rounded(leaves, PRECISIONS[precision])
        for name, leaves in kept.items()
        for precision in precisions
        if precision != OWN
    }


def _kept(probes: Probes, name: str) -> Iterator[tuple[Layout, torch.Tensor]]:
    """Each leaf that a cut keeps, as the model gives it for the example."""
    plan = make_plan(probes, name)
    calls = probes.traces[0].calls
    leaves = [leaf for number in plan.kept for leaf in plan.forms[number].taken(calls[number].output)]
    yield from zip(plan.layouts, leaves, strict=True)


def _rounded(leaves: Sequence[tuple[Layout, torch.Tensor]], kept: torch.dtype) -> _Rounded:
    nbytes, rounding, undoing = 0, 0.0, 0.0
    try:
        for layout, leaf in leaves:
            size, there, back = _leaf_rounded(layout, layout.kept_in(kept), leaf)
            nbytes, rounding, undoing = nbytes + size, rounding + there, undoing + back
    except BatchError as error:
        return _Rounded(0, 0.0, 0.0, str(error))
    return _Rounded(nbytes, rounding, undoing)


def _leaf_rounded(own: Layout, layout: Layout, leaf: torch.Tensor) -> tuple[int, float, float]:
    """Bytes of a row, and the seconds that rounding it and undoing that take; both 0 where nothing is rounded."""
    rows = own.to_rows(leaf)
    size = layout.row_bytes(rows[0].numel())
    if layout.kept is own.kept:
        return size, 0.0, 0.0
    layout.to_rows(leaf)  # refuses what the precision has no place for
    rows = rows[torch.arange(max(1, min(OBJECTS, MOST_VALUES // max(1, rows[0].numel())))) % len(rows)].contiguous()
    if not layout.scaled:
        small = rows.to(layout.kept)
        there, back = _quickest(lambda: rows.to(layout.kept)), _quickest(lambda: small.to(rows.dtype))
        return size, there / len(rows), back / len(rows)
    lengths = torch.full((len(rows),), rows.shape[1], device=rows.device) if layout.ragged else None
    given = rows.flatten(0, 1) if layout.ragged else rows
    codes, scales = layout.quantise(given, lengths)
    codes = codes.reshape(rows.shape)
    there = _quickest(lambda: layout.quantise(given, lengths))
    return size, there / len(rows), _quickest(lambda: layout.dequantise(codes, scales)) / len(rows)


def _quickest(work: Callable[[], Any]) -> float:
    """Seconds of the quickest of a few rounds."""
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


# -- in words ----------------------------------------------------------------------------------------------------------

_SLOW = "reading is slower than computing again"


def cut_cost_tables(costs: Sequence[CutCost], width: int) -> list[Table]:
    """A row for each cut and precision; what does not pay has a column if there is any such."""
    has_verdicts = any(map(_verdict, costs))
    epochs = next((one.prediction.epochs for one in costs if one.prediction is not None), 1)
    heads = [Head("cut", "left", is_broken=True), Head("level"), Head("kept"), Head("fill\ns")]
    heads += [Head("computed\ns/epoch"), Head("read\ns/epoch"), Head("paid after\nepochs")]
    heads += [Head(f"saved in\n{count(epochs, 'epoch')}, s")]
    heads += [Head("", "left", is_broken=True)] if has_verdicts else []
    rows = [_row(one)[: len(heads)] for one in costs]
    return fitting("", heads, rows, width, parts=((6,), (4, 6)))


def _row(cost: CutCost) -> list[str]:
    one = cost.prediction
    name = clean(cost.cut) if cost.precision == OWN else f"{clean(cost.cut)}, {cost.precision}"
    if one is None:
        return [name, *[""] * 7, _verdict(cost)]
    figures = [seconds(each) for each in (one.fill_seconds, one.computing_seconds, one.reading_seconds)]
    paid = "never" if one.epochs_until_paid is None else f"{one.epochs_until_paid:,}"
    saved = seconds(one.seconds_saved).replace("-", "−")
    return [name, f"{one.level:.2f}", bytes_in_words(one.bytes_kept), *figures, paid, saved, _verdict(cost)]


def _verdict(cost: CutCost) -> str:
    """Empty where it pays."""
    one = cost.prediction
    if one is None:
        return f"cannot be kept so: {clean(cost.refused)}"
    if not one.pays:
        return _SLOW
    return "" if one.seconds_saved > 0 else "too few epochs to pay"


def slow_cuts(costs: Sequence[CutCost]) -> list[CutCost]:
    """Where rows would better not be kept: reading them is slower than computing them again."""
    return [one for one in costs if one.prediction is not None and not one.prediction.pays]
