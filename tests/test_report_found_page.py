"""The page of a search: as text, and in a browser. See test_report_page.py, whose browser and probes are used here."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import report_samples as samples
from test_report_page import CONTRASTS, OVERFLOW, READY, SIZES, browser, opened  # noqa: F401  (a fixture)
from torchrecycle.report.found_page import (
    Answer,
    FoundPage,
    Shown,
    html_of_found,
    is_found_page,
    picture_of,
    write_found_page,
)

in_a_browser = pytest.mark.skipif(not READY, reason="no Chromium, or no Playwright")


def pictures(**changes: Any) -> FoundPage:
    """Two queries, twelve and three answers."""

    def shown(at: int) -> Shown:
        name = f"photos/a rather long name of a folder/{at:03}_{'x' * (at % 5 * 9)}.jpg"
        picture = samples.picture(at / 15, at, ((96, 96), (96, 48), (40, 96))[at % 3])
        return Shown(name, picture=picture, details=(("make", "Audi"), ("year", str(2000 + at))), score=1 - at / 15)

    first = Answer(Shown("red.jpg", picture=samples.picture(0, 0)), tuple(shown(at) for at in range(12)))
    same = replace(shown(0), same=True)
    second = Answer(Shown("a/blue.jpg", picture=samples.picture(0.6, 1)), (same, shown(3), shown(7)))
    page = FoundPage(
        title="Search in cars/images.tar, 8,144 pictures",
        sentence="Of 8,144 pictures, the 12 nearest to each of 2 queries.",
        answers=(first, second),
        facts=(("command", "torchrecycle search images.tar"), ("model", "timm/resnet18")),
        version="0.1.0",
        date="2026-11-25 18:05",
    )
    return replace(page, **changes)


def texts() -> FoundPage:
    found = tuple(
        Shown(f"line {at:,}", text, details=(("topic", "concrete"),), score=0.9 - at / 4, same=at == 0)
        for at, text in enumerate(samples.QUESTIONS)
    )
    query = Shown(samples.QUESTIONS[0], samples.QUESTIONS[0])
    return pictures(answers=(Answer(query, found),), random_weights=True)


def hostile() -> FoundPage:
    bad = Shown(samples.HOSTILE, samples.HOSTILE, details=((samples.HOSTILE, samples.HOSTILE),), score=0.5)
    tile = replace(bad, text="", picture=samples.picture(0.2, 2))
    return FoundPage(
        samples.HOSTILE,
        samples.HOSTILE,
        (Answer(bad, (bad, bad)), Answer(tile, (tile, tile))),
        ((samples.HOSTILE, samples.HOSTILE),),
        version=samples.HOSTILE,
        date=samples.HOSTILE,
    )


PAGES: dict[str, Callable[[], FoundPage]] = {"pictures": pictures, "texts": texts, "hostile": hostile}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("found")
    return lambda name: write_found_page(root / f"{name}.html", PAGES[name]())


# -- as text -----------------------------------------------------------------------------------------------------------


def test_every_object_stands_with_its_score_in_the_order_in_which_it_was_found():
    page = html_of_found(pictures())
    plain = html.unescape(re.sub(r"<[^>]+>", " ", page.split("<main")[1]))
    scores = re.findall(r"\b[01]\.\d{3}\b", plain)
    assert scores == [f"{1 - at / 15:.3f}" for at in (*range(12), 0, 3, 7)]
    assert page.count("<img ") == 12 + 3 + 2
    assert page.count("the same picture") == 1
    assert "make: Audi" in plain.replace("  ", " ")


def test_whatever_the_user_named_is_text_and_never_markup():
    page = html_of_found(hostile())
    body = page.split("<main")[1]
    assert "<script" not in body
    assert not re.search(r"<img (?!src=\"data:image/jpeg;base64,)", body)
    assert "\x00" not in page
    page.encode("utf-8")


def test_nothing_found_is_said_and_random_weights_too():
    page = html_of_found(pictures(answers=(Answer(Shown("a", "a"), ()),), random_weights=True))
    assert "Nothing was found." in page
    assert "The weights are random, because none were given." in page
    assert "The weights are random" not in html_of_found(pictures())


def test_a_page_is_known_and_a_page_of_somebody_else_is_not(tmp_path, written):
    assert is_found_page(written("pictures"))
    (tmp_path / "mine.html").write_text("<html>my own page</html>")
    assert not is_found_page(tmp_path / "mine.html")
    assert not is_found_page(tmp_path / "none.html")
    assert not is_found_page(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one_whole(tmp_path):
    path = write_found_page(tmp_path / "page.html", pictures())
    before = path.read_bytes()
    with pytest.raises(IsADirectoryError):
        write_found_page(tmp_path, texts())
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_picture_is_small_whatever_it_was():
    held = picture_of(Image.effect_noise((3000, 2000), 90).convert("RGB"))
    assert len(held) < 40_000


# -- in a browser ------------------------------------------------------------------------------------------------------


@in_a_browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_loaded_or_complained_of_and_nothing_is_wider_than_the_screen(browser, written, name, size):  # noqa: F811
    for theme in ("light", "dark"):
        with opened(browser, written(name), size=size, theme=theme) as tab:
            tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            scroll, inner, wide = tab.evaluate(OVERFLOW)
            assert wide == []
            assert scroll <= inner == SIZES[size][0]
            assert tab.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")


@in_a_browser
def test_with_large_letters_on_a_small_screen_it_still_fits(browser, written):  # noqa: F811
    for name in PAGES:
        with opened(browser, written(name)) as tab:
            tab.set_viewport_size({"width": 320, "height": 256})
            tab.evaluate("document.documentElement.style.fontSize = '150%'")
            assert tab.evaluate(OVERFLOW) == [320, 320, []]


@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["pictures", "texts"])
def test_all_text_stands_out_from_its_ground(browser, written, name, theme):  # noqa: F811
    with opened(browser, written(name), theme=theme) as tab:
        tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        seen = tab.evaluate(CONTRASTS)
    assert {"SPAN", "P", "DT", "DD", "H2"} <= set(seen)
    assert {kind: ratio for kind, ratio in seen.items() if ratio < 4.5} == {}


@in_a_browser
def test_the_tab_key_reaches_the_queries_and_the_skip_link_the_answer(browser, written):  # noqa: F811
    with opened(browser, written("pictures"), reduced_motion="reduce") as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "Skip to what was found"
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "red.jpg"
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#query-2"
        assert tab.locator("#query-2").is_visible()


@in_a_browser
def test_what_a_screen_reader_is_told(browser, written):  # noqa: F811
    with opened(browser, written("pictures")) as tab:
        session = tab.context.new_cdp_session(tab)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
    told: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            told.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"banner", "main", "navigation", "contentinfo", "list"} <= set(told)
    assert told["article"] == ["red.jpg", "a/blue.jpg"]
    headings = {"Search in cars/images.tar, 8,144 pictures", "What is nearest", "red.jpg", "a/blue.jpg", "What was run"}
    assert set(told["heading"]) == headings
    assert told["image"] == ["red.jpg", "a/blue.jpg"]  # of what was found, the name stands below


@in_a_browser
def test_long_texts_unfold_without_javascript(browser, written):  # noqa: F811
    with opened(browser, written("texts"), java_script_enabled=False) as tab:
        assert not tab.locator("details p").first.is_visible()
        tab.get_by_text("In full").first.click()
        assert tab.locator("details p").first.is_visible()


@in_a_browser
def test_it_prints_in_black_on_white_without_what_is_of_no_use_on_paper(browser, written):  # noqa: F811
    with opened(browser, written("pictures"), theme="dark") as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert not tab.locator("nav").is_visible()
        assert tab.locator(".pictures img").first.is_visible()
