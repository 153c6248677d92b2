"""Two sweeps side by side: what is told of their difference, and above all when none is told."""

from __future__ import annotations

import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

import report_samples as samples
from test_report_page import CONTRASTS, OVERFLOW, READY, SIZES, browser, opened  # noqa: F401  (a fixture)
from test_report_reading import saved, write
from torchrecycle.cli import app
from torchrecycle.report.compare import Comparison, compare
from torchrecycle.report.compare_page import html_of_comparison, is_comparison, write_comparison
from torchrecycle.report.compare_table import compared_tables, print_comparison
from torchrecycle.report.dots import Line, dots
from torchrecycle.sweep.results import Estimate, Recommendation, SweepResult

in_a_browser = pytest.mark.skipif(not READY, reason="no Chromium, or no Playwright")
runner = CliRunner()
METRIC = "R-precision"
A = samples.images()


def changed(by: dict[str, float] | None = None, *, slower: float = 1.0, **ran: Any) -> SweepResult:
    """The sweep of A with another loss: at some levels the quality is another, and it takes longer."""
    by = {"50": 0.021, "75": -0.03} if by is None else by
    levels = []
    for one in A.levels:
        quality = {name: Estimate(it.mean + by.get(one.level, 0.0), it.error) for name, it in one.quality.items()}
        trials = tuple(
            replace(t, curve=tuple(replace(at, seconds=slower * at.seconds) for at in t.curve)) for t in one.trials
        )
        levels.append(replace(one, quality=quality, trials=trials))
    return replace(A, levels=tuple(levels), ran=samples.ran(**{"loss": "ArcFace", **ran}))


def of(comparison: Comparison, level: str) -> Any:
    return next(pair for pair in comparison.pairs if pair.level == level)


