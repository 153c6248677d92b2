"""What a user did wrong, as one line on stderr and exit code 2; ``--debug`` shows where it came from."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer

from torchrecycle.errors import RecycleError

__all__ = ["Debug", "one_line_errors"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _what_is_kept() -> str:
    return "What was computed is kept; the same command goes on from there"


@contextmanager
def one_line_errors(debug: bool, kept: Callable[[], str] = _what_is_kept) -> Iterator[None]:
    """A mistake is one line on stderr and exit code 2, and so is Ctrl-C.

    Args:
        debug: let the exception through.
        kept: says what is left when the command is stopped.
    """
    try:
        yield
    except RecycleError as error:
        _end(debug, error, str(error))
    except torch.OutOfMemoryError as error:
        _end(debug, error, f"the graphics card's memory is full. Take a smaller --batch. {kept()}")
    except OSError as error:
        if error.errno is None:
            raise
        full = " No room is left on the disk: make some, or give another folder." if error.errno == errno.ENOSPC else ""
        where = f"{error.filename}: " if error.filename else ""
        _end(debug, error, f"{where}{error.strerror}.{full} {kept()}")
    except KeyboardInterrupt as error:
        _end(debug, error, f"stopped. {kept()}")


def _end(debug: bool, error: BaseException, line: str) -> None:
    if debug:
        raise error
    typer.echo(f"torchrecycle: {' '.join(line.split())}", err=True)
    raise typer.Exit(2) from None
