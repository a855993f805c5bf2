"""The curves of a fine-tune, from its event log.

A resumed run logs some steps again: the last entry of a step holds, and drops the later steps of the ended process. The
x axis spans the whole run from the start, so that nothing jumps as points come in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from es2.analysis.verdict import LEAST_REFUSALS_KEPT
from es2.charts import canvas
from es2.report import palette

HEIGHT = 205
TRAINED = ("loss", "separation", "kl_prompt", "kl_reply")
"""What every step logs."""
VALIDATED = (
    "validation_fisher_ratio",
    "validation_mean_difference_margin",
    "validation_kl_prompt",
    "validation_kl_reply",
    "validation_refusals_kept",
    "validation_refusal_agreement",
    "validation_refusal_log_prob",
    "validation_broken_first",
    "validation_base_refusal_log_prob",
    "validation_base_broken_first",
)
"""What an evaluation on `validation` adds: means over the target layers, the KLs, and what became of refusals."""


@dataclass
class History:
    """The numbers of a fine-tune by step; grows by `add`.

    Attributes:
        steps: what was logged after each step, by step, ascending.
        total: how many steps there will be; 0 before the first.
        stage: what the run is doing now; empty before anything.
    """

    steps: dict[int, dict[str, float | None]] = field(default_factory=dict)
    total: int = 0
    stage: str = ""

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take further events, oldest first."""
        for event in events:
            if event.get("event") != "progress":
                continue
            self.stage = str(event.get("stage", ""))
            if self.stage != "finetune" or not isinstance(event.get("done"), int):
                continue
            step = event["done"]
            self.total = int(event.get("total") or self.total)
            for stale in [known for known in self.steps if known >= step]:
                del self.steps[stale]
            self.steps[step] = {name: event[name] for name in (*TRAINED, *VALIDATED) if name in event}

    @property
    def sees_refusals(self) -> bool:
        """Whether replies to harmful prompts are measured on the way: not by runs of earlier versions."""
        validated = [numbers for numbers in self.steps.values() if any(name in numbers for name in VALIDATED)]
        return not validated or any("validation_broken_first" in numbers for numbers in validated)

    def curve(self, name: str) -> tuple[list[int], list[float | None]]:
        """The steps at which a number was logged, and its values; None where it was no finite number."""
        points = [(step, numbers[name]) for step, numbers in self.steps.items() if name in numbers]
        return [step for step, _ in points], [value for _, value in points]


def separation_curve(history: History) -> canvas.Figure:
    """Loss and separation of every step."""
    return _figure(
        history,
        [
            _line(history, "loss", "loss", canvas.NEUTRAL, dash="dot"),
            _line(history, "separation", "separation", palette.TUNED),
        ],
        title="objective's own units",
    )


def kl_curve(history: History, budget: float) -> canvas.Figure:
    """Both KLs of every step, those of `validation` as markers without a legend, and the budget, in nats per token."""
    traces = [
        _line(history, "kl_prompt", "prompts", palette.TUNED),
        _line(history, "kl_reply", "replies", palette.TUNED, dash="dot"),
        _markers(history, "validation_kl_prompt", "prompts, held out", "circle"),
        _markers(history, "validation_kl_reply", "replies, held out", "diamond-open"),
    ]
    high = max([budget, *(value for trace in traces for value in trace["y"] if value is not None)])
    line = {"color": canvas.NEUTRAL, "width": 1.5, "dash": "dash"}
    return _figure(
        history,
        traces,
        title="KL, nats per token",
        axis={"range": [0, canvas.nice_limit(1.1 * high)]},
        shapes=[{"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": budget, "y1": budget, "line": line}],
        annotations=[_words(f"budget {budget:g}", x=1, y=budget, yref="y")],
    )


