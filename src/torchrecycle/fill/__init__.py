"""One pass over a data set that fills the rows of one or many cuts.

``recycling.fill(dataset)`` reads 8,144 photos once, in the user's own collate function and workers, hashes each (0.1
ms), runs the prefix for those that the store does not have, and publishes the rows in whole segments. Stopped at any
moment, it goes on where it was: what is published is found by its key. ``fill_many([half, three_quarters], dataset)``
does so for several cuts while the deepest prefix runs once.

Several processes may fill at once: each computes what the others have not claimed (`torchrecycle.store.claims`). A
store that is full ends filling with one warning: the manifest is whole, and rows that are missing are computed when
they are used.

Every item is read between two looks at the random generators: a flip that is drawn at fill time would be frozen into
the row for ever.
"""

from torchrecycle.fill.filling import Fillable, FillReport, fill_pass, takes_no_more
from torchrecycle.fill.keeping import Keeping
from torchrecycle.fill.reading import Reading
from torchrecycle.fill.streaming import fill_stream

__all__ = ["FillReport", "Fillable", "Keeping", "Reading", "fill_pass", "fill_stream", "takes_no_more"]
