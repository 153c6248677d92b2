"""The page in a browser: nothing is loaded, nothing sticks out, everything can be read, reached and printed.

Debian's Chromium, driven by Playwright for Python. Without a browser these tests are skipped, unless the environment
variable TORCHRECYCLE_BROWSER is ``required``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import report_samples as samples
from torchrecycle.report import write_page
from torchrecycle.report.colours import LIGHT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
READY = BROWSER is not None and importlib.util.find_spec("playwright") is not None
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"phone": (360, 740), "wide": (1440, 900)}

pytestmark = pytest.mark.skipif(
    not READY and os.environ.get("TORCHRECYCLE_BROWSER") != "required", reason="no Chromium, or no Playwright"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert BROWSER is not None, "TORCHRECYCLE_BROWSER=required, but there is no chromium on the path"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a sample's page, written when it is asked for first."""
    root = tmp_path_factory.mktemp("pages")
    results = {name: [result] for name, result in samples.everything().items()}
    results["two tasks"] = [samples.images(), samples.pairs()]

    def path_of(name: str) -> Path:
        page = root / name / "index.html"
        return page if page.exists() else write_page(results[name], page.parent, title=name)

    return path_of


@contextmanager
def opened(browser: Any, page: Path, *, size: str = "wide", theme: str = "light", **options: Any) -> Iterator[Any]:
    """A tab with the page; whatever it asks for or complains of must be nothing."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, **options)
    said: list[str] = []
    try:
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
        tab.goto(page.as_uri())
        yield tab
        assert said == [page.as_uri()]
    finally:
        context.close()


# -- does it fit, can it be read ---------------------------------------------------------------------------------------

OVERFLOW = """() => {
    const wide = [...document.querySelectorAll('body *')].filter(
        (e) => !e.closest('.scroll, svg, .skip') && e.getBoundingClientRect().right > innerWidth + 1);
    return [document.documentElement.scrollWidth, innerWidth, wide.slice(0, 5).map((e) => e.outerHTML.slice(0, 90))];
}"""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["two tasks", "hostile", "random weights", "no curves", "two levels", "predictions", "expecting full"]
)
def test_nothing_is_wider_than_the_screen(browser, written, name, size):
    for theme in ("light", "dark"):
        with opened(browser, written(name), size=size, theme=theme) as tab:
            tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            scroll, inner, wide = tab.evaluate(OVERFLOW)
            assert wide == []
            assert scroll <= inner == SIZES[size][0]


def test_at_400_per_cent_and_with_large_letters_it_still_fits(browser, written):
    with opened(browser, written("two tasks")) as tab:
        tab.set_viewport_size({"width": 320, "height": 256})
        assert tab.evaluate(OVERFLOW)[0] <= 320
        tab.evaluate("document.documentElement.style.fontSize = '150%'")
        assert tab.evaluate(OVERFLOW) == [320, 320, []]


CONTRASTS = """() => {
    const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parsed = (css) => css.match(/[\\d.]+/g).map(Number);
    const opaque = (c) => c.length < 4 || c[3] === 1;
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const colour = parsed(getComputedStyle(e).backgroundColor);
            if (opaque(colour)) return colour;
        }
        return [255, 255, 255];
    };
    const seen = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || e.closest('title, desc, style')) continue;
        if (!e.checkVisibility()) continue;
        const style = getComputedStyle(e);
        const front = light(parsed(e.closest('svg') ? style.fill : style.color)), back = light(ground(e));
        const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
        const within = e.closest('svg, th, td, a, summary, h2, p, dd, dt, li, pre, span');
        const kind = e.closest('svg') ? 'plot' : within?.tagName;
        seen[kind] = Math.min(seen[kind] ?? 99, ratio);
    }
    return seen;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["two tasks", "random weights", "expecting full"])
