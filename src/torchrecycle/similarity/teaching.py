"""Is there anything to learn from a batch?

A triplet needs two objects of one group and one of another; 32 photos of 32 cars have none, and their loss is zero for
ever. That is silent, so `TrainableModel` asks each batch of the first epoch until one teaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.losses import GroupLoss, PairwiseLoss

__all__ = ["NothingToLearnError", "teaches"]


class NothingToLearnError(RecycleError, ValueError):
    """No batch holds what the loss compares."""

    @classmethod
    def of(cls, loss: Any) -> NothingToLearnError:
        """What is missing, in words."""
        name = type(loss).__name__
        if getattr(loss, "compares_all_pairs", False):
            return cls(
                f"every batch of the epoch had a single pair, and {name} learns from the other pairs of a batch: give "
                "the loader a larger batch_size"
            )
        if isinstance(loss, PairwiseLoss):
            return cls(
                f"no batch of the epoch had a negative for {name}: all pairs belong together (score 1.0) and are of "
                "one subgroup, whose objects are no negatives of each other. Give each pair a subgroup of its own "
                "(subgroup=number), or pairs with a score of 0.0, and batches of two pairs or more."
            )
        return cls(
            f"no batch of the epoch had two objects of one group and one of another, which {name} compares. If groups "
            "have a single member, there is nothing to learn; if they are many and small, let batches be of whole "
            "groups: GroupSimilarityDataLoader(dataset, batch_size=32, objects_per_group=4)."
        )


def teaches(loss: Any, targets: Mapping[str, Tensor]) -> bool:
    """Whether a batch holds what a loss compares."""
    if getattr(loss, "learns_groups", False):  # each object is compared with a vector for each group
        return True
    if getattr(loss, "compares_all_pairs", False):
        return len(targets["pairs"]) > 1
    if isinstance(loss, GroupLoss) and "groups" in targets:
        counts = targets["groups"].unique(return_counts=True)[1]
        return len(counts) > 1 and bool((counts > 1).any())
    if isinstance(loss, PairwiseLoss) and "labels" in targets:
        labels, subgroups = targets["labels"], targets["subgroups"]
        together = bool((labels > 0).any())
        return together and (bool((labels < labels.max()).any()) or bool((subgroups != subgroups[0]).any()))
    return True
