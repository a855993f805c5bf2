"""The figures of a sweep: its Pareto front, its settings as parallel coordinates, and its pairs of target layers.

All take a `sweep_document`. A point of each carries `["trial", number]`, so that a click shows that trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from es2.charts import canvas
from es2.report import palette

FRONT_HEIGHT, PARALLEL_HEIGHT, PAIRS_HEIGHT = 400, 330, 400
NAMES = {
    "layers": "layers",
    "objective": "objective",
    "kl_weight": "λ",
    "rate_factor": "rate ×",
    "learning_rate": "learning rate",
    "rank": "rank",
}
"""What the searched settings are called in a figure; `learning_rate` is of sweeps of former versions."""

Trial = Mapping[str, Any]

_LEAST_KL = 1e-4  # nats; a smaller one is drawn here, since a logarithmic axis has no 0
_PALEST = 0.15
_BESIDE_RING = "\u00a0" * 6  # between words and a point that may be ringed; plain spaces would be dropped
_TICK_ROOM = 0.03  # between the end of an axis and the words there, in parts of its length
_FEW_TICKS = [step * 10.0**power for power in range(-4, 3) for step in (1, 3)]


def setting_words(settings: Mapping[str, Any]) -> list[str]:
    """The searched settings of a trial, each in words."""
    return [f"{NAMES.get(name, name)} {value_words(value)}" for name, value in settings.items()]


def value_words(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def factor(separation: float) -> str:
    """A separation as the factor on base's fisher ratio."""
    return f"×{math.exp(separation):.2g}" if separation < 6 else f"×{math.exp(separation):.0f}"


# --------------------------------------------------------------------------------------------------------------- front


def front(document: Mapping[str, Any], chosen: int | None) -> canvas.Figure:
    """Separation against KL, a point a trial, the front joined.

    Paler points keep fewer of the base's refusals; of a sweep that counts refusals under attack they have fewer of
    these, and the front is a surface, of which no line is drawn.
    """
    trials = [trial for trial in document["trials"] if trial["numbers"]]
    best = [document["trials"][number] for number in document["front"]]
    groups: dict[str, list[Trial]] = {"kept": [], "pruned": [], "kept nothing": []}
    for trial in trials:
        if trial["number"] not in document["front"]:
            kept = "kept" if trial["numbers"]["kept"] else "kept nothing"
            groups["pruned" if trial["status"] == "pruned" else kept].append(trial)
    symbols = {"kept": ("circle", 9), "pruned": ("x-thin-open", 9), "kept nothing": ("circle-open", 9)}
    traces = [
        _points(group, name, *symbols[name], palette.TUNED if name == "kept" else canvas.NEUTRAL)
        for name, group in groups.items()
        if group
    ]
    joined: canvas.Trace = {}
    if not document["defended"]:
        joined = {"mode": "lines+markers", "line": {"color": palette.TUNED, "width": 2, "shape": "hv"}}
    traces.append(_points(best, "on the front", "circle", 13, palette.TUNED) | joined)
    named = {0: "first"} | ({document["best"]["number"]: "best"} if document["best"] else {})
    traces.append(
        canvas.scatter(
            x=[_kl(trial) for trial in trials if trial["number"] in named],
            y=[trial["numbers"]["separation"] for trial in trials if trial["number"] in named],
            text=[named[trial["number"]] + _BESIDE_RING for trial in trials if trial["number"] in named],
            textposition="middle left",
            mode="text",
            hoverinfo="skip",
            showlegend=False,
        )
    )
    ringed = [trial for trial in trials if trial["number"] == chosen]
    ring = {"symbol": "circle-open", "size": 23, "color": canvas.NEUTRAL, "line": {"width": 2.5}}
    traces.append(
        canvas.scatter(
            x=[_kl(trial) for trial in ringed],
            y=[trial["numbers"]["separation"] for trial in ringed],
            mode="markers",
            marker=ring,
            hoverinfo="skip",
            name="shown",
        )
    )
    budget = float(document["kl_budget"])
    xs = [_kl(trial) for trial in trials] + [budget]
    ys = [0.0, *(trial["numbers"]["separation"] for trial in trials)]
    low, high = math.log10(min(xs)) - 0.12, math.log10(max(xs)) + 0.12
    room = 0.09 * (max(ys) - min(ys)) or 0.5
    line = {"type": "line", "line": {"color": canvas.NEUTRAL, "width": 1.5, "dash": "dash"}, "layer": "below"}
    quiet = {"size": 11, "color": canvas.NEUTRAL}
    at_budget = (math.log10(budget) - low) / (high - low)
    return canvas.figure(
        traces,
        FRONT_HEIGHT,
        revision="front",
        x={
            "type": "log",
            "range": [low, high],
            "title": canvas.title("KL on harmless validation prompts, nats per token"),
            "tickvals": [tick for tick in _FEW_TICKS if low <= math.log10(tick) <= high],
            "ticktext": [f"{tick:g}" for tick in _FEW_TICKS if low <= math.log10(tick) <= high],
        },
        y={
            "range": [min(ys) - room, max(ys) + 1.4 * room],
            "title": canvas.title("separation: log of fisher ratio over base's"),
            "nticks": 7,
        },
        shapes=[
            line | {"x0": budget, "x1": budget, "y0": 0, "y1": 1, "yref": "paper"},
            line | {"x0": 0, "x1": 1, "xref": "paper", "y0": 0, "y1": 0},
        ],
        annotations=[
            canvas.words(f"budget {budget:g}", at_budget, 1, "right", "top", textangle=-90, font=quiet),
            canvas.words("base", 1, 0, "right", "top", yref="y", font=quiet),
        ],
        top=48,
    )


