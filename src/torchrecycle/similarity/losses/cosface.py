"""CosFace: softmax over cosines, where the right group's cosine is made smaller by a margin.

An embedding with the cosine 0.8 to the vector of its group is scored as if it had 0.45: with the usual margin, ``64
(0.8 - 0.35)``. (Wang et al., *CosFace: Large Margin Cosine Loss for Deep Face Recognition*, 2018, equation 4.) It is
pytorch-metric-learning's.
"""

from __future__ import annotations

from torch import nn

from torchrecycle.similarity.losses.base import library
from torchrecycle.similarity.losses.margin_softmax import MarginSoftmaxLoss

__all__ = ["CosFaceLoss"]


class CosFaceLoss(MarginSoftmaxLoss):
    """Softmax over cosines, where the right group's cosine is made smaller by a margin.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on; they are numbered from 0.
        margin: what is taken from the right group's cosine.
        scale: what the cosines are multiplied by.

    Raises:
        LossError: the scale is not above 0, or a size is less than 1.
    """

    def __init__(self, embedding_size: int, num_groups: int, margin: float = 0.35, scale: float = 64.0) -> None:
        super().__init__(embedding_size, num_groups, margin=margin, scale=scale)
        self.library = library().cosface(embedding_size, num_groups, margin=margin, scale=scale)
        nn.init.normal_(self.kernel, std=0.01)
