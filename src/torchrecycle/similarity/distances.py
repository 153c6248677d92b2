"""How far apart two embeddings are, and how alike: four measures, under the names that Quaterion's users know.

With ``x = [[3, 4]]`` and ``y = [[4, 3]]``, two vectors of length 5 whose cosine is 24 / 25 = 0.96:

    member         distance(x, y)            similarity(x, y)        in a matrix
    EUCLIDEAN      sqrt(1 + 1) = 1.414       1 / (1 + d) = 0.414     the same
    MANHATTAN      1 + 1 = 2                 1 / (1 + d) = 0.333     the same
    DOT_PRODUCT    -24                       24                      the same
    COSINE         1 - 0.96 = 0.04           0.96                    distance 0.02, similarity 0.98

**Cosines come in two scales**, as in Quaterion 0.1.35: row by row as they are, from -1 to 1; in a matrix as ``(1 +
cosine) / 2``, from 0 to 1, and their distances as ``(1 - cosine) / 2``. Margins that were chosen there would mean
something else if these were made one, so they are not.

**A vector of length zero** has the cosine 0 to any other, and a gradient of usual size: `torch.nn.functional.normalize`
would multiply it by 1e12, and one such embedding would ruin a model in one step. The gradient of a distance of 0 is 0,
never NaN. Euclidean distances of more than 25 rows come from a matrix product, in which equal vectors may end up at
3e-4 of their length instead of 0 (float32); exact ones would take ten times as long.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from torchrecycle.errors import RecycleError

__all__ = ["NO_LENGTH", "Distance", "DistanceError", "unit"]

NO_LENGTH = 1e-12
"""Vectors shorter than this have no direction: the limit of `torch.nn.functional.normalize`."""


class DistanceError(RecycleError, ValueError):
    """There is no distance of that name, or the tensors do not go together."""


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length one, and zero where there is no length; to the bit as `torch.nn.functional.normalize`.

    Args:
        vectors: of any shape.
        dim: along which a vector lies.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > NO_LENGTH, length, 1.0)


class Distance(str, Enum):
    """A measure of distance, and of similarity. A member is equal to its name: ``Distance.COSINE == "cosine"``.

    >>> x = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    >>> Distance.EUCLIDEAN.distance_matrix(x)
    tensor([[0.0000, 3.1623],
            [3.1623, 0.0000]])
    """

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    DOT_PRODUCT = "dot_product"
    MANHATTAN = "manhattan"

    @staticmethod
    def get_by_name(name: str) -> Distance:
        """The member of that name; a member is given back.

        Raises:
            DistanceError: there is none.
        """
        try:
            return Distance(name)
        except ValueError:
            known = ", ".join(f"'{member.value}'" for member in Distance)
            raise DistanceError(f"there is no distance {name!r}: give one of {known}") from None

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """How far row i of one is from row i of the other.

        Args:
            x: ``[batch, dim]``
            y: ``[batch, dim]``

        Returns:
            ``[batch]``; less is more alike. Negative for the dot product, which has no least value.

        Raises:
            DistanceError: the shapes differ.
        """
        _check_rows(x, y)
        if self is Distance.EUCLIDEAN:
            return torch.linalg.vector_norm(x - y, dim=1)
        if self is Distance.MANHATTAN:
            return (x - y).abs().sum(1)
        similarity = self.similarity(x, y)
        return 1 - similarity if self is Distance.COSINE else -similarity

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """How alike row i of one and row i of the other are: arguments and errors as of `distance`.

        Returns:
            ``[batch]``; more is more alike. Cosines from -1 to 1.
        """
        _check_rows(x, y)
        if self is Distance.COSINE:
            return (unit(x) * unit(y)).sum(1)
        if self is Distance.DOT_PRODUCT:
            return (x * y).sum(1)
        return 1 / (1 + self.distance(x, y))

    def distance_matrix(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """How far each row of one is from each row of the other.

        Args:
            x: ``[rows, dim]``
            y: ``[columns, dim]``; x itself if None.

        Returns:
            ``[rows, columns]``; less is more alike. Cosine distances from 0 to 1.

        Raises:
            DistanceError: not two matrices of the same width.
        """
        if self is Distance.EUCLIDEAN:
            return _apart(x, y, p=2.0)
        if self is Distance.MANHATTAN:
            return _apart(x, y, p=1.0)
        similarities = self.similarity_matrix(x, y)
        return 1 - similarities if self is Distance.COSINE else -similarities

    def similarity_matrix(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """How alike each row of one is to each row of the other: arguments and errors as of `distance_matrix`.

        Returns:
            ``[rows, columns]``; more is more alike. Cosines as ``(1 + cosine) / 2``, from 0 to 1.
        """
        _check_matrices(x, y)
        if self is Distance.COSINE:
            x = unit(x)
            return (x @ (x if y is None else unit(y)).T + 1) / 2
        if self is Distance.DOT_PRODUCT:
            return x @ (x if y is None else y).T
        return 1 / (1 + self.distance_matrix(x, y))


def _check_rows(x: Tensor, y: Tensor) -> None:
    # a batch of one would be broadcast over the other in silence
    if x.ndim != 2 or x.shape != y.shape:
        raise DistanceError(
            f"row by row, both must be [batch, dim] of the same shape: {list(x.shape)} and {list(y.shape)} came. For "
            "all with all, see distance_matrix and similarity_matrix"
        )


def _check_matrices(x: Tensor, y: Tensor | None) -> None:
    if x.ndim != 2 or (y is not None and (y.ndim != 2 or y.shape[1] != x.shape[1])):
        came = f"{list(x.shape)}" if y is None else f"{list(x.shape)} and {list(y.shape)}"
        raise DistanceError(f"a matrix of distances is of [rows, dim] and [columns, dim] of the same dim: {came} came")


def _apart(x: Tensor, y: Tensor | None, *, p: float) -> Tensor:
    _check_matrices(x, y)
    if x.dtype in (torch.float16, torch.bfloat16):  # cdist has no kernel for them
        return _apart(x.float(), None if y is None else y.float(), p=p).to(x.dtype)
    return torch.cdist(x, x if y is None else y, p=p)
