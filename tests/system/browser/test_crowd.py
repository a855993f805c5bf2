"""Thousands of prompts in a figure, which WebGL draws: everything answers as it does with fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlencode

import pytest

from es2.prompts.prompt_set import HARMFUL
from tests.builders_artifacts import Compared, write_comparison
from tests.system.browser.serving import expect, marks, place_of, playwright, served, settle

pytestmark = [*marks, pytest.mark.long]

N_PAIRS = 1560
"""Of which two thirds are measured: 2,080 prompts in each figure with the `probe` split shown, 1,040 without."""
WITHOUT_WEBGL = """
const getContext = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
    return kind.includes('webgl') ? null : getContext.call(this, kind, ...rest);
};
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"), N_PAIRS)


@pytest.fixture(scope="module")
def address(compared: Compared) -> Iterator[str]:
    with served(compared.artifacts.home) as address:
        yield f"{address}?{urlencode(compared.link(layer='2', splits='all'))}"


def opened(open_page: Callable[[str], playwright.Page], address: str, by: str) -> playwright.Page:
    page = open_page(address)
    expect(page.locator(f".st-key-linked_pair {by}").first).to_be_attached()
    settle(page)
    return page


def choose(page: playwright.Page, side: int, row: int) -> None:
    page.mouse.click(*place_of(page, side, row))


def farthest(compared: Compared) -> int:
    """The harmful prompt of layer 2 that stands alone."""
    margins = compared.analysis.base_probes.margin(compared.artifacts.activations.layer(2), 2)
    return int(margins.argmax())


def ringed(page: playwright.Page, side: int) -> list[list[float]]:
    """Where what is selected stands on one side."""
    return page.evaluate(
        """(side) => {
            const plot = document.querySelectorAll('.st-key-linked_pair .js-plotly-plot')[side];
            const { x, y } = plot._fullData.find((trace) => trace.name === 'selected');
            return Array.from(x, (value, index) => [value, y[index]]);
        }""",
        side,
    )


def test_a_crowd_answers_to_the_mouse(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, "canvas.gl-canvas-context")
    expect(page.locator(".st-key-linked_pair .point")).to_have_count(0)
    row = farthest(compared)
    assert compared.artifacts.prompts.labels[row] == HARMFUL
    page.mouse.move(*place_of(page, 0, row))
    expect(page.locator(".plots-halo")).to_have_count(2)
    choose(page, 0, row)
    expect(page.locator(".st-key-prompt_card")).to_contain_text(compared.artifacts.prompts.texts[row])
    settle(page)
    assert [len(ringed(page, side)) for side in (0, 1)] == [1, 1]


def test_fewer_points_are_drawn_without_webgl(address: str, open_page: Callable[[str], playwright.Page]) -> None:
    page = opened(open_page, address, "canvas.gl-canvas-context")
    page.locator(".st-key-others label").click()
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    settle(page)
    assert page.locator(".st-key-linked_pair .point").count() == 2 * 2 * N_PAIRS // 3


def test_a_browser_without_webgl_draws_the_crowd_too(
    address: str, compared: Compared, browser: playwright.Browser
) -> None:
    context = browser.new_context(viewport={"width": 1440, "height": 2000})
    context.add_init_script(WITHOUT_WEBGL)
    page = opened(lambda at: (page := context.new_page()).goto(at) and page, address, ".point")
    choose(page, 1, farthest(compared))
    expect(page.locator(".st-key-selected h3")).to_have_text("1 selected prompt")
    context.close()


def test_a_lost_context_draws_the_crowd_anew(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, "canvas.gl-canvas-context")
    canvas = "document.querySelector('.st-key-linked_pair canvas.gl-canvas-context')"
    page.evaluate(f"{canvas}.getContext('webgl').getExtension('WEBGL_lose_context').loseContext()")
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    settle(page)
    assert page.locator(".st-key-linked_pair .point").count() == 2 * 4 * N_PAIRS // 3
    choose(page, 0, farthest(compared))
    expect(page.locator(".st-key-selected h3")).to_have_text("1 selected prompt")
