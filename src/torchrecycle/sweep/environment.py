"""What a sweep ran on: processor, threads, graphics card, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from datetime import datetime
from pathlib import Path

import torch

from torchrecycle.allocator import keeps_freed_memory

__all__ = ["machine", "now", "versions"]

LIBRARIES = (
    "torchrecycle",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "pillow",
    "pytorch-metric-learning",
    "numpy",
)


def machine(device: torch.device | None = None) -> str:
    """What seconds depend on, in words: the processor and the threads in use, the graphics card if there is one at
    work, and whether memory that is freed stays with the process."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1] if found else name
    except OSError:
        pass
    card = f", {torch.cuda.get_device_name(device)}" if device is not None and device.type == "cuda" else ""
    memory = ", freed memory kept" if keeps_freed_memory() else ""
    return f"{name}, {torch.get_num_threads()} threads{card}{memory}"


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """ISO, to the second, with the time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
