"""The comparison: what a fine-tune did to a model, the word for it first, then everything that leads to the word.

The order is the order of doubt. A verdict and its reason; all layers before and after; the prompts of one layer under
both models in one frame; the numbers behind the word with what changed beyond chance; and the prompts that moved most
or stand on the wrong side. A selection belongs to prompts: it is marked in every figure and kept from layer to layer.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from app import artifacts, jobs_panel, prompt_list, state, text
from app.charts import compare_charts
from app.charts.compare_charts import Margins
from app.components import exports, other_layers
from app.components.plots import let_draw, linked, plot
from app.layer_control import layer_control, with_layer
from app.state import Choice
from app.umap_offer import umap_offer
from app.view_controls import VIEW_NAMES, choice_control, others_toggle, tool_control, view_control
from app.views.welcome import no_comparison
from es2.analysis.comparison import Comparison
from es2.analysis.projection import View
from es2.analysis.results import LayerNumbers
from es2.analysis.verdict import Verdict, rule
from es2.report.glossary import BY_NAME, TWO_MARGINS, Term
from es2.store.store import SHOWCASE
from es2.workflow.runs import list_runs, open_run

if TYPE_CHECKING:
    import pandas as pd

ARRANGEMENT_NAMES = {"side": "Side by side", "overlay": "Overlay", "morph": "Morph"}
COLUMNS = (1.35, 1)
NUMBERS = (
    "margin_mean",
    "mean_difference_margin",
    "fisher_ratio",
    "relative_distance",
    "probe_accuracy",
    "norm_ratio",
    "direction_cosine",
    "effective_rank",
    "rest_ratio",
    "centroid_distance",
)
N_MOVERS = 20
INTRODUCTION = (
    "Embedding Space Separation (ES2) is a short fine-tune that moves **harmful** and **harmless** prompts apart "
    "inside a language model, so that an attack has further to go, while a KL term holds what the model says to "
    "harmless ones. Every point is a prompt the fine-tune never saw: at the left in the model as it came, at the right "
    "after ES2. The word in the box says whether they stand further apart, or only seem to."
)
LIST_HEIGHT = 520
SELECTED_HEIGHT = 300


def page() -> None:
    """Draw the page for the current choice, or what leads there."""
    for sentence in state.notes():
        st.caption(f":material/info: {text.markdown(sentence)}")
    choice = state.current()
    comparison = artifacts.find_comparison(choice)
    if comparison is None:
        missing(choice)
        return
    choice = with_layer(choice, comparison.analysis, comparison.targets[-1])
    layer = choice.layer or 0
    verdicts = {at.layer: comparison.verdict(at.layer) for at in comparison.analysis.layers}
    # The pair is sent before what stands above it: it is what a person who opens the page or goes to another layer
    # waits for, and the browser draws things in the order in which they come.
    top, above = st.container(key="top"), st.container(key="strips")
    controls = st.container(
        horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="pair_controls"
    )
    for place in (top, above, controls):
        place.space(1)  # unseen: only what holds something is put on the page, where style.css gives it room
    margins = artifacts.pair_margins(comparison, layer)
    projection(choice, comparison, layer)
    let_draw()
    with controls:
        view_controls(choice, layer)
    with top:
        header(comparison, layer)
        summary(comparison, verdicts, layer)
    with above:
        strips(comparison, layer)
    with st.container(key="details"):
        left, right = st.columns(COLUMNS, gap="medium")
    with left:
        distribution(comparison, margins)
    # Of one height whatever is selected, so that a click moves nothing below.
    with right, st.container(height=compare_charts.HISTOGRAM_HEIGHT, border=False, key="selected"):
        prompt_list.selected_prompts(comparison.prompts, columns(comparison, margins), height=SELECTED_HEIGHT)
    numbers(comparison, layer)
    overview(comparison, verdicts, layer)
    lists(comparison, margins)
    exports.page_exports(partial(take_away, choice, comparison, layer, margins), comparison)
    n_shown = len(comparison.prompts) if choice.others else int(comparison.prompts.in_split("test").sum())
    others = partial(figures, choice, comparison, state.tool())
    other_layers.send_others(context(choice, comparison), layer, len(verdicts), 2 * n_shown, others)


# --------------------------------------------------------------------------------------------------- nothing to compare


def missing(choice: Choice) -> None:
    """Say why there is nothing to compare, and what leads there."""
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
        artifacts.prompts(run.config["prompts"])  # what is wrong with them is the sentence to show
        st.markdown(
            "What this comparison needs is not on disk for these prompts and this position, perhaps since the prompts "
            "changed; it is computed from the kept weights."
        )
        config = compare_config(choice, run.id, run.config)
        job = jobs_panel.latest("prepare", config)
        if job is not None and job.is_active():
            jobs_panel.live_bar(job)
            return
        jobs_panel.ending(job)
        if st.button("Compute the comparison", key="prepare_comparison", type="primary", icon=":material/play_arrow:"):
            jobs_panel.start("prepare", config)


def compare_config(choice: Choice, run: str, config: Any) -> dict[str, str]:
    """What a job is told, so that it makes what the page looks for."""
    against = {"against": choice.against} if choice.against and choice.run else {}
    settings = {"model": config["model"], "prompts": config["prompts"], "position": choice.position}
    return settings | {"run": run} | against


# --------------------------------------------------------------------------------------------------------- all layers


def header(comparison: Comparison, layer: int) -> None:
    """What is compared, and the layer's control."""
    analysis, config = comparison.analysis, comparison.config
    with st.container(key="header"):
        left, right = st.columns(COLUMNS, gap="medium", vertical_alignment="bottom")
    with left:
        what = f"{comparison.names[0]} → {comparison.names[1]}" if comparison.is_of_two_runs else title(comparison)
        st.subheader(f"{text.markdown(comparison.base.model)} · {text.markdown(what)}", anchor=False)
        n_test = sum(analysis.n_prompts["test"].values())
        drawn = int(comparison.prompts.in_split("test").sum())
        targets = ", ".join(map(str, comparison.targets))
        parts = [
            f"ES2 at {'layer' if len(comparison.targets) == 1 else 'layers'} {targets}",
            f"{config['objective']}, {config['method']}, {comparison.result['steps']} steps",
            f"prompts: {comparison.prompts.name}",
            f"numbers are of all {n_test:,} test prompts"
            + (f"; {drawn:,} of them are drawn" if drawn < n_test else ""),
        ]
        st.caption(" · ".join(text.markdown(part) for part in parts))
    with right:
        layer_control(layer, len(analysis.layers))
    if comparison.run == SHOWCASE:
        with st.container(horizontal=True, vertical_alignment="center", key="introduction"):
            st.markdown(INTRODUCTION, width="stretch")
            if st.button("Start your own", key="to_runs", icon=":material/model_training:"):
                state.go("runs")


