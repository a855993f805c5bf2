"""The figure of a sweep: each measured trial once, where its numbers are."""

from __future__ import annotations

from typing import Any

from es2.charts import sweep_chart
from tests.figures import Checked

sweep_chart = Checked(sweep_chart)  # type: ignore[assignment]


def trial(number: int, separation: float, kl: float, kept: bool = True) -> dict[str, Any]:
    numbers = {"separation": separation, "kl": kl, "kept": kept}
    return {"number": number, "settings": {"objective": "<b>fisher</b>"}, "numbers": numbers}


def test_each_trial_is_shown_by_what_became_of_it() -> None:
    failed = {"number": 4, "settings": {}, "numbers": None}
    trials = [trial(0, 1.0, 0.02), trial(1, 2.0, 0.05), trial(2, 0.5, 0.06), trial(3, 3.0, 0.4, kept=False), failed]
    figure = sweep_chart.pareto({"trials": trials, "front": [0, 1], "kl_budget": 0.1})
    shown = {trace.name: (trace.x, trace.y) for trace in figure.data}
    assert shown["no other has more separation at less KL"] == ((0.02, 0.05), (1.0, 2.0))
    assert shown["trial"] == ((0.06,), (0.5,))
    assert shown["kept nothing"] == ((0.4,), (3.0,))
    assert figure.layout.shapes[0].x0 == 0.1
    assert figure.layout.xaxis.range[1] > 0.4
    assert "<b>fisher" not in figure.data[2].hovertext[0]
