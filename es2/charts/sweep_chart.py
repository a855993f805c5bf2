"""What separation costs: the trials of a sweep by their KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from es2.charts import canvas
from es2.report import labels, palette

HEIGHT = 380


def pareto(sweep: Mapping[str, Any]) -> canvas.Figure:
    """Each trial's separation against its KL: the front filled and joined, trials that kept nothing as crosses.

    Args:
        sweep: as `es2.workflow.sweeps.sweep_document` gives it.
    """
    measured = [trial for trial in sweep["trials"] if trial["numbers"]]
    front = [trial for number in sweep["front"] for trial in measured if trial["number"] == number]
    others = [trial for trial in measured if trial not in front and trial["numbers"]["kept"]]
    lost = [trial for trial in measured if not trial["numbers"]["kept"]]
    traces = [
        _trace(lost, "kept nothing", mode="markers", marker={"symbol": "x", "size": 7, "color": canvas.NEUTRAL}),
        _trace(others, "trial", mode="markers", marker={"symbol": "circle-open", "size": 8, "color": palette.BASE}),
        _trace(
            front,
            "no other has more separation at less KL",
            mode="lines+markers",
            line={"color": palette.TUNED, "width": 1.5, "shape": "hv"},
            marker={"size": 10, "color": palette.TUNED},
        ),
    ]
    highest = max([sweep["kl_budget"], *(trial["numbers"]["kl"] for trial in measured)])
    return canvas.figure(
        traces,
        HEIGHT,
        revision="pareto",
        x={"range": [0, 1.05 * highest], "title": canvas.title("KL on harmless prompts, nats per token")},
        y={"title": canvas.title("separation: log of fisher ratio, over base's")},
        shapes=[canvas.vertical(sweep["kl_budget"], width=1.5, dash="dash")],
    )


def _trace(trials: list[Mapping[str, Any]], name: str, **settings: Any) -> canvas.Trace:
    return canvas.scatter(
        x=[trial["numbers"]["kl"] for trial in trials],
        y=[trial["numbers"]["separation"] for trial in trials],
        name=name,
        hoverinfo="text",
        hovertext=[_words(trial) for trial in trials],
        **settings,
    )


def _words(trial: Mapping[str, Any]) -> str:
    numbers = trial["numbers"]
    settings = (f"{name.replace('_', ' ')} {value}" for name, value in trial["settings"].items())
    head = f"<b>trial {trial['number']}</b>: separation {numbers['separation']:+.2f}, KL {numbers['kl']:.3f}"
    return "<br>".join([head, *map(labels.label, settings)])
