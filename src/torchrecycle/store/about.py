"""``about.json``: what a fingerprint covers, in words; the form of its rows; the version of the format.

It is for people first: whoever finds 40 GB under a hash of 32 letters reads here which model and which cut
they are of. It is written before the first segment and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import blake3
import numpy as np

from torchrecycle.errors import StoreError
from torchrecycle.store.container import DTYPES, Packed, code_of, refuse_newer
from torchrecycle.store.contract import FORMAT_VERSION, LeafSpec
from torchrecycle.store.shelf import Shelf

ABOUT = "about.json"


def write_about(shelf: Shelf, leaves: Sequence[LeafSpec], about: Mapping[str, Any]) -> None:
    """Write the file, unless there is one."""
    if shelf.read(ABOUT) is None:
        text = {"format": FORMAT_VERSION, "leaves": [_spec_to_json(spec) for spec in leaves], "about": about}
        text |= {"fingerprint": shelf.owner}
        text["blake3"] = _digest(text)
        data = np.frombuffer((json.dumps(text, indent=2, ensure_ascii=False) + "\n").encode(), dtype=np.uint8)
        shelf.write(ABOUT, Packed(len(data), [data]), keep=True)


def read_about(shelf: Shelf, leaves: Sequence[LeafSpec]) -> dict[str, Any] | None:
    """What the file says about the fingerprint, or None if there is none.

    Raises:
        StoreError: It is not readable, of a newer format, or its rows are not of this form.
    """
    found = read_form(shelf)
    if found is None:
        return None
    about, kept = found
    if kept != list(leaves):
        raise StoreError(
            f"{shelf.url}/{ABOUT}: the rows kept there are {_words(kept)}, and {_words(leaves)} are asked for"
        )
    return about


def read_form(shelf: Shelf) -> tuple[dict[str, Any], list[LeafSpec]] | None:
    """What the file says about the fingerprint, and the form of its rows; None if there is none.

    Raises:
        StoreError: It is not readable, or of a newer format.
    """
    file = f"{shelf.url}/{ABOUT}"
    data = shelf.read(ABOUT)
    if data is None:
        return None
    try:
        found = json.loads(data.numpy().tobytes().decode())
        version, about = found["format"], found["about"]
        if type(version) is not int or version < 1 or not isinstance(about, dict):
            raise ValueError("format or about is of no known form")
        refuse_newer(version, file)
        # Format 1 had no checksum.
        if version > 1 and found.pop("blake3") != _digest(found):
            raise ValueError("it does not match its checksum")
        if version > 1 and found["fingerprint"] != shelf.owner:
            raise StoreError(
                f"{file} belongs to {found['fingerprint']!r}: the folder has another name than it was given. Give it "
                "that name back, or delete it"
            )
        kept = [_spec_from_json(spec) for spec in found["leaves"]]
    except StoreError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else error
        raise StoreError(
            f"{file} is not readable ({why}): restore it, or delete that folder, whose rows are then computed again"
        ) from None
    return about, kept


def need_form(shelf: Shelf) -> tuple[dict[str, Any], list[LeafSpec]]:
    """What the file says about the fingerprint, and the form of its rows.

    Raises:
        StoreError: There is no such file, it is not readable, or of a newer format.
    """
    found = read_form(shelf)
    if found is None:
        raise StoreError(
            f"{shelf.url} holds no rows that can be read, since it has no {ABOUT}: filling writes that anew, and "
            "`torchrecycle store rm` removes what is there"
        )
    return found


def _digest(text: Mapping[str, Any]) -> str:
    """128 bits of BLAKE3 of all that the file says, as 32 letters."""
    canonical = json.dumps(text, sort_keys=True, separators=(",", ":"))
    return blake3.blake3(canonical.encode()).hexdigest(length=16)


def _spec_to_json(spec: LeafSpec) -> dict[str, Any]:
    return {"shape": list(spec.shape), "ragged": spec.ragged, "dtype": code_of(spec.dtype)}


def _spec_from_json(found: Any) -> LeafSpec:
    shape, ragged, dtype = found["shape"], found["ragged"], DTYPES[found["dtype"]]
    if type(ragged) is not bool or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise ValueError(f"no form of a leaf: {found}")
    return LeafSpec(tuple(shape), ragged, dtype)


def _words(leaves: Sequence[LeafSpec]) -> str:
    return ", ".join(f"{code_of(spec.dtype)} {['*'] * spec.ragged + list(spec.shape)}" for spec in leaves)
