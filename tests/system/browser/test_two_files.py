"""Two files as people have them, from the upload over a corrected column to the points of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from es2.prompts.loading import load_prompts
from es2.prompts.sources import read_source
from tests.builders import save_tiny_model
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = [*marks, pytest.mark.long]

WORK = 180_000
"""Milliseconds for a capture of the tiny model, on a machine at work."""
HARMFUL = "goal;text;note\r\n" + "".join(f"Break lock {i};About break {i};x\r\n" for i in range(60))
HARMLESS = "".join(f"Oil gate {i}\n" for i in range(60))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "tiny-llama")
    return home


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    with served(home, ES2_CACHE=str(home / "cache"), OMP_NUM_THREADS="1") as address:
        yield address


def upload(page: playwright.Page, box: str, name: str, content: str) -> None:
    chooser = page.locator(f".st-key-own_{box} input[type=file]")
    chooser.set_input_files({"name": name, "mimeType": "text/plain", "buffer": content.encode()})


def choose(page: playwright.Page, key: str, option: str) -> None:
    """Pick from a select box."""
    settle(page)
    page.locator(f".st-key-{key} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_two_files_a_corrected_column_and_their_points(
    address: str, home: Path, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}own?{urlencode({'model': str(home / 'tiny-llama')})}")
    upload(page, "harmful", "Ziele.csv", HARMFUL)
    expect(page.get_by_text("give a file of harmless ones too")).to_be_visible()
    upload(page, "harmless", "gates.txt", HARMLESS)
    reading = page.locator(".st-key-own_reading_of_files")
    expect(reading).to_contain_text("several columns that may hold the prompt: text, goal")
    expect(page.get_by_role("button", name="Use these prompts")).to_have_count(0)
    choose(page, "own_prompt_column", "goal")
    expect(reading).to_contain_text("prompts from goal, labels from the file given")
    expect(reading).to_contain_text("60 harmful, 60 harmless.")

    # Another page and back: the boxes are empty, what was understood is still there.
    page.locator("[data-testid=stSidebarNav] a", has_text="Layers").click()
    expect(page.get_by_role("button", name="Capture and analyse")).to_be_visible()
    settle(page)
    page.locator("[data-testid=stSidebarNav] a", has_text="Your own").click()
    expect(reading).to_contain_text("prompts from goal")
    settle(page)
    page.locator(".st-key-own_use button").first.click()

    expect(page.locator("[data-testid=stSidebar]")).to_contain_text("prompts from goal")
    source = parse_qs(urlsplit(page.url).query)["prompts"][0]
    assert read_source(source).prompt_column == "goal"
    prompts = load_prompts(source)
    settle(page)
    page.get_by_role("button", name="Capture and analyse").click()
    points = page.locator(".st-key-projection .scatterlayer .point")
    expect(points).to_have_count(int(prompts.in_split("test").sum()), timeout=WORK)

    page.reload()
    expect(points).to_have_count(int(prompts.in_split("test").sum()))
    assert parse_qs(urlsplit(page.url).query)["prompts"][0] == source
