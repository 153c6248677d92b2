"""Rows in a folder or in memory: lookup, gather, append, publish, verify."""

from torchrecycle.store.contract import FORMAT_VERSION, Leaf, LeafSpec, Ragged, Rows, Store, VerifyReport
from torchrecycle.store.segment import leaf_bytes
from torchrecycle.store.stores import FolderStore, MemoryStore, open_store

__all__ = [
    "FORMAT_VERSION",
    "FolderStore",
    "Leaf",
    "LeafSpec",
    "MemoryStore",
    "Ragged",
    "Rows",
    "Store",
    "VerifyReport",
    "leaf_bytes",
    "open_store",
]
