"""The projection: the prompts of one layer as points in a plane.

A hover label shows a prompt as it was written, each point holds its row, and selected points stay marked when the
figure is made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.projection import View
from es2.charts import canvas
from es2.charts.canvas import Trace
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.report import labels, palette

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


PROJECTION_HEIGHT = 520
TOP_WITH_TOOLS = 56
"""Room for plotly's buttons above the legend."""
MAX_TWINS = 12
"""With more prompts selected than this, lines to their twins would hide the points."""
MANY = 1000
"""Points of a label from which they are drawn smaller and without an edge."""
TOOLS = {"click": "pan", "lasso": "lasso", "box": "select"}
"""Ways to select, and plotly's mode for each; one at a time, since Streamlit ignores clicks while dragging selects."""


def projection(
    view: View,
    prompts: PromptSet,
    *,
    margins: Float[np.ndarray, "prompt"],
    others: bool = False,
    selected: Sequence[int] = (),
    tool: str = "click",
) -> canvas.Figure:
    """The prompts of one layer in a plane, coloured by label; test prompts filled, other splits hollow.

    Args:
        view: where each prompt is; `separation`, `pca` or `umap`.
        prompts: the prompt set, in the order of the view's rows.
        margins: signed distance of each prompt to the probe's boundary, + on the harmful side, for the hover text.
        others: whether to show the other splits too.
        selected: rows to ring; up to `MAX_TWINS` of them are joined to their contrast twins.
        tool: what a press of the mouse does, one of `TOOLS`.

    Returns:
        A figure whose points carry `["base", row]` as `customdata`.
    """
    coordinates = canvas.rounded(view.base)
    shown = np.ones(len(prompts), dtype=bool) if others else prompts.in_split("test")
    traces = [
        cloud(coordinates, rows, prompts, [f"margin {margin:+.4f}" for margin in margins[rows]], label, hollow=hollow)
        for label, hollow, rows in groups_of(prompts, others)
    ]
    ringed = [row for row in selected if shown[row]]
    joined = ringed if len(ringed) <= MAX_TWINS else []
    traces += [twin_lines(coordinates, joined, prompts, shown), rings(coordinates[ringed])]

    layout = canvas.layout(
        PROJECTION_HEIGHT,
        revision=view.kind,
        **frame(view, coordinates[shown], tool, [labels.label(axis) for axis in view.axes]),
    )
    return {"data": traces, "layout": layout}


def groups_of(prompts: PromptSet, others: bool) -> list[tuple[int, bool, Int[np.ndarray, "row"]]]:
    """Rows with the same marker, the hollow first: the label, whether they are of another split than test, the rows."""
    test = prompts.in_split("test")
    return [
        (label, hollow, np.flatnonzero((test != hollow) & (prompts.labels == label)))
        for hollow in ((True, False) if others else (False,))
        for label in (HARMLESS, HARMFUL)
    ]


def frame(view: View, points: Float[np.ndarray, "point 2"], tool: str, titles: Sequence[str]) -> dict[str, Any]:
    """The axes of all figures of a view, with room for `points`, what is marked on them, and what the mouse does."""
    x: dict[str, Any] = {"title": canvas.title(titles[0]), "showgrid": True}
    y: dict[str, Any] = {"title": canvas.title(titles[1]), "range": canvas.padded(points[:, 1])}
    marks: dict[str, Any] = {}
    if view.kind == "separation":
        limit = canvas.margin_limit(points[:, 0])
        x["range"] = [-limit, limit]
        marks = {"shapes": [canvas.BOUNDARY], "annotations": [side(HARMLESS), side(HARMFUL)]}
    else:
        x["range"] = canvas.padded(points[:, 0])
        y |= {"scaleanchor": "x", "scaleratio": 1}
    if view.kind == "umap":
        x["showticklabels"] = y["showticklabels"] = False
    return {
        "x": x,
        "y": y,
        "top": TOP_WITH_TOOLS,
        "dragmode": TOOLS[tool],
        "hovermode": "closest",
        "newselection": {"line": {"color": canvas.NEUTRAL, "width": 1.5, "dash": "dot"}},
        **marks,
    }


