"""The plots of a sweep: quality against time, quality against bytes, learning curves; each with its figures.

`plots_of` gives frozen values: points, words and a sheet of figures. They become a PNG and an SVG in the colours of
the light page, and an SVG inside the page whose colours are CSS variables, so that it follows the page into the dark:
it is drawn in sentinel colours, which are then replaced. No pyplot, and no backend is chosen, so that a notebook's own
plots stay as they are. A plot is 340 units wide with letters of 12.5: on a phone, where it has 300 pixels, of 11.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from torchrecycle.errors import RecycleError
from torchrecycle.report.colours import LIGHT, Mark, marks_of
from torchrecycle.report.columns import recommended
from torchrecycle.report.sheets import Cell, Sheet
from torchrecycle.report.words import clean, estimate, figure, megabytes, seconds, shortened
from torchrecycle.sweep.results import EpochPoint, Estimate, LevelResult, SweepResult, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plot", "ReportError", "plots_of", "to_inline_svg", "to_png", "to_svg"]


class ReportError(RecycleError, ImportError):
    """A package is missing that draws plots. ``pip install "torchrecycle[sweep]"``."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a point lies, and where its bars end."""

    x: float
    y: float
    left: float
    right: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one level."""

    label: str
    mark: Mark
    points: tuple[Point, ...]
    is_recommended: bool
    is_expected: bool = False
    """Whether nothing of it was measured: then its mark is hollow."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot with what it shows."""

    name: str
    """Of its files, without ending."""
    title: str
    caption: str
    """How to read it."""
    description: str
    """What it shows, in words, for those who do not see it."""
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    joined: bool
    """Whether the points of a level are joined by a line."""
    baseline: Estimate | None
    """The pretrained model as it comes, as a line across."""
    sheet: Sheet
    """Its figures, not rounded."""


def plots_of(result: SweepResult) -> list[Plot]:
    """Those for which there are figures: without a learning curve, two."""
    return [_against_seconds(result), _against_bytes(result), *_curves(result)]


# -- quality against what it costs -------------------------------------------------------------------------------------


def _against_seconds(result: SweepResult) -> Plot:
    def spent(one: LevelResult) -> tuple[float, float, float]:
        each = [trial.seconds + one.fill_seconds for trial in one.trials]
        return statistics.mean(each), min(each), max(each)

    return _against(
        result,
        "quality-against-seconds",
        "Quality against time",
        "Higher is better, further left is quicker. Seconds are those of one whole training with the pass that fills.",
        "seconds of training and filling",
        ("seconds", "seconds_quickest", "seconds_slowest"),
        spent,
        lambda x: f"after {seconds(x)} seconds",
    )


def _against_bytes(result: SweepResult) -> Plot:
    def kept(one: LevelResult) -> tuple[float, float, float]:
        return one.bytes_kept, one.bytes_kept, one.bytes_kept

    return _against(
        result,
        "quality-against-bytes",
        "Quality against disk",
        "Higher is better, further left keeps less. Full training keeps nothing.",
        "megabytes kept",
        ("bytes_kept", "", ""),
        kept,
        lambda x: f"with {megabytes(int(x))} megabytes",
    )


