"""Figures of two models over layers: pure functions from numbers to plotly figures, which know nothing of Streamlit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from es2.analysis.resampling import Interval
from es2.analysis.results import Analysis, Change, LayerNumbers
from es2.analysis.verdict import ROUNDING
from es2.charts import canvas
from es2.charts import layer_charts as charts
from es2.report import labels as wording
from es2.report import palette
from es2.report.glossary import BY_NAME, Term

MODEL_COLOURS = (palette.BASE, palette.TUNED)
OVERVIEW = (
    "probe_accuracy",
    "margin_mean",
    "mean_difference_margin",
    "fisher_ratio",
    "relative_distance",
    "effective_rank",
    "orthogonal_std_ratio",
    "norm_ratio",
    "direction_cosine",
    "centroid_distance",
)
"""The numbers of the whole model at a glance, from top to bottom."""
VERDICT_MARKS = {
    "separated": ("circle", palette.TUNED),
    "unchanged": ("circle-open", canvas.NEUTRAL),
    "inflated": ("diamond-wide-open", "#b8860b"),
    "contracted": ("bowtie", "#b8860b"),
    "worse": ("triangle-down", "#c2453b"),
    "collapsed": ("x", "#c2453b"),
}
"""A symbol for each verdict, so that the words are told apart without their colours."""

COMPARES = ("norm_ratio", "orthogonal_std_ratio", "direction_cosine")
"""Numbers that compare tuned with base themselves: 1 is no change."""
FULL_FACTOR = 2.0
FULL_DIFFERENCES = {"probe_accuracy": 0.1, "direction_cosine": 0.5, "margin_mean": 0.1, "mean_difference_margin": 0.1}
"""How large a change has the full colour: a factor, or a difference where there is no ratio."""

_ROW_HEIGHT = 27
_CELL, _NARROWEST = 21, 430
_NAMES_WIDTH = 190


# --------------------------------------------------------------------------------------------------------- all layers


def accuracy_strip(analysis: Analysis, names: tuple[str, str], *, chosen: int, targets: Sequence[int]) -> canvas.Figure:
    """Probe accuracy of both models over layers with its intervals, and chance."""
    pair = _both(analysis)
    n_layers = len(pair[0])
    lowest = min(layer.numbers["probe_accuracy"].low for layers in pair for layer in layers)
    chance = canvas.dashed((-0.6, n_layers - 0.4), 0.5, "chance")
    lines = [_line(layers, "probe_accuracy", name, model) for model, (layers, name) in enumerate(_named(pair, names))]
    bands = [charts.band(layers, "probe_accuracy", colour) for layers, colour in zip(pair, MODEL_COLOURS, strict=True)]
    return charts.strip(
        pair[1],
        [*bands, chance, *lines],
        [_layer_hover(pair, layer, names, ("probe_accuracy", "probe_auroc"), targets) for layer in range(n_layers)],
        chosen=chosen,
        marked=targets,
        marked_as="target layers",
        limits=(float(min(0.4, np.floor(lowest * 10) / 10)), 1.02),
        of_margins=False,
    )


def margin_strip(analysis: Analysis, names: tuple[str, str], *, chosen: int, targets: Sequence[int]) -> canvas.Figure:
    """The two margins of both models over layers."""
    pair = _both(analysis)
    n_layers = len(pair[0])
    shown = ("margin_mean", "mean_difference_margin")
    lines = [
        _line(layers, number, f"{words}, {name}", model, line={"dash": dash}, mode=mode)
        for number, words, dash, mode in (
            (shown[1], "mean-difference", "dot", "lines"),
            (shown[0], "margin", "solid", "lines+markers"),
        )
        for model, (layers, name) in enumerate(_named(pair, names))
    ]
    bands = [
        charts.band(layers, number, colour)
        for number in shown
        for layers, colour in zip(pair, MODEL_COLOURS, strict=True)
    ]
    return charts.strip(
        pair[1],
        [*bands, charts.zero_line(n_layers), *lines],
        [_layer_hover(pair, layer, names, shown, targets) for layer in range(n_layers)],
        chosen=chosen,
        marked=targets,
        marked_as="target layers",
        limits=charts.margin_limits([*pair[0], *pair[1]]),
        of_margins=True,
    )


def overview(
    analysis: Analysis, verdicts: Mapping[int, str], *, chosen: int, targets: Sequence[int], names: tuple[str, str]
) -> canvas.Figure:
    """What changed at which layer: a row for each number, a column for each layer, and the verdicts on top.

    A square is coloured by the direction and size of the change, fully at `FULL_FACTOR` or `FULL_DIFFERENCES`; where
    the interval includes no change there is a dot. A click picks the layer.
    """
    base, tuned = _both(analysis)
    cells = [
        (place, before, layer, BY_NAME[name], change_of(layer, name))
        for place, name in enumerate(OVERVIEW)
        for before, layer in zip(base, tuned, strict=True)
    ]
    sure = [is_change(change) for *_, change in cells]
    size = float(np.clip(_NARROWEST / len(tuned), 6, _CELL))  # so that columns stay apart on a narrow page
    traces = [
        canvas.scatter(
            x=[layer.layer for _, _, layer, _, _ in cells],
            y=[-place - 1 for place, *_ in cells],
            mode="markers",
            marker={
                "symbol": ["square" if one else "circle" for one in sure],
                "size": [size if one else 4 for one in sure],
                "color": [
                    _cell_colour(term.name, change) if one else canvas.translucent(canvas.NEUTRAL, 0.6)
                    for (_, _, _, term, change), one in zip(cells, sure, strict=True)
                ],
                "line": {"width": 0},
            },
            customdata=[["layer", layer.layer] for _, _, layer, _, _ in cells],
            hoverinfo="text",
            hovertext=[
                f"<b>layer {layer.layer}</b><br>{before_after(term, before, layer)}"
                for _, before, layer, term, _ in cells
            ],
            showlegend=False,
            name="changes",
        )
    ]
    for verdict, (symbol, colour) in VERDICT_MARKS.items():
        at = [layer.layer for layer in tuned if verdicts.get(layer.layer) == verdict]
        if at:
            traces.append(
                canvas.scatter(
                    x=at,
                    y=[0] * len(at),
                    mode="markers",
                    marker={"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2, "color": colour}},
                    customdata=[["layer", layer] for layer in at],
                    hoverinfo="text",
                    hovertext=[f"<b>layer {layer}</b><br>{verdict}" for layer in at],
                    name=verdict,
                )
            )
    n_layers = len(tuned)
    marks = [canvas.vertical(chosen), *(canvas.column(layer) for layer in targets)]
    rows = ["<b>verdict</b>", *(BY_NAME[name].title for name in OVERVIEW)]
    return canvas.figure(
        traces,
        _ROW_HEIGHT * len(rows) + canvas.TOP + canvas.BOTTOM_TITLED,
        revision="overview",
        x=canvas.layer_axis(n_layers),
        y={
            "range": [-len(rows) + 0.4, 0.6],
            "tickvals": [-place for place in range(len(rows))],
            "ticktext": rows,
            "showgrid": False,
        },
        shapes=marks,
        left=_NAMES_WIDTH,
    )


# ---------------------------------------------------------------------------------------------------------- their parts


def is_change(change: Change) -> bool:
    """Whether the interval leaves out that nothing changed: of the ratio where there is one, else of the difference."""
    if change.ratio is not None:
        return change.ratio.low > 1 + ROUNDING or change.ratio.high < 1 - ROUNDING
    return change.difference.low > ROUNDING or change.difference.high < -ROUNDING


def change_of(tuned: LayerNumbers, name: str) -> Change:
    """What the fine-tune did to a number of this layer, also to those that compare by themselves."""
    if name not in COMPARES:
        return (tuned.change or {})[name]
    number = tuned.numbers[name]
    difference = Interval(number.value - 1, number.low - 1, number.high - 1)
    return Change(difference, None if name == "direction_cosine" else number)


def _cell_colour(name: str, change: Change) -> str:
    """The colour of the model that has more, the fuller the larger the change."""
    if change.ratio is None:
        size = change.difference.value / FULL_DIFFERENCES[name]
    else:
        size = np.log(max(change.ratio.value, 1e-6)) / np.log(FULL_FACTOR)
    return canvas.translucent(MODEL_COLOURS[int(size > 0)], 0.25 + 0.75 * min(1.0, abs(float(size))))


def _both(analysis: Analysis) -> tuple[Sequence[LayerNumbers], Sequence[LayerNumbers]]:
    assert analysis.tuned_layers is not None
    return analysis.base_layers, analysis.tuned_layers


def _named(
    pair: tuple[Sequence[LayerNumbers], Sequence[LayerNumbers]], names: tuple[str, str]
) -> list[tuple[Sequence[LayerNumbers], str]]:
    return list(zip(pair, (wording.label(name) for name in names), strict=True))


def _line(layers: Sequence[LayerNumbers], number: str, name: str, model: int, **settings: Any) -> canvas.Trace:
    colour = MODEL_COLOURS[model]
    marker = {"size": 7 if model else 5, "color": colour}
    return charts.curve(layers, number, name, colour, **{"mode": "lines+markers", "marker": marker} | settings)


def _layer_hover(
    pair: tuple[Sequence[LayerNumbers], Sequence[LayerNumbers]],
    layer: int,
    names: tuple[str, str],
    shown: Sequence[str],
    targets: Sequence[int],
) -> str:
    head = f"<b>layer {layer}</b>" + (", target" if layer in targets else "")
    rows = [before_after(BY_NAME[name], pair[0][layer], pair[1][layer]) for name in shown]
    return "<br>".join([head, *rows])


def before_after(term: Term, base: LayerNumbers, tuned: LayerNumbers) -> str:
    """A number of a layer under both models in words, with the interval of the change."""
    after = tuned.numbers[term.name]
    if term.name in COMPARES:
        return f"{term.title}: {term.value(after)} ({term.range(after)})"
    words = f"{term.title}: {term.value(base.numbers[term.name])} → {term.value(after)}"
    return f"{words} ({change_words(term, change_of(tuned, term.name))})"


def change_words(term: Term, change: Change) -> str:
    """A change in a few words: the ratio where there is one, else the difference, with its interval."""
    if change.ratio is not None:
        ratio = change.ratio
        return f"×{ratio.value:,.2f}, {ratio.low:,.2f} to {ratio.high:,.2f}"
    sign = "+" if change.difference.value >= 0 else ""
    return f"{sign}{term.value(change.difference)}, {term.range(change.difference)}"
