"""What evaluating 20,000 objects takes: seconds and memory, all five metrics together.

``python benchmarks/evaluation.py`` evaluates embeddings of 384 numbers, each case in a process of its own, and keeps
what it finds under ``benchmarks/results/``:

* groups of five, and groups of 5,000, where each object has 4,999 relatives;
* 20,000 pairs, where left objects are asked for right ones: 20,000 against 20,000;
* the same pairs, where all objects are asked for all: 40,000 against 40,000.

The model hands the vectors through, so what is measured is reading, ranking and the figures. Memory is the largest
resident size of the process, less what it was after imports: the data, 30 or 61 MB, count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrecycle.similarity.evaluation import Evaluator
from torchrecycle.similarity.retrieval import (
    RetrievalMAP,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalReciprocalRank,
    RetrievalRPrecision,
)
from torchrecycle.similarity.samples import SimilarityGroupSample, SimilarityPairSample
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"

OBJECTS, DIM = 20_000, 384

GOAL = {"seconds": 60, "peak_megabytes": 2_000}
"""What each case may take, on two cores."""


# -- the cases ---------------------------------------------------------------------------------------------------------


class Vector:
    """An object of which the model reads a row."""

    def __init__(self, row: Tensor) -> None:
        self.row = row


class HandsThrough:
    """A model whose embeddings are the objects' rows."""

    def encode(self, inputs: Sequence[Vector], batch_size: int = 32, to_numpy: bool = True) -> Any:
        rows = torch.stack([one.row for one in inputs])
        return rows.numpy() if to_numpy else rows


def groups(members: int, generator: torch.Generator) -> list[SimilarityGroupSample]:
    """Objects around the centre of their group, of which the nearest is a relative in most cases."""
    labels = torch.arange(OBJECTS) % (OBJECTS // members)
    centres = torch.randn(OBJECTS // members, DIM, generator=generator)
    rows = centres[labels] + 2 * torch.randn(OBJECTS, DIM, generator=generator)
    return [SimilarityGroupSample(Vector(row), group) for row, group in zip(rows, labels.tolist(), strict=True)]


def pairs(generator: torch.Generator) -> list[SimilarityPairSample]:
    """Left objects, and right ones in which much is noise."""
    left = torch.randn(OBJECTS, DIM, generator=generator)
    right = left + 4 * torch.randn(OBJECTS, DIM, generator=generator)
    return [SimilarityPairSample(Vector(a), Vector(b)) for a, b in zip(left, right, strict=True)]


CASES: dict[str, tuple[Callable[[torch.Generator], list[Any]], bool]] = {
    "groups of 5": (lambda generator: groups(5, generator), False),
    "groups of 5,000": (lambda generator: groups(5_000, generator), False),
    "pairs, left asks right": (pairs, True),
    "pairs, all ask all": (pairs, False),
}
"""What makes the samples, and whether left objects are distinguished from right ones."""


# -- measuring ---------------------------------------------------------------------------------------------------------


def peak_megabytes() -> float:
    """The largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, and kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_here(case: str) -> dict[str, Any]:
    """Evaluate one case in this process, of which the peak is then that case's."""
    imported = peak_megabytes()
    make, distinguish = CASES[case]
    samples = make(torch.Generator().manual_seed(0))
    evaluator = Evaluator(
        {
            "P@1": RetrievalPrecision(1, distinguish=distinguish),
            "R@10": RetrievalRecall(10, distinguish=distinguish),
            "RR": RetrievalReciprocalRank(distinguish=distinguish),
            "RP": RetrievalRPrecision(distinguish=distinguish),
            "MAP": RetrievalMAP(distinguish=distinguish),
        },
        batch_size=256,
    )
    began = time.perf_counter()
    figures = evaluator.evaluate(samples, HandsThrough())
    return {
        "objects": OBJECTS * (2 if make is pairs else 1),
        "seconds": time.perf_counter() - began,
        "peak_megabytes": peak_megabytes() - imported,
        "figures": {name: round(float(value), 4) for name, value in figures.items()},
    }


def measure_apart(case: str) -> dict[str, Any]:
    """The same in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, "--case", case], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], help="print one as JSON, and keep nothing")
    parser.add_argument("--no-results", action="store_true", help="only print")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure_here(options.case)))
        return
    threads = os.environ.get("OMP_NUM_THREADS")
    about = {
        "command": (f"OMP_NUM_THREADS={threads} " if threads else "") + "python benchmarks/evaluation.py",
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{about['machine']}, torch {about['torch']}, Python {about['python']}, {about['date']}")
    print(f"{'':26}{'objects':>10}{'seconds':>10}{'megabytes':>11}   goal: at most {GOAL['seconds']} s, 2,000 MB")
    results = {}
    for case in CASES:
        row = results[case] = measure_apart(case)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in row["figures"].items())
        print(f"{case:26}{row['objects']:10,}{row['seconds']:10.1f}{row['peak_megabytes']:11,.0f}   {figures}")
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
        path = RESULTS / f"evaluation-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "goal": GOAL, "results": results}, indent=2) + "\n")
        print(f"kept as {path.relative_to(Path(__file__).parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
