"""Files beside the journal: a line for each level as it is finished, and all figures at the end.

``results.jsonl`` grows while a sweep runs: whoever watches it sees head only after a minute and full training after an
hour. A line says which sweep it is of, since several may share a folder, also at the same time: lines are only added,
each in one write. One that is asked again adds nothing.
``results.json`` is the whole of the last sweep that ended, as ``torchrecycle report compare`` takes it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from torchrecycle.sweep.environment import now
from torchrecycle.sweep.journal import JournalError
from torchrecycle.sweep.results import LevelResult, SweepResult

__all__ = ["RESULT", "ROWS", "finite", "keep_result", "keep_row", "write_whole"]

ROWS, RESULT = "results.jsonl", "results.json"


def keep_row(folder: Path, sweep: str, level: LevelResult) -> None:
    """Add a level to ``results.jsonl``, unless the same line of the same sweep is there.

    Args:
        folder: of the results.
        sweep: what tells the sweep from others in the folder.
        level: that has been finished.

    Raises:
        JournalError: it cannot be read or written.
    """
    path = folder / ROWS
    figures = finite(level.to_json())
    if any(line.get("sweep") == sweep and line.get("row") == figures for line in _lines(path)):
        return
    _add(path, json.dumps({"sweep": sweep, "date": now(), "row": figures}))


def _add(path: Path, line: str) -> None:
    """In one write at the end of the file, wherever that is by then: no line of another process is lost or split. The
    lock is for the look at the last byte, which is no end of a line while another process still writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                with suppress(OSError):  # a disk that knows no locks: a line may be empty then
                    fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            # A crash or a full disk may have left a part of a line: it must not swallow this one.
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            told = f"{chr(10) * torn}{line}\n".encode()
            if os.write(file, told) < len(told):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
    except OSError as error:
        raise _worded(path, error) from error


def _worded(path: Path, error: OSError) -> JournalError:
    worded = JournalError(f"cannot write to {path.parent}: {error.strerror}")
    worded.errno = error.errno
    return worded


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole: one is not while it is written, or where its writer was killed."""
    lines: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise JournalError(f"{path} cannot be read ({error}): move it away, and it is begun anew") from error


def keep_result(folder: Path, result: SweepResult) -> None:
    """Write ``results.json``.

    Raises:
        JournalError: it cannot be written.
    """
    write_whole(folder / RESULT, json.dumps(finite(result.to_json()), indent=2))


def write_whole(path: Path, text: str) -> None:
    """Written under another name first, so that a file is never half there.

    Raises:
        JournalError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise _worded(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know.

    >>> finite({"loss": (float("nan"), 1.0)})
    {'loss': [None, 1.0]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value
