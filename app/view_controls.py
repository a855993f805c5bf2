"""What several pages have alike: the controls above a projection, the steps of an introduction, a table of numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

import streamlit as st

from app import state
from app.charts import projection_chart
from app.state import Choice
from es2.report.glossary import Term

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
        on_change=lambda: state.take_habit("tool", st.session_state["tool"]),
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


def step_cards(steps: Sequence[tuple[str, str]]) -> None:
    """Steps beside each other: what each is called, and what happens there."""
    for column, (name, what) in zip(st.columns(len(steps), gap="medium"), steps, strict=True):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{name}**  \n{what}")


def numbers_table(heads: Sequence[str], rows: Iterable[tuple[Term, Sequence[str]]]) -> None:
    """Numbers of two models: a row for each term, with cells of HTML; raw numbers are paler."""
    head = "".join(f"<th>{html.escape(word)}</th>" for word in ("", *heads, "change", ""))
    body = "".join(_row(term, cells) for term, cells in rows)
    st.html(f'<table class="before-after"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def _row(term: Term, cells: Sequence[str]) -> str:
    tip = html.escape(term.definition, quote=True)
    first = f'<th scope="row" title="{tip}">{html.escape(term.title)}</th>'
    kind = "" if term.scale_free else ' class="raw"'
    return f"<tr{kind}>{first}{''.join(f'<td>{one}</td>' for one in cells)}</tr>"
