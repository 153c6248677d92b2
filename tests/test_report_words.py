"""What the report says of trainings: how long they really were, and of a user's own `fit` nothing that is not known."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

import report_samples as samples
from torchrecycle.report import html_of, notes, print_table
from torchrecycle.report.columns import epochs_run, metric_columns
from torchrecycle.report.compare import compare
from torchrecycle.report.markup import sentence
from torchrecycle.report.ran import ran_section
from torchrecycle.report.sheets import sheets_of, to_csv
from torchrecycle.sweep.results import EpochPoint, LevelResult, SweepResult


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def rows_of(page: str, caption: str) -> list[list[str]]:
    (table,) = re.findall(rf"<table><caption>{caption}.*?</table>", page)
    return [
        [words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in re.findall(r"<tr.*?</tr>", table)
    ]


# -- how many epochs ---------------------------------------------------------------------------------------------------


def searched(*ran: int, planned: int = 9) -> SweepResult:
    """At 50 %, rates were tried of which each was to have so many epochs, and really had some."""
    base = samples.images()
    half = base.of("50")
    tried = tuple(
        replace(
            trial,
            recipe=replace(trial.recipe, epochs=planned),
            curve=tuple(EpochPoint(at, 5.0 * at, 1.0, 0.8) for at in range(1, number + 1)),
        )
        for trial, number in zip(half.search, ran, strict=True)
    )
    return with_level(base, replace(half, search=tried))


def with_level(base: SweepResult, level: LevelResult) -> SweepResult:
    return replace(base, levels=tuple(level if one.level == level.level else one for one in base.levels))


def test_a_rate_that_was_left_early_is_shown_with_the_epochs_that_it_had():
    result = searched(1, 9, 3)
    page = ran_section(result, "x")
    rows = [row for row in rows_of(page, "Rates that were tried") if row[0] == "50 % recycled"]
    assert [row[3] for row in rows] == ["1 of 9", "9", "3 of 9"]
    assert [row[4] for row in rows] == ["5.00", "45.0", "15.0"]
    assert "12 trainings looked for a learning rate" in words(page)
    assert "2 of them ended early, since other rates did better by then." in words(page)
    table = list(csv.DictReader(io.StringIO(to_csv(sheets_of(result)[1]))))
    half = [row for row in table if row["level"] == "50" and row["purpose"] == "search"]
    assert [(row["epochs"], row["epochs_run"]) for row in half] == [("9", "1"), ("9", "9"), ("9", "3")]


def test_where_none_was_left_early_nothing_is_said_of_it():
    assert "ended early" not in words(ran_section(samples.images(), "x"))


def test_a_rate_that_diverged_is_said_to_and_has_no_quality():
    result = searched(9, 9, 9)
    half = result.of("50")
    lost = replace(half.search[2], curve=(EpochPoint(1, 5.0, math.nan, None),), quality={"R-precision": 0.0})
    page = ran_section(with_level(result, replace(half, search=(*half.search[:2], lost))), "x")
    (row,) = [row for row in rows_of(page, "Rates that were tried") if "diverged" in row]
    assert row[3] == "1 of 9"
    assert "0.000" not in row
    assert "1 of them diverged: the loss was no finite number any more." in words(page)
    assert "ended early" not in words(page)


def test_a_training_that_told_of_no_epochs_is_counted_by_how_often_it_read_its_data_or_not_at_all():
    (trial, *_) = samples.images().of("50").trials
    assert epochs_run(trial) == 4
    assert epochs_run(replace(trial, curve=(), untold_seconds=3.0, untold_epochs=2)) == 2
    assert epochs_run(replace(trial, curve=())) is None
    base = samples.images()
    untold = replace(base.of("50"), trials=(replace(trial, curve=()),))
    rows = rows_of(ran_section(with_level(base, untold), "x"), "What each level")
    assert [row[3] for row in rows if row[0] == "50 % recycled"] == ["of 4"]


# -- a user's own training ---------------------------------------------------------------------------------------------


def own(**changes: object) -> SweepResult:
    """Of a task whose `fit` is the user's own."""
    return samples.images(kind="objects", samples={}, untrained_found=(), **changes)


def test_of_a_users_own_fit_no_optimizer_is_claimed():
    result = own()
    console = Console(file=io.StringIO(), width=150)
    print_table(result, console=console)
    held = console.file
    assert isinstance(held, io.StringIO)
    page, printed = ran_section(result, "x"), held.getvalue()
    assert "AdamW" not in page + printed
    assert "  given to fit for 50 % recycled: 4 epochs, batch 64, rate 0.001" in printed
    assert "These are the recipes that the task's fit was given." in words(page)
    assert "AdamW" not in str(compare(result, own()).to_json())
    told = "\n".join(notes(samples.images()))
    assert "used for 50 % recycled: 4 epochs, batch 64, AdamW" in told
    assert "the task's fit" not in words(ran_section(samples.images(), "x"))


def test_of_a_users_own_figure_it_is_not_said_that_one_is_best():
    (column,) = metric_columns(own())
    assert column.meaning.endswith("with its standard error where it is known; more is better.")
    assert metric_columns(samples.images())[0].meaning.endswith("1 is best.")


def test_a_fit_that_stops_by_itself_is_no_rate_that_did_worse():
    result = searched(1, 9, 3)
    page = words(ran_section(replace(result, kind="objects"), "x"))
    assert "2 of them ended early, since other rates did better by then, or by their own fit ." in page


# -- the sentence ------------------------------------------------------------------------------------------------------


def test_the_cut_is_code_on_the_page_and_in_backticks_in_a_terminal():
    said = "Recycle 50 % (cut `trunk.blocks.2`): R-precision 0.936 ± 0.006."
    base = samples.images()
    result = replace(base, recommendation=replace(base.recommendation, sentence=said))
    assert "(cut <code>trunk.blocks.2</code>)" in html_of(result)
    assert "`" not in words(html_of(result))
    console = Console(file=io.StringIO(), width=150)
    print_table(result, console=console)
    held = console.file
    assert isinstance(held, io.StringIO)
    assert "(cut `trunk.blocks.2`)" in held.getvalue()


@pytest.mark.parametrize("cut", ["<script>", "a`b", "``", "&lt;"])
def test_whatever_stands_in_backticks_stays_text(cut):
    shown = sentence(f"cut `{cut}` of it")
    assert html.unescape(re.sub(r"</?(code|bdi)[^>]*>", "", shown)).replace("`", "") == f"cut {cut} of it".replace(
        "`", ""
    )
    assert "<script" not in shown
