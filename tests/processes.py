"""The process that forks others for the tests.

There is one for all tests of a run, and whoever starts it first decides what it has imported. So all start it with what
the most demanding of them needs: a command that is stopped with Ctrl-C must not be amid its imports, some of which
swallow that.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

PRELOADED = [
    "test_cli_sweep",
    "timm",
    "torchrecycle.sweep",
    "torchrecycle.report",
    "torchrecycle.testing.store_contract",
]


def forkserver_context() -> Any:
    """A context whose processes have imported what the tests need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
