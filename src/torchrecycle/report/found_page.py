"""What a search found, as one HTML file: each query with the objects nearest to it, as pictures or as texts.

    write_found_page(Path("search.html"), FoundPage(title="photos", answers=(...), facts=(("model", "timm/resnet18"),)))

Ten answers to three queries, as pictures of 10 KB each, are a page of 400 KB that asks nothing of the network. A score
is a number, a word for a screen reader and only then a bar. A page is known by a mark in it, so that one of somebody
else is not written over.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrecycle.report.document import document, put_whole
from torchrecycle.report.markup import definitions, slot, text
from torchrecycle.report.words import figure, shortened

__all__ = ["Answer", "FoundPage", "Shown", "is_found_page", "picture_of", "write_found_page"]

MARK = '<meta name="generator" content="torchrecycle search">'
LETTERS = 280
"""Of a text, so many are shown; the whole of it is unfolded."""
SIDE = 224
"""Pixels of the longer side of a picture: twice what it is shown in."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A query, or an object that was found."""

    name: str
    """What it is called: a file, or a place in a table; may be empty."""
    text: str = ""
    """Of a text."""
    picture: str = field(default="", repr=False)
    """Of a picture, a JPEG in base64."""
    details: tuple[tuple[str, str], ...] = ()
    """What else is known of it, by name."""
    score: float | None = None
    """Cosine similarity to the query, -1 to 1; None for a query."""
    same: bool = False
    """Whether it is what was asked for, to the byte."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for a query."""

    query: Shown
    found: tuple[Shown, ...]
    """The nearest first."""


@dataclass(frozen=True, slots=True)
class FoundPage:
    """All that a page tells."""

    title: str
    sentence: str
    """What was asked of what."""
    answers: tuple[Answer, ...]
    facts: tuple[tuple[str, str], ...] = ()
    """What was run, by name."""
    random_weights: bool = False
    version: str = ""
    """Of torchrecycle."""
    date: str = ""
    """As text."""


def picture_of(image: Any) -> str:
    """A PIL image as it is shown: a small JPEG, base64. The image is shrunk in place."""
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=82)
    return base64.b64encode(held.getvalue()).decode("ascii")


def is_found_page(path: Path) -> bool:
    """Whether a file is such a page."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARK in file.read(20_000)
    except OSError:
        return False


def write_found_page(path: Path, page: FoundPage) -> Path:
    """Write the page: all of it or nothing. What was there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    put_whole(path, html_of_found(page).encode("utf-8"))
    return path


def html_of_found(page: FoundPage) -> str:
    """The page as text."""
    cards = "".join(_card(answer, f"query-{number}") for number, answer in enumerate(page.answers, start=1))
    loud = _loud() if page.random_weights else ""
    facts = [(name, slot(value)) for name, value in page.facts]
    ran = f'<h3 id="ran">What was run</h3>{definitions(facts, "facts")}' if facts else ""
    main = (
        f'<div class="search"><section class="lead" aria-labelledby="answer"><h2 id="answer">What is nearest</h2>'
        f'<div>{loud}<p class="sentence">{slot(page.sentence)}</p>{_MEANING}</div></section>{_contents(page.answers)}'
        f'<section class="task" aria-label="Answers"><div class="cards">{cards}</div></section>'
        f'<section aria-labelledby="ran">{ran}</section></div>'
    )
    version = f"torchrecycle {slot(page.version)}" if page.version else "torchrecycle"
    when = f" on {slot(page.date)}" if page.date else ""
    footer = f"<p>Made by {version}{when}. This page is one file: it needs no network and no script.</p>"
    html = document(page.title, main, footer, skip="Skip to what was found", sheets=("found.css",))
    return html.replace('<meta name="color-scheme"', f'{MARK}<meta name="color-scheme"', 1)


_MEANING = (
    '<p class="note">The number beside each is the cosine similarity of its embedding and that of the query: 1 at '
    "most, about 0 where the two have nothing in common.</p>"
)


def _loud() -> str:
    return (
        '<div class="loud" role="note"><p><strong>The weights are random, because none were given.</strong></p>'
        "<p>What is near here says nothing about a pretrained model: run it again with its weights.</p></div>"
    )


def _contents(answers: Sequence[Answer]) -> str:
    if len(answers) < 2:
        return ""
    links = "".join(
        f'<li><a href="#query-{number}">{slot(shortened(answer.query.text or answer.query.name, 60))}</a></li>'
        for number, answer in enumerate(answers, start=1)
    )
    return f'<nav aria-label="Queries"><ul>{links}</ul></nav>'


# -- one answer --------------------------------------------------------------------------------------------------------


def _card(answer: Answer, ident: str) -> str:
    kind = "pictures" if any(one.picture for one in answer.found) else "texts"
    tiles = "".join(_tile(one) if one.picture else _line(one) for one in answer.found)
    found = f'<ol class="{kind}">{tiles}</ol>' if tiles else '<p class="note">Nothing was found.</p>'
    asked = _asked(answer.query, ident)
    return f'<article class="card" aria-labelledby="{ident}"><header class="asked">{asked}</header>{found}</article>'


def _asked(query: Shown, ident: str) -> str:
    picture = _picture(query) if query.picture else ""
    whole = _whole(query.text)
    name = slot(shortened(query.text or query.name, LETTERS))
    return f'{picture}<div><p class="soft">asked for</p><h3 id="{ident}" class="quoted">{name}</h3>{whole}</div>'


def _picture(one: Shown) -> str:
    # What stands below the picture says the same.
    alt = text(one.name if one.score is None else "")
    return (
        f'<img src="data:image/jpeg;base64,{text(one.picture)}" alt="{alt}" width="{SIDE}" height="{SIDE}" '
        'decoding="async">'
    )


def _tile(one: Shown) -> str:
    return (
        f'<li>{_picture(one)}<span class="score">{figure(one.score)}</span>{_same(one, "picture")}'
        f'<span class="place">{slot(one.name)}</span>{_details(one)}</li>'
    )


def _line(one: Shown) -> str:
    where = f'<span class="place soft">{slot(one.name)}</span>' if one.name else ""
    return (
        f'<li><div class="where"><span class="score">{figure(one.score)}</span>{_bar(one)}{where}</div>'
        f'<div><span class="said">{slot(shortened(one.text, LETTERS))}</span>{_same(one, "text")}{_details(one)}'
        f"{_whole(one.text)}</div></li>"
    )


def _bar(one: Shown) -> str:
    share = max(0.0, min(1.0, one.score or 0.0))
    return f'<span class="bar" aria-hidden="true"><i style="width:{share:.0%}"></i></span>'


def _same(one: Shown, what: str) -> str:
    return f'<span class="tag">the same {what}</span>' if one.same else ""


def _details(one: Shown) -> str:
    return "".join(f'<span class="detail">{text(name)}: {slot(value)}</span>' for name, value in one.details)


def _whole(said: str) -> str:
    if not shortened(said, LETTERS).endswith("…"):
        return ""
    return f"<details><summary>In full</summary><p>{slot(said)}</p></details>"
