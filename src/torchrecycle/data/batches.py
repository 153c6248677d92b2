"""Where in a batch a leaf lies, and the batch with another in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["path_of", "with_leaf"]


def path_of(batch: Any, leaf: Any, at: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """Where in a batch that very object lies."""
    if batch is leaf:
        return at
    if isinstance(batch, Mapping):
        parts = batch.items()
    elif isinstance(batch, (tuple, list)):
        parts = enumerate(batch)
    else:
        return None
    return next((found for name, part in parts if (found := path_of(part, leaf, (*at, name))) is not None), None)


def with_leaf(batch: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    """The batch with the leaf at that path replaced; mutable containers of the batch itself are written."""
    if not path:
        return leaf
    inner = with_leaf(batch[path[0]], path[1:], leaf)
    if isinstance(batch, tuple):
        parts = [*batch[: path[0]], inner, *batch[path[0] + 1 :]]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    batch[path[0]] = inner
    return batch
