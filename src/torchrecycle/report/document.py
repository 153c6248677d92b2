"""A whole HTML document in the look of all pages here: one file that asks nothing of the network and runs no script.

A content security policy in it says so to the browser. Light and dark follow the system, or three buttons that work by
CSS alone.
"""

from __future__ import annotations

import os
import uuid
from importlib import resources
from pathlib import Path

from torchrecycle.report.colours import theme_css
from torchrecycle.report.markup import slot, text

__all__ = ["document", "put_whole"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(
    title: str, main: str, footer: str, *, skip: str = "Skip to the answer", sheets: tuple[str, ...] = ()
) -> str:
    """
    Args:
        title: of the page, as plain text.
        main: its content, as HTML.
        footer: what stands below, as HTML.
        skip: what the link says that leads to the content.
        sheets: names of further style sheets of this package.
    """
    css = "".join(_sheet(name) for name in ("page.css", *sheets))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>\n{theme_css()}{css}</style></head>\n<body>"
        f'<a class="skip" href="#main">{text(skip)}</a>\n'
        f'<header class="top"><h1>{slot(title)}</h1>{_THEMES}</header>\n'
        f'<main id="main" tabindex="-1">{main}\n</main>\n<footer>{footer}</footer></body></html>\n'
    )


def _sheet(name: str) -> str:
    return resources.files("torchrecycle.report").joinpath(name).read_text(encoding="utf-8")


_THEMES = (
    '<fieldset class="themes"><legend>Colours</legend>'
    + "".join(
        f'<label><input type="radio" name="theme" id="theme-{name}"{" checked" if name == "system" else ""}>'
        f"<span>{name}</span></label>"
        for name in ("system", "light", "dark")
    )
    + "</fieldset>"
)


def put_whole(path: Path, content: bytes) -> None:
    """Write a file: all of it or nothing, also if this is stopped or the disk is full."""
    begun = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        begun.write_bytes(content)
        os.replace(begun, path)
    except BaseException:
        begun.unlink(missing_ok=True)
        raise
