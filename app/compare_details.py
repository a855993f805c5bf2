"""Below the pair of the comparison: the histograms, the numbers of the layer, all layers at a glance, prompt lists."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import artifacts, position_map, prompt_list, state, text
from app.components import exports
from app.components.plots import plot
from app.state import Choice
from app.view_controls import VIEW_NAMES, kept_buttons, numbers_table
from es2.analysis.comparison import Comparison
from es2.analysis.results import LayerNumbers
from es2.analysis.verdict import Verdict
from es2.charts import compare_charts, frames, pair_charts
from es2.charts.pair_charts import Margins
from es2.report.glossary import BY_NAME, TWO_MARGINS, Term

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = (
    "margin_mean",
    "mean_difference_margin",
    "fisher_ratio",
    "relative_distance",
    "probe_accuracy",
    "norm_ratio",
    "direction_cosine",
    "effective_rank",
    "orthogonal_std_ratio",
    "centroid_distance",
)
N_MOVERS = 20
LIST_HEIGHT = 520


def distribution(comparison: Comparison, margins: Margins) -> None:
    """How the test prompts spread along the separating direction before and after."""
    prompts = comparison.prompts
    test = np.flatnonzero(prompts.in_split("test"))
    place = {int(row): at for at, row in enumerate(test)}
    selected = [place[row] for row in state.selection(prompts.texts_digest) if row in place]
    before, after = margins
    plot(
        pair_charts.histograms((before[test], after[test]), prompts.labels[test], comparison.names, selected=selected),
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
    terms = [BY_NAME[name] for name in NUMBERS if name in tuned.numbers]
    numbers_table(comparison.names, [(term, number_cells(term, base, tuned)) for term in terms])
    st.caption(
        "Intervals are 95 %, paired over the same resamples of prompt pairs; ▲ and ▼ mark changes whose interval "
        "leaves out no change."
    )
    with st.expander("Why there are two margins, and what each number means", key="terms"):
        st.markdown(TWO_MARGINS)
        shown = [BY_NAME[name] for name in NUMBERS]
        st.markdown("\n".join(f"- **{term.title}**: {text.markdown(term.definition)}" for term in shown))


def number_cells(term: Term, base: LayerNumbers, tuned: LayerNumbers) -> tuple[str, str, str, str]:
    """One number in both models, its change and a mark; what only compares has no value of its own in base."""
    change, compares = compare_charts.change_of(tuned, term.name), term.name in compare_charts.COMPARES

    def cell(layer: LayerNumbers) -> str:
        number = layer.numbers[term.name]
        return f"{term.value(number)} <small>{term.range(number)}</small>"

    words = ""
    if not compares:
        value, _, interval = compare_charts.change_words(term, change).partition(", ")
        words = f"{value} <small>{interval}</small>"
    mark = ("▲" if change.difference.value > 0 else "▼") if compare_charts.is_change(change) else ""
    return "" if compares else cell(base), cell(tuned), words, mark


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
    before, after = (frames.own_side(prompts, one) for one in margins)
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
    chosen = kept_buttons("List", range(len(names)), "listing", 0, names.__getitem__)
    rows = found[names[chosen]]
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
        alt=names[chosen],
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
    by_position = artifacts.compared_by_position(comparison, choice)
    if drawn := position_map.figure(by_position, names, (layer, comparison.position), targets):
        charts["Probe accuracy by layer and position"] = drawn
    view = artifacts.view(comparison, layer, choice.view, fit_on=choice.fit_on, raw=choice.raw)
    if view is not None and view.tuned is not None:
        pair = pair_charts.pair(view, prompts, margins=margins, names=names, others=choice.others)
        charts |= {
            f"{VIEW_NAMES[choice.view]} at layer {layer}, {name}": one
            for name, one in zip(columns(comparison, margins), pair, strict=True)
        }
    numbers_of_all = frames.numbers_frame(zip(names, (analysis.base_layers, analysis.layers), strict=True))
    everyone = frames.prompts_frame(prompts, np.arange(len(prompts)), columns(comparison, margins), {})
    return charts, {f"Prompts at layer {layer}": everyone, "Numbers of all layers": numbers_of_all}
