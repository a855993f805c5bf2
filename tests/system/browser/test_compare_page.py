"""The comparison in a real browser: what is pointed at, chosen or zoomed on one side is so on the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Literal
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from es2.prompts.prompt_set import HARMFUL, HARMLESS
from tests.builders_artifacts import DISTANCES, TARGETS, Compared, write_comparison
from tests.builders_evaluation import REFUSES_LESS, write_replies
from tests.system.browser.serving import expect, marks, place_of, playwright, served, settle

pytestmark = marks

PLOTS = "[...document.querySelectorAll('.st-key-linked_pair .plots-plot')]"
X = f"{PLOTS}.map(plot => plot._fullData[0].x[0])"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def address(compared: Compared) -> Iterator[str]:
    with served(compared.artifacts.home) as address:
        yield address


def side(page: playwright.Page, index: int) -> playwright.Locator:
    """Base's plot or tuned's."""
    return page.locator(".st-key-linked_pair .plots-plot").nth(index)


def harmful_point(page: playwright.Page, index: int, at: int = 0) -> playwright.Locator:
    return side(page, index).locator(".scatterlayer .trace").nth(1).locator(".point").nth(at)


def rings(page: playwright.Page, index: int) -> playwright.Locator:
    """What is marked as selected: the last trace that has points."""
    return side(page, index).locator(".scatterlayer .trace").last.locator(".point")


def opened(
    open_page: Callable[[str], playwright.Page], address: str, compared: Compared, **link: str
) -> playwright.Page:
    page = open_page(f"{address}?{urlencode(compared.link(**link))}")
    expect(harmful_point(page, 0)).to_be_attached()
    settle(page)
    return page


def step_to(page: playwright.Page, layer: int) -> None:
    """Go one layer further, which is this one, and wait for all of the page."""
    page.locator(".st-key-next_layer button").first.click()
    expect(page.locator(".st-key-pair_controls h3")).to_have_text(f"Layer {layer}")
    settle(page)


def drag(page: playwright.Page, index: int) -> None:
    """Draw a box around all of one side."""
    box = side(page, index).locator(".nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] - 3, steps=10)
    page.mouse.up()


def test_hover_shows_the_same_prompt_on_both_sides(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="2")
    point = harmful_point(page, 0)
    point.hover(force=True)
    expect(side(page, 0).locator(".hovertext")).to_contain_text("<script>alert(1)</script> &amp; $x^2$ how do I")
    halos = page.locator(".plots-halo")
    expect(halos).to_have_count(2)
    twin = harmful_point(page, 1).bounding_box()
    halo = side(page, 1).locator(".plots-halo").bounding_box()
    assert twin is not None
    assert halo is not None
    for edge, size in (("x", "width"), ("y", "height")):
        assert abs(twin[edge] + twin[size] / 2 - halo[edge] - halo[size] / 2) < 2
    page.mouse.move(5, 5)
    expect(halos).to_have_count(0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_click_on_either_side_selects_on_both_and_moves_nothing(
    index: int, address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="2")
    below = page.locator(".before-after")
    before = below.bounding_box()
    harmful_point(page, index).click(force=True)
    heading = page.locator(".st-key-selected h3")
    expect(heading).to_have_text("1 selected prompt")
    settle(page)
    for each in (0, 1):
        expect(rings(page, each)).to_have_count(1)
    assert below.bounding_box() == before
    harmful_point(page, index, 3).click(force=True, modifiers=["Shift"])
    expect(heading).to_have_text("2 selected prompts")


def test_another_layer_is_drawn_in_the_same_figure(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    """To set up a figure anew takes plotly longer than to move its points."""
    page = opened(open_page, address, compared, layer="2")
    before = page.evaluate(f"window.before = {PLOTS}.map(plot => plot.querySelector('.main-svg')); {X}")
    step_to(page, 3)
    assert page.evaluate(X) != before
    assert (
        page.evaluate(f"{PLOTS}.map((plot, index) => plot.querySelector('.main-svg') === before[index])") == [True] * 2
    )


def test_a_figure_is_saved_under_a_name_that_says_what_it_is(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="2")
    step_to(page, 3)
    side(page, 1).hover()
    with page.expect_download() as found:
        side(page, 1).locator(".modebar-btn[data-title^=Download]").click()
    assert found.value.suggested_filename == "es2-compare-layer-3-2.svg"


@pytest.mark.long
@pytest.mark.parametrize("from_a_point", [True, False])
def test_a_quick_click_selects_what_it_meets(
    from_a_point: bool, address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    """Plotly looks every 50 ms what the mouse is over, and would take a click in between for what it saw last."""
    page = opened(open_page, address, compared, layer="3")
    prompts = compared.artifacts.prompts
    tested = prompts.in_split("test")
    passed = int((tested & (prompts.labels == HARMFUL)).nonzero()[0][0])
    met = int((tested & (prompts.labels == HARMLESS)).nonzero()[0][-1])
    corner = side(page, 0).locator(".nsewdrag").first.bounding_box()
    assert corner is not None
    page.evaluate(
        """([passed, met]) => {
            const area = document.querySelector('.st-key-linked_pair .nsewdrag');
            const send = (type, [clientX, clientY], target = area) =>
                target.dispatchEvent(new MouseEvent(type, { bubbles: true, view: window, clientX, clientY }));
            send('mousemove', passed);
            send('mousemove', met);
            send('mousedown', met);
            send('mouseup', met, document.querySelector('.dragcover'));
        }""",
        [place_of(page, 0, passed) if from_a_point else (corner["x"] + 3, corner["y"] + 3), place_of(page, 0, met)],
    )
    expect(page.locator(".st-key-prompt_card")).to_contain_text(prompts.texts[met])


def test_a_box_on_one_side_selects_everywhere_and_lasts(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="2")
    n_test = int(compared.artifacts.prompts.in_split("test").sum())
    page.locator(".st-key-tool button").nth(2).click()
    page.wait_for_function(f"{PLOTS}.every(plot => plot._fullLayout?.dragmode === 'select')")
    settle(page)
    drag(page, 1)
    heading = page.locator(".st-key-selected h3")
    expect(heading).to_have_text(f"{n_test} selected prompts")
    expect(rings(page, 0)).to_have_count(n_test)
    step_to(page, 3)
    expect(rings(page, 0)).to_have_count(n_test)
    page.locator(".st-key-clear_selection button").click()
    expect(heading).to_have_text("Hardest prompts")


def test_a_picked_layer_is_drawn_without_the_server(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="2")
    places = f"{PLOTS}.map(plot => plot.calcdata.flatMap(trace => trace.map(point => [point.x, point.y])))"
    harmful_point(page, 0).click(force=True)
    expect(page.locator(".st-key-selected h3")).to_have_text("1 selected prompt")
    n_others = len(compared.analysis.layers) - 1
    page.wait_for_function(f"window.es2Layers?.figures.size === {n_others}")
    settle(page)
    before = page.evaluate(places)
    page.evaluate("document.dispatchEvent(new CustomEvent('es2-layer-picked', { detail: 4 }))")
    page.wait_for_function(f"JSON.stringify({places}) !== {json.dumps(json.dumps(before, separators=(',', ':')))}")
    expect(rings(page, 0)).to_have_count(1)
    expect(page.locator(".st-key-pair_controls h3")).to_have_text("Layer 2")
    drawn = page.evaluate(f"{PLOTS}.map(plot => plot.data.filter(trace => trace.name !== 'twins'))")
    page.locator(".st-key-next_layer button").first.click()
    page.locator(".st-key-next_layer button").first.click()
    expect(page.locator(".st-key-pair_controls h3")).to_have_text("Layer 4")
    settle(page)
    assert page.evaluate(f"{PLOTS}.map(plot => plot.data.filter(trace => trace.name !== 'twins'))") == drawn


@pytest.mark.long
def test_a_click_at_the_moment_of_a_question_runs_the_page(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    """Streamlit sends what components say within one turn of the browser as one message, for a part of the page."""
    page = opened(open_page, address, compared, layer="2")
    page.evaluate(
        """() => {
            const [later, context] = [window.setTimeout, window.es2Layers.context];
            window.held = [];
            window.setTimeout = (run, pause, ...rest) => {
                const asked = window.es2Layers.context !== context && /sendUpdateWidgetsMessage/.test(run);
                return asked ? window.held.push(run) : later(run, pause, ...rest);
            };
        }"""
    )
    page.get_by_text("Probe split").click()
    page.wait_for_function("held.length")
    harmful_point(page, 0).click(force=True)
    page.evaluate("held.splice(0).forEach(send => send())")
    expect(page.locator(".st-key-selected h3")).to_have_text("1 selected prompt")


@pytest.mark.long
def test_nothing_is_sent_as_a_reference_to_what_was_sent_before(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    """The browser may have let go of it by then, and Streamlit's page is dead after that."""
    page = opened(open_page, address, compared, layer="2")
    kinds: list[str | None] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda data: kinds.append(kind_of(data))))
    page.reload()
    expect(harmful_point(page, 0)).to_be_attached()
    settle(page)
    harmful_point(page, 0).click(force=True)
    expect(page.locator(".st-key-selected h3")).to_have_text("1 selected prompt")
    settle(page)
    assert "delta" in kinds
    assert "ref_hash" not in kinds


