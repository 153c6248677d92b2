"""What a user did wrong, as one line on stderr and exit code 2; ``--debug`` shows where it came from.

``torchrecycle sweep texts reviews.csv`` on a full disk ends with ``torchrecycle: cannot write ...: No space left on
device. Make room. Kept: 4 finished trainings in ...; the same command goes on from there``, and so does Ctrl-C.
"""

from __future__ import annotations

import _thread
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from torchrecycle.errors import RecycleError

__all__ = ["Debug", "OneLineGroup", "OptionError", "one_line_errors"]

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from: its traceback.")]


class OptionError(RecycleError, ValueError):
    """What was given to an option cannot be used."""


def _nothing_lost() -> str:
    return "Nothing is lost; the same command begins anew"


@contextmanager
def one_line_errors(
    debug: bool, kept: Callable[[], str] = _nothing_lost, *, smaller: str = "a smaller --batch"
) -> Iterator[None]:
    """A mistake is one line on stderr and exit code 2, and so is Ctrl-C. Whatever else goes wrong is let through.

    Args:
        debug: let the exception through; of Ctrl-C, show the traceback.
        kept: says what is left when the command is stopped; must not fail.
        smaller: what to take where the memory is full.
    """
    with _ctrl_c() as ctrl_c:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            ctrl_c.deaf = True
            stopped = ctrl_c.heard or isinstance(error, KeyboardInterrupt)
            line = f"stopped. {kept()}" if stopped else _in_one_line(error, kept, smaller)
            if line is None or (debug and not stopped):
                raise
            if debug:
                traceback.print_exception(error)
            typer.echo(f"torchrecycle: {' '.join(line.split())}", err=True)
            raise typer.Exit(2) from None


def _in_one_line(error: BaseException, kept: Callable[[], str], smaller: str) -> str | None:
    """None if it is nothing that a user could mend."""
    # First, since a model that did not run for want of memory is told as one that takes no such example.
    memory = _full_memory(error)
    if memory is not None:
        return f"{memory} is full. Take {smaller}. {kept()}"
    if isinstance(error, RecycleError):
        return f"{error}{_after_a_disk(error, kept)}"
    # A broken pipe is left to Typer: somebody reads no further.
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{_after_a_disk(error, kept)}"
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _after_a_disk(error: BaseException, kept: Callable[[], str]) -> str:
    """What to do about a disk that did not take or give something; nothing where it was not the disk."""
    number = getattr(error, "errno", None)
    if number is None:
        return ""
    return f". {'Make room' if number in _FULL else 'See that it can be read and written'}. {kept()}"


def _full_memory(error: BaseException) -> str | None:
    """Which memory is full, if that is what it was, or led to it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the graphics card's memory"
    # PyTorch has no class of its own for the other one.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the memory"
    return _full_memory(error.__cause__) if error.__cause__ is not None else None


# -- arguments that are missing or wrong -------------------------------------------------------------------------------

_UsageError: Any = typer.BadParameter.__bases__[0]
"""Of click, or of the copy of it that newer versions of Typer hold: Typer names its heir only."""


class OneLineGroup(TyperGroup):
    """The root of the commands; what Typer says of arguments is one line too, for all that lie below."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _one_line_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_usage():
            return super().invoke(ctx)


@contextmanager
def _one_line_usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # what it shows is the help
            raise
        words = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx is not None else "torchrecycle"
        typer.echo(f"torchrecycle: {words[:1].lower()}{words[1:]}. See {command} --help", err=True)
        raise typer.Exit(error.exit_code) from None


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

AGAIN = 0.05
"""Seconds after which a Ctrl-C that was swallowed is heard again."""


class _CtrlC:
    """Ctrl-C is for this process and not for its workers, which it ends itself, and is not lost.

    A terminal sends it to both. A worker that it kills makes PyTorch raise a `RuntimeError` here, and where Python
    itself calls something (a hook at fork, a finaliser) a `KeyboardInterrupt` is printed and forgotten.
    """

    def __init__(self) -> None:
        self.heard = False
        self.deaf = False
        """Nothing more is to be heard: what is to be said is being found and written."""
        self._process = os.getpid()
        self._print = sys.unraisablehook

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.deaf:
            return
        self.heard = True
        raise KeyboardInterrupt

    def swallowed(self, what: sys.UnraisableHookArgs) -> None:
        """What comes of a Ctrl-C, such as a loader that was half made, says nothing more than that."""
        if not issubclass(what.exc_type, KeyboardInterrupt):
            if not self.heard:
                self._print(what)
        elif os.getpid() == self._process:
            threading.Timer(AGAIN, _interrupt).start()


def _interrupt() -> None:
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread also from a wait
    else:
        _thread.interrupt_main()


@contextmanager
def _ctrl_c() -> Iterator[_CtrlC]:
    ctrl_c = _CtrlC()
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    # A job in the background ignores it, and a program around this one may have a handler of its own.
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if not ours:
        yield ctrl_c
        return
    signal.signal(signal.SIGINT, ctrl_c.handle)
    sys.unraisablehook = ctrl_c.swallowed
    try:
        yield ctrl_c
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
