"""The series in a real browser: sets are chosen, each has a panel, and a prompt is marked in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from es2.training.terms import DEFAULT_OBJECTIVE
from es2.workflow.series import analyse_members, open_members
from tests.builders_artifacts import TUNED_DISTANCES
from tests.builders_series import Series, write_series, write_set
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = marks

PANELS = ".st-key-series_panels .plots-plot"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Series]:
    home: Path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        found = write_series(home, 60)
        base, prompts = found.artifacts.activations, found.artifacts.prompts
        analyse_members(base, open_members((), base, "last"), prompts, "last")
        write_set(home, found.artifacts, TUNED_DISTANCES, model="another-model", run="of-another-base")
        yield found


def panel(page: playwright.Page, index: int) -> playwright.Locator:
    return page.locator(PANELS).nth(index)


def test_four_sets_show_four_panels_and_one_prompt_in_all(
    made: Series, open_page: Callable[[str], playwright.Page]
) -> None:
    home = made.artifacts.home
    with served(home) as address:
        steps = ",".join(one.key for one in made.checkpoints)
        page = open_page(f"{address}series?{urlencode(made.artifacts.link(layer='2', series=steps))}")
        expect(page.locator(PANELS)).to_have_count(3)
        settle(page)
        page.locator(".st-key-series_sets input").click()
        options = page.get_by_role("option")
        expect(options.filter(has_text="another")).to_have_count(0)
        options.filter(has_text=f"{DEFAULT_OBJECTIVE} at 2, 3").click()
        page.keyboard.press("Escape")
        expect(page.locator(PANELS)).to_have_count(4)
        settle(page)
        keys = parse_qs(urlsplit(page.url).query)["series"][0].split(",")
        assert set(keys) == {made.compared.tuned.key, *(one.key for one in made.checkpoints)}
        ranges = page.evaluate(
            f"[...document.querySelectorAll('{PANELS}')].map(({{_fullLayout: {{xaxis, yaxis}}}}) => "
            "[...xaxis.range, ...yaxis.range])"
        )
        assert all(one == ranges[0] for one in ranges), "one frame"
        point = panel(page, 2).locator(".scatterlayer .trace").nth(1).locator(".point").nth(3)
        point.hover(force=True)
        expect(page.locator(f"{PANELS} .plots-halo")).to_have_count(4)
        point.click(force=True)
        expect(page.get_by_text("1 selected prompt")).to_be_visible()
        settle(page)
        for index in range(4):
            expect(panel(page, index).locator(".scatterlayer .trace").last.locator(".point")).to_have_count(1)
