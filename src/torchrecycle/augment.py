"""Augmentation of activations: what is kept stays as it is, and each epoch sees it a little changed.

``recycle(model, images, level=0.5, store="activations/", augment=Brightness(0.2))`` reads 64 rows of a ViT as before,
``[64, 197, 768]``, and then adds to all numbers of a row the same amount, drawn anew for each row and each epoch: up to
a fifth of the row's range. That costs a hundredth of the suffix's time and nothing on disk, where views of the pixels
cost a run of the prefix and a row for each.

An augmentation is any callable that takes the rows and gives new ones of the same form. It is called in training mode
only, on the model's device, for rows of the store and for raw batches alike, after all proofs and after decoding; what
it gives is never kept. Those below draw from torch's generator of that device, so that a seed repeats them.

Tokens of which all numbers are zero are padding: they count for nothing, and stay zero.
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from torchrecycle.errors import BatchError

__all__ = ["Augmentation", "Brightness", "Compose", "Contrast", "Mixup", "Noise", "TokenDrop", "apply"]

Per = Literal["row", "channel", "channel range"]


class Augmentation(ABC):
    """A change of rows: called with a tensor ``[batch, ...]`` if the cut gives one, else with a list of such, it gives
    the same form back. Any callable will do in its place.

    Args:
        leaves: which tensors to change, by number, where the cut gives several.
    """

    def __init__(self, *, leaves: Sequence[int] | None = None) -> None:
        numbers = [leaves] if isinstance(leaves, int) else leaves
        if numbers is not None and not all(type(number) is int for number in numbers):
            raise ValueError(f"leaves={leaves!r} is no list of numbers of tensors, such as [0]")
        self.leaves = None if numbers is None else tuple(numbers)

    @abstractmethod
    def change(self, rows: torch.Tensor) -> torch.Tensor:
        """New rows ``[batch, ...]`` of the same shape and dtype; those that are given are not to be written into."""

    def skipped(self) -> None:
        """Called in place of the change where the model runs in eval mode."""
        return

    def __call__(self, rows: Any) -> Any:
        """The rows, changed.

        Raises:
            BatchError: the cut gives several tensors, and `leaves` does not say which to change; or whole numbers.
        """
        if isinstance(rows, torch.Tensor):
            return self._changed(rows) if self.leaves is None or self._chosen([rows]) else rows
        chosen = self._chosen(rows)
        return [self._changed(leaf) if number in chosen else leaf for number, leaf in enumerate(rows)]

    def _chosen(self, rows: Sequence[torch.Tensor]) -> tuple[int, ...]:
        shapes = [list(leaf.shape) for leaf in rows]
        if self.leaves is None:
            raise BatchError(
                f"the cut gives {len(rows)} tensors of the shapes {shapes}: say which of them to change, "
                f"{type(self).__name__}(..., leaves=[0])"
            )
        if not all(0 <= number < len(rows) for number in self.leaves):
            raise BatchError(f"leaves={list(self.leaves)}, but the cut gives {len(rows)} tensors: {shapes}")
        return self.leaves

    def _changed(self, rows: torch.Tensor) -> torch.Tensor:
        if not rows.is_floating_point():
            raise BatchError(
                f"{type(self).__name__} changes floating point numbers, and these rows are {list(rows.shape)} "
                f"{rows.dtype}. Where the cut gives several tensors, say which of them to change: leaves=[0]."
            )
        return self.change(rows)


# -- point-wise changes ------------------------------------------------------------------------------------------------


def _refuse_no_number(name: str, value: Any, such_as: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={reprlib.repr(value)} is no number from 0 on, such as {such_as}")


def _refuse_no_dimension(channels: Any) -> None:
    if channels is not None and type(channels) is not int:
        raise ValueError(f"channels={channels!r} is no dimension of rows [batch, ...], such as 1")


class _PointWise(Augmentation):
    """A change of each number for itself, of a strength that is drawn for the row or for each of its channels."""

    def __init__(
        self,
        strength: float,
        *,
        per: Per = "row",
        channels: int | None = None,
        leaves: Sequence[int] | None = None,
    ) -> None:
        super().__init__(leaves=leaves)
        _refuse_no_number("strength", strength, 0.2)
        if per not in ("row", "channel", "channel range"):
            raise ValueError(f"per={per!r} is none of 'row', 'channel' and 'channel range'")
        _refuse_no_dimension(channels)
        self.strength, self.per, self.channels = float(strength), per, channels

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strength}, per={self.per!r})"

    def change(self, rows: torch.Tensor) -> torch.Tensor:
        channel = channel_of(rows, self.channels)
        real = _real(rows, channel)
        work = rows.float() if rows.dtype.itemsize < 4 else rows
        changed = self._change(work, channel, real)
        if real is not None:
            changed = torch.where(real, changed, work)
        return changed.to(rows.dtype)

    @abstractmethod
    def _change(self, rows: torch.Tensor, channel: int, real: torch.Tensor | None) -> torch.Tensor: ...

    def _over(self, rows: torch.Tensor, channel: int) -> list[int]:
        """The dimensions over which a row is measured."""
        own = {0, channel} if self.per == "channel range" and rows.dim() > 2 else {0}
        return [dim for dim in range(rows.dim()) if dim not in own]

    def _drawn(self, rows: torch.Tensor, channel: int) -> torch.Tensor:
        """Uniform in [-strength, strength): one number for each row, or one for each channel of it."""
        own = {0} if self.per == "row" else {0, channel}
        shape = [size if dim in own else 1 for dim, size in enumerate(rows.shape)]
        return (torch.rand(shape, device=rows.device, dtype=rows.dtype) * 2 - 1) * self.strength


class Brightness(_PointWise):
    """Add an amount to all numbers of a row (FroFA: Bär et al. 2024, arXiv 2403.10519).

    With ``x = (f - min f) / (max f - min f)`` a row is brought to [0, 1] as if it were a picture; ``b``, uniform in
    [-strength, strength), is added; and it is brought back: ``f + b (max f - min f)``. Nothing is clipped, since
    activations have no white.

    Args:
        strength: up to which share of the range.
        per: ``"row"``: one ``b`` for the row, whose range is that of all its numbers (the paper's FroFA);
            ``"channel"``: one for each channel, with the row's range (its cFroFA); ``"channel range"``: one for each,
            with the channel's own range (its c²FroFA). Of rows ``[batch, dim]`` a channel has no range of its own, and
            the last two are the same.
        channels: the dimension of channels in ``[batch, ...]``; see `channel_of`.
        leaves: which tensors to change, where the cut gives several.
    """

    def _change(self, rows: torch.Tensor, channel: int, real: torch.Tensor | None) -> torch.Tensor:
        over = self._over(rows, channel)
        high = (rows if real is None else rows.masked_fill(~real, -torch.inf)).amax(over, keepdim=True)
        low = (rows if real is None else rows.masked_fill(~real, torch.inf)).amin(over, keepdim=True)
        return rows + self._drawn(rows, channel) * (high - low)


class Contrast(_PointWise):
    """Stretch a row about its mean, or press it together (FroFA: Bär et al. 2024, arXiv 2403.10519).

    ``m + (1 + c) (f - m)`` with the mean ``m`` of the row's numbers and ``c`` uniform in [-strength, strength). To
    bring the row to [0, 1] before and back after changes nothing of that.

    Args:
        strength: 0.2 for factors from 0.8 to 1.2.
        per: as of `Brightness`; with ``"channel range"`` about the mean of each channel.
        channels: the dimension of channels in ``[batch, ...]``; see `channel_of`.
        leaves: which tensors to change, where the cut gives several.
    """

    def _change(self, rows: torch.Tensor, channel: int, real: torch.Tensor | None) -> torch.Tensor:
        mean = _mean(rows, self._over(rows, channel), real)
        return mean + (1 + self._drawn(rows, channel)) * (rows - mean)


class Noise(_PointWise):
    """Add normal noise to each number: ``f + strength s n`` with ``n`` of mean 0 and variance 1, drawn for each.

    ``s`` is the standard deviation of the row's numbers; of each channel's with ``per="channel range"``. With
    ``per="channel"`` one ``n`` is drawn for each channel of a row, and its places share it.

    Args:
        strength: in standard deviations.
        per: see above.
        channels: the dimension of channels in ``[batch, ...]``; see `channel_of`.
        leaves: which tensors to change, where the cut gives several.
    """

    def _change(self, rows: torch.Tensor, channel: int, real: torch.Tensor | None) -> torch.Tensor:
        over = self._over(rows, channel)
        mean = _mean(rows, over, real)
        deviation = _mean((rows - mean).square(), over, real).sqrt()
        shape = list(rows.shape)
        if self.per == "channel":
            shape = [size if dim in (0, channel) else 1 for dim, size in enumerate(shape)]
        noise = torch.randn(shape, device=rows.device, dtype=rows.dtype)
        return rows + self.strength * deviation * noise


def channel_of(rows: torch.Tensor, told: int | None = None) -> int:
    """The dimension of channels in ``[batch, ...]``.

    If it is not told: the last of tokens ``[batch, tokens, dim]`` and of vectors; of maps the first after the batch,
    ``[batch, channels, height, width]``, but for ``[batch, height, width, channels]``, which is known by its two sides
    being alike.

    Raises:
        BatchError: there is no such dimension.
    """
    if rows.dim() < 2:
        raise BatchError(f"rows {list(rows.shape)} are single numbers, which have no channels")
    if told is not None:
        if not -rows.dim() < told < rows.dim() or told % rows.dim() == 0:
            raise BatchError(f"channels={told} is no dimension after the batch of rows {list(rows.shape)}")
        return told % rows.dim()
    sizes = rows.shape[1:]
    last = len(sizes) < 3 or sizes[-3] == sizes[-2] != sizes[-1]
    return rows.dim() - 1 if last else 1


def _real(rows: torch.Tensor, channel: int) -> torch.Tensor | None:
    """Which tokens are no padding, ``[batch, tokens, 1]``; None where rows have no tokens."""
    return (rows != 0).any(channel, keepdim=True) if rows.dim() == 3 else None


def _mean(rows: torch.Tensor, over: list[int], real: torch.Tensor | None) -> torch.Tensor:
    if real is None:
        return rows.mean(over, keepdim=True)
    count = real.expand_as(rows).sum(over, keepdim=True).clamp_min(1)
    return (rows * real).sum(over, keepdim=True) / count


# -- tokens ------------------------------------------------------------------------------------------------------------


class TokenDrop(Augmentation):
    """Put zeros in the place of some tokens, or of some places of a map: drawn for each of them.

    The shape stays, and attention still sees that there is a token. One at least of each object is left, and padding is
    as it was.

    Args:
        probability: with which each token is dropped.
        keep: how many of the first tokens always stay: 1 for a class token.
        channels: the dimension of channels in ``[batch, ...]``; see `channel_of`.
        leaves: which tensors to change, where the cut gives several.
    """

    def __init__(
        self,
        probability: float,
        *,
        keep: int = 0,
        channels: int | None = None,
        leaves: Sequence[int] | None = None,
    ) -> None:
        super().__init__(leaves=leaves)
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability < 1:
            raise ValueError(f"probability={reprlib.repr(probability)} is no number from 0 to below 1, such as 0.1")
        if type(keep) is not int or keep < 0:
            raise ValueError(f"keep={keep!r} is no number of tokens, such as 1")
        _refuse_no_dimension(channels)
        self.probability, self.keep, self.channels = float(probability), keep, channels

    def __repr__(self) -> str:
        return f"TokenDrop({self.probability}, keep={self.keep})"

    def change(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dim() < 3:
            raise BatchError(f"rows {list(rows.shape)} have no tokens to drop: cut before they are pooled")
        channel = channel_of(rows, self.channels)
        shape = [1 if dim == channel else size for dim, size in enumerate(rows.shape)]
        drawn = torch.rand(shape, device=rows.device).flatten(1)
        real = _real(rows, channel)
        # Padding is below all, so that the token that stays is one of the object's.
        ranked = drawn if real is None else drawn.masked_fill(~real.flatten(1), -1.0)
        dropped = (drawn < self.probability) & (ranked < ranked.amax(1, keepdim=True))
        if self.keep:
            dropped[:, : self.keep] = False
        return rows.masked_fill(dropped.view(shape), 0)


# -- between objects ---------------------------------------------------------------------------------------------------


class Mixup(Augmentation):
    """Mix each row with that of another object of the batch: ``lam f_i + (1 - lam) f_j``.

    Manifold mixup (Verma et al. 2019, arXiv 1806.05236): ``lam`` is of Beta(alpha, alpha), one for the batch, and ``j``
    of a permutation of the batch. Targets are mixed by mixing their losses:

    >>> mixup = Mixup(2.0)
    >>> recycling = recycle(model, images, cut="layer2", store="memory://mixup", augment=mixup)  # doctest: +SKIP
    >>> loss = mixup.loss(F.cross_entropy, model(images), labels)  # doctest: +SKIP

    What else the suffix reads (a mask of padding) stays that of object ``i``: of a longer text ``j``, what lies beyond
    ``i``'s end is hidden.

    Args:
        alpha: of the Beta distribution; the paper takes 2 for its best results. 0 mixes nothing.
        leaves: which tensors to mix, where the cut gives several; all of them if left out.
    """

    lam: torch.Tensor | float
    """Of the last batch; 1 if nothing was mixed."""
    index: torch.Tensor | None
    """The ``j`` of each object of the last batch, ``[batch]`` int64; None if nothing was mixed."""

    def __init__(self, alpha: float = 2.0, *, leaves: Sequence[int] | None = None) -> None:
        super().__init__(leaves=leaves)
        _refuse_no_number("alpha", alpha, 2.0)
        self.alpha = float(alpha)
        self.lam, self.index = 1.0, None

    def __repr__(self) -> str:
        return f"Mixup({self.alpha})"

    def skipped(self) -> None:
        """Nothing is mixed: the loss is the criterion's."""
        self.lam, self.index = 1.0, None

    def __call__(self, rows: Any) -> Any:
        """The rows, mixed; `lam` and `index` say how."""
        self.skipped()
        first = rows if isinstance(rows, torch.Tensor) else rows[0]
        if self.alpha == 0 or len(first) < 2:
            return rows
        alpha = torch.full((), self.alpha, device=first.device)
        self.lam = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        self.index = torch.randperm(len(first), device=first.device)
        return super().__call__(rows)

    def _chosen(self, rows: Sequence[torch.Tensor]) -> tuple[int, ...]:
        return tuple(range(len(rows))) if self.leaves is None else super()._chosen(rows)

    def change(self, rows: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.lam, torch.Tensor)
        assert self.index is not None
        lam = self.lam.to(rows.dtype)
        return lam * rows + (1 - lam) * rows.index_select(0, self.index)

    def loss(self, criterion: Callable[[Any, Any], torch.Tensor], output: Any, targets: Any) -> torch.Tensor:
        """``lam criterion(output, targets) + (1 - lam) criterion(output, targets of j)``, for the last batch.

        After a forward in eval mode it is ``criterion(output, targets)``.

        Args:
            criterion: any loss of an output and its targets.
            output: of the model.
            targets: ``[batch, ...]``, or a nest of such.

        Raises:
            BatchError: the targets are not of the batch that was mixed last.
        """
        if self.index is None:
            return criterion(output, targets)
        others = pytree.tree_map(self._of_others, targets)
        return self.lam * criterion(output, targets) + (1 - self.lam) * criterion(output, others)

    def _of_others(self, targets: Any) -> Any:
        assert self.index is not None
        if not isinstance(targets, torch.Tensor) or targets.dim() == 0:
            raise BatchError(f"mixed targets are tensors [batch, ...], not a {type(targets).__name__}")
        if len(targets) != len(self.index):
            raise BatchError(
                f"{len(targets)} targets came for a batch of {len(self.index)} objects that were mixed: call loss() "
                "after each forward, before the next one"
            )
        return targets.index_select(0, self.index.to(targets.device))


class Compose:
    """One augmentation after the other.

    Args:
        augmentations: in their order.
    """

    def __init__(self, augmentations: Sequence[Callable[[Any], Any]]) -> None:
        parts = augmentations if isinstance(augmentations, (list, tuple)) else [None]
        if not all(callable(part) and not isinstance(part, type) for part in parts):
            raise TypeError(
                "Compose takes a list of functions of a batch's activations, such as [Brightness(0.2), Noise(0.1)], "
                f"not {augmentations!r}"
            )
        self.augmentations = tuple(augmentations)

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.augmentations))}])"

    def __call__(self, rows: Any) -> Any:
        """The rows, changed by all of them."""
        for augmentation in self.augmentations:
            rows = augmentation(rows)
        return rows

    def skipped(self) -> None:
        """Called in place of the change where the model runs in eval mode."""
        for augmentation in self.augmentations:
            tell_skipped(augmentation)


