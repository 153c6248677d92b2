"""Why one fingerprint is not another: what was changed between the run that filled and the run that missed.

A user comes back after a month, and instead of hits the prefix runs for every image. There are two fingerprints now;
`diff` says in what they differ: *`layer1.0.conv1.weight` differs* (another checkpoint), *`bn1` (BatchNorm2d): eps is
1e-05 against 0.001* (another variant of the model), *precision: bfloat16 against float32*.

``about.json`` holds the digest of each part of a fingerprint, and of modules and settings the words. One that was
written before these were kept is compared by what it has, and the difference says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrecycle.store.container import code_of
from torchrecycle.store.contract import LeafSpec
from torchrecycle.store.holdings import precision_of

__all__ = ["Difference", "Side", "difference_of"]

SHOWN = 20
"""How many lines are printed before the rest is counted."""

_FIELDS = ("model", "cut", "autocast", "key inputs")
_DIGITS = 16
"""Of digests, since some are kept shortened."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared."""

    fingerprint: str
    about: Mapping[str, Any]
    leaves: Sequence[LeafSpec]


@dataclass(frozen=True, slots=True)
class Difference:
    """In what two fingerprints differ."""

    a: str
    b: str
    lines: tuple[str, ...]
    """One thing each, in words: a's value before b's."""
    incomplete: str = ""
    """Why there may be more than `lines` say; empty if there cannot."""

    def __str__(self) -> str:
        if self.a == self.b:
            return f"{self.a} is one and the same fingerprint"
        shown = list(self.lines[:SHOWN])
        more = len(self.lines) - len(shown)
        shown += [f"and {more} more"] if more else []
        shown += [] if self.lines else ["nothing that about.json tells differs"]
        shown += [self.incomplete] if self.incomplete else []
        return "\n".join([f"{self.a} against {self.b}:", *(f"  {line}" for line in shown)])


def difference_of(a: Side, b: Side) -> Difference:
    """Compare what two ``about.json`` say."""
    lines = [
        f"{field}: {_plain(a.about.get(field))} against {_plain(b.about.get(field))}"
        for field in _FIELDS
        if a.about.get(field) != b.about.get(field)
    ]
    precisions = [precision_of(side.about, side.leaves) for side in (a, b)]
    lines += [f"precision: {' against '.join(precisions)}"] if precisions[0] != precisions[1] else []
    if list(a.leaves) != list(b.leaves):
        lines.append(f"kept leaves: {_form(a.leaves)} against {_form(b.leaves)}")
    without = [side.fingerprint for side in (a, b) if not _mapping(side.about, "parts")]
    if without:
        incomplete = f"{' and '.join(without)} does not say of which parts it is made, so weights cannot be compared"
        return Difference(a.fingerprint, b.fingerprint, tuple(lines), incomplete)
    lines += _part_lines(a, b)
    incomplete = "" if lines or a.fingerprint == b.fingerprint else _OTHER_RECIPE
    return Difference(a.fingerprint, b.fingerprint, tuple(lines), incomplete)


_OTHER_RECIPE = "they may be of different versions of torchrecycle's recipe, or one of them is no fingerprint of it"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "not said" if value is None else str(value)


def _form(leaves: Iterable[LeafSpec]) -> str:
    return ", ".join(f"{code_of(spec.dtype)} {['*'] * spec.ragged + list(spec.shape)}" for spec in leaves)


def _mapping(about: Mapping[str, Any], field: str) -> Mapping[str, str]:
    found = about.get(field)
    # It was written by anybody who may write to the store.
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _part_lines(a: Side, b: Side) -> Iterator[str]:
    parts, others = _mapping(a.about, "parts"), _mapping(b.about, "parts")
    words, other_words = _mapping(a.about, "words"), _mapping(b.about, "words")
    for name in parts:
        if name in others and parts[name][:_DIGITS] != others[name][:_DIGITS]:
            yield from _part_line(name, words.get(name), other_words.get(name), _said(a, b))
    for here, there, side in ((parts, others, a), (others, parts, b)):
        alone = [name for name in here if name not in there]
        if alone:
            some = ", ".join(f"`{name}`" for name in alone[:3]) + (f" and {len(alone) - 3} more" * (len(alone) > 3))
            yield f"only in {side.fingerprint}: {some}"


def _said(a: Side, b: Side) -> frozenset[str]:
    """Settings of which a line speaks already, or that follow from one that does."""
    found = {"cut", "precision", "autocast", "inputs"}
    # What int8 is multiplied by is the precision's own, and no words for people.
    found |= {"leaves", "scales"} if list(a.leaves) != list(b.leaves) else set()
    found |= {"steps"} if a.about.get("cut") != b.about.get("cut") else set()
    return frozenset(found)


def _part_line(name: str, words: str | None, others: str | None, said: frozenset[str]) -> Iterator[str]:
    """What differs in one part: a tensor, a module's class and settings, or the settings of all."""
    if words is None or others is None:
        yield f"`{name}` differs"
        return
    here, there = _named(words), _named(others)
    names = [*here, *(setting for setting in there if setting not in here)]
    of_all = name == "settings"
    changed = [setting for setting in names if here.get(setting) != there.get(setting)]
    for setting in changed:
        if not of_all or setting not in said:
            place = "setting" if of_all else f"{_quoted(name)}:"
            yield f"{place} {setting} is {here.get(setting, 'not there')} against {there.get(setting, 'not there')}"
    if not changed:
        rest = [(x, y) for x, y in zip(words.split("; "), others.split("; "), strict=False) if x != y]
        what = f": {rest[0][0]} against {rest[0][1]}" if rest else " differs in something that was shortened"
        yield f"{_quoted(name)}{what}"


def _quoted(name: str) -> str:
    """
    >>> _quoted("layer1.0.bn1 (BatchNorm2d)")
    '`layer1.0.bn1` (BatchNorm2d)'
    """
    module, space, kind = name.rpartition(" (")
    return f"`{module}` ({kind}" if space else f"`{name}`"


def _named(words: str) -> dict[str, str]:
    """
    >>> _named("torch.nn.LayerNorm; (384,), eps=1e-12, elementwise_affine=True; eps=1e-12; normalized_shape=(384,)")
    {'eps': '1e-12', 'normalized_shape': '(384,)'}
    """
    pairs = (word.partition("=") for word in words.split("; "))
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}
