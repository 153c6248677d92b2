"""A sweep's page, its files, its table in a terminal and its fragment for a notebook, all without a browser."""

from __future__ import annotations

import base64
import csv
import doctest
import importlib
import io
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

import report_samples as samples
from torchrecycle.errors import RecycleError
from torchrecycle.report import ReportError, html_of, notes, print_table, tables, write_page
from torchrecycle.report.colours import LIGHT, marks_of
from torchrecycle.report.columns import cost_columns
from torchrecycle.report.plots import plots_of, to_png
from torchrecycle.report.predicted import slow_lines
from torchrecycle.sweep.results import SweepResult

ALL = samples.everything()
VOID = {"meta", "img", "input", "br", "hr", "link", "wbr"}
INLINE = {"a", "bdi", "code", "small", "span", "strong"}
PLOTS = ["quality-against-seconds", "quality-against-bytes", "learning-by-epoch", "learning-by-second"]


class Parsed(HTMLParser):
    """What a page holds; it fails on an element that is not closed, or in the wrong order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.words.append("" if tag in INLINE else " ")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each sample's page, and of one with two tasks."""
    root = tmp_path_factory.mktemp("pages")
    written = {name: write_page([result], root / name, title=result.title).parent for name, result in ALL.items()}
    written["two"] = write_page([ALL["images"], ALL["pairs"]], root / "two", title="Two tasks").parent
    return written


@pytest.fixture(scope="module")
def parsed(pages: dict[str, Path]) -> dict[str, Parsed]:
    return {name: Parsed(_html(folder)) for name, folder in pages.items()}


def _html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, "two"])
def test_every_element_is_closed_ids_are_unique_and_what_is_referred_to_is_there(name, pages, parsed):
    page = parsed[name]
    ids = page.values("id")
    assert [ident for ident, times in Counter(ids).items() if times > 1] == []
    targets = [value for kind in ("aria-labelledby", "aria-describedby") for value in page.values(kind)]
    targets += [value[1:] for value in page.values("href") if value.startswith("#")]
    targets += [found for value in page.values("clip-path") for found in re.findall(r"url\(#(.+)\)", value)]
    assert len(targets) > 20
    assert set(targets) <= set(ids)


@pytest.mark.parametrize("name", [*ALL, "two"])
def test_the_page_loads_nothing_and_runs_nothing(name, pages, parsed):
    page, html = parsed[name], _html(pages[name])
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.values("src"))
    beside = [value for value in page.values("href") if not value.startswith(("#", "data:"))]
    assert len(beside) >= 6
    assert all((pages[name] / value).is_file() for value in beside)
    css = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.S))
    assert "url(" not in css
    assert "@import" not in css
    assert not any("://" in value for _, attributes in page.elements for value in attributes.values())
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


@pytest.mark.parametrize("name", ALL)
def test_the_recommendation_comes_before_everything_else(name, pages, parsed):
    html, sentence = _html(pages[name]), " ".join(ALL[name].recommendation.sentence.split())
    (shown,) = re.findall(r'<p class="sentence">.*?</p>', html)
    assert Parsed(shown).text == sentence
    assert html.index("Which level to take") < html.index(shown) < html.index("<table") < html.index("What was run")


def test_two_tasks_stand_on_one_page_each_with_its_answer_on_top(parsed):
    text = parsed["two"].text
    for name in ("images", "pairs"):
        assert text.index(ALL[name].recommendation.sentence) < text.index("The levels compared")
    assert text.count("The levels compared") == 2
    assert text.count("What it finds") == text.count("What was run") == 2


def test_random_weights_are_said_loudly_before_the_sentence(parsed):
    text = parsed["random weights"].text
    assert text.index("The weights are random, because none were given.") < text.index("No level is better")
    assert [a["role"] for _, a in parsed["random weights"].elements if a.get("class") == "loud"] == ["note"]
    assert "weights are random" not in parsed["images"].text


