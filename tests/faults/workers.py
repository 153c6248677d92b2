"""What a `DataLoader`'s worker does, and what is done to the files while it does it."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from faults.truth import Reading, check_all_right, gather_all, keys_of, open_rows, write
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


def read_very_many(folder: str, count: int, told: Any) -> None:
    """Read and verify a store of one row per segment. Told: how many maps of memory the process then has."""
    rows = open_rows(Path(folder))
    check_all_right(rows, range(count))
    assert rows.verify().rows == count
    check_all_right(rows, range(count))
    told.send(len(Path("/proc/self/maps").read_text().splitlines()))


def read_in_threads(folder: str, told: Any) -> None:
    """Gather in three threads while this one publishes, refreshes and verifies. Told: batches read, rows wrong."""
    torch.set_num_threads(1)
    rows = open_rows(Path(folder))
    write(rows, range(100), step=10)
    locations = rows.lookup(keys_of(range(100)))
    ended, answers, errors = threading.Event(), [], []

    def gather(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not ended.is_set():
                numbers = draw.sample(range(100), 16)
                answers.append(gather_all(rows, numbers, locations[numbers]))
                time.sleep(0.001)
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    other = open_rows(Path(folder))
    for start in range(100, 220, 4):
        write(rows if start % 8 else other, range(start, start + 4))
        rows.refresh()
        if start % 40 == 0:
            rows.verify()
    ended.set()
    for thread in threads:
        thread.join()
    check_all_right(rows, range(220))
    told.send((len(answers), sum(len(answer.right) != 16 for answer in answers), errors))


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
