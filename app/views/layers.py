"""The base view: every layer at a glance, one layer in detail, and the prompts behind the points.

A selection belongs to prompts, not to a chart: it is kept when the layer or the view changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import artifacts, position_map, prompt_list, state, text
from app.artifacts import Opened
from app.components import exports, other_layers
from app.components.plots import linked, plot
from app.layer_control import layer_control, with_layer
from app.state import Choice
from app.view_controls import VIEW_NAMES, link_notes, others_toggle, tool_control, umap_offer, view_control
from app.views.welcome import welcome
from es2.analysis.results import Analysis, LayerNumbers
from es2.charts import canvas, frames, projection_chart
from es2.charts import layer_charts as charts
from es2.report.glossary import BY_NAME, TERMS, TWO_MARGINS

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float

COLUMNS = (1.35, 1)
COST_CURVES = {
    "cost_accuracy": (charts.COST_LINES, "accuracy, AUROC"),
    "cost_margin": (charts.COST_MARGINS, "scale-free units"),
}


def page() -> None:
    """Render the page for the current choice, or what leads there."""
    link_notes()
    choice = state.current()
    model = artifacts.model_name(choice.model)
    opened = artifacts.find(model, artifacts.prompts(choice.prompts), choice.position, choice.rendering)
    if opened is None:
        welcome(choice)
        return
    choice = with_layer(choice, opened.analysis, opened.analysis.best_layer)
    layer = choice.layer or 0
    (margins,) = artifacts.margins(opened, layer)
    header(opened, layer)
    strip(choice, opened, layer)
    with st.container(key="details"):
        left, right = st.columns(COLUMNS, gap="medium")
    with left:
        projection(choice, opened, layer)
        distribution(choice, opened, margins)
    with right:
        prompt_list.selected_prompts(opened.prompts, {"margin": margins})
    numbers(opened.analysis.layers[layer])
    regularisation(opened.analysis.layers[layer])
    exports.page_exports(partial(take_away, choice, opened, layer, margins))
    n_shown = len(opened.prompts) if choice.others else int(opened.prompts.in_split("test").sum())
    others = partial(figures, choice, opened, state.tool())
    other_layers.send_others(context(choice, opened), layer, len(opened.analysis.layers), n_shown, others)


# --------------------------------------------------------------------------------------------------------- all layers


def header(opened: Opened, layer: int) -> None:
    """What is shown, and the layer's own control for the keyboard."""
    activations, prompts = opened.base, opened.prompts
    n_layers = len(opened.analysis.layers)
    with st.container(key="header"):
        left, right = st.columns(COLUMNS, gap="medium", vertical_alignment="bottom")
    with left:
        st.subheader(text.markdown(activations.model), anchor=False)
        test = opened.analysis.n_prompts["test"]
        st.caption(
            f"{len(prompts):,} prompts ({text.markdown(prompts.name)}) · {n_layers} layers · "
            f"{activations.d_model:,} dimensions · every number is of the {sum(test.values()):,} prompts of the "
            f"test split, probes are fitted on {sum(opened.analysis.n_prompts['probe'].values()):,} others"
        )
        text.how_read(activations)
    with right:
        layer_control(layer, n_layers)


def strip(choice: Choice, opened: Opened, layer: int) -> None:
    """Accuracy and margins over layers, two charts with aligned axes; a click on either goes to a layer.

    Where several positions are analysed, accuracy is a map of layers and positions.
    """
    analysis, analyses = opened.analysis, artifacts.by_position(opened)
    mapped = position_map.show(
        positions(opened, analyses, layer), analyses, lambda one: artifacts.job_config(replace(choice, position=one))
    )
    for key, draw, alt in (
        ("accuracy_strip", charts.accuracy_strip, "Probe accuracy over layers with its interval and controls"),
        ("margin_strip", charts.margin_strip, "The two margins over layers with their intervals"),
    )[mapped:]:
        plot(
            draw(analysis.layers, chosen=layer, recommended=analysis.recommended),
            key=key,
            on_pick=partial(state.pick_layer, key),
            alt=alt,
        )
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="recommendation"):
        st.markdown("**Recommended target layers**", width="content")
        for target in analysis.recommended:
            st.button(
                f"{target}",
                key=f"go_to_{target}",
                help=f"Go to layer {target}",
                disabled=target == layer,
                on_click=state.update,
                kwargs={"layer": target},
            )
    st.caption(text.markdown(analysis.reason))


def positions(opened: Opened, analyses: Mapping[str, Analysis | None], layer: int) -> canvas.Figure | None:
    """The map of layers and positions, where several are analysed."""
    return position_map.figure(analyses, [opened.base.model], (layer, opened.position), opened.analysis.recommended)


# ---------------------------------------------------------------------------------------------------------- one layer


