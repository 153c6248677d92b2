"""Which files there are in a folder, a tar or a zip, and how each is read later, in any order and by many processes.

A tar of 8,144 photos is walked once, for 0.3 s. Of each photo the place in the tar is kept, so that a worker that is
asked for number 5,000 opens the tar, seeks, reads 8 KB and closes: nothing is unpacked, nothing stays open across a
fork, and what is pickled is a path and two numbers. A compressed tar has no such places and is refused with the
command that unpacks it; a zip has them.

Names are relative, with ``/``. Hidden files, and what macOS and Windows add, are passed over.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from torchrecycle.files.errors import DataError, readable, shown
from torchrecycle.files.marker import holds_results

__all__ = ["Listing", "Piece", "list_files", "plain"]

_ADDED = {"__MACOSX", "Thumbs.db", "desktop.ini"}

_UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".tbz2": "bunzip2", ".xz": "unxz", ".txz": "unxz"}
_UNPACK |= {".zst": "unzstd", ".tzst": "unzstd"}

_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PK": ".zip"}


# ------------------------------------------------------------------------------------------------------ pieces


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file of its own."""

    path: str
    """Where it is."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True, slots=True)
class Stretch:
    """A member of a tar, which lies in it as it is."""

    path: str
    """The tar."""
    offset: int
    """Where the member's content begins, in bytes."""
    size: int
    """How long it is, in bytes."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise EOFError(f"{Path(self.path).name} ends in the middle of it")
        return data


@dataclass(frozen=True, slots=True)
class Packed:
    """A member of a zip."""

    path: str
    """The zip."""
    offset: int
    """Where the member's header begins, in bytes."""
    size: int
    """How long its content is in the zip, in bytes."""
    deflated: bool
    """Whether its content is compressed."""
    crc: int
    """The checksum of what comes out."""

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            header = file.read(30)
            if len(header) < 30:
                raise EOFError(f"{Path(self.path).name} ends in the middle of it")
            file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            data = file.read(self.size)
        data = zlib.decompress(data, -zlib.MAX_WBITS) if self.deflated else data
        if zlib.crc32(data) != self.crc:
            raise ValueError("its checksum in the zip is another")
        return data


Piece: TypeAlias = WholeFile | Stretch | Packed


# ----------------------------------------------------------------------------------------------------- listing


@dataclass(slots=True)
class Listing:
    """What a folder or an archive holds."""

    where: Path
    """The folder or archive."""
    files: dict[str, Piece] = field(default_factory=dict)
    """How to read each, by name: relative, with ``/``."""
    folders: list[str] = field(default_factory=list)
    """Those that are said to be there, also empty ones."""
    twice: list[str] = field(default_factory=list)
    """Names that an archive holds more than once; the last is kept, as unpacking would."""
    size: int = 0
    """Bytes of an archive."""
    loops: list[str] = field(default_factory=list)
    """Links that lead to a folder around them, which are not followed."""
    results: list[str] = field(default_factory=list)
    """Folders with the results of a sweep, which are passed over."""
    ours: list[str] = field(default_factory=list)
    """Folders that were to be passed over."""

    def add(self, name: str, piece: Piece) -> None:
        if name in self.files:
            self.twice.append(name)
        self.files[name] = piece


def plain(name: str) -> str:
    """A name as it is compared: with ``/``, without ``./``, composed.

    >>> plain("./cat\\\\1.jpg")
    'cat/1.jpg'
    """
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/")).lstrip("/")
    return posixpath.normpath(name) if name else ""


def list_files(where: Path, leave_out: Sequence[Path] = ()) -> Listing:
    """What a folder, a tar or a zip holds.

    Args:
        where: the folder or archive.
        leave_out: folders that are passed over, wherever links lead to them; they need not be there.

    Raises:
        DataError: if it is not there, cannot be read, or is none of these.
    """
    with readable(where):
        status = where.stat()
        if stat.S_ISDIR(status.st_mode):
            return _list_folder(where, leave_out)
        with where.open("rb") as file:
            begin = file.read(8)
    suffix = where.suffix.lower()
    packed = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), suffix)
    listing = Listing(where, size=status.st_size)
    if packed in _UNPACK:
        raise DataError(
            f"{shown(where)} is a compressed tar, which cannot be read in any order. "
            f"Unpack it to a plain tar with `{_UNPACK[packed]} {shown(where.name)}`, or to a folder"
        )
    if packed == ".zip":
        return _list_zip(listing)
    return _list_tar(listing, suffix)


