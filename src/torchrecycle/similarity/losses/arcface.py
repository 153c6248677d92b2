"""ArcFace: softmax over angles, where the right group's angle is made larger by a margin.

An embedding at 40 degrees from the vector of its group is scored as if it were at 68.6: with the usual margin of 0.5
radians, ``64 cos(0.70 + 0.5)`` instead of ``64 cos(0.70)``. (Deng et al., *ArcFace: Additive Angular Margin Loss for
Deep Face Recognition*, 2019, equation 3.) It is pytorch-metric-learning's, which also goes on falling beyond 180
degrees less the margin, where the plain formula would rise again.
"""

from __future__ import annotations

import math

from torch import nn

from torchrecycle.similarity.losses.base import LossError, library
from torchrecycle.similarity.losses.margin_softmax import MarginSoftmaxLoss

__all__ = ["ArcFaceLoss"]


class ArcFaceLoss(MarginSoftmaxLoss):
    """Softmax over angles, where the right group's angle is made larger by a margin.

    Args:
        embedding_size: numbers of an embedding.
        num_groups: how many groups there are to train on; they are numbered from 0.
        scale: what the cosines are multiplied by.
        margin: an angle in radians.

    Raises:
        LossError: the margin is no angle between 0 and pi, the scale is not above 0, or a size is less than 1.
    """

    def __init__(self, embedding_size: int, num_groups: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(embedding_size, num_groups, margin=margin, scale=scale)
        if not 0 <= margin < math.pi:
            raise LossError(
                f"the margin of ArcFaceLoss is an angle in radians, from 0 to below pi, and {margin:g} came: "
                f"{margin:g} degrees are margin={math.radians(margin):.3f}"
            )
        self.library = library().arcface(embedding_size, num_groups, degrees=math.degrees(margin), scale=scale)
        nn.init.normal_(self.kernel, std=0.01)