def test_all_text_stands_out_from_its_ground(browser, written, name, theme):
    with opened(browser, written(name), theme=theme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        seen = tab.evaluate(CONTRASTS)
    assert {"plot", "TD", "TH", "P", "A", "LI", "DT", "DD", "SUMMARY", "PRE"} <= set(seen)
    assert {kind: ratio for kind, ratio in seen.items() if ratio < 4.5} == {}


MARKS = """() => {
    const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (css) => {
        const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const card = light(getComputedStyle(document.querySelector('figure')).backgroundColor);
    return NAMES.map((name) => {
        const probe = document.createElement('i');
        probe.style.color = `var(--${name})`;
        document.body.append(probe);
        const front = light(getComputedStyle(probe).color);
        probe.remove();
        return (Math.max(front, card) + 0.05) / (Math.min(front, card) + 0.05);
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_colours_of_levels_stand_out_three_to_one(browser, written, theme):
    names = ["grey", "blue", "orange", "green", "purple", "ochre", "sky", "rose", "strong-line", "right", "wrong"]
    with opened(browser, written("two tasks"), theme=theme) as tab:
        ratios = tab.evaluate(MARKS.replace("NAMES", str(names)))
    assert {name: ratio for name, ratio in zip(names, ratios, strict=True) if ratio < 3} == {}


def test_letters_in_a_plot_are_legible_on_a_phone_and_do_not_leave_it(browser, written):
    outside = """() => [...document.querySelectorAll('svg.plot')].flatMap((svg) => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].map((text) => text.getBoundingClientRect()).filter(
            (t) => t.left < box.left - 1 || t.right > box.right + 1 || t.top < box.top - 1 || t.bottom > box.bottom + 1
        ).map((t) => [t.left, t.right, box.left, box.right]);
    })"""
    for size in SIZES:
        with opened(browser, written("two tasks"), size=size) as tab:
            heights = tab.evaluate(
                "[...document.querySelectorAll('svg.plot text')].map((t) => t.getBoundingClientRect().height)"
            )
            assert len(heights) > 60
            assert min(heights) >= 11
            assert tab.evaluate(outside) == []


def test_labels_of_an_axis_and_of_the_legend_do_not_overlap(browser, written):
    overlaps = """() => [...document.querySelectorAll('svg.plot')].flatMap((svg) => {
        const boxes = [...svg.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
        return boxes.flatMap(([name, a], at) => boxes.slice(at + 1).filter(([, b]) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4
        ).map(([other]) => [name, other]));
    })"""
    for name in ("two tasks", "two levels", "no curves", "hostile", "expecting full"):
        with opened(browser, written(name), size="phone") as tab:
            assert tab.evaluate(overlaps) == []


# -- themes ------------------------------------------------------------------------------------------------------------


def _ground(tab: Any) -> str:
    return tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def _rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:], 16)})"


def test_the_buttons_choose_the_theme_with_and_without_javascript(browser, written):
    for javascript in (True, False):
        with opened(browser, written("two tasks"), theme="dark", java_script_enabled=javascript) as tab:
            dark = _ground(tab)
            assert dark != _rgb(LIGHT["paper"])
            tab.get_by_label("light", exact=True).check()
            assert _ground(tab) == _rgb(LIGHT["paper"])
            tab.get_by_label("dark", exact=True).check()
            assert _ground(tab) == dark
            tab.emulate_media(color_scheme="light")
            assert _ground(tab) == dark
            tab.get_by_label("system", exact=True).check()
            assert _ground(tab) == _rgb(LIGHT["paper"])


def test_plots_follow_the_theme(browser, written):
    colour = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    with opened(browser, written("two tasks"), theme="light") as tab:
        light = tab.evaluate(colour)
        tab.emulate_media(color_scheme="dark")
        assert light == _rgb(LIGHT["ink"]) != tab.evaluate(colour)


def test_without_javascript_everything_reads_and_unfolds(browser, written):
    with opened(browser, written("two tasks"), java_script_enabled=False) as tab:
        assert tab.locator(".sentence").first.is_visible()
        assert not tab.locator(".meanings").first.is_visible()
        tab.get_by_text("What the columns mean").first.click()
        assert tab.locator(".meanings").first.is_visible()
        assert tab.locator("svg.plot").count() == 8


def test_movement_is_smooth_only_for_those_who_want_it(browser, written):
    moves = "getComputedStyle(document.documentElement).scrollBehavior"
    with opened(browser, written("two levels"), reduced_motion="reduce") as tab:
        assert tab.evaluate(moves) == "auto"
    with opened(browser, written("two levels"), reduced_motion="no-preference") as tab:
        assert tab.evaluate(moves) == "smooth"


# -- keyboard and screen reader ----------------------------------------------------------------------------------------

FOCUSED = """() => {
    const e = document.activeElement;
    const shown = e.matches('input') ? e.nextElementSibling : e;
    const style = getComputedStyle(shown), box = shown.getBoundingClientRect();
    return {
        tag: e.tagName, name: e.className, id: e.id, text: (e.getAttribute('aria-label') ?? e.textContent).slice(0, 60),
        outline: style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth),
        inside: box.left >= 0 && box.right <= innerWidth + 1 && box.bottom > 0 && box.top < innerHeight,
        top: box.top + scrollY,
    };
}"""


def test_the_tab_key_reaches_everything_in_order_and_shows_where_it_is(browser, written):
    with opened(browser, written("two tasks"), reduced_motion="reduce") as tab:
        stops = []
        while len(stops) < 200:
            tab.keyboard.press("Tab")
            at = tab.evaluate(FOCUSED)
            if at["tag"] == "BODY":
                break
            stops.append(at)
        expected = tab.evaluate(
            "[...document.querySelectorAll('a, summary, pre[tabindex], .scroll')].filter("
            "(e) => e.checkVisibility()).length"
        )
    assert len(stops) == expected + 1  # and the three buttons, which are one stop
    assert [stop["name"] for stop in stops[:2]] == ["skip", ""]
    assert stops[1]["id"] == "theme-system"
    assert [stop for stop in stops if stop["outline"] < 2 or not stop["inside"]] == []
    assert {"A", "INPUT", "SUMMARY", "PRE", "DIV"} == {stop["tag"] for stop in stops}
    assert any(stop["text"] == "Levels of recycling: Which emoji is it?" for stop in stops)
    tops = [stop["top"] for stop in stops if stop["tag"] in ("SUMMARY", "PRE") and "plot" not in stop["text"]]
    assert tops == sorted(tops)


def test_the_skip_link_leads_to_the_answer(browser, written):
    with opened(browser, written("two tasks")) as tab:
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        tab.keyboard.press("Tab")
        assert "Which emoji" in tab.evaluate("document.activeElement.textContent")


FIT = """() => [...document.querySelectorAll('.scroll:has(> table.levels)')].map((e) => [
    e.clientWidth, e.scrollWidth, getComputedStyle(e).overflowX, e.getBoundingClientRect().right <= innerWidth])"""


@pytest.mark.parametrize("name", ["two tasks", "predictions", "expecting full"])
def test_the_widest_tables_fit_a_page_of_1200_pixels_and_scroll_in_their_box_on_400(browser, written, name):
    with opened(browser, written(name)) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        tab.set_viewport_size({"width": 1200, "height": 900})
        wide = tab.evaluate(FIT)
        assert wide
        assert all(scroll <= width for width, scroll, _, _ in wide), wide
        tab.set_viewport_size({"width": 400, "height": 800})
        narrow = tab.evaluate(FIT)
        assert all(way == "auto" and inside for _, _, way, inside in narrow), narrow
        assert any(scroll > width for width, scroll, _, _ in narrow)
        assert tab.evaluate("document.documentElement.scrollWidth") == 400


def test_a_table_that_is_too_wide_scrolls_by_the_arrow_keys(browser, written):
    with opened(browser, written("two tasks"), size="phone", reduced_motion="reduce") as tab:
        table = tab.locator(".scroll").first
        table.focus()
        for _ in range(5):
            tab.keyboard.press("ArrowRight")
        deadline = time.monotonic() + 10  # the page lets no script in, so that it cannot be waited for from inside
        while (moved := table.evaluate("(e) => e.scrollLeft")) <= 30 and time.monotonic() < deadline:
            tab.wait_for_timeout(50)
        assert moved > 30
        head = tab.locator("table.levels tbody th").first
        assert head.evaluate("(e) => e.getBoundingClientRect().left >= 0")  # the level stays beside its figures


def test_what_a_screen_reader_is_told(browser, written):
    with opened(browser, written("two tasks")) as tab:
        session = tab.context.new_cdp_session(tab)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
    told: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            told.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"banner", "main", "navigation", "contentinfo"} <= set(told)
    sections = ["Which level to take", "The levels compared", "What quality costs", "What it finds", "What was run"]
    assert set(sections) <= set(told["heading"])
    assert [told["heading"].count(name) for name in sections] == [1, 2, 2, 2, 2]
    pictures = told.get("image", []) + told.get("img", [])
    assert len(pictures) > 100
    assert "" not in pictures
    assert {"Quality against time", "Learning, second by second"} <= set(pictures)
    assert len(told["table"]) >= 4
    assert "" not in told["table"]
    assert "" not in told["link"] + told["radio"] + told["region"]
    assert {"system", "light", "dark"} == set(told["radio"])
    assert "50 % recycled recommended" in told["rowheader"]
    described = [node for node in nodes if "description" in node and "50 % recycled: 0.936" in str(node["description"])]
    assert len(described) >= 2


# -- paper -------------------------------------------------------------------------------------------------------------


def test_on_paper_it_is_light_without_buttons_and_nothing_is_cut_off(browser, written):
    with opened(browser, written("two tasks"), theme="dark") as tab:
        tab.get_by_label("dark", exact=True).check()
        tab.set_viewport_size({"width": 700, "height": 1000})  # of an A4 sheet between its margins
        tab.emulate_media(media="print")
        assert _ground(tab) == "rgb(255, 255, 255)"
        assert tab.evaluate("getComputedStyle(document.querySelector('.sentence')).color") == _rgb(LIGHT["ink"])
        assert tab.evaluate("getComputedStyle(document.querySelector('svg.plot text')).fill") == _rgb(LIGHT["ink"])
        hidden = [".themes", "nav", ".skip", ".files", ".data"]
        assert [name for name in hidden if tab.locator(name).first.is_visible()] == []
        assert tab.locator("table.levels").first.is_visible()
        assert tab.locator(".meanings").first.is_visible()
        tables = tab.evaluate("[...document.querySelectorAll('table')].map((t) => t.getBoundingClientRect().right)")
        assert max(tables) <= 701
        assert tab.evaluate(OVERFLOW)[2] == []


def test_it_becomes_a_pdf_of_a_few_sheets(browser, written):
    with opened(browser, written("two tasks"), theme="dark") as tab:
        pdf = tab.pdf(format="A4", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 6 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 16
    assert len(pdf) > 100_000