@pytest.mark.parametrize("name", ["images", "pairs", "two levels", "zero errors", "quality now and then"])
def test_every_figure_is_on_the_page_or_in_its_csv_files(name, pages, parsed):
    known = {
        float(cell)
        for path in (pages[name] / "plots").glob("*.csv")
        for row in _rows(path)
        for cell in row.values()
        if re.fullmatch(r"-?[\d.]+(e-?\d+)?|nan", cell)
    }
    result = ALL[name].to_json()
    assert result["ran"].pop("seconds") in (263.11656289500024, 254.0)
    figures = list(_leaves(result, (int, float)))
    assert len(figures) > 100
    text = parsed[name].text
    missing = [f for f in figures if not (math.isnan(f) or f in known or f"{f:,}" in text)]
    assert missing == []
    assert ("4 min 23 s" if name != "pairs" else "4 min 14 s") in text


@pytest.mark.parametrize("name", ["images", "pairs", "hostile"])
def test_every_text_of_a_result_is_on_the_page(name, parsed):
    result = ALL[name]
    ran = result.to_json()["ran"]
    ran["date"] = ran["date"].replace("T", " ")
    wanted = [*_leaves(ran, str), *ran["settings"], *ran["versions"], *result.metrics]
    wanted += [result.title, result.recommendation.sentence, *result.recommendation.verdicts.values()]
    wanted += [found.note for found in result.untrained_found]
    text = parsed[name].text
    assert [one for one in wanted if " ".join(one.split()).rstrip(".") not in text] == []


