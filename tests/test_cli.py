"""The command line: what it prints, and how a mistake looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from torchrecycle.cli import app
from torchrecycle.store import FolderStore, LeafSpec

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with ten rows of three numbers."""
    rows = FolderStore(tmp_path / "store").rows(
        "f" * 32, [LeafSpec((3,), ragged=False, dtype=torch.float32)], {"model": "a.Model", "cut": "layer2"}
    )
    keys = np.arange(160, dtype=np.uint8).reshape(10, 16)
    rows.append(keys, [torch.arange(30.0).reshape(10, 3)])
    rows.publish()
    return tmp_path / "store"


def test_ls_names_model_cut_and_rows(folder: Path):
    result = runner.invoke(app, ["store", "ls", str(folder)])
    assert result.exit_code == 0
    assert "f" * 32 in result.output
    assert "10 rows" in result.output
    assert "a.Model cut at layer2" in result.output


def test_stat_adds_up(folder: Path):
    result = runner.invoke(app, ["store", "stat", str(folder)])
    assert result.output.startswith("1 fingerprints, 10 rows")


def test_verify_finds_a_flipped_bit_and_says_so_with_exit_code_1(folder: Path):
    assert runner.invoke(app, ["store", "verify", str(folder)]).exit_code == 0
    segment = next((folder / ("f" * 32)).glob("*.safetensors"))
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(bytes(data))
    result = runner.invoke(app, ["store", "verify", str(folder)])
    assert result.exit_code == 1
    assert segment.name in result.output
    again = runner.invoke(app, ["store", "verify", str(folder)])
    assert again.exit_code == 0
    assert "10 rows" not in runner.invoke(app, ["store", "ls", str(folder)]).output


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path):
    result = runner.invoke(app, ["store", "ls", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "there is no folder" in result.stderr
    (tmp_path / "letter.txt").write_text("no store")
    result = runner.invoke(app, ["store", "verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no store" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_error_itself(tmp_path: Path):
    result = runner.invoke(app, ["store", "ls", str(tmp_path / "none"), "--debug"])
    assert isinstance(result.exception, OSError)
