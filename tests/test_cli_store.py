"""``torchrecycle store``: what a user sees of each verb, and the exit codes that a script sees."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from torchrecycle.cli import app
from torchrecycle.store import FolderStore, LeafSpec, Ragged, Rows

FIRST, SECOND = "3f9c" + "0" * 28, "a07b" + "1" * 28
SPECS = [LeafSpec((3,), ragged=False, dtype=torch.float32), LeafSpec((2,), ragged=True, dtype=torch.bfloat16)]
runner = CliRunner()


def run(command: str, *arguments: object, **options: Any) -> Result:
    return runner.invoke(app, ["store", *shlex.split(command), *map(str, arguments)], **options)


def keys_of(numbers: range) -> np.ndarray:
    keys = np.zeros((len(numbers), 16), dtype=np.uint8)
    keys[:, 0] = list(numbers)
    return keys


def fill(rows: Rows, numbers: range, step: int) -> None:
    for start in range(numbers.start, numbers.stop, step):
        count = min(step, numbers.stop - start)
        ragged = Ragged(torch.zeros(2 * count, 2).bfloat16(), torch.full((count,), 2))
        rows.append(keys_of(range(start, start + count)), [torch.arange(3.0 * count).view(-1, 3), ragged])
        rows.publish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two fingerprints: 20 rows in four segments with a manifest, and 3 rows."""
    store = FolderStore(tmp_path / "store")
    about = {"model": "torchvision.models.resnet.ResNet", "cut": "layer2", "level": 0.5, "precision": "bfloat16"}
    rows = store.rows(FIRST, SPECS, {**about, "parts": {"conv1 (Conv2d)": "0", "conv1.weight": "0"}})
    fill(rows, range(20), step=5)
    rows.write_manifest("d" * 32, {"keys": torch.from_numpy(keys_of(range(20)))}, {"name": "train"})
    other = {**about, "cut": "layer3", "precision": "float32", "parts": {"conv1 (Conv2d)": "0", "conv1.weight": "1"}}
    fill(store.rows(SECOND, SPECS, other), range(3), step=3)
    return tmp_path / "store"


def segments_of(folder: Path, fingerprint: str = FIRST) -> list[Path]:
    return sorted((folder / fingerprint).glob("*-*.safetensors"))


def damage(folder: Path) -> Path:
    path = segments_of(folder)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_ls_is_a_table_that_a_person_understands(folder: Path):
    result = run("ls", folder)
    assert result.exit_code == 0
    head, first, second, total = result.output.splitlines()
    assert head.split() == ["fingerprint", "model", "cut", "precision", "rows", "size", "last", "used", "data", "sets"]
    size = f"{sum(p.stat().st_size for p in (folder / FIRST).rglob('*') if p.is_file()) / 1000:.1f} kB"
    assert first.split() == f"{FIRST[:12]} ResNet layer2 bfloat16 20 {size} under 1 hour train (20)".split()
    assert second.split()[:5] == [SECOND[:12], "ResNet", "layer3", "float32", "3"]
    assert total.startswith("2 fingerprints, 23 rows, ")


def test_ls_as_json_has_every_figure(folder: Path):
    first, second = json.loads(run("ls --json", folder).output)
    assert (first["fingerprint"], first["rows"], first["segments"]) == (FIRST, 20, 4)
    assert first["data_sets"] == [{"identity": "d" * 32, "name": "train", "items": 20}]
    assert first["used"].endswith("+00:00")
    assert second["model"] == "torchvision.models.resnet.ResNet"


def test_ls_of_an_empty_folder_says_so(tmp_path: Path):
    assert run("ls", tmp_path).output == f"{tmp_path} holds no rows yet\n"
    assert json.loads(run("ls --json", tmp_path).output) == []


def test_ls_names_what_cannot_be_read(folder: Path):
    segments_of(folder)[0].write_bytes(b"short")
    run("verify", folder, SECOND)
    result = run("ls", folder)
    assert result.exit_code == 0
    assert "(cannot be read in full, see below)" in result.output
    assert f"{FIRST[:12]}: {segments_of(folder)[0]} is damaged: it has 5 bytes" in result.output
    run("verify", folder)
    assert "train (20) (1 damaged file set aside)" in run("ls", folder).output


def test_names_that_somebody_has_written_cannot_move_the_cursor(folder: Path):
    store = FolderStore(folder)
    fill(store.rows("evil", SPECS, {"model": "a\x1b[2Jb", "cut": "[red]c\nd"}), range(2), step=2)
    for command in ("ls", "stat"):
        output = run(command, folder, *(["evil"] if command == "stat" else [])).output
        assert "\x1b" not in output
        assert "[red]c\ufffdd" in output


