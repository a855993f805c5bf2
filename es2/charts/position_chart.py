"""The map of layers and positions: at which layer, and at which token, a probe tells harmful from harmless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from es2.analysis.results import Analysis, LayerNumbers
from es2.charts import canvas, compare_charts, layer_charts
from es2.report import labels
from es2.report.glossary import BY_NAME
from es2.store.sources import MEAN, before_last

NUMBER = "probe_accuracy"
CHANCE = 0.5

_ROW_HEIGHT, _PAIR_HEIGHT = 26, 40
_CELL, _PAIR_CELL, _NARROWEST = 20, 15, 520
_APART = 0.2  # of base and tuned from the middle of their row
_BELOW = 0.45  # room for the marks of target layers below the lowest row
_PALEST = 0.1
_SHORT = {"last_instruction": "request end"}


def position_words(position: str) -> str:
    """What a position is called in words."""
    distance = before_last(position)
    if distance is None:
        return "Mean over the request" if position == MEAN else "Last token of the request"
    return f"{distance} before last" if distance else "Last token"


def height(n_positions: int, n_models: int) -> int:
    """The height of a map, in pixels."""
    row = _ROW_HEIGHT if n_models == 1 else _PAIR_HEIGHT
    return canvas.TOP + canvas.BOTTOM + round(row * (n_positions + _BELOW))


def position_map(
    analyses: Mapping[str, Analysis | None],
    names: Sequence[str],
    *,
    chosen: tuple[int, str],
    marked: Sequence[int],
    marked_as: str,
) -> canvas.Figure:
    """Probe accuracy at every layer and position, the fuller a square the higher; a click picks both.

    Squares carry `["layer", layer, row]` as `customdata` where they are of the chosen position, else `["cell", …]`, and
    `["none", …]` where nothing is analysed; rows count from the end of the prompt on.

    Args:
        analyses: by captured position, from the end of the prompt on; None where there is no analysis.
        names: of base, or of base and tuned, whose rows are then beneath each other.
        chosen: the layer and position to frame, which is analysed.
        marked: the layers to mark by a triangle.
        marked_as: what the triangles are called.
    """
    found = {position: _models(one, len(names)) for position, one in analyses.items() if one is not None}
    layers = range(len(found[chosen[1]][0]))
    full = _full([layer for models in found.values() for model in models for layer in model])
    rows = {position: row for row, position in enumerate(analyses)}
    kinds = {position: "layer" if position == chosen[1] else "cell" for position in found}
    size = float(np.clip(_NARROWEST / len(layers), 5, _CELL if len(names) == 1 else _PAIR_CELL))
    traces = []
    for model, colour in enumerate(compare_charts.MODEL_COLOURS[: len(names)]):
        cells = [(position, layer) for position, models in found.items() for layer in models[model]]
        filled = [canvas.translucent(colour, _depth(layer.numbers[NUMBER].value, full)) for _, layer in cells]
        traces.append(
            canvas.scatter(
                x=[layer.layer for _, layer in cells],
                y=[rows[position] + _APART * (1 - 2 * model) * (len(names) - 1) for position, _ in cells],
                mode="markers",
                marker=_squares(size, filled, colour),
                customdata=[[kinds[position], layer.layer, rows[position]] for position, layer in cells],
                hoverinfo="text",
                hovertext=[_hover(position, found[position], layer.layer) for position, layer in cells],
                showlegend=False,
                name=names[model],
            )
        )
        traces += [_swatch(size, colour, value, full, names, model) for value in (CHANCE, full)]
    if missing := [position for position in analyses if position not in found]:
        traces.append(_missing(missing, rows, layers))
    traces.append(
        canvas.scatter(
            x=list(marked),
            y=[-0.5 - _BELOW / 2] * len(marked),
            mode="markers",
            marker={"symbol": "triangle-up", "size": 10, "color": canvas.NEUTRAL},
            name=marked_as,
            hoverinfo="skip",
        )
    )
    layer, row = chosen[0], rows[chosen[1]]
    frame = {"type": "rect", "x0": layer - 0.5, "x1": layer + 0.5, "y0": row - 0.5, "y1": row + 0.5, "layer": "below"}
    return canvas.figure(
        traces,
        height(len(rows), len(names)),
        revision="positions",
        bottom=canvas.BOTTOM,
        x=canvas.layer_axis(len(layers), None),
        y={
            "range": [-0.5 - _BELOW, len(rows) - 0.5],
            "tickvals": list(rows.values()),
            "ticktext": [_SHORT.get(position, position.replace("-", "−")) for position in rows],
            "showgrid": False,
        },
        shapes=[frame | {"line": {"color": canvas.NEUTRAL, "width": 2}}],
        hoverdistance=-1,
    )


def _models(analysis: Analysis, n_models: int) -> tuple[Sequence[LayerNumbers], ...]:
    return (analysis.base_layers, analysis.layers)[:n_models]


def _full(layers: Sequence[LayerNumbers]) -> float:
    """The accuracy of the full colour: the highest that is shown, or a little more."""
    return float(np.clip(np.ceil(20 * max(layer.numbers[NUMBER].value for layer in layers)) / 20, 0.6, 1.0))


def _depth(value: float, full: float) -> float:
    return _PALEST + (1 - _PALEST) * float(np.clip((value - CHANCE) / (full - CHANCE), 0, 1))


def _squares(size: float, filled: Any, colour: str) -> dict[str, Any]:
    edge = {"width": 1, "color": canvas.translucent(colour, 0.4)}
    return {"symbol": "square", "size": size, "color": filled, "line": edge}


def _swatch(size: float, colour: str, value: float, full: float, names: Sequence[str], model: int) -> canvas.Trace:
    """An entry of the legend: what the palest and the fullest colour of a model stand for."""
    of = ["accuracy"] * (model == 0) + [labels.label(names[model])] * (len(names) > 1)
    return canvas.scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker=_squares(size, canvas.translucent(colour, _depth(value, full)), colour),
        name=f"{', '.join(of)} ≤ {value:g}" if value == CHANCE else f"{value:g}",
        hoverinfo="skip",
    )


def _missing(positions: Sequence[str], rows: Mapping[str, int], layers: Sequence[int]) -> canvas.Trace:
    """Dots where embeddings were captured and not analysed."""
    cells = [(position, layer) for position in positions for layer in layers]
    return canvas.scatter(
        x=[layer for _, layer in cells],
        y=[rows[position] for position, _ in cells],
        mode="markers",
        marker={"symbol": "circle-open", "size": 4, "color": canvas.NEUTRAL},
        customdata=[["none", layer, rows[position]] for position, layer in cells],
        hoverinfo="text",
        hovertext=[f"{_head(layer, position)}<br>captured, not analysed" for position, layer in cells],
        name="not analysed",
    )


def _hover(position: str, models: Sequence[Sequence[LayerNumbers]], layer: int) -> str:
    head = _head(layer, position)
    if len(models) == 1:
        rows = layer_charts.number_rows(models[0][layer], (NUMBER, "probe_accuracy_control", "probe_auroc"))
    else:
        both = (models[0][layer], models[1][layer])
        rows = [compare_charts.before_after(BY_NAME[name], *both) for name in (NUMBER, "probe_auroc")]
    return "<br>".join([head, *rows])


def _head(layer: int, position: str) -> str:
    words = position_words(position)
    return f"<b>layer {layer}</b>, {words[0].lower()}{words[1:]}"
