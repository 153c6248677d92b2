"""Figures of two sweeps as dots on lines, one line for each level: which is higher, and is that more than chance?

A table says 0.917 ± 0.006 and 0.936 ± 0.006; that the bars do not touch is seen here at once. A is a blue disc above
its line and B an orange square below it, so that bars which overlap stay apart, and colour alone says nothing. Drawn
by hand, since it is a dozen lines of SVG in the page's own colours: 340 units wide, with letters of 12.5, as all plots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrecycle.report.colours import Mark, shape
from torchrecycle.report.markup import text
from torchrecycle.report.words import estimate, figure
from torchrecycle.sweep.results import Estimate

__all__ = ["A", "B", "Line", "dots"]

A, B = Mark("blue", "o"), Mark("orange", "s")
WIDTH, TOP, STEP, MARGIN = 340, 22, 54, 14
"""Units: of the whole, of what is above the first line, from line to line, and left and right of what is drawn."""


@dataclass(frozen=True, slots=True)
class Line:
    """One level."""

    name: str
    a: Estimate | None
    b: Estimate | None


def dots(lines: Sequence[Line], label: str, ident: str) -> str:
    """An SVG in a page.

    Args:
        lines: from above to below.
        label: what is measured.
        ident: begins its ids.
    """
    lines = [Line(line.name, _drawable(line.a), _drawable(line.b)) for line in lines]
    known = [one for line in lines for one in (line.a, line.b) if one is not None]
    if not known:
        return ""
    low, high = min(one.mean - one.error for one in known), max(one.mean + one.error for one in known)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    scale = (WIDTH - 2 * MARGIN) / (high - low)

    def at(value: float) -> float:
        return MARGIN + (value - low) * scale

    bottom = TOP + STEP * len(lines)
    grid = "".join(
        f'<path d="M{at(tick):.1f} {TOP - 14}V{bottom}" stroke="var(--line)"/>'
        f'<text x="{at(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(tick, ticks)}</text>'
        for tick in ticks
    )
    drawn = "".join(_line(line, TOP + STEP * number, at) for number, line in enumerate(lines))
    told = ". ".join(f"{line.name}: {_told(line)}" for line in lines)
    return (
        f'<svg class="plot dots" viewBox="0 0 {WIDTH} {bottom + 26}" role="img" aria-labelledby="{ident}-title" '
        f'aria-describedby="{ident}-desc"><title id="{ident}-title">{text(label)} of A and B</title>'
        f'<desc id="{ident}-desc">{text(told)}.</desc>'
        f'<g font-size="12.5" fill="var(--ink)">{grid}{drawn}</g></svg>'
    )


def _drawable(one: Estimate | None) -> Estimate | None:
    """None where there is no place for it; without a bar where its error is not known."""
    if one is None or not abs(one.mean) < LARGEST:
        return None
    return one if 0 <= one.error < LARGEST else Estimate(one.mean, 0.0)


LARGEST = 1e9
"""Figures beyond it are no quality, and would leave no room for others."""


def _line(line: Line, y: float, at: Callable[[float], float]) -> str:
    above = f'<path d="M0 {y - 15}H{WIDTH}" stroke="var(--line)"/>' if y > TOP else ""
    name = f'<text x="{MARGIN}" y="{y + 4}">{text(line.name)}</text>'
    return (
        above
        + name
        + "".join(_dot(one, mark, y + below, at) for one, mark, below in ((line.a, A, 16), (line.b, B, 30)))
    )


def _dot(one: Estimate | None, mark: Mark, y: float, at: Callable[[float], float]) -> str:
    if one is None:
        return ""
    bar = (
        f'<path d="M{at(one.mean - one.error):.1f} {y}H{at(one.mean + one.error):.1f}" '
        f'stroke="var(--{mark.colour})" stroke-width="2"/>'
        if one.error
        else ""
    )
    return bar + shape(mark, at(one.mean), y, 11)


def _told(line: Line) -> str:
    return ", ".join(f"{name} {estimate(one)}" for name, one in (("A", line.a), ("B", line.b)) if one is not None)


def _ticks(low: float, high: float) -> list[float]:
    """Round figures that enclose what is drawn: three to six.

    >>> _ticks(0.738, 0.942)
    [0.7, 0.8, 0.9, 1.0]
    """
    span = max(high - low, 1e-3, 1e-6 * max(abs(low), abs(high)))
    power = 10 ** math.floor(math.log10(span))
    step = next(power * each for each in (0.2, 0.5, 1.0, 2.0, 5.0) if span / (power * each) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(each * step, 10) for each in range(first, max(last, first + 1) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    return figure(value, max(0, -math.floor(math.log10(step) + 1e-9)))