def title(comparison: Comparison) -> str:
    """What the run is called."""
    if comparison.run == SHOWCASE:
        return "showcase"
    return artifacts.run_title(open_run(comparison.run))


def summary(comparison: Comparison, verdicts: dict[int, Verdict], layer: int) -> None:
    """The verdict in a word and a sentence, on the run and on the layer; what happened to harmless prompts."""
    run = comparison.run_verdict
    with st.container(key="verdict", border=True, gap="xsmall"):
        st.markdown(f"**{text.markdown(run.name.capitalize())}.** **{text.markdown(run.reason)}**")
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
    stands = f"over the budget of {budget:g} on the {' and the '.join(over)}" if over else f"budget {budget:g} each"
    return f"KL from base on harmless test prompts, nats per token: {parts}; {stands}."


def rule_table(comparison: Comparison, current: str) -> None:
    """The table of verdicts with the thresholds in use; the row that gave this layer's word is bold."""
    st.markdown("The first row that holds, on 95 % intervals; a run has the gravest word of its target layers.")
    rows = [
        f"| **{name}** | **{text.markdown(when)}** |" if name == current else f"| {name} | {text.markdown(when)} |"
        for name, when in rule(comparison.kl_budget).items()
    ]
    st.markdown("\n".join(["| word | when |", "| --- | --- |", *rows]))


def strips(comparison: Comparison, layer: int) -> None:
    """Accuracy and margins of both models over layers; a click on either goes to a layer."""
    for key, draw, alt in (
        ("accuracy_strip", compare_charts.accuracy_strip, "Probe accuracy of both models over layers"),
        ("margin_strip", compare_charts.margin_strip, "The margins of both models over layers"),
    ):
        plot(
            draw(comparison.analysis, comparison.names, chosen=layer, targets=comparison.targets),
            key=key,
            on_pick=partial(state.pick_layer, key),
            alt=alt,
        )


# ---------------------------------------------------------------------------------------------------------- one layer


def view_controls(choice: Choice, layer: int) -> None:
    """Which layer it is, and in which view the prompts are drawn."""
    st.subheader(f"Layer {layer}", anchor=False, width="content")
    others_toggle(choice)
    with st.popover("Axes", type="tertiary"):
        axes_controls(choice)
    tool_control()
    choice_control(choice, "arrangement", state.ARRANGEMENTS, ARRANGEMENT_NAMES)
    view_control(choice)


