"""How long a person waits in the app: opening it, and from the click on a layer to its new points.

    python -m tests.benchmarks.layer_change [--home FOLDER] [--clicks 20] [--ahead 0]

Drives the real app in headless Chromium on the committed showcase, or on the newest comparison below `--home`. A layer
is clicked in the strip; what is waited for is that both plots of the pair hold other points than before, and that all
of the page shows the layer. When it opens, that is when the points are drawn, and when they answer to the mouse.
Printed as JSON: seconds, their median, and for each view.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.system.browser.serving import CHROMIUM, FLAGS, playwright, served, settle

HEADING = "document.querySelector('.st-key-pair_controls h3')?.textContent"
OPENING = """
const pair = '.st-key-linked_pair ';
new MutationObserver(() => {
    const drawn = [...document.querySelectorAll(`${pair} .plots-plot`)].some((plot) => plot.listening);
    if (drawn || document.querySelector(`${pair} .plots-points path`)) window.firstFigure ??= performance.now();
    if (drawn) window.answersToTheMouse ??= performance.now();
}).observe(document, {childList: true, subtree: true});
"""
"""Notes when the prompts are to be seen, drawn before plotly has come or by it, and when plotly has drawn them: in
milliseconds since the page was asked for, by the page's own clock, since asking it all the time would slow it down."""
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


def measure(
    address: str, link: str, clicks: int, driver: playwright.Playwright, ahead: float = 0.0
) -> dict[str, object]:
    """Open the comparison that a link asks for, in its view, look for `ahead` seconds, and click through layers."""
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = browser.new_context(viewport={"width": 1440, "height": 1400}).new_page()
    page.add_init_script(OPENING)
    page.goto(f"{address}?{link}")
    page.wait_for_function("window.answersToTheMouse", timeout=60_000)
    opened, answers = page.evaluate("[firstFigure / 1000, answersToTheMouse / 1000]")
    settle(page)
    time.sleep(ahead)
    seconds, whole = [], []
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
        page.wait_for_function(f"{HEADING} === 'Layer {layer}'", timeout=15_000, polling=10)
        whole.append(round(time.perf_counter() - started, 3))
        settle(page)
    browser.close()
    return {
        "first_figure": round(opened, 2),
        "answers_to_the_mouse": round(answers, 2),
        "median": statistics.median(seconds),
        "median_with_heading": statistics.median(whole),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--ahead", type=float, default=0.0, help="seconds to look at the page before the first click")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as empty,
        playwright.sync_playwright() as driver,
        served(arguments.home or Path(empty), ES2_SHOWCASE=str(SHOWCASE)) as address,
    ):
        found = {view: measure(address, f"view={view}", arguments.clicks, driver, arguments.ahead) for view in VIEWS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
