"""Pieces of HTML: escaped text, tables that a screen reader can walk, links that carry a file within them.

Whatever comes from the user goes through `text`, which is the one place where ``<script>`` becomes ``&lt;script&gt;``.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torchrecycle.report.sheets import Cell, Sheet
from torchrecycle.report.words import clean, figure

__all__ = ["Download", "data_table", "data_uri", "definitions", "downloads", "scrolling", "sentence", "slot", "text"]


def text(value: object) -> str:
    """Any text as text, also within an attribute.

    >>> text('<b onclick="x">')
    '&lt;b onclick=&quot;x&quot;&gt;'
    """
    return html.escape(clean(value), quote=True)


def slot(value: object) -> str:
    """A text of the user's, whose own direction of writing must not turn what stands around it."""
    return f'<bdi dir="auto">{text(value)}</bdi>'


def sentence(value: str) -> str:
    """Words of ours for the reader, in which a figure stays with its unit at the end of a line; what stands in
    backticks is the name of a module.

    >>> sentence("in 31 s, 0.936 ± 0.006")
    '<bdi dir="auto">in 31\\xa0s, 0.936\\xa0±\\xa00.006</bdi>'
    >>> sentence("cut `a.<b>`")
    '<bdi dir="auto">cut <code>a.&lt;b&gt;</code></bdi>'
    """
    together = re.sub(r"(?<=\d) (?=(?:s|min|h|[kMGT]?B|%|×)\b|%|×)", "\u00a0", value).replace(" ± ", "\u00a0±\u00a0")
    return re.sub(r"`([^`<>]+)`", r"<code>\1</code>", slot(together))


def data_uri(kind: str, content: bytes) -> str:
    """A file as a link, so that a page that is mailed alone still has it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class Download:
    """A file that lies beside the page, and, if there is an address, also within it."""

    path: str
    """Relative to the page."""
    kind: str
    """``PNG``, ``CSV``, ``SVG``."""
    within: str
    """A data URI; may be empty."""


def downloads(files: Sequence[Download], what: str) -> str:
    """Links to save the files that are within the page, then to those beside it."""
    saved = [
        f'<a href="{file.within}" download="{text(file.path.rpartition("/")[2])}" '
        f'aria-label="Save {file.kind}: {text(what)}">{file.kind}</a>'
        for file in files
        if file.within
    ]
    beside = [
        f'<a href="{text(file.path)}" aria-label="Open {file.kind} beside this page: {text(what)}">{file.kind}</a>'
        for file in files
    ]
    return f'<p class="files"><span>Save {" ".join(saved)}</span> <span>Beside this page {" ".join(beside)}</span></p>'


def scrolling(table: str, label: str) -> str:
    """A table that scrolls by itself where it is wider than the page, also by the arrow keys."""
    return f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0">{table}</div>'


def data_table(sheet: Sheet, caption: str) -> str:
    """A sheet of figures as it is, each row under its first cell."""
    head = "".join(f'<th scope="col">{text(name.replace("_", " "))}</th>' for name in sheet.header)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in sheet.rows)
    table = f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return scrolling(table, caption)


def _row(row: Sequence[Cell]) -> str:
    first, *others = row
    return f'<th scope="row">{text(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in others)


def _cell(cell: Cell) -> str:
    if isinstance(cell, float):
        return figure(cell, 4 if abs(cell) < 100 else 1)
    return f"{cell:,}" if isinstance(cell, int) else text("" if cell is None else cell)


def definitions(pairs: Sequence[tuple[str, str]], kind: str) -> str:
    """Names with what they mean; the second of each pair is HTML already."""
    return f'<dl class="{kind}">' + "".join(f"<div><dt>{text(a)}</dt><dd>{b}</dd></div>" for a, b in pairs) + "</dl>"
