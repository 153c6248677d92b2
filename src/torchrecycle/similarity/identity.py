"""A model as an index sees it: what it makes of objects, and what tells it from every other model.

An index of 20,000 photos is kept for months; the model that made it is trained further, loaded from another file, moved
to another machine. ``KnownModel(model).identity`` is the same 32 hexadecimal digits only while classes, settings and
the bytes of all weights are the same: the fingerprint of its modules, as kept rows have one.

What a call of ``encode`` itself leaves in a module (a counter, the last attention map) is no setting: the first batch
shows it, it is left out, and the index remembers its name. All else counts, names with an underscore included.
A weight or a buffer that ``encode`` changes is refused: the same object would come out otherwise each time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from torchrecycle.errors import CutError, RecycleError
from torchrecycle.fingerprint import Fingerprint, Watch, take_fingerprint
from torchrecycle.keys import key
from torchrecycle.similarity.collection import SearchError

__all__ = ["KnownModel", "OtherModelError"]

ROOT = "model"


class OtherModelError(SearchError):
    """The index was made by another model, or this one has changed since. Make a new index."""


class KnownModel:
    """A model and what tells it from others.

    Args:
        model: with ``encode(objects, batch_size=...)``, or a function from a list of objects to embeddings.
        batch_size: objects that it sees at once.
        given: what the user says of it, such as a version of its preprocessing; needed for what is no module.
        written: attributes that ``encode`` sets, as (module, attribute), as far as they are known.

    Raises:
        SearchError: it makes no embeddings, or nothing tells it from others.
    """

    def __init__(self, model: Any, batch_size: int, given: Any, written: Iterable[tuple[str, str]] = ()) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise SearchError(f"batch_size={batch_size!r}: expected 1 or more")
        self.model, self.batch_size, self.given = model, batch_size, given
        self.words = getattr(model, "__name__", None) or type(model).__name__
        self.written = frozenset(written)
        _must_encode(model)
        is_module = isinstance(model, nn.Module)
        if not is_module and given is None:
            raise SearchError(
                f"{self.words} is no torch.nn.Module, so that nothing tells it from another model: say what does, such "
                "as its name and version, with identity="
            )
        self._fingerprint = self._taken() if is_module else None
        self._watch = Watch({ROOT: model}, []) if is_module else None

    # -- which model ---------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Of modules and what was given, in hex."""
        return key((self.modules, self.weights, self.given), where="identity").hex()

    @property
    def modules(self) -> str:
        """Of classes and settings alone."""
        return self._part_of(tensors=False)

    @property
    def weights(self) -> str:
        """Of all tensors alone."""
        return self._part_of(tensors=True)

    def _part_of(self, *, tensors: bool) -> str:
        parts = self._fingerprint.parts if self._fingerprint is not None else {}
        chosen = [f"{name}={digest}" for name, digest in parts.items() if name.endswith(")") != tensors]
        return blake3("\n".join(chosen).encode()).hexdigest(length=16)

    def knowing(self, written: Sequence[tuple[str, str]]) -> KnownModel:
        """The same, where an index says what ``encode`` sets."""
        return self if self.written >= set(written) else KnownModel(self.model, self.batch_size, self.given, written)

    def encode_first(self, objects: Sequence[Any], what: str, numbers: Sequence[int]) -> np.ndarray:
        """As `encode`; what that sets in the modules is henceforth no part of what the model is.

        Raises:
            SearchError: it has changed a weight or a buffer, or see `encode`.
        """
        if self._fingerprint is None:
            return self.encode(objects, what, numbers)
        before = _attributes(self.model)
        rows = self.encode(objects, what, numbers)
        changed = self._fingerprint.difference(self._taken())
        if changed:
            tensors = {f"{ROOT}.{name}" for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
            moved = [name for name in changed if name in tensors]
            if moved:
                raise SearchError(
                    f"{self.words}.encode changes {moved[0].removeprefix(f'{ROOT}.')}, so that the same object comes "
                    "out otherwise each time: put the model in eval mode, model.eval()"
                )
            self.written |= _written(before, _attributes(self.model), changed)
            self._fingerprint = self._taken()
        return rows

    def _taken(self) -> Fingerprint:
        began = time.monotonic()
        self._seen = _attributes(self.model)
        try:
            return take_fingerprint({ROOT: self.model}, {}, [], {}, written=self.written)
        except CutError as error:
            raise SearchError(f"this {self.words} cannot be told from another: {error}") from error
        finally:
            self._looked_at = time.monotonic()
            self._took = self._looked_at - began

    def must_not_have_moved(self) -> None:
        """A look that costs next to nothing; and, in a hundredth of the time, at all bytes.

        Raises:
            OtherModelError: the weights or settings are no longer those of the index.
        """
        if self._watch is None:
            return
        due = time.monotonic() - self._looked_at > max(1.0, 100 * self._took)
        if due or self._watch.moved() or _replaced(self._seen, _attributes(self.model)) - self.written:
            self.must_be_the_same()

    def must_be_the_same(self) -> None:
        """All bytes are hashed.

        Raises:
            OtherModelError: classes, settings or weights are no longer those of the index.
        """
        if self._watch is None or self._fingerprint is None:
            return
        changed = self._fingerprint.difference(self._taken())
        if changed:
            more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
            raise OtherModelError(
                f"the model has changed since this index was opened ({changed[0].removeprefix(f'{ROOT}.')}{more}): "
                "what it gives now is not comparable with what is kept. Make a new index"
            )
        self._watch.renew()

    # -- what it makes of objects --------------------------------------------------------------------------------------

    def encode(self, objects: Sequence[Any], what: str, numbers: Sequence[int]) -> np.ndarray:
        """Embeddings ``[objects, dim]`` of length one, in float32.

        Args:
            objects: some.
            what: what they are, for messages.
            numbers: of each, for messages.

        Raises:
            SearchError: one of them is no embedding.
        """
        given = list(objects)
        out = self._given_by_the_model(given, what, numbers)
        rows = out.detach().float().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)
        if rows.ndim != 2 or len(rows) != len(given) or not rows.shape[1] or rows.dtype.kind not in "fiu":
            raise SearchError(
                f"{self.words} gives {list(rows.shape)} of {rows.dtype} for {len(given)} objects: expected one "
                f"embedding for each, [{len(given)}, dim]"
            )
        wide = rows.astype(np.float64)  # in which the square of no float32 is too large or too small
        lengths = np.sqrt((wide**2).sum(1))
        for number, length in zip(numbers, lengths, strict=True):
            if not np.isfinite(length):
                raise SearchError(f"the embedding of {what} {number:,} holds NaN or infinity: no search can find it")
            if length == 0:
                raise SearchError(f"the embedding of {what} {number:,} is all zeros, which is near to nothing")
        return (wide / lengths[:, None]).astype(np.float32)

    def _given_by_the_model(self, given: list[Any], what: str, numbers: Sequence[int]) -> Any:
        encode = getattr(self.model, "encode", None)
        try:
            return encode(given, batch_size=self.batch_size) if callable(encode) else self.model(given)
        except (RecycleError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a user's own code raises for an object that it does not take
            kinds = ", ".join(sorted({type(one).__name__ for one in given}))
            first = f" {numbers[0]:,}" if len(numbers) else ""
            raise SearchError(
                f"{self.words} cannot encode {what}{first} (of type {kinds}): {type(error).__name__}: {error}"
            ) from error


def _must_encode(model: Any) -> None:
    if callable(getattr(model, "encode", None)) or (callable(model) and not isinstance(model, nn.Module)):
        return
    raise SearchError(
        f"a {type(model).__name__} has no encode(objects, batch_size=...), by which objects become embeddings: give a "
        "SimilarityModel, or a function from a list of objects to a tensor"
    )


# -- what encode leaves behind -----------------------------------------------------------------------------------------


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules under the names that a fingerprint gives them."""
    return [(f"{ROOT}.{name}" if name else ROOT, module) for name, module in model.named_modules()]


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The attributes of all modules that are no part of every module."""
    usual = nn.Module().__dict__
    return {
        (name, attribute): value
        for name, module in _named(model)
        for attribute, value in module.__dict__.items()
        if attribute not in usual
    }


def _replaced(before: dict[tuple[str, str], Any], now: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    """Attributes that are another object than before."""
    return {where for where in (*before, *now) if before.get(where) is not now.get(where)}


def _written(
    before: dict[tuple[str, str], Any], now: dict[tuple[str, str], Any], changed: Sequence[str]
) -> set[tuple[str, str]]:
    """Attributes that were set in between, and, of modules that have changed, those that may have been written in
    place."""
    names = {part.rpartition(" (")[0] for part in changed}
    return _replaced(before, now) | {
        where
        for where, value in now.items()
        if where[0] in names and isinstance(value, (list, dict, set, torch.Tensor))
    }