def _points(trials: Sequence[Trial], name: str, symbol: str, size: float, colour: str) -> canvas.Trace:
    colours = [_depth(refused_share(trial["numbers"]) if colour == palette.TUNED else None, colour) for trial in trials]
    return canvas.scatter(
        x=[_kl(trial) for trial in trials],
        y=[trial["numbers"]["separation"] for trial in trials],
        mode="markers",
        marker={"symbol": symbol, "size": size, "color": colours, "line": {"width": 1.5, "color": colour}},
        customdata=[["trial", trial["number"]] for trial in trials],
        hoverinfo="text",
        hovertext=[_hover(trial) for trial in trials],
        name=name,
    )


def refused_share(numbers: Mapping[str, Any]) -> float | None:
    """What a point's colour stands for: the share refused under attack, else of the base's refusals that are kept."""
    if defence := numbers.get("defence"):
        return float(defence["refusals"] / defence["n_harmful"])
    return numbers.get("refusals_kept")


def defence_words(defence: Mapping[str, Any]) -> list[str]:
    """What was refused under attack, and what of harmless prompts, beside base."""
    kinds = (("refusals", "n_harmful", "under attack"), ("over_refusals", "n_harmless", "harmless"))
    return [f"refuses {defence[one]} of {defence[n]} {of} (base {defence[f'base_{one}']})" for one, n, of in kinds]


def _kl(trial: Trial) -> float:
    return max(float(trial["numbers"]["kl"]), _LEAST_KL)


def _depth(kept: float | None, colour: str = palette.TUNED) -> str:
    return canvas.translucent(colour, 1.0 if kept is None else _PALEST + (1 - _PALEST) * kept)


def _hover(trial: Trial) -> str:
    numbers = trial["numbers"]
    lines = [f"<b>trial {trial['number']}</b>, {trial['status']}{_comment(trial)}"]
    if numbers:
        separation = float(numbers["separation"])
        lines += [f"separation {separation:+.2f}, fisher ratio {factor(separation)}", f"KL {numbers['kl']:.3f} nats"]
        if numbers.get("refusals_kept") is not None:
            lines.append(f"refusals kept {numbers['refusals_kept']:.0%}")
        lines += defence_words(numbers["defence"]) if numbers.get("defence") else []
    return "<br>".join([*lines, *setting_words(trial["settings"])])


def _comment(trial: Trial) -> str:
    numbers = trial["numbers"]
    if not numbers:
        return ""
    if not numbers["kept"]:
        return ", kept no step within the budget"
    return f", {numbers['lost']}" if numbers["lost"] else ""


# ------------------------------------------------------------------------------------------------ parallel coordinates


@dataclass(frozen=True)
class Axis:
    """One vertical axis.

    Attributes:
        name: what is below it.
        value: of a trial; None where it has none.
        place: where a value is, from 0 to 1.
        ticks: places and words along it.
    """

    name: str
    value: Callable[[Trial], Any]
    place: Callable[[Any], float]
    ticks: Sequence[tuple[float, str]]


