"""Which data sets rows can be kept of, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrecycle.data import RecycledDataset
from torchrecycle.errors import BatchError
from torchrecycle.frames import is_frame

__all__ = ["NAMELESS", "refuse_for_streams", "refuse_no_map_style"]


NAMELESS = (
    "recycle(key=...) identifies objects without looking at them, so that another resize or tokenizer would not be "
    "noticed. Give data set and preprocessing a name too: loader(dataset, name='train, resize 224, v1'), and change "
    "it when they change."
)


def refuse_for_streams(key: Any, name: str | None, views: int) -> None:
    """What asks for an index, or for a manifest."""
    if key is not None:
        raise BatchError(
            "recycle(key=...) and an iterable data set do not go together: each object is read in every epoch, so its "
            "content is its key. Make the recycling without key=, or give a map-style data set."
        )
    if name is not None:
        raise BatchError(
            f"name={name!r} keeps what was read of a map-style data set; an iterable one is read in every epoch. Leave "
            "name= out."
        )
    if views > 1:
        raise BatchError(
            f"views={views} draws one of the augmented versions of an object by its index, which the objects of an "
            "iterable data set do not have. Give a map-style data set, or recycle(augment=) for changes of the "
            "activations."
        )


def _some(mapping: Mapping[Any, Any]) -> str:
    names = [repr(name) for name in list(mapping)[:4]]
    return ", ".join(names) + (", ..." if len(mapping) > 4 else "")


def refuse_no_map_style(dataset: Any) -> None:
    if is_frame(dataset) and hasattr(dataset, "columns"):
        kind = f"{type(dataset).__module__.partition('.')[0]} {type(dataset).__name__}"
        raise BatchError(
            f"a {kind} gives no items by number: write a torch.utils.data.Dataset around it, whose __getitem__ makes "
            "tensors of row i. An edit of the frame is then seen as an edit of the data set."
        )
    if isinstance(dataset, Mapping):
        raise BatchError(
            f"a {type(dataset).__name__} is no data set: it has {_some(dataset)}. Give one of them: "
            "loader(splits['train'])."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise BatchError(
            f"a {type(dataset).__name__} is no map-style data set: with recycling it needs __len__ and __getitem__, "
            "so that an index stands for an object"
        )
    if isinstance(dataset, RecycledDataset):
        raise BatchError("this data set is recycled already: give the one that it was made of")
    if len(dataset) == 0:
        raise BatchError("the data set is empty: there is nothing to fill or to train on")
