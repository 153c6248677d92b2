"""Small real disks: file systems in memory that can be filled to the last page, or made read-only.

Mounting needs rights that a test run often has not. Then the tests that need it are skipped, in words.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = 4096


@contextlib.contextmanager
def small_disk(folder: Path, *, pages: int = 768, inodes: int = 200) -> Iterator[Path]:
    """A tmpfs of so many pages and files, mounted on a new folder and gone afterwards."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={pages * PAGE},nr_inodes={inodes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        # Lazily, since maps of its files may still be there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Within this context nothing can be written to a mounted disk."""
    _mount("-o", "remount,ro", str(disk))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(disk))


@contextlib.contextmanager
def without_rights(folder: Path, *hidden: str) -> Iterator[None]:
    """Within this context this process may read a folder and write nothing in it, also if it is root's otherwise.

    Args:
        folder: Which.
        hidden: Folders in it that it may not even read.
    """
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    for path in reversed(folders):
        path.chmod(0 if path in [folder / name for name in hidden] else 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


NOBODY = 65534


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        pytest.skip(f"no file system can be mounted here, which takes root: {problem}")


class Ballast:
    """What takes the room of a disk, in a folder beside the store."""

    def __init__(self, disk: Path) -> None:
        self._folder = disk / "ballast"
        self._folder.mkdir()

    def leave_pages(self, count: int) -> None:
        """Take all pages but so many."""
        with open(self._folder / "pages", "wb") as file:
            found = os.statvfs(self._folder)
            file.write(bytes((found.f_bavail - count) * PAGE))

    def leave_files(self, count: int) -> None:
        """Take all inodes but so many."""
        for number in range(os.statvfs(self._folder).f_favail - count):
            (self._folder / str(number)).touch()

    def free(self) -> None:
        """Give the room back."""
        for path in self._folder.iterdir():
            path.unlink()
