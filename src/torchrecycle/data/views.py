"""Views: each object in several augmented versions, each read under a seed of its own.

A data set of 2,000 photos with a random crop and a flip, under ``views=4``, is kept as 8,000 objects. `Views` is that
data set: item 2,000 * 3 + 17, its *place*, is photo 17 as it comes out when all generators were seeded by (17, 3). So
the pass that fills, the manifest and what asks whether a data set has changed work on it as on any other, and with
eight views instead of four the first 8,000 places are what they were.

An epoch has 2,000 items nevertheless: `Draws` takes one view of each, by the seed of torch, the object, and how often
it was taken before in this process. No generator is asked for that, so that the order of batches is as without us. In a
worker, ``torch.initial_seed()`` is another one in each epoch, which makes up for what a new process does not remember.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from torchrecycle.data.generators import Generators, mix
from torchrecycle.data.state import state_of

__all__ = ["RECIPE", "Draws", "Views", "draws", "some_of", "viewed"]

RECIPE = 1
"""Of how a seed is made of object and view. Another recipe is another augmentation: all views would be made again."""

SAMPLES = 8
"""How many items stand for a data set, where all of them would take too long."""

_DRAWING = 2**32
"""What tells the numbers that draw a view from those that seed one."""


def some_of(count: int) -> list[int]:
    """A few indices of so many, the first and the last among them."""
    return sorted({round(i * (count - 1) / (SAMPLES - 1)) for i in range(SAMPLES)})


class Views(Dataset[Any]):
    """A map-style data set of several views of each item of another.

    Generators are as before after each reading.

    Args:
        base: map-style.
        count: how many views of each item.
    """

    def __init__(self, base: Any, count: int) -> None:
        self.base, self.count = base, count
        self._generators: Generators | None = None
        self._found_in = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": None}  # another process has generators of its own

    def __len__(self) -> int:
        return self.count * len(self.base)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        generators = self.generators(places)
        with generators.undisturbed():
            items = []
            for index, view in self.seeds(places):
                generators.seed(RECIPE, index, view)
                items.append(self.base[index])
            return items

    def seeds(self, places: Iterable[int]) -> list[tuple[int, int]]:
        """What the items at these places are read under: index and view of each."""
        count, objects = len(self), len(self.base)
        wrong = next((place for place in places if not 0 <= place < count), None)
        if wrong is not None:
            raise IndexError(f"place {wrong} was asked of {self.count} views of {objects} items")
        return [(int(place) % objects, int(place) // objects) for place in places]

    def generators(self, places: Sequence[int]) -> Generators:
        """Those that reading moves. Some are made, or made anew, when a process reads its first item: so one is read
        before they are looked for."""
        if self._generators is None or self._found_in != os.getpid():
            with Generators(self.base).undisturbed():
                for index, _ in self.seeds(places[:1]):
                    self.base[index]
                self._generators, self._found_in = Generators(self.base), os.getpid()
        return self._generators


def viewed(base: Any, count: int) -> Any:
    """A data set of so many views of each item: itself, of one."""
    return base if count == 1 else Views(base, count)


def draws(base: Any) -> bool:
    """Whether items come out differently under another seed, or draw from a generator: as a few of them do."""
    indices = some_of(len(base))
    generators = Views(base, 1).generators(indices)
    with generators.undisturbed():
        for index in indices:
            found = []
            for view in range(2):
                generators.seed(RECIPE, index, view)
                before = generators.states()
                found.append(state_of(base[index]))
                if generators.moved(before):
                    return True
            if found[0] != found[1]:
                return True
    return False


class Draws:
    """Which view of an object comes next, in this process.

    Args:
        objects: how many there are.
        views: of each.
    """

    def __init__(self, objects: int, views: int) -> None:
        self.objects, self.views = objects, views
        # An object that another rank has had in the last epoch would come in the same view once more.
        self._rank = _rank()
        self._taken: np.ndarray | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taken": None}

    def peek(self, index: torch.Tensor) -> torch.Tensor:
        """The places that `take` would give, ``[batch]`` int64."""
        return self._places(index, self._counts()[index.numpy()])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """The places of these objects in views that are drawn now.

        Args:
            index: of objects, ``[batch]`` int64. One that comes twice is drawn twice.
        """
        counts, at = self._counts(), index.numpy()
        times = counts[at] + _repeats(at)
        np.add.at(counts, at, 1)
        return self._places(index, times)

    def _places(self, index: torch.Tensor, times: np.ndarray) -> torch.Tensor:
        mixed = mix(_DRAWING, torch.initial_seed(), self._rank, index.numpy(), times)
        view = torch.from_numpy((mixed % np.uint64(self.views)).astype(np.int64))
        return view[: len(index)] * self.objects + index

    def _counts(self) -> np.ndarray:
        """How often each object was taken; from nothing in a process that was forked."""
        if self._taken is None or self._process != os.getpid():
            self._taken, self._process = np.zeros(self.objects, dtype=np.int64), os.getpid()
        return self._taken


def _repeats(index: np.ndarray) -> np.ndarray:
    """How often each number came before in the same array."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(index) else np.zeros(0, np.int64)
    before = np.arange(len(index)) - np.repeat(starts, np.diff(np.r_[starts, len(index)]))
    found = np.empty_like(before)
    found[order] = before
    return found


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else 0