def kind_of(data: str | bytes) -> str | None:
    """What kind of message the server sent."""
    assert isinstance(data, bytes)
    return ForwardMsg.FromString(data).WhichOneof("type")


def test_zoom_is_common(address: str, compared: Compared, open_page: Callable[[str], playwright.Page]) -> None:
    page = opened(open_page, address, compared, layer="2")
    ranges = f"{PLOTS}.map(plot => plot._fullLayout.xaxis.range)"
    before = page.evaluate(ranges)
    assert before[0] == before[1]
    side(page, 0).hover()
    side(page, 0).locator("[data-title='Zoom in']").click()
    page.wait_for_function(f"({ranges})[1][1] < {before[1][1]}")
    after = page.evaluate(ranges)
    assert after[0] == pytest.approx(after[1])


def test_morph_moves_points_from_base_to_tuned(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="3")
    target = page.evaluate(f"{PLOTS}[1].calcdata[1].map(point => point.x)")
    page.locator(".st-key-arrangement button", has_text="Morph").click()
    play = page.locator(".plots-play")
    expect(play).to_have_text("Play")
    settle(page)
    expect(page.locator(".st-key-linked_pair .plots-plot")).to_have_count(1)
    now = f"{PLOTS}[0].calcdata[1].map(point => point.x)"
    start = page.evaluate(now)
    assert start != pytest.approx(target)
    play.click()
    page.wait_for_function("document.querySelector('.plots-moment').value === '1'")
    expect(play).to_have_text("Play")
    assert page.evaluate(now) == pytest.approx(target)
    page.locator(".plots-moment").fill("0")
    page.wait_for_function(f"({now})[0] === {start[0]}")


