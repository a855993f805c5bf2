"""What is chosen of how a model reads prompts: a position in the map, and a system prompt, which is another set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from es2.core.rendering import Rendering
from es2.models.catalogue import resolve
from es2.prompts.loading import load_prompts
from es2.store.store import Store
from es2.workflow.derived import find_activations
from es2.workflow.prepare import prepare
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = [*marks, pytest.mark.long]

WORK = 180_000
"""Milliseconds for a capture of the tiny model, on a machine at work."""
OWN = "Answer in <verse>."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a model, prompts, and what the page shows of both at first."""
    home = tmp_path_factory.mktemp("home")
    model = save_tiny_model(home / "tiny-llama")
    prompts = write_prompts(home / "prompts.csv", tiny_prompts(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        patch.setenv("ES2_CACHE", str(home / "cache"))
        prepare(str(model), load_prompts(str(prompts)))
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with served(home, ES2_CACHE=str(home / "cache"), OMP_NUM_THREADS="1") as address:
        yield address


def map_of_positions(page: playwright.Page, n_points: int) -> None:
    """Have the other captured position analysed, choose a layer of it in the map, open the link again, and go back."""
    settle(page)
    page.locator(".st-key-analyse_positions button").click()
    drawn = page.locator(".st-key-position_map .nsewdrag")
    expect(drawn).to_have_count(1, timeout=WORK)
    choose_cell(page, layer=1, row=1)
    expect_chosen(page, "last_instruction", 1, 1)
    page.reload()
    expect_chosen(page, "last_instruction", 1, 1)
    expect(page.locator(".st-key-projection .scatterlayer .point")).to_have_count(n_points)
    choose_cell(page, layer=0, row=0)
    expect_chosen(page, "last", 0, 0)


def choose_cell(page: playwright.Page, layer: int, row: int) -> None:
    """Click a square of the map."""
    settle(page)
    x, y = page.evaluate(
        """([layer, row]) => {
            const plot = document.querySelector('.st-key-position_map .js-plotly-plot');
            const box = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;
            return [box.left + xaxis._offset + xaxis.d2p(layer), box.top + yaxis._offset + yaxis.d2p(row)];
        }""",
        [layer, row],
    )
    page.mouse.move(x, y)
    expect(page.locator(".st-key-position_map .hovertext").first).to_contain_text(f"layer {layer}")
    page.mouse.click(x, y)


def expect_chosen(page: playwright.Page, position: str, layer: int, row: int) -> None:
    """Layer and position are in the address, the heading and the frame in the map."""
    page.wait_for_function(
        "([layer, row]) => { const frame = document.querySelector('.st-key-position_map .js-plotly-plot')"
        "?.layout?.shapes?.[0]; return frame?.x0 === layer - 0.5 && frame?.y0 === row - 0.5; }",
        arg=[layer, row],
    )
    expect(page.get_by_role("heading", name=f"Layer {layer}", exact=True)).to_be_visible()
    page.wait_for_function(  # it follows the page
        "([position, layer]) => { const asked = new URLSearchParams(location.search);"
        " return asked.get('position') === position && asked.get('layer') === layer; }",
        arg=[position, str(layer)],
    )


def test_another_system_prompt_is_another_set(
    address: str, home: Path, open_page: Callable[[str], playwright.Page]
) -> None:
    link = {"model": str(home / "tiny-llama"), "prompts": str(home / "prompts.csv")}
    page = open_page(f"{address}layers?{urlencode(link)}")
    points = page.locator(".st-key-projection .scatterlayer .point")
    prompts = load_prompts(str(home / "prompts.csv"))
    n_points = int(prompts.in_split("test").sum())
    expect(points).to_have_count(n_points)

    map_of_positions(page, n_points)
    settle(page)
    page.locator(".st-key-rendering button").click()
    panel = page.get_by_role("dialog")
    expect(panel.locator(".prompt-tokens .read")).to_have_count(1)
    for name in ("model", "prompts"):
        expect(panel.locator(f".st-key-rendering_{name} input")).to_have_count(1)
    settle(page)
    panel.get_by_text("Own text", exact=True).click()
    expect(panel).to_contain_text("The system prompt is blank")
    box = panel.locator(".st-key-rendering_text textarea")
    box.fill(OWN)
    box.press("Control+Enter")
    expect(panel.locator(".prompt-text")).to_contain_text(OWN)
    settle(page)
    panel.get_by_role("button", name="Read prompts this way").click()

    expect(page.locator("[data-testid=stSidebar]")).to_contain_text(OWN)
    capture = page.get_by_role("button", name="Capture and analyse")
    expect(capture).to_be_visible()
    settle(page)
    assert parse_qs(urlsplit(page.url).query)["system_prompt"] == [OWN]
    capture.click()
    expect(points).to_have_count(n_points, timeout=WORK)
    store = Store(home / "cached_activations")
    model = resolve(str(home / "tiny-llama")).name
    sets = [
        find_activations(model, prompts.measured(), "last", store, rendering=rendering)
        for rendering in (Rendering(), Rendering(system_prompt=OWN))
    ]
    assert None not in sets
    assert sets[0].key != sets[1].key  # type: ignore[union-attr]
    settle(page)
    page.locator("[data-testid=stSidebarNav] a", has_text="Runs").click()
    expect(page.locator("[data-testid=stSidebar]")).to_contain_text(OWN)
