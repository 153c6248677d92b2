"""What a sweep is asked to do beside its task: levels, store, seeds, limits; a frozen record of `sweep`'s options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchrecycle.errors import RecycleError

__all__ = ["LEVELS", "SweepError", "SweepPlan"]

LEVELS = ("full", "50", "75", "head")


class SweepError(RecycleError, ValueError):
    """A sweep cannot be run as asked, a task gives what cannot be used, or a training has diverged."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """How a task is swept."""

    store: str | Path
    """Where rows are kept: a folder, or ``memory://name``."""
    results: Path | None = None
    """The folder where finished trainings (``journal/``) and levels (``results.jsonl``) are kept; the store's name with
    ``-sweep`` behind it if None."""
    levels: Iterable[str | float] = LEVELS
    """``full``, ``head``, or how many per cent of the blocks are recycled; or their share, such as 0.5."""
    seeds: Sequence[int] = (0,)
    search: bool = True
    """Whether a rate is looked for, at each level; else the recipe's is taken."""
    budget: str | float | None = None
    """How long it may take, such as ``30m``, all its runs together; None sets no limit."""
    began: float | None = None
    """When the budget began to be used, as `time.monotonic` tells it; when the sweep is made, if None."""
    max_bytes: int | str | None = None
    """How many bytes the rows of this sweep may take in the store, such as ``20 GB``; None sets no limit. Rows of other
    models there are not counted, and stay."""
    predict: bool | Sequence[str] | None = None
    """Whether it is measured beforehand what each level takes; None: where that is cheap against what is planned. Names
    of precisions: at those, too."""
    precision: str | None = None
    """Of kept rows; see `recycle`."""
    views: int | None = None
    """In how many augmented versions each object of the training split is kept; see `recycle`."""
    weights: Path | None = None
    """A folder where the trained weights of each final training are kept; None keeps none."""
    command: str = "sweep(...)"
    """What is said of how it was called."""
    tell: Callable[[str], None] = field(default=lambda line: None, repr=False)
    """Told of what has ended, a line at a time."""

    @property
    def folder(self) -> Path:
        """Where results are kept.

        Raises:
            SweepError: none is given, and the store is no folder beside which one could be.
        """
        if self.results is not None:
            return Path(self.results)
        if "://" in str(self.store):
            raise SweepError(
                f"the store {self.store} is no folder, so there is no place beside it for what a sweep finishes: give "
                "results='a folder'"
            )
        store = Path(self.store)
        return store.with_name(f"{store.name}-sweep") if store.name else store / "sweep"

    @property
    def journal(self) -> Path:
        """The folder of finished trainings."""
        return self.folder / "journal"
