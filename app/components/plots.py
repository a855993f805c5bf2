"""Every figure of the app: drawn by plotly.js in a small component of our own (`plots.js`).

Streamlit's own chart brings a second plotly.js of 4.7 MB, draws a figure anew whenever anything in it changes, and
reports clicks but not the mouse. This one uses the copy that the plotly package ships, redraws what has changed and no
more (a step to another layer moves one line of a strip), and lets figures know of each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.charts.canvas import Figure
from app.components import plotly_library

FIRST_PAUSE = 0.4
"""Seconds."""
_LET_DRAWN = "plots_let_drawn"

_plots = plotly_library.component(
    "es2_plots",
    Path(__file__),
    '<div class="plots"></div>',
    isolate_styles=False,
)


def plot(figure: Figure, *, key: str, alt: str, on_pick: Callable[[], None] | None = None) -> None:
    """Draw one figure.

    Args:
        figure: it has a height.
        key: of the widget. In `on_pick` its `picked` in the session's state is the `customdata` of the clicked point.
        alt: what is to be seen, for those who cannot.
        on_pick: called when a point that has `customdata` is clicked.
    """
    data = {
        "library": plotly_library.ADDRESS,
        "figures": [_as_json(figure)],
        "height": figure["layout"]["height"],
        "picks": on_pick is not None,
        "alt": alt,
    }
    _draw(key, data, on_picked_change=on_pick or _nothing)


def linked(
    figures: Sequence[Figure],
    *,
    key: str,
    height: int,
    selected: Sequence[int],
    on_select: Callable[[], None],
    name: str,
    alt: str,
    context: str,
) -> None:
    """Draw figures of prompts beside each other: what is hovered, selected or zoomed in one is so in all.

    Args:
        figures: their points carry `[model, row]` as `customdata`; points of one row belong together. Traces with `to`
            in their `meta` (`{"x": […], "y": […]}`) move there as the person plays or drags the scrubber.
        key: of the widget. In `on_select` its `selected` in the session's state lists the rows.
        height: of the whole, in pixels, whatever is drawn.
        selected: the rows that are selected; a click with shift adds to them.
        on_select: called when points of any figure were clicked or drawn around.
        name: of the file when a figure is saved, without its ending.
        alt: what is to be seen, for those who cannot.
        context: names everything besides the layer and the selection that the figures depend on: with other figures of
            the same name at hand (`other_layers`), the browser draws a picked layer at once.
    """
    data = {
        "library": plotly_library.ADDRESS,
        "context": context,
        "figures": [_as_json(figure) for figure in figures],
        "height": height,
        "selected": list(selected),
        "name": name,
        "alt": alt,
    }
    _draw(key, data, on_selected_change=on_select)


def let_draw() -> None:
    """Give the browser a moment, once a session, before more of the page reaches it.

    It puts everything on the page that has come before it runs a component's script, so that the prompts, which are
    sent first, would be drawn last: a second later.
    """
    if _LET_DRAWN not in st.session_state:
        st.session_state[_LET_DRAWN] = True
        time.sleep(FIRST_PAUSE)


def _draw(key: str, data: dict[str, Any], **callbacks: Any) -> None:
    # In a list, since Streamlit looks for tables in a dict, and to know one imports pandas: half a second, once.
    _plots(key=key, data=[data], **callbacks)


def _as_json(figure: Figure) -> dict[str, str]:
    """Traces and layout as texts of their own: what has not changed is known by comparing them."""
    return {"data": as_text(figure["data"]), "layout": as_text(figure["layout"])}


def as_text(part: Any) -> str:
    """Traces or a layout, numpy's arrays included, as JSON in which what is not finite is null.

    Plotly's own encoder asks after pandas, which another session may be about to import and is half there then.
    """
    text = json.dumps(part, default=_listed)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"A figure holds a {type(value).__name__}, which is no JSON.")


def _nothing() -> None:
    """Streamlit asks for a callback where the component may report."""
