"""One prompt of one's own, layer by layer: on which side it stands, and how far from the boundary, in both models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from app.charts import canvas
from es2.report import palette
from es2.report.glossary import UNITS

if TYPE_CHECKING:
    from jaxtyping import Float


HEIGHT = 240


def sides(margins: Mapping[str, Float[np.ndarray, "layer"]], *, chosen: int | None = None) -> canvas.Figure:
    """Signed distance to the probe's boundary over layers, one line per model, + on the harmful side.

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
        HEIGHT,
        revision="sides",
        x=canvas.layer_axis(n_layers),
        y={"range": [-limit, limit], "title": canvas.title(UNITS), "nticks": 6},
        shapes=[boundary, *([canvas.vertical(chosen)] if chosen is not None else [])],
        dragmode=False,
    )
