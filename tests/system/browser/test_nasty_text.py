"""Prompts, names and replies full of what browsers, Markdown and plotly would like to interpret: shown as text, always.

One home whose prompts are all of that; every page is opened on it, hovered and clicked, and nothing on the page may
have been made of a text: no element, no formula, no link, no request, no script, and no page wider than the window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from es2.core.files import with_checksum, write_json
from es2.report.report import write_report
from es2.workflow.compared import find_compared
from tests import builders_artifacts
from tests.builders_artifacts import Compared, write_comparison
from tests.builders_evaluation import Evaluated, directions_by_hand, write_evaluated
from tests.system.browser.serving import expect, marks, place_of, playwright, served, settle

pytestmark = [*marks, pytest.mark.long]

HTML = (
    '<img src=x onerror="window.pwned=1"> <script>window.pwned=1</script> <svg onload=window.pwned=1> <b>bold</b> &lt;'
)
MARKDOWN = (
    "# **bold** [x](javascript:window.pwned=1) ![x](http://a.invalid/y) :red[r] :material/home: www.a.invalid -> --x"
)
LATEX = r"$\frac{1}{2}$ and $$\sum_x x^2$$ and \(x\) and \[y\], bold"
SPREADSHEET = '=HYPERLINK("http://a.invalid","bold")'
RIGHT_TO_LEFT = "مرحبا كيف أفتح القفل 🔒 日本語 👩‍👩‍👧‍👦"
OVERRIDE = "open \u202egnp.exe the lock"
LONG = "Long " + "word " * 1999
UNBROKEN = "x" * 10_000
NASTY = (HTML, MARKDOWN, LATEX, SPREADSHEET, RIGHT_TO_LEFT, OVERRIDE, LONG, UNBROKEN)
NAME = "**b** <img src=x onerror=window.pwned=1> $x$ :red[r] www.a.invalid"

MADE_OF_TEXT = """() => {
    const made = [...document.querySelectorAll(
        'img[src="x"], img[src*="invalid"], a[href*="invalid"], a[href*="javascript"], a[*|href*="invalid"], .katex, '
        + 'svg[onload], [onerror]')];
    const bold = [...document.querySelectorAll('b, strong, i, em, h1, code, span[style*="color"]')].filter(
        one => one.childElementCount === 0 && /^\\s*(bold|b|r|x)\\s*$/.test(one.textContent));
    const scripts = [...document.scripts].filter(one => one.textContent.trim().startsWith('window.pwned'));
    return [...made, ...bold, ...scripts].map(one => one.outerHTML.slice(0, 200));
}"""
TOO_WIDE = """() => [document.documentElement, document.querySelector('[data-testid=stMain]') ?? document.body]
    .some(one => one.scrollWidth > one.clientWidth + 1)"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A comparison whose prompts are nasty, and so is its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders_artifacts, "NASTY", NASTY)
        compared = write_comparison(tmp_path_factory.mktemp("home"))
    compared.run.rename(NAME)
    return compared


@pytest.fixture(scope="module")
def evaluated(compared: Compared) -> Evaluated:
    """An evaluation whose prompts and replies are nasty, in the same home."""
    home = compared.artifacts.home
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        patch.setenv("ES2_CACHE", str(home / "cache"))
        evaluated = write_evaluated(home)
    document = json.loads(evaluated.path.read_text())
    document.pop("digest", None)
    document["prompts"] = NAME
    replies = {"before": ["refusal"] * 6 + ["answer"] * 6, "remove": ["answer"] * 6, "add": ["refusal"] * 6}
    checked = directions_by_hand([f"prompt {at}" for at in range(12)], {"base": replies, "tuned": replies})
    document["suite"]["direction"], document["rows"]["direction"] = checked
    for suite, rows in document["rows"].items():
        asked = "question" if suite == "ability" else "prompt"
        prompts = dict.fromkeys(row[asked] for row in rows)
        nasty = {prompt: NASTY[at % len(NASTY)] for at, prompt in enumerate(prompts)}
        for row in rows:
            row[asked] = nasty[row[asked]]
            for model in ("base", "tuned"):
                if "text" in row.get(model, {}):
                    row[model]["text"] = f"{HTML}\n{MARKDOWN}\n{LATEX}"
    write_json(evaluated.path, with_checksum(document))
    return evaluated


@pytest.fixture(scope="module")
def address(compared: Compared) -> Iterator[str]:
    home = compared.artifacts.home
    with served(home, ES2_CACHE=str(home / "cache")) as address:
        yield address


@pytest.fixture
def open_watched(open_page: Callable[[str], playwright.Page], address: str) -> Iterator[Callable[..., playwright.Page]]:
    """Open a page of the app; at the end no request has gone anywhere else."""
    asked: list[str] = []

    def open_watched(path: str, link: dict[str, str]) -> playwright.Page:
        page = open_page(f"{address}{path}?{urlencode(link)}")
        page.on("request", lambda request: asked.append(request.url))
        return page

    yield open_watched
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "ws://127.0.0.1"))] == []


