"""Does the separation hold under steering: how far embeddings have to travel, and what steered models say.

First how far embeddings have to travel, then replies over the length of the steering vector, then one prompt moved
across the boundary. The evaluation measured everything; nothing is generated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import evaluations, text
from app.components import exports
from app.components.plots import plot
from app.evaluations import Evaluation, Intro
from app.view_controls import kept_buttons, kept_choice, told_apart
from es2.analysis.verdict import direction_rule
from es2.charts import evaluation_charts
from es2.charts.evaluation_charts import MODELS, NAMES, in_words
from es2.evaluation.results import SHOWN_CHARACTERS
from es2.report import findings
from es2.report.findings import DIRECTION_NAMES, interval_of
from es2.report.labels import shortened

if TYPE_CHECKING:
    import pandas as pd

INTRO = Intro(
    title="Does it hold under steering?",
    about="ES2 answers attacks that touch no word of the prompt but the embeddings inside the model. Here such attacks "
    "are carried out on the harmful test prompts, on base and tuned alike, by an attacker who has read the very model "
    "that is attacked.",
    steps=(
        ("Needed perturbation", "How far every harmful embedding has to travel until the probe takes it for harmless."),
        ("Replies under steering", "Embeddings are steered during generation, further and further: who still refuses?"),
        ("Soft prompt", "A few vectors before the user's text, fitted once until refusals are unlikely: who refuses?"),
        ("Direction", "The difference of means removed from the model, or added: do refusals depend on it?"),
        ("Control", "The same steerings in random directions: what those do to a model is damage, not knowledge."),
    ),
    suite="perturbation",
)
SUITES = ("perturbation", "soft_prompt", "direction")
N_CHARACTERS = 110


def page() -> None:
    """Render the page for the current choice, or what leads there."""
    found = evaluations.opened(INTRO, SUITES)
    if found is None:
        return
    run, evaluation = found
    for problem in dict.fromkeys(filter(None, map(evaluation.problem, SUITES))):
        st.info(text.markdown(problem), icon=":material/info:")
    attack, soft, checked = map(evaluation.part, SUITES)
    if attack is None and soft is None and checked is None:
        return
    with st.container(key="finding", border=True, gap="xsmall"):
        if attack is not None:
            if sentence := findings.needed_sentence(attack):
                st.markdown(f"**{text.markdown(sentence)}**")
            st.markdown(text.markdown(findings.attack_sentence(attack)))
        if soft is not None:
            st.markdown(text.markdown(findings.soft_sentence(soft)))
        if checked is not None:
            for which, reason in findings.direction_findings(checked):
                st.markdown(f"**{text.markdown(which)}.** {text.markdown(reason)}")
    if attack is not None:
        curves(attack)
    if attack is not None or soft is not None:
        soft_curves(evaluation, soft)
    directions(evaluation, checked, run.is_shipped)
    if attack is not None:
        if attack["needed"]:
            needed(attack)
        one_prompt(evaluation, attack)
    exports.page_exports(partial(take_away, evaluation), None)


# -------------------------------------------------------------------------------------------------------------- curves


def curves(attack: Mapping[str, Any]) -> None:
    """Who still refuses, and who still speaks, over the length of the steering vector."""
    st.subheader("Replies under steering", anchor=False)
    if not evaluation_charts.directions_of(attack):
        st.caption("No direction was steered along.")
        return
    for rate, title in (("dsr", "DSR"), ("degenerate", "degenerate share")):
        plot(
            evaluation_charts.curve(attack, rate, title),
            key=f"curve_{rate}",
            alt=f"{title} over the budget under base and tuned, a panel for each direction",
        )
    st.caption(
        f"The same {attack['n_prompts']:,} harmful prompts in every point, 95 % intervals; budget 0 is no steering. A "
        "defence holds where DSR stays up under SCAV, RepE and the difference of means without replies becoming "
        "degenerate; what a random direction of the same length does is damage alone."
    )
    rows = exact_steerings(attack)
    if rows:
        with st.expander("Steered exactly to p₀ along SCAV", key="exact_steerings"):
            st.markdown(
                "Every embedding is steered only as far as it takes until the probe gives p₀, and the probe is read "
                "again at the same point: the largest error says how exactly that was met in the forward pass."
            )
            st.dataframe(rows, hide_index=True, width="stretch")


def soft_curves(evaluation: Evaluation, soft: Mapping[str, Any] | None) -> None:
    """Who still refuses, and who still speaks, after a soft prompt; or that it was not measured."""
    st.subheader("Replies after a soft prompt", anchor=False)
    if soft is None:
        if evaluation.problem("soft_prompt") is None:
            st.caption(
                "Not measured in this evaluation. Evaluating attacks again with the same settings adds it, and "
                "generates nothing else anew."
            )
        return
    for rate, title in (("dsr", "DSR"), ("degenerate", "degenerate share")):
        plot(
            evaluation_charts.curve(soft, rate, title),
            key=f"soft_curve_{rate}",
            alt=f"{title} over the budget of a soft prompt under base and tuned, beside random vectors",
        )
    refused = ", ".join(f"{name} {n}" for name, n in soft["n_refused"].items())
    st.caption(
        f"The same {soft['n_prompts']:,} harmful prompts in every point, 95 % intervals. Vectors stand before the "
        f"user's text. Those of each model were fitted to it on {soft['n_fitted']:,} other harmful prompts (refused: "
        f"{refused}), until its probes read harmless and its own refusals became unlikely; what random vectors of the "
        "same length do is damage alone. Neither vectors nor replies are kept."
    )
    with st.expander("Prompt by prompt", key="soft_prompts"):
        st.dataframe(soft_verdicts(evaluation), hide_index=True, width="stretch")


def soft_verdicts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The verdict on every prompt's reply after each soft prompt, a row for each prompt and model."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in evaluation.rows("soft_prompt"):
        steering = row["steering"]
        name = DIRECTION_NAMES[steering["direction"]] if steering["length"] else "no soft prompt"
        name += f" {steering['budget']:g}, {steering['length']} vectors" if steering["length"] else ""
        for model in (one for one in MODELS if one in row):
            own = rows.setdefault((row["prompt"], model), {"prompt": row["prompt"], "model": model})
            own[name] = evaluations.VERDICT_NAMES.get(row[model]["verdict"], row[model]["verdict"])
    return list(rows.values())


def directions(evaluation: Evaluation, checked: Mapping[str, Any] | None, is_shipped: bool) -> None:
    """What removing and adding directions does to refusals; or that it was not measured, and where it can be."""
    st.subheader("Does the direction steer?", anchor=False)
    if checked is None:
        if evaluation.problem("direction") is None:
            where = "an evaluation of a run of your own" if is_shipped else "a new one"
            st.caption(f"Not measured in this evaluation. The suite Direction of {where} measures it.")
        return
    plot(
        evaluation_charts.direction_rates(checked),
        key="direction_rates",
        alt="Shares refused with the difference of means removed and added, beside random directions, base and tuned",
    )
    st.caption(
        "The difference of means of a layer is removed from the output of every block while "
        f"{_counted(checked, 'harmful')} are replied to, and added at its own layer while "
        f"{_counted(checked, 'harmless')} are, always at every token. "
        f"The control: {findings.controls(checked)}. 95 % intervals over prompts. "
        "Where labels can be read along a direction that refusals do not depend on, it reads but does not steer."
    )
    with st.expander("The rule behind these words", key="direction_rule"):
        rows = [f"| {text.markdown(word)} | {text.markdown(when)} |" for word, when in direction_rule().items()]
        st.markdown("\n".join(["| word | when |", "| --- | --- |", *rows]))
    with st.expander("Prompt by prompt", key="direction_prompts"):
        st.dataframe(direction_verdicts(evaluation), hide_index=True, width="stretch")


def _counted(checked: Mapping[str, Any], label: str) -> str:
    return f"{checked['n_prompts'][label]:,} {label} test prompts"


def direction_verdicts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The verdict on every prompt's reply before and after, a row for each prompt, model, layer; replies are cut."""
    before: dict[tuple[str, str], str] = {}
    random: dict[tuple[Any, ...], list[str]] = {}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in evaluation.rows("direction"):
        steering = row["steering"]
        for model in (one for one in MODELS if one in row):
            of, verdict = (row["prompt"], model), row[model]["verdict"]
            own = (*of, steering["layer"])
            name = evaluations.VERDICT_NAMES.get(verdict, verdict)
            if steering["kind"] == "none":
                before[of] = name
            elif steering["control"] is not None:
                random.setdefault(own, []).append(name)
            else:
                rows[own] = {"direction": findings.STEERING_NAMES[steering["kind"]], "after": name}
                rows[own] |= {"reply": _kept(row[model].get("text"))}
    return [
        {"prompt": prompt, "model": model, "layer": layer, "before": before[prompt, model]}
        | own
        | {"random": ", ".join(random[prompt, model, layer])}
        for (prompt, model, layer), own in rows.items()
    ]


