"""What a recycling tells of itself: what it has done so far, and how kept rows compare with fresh ones."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckReport", "Stats"]


@dataclass(slots=True)
class Stats:
    """What a recycling has done so far, in this process."""

    hits: int = 0
    """Objects whose row came from the store."""
    misses: int = 0
    """Objects that the prefix ran for: at fill, in a raw batch, or in one of which some rows were missing."""
    bytes_read: int = 0
    """Bytes of rows handed to the model."""
    bytes_written: int = 0
    """Bytes of rows added to the store."""
    prefix_seconds: float = 0.0
    """Time in prefix runs."""
    suffix_seconds: float = 0.0
    """Time in the forward from the cut on (without backward)."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Kept rows against fresh ones."""

    objects: int
    """Objects of the batch."""
    found: int
    """Those of them whose row is kept."""
    difference: float
    """Largest relative difference (root mean square, over a leaf) between the kept rows and a fresh prefix run."""
    composition: float
    """The same between two fresh runs of which one has each object alone: what rounding makes."""
    precision: float = 0.0
    """The same between fresh rows and what would be kept of them: what the precision of kept rows makes."""

    @property
    def ok(self) -> bool:
        """Whether the kept rows differ by no more than rounding and their precision explain."""
        return self.difference <= max(10 * self.composition, 1e-3) + 2 * self.precision

    def __str__(self) -> str:
        precision = f" and the precision of rows {self.precision:.1e}" if self.precision else ""
        return (
            f"{self.found} of {self.objects} objects are kept; they differ from fresh ones by {self.difference:.1e}, "
            f"where another batch composition alone makes {self.composition:.1e}{precision}"
        )
