"""The figure of a film: the clouds of each target layer step by step, beside loss, KL and margin.

One figure for the app, the report and a file of its own: plotly's own frames, slider and buttons move it, so that it
needs no script but plotly's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.film import FilmView
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES
from es2.report.labels import hover, label
from es2.report.palette import BASE, COLOURS, NEUTRAL, SYMBOLS, TUNED

if TYPE_CHECKING:
    from jaxtyping import Float


Curve = tuple[Sequence[int], Sequence[float | None]]
"""Steps, and a number at each; None where it was none."""
Moving = tuple[dict[str, Any], list[dict[str, Any]]]
"""A trace, and what of it is different in each frame."""

_SIDE, _RIGHT, _TOP, _BOTTOM = 64, 14, 30, 118  # pixels around the plots; the slider is below them
_CLOUD, _CURVE, _BETWEEN = 330, 150, 58  # pixels of the plots, and of what is between two rows
_PER_ROW = 2
_GAP = 0.075  # part of the width between two plots
_PLAY_SECONDS = 8.0
_LONGEST, _SHORTEST, _JUMP = 800, 120, 100  # milliseconds of a frame, and of a way that the slider goes
_ROOM = 0.06


def film_figure(
    view: FilmView, losses: Curve, kl_budget: float, *, n_steps: int = 0, at_end: bool = False
) -> dict[str, Any]:
    """The figure, as `go.Figure` takes it.

    Args:
        view: the points of the film.
        losses: of every step.
        kl_budget: nats per token.
        n_steps: number of steps that there will be, so that nothing jumps as they come in.
        at_end: whether the last frame is shown at first, as of a run under way.
    """
    n_layers = len(view.layers)
    n_rows = -(-n_layers // _PER_ROW)
    height = n_rows * (_CLOUD + _BETWEEN) + _CURVE
    shown = len(view.steps) - 1 if at_end else 0
    axes: dict[str, Any] = {}
    clouds = [moving for place in range(n_layers) for moving in _clouds(view, place, axes, height)]
    curves, moments = _curves(view, losses, kl_budget, n_steps, axes, height)
    moving = [*clouds, *moments]
    frames = [
        {
            "name": str(step),
            "traces": list(range(len(curves), len(curves) + len(moving))),
            "data": [places[at] for _, places in moving],
        }
        for at, step in enumerate(view.steps)
    ]
    data = [*curves, *(trace | places[shown] for trace, places in moving)]
    layout = {
        "height": height + _TOP + _BOTTOM,
        "margin": {"l": _SIDE, "r": _RIGHT, "t": _TOP, "b": _BOTTOM, "pad": 0},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "itemclick": False},
        "hovermode": "closest",
        "dragmode": False,
        "hoverlabel": {"align": "left", "namelength": -1},
        **axes,
        **_controls(view, shown, height),
    }
    return {"data": data, "layout": layout, "frames": frames}


def film_caption(view: FilmView, kept: int | None = None) -> str:
    """What the figure shows, in plain words; `kept` is the step whose weights were kept."""
    lengths = "all in the model's own units" if view.raw else "each step in units of its own scale"
    said = [
        f"{len(view.labels)} prompts of the validation split at every validation, {lengths}. One projection for all "
        "steps: x is the base's mean-difference direction, + = harmful (fitted on these very prompts, so even the base "
        "looks a little apart), y the first principal component of what base and the last step hold beside it.",
        "Length: the scale of the embeddings, against the base's; a residual stream that only grows is inflated.",
    ]
    if kept is not None:
        said.append(f"The weights of step {kept} were kept.")
    if view.n_lost:
        said.append(f"{view.n_lost} damaged {'frame is' if view.n_lost == 1 else 'frames are'} left out.")
    return " ".join(said)


def losses(events: Iterable[Mapping[str, Any]]) -> Curve:
    """The loss of every step; a step's last event counts, and drops the later steps of a process that was killed."""
    found: dict[int, float | None] = {}
    for event in events:
        if event.get("stage") == "finetune" and isinstance(event.get("done"), int) and "loss" in event:
            while found and next(reversed(found)) >= event["done"]:
                found.popitem()
            found[event["done"]] = event["loss"]
    return list(found), list(found.values())


