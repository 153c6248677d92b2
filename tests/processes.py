"""The process that forks others for the tests.

There is one for all tests of a run, and whoever starts it first decides what it has imported. So all start it with what
the most demanding of them needs: a command that is stopped with Ctrl-C must not be amid its imports, some of which
swallow that.
"""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path
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


def killed_at(line: str, code: str, *arguments: object) -> None:
    """Run Python code in a process, in the folder of the tests, and SIGKILL it when it prints a line that begins so.

    Raises:
        AssertionError: it ended before.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    for told in process.stdout:
        if told.startswith(line):
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