def test_stat_says_everything_of_one(folder: Path):
    output = run("stat", folder, FIRST[:4]).output
    lines = {line[:12].strip(): line[13:] for line in output.splitlines() if line[:1].isalpha()}
    assert lines["fingerprint"] == FIRST
    assert lines["cut"] == "layer2 (level 0.50)"
    assert "row          float32 [3], 12 B" in output
    assert "row          bfloat16 ['length', 2], 4 B a step" in output
    assert lines["rows"].startswith("20 in 4 segments")
    assert lines["data sets"] == "train (20)"
    assert lines["covers"] == "1 module, 1 tensor and settings; see about.json"
    assert all(path.name in output for path in segments_of(folder))
    found = json.loads(run("stat --json", folder, FIRST).output)
    assert [segment["rows"] for segment in found["segments"]] == [5, 5, 5, 5]
    assert found["leaves"][1] == {"shape": [2], "ragged": True, "dtype": "torch.bfloat16"}
    assert found["about"]["level"] == 0.5


def test_stat_of_all_adds_up(folder: Path):
    assert run("stat", folder).output.startswith("2 fingerprints, 23 rows, ")
    assert json.loads(run("stat --json", folder).output)["rows"] == 23


def test_verify_ends_with_1_where_something_was_damaged(folder: Path):
    assert run("verify", folder).exit_code == 0
    path = damage(folder)
    left = folder / SECOND / "x-1.safetensors.tmp-7-ab"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    result = run("verify", folder)
    assert result.exit_code == 1
    assert f"{FIRST}  3 segments, 15 sound rows" in result.output
    assert str(path) in result.output
    assert "lying there: 1 half-written file of a writer that was killed (4 B)" in result.output
    assert f"`torchrecycle store compact {folder}` removes what killed processes left" in result.output
    assert run("verify", folder, SECOND).exit_code == 0
    assert run("verify", folder).exit_code == 0


def test_compact_says_what_it_did(folder: Path):
    result = run("compact", folder, FIRST[:4])
    assert result.exit_code == 0
    assert result.output.startswith(f"{FIRST}  4 segments -> 1, ")
    assert len(segments_of(folder)) == 1
    assert "nothing to do" in run("compact", folder).output
    assert "merged" in run("stat", folder, FIRST).output


def test_compact_of_damaged_rows_says_verify(folder: Path):
    damage(folder)
    result = run("compact", folder)
    assert result.exit_code == 2
    assert "torchrecycle store verify" in result.stderr
    assert result.stderr.count("\n") == 1


def test_evict_makes_a_store_small_enough(folder: Path):
    for path in segments_of(folder):
        os.utime(path, (1, 1))
    result = run("evict --max-bytes 30kB", folder)
    assert result.exit_code == 0
    assert "4 segments evicted, 1 fingerprint removed entirely" in result.output
    assert f"removed entirely: {FIRST}" in result.output
    assert FolderStore(folder).fingerprints() == [SECOND]
    forgotten = run("evict --max-bytes 20", folder)
    assert forgotten.exit_code == 2
    assert "'20' has no unit: '20 GB', or '20 B' if bytes are meant" in forgotten.stderr
    wrong = run("evict --max-bytes much", folder)
    assert wrong.exit_code == 2
    assert "'much' is no size: give bytes, or a number with a unit" in wrong.stderr
    assert "missing option '--max-bytes'" in run("evict", folder).stderr


def test_forget_asks_and_erases(folder: Path):
    key = keys_of(range(2, 3))[0].tobytes().hex()
    nobody = run("forget", folder, key)
    assert nobody.exit_code == 2
    assert "nothing was removed, since nobody answered: give --yes" in nobody.stderr
    no = run("forget", folder, key, input="n\n")
    assert no.exit_code == 1
    assert "nothing was removed" in no.stdout
    result = run("forget", folder, key, input="y\n")
    assert result.exit_code == 0
    assert "2 rows erased, 2 segments written anew; 1 manifest removed" in result.output
    assert f"Erase 1 object from {folder}" in result.stderr
    assert "no row and no manifest of it is here" in run("forget --yes", folder, key).output
    wrong = run("forget --yes", folder, "photo.jpg")
    assert wrong.exit_code == 2
    assert "'photo.jpg' is no key" in wrong.stderr


def test_forget_ends_with_1_where_something_may_be_left(folder: Path):
    damage(folder)
    result = run("forget --yes", folder, *(key.tobytes().hex() for key in keys_of(range(20))))
    assert result.exit_code == 1
    assert "NOT DONE: " in result.output
    assert "store verify" in result.output


def test_diff_says_why_rows_were_missed(folder: Path):
    result = run("diff", folder, FIRST[:4], SECOND[:4])
    assert result.exit_code == 0
    assert result.output == (
        f"{FIRST} against {SECOND}:\n"
        "  cut: layer2 against layer3\n"
        "  precision: bfloat16 against float32\n"
        "  `conv1.weight` differs\n"
    )
    assert json.loads(run("diff --json", folder, FIRST, SECOND).output)["lines"][-1] == "`conv1.weight` differs"


