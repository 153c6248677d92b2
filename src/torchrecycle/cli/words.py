"""What several commands say and check alike."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import typer

from torchrecycle.cli.errors import OptionError

__all__ = ["as_utf8", "check_device", "left_out_line", "say_random", "telling"]


def telling(path: Path) -> str:
    """The name of a file or folder; that of the folder around it where the name could be anybody's."""
    path = path.resolve()
    stem = path.name.partition(".")[0] if path.is_file() else path.name
    return path.parent.name or stem if stem in ("images", "data", "train", "model", "") else stem


def check_device(name: str | None) -> None:
    """Use it once, since PyTorch knows many names and says nothing of what is there.

    Raises:
        OptionError: it cannot be used.
    """
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name} is no device: give cpu, or cuda for a graphics card") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise OptionError(f"--device {name} cannot be used here ({why}): leave it out, or give cpu") from error


def left_out_line(line: str) -> str:
    """
    >>> left_out_line("cannot decode 1 of 48 pictures: a.png (it is empty): left out")
    'left out: cannot decode 1 of 48 pictures: a.png (it is empty)'
    """
    if "nothing left out" in line:
        return line
    return f"left out: {line.removesuffix(': left out')}"


def say_random(*, published: bool) -> None:
    """On stderr, loudly.

    Args:
        published: whether there is an option for the weights that a library publishes.
    """
    other = ", or --pretrained for the published ones" if published else ""
    typer.secho(
        "THE WEIGHTS ARE RANDOM, since none were given: what comes out says nothing about a pretrained model. Give "
        f"--checkpoint FILE{other}.",
        err=True,
        bold=True,
        fg="red",
    )


def as_utf8(value: object) -> str:
    """As text that any file can hold: the name of a file need not be UTF-8.

    >>> as_utf8("caf\\udce9.jpg"), as_utf8(13)
    ('caf?.jpg', '13')
    """
    return str(value).encode("utf-8", "replace").decode("utf-8")
