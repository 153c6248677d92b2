"""Rows in a folder or in memory: lookup, gather, append, publish, verify."""

from torchrecycle.store.contract import FORMAT_VERSION, Leaf, LeafSpec, Ragged, Rows, Store, VerifyReport
from torchrecycle.store.difference import Difference
from torchrecycle.store.forgetting import ForgetReport
from torchrecycle.store.holdings import Details, Holding
from torchrecycle.store.merging import CompactReport
from torchrecycle.store.room import EvictReport
from torchrecycle.store.segment import leaf_bytes
from torchrecycle.store.stores import FolderStore, MemoryStore, open_store
from torchrecycle.store.upkeep import ShelfStore, Verified

__all__ = [
    "FORMAT_VERSION",
    "CompactReport",
    "Details",
    "Difference",
    "EvictReport",
    "FolderStore",
    "ForgetReport",
    "Holding",
    "Leaf",
    "LeafSpec",
    "MemoryStore",
    "Ragged",
    "Rows",
    "ShelfStore",
    "Store",
    "Verified",
    "VerifyReport",
    "leaf_bytes",
    "open_store",
]