def _leaves(value: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield value


def test_what_a_user_names_comes_out_as_text(pages, parsed):
    html = _html(pages["hostile"])
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 40
    assert "caf?\ufffd<script>" in parsed["hostile"].text  # neither half a surrogate nor a nought can be in a page
    inside = ElementTree.fromstring((pages["hostile"] / "plots" / "quality-against-seconds.svg").read_bytes())
    assert any("<script>alert(1)" in (text.text or "") for text in inside.iter() if text.tag.endswith("}text"))
    assert [one.tag for one in inside.iter() if one.tag.endswith("script")] == []


def test_the_recommended_row_is_marked_in_words(pages):
    for name, row in (("images", "50 % recycled"), ("pairs", "full training"), ("nothing is better", "untrained")):
        marked = re.findall(r'<tr class="taken"><th scope="row">(.*?)</th>', _html(pages[name]).split("</table>")[0])
        assert [Parsed(one).text for one in marked] == [f"{row} recommended"]
    assert "recommended</strong>" not in _html(pages["random weights"])


def test_every_table_has_a_caption_and_every_head_a_scope(parsed):
    for page in parsed.values():
        assert len(page.all("caption")) == len(page.all("table")) >= 4
        assert {head.get("scope") for head in page.all("th")} == {"col", "row"}


def test_headings_go_down_by_one(parsed):
    for page in parsed.values():
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_neighbours_are_right_or_wrong_in_words(parsed):
    text = parsed["images"].text
    assert text.count("✗ wrong") == sum(not ok for ok in _all_right(ALL["images"]))
    assert text.count("✓ right") == sum(_all_right(ALL["images"]))
    assert "5 of 5 right" in text
    assert "says round (83 %)" in text
    assert "right in place 2" in parsed["pairs"].text
    assert all(image["alt"] for image in parsed["images"].all("img"))


def _all_right(result: SweepResult) -> list[bool]:
    found = [*result.untrained_found, *(f for one in result.levels for f in one.trials[0].found)]
    return [ok for one in found for ok in one.right]


def test_a_long_text_is_cut_short_and_can_be_unfolded_whole(parsed):
    text = parsed["pairs"].text
    assert "Long texts in full" in text
    assert " ".join(samples.LONG.split()) in text
    assert "…" in text


def test_without_samples_there_is_no_section_of_them(parsed):
    assert "What it finds" not in parsed["no samples"].text
    assert "what it finds" not in parsed["no samples"].text


def test_what_was_searched_is_shown_and_what_was_chosen(parsed):
    text = parsed["images"].text
    assert "12 trainings looked for a learning rate, 1 min 28 s in all. Their quality" in text
    assert text.count(" chosen") == 5  # the head of the column, and one for each level
    assert "The learning rates were given; none were looked for." in parsed["two levels"].text


def test_without_full_training_there_is_no_speed_up(pages):
    rows = _rows(pages["two levels"] / "plots" / "levels.csv")
    assert [row["speed_up"] for row in rows] == ["", "", ""]
    assert rows[1]["speed_up_against_frozen"] != ""


def test_without_full_training_no_column_stands_against_nothing(parsed):
    heads = [column.name for column in cost_columns(ALL["two levels"])]
    assert "speed-up" not in heads
    assert "with filling" not in heads
    assert "expected speed-up" not in heads
    for text in (parsed["two levels"].text, _printed(ALL["two levels"], 150)):
        assert "speed-up" not in text
        assert "of full training" not in text
        assert "≈" not in text
    assert "full training" not in {row.split("  ")[0].strip() for row in _printed(ALL["two levels"], 150).splitlines()}


def test_full_training_that_was_not_run_is_expected_and_never_taken_for_measured(pages, parsed):
    result, html = ALL["expecting full"], _html(pages["expecting full"])
    (row,) = re.findall(r'<tr class="expected">.*?</tr>', html)
    assert Parsed(row).text == (
        "full training expected ≈ 0.921 ± 0.012 ≈ 20.2 ≈ 60.5 not run, so not measured: what is expected of it from "
        "the levels that were"
    )
    assert "the hollow mark was not measured" in parsed["expecting full"].text.lower()
    assert [column.name for column in cost_columns(result)].count("expected speed-up") == 1
    assert html.count("≈ 1.9×") == 1  # 60.5 seconds by 23.4 and 7.8 of filling
    shown = next(line for line in _printed(result, 150).splitlines() if line.startswith(" full training"))
    assert shown.split() == ["full", "training", "≈", "≈", "0.921", "±", "0.012", "≈", "20.2", "≈", "60.5"]
    rows = _rows(pages["expecting full"] / "plots" / "levels.csv")
    assert [row["level"] for row in rows] == ["untrained", "full, not run, expected", "50", "75", "head"]
    assert (rows[1]["R-precision"], rows[1]["total_seconds"], rows[1]["epoch_seconds"]) == ("0.9214", "60.5", "")


def test_a_plot_of_what_is_expected_has_a_hollow_mark(pages):
    from PIL import Image

    plot = plots_of(ALL["expecting full"])[0]
    assert plot.series[0].label == "full training, expected"
    assert [one.is_expected for one in plot.series] == [True, False, False, False]
    point = plot.series[0].points[0]
    assert (point.x, point.y, point.high - point.y) == (60.5, 0.9214, pytest.approx(0.0123))
    with Image.open(pages["expecting full"] / "plots" / "quality-against-seconds.png") as image:
        assert LIGHT["blue"] in {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in _colours(image)}


def test_what_was_predicted_stands_beside_what_came(pages, parsed):
    result, html = ALL["predictions"], _html(pages["predictions"])
    (table,) = re.findall(r"<table[^>]*><caption>Predicted, and what came.*?</table>", html)
    rows = {Parsed(row).text for row in re.findall(r"<tr.*?</tr>", table)}
    assert "50 % recycled 5.71 5.94 9.80 10.2 7.51 7.82 73.5 73.5 2 2 −4 % reading is quicker" in rows
    assert (
        "75 % recycled 2.35 2.45 1.88 1.96 7.51 7.82 51.5 51.5 never never −4 % reading is slower than computing again"
        in rows
    )
    assert (
        "head only 0.13 0.14 0.12 7.00 7.51 7.82 9.2 9.2 never 2 −4 % predicted: reading is slower than computing "
        "again; measured: reading is quicker" in rows
    )
    assert "Each level was timed on 8 batches at most before anything was filled" in parsed["predictions"].text
    assert "3 predictions of what was not run" in parsed["predictions"].text
    (others,) = re.findall(r"<table[^>]*><caption>Predicted, but not run.*?</table>", html)
    assert "measured" not in Parsed(others).text
    assert "25 % recycled 5.71 5.14 7.51 73.5 never reading is slower than computing again" in Parsed(others).text
    assert "50 % recycled int8 5.71" in Parsed(others).text
    sheet = _rows(pages["predictions"] / "plots" / "predictions.csv")
    assert [(row["level"], row["precision"]) for row in sheet] == [
        ("full", ""), ("50", ""), ("75", ""), ("head", ""), ("50", "float16"), ("50", "int8"), ("25", "")
    ]  # fmt: skip
    predicted = result.of("75").predicted
    assert predicted is not None
    assert float(sheet[2]["epoch_seconds predicted"]) == predicted.epoch_seconds
    assert float(sheet[2]["epoch_seconds measured"]) == result.of("75").epoch_seconds
    assert [row["pays"] for row in sheet] == ["", "true", "false", "false", "true", "false", "false"]


def test_where_reading_is_slower_than_computing_again_it_is_said(parsed):
    words = (
        "75 % recycled: reading is slower than computing again. An epoch takes 2.45 s from the store, and 1.96 s with "
        "the same layers frozen and no store."
    )
    assert words in parsed["predictions"].text.replace("\xa0", " ")
    assert words in " ".join(_printed(ALL["predictions"], 150).split())
    assert "An epoch takes" not in parsed["images"].text
    assert "reading is slower" not in _printed(ALL["images"], 150)


def test_a_few_per_cent_are_neither_quicker_nor_slower():
    half = ALL["predictions"].of("50")
    for factor, lines in ((0.97, 0), (1.03, 0), (1.07, 1)):
        one = replace(half, frozen_epoch_seconds=half.epoch_seconds / factor)
        shown = slow_lines(replace(ALL["predictions"], levels=(one,)))
        assert len(shown) == lines


def test_without_predictions_there_is_no_section_of_them(pages, parsed):
    assert "Predicted" not in parsed["images"].text
    assert "what was predicted" not in parsed["images"].text
    assert "predicted" not in _printed(ALL["images"], 150)
    assert not (pages["images"] / "plots" / "predictions.csv").exists()


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one SweepResult or more"):
        write_page([], tmp_path, title="nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = write_page([samples.two_levels()], tmp_path, title="first")
    before = page.read_bytes()
    (tmp_path / "plots" / "levels.csv").unlink()
    (tmp_path / "plots" / "levels.csv").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"levels\.csv"):
        write_page([samples.two_levels()], tmp_path, title="second")
    assert page.read_bytes() == before
    assert list(tmp_path.rglob("*.part")) == []


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        write_page([ALL["images"]], tmp_path / folder, title="twice")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 1 + 4 * 3 + 3
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


# -- plots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL, "two"])
def test_each_plot_is_a_picture_in_the_colours_of_its_levels(name, pages):
    from PIL import Image

    pngs = sorted((pages[name] / "plots").glob("*.png"))
    assert len(pngs) == {"two": 8, "no curves": 2}.get(name, 4)
    for path in pngs:
        with Image.open(path) as image:
            assert image.width == 1133
            colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in _colours(image)}
        kinds = samples.images() if name == "two" else ALL[name]
        marks = marks_of(kinds)
        assert {LIGHT[marks[one.level].colour] for one in kinds.levels} <= colours
        assert len(colours) > 50


