"""Cross-batch memory: the embeddings of the last batches, to compare those of a batch with.

With batches of 32 an object meets 31 others. Since a model changes slowly, the embeddings of the last 10,000 objects
are still nearly what it would give now; so they are kept, and the loss between the batch and them is added to the
batch's own (Wang et al., *Cross-Batch Memory for Embedding Learning*, 2020, algorithm 1).

    config = XbmConfig(buffer_size=10_000, start_iteration=1_000)
    buffer = XbmBuffer(config, embedding_size=384)
    ...
    loss = triplet(embeddings, groups)
    if step >= config.start_iteration:
        loss = loss + config.weight * triplet.xbm_loss(embeddings, groups, *buffer.get())
    buffer.queue(embeddings, groups)                # after the loss: an object is not compared with itself

10,000 embeddings of 384 numbers are 15 MB.

**The memory is no registered buffer of the module**, although it moves with it and is saved with it: DDP sends the
first process's buffers to all others at each step, and theirs would be lost. Each process has the memory of what it
has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from torchrecycle.similarity.losses.base import LossError

__all__ = ["XbmBuffer", "XbmConfig", "XbmDevice"]


class XbmDevice(str, Enum):
    """Where the memory is."""

    CPU = "cpu"
    """In RAM, also where the model is on a GPU."""
    CUDA = "cuda"
    """On the GPU."""
    AUTO = "auto"
    """Where the module is that it belongs to: it moves along."""


@dataclass(frozen=True)
class XbmConfig:
    """How embeddings are kept, and how much they count.

    Raises:
        LossError: a number is out of its range, or there is no such device.
    """

    weight: float = 1.0
    """What the memory's loss is multiplied by before it is added."""
    buffer_size: int = 10_000
    """How many embeddings are kept."""
    start_iteration: int = 1_000
    """From which step on the memory's loss is added: at first a model changes too fast."""
    device: XbmDevice | str = XbmDevice.AUTO
    """Where they are kept."""

    def __post_init__(self) -> None:
        if self.buffer_size < 1 or self.start_iteration < 0 or not self.weight >= 0:
            raise LossError(
                f"a cross-batch memory keeps an embedding at least, and starts at step 0 at the earliest, with a "
                f"weight that is not negative: buffer_size={self.buffer_size}, "
                f"start_iteration={self.start_iteration} and weight={self.weight} came"
            )
        try:
            object.__setattr__(self, "device", XbmDevice(self.device))
        except ValueError:
            raise LossError(f"there is no device {self.device!r} for a memory: give 'cpu', 'cuda' or 'auto'") from None


class XbmBuffer(nn.Module):
    """The last embeddings, and their groups. When it is full, the oldest give way.

    It is saved and restored by ``state_dict``, oldest first, also into a buffer of another size: the newest are kept.

    Args:
        config: how many are kept, and where.
        embedding_size: numbers of an embedding.

    Raises:
        LossError: no number.
    """

    def __init__(self, config: XbmConfig, embedding_size: int) -> None:
        super().__init__()
        if embedding_size < 1:
            raise LossError(f"embeddings to keep need a number at least: embedding_size={embedding_size} came")
        self.config = config
        self._embeddings = torch.zeros(config.buffer_size, embedding_size)
        self._groups = torch.zeros(config.buffer_size, dtype=torch.int64)
        self._next = 0
        self._filled = 0
        self._place()

    def _place(self) -> None:
        if self.config.device != XbmDevice.AUTO:
            self._embeddings = self._embeddings.to(self.config.device)
            self._groups = self._groups.to(self.config.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XbmBuffer:
        super()._apply(fn, recurse)
        self._embeddings, self._groups = fn(self._embeddings), fn(self._groups)
        self._place()
        return self

    def __len__(self) -> int:
        return self._filled

    @property
    def is_full(self) -> bool:
        """Whether the oldest give way."""
        return self._filled == len(self._groups)

    def get(self) -> tuple[Tensor, Tensor]:
        """What is kept, oldest first.

        Returns:
            embeddings ``[kept, embedding_size]`` and groups ``[kept]``: copies, which stay as they are
        """
        first = self._next if self.is_full else 0
        parts = [slice(first, self._filled), slice(0, first)]
        return torch.cat([self._embeddings[p] for p in parts]), torch.cat([self._groups[p] for p in parts])

    @torch.no_grad()
    def queue(self, embeddings: Tensor, groups: Tensor) -> None:
        """Keep those of a batch. No gradient comes along.

        Args:
            embeddings: ``[batch, embedding_size]``; of more than there is room for, the last.
            groups: ``[batch]``

        Raises:
            LossError: the shapes are others.
        """
        size, dim = self._embeddings.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != dim or groups.shape != embeddings.shape[:1]:
            raise LossError(
                f"the memory keeps embeddings [batch, {dim}] with groups [batch]: {list(embeddings.shape)} and "
                f"{list(groups.shape)} came"
            )
        embeddings, groups = embeddings[-size:], groups[-size:]
        until_end = min(size - self._next, len(groups))
        self._write(embeddings[:until_end], groups[:until_end])
        self._write(embeddings[until_end:], groups[until_end:])

    def _write(self, embeddings: Tensor, groups: Tensor) -> None:
        after = self._next + len(groups)
        self._embeddings[self._next : after] = embeddings
        self._groups[self._next : after] = groups
        self._filled = max(self._filled, after)
        self._next = after % len(self._groups)

    def get_extra_state(self) -> dict[str, Tensor]:
        """What ``state_dict`` saves."""
        embeddings, groups = self.get()
        return {"embeddings": embeddings, "groups": groups}

    def set_extra_state(self, state: Any) -> None:
        """What ``load_state_dict`` restores.

        Raises:
            LossError: the embeddings are of another size.
        """
        self._next = self._filled = 0
        self.queue(state["embeddings"], state["groups"])

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self._filled} of {len(self._groups)} embeddings of {self._embeddings.shape[1]} numbers"
