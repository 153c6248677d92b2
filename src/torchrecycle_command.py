"""The first step of the command ``torchrecycle``: from here on Ctrl-C is one line, also while PyTorch is imported.

Importing any part of the package `torchrecycle` imports PyTorch, which takes from one to ten seconds; a Ctrl-C in that
time would end in a traceback through whatever was being imported. So this module lies beside the package and imports
nothing but what Python has. What comes before it (the start of Python itself, some 20 ms) cannot be helped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import NoReturn

__all__ = ["main"]

NOTHING_DONE = "torchrecycle: stopped. Nothing had been begun; what earlier runs kept is as it was\n"
REFUSED = 2
"""What a command ends with that was stopped or asked for what cannot be; it has said so in one line."""
CTRL_C_OUTSIDE = 130
"""What Typer ends with on a Ctrl-C that no command has heard: amid the reading of arguments."""


def main() -> NoReturn:
    """Run the command and end the process with its exit code."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
    if heard:
        signal.signal(signal.SIGINT, _stop)
    from torchrecycle.cli import app

    sys.excepthook = _only_ours
    code: int | str | None = 0
    try:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app()
    except SystemExit as end:
        code = _told(end.code)  # while it is at hand: what it holds says more when it is let go
    except KeyboardInterrupt:  # while Typer makes the command
        code = _told(CTRL_C_OUTSIDE)
    sys.exit(code)


def _only_ours(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """The thread by which `multiprocessing` shares tensors calls this hook where a worker that is ended hangs up."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, frames)


def _told(code: int | str | None) -> int | str | None:
    """All is done or has been told: what comes now is the end of Python, which is not worth a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == CTRL_C_OUTSIDE:
        sys.stderr.write(NOTHING_DONE)
        code = REFUSED
    if code == REFUSED:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """At once: packages catch exceptions while they are imported, and there is nothing to clean up."""
    os.write(2, NOTHING_DONE.encode())
    os._exit(REFUSED)
