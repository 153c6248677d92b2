"""Rows that the user's own forward computes, on their way into the store.

A stream is not read before training; its rows are made by the forwards of the first epoch, 64 at a time. Between two
forwards runs the user's code, which may write into a frozen layer where no counter sees it (``p.data.copy_(...)`` of
averaged weights). So rows are held back, 64 MB or a second of them, until the prefix has been hashed once more and was
what the fingerprint says; if it was not, they are dropped, and nothing wrong is ever kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torchrecycle.data import RowSource
from torchrecycle.errors import RecycleWarning, StoreError
from torchrecycle.fill.filling import REFUSALS, takes_no_more
from torchrecycle.store import Leaf, Ragged

__all__ = ["Keeping"]

HELD_BYTES = 64 * 2**20


class Keeping:
    """See the module.

    Args:
        confirm: hashes the prefix again, and calls `take` or `drop`.
        wrote: is told how many bytes were published.
    """

    def __init__(self, confirm: Callable[[], Any], wrote: Callable[[int], None]) -> None:
        self._confirm, self._wrote = confirm, wrote
        self.on = False
        """Whether rows that forwards compute are kept: a stream is in use, and its objects come again."""
        self.refused: StoreError | None = None
        """Why the store takes no more rows."""
        self.kept = 0
        """How many rows were kept so far."""
        self._held: list[tuple[RowSource, np.ndarray, list[Leaf]]] = []
        self._bytes = 0
        self._unpublished: set[bytes] = set()

    def hold(self, source: RowSource, keys: np.ndarray, leaves: Sequence[Leaf]) -> None:
        """Copies of the rows of these keys, until the prefix is known to be what it was.

        Args:
            source: of the recycling.
            keys: ``[n, 16]`` uint8.
            leaves: as `RowSource.encode` gives them.
        """
        wanted = {key.tobytes() for key in keys}
        if wanted & self._unpublished:  # they come again: a new epoch has begun, of a loader that is not ours
            self.publish(source)
        self._unpublished |= wanted
        self._held.append((source, keys, [_copied(leaf) for leaf in leaves]))
        self._bytes += sum(map(_nbytes, leaves))
        if self._bytes > HELD_BYTES:
            self._confirm()

    def take(self) -> None:
        """The prefix was hashed, and is what it was: what is held goes into the store."""
        held, self._held, self._bytes = self._held, [], 0
        for source, keys, leaves in held:
            if self._write(lambda s=source, k=keys, v=leaves: s.rows.append(k, v), source):
                self.kept += len(keys)

    def drop(self) -> None:
        """The prefix has moved since the rows that are held were computed, or while."""
        self._held, self._bytes = [], 0

    def publish(self, source: RowSource) -> None:
        """Let all that was kept be found, after the prefix was hashed.

        Args:
            source: whose rows may wait to be published.
        """
        if self._held:
            self._confirm()
        self._write(source.rows.publish, source)
        self._unpublished.clear()

    def _write(self, write: Callable[[], None], source: RowSource) -> bool:
        """Whether the store took it. One that takes no more gets no more, with one warning."""
        if self.refused is not None:
            return False
        before = source.rows.bytes_written
        try:
            write()
        except StoreError as error:
            if not takes_no_more(error) or error.errno is None:
                raise
            self.refused = error
            self.kept -= source.rows.discard()
            warnings.warn(
                f"the store {REFUSALS[error.errno]}, and no more rows of the stream are kept: objects without a row "
                f"are computed each time they come. Free some space, or give store= another place. ({error})",
                RecycleWarning,
                stacklevel=3,
            )
            return False
        self._wrote(source.rows.bytes_written - before)
        return True


def _copied(leaf: Leaf) -> Leaf:
    """The model goes on with these tensors, and may write into them."""
    return Ragged(leaf.values.clone(), leaf.lengths.clone()) if isinstance(leaf, Ragged) else leaf.clone()


def _nbytes(leaf: Leaf) -> int:
    return leaf.values.nbytes if isinstance(leaf, Ragged) else leaf.nbytes
