"""What ArcFace and CosFace have in common: softmax over scaled cosines, made harder for the right group by a margin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchrecycle.similarity.losses.base import KnownGroupsLoss, LossError

__all__ = ["MarginSoftmaxLoss"]


class MarginSoftmaxLoss(KnownGroupsLoss):
    """Cross-entropy over scaled cosines to one learned vector per group, by a loss of pytorch-metric-learning.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on; they are numbered from 0.
        margin: how much harder it is made for the right group.
        scale: what the cosines are multiplied by.

    Raises:
        LossError: the scale is not above 0, or a size is less than 1.
    """

    library: Any
    """The loss of pytorch-metric-learning; it holds the vectors."""

    def __init__(self, embedding_size: int, num_groups: int, *, margin: float, scale: float) -> None:
        super().__init__(embedding_size, num_groups)
        if not scale > 0:
            raise LossError(f"the scale of {type(self).__name__} must be above 0: {scale} came")
        self.margin = margin
        self.scale = scale

    @property
    def kernel(self) -> nn.Parameter:
        """The learned vectors, ``[embedding_size, num_groups]``."""
        return self.library.W

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "margin": self.margin, "scale": self.scale}

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        # the library would cast its parameter to the embeddings' type, under the optimiser's feet
        return self.library(embeddings.to(self.kernel.dtype), groups)
