"""The figures: pure functions from numbers to plotly figures, which know nothing of Streamlit.

One colour means one thing in every figure, and no figure asks for the theme: each colour was chosen to stand out on
white and on near-black alike (contrast of at least 3 to both) and to stay apart for colour-blind readers, and labels
differ in marker shape besides. That keeps a figure the same object when the theme changes, and spares the page a wrong
first frame, since the browser tells the theme late. Text, grid and background come from Streamlit's plotly theme.

Everything is `go.Scatter`: WebGL is missing on some machines, and selection must work there too. Charts that share an
x axis are separate figures with equal margins, because subplots do not report clicks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from app import text
from app.glossary import BY_NAME, UNITS
from es2.projection import View
from es2.prompts import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.results import CostPoint, Interval, LayerNumbers

COLOURS = {HARMFUL: "#d95f02", HARMLESS: "#2b83ba"}
"""Vermilion and blue: the pair that every kind of colour blindness tells apart."""
BASE = "#159588"
TUNED = "#a463c4"
NEUTRAL = "#85898f"
"""Controls, chance, boundaries, the chosen layer: what is no model and no label."""
SYMBOLS = {HARMFUL: "diamond", HARMLESS: "circle"}
MARKER_SIZES = {HARMFUL: 8, HARMLESS: 7.5}

ACCURACY_HEIGHT = 200
MARGIN_HEIGHT = 190
PROJECTION_HEIGHT = 520
HISTOGRAM_HEIGHT = 190
COST_HEIGHT = 250
LEFT, RIGHT, TOP = 64, 14, 26
TOP_WITH_TOOLS = 56
"""Room for plotly's buttons above the legend."""
BOTTOM, BOTTOM_TITLED = 22, 44
MAX_TWINS = 12
"""With more prompts selected than this, lines to their twins would hide the points."""
MAX_BINS = 40
TOOLS = {"click": "pan", "lasso": "lasso", "box": "select"}
"""Ways to select, and plotly's mode for each; one at a time, since Streamlit ignores clicks while dragging selects."""

