"""The few exceptions of torchrecycle, each also a builtin, and what to do about each.

A user who writes ``except ValueError`` around `recycle` still catches a `CutError`; one who writes
``except RecycleError`` catches everything that this library raises on purpose. A message says what came, what was
expected, where, and the next step.
"""

from __future__ import annotations

__all__ = [
    "AutocastError",
    "BatchError",
    "CutError",
    "DamagedRowError",
    "GoneRowsError",
    "KeyTypeError",
    "RandomInputError",
    "RecycleError",
    "RecycleWarning",
    "StaleActivationError",
    "StoreError",
]


class RecycleError(Exception):
    """Anything that torchrecycle raises on purpose."""


class RecycleWarning(UserWarning):
    """Nothing is wrong, but something does not happen that one might count on. Said once."""


class CutError(RecycleError, ValueError):
    """The model cannot be divided there. See ``cuts(model, example)`` for where it can."""


class BatchError(RecycleError, ValueError):
    """A batch, an example or a data set is not of the form that the recycling was made for."""


class KeyTypeError(RecycleError, TypeError):
    """An object of a type that has no key by content. Give it ``__recycle_key__``, or pass ``key=``."""


class RandomInputError(RecycleError, ValueError):
    """An object or a prefix comes out differently each time, so one kept row would freeze one draw of it."""


class AutocastError(RecycleError, RuntimeError):
    """Autocast around the forward is not the one that the rows were made under. Declare it: ``autocast=``."""


class StaleActivationError(RecycleError, RuntimeError):
    """The prefix has moved since the rows were made. Make a new iterator of the loader: it fills anew."""


class StoreError(RecycleError, OSError):
    """The folder is no store, is of a newer format, or cannot be read or written."""


class DamagedRowError(StoreError):
    """A kept row does not match its checksum. ``torchrecycle store verify`` sets it aside, to be computed again."""


class GoneRowsError(StoreError):
    """Rows that were found have left the store since: evicted, set aside, deleted. Look their keys up again."""
