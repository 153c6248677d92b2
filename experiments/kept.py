"""What an experiment has measured: a JSON file, written after each step, from which a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Kept"]

RESULTS = Path(__file__).parent / "results"


class Kept:
    """Measurements by name.

    Args:
        path: of the file; made with the first measurement.
        settings: what all of them depend on. A file with others is not gone on from.

    Raises:
        SystemExit: the file has measurements under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "measured": {}}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))
            if self.found["settings"] != settings:
                raise SystemExit(
                    f"{path} was measured with {self.found['settings']} and not with {settings}: give the same "
                    "arguments, or move the file away"
                )

    @property
    def measured(self) -> dict[str, Any]:
        return self.found["measured"]

    def __contains__(self, name: str) -> bool:
        return name in self.measured

    def keep(self, name: str, value: Any) -> None:
        """Written under another name first, so that a file is never half there."""
        self.measured[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