def _colours(image: Any) -> list[tuple[int, tuple[int, int, int]]]:
    return image.convert("RGB").getcolors(1 << 24)


def test_a_csv_holds_what_its_plot_shows(pages):
    result = ALL["images"]
    rows = {row["level"]: row for row in _rows(pages["images"] / "plots" / "quality-against-seconds.csv")}
    assert float(rows["untrained"]["R-precision"]) == 0.73893
    for one in result.levels:
        row, quality = rows[one.level], one.quality["R-precision"]
        assert float(row["seconds"]) == pytest.approx(one.total_seconds + one.fill_seconds, rel=1e-12)
        assert (float(row["R-precision"]), float(row["R-precision error"])) == (quality.mean, quality.error)
        assert float(row["seconds_quickest"]) < float(row["seconds"]) < float(row["seconds_slowest"])
    kept = {row["level"]: row["bytes_kept"] for row in _rows(pages["images"] / "plots" / "quality-against-bytes.csv")}
    assert kept == {"untrained": "", **{one.level: str(one.bytes_kept) for one in result.levels}}
    curves = _rows(pages["images"] / "plots" / "learning-by-epoch.csv")
    assert Counter(row["level"] for row in curves) == {"full": 3, "50": 4, "75": 5, "head": 40}
    first = next(row for row in curves if row["level"] == "50")
    seeds = [trial.curve[0].quality for trial in result.of("50").trials]
    assert float(first["R-precision lowest seed"]) == min(q for q in seeds if q is not None)
    assert float(first["seconds_with_filling"]) - float(first["seconds"]) == pytest.approx(7.8218)


