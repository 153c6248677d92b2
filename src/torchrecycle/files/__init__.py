"""What a user has on disk -> objects for a sweep: pictures in a folder, a tar or a zip, tables of texts or of pairs."""

from torchrecycle.files.errors import DataError
from torchrecycle.files.pictures import Picture, Pictures, find_pictures
from torchrecycle.files.tables import Row, read_table
from torchrecycle.files.texts import Pairs, Texts, find_pairs, find_texts

__all__ = [
    "DataError",
    "Pairs",
    "Picture",
    "Pictures",
    "Row",
    "Texts",
    "find_pairs",
    "find_pictures",
    "find_texts",
    "read_table",
]