def _against(
    result: SweepResult,
    name: str,
    title: str,
    caption: str,
    x_label: str,
    x_names: tuple[str, str, str],
    cost: Callable[[LevelResult], tuple[float, float, float]],
    say: Callable[[float], str],
) -> Plot:
    """One point for each level."""
    marks, metric, taken = marks_of(result), result.metric, recommended(result)
    unit = 1e6 if x_names[0] == "bytes_kept" else 1.0
    series, rows, told = [], [], []
    for one in result.levels:
        quality, (x, left, right) = one.quality[metric], cost(one)
        low, high = quality.mean - quality.error, quality.mean + quality.error
        point = Point(x / unit, quality.mean, left / unit, right / unit, low, high)
        series.append(Series(one.words, marks[one.level], (point,), one.level == taken))
        costs: list[Cell] = [one.bytes_kept] if unit > 1 else [x, left, right]
        rows.append((one.level, *costs, quality.mean, quality.error))
        told.append(f"{one.words}: {estimate(quality)} {say(x)}")
    for one in _expected(result, unit):
        series.insert(0, one)
        (point,) = one.points
        costs = [None] if unit > 1 else [point.x, None, None]
        rows.insert(0, ("full, not run, expected", *costs, point.y, point.high - point.y))
        told.insert(0, f"{one.label}, not run: {figure(point.y)}")
    before = result.untrained[metric]
    rows.insert(0, ("untrained", *(None for name in x_names if name), before.mean, before.error))
    hollow = " The hollow mark was not measured: it is what is expected." if series[0].is_expected else ""
    ring = " The ring marks what is recommended." if any(one.is_recommended for one in series) else ""
    bars = "Bars up and down: standard error"
    across = "; across: from the quickest to the slowest seed." if unit == 1 and len(result.seeds) > 1 else "."
    return Plot(
        name,
        title,
        f"{caption}{ring}{hollow} {bars}{across}",
        f"{clean(metric)} of each level. Untrained: {estimate(before)}. {'. '.join(told)}.",
        x_label,
        f"{shortened(clean(metric), 30)}, test split",
        tuple(series),
        False,
        before,
        Sheet(name, ("level", *filter(None, x_names), metric, f"{metric} error"), tuple(rows)),
    )


def _expected(result: SweepResult, unit: float) -> Iterator[Series]:
    """Full training where it was not run; against seconds only if some are expected of it."""
    expected, spent = result.expected_full, result.expected_full_seconds
    if result.full is not None or expected is None or (spent is None and unit == 1):
        return
    x = 0.0 if unit > 1 or spent is None else spent
    point = Point(x, expected.mean, x, x, expected.mean - expected.error, expected.mean + expected.error)
    yield Series(f"{in_words('full')}, expected", marks_of(result)["full"], (point,), False, is_expected=True)


# -- learning curves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """An epoch, over the seeds."""

    epoch: int
    seconds: float
    mean: float
    low: float
    high: float


def _curves(result: SweepResult) -> Iterator[Plot]:
    """Against epochs and against seconds; of the loss if no quality was measured on the way."""
    points = [at for one in result.levels for trial in one.trials for at in trial.curve]
    if not points:
        return
    if any(at.quality is not None for at in points):
        metric, split = clean(result.metric), result.curve_split
        yield from _curves_of(result, metric, f"{shortened(metric, 30)}, {split} split", lambda at: at.quality)
    else:
        yield from _curves_of(result, "loss", "loss, training split", lambda at: at.loss)


def _curves_of(
    result: SweepResult, what: str, y_label: str, value: Callable[[EpochPoint], float | None]
) -> Iterator[Plot]:
    marks, taken = marks_of(result), recommended(result)
    steps = {one.level: _steps(one, value) for one in result.levels}
    header = ("level", "epoch", "seconds", "seconds_with_filling", what, f"{what} lowest seed", f"{what} highest seed")
    rows = tuple(
        (one.level, at.epoch, at.seconds, at.seconds + one.fill_seconds, at.mean, at.low, at.high)
        for one in result.levels
        for at in steps[one.level]
    )
    told = [
        f"{one.words}: {figure(of[0].mean)} after {_epoch(of[0])}, {figure(of[-1].mean)} after {_epoch(of[-1])}"
        if len(of) > 1
        else f"{one.words}: {figure(of[0].mean)} after {_epoch(of[0])}"
        for one in result.levels
        if (of := steps[one.level])
    ]
    thick = " The thick line is what is recommended." if result.recommendation.level else ""
    bars = " Bars: from the worst to the best seed." if len(result.seeds) > 1 else ""
    for name, title, caption, x_label, x in (
        (
            "learning-by-epoch",
            "Learning, epoch by epoch",
            "What each pass over the training data gives.",
            "epochs",
            lambda one, at: at.epoch,
        ),
        (
            "learning-by-second",
            "Learning, second by second",
            "The same against the clock; a recycled level begins when the store is filled.",
            "seconds of training and filling",
            lambda one, at: at.seconds + one.fill_seconds,
        ),
    ):
        series = tuple(
            Series(
                one.words,
                marks[one.level],
                tuple(Point(x(one, at), at.mean, x(one, at), x(one, at), at.low, at.high) for at in steps[one.level]),
                one.level == taken,
            )
            for one in result.levels
        )
        description = f"{what} of each level along the training. {'. '.join(told)}."
        sheet = Sheet(name, header, rows)
        yield Plot(name, title, caption + thick + bars, description, x_label, y_label, series, True, None, sheet)


