"""What all figures share: colours, sizes, and the one way to make a figure of traces.

No figure asks for the theme, which the browser sends late: each colour has a contrast of at least 3 to white and to
near-black, and text, grid and background come from Streamlit's plotly theme. Equal margins line charts up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from es2.analysis.resampling import Interval
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.report.palette import NEUTRAL, interval_band, translucent

if TYPE_CHECKING:
    from jaxtyping import Float


Trace: TypeAlias = dict[str, Any]
Figure: TypeAlias = dict[str, Any]
"""What `go.Scatter` and `go.Figure` take, unchecked: checking takes most of the time that a figure takes, and the tests
do it."""

MARKER_SIZES = {HARMFUL: 8, HARMLESS: 7.5}

LEFT, RIGHT, TOP = 64, 14, 26
BOTTOM, BOTTOM_TITLED = 22, 44

LEGEND: dict[str, Any] = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": 1.02,
    "yanchor": "bottom",
    "itemclick": False,
    "itemdoubleclick": False,
}


def scatter(**settings: Any) -> Trace:
    """A trace of points or lines; `settings` as for `go.Scatter`."""
    return {"type": "scatter", **settings}


def nice_limit(value: float) -> float:
    """The next larger of …, 0.1, 0.2, 0.3, 0.5, 1, …, so that an axis moves rarely when the layer changes."""
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 1.5, 2, 3, 5, 7, 10) if value <= step * power * (1 + 1e-9)))


def rounded(points: Float[np.ndarray, "prompt 2"]) -> Float[np.ndarray, "prompt 2"]:
    """Coordinates to a hundred-thousandth of the largest, in float64: finer than a screen, half as long in JSON."""
    largest = float(np.abs(points).max(initial=0))
    decimals = 6 - int(np.ceil(np.log10(largest))) if 0 < largest < np.inf else 0
    return np.round(np.asarray(points, dtype=np.float64), decimals)


def padded(values: Float[np.ndarray, "point"]) -> list[float]:
    """The range of an axis that shows all `values` with some room at either end."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    return [low - room, high + room]


def figure(traces: Sequence[Trace], height: int, *, x: dict[str, Any], y: dict[str, Any], **more: Any) -> Figure:
    """Traces in a layout whose margins are the same everywhere and never automatic, so that charts line up.

    Axes are fixed and nothing is dragged, if `x`, `y` and `more` (as for `layout`) do not say otherwise.
    """
    fixed = {"fixedrange": True}
    settings: dict[str, Any] = {"hovermode": "closest", "dragmode": False} | more
    return {"data": list(traces), "layout": layout(height, x=fixed | x, y=fixed | y, **settings)}


def layout(
    height: int,
    *,
    revision: str,
    x: dict[str, Any],
    y: dict[str, Any],
    bottom: int = BOTTOM_TITLED,
    top: int = TOP,
    left: int = LEFT,
    **more: Any,
) -> dict[str, Any]:
    """The layout of `figure`, as plotly's JSON has it."""
    axis = {"zeroline": False, "automargin": False}
    return {
        "height": height,
        "margin": {"l": left, "r": RIGHT, "t": top, "b": bottom, "pad": 0},
        "legend": LEGEND,
        "uirevision": revision,
        "hoverlabel": {"align": "left", "namelength": -1},
        "xaxis": axis | x,
        "yaxis": axis | y,
        **more,
    }


def title(words: str | None) -> dict[str, Any]:
    """An axis title."""
    return {"text": words, "standoff": 6}


def vertical(x: float, *, width: float = 2, dash: str = "solid") -> dict[str, Any]:
    """A line over the whole height: the chosen layer, a boundary, the chosen C."""
    line = {"color": NEUTRAL, "width": width, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}


LAYERS = "layer (residual stream after the block)"
"""What an axis of layers is called."""


def layer_axis(n_layers: int, words: str | None = LAYERS) -> dict[str, Any]:
    """The x axis of every figure over layers, so that charts above each other line up."""
    return {
        "range": [-0.6, n_layers - 0.4],
        "title": title(words),
        "tickmode": "linear",
        "tick0": 0,
        "dtick": 1 if n_layers <= 40 else 5,
        "showgrid": False,
    }


def band(x: Sequence[int], intervals: Sequence[Interval], colour: str, name: str) -> Trace:
    """Intervals over `x` as a band behind their line."""
    return interval_band(x, intervals, colour) | {"name": f"{name} interval"}


def column(layer: int, colour: str = NEUTRAL, opacity: float = 0.14, half_width: float = 0.5) -> dict[str, Any]:
    """A pale column behind a layer that something was done at."""
    return {
        "type": "rect",
        "x0": layer - half_width,
        "x1": layer + half_width,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"width": 0},
        "fillcolor": translucent(colour, opacity),
        "layer": "below",
    }


def dashed(x: Sequence[float], y: float, name: str, width: float = 1) -> Trace:
    """A dashed level line from the first to the second of `x`."""
    line = {"color": NEUTRAL, "width": width, "dash": "dash"}
    return scatter(x=list(x), y=[y, y], mode="lines", line=line, name=name, hoverinfo="skip")


def error_bars(intervals: Sequence[Interval], colour: str, thickness: float = 1.5) -> dict[str, Any]:
    """Intervals about the points of a trace."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.value for interval in intervals],
        "arrayminus": [interval.value - interval.low for interval in intervals],
        "color": colour,
        "thickness": thickness,
        "width": 3,
    }


def words(text: str, x: float, y: float, xanchor: str, yanchor: str, **more: Any) -> dict[str, Any]:
    """An annotation at a place of the plot, in parts of its width and height."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": xanchor, "yanchor": yanchor}
    return {"text": text, "showarrow": False} | place | more


BOUNDARY = vertical(0, width=1.5, dash="dash")
"""The probe's boundary, where the x axis is the distance to it."""


def margin_limit(margins: Float[np.ndarray, "prompt"]) -> float:
    """How far an axis of margins reaches to either side, so that the projection and the histogram line up."""
    return nice_limit(1.05 * float(np.abs(margins).max(initial=0)))
