"""What several pages share: widgets that keep what was chosen, an introduction, a table of numbers."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import streamlit as st

from app import jobs_panel, state, text
from app.state import Choice
from es2.charts import projection_chart
from es2.report.glossary import Term

VIEW_NAMES = {"separation": "Separation", "pca": "PCA", "umap": "UMAP"}
TOOL_ICONS = {"click": ":material/arrow_selector_tool:", "lasso": ":material/lasso_select:", "box": ":material/select:"}


def link_notes() -> None:
    """Show what was wrong with the link that the page was opened with."""
    for sentence in state.notes():
        st.caption(f":material/info: {text.markdown(sentence)}")


def kept_choice(label: str, options: Sequence[Any], key: str, usual: Any, widget: Any, **arguments: Any) -> Any:
    """What is chosen in a widget that keeps the last choice, as long as it is among the options."""
    kept = state.habit(key, usual)
    st.session_state[key] = kept if kept in options else usual
    widget(label, options, key=key, on_change=lambda: state.take_habit(key, st.session_state[key]), **arguments)
    return st.session_state[key]


def told_apart(options: Iterable[Any], name: Callable[[Any], str]) -> Callable[[Any], str]:
    """`name`, with a number behind what was called the same before: of such options Streamlit takes the last one."""
    names: dict[Any, str] = {}
    counts: Counter[str] = Counter()
    for option in options:
        called = name(option)
        counts[called] += 1
        names[option] = f"{called} ({counts[called]})" if counts[called] > 1 else called
    return names.__getitem__


def kept_buttons(
    label: str,
    options: Sequence[Any],
    key: str,
    usual: Any,
    format_func: Callable[[Any], str],
    help: str | None = None,
) -> Any:
    """As `kept_choice`, in a row of buttons without a visible label."""
    how = {"format_func": format_func, "help": help, "required": True, "label_visibility": "collapsed"}
    return kept_choice(label, options, key, usual, st.segmented_control, **how)


def others_toggle(choice: Choice) -> None:
    """The switch for the prompts of the probe split."""
    st.session_state["others"] = choice.others
    st.toggle(
        "Probe split",
        key="others",
        help="Show the prompts on which the probe was fitted too, as hollow markers. With fewer prompts than "
        "dimensions a probe separates its own prompts perfectly, so only test says how good it is.",
        on_change=lambda: state.update(others=st.session_state["others"]),
    )


def tool_control() -> None:
    """The buttons for what a press of the mouse does."""
    kept_buttons("Select by", list(projection_chart.TOOLS), "tool", state.tool(), TOOL_ICONS.__getitem__)


def view_control(choice: Choice) -> None:
    """The buttons for which plane is shown."""
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


def axes_controls(choice: Choice, models: str) -> None:
    """What lengths are measured in, and what the axes are fitted on: base, or `models` (both, all) of those shown."""
    st.session_state["raw"] = choice.raw
    st.toggle(
        "Raw lengths",
        key="raw",
        disabled=choice.view == "umap",
        help="Draw in the models' own units instead of dividing each by the length of its embeddings. A model "
        "whose residual stream was merely inflated looks better separated then.",
        on_change=lambda: state.update(raw=st.session_state["raw"]),
    )
    st.session_state["fit_on"] = choice.fit_on == "both"
    st.toggle(
        f"Fit on {models}",
        key="fit_on",
        disabled=choice.view == "umap",
        help=f"Fit the principal components on the prompts under {models} models rather than under base alone.",
        on_change=lambda: state.update(fit_on="both" if st.session_state["fit_on"] else "base"),
    )


def introduction(title: str, about: str, steps: Sequence[tuple[str, str]]) -> None:
    """A page's heading, a sentence or two, and steps beside each other: what each is called, what happens there."""
    st.header(title, anchor=False)
    st.markdown(about)
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


def umap_offer(config: Mapping[str, str], seconds: float, *, height: int) -> None:
    """Say what UMAP needs, and start its job or show how far it is; `height` is that of the chart it replaces."""
    with st.container(border=True, height=height, key="umap_missing", vertical_alignment="center"):
        st.markdown("**UMAP is computed once for all layers and kept on disk.**")
        st.markdown(
            "It places prompts that are near each other in the model's space near each other in the plane. That "
            "takes a while, so it runs in the background; the other views stay usable meanwhile."
        )
        label = f"Compute UMAP for all layers (about {text.duration(seconds)})"
        jobs_panel.offer("project", config, label, "compute_umap", icon=None)
