"""A collection of Qdrant: embeddings by key, in memory, in a folder or on a server, and what can go wrong there.

``Collection(Place("photos.index"), "objects")`` opens the folder; ``create(384, about)`` makes the collection,
``put`` adds 32 embeddings, ``nearest`` answers. Everything that Qdrant says, from a locked folder to a server that is
not there, becomes an error of this library with the next step; nothing else here knows of Qdrant.

What an index says of itself (the model that made it) is the collection's own metadata, so that it lies with the
embeddings and goes with them, on a server too. A key is 16 bytes, as a UUID of Qdrant.
"""

from __future__ import annotations

import errno
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrecycle.errors import RecycleError

__all__ = [
    "Collection",
    "IndexFolderError",
    "Place",
    "SearchError",
    "SearchPackageError",
    "SearchServerError",
    "id_of",
    "is_index",
]

NUMBER = "_number"
"""The name in a payload under which the number of an object is kept."""

PATIENCE = 60
"""Seconds that a server has to answer."""

PAGE = 1000
"""Points that are asked for, or removed, at once."""

META, LOCK = "meta.json", ".lock"
"""What Qdrant's embedded mode puts into each of its folders."""


class SearchError(RecycleError, ValueError):
    """What is asked of an index cannot be: the objects, the embeddings, the query or the index itself are not fit."""


class IndexFolderError(RecycleError, OSError):
    """The folder is no index, is in use by another process, or cannot be read or written."""


class SearchServerError(RecycleError, ConnectionError):
    """The Qdrant server cannot be reached, or does not do what it is asked for."""


class SearchPackageError(RecycleError, ImportError):
    """The package qdrant-client is not installed: ``pip install "torchrecycle[similarity]"``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where collections lie: in a folder, on a server, or, with neither, in memory."""

    path: Path | None = None
    """A folder of Qdrant's embedded mode."""
    url: str | None = None
    """A server, such as ``http://localhost:6333``."""
    api_key: str | None = None
    """Of the server, if it asks for one."""

    def __post_init__(self) -> None:
        if self.path is not None and self.url is not None:
            raise SearchError(f"path {str(self.path)!r} and url {self.url!r} are both given: give one of them")

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else self.url or "memory"

    def __repr__(self) -> str:  # without the key
        return f"Place({self})"


def id_of(key: bytes) -> str:
    """
    >>> id_of(bytes(range(16)))
    '00010203-0405-0607-0809-0a0b0c0d0e0f'
    """
    return str(uuid.UUID(bytes=key))


def is_index(path: Path) -> bool:
    """Whether Qdrant's embedded mode has made this folder."""
    return (path / META).is_file()


