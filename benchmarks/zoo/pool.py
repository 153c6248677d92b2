"""Worker processes for the zoo: a case that hangs or kills its process costs only itself.

Two workers on two cores, each with one torch thread. A worker that says nothing for 300 seconds is killed and replaced,
and the case recorded as `timeout`; one that dies (out of memory, a segmentation fault) as `crash`. A worker that has
grown beyond 4 GB is replaced before it gets another case.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

LARGE = 4 * 2**20
"""KiB of resident memory after which a worker is replaced."""


def work(pipe: Connection, options: dict[str, Any]) -> None:
    """A worker: takes (library, name), gives back what was found."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from check import check_case
    from libraries import find_case

    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent was killed
        while (asked := pipe.recv()) is not None:
            before = time.process_time()
            found = check_case(find_case(*asked), **options)
            found["cpu_seconds"] = round(time.process_time() - before, 2)
            found["worker_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send(found)


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    asked: tuple[str, str] | None = None
    since: float = 0.0
    outgrown: bool = False

    def end(self) -> None:
        """Let it go if it is idle; kill it otherwise."""
        if self.asked is None and self.process.is_alive():
            self.pipe.send(None)
            self.process.join(10)
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def run_all(names: Sequence[tuple[str, str]], jobs: int, limit: float, **options: Any) -> Iterator[dict[str, Any]]:
    """What is found for each (library, name), as it comes.

    Args:
        names: the cases.
        jobs: processes.
        limit: seconds per case.
        **options: of `check_case`.
    """
    waiting, workers = list(names), []
    try:
        workers = [_start(limit, options) for _ in range(min(jobs, len(waiting)))]
        while waiting or any(worker.asked for worker in workers):
            for i, worker in enumerate(workers):
                if worker.asked is None and waiting:
                    if worker.outgrown:
                        worker.end()
                        workers[i] = worker = _start(limit, options)
                    worker.asked, worker.since = waiting.pop(0), time.monotonic()
                    worker.pipe.send(worker.asked)
            yield from _collect(workers, limit, options)
    finally:
        for worker in workers:
            worker.end()


def _start(limit: float, options: dict[str, Any]) -> _Worker:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, {"seconds": 0.8 * limit, **options}), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _collect(workers: list[_Worker], limit: float, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ready = wait([worker.pipe for worker in workers if worker.asked], timeout=1.0)
    for i, worker in enumerate(workers):
        if worker.asked is None:
            continue
        if worker.pipe in ready:
            try:
                found = worker.pipe.recv()
                worker.outgrown = found["worker_kib"] > LARGE
            except (EOFError, ConnectionError):
                worker.process.join()
                found = _lost(worker, "crash", f"the process ended with {worker.process.exitcode}")
                worker.end()
                workers[i] = _start(limit, options)
        elif time.monotonic() - worker.since > limit:
            found = _lost(worker, "timeout", f"after {limit:.0f} s")
            worker.end()
            workers[i] = _start(limit, options)
        else:
            continue
        worker.asked = None
        yield found


def _lost(worker: _Worker, status: str, reason: str) -> dict[str, Any]:
    assert worker.asked is not None
    library, name = worker.asked
    seconds = round(time.monotonic() - worker.since, 2)
    return {"library": library, "name": name, "status": status, "reason": reason, "cuts": [], "seconds": seconds}
