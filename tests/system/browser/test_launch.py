"""A fine-tune from the page: layers by click, a real short run of a tiny model, its progress, its end.

The runs are real ones, in processes of their own, so this is the whole way from a click to the comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from es2.jobs.job import Job
from es2.workflow.runs import list_runs
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = marks

N_LAYERS = 6
WORK = 180_000
"""Milliseconds for a run of the tiny model to get somewhere, on a machine at work."""


@dataclass(frozen=True)
class App:
    """The served app and what is chosen in it."""

    address: str
    home: Path
    model: Path
    prompts: Path

    @property
    def runs(self) -> str:
        """The page of runs, with the tiny model and its prompts."""
        return f"{self.address}runs?{urlencode({'model': str(self.model), 'prompts': str(self.prompts)})}"

    def newest(self) -> Job:
        """The newest run."""
        return list_runs(self.home / "runs")[0]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    home = tmp_path_factory.mktemp("home")
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", n_layers=N_LAYERS)
    prompts = write_prompts(home / "locks.csv", tiny_prompts(60))
    with served(home, ES2_CACHE=str(home / "cache"), OMP_NUM_THREADS="1") as address:
        yield App(address, home, model, prompts)
    for run in list_runs(home / "runs"):
        run.cancel()


def button(page: playwright.Page, key: str) -> playwright.Locator:
    """The button of this key; one with a tooltip stands on the page twice, the second time for touch screens."""
    return page.locator(f".st-key-{key} button").first


def click_layer(page: playwright.Page, layer: int) -> None:
    """Click in a layer's column of the strip of target layers, far from any marker."""
    box = page.locator(".st-key-target_strip .nsewdrag").first.bounding_box()
    assert box is not None
    x = box["x"] + box["width"] * (layer + 0.6) / N_LAYERS
    y = box["y"] + box["height"] * 0.2
    page.mouse.move(x - 4, y)
    page.mouse.move(x, y)
    expect(page.locator(".st-key-target_strip .hovertext").first).to_contain_text(f"layer {layer}")
    page.mouse.click(x, y)


def expect_targets(page: playwright.Page, *layers: int) -> None:
    tags = page.locator(".st-key-targets .react-aria-ComboBox [data-tag]")
    expect(tags).to_have_text([f"Layer {layer}" for layer in layers])
    settle(page)


def set_number(page: playwright.Page, name: str, value: str) -> None:
    """Type a number of the form once nothing moves any more, and wait until it is taken over."""
    settle(page)
    field = page.locator(f".st-key-launch_{name} input")
    expect(field).to_have_count(1)  # while the form is drawn anew, both stand there
    field.fill(value)
    field.press("Enter")
    settle(page)


def fill_in(page: playwright.Page, *, steps: int, layers: tuple[int, ...] = ()) -> None:
    """Wait for the form, take further layers by click and set the number of steps."""
    expect(button(page, "start_finetune")).to_be_enabled()
    settle(page)
    for layer in layers:
        click_layer(page, layer)
        settle(page)
    set_number(page, "steps", str(steps))


def test_from_the_click_to_the_comparison(app: App, open_page: Callable[[str], playwright.Page]) -> None:
    page = open_page(app.runs)
    expect_targets(page, 2, 4)
    click_layer(page, 1)
    expect_targets(page, 1, 2, 4)
    expect(page.locator(".st-key-launch")).to_contain_text("collapse")
    expect(button(page, "start_finetune")).to_be_disabled()
    click_layer(page, 4)
    expect_targets(page, 1, 2)
    click_layer(page, 4)
    expect_targets(page, 1, 2, 4)
    page.locator(".st-key-targets .react-aria-ComboBox [aria-label='Remove Layer 2']").click()
    expect_targets(page, 1, 4)
    set_number(page, "steps", "0")
    expect(page.locator(".st-key-launch_start")).to_contain_text("steps must be a whole number")
    set_number(page, "steps", "30")
    expect(page.locator(".st-key-estimate")).to_contain_text("of memory")
    button(page, "start_finetune").dblclick()

    expect(page.locator("[class*=st-key-cancel_page_]")).to_have_count(1)
    assert len(list_runs(app.home / "runs")) == 1, "a double click starts one run"
    run = app.newest()
    assert run.config["layers"] == [1, 4]
    assert run.config["steps"] == 30

    page.reload()
    second = open_page(app.runs)
    for tab in (page, second):
        expect(button(tab, f"cancel_page_{run.id}")).to_be_visible()
    expect(page.locator("[class*=st-key-curves_] .js-plotly-plot")).to_have_count(6, timeout=WORK)
    second.close()

    page.wait_for_url(lambda url: f"run={run.id}" in url and "/runs" not in url, timeout=WORK)
    assert run.status() == "done", run.log_tail()
    page.goto(app.runs)
    expect_a_film_that_plays(page, run)


