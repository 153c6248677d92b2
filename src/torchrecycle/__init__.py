"""torchrecycle: layer recycling for PyTorch.

The first layers of a pretrained network are frozen, so what they compute for an object never changes: compute it once,
keep it, and train and serve only the rest. On any model, at any depth, in whatever loop you already have.
"""

from torchrecycle.absent import RecycledTensor
from torchrecycle.allocator import keep_freed_memory
from torchrecycle.bypass import OffloadReport
from torchrecycle.cost import Cut, Cuts, cuts
from torchrecycle.errors import (
    AutocastError,
    BatchError,
    CutError,
    DamagedRowError,
    GoneRowsError,
    KeyTypeError,
    RandomInputError,
    RecycleError,
    RecycleWarning,
    StaleActivationError,
    StoreError,
)
from torchrecycle.fill import FillReport
from torchrecycle.keys import key
from torchrecycle.recycling import CheckReport, Recycling, Stats, fill_many, recycle

__all__ = [
    # where to cut
    "Cut",
    "Cuts",
    "cuts",
    # recycle
    "CheckReport",
    "FillReport",
    "OffloadReport",
    "RecycledTensor",
    "Recycling",
    "Stats",
    "fill_many",
    "recycle",
    # steady steps on a processor
    "keep_freed_memory",
    # keys
    "key",
    # errors
    "AutocastError",
    "BatchError",
    "CutError",
    "DamagedRowError",
    "GoneRowsError",
    "KeyTypeError",
    "RandomInputError",
    "RecycleError",
    "RecycleWarning",
    "StaleActivationError",
    "StoreError",
]
