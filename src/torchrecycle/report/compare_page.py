"""Two sweeps on one page: the sentence on top, what differs, and what each has at each level.

    write_comparison(Path("compare.html"), compare(a, b), names=("sweep-cars", "sweep-cars-arcface"))

One file that asks nothing of the network and runs no script. It is known by a mark in it, so that a page of somebody
else is not written over. That the figures of the two say nothing about each other, if they do not, stands above them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torchrecycle.report.colours import marks_for, swatch
from torchrecycle.report.columns import EXPECTED
from torchrecycle.report.compare import Comparison, Difference, recommended_in_words
from torchrecycle.report.compare_table import are_times_alike, compared_heads, compared_rows, cost_heads, sides
from torchrecycle.report.document import document, put_whole
from torchrecycle.report.dots import A, B, Line, dots
from torchrecycle.report.markup import definitions, scrolling, sentence, slot, text
from torchrecycle.report.words import clean
from torchrecycle.sweep.results import SweepResult

__all__ = ["html_of_comparison", "is_comparison", "write_comparison"]

MARK = '<meta name="generator" content="torchrecycle report compare">'


def is_comparison(path: Path) -> bool:
    """Whether a file is such a page."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARK in file.read(20_000)
    except OSError:
        return False


def write_comparison(path: Path, comparison: Comparison, *, names: tuple[str, str]) -> Path:
    """Write the page: all of it or nothing. What was there is replaced.

    Args:
        path: an HTML file; its folder is made if it is missing.
        comparison: of two sweeps.
        names: what to call them: where they came from.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    put_whole(path, html_of_comparison(comparison, names=names).encode("utf-8"))
    return path


def html_of_comparison(comparison: Comparison, *, names: tuple[str, str]) -> str:
    """The page as text."""
    main = (
        f"{_lead(comparison, names)}{_CONTENTS}"
        f'<section class="task" aria-labelledby="levels"><h2 id="levels">Level by level</h2>'
        f"{_levels(comparison)}{_sure(comparison)}{_meanings(comparison)}{_plot(comparison)}</section>"
        f'<section class="task" aria-labelledby="differs"><h2 id="differs">What differs</h2>'
        f"{_differing(comparison.differences)}</section>"
        f'<section class="task" aria-labelledby="ran"><h2 id="ran">What was run</h2>'
        f"{''.join(map(_ran, sides(comparison)))}</section>"
    )
    footer = "<p>Made by torchrecycle. This page is one file: it needs no network and no script.</p>"
    html = document(f"{names[0]} and {names[1]}", main, footer, sheets=("compare.css",))
    return html.replace('<meta name="color-scheme"', f'{MARK}<meta name="color-scheme"', 1)


_CONTENTS = (
    '<nav aria-label="On this page"><ul><li><a href="#levels">levels</a> <a href="#differs">what differs</a> '
    '<a href="#ran">what was run</a></li></ul></nav>'
)


def _lead(comparison: Comparison, names: tuple[str, str]) -> str:
    told = [
        (f"{side}, {name}", f"recommends {sentence(recommended_in_words(result))}")
        for (side, result), name in zip(sides(comparison), names, strict=True)
    ]
    return (
        '<section class="lead" aria-labelledby="answer"><h2 id="answer">A beside B</h2>'
        f'<div>{_loud(comparison.warnings)}<p class="sentence">{sentence(comparison.sentence)}</p>'
        f"{definitions(told, 'facts')}</div></section>"
    )


def _loud(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    first, *others = warnings
    rest = "".join(f"<p>{slot(line)}</p>" for line in others)
    return f'<div class="loud" role="note"><p><strong>{slot(first)}</strong></p>{rest}</div>'


# -- the table ---------------------------------------------------------------------------------------------------------


def _levels(comparison: Comparison) -> str:
    heads = ["level", *compared_heads(comparison), *cost_heads(comparison)]
    head = "".join(f'<th scope="col"{_WORDS if name == "level" else ""}>{text(name)}</th>' for name in heads)
    marks = marks_for([pair.level for pair in comparison.pairs])
    body = "".join(
        f'<tr><th scope="row"><span class="level">{swatch(marks[level])}{text(name)}</span></th>'
        f"{''.join(map(_cell, cells))}</tr>"
        for level, name, cells in compared_rows(comparison)
    )
    caption = f"Levels of A and B: {comparison.a.title}"
    table = (
        f'<table class="levels"><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return scrolling(table, caption)


def _sure(comparison: Comparison) -> str:
    sure = comparison.how_sure
    return f'<p class="files">The error of B less A is {text(sure)}.</p>' if sure else ""


_WORDS = ' class="words"'


def _cell(cell: str) -> str:
    if cell.startswith(EXPECTED):
        return f'<td class="expected">{text(cell)} <small>expected</small></td>'
    return f"<td>{text(cell)}</td>"


def _meanings(comparison: Comparison) -> str:
    return (
        '<details class="legend"><summary>What the columns mean</summary>'
        f"{definitions(list(_meaning(comparison)), 'meanings')}</details>"
    )


def _meaning(comparison: Comparison) -> Iterator[tuple[str, str]]:
    for metric in comparison.metrics:
        meaning = clean(comparison.a.metrics.get(metric, "")).rstrip(". ")
        yield metric, f"{slot(f'{meaning}.') if meaning else ''} On the test split, with its standard error."
    if comparison.is_same_test is not False:
        sure = comparison.how_sure
        yield "B less A", "More than 0 is higher in B." + (f" Its error is {text(sure)}." if sure else "")
    yield "epoch s", "Seconds of one epoch of training, mean."
    yield "in all s", "Seconds of all epochs of one training, and of the pass that fills."
    if are_times_alike(comparison):
        yield "B is quicker", "Seconds in all of A by those of B: 2.0× is half the time."
    yield "MB kept", "Megabytes on the disk for this level, all splits."
    if any(result.expected_full is not None for _, result in sides(comparison)):
        yield EXPECTED.strip(), "Not run and not measured, but expected from the levels that were."


# -- the plot ----------------------------------------------------------------------------------------------------------


def _plot(comparison: Comparison) -> str:
    if not comparison.metrics:
        return ""
    metric, a, b = comparison.metrics[0], comparison.a, comparison.b
    lines = [Line("untrained", a.untrained[metric], b.untrained[metric])]
    for pair in comparison.pairs:
        both = (None if one is None else one.quality.get(metric) for one in (pair.a, pair.b))
        lines.append(Line(pair.words, *both))
    drawn = dots(lines, metric, "compared")
    if not drawn:
        return ""
    key = "".join(f'<span class="level">{swatch(mark)}{name}</span> ' for name, mark in (("A", A), ("B", B)))
    return (
        f'<div class="figures"><figure><figcaption><h3 id="compared-heading">{text(metric)}</h3>'
        f"<p>Of each level on the test split; further right is higher. Bars: standard error.</p><p>{key}</p>"
        f"</figcaption>{drawn}</figure></div>"
    )


# -- what differs, what was run ----------------------------------------------------------------------------------------


def _differing(differences: Sequence[Difference]) -> str:
    if not differences:
        return "<p>Nothing that is told of them.</p>"
    body = "".join(f'<tr><th scope="row">{text(one.what)}</th>{_side(one.a)}{_side(one.b)}</tr>' for one in differences)
    caption = "What is not the same in A and B"
    table = (
        f'<table class="differs"><caption>{caption}</caption><thead><tr><th scope="col">what</th>'
        f'<th scope="col" class="words">A</th><th scope="col" class="words">B</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return scrolling(table, caption)


def _side(value: str) -> str:
    return f'<td class="words">{slot(value)}</td>' if value else '<td class="words soft">not there</td>'


def _ran(side: tuple[str, SweepResult]) -> str:
    name, result = side
    ran = result.ran
    facts = [
        ("model", slot(ran.model)),
        ("data", slot(ran.data)),
        ("recommends", f'<span class="quoted">{sentence(result.recommendation.sentence)}</span>'),
        ("licences", f"<ul>{''.join(f'<li>{slot(line)}</li>' for line in ran.licences)}</ul>" if ran.licences else ""),
        ("machine", slot(ran.machine)),
        ("date", slot(ran.date.replace("T", " ", 1))),
    ]
    return (
        f'<h3>{name}</h3><pre class="command" tabindex="0" aria-label="The command of {name}"><code>'
        f"{text(ran.command)}</code></pre>{definitions([fact for fact in facts if fact[1]], 'facts')}"
    )
