"""What a visitor waits for, on the server's side: importing the app, opening it, another layer, another view.

The app runs on the committed showcase, without a browser (Streamlit's own test runner), so what is measured is a whole
rerun of the page. What the browser adds is `tests.benchmarks.layer_change`'s to tell.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from streamlit.testing.v1 import AppTest

from tests.benchmarks.contest import Figure, Report, Settings

ROOT = Path(__file__).parents[2]
MAIN = str(ROOT / "app" / "main.py")
SHOWCASE = ROOT / "cached_activations" / "showcase"
IMPORT = """import time; started = time.perf_counter()
import app.sidebar, app.state, app.views.compare, app.views.layers, app.views.runs
import app.views.behaviour, app.views.robustness, app.views.own, app.views.welcome
print(time.perf_counter() - started)"""
VIEWS = ("pca", "separation")


def import_seconds() -> float:
    """Importing every page in a fresh process."""
    command = [sys.executable, "-c", IMPORT]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def turn(at: AppTest, name: str, value: str) -> None:
    """Follow a link that differs in one thing."""
    at.query_params[name] = value
    at.run()
    if at.exception:
        raise RuntimeError(f"The app failed: {at.exception[0].message}")


def measure(settings: Settings) -> Report:
    """Seconds of each, on the showcase."""
    imports = [import_seconds() for _ in range(settings.repeats)]
    with tempfile.TemporaryDirectory() as home:
        kept = {name: os.environ.get(name) for name in ("ES2_HOME", "ES2_SHOWCASE")}
        os.environ |= {"ES2_HOME": home, "ES2_SHOWCASE": str(SHOWCASE)}
        try:
            at = AppTest.from_file(MAIN, default_timeout=120)
            seconds = {"opening": [timed(at.run)]}
            for view in VIEWS:
                turn(at, "view", view)
                seconds[f"layer, {view}"] = [
                    timed(lambda layer=layer: turn(at, "layer", str(layer)))  # type: ignore[misc]
                    for layer in range(10, 10 + 2 * settings.repeats)
                ]
            seconds["view"] = [
                timed(lambda view=view: turn(at, "view", view))  # type: ignore[misc]
                for view in VIEWS * settings.repeats
            ]
        finally:
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    figures = [
        Figure("import", statistics.median(imports), "s", at_most=1.5),
        Figure("opening", seconds["opening"][0], "s"),
        *(
            Figure(f"another layer, {view}", 1e3 * statistics.median(seconds[f"layer, {view}"]), "ms", at_most=150)
            for view in VIEWS
        ),
        Figure("another view", 1e3 * statistics.median(seconds["view"]), "ms"),
    ]
    return Report("app", tuple(figures), {"import": imports, "seconds": seconds})
