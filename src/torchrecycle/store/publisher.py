"""Writing a segment while the next one is gathered: packing, hashing, writing and waiting for the disk, in a thread.

256 MB take a second to hash and to reach a disk, in which a prefix runs for a hundred more images. One segment at most
is on its way, so that memory holds two of them and never more: whoever has the next ready waits for the one before.

The thread is no daemon: the end of the interpreter waits for it, and what was handed over is published. A fork leaves
it to the parent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Publisher"]


class Publisher:
    """Runs one piece of work at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: int | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work goes on at this moment."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether nothing was started whose end was not waited for."""
        return self._thread is None

    def start(self, work: Callable[[], int]) -> None:
        """Begin something, after `finish` has taken what was before."""
        assert self._thread is None
        self._result = self._error = None

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:  # raised again where it is waited for
                self._error = error

        self._thread = threading.Thread(target=run, name="torchrecycle publisher")
        self._thread.start()

    def finish(self) -> int | None:
        """Wait for the work and give its result; None if there is none. Raises what the work has raised."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result
