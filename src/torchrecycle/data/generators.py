"""All random generators that reading a data set may draw from, taken together.

Python's, NumPy's and torch's global ones, and those that the data set and its transforms hold: a pipeline of
albumentations with three transforms has six. `Generators` looks at all of them (has reading an item moved one?), seeds
all of them, each from numbers of its own, and puts them back. One that draws from the system, or that hides in an
object written in C, is found by reading an item twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from torchrecycle.data.state import generators_of
from torchrecycle.trace import random_state, set_random_state

__all__ = ["Generators", "mix"]

_GLOBAL = 4
"""How many numbers are kept for the global generators, so that the private ones begin at the fifth."""


def mix(*numbers: Any) -> np.ndarray:
    """64 bits that look random, of numbers: the same ones of the same numbers, everywhere and for ever.

    Each number is added in turn, and what there is goes through the finaliser of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16, function ``mix64``).

    Args:
        numbers: whole numbers of up to 64 bits, or arrays of them that broadcast with each other.

    Returns:
        uint64, of the numbers' common shape; of one dimension at least.

    >>> mix(0, 1).tolist() == mix(0, [1, 2])[:1].tolist()
    True
    """
    mixed = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        if isinstance(number, int):
            number = number % 2**64
        mixed = (mixed ^ np.atleast_1d(np.asarray(number)).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


class Generators:
    """The global random generators, and those that can be reached from some objects.

    Args:
        objects: a data set, a collate function.
    """

    def __init__(self, *objects: Any) -> None:
        self._private = [one for one in generators_of(*objects) if _can_be_put_back(one)]

    def states(self) -> tuple[Any, ...]:
        """What `put_back` takes and `moved` compares with."""
        return random_state(), [_state(one) for one in self._private]

    def put_back(self, states: tuple[Any, ...]) -> None:
        """Let all go on from where they were."""
        set_random_state(states[0])
        for generator, state in zip(self._private, states[1], strict=True):
            _set_state(generator, state)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Whatever runs inside, all generators are as before."""
        states = self.states()
        try:
            yield
        finally:
            self.put_back(states)

    def seed(self, *numbers: int) -> None:
        """Let each draw what it always draws after these numbers, and no two of them the same."""
        seeds = mix(*numbers, np.arange(_GLOBAL + len(self._private))).tolist()
        random.seed(seeds[0])
        np.random.seed(_words(seeds[1]))
        torch.default_generator.manual_seed(seeds[2])
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seeds[3])
        for generator, seed in zip(self._private, seeds[_GLOBAL:], strict=True):
            _seed(generator, seed)

    def moved(self, before: tuple[Any, ...]) -> list[str]:
        """Whose generators have drawn since, in words that "drew from" may stand before."""
        (python, numpy, torch_, cuda), private = before
        now = random_state()
        names = []
        if python != now[0]:
            names.append("Python's random")
        if numpy is not None and not _is_same(numpy, now[1]):
            names.append("NumPy's")
        if not torch.equal(torch_, now[2]):
            names.append("torch's")
        if len(cuda) == len(now[3]) and not all(map(torch.equal, cuda, now[3])):
            names.append("CUDA's")
        found = [f"{' and '.join(names)} generator"] if names else []
        if not all(_is_same(state, _state(one)) for one, state in zip(self._private, private, strict=True)):
            found.append("a random generator that it holds")
        return found


def _words(seed: int) -> list[int]:
    """NumPy's older generators take numbers of 32 bits."""
    return [seed & 0xFFFFFFFF, seed >> 32]


def _can_be_put_back(generator: Any) -> bool:
    """Whether it has a state; the system's has none."""
    return not isinstance(generator, random.SystemRandom)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        if kind.__module__.startswith("numpy."):  # others may take no seed; what they draw is found by reading twice
            generator.bit_generator.state = kind(seed).state
    elif isinstance(generator, np.random.RandomState):
        state = generator.get_state(legacy=False)
        kind = getattr(np.random, state["bit_generator"], None) if isinstance(state, dict) else None
        if kind is not None:
            generator.set_state(kind(_words(seed)).state)
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