def test_rm_asks_and_removes(folder: Path):
    no = run("rm", folder, FIRST[:4], input="\n")
    assert no.exit_code == 1
    assert f"Remove {FIRST} (torchvision.models.resnet.ResNet cut at layer2: 20 rows, " in no.stderr
    assert FolderStore(folder).fingerprints() == [FIRST, SECOND]
    result = run("rm --yes", folder, FIRST[:4])
    assert result.exit_code == 0
    assert result.output.startswith("removed, ")
    assert FolderStore(folder).fingerprints() == [SECOND]


def test_rm_refuses_what_is_no_fingerprint(folder: Path):
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"cat")
    for name in ("photos", "..", "nothing", ""):
        result = run("rm --yes", folder, name)
        assert result.exit_code == 2
        assert "no fingerprint of" in result.stderr
    assert (folder / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("verb", ["ls", "stat", "verify", "compact", "evict --max-bytes 1GB", "rm --yes", "diff"])
def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, verb: str):
    arguments = {"rm --yes": ["a"], "diff": ["a", "b"]}.get(verb, [])
    result = run(verb, tmp_path / "none", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("torchrecycle: there is no folder")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["ls", "verify", "compact"])
def test_a_store_of_nothing_is_said_to_be_one(tmp_path: Path, verb: str):
    result = run(verb, tmp_path)
    assert (result.exit_code, result.output) == (0, f"{tmp_path} holds no rows yet\n")


def test_the_folder_of_one_fingerprint_is_no_store_and_the_error_names_the_one_around_it(folder: Path):
    result = run("ls", folder / FIRST)
    assert result.exit_code == 2
    assert f"holds one fingerprint. Its store is the folder around it: give {folder}" in result.stderr


def test_ls_names_two_data_sets_and_counts_the_others(folder: Path):
    rows = FolderStore(folder).existing(FIRST)
    for letter in "abc":
        rows.write_manifest(letter * 32, {"keys": torch.from_numpy(keys_of(range(2)))}, {"name": letter})
    assert "a (2), b (2) and 2 more\n" in run("ls", folder).output
    assert "a (2), b (2), c (2), train (20)\n" in run("stat", folder, FIRST).output


def test_on_a_terminal_of_80_columns_a_fingerprint_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torchrecycle.cli.store._columns", lambda: 80)
    head, first, second, data_sets, total = run("ls", folder).output.splitlines()
    assert head.split()[-2:] == ["last", "used"]
    assert max(map(len, (head, first, second))) <= 80
    assert data_sets == f"{FIRST[:12]}: train (20)"
    assert total.startswith("2 fingerprints")


def test_stat_says_the_precision_that_ls_says(folder: Path):
    about = {"model": "Net", "cut": "a", "precision": "own", "autocast": "None", "key inputs": ["images"]}
    fill(FolderStore(folder).rows("own", SPECS, about), range(2), step=2)
    output = run("stat", folder, "own").output
    assert "precision    float32, bfloat16\n" in output
    assert "key inputs   images\n" in output
    assert "autocast" not in output


def test_a_damaged_fingerprint_does_not_keep_compact_from_the_others(folder: Path):
    fill(FolderStore(folder).rows(SECOND, SPECS, {}), range(3, 6), step=1)
    damage(folder)
    (folder / "0").mkdir()
    (folder / "0" / "about.json").write_text("{")
    result = run("compact", folder)
    assert result.exit_code == 2
    assert result.stdout.startswith(f"{SECOND}  4 segments -> 1, ")
    assert result.stderr.count("\n") == 1
    assert "about.json is not readable (Expecting property name" in result.stderr


def test_verify_says_of_what_was_set_aside_what_takes_it_away(folder: Path):
    damage(folder)
    output = run("verify", folder).output
    assert "`torchrecycle store evict` takes it first" in output
    assert "compact" not in output
    run("compact", folder)
    assert "takes it first" in run("verify", folder).output


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("evict --max-bytes 1kB", [], "What was evicted before is gone; the same command goes on from there"),
        ("forget --yes", ["0" * 32], "Not all of it is erased; the same command goes on from there"),
        ("rm --yes", [FIRST], "else `torchrecycle store compact"),
    ],
)
def test_ctrl_c_in_the_midst_of_removing_does_not_say_that_nothing_is_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, arguments: list[str], said: str
):
    monkeypatch.setattr(FolderStore, verb.partition(" ")[0], interrupted)
    result = run(verb, folder, *arguments)
    assert result.exit_code == 2
    assert "stopped." in result.stderr
    assert said in result.stderr
    assert "Nothing is lost" not in result.stderr


def test_rows_that_were_not_used_for_long_say_when_they_were(folder: Path):
    for path, days in zip(segments_of(folder), [3, 4, 5, 6], strict=True):
        then = time.time() - days * 86_400 - 60
        os.utime(path, (then, then))
    assert "3 days ago" in run("ls", folder).output
