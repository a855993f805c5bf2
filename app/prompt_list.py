"""Prompts as lists: the selected ones, the hardest ones, and one in full beside its twin; the worst first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import state, text
from es2.charts import projection_chart
from es2.charts.frames import Margins, own_side, prompts_frame
from es2.prompts.prompt_set import LABEL_NAMES, PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float, Int


COLUMNS = ("prompt", "label", "side", "category", "split", "pair")
"""What no model may be called in a table, beside its margins."""
N_HARDEST = 15
MAX_IN_CARD = 4
"""Models whose margins are said in words, too."""
TABLE_HEIGHT = 640
ROW_HEIGHT = 64
"""Streamlit wraps the text of a cell in rows higher than four times the base font size."""
HEAD_HEIGHT = 40


def worst_first(prompts: PromptSet, rows: Int[np.ndarray, "row"], margins: Margins) -> Int[np.ndarray, "row"]:
    """`rows` sorted from the furthest on the wrong side to the furthest on the correct one."""
    deciding = list(margins.values())[-1]
    return rows[np.argsort(own_side(prompts, deciding)[rows], kind="stable")]


def selected_prompts(prompts: PromptSet, margins: Margins, *, height: int = TABLE_HEIGHT) -> None:
    """The selected prompts; with none, how to select, and the prompts that the probe misreads worst."""
    digest = prompts.texts_digest
    rows = worst_first(prompts, np.array(state.selection(digest), dtype=int), margins)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        if len(rows):
            noun = "prompt" if len(rows) == 1 else "prompts"
            st.subheader(f"{len(rows)} selected {noun}", anchor=False, width="content")
        else:
            st.subheader("Hardest prompts", anchor=False, width="content")
        st.button(
            "Clear selection",
            key="clear_selection",
            type="tertiary",
            disabled=not len(rows),
            on_click=state.select,
            args=((), digest),
        )
    if len(rows) == 0:
        st.caption(
            "Click a point, or take the lasso or the box and draw around several: they are listed here and stay "
            "selected when the layer changes. Until then, the test prompts that stand furthest on the wrong side."
        )
        rows = worst_first(prompts, np.flatnonzero(prompts.in_split("test")), margins)[:N_HARDEST]
    elif len(rows) == 1:
        card(prompts, int(rows[0]), margins)
    table(prompts, rows, margins, key="prompt_table", height=height, alt="The selected prompts")


def table(
    prompts: PromptSet,
    rows: Int[np.ndarray, "row"],
    margins: Margins,
    *,
    key: str,
    alt: str,
    height: int = TABLE_HEIGHT,
    more: Mapping[str, Float[np.ndarray, "row"]] | None = None,
) -> None:
    """The prompts of `rows` with their margins; `more` are further columns of numbers, one entry a row."""
    numbers = [*margins, *(more or {})]
    with st.container(key=key):  # a class to find it by: a table that selects nothing gets none
        st.dataframe(
            prompts_frame(prompts, rows, margins, more or {}),
            hide_index=True,
            height=min(height, ROW_HEIGHT * len(rows) + HEAD_HEIGHT),
            row_height=ROW_HEIGHT,
            column_config={
                "prompt": st.column_config.TextColumn("Prompt", width=236),
                "label": st.column_config.TextColumn("Label", width=70),
                "side": st.column_config.TextColumn("Side", width=62, help="Whether it is on its own label's side."),
                "category": st.column_config.TextColumn("Category", width=110),
                "split": st.column_config.TextColumn("Split", width=60),
                "pair": st.column_config.TextColumn("Pair", width=90),
            }
            | {
                name: st.column_config.NumberColumn(
                    name[:1].upper() + name[1:],
                    format="%+.4f",
                    width=72,
                    help="How far it moved towards its own side."
                    if name not in margins
                    else "Signed distance to the boundary, + on the harmful side.",
                )
                for name in numbers
            },
            alt=alt,
        )


def card(prompts: PromptSet, row: int, margins: Margins) -> None:
    """One prompt and its contrast twin, in full."""
    with st.container(border=True, key="prompt_card", gap="xsmall"):
        for shown in (row, *(twin for _, twin in projection_chart.twins_of(prompts, [row]))):
            name = LABEL_NAMES[int(prompts.labels[shown])]
            head = name if shown == row else f"its twin, {name}"
            sides = (
                f"{text.markdown(column)} {values[shown]:+.4f}, on the "
                f"{'correct' if own_side(prompts, values)[shown] > 0 else 'wrong'} side"
                for column, values in margins.items()
            )
            few = len(margins) <= MAX_IN_CARD  # the table has them all
            st.caption(" · ".join([f"**{head}**", *(sides if few else ())]))
            st.text(prompts.texts[shown], width="stretch")
