"""Every figure of the app, drawn by plotly.js in a component of our own (`plots.js`).

Streamlit's own chart brings a second plotly.js of 4.7 MB, draws a figure anew whenever anything in it changes, and does
not report the mouse. This one redraws only what has changed, and links figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.components import plotly_library
from es2.charts.canvas import Figure

FIRST_PAUSE = 0.4  # seconds
_PAUSED = "plots_paused"

_plots = plotly_library.component("es2_plots", Path(__file__), '<div class="plots"></div>', isolate_styles=False)


def plot(figure: Figure, *, key: str, alt: str, on_pick: Callable[[], None] | None = None) -> None:
    """Draw one figure, whose layout has a height; where it has frames, its own slider and buttons move it.

    Args:
        key: of the widget. In `on_pick` its `picked` in the session's state is the `customdata` of the clicked point.
        alt: a description for screen readers.
        on_pick: called when a point that has `customdata` is clicked.
    """
    data = {"height": figure["layout"]["height"], "picks": on_pick is not None, "alt": alt}
    _draw(key, [figure], data, on_picked_change=on_pick or _nothing)


def linked(
    figures: Sequence[Figure],
    *,
    key: str,
    height: int,
    selected: Sequence[int],
    on_select: Callable[[], None],
    name: str,
    alt: str,
    context: str = "",
    grid: bool = False,
) -> None:
    """Draw figures of prompts beside each other, with hovering, selection and zoom in common.

    Args:
        figures: their points carry `[model, row]` as `customdata`; points of one row belong together. Traces with `to`
            in their `meta` (`{"x": […], "y": […]}`) move there as the scrubber plays or is dragged.
        key: of the widget. In `on_select` its `selected` in the session's state lists the rows.
        height: of the whole component, or in a grid of each figure, in pixels.
        selected: the selected rows; a click with shift adds to them.
        on_select: called when points of any figure were clicked or lassoed.
        name: of the file when a figure is saved, without suffix.
        alt: a description for screen readers.
        context: identifies all that the figures depend on besides layer and selection: where `other_layers` sent
            figures of the same context, the browser draws a picked layer at once.
        grid: whether there are as many in a row as there is room for, rather than all in one.
    """
    data = {"context": context, "height": height, "selected": list(selected), "name": name, "alt": alt, "grid": grid}
    _draw(key, figures, data, on_selected_change=on_select)


def let_draw() -> None:
    """Pause once a session, so that the browser draws the prompts before more of the page reaches it.

    The browser runs a component's script only after it has placed all that has arrived.
    """
    if _PAUSED not in st.session_state:
        st.session_state[_PAUSED] = True
        time.sleep(FIRST_PAUSE)


def _draw(key: str, figures: Sequence[Figure], data: dict[str, Any], **callbacks: Any) -> None:
    # Traces and layout are texts of their own, which the browser compares to find what has changed.
    parts = ("data", "layout", "frames")
    texts = [{part: as_text(figure[part]) for part in parts if part in figure} for figure in figures]
    # In a list, since Streamlit looks for tables in a dict and imports pandas for it: half a second, once.
    _plots(key=key, data=[data | {"library": plotly_library.ADDRESS, "figures": texts}], **callbacks)


def as_text(part: Any) -> str:
    """Traces or a layout, numpy's arrays included, as JSON with null for numbers that are not finite.

    Plotly's own encoder looks for pandas, which another session may have imported in part.
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
    """The callback that Streamlit needs where a component may report."""
