"""What somebody brings along and takes away, in a real browser; and what a fresh clone shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.builders_artifacts import Compared, write_comparison
from tests.system.browser.serving import PATIENCE, expect, marks, playwright, served, settle

pytestmark = marks

GOOD = b"prompt,label\n" + b"".join(
    b"how to break lock %d,harmful\nhow to oil lock %d,harmless\n" % (i, i) for i in range(60)
)
BAD = b"prompt,label\nhow to oil <b>a lock</b>,perhaps\n,harmless\nhow to break a lock,harmful\n"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def address(compared: Compared) -> Iterator[str]:
    with served(compared.artifacts.home) as address:
        yield address


def test_a_bad_file_and_a_good_one(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = open_page(f"{address}own?{urlencode(compared.link())}")
    chooser = page.locator(".st-key-own_file input[type=file]")
    chooser.set_input_files({"name": "mine.csv", "mimeType": "text/csv", "buffer": BAD})
    expect(page.get_by_text("2 rows cannot be read. Mend the file, or leave them out.")).to_be_visible()
    expect(page.get_by_role("button", name="Use these prompts")).to_have_count(0)
    chooser.set_input_files({"name": "../mine.csv", "mimeType": "text/csv", "buffer": GOOD})
    expect(page.get_by_text("of 120 prompts.")).to_be_visible()
    page.get_by_role("button", name="Use these prompts").click()
    expect(page.get_by_role("button", name="Capture and analyse")).to_be_visible()
    chosen = Path(parse_qs(urlsplit(page.url).query)["prompts"][0])
    assert chosen.parents[1] == compared.artifacts.home / "uploads"
    assert chosen.name == "mine.csv"
    assert chosen.read_bytes() == GOOD


def test_a_report_is_taken_away_and_opens_without_the_app(
    address: str,
    compared: Compared,
    open_page: Callable[[str], playwright.Page],
    browser: playwright.Browser,
    tmp_path: Path,
) -> None:
    page = open_page(f"{address}?{urlencode(compared.link())}")
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    settle(page)
    page.locator(".st-key-take_away button").first.click()
    with page.expect_download() as download:
        page.locator(".st-key-take_report button").click()
    kept = tmp_path / "report.html"
    download.value.save_as(kept)
    alone = browser.new_context(offline=True)
    alone.set_default_timeout(PATIENCE)
    asked: list[str] = []
    report = alone.new_page()
    report.on("request", lambda request: asked.append(request.url))
    report.goto(kept.as_uri())
    expect(report.locator(".js-plotly-plot").first).to_be_visible()
    expect(report.get_by_text("fisher", exact=False).first).to_be_visible()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    alone.close()


def test_a_fresh_clone_opens_on_the_showcase(tmp_path: Path, open_page: Callable[[str], playwright.Page]) -> None:
    showcase = Path(__file__).parents[3] / "cached_activations" / "showcase"
    if not showcase.is_dir():
        pytest.skip("no showcase is committed")
    with served(tmp_path, ES2_SHOWCASE=str(showcase)) as address:
        page = open_page(address)
        expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
        expect(page.locator(".st-key-verdict")).to_contain_text("Separated")
        expect(page.locator(".st-key-introduction")).to_contain_text("Embedding Space Separation")
        settle(page)
        for name, found in (("Behaviour", "refuses more harmful requests"), ("Robustness", "learnt directions")):
            page.get_by_role("link", name=name).click()
            expect(page.locator(".st-key-finding")).to_contain_text(found)
            expect(page.locator(".st-key-header")).to_contain_text("qwen2.5-coder-0.5b-instruct")
            expect(page.get_by_text("without weights and without replies")).to_be_visible()
            settle(page)
        page.get_by_role("link", name="Compare").click()
        settle(page)
        page.locator(".st-key-to_runs button").click()
        page.wait_for_url("**/runs**")
        settle(page)  # the server ends only when the page is computed
