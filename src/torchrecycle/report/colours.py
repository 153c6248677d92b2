"""The colours of the page, light and dark, and the colour and shape by which a level is known everywhere.

A level has the same colour and the same shape in every plot, every legend and every row of a table: full training is
a blue disc, head only a purple diamond, what lies between an orange square, a green triangle and so on. The hues are
those of Okabe and Ito, which the colour-blind can tell apart, made darker or lighter until they stand out three to one
from the paper; text keeps 4.5 to one, which a test in a browser measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrecycle.sweep.results import SweepResult

__all__ = ["DARK", "LIGHT", "UNTRAINED", "Mark", "marks_for", "marks_of", "shape", "swatch", "theme_css"]

LIGHT = {
    "paper": "#faf9f6",
    "card": "#ffffff",
    "ink": "#1d1f23",
    "soft": "#575b62",
    "line": "#dedbd4",
    "strong-line": "#8b8f96",
    "tint": "#f1efe9",
    "link": "#0a56a0",
    "loud": "#fff0e3",
    "loud-ink": "#7c2a00",
    "loud-line": "#c2500c",
    "right": "#0b6846",
    "wrong": "#a3280f",
    "grey": "#6d7178",
    "blue": "#0068ad",
    "orange": "#c64e00",
    "green": "#00805d",
    "purple": "#a23f86",
    "ochre": "#8a6400",
    "sky": "#3f86b5",
    "rose": "#c0395c",
}
DARK = {
    "paper": "#131518",
    "card": "#1b1e22",
    "ink": "#e9e7e2",
    "soft": "#abafb6",
    "line": "#343940",
    "strong-line": "#7b818a",
    "tint": "#25292f",
    "link": "#8fc6ff",
    "loud": "#3a1e0b",
    "loud-ink": "#ffcfae",
    "loud-line": "#f08a4b",
    "right": "#77dcb4",
    "wrong": "#ffa892",
    "grey": "#a3a7ae",
    "blue": "#6bb5f2",
    "orange": "#ff9d5c",
    "green": "#4fd0a7",
    "purple": "#eba0d4",
    "ochre": "#e3c04f",
    "sky": "#a5dcf7",
    "rose": "#ff8fa8",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """How a level is shown."""

    colour: str
    """A name in `LIGHT` and `DARK`."""
    marker: str
    """As matplotlib has it; empty for a dashed line."""


UNTRAINED = Mark("grey", "")
_FULL, _HEAD = Mark("blue", "o"), Mark("purple", "D")
_BETWEEN = (
    Mark("orange", "s"),
    Mark("green", "^"),
    Mark("ochre", "v"),
    Mark("sky", "p"),
    Mark("rose", "P"),
)


def marks_of(result: SweepResult) -> dict[str, Mark]:
    """The mark of each level, and of ``untrained``; also of a level that was only predicted or is only expected."""
    return marks_for(list(dict.fromkeys(one.level for one in (*result.levels, *result.predictions))))


def marks_for(levels: Sequence[str]) -> dict[str, Mark]:
    """The same for names of levels, from no recycling to all.

    >>> marks_for(["50", "head"])["50"]
    Mark(colour='orange', marker='s')
    """
    between = [level for level in levels if level not in ("full", "head")]
    marks = {level: _BETWEEN[at % len(_BETWEEN)] for at, level in enumerate(between)}
    return {"untrained": UNTRAINED, "full": _FULL, "head": _HEAD, **marks}


_SHAPES = {
    "": '<path d="M0 8h4.5M6 8h4.5M12 8h4" fill="none" stroke-width="2.5" stroke="currentColor"/>',
    "o": '<circle cx="8" cy="8" r="5.8"/>',
    "s": '<path d="M2.8 2.8h10.4v10.4H2.8z"/>',
    "^": '<path d="M8 1.6 14.8 13.6H1.2z"/>',
    "v": '<path d="M8 14.4 1.2 2.4h13.6z"/>',
    "D": '<path d="M8 .8 15.2 8 8 15.2 .8 8z"/>',
    "p": '<path d="M8 1.2 15 6.3 12.3 14.5H3.7L1 6.3z"/>',
    "P": '<path d="M5.4 1.6h5.2v3.8h3.8v5.2h-3.8v3.8H5.4v-3.8H1.6V5.4h3.8z"/>',
}
"""The markers in a square of 16."""


def swatch(mark: Mark) -> str:
    """The mark as a small picture beside a level's name; the name says the same, so a screen reader skips it."""
    return (
        f'<svg class="mark" viewBox="0 0 16 16" aria-hidden="true" focusable="false" '
        f'style="color:var(--{mark.colour})" fill="currentColor">{_SHAPES[mark.marker]}</svg>'
    )


def shape(mark: Mark, x: float, y: float, size: float) -> str:
    """The same within an SVG, its middle at a place."""
    scale = size / 16
    return (
        f'<g transform="translate({x - size / 2:.1f} {y - size / 2:.1f}) scale({scale:.3f})" '
        f'style="color:var(--{mark.colour})" fill="currentColor">{_SHAPES[mark.marker]}</g>'
    )


def theme_css() -> str:
    """The colours as CSS variables: as the system has it, or as the three buttons on the page say; light on paper."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in theme.items()) for theme in (LIGHT, DARK))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n"
        f":root:has(#theme-light:checked){{color-scheme:light;{light}}}\n"
        f":root:has(#theme-dark:checked){{color-scheme:dark;{dark}}}\n"
        f"@media print{{:root,:root:has(#theme-dark:checked){{color-scheme:light;{light}}}}}\n"
    )