_MAIN: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 7, "color": BASE}, "legendrank": 1}
_LEGEND: dict[str, Any] = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": 1.02,
    "yanchor": "bottom",
    "itemclick": False,
    "itemdoubleclick": False,
}


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` as an `rgba(…)` of this opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def nice_limit(value: float) -> float:
    """The next larger of …, 0.1, 0.2, 0.3, 0.5, 1, …, so that an axis moves rarely when the layer changes."""
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 1.5, 2, 3, 5, 7, 10) if value <= step * power * (1 + 1e-9)))


def _figure(
    traces: Sequence[go.Scatter],
    height: int,
    *,
    revision: str,
    x: dict[str, Any],
    y: dict[str, Any],
    bottom: int = BOTTOM_TITLED,
    top: int = TOP,
    **layout: Any,
) -> go.Figure:
    """Traces in a layout whose margins are the same everywhere and never automatic, so that charts line up.

    Made in one go: every later `update` of a plotly figure costs as much as the figure itself.
    """
    axis = {"zeroline": False, "automargin": False}
    return go.Figure(
        list(traces),
        {
            "height": height,
            "margin": {"l": LEFT, "r": RIGHT, "t": top, "b": bottom, "pad": 0},
            "legend": _LEGEND,
            "uirevision": revision,
            "hoverlabel": {"align": "left", "namelength": -1},
            "xaxis": axis | x,
            "yaxis": axis | y,
            **layout,
        },
    )


def _title(words: str | None) -> dict[str, Any]:
    return {"text": words, "standoff": 6}


def _vertical(x: float, *, width: float = 2, dash: str = "solid") -> dict[str, Any]:
    """A line over the whole height: the chosen layer, a boundary, the chosen C."""
    line = {"color": NEUTRAL, "width": width, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line, "layer": "below"}


_BOUNDARY = _vertical(0, width=1.5, dash="dash")


# ------------------------------------------------------------------------------------------------------ the layer strip


def _band(layers: Sequence[LayerNumbers], name: str, colour: str) -> go.Scatter:
    """The intervals of one number as a band behind its line."""
    x = [layer.layer for layer in layers]
    intervals = [layer.numbers[name] for layer in layers]
    return go.Scatter(
        x=x + x[::-1],
        y=[interval.high for interval in intervals] + [interval.low for interval in intervals][::-1],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=translucent(colour, 0.16),
        hoverinfo="skip",
        showlegend=False,
        name=f"{name} interval",
    )


def _curve(layers: Sequence[LayerNumbers], name: str, title: str, colour: str, **settings: Any) -> go.Scatter:
    return go.Scatter(
        x=[layer.layer for layer in layers],
        y=[layer.numbers[name].value for layer in layers],
        name=title,
        line={"color": colour, "width": 2} | settings.pop("line", {}),
        **{"mode": "lines", "hoverinfo": "skip"} | settings,
    )


def _strip(
    layers: Sequence[LayerNumbers],
    traces: Sequence[go.Scatter],
    hover: Sequence[str],
    *,
    chosen: int,
    recommended: Sequence[int],
    limits: tuple[float, float],
    height: int,
    title: str,
    revision: str,
    titled: bool,
) -> go.Figure:
    """A chart over layers on which a click anywhere in a layer's column picks it.

    The one trace that answers the mouse is the last line of `traces`: it gets the hover texts, and the layer as
    `customdata`. All others are told to skip, so a click means one thing.
    """
    answering = traces[-1]
    answering.hoverinfo = "text"
    answering.hovertext = list(hover)
    answering.customdata = [["layer", layer.layer] for layer in layers]
    answering.unselected = {"marker": {"opacity": 1}}
    low, high = limits
    targets = go.Scatter(
        x=list(recommended),
        y=[low + 0.045 * (high - low)] * len(recommended),
        mode="markers",
        marker={"symbol": "triangle-up", "size": 10, "color": NEUTRAL},
        name="recommended targets",
        hoverinfo="skip",
    )
    n_layers = len(layers)
    return _figure(
        [*traces, targets],
        height,
        revision=revision,
        bottom=BOTTOM_TITLED if titled else BOTTOM,
        x={
            "range": [-0.6, n_layers - 0.4],
            "fixedrange": True,
            "title": _title("layer (residual stream after the block)" if titled else None),
            "tickmode": "linear",
            "tick0": 0,
            "dtick": 1 if n_layers <= 40 else 5,
            "showgrid": False,
        },
        y={"range": [low, high], "fixedrange": True, "title": _title(title), "nticks": 6},
        shapes=[_vertical(chosen)],
        hovermode="x",
        hoverdistance=-1,
        dragmode=False,
        clickmode="event+select",
    )


def accuracy_strip(layers: Sequence[LayerNumbers], *, chosen: int, recommended: Sequence[int]) -> go.Figure:
    """Probe accuracy over layers with its interval, the shuffled-label control, and chance.

    Args:
        layers: one model's numbers, in the order of its layers.
        chosen: the layer to mark by a vertical line.
        recommended: the layers to mark by a triangle.
    """
    accuracy, control = BY_NAME["probe_accuracy"], BY_NAME["probe_accuracy_control"]
    lowest = min(min(layer.numbers[name].low for name in (accuracy.name, control.name)) for layer in layers)
    low = min(0.4, np.floor(lowest * 10) / 10)
    traces = [
        _band(layers, accuracy.name, BASE),
        _band(layers, control.name, NEUTRAL),
        go.Scatter(
            x=[-0.6, len(layers) - 0.4],
            y=[0.5, 0.5],
            mode="lines",
            line={"color": NEUTRAL, "width": 1, "dash": "dash"},
            name="chance",
            hoverinfo="skip",
        ),
        _curve(layers, control.name, "shuffled labels", NEUTRAL, line={"dash": "dot"}),
        _curve(layers, accuracy.name, "probe accuracy, 95 % interval", BASE, **_MAIN),
    ]
    hover = [
        _hover_rows(layer, ("probe_accuracy", "probe_accuracy_control", "probe_auroc"), layer.layer in recommended)
        for layer in layers
    ]
    return _strip(
        layers,
        traces,
        hover,
        chosen=chosen,
        recommended=recommended,
        limits=(float(low), 1.02),
        height=ACCURACY_HEIGHT,
        title="balanced accuracy",
        revision="accuracy strip",
        titled=False,
    )


def margin_strip(layers: Sequence[LayerNumbers], *, chosen: int, recommended: Sequence[int]) -> go.Figure:
    """The two margins over layers, with their intervals; arguments as for `accuracy_strip`."""
    margin, mean_difference = BY_NAME["margin_mean"], BY_NAME["mean_difference_margin"]
    bounds = [layer.numbers[name] for layer in layers for name in (margin.name, mean_difference.name)]
    lowest, highest = min(bound.low for bound in bounds), max(bound.high for bound in bounds)
    high = nice_limit(max(highest, 0.0) * 1.05)
    low = min(-0.08 * high, 1.1 * lowest)
    traces = [
        _band(layers, margin.name, BASE),
        _band(layers, mean_difference.name, BASE),
        _zero_line(-0.6, len(layers) - 0.4),
        _curve(layers, mean_difference.name, "mean-difference margin", BASE, line={"dash": "dot"}),
        _curve(layers, margin.name, "margin of the probe", BASE, **_MAIN),
    ]
    names = ("margin_mean", "margin_harmful_q1", "mean_difference_margin")
    hover = [_hover_rows(layer, names, layer.layer in recommended) for layer in layers]
    return _strip(
        layers,
        traces,
        hover,
        chosen=chosen,
        recommended=recommended,
        limits=(low, high),
        height=MARGIN_HEIGHT,
        title=UNITS,
        revision="margin strip",
        titled=True,
    )


def _zero_line(low: float, high: float) -> go.Scatter:
    return go.Scatter(
        x=[low, high],
        y=[0, 0],
        mode="lines",
        line={"color": NEUTRAL, "width": 1},
        hoverinfo="skip",
        showlegend=False,
        name="zero",
    )


def _hover_rows(layer: LayerNumbers, names: Sequence[str], recommended: bool) -> str:
    head = f"<b>layer {layer.layer}</b>" + (", recommended" if recommended else "")
    rows = [(BY_NAME[name], layer.numbers[name]) for name in names]
    return "<br>".join([head, *(f"{term.title}: {term.value(number)} ({term.range(number)})" for term, number in rows)])


# --------------------------------------------------------------------------------------------------------- one layer


def projection(
    view: View,
    prompts: PromptSet,
    *,
    margins: Float[np.ndarray, "prompt"],
    others: bool = False,
    selected: Sequence[int] = (),
    tool: str = "click",
) -> go.Figure:
    """The prompts of one layer in a plane, coloured by label; test prompts filled, other splits hollow.

    Args:
        view: where each prompt stands; `separation`, `pca` or `umap`.
        prompts: the prompt set, in the order of the view's rows.
        margins: signed distance of each prompt to the probe's boundary, + on the harmful side, for the hover text.
        others: whether to show the other splits too.
        selected: rows to ring; up to `MAX_TWINS` of them are joined to their contrast twins.
        tool: what a press of the mouse does, one of `TOOLS`.

    Returns:
        A figure whose points carry `["base", row]` as `customdata`.
    """
    coordinates = np.asarray(view.base, dtype=np.float64)
    test = prompts.in_split("test")
    shown = np.ones(len(prompts), dtype=bool) if others else test
    traces = []
    for hollow in (True, False) if others else (False,):
        for label in (HARMLESS, HARMFUL):
            rows = np.flatnonzero((test != hollow) & (prompts.labels == label))
            traces.append(_cloud(coordinates, rows, prompts, margins, label, hollow=hollow))
    ringed = [row for row in selected if shown[row]]
    if len(ringed) <= MAX_TWINS:
        traces.append(_twins(coordinates, ringed, prompts, shown))
    traces.append(_rings(coordinates[ringed]))

    x: dict[str, Any] = {"title": _title(text.label(view.axes[0])), "showgrid": True}
    y: dict[str, Any] = {"title": _title(text.label(view.axes[1]))}
    marks: dict[str, Any] = {}
    if view.kind == "separation":
        limit = margin_limit(coordinates[shown, 0])
        x["range"] = [-limit, limit]
        marks = {"shapes": [_BOUNDARY], "annotations": [_side(HARMLESS), _side(HARMFUL)]}
    else:
        y |= {"scaleanchor": "x", "scaleratio": 1}
    if view.kind == "umap":
        x["showticklabels"] = y["showticklabels"] = False
    return _figure(
        traces,
        PROJECTION_HEIGHT,
        revision=view.kind,
        top=TOP_WITH_TOOLS,
        x=x,
        y=y,
        dragmode=TOOLS[tool],
        hovermode="closest",
        newselection={"line": {"color": NEUTRAL, "width": 1.5, "dash": "dot"}},
        **marks,
    )


def _rings(points: Float[np.ndarray, "row 2"]) -> go.Scatter:
    """Rings around what is selected, thinner when there are many."""
    few = len(points) <= MAX_TWINS
    return go.Scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": 17 if few else 13,
            "color": NEUTRAL,
            "line": {"width": 2.5 if few else 1.5},
        },
        hoverinfo="skip",
        showlegend=False,
        name="selected",
        unselected={"marker": {"opacity": 1}},
    )


def _cloud(
    coordinates: Float[np.ndarray, "prompt 2"],
    rows: Int[np.ndarray, "row"],
    prompts: PromptSet,
    margins: Float[np.ndarray, "prompt"],
    label: int,
    *,
    hollow: bool,
) -> go.Scatter:
    colour, name = COLOURS[label], LABEL_NAMES[label]
    line = {"width": 1.2 if hollow else 0.6, "color": colour if hollow else "rgba(255,255,255,0.65)"}
    return go.Scatter(
        x=coordinates[rows, 0],
        y=coordinates[rows, 1],
        mode="markers",
        name=f"{name}, other splits" if hollow else name,
        marker={
            "symbol": SYMBOLS[label] + ("-open" if hollow else ""),
            "size": MARKER_SIZES[label],
            "color": colour,
            "opacity": 0.45 if hollow else 0.85,
            "line": line,
        },
        selected={"marker": {"opacity": 0.45 if hollow else 0.85}},
        unselected={"marker": {"opacity": 0.45 if hollow else 0.85}},
        customdata=[["base", int(row)] for row in rows],
        hovertext=[hover_text(prompts, int(row), float(margins[row])) for row in rows],
        hoverinfo="text",
    )


def hover_text(prompts: PromptSet, row: int, margin: float) -> str:
    """A prompt and what is known about it, safe to show in a plotly label."""
    known = (LABEL_NAMES[int(prompts.labels[row])], prompts.categories[row], f"{prompts.splits[row]} split")
    pair = text.hover(prompts.pairs[row], limit=40)
    about = " · ".join(text.hover(part, limit=60) for part in known)
    return f"{text.hover(prompts.texts[row])}<br><i>{about}</i><br><i>margin {margin:+.3f} · pair {pair}</i>"


def twins_of(prompts: PromptSet, rows: Sequence[int]) -> list[tuple[int, int]]:
    """For each of `rows` the rows of the same pair under the other label, as (row, twin)."""
    return [
        (row, twin)
        for row in rows
        for twin in range(len(prompts))
        if prompts.pairs[twin] == prompts.pairs[row] and prompts.labels[twin] != prompts.labels[row]
    ]


def _twins(
    coordinates: Float[np.ndarray, "prompt 2"],
    rows: Sequence[int],
    prompts: PromptSet,
    shown: Bool[np.ndarray, "prompt"],
) -> go.Scatter:
    x: list[float | None] = []
    y: list[float | None] = []
    for row, twin in twins_of(prompts, rows):
        if shown[twin]:
            x += [float(coordinates[row, 0]), float(coordinates[twin, 0]), None]
            y += [float(coordinates[row, 1]), float(coordinates[twin, 1]), None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": NEUTRAL, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
        name="twins",
    )


def _side(label: int) -> dict[str, Any]:
    """The name of one side of the boundary, at the top of the plot."""
    harmful = label == HARMFUL
    return {
        "x": 0,
        "y": 1,
        "yref": "paper",
        "xanchor": "left" if harmful else "right",
        "yanchor": "top",
        "xshift": 8 if harmful else -8,
        "showarrow": False,
        "text": f"read as {LABEL_NAMES[label]}",
        "font": {"color": COLOURS[label], "size": 12},
    }


def margin_limit(margins: Float[np.ndarray, "prompt"]) -> float:
    """How far an axis of margins reaches to either side, so that the projection and the histogram line up."""
    return nice_limit(1.05 * float(np.abs(margins).max(initial=0)))


def histogram(
    margins: Float[np.ndarray, "prompt"], labels: Int[np.ndarray, "prompt"], *, limit: float | None = None
) -> go.Figure:
    """How many prompts of each label stand where along the separating direction.

    Args:
        margins: signed distance to the boundary, + on the harmful side, scale-free.
        labels: 1 harmful, 0 harmless.
        limit: the axis reaches from −limit to limit; chosen from the margins if not given.
    """
    limit = limit or margin_limit(margins)
    # An even number of bins puts an edge on the boundary, so that no bar holds prompts of both sides.
    n_bins = 2 * int(np.clip(np.sqrt(max(len(margins), 1)), 4, MAX_BINS // 2))
    edges = np.linspace(-limit, limit, n_bins + 1)
    traces = []
    for label in (HARMLESS, HARMFUL):
        name, colour = LABEL_NAMES[label], COLOURS[label]
        counts, _ = np.histogram(margins[labels == label], bins=edges)
        traces.append(
            go.Scatter(
                x=edges.tolist(),
                y=[*counts.tolist(), int(counts[-1])],
                mode="lines",
                line={"color": colour, "width": 2, "shape": "hv", "dash": "solid" if label == HARMFUL else "dot"},
                fill="tozeroy",
                fillcolor=translucent(colour, 0.22),
                name=name,
                hoverinfo="text",
                hovertext=[
                    f"{count} {name} from {low:+.3f} to {high:+.3f}"
                    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
                ],
            )
        )
    return _figure(
        traces,
        HISTOGRAM_HEIGHT,
        revision="histogram",
        x={
            "range": [-limit, limit],
            "fixedrange": True,
            "title": _title("Distance to the probe's boundary, + = harmful (in units of the scale)"),
        },
        y={"fixedrange": True, "rangemode": "tozero", "title": _title("prompts"), "nticks": 5},
        shapes=[_BOUNDARY],
        hovermode="x",
        dragmode=False,
    )


COST_LINES = {"probe_accuracy": "accuracy", "probe_auroc": "AUROC"}
COST_MARGINS = {"margin_mean": "margin", "margin_harmful_q1": "margin, easier quarter of harmful"}


def cost_curve(points: Sequence[CostPoint], names: dict[str, str], *, chosen: float, title: str) -> go.Figure:
    """Some of the main numbers over the probe's inverse regularisation strength C.

    Args:
        points: the curve, ascending in C.
        names: which numbers, and what to call them.
        chosen: the C that cross-validation chose, marked by a vertical line.
        title: of the y axis.
    """
    costs = [point.C for point in points]
    traces = []
    for (name, called), dash, symbol in zip(names.items(), ("solid", "dot"), ("circle", "square"), strict=False):
        intervals = [point.numbers[name] for point in points]
        traces.append(
            go.Scatter(
                x=costs,
                y=[interval.value for interval in intervals],
                mode="lines+markers",
                line={"color": BASE, "width": 2, "dash": dash},
                marker={"size": 6, "color": BASE, "symbol": symbol},
                error_y=_error_bars(intervals),
                name=called,
                hoverinfo="text",
                hovertext=[
                    f"C = {point.C:g}: {called} {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
                    for point, interval in zip(points, intervals, strict=True)
                ],
            )
        )
    return _figure(
        traces,
        COST_HEIGHT,
        revision=f"cost {title}",
        x={
            "type": "log",
            "tickvals": costs,
            "ticktext": [f"{cost:g}" for cost in costs],
            "title": _title("C (weaker regularisation to the right)"),
            "fixedrange": True,
        },
        y={"title": _title(title), "fixedrange": True, "nticks": 6},
        shapes=[_vertical(chosen)],
        hovermode="closest",
        dragmode=False,
    )


def _error_bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.value for interval in intervals],
        "arrayminus": [interval.value - interval.low for interval in intervals],
        "color": translucent(BASE, 0.45),
        "thickness": 1.2,
        "width": 3,
    }
