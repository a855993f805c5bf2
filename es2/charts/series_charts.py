"""Figures of a series: the prompts under every model in one frame, and numbers over layers and by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from es2.analysis.projection import View
from es2.analysis.resampling import Interval
from es2.analysis.series import Member, SeriesView
from es2.charts import canvas, projection_chart
from es2.prompts.prompt_set import PromptSet
from es2.report import labels as wording
from es2.report import palette
from es2.report.glossary import BY_NAME

PANEL_HEIGHT = 262
STRIP_HEIGHT = 240
STEP_HEIGHT = 235
NUMBERS = ("probe_accuracy", "fisher_ratio", "mean_difference_margin")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross")
KL = {"prompt": "on the prompts", "reply": "on the replies"}
_PANEL = {"left": 40, "bottom": 24, "top": 50}
_LEGEND, _ENTRY = 190, 21  # pixels: the legend's width, and the height of one of its lines
_NAME = 30
"""Characters of a name that a panel and a legend have room for."""


def short(name: str) -> str:
    """A model's name as a figure has room for it: its beginning and its end, where steps are."""
    cut = name if len(name) <= _NAME else f"{name[: _NAME - 15]}…{name[-14:]}"
    return wording.label(cut)


def panels(
    view: SeriesView,
    names: Sequence[str],
    prompts: PromptSet,
    margins: Sequence[np.ndarray],
    *,
    others: bool = False,
    selected: Sequence[int] = (),
    tool: str = "click",
) -> list[canvas.Figure]:
    """The prompts under each model, base first, with equal axes; the titles of the axes are in the view.

    Points carry `[name, row]` as `customdata`; arguments as for `es2.charts.pair_charts.pair`.
    """
    points = [canvas.rounded(one) for one in view.points]
    shown = np.ones(len(prompts), dtype=bool) if others else prompts.in_split("test")
    ringed = [row for row in selected if shown[row]]
    joined = ringed if len(ringed) <= projection_chart.MAX_TWINS else []
    base = View(view.kind, points[0], None, view.axes, None)
    frame = projection_chart.frame(base, np.concatenate([one[shown] for one in points]), tool, ("", ""))
    frame |= {"top": _PANEL["top"]}
    frame.pop("annotations", None)  # too wide for a panel
    figures = []
    for number, (own, name, margin) in enumerate(zip(points, names, margins, strict=True)):
        traces = [
            projection_chart.cloud(
                own, rows, prompts, [f"margin {margin[row]:+.4f}" for row in rows], label, hollow=hollow, model=name
            )
            for label, hollow, rows in projection_chart.groups_of(prompts, others)
        ]
        traces += [
            projection_chart.twin_lines(own, joined, prompts, shown),
            projection_chart.rings(own[ringed]),
        ]
        colour = palette.TUNED if number else palette.BASE
        layout = canvas.layout(
            PANEL_HEIGHT,
            revision=f"series {view.kind}",
            left=_PANEL["left"],
            bottom=_PANEL["bottom"],
            title=_heading(short(name), colour),
            showlegend=number == 0,
            **frame,
        )
        figures.append({"data": traces, "layout": layout})
    return figures


def strip(members: Sequence[Member], names: Sequence[str], number: str, *, chosen: int) -> canvas.Figure:
    """One number of every model over layers; a click anywhere in a layer's column picks it."""
    term = BY_NAME[number]
    n_layers = len(members[0].layers)
    traces = [canvas.band(range(n_layers), [at.numbers[number] for at in members[0].layers], palette.BASE, "Base")]
    for member, name, style in zip(members, names, styles(members), strict=True):
        traces.append(
            canvas.scatter(
                x=list(range(n_layers)),
                y=[at.numbers[number].value for at in member.layers],
                name=short(name),
                mode="lines",
                line={"color": style["color"], "dash": style["dash"], "width": 2},
                hoverinfo="skip",
            )
        )
    rows = [
        [
            f"{wording.label(name)}: {term.value(member.layers[layer].numbers[number])}"
            for member, name in zip(members, names, strict=True)
        ]
        for layer in range(n_layers)
    ]
    answering = {
        "hoverinfo": "text",
        "hovertext": ["<br>".join([f"<b>layer {layer}</b>", *row]) for layer, row in enumerate(rows)],
        "customdata": [["layer", layer] for layer in range(n_layers)],
    }
    traces[-1] |= answering
    values = [one for member in members for at in member.layers for one in _ends(at.numbers[number])]
    low = min(0.4, min(values)) if number == "probe_accuracy" else min(0.0, 1.05 * min(values))
    high = 1.02 if number == "probe_accuracy" else canvas.nice_limit(1.05 * max(values))
    figure = canvas.figure(
        traces,
        max(STRIP_HEIGHT, _ENTRY * len(members) + 10 + canvas.BOTTOM_TITLED),
        revision=f"series {number}",
        x=canvas.layer_axis(n_layers),
        y={"range": [low, high], "title": canvas.title(term.title), "nticks": 6},
        shapes=[canvas.vertical(chosen)],
        hovermode="x",
        hoverdistance=-1,
        top=10,
    )
    figure["layout"]["margin"]["r"] = _LEGEND
    figure["layout"]["legend"] = canvas.LEGEND | {"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top"}
    return figure


