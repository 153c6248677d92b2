"""Data sets that read rows instead of objects: manifest, data set, collate function, loader."""

from torchrecycle.data.columns import Column, Template, absent_column, make_column
from torchrecycle.data.dataset import Fetched, RecycledDataset, item_number
from torchrecycle.data.generators import Generators
from torchrecycle.data.known import KnownManifests
from torchrecycle.data.loader import RecycledCollate, RecycledLoader
from torchrecycle.data.manifest import Manifest, identity_of
from torchrecycle.data.order import BlockShuffleSampler, draws_at_once, in_blocks
from torchrecycle.data.samplers import compare_samplers
from torchrecycle.data.source import RowSource
from torchrecycle.data.state import generators_of, state_of
from torchrecycle.data.stream import Marks, StreamLoader, Tally, is_stream
from torchrecycle.data.views import Views, draws, viewed

__all__ = [
    "BlockShuffleSampler",
    "Column",
    "Fetched",
    "Generators",
    "KnownManifests",
    "Manifest",
    "Marks",
    "RecycledCollate",
    "RecycledDataset",
    "RecycledLoader",
    "RowSource",
    "StreamLoader",
    "Tally",
    "Template",
    "Views",
    "absent_column",
    "compare_samplers",
    "draws",
    "draws_at_once",
    "generators_of",
    "identity_of",
    "in_blocks",
    "is_stream",
    "item_number",
    "make_column",
    "state_of",
    "viewed",
]