def held_out_curve(history: History, name: str, title: str, base: str | None = None) -> canvas.Figure:
    """One number on `validation`; before the first one, words in its place.

    Args:
        name: of the number, as it is logged; of numbers of layers that is the mean over the target layers.
        title: of its axis.
        base: the name of the base's value, a line of its own, if that is logged.
    """
    line = _line(history, name, title, palette.TUNED, marker=8)
    lines = [line]
    if base is not None:
        lines = [line | {"name": "tuned"}, _line(history, base, "base", palette.BASE, dash="dash")]
    waiting = [] if line["x"] else [_words(_absent(history), x=0.5, y=0.5, centred=True)]
    return _figure(
        history,
        lines,
        title=title,
        axis={"rangemode": "tozero"} if line["x"] else {"range": [0, 1], "showticklabels": False},
        annotations=waiting,
        **({"showlegend": False, "top": 8} if base is None else {}),
    )


def refusals_curve(history: History) -> canvas.Figure:
    """What is left of the base's refusals on `validation`, and broken first tokens, as shares."""
    traces = [
        _line(history, "validation_refusals_kept", "begun alike", palette.TUNED, marker=8),
        _line(history, "validation_refusal_agreement", "tokens agreed", palette.TUNED, dash="dot", marker=8),
        _line(history, "validation_broken_first", "broken first", canvas.NEUTRAL, dash="dash", marker=8),
        _line(history, "validation_base_broken_first", "broken first, base", palette.BASE, dash="dash"),
    ]
    none = not traces[0]["x"]
    place = {"x": 0.5, "y": 0.65, "centred": True} if none else {"x": 1, "y": LEAST_REFUSALS_KEPT, "yref": "y"}
    words = _absent(history) if none else f"kept at least: {LEAST_REFUSALS_KEPT:g}"
    line = {"color": canvas.NEUTRAL, "width": 1.5, "dash": "dash"}
    y = LEAST_REFUSALS_KEPT
    least = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": line}
    return _figure(
        history,
        traces,
        title="share",
        axis={"range": [-0.03, 1.05]},
        shapes=[] if none else [least],
        annotations=[_words(words, **place)],
    )


def _absent(history: History) -> str:
    """Why there is no number of held-out prompts: none was looked at yet, or the base refuses none of them."""
    looked = bool(history.curve("validation_broken_first")[0])
    return "the base refuses none of these prompts" if looked else "comes with the first look at held-out prompts"


def _words(words: str, *, x: float, y: float, centred: bool = False, **place: Any) -> dict[str, Any]:
    """A quiet annotation, in parts of the plot's width and height."""
    anchors = ("center", "middle") if centred else ("right", "bottom")
    return canvas.words(words, x, y, *anchors, font={"size": 11, "color": canvas.NEUTRAL}, **place)


def _line(
    history: History, name: str, title: str, colour: str, *, dash: str = "solid", marker: float = 0
) -> canvas.Trace:
    x, y = history.curve(name)
    alone = len(x) == 1  # a line needs two points
    return canvas.scatter(
        x=x,
        y=y,
        mode="lines+markers" if marker or alone else "lines",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"size": marker or 6, "color": colour},
        name=title,
        hovertemplate=f"step %{{x}}: {title} %{{y:.4f}}<extra></extra>",
    )


def _markers(history: History, name: str, title: str, symbol: str) -> canvas.Trace:
    marker = {"size": 9, "color": palette.TUNED, "symbol": symbol}
    return _line(history, name, title, palette.TUNED) | {"mode": "markers", "showlegend": False, "marker": marker}


def _figure(
    history: History,
    traces: Sequence[canvas.Trace],
    *,
    title: str,
    axis: Mapping[str, Any] | None = None,
    **layout: Any,
) -> canvas.Figure:
    x = {"range": [0, 1.02 * max(history.total, 1)], "title": canvas.title("step"), "showgrid": False}
    y = {"title": canvas.title(title), "nticks": 5} | dict(axis or {})
    return canvas.figure(traces, HEIGHT, revision=title, x=x, y=y, **layout)
