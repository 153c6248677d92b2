"""Are two outputs the same? To the bit, or within rounding where objects were computed in another company.

The zoo judges torchrecycle, so it compares with its own functions and not with those of the proof that it checks.
`leaves` takes any output apart: tensors, dicts, tuples, ModelOutputs, caches with attributes. `first_unequal` asks for
every bit. `first_far` allows each tensor a relative difference (root mean square) of 1e-3, since a batch of three and a
batch of two are summed in other orders; for padded sequences it looks at real tokens only.

Outputs that are discontinuous: integers and booleans (an argmax, a routed expert) may tip over by rounding, so 1 % of
their places may differ, and none where there are fewer than 100. Where a float is further off than 1e-3, `check.py`
measures how far the plain model itself moves when the same objects come one by one, and allows ten times that, at most
0.1; the result then says so. Detections are compared to the bit only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-3


def leaves(output: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of an output, with its path."""
    if isinstance(output, torch.Tensor) or output is None or isinstance(output, (bool, int, float, str)):
        yield path or "output", output
    elif isinstance(output, Mapping):
        for name, part in output.items():
            yield from leaves(part, f"{path}.{name}".lstrip("."), depth + 1)
    elif isinstance(output, (tuple, list)):
        for i, part in enumerate(output):
            yield from leaves(part, f"{path}[{i}]", depth + 1)
    elif isinstance(output, type) or callable(output) or depth > 8:
        yield path, type(output).__name__
    elif hasattr(output, "__dict__"):
        for name, part in vars(output).items():
            yield from leaves(part, f"{path}.{name}".lstrip("."), depth + 1)
    else:
        yield path, type(output).__name__


def copied(output: Any) -> list[tuple[str, Any]]:
    """The leaves of an output, detached and copied: what comes later cannot write into them."""
    return [(path, leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf) for path, leaf in leaves(output)]


def first_unequal(want: list[tuple[str, Any]], got: list[tuple[str, Any]]) -> str:
    """Where two outputs differ by a bit or more, in words; empty if nowhere."""
    form = _other_form(want, got)
    if form:
        return form
    for (path, a), (_, b) in zip(want, got, strict=True):
        if isinstance(a, torch.Tensor) and not _same_bits(a, b):
            return f"{path} differs by {distance(a, b):.2g} of its size"
    return ""


@dataclass(frozen=True, slots=True)
class Far:
    """One tensor that is further off than rounding explains."""

    path: str
    difference: float
    """Relative, as by `distance`; share of the places for integers."""

    def __str__(self) -> str:
        return f"{self.path} is off by {self.difference:.2g}"


def far(want: list[tuple[str, Any]], got: list[tuple[str, Any]], mask: torch.Tensor | None = None) -> list[Far] | str:
    """The tensors that are further apart than rounding explains, or in words why the outputs have no common form.

    Args:
        want: leaves of the one.
        got: leaves of the other.
        mask: ``[batch, tokens]``, one at real tokens; the others are not compared.
    """
    form = _other_form(want, got)
    if form:
        return form
    found = []
    for (path, a), (_, b) in zip(want, got, strict=True):
        if isinstance(a, torch.Tensor) and not _same_bits(a, b):
            place = None if mask is None else real_places(a.shape, mask)
            difference = distance(a, b, place)
            least = 1e-2 if not a.is_floating_point() and a.numel() >= 100 else 0.0
            if not difference <= (TOLERANCE if a.is_floating_point() or a.is_complex() else least):
                found.append(Far(path, difference))
    return found


def _other_form(want: list[tuple[str, Any]], got: list[tuple[str, Any]]) -> str:
    if [path for path, _ in want] != [path for path, _ in got]:
        return f"other entries: {[path for path, _ in got][:8]} instead of {[path for path, _ in want][:8]}"
    for (path, a), (_, b) in zip(want, got, strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            return f"{path} is a {type(b).__name__} instead of a {type(a).__name__}"
        if isinstance(a, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{path} is {list(b.shape)} {b.dtype} instead of {list(a.shape)} {a.dtype}"
        elif a != b and not (a != a and b != b):
            return f"{path} is {b!r} instead of {a!r}"
    return ""


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN is the same as NaN."""
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def distance(a: torch.Tensor, b: torch.Tensor, place: torch.Tensor | None = None) -> float:
    """Root mean square of the difference by that of `a`, over finite places; for integers the share that differs.

    Infinite where one has a NaN or an infinity that the other has not.
    """
    if place is not None:
        place = place.expand(a.shape)
        a, b = a[place], b[place]
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).double().mean().item()
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.double(), b.double()
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = a[finite], b[finite]
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    return ((a - b).pow(2).mean().sqrt() / a.pow(2).mean().sqrt().clamp_min(1e-30)).item()


def real_places(shape: torch.Size, mask: torch.Tensor) -> torch.Tensor | None:
    """Which places of a tensor belong to real tokens, broadcastable to its shape; None where all are compared.

    ``[batch, tokens, dim]`` by dimension 1, ``[batch, heads, tokens, tokens]`` by both, ``[batch * tokens, experts]``
    by the first. A dimension that is as long as the sequence by chance is compared in part.
    """
    batch, tokens = mask.shape
    mask = mask.bool()
    if shape and shape[0] == batch * tokens and batch > 1 and tokens > 1:
        return mask.reshape(-1, *[1] * (len(shape) - 1))
    if len(shape) < 2 or shape[0] != batch:
        return None
    place = None
    for dim in range(1, len(shape)):
        if shape[dim] == tokens:
            view = [1] * len(shape)
            view[0], view[dim] = batch, tokens
            here = mask.reshape(view)
            place = here if place is None else place & here
    return place
