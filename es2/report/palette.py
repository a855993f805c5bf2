"""Colours and symbols that mean the same in every figure, of the app and of reports.

Each has a contrast of at least 3 to white and to near-black; colour-blind readers can distinguish them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from es2.prompts.prompt_set import HARMFUL, HARMLESS

if TYPE_CHECKING:
    from es2.analysis.resampling import Interval


COLOURS = {HARMFUL: "#d95f02", HARMLESS: "#2b83ba"}
BASE = "#159588"
TUNED = "#a463c4"
NEUTRAL = "#85898f"  # controls, chance, boundaries, the chosen layer
SYMBOLS = {HARMFUL: "diamond", HARMLESS: "circle"}


def translucent(colour: str, alpha: float) -> str:
    """`#rrggbb` as an `rgba(…)` of this opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def interval_band(x: Sequence[int], intervals: Sequence[Interval], colour: str) -> dict[str, Any]:
    """The arguments of `go.Scatter` for intervals over `x` as a band."""
    return {
        "type": "scatter",
        "x": [*x, *x[::-1]],
        "y": [interval.high for interval in intervals] + [interval.low for interval in intervals][::-1],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": translucent(colour, 0.16),
        "hoverinfo": "skip",
        "showlegend": False,
    }
