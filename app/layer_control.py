"""The control that steps through layers: buttons, a slider, and the keys P and N, the same on every page."""

from __future__ import annotations

import streamlit as st

from app import state, text
from app.state import Choice
from es2.analysis.results import Analysis


def with_layer(choice: Choice, analysis: Analysis, usual: int) -> Choice:
    """The choice with a layer that exists: the asked one, else `usual`."""
    n_layers = len(analysis.layers)
    if choice.layer is not None and choice.layer < n_layers:
        return choice
    if choice.layer is not None:
        sentence = f"This model has no layer {choice.layer}, only 0 to {n_layers - 1}; layer {usual} is shown."
        state.note(sentence)
        st.caption(f":material/info: {text.markdown(sentence)}")
    return state.settle(layer=usual)


def layer_control(layer: int, n_layers: int) -> None:
    """Previous, slider, next."""
    with st.container(horizontal=True, wrap=False, vertical_alignment="bottom", gap="small"):
        st.button(
            "",
            key="previous_layer",
            icon=":material/chevron_left:",
            help="Previous layer",
            shortcut="P",
            disabled=layer == 0,
            on_click=state.update,
            kwargs={"layer": layer - 1},
        )
        st.session_state["layer"] = layer
        st.slider(
            "Layer",
            0,
            max(1, n_layers - 1),
            key="layer",
            disabled=n_layers == 1,
            on_change=lambda: state.update(layer=st.session_state["layer"]),
        )
        st.button(
            "",
            key="next_layer",
            icon=":material/chevron_right:",
            help="Next layer",
            shortcut="N",
            disabled=layer == n_layers - 1,
            on_click=state.update,
            kwargs={"layer": layer + 1},
        )
