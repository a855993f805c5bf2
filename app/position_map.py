"""The map of layers and positions in the place of the accuracy strip, where more than one position is analysed.

Positions are analysed one by one. Of those that are captured and not analysed the page says so, and a button has them
analysed in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from app import jobs_panel, state
from app.components.plots import plot
from app.view_controls import kept_buttons
from es2.analysis.results import Analysis
from es2.charts import canvas, position_chart

KEY = "position_map"
SHAPES = {"map": "Map of positions", "curve": "Curve with intervals"}

Config = Callable[[str], Mapping[str, Any]]


def figure(
    analyses: Mapping[str, Analysis | None], names: Sequence[str], chosen: tuple[int, str], marked: Sequence[int]
) -> canvas.Figure | None:
    """The map; None where fewer than two positions are analysed."""
    if sum(analysis is not None for analysis in analyses.values()) < 2:
        return None
    marked_as = "recommended targets" if len(names) == 1 else "target layers"
    return position_chart.position_map(analyses, names, chosen=chosen, marked=marked, marked_as=marked_as)


def show(
    drawn: canvas.Figure | None, analyses: Mapping[str, Analysis | None], config: Config, **with_position: Any
) -> bool:
    """Draw the map, on which a click chooses both, unless the curve is wanted; returns whether it is there.

    Args:
        drawn: the figure, if there is one.
        analyses: by captured position; None where there is no analysis.
        config: returns the settings of the job that analyses a position.
        with_position: is taken with another position.
    """
    missing = [position for position, analysis in analyses.items() if analysis is None]
    if drawn is None and not missing:
        return False
    with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="positions"):
        is_map = drawn is not None and _shape() == "map"
        if missing:
            _offer(missing, config, "Analyse" if drawn is not None else "Analyse, for a map of layers and positions")
    if drawn is not None and is_map:
        # Of its height at once, so that what is below does not jump when the browser has drawn it.
        with st.container(height=drawn["layout"]["height"], border=False, key="position_map_room"):
            plot(
                drawn,
                key=KEY,
                on_pick=partial(state.pick_cell, KEY, list(analyses), **with_position),
                alt="Probe accuracy at every layer and position; a click chooses both",
            )
    return is_map


def _shape() -> str:
    return str(kept_buttons("Accuracy", list(SHAPES), "accuracy_as", "map", SHAPES.__getitem__))


def _offer(missing: Sequence[str], config: Config, label: str) -> None:
    """Say which positions are not analysed, how their last jobs ended, and the button that starts a job for each."""
    jobs = [job for position in missing if (job := jobs_panel.latest("prepare", config(position))) is not None]
    under_way = any(job.is_active() for job in jobs)
    words = ", ".join(position_chart.position_words(position).lower() for position in missing)
    st.caption(f"{'Being analysed' if under_way else 'Captured and not analysed'}: {words}.", width="content")
    if under_way:
        return
    if st.button(label, key="analyse_positions", type="tertiary", icon=":material/play_arrow:"):
        for position in missing:
            jobs_panel.ensure("prepare", config(position))
        st.rerun()
    for job in jobs:
        jobs_panel.ending(job)