def check(page: playwright.Page) -> None:
    """Nothing on the page was made of a text."""
    settle(page)
    assert page.evaluate("window.pwned") is None
    assert page.evaluate(MADE_OF_TEXT) == []
    assert not page.evaluate(TOO_WIDE)


def test_compare(compared: Compared, open_watched: Callable[..., playwright.Page]) -> None:
    page = open_watched("", compared.link())
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    expect(page.locator(".st-key-header")).to_contain_text(NAME[:40])
    check(page)
    texts = compared.artifacts.prompts.texts
    for text in NASTY:
        written = " ".join(text.split())
        row = texts.index(text.strip())
        page.mouse.move(5, 5)
        page.mouse.move(*place_of(page, 0, row))
        label = page.locator(".st-key-linked_pair .hovertext").first
        expect(label).to_be_visible()
        shown = "".join((label.text_content() or "").replace("\xa0", " ").split())
        begin = "".join(written.split())
        assert begin[:60] in shown, "the hover says what was written"
        assert ("…" in shown) == (len(written) > 400)
        assert shown.count("x") <= 500
    check(page)
    page.mouse.click(*place_of(page, 0, texts.index(HTML)))
    expect(page.locator(".st-key-prompt_card")).to_contain_text(HTML)
    check(page)
    # Streamlit's own download of a table would write the formula as one.
    expect(page.get_by_role("button", name="Download as CSV")).to_have_count(0)
    assert page.locator('[aria-label^="Download as CSV"]').count() > 0, "it is there and hidden"
    page.locator(".st-key-take_away button").first.click()
    expect(page.locator(".st-key-take_report button")).to_be_visible()
    check(page)


@pytest.mark.parametrize("text", [MARKDOWN, LATEX, RIGHT_TO_LEFT, UNBROKEN])
def test_a_selected_prompt_in_full(compared: Compared, open_watched: Callable[..., playwright.Page], text: str) -> None:
    page = open_watched("", compared.link())
    expect(page.locator(".st-key-linked_pair .point").first).to_be_attached()
    settle(page)
    row = compared.artifacts.prompts.texts.index(text)
    page.mouse.click(*place_of(page, 1, row))
    expect(page.locator(".st-key-prompt_card")).to_contain_text(text)
    check(page)


@pytest.mark.parametrize("path", ["layers", "runs", "own"])
def test_other_pages(compared: Compared, open_watched: Callable[..., playwright.Page], path: str) -> None:
    page = open_watched(path, compared.link())
    if path == "runs":
        expect(page.locator(f".st-key-run_{compared.run.id}")).to_contain_text(NAME[:40])
    elif path == "layers":
        expect(page.locator(".st-key-projection .point").first).to_be_attached()
    else:
        expect(page.locator(".st-key-own_file")).to_be_visible()
        head = "prompt,label\n"
        rows = "".join(
            '"{}",harmful\nhow to oil lock {},harmless\n'.format(one.replace('"', '""'), at)
            for at, one in enumerate(NASTY)
        )
        upload = {"name": f"{NAME}.csv".replace("/", ""), "mimeType": "text/csv", "buffer": (head + rows).encode()}
        page.locator(".st-key-own_file input[type=file]").set_input_files(upload)
        expect(page.get_by_text(f"of {2 * len(NASTY)} prompts.")).to_be_visible()
    check(page)


@pytest.mark.parametrize("path", ["behaviour", "robustness"])
def test_evaluations(evaluated: Evaluated, open_watched: Callable[..., playwright.Page], path: str) -> None:
    page = open_watched(path, evaluated.link())
    key = {"behaviour": ".st-key-exchange_0", "robustness": ".st-key-steered_prompt"}[path]
    expect(page.locator(key)).to_contain_text("<script>window.pwned=1</script>")
    expect(page.locator(key)).to_contain_text("[x](javascript:window.pwned=1)")
    if path == "robustness":
        expect(page.locator(".st-key-finding")).to_contain_text("Tuned, layer 1: steers. Removed, it steers: DSR 1.00")
        expect(page.locator(".st-key-direction_rates .point").first).to_be_attached()
        page.locator(".st-key-direction_prompts summary").click()
        expect(page.locator(".st-key-direction_prompts canvas").first).to_be_visible()
    check(page)


def test_the_report(
    compared: Compared, open_page: Callable[[str], playwright.Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ES2_HOME", str(compared.artifacts.home))
    page = open_page(write_report(find_compared(compared.run.id), tmp_path / "report.html").as_uri())
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    for summary in page.locator("summary").all():
        summary.click()
    expect(page.get_by_role("heading", name=NAME)).to_be_visible()
    assert page.evaluate("window.pwned") is None
    assert page.evaluate(MADE_OF_TEXT) == []
    assert not page.evaluate(TOO_WIDE)
