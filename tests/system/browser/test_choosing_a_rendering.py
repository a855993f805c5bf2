"""Another system prompt, chosen in the panel, is another activation set, and the page keeps to it."""

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

pytestmark = marks

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


def test_another_system_prompt_is_another_set(
    address: str, home: Path, open_page: Callable[[str], playwright.Page]
) -> None:
    link = {"model": str(home / "tiny-llama"), "prompts": str(home / "prompts.csv")}
    page = open_page(f"{address}layers?{urlencode(link)}")
    points = page.locator(".st-key-projection .scatterlayer .point")
    prompts = load_prompts(str(home / "prompts.csv"))
    n_points = int(prompts.in_split("test").sum())
    expect(points).to_have_count(n_points)

    settle(page)
    page.locator(".st-key-rendering button").click()
    panel = page.get_by_role("dialog")
    expect(panel.locator(".prompt-tokens .read")).to_have_count(1)
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
