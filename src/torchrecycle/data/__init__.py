"""Data sets that read rows instead of objects: manifest, data set, collate function, loader."""

from torchrecycle.data.columns import Column, Template, absent_column, make_column
from torchrecycle.data.dataset import Fetched, RecycledDataset
from torchrecycle.data.loader import RecycledCollate, RecycledLoader
from torchrecycle.data.manifest import Manifest, identity_of, quick_state_of, state_of
from torchrecycle.data.source import RowSource

__all__ = [
    "Column",
    "Fetched",
    "Manifest",
    "RecycledCollate",
    "RecycledDataset",
    "RecycledLoader",
    "RowSource",
    "Template",
    "absent_column",
    "identity_of",
    "make_column",
    "quick_state_of",
    "state_of",
]
