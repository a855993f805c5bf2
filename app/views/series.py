"""The series: a base and its runs, checkpoints and imported adapters side by side, and their numbers by step.

All panels share one frame, and a selection is of prompts: what is marked in one panel is marked in all.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import artifacts, jobs_panel, prompt_list, state, text
from app.artifacts import Opened
from app.components import exports
from app.components.plots import linked, plot
from app.layer_control import layer_control, with_layer
from app.state import Choice
from app.view_controls import (
    VIEW_NAMES,
    axes_controls,
    choice_control,
    kept_buttons,
    link_notes,
    others_toggle,
    told_apart,
    tool_control,
)
from app.views.welcome import welcome
from es2.analysis.series import MAX_MEMBERS, VIEWS, Member, SeriesView, series_view
from es2.charts import canvas, frames, series_charts
from es2.report.glossary import BY_NAME
from es2.workflow.runs import list_runs
from es2.workflow.series import base_member, find_members, refusal

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float

COLUMNS = (1.35, 1)
N_SHOWN = 5
"""Of the sets there are, shown beside base before any is chosen: spread evenly, the last among them."""
FIRST = "A series sets fine-tunes and checkpoints of one model beside it, in one frame. The model itself comes first."
ALONE = (
    "There is nothing to set beside this model yet. What can stand here: its fine-tunes, adapters that were imported, "
    "and the checkpoints of a training of your own with the `RepresentationCallback` (docs/watching.md), captured on "
    "the same prompts."
)


def page() -> None:
    """Render the page for the current choice, or what leads there."""
    link_notes()
    choice = state.current()
    model = artifacts.model_name(choice.model)
    opened = artifacts.find(model, artifacts.prompts(choice.prompts), choice.position, choice.rendering)
    if opened is None:
        with st.container(width=820, key="series_first"):
            st.info(FIRST, icon=":material/info:")
        welcome(choice)
        return
    choice = with_layer(choice, opened.analysis, opened.analysis.best_layer)
    layer = choice.layer or 0
    offered = find(opened)
    header(opened, layer, len(offered))
    if not offered:
        alone()
        return
    chosen = choose(choice, opened, offered)
    members = analysed(opened, chosen)
    missing(choice, opened, [one for one in chosen if one.activations.key not in {m.activations.key for m in members}])
    names = names_of(members)
    strip(members, names, layer)
    view = fitted(choice, opened, members, layer)
    margins = margins_of(opened, members, layer)
    panels(choice, opened, names, view, margins, layer)
    st.subheader("By step", anchor=False)
    by_step(members, names, layer)
    table(members, names, layer)
    prompt_list.selected_prompts(opened.prompts, dict(zip(names, margins, strict=True)), height=360)
    exports.page_exports(partial(take_away, choice, opened, members, names, layer))


# ------------------------------------------------------------------------------------------------------ what is chosen


def find(opened: Opened) -> list[Member]:
    """The sets that fit beside base, read anew when a set or a run has changed."""
    sets = tuple((one.key, one.inode, one.runs) for one in artifacts.sets())
    runs = tuple((run.id, run.name, artifacts.result_stamp(run)) for run in list_runs())
    return _found(opened.base.key, opened.position, sets, runs, opened)


@st.cache_resource(max_entries=4, show_spinner=False)
def _found(key: str, position: str, sets: object, runs: object, _opened: Opened) -> list[Member]:
    return find_members(_opened.base, _opened.position)


def choose(choice: Choice, opened: Opened, offered: Sequence[Member]) -> list[Member]:
    """The box of what stands beside base, and what is chosen in it; a link's sets that do not fit are said to."""
    by_key = {member.activations.key: member for member in offered}
    for key in choice.series:
        if key not in by_key:
            other = next((one for one in artifacts.sets() if one.key == key), None)
            sentence = refusal(opened.base, other, opened.position) if other else f"There is no activation set {key}."
            st.caption(f":material/info: {text.markdown(sentence)}")
    usual = [offered[at] for at in sorted({*np.linspace(0, len(offered) - 1, min(N_SHOWN, len(offered))).astype(int)})]
    chosen = [key for key in by_key if key in choice.series] or [member.activations.key for member in usual]
    st.session_state["series_sets"] = chosen
    st.multiselect(
        "Beside base",
        list(by_key),
        key="series_sets",
        format_func=told_apart(by_key, lambda key: by_key[key].name),
        max_selections=MAX_MEMBERS - 1,
        help="Runs, imported adapters, and checkpoints that the RepresentationCallback captured: everything of this "
        "base, on these prompts, at this position.",
        on_change=_chosen,
    )
    return [member for key, member in by_key.items() if key in chosen]


