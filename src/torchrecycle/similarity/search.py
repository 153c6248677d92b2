"""Search by similarity: the embeddings of objects in Qdrant, and which of them are nearest to a query.

    with index(model, photos, "photos.index") as found:
        for one in found.search(query, k=5):
            print(one.score, photos[one.number])

Of 20,000 photos the first call encodes each once; their embeddings of 384 numbers take 79 MB in ``photos.index``, and a
query takes 15 to 70 ms on two cores besides its own encoding, since Qdrant's embedded mode compares it with each.
The next call encodes what is new. Far beyond that, a Qdrant server is quicker: ``url="http://localhost:6333"``.

Two things must never happen: that an embedding is taken for one of another object, and that it is compared with those
of another model. So an object is known by its content (`torchrecycle.keys.key`), and never by its place in a list; and
the index says which model made it: the fingerprint of its modules, that is classes, settings and the bytes of all
weights, as in `torchrecycle.fingerprint`. What no module shows (how pictures are resized, which tokenizer there is) is
found by encoding some of the objects that are there already again: what does not come out as it was is refused.

An embedded index is Qdrant's own folder, and Qdrant pickles what is in it: open only folders whose makers you trust.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from torchrecycle.keys import KEY_BYTES
from torchrecycle.keys import key as key_of
from torchrecycle.progress import progress
from torchrecycle.similarity.collection import (
    NUMBER,
    Collection,
    IndexFolderError,
    Place,
    SearchError,
    SearchPackageError,
    SearchServerError,
    id_of,
    is_index,
)
from torchrecycle.similarity.identity import KnownModel, OtherModelError

__all__ = [
    "Found",
    "IndexFolderError",
    "IndexReport",
    "MissingIndexError",
    "OtherModelError",
    "OtherObjectsError",
    "SearchError",
    "SearchIndex",
    "SearchPackageError",
    "SearchServerError",
    "index",
]

FORMAT = 1
"""Of what an index says of itself."""
ALIKE = 0.999
"""Cosine similarity from which an embedding that is made again counts as the same: what half precision, another
processor or another batch changes is less, what another resize or tokenizer changes is more."""
LONGEST_PROBE = 1000
"""Letters of a text that an index keeps to see, when it is opened, whether it still comes out as it did."""
VERIFIED = 3
"""So many objects that are there already are encoded again."""

Others = Literal["refuse", "keep", "remove"]


class MissingIndexError(SearchError):
    """There is no index of that name."""


class OtherObjectsError(SearchError):
    """The index holds objects that are not among those that were given."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count
        """How many."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is near to a query."""

    number: int
    """Its place in the objects that were given to `index`; of those that `SearchIndex.add` brought, counted on."""
    score: float
    """Cosine similarity of the two embeddings, -1 to 1."""
    payload: dict[str, Any]
    """What was given beside it."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What a call did to an index."""

    encoded: int
    """So many objects were new, and were encoded."""
    found: int
    """So many were there already."""
    removed: int
    """So many were there that no longer belong there, and were taken out."""
    repeated: int
    """So many have the content of another that came before, and stand behind it."""
    verified: int
    """So many of those found were encoded again, and came out as they are kept."""