def _clouds(view: FilmView, place: int, axes: dict[str, Any], height: int) -> list[Moving]:
    """Both labels of one layer, and its length; adds their axes to `axes`."""
    row, column = divmod(place, _PER_ROW)
    width = (1 - _GAP) / 2
    across = [0.0, 1.0] if len(view.layers) == 1 else [column * (width + _GAP), column * (width + _GAP) + width]
    x, y = _add_axes(axes, across, _domain(height, row * (_CLOUD + _BETWEEN), _CLOUD))
    points = _rounded(view.points[:, place])
    low, high = (edge(axis=(0, 1)) for edge in (points.min, points.max))
    room = np.maximum(_ROOM * (high - low), 1e-9)
    ranges = [[float(a), float(b)] for a, b in zip(low - room, high + room, strict=True)]
    titles = [f"Layer {view.layers[place]}: {view.axes[0][0].lower()}{view.axes[0][1:]}", view.axes[1]]
    for name, own, title in ((x, ranges[0], titles[0]), (y, ranges[1], titles[1] if column == 0 else None)):
        axes[name] |= {"range": own, "title": {"text": title and label(title), "standoff": 6}, "showgrid": True}
    anchors = {"xaxis": x.replace("axis", ""), "yaxis": y.replace("axis", "")}
    found: list[Moving] = []
    for which in (HARMLESS, HARMFUL):
        rows = np.flatnonzero(view.labels == which)
        cloud = {
            "type": "scatter",
            "mode": "markers",
            "name": LABEL_NAMES[which],
            "legendgroup": LABEL_NAMES[which],
            "legendrank": 1,  # before the curves
            "showlegend": place == 0,
            "marker": {"color": COLOURS[which], "symbol": SYMBOLS[which], "size": 7, "opacity": 0.8},
            "hoverinfo": "text",
            "hovertext": [_words(view.texts[at]) for at in rows],
        }
        found.append((cloud | anchors, [{"x": now[rows, 0].tolist(), "y": now[rows, 1].tolist()} for now in points]))
    length = {
        "type": "scatter",
        "mode": "text",
        "name": "length",
        "x": [ranges[0][1]],
        "y": [ranges[1][1]],
        "textposition": "bottom left",
        "textfont": {"color": NEUTRAL, "size": 12},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    found.append((length | anchors, [{"text": [f"length ×{now:.2f} "]} for now in view.lengths[:, place]]))
    return found


def _curves(
    view: FilmView, losses: Curve, kl_budget: float, n_steps: int, axes: dict[str, Any], height: int
) -> tuple[list[dict[str, Any]], list[Moving]]:
    """Loss, KL and margin by step, and in each of their plots a line at the moment."""
    measured = {
        name: [now.get(name) for now in view.numbers] for name in ("kl_prompt", "kl_reply", "mean_difference_margin")
    }
    margin = "mean-difference margin"
    panels: list[tuple[str, list[tuple[str, Curve, str, str, bool]]]] = [
        ("loss", [("loss", losses, NEUTRAL, "solid", False)]),
        (
            "KL, nats per token",
            [
                ("KL of prompts", (view.steps, measured["kl_prompt"]), TUNED, "solid", True),
                ("KL of replies", (view.steps, measured["kl_reply"]), TUNED, "dot", True),
            ],
        ),
        (margin, [(margin, (view.steps, measured["mean_difference_margin"]), BASE, "solid", False)]),
    ]
    last = max([n_steps, view.steps[-1], *losses[0]])
    width = (1 - 2 * _GAP) / 3
    curves: list[dict[str, Any]] = []
    moments: list[Moving] = []
    for column, (title, lines) in enumerate(panels):
        start = column * (width + _GAP)
        x, y = _add_axes(axes, [start, start + width], _domain(height, height - _CURVE, _CURVE))
        values = [value for _, (_, found), *_ in lines for value in found if value is not None]
        if column == 1:
            values += [0.0, kl_budget]
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 2 * _ROOM * (high - low) or 1.0
        reach = [low if column == 1 else low - room, high + room]
        axes[x] |= {"range": [-0.02 * last, 1.02 * last], "title": {"text": "step", "standoff": 4}, "showgrid": False}
        axes[y] |= {"range": reach, "title": {"text": title, "standoff": 6}, "nticks": 6}
        anchors = {"xaxis": x.replace("axis", ""), "yaxis": y.replace("axis", "")}
        for name, (steps, found), colour, dash, in_legend in lines:
            curves.append(
                {
                    "type": "scatter",
                    "mode": "lines" if name == "loss" and len(steps) > 1 else "lines+markers",
                    "name": name,
                    "x": list(steps),
                    "y": list(found),
                    "line": {"color": colour, "width": 2, "dash": dash},
                    "marker": {"size": 6, "color": colour},
                    "showlegend": in_legend,
                    "hovertemplate": f"step %{{x}}: {name} %{{y:.4f}}<extra></extra>",
                    **anchors,
                }
            )
        if column == 1:
            line = {"color": NEUTRAL, "width": 1.5, "dash": "dash"}
            shape = {"type": "line", "xref": f"{anchors['xaxis']} domain", "x0": 0, "x1": 1, "line": line}
            axes["shapes"] = [shape | {"yref": anchors["yaxis"], "y0": kl_budget, "y1": kl_budget}]
        mark: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": "moment", "showlegend": False}
        mark |= {"y": reach, "line": {"color": NEUTRAL, "width": 2}, "hoverinfo": "skip"}
        moments.append((mark | anchors, [{"x": [step, step]} for step in view.steps]))
    return curves, moments


def _controls(view: FilmView, shown: int, height: int) -> dict[str, Any]:
    """Play and pause, and a slider over the steps, below the plots."""
    pause = int(min(_LONGEST, max(_SHORTEST, 1000 * _PLAY_SECONDS / len(view.steps))))
    play = {
        "mode": "immediate",
        "fromcurrent": True,
        "frame": {"duration": pause, "redraw": False},
        "transition": {"duration": int(0.7 * pause), "easing": "cubic-in-out"},
    }
    # Not in no time: then a movement that is under way would go on and leave the points at its end.
    at_once = {"mode": "immediate", "frame": {"duration": _JUMP, "redraw": False}, "transition": {"duration": _JUMP}}
    below = -(_BOTTOM - 56) / height
    menu = {
        "type": "buttons",
        "direction": "left",
        "showactive": False,
        "x": 0,
        "xanchor": "left",
        "y": below,
        "yanchor": "middle",
        "pad": {"t": 0, "r": 0},
        "buttons": [
            {"label": "Play", "method": "animate", "args": [None, play]},
            {"label": "Pause", "method": "animate", "args": [[None], at_once]},
        ],
    }
    slider = {
        "active": shown,
        "x": 0.16,
        "len": 0.84,
        "y": below,
        "yanchor": "middle",
        "pad": {"t": 0, "b": 0},
        "currentvalue": {"prefix": "step ", "xanchor": "right"},
        "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], at_once]} for step in view.steps],
    }
    return {"updatemenus": [menu], "sliders": [slider]}


def _add_axes(axes: dict[str, Any], across: list[float], upwards: list[float]) -> tuple[str, str]:
    """The names of a new pair of axes over a part of the plots' width and height."""
    number = sum(name.startswith("xaxis") for name in axes) + 1
    suffix = "" if number == 1 else str(number)
    fixed = {"zeroline": False, "automargin": False, "fixedrange": True}
    axes[f"xaxis{suffix}"] = fixed | {"domain": across, "anchor": f"y{suffix}"}
    axes[f"yaxis{suffix}"] = fixed | {"domain": upwards, "anchor": f"x{suffix}"}
    return f"xaxis{suffix}", f"yaxis{suffix}"


def _domain(height: int, top: int, tall: int) -> list[float]:
    """The part of the height that a plot takes whose top is so many pixels below the first one's."""
    return [1 - (top + tall) / height, 1 - top / height]


def _words(text: str | None) -> str:
    return "a prompt that the prompt set does not hold any more" if text is None else hover(text)


def _rounded(points: Float[np.ndarray, "step prompt 2"]) -> Float[np.ndarray, "step prompt 2"]:
    """Coordinates to a ten-thousandth of the largest, finer than a screen."""
    largest = float(np.abs(points).max(initial=0))
    return np.round(points, 4 - int(np.floor(np.log10(largest)))) if largest > 0 else points
