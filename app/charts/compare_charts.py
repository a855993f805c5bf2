"""Figures of two models: pure functions from numbers to plotly figures, which know nothing of Streamlit.

Before and after share every ruler: one range for both axes whatever is drawn, one scale for both histograms. Base and
tuned have colours of their own; where labels are told apart, colour means the label, and place, size or row the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from app.charts import canvas, projection_chart
from app.charts import layer_charts as charts
from app.charts.canvas import Trace
from es2.analysis.projection import View
from es2.analysis.resampling import Interval
from es2.analysis.results import Analysis, Change, LayerNumbers
from es2.analysis.verdict import ROUNDING
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.report import labels as wording
from es2.report import palette
from es2.report.glossary import BY_NAME, UNITS, Term

if TYPE_CHECKING:
    from jaxtyping import Float, Int


PAIR_HEIGHT = 470
MORPH_CONTROLS = 40
HISTOGRAM_HEIGHT = 430
MODEL_COLOURS = (palette.BASE, palette.TUNED)
OVERVIEW = (
    "probe_accuracy",
    "margin_mean",
    "mean_difference_margin",
    "fisher_ratio",
    "relative_distance",
    "effective_rank",
    "rest_ratio",
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

COMPARES = ("norm_ratio", "rest_ratio", "direction_cosine")
"""Numbers that compare tuned with base themselves: 1 is no change."""
FULL_FACTOR = 2.0
FULL_DIFFERENCES = {"probe_accuracy": 0.1, "direction_cosine": 0.5, "margin_mean": 0.1, "mean_difference_margin": 0.1}
"""How large a change has the full colour: a factor, or a difference where there is no ratio."""

_ROW_HEIGHT = 27
_CELL, _NARROWEST = 21, 430
_NAMES_WIDTH = 190
_TWO_LINES = 60

Margins: TypeAlias = 'tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]'


# --------------------------------------------------------------------------------------------------------- all layers


def accuracy_strip(analysis: Analysis, names: tuple[str, str], *, chosen: int, targets: Sequence[int]) -> canvas.Figure:
    """Probe accuracy of both models over layers with its intervals, and chance.

    Args:
        analysis: of both models.
        names: what they are called.
        chosen: the layer to mark by a vertical line.
        targets: the layers to mark by a triangle.
    """
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
        height=charts.ACCURACY_HEIGHT,
        title="balanced accuracy",
        revision="compared accuracy",
        titled=False,
    )


def margin_strip(analysis: Analysis, names: tuple[str, str], *, chosen: int, targets: Sequence[int]) -> canvas.Figure:
    """The two margins of both models over layers; arguments as for `accuracy_strip`."""
    pair = _both(analysis)
    n_layers = len(pair[0])
    shown = ("margin_mean", "mean_difference_margin")
    bounds = [layer.numbers[name] for layers in pair for layer in layers for name in shown]
    high = canvas.nice_limit(max(max(bound.high for bound in bounds), 0.0) * 1.05)
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
        [*bands, charts.zero_line(-0.6, n_layers - 0.4), *lines],
        [_layer_hover(pair, layer, names, shown, targets) for layer in range(n_layers)],
        chosen=chosen,
        marked=targets,
        marked_as="target layers",
        limits=(min(-0.08 * high, 1.1 * min(bound.low for bound in bounds)), high),
        height=charts.MARGIN_HEIGHT,
        title=UNITS,
        revision="compared margins",
        titled=True,
    )


def overview(
    analysis: Analysis, verdicts: Mapping[int, str], *, chosen: int, targets: Sequence[int], names: tuple[str, str]
) -> canvas.Figure:
    """What changed at which layer: a row for each number, a column for each layer, and the verdicts on top.

    A square is coloured by the direction and size of the change, fully at `FULL_FACTOR` or `FULL_DIFFERENCES`; where
    the interval includes no change there is a dot. A click picks the layer.

    Args:
        analysis: of both models.
        verdicts: the word for each layer.
        chosen: the layer to mark.
        targets: the target layers.
        names: what the models are called.
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
                    _cell_colour(_strength(term.name, change)) if one else canvas.translucent(canvas.NEUTRAL, 0.6)
                    for (_, _, _, term, change), one in zip(cells, sure, strict=True)
                ],
                "line": {"width": 0},
            },
            customdata=[["layer", layer.layer] for _, _, layer, _, _ in cells],
            hoverinfo="text",
            hovertext=[
                f"<b>layer {layer.layer}</b><br>{_before_after(term, before, layer)}"
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


# ---------------------------------------------------------------------------------------------------------- one layer


def pair(
    view: View,
    prompts: PromptSet,
    *,
    margins: Margins,
    names: tuple[str, str],
    arrangement: str = "side",
    others: bool = False,
    selected: Sequence[int] = (),
    tool: str = "click",
) -> list[dict[str, Any]]:
    """The prompts of one layer under both models, in one frame.

    Args:
        view: where each prompt stands in either; has `tuned`.
        prompts: the prompt set, in the order of the view's rows.
        margins: of base and tuned, for the hover texts.
        names: what the models are called.
        arrangement: `side` gives a figure for each model; `overlay` one figure with a line from where each prompt was
            to where it is; `morph` one figure of base, whose traces say in their `meta` where tuned has them.
        others: whether to show the `probe` split too, as hollow markers.
        selected: rows to ring.
        tool: what a press of the mouse does, one of `projection_chart.TOOLS`.

    Returns:
        Figures with equal axes, whose points carry `["base" or "tuned", row]` as `customdata`: what `go.Figure` takes,
        unchecked, for `app.components.plots`.
    """
    assert view.tuned is not None
    points = tuple(canvas.rounded(one) for one in (view.base, view.tuned))
    test = prompts.in_split("test")
    shown = np.ones(len(prompts), dtype=bool) if others else test
    ringed = np.array([row for row in selected if shown[row]], dtype=int)
    words = [f"margin {before:+.4f} → {after:+.4f}" for before, after in zip(*margins, strict=True)]
    groups = [
        (label, hollow, np.flatnonzero((test != hollow) & (prompts.labels == label)))
        for hollow in ((True, False) if others else (False,))
        for label in (HARMLESS, HARMFUL)
    ]

    def clouds(model: int) -> list[Trace]:
        return [
            projection_chart.cloud(
                points[model],
                rows,
                prompts,
                [words[row] for row in rows],
                label,
                hollow=hollow,
                model=("base", "tuned")[model],
            )
            for label, hollow, rows in groups
        ]

    def marks(model: int) -> list[Trace]:
        few = len(ringed) <= projection_chart.MAX_TWINS
        lines = projection_chart.twin_lines(points[model], ringed.tolist() if few else [], prompts, shown)
        return [lines, projection_chart.rings(points[model][ringed])]

    titles = [_axis(axis) for axis in view.axes]
    frame = projection_chart.frame(view, np.concatenate([one[shown] for one in points]), tool, titles)
    height = PAIR_HEIGHT - (MORPH_CONTROLS if arrangement == "morph" else 0)

    def figure(traces: Sequence[Trace], heading: str, colour: str | None) -> dict[str, Any]:
        layout = canvas.layout(
            height,
            revision=f"{view.kind} {arrangement}",
            bottom=_TWO_LINES,
            title=_heading(heading, colour),
            **frame,
        )
        return {"data": list(traces), "layout": layout}

    if arrangement == "overlay":
        traces = [_ways(points, rows, label) for label, _, rows in groups]
        traces += [_faded(cloud) for cloud in clouds(0)] + clouds(1) + marks(1)
        return [figure(traces, f"{names[0]} (small) → {names[1]}", None)]
    if arrangement == "morph":
        traces = [*clouds(0), *marks(0)]
        for trace, end in zip(traces, [*clouds(1), *marks(1)], strict=True):
            trace["meta"] = {"to": {"x": end["x"], "y": end["y"]}}
        return [figure(traces, f"{names[0]} → {names[1]}", None)]
    return [figure([*clouds(model), *marks(model)], names[model], MODEL_COLOURS[model]) for model in (0, 1)]


def histograms(
    margins: Margins, labels: Int[np.ndarray, "prompt"], names: tuple[str, str], *, selected: Sequence[int] = ()
) -> canvas.Figure:
    """How many prompts of each label stand where along the separating direction: base above, tuned below, one scale.

    Args:
        margins: signed distances to each model's boundary, + on the harmful side, scale-free.
        labels: 1 harmful, 0 harmless.
        names: what the models are called.
        selected: positions in `labels` of the prompts to mark by ticks below the bars.
    """
    limit = canvas.margin_limit(np.concatenate(margins))
    edges = charts.bin_edges(limit, len(labels))
    counts = [
        {label: np.histogram(values[labels == label], bins=edges)[0] for label in (HARMLESS, HARMFUL)}
        for values in margins
    ]
    highest = max(1, max(int(bars.max()) for one in counts for bars in one.values()))
    traces = []
    for model, bars in enumerate(counts):
        axis = ("y2", "y")[model]
        for label, heights in bars.items():
            of = f"{wording.label(names[model])}: "
            traces.append(charts.bars(heights, edges, label, of, yaxis=axis, showlegend=model == 0))
        traces.append(
            canvas.scatter(
                x=margins[model][list(selected)].tolist(),
                y=[-0.06 * highest] * len(selected),
                yaxis=axis,
                mode="markers",
                marker={
                    "symbol": "line-ns-open",
                    "size": 9,
                    "line": {"width": 1.8},
                    "color": [palette.COLOURS[int(labels[at])] for at in selected],
                },
                hoverinfo="skip",
                showlegend=False,
                name=f"selected {model}",
            )
        )
    y = {"fixedrange": True, "range": [-0.12 * highest, 1.08 * highest], "nticks": 4, "zeroline": False}
    return canvas.figure(
        traces,
        HISTOGRAM_HEIGHT,
        revision="compared histograms",
        x={
            "range": [-limit, limit],
            "anchor": "y",
            "title": canvas.title(charts.ALONG),
        },
        y=y | {"domain": [0, 0.46], "title": canvas.title("prompts")},
        yaxis2=y | {"domain": [0.54, 1], "anchor": "x", "automargin": False, "title": canvas.title("prompts")},
        shapes=[canvas.BOUNDARY],
        annotations=[_row_name(name, model) for model, name in enumerate(names)],
        hovermode="x",
        dragmode=False,
    )


# ---------------------------------------------------------------------------------------------------------- their parts


def is_change(change: Change) -> bool:
    """Whether the interval leaves out that nothing changed: of the ratio where there is one, else of the difference."""
    if change.ratio is not None:
        return change.ratio.low > 1 + ROUNDING or change.ratio.high < 1 - ROUNDING
    return change.difference.low > ROUNDING or change.difference.high < -ROUNDING


def _cell_colour(strength: float) -> str:
    """The colour of the model that has more, the fuller the larger the change."""
    return canvas.translucent(MODEL_COLOURS[int(strength > 0)], 0.25 + 0.75 * abs(strength))


def change_of(tuned: LayerNumbers, name: str) -> Change:
    """What the fine-tune did to a number of this layer, also to those that compare by themselves."""
    if name not in COMPARES:
        return (tuned.change or {})[name]
    number = tuned.numbers[name]
    difference = Interval(number.value - 1, number.low - 1, number.high - 1)
    return Change(difference, None if name == "direction_cosine" else number)


def _strength(name: str, change: Change) -> float:
    """How large a change is, from −1 to 1."""
    if change.ratio is None:
        return float(np.clip(change.difference.value / FULL_DIFFERENCES[name], -1, 1))
    return float(np.clip(np.log(max(change.ratio.value, 1e-6)) / np.log(FULL_FACTOR), -1, 1))


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
    rows = [_before_after(BY_NAME[name], pair[0][layer], pair[1][layer]) for name in shown]
    return "<br>".join([head, *rows])


def _before_after(term: Term, base: LayerNumbers, tuned: LayerNumbers) -> str:
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


def _axis(words: str) -> str:
    """An axis title that fits half of the page: what stands in brackets goes below."""
    return wording.label(words).replace(" (", "<br>(", 1)


def _heading(name: str, colour: str | None) -> dict[str, Any]:
    font = {"size": 15} | ({"color": colour} if colour else {})
    return {
        "text": f"<b>{wording.label(name)}</b>",
        "font": font,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 6},
    }