def test_the_csv_within_the_page_is_the_one_beside_it(pages, parsed):
    within = {
        link["download"]: base64.b64decode(link["href"].partition(",")[2])
        for link in parsed["two"].all("a")
        if "download" in link
    }
    assert len(within) == 2 * (4 * 2 + 3)
    assert all((pages["two"] / "plots" / name).read_bytes() == content for name, content in within.items())


def test_a_text_in_a_csv_is_no_formula(pages):
    rows = _rows(pages["hostile"] / "plots" / "levels.csv")
    assert rows[1]["verdict"] == f"'={samples.HOSTILE}"
    assert {row["verdict"][:1] for row in rows} == {"", "'"}


def test_quality_is_plotted_where_it_was_measured_and_loss_where_it_was_not(pages):
    rows = _rows(pages["quality now and then"] / "plots" / "learning-by-epoch.csv")
    assert [row["epoch"] for row in rows if row["level"] == "75"] == ["2", "4"]
    rows = _rows(pages["no quality on the way"] / "plots" / "learning-by-epoch.csv")
    assert "loss" in rows[0]
    assert "R-precision" not in rows[0]


def test_without_a_curve_two_plots_are_drawn_and_the_page_says_so(parsed):
    assert [plot.name for plot in plots_of(ALL["no curves"])] == PLOTS[:2]
    assert "No learning curve was kept, so none is drawn." in parsed["no curves"].text
    assert "No learning curve" not in parsed["images"].text


def test_each_plot_has_its_figures_in_words_for_those_who_do_not_see_it(parsed):
    text = parsed["images"].text
    assert "50 % recycled: 0.936 ± 0.006 after 31.6 seconds" in text
    assert "50 % recycled: 0.936 ± 0.006 with 73.5 megabytes" in text
    described = [svg for svg in parsed["images"].all("svg") if svg.get("role") == "img"]
    assert len(described) == 4
    assert all(svg["aria-labelledby"] and svg["aria-describedby"] for svg in described)


def test_each_level_has_a_colour_and_a_shape_of_its_own():
    for result in ALL.values():
        marks = marks_of(result)
        assert (
            len({mark.colour for mark in marks.values()}) == len({mark.marker for mark in marks.values()}) == len(marks)
        )


