"""Hours of use in a few minutes or in one: `python -m tests.system.soak --minutes 60`.

A visitor comes with a browser, looks at both models layer by layer, turns every page, brings a file, starts a job on it
and cancels it or lets it end, and leaves; then the next one comes. The server that a user would start is measured
between visits: what it holds in memory, its open files, its processes, its temporary files. The first fifth of the
measurements is warm-up; the medians of the second and the last are compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import psutil

from es2.jobs.queue import list_jobs
from tests.builders import save_tiny_model
from tests.builders_artifacts import write_comparison
from tests.system.browser.serving import CHROMIUM, FLAGS, expect, playwright, served, settle

logger = logging.getLogger(__name__)

GROWTH = 0.10
"""By how much of it the server's memory may have grown between the second and the last fifth."""
SPARE_FILES = 6
"""Connections that come and go."""
KEPT_SECONDS, FILES_KEPT = 150.0, 3
"""Streamlit keeps a session for two minutes after its page has gone, with an event loop, which has three handles."""
WAIT_SECONDS = 60.0
PATIENCE = 120_000
"""Milliseconds for anything that a visitor waits for; a slow machine leaks nothing."""


@dataclass(frozen=True)
class Sample:
    """The server between two visits.

    Attributes:
        seconds: since the start.
        memory: resident bytes of the server itself.
        files: its open files and sockets.
        sessions: how many sessions ended so lately that Streamlit may keep them still.
        threads: its threads.
        children: processes that it started and that are still there, zombies included.
        temporary: files and folders that it left in the system's temporary folder or, unfinished, in the home.
        jobs: how many jobs there have been.
    """

    seconds: float
    memory: int
    files: int
    sessions: int
    threads: int
    children: int
    temporary: int
    jobs: int


class Server:
    """The process behind an address."""

    def __init__(self, home: Path, temporary: Path) -> None:
        self.home, self.temporary = home, temporary
        (self.process,) = [child for child in psutil.Process().children() if "streamlit" in " ".join(child.cmdline())]
        self.started = time.monotonic()
        self.left: list[float] = []

    def sample(self) -> Sample:
        """Wait for what is on its way out, and measure."""
        end = time.monotonic() + WAIT_SECONDS
        while self.process.children(recursive=True) and time.monotonic() < end:
            time.sleep(0.2)
        unfinished = [path for name in (".tmp-*", ".former-*", ".deleted-*") for path in self.home.rglob(name)]
        return Sample(
            seconds=round(time.monotonic() - self.started, 1),
            memory=self.process.memory_info().rss,
            files=self.process.num_fds(),
            sessions=sum(time.monotonic() - left < KEPT_SECONDS for left in self.left),
            threads=self.process.num_threads(),
            children=len(self.process.children(recursive=True)),
            temporary=len(list(self.temporary.iterdir())) + len(unfinished),
            jobs=len(list_jobs(self.home / "runs")),
        )

    def stacks(self) -> str:
        """Where each of its threads is, and what it logged; it ends with that."""
        self.process.send_signal(signal.SIGABRT)
        self.process.wait(WAIT_SECONDS)
        return (self.home / "server.log").read_text(errors="replace")


def prompts_file(number: int) -> dict[str, Any]:
    """A file that nobody has brought before."""
    rows = ["prompt,label,pair"]
    for pair in range(40):
        rows += [
            f"how to break lock {pair} of {number},harmful,{pair}",
            f"how to oil lock {pair} of {number},harmless,{pair}",
        ]
    return {"name": f"mine {number}.csv", "mimeType": "text/csv", "buffer": "\n".join(rows).encode()}