# -- within a forward --------------------------------------------------------------------------------------------------


def tell_skipped(augment: Any) -> None:
    """Let an augmentation know that the model runs in eval mode, if it wants to."""
    skipped = getattr(augment, "skipped", None)
    if callable(skipped):
        skipped()


def apply(
    augment: Callable[[Any], Any], leaves: Sequence[torch.Tensor], objects: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """The leaves of an activation, changed.

    The augmentation sees objects along the first dimension, wherever the model has them.

    Args:
        augment: any callable.
        leaves: as the model gives them.
        objects: of each leaf, which dimension counts the objects, and how many of its places belong to one.

    Raises:
        BatchError: it gives something else than rows of the same form, or has written into them.
    """
    given = [_objects_first(leaf, *where) for leaf, where in zip(leaves, objects, strict=True)]
    before = [0 if leaf.is_inference() else leaf._version for leaf in leaves]
    found: Any = augment(given[0] if len(given) == 1 else list(given))
    name = getattr(augment, "__qualname__", type(augment).__name__)
    if [0 if leaf.is_inference() else leaf._version for leaf in leaves] != before:
        raise BatchError(
            f"augment= ({name}) has written into the rows that it was given, which may be used again. Give new ones: "
            "rows + noise, not rows.add_(noise)."
        )
    if len(given) > 1 and not (isinstance(found, (list, tuple)) and len(found) == len(given)):
        what = f"{len(found)} tensors" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
        raise BatchError(f"augment= ({name}) gives {what} where a list of {len(given)} tensors was expected")
    changed: list[Any] = list(found) if len(given) > 1 else [found]
    for number, (a, b) in enumerate(zip(given, changed, strict=True)):
        if not isinstance(b, torch.Tensor) or (b.shape, b.dtype, b.device) != (a.shape, a.dtype, a.device):
            got = f"{list(b.shape)} {b.dtype} on {b.device}" if isinstance(b, torch.Tensor) else type(b).__name__
            raise BatchError(
                f"augment= ({name}) gives {got} for leaf {number}, where {list(a.shape)} {a.dtype} on {a.device} came: "
                "what comes after the cut needs the same form"
            )
    return [_objects_back(leaf, *where) for leaf, where in zip(changed, objects, strict=True)]


def _objects_first(leaf: torch.Tensor, dim: int, per_object: int) -> torch.Tensor:
    """``[batch, ...]``; with several places for each object ``[batch, places, ...]``. A view."""
    if per_object > 1:
        leaf = leaf.unflatten(dim, (-1, per_object)).movedim(dim + 1, 0)
        return leaf.movedim(dim + 1, 0)
    return leaf.movedim(dim, 0)


def _objects_back(leaf: torch.Tensor, dim: int, per_object: int) -> torch.Tensor:
    """The inverse of `_objects_first`."""
    if per_object > 1:
        return leaf.movedim(0, dim + 1).movedim(0, dim + 1).flatten(dim, dim + 1)
    return leaf.movedim(0, dim)
