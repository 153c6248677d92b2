"""A sign of life for whatever takes over two seconds: a bar on a terminal, plain lines elsewhere.

Filling 8,144 photos shows, on a terminal, a bar with the time left; in a log file a line every ten seconds:
``filling: 2,048 of 8,144 objects, 31 s``. What is done within two seconds shows nothing.

Where work advances it can also be stopped: `watching` has something called at each step of whatever is under way, such
as a clock that raises when time is up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Progress", "progress", "watching"]

QUIET_SECONDS = 2.0
LINE_EVERY = 10.0

_watch: ContextVar[Callable[[], None] | None] = ContextVar("watch", default=None)


class Progress:
    """What `progress` hands out: call `advance` with what was done."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._began = time.monotonic()
        self._last_line = self._began + QUIET_SECONDS - LINE_EVERY
        self._bar: Any = None
        self._task: Any = None

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        watch = _watch.get()
        if watch is not None:
            watch()
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif now - self._began > QUIET_SECONDS and (self.total is None or self.done < self.total):
            if sys.stderr.isatty():
                self._open_bar()
            elif now - self._last_line >= LINE_EVERY:
                self._last_line = now
                of = "" if self.total is None else f" of {self.total:,}"
                print(
                    f"{self.title}: {self.done:,}{of} {self.unit}, {now - self._began:.0f} s",
                    file=sys.stderr,
                )

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Bar(*columns, *times, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total, completed=self.done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(title: str, total: int | None, unit: str = "objects") -> Iterator[Progress]:
    """Show how far something is, on stderr. `total` is None where nobody knows it."""
    shown = Progress(title, total, unit)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def watching(call: Callable[[], None]) -> Iterator[None]:
    """Have something called whenever anything advances, in this thread and until the end, also where nothing is shown.

    What it raises stops the work as Ctrl-C would: rows that are filled are kept, models are as they were.

    Args:
        call: takes little time, since it is called for each batch.
    """
    token = _watch.set(call)
    try:
        yield
    finally:
        _watch.reset(token)
