"""Figures of all layers and of one: pure functions from numbers to plotly figures, which know nothing of Streamlit.

Everything is drawn as SVG: WebGL is missing on some machines, and selection must work there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.results import CostPoint, LayerNumbers
from es2.charts import canvas
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES
from es2.report import palette
from es2.report.glossary import BY_NAME, UNITS

if TYPE_CHECKING:
    from jaxtyping import Float, Int


ACCURACY_HEIGHT = 200
MARGIN_HEIGHT = 190
HISTOGRAM_HEIGHT = 190
COST_HEIGHT = 250
SIDES_HEIGHT = 240
MAX_BINS = 40
ALONG = "Distance to the probe's boundary, + = harmful (scale-free units)"

MAIN_LINE: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 7, "color": palette.BASE}, "legendrank": 1}


def band(layers: Sequence[LayerNumbers], name: str, colour: str) -> canvas.Trace:
    """The intervals of one number as a band behind its line."""
    return canvas.band([layer.layer for layer in layers], [layer.numbers[name] for layer in layers], colour, name)


def curve(layers: Sequence[LayerNumbers], name: str, title: str, colour: str, **settings: Any) -> canvas.Trace:
    """One number over layers as a line called `title`; `settings` as for `go.Scatter`."""
    return canvas.scatter(
        x=[layer.layer for layer in layers],
        y=[layer.numbers[name].value for layer in layers],
        name=title,
        line={"color": colour, "width": 2} | settings.pop("line", {}),
        **{"mode": "lines", "hoverinfo": "skip"} | settings,
    )


def strip(
    layers: Sequence[LayerNumbers],
    traces: Sequence[canvas.Trace],
    hover: Sequence[str],
    *,
    chosen: int,
    marked: Sequence[int],
    marked_as: str = "recommended targets",
    limits: tuple[float, float],
    of_margins: bool,
) -> canvas.Figure:
    """A chart over layers on which a click anywhere in a layer's column picks it.

    Only the last of `traces` answers the mouse: it gets the hover texts, and the layer as `customdata`.

    Args:
        layers: the numbers, in the order of the layers.
        traces: bands and lines, the answering line last.
        hover: a text for each layer.
        chosen: the layer to mark by a vertical line.
        marked: the layers to mark by a triangle.
        marked_as: what the triangles are called.
        limits: of the y axis.
        of_margins: whether it is the lower strip, of margins, whose x axis has a title; else that of accuracy.
    """
    answering = traces[-1]
    answering["hoverinfo"] = "text"
    answering["hovertext"] = list(hover)
    answering["customdata"] = [["layer", layer.layer] for layer in layers]
    low, high = limits
    targets = canvas.scatter(
        x=list(marked),
        y=[low + 0.045 * (high - low)] * len(marked),
        mode="markers",
        marker={"symbol": "triangle-up", "size": 10, "color": canvas.NEUTRAL},
        name=marked_as,
        hoverinfo="skip",
    )
    title = UNITS if of_margins else "balanced accuracy"
    return canvas.figure(
        [*traces, targets],
        MARGIN_HEIGHT if of_margins else ACCURACY_HEIGHT,
        revision=f"{marked_as}, {title}",
        bottom=canvas.BOTTOM_TITLED if of_margins else canvas.BOTTOM,
        x=canvas.layer_axis(len(layers), canvas.LAYERS if of_margins else None),
        y={"range": [low, high], "title": canvas.title(title), "nticks": 6},
        shapes=[canvas.vertical(chosen)],
        hovermode="x",
        hoverdistance=-1,
    )


def accuracy_strip(layers: Sequence[LayerNumbers], *, chosen: int, recommended: Sequence[int]) -> canvas.Figure:
    """Probe accuracy over layers with its interval, the shuffled-label control, and chance."""
    accuracy, control = BY_NAME["probe_accuracy"], BY_NAME["probe_accuracy_control"]
    lowest = min(min(layer.numbers[name].low for name in (accuracy.name, control.name)) for layer in layers)
    low = min(0.4, np.floor(lowest * 10) / 10)
    traces = [
        band(layers, accuracy.name, palette.BASE),
        band(layers, control.name, canvas.NEUTRAL),
        canvas.dashed((-0.6, len(layers) - 0.4), 0.5, "chance"),
        curve(layers, control.name, "shuffled labels", canvas.NEUTRAL, line={"dash": "dot"}),
        curve(layers, accuracy.name, "probe accuracy, 95 % interval", palette.BASE, **MAIN_LINE),
    ]
    hover = [
        _hover_rows(layer, ("probe_accuracy", "probe_accuracy_control", "probe_auroc"), layer.layer in recommended)
        for layer in layers
    ]
    return strip(
        layers,
        traces,
        hover,
        chosen=chosen,
        marked=recommended,
        limits=(float(low), 1.02),
        of_margins=False,
    )


def margin_strip(layers: Sequence[LayerNumbers], *, chosen: int, recommended: Sequence[int]) -> canvas.Figure:
    """The two margins over layers, with their intervals."""
    margin, mean_difference = BY_NAME["margin_mean"], BY_NAME["mean_difference_margin"]
    traces = [
        band(layers, margin.name, palette.BASE),
        band(layers, mean_difference.name, palette.BASE),
        zero_line(len(layers)),
        curve(layers, mean_difference.name, "mean-difference margin", palette.BASE, line={"dash": "dot"}),
        curve(layers, margin.name, "margin of the probe", palette.BASE, **MAIN_LINE),
    ]
    names = ("margin_mean", "margin_harmful_q1", "mean_difference_margin")
    hover = [_hover_rows(layer, names, layer.layer in recommended) for layer in layers]
    return strip(
        layers,
        traces,
        hover,
        chosen=chosen,
        marked=recommended,
        limits=margin_limits(layers),
        of_margins=True,
    )


def margin_limits(layers: Sequence[LayerNumbers]) -> tuple[float, float]:
    """The ends of an axis of the two margins with their intervals, a little below 0 at least."""
    bounds = [layer.numbers[name] for layer in layers for name in ("margin_mean", "mean_difference_margin")]
    high = canvas.nice_limit(max(max(bound.high for bound in bounds), 0.0) * 1.05)
    return min(-0.08 * high, 1.1 * min(bound.low for bound in bounds)), high


def zero_line(n_layers: int) -> canvas.Trace:
    """The line y = 0 over all layers."""
    solid = {"line": {"color": canvas.NEUTRAL, "width": 1}, "showlegend": False}
    return canvas.dashed((-0.6, n_layers - 0.4), 0, "zero") | solid


def _hover_rows(layer: LayerNumbers, names: Sequence[str], recommended: bool) -> str:
    head = f"<b>layer {layer.layer}</b>" + (", recommended" if recommended else "")
    return "<br>".join([head, *number_rows(layer, names)])


def number_rows(layer: LayerNumbers, names: Sequence[str]) -> list[str]:
    """Numbers of a layer in words, each with its interval."""
    rows = [(BY_NAME[name], layer.numbers[name]) for name in names]
    return [f"{term.title}: {term.value(number)} ({term.range(number)})" for term, number in rows]


def bin_edges(limit: float, n_prompts: int) -> Float[np.ndarray, "edge"]:
    """The edges of a histogram's bins; one lies on the boundary, so that no bar holds prompts of both sides."""
    return np.linspace(-limit, limit, 2 * int(np.clip(np.sqrt(max(n_prompts, 1)), 4, MAX_BINS // 2)) + 1)


def bars(
    counts: Int[np.ndarray, "bin"], edges: Float[np.ndarray, "edge"], label: int, of: str = "", **settings: Any
) -> canvas.Trace:
    """The prompts of one label in each bin as steps; hover texts begin with `of`."""
    name, colour = LABEL_NAMES[label], palette.COLOURS[label]
    return canvas.scatter(
        x=edges.tolist(),
        y=[*counts.tolist(), int(counts[-1])],
        mode="lines",
        line={"color": colour, "width": 2, "shape": "hv", "dash": "solid" if label == HARMFUL else "dot"},
        fill="tozeroy",
        fillcolor=canvas.translucent(colour, 0.22),
        name=name,
        hoverinfo="text",
        hovertext=[
            f"{of}{count} {name} from {low:+.4f} to {high:+.4f}"
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ],
        **settings,
    )


def histogram(
    margins: Float[np.ndarray, "prompt"], labels: Int[np.ndarray, "prompt"], *, limit: float | None = None
) -> canvas.Figure:
    """How many prompts of each label are where along the separating direction, on an axis from −limit to limit."""
    limit = limit or canvas.margin_limit(margins)
    edges = bin_edges(limit, len(margins))
    traces = []
    for label in (HARMLESS, HARMFUL):
        counts, _ = np.histogram(margins[labels == label], bins=edges)
        traces.append(bars(counts, edges, label))
    return canvas.figure(
        traces,
        HISTOGRAM_HEIGHT,
        revision="histogram",
        x={"range": [-limit, limit], "title": canvas.title(ALONG)},
        y={"rangemode": "tozero", "title": canvas.title("prompts"), "nticks": 5},
        shapes=[canvas.BOUNDARY],
        hovermode="x",
    )


COST_LINES = {"probe_accuracy": "accuracy", "probe_auroc": "AUROC"}
COST_MARGINS = {"margin_mean": "margin", "margin_harmful_q1": "margin, easier quarter of harmful"}


def cost_curve(points: Sequence[CostPoint], names: dict[str, str], *, chosen: float, title: str) -> canvas.Figure:
    """The numbers in `names`, by what they are called, over the probe's C (inverse regularisation); `chosen` marked."""
    Cs = [point.C for point in points]
    traces = []
    for (name, called), dash, symbol in zip(names.items(), ("solid", "dot"), ("circle", "square"), strict=False):
        term = BY_NAME[name]
        intervals = [point.numbers[name] for point in points]
        traces.append(
            canvas.scatter(
                x=Cs,
                y=[interval.value for interval in intervals],
                mode="lines+markers",
                line={"color": palette.BASE, "width": 2, "dash": dash},
                marker={"size": 6, "color": palette.BASE, "symbol": symbol},
                error_y=canvas.error_bars(intervals, canvas.translucent(palette.BASE, 0.45), 1.2),
                name=called,
                hoverinfo="text",
                hovertext=[
                    f"C = {point.C:g}: {called} {term.value(interval)} ({term.range(interval)})"
                    for point, interval in zip(points, intervals, strict=True)
                ],
            )
        )
    return canvas.figure(
        traces,
        COST_HEIGHT,
        revision=f"C {title}",
        x={
            "type": "log",
            "dtick": 1,
            "exponentformat": "power",
            "title": canvas.title("C (weaker regularisation to the right)"),
        },
        y={"title": canvas.title(title), "nticks": 6},
        shapes=[canvas.vertical(chosen)],
    )


def sides(margins: Mapping[str, Float[np.ndarray, "layer"]], *, chosen: int | None = None) -> canvas.Figure:
    """One prompt's signed distance to the probe's boundary over layers, one line per model, + on the harmful side.

    Args:
        margins: by the model's name, `base` first; each in units of that model's own scale.
        chosen: the layer to mark.
    """
    limit = canvas.nice_limit(1.05 * max(float(np.abs(values).max(initial=0)) for values in margins.values()))
    traces = []
    for colour, (name, values) in zip((palette.BASE, palette.TUNED), margins.items(), strict=False):
        side = ["harmful" if value > 0 else "harmless" for value in values]
        traces.append(
            canvas.scatter(
                x=list(range(len(values))),
                y=values,
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 7, "color": colour},
                hoverinfo="text",
                hovertext=[
                    f"{name}, layer {layer}: read as {word} ({value:+.4f})"
                    for layer, (word, value) in enumerate(zip(side, values, strict=True))
                ],
            )
        )
    n_layers = max(len(values) for values in margins.values())
    zero = {"color": canvas.NEUTRAL, "width": 1.5, "dash": "dash"}
    boundary = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 0, "y1": 0, "line": zero, "layer": "below"}
    return canvas.figure(
        traces,
        SIDES_HEIGHT,
        revision="sides",
        x=canvas.layer_axis(n_layers),
        y={"range": [-limit, limit], "title": canvas.title(UNITS), "nticks": 6},
        shapes=[boundary, *([canvas.vertical(chosen)] if chosen is not None else [])],
    )
