"""Tells a folder with a sweep's results from any other, so that it is neither written over nor learned from.

A sweep of ``photos/`` that is run in ``photos/`` leaves ``photos/sweep-photos-resnet18/plots/0.png``. Its folder holds
a ``sweep.json``, by which the next sweep knows that this is no class of pictures, and that it may go on there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["MARKER", "MARKER_TEXT", "holds_results", "is_marked"]

MARKER = "sweep.json"
_SAID: dict[str, Any] = {"made_by": "torchrecycle sweep", "format": 1}
MARKER_TEXT = json.dumps(_SAID) + "\n"
"""What the file holds."""


def is_marked(folder: Path) -> bool:
    """Whether a sweep may write its results there, since one of its kind has."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == _SAID
    except (OSError, ValueError):
        return False


def holds_results(folder: Path) -> bool:
    """Whether a sweep's results seem to lie there: enough to pass a folder over, not to write into it."""
    return ((folder / "journal").is_dir() and (folder / "results.json").is_file()) or is_marked(folder)
