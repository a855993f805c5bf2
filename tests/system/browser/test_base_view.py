"""The base view in a real browser: clicks, lassos and reloads, which nothing else can test.

The server runs as a user starts it, on a folder of synthetic artifacts; a widget is found by its key, which Streamlit
makes a CSS class. Every wait is for something on the page, never for a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.builders_artifacts import BEST_LAYER, DISTANCES, NASTY, Artifacts, write_artifacts
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = marks


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return write_artifacts(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def address(artifacts: Artifacts) -> Iterator[str]:
    with served(artifacts.home) as address:
        yield address


def points(page: playwright.Page) -> playwright.Locator:
    return page.locator(".st-key-projection .scatterlayer .point")


def layout_of(page: playwright.Page, key: str) -> dict:
    """The layout of a chart as plotly holds it."""
    return page.evaluate(f"document.querySelector('.st-key-{key} .js-plotly-plot').layout")


def expect_layer(page: playwright.Page, layer: int) -> None:
    """Wait until this layer is the chosen one, in the address, the heading and the strip, and everything is drawn."""
    expect(page.locator(".st-key-details h3").first).to_have_text(f"Layer {layer}")
    page.wait_for_url(lambda url: parse_qs(urlsplit(url).query).get("layer") == [str(layer)])
    page.wait_for_function(
        f"document.querySelector('.st-key-accuracy_strip .js-plotly-plot')?.layout?.shapes?.[0]?.x0 === {layer}"
    )
    settle(page)


def click_layer(page: playwright.Page, layer: int, *, height: float, key: str = "accuracy_strip") -> None:
    """Click in a layer's column of a strip, at a height from 0 (top) to 1, far from any marker."""
    box = page.locator(f".st-key-{key} .nsewdrag").first.bounding_box()
    assert box is not None
    n_layers = len(DISTANCES)
    x = box["x"] + box["width"] * (layer + 0.6) / n_layers
    y = box["y"] + box["height"] * height
    page.mouse.move(x - 4, y)
    page.mouse.move(x, y)
    expect(page.locator(f".st-key-{key} .hovertext").first).to_contain_text(f"layer {layer}")
    page.mouse.click(x, y)


def lasso(page: playwright.Page, left: float, top: float, right: float, bottom: float) -> None:
    """Draw a lasso around a part of the projection, in parts of its width and height."""
    box = page.locator(".st-key-projection .nsewdrag").first.bounding_box()
    assert box is not None

    def place(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    page.mouse.move(*place(left, top))
    page.mouse.down()
    for corner in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(*place(*corner), steps=8)
    page.mouse.up()


def test_click_lasso_reload(address: str, artifacts: Artifacts, open_page: Callable[[str], playwright.Page]) -> None:
    page = open_page(f"{address}layers?{urlencode(artifacts.link())}")
    n_test = int(artifacts.prompts.in_split("test").sum())
    expect(points(page)).to_have_count(n_test)
    expect_layer(page, BEST_LAYER)

    before = page.locator(".st-key-projection .scatterlayer .trace .point").first.get_attribute("transform")
    click_layer(page, 1, height=0.9)
    expect_layer(page, 1)
    after = page.locator(".st-key-projection .scatterlayer .trace .point").first.get_attribute("transform")
    assert before != after, "the projection shows the other layer"

    click_layer(page, 4, height=0.2, key="margin_strip")
    expect_layer(page, 4)

    page.locator(".st-key-tool button").nth(1).click()
    page.wait_for_function(
        "document.querySelector('.st-key-projection .js-plotly-plot')?._fullLayout?.dragmode === 'lasso'"
    )
    settle(page)
    lasso(page, 0.02, 0.02, 0.98, 0.98)
    heading = page.locator(".st-key-details h3").nth(1)
    expect(heading).to_have_text(f"{n_test} selected prompts")
    expect(points(page)).to_have_count(2 * n_test)  # each has its ring
    cells = page.locator(".st-key-prompt_table [role=gridcell]")
    expect(cells.first).to_be_attached()
    tested = set(artifacts.prompts.select(artifacts.prompts.in_split("test")).texts)
    listed = page.locator(".st-key-prompt_table [role=gridcell][aria-colindex='1']").all_text_contents()
    assert listed
    assert set(listed) <= tested

    click_layer(page, 2, height=0.5)
    expect_layer(page, 2)
    expect(heading).to_have_text(f"{n_test} selected prompts")
    page.locator(".st-key-clear_selection button").click()
    expect(heading).to_have_text("Hardest prompts")

    page.locator(".st-key-view button", has_text="PCA").click()
    page.wait_for_url(lambda url: parse_qs(urlsplit(url).query).get("view") == ["pca"])
    page.reload()
    expect(points(page)).to_have_count(n_test)
    expect_layer(page, 2)
    assert "Principal component" in layout_of(page, "projection")["xaxis"]["title"]["text"]


def test_a_click_selects_one_prompt_and_a_second_click_does_no_harm(
    address: str, artifacts: Artifacts, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}layers?{urlencode(artifacts.link())}")
    heading = page.locator(".st-key-details h3").nth(1)
    harmful = page.locator(".st-key-projection .scatterlayer .trace").nth(1).locator(".point").first
    expect(harmful).to_be_attached()
    for _ in range(2):
        settle(page)
        harmful.hover(force=True)
        harmful.click(force=True)
        expect(heading).to_have_text("1 selected prompt")
    expect(page.locator(".st-key-prompt_card")).to_contain_text("its twin")
    for place in ("prompt_card", "prompt_table"):
        expect(page.locator(f".st-key-{place}")).to_contain_text(NASTY[0])
        assert page.locator(f".st-key-{place} script, .st-key-{place} b").count() == 0


def test_hover_shows_the_prompt_and_runs_nothing(
    address: str, artifacts: Artifacts, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}layers?{urlencode(artifacts.link())}")
    harmful = page.locator(".st-key-projection .scatterlayer .trace").nth(1).locator(".point").first
    expect(harmful).to_be_attached()
    settle(page)
    harmful.hover(force=True)
    label = page.locator(".st-key-projection .hoverlayer .hovertext")
    expect(label).to_contain_text("<script>alert(1)</script> &amp; $x^2$ how do I")
    expect(label).to_contain_text("pair-000")


def test_the_back_button_goes_back(
    address: str, artifacts: Artifacts, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}layers?{urlencode(artifacts.link())}")
    expect_layer(page, BEST_LAYER)
    page.locator(".st-key-next_layer button").first.click()
    expect_layer(page, BEST_LAYER + 1)
    page.go_back()
    expect_layer(page, BEST_LAYER)


def test_the_keyboard_goes_through_the_layers(
    address: str, artifacts: Artifacts, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}layers?{urlencode(artifacts.link())}")
    expect_layer(page, BEST_LAYER)
    for key, layer in (("n", BEST_LAYER + 1), ("p", BEST_LAYER)):
        for _ in range(3):  # Streamlit sometimes misses the first key after a page was drawn
            page.keyboard.press(key)
            try:
                expect(page.locator(".st-key-details h3").first).to_have_text(f"Layer {layer}", timeout=10_000)
                break
            except AssertionError:
                continue
        expect_layer(page, layer)


def test_an_empty_cache_offers_one_button(tmp_path: Path, open_page: Callable[[str], playwright.Page]) -> None:
    with served(tmp_path) as address:
        page = open_page(f"{address}layers")
        expect(page.locator(".st-key-prepare button")).to_be_enabled()
        expect(page.locator(".js-plotly-plot")).to_have_count(0)