def _passed_over(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part in _ADDED for part in parts)


# ------------------------------------------------------------------------------------------------------ folder


def _list_folder(where: Path, leave_out: Sequence[Path]) -> Listing:
    listing = Listing(where)
    root = where.resolve()
    around = {_identity(folder.stat()) for folder in (root, *root.parents)}
    passed = {_identity(folder.stat()) for folder in leave_out if folder.exists()}
    _walk(listing, str(where), "", frozenset(around), frozenset(passed))
    listing.folders = [name for name in listing.folders if not _is_around_ours(listing, f"{name}/")]
    return listing


def _is_around_ours(listing: Listing, folder: str) -> bool:
    """Whether there is nothing else in the folder, so that it is none of the user's that is empty."""
    passed = any(name.startswith(folder) for name in (*listing.ours, *listing.results))
    return passed and not any(name.startswith(folder) for name in listing.files)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


_Identities: TypeAlias = frozenset[tuple[int, int]]


def _walk(listing: Listing, folder: str, below: str, around: _Identities, passed: _Identities) -> None:
    with readable(folder), os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if _passed_over((entry.name,)):
            continue
        name = below + entry.name
        try:
            status = entry.stat()
        except OSError:
            # A link that leads nowhere: it stays in the list, so that it is missed when it is read.
            listing.add(name, WholeFile(entry.path))
            continue
        if stat.S_ISREG(status.st_mode):
            listing.add(name, WholeFile(entry.path))
        elif stat.S_ISDIR(status.st_mode):
            _enter(listing, entry.path, name, around, passed)


def _enter(listing: Listing, path: str, name: str, around: _Identities, passed: _Identities) -> None:
    # Not the number that scandir gives, which is 0 on Windows.
    identity = _identity(os.stat(path))
    if identity in around:
        listing.loops.append(name)
        return
    if identity in passed:
        listing.ours.append(name)
        return
    if holds_results(Path(path)):
        listing.results.append(name)
        return
    listing.folders.append(name)
    _walk(listing, path, f"{name}/", around | {identity}, passed)


# ---------------------------------------------------------------------------------------------------- archives


def _list_tar(listing: Listing, suffix: str) -> Listing:
    path = str(listing.where)
    links: list[tuple[str, str]] = []
    try:
        with readable(path), tarfile.open(path, "r:") as tar:
            for member in tar:
                _add_member(listing, member, links)
    except (tarfile.TarError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_no_tar(listing, suffix, str(error))) from None
    if listing.size % 512:
        raise DataError(f"{shown(path)} is cut off: its size, {listing.size:,}, is no multiple of 512. Get it anew")
    for name, target in links:
        if target in listing.files:
            listing.add(name, listing.files[target])
    return listing


def _no_tar(listing: Listing, suffix: str, why: str) -> str:
    if suffix == ".tar" or listing.files:
        return f"{shown(listing.where)} cannot be read as a tar ({why}): is it whole?"
    return f"{shown(listing.where)} is neither a folder nor a tar nor a zip: expected one that holds pictures"


def _add_member(listing: Listing, member: tarfile.TarInfo, links: list[tuple[str, str]]) -> None:
    name = plain(member.name)
    if name in ("", ".") or _passed_over(name.split("/")):
        return
    if member.isdir():
        listing.folders.append(name)
    elif member.islnk():
        links.append((name, plain(member.linkname)))
    elif member.issym():
        links.append((name, plain(posixpath.join(posixpath.dirname(name), member.linkname))))
    elif member.isreg() and not member.issparse():
        piece = Stretch(str(listing.where), member.offset_data, member.size)
        listing.add(name, piece)


def _list_zip(listing: Listing) -> Listing:
    path = str(listing.where)
    try:
        with readable(path), zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                _add_info(listing, info)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{shown(path)} cannot be read as a zip ({error}): is it whole?") from None
    return listing


def _add_info(listing: Listing, info: zipfile.ZipInfo) -> None:
    name = plain(info.filename)
    if name in ("", ".") or _passed_over(name.split("/")):
        return
    if info.is_dir():
        listing.folders.append(name)
        return
    if info.flag_bits & 1:
        raise DataError(f"{shown(listing.where)} is encrypted ({shown(name)}): unpack it to a folder")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{shown(listing.where)} is packed in a way that cannot be read: unpack it to a folder")
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    piece = Packed(str(listing.where), info.header_offset, info.compress_size, deflated, info.CRC)
    listing.add(name, piece)
