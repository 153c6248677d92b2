"""What a data set for similarity learning holds: objects in groups, or pairs of objects.

``SimilarityGroupSample(obj=photo, group=371)`` says that this photo is like all others of group 371 and unlike the
rest. ``SimilarityPairSample(obj_a="how do I stop it?", obj_b="press q", score=1.0)`` says how alike two objects are.
An object is anything: what turns it into a model's input is the encoder's collate function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SimilarityGroupSample", "SimilarityPairSample", "SimilaritySample"]


@dataclass
class SimilarityGroupSample:
    """An object of a group: like every other of the group, unlike all objects of other groups."""

    obj: Any
    """The object."""
    group: int
    """The number of its group."""


@dataclass
class SimilarityPairSample:
    """Two objects, and how alike they are."""

    obj_a: Any
    """The left object: a question."""
    obj_b: Any
    """The right one: its answer."""
    score: float = 1.0
    """1.0 where they belong together, 0.0 where they have nothing in common."""
    subgroup: int = 0
    """Objects of pairs of another subgroup are negatives of this pair; those of the same subgroup are not."""


SimilaritySample = SimilarityGroupSample | SimilarityPairSample