class Collection:
    """One collection. Closing it lets go of the folder, which one process has at a time.

    Args:
        place: where it lies. A folder that is not there is made.
        name: of the collection.

    Raises:
        IndexFolderError: the folder is something else, or in use, or cannot be read or written.
        SearchServerError: the server does not answer.
        SearchPackageError: qdrant-client is not installed.
    """

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self._made_folder = place.path is not None and not place.path.exists()
        self.client = _open(place)
        self._dim: int | None = None
        try:
            with self._asking():
                self._exists = bool(self.client.collection_exists(name))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the folder or the connection. A folder that was made here for nothing is taken away."""
        self.client.close()
        if self._made_folder and not self._exists and self.place.path is not None:
            for name in (META, LOCK):
                (self.place.path / name).unlink(missing_ok=True)
            if self.place.path.is_dir() and not any(self.place.path.iterdir()):
                self.place.path.rmdir()

    # -- the collection itself -----------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Whether there is one of this name."""
        return self._exists

    def others(self) -> list[str]:
        """The names of all collections that lie there."""
        with self._asking():
            return sorted(each.name for each in self.client.get_collections().collections)

    def create(self, dim: int, about: Mapping[str, Any]) -> None:
        """Make it, for embeddings of ``dim`` numbers.

        Raises:
            SearchServerError: the server keeps no metadata, by which the model is known (Qdrant before 1.16).
        """
        from qdrant_client import models

        with self._asking():
            self.client.create_collection(
                self.name,
                vectors_config=models.VectorParams(size=dim, distance=models.Distance.COSINE),
                metadata=dict(about),
            )
            self._exists = True
            if self.place.url is not None:
                # Without this index, a server does not sort by a number in the payload.
                self.client.create_payload_index(self.name, NUMBER, field_schema=models.PayloadSchemaType.INTEGER)
            if self.about() != dict(about):
                self.client.delete_collection(self.name)
                self._exists = False
                raise SearchServerError(
                    f"the server {self.place} does not keep what an index says of its model: that takes Qdrant 1.16 or "
                    "later"
                )

    def about(self) -> dict[str, Any]:
        """What was said of it when it was made; empty if nothing was."""
        with self._asking():
            return dict(self.client.get_collection(self.name).config.metadata or {})

    def dim(self) -> int | None:
        """How long its embeddings are; None if it is of another kind, or not compared by cosine."""
        from qdrant_client import models

        if self._dim is None:
            with self._asking():
                said = self.client.get_collection(self.name).config.params.vectors
            if isinstance(said, models.VectorParams) and said.distance == models.Distance.COSINE:
                self._dim = said.size
        return self._dim

    def count(self) -> int:
        """How many embeddings it holds."""
        with self._asking():
            return self.client.count(self.name, exact=True).count

    # -- what it holds -------------------------------------------------------------------------------------------------

    def payloads(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of those that are there, what is kept beside the embedding."""
        found: dict[str, dict[str, Any]] = {}
        for some in _pages(ids):
            with self._asking():
                records = self.client.retrieve(self.name, ids=some, with_payload=True, with_vectors=False)
            found |= {str(record.id): dict(record.payload or {}) for record in records}
        return found

    def vectors(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Of those that are there, the embedding ``[dim]``, of length one."""
        with self._asking():
            records = self.client.retrieve(self.name, ids=list(ids), with_payload=False, with_vectors=True)
        return {str(record.id): np.asarray(record.vector, np.float32) for record in records}

    def ids(self) -> Iterator[str]:
        """All ids. Nothing may be put or removed while this runs."""
        offset: Any = None
        while True:
            with self._asking():
                records, offset = self.client.scroll(
                    self.name, limit=PAGE, offset=offset, with_payload=False, with_vectors=False
                )
            yield from (str(record.id) for record in records)
            if offset is None:
                return

    def next_number(self) -> int:
        """One more than the highest number in a payload."""
        from qdrant_client import models

        with self._asking():
            records, _ = self.client.scroll(
                self.name,
                limit=1,
                order_by=models.OrderBy(key=NUMBER, direction=models.Direction.DESC),
                with_payload=True,
            )
        return int((records[0].payload or {}).get(NUMBER, -1)) + 1 if records else 0

    def put(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Mapping[str, Any]]) -> None:
        """Add embeddings ``[len(ids), dim]``, or replace those of the same ids."""
        from qdrant_client import models

        batch = models.Batch(ids=list(ids), vectors=vectors.tolist(), payloads=[dict(each) for each in payloads])
        with self._asking():
            self.client.upsert(self.name, points=batch, wait=True)

    def put_payloads(self, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace what is kept beside embeddings that are there."""
        from qdrant_client import models

        for some in _pages(list(payloads)):
            operations = [
                models.OverwritePayloadOperation(
                    overwrite_payload=models.SetPayload(payload=dict(payloads[each]), points=[each])
                )
                for each in some
            ]
            with self._asking():
                self.client.batch_update_points(self.name, update_operations=operations, wait=True)

    def remove(self, ids: Sequence[str]) -> None:
        from qdrant_client import models

        for some in _pages(ids):
            with self._asking():
                self.client.delete(self.name, points_selector=models.PointIdsList(points=list(some)), wait=True)

    def nearest(self, vectors: np.ndarray, k: int, *, exact: bool) -> list[list[tuple[float, dict[str, Any]]]]:
        """For each of ``[queries, dim]``, cosine similarity and payload of the nearest, the nearest first."""
        from qdrant_client import models

        # The embedded mode is exact, and complains of being told so.
        params = models.SearchParams(exact=True) if exact and self.place.url is not None else None
        requests = [
            models.QueryRequest(query=vector.tolist(), limit=k, with_payload=True, params=params) for vector in vectors
        ]
        with self._asking():
            answers = self.client.query_batch_points(self.name, requests=requests)
        return [[(point.score, dict(point.payload or {})) for point in answer.points] for answer in answers]

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Around whatever is asked of Qdrant.

        Raises:
            SearchServerError: the server did not answer, or with an error.
            IndexFolderError: the folder's disk is full, or what it holds is damaged.
        """
        import sqlite3

        from qdrant_client.http.exceptions import ApiException

        with warnings.catch_warnings():
            _ignore_size()
            try:
                yield
            except RecycleError:
                raise
            except ApiException as error:
                raise SearchServerError(_why_no_answer(self.place, error)) from error
            except (sqlite3.Error, OSError) as error:
                raise _unusable(self.place, error) from error
            except (ValueError, RuntimeError) as error:  # a name with a slash; a client that is closed
                raise SearchError(f"Qdrant cannot do what it is asked for: {_one_line(error)}") from error


def _ignore_size() -> None:
    # Qdrant's embedded mode says from 20,000 points on that a server is faster; the documentation here says so too.
    warnings.filterwarnings("ignore", message="Local mode is not recommended")


def _pages(ids: Sequence[str]) -> Iterator[list[str]]:
    for begin in range(0, len(ids), PAGE):
        yield list(ids[begin : begin + PAGE])


def _why_no_answer(place: Place, error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f"the Qdrant server {place} lets nobody in without its key ({status}): give the right api_key"
    if status is not None:
        content = getattr(error, "content", b"")
        said = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        return f"the Qdrant server {place} answered with {status}: {_one_line(said)}. Is it a Qdrant of 1.16 or later?"
    source = getattr(error, "source", error)
    return (
        f"no Qdrant server can be reached at {place} ({_one_line(source)}): start one, correct the url, or give a "
        "folder in its place, which needs no server"
    )


def _one_line(what: object) -> str:
    words = " ".join(str(what).split())[:200].rstrip(". ")
    return words or type(what).__name__


# -- opening -----------------------------------------------------------------------------------------------------------


def _open(place: Place) -> Any:
    """A client of Qdrant."""
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise SearchPackageError(
            'searching needs qdrant-client, which is not installed: pip install "torchrecycle[similarity]"'
        ) from error
    if place.url is not None:
        return _open_server(QdrantClient, place)
    if place.path is None:
        return QdrantClient(":memory:")
    _refuse_other_things(place.path)
    with warnings.catch_warnings():
        _ignore_size()
        try:
            return QdrantClient(path=str(place.path))
        # What lies there may be damaged in any way: JSON, SQLite, a pickle.
        except Exception as error:
            _let_go(error)
            raise _unusable(place, error) from error


def _let_go(error: BaseException | None) -> None:
    """Close what Qdrant had opened when it failed (its lock, SQLite), which only the failure still holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            locked: Any = getattr(error, "fh", None)  # of portalocker
            if locked is not None:
                locked.close()
            error = error.__context__


def _open_server(client: Any, place: Place) -> Any:
    try:
        # Its own check asks in another thread, and complains there.
        return client(url=place.url, api_key=place.api_key, timeout=PATIENCE, check_compatibility=False)
    except ValueError as error:
        raise SearchServerError(
            f"{place.url!r} is no address of a server ({_one_line(error)}): expected one such as http://localhost:6333"
        ) from error


def _refuse_other_things(path: Path) -> None:
    """Qdrant would put its files among those of somebody else.

    Raises:
        IndexFolderError: there is something else.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise IndexFolderError(f"{path} is a file, and an index is a folder: give another one")
    try:
        held = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise _unusable(Place(path), error) from error
    if held and META not in held:
        raise IndexFolderError(
            f"{path} holds {', '.join(held[:3])}{' and more' * (len(held) > 3)}, and no index: give a new folder"
        )


def _unusable(place: Place, error: Exception) -> RecycleError:
    if place.path is None:
        return SearchError(f"Qdrant cannot do what it is asked for: {_one_line(error)}")
    if isinstance(error, RuntimeError) and "already accessed" in str(error):
        return IndexFolderError(
            f"the index {place.path} is open in another process, or twice in this one: close it there, or use a Qdrant "
            "server (url=), which many can ask at once"
        )
    number = getattr(error, "errno", None) or (errno.ENOSPC if "is full" in str(error) else None)
    why = getattr(error, "strerror", None) or _one_line(error)
    if number is None:
        step = ". It seems to be damaged: make a new one from the objects"
        worded = IndexFolderError(
            f"the index {place.path} cannot be read or written ({type(error).__name__}: {why}){step}"
        )
    else:
        worded = IndexFolderError(f"the index {place.path} cannot be read or written: {why}")
    worded.errno = number
    return worded