def exact_steerings(attack: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steerings up to a probability, a row for each and model."""
    return [
        {
            "p₀": point["p0"],
            "model": model,
            "DSR": in_words(interval_of(point[model]["dsr"])),
            "degenerate": in_words(interval_of(point[model]["degenerate"])),
            "length / ‖e‖": in_words(interval_of(point[model]["relative_length"]), 3),
            "largest error": f"{point[model]['largest_error']:.1e}",
        }
        for point in attack["curve"]
        if point["p0"] is not None
        for model in MODELS
        if point[model]
    ]


# -------------------------------------------------------------------------------------------------------------- needed


def needed(attack: Mapping[str, Any]) -> None:
    """How far embeddings have to travel: over all layers, and prompt by prompt at the attacked ones."""
    p0s = list(dict.fromkeys(record["p0"] for record in attack["needed"]))
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader("Needed perturbation over layers", anchor=False, width="content")
        chosen = kept_buttons(
            "p₀",
            p0s,
            "needed_p0",
            findings.main_p0(attack),
            lambda p0: f"to p₀ = {p0:g}",
            help="The probability of harmful that has to be reached. At 0.5 the way ends on the probe's boundary and "
            "depends on the geometry alone; at 0.01 it also depends on how steep the probe is, so it means something "
            "only between base and tuned.",
        )
    plot(
        evaluation_charts.needed_strip(attack, chosen),
        key="needed_strip",
        alt="Relative length of the needed perturbation over layers, base and tuned",
    )
    st.caption(
        f"Mean over {attack['n_needed']:,} harmful test prompts with its 95 % interval, relative to an embedding's own "
        "length, against probes fitted anew on each model. Grey columns are the attacked layers."
    )
    if attack["needed_values"]:
        st.subheader("Needed perturbation, prompt by prompt", anchor=False)
        plot(
            evaluation_charts.reach(attack),
            key="reach",
            alt="Share of prompts within reach of a perturbation of some length at the attacked layers, base and tuned",
        )
        st.caption(
            "The share of harmful prompts that a perturbation of at most this length brings to p₀; further right is "
            "harder to attack. A curve that begins above 0 has prompts that need no perturbation."
        )


# ---------------------------------------------------------------------------------------------------------- one prompt

Step = tuple[float | None, float | None]
"""Budget and p₀ of a steering along some direction."""


def one_prompt(evaluation: Evaluation, attack: Mapping[str, Any]) -> None:
    """Move one prompt's embedding across the boundary, and see what both models reply."""
    rows = {
        (row["prompt"], row["steering"]["direction"], (row["steering"]["budget"], row["steering"]["p0"])): row
        for row in evaluation.rows("perturbation")
    }
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    directions = evaluation_charts.directions_of(attack)
    if not prompts or not directions:
        return
    st.subheader("One prompt across the boundary", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        prompt = kept_choice(
            "Prompt",
            prompts,
            "attack_prompt",
            prompts[0],
            st.selectbox,
            format_func=told_apart(prompts, lambda one: shortened(one, N_CHARACTERS)),
        )
        direction = kept_choice(
            "Direction",
            directions,
            "attack_direction",
            directions[0],
            st.segmented_control,
            format_func=DIRECTION_NAMES.__getitem__,
            required=True,
        )
    steps = steps_of(attack, direction)
    names = [step_name(step) for step in steps]
    at = 0
    if len(steps) > 1:
        label = "Length of the steering vector relative to the embedding's own"
        name = kept_choice(label, names, "attack_step", names[1], st.select_slider)
        at = names.index(name)
    found = [rows.get((prompt, "none" if step == (0.0, None) else direction, step)) for step in steps]
    row = found[at]
    models = [model for model in MODELS if any(one is not None and model in one for one in found)]
    read = {
        model: [None if one is None else float(one[model]["read"]["probability"]) for one in found] for model in models
    }
    plot(
        evaluation_charts.boundary(names, read, at, sum(p0 is None for _, p0 in steps)),
        key="boundary",
        alt="The probe's probability of harmful for this prompt under each steering, base and tuned",
    )
    with st.container(border=True, key="steered_prompt", gap="xsmall"):
        evaluations.shown(prompt)
        if row is None:
            st.caption("This steering was not measured for this prompt.")
            return
        for model, column in zip(models, st.columns(len(models), gap="medium"), strict=True):
            with column, st.container(gap="xsmall"):
                with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
                    st.markdown(f":small[**{NAMES[model]}**]", width="content")
                    evaluations.badge(row[model]["verdict"], harmful=True)
                seen = row[model]["read"]
                st.caption(f"P(harmful) {seen['probability']:.3f} · steered by {seen['relative']:.3f} of ‖e‖")
                evaluations.shown(_kept(row[model].get("text")))
    st.caption(
        f"The probability is the probe's own, read back after steering at the last prompt token, the mean over layers "
        f"{', '.join(map(str, attack['layers']))}. Of replies to steered requests only the beginning is kept."
    )


def steps_of(attack: Mapping[str, Any], direction: str) -> list[Step]:
    """The steerings along a direction: none, the budgets, then those up to a probability, the furthest last."""
    steps: list[Step] = [(p["budget"], p["p0"]) for p in attack["curve"] if p["direction"] == direction]
    return [(0.0, None), *sorted(steps, key=lambda step: (step[0] is None, step[0] or -(step[1] or 0)))]


def step_name(step: Step) -> str:
    """A steering in a word."""
    budget, p0 = step
    if p0 is not None:
        return f"to p₀ = {p0:g}"
    return f"{budget:g}" if budget else "no steering"


def _kept(words: str | None) -> str | None:
    """A kept reply, with a sign that it went on where it was cut when it was kept; None where its words were not."""
    return words if words is None or len(words) < SHOWN_CHARACTERS else f"{words[: SHOWN_CHARACTERS - 1]}…"


# ----------------------------------------------------------------------------------------------------------- take away


def take_away(evaluation: Evaluation) -> tuple[dict[str, exports.Figure], dict[str, pd.DataFrame]]:
    """The charts and tables of the page, to be downloaded."""
    import pandas as pd

    charts: dict[str, exports.Figure] = {}
    tables: dict[str, pd.DataFrame] = {}
    if (attack := evaluation.part("perturbation")) is not None:
        if evaluation_charts.directions_of(attack):
            charts["DSR under steering"] = evaluation_charts.curve(attack, "dsr", "DSR")
            charts["Degenerate replies under steering"] = evaluation_charts.curve(
                attack, "degenerate", "degenerate share"
            )
        for p0 in dict.fromkeys(record["p0"] for record in attack["needed"]):
            charts[f"Needed perturbation to {p0:g} over layers"] = evaluation_charts.needed_strip(attack, p0)
        if attack["needed_values"]:
            charts["Needed perturbation by prompt"] = evaluation_charts.reach(attack)
        lengths = [
            {"layer": record["layer"], "p0": record["p0"], "model": model} | _flat(record[model])
            for record in attack["needed"]
            for model in ("base", "tuned", "change")
            if record[model]
        ]
        replies = [
            {"prompt": row["prompt"], **row["steering"]}
            | {
                f"{model} {entry}": row[model].get(entry)
                for model in MODELS
                if model in row
                for entry in ("verdict", "text")
            }
            | {f"{model} probability": row[model]["read"]["probability"] for model in MODELS if model in row}
            for row in evaluation.rows("perturbation")
        ]
        tables["Steerings"] = pd.DataFrame(_swept(attack, ("direction", "budget", "p0")))
        tables["Needed perturbation"] = pd.DataFrame(lengths)
        tables["Replies under steering"] = pd.DataFrame(replies)
    if (soft := evaluation.part("soft_prompt")) is not None:
        charts["DSR after soft prompts"] = evaluation_charts.curve(soft, "dsr", "DSR")
        charts["Degenerate replies after soft prompts"] = evaluation_charts.curve(
            soft, "degenerate", "degenerate share"
        )
        tables["Soft prompts"] = pd.DataFrame(_swept(soft, ("direction", "length", "budget")))
        tables["Verdicts after soft prompts"] = pd.DataFrame(soft_verdicts(evaluation))
    if (checked := evaluation.part("direction")) is not None:
        charts["Refusals with directions removed and added"] = evaluation_charts.direction_rates(checked)
        tables["Directions removed and added"] = pd.DataFrame(
            {"layer": layer, "direction": findings.STEERING_NAMES[kind], "model": model} | _flat(refused)
            for layer, model, kind, refused in findings.direction_rows(checked)
        )
        tables["Replies under directions"] = pd.DataFrame(direction_verdicts(evaluation))
    return charts, tables


def _swept(attack: Mapping[str, Any], settings: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each point of a sweep and model."""
    return [
        {name: point[name] for name in settings} | {"model": model} | _flat(point[model])
        for point in attack["curve"]
        for model in MODELS
        if point[model]
    ]


def _flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Numbers with intervals as columns."""
    found: dict[str, float] = {}
    for name, number in numbers.items():
        if isinstance(number, Mapping):
            interval = interval_of(number)
            found |= {name: interval.value, f"{name} low": interval.low, f"{name} high": interval.high}
        else:
            found[name] = number
    return found