def parallel(document: Mapping[str, Any], chosen: int | None) -> canvas.Figure:
    """A line a trial, through its searched settings to what they came to."""
    axes = _axes(document)
    on_front = set(document["front"])

    def rank(trial: Trial) -> tuple[bool, bool]:
        return trial["number"] == chosen, trial["number"] in on_front

    traces = [_line(trial, axes, *rank(trial)) for trial in sorted(document["trials"], key=rank)]
    ticks = [(x, place, words) for x, axis in enumerate(axes) for place, words in axis.ticks]
    traces.append(
        canvas.scatter(
            x=[x + (0.05 if 0 < place < 1 else 0) for x, place, _ in ticks],
            y=[place + _TICK_ROOM * ((place >= 1) - (place <= 0)) for _, place, _ in ticks],
            text=[words for _, _, words in ticks],
            textposition=[_beside(place) for _, place, _ in ticks],
            textfont={"size": 11},
            mode="text",
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for name, line in (
        ("on the front", {"color": palette.TUNED, "width": 2}),
        ("others", {"color": canvas.translucent(canvas.NEUTRAL, 0.45), "width": 1}),
        ("shown", {"color": canvas.NEUTRAL, "width": 5}),
    ):
        traces.append(canvas.scatter(x=[None], y=[None], mode="lines", line=line, name=name))
    line = {"type": "line", "y0": 0, "y1": 1, "line": {"color": canvas.NEUTRAL, "width": 1}, "layer": "below"}
    return canvas.figure(
        traces,
        PARALLEL_HEIGHT,
        revision="parallel",
        left=30,
        x={
            "range": [-0.3, len(axes) - 0.6],
            "tickvals": list(range(len(axes))),
            "ticktext": [axis.name for axis in axes],
            "showgrid": False,
        },
        y={"range": [-0.16, 1.16], "visible": False},
        shapes=[line | {"x0": x, "x1": x} for x in range(len(axes))],
    )


def _beside(place: float) -> str:
    """Where the words of a tick go: outside of the axis at its ends."""
    return "top center" if place >= 1 else "bottom center" if place <= 0 else "middle right"


def _line(trial: Trial, axes: Sequence[Axis], is_chosen: bool, on_front: bool) -> canvas.Trace:
    places = [None if (value := axis.value(trial)) is None else axis.place(value) for axis in axes]
    colour = palette.TUNED if on_front else canvas.translucent(canvas.NEUTRAL, 1 if is_chosen else 0.45)
    return canvas.scatter(
        x=list(range(len(axes))),
        y=places,
        mode="lines+markers",
        line={"color": colour, "width": 5 if is_chosen else 2 if on_front else 1},
        marker={"size": 9 if is_chosen else 6, "color": colour},
        customdata=[["trial", trial["number"]]] * len(axes),
        hoverinfo="text",
        hovertext=[_hover(trial)] * len(axes),
        name=f"trial {trial['number']}",
        showlegend=False,
    )


def _axes(document: Mapping[str, Any]) -> list[Axis]:
    axes: list[Axis] = []
    for name, bounds in document["space"]["searched"].items():
        if name == "layers":
            for at, words in enumerate(("lower layer", "upper layer")):
                axes.append(_range_axis(words, _layer(at), bounds, log=False))
            continue
        axis = _choice_axis if name in ("objective", "rank") else _range_axis
        axes.append(axis(NAMES.get(name, name), _setting(name), bounds))
    found = [trial["numbers"] for trial in document["trials"] if trial["numbers"]]
    for name, title in (("kl", "KL"), ("separation", "separation")):
        values = [max(number[name], _LEAST_KL) if name == "kl" else number[name] for number in found]
        if values:
            axes.append(_range_axis(title, _number(name), [min(values), max(values)], log=name == "kl"))
    counts = [number["defence"]["refusals"] for number in found if number.get("defence")]
    if counts:
        axes.append(_range_axis("refused<br>under attack", _refusals, [min(counts), max(counts)], log=False))
    return axes


def _setting(name: str) -> Callable[[Trial], Any]:
    return lambda trial: trial["settings"].get(name)


def _layer(at: int) -> Callable[[Trial], Any]:
    return lambda trial: trial["settings"]["layers"][at]


def _number(name: str) -> Callable[[Trial], Any]:
    return lambda trial: trial["numbers"][name] if trial["numbers"] else None


def _refusals(trial: Trial) -> Any:
    return ((trial["numbers"] or {}).get("defence") or {}).get("refusals")


def _range_axis(name: str, value: Callable[[Trial], Any], bounds: Sequence[float], log: bool = True) -> Axis:
    low, high = float(bounds[0]), float(bounds[-1])

    def place(at: float) -> float:
        if low == high:
            return 0.5
        part = math.log(max(at, low) / low) / math.log(high / low) if log else (at - low) / (high - low)
        return min(max(part, 0.0), 1.0)

    return Axis(name, value, place, [(place(one), f"{one:.3g}") for one in dict.fromkeys((low, high))])


def _choice_axis(name: str, value: Callable[[Trial], Any], choices: Sequence[Any]) -> Axis:
    def place(one: Any) -> float:
        return choices.index(one) / (len(choices) - 1) if len(choices) > 1 else 0.5

    return Axis(name, value, place, [(place(one), value_words(one)) for one in choices])


# ----------------------------------------------------------------------------------------------------- pairs of layers


def pairs(document: Mapping[str, Any], chosen: int | None) -> canvas.Figure | None:
    """The best separation of the kept trials of each pair of target layers; None where layers were not searched.

    A pair that was not tried is empty; one whose trials kept nothing has a ring.
    """
    bounds = document["space"]["searched"].get("layers")
    if bounds is None:
        return None
    low, high = bounds
    best: dict[tuple[int, int], Trial] = {}
    tried: dict[tuple[int, int], Trial] = {}
    for trial in document["trials"]:
        pair = (trial["settings"]["layers"][0], trial["settings"]["layers"][1])
        tried[pair] = trial
        if trial["numbers"] and trial["numbers"]["kept"]:
            best[pair] = max(best.get(pair, trial), trial, key=lambda one: float(one["numbers"]["separation"]))
    lower, upper = range(low, high), range(low + 1, high + 1)
    values = [trial["numbers"]["separation"] for trial in best.values()]
    colours = [[0, canvas.translucent(palette.TUNED, _PALEST)], [1, palette.TUNED]]
    place = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom", "len": 0.42, "xpad": 0}
    bar = place | {"thickness": 8, "outlinewidth": 0, "nticks": 4, "ticklabelposition": "outside top"}
    squares: canvas.Trace = {
        "type": "heatmap",
        "x": list(lower),
        "y": list(upper),
        "z": [[best[x, y]["numbers"]["separation"] if (x, y) in best else None for x in lower] for y in upper],
        "zmin": min([0.0, *values]),
        "zmax": max([0.1, *values]),
        "colorscale": colours,
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "skip",
        "hoverongaps": False,
        "name": "separation",
    }
    nothing = {pair: trial for pair, trial in tried.items() if pair not in best}
    clear = {"symbol": "square", "size": 14, "color": "rgba(0,0,0,0)"}
    open_ring = {"symbol": "circle-open", "size": 7, "color": canvas.NEUTRAL}
    traces = [squares, _cells(best, "best", clear) | {"showlegend": False}]
    if nothing:
        traces.append(_cells(nothing, "kept nothing", open_ring))
    frames = []
    shown = next((trial["settings"]["layers"] for trial in document["trials"] if trial["number"] == chosen), None)
    if shown is not None:
        x, y = shown
        edge = {"color": canvas.NEUTRAL, "width": 2.5}
        frames.append({"type": "rect", "x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5, "line": edge})
    ticks = {"showgrid": False} | ({"dtick": 1, "tick0": low} if high - low <= 8 else {"nticks": 10})
    return canvas.figure(
        traces,
        PAIRS_HEIGHT,
        revision="pairs",
        x=ticks | {"range": [low - 0.5, high - 0.5], "title": canvas.title("lower target layer")},
        y=ticks | {"range": [low + 0.5, high + 0.5], "title": canvas.title("upper target layer")},
        shapes=frames,
        top=48,
    )


def _cells(trials: Mapping[tuple[int, int], Trial], name: str, marker: Mapping[str, Any]) -> canvas.Trace:
    return canvas.scatter(
        x=[x for x, _ in trials],
        y=[y for _, y in trials],
        mode="markers",
        marker=dict(marker),
        customdata=[["trial", trial["number"]] for trial in trials.values()],
        hoverinfo="text",
        hovertext=[_hover(trial) for trial in trials.values()],
        name=name,
    )
