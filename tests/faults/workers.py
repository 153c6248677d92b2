"""What a `DataLoader`'s worker does, and what is done to the files while it does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from faults.truth import Reading, check_all_right, gather_all, keys_of, open_rows
from torchrecycle.store import Rows


class Gathering(Dataset[Any]):
    """Items are answers: whether the rows of a batch came right, by the locations that the main process found."""

    def __init__(self, rows: Rows, numbers: list[int], locations: np.ndarray) -> None:
        self.rows, self.numbers, self.locations = rows, numbers, locations

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, at: list[int]) -> list[Reading]:
        reading = gather_all(self.rows, [self.numbers[place] for place in at], self.locations[at])
        if reading.error is not None:
            reading.error = type(reading.error)(str(reading.error))  # without what does not pickle
        return [reading]


def first(items: list[Any]) -> Any:
    return items[0]


def read_what_is_cut(folder: str, count: int, told: Any) -> None:
    """Gather some rows; wait until the files have been cut under the map; gather the others. Told: how many came."""
    torch.set_num_threads(1)
    # A crash is expected, and nobody wants its core.
    os.environ.pop("PYTHONFAULTHANDLER", None)
    rows = open_rows(Path(folder))
    locations = rows.lookup(keys_of(range(count)))
    check_all_right(rows, range(2))
    told.send(2)
    told.recv()
    reading = gather_all(rows, range(count), locations)
    told.send((len(reading.right), len(reading.wrong), str(reading.error)))
