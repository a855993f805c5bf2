"""The prompts at the other layers, sent to the browser ahead, so that a click on a layer waits for no server.

The browser asks for the other layers while it is idle, the nearest first and a few at a time, so that clicks go first.
On a click it draws what it has at once (`plots.js`); the page's answer is the same figure and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, state
from app.components.plots import as_text
from es2.charts.canvas import Figure

KEY = "other_layers"
MOVING = ("x", "y", "text", "meta")  # the entries of a trace that differ between layers

_SECONDS = 0.15  # of the server at a time: a click waits for it
_MAX_POINTS = 60_000  # of all layers together: some megabytes in the browser
_FEWEST = 3  # with room for fewer layers, the server prepares the neighbours instead

_send = st.components.v2.component("es2_other_layers", js=Path(__file__).with_suffix(".js").read_text(encoding="utf-8"))


def send_others(context: str, layer: int, n_layers: int, points: int, make: Callable[[int], Sequence[Figure]]) -> None:
    """Send the figures of the other layers when the browser asks; prepare large ones of the neighbours on the server.

    Args:
        context: as of the `linked` figures that they replace.
        layer: the current layer.
        points: number of points in a layer's figures.
        make: returns the figures of one layer, with nothing selected; called in its own threads for large ones.
    """
    wanted = nearest(layer, n_layers, points)
    if wanted:
        _answer(context, wanted, make)
    else:
        artifacts.make_ready(make, layer, n_layers)


def nearest(layer: int, n_layers: int, points: int) -> list[int]:
    """The layers to send ahead, the nearest first; none where there is room for fewer than three."""
    others = sorted((one for one in range(n_layers) if one != layer), key=lambda one: (abs(one - layer), -one))
    room = _MAX_POINTS // max(points, 1)
    return others[:room] if room >= _FEWEST else []


@st.fragment
def _answer(context: str, wanted: Sequence[int], make: Callable[[int], Sequence[Figure]]) -> None:
    """Send the requested layers of `wanted` until the time is up; the browser asks again for the rest."""
    if state.owes_the_page():  # Streamlit joins a request and a click at the same moment, and runs this fragment only
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
    """The parts of a figure that differ between layers: of its traces in order, and its layout, as text."""
    traces = [{name: trace[name] for name in MOVING if name in trace} for trace in figure["data"]]
    return {"traces": as_text(traces), "layout": as_text(figure["layout"])}
