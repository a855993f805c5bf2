"""Several people at once: five sessions, two servers on one folder, and a job that all of them see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from es2.jobs.job import children
from es2.jobs.queue import launch
from tests.builders_artifacts import DISTANCES, Compared, write_comparison
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = [*marks, pytest.mark.long]

WORKER = """
import sys, time
from pathlib import Path
from es2.jobs.running import run_job

def wait(config, report, folder):
    while True:
        report("capture", 1, 2)
        time.sleep(0.05)

sys.exit(run_job(Path(sys.argv[1]), {"prepare": wait}))
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def addresses(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two servers on one folder."""
    home = compared.artifacts.home
    with served(home) as first, served(home, log=tmp_path_factory.mktemp("logs") / "second.log") as second:
        yield first, second


def layer_of(page: playwright.Page) -> int:
    return int(parse_qs(urlsplit(page.url).query)["layer"][0])


def test_five_sessions_do_not_meet(
    addresses: tuple[str, str], compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    pages = []
    for at in range(5):
        link = compared.link(layer=str(at), view="pca" if at % 2 else "separation")
        pages.append(open_page(f"{addresses[at % 2]}layers?{urlencode(link)}"))
    for page in pages:
        expect(page.locator(".st-key-projection .scatterlayer .point").first).to_be_attached()
    for page in pages:  # all click before any is looked at again
        settle(page)
        page.locator(".st-key-next_layer button").first.click()
    for at, page in enumerate(pages):
        expect(page.locator(".st-key-details h3").first).to_have_text(f"Layer {at + 1}")
        settle(page)
        assert layer_of(page) == at + 1 < len(DISTANCES)
        title = page.evaluate("document.querySelector('.st-key-projection .js-plotly-plot').layout.xaxis.title.text")
        assert title.startswith("Principal component") == bool(at % 2)


def test_a_job_is_seen_and_cancelled_from_either_server(
    addresses: tuple[str, str], compared: Compared, open_page: Callable[[str], playwright.Page], tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    config = {"model": "some-model", "prompts": "builtin", "position": "last"}
    job, waiting = (
        launch("prepare", config, root=compared.artifacts.home / "runs", command=[sys.executable, str(worker)])
        for _ in range(2)
    )
    processes = [children[one.path] for one in (job, waiting)]
    pages = [open_page(f"{address}layers?{urlencode(compared.link())}") for address in addresses]
    for page in pages:
        expect(page.locator(f".st-key-job_{job.id}")).to_contain_text("Reading prompts")
        expect(page.locator(f".st-key-job_{waiting.id}")).to_contain_text("Waiting for its turn, 1 before it")
    settle(pages[1])
    pages[1].locator(f".st-key-cancel_sidebar_{waiting.id} button").first.click()
    for page in pages:
        expect(page.locator(f".st-key-job_{waiting.id}")).to_have_count(0)
    settle(pages[0])
    pages[0].locator(f".st-key-cancel_sidebar_{job.id} button").first.click()
    for page in pages:
        expect(page.locator("[class*=st-key-job_]")).to_have_count(0)
    assert [process.wait(60) for process in processes] == [1, 1]
    assert (job.status(), waiting.status()) == ("cancelled", "cancelled")
    assert [event["status"] for event in waiting.events()[0] if event["event"] == "status"] == ["queued", "cancelled"]
