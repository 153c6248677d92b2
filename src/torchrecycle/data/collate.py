"""Batches of which some rows are missing, or leave while they are read.

A batch of 64 whose items all have rows is collated as ever. If 3 rows leave the store between looking up and gathering
(another process has evicted them), the keys are looked up again, these 3 items are read, and the batch holds 61 rows
and 3 photos: the epoch goes on, in a worker as in the main process. A collate function of the user's that does not run
on stand-ins gets the items themselves, since a batch with misses may have come from a store that never was filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchrecycle.data.dataset import Fetched
from torchrecycle.data.loader import RecycledCollate
from torchrecycle.data.resident import Resident
from torchrecycle.data.source import TRIES, RowSource
from torchrecycle.data.stream import Marks, place_of_stream
from torchrecycle.errors import GoneRowsError, StoreError

__all__ = ["MixedCollate"]


class MixedCollate(RecycledCollate):
    """Items to a batch with rows in it, and with raw inputs for the objects that have none.

    Args:
        collate_fn: the user's; None for ``default_collate``.
        source: of the rows; None while recycling is off.
        marks: whether batches none of whose objects has a row are handed out as such, to be kept.
        owner: the recycling, if it is to be asked for its rows at each batch: it may be divided anew or paused while a
            trainer holds this function. Not pickled to workers, which have the rows that they were started with.
    """

    def __init__(
        self,
        collate_fn: Callable[[Sequence[Any]], Any] | None,
        source: RowSource | None,
        marks: Marks | None = None,
        owner: Any = None,
    ) -> None:
        super().__init__(collate_fn, source)
        self.marks = marks or Marks()
        self._owner = owner

    def _look(self) -> None:
        if self._owner is not None:
            self.source = None if self._owner.off else self._owner.source

    def __getstate__(self) -> dict[str, Any]:
        self._look()
        return {**self.__dict__, "_owner": None}

    def _placed(self, batch: Any, source: RowSource, resident: Resident | None = None) -> Any:
        if self.marks.on and not source.user_keys:
            return place_of_stream(source, batch)
        return super()._placed(batch, source, resident)

    def __call__(self, items: Sequence[Any]) -> Any:
        self._look()
        for _ in range(TRIES):
            if not isinstance(items, Fetched):
                break
            try:
                return super().__call__(items)
            except GoneRowsError:
                items.dataset.look_again()
                items = items.dataset.fetch(items.places)
            except StoreError:
                raise
            except Exception:
                if not items.raw:
                    raise
                # A user's function that takes no batch of rows beside objects: it gets objects, and raises on those.
                items = items.dataset.read(items.places.tolist())
        if isinstance(items, Fetched):
            items = items.dataset.read(items.places.tolist())
        try:
            return super().__call__(items)
        except GoneRowsError as error:
            raise GoneRowsError(
                f"{error}. These items were asked for one by one, so that they cannot be read instead: make the data "
                "set again, recycling.dataset(...), and let what wraps it ask for a batch (__getitems__)."
            ) from error
