"""The comparison: what a fine-tune did to a model, the verdict first, then everything that leads to it.

A selection belongs to prompts: it is marked in every figure and kept from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import streamlit as st

from app import artifacts, compare_details, jobs_panel, position_map, prompt_list, state, text
from app.components import exports, other_layers
from app.components.plots import let_draw, linked, plot
from app.layer_control import layer_control, with_layer
from app.state import Choice
from app.view_controls import (
    VIEW_NAMES,
    axes_controls,
    choice_control,
    link_notes,
    others_toggle,
    tool_control,
    umap_offer,
    view_control,
)
from app.views.welcome import no_comparison
from es2.analysis.comparison import Comparison
from es2.analysis.projection import View
from es2.analysis.verdict import Verdict, behaviour_rule, rule
from es2.charts import compare_charts, pair_charts
from es2.workflow.runs import list_runs, open_run

ARRANGEMENT_NAMES = {"side": "Side by side", "overlay": "Overlay", "morph": "Morph"}
COLUMNS = (1.35, 1)
INTRODUCTION = (
    "Embedding Space Separation (ES2) is a short fine-tune that moves **harmful** and **harmless** prompts apart "
    "inside a language model, so that an attack has further to go, while a KL term holds what the model says to "
    "harmless ones. Every point is a prompt the fine-tune never saw: at the left in the model as it came, at the right "
    "after ES2. The word in the box says whether they stand further apart, or only seem to."
)
SELECTED_HEIGHT = 300


def page() -> None:
    """Render the page for the current choice, or what leads there."""
    link_notes()
    choice = state.current()
    comparison = artifacts.find_comparison(choice)
    if comparison is None:
        missing(choice)
        return
    choice = with_layer(choice, comparison.analysis, comparison.targets[-1])
    layer = choice.layer or 0
    verdicts = {at.layer: comparison.verdict(at.layer) for at in comparison.analysis.layers}
    # The pair is sent before what is above it: the browser shows things in the order in which they come.
    top = st.container(key="top")
    mapped = positions(choice, comparison, layer)
    above = st.container(key="margins" if mapped else "strips")
    controls = st.container(
        horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="pair_controls"
    )
    for place in (top, above, controls):
        place.space(1)  # unseen: only what holds something is put on the page, where style.css gives it room
    margins = artifacts.margins(comparison, layer)
    projection(choice, comparison, layer)
    let_draw()
    with controls:
        view_controls(choice, layer)
    with top:
        header(comparison, layer)
        if doubts := comparison.result.get("warnings"):
            st.warning("\n\n".join(text.markdown(str(sentence)) for sentence in doubts))
        summary(comparison, verdicts, layer)
    with above:
        strips(comparison, layer, mapped)
    with st.container(key="details"):
        left, right = st.columns(COLUMNS, gap="medium")
    with left:
        compare_details.distribution(comparison, margins)
    # Of one height whatever is selected, so that a click moves nothing below.
    with right, st.container(height=pair_charts.HISTOGRAM_HEIGHT, border=False, key="selected"):
        prompt_list.selected_prompts(
            comparison.prompts, compare_details.columns(comparison, margins), height=SELECTED_HEIGHT
        )
    compare_details.numbers(comparison, layer)
    compare_details.overview(comparison, verdicts, layer)
    compare_details.lists(comparison, margins)
    exports.page_exports(partial(compare_details.take_away, choice, comparison, layer, margins), comparison)
    n_shown = len(comparison.prompts) if choice.others else int(comparison.prompts.in_split("test").sum())
    others = partial(figures, choice, comparison, state.tool())
    other_layers.send_others(context(choice, comparison), layer, len(verdicts), 2 * n_shown, others)


# --------------------------------------------------------------------------------------------------- nothing to compare


def missing(choice: Choice) -> None:
    """Show why there is nothing to compare, and what leads there."""
    ended = [run for run in list_runs() if run.result() is not None]
    if choice.run is None and not ended:
        no_comparison(choice)
        return
    run = open_run(choice.run) if choice.run is not None else ended[0]
    title = text.markdown(artifacts.run_title(run))
    with st.container(width=820, key="no_comparison"):
        st.subheader(title, anchor=False)
        if run.is_active():
            st.markdown("This run is under way. Its comparison with base opens here when it is done.")
            jobs_panel.live_bar(run)
            return
        if run.result() is None:
            st.markdown(f"This run is {run.status()} and has left nothing to compare; resume it, or choose another.")
            jobs_panel.ending(run)
            return
        artifacts.prompts(run.config["prompts"])  # their error is the sentence to show
        st.markdown(
            "What this comparison needs is not on disk for these prompts and this position, perhaps since the prompts "
            "changed; it is computed from the kept weights."
        )
        config = compare_config(choice, run.id, run.config)
        jobs_panel.offer("prepare", config, "Compute the comparison", "prepare_comparison")


def compare_config(choice: Choice, run: str, config: Any) -> dict[str, str]:
    """The settings of a job that makes what the page looks for."""
    against = {"against": choice.against} if choice.against and choice.run else {}
    settings = {"model": config["model"], "prompts": config["prompts"], "position": choice.position}
    return settings | {"run": run} | against


# --------------------------------------------------------------------------------------------------------- all layers


def header(comparison: Comparison, layer: int) -> None:
    """What is compared, and the layer's control."""
    analysis, config, run = comparison.analysis, comparison.config, open_run(comparison.run)
    with st.container(key="header"):
        left, right = st.columns(COLUMNS, gap="medium", vertical_alignment="bottom")
    with left:
        what = (
            f"{comparison.names[0]} → {comparison.names[1]}" if comparison.is_of_two_runs else artifacts.run_title(run)
        )
        st.subheader(f"{text.markdown(comparison.base.model)} · {text.markdown(what)}", anchor=False)
        n_test = sum(analysis.n_prompts["test"].values())
        n_shown = int(comparison.prompts.in_split("test").sum())
        targets = ", ".join(map(str, comparison.targets))
        parts = [
            f"ES2 at {'layer' if len(comparison.targets) == 1 else 'layers'} {targets}",
            f"{config['objective']}, {config['method']}, {comparison.result['steps']} steps",
            f"prompts: {comparison.prompts.name}",
            f"numbers are of all {n_test:,} test prompts"
            + (f"; {n_shown:,} of them are drawn" if n_shown < n_test else ""),
        ]
        st.caption(" · ".join(text.markdown(part) for part in parts))
        text.how_read(comparison.base)
    with right:
        layer_control(layer, len(analysis.layers))
    if run.is_shipped:
        with st.container(horizontal=True, vertical_alignment="center", key="introduction"):
            st.markdown(INTRODUCTION, width="stretch")
            if st.button("Start your own", key="to_runs", icon=":material/model_training:"):
                state.go("runs")


