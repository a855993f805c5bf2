"""How long a person waits in the app: opening it, and from the click on a layer to its new figures.

    python -m tests.benchmarks.layer_change [--home FOLDER] [--clicks 20]

Drives the real app in headless Chromium on the committed showcase, or on the newest comparison below `--home`. A layer
is clicked in the strip; what is waited for is that both plots of the pair hold other points than before. Printed as
JSON: seconds, their median, and for each view.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.browser.serving import CHROMIUM, FLAGS, playwright, served, settle

VIEWS = ("separation", "pca", "umap")
SHOWCASE = Path(__file__).parents[2] / "cached_activations" / "showcase"
POINTS = """[...document.querySelectorAll('.st-key-linked_pair .plots-plot')].map(plot =>
    plot.data ? Array.from(plot._fullData.find(trace => trace.name === 'harmful').x.slice(0, 5)).join() : '').join()"""


def click_layer(page: playwright.Page, layer: int) -> None:
    """Click the strip's marker of a layer."""
    page.locator(".st-key-accuracy_strip .scatterlayer .trace").last.wait_for(state="attached")
    box = page.locator(".st-key-accuracy_strip .nsewdrag").first.bounding_box()
    assert box is not None
    low, high = page.evaluate(
        "document.querySelector('.st-key-accuracy_strip .js-plotly-plot')._fullLayout.xaxis.range"
    )
    at = box["x"] + (layer - low) / (high - low) * box["width"]
    page.mouse.move(at, box["y"] + box["height"] / 2)
    page.mouse.click(at, box["y"] + box["height"] / 2)


def measure(address: str, link: str, clicks: int, driver: playwright.Playwright) -> dict[str, object]:
    """Open the comparison that a link asks for, in its view, and click through layers."""
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_context(viewport={"width": 1440, "height": 1400}).new_page()
    started = time.perf_counter()
    page.goto(f"{address}?{link}")
    page.wait_for_function(f"({POINTS}).length > 10", timeout=60_000)
    opened = time.perf_counter() - started
    settle(page)
    seconds = []
    for number in range(clicks):
        before = page.evaluate(POINTS)
        layer = 10 + (number * 7) % 17
        started = time.perf_counter()
        click_layer(page, layer)
        try:
            page.wait_for_function(f"({POINTS}) !== {json.dumps(before)}", timeout=15_000, polling=10)
        except playwright.TimeoutError:
            continue  # the layer that was shown already
        seconds.append(round(time.perf_counter() - started, 3))
        settle(page)
    browser.close()
    return {"first_figure": round(opened, 2), "median": statistics.median(seconds), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--clicks", type=int, default=20)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as empty,
        playwright.sync_playwright() as driver,
        served(arguments.home or Path(empty), ES2_SHOWCASE=str(SHOWCASE)) as address,
    ):
        found = {view: measure(address, f"view={view}", arguments.clicks, driver) for view in VIEWS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