def by_step(members: Sequence[Member], names: Sequence[str], layer: int, number: str) -> canvas.Figure:
    """One number of a layer from step to step, a line for each training that begins at base, with intervals.

    Where a step is not known the models are in order instead.
    """
    term = BY_NAME[number]
    values = [member.layers[layer].numbers[number] for member in members]
    words = [f"{term.value(value)} ({term.range(value)})" for value in values]
    return _lines(members, names, [(values, words)], term.title)


def kl_by_step(members: Sequence[Member], names: Sequence[str]) -> canvas.Figure | None:
    """The KLs from base on harmless test prompts, of the models where they were measured; None where of none."""
    if not any(member.kl for member in members):
        return None
    curves = []
    for part, called in KL.items():
        values = [
            Interval(0.0, 0.0, 0.0) if not number else _point((member.kl or {}).get(part))
            for number, member in enumerate(members)
        ]
        curves.append((values, ["" if one is None else f"{one.value:.4f} {called}" for one in values]))
    return _lines(members, names, curves, "KL, nats per token")


# ---------------------------------------------------------------------------------------------------------- their parts


def styles(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Colour, dash and symbol of each: base's own colour, a dash for each training, its steps from pale to full."""
    trainings = list(dict.fromkeys(member.training for member in members[1:]))
    found: list[dict[str, Any]] = [{"color": palette.BASE, "dash": "solid", "symbol": "circle"}]
    for place, member in enumerate(members[1:], 1):
        at = trainings.index(member.training)
        steps = [number for number, one in enumerate(members) if number and one.training == member.training]
        opacity = 0.4 + 0.6 * (steps.index(place) + 1) / len(steps)
        colour = palette.translucent(palette.TUNED, round(opacity, 2))
        found.append({"color": colour, "dash": DASHES[at % len(DASHES)], "symbol": SYMBOLS[at % len(SYMBOLS)]})
    return found


def _lines(
    members: Sequence[Member],
    names: Sequence[str],
    curves: Sequence[tuple[Sequence[Interval | None], Sequence[str]]],
    title: str,
) -> canvas.Figure:
    """Curves of values by step, for each training from base on."""
    numbered = all(member.step is not None for member in members)
    places = [member.step or 0 if numbered else number for number, member in enumerate(members)]
    look = styles(members)
    trainings = list(dict.fromkeys(member.training for member in members[1:]))
    traces: list[canvas.Trace] = []
    for curve, (values, words) in enumerate(curves):
        for training in trainings:
            own = [number for number, member in enumerate(members) if number and member.training == training]
            shown = [number for number in [0, *own] if values[number] is not None]
            if len(shown) < 2:
                continue
            known = [value for number in shown if (value := values[number]) is not None]
            joined = numbered or len(own) > 1
            style = look[own[0]]
            traces.append(
                canvas.scatter(
                    x=[places[number] for number in shown],
                    y=[value.value for value in known],
                    mode="lines+markers" if joined else "markers",
                    line={"color": palette.TUNED, "width": 2, "dash": "dot" if curve else style["dash"]},
                    marker={
                        "size": 8,
                        "symbol": ["circle", *[style["symbol"] + ("-open" if curve else "")] * (len(shown) - 1)],
                        "color": [palette.BASE, *[palette.TUNED] * (len(shown) - 1)],
                    },
                    error_y=canvas.error_bars(known, canvas.translucent(palette.TUNED, 0.5), 1.2),
                    hoverinfo="text",
                    hovertext=[f"{wording.label(names[number])}: {words[number]}" for number in shown],
                    name=title,
                )
            )
    bounds = [one for values, _ in curves for value in values if value is not None for one in _ends(value)]
    room = 0.08 * (max(bounds) - min(bounds)) or 0.1
    x: dict[str, Any] = {"title": canvas.title("step"), "showgrid": False}
    most = max(places)
    x["range"] = [-0.05 * most, 1.05 * most]
    if not numbered:
        x |= {"title": canvas.title(None), "tickvals": places, "ticktext": [short(name) for name in names]}
        x["range"] = [-0.4, most + 0.4]
    return canvas.figure(
        traces,
        STEP_HEIGHT,
        revision=f"series by step {title}",
        x=x,
        y={"range": [min(bounds) - room, max(bounds) + room], "title": canvas.title(title), "nticks": 5},
        showlegend=False,
        top=10,
    )


def _point(value: float | None) -> Interval | None:
    return None if value is None else Interval(value, value, value)


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def _heading(name: str, colour: str) -> dict[str, Any]:
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 4}}
    return {"text": f"<b>{name}</b>", "font": {"size": 14, "color": colour}} | place