def _row_name(name: str, model: int) -> dict[str, Any]:
    font = {"color": MODEL_COLOURS[model], "size": 13}
    return canvas.words(f"<b>{wording.label(name)}</b>", 0.02, (1, 0.46)[model], "left", "top", font=font)


def _ways(points: tuple[Float[np.ndarray, "prompt 2"], ...], rows: Int[np.ndarray, "row"], label: int) -> Trace:
    """A line for each prompt from where base has it to where tuned has it."""
    before, after = (one[rows].tolist() for one in points)
    ends = [place for way in zip(before, after, strict=True) for place in (*way, (None, None))]
    return {
        "type": "scatter",
        "x": [x for x, _ in ends],
        "y": [y for _, y in ends],
        "mode": "lines",
        "line": {"color": canvas.translucent(palette.COLOURS[label], 0.28), "width": 1},
        "hoverinfo": "skip",
        "showlegend": False,
        "name": f"ways {LABEL_NAMES[label]}",
    }


def _faded(cloud: Trace) -> Trace:
    """A cloud as where the lines begin: small, without an outline, and not in the legend a second time."""
    marker = {"marker": {"opacity": 0.45}}
    small = cloud["marker"] | {"size": 4, "opacity": 0.45, "line": {"width": 0}}
    return cloud | {"marker": small, "selected": marker, "unselected": marker, "showlegend": False}
