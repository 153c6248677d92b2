"""Memory that is freed stays with a process, unless its user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import torchrecycle.demo.run
import torchrecycle.sweep
from torchrecycle.cli.main import app

STEPS = """
import resource, sys
import torch
from torchrecycle.sweep import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
for step in range(15):
    if step == 5:  # the first ones take the memory in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20).add(1)  # twice 64 MB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_A_STEP = 2 * (64 << 20) // 4096

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def faults(mode: str, **tuned: str) -> tuple[bool, int]:
    """Whether memory was kept, and how many pages ten steps were given by the system."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    }
    command = [sys.executable, "-c", STEPS, mode]
    kept, count = subprocess.run(command, check=True, text=True, capture_output=True, env=clean | tuned).stdout.split()
    return kept == "True", int(count)


@glibc_only
def test_steps_after_the_first_ones_are_given_no_new_pages():
    kept, count = faults("kept")
    assert kept
    assert count < PAGES_OF_A_STEP  # of ten steps


@glibc_only
def test_without_it_each_step_is_given_all_its_pages_anew():
    """Else there would be nothing to keep, and the test above would say nothing."""
    kept, count = faults("default")
    assert not kept
    assert count > 5 * PAGES_OF_A_STEP


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_tuned_is_left_alone(name: str):
    value = "glibc.malloc.mmap_max=65536" if name == "GLIBC_TUNABLES" else "65536"
    assert not faults("kept", **{name: value})[0]


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "images", "no-such-folder", "--model", "timm/resnet18"],
        ["cuts", "--model", "timm/resnet18", "--size", "64", "--objects", "64"],
        ["demo"],
    ],
    ids=lambda words: words[0],
)
def test_commands_that_measure_time_keep_it(command: list[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    monkeypatch.setattr(torchrecycle.sweep, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(torchrecycle.demo.run, "run_demo", lambda *args, **options: {})
    result = CliRunner().invoke(app, command)
    assert asked, result.output
