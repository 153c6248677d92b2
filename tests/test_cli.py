"""The command line: what it prints, and how a mistake looks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from torchrecycle.cli import app
from torchrecycle.cli.errors import one_line_errors
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
    (line,) = [line for line in result.output.splitlines() if line.startswith("f" * 12)]
    assert line.split()[1:5] == ["Model", "layer2", "?", "10"]


def test_stat_adds_up(folder: Path):
    result = runner.invoke(app, ["store", "stat", str(folder)])
    assert result.output.startswith("1 fingerprint, 10 rows")


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sweep images photos", "missing option '--model'. See torchrecycle sweep images --help"),
        ("sweep images --model timm/resnet18", "missing argument 'where'"),
        ("sweep images photos --model m --epochs 0", "invalid value for '--epochs': "),
        ("sweep images photos --model m --task guess", "'guess' is not one of 'similarity', 'classify'"),
        ("sweep images photos --modle m", "no such option: --modle"),
        ("sweep texts a b --model m", "unexpected extra argument"),
        ("cuts --model", "option '--model' requires an argument"),
        ("store ls", "missing argument 'PATH'. See torchrecycle store ls --help"),
        ("swep", "no such command 'swep'"),
        ("-q", "no such option: -q. See torchrecycle --help"),
    ],
)
def test_arguments_that_are_missing_or_wrong_are_one_line_and_exit_code_2(arguments, words):
    result = runner.invoke(app, arguments.split(), prog_name="torchrecycle", env={"COLUMNS": "40"})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("torchrecycle: ")
    assert result.stderr.endswith(" --help\n")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_without_any_argument_the_help_is_shown():
    assert "Compare full training" in runner.invoke(app, []).output
    assert "--help" in runner.invoke(app, ["sweep"]).output


CONSOLE_SCRIPT = "import torchrecycle_command as c, sys; sys.argv[0] = 'torchrecycle'; c.main()"


@pytest.mark.parametrize("start", [["-m", "torchrecycle.cli"], ["-c", CONSOLE_SCRIPT]], ids=["module", "script"])
def test_wrong_arguments_are_one_line_however_the_command_is_started(start):
    ended = subprocess.run([sys.executable, *start, "sweep", "images"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "torchrecycle: missing argument 'where'. See torchrecycle sweep images --help\n"


def test_debug_shows_the_error_itself(tmp_path: Path):
    result = runner.invoke(app, ["store", "ls", str(tmp_path / "none"), "--debug"])
    assert isinstance(result.exception, OSError)


# -- what ends a command -----------------------------------------------------------------------------------------------


def _interrupt() -> None:
    """As a terminal does on Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def _is_told(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_ctrl_c_says_what_is_kept(capsys):
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(typer.Exit) as ended, one_line_errors(False, lambda: "Kept: all"):
        _interrupt()
    assert ended.value.exit_code == 2
    assert _is_told(capsys) == "torchrecycle: stopped. Kept: all\n"
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (handler, hook)


class _Finalised:
    """What its finaliser raises, Python prints and forgets."""

    def __del__(self) -> None:
        _interrupt()


def _swallow() -> None:
    _Finalised()
    time.sleep(10)


def test_a_ctrl_c_that_python_swallows_is_heard_all_the_same(capsys):
    began = time.monotonic()
    with pytest.raises(typer.Exit), one_line_errors(False):
        _swallow()
    assert time.monotonic() - began < 5
    assert _is_told(capsys).startswith("torchrecycle: stopped. ")


def _turn_into_an_error() -> None:
    try:
        _interrupt()
    finally:
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")


def test_an_error_that_ctrl_c_led_to_is_no_error(capsys):
    with pytest.raises(typer.Exit), one_line_errors(False):
        _turn_into_an_error()
    assert _is_told(capsys).startswith("torchrecycle: stopped. ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked on Unix only")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_worker_is_not_ended_by_ctrl_c():
    with one_line_errors(False):
        worker = os.fork()
        if not worker:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7


def test_debug_shows_where_ctrl_c_came(capsys):
    with pytest.raises(typer.Exit), one_line_errors(True):
        _interrupt()
    said = capsys.readouterr().err
    assert "in _interrupt" in said
    assert said.splitlines()[-1].startswith("torchrecycle: stopped. ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the graphics card's memory is full. Take a smaller --batch"),
        (MemoryError(), "the memory is full. Take a smaller --batch"),
        (OSError(errno.ENOSPC, "No space left on device", "rows"), "rows: No space left on device. Make room. "),
        (OSError(errno.EACCES, "Permission denied", "rows"), "rows: Permission denied. See that it can be "),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, error: Exception, words):
    with pytest.raises(typer.Exit), one_line_errors(False):
        raise error
    said = _is_told(capsys)
    assert words in said
    assert "Nothing is lost; the same command begins anew" in said


def test_what_takes_less_memory_is_said_as_the_command_has_it(capsys):
    with pytest.raises(typer.Exit), one_line_errors(False, smaller="a smaller --batch, or fewer --tokens"):
        raise MemoryError
    assert "the memory is full. Take a smaller --batch, or fewer --tokens. Nothing is lost" in _is_told(capsys)


def test_pytorch_says_that_memory_is_full_in_words_that_are_known(capsys):
    with pytest.raises(typer.Exit), one_line_errors(False):
        torch.empty(1 << 46)
    assert "the memory is full" in _is_told(capsys)


@pytest.mark.parametrize("error", [ValueError("a defect"), BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError("?")])
def test_what_is_no_mistake_of_the_user_is_let_through(error: Exception):
    with pytest.raises(type(error)), one_line_errors(False):
        raise error