def visit(page: playwright.Page, address: str, compared: dict[str, str], model: str, number: int) -> None:
    """Everything that a visitor does."""
    page.goto(f"{address}?{urlencode(compared | {'layer': '1'})}")
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    settle(page)
    for _ in range(2):
        click(page, "next_layer")
    page.locator(".st-key-view button", has_text="PCA").click()
    settle(page)
    for name in ("Runs", "Behaviour", "Robustness", "Layers"):
        page.get_by_role("link", name=name, exact=True).click()
        settle(page)
    for _ in range(2):
        click(page, "previous_layer")
    page.locator(".st-key-view button", has_text="Separation").click()
    settle(page)

    page.goto(f"{address}own?{urlencode({'model': model})}")
    page.locator(".st-key-own_file input[type=file]").set_input_files(prompts_file(number))
    page.get_by_role("button", name="Use these prompts").click()
    page.get_by_role("button", name="Capture and analyse").click()
    cancel = page.locator(".st-key-welcome [class*=st-key-cancel_page_] button").first
    expect(cancel).to_be_visible()
    if number % 4:
        cancel.click()
        expect(page.get_by_text("It was cancelled")).to_be_visible()
    else:
        expect(page.locator(".st-key-accuracy_strip .js-plotly-plot")).to_be_visible(timeout=PATIENCE)
    settle(page)


def click(page: playwright.Page, key: str) -> None:
    page.locator(f".st-key-{key} button").first.click()
    settle(page)


def soak(home: Path, seconds: float) -> tuple[list[Sample], Sample]:
    """Let visitors come for so long; returns the samples between visits, and one after the last visitor."""
    compared = write_comparison(home)
    model = str(save_tiny_model(home / "models" / "tiny-llama"))
    temporary = home / "tmp"
    temporary.mkdir()
    environment = {
        "PYTHONFAULTHANDLER": "1",
        "ES2_CACHE": str(home / "cache"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    samples: list[Sample] = []
    expect.set_options(timeout=PATIENCE)
    with served(home, **environment) as address, playwright.sync_playwright() as driver:
        server = Server(home, temporary)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        number = 0
        while time.monotonic() - server.started < seconds or number < 5:
            context = browser.new_context(viewport={"width": 1440, "height": 1600})
            context.set_default_timeout(PATIENCE)
            problems: list[str] = []
            page = context.new_page()
            page.on("pageerror", lambda error, found=problems: found.append(str(error)))
            try:
                visit(page, address, compared.link(), model, number)
            except (AssertionError, playwright.Error):
                logger.error("Visit %d at %s failed; the server: %s", number, page.url, server.stacks())
                raise
            context.close()
            server.left += 2 * [time.monotonic()]  # it loaded two pages
            if problems:
                raise RuntimeError(f"Visit {number}: {problems[0]}")
            samples.append(server.sample())
            logger.info("Visit %d: %s", number, samples[-1])
            number += 1
        browser.close()
        return samples, server.sample()


def judge(samples: Sequence[Sample], last: Sample) -> dict[str, Any]:
    """What leaked, as JSON values; `leaks` is empty when nothing did."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    names = ("memory", "files", "threads")
    medians = {name: [median(getattr(one, name) for one in part) for part in (early, late)] for name in names}
    own = [median(one.files - FILES_KEPT * one.sessions for one in part) for part in (early, late)]
    growth = medians["memory"][1] / medians["memory"][0] - 1
    leaks = []
    if growth > GROWTH:
        leaks.append(f"memory grew by {growth:.1%}")
    if own[1] > own[0] + SPARE_FILES:
        leaks.append(f"open files that belong to no session grew from {own[0]:.0f} to {own[1]:.0f}")
    if last.children:
        leaks.append(f"{last.children} processes are left")
    if last.temporary:
        leaks.append(f"{last.temporary} temporary files or folders are left")
    return {
        "visits": len(samples),
        "seconds": last.seconds,
        "jobs": last.jobs,
        "memory_mb": [round(value / 1e6, 1) for value in medians["memory"]],
        "memory_growth": round(growth, 4),
        "files": medians["files"],
        "files_of_no_session": own,
        "threads": medians["threads"],
        "children_left": last.children,
        "temporary_left": last.temporary,
        "leaks": leaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, help="write all samples here as JSON, too")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ["ES2_SHOWCASE"] = os.devnull
    with tempfile.TemporaryDirectory(prefix="es2-soak-") as folder:
        samples, last = soak(Path(folder).resolve(), 60 * options.minutes)
    found = judge(samples, last)
    if options.out:
        options.out.write_text(json.dumps(found | {"samples": [asdict(one) for one in samples]}, indent=1))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if found["leaks"] else 0)


if __name__ == "__main__":
    main()
