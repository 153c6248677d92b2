"""What several commands say and check alike."""

from __future__ import annotations

import datetime
import time
import warnings
from pathlib import Path

import torch
import typer

from torchrecycle.allocator import keep_freed_memory, tuned_by
from torchrecycle.cli.errors import OptionError

__all__ = [
    "ago",
    "as_utf8",
    "at_time",
    "check_device",
    "keep_memory",
    "left_out_line",
    "printable",
    "say_random",
    "telling",
]


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


def keep_memory() -> None:
    """For a command that measures time; said on stderr, where the user's settings forbid it."""
    if not keep_freed_memory() and (setting := tuned_by()) is not None:
        typer.echo(
            f"memory is given back as {setting} says: on a processor, steps may be slower, and take another time each "
            "minute",
            err=True,
        )


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


def printable(value: object) -> str:
    """In one line, without what would move a terminal's cursor: words that somebody else has written.

    >>> printable("layer2" + chr(27) + "[2J" + chr(10) + "rm") == "layer2�[2J�rm"
    True
    """
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in as_utf8(value))


HOUR, DAY = 3600.0, 86400.0


def ago(when: float | None, now: float | None = None) -> str:
    """How long ago something was, of which the hour is known.

    Args:
        when: in seconds since 1970; None for never.
        now: the same; the present if not given.

    >>> [ago(1e9 - seconds, now=1e9) for seconds in (60, 4000, 8000, 100_000, 1_000_000)]
    ['under 1 hour', '1 hour ago', '2 hours ago', '1 day ago', '11 days ago']
    >>> ago(0.0, now=1e9), ago(None)
    ('1970-01-01', 'never')
    """
    if when is None:
        return "never"
    seconds = (time.time() if now is None else now) - when
    if seconds < HOUR:
        return "under 1 hour"
    if seconds > 30 * DAY:
        return str(datetime.datetime.fromtimestamp(when, datetime.timezone.utc).date())
    count, what = (int(seconds / HOUR), "hour") if seconds < DAY else (int(seconds / DAY), "day")
    return f"{count} {what}{'' if count == 1 else 's'} ago"


def at_time(when: float | None) -> str | None:
    """For other programs.

    >>> at_time(1e9)
    '2001-09-09T01:46:40+00:00'
    """
    if when is None:
        return None
    return datetime.datetime.fromtimestamp(int(when), datetime.timezone.utc).isoformat()