def projection(choice: Choice, opened: Opened, layer: int) -> None:
    """The prompts in a plane, with the controls above."""
    prompts = opened.prompts
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader(f"Layer {layer}", anchor=False, width="content")
        others_toggle(choice)
        tool_control()
        view_control(choice)
    selected = state.selection(prompts.texts_digest)
    plots = figures(choice, opened, state.tool(), layer, selected)
    if not plots:
        umap_offer(
            artifacts.job_config(choice), artifacts.umap_seconds(opened), height=projection_chart.PROJECTION_HEIGHT
        )
        return
    linked(
        plots,
        key="projection",
        height=projection_chart.PROJECTION_HEIGHT,
        selected=selected,
        on_select=partial(state.pick_prompts, "projection", prompts.texts_digest),
        name=f"es2-layer-{layer}",
        alt=f"{VIEW_NAMES[choice.view]} of the prompts at layer {layer}, coloured by label",
        context=context(choice, opened),
    )


def figures(choice: Choice, opened: Opened, tool: str, layer: int, selected: Sequence[int] = ()) -> list[canvas.Figure]:
    """The prompts of one layer in the chosen view, as one figure; none where it has no coordinates."""
    view = artifacts.view(opened, layer, choice.view)
    if view is None:
        return []
    (margins,) = artifacts.margins(opened, layer)
    return [
        projection_chart.projection(
            view, opened.prompts, margins=margins, others=choice.others, selected=selected, tool=tool
        )
    ]


def context(choice: Choice, opened: Opened) -> str:
    """What `figures` depend on besides the layer and the selection."""
    return repr((opened.key, choice.view, choice.others, state.tool()))


def distribution(choice: Choice, opened: Opened, margins: Float[np.ndarray, "prompt"]) -> None:
    """How the test prompts spread along the separating direction, on the separation view's own axis."""
    plot(
        histogram(choice, opened, margins),
        key="histogram",
        alt="Histogram of the test prompts along the separating direction, by label",
    )


def histogram(choice: Choice, opened: Opened, margins: Float[np.ndarray, "prompt"]) -> canvas.Figure:
    """The margins of the test prompts, on the axis that the projection has."""
    test = opened.prompts.in_split("test")
    limit = canvas.margin_limit(margins if choice.others else margins[test])
    return charts.histogram(margins[test], opened.prompts.labels[test], limit=limit)


def numbers(layer: LayerNumbers) -> None:
    """The layer's numbers with their intervals, scale-free ones first."""
    st.subheader("Numbers of this layer", anchor=False)
    for scale_free in (True, False):
        if not scale_free:
            st.caption("Raw lengths, in the model's own units: they also grow when the residual stream is inflated.")
        with st.container(horizontal=True, gap="small", key="numbers" if scale_free else "raw_numbers"):
            for term in TERMS:
                if term.scale_free is scale_free and term.name in layer.numbers:
                    number = layer.numbers[term.name]
                    st.metric(
                        term.title,
                        term.value(number),
                        delta=term.range(number),
                        delta_color="off",
                        delta_arrow="off",
                        help=term.definition,
                        width=172,
                    )


def regularisation(layer: LayerNumbers) -> None:
    """The main numbers over the probe's C, and why there are two margins."""
    with st.expander("How much depends on the probe: regularisation, and the two margins", key="by_C"):
        st.markdown(TWO_MARGINS)
        for column, (key, (names, title)) in zip(st.columns(2, gap="medium"), COST_CURVES.items(), strict=True):
            with column:
                figure = charts.cost_curve(layer.by_C, names, chosen=layer.C, title=title)
                plot(figure, key=key, alt=f"{title} over C")
        st.caption(
            f"The line marks C = {layer.C:g}, chosen by cross-validated log-loss inside the probe split"
            + (f" ({layer.log_loss:.3f} nats there)" if layer.log_loss is not None else "")
            + f". {BY_NAME['margin_mean'].title} and accuracy are of the test split, with 95 % intervals."
        )


def take_away(
    choice: Choice, opened: Opened, layer: int, margins: Float[np.ndarray, "prompt"]
) -> tuple[dict[str, canvas.Figure], dict[str, pd.DataFrame]]:
    """The charts and tables of the page, to be downloaded."""
    analysis, at = opened.analysis, opened.analysis.layers[layer]
    strips = {"Probe accuracy over layers": charts.accuracy_strip, "Margins over layers": charts.margin_strip}
    found = {
        name: make(analysis.layers, chosen=layer, recommended=analysis.recommended) for name, make in strips.items()
    }
    if drawn := positions(opened, artifacts.by_position(opened), layer):
        found["Probe accuracy by layer and position"] = drawn
    for one in figures(choice, opened, state.tool(), layer):
        found[f"{VIEW_NAMES[choice.view]} at layer {layer}"] = one
    found[f"Distribution at layer {layer}"] = histogram(choice, opened, margins)
    for names, title in COST_CURVES.values():
        found[f"Over C at layer {layer}, {title}"] = charts.cost_curve(at.by_C, names, chosen=at.C, title=title)
    everyone = frames.prompts_frame(opened.prompts, np.arange(len(opened.prompts)), {"margin": margins}, {})
    numbers_of_all = frames.numbers_frame([(opened.base.model, analysis.layers)])
    return found, {f"Prompts at layer {layer}": everyone, "Numbers of all layers": numbers_of_all}
