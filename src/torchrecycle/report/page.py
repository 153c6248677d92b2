"""One self-contained HTML file for one sweep or several: the answer on top, then what it rests on.

The file asks nothing of the network, runs no script and refers to no other file but the copies of its plots beside
it; a content security policy in it says so to the browser. Light and dark follow the system, or three buttons that work
by CSS alone. It is put in its place whole, by a rename, so that a reader never sees half of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrecycle.report.document import document, put_whole
from torchrecycle.report.found import found_section
from torchrecycle.report.levels import columns_explained, levels_table
from torchrecycle.report.markup import Download, data_table, data_uri, downloads, sentence, slot, text
from torchrecycle.report.plots import Plot, plots_of, to_inline_svg, to_png, to_svg
from torchrecycle.report.predicted import predicted_section, predictions_sheet, slow_lines
from torchrecycle.report.ran import ran_section
from torchrecycle.report.sheets import Sheet, sheets_of, to_csv
from torchrecycle.report.words import duration
from torchrecycle.sweep.results import SweepResult

__all__ = ["write_page"]


def write_page(results: Sequence[SweepResult], folder: Path, *, title: str) -> Path:
    """Write ``index.html`` and, in ``plots/``, each plot as PNG, SVG and CSV and all figures as CSV.

    Each file is written under another name and then renamed, the page last: what was there before stays whole until
    then. Files of an older page with other names are left alone.

    Args:
        results: one for each task, in the order of the page.
        folder: made if it is missing.
        title: of the page.

    Returns:
        The path of ``index.html``.

    Raises:
        ReportError: matplotlib is not installed.
        ValueError: there is no result.
        OSError: the folder cannot be written to.
    """
    if not results:
        raise ValueError("no result to write a page of: give one SweepResult or more")
    parts = [_part(result, number, len(results)) for number, result in enumerate(results, start=1)]
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for part in parts:
        for path, content in part.files.items():
            put_whole(folder / path, content)
    page = folder / "index.html"
    put_whole(page, _page(parts, title).encode("utf-8"))
    return page


# -- one task ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """What the page holds of one task."""

    result: SweepResult
    ident: str
    """Begins every id of the task."""
    html: str
    files: dict[str, bytes]
    """By path, relative to the page."""


def _part(result: SweepResult, number: int, count: int) -> _Part:
    ident = f"task-{number}"
    before = f"plots/{ident}-" if count > 1 else "plots/"
    files: dict[str, bytes] = {}
    figures = []
    for plot in plots_of(result):
        stem = f"{before}{plot.name}"
        own = {f"{stem}.png": to_png(plot), f"{stem}.svg": to_svg(plot), f"{stem}.csv": to_csv(plot.sheet).encode()}
        files |= own
        figures.append(_figure(plot, f"{ident}-{plot.name}", own))
    sheets = {f"{before}{sheet.name}.csv": sheet for sheet in _sheets(result)}
    files |= {path: to_csv(sheet).encode() for path, sheet in sheets.items()}
    return _Part(result, ident, _section(result, ident, figures, sheets), files)


def _sheets(result: SweepResult) -> list[Sheet]:
    predictions = predictions_sheet(result)
    return [*sheets_of(result), *([predictions] if predictions is not None else [])]


def _section(result: SweepResult, ident: str, figures: Sequence[str], sheets: dict[str, Sheet]) -> str:
    links = [
        f'<a href="{data_uri("text/csv;charset=utf-8", to_csv(sheet).encode())}" download="{path.rpartition("/")[2]}" '
        f'aria-label="Save {sheet.name}.csv: {text(result.title)}">{sheet.name}.csv</a>'
        for path, sheet in sheets.items()
    ]
    curves = "" if len(figures) > 2 else "<p>No learning curve was kept, so none is drawn.</p>"
    return (
        f'<section class="task" id="{ident}" aria-labelledby="{ident}-title">'
        f'<h2 id="{ident}-title">{slot(result.title)}</h2>'
        f'<section aria-labelledby="{ident}-levels"><h3 id="{ident}-levels">The levels compared</h3>'
        f"{levels_table(result)}{columns_explained(result)}{_slow(result)}"
        f'<p class="files">All figures, not rounded: {" ".join(links)}</p></section>{predicted_section(result, ident)}'
        f'<section aria-labelledby="{ident}-plots"><h3 id="{ident}-plots">What quality costs</h3>'
        f'<div class="figures">{"".join(figures)}</div>{curves}</section>'
        f"{found_section(result, ident)}{ran_section(result, ident)}</section>"
    )


def _slow(result: SweepResult) -> str:
    """Where recycling does not pay, below the figures that show it."""
    return "".join(f'<p class="slow">{sentence(line)}</p>' for line in slow_lines(result))


def _figure(plot: Plot, ident: str, files: dict[str, bytes]) -> str:
    kinds = {"png": "image/png", "csv": "text/csv;charset=utf-8"}
    links = []
    for path, content in files.items():
        kind = path.rpartition(".")[2]
        links.append(Download(path, kind.upper(), data_uri(kinds[kind], content) if kind in kinds else ""))
    return (
        f'<figure><figcaption><h4 id="{ident}-heading">{text(plot.title)}</h4><p>{text(plot.caption)}</p></figcaption>'
        f"{to_inline_svg(plot, ident)}"
        f'<details class="data"><summary>Figures of this plot</summary>{data_table(plot.sheet, plot.title)}</details>'
        f"{downloads(links, plot.title)}</figure>"
    )


# -- the whole ---------------------------------------------------------------------------------------------------------


def _page(parts: Sequence[_Part], title: str) -> str:
    main = f"{_answers(parts)}{_contents(parts)}\n" + "\n".join(part.html for part in parts)
    return document(title, main, _footer(parts))


def _answers(parts: Sequence[_Part]) -> str:
    answers = "".join(_answer(part, named=len(parts) > 1) for part in parts)
    return f'<section class="lead" aria-labelledby="answer"><h2 id="answer">Which level to take</h2>{answers}</section>'


def _answer(part: _Part, *, named: bool) -> str:
    result = part.result
    name = f'<h3><a href="#{part.ident}">{slot(result.title)}</a></h3>' if named else ""
    return f'<div>{name}{_loud(result)}<p class="sentence">{sentence(result.recommendation.sentence)}</p></div>'


def _loud(result: SweepResult) -> str:
    if not result.ran.random_weights:
        return ""
    return (
        '<div class="loud" role="note"><p><strong>The weights are random, because none were given.</strong></p>'
        f"<p>The figures say nothing about a pretrained {slot(result.ran.model)}: run it again with its weights.</p>"
        "</div>"
    )


def _contents(parts: Sequence[_Part]) -> str:
    return f'<nav aria-label="On this page"><ul>{"".join(map(_content, parts))}</ul></nav>'


def _content(part: _Part) -> str:
    links = " ".join(f'<a href="#{part.ident}-{name}">{words}</a>' for name, words in _headings(part))
    return f"<li><span>{slot(part.result.title)}</span> {links}</li>"


def _headings(part: _Part) -> Iterator[tuple[str, str]]:
    yield "levels", "levels"
    if f'id="{part.ident}-predicted"' in part.html:
        yield "predicted", "what was predicted"
    yield "plots", "plots"
    if f'id="{part.ident}-found"' in part.html:
        yield "found", "what it finds"
    yield "ran", "what was run"


def _footer(parts: Sequence[_Part]) -> str:
    ran = parts[0].result.ran
    took = duration(sum(part.result.ran.seconds for part in parts))
    version = ran.versions.get("torchrecycle", "")
    return (
        f"<p>Made by torchrecycle {slot(version)} on {slot(ran.date.replace('T', ' ', 1))}, in {took}. "
        "This page is one file: it needs no network and no script.</p>"
    )