def printed(comparison: Comparison, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_comparison(comparison, console=console)
    held = console.file
    assert isinstance(held, io.StringIO)
    return held.getvalue()


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_difference_at_a_level_is_b_less_a_with_the_error_of_both():
    by = compare(A, changed()).pairs[1].difference(METRIC)
    assert by is not None
    assert by.mean == pytest.approx(0.021)
    assert by.error == pytest.approx(math.sqrt(2) * 0.0056)


def test_the_sentence_names_the_levels_at_which_more_than_chance_is_between_them():
    assert compare(A, changed()).sentence == (
        "R-precision of B is higher at 50 % recycled (+0.021 ± 0.008) and lower at 75 % recycled (−0.030 ± 0.009) than "
        "that of A; elsewhere it differs by no more than chance explains."
    )
    small = compare(A, changed({"50": 0.010})).sentence
    assert "by no more than chance explains" in small
    assert "50 % recycled (+0.010 ± 0.008)" in small


def test_where_an_error_is_not_known_nothing_is_held_to_be_more_than_chance():
    exact = samples.with_zero_errors()
    comparison = compare(exact, replace(changed({"50": 0.3}), untrained=exact.untrained))
    by = comparison.difference(of(comparison, "50"), METRIC)
    assert by is not None
    assert (by.mean, by.error) == (pytest.approx(0.3), 0.0)
    assert "no more than chance" in comparison.sentence


def test_what_differs_is_told_and_what_does_not_is_not():
    b = changed(settings={**A.ran.settings, "head": "two layers"}, versions={**A.ran.versions, "timm": "1.0.20"})
    told = {one.what: (one.a, one.b) for one in compare(A, b).differences}
    assert told == {
        "loss": ("softmax over cosines to one learned vector per training class", "ArcFace"),
        "head": ("", "two layers"),
        "version of timm": ("1.0.15", "1.0.20"),
    }


def test_another_recipe_or_cut_at_a_level_is_told():
    half = A.of("50")
    recipe = replace(half.trials[0].recipe, epochs=9)
    other = replace(half, cut="trunk.blocks.3", trials=tuple(replace(t, recipe=recipe) for t in half.trials))
    b = replace(A, levels=tuple(other if one.level == "50" else one for one in A.levels))
    told = {one.what: one.b for one in compare(A, b).differences}
    assert told["cut of 50 % recycled"] == "trunk.blocks.3"
    assert told["training of 50 % recycled"].startswith("9 epochs, batch 64")
    assert len(told) == 2


def test_levels_of_either_stand_in_order_and_a_level_of_one_has_no_difference():
    quarter = replace(A.of("50"), level="25")
    b = replace(A, levels=(quarter, A.of("75"), A.of("head")))
    comparison = compare(A, b)
    assert [pair.level for pair in comparison.pairs] == ["full", "25", "50", "75", "head"]
    assert [comparison.difference(pair, METRIC) is None for pair in comparison.pairs] == [
        True,
        True,
        True,
        False,
        False,
    ]
    only = replace(A, levels=(A.of("full"),), recommendation=Recommendation("full", "Take it.", {}))
    assert compare(only, b).sentence == "A and B have no level in common: each stands for itself."


def test_the_same_results_twice_are_said_to_be_the_same():
    assert compare(A, samples.images()).warnings == ("A and B are the same results.",)
    assert compare(A, changed()).warnings == ()


# -- when the figures say nothing about each other ---------------------------------------------------------------------


def test_the_pretrained_model_gives_away_that_the_test_objects_are_others():
    b = replace(changed(), untrained={METRIC: Estimate(0.7102, 0.0098)})
    comparison = compare(A, b)
    assert comparison.is_same_test is False
    assert comparison.warnings[0].startswith(
        "Not the same test objects: the same pretrained model, with the same settings, has R-precision 0.7389 in A and "
        "0.7102 in B."
    )
    assert comparison.sentence == "A and B cannot be compared: each stands for itself."
    assert all(comparison.difference(pair, METRIC) is None for pair in comparison.pairs)
    assert {level["quality"][METRIC]["difference"] for level in comparison.to_json()["levels"]} == {None}
    assert "less A" not in printed(comparison)
    assert "less A" not in html_of_comparison(comparison, names=("a", "b"))


def test_a_figure_that_is_no_number_proves_nothing():
    unknown = {METRIC: Estimate(math.nan, 0.0098)}
    comparison = compare(replace(A, untrained=unknown), replace(changed(data="photos/"), untrained=unknown))
    assert comparison.is_same_test is None


def test_a_hair_apart_is_told_but_is_another_machine_or_precision_and_not_another_split():
    b = replace(changed(), untrained={METRIC: Estimate(0.73903, 0.0098)})
    comparison = compare(A, b)
    assert comparison.is_same_test is True
    assert comparison.warnings[0].startswith("The same pretrained model has R-precision 0.7389 in A and 0.7390 in B.")


def test_the_pretrained_model_proves_that_the_objects_are_the_same_though_they_are_called_otherwise():
    comparison = compare(A, changed(data="photos.tar, 1,794 pictures of 317 classes"))
    assert comparison.is_same_test is True
    assert comparison.warnings == ()


@pytest.mark.parametrize(
    ("b", "words"),
    [
        (changed(splits={**A.ran.splits, "test": 1000}), "A was tested on 894 objects, B on 1,000 objects"),
        (replace(changed(), kind="texts"), "A is of images, B of texts"),
        (changed(settings={**A.ran.settings, "split seed": "1"}), "the split seed is 0 in A and 1 in B"),
    ],
)
def test_another_task_or_split_is_said_loudly_and_no_difference_is_told(b, words):
    b = replace(b, untrained={METRIC: Estimate(0.5, 0.01)})
    comparison = compare(A, b)
    assert comparison.is_same_test is False
    assert words in comparison.warnings[0]
    assert printed(comparison).rstrip().endswith("A and B cannot be compared: each stands for itself.")


def test_part_of_the_training_objects_is_another_experiment_on_the_same_test_objects():
    splits = {**A.ran.splits, "train": 180}
    b = changed(splits=splits, settings={**A.ran.settings, "part of the training split": "25%"})
    comparison = compare(A, b)
    assert comparison.is_same_test is True
    assert "objects to train on" in {one.what for one in comparison.differences}


def test_another_model_of_the_same_data_is_compared_and_so_are_the_pretrained_ones():
    b = replace(changed(model="timm/resnet18"), untrained={METRIC: Estimate(0.60, 0.01)})
    comparison = compare(A, b)
    assert comparison.is_same_test is True
    by = comparison.untrained_difference(METRIC)
    assert by is not None
    assert (by.mean, by.error) == (pytest.approx(-0.13893), pytest.approx(math.hypot(0.0098, 0.01)))
    assert comparison.warnings[0].startswith("That both were tested on the same objects is taken from the data's name")
    assert compare(A, changed()).untrained_difference(METRIC) is None


def test_rows_of_another_precision_may_score_otherwise_and_are_no_other_split():
    def kept(precision: str | None, untrained: float) -> SweepResult:
        levels = tuple(replace(one, predicted=samples.prediction(one, precision=precision)) for one in A.levels)
        return replace(A, levels=levels, untrained={METRIC: Estimate(untrained, 0.0098)})

    assert compare(kept(None, 0.739), kept("int8", 0.735)).is_same_test is True
    assert compare(kept(None, 0.739), kept(None, 0.735)).is_same_test is False


def test_of_another_model_on_data_of_another_name_it_cannot_be_told():
    b = replace(changed(model="timm/resnet18", data="photos/"), untrained={METRIC: Estimate(0.60, 0.01)})
    comparison = compare(A, b)
    assert comparison.is_same_test is None
    assert comparison.warnings[0].startswith("It cannot be told whether both were tested on the same objects")
    assert comparison.difference(of(comparison, "50"), METRIC) is not None


def test_no_metric_in_common_leaves_costs_alone():
    comparison = compare(A, samples.pairs())
    assert comparison.metrics == ()
    assert comparison.is_same_test is False
    assert "No metric in common: A has R-precision, B has reciprocal rank, precision@1." in comparison.warnings
    assert "MB kept" in printed(comparison)
    assert 'svg class="plot' not in html_of_comparison(comparison, names=("a", "b"))


def test_another_main_metric_is_said_and_what_both_have_is_compared():
    base = samples.pairs()
    b = replace(base, metric="precision@1", ran=samples.ran(model="all-MiniLM-L6-v2", data=base.ran.data, settings={}))
    comparison = compare(base, b)
    assert comparison.metrics == ("reciprocal rank", "precision@1")
    assert (
        "A goes by reciprocal rank and B by precision@1; what is shown first is reciprocal rank." in comparison.warnings
    )


def test_seconds_of_another_machine_are_not_compared():
    here, there = compare(A, changed(slower=2.0)), compare(A, changed(slower=2.0, machine="Xeon, 8 threads"))
    assert "quicker" in printed(here)
    assert "0.6×" in printed(here)
    assert "quicker" not in printed(there)
    assert there.warnings == ("Not the same machine or torch: seconds of one say nothing about those of the other.",)


def test_random_weights_are_said_loudly():
    warnings = compare(A, samples.with_random_weights()).warnings
    assert "The weights of B are random: its figures say nothing about a pretrained model." in warnings


# -- in a terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [150, 100, 75, 60, 40])
def test_no_figure_is_cut_off_however_narrow_the_terminal(width):
    for b in (changed(), samples.expecting_full(), samples.two_levels()):
        shown = printed(compare(A, b), width)
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        words = " ".join(shown.split())
        for one in b.levels:
            assert f"{one.quality[METRIC].mean:.3f} ± {one.quality[METRIC].error:.3f}" in words


def test_full_training_that_was_not_run_is_shown_as_expected_and_not_subtracted():
    comparison = compare(A, samples.expecting_full())
    row = next(line for line in printed(comparison).splitlines() if line.startswith(" full training"))
    assert "≈ 0.921 ± 0.012" in row
    assert "≈ 60.5" in row
    assert "+" not in row
    assert "−" not in row
    both = compare(samples.expecting_full(), samples.expecting_full())
    assert printed(both).count("≈ 0.921 ± 0.012") == 2


def test_a_wide_terminal_gets_one_table_and_a_narrow_one_two():
    comparison = compare(A, changed())
    assert [len(table.columns) for table in compared_tables(comparison, 150)] == [11]
    assert [len(table.columns) for table in compared_tables(comparison, 100)] == [4, 8]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, result in {"a": A, "b": changed(), "hostile": samples.hostile()}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "results.json", saved(result))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_the_table_and_writes_the_page(folders):
    done = runner.invoke(app, ["report", "compare", "a", "b/results.json", "--out", "deep/page.html"])
    assert done.exit_code == 0, done.output
    assert "+0.021 ± 0.008" in done.output
    assert done.output.rstrip().endswith("The page: deep/page.html")
    assert is_comparison(folders / "deep" / "page.html")
    assert runner.invoke(app, ["report", "compare", "a", "b", "--out", "deep/page.html"]).exit_code == 0


