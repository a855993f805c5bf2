"""Figures of one layer's prompts under both models: pure functions that know nothing of Streamlit.

Both models have the same axes. Colour means the label, and place, size or row the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from es2.analysis.projection import View
from es2.charts import canvas, projection_chart
from es2.charts import layer_charts as charts
from es2.charts.canvas import Trace
from es2.charts.compare_charts import MODEL_COLOURS
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.report import labels as wording
from es2.report import palette

if TYPE_CHECKING:
    from jaxtyping import Float, Int


PAIR_HEIGHT = 470
MORPH_CONTROLS = 40
HISTOGRAM_HEIGHT = 430
_TWO_LINES = 60

Margins: TypeAlias = 'tuple[Float[np.ndarray, "prompt"], ...]'


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
        view: where each prompt is in either; has `tuned`.
        prompts: the prompt set, in the order of the view's rows.
        margins: of base and tuned, for the hover texts.
        names: of the models.
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
    shown = np.ones(len(prompts), dtype=bool) if others else prompts.in_split("test")
    ringed = np.array([row for row in selected if shown[row]], dtype=int)
    words = [f"margin {before:+.4f} → {after:+.4f}" for before, after in zip(*margins, strict=True)]
    groups = projection_chart.groups_of(prompts, others)

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
    """How many prompts of each label are where along the separating direction: base above, tuned below, one scale.

    `selected` are positions in `labels` of the prompts to mark by ticks below the bars.
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
        x={"range": [-limit, limit], "anchor": "y", "title": canvas.title(charts.ALONG)},
        y=y | {"domain": [0, 0.46], "title": canvas.title("prompts")},
        yaxis2=y | {"domain": [0.54, 1], "anchor": "x", "automargin": False, "title": canvas.title("prompts")},
        shapes=[canvas.BOUNDARY],
        annotations=[_row_name(name, model) for model, name in enumerate(names)],
        hovermode="x",
    )


# ---------------------------------------------------------------------------------------------------------- their parts


def _axis(words: str) -> str:
    """An axis title that fits half of the page: words in brackets go below."""
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
