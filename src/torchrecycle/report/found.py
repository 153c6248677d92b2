"""What each level finds: a few objects of the test split with their nearest neighbours, before and after training.

A figure of 0.936 says little to who has not seen which emoji stands beside which. Right and wrong are told by a sign, a
word and the kind of border, and only then by colour. Of a level the first seed is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torchrecycle.report.levels import level_name
from torchrecycle.report.markup import slot, text
from torchrecycle.report.words import shortened
from torchrecycle.sweep.results import Found, Sample, SweepResult

__all__ = ["found_section"]

SHOWN = {"images": 4, "texts": 2, "pairs": 2, "objects": 2}
"""Objects that are open from the start; the others are unfolded."""
LETTERS = 120
"""Of a text, this many are shown; the whole of it is unfolded."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One object with what each model finds for it."""

    query: int
    answers: tuple[tuple[str, Found], ...]
    """(level, what it finds)."""


def found_section(result: SweepResult, ident: str) -> str:
    """Cards, one for each object; empty if a sweep kept none."""
    asked = _asked(result)
    if not asked:
        return ""
    cards = [_card(result, one, f"{ident}-found-{number}") for number, one in enumerate(asked, start=1)]
    shown, more = cards[: SHOWN[result.kind]], cards[SHOWN[result.kind] :]
    rest = f'<details><summary>{len(more)} more</summary><div class="cards">{"".join(more)}</div></details>'
    seed = f" Of trained levels, seed {result.seeds[0]} is shown." if len(result.seeds) > 1 else ""
    return (
        f'<section aria-labelledby="{ident}-found"><h3 id="{ident}-found">What it finds</h3>'
        f"<p>Objects of the test split, which no training saw, with what each model holds to be nearest, the nearest "
        f"first.{seed}</p>"
        f'<div class="cards">{"".join(shown)}</div>{rest if more else ""}</section>'
    )


def _asked(result: SweepResult) -> list[_Asked]:
    each: dict[int, list[tuple[str, Found]]] = {}
    for level, found in _all_found(result):
        for one in found:
            each.setdefault(one.query, []).append((level, one))
    return [_Asked(query, tuple(answers)) for query, answers in each.items()]


def _all_found(result: SweepResult) -> Iterator[tuple[str, tuple[Found, ...]]]:
    yield "untrained", result.untrained_found
    for one in result.levels:
        yield one.level, one.trials[0].found


def _card(result: SweepResult, asked: _Asked, ident: str) -> str:
    sample = _sample(result, asked.query)
    answers = "".join(_answer(result, level, found) for level, found in asked.answers)
    return (
        f'<article class="card" aria-labelledby="{ident}"><header class="asked">{_query(sample, ident)}</header>'
        f'<dl class="answers">{answers}</dl>{_in_full(result, asked)}</article>'
    )


def _sample(result: SweepResult, at: int) -> Sample:
    return result.samples.get(at, Sample(f"object {at}", ""))


def _query(sample: Sample, ident: str) -> str:
    if sample.picture:
        return (
            f'{_picture(sample)}<div><h4 id="{ident}">{slot(sample.title)}</h4>'
            f'<p class="soft">{slot(shortened(sample.text, 60))}</p></div>'
        )
    return (
        f'<div><p class="soft">{slot(sample.title)}</p>'
        f'<h4 id="{ident}" class="quoted">{slot(shortened(sample.text or sample.title, LETTERS))}</h4></div>'
    )


def _picture(sample: Sample) -> str:
    alt = text(f"{sample.title}: {shortened(sample.text, 80)}" if sample.text else sample.title)
    return (
        f'<img src="data:image/jpeg;base64,{text(sample.picture)}" alt="{alt}" width="96" height="96" decoding="async">'
    )


def _answer(result: SweepResult, level: str, found: Found) -> str:
    samples = [_sample(result, at) for at in found.nearest]
    kind = "pictures" if any(sample.picture for sample in samples) else "texts"
    items = "".join(
        _neighbour(sample, ok, result.kind != "pairs") for sample, ok in zip(samples, found.right, strict=True)
    )
    note = f'<p class="note">{slot(found.note)}</p>' if found.note else ""
    tiles = f'<ol class="{kind}">{items}</ol>' if items else ""
    name = f'{level_name(result, level)} <span class="soft">{_score(result, found)}</span>'
    return f"<div><dt>{name}</dt><dd>{tiles}{note}</dd></div>"


def _score(result: SweepResult, found: Found) -> str:
    """How many are right; of a pair, of which only one can be, where it stands."""
    if result.kind != "pairs":
        return f"{sum(found.right)} of {len(found.right)} right"
    return f"right in place {found.right.index(True) + 1}" if any(found.right) else "the right one is not among these"


def _neighbour(sample: Sample, is_right: bool, is_named: bool) -> str:
    word = "right" if is_right else "wrong"
    sign = f'<span class="sign" aria-hidden="true">{"✓" if is_right else "✗"}</span> {word}'
    if sample.picture:
        return (
            f'<li class="{word}">{_picture(sample)}<span class="is">{sign}</span>'
            f'<span class="class">{slot(shortened(sample.title, 40))}</span></li>'
        )
    said = slot(shortened(sample.text or sample.title, LETTERS))
    title = f"{slot(shortened(sample.title, 40))}: " if is_named and sample.text and sample.title else ""
    return f'<li class="{word}"><span class="is">{sign}</span> <span class="said">{title}{said}</span></li>'


def _in_full(result: SweepResult, asked: _Asked) -> str:
    """The texts of a card that were shortened, each once."""
    numbers = dict.fromkeys([asked.query, *(at for _, found in asked.answers for at in found.nearest)])
    samples = [_sample(result, at) for at in numbers]
    long = [one.text for one in samples if not one.picture and shortened(one.text, LETTERS).endswith("…")]
    if not long:
        return ""
    items = "".join(f"<li>{slot(one)}</li>" for one in long)
    return f'<details class="whole"><summary>Long texts in full</summary><ol>{items}</ol></details>'
