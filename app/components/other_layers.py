"""The prompts at the other layers, sent to the browser ahead, so that going to one of them waits for no server.

A click on a layer runs the whole page again before its points are on their way. They depend on little that the click
changes, so the browser asks for the other layers while nobody waits, the nearest first and a few at a time; on a click
it draws what it has at once (`plots.js`), and the page's answer, which is the same figure, changes nothing any more.
The browser asks rather than the server sends, so nothing runs once it has everything, and a click goes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, state
from app.charts.canvas import Figure
from app.components.plots import as_text

KEY = "other_layers"
MOVING = ("x", "y", "text", "meta")
"""What of a trace is another at another layer; everything else is as in the figure that is shown."""

_SECONDS = 0.15  # of the server at a time: a click waits for it
_MAX_POINTS = 60_000  # of all layers together: some megabytes in the browser
_FEWEST = 3  # with room for less than that, neighbours are made ready on the server instead

_send = st.components.v2.component("es2_other_layers", js=Path(__file__).with_suffix(".js").read_text(encoding="utf-8"))


def send_others(context: str, layer: int, n_layers: int, points: int, make: Callable[[int], Sequence[Figure]]) -> None:
    """Send the figures of the other layers when the browser asks; of large ones, make the neighbours ready here.

    Args:
        context: names everything besides the layer and the selection that the figures depend on: the same as of the
            `linked` figures that they take the place of.
        layer: the one that is shown.
        n_layers: how many there are.
        points: how many a layer's figures have.
        make: the figures of one layer, with nothing selected; called in threads of its own for large ones.
    """
    wanted = nearest(layer, n_layers, points)
    if wanted:
        _answer(context, wanted, make)
    else:
        artifacts.make_ready(make, layer, n_layers)


def nearest(layer: int, n_layers: int, points: int) -> list[int]:
    """The layers to send ahead, the nearest first; none where there is no room for a few of them."""
    others = sorted((one for one in range(n_layers) if one != layer), key=lambda one: (abs(one - layer), -one))
    room = _MAX_POINTS // max(points, 1)
    return others[:room] if room >= _FEWEST else []


@st.fragment
def _answer(context: str, wanted: Sequence[int], make: Callable[[int], Sequence[Figure]]) -> None:
    """Send what the browser asks for of `wanted`, as much as there is time for; it asks again for the rest.

    Of a question and a click at the same moment Streamlit makes one message, and for both runs this alone.
    """
    if state.owes_the_page():
        st.rerun()
    made: dict[int, Any] = {}
    started = time.perf_counter()
    for layer in st.session_state.get(KEY, {}).get("missing") or ():
        if layer in wanted and time.perf_counter() - started < _SECONDS:
            made[layer] = [moving(figure) for figure in make(layer)]
    with st.container(key="other_layers_frame"):
        data = {"context": context, "wanted": list(wanted), "layers": made}
        _send(key=KEY, data=data, on_missing_change=lambda: None)


def moving(figure: Figure) -> dict[str, str]:
    """What of a figure is another at another layer: of its traces in their order, and its layout as `plots` has it."""
    traces = [{name: trace[name] for name in MOVING if name in trace} for trace in figure["data"]]
    return {"traces": as_text(traces), "layout": as_text(figure["layout"])}