CLOUD = """() => {
    const plot = document.querySelector('.st-key-film_former .js-plotly-plot');
    const cloud = plot.querySelector('.scatterlayer .trace:has(.point)');
    const places = [...cloud.querySelectorAll('.point')].map(point => point.getAttribute('transform'));
    return places.join().replace(/[0-9.]+/g, number => Math.round(number));
}"""


def expect_a_film_that_plays(page: playwright.Page, run: Job) -> None:
    """Play the film of a run, and move its slider back: the points move, and stand where they stood."""
    button(page, f"curves_{run.id}").click()
    film = page.locator(".st-key-film_former")
    step = film.locator(".slider-label").first  # what is above the rail; the others are below it
    expect(step).to_have_text("step 0")
    settle(page)
    at_first = page.evaluate(CLOUD)
    film.locator(".updatemenu-button").first.click()
    expect(step).to_have_text("step 30")
    page.wait_for_function(f"before => ({CLOUD})() !== before", arg=at_first)
    rail = film.locator(".slider-rail-touch-rect").bounding_box()
    assert rail is not None
    page.mouse.click(rail["x"] + 1, rail["y"] + rail["height"] / 2)
    expect(step).to_have_text("step 0")
    page.wait_for_function(f"before => ({CLOUD})() === before", arg=at_first)


@pytest.mark.long
def test_cancel_resume_rename_delete(app: App, open_page: Callable[[str], playwright.Page]) -> None:
    page = open_page(app.runs)
    if list_runs(app.home / "runs"):
        button(page, "new_run").click()
    fill_in(page, steps=5000)
    button(page, "start_finetune").click()
    expect(page.locator("[class*=st-key-curves_] .js-plotly-plot")).to_have_count(6, timeout=WORK)
    run = app.newest()
    button(page, f"cancel_page_{run.id}").click()
    row = page.locator(f".st-key-run_{run.id}")
    expect(row).to_contain_text("cancelled", timeout=WORK)
    assert run.status() == "cancelled"
    stopped_at = max(event["done"] for event in run.events()[0] if event.get("stage") == "finetune")

    button(page, f"resume_{run.id}").click()
    expect(button(page, f"cancel_page_{run.id}")).to_be_visible()
    page.wait_for_function(
        """([id, step]) => {
            const bar = document.querySelector(`.st-key-live_${id} [data-testid=stProgress]`)?.textContent ?? '';
            return Number((/Fine-tuning, ([0-9,]+) of/.exec(bar)?.[1] ?? '0').replace(',', '')) > step;
        }""",
        arg=[run.id, stopped_at],
        timeout=WORK,
    )
    process = run._pid()
    assert process is not None
    os.kill(process, signal.SIGKILL)
    expect(row).to_contain_text("interrupted", timeout=WORK)
    expect(row).to_contain_text("ended without a result")

    settle(page)
    button(page, f"rename_{run.id}").click()
    name = page.locator(f".st-key-name_{run.id} input")
    name.fill("<b>long</b> *one*")
    name.press("Enter")
    button(page, "rename_confirm").click()
    expect(row).to_contain_text("<b>long</b> *one*")
    expect(page.locator("[role=dialog]")).to_have_count(0)

    settle(page)
    button(page, f"delete_{run.id}").click()
    button(page, "delete_confirm").click()
    expect(row).to_have_count(0)
    assert not run.path.exists()