def test_json_is_one_object_with_every_figure(folders):
    done = runner.invoke(app, ["report", "compare", "a", "b", "--json", "--out", "page.html"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["a"] == {"from": "a"}
    assert report["same_test_objects"] is True
    assert [level["level"] for level in report["levels"]] == ["full", "50", "75", "head"]
    half = report["levels"][1]
    assert half["quality"][METRIC]["difference"] == pytest.approx(0.021)
    assert half["a"]["bytes_kept"] == A.of("50").bytes_kept
    assert half["b"]["total_seconds"] == pytest.approx(A.of("50").total_seconds)
    assert report["differences"] == [
        {"what": "loss", "a": "softmax over cosines to one learned vector per training class", "b": "ArcFace"}
    ]
    assert "The page: page.html" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "nowhere"], "there is no nowhere: give the folder that torchrecycle sweep wrote to"),
        (["a", "."], "holds no results.json"),
        (["a", "broken.json"], "broken.json is no JSON"),
        (["a", "b", "--out", "page.pdf"], "does not end in .html"),
        (["a", "b", "--out", "a"], "--out a is a folder"),
        (["a", "b", "--out", "other.html"], "other.html is there and is no page of a comparison"),
        (["a"], "missing argument 'B'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, arguments, words):
    (folders / "broken.json").write_text('{"levels":')
    (folders / "other.html").write_text("<p>mine</p>")
    done = runner.invoke(app, ["report", "compare", *arguments])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert (folders / "other.html").read_text() == "<p>mine</p>"


def test_control_characters_of_a_file_do_not_reach_the_terminal(folders):
    wild = saved(A)
    for level, name in zip(wild["levels"], ("full", "\x1b[2J50", "75", "head"), strict=True):
        level["level"] = name
        level["cut"] = "a\x1b[31mb"
    wild["ran"]["loss"] = "a\x1b]0;title\x07"
    write(folders / "b" / "results.json", wild)
    done = runner.invoke(app, ["report", "compare", "a", "b"])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "\x07" not in done.output


# -- the page ----------------------------------------------------------------------------------------------------------

PAGES = {
    "plain": (A, changed()),
    "loud": (A, replace(samples.pairs(), title="Another")),
    "expecting": (A, samples.expecting_full()),
    "hostile": (samples.hostile(), replace(samples.hostile(), ran=samples.ran(loss=samples.HOSTILE * 3))),
    "split": (A, replace(changed(machine="Xeon"), untrained={METRIC: Estimate(0.7102, 0.0098)})),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compared")
    names = (samples.HOSTILE, "b")
    return {name: write_comparison(root / f"{name}.html", compare(*both), names=names) for name, both in PAGES.items()}


def test_what_a_user_names_comes_out_as_text(pages):
    page = pages["hostile"].read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    assert page.count("</style>") == page.count("<style>") == 1


def test_the_warnings_stand_before_the_sentence_and_the_sentence_before_the_tables(pages):
    page = pages["split"].read_text(encoding="utf-8")
    order = ["Not the same test objects", "Not the same machine", "A and B cannot be compared", "<table"]
    places = [page.index(words) for words in order]
    assert places == sorted(places)
    assert 'class="loud" role="note"' in page
    assert 'class="loud"' not in pages["plain"].read_text(encoding="utf-8")


def test_every_figure_of_both_is_on_the_page(pages):
    words = html.unescape(re.sub(r"<[^>]+>", " ", pages["plain"].read_text(encoding="utf-8")))
    for result in PAGES["plain"]:
        for one in result.levels:
            assert f"{one.quality[METRIC].mean:.3f} ± {one.quality[METRIC].error:.3f}" in words
            assert f"{one.bytes_kept / 1e6:.1f}" in words or not one.cut
    assert "−0.030 ± 0.009" in words
    assert "ArcFace" in words


def test_the_dots_lie_where_the_figures_are():
    drawn = dots([Line("50 % recycled", Estimate(0.2, 0.1), Estimate(0.6, 0.0)), Line("none", None, None)], "it", "x")
    ticks = {
        float(t): float(x) for x, t in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">([\d.]+)<', drawn)
    }
    left, right = min(ticks), max(ticks)
    scale = (ticks[right] - ticks[left]) / (right - left)
    marks = [float(x) + 5.5 for x in re.findall(r"translate\(([\d.]+) ", drawn)]
    assert marks == pytest.approx([ticks[left] + scale * (value - left) for value in (0.2, 0.6)], abs=0.2)
    (bar,) = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)" stroke="var\(--blue\)"', drawn)
    assert [float(x) for x in bar] == pytest.approx(
        [ticks[left] + scale * (value - left) for value in (0.1, 0.3)], abs=0.2
    )
    assert "50 % recycled: A 0.200 ± 0.100, B 0.600" in drawn
    assert dots([Line("none", None, None)], "it", "x") == ""


@pytest.mark.parametrize("mean", [0.0, 1.0, -3.0, 1e-12, 12345.678, 9e8, 1e17, 1e308, math.nan, math.inf])
@pytest.mark.parametrize("error", [0.0, 0.01, 1e300, math.nan, math.inf, -1.0])
def test_any_figure_can_be_drawn_or_is_left_out(mean, error):
    drawn = dots(
        [Line("x", Estimate(mean, error), Estimate(0.5, 0.1)), Line("y", None, Estimate(mean, error))], "i", "x"
    )
    ElementTree.fromstring(drawn)
    places = [float(x) for x in re.findall(r"translate\((-?[\d.]+) ", drawn)]
    assert len(places) == (3 if abs(mean) < 1e9 else 1)
    assert all(0 <= x <= 340 for x in places)
    assert "nan" not in re.sub(r"<desc.*?</desc>", "", drawn)


@in_a_browser
@pytest.mark.parametrize("name", PAGES)
def test_in_a_browser_nothing_is_loaded_or_wider_than_the_screen(browser, pages, name):  # noqa: F811
    for size in SIZES:
        with opened(browser, pages[name], size=size, theme="dark" if size == "phone" else "light") as tab:
            tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            scroll, inner, wide = tab.evaluate(OVERFLOW)
            assert wide == []
            assert scroll <= inner == SIZES[size][0]


@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(browser, pages, theme):  # noqa: F811
    for name in ("split", "expecting"):
        with opened(browser, pages[name], theme=theme) as tab:
            tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            seen = tab.evaluate(CONTRASTS)
        assert {"TD", "TH", "P", "A", "DD", "SUMMARY", "PRE", "plot"} <= set(seen)
        assert {kind: ratio for kind, ratio in seen.items() if ratio < 4.5} == {}
