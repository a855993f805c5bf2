"""The curves of a run from its events: read on, resumed, damaged, drawn."""

from __future__ import annotations

from typing import Any

from es2.analysis.verdict import LEAST_REFUSALS_KEPT
from es2.charts import canvas, run_charts
from es2.charts.run_charts import History
from tests.figures import Checked, traces

run_charts = Checked(run_charts)
HELD_OUT = ("validation_fisher_ratio", "Fisher ratio")


def step(done: int, total: int = 10, **numbers: float | None) -> dict[str, Any]:
    return {"event": "progress", "stage": "finetune", "done": done, "total": total, "time": float(done), **numbers}


def history(*events: dict[str, Any]) -> History:
    made = History()
    made.add(events)
    return made


def test_curves_hold_what_was_logged_at_each_step() -> None:
    made = history(
        {"event": "status", "status": "running"},
        {"event": "progress", "stage": "base", "done": 5, "total": 9},
        step(1, loss=2.0),
        step(2, loss=1.0, validation_fisher_ratio=0.5),
    )
    assert made.curve("loss") == ([1, 2], [2.0, 1.0])
    assert made.curve("validation_fisher_ratio") == ([2], [0.5])
    assert (made.total, made.stage) == (10, "finetune")


def test_reading_on_is_reading_at_once() -> None:
    events = [step(n, loss=1.0 / n) for n in range(1, 8)]
    parts = History()
    for event in events:
        parts.add([event])
    assert parts == history(*events)


def test_a_resumed_run_forgets_what_the_killed_one_did_later() -> None:
    made = history(*(step(n, loss=float(n)) for n in range(1, 8)), step(5, loss=50.0), step(6, loss=60.0))
    assert made.curve("loss") == ([1, 2, 3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0, 50.0, 60.0])


def test_what_is_no_number_leaves_a_gap() -> None:
    made = history(step(1, loss=1.0, kl_prompt=0.1), step(2, loss=None, kl_prompt=None))
    assert traces(run_charts.separation_curve(made))["loss"].y == (1.0, None)
    assert run_charts.kl_curve(made, 0.1).layout.yaxis.range[0] == 0


def test_later_stages_leave_the_curves() -> None:
    made = history(step(1, loss=1.0), {"event": "progress", "stage": "capture", "done": 3, "total": 9})
    assert made.stage == "capture"
    assert made.curve("loss") == ([1], [1.0])
    assert made.total == 10


def test_the_axis_spans_the_whole_run_from_the_first_step() -> None:
    early = history(step(1, total=40, loss=1.0, separation=0.1))
    late = history(*(step(n, total=40, loss=1.0, separation=0.1) for n in range(1, 41)))
    for made in (early, late):
        low, high = run_charts.separation_curve(made).layout.xaxis.range
        assert low == 0
        assert 40 <= high < 42
    assert traces(run_charts.separation_curve(early))["separation"].mode == "lines+markers", "one point makes no line"


def test_the_budget_is_in_sight_whether_it_is_kept_or_not() -> None:
    for kl in (0.001, 3.0):
        figure = run_charts.kl_curve(history(step(1, kl_prompt=kl, kl_reply=kl / 2, validation_kl_prompt=kl)), 0.1)
        (line,) = figure.layout.shapes
        assert line.y0 == line.y1 == 0.1
        assert line.line.color == canvas.NEUTRAL
        low, high = figure.layout.yaxis.range
        assert low == 0
        assert high > max(kl, 0.1)
        assert "budget 0.1" in figure.layout.annotations[0].text


def test_prompts_and_replies_are_told_apart_without_colour() -> None:
    drawn = traces(run_charts.kl_curve(history(step(1, kl_prompt=0.1, kl_reply=0.2, validation_kl_reply=0.3)), 0.1))
    assert drawn["prompts"].line.dash != drawn["replies"].line.dash
    assert drawn["prompts, held out"].marker.symbol != drawn["replies, held out"].marker.symbol
    assert drawn["replies, held out"].y == (0.3,)


def test_held_out_numbers_say_that_they_will_come() -> None:
    before = run_charts.held_out_curve(history(step(1)), *HELD_OUT)
    assert "first look" in before.layout.annotations[0].text
    after = run_charts.held_out_curve(
        history(step(1), step(2, validation_fisher_ratio=0.7)), "validation_fisher_ratio", "Fisher ratio"
    )
    assert not after.layout.annotations
    assert (after.data[0].x, after.data[0].y) == ((2,), (0.7,))


def test_what_became_of_refusals() -> None:
    shares = {"validation_refusals_kept": 0.4, "validation_refusal_agreement": 0.9, "validation_broken_first": 0.1}
    seen = history(step(1), step(2, **shares))
    figure = run_charts.refusals_curve(seen)
    assert [trace.y for trace in figure.data] == [(0.4,), (0.9,), (0.1,), ()]
    assert len({trace.line.dash for trace in figure.data[:3]}) == 3, "told apart without colour"
    (least,) = figure.layout.shapes
    assert least.y0 == LEAST_REFUSALS_KEPT
    before = run_charts.refusals_curve(history(step(1)))
    assert "first look" in before.layout.annotations[0].text
    nothing = history(step(1, validation_broken_first=0.0))
    for figure in (
        run_charts.refusals_curve(nothing),
        run_charts.held_out_curve(nothing, "validation_refusal_log_prob", "nats"),
    ):
        assert "refuses none" in figure.layout.annotations[0].text
        assert not figure.layout.shapes


def test_how_likely_refusals_are_stands_beside_the_base() -> None:
    names = "validation_refusal_log_prob", "validation_base_refusal_log_prob"
    seen = history(step(4, **dict(zip(names, (-0.9, -0.2), strict=True))))
    drawn = traces(run_charts.held_out_curve(seen, names[0], "nats", names[1]))
    assert (drawn["tuned"].y, drawn["base"].y) == ((-0.9,), (-0.2,))
    assert drawn["tuned"].line.dash != drawn["base"].line.dash


def test_a_run_of_an_earlier_version_saw_no_refusals() -> None:
    assert history(step(1)).sees_refusals, "not yet"
    assert history(step(1), step(2, validation_kl_prompt=0.1, validation_broken_first=0.0)).sees_refusals
    assert not history(step(1), step(2, validation_kl_prompt=0.1)).sees_refusals


def test_nothing_yet_is_a_figure_too() -> None:
    empty = History()
    for figure in (
        run_charts.separation_curve(empty),
        run_charts.kl_curve(empty, 0.1),
        run_charts.held_out_curve(empty, *HELD_OUT),
        run_charts.refusals_curve(empty),
    ):
        assert figure.layout.xaxis.range == (0, 1.02)