def index(
    model: Any,
    objects: Sequence[Any],
    path: str | Path | None = None,
    *,
    url: str | None = None,
    api_key: str | None = None,
    name: str = "objects",
    payloads: Sequence[Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    key: Callable[[Any], Any] | None = None,
    identity: Any = None,
    others: Others = "refuse",
    verify: int = VERIFIED,
) -> SearchIndex:
    """Put the embeddings of objects into Qdrant, to search among them.

    What is there already from an earlier call is not encoded again. This may be stopped at any moment: what was
    encoded stays, and the same call goes on from there. Only one process at a time has a folder open.

    Args:
        model: a `SimilarityModel`, or anything with ``encode(objects, batch_size=...)`` that gives ``[objects, dim]``,
            or a function from a list of objects to that.
        objects: what is to be found. Read with ``len`` and by number, so a map-style data set does too; where the index
            exists already, what is new is read twice.
        path: a folder of Qdrant's embedded mode; made if it is not there. Without it, and without ``url``, the index is
            in memory.
        url: a Qdrant server (1.16 or later), such as ``http://localhost:6333``.
        api_key: of the server.
        name: of the collection there: a folder or server may hold several.
        payloads: for each object what is to be given back with it: a dict that JSON can hold.
        batch_size: objects that the model sees at once.
        key: from an object to what identifies it, such as a primary key. By default that is its content; a text stands
            for itself, also where it is the name of a file: give names as `pathlib.Path`, which counts by what is in
            the file.
        identity: what tells the model from others beside its modules, such as a version of the preprocessing. It must
            be given for a model that is no module.
        others: what to do where the index holds objects that are not among these: ``refuse``, ``keep`` them (their
            numbers are then those of the list that they came with), or ``remove`` them.
        verify: so many of the objects that are there already are encoded again and compared.

    Returns:
        The index; close it, or use it in a ``with``. Its ``report`` says what was encoded.

    Raises:
        OtherModelError: the index was made by another model or preprocessing.
        OtherObjectsError: it holds objects that are not among these, and ``others`` is ``refuse``.
        SearchError: there are no objects, an embedding holds NaN or no direction, a payload is no JSON.
        KeyTypeError: an object has no key by content; give ``key``.
        IndexFolderError: the folder is something else, in use, or cannot be written.
        SearchServerError: the server cannot be reached.
        SearchPackageError: qdrant-client is not installed.
    """
    known = KnownModel(model, batch_size, identity)
    items = _listed(objects)
    if not len(items):
        raise SearchError("there are no objects to index: give one or more")
    _check_options(others, verify)
    beside = _checked_payloads(payloads, len(items))
    place = Place(None if path is None else Path(path), url, api_key)
    made = SearchIndex(known, Collection(place, name), key or _itself)
    try:
        made._check_model()
        made.report = made._hold(items, beside, others, verify)
    except BaseException:
        made.close()
        raise
    return made


def _itself(obj: Any) -> Any:
    return obj


def _listed(objects: Any) -> Any:
    """Something with a length that is read by number."""
    return objects if hasattr(objects, "__len__") and hasattr(objects, "__getitem__") else list(objects)


def _check_options(others: Others, verify: int) -> None:
    """
    Raises:
        SearchError: one of them cannot be.
    """
    if others not in ("refuse", "keep", "remove"):
        raise SearchError(f"others={others!r}: expected 'refuse', 'keep' or 'remove'")
    if verify < 0:
        raise SearchError(f"verify={verify}: expected how many objects to encode again, 0 or more")


def _checked_payloads(payloads: Sequence[Mapping[str, Any]] | None, count: int) -> Sequence[Mapping[str, Any]]:
    """
    Raises:
        SearchError: there are not as many as objects, or one cannot be kept.
    """
    if payloads is None:
        return _Nothing(count)
    if len(payloads) != count:
        raise SearchError(f"{len(payloads):,} payloads for {count:,} objects: give one for each")
    for number, payload in enumerate(payloads):
        if not isinstance(payload, Mapping):
            raise SearchError(f"payload {number:,} is a {type(payload).__name__}: expected a dict")
        if NUMBER in payload:
            raise SearchError(
                f"payload {number:,} has {NUMBER!r}, which an index keeps its own number under: rename it"
            )
        try:
            json.dumps(dict(payload), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SearchError(f"payload {number:,} is nothing that JSON can hold: {error}") from error
    return payloads


class _Nothing(Sequence[Mapping[str, Any]]):
    """As many empty payloads as there are objects."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return {}


class SearchIndex:
    """The embeddings of objects, and the model that made them. `index` and `SearchIndex.load` make one.

    May be used by one thread at a time. The model may go on to be trained; then this index refuses to search with it.

    Attributes:
        report: what the last call to `index`, `update` or `add` did; None after `load`.
        name: of the collection.
        client: Qdrant's own client, for whatever else is to be asked of it.
    """

    def __init__(self, model: KnownModel, collection: Collection, key: Callable[[Any], Any]) -> None:
        self._model, self._collection, self._key = model, collection, key
        self._close = weakref.finalize(self, collection.close)
        self._verified = False
        """Whether some of what is there was encoded again."""
        self.report: IndexReport | None = None
        self.name = collection.name
        self.client = collection.client

    @classmethod
    def load(
        cls,
        model: Any,
        path: str | Path | None = None,
        *,
        url: str | None = None,
        api_key: str | None = None,
        name: str = "objects",
        batch_size: int = 32,
        key: Callable[[Any], Any] | None = None,
        identity: Any = None,
    ) -> SearchIndex:
        """Open an index that is there. Nothing is written, and nothing encoded but the first text, to compare.

        That the modules of the model are the same is seen. Its preprocessing is seen by that text; where objects are
        no texts, only as far as ``identity`` says it. To see it there too, give `index` the objects again.

        Args:
            model: the one that made it.
            path: its folder.
            url: or its server.
            api_key: of the server.
            name: of the collection.
            batch_size: objects that the model sees at once, in `add` and `search_all`.
            key: as it was given to `index`.
            identity: as it was given to `index`.

        Raises:
            OtherModelError: another model made it.
            MissingIndexError: there is no index of that name.
            IndexFolderError: the folder is something else, or in use.
            SearchServerError: the server cannot be reached.
        """
        place = Place(None if path is None else Path(path), url, api_key)
        if place.path is None and place.url is None:
            raise SearchError("an index in memory cannot be loaded: give the path or the url of one that was kept")
        if place.path is not None and not is_index(place.path):
            what = "holds no index" if place.path.exists() else "does not exist"
            raise IndexFolderError(f"{place.path} {what}: make one with index(model, objects, {str(path)!r})")
        made = cls(KnownModel(model, batch_size, identity), Collection(place, name), key or _itself)
        try:
            if not made._collection.exists:
                there = ", ".join(map(repr, made._collection.others())) or "none"
                raise MissingIndexError(f"{place} holds no index named {name!r}; what is there: {there}")
            made._check_model()
            made._verify_probe()
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Let go of the folder or the server. May be called again."""
        self._close()

    def __enter__(self) -> SearchIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SearchIndex({self._collection.name!r} in {self._collection.place}, made by {self._model.words})"

    def holds(self, objects: Sequence[Any]) -> list[bool]:
        """Of each object whether it is there, by its content. Nothing is encoded."""
        ids = [self._id(objects[number], f"objects[{number}]") for number in range(len(objects))]
        there = self._opened().payloads(list(dict.fromkeys(ids))) if self._collection.exists else {}
        return [each in there for each in ids]

    def __len__(self) -> int:
        """How many objects it holds."""
        return self._opened().count() if self._opened().exists else 0

    # -- search --------------------------------------------------------------------------------------------------------

    def search(self, query: Any, k: int = 10, *, exact: bool = False) -> list[Found]:
        """The objects nearest to a query, the nearest first.

        Args:
            query: an object, as the model takes them.
            k: how many; all that there are if there are fewer.
            exact: have a server compare with each embedding, where it would else search by its graph, which may miss
                some. The embedded mode always does.

        Raises:
            OtherModelError: the model has changed since the index was opened. A write that PyTorch does not count
                (``weight.data[0] = 1``) is seen within a second, or a hundred times what hashing takes.
            SearchError: ``k`` is less than 1, or the query's embedding holds NaN or no direction.
        """
        return self.search_all([query], k, exact=exact)[0]

    def search_all(self, queries: Sequence[Any], k: int = 10, *, exact: bool = False) -> list[list[Found]]:
        """For each query the objects nearest to it. See `search`."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SearchError(f"k={k!r}: expected how many objects to find, 1 or more")
        collection = self._opened()
        self._model.must_not_have_moved()
        found: list[list[Found]] = []
        for some in _parts(range(len(queries)), self._model.batch_size):
            vectors = self._model.encode([queries[n] for n in some], "query", some)
            self._must_fit(vectors)
            found += [_found(answer) for answer in collection.nearest(vectors, k, exact=exact)]
        return found

    # -- what it holds -------------------------------------------------------------------------------------------------

    def update(
        self,
        objects: Sequence[Any],
        payloads: Sequence[Mapping[str, Any]] | None = None,
        *,
        others: Others = "refuse",
        verify: int = VERIFIED,
    ) -> IndexReport:
        """What `index` does, with an index that is open: make it hold these objects, under their numbers in the list.

        Raises:
            OtherModelError: the model has changed, or its preprocessing has.
            OtherObjectsError: it holds objects that are not among these, and ``others`` is ``refuse``.
            SearchError: see `index`.
        """
        _check_options(others, verify)
        self._opened()
        self._model.must_be_the_same()
        items = _listed(objects)
        if not len(items):
            raise SearchError("there are no objects to index: give one or more")
        self.report = self._hold(items, _checked_payloads(payloads, len(items)), others, verify)
        return self.report

    def add(self, objects: Sequence[Any], payloads: Sequence[Mapping[str, Any]] | None = None) -> IndexReport:
        """Put more objects in; those that are there already stay as they are, number and payload included.

        New ones are numbered on from the highest number so far.

        Raises:
            OtherModelError: the model has changed.
            SearchError: see `index`.
        """
        collection = self._opened()
        self._model.must_be_the_same()
        items = _listed(objects)
        beside = _checked_payloads(payloads, len(items))
        first = self._ids(items)
        there = collection.payloads(list(first)) if collection.exists else {}
        verified = 0 if self._verified else self._verify(items, {each: first[each] for each in there}, VERIFIED)
        new = {each: number for each, number in first.items() if each not in there}
        offset = collection.next_number() if collection.exists else 0
        numbers = {number: offset + place for place, number in enumerate(new.values())}
        self._encode_all(items, beside, new, numbers)
        self.report = IndexReport(len(new), len(there), 0, len(items) - len(first), verified)
        return self.report

    def remove(self, objects: Iterable[Any]) -> int:
        """Take objects out, by their content. The others keep their numbers.

        Returns:
            How many were there.
        """
        collection = self._opened()
        ids = list(dict.fromkeys(self._id(obj, "object") for obj in objects))
        there = list(collection.payloads(ids)) if collection.exists else []
        collection.remove(there)
        return len(there)

    # -- putting in ----------------------------------------------------------------------------------------------------

    def _hold(self, items: Any, payloads: Sequence[Mapping[str, Any]], others: Others, verify: int) -> IndexReport:
        """Make the index hold these objects, under their numbers."""
        if not self._collection.exists or not self._collection.count():
            return self._hold_new(items, payloads)
        first = self._ids(items)
        there = self._collection.payloads(list(first))
        removed = self._settle_others(first, len(there), others)
        verified = self._verify(items, {each: first[each] for each in there}, verify)
        wanted = {each: {**payloads[first[each]], NUMBER: first[each]} for each in there}
        self._collection.put_payloads({each: said for each, said in wanted.items() if there[each] != said})
        new = {each: number for each, number in first.items() if each not in there}
        self._encode_all(items, payloads, new, {number: number for number in new.values()})
        return IndexReport(len(new), len(there), removed, len(items) - len(first), verified)

    def _hold_new(self, items: Any, payloads: Sequence[Mapping[str, Any]]) -> IndexReport:
        """As `_hold` of an empty index, which reads each object once only."""
        seen: set[str] = set()
        with progress("encoding", len(items)) as shown:
            for some in _parts(range(len(items)), self._model.batch_size):
                objects = {number: items[number] for number in some}
                new: dict[int, str] = {}
                for number, obj in objects.items():
                    each = self._id(obj, f"objects[{number}]")
                    if each not in seen:
                        seen.add(each)
                        new[number] = each
                self._put(new, [objects[number] for number in new], payloads, {number: number for number in new})
                shown.advance(len(some))
        return IndexReport(len(seen), 0, 0, len(items) - len(seen), 0)

    def _ids(self, items: Any) -> dict[str, int]:
        """Of each content, the first object that has it."""
        first: dict[str, int] = {}
        with progress("reading", len(items)) as shown:
            for number in range(len(items)):
                first.setdefault(self._id(items[number], f"objects[{number}]"), number)
                shown.advance()
        return first

    def _id(self, obj: Any, where: str) -> str:
        told = self._key(obj)
        # Whatever is a key already, such as a digest, is one.
        return id_of(told if isinstance(told, bytes) and len(told) == KEY_BYTES else key_of(told, where=where))

    def _settle_others(self, first: Mapping[str, int], known: int, others: Others) -> int:
        extra = self._collection.count() - known
        if not extra or others == "keep":
            return 0
        if others == "refuse":
            raise OtherObjectsError(
                f"the index {self._collection.place} holds {extra:,} object{'s' * (extra != 1)} that "
                f"{'are' if extra != 1 else 'is'} not among these {len(first):,}. To have these only, say "
                "others='remove'; to have all, others='keep', or SearchIndex.load(...).add(objects)",
                extra,
            )
        gone = [each for each in self._collection.ids() if each not in first]
        self._collection.remove(gone)
        return len(gone)

    def _verify(self, items: Any, there: Mapping[str, int], most: int) -> int:
        """Encode some that are there again.

        Raises:
            OtherModelError: they do not come out as they are kept.
        """
        ids = list(there)
        chosen = sorted({round(part * (len(ids) - 1)) for part in np.linspace(0, 1, min(most, len(ids)))})
        if not chosen:
            return 0
        self._verified = True
        numbers = {ids[place]: there[ids[place]] for place in chosen}
        self._compare({each: items[number] for each, number in numbers.items()}, list(numbers.values()))
        return len(numbers)

    def _verify_probe(self) -> None:
        """Encode the text again that an index of texts keeps for this.

        Raises:
            OtherModelError: it does not come out as it is kept.
        """
        probe = self._collection.about().get("probe")
        if probe is None:
            return
        each = self._id(probe, "the first text")
        if self._collection.payloads([each]):  # else it was removed since
            self._compare({each: probe}, [0])

    def _compare(self, objects: Mapping[str, Any], numbers: Sequence[int]) -> None:
        vectors = self._model.encode(list(objects.values()), "object", numbers)
        self._must_fit(vectors)
        kept = self._collection.vectors(list(objects))
        for each, number, vector in zip(objects, numbers, vectors, strict=True):
            alike = float(vector @ kept[each])  # both of length one
            if alike < ALIKE:
                raise OtherModelError(
                    f"object {number:,} comes out of the model otherwise than it is kept in {self._collection.place} "
                    f"(cosine similarity {alike:.4f}), though its modules are the same: its preprocessing is another, "
                    "a library was changed, or the model is not in eval mode. Make a new index in another folder"
                )

    def _encode_all(
        self, items: Any, payloads: Sequence[Mapping[str, Any]], new: Mapping[str, int], numbers: Mapping[int, int]
    ) -> None:
        ids = {number: each for each, number in new.items()}
        with progress("encoding", len(ids)) as shown:
            for some in _parts(list(ids), self._model.batch_size):
                self._put({number: ids[number] for number in some}, [items[n] for n in some], payloads, numbers)
                shown.advance(len(some))

    def _put(
        self,
        ids: Mapping[int, str],
        objects: Sequence[Any],
        payloads: Sequence[Mapping[str, Any]],
        numbers: Mapping[int, int],
    ) -> None:
        """Encode a batch and keep it.

        Args:
            ids: by the place of the object in the list.
            objects: in the same order.
            payloads: of all objects of the list.
            numbers: under which each is kept, by its place.
        """
        if not ids:
            return
        if self._collection.exists:
            vectors = self._model.encode(objects, "object", list(ids))
        else:
            vectors = self._model.encode_first(objects, "object", list(ids))
            self._collection.create(vectors.shape[1], self._about(objects[0]))
        self._must_fit(vectors)
        beside = [{**payloads[place], NUMBER: numbers[place]} for place in ids]
        self._collection.put(list(ids.values()), vectors, beside)

    # -- which model ---------------------------------------------------------------------------------------------------

    def _about(self, first: Any) -> dict[str, Any]:
        model = self._model
        probe = {"probe": first} if isinstance(first, str) and len(first) <= LONGEST_PROBE else {}
        return {
            "made_by": "torchrecycle",
            "format": FORMAT,
            "model": model.identity,
            "modules": model.modules,
            "weights": model.weights,
            "class": model.words,
            "written": sorted(map(list, model.written)),
            **probe,
        }

    def _check_model(self) -> None:
        """
        Raises:
            OtherModelError: another model made what is there.
            SearchError: it is none of ours.
        """
        if not self._collection.exists:
            return
        said, place = self._collection.about(), f"{self.name!r} in {self._collection.place}"
        if said.get("made_by") != "torchrecycle":
            raise SearchError(
                f"the collection {place} was not made here, so that nothing says which model its embeddings are of: "
                "give another name"
            )
        if said.get("format") != FORMAT:
            raise SearchError(f"the index {place} is of format {said.get('format')}, and {FORMAT} is known here")
        self._model = self._model.knowing([(module, attribute) for module, attribute in said["written"]])
        if said["model"] != self._model.identity:
            raise OtherModelError(
                f"the index {place} was made by another model, a {said['class']}: {self._how_other(said)}. Take the "
                "model that made it, or make a new index in another folder or under another name"
            )

    def _how_other(self, said: Mapping[str, Any]) -> str:
        if said["modules"] != self._model.modules:
            return f"this is a {self._model.words} of other classes or settings"
        if said["weights"] != self._model.weights:
            return "this one has other weights"
        return "what identity= says is another"

    def _must_fit(self, vectors: np.ndarray) -> None:
        dim = self._collection.dim() if self._collection.exists else None
        if dim != vectors.shape[1]:
            raise OtherModelError(
                f"the index {self._collection.place} holds "
                f"{'embeddings of ' + str(dim) + ' numbers' if dim else 'nothing that is compared by cosine'}, and the "
                f"model gives {vectors.shape[1]}"
            )

    def _opened(self) -> Collection:
        if not self._close.alive:
            raise SearchError("the index is closed: open it again with SearchIndex.load")
        return self._collection


def _found(answer: Sequence[tuple[float, dict[str, Any]]]) -> list[Found]:
    found = []
    for score, payload in answer:
        number = int(payload.pop(NUMBER))
        # Of float32 numbers, a cosine may come out as 1.00000003.
        found.append(Found(number, max(-1.0, min(1.0, float(score))), payload))
    # Those that are exactly as near come in no order of their own.
    return sorted(found, key=lambda one: (-one.score, one.number))


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]
