"""How fast are keys, beside BLAKE3 itself on the same bytes?

A key is a hash over a spelled-out object. For an image of 1 MB the hash is nearly all of it; for a text of 30 letters
the rest is, which is Python. ``python benchmarks/keys.py`` takes both in turn in one process, on one thread, and prints

* GB/s of tensors of 1 MB, one by one and as rows of a batch of 64; of one that is not contiguous; of a file;
* short objects per second: texts, bytes, integers, floats, pairs, dicts, a list of texts as one object, and rows of a
  batch of 32 token ids, with padding and without.

Seconds are of processor time, which other programs on the machine hardly lengthen.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from torchrecycle.keys import key, tensor_row_keys
from torchrecycle.sweep.environment import machine

RESULTS = Path(__file__).parent / "results"
MEGABYTE = 1 << 20
GOAL_BYTES = 2e9
"""Bytes per second of 1 MB tensors, on one core."""
GOAL_TEXTS = 200_000
"""Short texts per second, on one core."""


@dataclass(frozen=True)
class Case:
    """Something to be hashed, by us and by BLAKE3 alone."""

    name: str
    keys: Callable[[], Any]
    plain: Callable[[], Any]
    amount: float
    """Bytes or objects in one call."""
    unit: str
    goal: float | None = None


def seconds(call: Callable[[], Any], at_least: float = 0.05) -> float:
    """Processor seconds of one call, as the mean over as many as take some time."""
    count, began = 0, time.process_time()
    while True:
        call()
        count += 1
        taken = time.process_time() - began
        if taken >= at_least:
            return taken / count


def raw(data: Any) -> bytes:
    return blake3(data).digest(16)


def large(folder: Path) -> list[Case]:
    one = torch.randn(MEGABYTE // 4)
    many = torch.randn(64, MEGABYTE // 4)
    crossed = torch.randn(512, 512).t()
    file = folder / "file"
    file.write_bytes(torch.randn(MEGABYTE // 4).numpy().tobytes())

    def bytes_of(tensor: torch.Tensor) -> memoryview:
        return tensor.contiguous().numpy().reshape(-1).data.cast("B")

    one_view, rows = bytes_of(one), [bytes_of(row) for row in many]
    return [
        Case("a tensor of 1 MB", lambda: key(one), lambda: raw(one_view), MEGABYTE, "B", GOAL_BYTES),
        Case(
            "64 rows of 1 MB",
            lambda: tensor_row_keys({"x": many}),
            lambda: [raw(row) for row in rows],
            64 * MEGABYTE,
            "B",
            GOAL_BYTES,
        ),
        Case("1 MB, not contiguous", lambda: key(crossed), lambda: raw(bytes_of(crossed)), MEGABYTE, "B"),
        Case("a file of 1 MB", lambda: key(file), lambda: raw(file.read_bytes()), MEGABYTE, "B"),
    ]


def one_by_one(name: str, objects: Sequence[Any], spelled: Sequence[bytes], goal: float | None = None) -> Case:
    return Case(
        name,
        lambda: [key(obj) for obj in objects],
        lambda: [raw(data) for data in spelled],
        len(objects),
        "objects",
        goal,
    )


def short() -> list[Case]:
    numbers = range(10_000)
    texts = [f"a short text, number {number}" for number in numbers]
    data = [text.encode() for text in texts]
    ids = torch.randint(0, 30_000, (10_000, 32))
    kept = ids < 25_000
    id_bytes = [row.numpy().tobytes() for row in ids]
    return [
        one_by_one("short texts", texts, data, GOAL_TEXTS),
        one_by_one("short bytes", data, data),
        one_by_one("integers", numbers, [number.to_bytes(8, "little") for number in numbers]),
        one_by_one("floats", [number / 7 for number in numbers], data),
        one_by_one("(text, integer)", list(zip(texts, numbers, strict=True)), data),
        one_by_one('{"text": ..., "id": ...}', [{"text": t, "id": i} for i, t in enumerate(texts)], data),
        Case("a list of 10,000 texts", lambda: key(texts), lambda: [raw(b"".join(data))], len(texts), "objects"),
        Case(
            "rows of 32 ids",
            lambda: tensor_row_keys({"input_ids": ids}),
            lambda: [raw(row) for row in id_bytes],
            len(ids),
            "objects",
        ),
        Case(
            "rows of 32 ids, padded",
            lambda: tensor_row_keys({"input_ids": ids}, masks=kept, ragged={"input_ids"}),
            lambda: [raw(row) for row in id_bytes],
            len(ids),
            "objects",
        ),
    ]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Ours and BLAKE3 alone, in turn."""
    case.keys()
    case.plain()
    pairs = [(seconds(case.keys), seconds(case.plain)) for _ in range(rounds)]
    ratios = [plain / ours for ours, plain in pairs]
    per_second = case.amount / statistics.median(ours for ours, _ in pairs)
    return {
        "unit": f"{case.unit}/s",
        "per_second": per_second,
        "blake3_per_second": case.amount / statistics.median(plain for _, plain in pairs),
        "of_blake3": statistics.median(ratios),
        "of_blake3_min": min(ratios),
        "of_blake3_max": max(ratios),
        "goal": case.goal,
        "met": None if case.goal is None else per_second >= case.goal,
    }


def in_words(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:6.2f} GB/s" if unit == "B/s" else f"{per_second / 1e3:6.0f} k/s "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--no-results", action="store_true", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {}
    print(f"{'keys, on one core':28}{'ours':>12}{'BLAKE3':>12}   ours of BLAKE3")
    with tempfile.TemporaryDirectory() as folder:
        for case in [*large(Path(folder)), *short()]:
            row = results[case.name] = measure(case, 3 if options.quick else options.rounds)
            goal = ""
            if case.goal is not None:
                goal = f"   goal {in_words(case.goal, row['unit']).strip()}: {'met' if row['met'] else 'MISSED'}"
            print(
                f"{case.name:28}{in_words(row['per_second'], row['unit']):>12}"
                f"{in_words(row['blake3_per_second'], row['unit']):>12}   {row['of_blake3']:.2f} "
                f"({row['of_blake3_min']:.2f} to {row['of_blake3_max']:.2f}){goal}",
                flush=True,
            )
    about = {
        "command": "python benchmarks/keys.py",
        "machine": machine(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(f"{about['machine']}, one thread, torch {about['torch']}, Python {about['python']}, {about['date']}")
    if not options.no_results:
        slug = re.sub(r"[^a-z0-9]+", "-", str(about["machine"]).lower()).strip("-")
        path = RESULTS / f"keys-{slug}-{about['date']}.json"
        path.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
        print(f"kept as {path.relative_to(RESULTS.parents[1])}", file=sys.stderr)


if __name__ == "__main__":
    main()