def test_the_users_own_matplotlib_style_is_neither_used_nor_changed():
    import matplotlib

    plot = plots_of(ALL["two levels"])[0]
    plain = to_png(plot)
    with matplotlib.rc_context({"font.size": 33.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert to_png(plot) == plain
        assert matplotlib.rcParams["font.size"] == 33.0
        assert matplotlib.rcParams["svg.fonttype"] == "path"


def test_without_matplotlib_the_error_says_what_to_install_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r'pip install "torchrecycle\[sweep\]"') as caught:
        write_page([ALL["two levels"]], tmp_path / "page", title="no plots")
    assert isinstance(caught.value, RecycleError)
    assert isinstance(caught.value, ImportError)
    assert not (tmp_path / "page").exists()
    fragment = html_of(ALL["two levels"])
    assert "Take 50\xa0% recycled." in fragment
    assert "pip install" in fragment
    assert "<img" not in fragment


# -- notebook ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_shows_recommendation_table_and_plots(name):
    fragment = html_of(ALL[name])
    page = Parsed(fragment)
    assert " ".join(ALL[name].recommendation.sentence.split()) in page.text
    assert len(page.all("table")) == 1
    assert len(page.all("img")) == (2 if name == "no curves" else 4)
    assert all(image["alt"] for image in page.all("img"))
    assert "<script" not in fragment
    style = fragment.partition("<style>")[2].partition("</style>")[0]
    assert all(".torchrecycle" in rule.partition("{")[0] for rule in style.split("}") if rule.strip())
    assert ("weights are random" in page.text) == (name == "random weights")


# -- terminal ----------------------------------------------------------------------------------------------------------


def _printed(result: SweepResult, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_table(result, console=console)
    held = console.file
    assert isinstance(held, io.StringIO)
    return held.getvalue()


def test_a_wide_terminal_gets_one_table_and_a_narrow_one_two():
    assert [len(table.columns) for table in tables(ALL["images"], 150)] == [11]
    assert [len(table.columns) for table in tables(ALL["images"], 100)] == [3, 9]
    assert [len(table.columns) for table in tables(ALL["pairs"], 100)] == [4, 9]


@pytest.mark.parametrize("width", [150, 100, 80, 74, 60, 40, 32])
def test_no_figure_is_cut_off_however_narrow_the_terminal(width):
    for name in ("images", "pairs", "predictions", "expecting full", "two levels"):
        printed, result = _printed(ALL[name], width), ALL[name]
        assert max(map(len, printed.splitlines())) <= width
        assert "…" not in printed
        words = " ".join(printed.split())
        for one in result.levels:
            for metric, quality in one.quality.items():
                assert f"{quality.mean:.3f} ± {quality.error:.3f}" in words, (metric, one.level)
            assert not one.cut or f"{one.bytes_kept / 1e6:.1f}" in words
            assert not one.predicted or f"{one.predicted.epoch_seconds:.2f}"[:4] in words


def test_the_table_fits_its_width_and_shows_the_figures_of_the_page():
    printed = _printed(ALL["images"], 150)
    assert max(map(len, printed.splitlines())) <= 150
    (row,) = [line.split() for line in printed.splitlines() if line.startswith(" 50 % recycled *")]
    assert row[4:5] == ["trunk.blocks.2"]
    assert row[5:] == ["0.936", "±", "0.006", "7.82", "5.94", "23.8", "2.7×", "2.0×", "1.7×", "73.5", "2"]
    (first,) = [line.split() for line in printed.splitlines() if line.startswith(" untrained")]
    assert first == ["untrained", "0.739", "±", "0.010"]


def test_the_sentence_ends_what_is_printed_and_notes_say_what_was_used():
    printed = _printed(ALL["images"], 400)
    assert printed.rstrip().endswith(ALL["images"].recommendation.sentence)
    lines = list(notes(ALL["images"]))
    assert (
        "  used for 50 % recycled: 4 epochs, batch 64, AdamW, rate 0.001, head 0.001, weight decay 0.01, scale 4"
        in lines
    )
    assert "  50 % recycled: the best, twice as quick as full training" in lines
    assert "  AMD EPYC, 2 threads, torch 2.14.1+cpu; took 4 min 23 s in all" in lines
    assert "The weights are random" in _printed(ALL["random weights"], 150)


@pytest.mark.parametrize("name", ALL)
def test_each_result_can_be_printed_and_brackets_are_no_markup(name):
    printed = _printed(ALL[name], 1000)
    assert "untrained" in printed
    if name == "hostile":
        assert printed.count(samples.HOSTILE) > 5


@pytest.mark.parametrize("room", ["words", "sheets", "markup", "ran", "colours", "dots"])
def test_the_examples_in_docstrings_run(room):
    done = doctest.testmod(importlib.import_module(f"torchrecycle.report.{room}"))
    assert done.attempted > 0
    assert done.failed == 0