def projection(choice: Choice, comparison: Comparison, layer: int) -> None:
    """The prompts under both models."""
    digest = comparison.prompts.texts_digest
    selected = state.selection(digest)
    drawn = figures(choice, comparison, state.tool(), layer, selected)
    if not drawn:
        if comparison.run == SHOWCASE:
            st.info("The showcase has no UMAP at this position; the other views are computed as you look.")
            return
        seconds = artifacts.UMAP_START_SECONDS + artifacts.UMAP_SECONDS_PER_PROMPT * 2 * (
            comparison.base.n_layers * comparison.base.n_prompts
        )
        config = compare_config(choice, comparison.run, comparison.config)
        umap_offer(config, seconds, height=compare_charts.PAIR_HEIGHT)
        return
    with st.container(key="pair"):
        linked(
            drawn,
            key="linked_pair",
            height=compare_charts.PAIR_HEIGHT,
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
    return artifacts.pair_view(comparison, layer, choice.view, fit_on=choice.fit_on, raw=choice.raw)


def figures(
    choice: Choice, comparison: Comparison, tool: str, layer: int, selected: Sequence[int] = ()
) -> list[exports.Figure]:
    """The prompts of one layer in the chosen view and arrangement; none where it has no coordinates."""
    view = fit(choice, comparison, layer)
    if view is None or view.tuned is None:
        return []
    return compare_charts.pair(
        view,
        comparison.prompts,
        margins=artifacts.pair_margins(comparison, layer),
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


def axes_controls(choice: Choice) -> None:
    """What lengths are measured in, and what the axes are fitted on."""
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
        "Fit on both",
        key="fit_on",
        disabled=choice.view == "umap",
        help="Fit the principal components on the prompts under both models rather than under base alone.",
        on_change=lambda: state.update(fit_on="both" if st.session_state["fit_on"] else "base"),
    )


def distribution(comparison: Comparison, margins: Margins) -> None:
    """How the test prompts spread along the separating direction before and after."""
    prompts = comparison.prompts
    test = np.flatnonzero(prompts.in_split("test"))
    place = {int(row): at for at, row in enumerate(test)}
    selected = [place[row] for row in state.selection(prompts.texts_digest) if row in place]
    before, after = margins
    plot(
        compare_charts.histograms(
            (before[test], after[test]), prompts.labels[test], comparison.names, selected=selected
        ),
        key="histograms",
        alt="Histograms of the test prompts along the separating direction, base above tuned, by label",
    )


def columns(comparison: Comparison, margins: Margins) -> prompt_list.Margins:
    """The margins by what their columns are called."""
    names = ("first run", "second run") if comparison.is_of_two_runs else ("base", "tuned")
    return dict(zip(names, margins, strict=True))


def numbers(comparison: Comparison, layer: int) -> None:
    """The numbers of the layer before and after, with what changed."""
    st.subheader("Numbers of this layer", anchor=False)
    analysis = comparison.analysis
    base, tuned = analysis.base_layers[layer], analysis.layers[layer]
    rows = "".join(number_row(BY_NAME[name], base, tuned) for name in NUMBERS if name in tuned.numbers)
    heads = ("", *comparison.names, "change", "")
    head = "".join(f"<th>{html.escape(word)}</th>" for word in heads)
    st.html(f'<table class="before-after"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>')
    st.caption(
        "Intervals are 95 %, paired over the same resamples of prompt pairs; ▲ and ▼ mark changes whose interval "
        "leaves out no change."
    )
    with st.expander("Why there are two margins, and what each number means", key="terms"):
        st.markdown(TWO_MARGINS)
        shown = [BY_NAME[name] for name in NUMBERS]
        st.markdown("\n".join(f"- **{term.title}**: {text.markdown(term.definition)}" for term in shown))


def number_row(term: Term, base: LayerNumbers, tuned: LayerNumbers) -> str:
    """One number as a row of the table; what only compares has no value of its own in base."""
    change, compares = compare_charts.change_of(tuned, term.name), term.name in compare_charts.COMPARES

    def cell(layer: LayerNumbers) -> str:
        number = layer.numbers[term.name]
        return f"{term.value(number)} <small>{term.range(number)}</small>"

    words = ""
    if not compares:
        value, _, interval = compare_charts.change_words(term, change).partition(", ")
        words = f"{value} <small>{interval}</small>"
    mark = ("▲" if change.difference.value > 0 else "▼") if compare_charts.is_change(change) else ""
    cells = ("" if compares else cell(base), cell(tuned), words, mark)
    tip = html.escape(term.definition, quote=True)
    first = f'<th scope="row" title="{tip}">{html.escape(term.title)}</th>'
    kind = "" if term.scale_free else ' class="raw"'
    return f"<tr{kind}>{first}{''.join(f'<td>{one}</td>' for one in cells)}</tr>"


def overview(comparison: Comparison, verdicts: dict[int, Verdict], layer: int) -> None:
    """All layers and all numbers at once."""
    st.subheader("The whole model", anchor=False)
    plot(
        compare_charts.overview(
            comparison.analysis,
            {at: one.name for at, one in verdicts.items()},
            chosen=layer,
            targets=comparison.targets,
            names=comparison.names,
        ),
        key="overview",
        on_pick=partial(state.pick_layer, "overview"),
        alt="What changed in each number at each layer, with the verdicts",
    )
    low, high = comparison.names
    st.caption(
        f"Squares are changes beyond chance: purple higher in {text.markdown(high)}, green higher in "
        f"{text.markdown(low)}, with the full colour at ×{compare_charts.FULL_FACTOR:g} (accuracy and margins: at a "
        f"difference of {compare_charts.FULL_DIFFERENCES['probe_accuracy']:g}); dots are changes within chance. Grey "
        "columns are target layers, and a click goes to a layer."
    )


def lists(comparison: Comparison, margins: Margins) -> None:
    """The prompts that moved most, those on the wrong side, and those that changed side."""
    prompts = comparison.prompts
    test = np.flatnonzero(prompts.in_split("test"))
    before, after = (prompt_list.own_side(prompts, one) for one in margins)
    moved = after - before
    by_move = test[np.argsort(moved[test], kind="stable")]
    wrong = test[after[test] <= 0]
    changed = test[(after[test] > 0) != (before[test] > 0)]
    found = {
        f"Moved most to their own side ({min(N_MOVERS, len(test))})": by_move[::-1][:N_MOVERS],
        f"Moved most to the other side ({min(N_MOVERS, len(test))})": by_move[:N_MOVERS],
        f"On the wrong side ({len(wrong)})": wrong[np.argsort(after[wrong], kind="stable")],
        f"Changed side ({len(changed)})": changed[np.argsort(-np.abs(moved[changed]), kind="stable")],
    }
    st.subheader("Prompts that stand out", anchor=False)
    names = list(found)
    st.session_state["listing"] = state.listing()
    chosen = st.segmented_control(
        "List",
        range(len(names)),
        key="listing",
        format_func=names.__getitem__,
        required=True,
        label_visibility="collapsed",
        on_change=lambda: state.take_listing(st.session_state["listing"]),
    )
    rows = found[names[chosen or 0]]
    if len(rows) == 0:
        st.caption("None.")
        return
    prompt_list.table(
        prompts,
        rows,
        columns(comparison, margins),
        key="listed_prompts",
        height=LIST_HEIGHT,
        more={"moved": moved[rows]},
        alt=names[chosen or 0],
    )


def take_away(
    choice: Choice, comparison: Comparison, layer: int, margins: Margins
) -> tuple[dict[str, exports.Figure], dict[str, pd.DataFrame]]:
    """The charts and tables of the page, to be downloaded."""
    prompts, analysis, names, targets = comparison.prompts, comparison.analysis, comparison.names, comparison.targets
    charts: dict[str, exports.Figure] = {
        "Probe accuracy over layers": compare_charts.accuracy_strip(analysis, names, chosen=layer, targets=targets),
        "Margins over layers": compare_charts.margin_strip(analysis, names, chosen=layer, targets=targets),
    }
    view = artifacts.pair_view(comparison, layer, choice.view, fit_on=choice.fit_on, raw=choice.raw)
    if view is not None and view.tuned is not None:
        pair = compare_charts.pair(view, prompts, margins=margins, names=names, others=choice.others)
        charts |= {
            f"{VIEW_NAMES[choice.view]} at layer {layer}, {name}": one
            for name, one in zip(columns(comparison, margins), pair, strict=True)
        }
    numbers_of_all = exports.numbers_frame(zip(names, (analysis.base_layers, analysis.layers), strict=True))
    everyone = prompt_list.as_frame(prompts, np.arange(len(prompts)), columns(comparison, margins), {})
    return charts, {f"Prompts at layer {layer}": everyone, "Numbers of all layers": numbers_of_all}
