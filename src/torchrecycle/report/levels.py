"""The table of levels as HTML, with the recommended row marked in words, and what each column means."""

from __future__ import annotations

from torchrecycle.report.colours import marks_of, swatch
from torchrecycle.report.columns import (
    EXPECTED,
    EXPECTED_WORDS,
    Column,
    cost_columns,
    expects_full,
    metric_columns,
    recommended,
)
from torchrecycle.report.markup import definitions, scrolling, slot, text
from torchrecycle.report.words import percent
from torchrecycle.sweep.recommend import ENOUGH, ENOUGH_WITHIN_NOISE
from torchrecycle.sweep.results import LevelResult, SweepResult, in_words

__all__ = ["columns_explained", "level_name", "levels_table"]


def levels_table(result: SweepResult) -> str:
    """Levels as rows, the pretrained model as it comes first."""
    columns = [*metric_columns(result), *cost_columns(result)]
    names = ["level", "cut", *(column.name for column in columns), "verdict"]
    head = "".join(f'<th scope="col"{_left(name)}>{_unit(text(name))}</th>' for name in names)
    rows = _untrained_row(result, columns) + _expected_row(result, columns)
    rows += "".join(_level_row(result, one, columns) for one in result.levels)
    caption = f"Levels of recycling: {result.title}"
    table = (
        f'<table class="levels"><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )
    return scrolling(table, caption)


def _left(name: str) -> str:
    return ' class="words"' if name in ("level", "cut", "verdict") else ""


def _unit(name: str) -> str:
    """``fill s`` in one line."""
    return f"{name[:-2]}\u00a0s" if name.endswith(" s") else name


def _untrained_row(result: SweepResult, columns: list[Column]) -> str:
    cells = "".join(f"<td>{text(column.untrained(result))}</td>" for column in columns)
    about = "the pretrained model as it comes" if not result.ran.random_weights else "random weights as they come"
    return _tr(result, "untrained", '<td class="words"></td>', cells, about)


def _expected_row(result: SweepResult, columns: list[Column]) -> str:
    """Full training where it was not run: what is expected of it, and that it is no more than that."""
    if not expects_full(result):
        return ""
    cells = "".join(f"<td>{text(column.expected(result))}</td>" for column in columns)
    name = f'{level_name(result, "full")} <em class="tag">expected</em>'
    return (
        f'<tr class="expected"><th scope="row">{name}</th><td class="words"></td>{cells}'
        f'<td class="words verdict">{EXPECTED_WORDS}</td></tr>'
    )


def _level_row(result: SweepResult, one: LevelResult, columns: list[Column]) -> str:
    cut = (
        f"<code>{slot(one.cut).replace('.', '.<wbr>')}</code> <small>{percent(one.share)} of the blocks</small>"
        if one.cut
        else ""
    )
    cells = "".join(f"<td>{text(column.cell(result, one))}</td>" for column in columns)
    verdict = result.recommendation.verdicts.get(one.level, "")
    return _tr(result, one.level, f'<td class="words">{cut}</td>', cells, verdict)


def _tr(result: SweepResult, level: str, cut: str, cells: str, verdict: str) -> str:
    taken = level == recommended(result)
    tag = ' <strong class="tag">recommended</strong>' if taken else ""
    name = f'<th scope="row">{level_name(result, level)}{tag}</th>'
    row = ' class="taken"' if taken else ""
    return f'<tr{row}>{name}{cut}{cells}<td class="words verdict">{slot(verdict)}</td></tr>'


def level_name(result: SweepResult, level: str) -> str:
    """The mark and the name of a level."""
    words = "untrained" if level == "untrained" else in_words(level)
    return f'<span class="level">{swatch(marks_of(result)[level])}{text(words)}</span>'


def columns_explained(result: SweepResult) -> str:
    """What each column means, to be unfolded; on paper it is."""
    first = [
        (
            "level",
            "How much of the network is recycled: these layers are frozen, computed once for each object, and kept. "
            "Only what comes after them is trained.",
        ),
        ("cut", "The module whose output is kept, and the share of the network's blocks that end there."),
    ]
    shown = [(column.name, text(column.meaning)) for column in (*metric_columns(result), *cost_columns(result))]
    last = [
        (
            "verdict",
            "The gain is how far the best level is above the untrained model. A level is good enough if it keeps "
            f"{percent(ENOUGH)} of it, or {percent(ENOUGH_WITHIN_NOISE)} where what it loses may be chance; of those "
            "the one that takes least time, filling counted in, is recommended.",
        )
    ]
    if expects_full(result):
        last.append((EXPECTED.strip(), "Before a figure that was not measured, but is expected."))
    return (
        '<details class="legend"><summary>What the columns mean</summary>'
        f"{definitions([*first, *shown, *last], 'meanings')}</details>"
    )