def _chosen() -> None:
    state.update(series=tuple(st.session_state["series_sets"]))


def analysed(opened: Opened, chosen: Sequence[Member]) -> list[Member]:
    """Base and those of the chosen that have numbers."""
    members = [replace(base_member(opened.base), analysis=opened.analysis)]
    for member in chosen:
        kept, analysis = artifacts.beside(opened, member.activations)
        if analysis is not None:
            members.append(replace(member, activations=kept, analysis=analysis))
    return members


def names_of(members: Sequence[Member]) -> list[str]:
    """What the models are called, no two alike, and none as a column of the table of prompts."""
    taken: list[str | int] = [*prompt_list.COLUMNS, *range(len(members))]
    name = told_apart(taken, lambda one: one if isinstance(one, str) else members[one].name)
    return [name(at) for at in range(len(members))]


def missing(choice: Choice, opened: Opened, lacking: Sequence[Member]) -> None:
    """Offer to compute the numbers of sets that have none yet; their panels come with them."""
    if not lacking:
        return
    config = {
        "model": opened.base.model,
        "base": opened.base.key,
        "prompts": choice.prompts,
        "position": opened.position,
        "sets": [member.activations.key for member in lacking],
    }
    with st.container(border=True, key="series_missing"):
        called = ", ".join(member.name for member in lacking)
        st.markdown(f"Captured, without numbers yet: {text.markdown(called)}. No model is loaded for them.")
        noun = "1 set" if len(lacking) == 1 else f"{len(lacking)} sets"
        jobs_panel.offer("series", config, f"Compute the numbers of {noun}", "compute_series")


# ----------------------------------------------------------------------------------------------------- what is shown


def header(opened: Opened, layer: int, n_offered: int) -> None:
    """What it is a series of, and the layer's control."""
    with st.container(key="header"):
        left, right = st.columns(COLUMNS, gap="medium", vertical_alignment="bottom")
    with left:
        st.subheader(f"{text.markdown(opened.base.model)} · series", anchor=False)
        n_test = sum(opened.analysis.n_prompts["test"].values())
        st.caption(
            f"{n_offered} captured beside base · prompts: {text.markdown(opened.prompts.name)} · every number is of "
            f"the {n_test:,} prompts of the test split"
        )
    with right:
        layer_control(layer, len(opened.analysis.layers))


def alone() -> None:
    """Say what could stand here."""
    with st.container(width=820, key="series_alone"):
        st.info(ALONE, icon=":material/info:")
        if st.button("Start a fine-tune", key="to_runs", type="primary", icon=":material/model_training:"):
            state.go("runs")


def strip(members: Sequence[Member], names: Sequence[str], layer: int) -> None:
    """One number of all over layers; a click goes to a layer."""
    number = kept_buttons(
        "Number", series_charts.NUMBERS, "series_number", series_charts.NUMBERS[0], lambda one: BY_NAME[one].title
    )
    plot(
        series_charts.strip(members, names, number, chosen=layer),
        key="series_strip",
        on_pick=partial(state.pick_layer, "series_strip"),
        alt=f"{BY_NAME[number].title} of every model over layers",
    )


def kind_of(choice: Choice) -> str:
    """The chosen view; UMAP has no map of more than two models."""
    return choice.view if choice.view in VIEWS else VIEWS[0]


def fitted(choice: Choice, opened: Opened, members: Sequence[Member], layer: int) -> SeriesView:
    """Where the prompts stand under each model; kept for as long as nothing that decides it changes."""
    keys = tuple(str((member.activations.key, member.analysis and member.analysis.config)) for member in members)
    how = (kind_of(choice), choice.fit_on, choice.raw)
    return _fitted(opened.key, keys, layer, how, opened, members)


@st.cache_resource(max_entries=64, show_spinner=False)
def _fitted(
    key: tuple[str, ...],
    keys: tuple[str, ...],
    layer: int,
    how: tuple[str, str, bool],
    _opened: Opened,
    _members: Sequence[Member],
) -> SeriesView:
    kind, fit_on, raw = how
    return series_view(
        _members,
        _opened.prompts,
        layer,
        kind,
        position=_opened.position,
        fit_on="both" if fit_on == "both" else "base",
        raw=raw,
    )