def rings(points: Float[np.ndarray, "row 2"]) -> Trace:
    """Rings around what is selected, thinner when there are many."""
    few = len(points) <= MAX_TWINS
    return {
        "type": "scatter",
        "x": points[:, 0],
        "y": points[:, 1],
        "mode": "markers",
        "marker": {
            "symbol": "circle-open",
            "size": 17 if few else 13,
            "color": canvas.NEUTRAL,
            "line": {"width": 2.5 if few else 1.5},
        },
        "hoverinfo": "skip",
        "showlegend": False,
        "name": "selected",
        "unselected": {"marker": {"opacity": 1}},
    }


def cloud(
    coordinates: Float[np.ndarray, "prompt 2"],
    rows: Int[np.ndarray, "row"],
    prompts: PromptSet,
    margins: Sequence[str],
    label: int,
    *,
    hollow: bool,
    model: str = "base",
) -> Trace:
    """The points of one label.

    `margins` are the words below the prompt in each point's hover label; `hollow` points are of another split than
    `test`; `model` is the first entry of each point's `customdata`, before its row.
    """
    colour, name = palette.COLOURS[label], LABEL_NAMES[label]
    line = {"width": 1.2 if hollow else 0.6, "color": colour if hollow else "rgba(255,255,255,0.65)"}
    size, opacity = canvas.MARKER_SIZES[label], 0.45 if hollow else 0.85
    if len(rows) > MANY:  # in a crowd edges cover the neighbours, and each takes the browser time
        size, opacity = 0.7 * size, 0.45  # so that classes are seen to mix where they do
        line = line if hollow else {"width": 0}
    return {
        "type": "scatter",
        "x": coordinates[rows, 0],
        "y": coordinates[rows, 1],
        "mode": "markers",
        "name": f"{name}, other splits" if hollow else name,
        "marker": {
            "symbol": palette.SYMBOLS[label] + ("-open" if hollow else ""),
            "size": size,
            "color": colour,
            "opacity": opacity,
            "line": line,
        },
        "selected": {"marker": {"opacity": opacity}},
        "unselected": {"marker": {"opacity": opacity}},
        "customdata": [[model, int(row)] for row in rows],
        # Apart, since the first stays the same from layer to layer and is ten times as long as the second.
        "hovertext": [hover_text(prompts, int(row)) for row in rows],
        "text": list(margins),
        "hovertemplate": "%{hovertext}<br><i>%{text}</i><extra></extra>",
    }


def hover_text(prompts: PromptSet, row: int) -> str:
    """A prompt and what is known about it, safe to show in a plotly label."""
    known = (LABEL_NAMES[int(prompts.labels[row])], prompts.categories[row], f"{prompts.splits[row]} split")
    return _hover_text(prompts.texts[row], prompts.pairs[row], known)


@lru_cache(maxsize=20_000)
def _hover_text(prompt: str, pair: str, known: tuple[str, ...]) -> str:
    about = [labels.hover(part, limit=60) for part in known]
    return f"{labels.hover(prompt)}<br><i>{' · '.join([*about, f'pair {labels.hover(pair, limit=40)}'])}</i>"


def twins_of(prompts: PromptSet, rows: Sequence[int]) -> list[tuple[int, int]]:
    """For each of `rows` the rows of the same pair under the other label, as (row, twin)."""
    return [
        (row, twin)
        for row in rows
        for twin in range(len(prompts))
        if prompts.pairs[twin] == prompts.pairs[row] and prompts.labels[twin] != prompts.labels[row]
    ]


def twin_lines(
    coordinates: Float[np.ndarray, "prompt 2"],
    rows: Sequence[int],
    prompts: PromptSet,
    shown: Bool[np.ndarray, "prompt"],
) -> Trace:
    """Lines from `rows` to those of their contrast twins that are shown."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, twin in twins_of(prompts, rows):
        if shown[twin]:
            x += [float(coordinates[row, 0]), float(coordinates[twin, 0]), None]
            y += [float(coordinates[row, 1]), float(coordinates[twin, 1]), None]
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "mode": "lines",
        "line": {"color": canvas.NEUTRAL, "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
        "name": "twins",
    }


def side(label: int) -> dict[str, Any]:
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
        "font": {"color": palette.COLOURS[label], "size": 12},
    }