def _epoch(step: _Step) -> str:
    return f"epoch {step.epoch} ({seconds(step.seconds)} s)"


def _steps(one: LevelResult, value: Callable[[EpochPoint], float | None]) -> list[_Step]:
    """Means over the seeds of what is known and finite; a training that came apart ends there."""
    seen: dict[int, list[tuple[float, float]]] = {}
    for trial in one.trials:
        for at in trial.curve:
            y = value(at)
            if y is not None and math.isfinite(y):
                seen.setdefault(at.epoch, []).append((at.seconds, y))
    steps = []
    for epoch, known in sorted(seen.items()):
        ys = [y for _, y in known]
        steps.append(_Step(epoch, statistics.mean(s for s, _ in known), statistics.mean(ys), min(ys), max(ys)))
    return steps


# -- drawing -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, DOTS = 340, 290, 240
"""Units of 1/72 inch, and dots per inch of the PNG."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torchrecycle",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "errorbar.capsize": 3,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
}
_SENTINELS = {name: f"#01{number:02x}fe" for number, name in enumerate(LIGHT)}
"""A colour that nobody chose, for each name."""


def to_png(plot: Plot) -> bytes:
    """On the light page's card.

    Raises:
        ReportError: matplotlib is not installed.
    """
    return _drawn(plot, LIGHT, "png")


def to_svg(plot: Plot) -> bytes:
    """A file of its own, in the colours of the light page, with letters as text.

    Raises:
        ReportError: matplotlib is not installed.
    """
    return _drawn(plot, LIGHT, "svg")


def to_inline_svg(plot: Plot, prefix: str) -> str:
    """A part of a page: colours are the page's variables, ids begin with the prefix, the description is within.

    Raises:
        ReportError: matplotlib is not installed.
    """
    root = ElementTree.fromstring(_drawn(plot, _SENTINELS, "svg"))
    _without_names(root)
    _with_prefix(root, prefix)
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", _styled(element.get("style", "")))
    labels = {"title": plot.title, "desc": plot.description}
    for name, text in reversed(labels.items()):
        label = ElementTree.Element(name, {"id": f"{prefix}-{name}"})
        label.text = clean(text)
        root.insert(0, label)
    view = root.get("viewBox", "")
    root.attrib = {
        "class": "plot",
        "viewBox": view,
        "role": "img",
        "aria-labelledby": f"{prefix}-title",
        "aria-describedby": f"{prefix}-desc",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _without_names(root: ElementTree.Element) -> None:
    """Take off the namespaces, which HTML knows, and what describes the file."""
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))


def _with_prefix(root: ElementTree.Element, prefix: str) -> None:
    """Ids are unique on the whole page; those that nothing refers to go."""
    used = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" and value.startswith("#"):
                used.add(value[1:])
                element.set(name, f"#{prefix}-{value[1:]}")
            elif found := re.fullmatch(r"url\(#(.+)\)", value):
                used.add(found[1])
                element.set(name, f"url(#{prefix}-{found[1]})")
    for element in root.iter():
        ident = element.attrib.pop("id", None)
        if ident in used:
            element.set("id", f"{prefix}-{ident}")


def _styled(style: str) -> str:
    for name, colour in _SENTINELS.items():
        style = style.replace(colour, f"var(--{name})")
    return re.sub(r"font:\s*(?:(\d+) )?([\d.]+)px [^;]+", r"font-size: \2px", style)


def _drawn(plot: Plot, colours: Mapping[str, str], kind: str) -> bytes:
    with _as_installed():
        made = _figure(plot, colours)
        held = io.BytesIO()
        about = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        made.savefig(held, format=kind, dpi=DOTS if kind == "png" else 72, metadata=about)
    return held.getvalue()


@contextmanager
def _as_installed() -> Iterator[None]:
    """matplotlib's own settings and these, whatever style the user has; the user's come back after that.

    A letter that its font lacks is drawn as a box in the PNG, without a warning: the page has the text.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError(
            'plots are drawn by matplotlib, which is not installed: pip install "torchrecycle[sweep]"'
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        for name, value in _SETTINGS.items():
            matplotlib.rcParams[name] = value
        yield


def _figure(plot: Plot, colours: Mapping[str, str]) -> Figure:
    from matplotlib.figure import Figure

    entries = len(plot.series) + (plot.baseline is not None)
    height = HEIGHT + 18 * ((entries + 1) // 2 - 2)
    made = Figure(figsize=(WIDTH / 72, height / 72), facecolor=colours["card"], layout="constrained")
    axes = made.add_subplot(facecolor=colours["card"])
    shown = [_draw(axes, one, plot, colours) for one in plot.series if one.points]
    if plot.baseline is not None:
        shown.insert(0, _draw_baseline(axes, plot.baseline, colours))
    _scale(axes, plot)
    _dress(axes, plot, colours)
    made.legend(
        handles=shown,
        loc="outside upper left",
        ncols=2,
        frameon=False,
        labelcolor=colours["ink"],
        handlelength=1.8,
        columnspacing=1.4,
        borderaxespad=0.2,
        handletextpad=0.6,
    )
    return made


def _draw(axes: Axes, one: Series, plot: Plot, colours: Mapping[str, str]) -> Any:
    colour = colours[one.mark.colour]
    xs, ys = [p.x for p in one.points], [p.y for p in one.points]
    every = max(1, math.ceil(len(xs) / 8))
    up = [[p.y - p.low for p in one.points], [p.high - p.y for p in one.points]]
    across = [[p.x - p.left for p in one.points], [p.right - p.x for p in one.points]]
    bars = axes.errorbar(
        xs,
        ys,
        yerr=up if any(map(any, up)) else None,
        xerr=across if any(map(any, across)) else None,
        errorevery=every,
        markevery=every,
        label=one.label,
        color=colour,
        marker=one.mark.marker,
        markerfacecolor=colours["card"] if one.is_expected else colour,
        markeredgecolor=colour if one.is_expected else colours["card"],
        markeredgewidth=1.6 if one.is_expected else 0.6,
        markersize=6 if plot.joined else 8.5,
        linestyle="-" if plot.joined else "none",
        linewidth=2.8 if one.is_recommended else 1.5,
        elinewidth=1.3,
        zorder=3,
    )
    if one.is_recommended and not plot.joined:
        axes.plot(xs, ys, "o", markersize=18, markerfacecolor="none", markeredgecolor=colours["ink"], zorder=2)
    return bars


def _draw_baseline(axes: Axes, baseline: Estimate, colours: Mapping[str, str]) -> Any:
    colour = colours["grey"]
    if baseline.error:
        low, high = baseline.mean - baseline.error, baseline.mean + baseline.error
        axes.axhspan(low, high, color=colour, alpha=0.16, linewidth=0, zorder=0)
    return axes.axhline(baseline.mean, color=colour, linestyle=(0, (4, 2)), linewidth=1.4, label="untrained", zorder=1)


def _scale(axes: Axes, plot: Plot) -> None:
    """Logarithmic across where the largest is more than twenty times the smallest, which a nought forbids."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    xs = [p.x for one in plot.series for p in one.points]
    axes.margins(x=0.1, y=0.14)
    axes.yaxis.set_major_locator(MaxNLocator(6, min_n_ticks=3, steps=[1, 2, 5, 10]))
    if not xs or min(xs) <= 0 or max(xs) <= 20 * min(xs):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=plot.x_label == "epochs", steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        if min(xs, default=0) >= 0:
            axes.set_xlim(left=max(axes.get_xlim()[0], -0.06 * max([*xs, 0.1])))
        return
    axes.set_xscale("log")
    steps = (1.0, 2.0, 5.0) if max(xs) <= 200 * min(xs) else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _dress(axes: Axes, plot: Plot, colours: Mapping[str, str]) -> None:
    log = ", logarithmic" if axes.get_xscale() == "log" else ""
    axes.set_xlabel(plot.x_label + log, color=colours["soft"])
    axes.set_title(plot.y_label, loc="left", fontsize=12.5, color=colours["soft"], pad=7)
    axes.grid(True, color=colours["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color=colours["strong-line"], labelcolor=colours["ink"], length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["strong-line"])
