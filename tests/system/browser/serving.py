"""The app as a user starts it, and Chromium: what all browser tests share, with the fixtures of `conftest.py`.

A widget is found by its key, which Streamlit makes a CSS class. Every wait is for something on the page, never for a
time.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

marks = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

ROOT = Path(__file__).parents[3]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a graphics card
    "--disable-gpu-watchdog",  # which takes a slow machine for a driver that hangs
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
PATIENCE = 60_000
"""Milliseconds; a slow machine is no failure."""

expect = playwright.expect
expect.set_options(timeout=PATIENCE)


STREAMLIT = (sys.executable, "-m", "streamlit", "run", "app/main.py")


@contextmanager
def served(
    home: Path, *, log: Path | None = None, command: Sequence[str] = STREAMLIT, cwd: Path = ROOT, **environment: str
) -> Iterator[str]:
    """The app on a free port, with this home and further variables of its environment; yields its address."""
    log = log or home / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--server.port", str(port), "--server.headless", "true"],
            cwd=cwd,
            env=os.environ | {"ES2_HOME": str(home), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{address}_stcore/health", timeout=1):
                    break
            except OSError:
                server_pause(server)
        yield address
    finally:
        server.terminate()
        server.wait(120)  # it ends what a page computes first


def server_pause(server: subprocess.Popen[bytes]) -> None:
    """A fifth of a second, or until the server ends."""
    try:
        server.wait(0.2)
    except subprocess.TimeoutExpired:
        return


SETTLED = """() => {
    const running = document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state');
    const drawn = [...document.querySelectorAll('.js-plotly-plot')].map(plot => plot._fullLayout);
    const before = window.drawnBefore ?? [];
    window.drawnBefore = drawn;
    const same = drawn.length === before.length && drawn.every((layout, index) => layout === before[index]);
    return running === 'notRunning' && same && drawn.every(layout => layout !== undefined);
}"""


def settle(page: playwright.Page) -> None:
    """Wait until the script has run and no chart was drawn anew between two looks, so that a click meets its aim."""
    page.wait_for_function(SETTLED, polling=400)


_PLACE_OF = """([div, row]) => {
    const plot = document.querySelectorAll('.st-key-linked_pair .js-plotly-plot')[div];
    const box = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;
    for (const { customdata, x, y } of plot._fullData) {
        const at = (customdata ?? []).findIndex(one => one[1] === row);
        if (at < 0) continue;
        return [box.left + xaxis._offset + xaxis.d2p(x[at]), box.top + yaxis._offset + yaxis.d2p(y[at])];
    }
}"""


def place_of(page: playwright.Page, side: int, row: int) -> tuple[float, float]:
    """Where a prompt's point stands on the compare page, in pixels of the window."""
    x, y = page.evaluate(_PLACE_OF, [side, row])
    return x, y
