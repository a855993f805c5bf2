"""The browser and its pages. Imports of playwright stand inside, so that tests are collected where it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.system.browser.serving import CHROMIUM, FLAGS, playwright

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Open an address in a window of its own; fails the test when the page logs an uncaught error."""
    from tests.system.browser.serving import PATIENCE

    context = browser.new_context(viewport={"width": 1440, "height": 2000})
    context.set_default_timeout(PATIENCE)
    problems: list[str] = []

    def open_page(address: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    context.close()
    assert problems == []
