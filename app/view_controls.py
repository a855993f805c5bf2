"""The controls above a projection, the same on every page: what is shown, how it is drawn, how points are selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from app import state
from app.charts import projection_chart
from app.state import Choice

VIEW_NAMES = {"separation": "Separation", "pca": "PCA", "umap": "UMAP"}
TOOL_ICONS = {"click": ":material/arrow_selector_tool:", "lasso": ":material/lasso_select:", "box": ":material/select:"}


def others_toggle(choice: Choice) -> None:
    """Whether the prompts of the probe split are shown too."""
    st.session_state["others"] = choice.others
    st.toggle(
        "Probe split",
        key="others",
        help="Show the prompts on which the probe was fitted too, as hollow markers. With fewer prompts than "
        "dimensions a probe separates its own prompts perfectly, so only test says how good it is.",
        on_change=lambda: state.update(others=st.session_state["others"]),
    )


def tool_control() -> None:
    """What a press of the mouse does."""
    st.session_state["tool"] = state.tool()
    st.segmented_control(
        "Select by",
        list(projection_chart.TOOLS),
        key="tool",
        format_func=TOOL_ICONS.__getitem__,
        required=True,
        label_visibility="collapsed",
        on_change=lambda: state.take_tool(st.session_state["tool"]),
    )


def view_control(choice: Choice) -> None:
    """Which plane is shown."""
    choice_control(choice, "view", state.VIEWS, VIEW_NAMES)


def choice_control(choice: Choice, name: str, options: Sequence[str], names: Mapping[str, str]) -> None:
    """One field of the choice as a row of buttons, under the words in `names`."""
    st.session_state[name] = getattr(choice, name)
    st.segmented_control(
        name.capitalize(),
        options,
        key=name,
        format_func=names.__getitem__,
        required=True,
        label_visibility="collapsed",
        on_change=lambda: state.update(**{name: st.session_state[name]}),
    )
