"""The figures of a report: pure functions from a comparison's numbers to plotly figures.

Each shows both models at once. Text, grid and background have no colour here: the page sets them by the reader's theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from es2.analysis.projection import View
from es2.analysis.results import Analysis
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.report.findings import Numbers, interval_of, panels_of
from es2.report.glossary import BY_NAME
from es2.report.labels import hover, label
from es2.report.palette import BASE, COLOURS, NEUTRAL, SYMBOLS, TUNED, interval_band

if TYPE_CHECKING:
    from jaxtyping import Float, Int


STRIP_HEIGHT = 270
VIEW_HEIGHT = 430
TRAINING_HEIGHT = 280


def strip(analysis: Analysis, name: str, *, names: tuple[str, str], targets: Sequence[int], y_title: str) -> go.Figure:
    """One number over the layers, of both models with its intervals; triangles mark the target layers.

    Args:
        name: of the number, as in `LayerNumbers.numbers`.
        names: of the two models.
        y_title: the axis' title, with its unit.
    """
    figure = go.Figure()
    models = ((analysis.base_layers, names[0], BASE, "dot"), (analysis.layers, names[1], TUNED, "solid"))
    term = BY_NAME[name]
    for layers, called, colour, dash in models:
        x = [layer.layer for layer in layers]
        intervals = [layer.numbers[name] for layer in layers]
        figure.add_trace(go.Scatter(interval_band(x, intervals, colour)))
        figure.add_scatter(
            x=x,
            y=[interval.value for interval in intervals],
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 6, "color": colour},
            name=label(called),
            hoverinfo="text",
            hovertext=[f"{label(called)}: {term.value(interval)} ({term.range(interval)})" for interval in intervals],
        )
    intervals = [layer.numbers[name] for layers, *_ in models for layer in layers]
    low, high = min(interval.low for interval in intervals), max(interval.high for interval in intervals)
    foot = low - 0.09 * (high - low)
    figure.add_scatter(
        x=list(targets),
        y=[foot] * len(targets),
        mode="markers",
        marker={"symbol": "triangle-up", "size": 11, "color": NEUTRAL},
        name="target layers",
        hoverinfo="skip",
    )
    x_title = {"text": "layer (residual stream after the block)"}
    xaxis = {"title": x_title, "range": [-0.6, len(analysis.layers) - 0.4]}
    return _finished(figure, STRIP_HEIGHT, xaxis=xaxis, yaxis={"title": {"text": y_title}}, hovermode="x unified")


def pair(
    view: View,
    prompts: PromptSet,
    rows: Int[np.ndarray, "row"],
    *,
    margins: tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]],
    names: tuple[str, str],
) -> go.Figure:
    """Both models' prompts of one layer beside each other, on equal axes.

    Args:
        prompts: in the order of the view's rows.
        rows: of the prompts that are shown.
        margins: signed distance of every prompt to each model's own boundary, + on the harmful side.
    """
    tuned = view.base if view.tuned is None else view.tuned
    figure = make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[label(name) for name in names]
    )
    for column, (points, own) in enumerate(zip((view.base, tuned), margins, strict=True), start=1):
        for which in (HARMLESS, HARMFUL):
            of_label = rows[prompts.labels[rows] == which]
            cloud = go.Scatter(
                x=points[of_label, 0].tolist(),
                y=points[of_label, 1].tolist(),
                mode="markers",
                marker={"color": COLOURS[which], "symbol": SYMBOLS[which], "size": 7, "opacity": 0.8},
                name=LABEL_NAMES[which],
                legendgroup=LABEL_NAMES[which],
                showlegend=column == 1,
                hoverinfo="text",
                hovertext=[f"{hover(prompts.texts[row])}<br>margin {own[row]:+.4f}" for row in of_label],
            )
            figure.add_trace(cloud, 1, column)
    both = np.concatenate([view.base[rows], tuned[rows]])
    low, high = both.min(axis=0), both.max(axis=0)
    room = 0.06 * np.maximum(high - low, 1e-9)
    ranges = [[float(a), float(b)] for a, b in zip(low - room, high + room, strict=True)]
    if view.kind == "separation":
        limit = max(map(abs, ranges[0]))
        ranges[0] = [-limit, limit]
        line = {"color": NEUTRAL, "width": 1.5, "dash": "dash"}
        for x, y in (("x", "y domain"), ("x2", "y2 domain")):
            figure.add_shape(type="line", x0=0, x1=0, y0=0, y1=1, xref=x, yref=y, line=line, layer="below")
    for axis in ("xaxis", "xaxis2"):
        figure.layout[axis].update(range=ranges[0], title={"text": label(view.axes[0])})
    figure.layout.yaxis.update(range=ranges[1], title={"text": label(view.axes[1])})
    figure.layout.yaxis2.update(range=ranges[1])
    if view.kind == "pca":
        figure.layout.yaxis.update(scaleanchor="x")
        figure.layout.xaxis2.update(matches="x")
    return _finished(figure, VIEW_HEIGHT, hovermode="closest", legend={"y": 1.07})


def training(events: Sequence[Mapping[str, Any]], kl_budget: float) -> go.Figure | None:
    """The course of the training: separation, both KLs against their budget, validations; None if unknown.

    What became of the base's refusals is a panel of its own where the run measured it.

    Args:
        events: progress events, of which the last of each training step counts.
        kl_budget: nats per token.
    """
    steps = {int(event["done"]): event for event in events if event.get("stage") == "finetune" and "loss" in event}
    if not steps:
        return None
    panels: list[tuple[str, tuple[tuple[str, str, str, str], ...]]] = [
        ("objective's own units", (("loss", "loss", NEUTRAL, "dot"), ("separation", "separation", TUNED, "solid"))),
        (
            "KL, nats per token",
            (
                ("validation_kl_prompt", "prompts, held out", TUNED, "solid"),
                ("validation_kl_reply", "replies, held out", TUNED, "dot"),
            ),
        ),
        (
            "mean-difference margin, held out",
            (("validation_mean_difference_margin", "mean-difference margin, held out", BASE, "solid"),),
        ),
    ]
    if any("validation_broken_first" in event for event in steps.values()):
        refusals = (
            ("validation_refusals_kept", "begun alike", TUNED, "solid"),
            ("validation_refusal_agreement", "tokens agreed", TUNED, "dot"),
            ("validation_broken_first", "broken first", NEUTRAL, "dash"),
        )
        panels.append(("share, harmful prompts held out", refusals))
    figure = make_subplots(1, len(panels), horizontal_spacing=0.07)
    for column, (title, lines) in enumerate(panels, start=1):
        for name, called, colour, dash in lines:
            points = [(step, steps[step][name]) for step in sorted(steps) if steps[step].get(name) is not None]
            line = go.Scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                mode="lines" if name in ("loss", "separation") else "lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                name=called,
                hovertemplate="step %{x}: %{y:.4f}",
            )
            figure.add_trace(line, 1, column)
        suffix = "" if column == 1 else str(column)
        figure.layout[f"xaxis{suffix}"].update(title={"text": "step"}, range=[0, max(steps) + 0.5])
        figure.layout[f"yaxis{suffix}"].update(title={"text": title})
    if len(panels) > 3:
        figure.layout.yaxis4.update(range=[-0.03, 1.05])
    kls = [float(value) for trace in figure.data[2:4] for value in trace.y]
    figure.layout.yaxis2.update(range=[0, 1.2 * max([kl_budget, *kls])])
    line = {"color": NEUTRAL, "width": 1.5, "dash": "dash"}
    figure.add_shape(
        type="line", x0=0, x1=1, xref="x2 domain", y0=kl_budget, y1=kl_budget, yref="y2", line=line,
        label={"text": f"budget {kl_budget:g}", "textposition": "end", "font": {"size": 11}},
    )  # fmt: skip
    return _finished(figure, TRAINING_HEIGHT, hovermode="closest")


def attack_curves(attack: Numbers, names: tuple[str, str]) -> go.Figure:
    """DSR against the budget of an attack under both models, a panel for each direction or soft prompt.

    Args:
        attack: the part of an evaluation.
        names: of the two models.
    """
    panels = panels_of(attack)
    budgets = [f"{budget:g}" for budget in sorted({point["budget"] for points in panels.values() for point in points})]
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=[label(name) for name in panels]
    )
    models = (("base", names[0], BASE, "dot"), ("tuned", names[1], TUNED, "solid"))
    for column, points in enumerate(panels.values(), start=1):
        for model, called, colour, dash in models:
            numbers = [interval_of(point[model]["dsr"]) for point in points]
            curve = go.Scatter(
                x=[f"{point['budget']:g}" for point in points],
                y=[number.value for number in numbers],
                error_y={
                    "array": [number.high - number.value for number in numbers],
                    "arrayminus": [number.value - number.low for number in numbers],
                    "color": colour,
                    "thickness": 1,
                },
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                name=label(called),
                legendgroup=model,
                showlegend=column == 1,
                hovertemplate="budget %{x}: %{y:.2f}",
            )
            figure.add_trace(curve, 1, column)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=budgets, title={"text": "budget"})
    figure.update_yaxes(range=[-0.04, 1.04])
    figure.update_annotations(font={"size": 13})
    figure.layout.yaxis.update(title={"text": "DSR"})
    return _finished(figure, TRAINING_HEIGHT, hovermode="closest", legend={"y": 1.12})


def _finished(figure: go.Figure, height: int, legend: Mapping[str, Any] | None = None, **layout: Any) -> go.Figure:
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 70, "r": 14, "t": 40, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"} | dict(legend or {}),
        hoverlabel={"align": "left", "namelength": -1},
        **layout,
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(zeroline=False)
    return figure
