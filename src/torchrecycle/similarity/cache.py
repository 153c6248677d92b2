"""What `TrainableModel.configure_caches` returns: which encoders keep what they give, and where.

``CacheConfig(CacheType.AUTO, save_dir="activations/")`` keeps the outputs of all frozen encoders in that folder, where
the next run, another process, or a trial with another head finds them; without ``save_dir`` they live in memory, as
long as the model does. Keys are contents, so that nothing is found that another object, another preprocessing or
another checkpoint gave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from torchrecycle.errors import RecycleError

__all__ = ["CacheConfig", "CacheError", "CacheType"]

KeyExtractor = Callable[[Any], Any]


class CacheError(RecycleError, ValueError):
    """A cache that cannot work: of an encoder that is trained, in a place that is not there, under no name."""


class CacheType(str, Enum):
    """Where the rows of an encoder are kept."""

    NONE = "none"
    """Nowhere: the encoder runs for every batch."""
    AUTO = "auto"
    """On disk if there is a ``save_dir``, else in memory."""
    CPU = "cpu"
    """In memory; with a ``save_dir`` on disk too, from where they are read into memory once."""
    GPU = "gpu"
    """In the memory of the model's GPU; with a ``save_dir`` on disk too."""
    DISK = "disk"
    """On disk, read as batches ask for them: for more rows than memory holds. As fast as memory."""


@dataclass
class CacheConfig:
    """How the outputs of frozen encoders are kept."""

    cache_type: CacheType | None = CacheType.AUTO
    """For every frozen encoder that `mapping` does not name; None for no other."""
    mapping: Mapping[str, CacheType] = field(default_factory=dict)
    """Encoders by name."""
    key_extractors: KeyExtractor | Mapping[str, KeyExtractor] = field(default_factory=dict)
    """From an object to what identifies it (a primary key, a file's name), in place of its content: one for all
    encoders, or by name. With a `save_dir` it needs a `name`."""
    batch_size: int | None = 32
    """Objects per forward of an encoder while its rows are computed."""
    num_workers: int | None = None
    """Processes that read the data set then; the loader's own number if None."""
    save_dir: str | os.PathLike[str] | None = None
    """The folder of the store."""
    precision: str | None = None
    """``"bfloat16"`` or ``"float16"`` keeps half the bytes, ``"int8"`` a quarter, ``"auto"`` the fewest that lose no
    more than another batch would; the encoder's own dtype if None."""
    name: str | None = None
    """Stands for the data sets with their preprocessing: as long as it stays, the next run does not read them at all.
    Change it when they change. Each data set is told from the others by its length and loader besides."""

    def __post_init__(self) -> None:
        for name, kind in (("", self.cache_type), *self.mapping.items()):
            if kind is not None and kind not in list(CacheType):
                where = f" of '{name}'" if name else ""
                raise CacheError(f"cache type{where} is {kind!r}: give one of {', '.join(map(str, CacheType))}")
        if self.cache_type is None and not self.mapping:
            raise CacheError(
                "this cache keeps nothing: give cache_type=CacheType.AUTO for all frozen encoders, or a mapping of "
                "some. For no cache let configure_caches() return None."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise CacheError(f"batch_size={self.batch_size} of a cache is no number of objects")

    def type_of(self, encoder: str) -> CacheType:
        """Where an encoder's rows are kept.

        Raises:
            CacheError: on a GPU that is not there, or on disk without a folder.
        """
        kind = CacheType(self.mapping.get(encoder, self.cache_type or CacheType.NONE))
        if kind is CacheType.GPU and not torch.cuda.is_available():
            raise CacheError(
                f"CacheType.GPU is asked for the encoder '{encoder}', and torch sees no GPU (torch.cuda.is_available() "
                "is False). CacheType.AUTO works everywhere."
            )
        if kind is CacheType.DISK and self.save_dir is None:
            raise CacheError(f"CacheType.DISK is asked for the encoder '{encoder}': say where, with save_dir=")
        return kind

    def extractor_of(self, encoder: str) -> KeyExtractor | None:
        """What identifies an object for an encoder, if not its content."""
        found = self.key_extractors if callable(self.key_extractors) else self.key_extractors.get(encoder)
        if found is not None and self.save_dir is not None and self.name is None:
            raise CacheError(
                f"the key extractor of '{encoder}' identifies objects without looking at them, so that another resize "
                "or tokenizer would not be noticed in what save_dir keeps. Name data and preprocessing, "
                "CacheConfig(..., name='cars, 224 px, v1'), and change the name when they change."
            )
        return found