def test_the_whole_model_takes_the_click_and_pages_keep_the_choice(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared)
    expect(page.locator(".st-key-pair_controls h3")).to_have_text(f"Layer {TARGETS[-1]}")
    verdicts = page.locator(".st-key-overview .scatterlayer .point")
    assert verdicts.count() > 10 * len(DISTANCES)
    cell = page.locator(".st-key-overview .scatterlayer .trace").first.locator(".point").nth(1)
    cell.scroll_into_view_if_needed()
    cell.hover(force=True)
    cell.click(force=True)
    expect(page.locator(".st-key-pair_controls h3")).to_have_text("Layer 1")
    settle(page)
    page.get_by_role("link", name="Layers").click()
    expect(page.locator(".st-key-projection")).to_be_visible()
    expect(page.locator(".st-key-details h3").first).to_have_text("Layer 1")
    page.wait_for_url(lambda url: parse_qs(urlsplit(url).query).get("layer") == ["1"])
    page.get_by_role("link", name="Compare").click()
    expect(page.locator(".st-key-pair_controls h3")).to_have_text("Layer 1")
    expect(harmful_point(page, 1)).to_be_attached()


def test_the_library_is_loaded_once(
    address: str, compared: Compared, open_page: Callable[[str], playwright.Page]
) -> None:
    page = opened(open_page, address, compared, layer="1")
    step_to(page, 2)
    loaded = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len([name for name in loaded if name.endswith("plotly.min.js")]) == 1
    hosts = {urlsplit(name).hostname for name in loaded if "fonts.gstatic.com" not in name}
    assert hosts <= {"127.0.0.1", None, ""}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_run_that_refuses_less_is_warned_of(
    theme: Literal["light", "dark"], open_page: Callable[[str], playwright.Page], address: str, compared: Compared
) -> None:
    harmful = write_comparison(compared.artifacts.home)
    write_replies(harmful.run, "requests", *REFUSES_LESS)
    page = open_page("about:blank")
    page.emulate_media(color_scheme=theme)
    for path, place in (("", ".st-key-verdict"), ("runs", f".st-key-run_{harmful.run.id}"), ("behaviour", ".stMain")):
        page.goto(f"{address.rstrip('/')}/{path}?{urlencode(harmful.link())}")
        expect(page.locator(place)).to_contain_text("refuses less")
        warning = page.locator(place).get_by_test_id("stAlert")
        expect(warning).to_contain_text("Refuses less. The tuned model refuses fewer harmful requests than its base")
        expect(warning).to_be_in_viewport()