def margins_of(opened: Opened, members: Sequence[Member], layer: int) -> list[Float[np.ndarray, "prompt"]]:
    """By model, the signed distance of each prompt to its own boundary."""
    separation = fitted(replace(state.current(), view="separation", raw=False, fit_on="base"), opened, members, layer)
    return [one[:, 0] for one in separation.points]


def panels(
    choice: Choice,
    opened: Opened,
    names: Sequence[str],
    view: SeriesView,
    margins: Sequence[Float[np.ndarray, "prompt"]],
    layer: int,
) -> None:
    """A panel for each model, with the controls above."""
    shown = replace(choice, view=kind_of(choice))
    with st.container(
        horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="series_controls"
    ):
        st.subheader(f"Layer {layer}", anchor=False, width="content")
        others_toggle(choice)
        with st.popover("Axes", type="tertiary"):
            axes_controls(shown, "all")
        tool_control()
        choice_control(shown, "view", VIEWS, VIEW_NAMES)
    digest = opened.prompts.texts_digest
    selected = state.selection(digest)
    linked(
        series_charts.panels(
            view, names, opened.prompts, margins, others=choice.others, selected=selected, tool=state.tool()
        ),
        key="series_panels",
        height=series_charts.PANEL_HEIGHT,
        selected=selected,
        on_select=partial(state.pick_prompts, "series_panels", digest),
        name=f"es2-series-layer-{layer}",
        alt=f"{VIEW_NAMES[view.kind]} of the prompts at layer {layer} under {len(names)} models, coloured by label",
        grid=True,
    )
    fit = "all models" if choice.fit_on == "both" else "base"
    x, y = view.axes
    st.caption(
        f"All panels have the same axes, fitted on {fit}. Right: {x[:1].lower() + x[1:]}. Up: {y[:1].lower() + y[1:]}."
    )


def by_step(members: Sequence[Member], names: Sequence[str], layer: int) -> None:
    """The numbers of the layer from step to step."""
    figures = step_figures(members, names, layer)
    for start in range(0, len(figures), 2):
        columns = st.columns(2, gap="medium")
        for column, (title, figure) in zip(columns, list(figures.items())[start : start + 2], strict=False):
            with column:
                plot(figure, key=f"series_step_{title}", alt=f"{title} by step at layer {layer}")
    note = "Intervals are 95 %, over resamples of prompt pairs. Lines begin at base, dashed as above."
    if "KL" in figures:
        note += " KL: filled on the prompts, open on the replies."
    st.caption(note)


def step_figures(members: Sequence[Member], names: Sequence[str], layer: int) -> dict[str, canvas.Figure]:
    """The charts by step, by title."""
    found = {BY_NAME[one].title: series_charts.by_step(members, names, layer, one) for one in series_charts.NUMBERS}
    kl = series_charts.kl_by_step(members, names)
    return found | ({"KL": kl} if kl is not None else {})


def table(members: Sequence[Member], names: Sequence[str], layer: int) -> None:
    """The numbers of the layer, a row for each model."""
    terms = [BY_NAME[one] for one in (*series_charts.NUMBERS, "norm_ratio")]
    heads = "".join(f'<th title="{html.escape(one.definition, quote=True)}">{one.title}</th>' for one in terms)
    rows = ""
    for member, name in zip(members, names, strict=True):
        numbers = [(term, member.layers[layer].numbers[term.name]) for term in terms]
        cells = "".join(f"<td>{term.value(one)}<small>{term.range(one)}</small></td>" for term, one in numbers)
        kl = ", ".join(f"{value:.3f}" for value in (member.kl or {}).values()) or "–"
        step = "–" if member.step is None else f"{member.step:,}"
        rows += f'<tr><th scope="row">{html.escape(name)}</th><td>{step}</td>{cells}<td>{kl}</td></tr>'
    st.html(
        '<div class="series-table"><table class="before-after"><thead><tr><th></th><th>step</th>'
        f"{heads}<th>KL prompt, reply</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def take_away(
    choice: Choice, opened: Opened, members: Sequence[Member], names: Sequence[str], layer: int
) -> tuple[dict[str, canvas.Figure], dict[str, pd.DataFrame]]:
    """The charts and the table of the page, to be downloaded."""
    figures = {
        f"{BY_NAME[one].title} of the series over layers": series_charts.strip(members, names, one, chosen=layer)
        for one in series_charts.NUMBERS
    }
    for title, figure in step_figures(members, names, layer).items():
        figures[f"{title} by step at layer {layer}"] = figure
    numbers = frames.numbers_frame([(name, member.layers) for name, member in zip(names, members, strict=True)])
    return figures, {"Numbers of all models and layers": numbers}
