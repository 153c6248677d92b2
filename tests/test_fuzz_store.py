"""Hostile files: 5,000 changes of small stores, each opened and read in every way. See ``fuzz/store.py``.

They run in processes of their own, so that a crash is seen, and memory can be limited. ``make fuzz`` runs more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz" / "store.py"
IN_MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_hostile_files_are_an_error_each_or_harmless(tmp_path: Path):
    children = [start(tmp_path / f"{seed}", str(SCRIPT), "--count", "2500", "--seed", str(seed)) for seed in (1, 2)]
    ended = [(child, *child.communicate(timeout=900)) for child in children]
    kinds, outcomes = Counter[str](), Counter[str]()
    for seed, (child, out, errors) in enumerate(ended, 1):
        assert child.returncode == 0, (
            f"it ended with {child.returncode}; the files are in {tmp_path / str(seed)}, in 'failure' if there is one, "
            f"else in 'store'\n{out[-3000:]}\n{errors[-6000:]}"
        )
        told = json.loads(out.splitlines()[-1])
        kinds.update(told["kinds"])
        outcomes.update(told["outcomes"])
    assert sum(kinds.values()) >= 5_000
    assert len(kinds) == 13
    assert min(kinds.values()) > 100, kinds
    # Neither is everything refused, which would be safe and useless, nor is everything served.
    assert min(outcomes[what] for what in ("served", "refused", "set aside", "manifest", "probe")) > 100


SABOTAGE = """
import sys
sys.path.insert(0, {folder!r})
from torchrecycle.store.segment import Segment
from torchrecycle.store import shelf
{what}
import store
store.main()
"""


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        pytest.param("Segment._matches = lambda *_: True", "another row was served", id="sums that are not compared"),
        pytest.param("shelf._NO_LINKS = 0", "while the store was read", id="links that are followed"),
    ],
)
def test_the_fuzzing_sees_what_it_is_for(tmp_path: Path, what: str, seen: str):
    code = SABOTAGE.format(folder=str(SCRIPT.parent), what=what)
    child = start(tmp_path, "-c", code, "--count", "300", "--seed", "1", "--go-on")
    out, errors = child.communicate(timeout=600)
    assert child.returncode == 1, errors[-3000:]
    assert seen in out + errors
