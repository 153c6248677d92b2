"""Sizes and counts as people write and read them: ``"20 GB"`` -> 20,000,000,000 and back."""

from __future__ import annotations

import re

from torchrecycle.errors import StoreError

__all__ = ["bytes_in_words", "counted", "parse_bytes"]

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgtp]?)(i?)(b?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_bytes(size: int | str) -> int:
    """A size in bytes.

    Args:
        size: Bytes, or words with a unit: ``"500MB"``, ``"20 GB"``, ``"1.5GiB"``, ``"0"``. MB are millions, MiB
            1024 * 1024. Who forgets the unit of 20 GB would have a store emptied to 20 bytes.

    Raises:
        StoreError: It is no size, or words without a unit.

    >>> parse_bytes("500MB"), parse_bytes("20 GB"), parse_bytes("1.5GiB"), parse_bytes("7 B"), parse_bytes(7)
    (500000000, 20000000000, 1610612736, 7, 7)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None or (found[3] and not found[2]):
        raise StoreError(
            f"{size!r} is no size: give bytes, or a number with a unit, such as '500MB', '20 GB', '1.5GiB'"
        )
    if not (found[2] or found[4]) and float(found[1]):
        bare = found[0].strip()
        raise StoreError(f"{size!r} has no unit: '{bare} GB', or '{bare} B' if bytes are meant")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()])


def bytes_in_words(nbytes: int) -> str:
    """
    >>> bytes_in_words(999), bytes_in_words(1_234_567), bytes_in_words(42_000_000_000)
    ('999 B', '1.2 MB', '42.0 GB')
    """
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        # What would be shown as 1000.0 of a unit is 1.0 of the next.
        if abs(size) < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{nbytes:,} B" if unit == "B" else f"{size:,.1f} {unit}"


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "segment"), counted(1200, "row")
    ('1 segment', '1,200 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
