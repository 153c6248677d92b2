"""Memory that is freed stays with a process, unless its user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import torchrecycle.cli.words
import torchrecycle.demo.run
from torchrecycle.cli.main import app

STEPS = """
import resource, sys
import torch
from torchrecycle import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
for step in range(105):
    if step == 5:  # the first ones take the memory in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20).add(1)  # twice 64 MB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_A_STEP = 2 * (64 << 20) // 4096

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
huge = pytest.mark.skipif(_HUGE.exists() and "[always]" in _HUGE.read_text(), reason="pages of 2 MB are given")
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def faults(mode: str, **tuned: str) -> tuple[bool, int]:
    """Whether memory was kept, and how many pages a hundred steps were given by the system."""
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
    # A small object in the place of a large one that was freed lets the heap grow, now and then: in a tenth at most.
    assert count < 10 * PAGES_OF_A_STEP


@glibc_only
@huge
def test_without_it_each_step_is_given_all_its_pages_anew():
    """Else there would be nothing to keep, and the test above would say nothing."""
    kept, count = faults("default")
    assert not kept
    assert count > 50 * PAGES_OF_A_STEP


@glibc_only
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_MAX_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=65536"),
    ],
)
def test_what_the_user_says_of_giving_back_is_left_alone(name: str, value: str):
    assert not faults("kept", **{name: value})[0]


@glibc_only
@pytest.mark.parametrize(("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.pthread.rseq=0")])
def test_what_a_container_says_of_other_things_does_not_matter(name: str, value: str):
    assert faults("kept", **{name: value})[0]


SAID = "from torchrecycle.cli.words import keep_memory; keep_memory()"


@glibc_only
def test_it_is_said_where_the_users_settings_forbid_it():
    env = {**os.environ, "MALLOC_MMAP_MAX_": "65536"}
    said = subprocess.run([sys.executable, "-c", SAID], check=True, text=True, capture_output=True, env=env)
    assert said.stderr.startswith("memory is given back as MALLOC_MMAP_MAX_ says: on a processor, ")
    assert said.stdout == ""


ROOM = """
import sys
import torch
from torchrecycle import keep_freed_memory
from torchrecycle.data.resident import free_bytes
from torchrecycle.sweep.environment import machine
keep_freed_memory()
blocks = [torch.ones(64 << 20) for _ in range(4)]  # 1 GB
taken = free_bytes(torch.device("cpu"))
del blocks
print(free_bytes(torch.device("cpu")) - taken, machine())
"""


@glibc_only
def test_what_is_kept_counts_as_free_and_results_say_that_it_was():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", ROOM]
    freed, told = subprocess.run(command, check=True, text=True, capture_output=True, env=clean).stdout.split(
        maxsplit=1
    )
    assert 0.8e9 < int(freed) < 1.4e9
    assert told.strip().endswith(" threads, freed memory kept")


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
    monkeypatch.setattr(torchrecycle.cli.words, "keep_freed_memory", lambda: asked.append(True) or True)
    monkeypatch.setattr(torchrecycle.demo.run, "run_demo", lambda *args, **options: {})
    result = CliRunner().invoke(app, command)
    assert asked, result.output
