"""A sweep from the page: started by the form, followed live, a point clicked, its settings taken, a run opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest

from es2.workflow.sweeps import cancel_sweep, list_sweeps, sweep_document
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.system.browser.serving import expect, marks, playwright, served, settle

pytestmark = marks

WORK = 180_000
"""Milliseconds for a sweep of the tiny model to get somewhere, on a machine at work."""

POINTS = """() => {
    const plot = document.querySelector('.st-key-sweep_front .js-plotly-plot');
    return (plot?._fullData ?? []).flatMap(({ customdata }) => customdata ?? []).length;
}"""
PLACE_OF = """trial => {
    const plot = document.querySelector('.st-key-sweep_front .js-plotly-plot');
    const box = plot.getBoundingClientRect(), { xaxis, yaxis } = plot._fullLayout;
    for (const { customdata, x, y } of plot._fullData) {
        const at = (customdata ?? []).findIndex(one => one[1] === trial);
        if (at < 0) continue;
        return [box.left + xaxis._offset + xaxis.d2p(x[at]), box.top + yaxis._offset + yaxis.d2p(y[at])];
    }
}"""


def set_number(page: playwright.Page, key: str, value: str) -> None:
    settle(page)
    field = page.locator(f".st-key-{key} input")
    field.fill(value)
    field.press("Enter")
    settle(page)


@pytest.mark.long
def test_from_the_form_to_a_run_and_its_settings(tmp_path: Path, open_page: Callable[[str], playwright.Page]) -> None:
    model = save_tiny_model(tmp_path / "tiny-llama", n_layers=6, initializer_range=0.1)
    prompts = write_prompts(tmp_path / "locks.csv", tiny_prompts(60))
    link = urlencode({"model": str(model), "prompts": str(prompts)})
    with served(tmp_path, ES2_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1") as address:
        page = open_page(f"{address}sweep?{link}")
        expect(page.locator(".st-key-sweep_estimate")).to_contain_text("At most")
        set_number(page, "sweep_trials", "2")
        set_number(page, "sweep_steps", "2")
        page.locator(".st-key-sweep_advanced summary").click()
        set_number(page, "sweep_fixed_kl_budget", "5")
        page.locator(".st-key-start_sweep button").first.dblclick()

        expect(page.locator("[class*=st-key-cancel_page_]")).to_have_count(1)
        page.wait_for_function(f"() => ({POINTS})() > 0", timeout=WORK)
        (sweep,) = list_sweeps(tmp_path / "runs")  # a double click starts one
        try:
            page.wait_for_function(f"() => ({POINTS})() === 2", timeout=WORK)
            expect(page.locator(".st-key-sweep_ended")).to_contain_text("Done, 2 of 2 trials", timeout=WORK)
        finally:
            cancel_sweep(sweep)
        document = sweep_document(sweep)
        best = document["best"]
        other = next(trial for trial in document["trials"] if trial["number"] != best["number"])

        settle(page)
        shown = page.locator(".st-key-sweep_trial")
        expect(shown).to_contain_text(f"λ {best['settings']['kl_weight']:g} ")
        x, y = page.evaluate(PLACE_OF, other["number"])
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y)
        page.mouse.click(x, y)
        expect(shown).to_contain_text(f"λ {other['settings']['kl_weight']:g} ")
        named = {f"sweep={sweep.id}", f"trial={other['number']}"}  # what is shown can be passed on
        page.wait_for_url(lambda url: named <= set(url.partition("?")[2].split("&")))
        page.locator(".st-key-sweep_take button").click()
        page.wait_for_url("**/runs**")
        expect(page.locator(".st-key-launch_kl_weight input")).to_have_value(f"{other['settings']['kl_weight']:.2f}")
        tags = page.locator(".st-key-targets .react-aria-ComboBox [data-tag]")
        expect(tags).to_have_text([f"Layer {layer}" for layer in other["settings"]["layers"]])

        page.goto(f"{address}sweep?{link}&sweep={sweep.id}")
        expect(shown).to_contain_text(f"λ {best['settings']['kl_weight']:g} ")
        settle(page)
        page.locator(".st-key-sweep_compare button").click()
        page.wait_for_url(lambda url: f"run={best['run']}" in url and "/sweep" not in url)
        expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
