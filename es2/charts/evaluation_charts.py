"""Figures of an evaluation: pure functions from kept numbers to plotly figures, which know nothing of Streamlit.

Budgets double from one to the next, so they are at equal steps. Panels of one figure share their axes' ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from es2.analysis.resampling import Interval
from es2.charts import canvas
from es2.report import labels, palette
from es2.report.findings import BY_NAME, DIRECTION_NAMES, Numbers, interval_of, panels_of

MODELS = ("base", "tuned")
NAMES: Mapping[str, str] = {"base": "Base", "tuned": "Tuned"}
MODEL_COLOURS: Mapping[str, str] = {"base": palette.BASE, "tuned": palette.TUNED}
MODEL_SYMBOLS: Mapping[str, str] = {"base": "circle-open", "tuned": "square"}
DASHES: Mapping[str, str] = {"base": "dot", "tuned": "solid"}
RATES = ("dsr", "over_refusal", "harmful_degenerate", "harmless_degenerate")
"""The rates of replies that the figure shows, from top to bottom."""

CURVE_HEIGHT = 235
NEEDED_HEIGHT = 230
BOUNDARY_HEIGHT = 230
_ROW_HEIGHT = 34
_ROW_NAMES = 142
_GAP = 0.025
_DODGE = 0.07
_PANEL_ROW, _PANEL_GAP = 200, 52
_BUDGET = "budget: length of the steering vector / ‖e‖ (steps not to scale)"
_SOFT_BUDGET = "budget: length of each vector / mean length of a token's embedding (steps not to scale)"


def rates(refusal: Numbers | None, ability: Numbers | None, choice: Numbers | None = None) -> canvas.Figure:
    """Rates of replies and of right answers before and after, with their intervals, and the agreement with base.

    Takes the parts `refusal`, `kl` and `ability` of an evaluation, where there are.
    """
    rows: list[tuple[str, dict[str, Interval]]] = []
    of_models = {model: (refusal or {}).get(model) or {} for model in MODELS}
    for name in RATES:
        found = {model: interval_of(own[name]) for model, own in of_models.items() if own.get(name)}
        if found:
            rows.append((BY_NAME[name].title, found))
    if ability is not None and ability["agreement"] is not None:
        rows.append((BY_NAME["agreement"].title, {"tuned": interval_of(ability["agreement"])}))
    if choice is not None:
        answered = {model: interval_of(own["accuracy"]) for model in MODELS if (own := choice[model])}
        rows.append((BY_NAME["accuracy"].title, answered))
    traces = []
    for place, model in enumerate(MODELS):
        points = [(row, title, found[model]) for row, (title, found) in enumerate(rows) if model in found]
        both = [len(found) == 2 for _, found in rows]
        traces.append(
            _trace(
                model,
                x=[number.value for _, _, number in points],
                y=[-row + (0.15 - 0.3 * place if both[row] else 0.0) for row, _, _ in points],
                mode="markers",
                marker=_marker(model, 9),
                error_x=_bars([number for _, _, number in points], model),
                hovertext=[f"{title}, {model}: {in_words(number)}" for _, title, number in points],
            )
        )
    return canvas.figure(
        traces,
        _ROW_HEIGHT * max(len(rows), 1) + canvas.TOP + canvas.BOTTOM_TITLED,
        revision="rates",
        x={"range": [-0.02, 1.02], "title": canvas.title("share (no unit), 95 % interval")},
        y={
            "range": [-len(rows) + 0.5, 0.5],
            "tickvals": [-row for row in range(len(rows))],
            "ticktext": [title for title, _ in rows],
            "showgrid": False,
        },
        left=_ROW_NAMES,
    )


# ------------------------------------------------------------------------------------------------------------- attacks


def directions_of(attack: Numbers) -> list[str]:
    """The directions that were steered along, in the order of reading."""
    steered = {point["direction"] for point in attack["curve"]} - {"none"}
    return [name for name in DIRECTION_NAMES if name in steered]


def curve(attack: Numbers, rate: str, title: str) -> canvas.Figure:
    """A rate (`dsr`, `degenerate`, `answered`) against the budget; budget 0 is none.

    A panel for each direction of steerings, or for each kind and number of vectors of soft prompts.
    """
    swept = panels_of(attack)
    names, panels = list(swept), list(swept.values())
    budgets = sorted({point["budget"] for points in panels for point in points})
    place = {budget: at for at, budget in enumerate(budgets)}
    is_soft = any(point.get("length") for points in panels for point in points)
    traces = []
    for number, points in enumerate(panels):
        for index, model in enumerate(MODELS):
            found = [(point["budget"], interval_of(point[model][rate])) for point in points if point[model]]
            called = f"{names[number]}, {model}"
            traces.append(
                _trace(
                    model,
                    x=[place[budget] + _DODGE * (2 * index - 1) for budget, _ in found],
                    y=[number.value for _, number in found],
                    xaxis=f"x{number + 1 if number else ''}",
                    mode="lines+markers",
                    marker=_marker(model, 7),
                    error_y=_bars([number for _, number in found], model),
                    legendgroup=model,
                    showlegend=number == 0,
                    hovertext=[f"{called}, budget {budget:g}: {in_words(number)}" for budget, number in found],
                )
            )
    axis = _step_axis([f"{budget:g}" for budget in budgets])
    domains = _domains(len(panels))
    more: dict[str, Any] = {
        f"xaxis{panel + 1}": {"zeroline": False, "fixedrange": True, "anchor": "y", "domain": domains[panel]} | axis
        for panel in range(1, len(panels))
    }
    return canvas.figure(
        traces,
        CURVE_HEIGHT,
        revision=f"{'soft ' if is_soft else ''}curve {rate}",
        top=2 * canvas.TOP,
        x=axis | ({"domain": domains[0]} if domains else {}),
        y={"range": [-0.04, 1.04], "title": canvas.title(title), "nticks": 6},
        annotations=[
            *(_panel_name(name, domain) for name, domain in zip(names, domains, strict=True)),
            _below(_SOFT_BUDGET if is_soft else _BUDGET),
        ],
        legend=_legend_above(CURVE_HEIGHT - 2 * canvas.TOP - canvas.BOTTOM_TITLED),
        **more,
    )


def reach(attack: Numbers) -> canvas.Figure:
    """The share of harmful prompts that a perturbation of some length brings to p₀: a row of panels for each attacked
    layer, a column for each p₀.

    A curve further to the right is harder to attack. It begins at the share that needs no perturbation at all.
    """
    values = attack["needed_values"]
    layers = list(dict.fromkeys(entry["layer"] for entry in values))
    p0s = list(dict.fromkeys(entry["p0"] for entry in values))
    limits = {
        p0: canvas.nice_limit(
            1.02 * max(max(entry[m], default=0) for entry in values if entry["p0"] == p0 for m in _in(entry))
        )
        for p0 in p0s
    }
    inner = _PANEL_ROW * max(len(layers), 1)
    domains, heights = _domains(len(p0s)), _domains(len(layers), gap=_PANEL_GAP / inner)
    traces, annotations, more = [], [], {}
    for entry in values:
        row, column = layers.index(entry["layer"]), p0s.index(entry["p0"])
        number = row * len(p0s) + column
        suffix = str(number + 1) if number else ""
        for model in _in(entry):
            lengths = np.sort(np.asarray(entry[model], dtype=np.float64))
            shares = np.arange(1, len(lengths) + 1) / max(len(lengths), 1)
            limit = limits[entry["p0"]]
            traces.append(
                _trace(
                    model,
                    x=[0.0, *lengths.tolist(), limit],
                    y=[0.0, *shares.tolist(), 1.0],
                    xaxis=f"x{suffix}",
                    yaxis=f"y{suffix}",
                    mode="lines",
                    line=_line(model) | {"shape": "hv"},
                    legendgroup=model,
                    showlegend=number == 0,
                    hovertext=[
                        f"layer {entry['layer']}, {model}: {share:.0%} need at most {length:.3f}"
                        for length, share in zip([0.0, *lengths], [float((lengths == 0).mean()), *shares], strict=True)
                    ]
                    + [""],
                )
            )
        height = heights[len(layers) - 1 - row]  # the first layer is the uppermost
        axis = {"zeroline": False, "automargin": False, "fixedrange": True}
        x = {"domain": domains[column], "anchor": f"y{suffix}", "range": [0, limits[entry["p0"]]], "nticks": 6}
        more[f"xaxis{suffix}"] = axis | x
        more[f"yaxis{suffix}"] = axis | {
            "domain": height,
            "anchor": f"x{suffix}",
            "range": [0, 1.02],
            "nticks": 5,
            "tickformat": ".0%",
            "showticklabels": column == 0,
        }
        words = f"layer {entry['layer']}, to p₀ = {entry['p0']:g}"
        annotations.append(_panel_name(words, domains[column], y=height[1]))
    return canvas.figure(
        traces,
        inner + 2 * canvas.TOP + canvas.BOTTOM_TITLED,
        revision="reach",
        top=2 * canvas.TOP,
        x=more.pop("xaxis", {}),
        y=more.pop("yaxis", {}),
        annotations=[*annotations, _below("relative length of the steering vector, ‖shift‖ / ‖e‖")],
        legend=_legend_above(inner),
        **more,
    )


def needed_strip(attack: Numbers, p0: float) -> canvas.Figure:
    """The relative length that brings harmful prompts to `p0`, over all layers: mean with interval, base and tuned, and
    the lower quartile, the easier attacks, as a thin line."""
    records = [record for record in attack["needed"] if record["p0"] == p0]
    layers = [record["layer"] for record in records]
    traces, highest = [], 0.0
    for model in MODELS:
        found = [(record["layer"], interval_of(record[model]["relative"])) for record in records if record[model]]
        if not found:
            continue
        highest = max(highest, *(number.high for _, number in found))
        colour = MODEL_COLOURS[model]
        x = [layer for layer, _ in found]
        traces += [
            canvas.band(x, [number for _, number in found], colour, model),
            canvas.scatter(
                x=x,
                y=[record[model]["relative_q1"]["value"] for record in records],
                mode="lines",
                line={"color": colour, "width": 1, "dash": "dot"},
                hoverinfo="skip",
                name=f"{NAMES[model]}, easier quarter",
            ),
            _trace(
                model,
                x=x,
                y=[number.value for _, number in found],
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker=_marker(model, 7),
                name=f"{NAMES[model]}, mean",
                hovertext=[_needed_words(record, model) for record in records],
            ),
        ]
    last = max(layers, default=0)
    return canvas.figure(
        traces,
        NEEDED_HEIGHT,
        revision=f"needed {p0:g}",
        x=canvas.layer_axis(last + 1),
        y={"range": [0, canvas.nice_limit(1.05 * highest)], "title": canvas.title("‖shift‖ / ‖e‖"), "nticks": 6},
        shapes=[canvas.column(layer) for layer in attack["layers"]],
    )


def boundary(
    steps: Sequence[str], read: Mapping[str, Sequence[float | None]], chosen: int, joined: int
) -> canvas.Figure:
    """One prompt's probability of harmful under each steering, as the probe read it back: where it crosses one half.

    Args:
        steps: what the steerings are called, in their order.
        read: by model, the probability after each; None where there is none.
        chosen: index of the steering that is shown.
        joined: number of first steerings that grow from one to the next and are joined by a line.
    """
    traces = [canvas.dashed((-0.4, len(steps) - 0.6), 0.5, "the probe's boundary", width=1.5)]
    for model, values in read.items():
        words = [
            f"{model}, {labels.label(step)}: " + ("–" if value is None else f"{value:.3f}")
            for step, value in zip(steps, values, strict=True)
        ]
        for part, mode in ((slice(0, joined), "lines+markers"), (slice(joined, None), "markers")):
            traces.append(
                _trace(
                    model,
                    x=list(range(len(steps)))[part],
                    y=list(values)[part],
                    mode=mode,
                    marker=_marker(model, 8),
                    name=NAMES[model] if part.start == 0 else f"{NAMES[model]}, to p₀",
                    showlegend=part.start == 0,
                    hovertext=words[part],
                )
            )
    return canvas.figure(
        traces,
        BOUNDARY_HEIGHT,
        revision="boundary",
        x=_step_axis([labels.label(step) for step in steps]) | {"title": canvas.title(_BUDGET)},
        y={"range": [-0.04, 1.04], "title": canvas.title("P(harmful), read back"), "nticks": 6},
        shapes=[canvas.vertical(chosen)],
    )


def direction_rates(directions: Numbers) -> canvas.Figure:
    """Shares refused with and without a direction, base and tuned: of harmful requests where it is removed, and of
    harmless ones where it is added, a panel each; a row for the replies before, and two for each layer.
    """
    layers = [record["layer"] for record in directions["layers"]]
    rows = ["not steered"]
    for layer in layers:
        rows += [f"layer {layer}, direction", f"layer {layer}, random"]
    kinds = (("remove", "Removed: harmful requests refused"), ("add", "Added: harmless requests refused"))
    domains = _domains(len(kinds), gap=0.06)
    traces = []
    for panel, (kind, title) in enumerate(kinds):
        for place, model in enumerate(MODELS):
            points: list[tuple[int, Interval]] = []
            for at, record in enumerate(directions["layers"]):
                if record[model]:
                    refused = record[model][kind]["refused"]
                    points += [(0, interval_of(refused["before"]))] if not at else []
                    points += [
                        (2 * at + row, interval_of(refused[name]))
                        for row, name in enumerate(("direction", "control"), 1)
                    ]
            traces.append(
                _trace(
                    model,
                    x=[number.value for _, number in points],
                    y=[-row + 0.15 - 0.3 * place for row, _ in points],
                    xaxis=f"x{panel + 1 if panel else ''}",
                    mode="markers",
                    marker=_marker(model, 9),
                    error_x=_bars([number for _, number in points], model),
                    legendgroup=model,
                    showlegend=panel == 0 and bool(points),
                    hovertext=[f"{title}, {rows[row]}, {model}: {in_words(number)}" for row, number in points],
                )
            )
    axis: dict[str, Any] = {"range": [-0.04, 1.04], "nticks": 6}
    inner = _ROW_HEIGHT * len(rows)
    return canvas.figure(
        traces,
        inner + 2 * canvas.TOP + canvas.BOTTOM_TITLED,
        revision="direction",
        top=2 * canvas.TOP,
        left=_ROW_NAMES,
        x=axis | {"domain": domains[0]},
        y={
            "range": [-len(rows) + 0.5, 0.5],
            "tickvals": [-row for row in range(len(rows))],
            "ticktext": rows,
            "showgrid": False,
        },
        xaxis2=axis | {"domain": domains[1], "anchor": "y", "zeroline": False, "fixedrange": True},
        annotations=[
            *(_panel_name(title, domain) for (_, title), domain in zip(kinds, domains, strict=True)),
            _below("share refused (no unit), 95 % interval"),
        ],
        legend=_legend_above(inner),
    )


# --------------------------------------------------------------------------------------------------------- their parts


def _in(entry: Numbers) -> list[str]:
    return [model for model in MODELS if entry.get(model)]


def _line(model: str) -> dict[str, Any]:
    return {"color": MODEL_COLOURS[model], "width": 2, "dash": DASHES[model]}


def _trace(model: str, **settings: Any) -> canvas.Trace:
    """A trace of one model with hover texts; `settings` as for `go.Scatter`."""
    return canvas.scatter(**{"name": NAMES[model], "line": _line(model), "hoverinfo": "text"} | settings)


def _step_axis(names: Sequence[str]) -> dict[str, Any]:
    """An axis of steerings at equal steps."""
    places = list(range(len(names)))
    return {"range": [-0.4, len(names) - 0.6], "tickvals": places, "ticktext": list(names), "showgrid": False}


def _marker(model: str, size: float) -> dict[str, Any]:
    colour = MODEL_COLOURS[model]
    return {"symbol": MODEL_SYMBOLS[model], "size": size, "color": colour, "line": {"width": 2, "color": colour}}


def _bars(numbers: Sequence[Interval], model: str) -> dict[str, Any]:
    return canvas.error_bars(numbers, canvas.translucent(MODEL_COLOURS[model], 0.6))


def in_words(number: Interval, digits: int = 2) -> str:
    """A number with its interval."""
    return f"{number.value:.{digits}f} ({number.low:.{digits}f} to {number.high:.{digits}f})"


def _needed_words(record: Numbers, model: str) -> str:
    of = record[model]
    relative, easier, already = (interval_of(of[name]) for name in ("relative", "relative_q1", "already"))
    rows = [
        f"<b>layer {record['layer']}, {model}</b>",
        f"mean {in_words(relative, 3)}",
        f"easier quarter {easier.value:.3f}",
        f"need no perturbation: {already.value:.0%}",
    ]
    if record["change"] is not None:
        ratio = interval_of(record["change"]["relative_ratio"])
        rows.append(f"tuned / base ×{in_words(ratio)}")
    return "<br>".join(rows)


def _domains(n: int, gap: float = _GAP) -> list[list[float]]:
    """`n` equal stretches of 0 to 1 with gaps between them."""
    width = (1 - gap * (n - 1)) / max(n, 1)
    return [[at * (width + gap), min(1.0, at * (width + gap) + width)] for at in range(n)]


def _panel_name(words: str, domain: Sequence[float], y: float = 1.0) -> dict[str, Any]:
    return canvas.words(f"<b>{labels.label(words)}</b>", domain[0], y, "left", "bottom", font={"size": 12})


def _below(words: str) -> dict[str, Any]:
    """One axis title for all panels of a row."""
    return canvas.words(words, 0.5, 0, "center", "top", yshift=-20)


def _legend_above(plot_height: float) -> dict[str, Any]:
    """A legend above the names of the panels."""
    return canvas.LEGEND | {"y": 1 + 22 / plot_height}