def summary(comparison: Comparison, verdicts: dict[int, Verdict], layer: int) -> None:
    """The verdict in words and a sentence, on the run, its replies and the layer; the KLs on harmless prompts."""
    run = comparison.run_verdict
    with st.container(key="verdict", border=True, gap="xsmall"):
        st.markdown(f"**{text.markdown(comparison.outcome.capitalize())}.** **{text.markdown(run.reason)}**")
        for sentence in comparison.warnings:
            text.warn(sentence)
        if not comparison.is_of_two_runs and not comparison.warnings:
            st.markdown(text.markdown(comparison.behaviours[-1].reason))
        here = verdicts[layer]
        st.markdown(f"This layer: **{here.name}**. {text.markdown(here.reason)}")
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            st.caption(kl_words(comparison), width="stretch")
            with st.popover("How this word is chosen", type="tertiary"):
                rule_table(comparison, verdicts[layer].name)


def kl_words(comparison: Comparison) -> str:
    """What the fine-tune did to the logits of harmless test prompts, against its budget."""
    kl = comparison.kl
    if not kl:
        return "KL on harmless test prompts: not measured for this pair."
    budget = comparison.kl_budget
    over = [name for name, value in kl.items() if value > budget]
    parts = ", ".join(f"{value:.3f} on the {name}" for name, value in kl.items())
    against = f"over the budget of {budget:g} on the {' and the '.join(over)}" if over else f"budget {budget:g} each"
    return f"KL from base on harmless test prompts, nats per token: {parts}; {against}."


def rule_table(comparison: Comparison, current: str) -> None:
    """The table of verdicts with the thresholds in use; the row that gave this layer's word is bold."""
    st.markdown("The first row that holds, on 95 % intervals; a run has the gravest word of its target layers.")
    rows = _rows(rule(comparison.kl_budget), current)
    behaviour = "" if comparison.is_of_two_runs else comparison.behaviours[-1].name or ""
    st.markdown("\n".join(["| word | when |", "| --- | --- |", *rows]))
    st.markdown("What became of behaviour is read off the newest evaluation of the run, base against tuned.")
    st.markdown("\n".join(["| word | when |", "| --- | --- |", *_rows(behaviour_rule(), behaviour)]))


