"""The figure of a film: what each frame holds, and that a page with it needs nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from es2.analysis.film import FilmView
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.report.film import film_caption, film_figure, losses
from es2.report.page import figure_html
from es2.report.palette import COLOURS, SYMBOLS

STEPS = (0, 4, 8)
LABELS = np.array([HARMFUL, HARMLESS, HARMFUL, HARMLESS, HARMLESS], dtype=np.int8)
LOSSES = ([1, 2, 3], [2.0, None, 1.0])


def view_of(n_layers: int = 2) -> FilmView:
    rng = np.random.default_rng(0)
    return FilmView(
        steps=STEPS,
        layers=tuple(range(10, 10 + n_layers)),
        labels=LABELS,
        texts=("<b>force</b> $x$ the lock", "oil it", None, "paint it", "sell it"),
        points=rng.normal(size=(len(STEPS), n_layers, len(LABELS), 2)),
        lengths=np.linspace(1, 2, len(STEPS) * n_layers).reshape(len(STEPS), n_layers),
        numbers=(
            {"mean_difference_margin": 0.1, "kl_prompt": 0.0},
            {"mean_difference_margin": 0.3},
            {"mean_difference_margin": 0.5, "kl_prompt": 0.2},
        ),
        raw=False,
    )


def named(figure: go.Figure, name: str) -> list[int]:
    return [place for place, trace in enumerate(figure.data) if trace.name == name]


def test_every_frame_moves_both_clouds_and_marks_its_moment() -> None:
    view = view_of()
    figure = go.Figure(film_figure(view, LOSSES, 0.1))  # plotly checks every name and value
    assert [frame.name for frame in figure.frames] == ["0", "4", "8"]
    for at, frame in enumerate(figure.frames):
        moved = dict(zip(frame.traces, frame.data, strict=True))
        for label, name in ((HARMFUL, "harmful"), (HARMLESS, "harmless")):
            for layer, place in enumerate(named(figure, name)):
                np.testing.assert_allclose(moved[place].x, view.points[at, layer, label == LABELS, 0], atol=1e-4)
                np.testing.assert_allclose(moved[place].y, view.points[at, layer, label == LABELS, 1], atol=1e-4)
        for place in named(figure, "moment"):
            assert moved[place].x == (STEPS[at], STEPS[at])
        texts = [moved[place].text[0] for place in named(figure, "length")]
        assert texts == [f"length ×{length:.2f} " for length in view.lengths[at]]
        assert len(moved) == 2 * 3 + 3, "nothing else moves"


def test_the_frame_stays_while_the_points_move() -> None:
    view = view_of()
    figure = go.Figure(film_figure(view, LOSSES, 0.1))
    for layer, (x, y) in enumerate((("xaxis", "yaxis"), ("xaxis2", "yaxis2"))):
        for axis, number in ((x, 0), (y, 1)):
            low, high = figure.layout[axis].range
            assert low < view.points[:, layer, :, number].min()
            assert high > view.points[:, layer, :, number].max()
    assert "Layer 10: along base's mean difference" in figure.layout.xaxis.title.text
    assert "principal component" in figure.layout.yaxis.title.text


def test_curves_hold_what_was_measured_and_the_budget() -> None:
    figure = go.Figure(film_figure(view_of(), LOSSES, 0.1, n_steps=16))
    curves = {trace.name: trace for trace in figure.data}
    assert (curves["loss"].x, curves["loss"].y) == ((1, 2, 3), (2.0, None, 1.0))
    assert (curves["KL of prompts"].x, curves["KL of prompts"].y) == (STEPS, (0.0, None, 0.2))
    assert curves["mean-difference margin"].y == (0.1, 0.3, 0.5)
    assert figure.layout.shapes[0].y0 == 0.1
    assert all(figure.layout[f"xaxis{number}"].range[1] > 16 for number in (3, 4, 5)), "the whole run from the start"
    assert curves["KL of prompts"].line.dash != curves["KL of replies"].line.dash


def test_it_begins_at_the_base_or_of_a_run_under_way_at_its_end() -> None:
    for at_end, at in ((False, 0), (True, 2)):
        figure = go.Figure(film_figure(view_of(), LOSSES, 0.1, at_end=at_end))
        assert figure.layout.sliders[0].active == at
        moved = dict(zip(figure.frames[at].traces, figure.frames[at].data, strict=True))
        assert all(figure.data[place].x == trace.x for place, trace in moved.items() if trace.x is not None)


def test_play_pause_and_a_stop_for_every_step() -> None:
    layout = go.Figure(film_figure(view_of(), LOSSES, 0.1)).layout
    assert [button.label for button in layout.updatemenus[0].buttons] == ["Play", "Pause"]
    assert [step.args[0] for step in layout.sliders[0].steps] == [("0",), ("4",), ("8",)]
    jump = layout.sliders[0].steps[0].args[1]
    assert jump["transition"]["duration"] > 0, "or plotly leaves points at the end of the movement that it interrupts"


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_plots_of_any_number_of_layers_do_not_overlap(n_layers: int) -> None:
    layout = go.Figure(film_figure(view_of(n_layers), LOSSES, 0.1)).layout
    boxes = []
    for number in range(1, n_layers + 4):
        suffix = "" if number == 1 else str(number)
        boxes.append((layout[f"xaxis{suffix}"].domain, layout[f"yaxis{suffix}"].domain))
    for place, ((left, right), (low, high)) in enumerate(boxes):
        assert 0 <= left < right <= 1.0001
        assert -1e-9 <= low < high <= 1
        for (other_left, other_right), (other_low, other_high) in boxes[:place]:
            beside = right <= other_left or other_right <= left
            above = high <= other_low or other_high <= low
            assert beside or above


def test_hover_shows_the_prompt_and_no_markup_of_it() -> None:
    figure = go.Figure(film_figure(view_of(), LOSSES, 0.1))
    clouds = [figure.data[place] for place in named(figure, "harmful")]
    assert clouds[0].hovertext == (
        "&lt;b&gt;force&lt;/b&gt; &#36;x&#36; the lock",
        "a prompt that the prompt set does not hold any more",
    )
    assert clouds[0].marker.color == COLOURS[HARMFUL]
    assert clouds[0].marker.symbol == SYMBOLS[HARMFUL]


def test_a_run_that_logged_nothing_yet_has_a_figure_too() -> None:
    bare = replace(view_of(), numbers=({}, {}, {}), points=np.zeros_like(view_of().points))
    assert go.Figure(film_figure(bare, ([], []), 0.1)).frames


def test_the_caption_says_what_the_axes_are() -> None:
    said = film_caption(view_of(), 8)
    for words in ("mean-difference direction", "principal component", "own scale", "step 8 were kept"):
        assert words in said
    assert "own units" in film_caption(replace(view_of(), raw=True, n_lost=2))
    assert "2 damaged frames are left out" in film_caption(replace(view_of(), n_lost=2))


def test_losses_forget_what_a_killed_process_did_later() -> None:
    events = [{"stage": "finetune", "done": step, "loss": float(step)} for step in (1, 2, 3, 2)]
    assert losses([{"event": "status"}, {"stage": "base", "done": 1}, *events]) == ([1, 2], [1.0, 2.0])


def test_a_file_of_its_own_holds_the_frames() -> None:
    page = figure_html(film_figure(view_of(), LOSSES, 0.1), "Film of <one>", "Lengths & axes.")
    assert "Lengths &amp; axes." in page
    assert "Film of &lt;one&gt;" in page
    data = page.split("const FIGURES = ", 1)[1]
    found, _ = json.JSONDecoder().raw_decode(data)
    assert [frame["name"] for frame in found["figure-1"]["frames"]] == ["0", "4", "8"]
    assert "http" not in page.split("const FIGURES = ", 1)[1].split("};", 1)[0]