def _rows(rule: Mapping[str, str], current: str) -> list[str]:
    return [
        f"| **{name}** | **{text.markdown(when)}** |" if name == current else f"| {name} | {text.markdown(when)} |"
        for name, when in rule.items()
    ]


def positions(choice: Choice, comparison: Comparison, layer: int) -> bool:
    """The map of layers and positions, where several are analysed; returns whether it is there."""
    analyses = artifacts.compared_by_position(comparison, choice)
    drawn = position_map.figure(analyses, comparison.names, (layer, comparison.position), comparison.targets)

    def config(position: str) -> dict[str, str]:
        return compare_config(replace(choice, position=position), comparison.run, comparison.config)

    # Where no run is chosen, the newest that has the position is shown: with another position it stays this one.
    return position_map.show(drawn, analyses, config, run=comparison.run)


def strips(comparison: Comparison, layer: int, mapped: bool) -> None:
    """Accuracy, unless it is `mapped`, and margins of both models over layers; a click on either goes to a layer."""
    for key, draw, alt in (
        ("accuracy_strip", compare_charts.accuracy_strip, "Probe accuracy of both models over layers"),
        ("margin_strip", compare_charts.margin_strip, "The margins of both models over layers"),
    )[mapped:]:
        plot(
            draw(comparison.analysis, comparison.names, chosen=layer, targets=comparison.targets),
            key=key,
            on_pick=partial(state.pick_layer, key),
            alt=alt,
        )


# ---------------------------------------------------------------------------------------------------------- one layer


def view_controls(choice: Choice, layer: int) -> None:
    """Which layer it is, and in which view the prompts are shown."""
    st.subheader(f"Layer {layer}", anchor=False, width="content")
    others_toggle(choice)
    with st.popover("Axes", type="tertiary"):
        axes_controls(choice, "both")
    tool_control()
    choice_control(choice, "arrangement", state.ARRANGEMENTS, ARRANGEMENT_NAMES)
    view_control(choice)


def projection(choice: Choice, comparison: Comparison, layer: int) -> None:
    """The prompts under both models."""
    digest = comparison.prompts.texts_digest
    selected = state.selection(digest)
    plots = figures(choice, comparison, state.tool(), layer, selected)
    if not plots:
        config = compare_config(choice, comparison.run, comparison.config)
        umap_offer(config, artifacts.umap_seconds(comparison), height=pair_charts.PAIR_HEIGHT)
        return
    with st.container(key="pair"):
        linked(
            plots,
            key="linked_pair",
            height=pair_charts.PAIR_HEIGHT,
            selected=selected,
            on_select=lambda: state.pick_prompts("linked_pair", digest),
            name=f"es2-compare-layer-{layer}",
            alt=f"{VIEW_NAMES[choice.view]} of the prompts at layer {layer} under both models, coloured by label",
            context=context(choice, comparison),
        )
    view = fit(choice, comparison, layer)
    if view is not None and view.approximate:
        st.caption("Tuned points were placed into a map fitted on base alone, which is only roughly right.")


def fit(choice: Choice, comparison: Comparison, layer: int) -> View | None:
    """Where the prompts stand in the chosen view, in both models; None for UMAP coordinates that are not there."""
    return artifacts.view(comparison, layer, choice.view, fit_on=choice.fit_on, raw=choice.raw)


def figures(
    choice: Choice, comparison: Comparison, tool: str, layer: int, selected: Sequence[int] = ()
) -> list[exports.Figure]:
    """The prompts of one layer in the chosen view and arrangement; none where it has no coordinates."""
    view = fit(choice, comparison, layer)
    if view is None or view.tuned is None:
        return []
    return pair_charts.pair(
        view,
        comparison.prompts,
        margins=artifacts.margins(comparison, layer),
        names=comparison.names,
        arrangement=choice.arrangement,
        others=choice.others,
        selected=selected,
        tool=tool,
    )


def context(choice: Choice, comparison: Comparison) -> str:
    """What `figures` depend on besides the layer and the selection."""
    shown = (choice.view, choice.arrangement, choice.others, choice.fit_on, choice.raw, state.tool())
    return repr((comparison.key, comparison.names, *shown))
