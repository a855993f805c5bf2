"""The form that starts an evaluation: which prompts, which parts, how many, how long it will take, one button.

It states before anything is loaded how many prompts are left without the run's own, and why a part cannot be measured
on them. Sources that would have to be fetched are left to the job.
"""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from app import artifacts, jobs_panel, text
from app.settings_form import SettingsForm, start_button
from app.state import Choice
from es2.analysis.setup import check_prompts
from es2.core.errors import Es2Error, InputError
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.multiple_choice import n_characters
from es2.evaluation.results import KIND
from es2.evaluation.suites import choose_prompts, held_out
from es2.jobs.job import Job
from es2.models.machine import this_machine
from es2.models.shape import Shape
from es2.prompts.benchmarks import absolute_source, is_remote
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.prompts.questions import absolute_questions, load_questions
from es2.workflow.derived import find_activations
from es2.workflow.evaluation_plan import Sample, evaluation_seconds, known_shares
from es2.workflow.runs import config_of, rendering_of

FORM = "evaluation_form"
"""The session's key for whether the form is open above an evaluation."""
SUITE_NAMES = {
    "all": "All",
    "refusal": "Refusals",
    "kl": "KL",
    "perturbation": "Attacks",
    "soft_prompt": "Soft prompt",
    "ability": "Ability",
    "direction": "Direction",
}
ATTACKS = {"perturbation", "soft_prompt"}
"""The suites that attack, on the same prompts."""
ANSWER_NAMES = {"text": "Text", "letter": "Letter"}
_HUB_CHARACTERS = 1000.0  # of a question of MMLU-Pro with its options, roughly

CHOSEN = "evaluation_chosen"
"""The session's key for which evaluation of each run is shown."""


def form(run: Job, choice: Choice, suite: str, tokens_per_second: float | None) -> None:
    """Render the form for a run with weights, the prompts of the choice and `suite` preset.

    `tokens_per_second` is the speed of an earlier evaluation here; None before one.
    """
    with st.container(border=True, key="evaluation_form_box"):
        widgets = SettingsForm(EvaluateConfig, "evaluate", {"suite": SUITE_NAMES, "answer_by": ANSWER_NAMES})
        source = widgets.one("prompts", choice.prompts)
        with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
            values = {"suite": widgets.one("suite", suite), **widgets.group("main", per_row=2)}
        with st.expander("Advanced", key="evaluate_advanced"):
            values |= widgets.group("advanced")
        config, words, problem = None, "", ""
        try:
            values |= {"model": str(run.config["model"]), "run": run.id} | dict(choice.rendering)
            values |= {"prompts": absolute_source(source.strip() or choice.prompts)}
            values |= {"questions": absolute_questions(values["questions"].strip() or "builtin")}
            config = EvaluateConfig.from_text(
                values | {"steering_limit": min(values["steering_limit"], values["limit"])}
            )
            words = _expectation(config, run, tokens_per_second)
        except InputError as error:
            config, problem = None, text.in_app(str(error))
        with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
            pressed = start_button("Evaluate", "start_evaluation", disabled=config is None)
            if config is None:
                st.markdown(f":red[{text.markdown(problem)}]", width="stretch")
            elif pressed:
                st.session_state[FORM] = False
                st.session_state.pop(CHOSEN, None)  # the page opens on the new one
                jobs_panel.start(KIND, config.to_dict())
            else:
                st.caption(words, width="stretch")


def _expectation(config: EvaluateConfig, run: Job, tokens_per_second: float | None) -> str:
    """How many prompts will be used and about how long it takes, in Markdown.

    Raises:
        InputError: for prompts that cannot be used at all.
    """
    notes = []
    source = config.prompts
    if config.suite == "ability":
        sample = Sample(0, 0, 0, 0, 0.0)
    elif is_remote(source):
        sample = Sample(config.limit, config.limit, config.steering_limit, 0, 80.0, directed=2 * config.limit)
        notes.append("The prompts are fetched from the Hub when it starts, so at most:")
    else:
        reading = artifacts.prompts(source).reading
        if reading is not None and not reading.is_plain:
            notes.append(reading.sentence)
        sample, problems = _sample(config, run)
        notes += problems
    counts = []
    if "refusal" in config.suites:
        counts.append(f"{sample.harmful:,} harmful and {sample.harmless:,} harmless prompts")
    elif "kl" in config.suites:
        counts.append(f"{sample.harmless:,} harmless prompts")
    if ATTACKS & set(config.suites) and sample.steered:
        counts.append(f"{sample.steered:,} attacked prompts")
    if "direction" in config.suites and sample.directed:
        counts.append(f"{sample.directed:,} prompts, each under {1 + config.controls} directions at each layer")
    if "ability" in config.suites:
        sample = _with_questions(sample, config)
        counts.append(f"{sample.questions:,} questions")
    words = ", ".join(counts)
    try:
        shape = Shape.of_model(config.model)
        machine = None if tokens_per_second else this_machine()
        parts = evaluation_seconds(config, sample, shape, machine, tokens_per_second=tokens_per_second)
        words += f"; about {text.duration(sum(parts.values()))}"
    except Es2Error as error:
        words += f". No estimate: {error}"
    return " ".join(text.markdown(part) for part in (*notes, words))


def _with_questions(sample: Sample, config: EvaluateConfig) -> Sample:
    """The sample with the multiple-choice questions that will be asked; those of the Hub are not fetched for it."""
    if config.questions.startswith("hf:"):
        return replace(sample, questions=config.question_limit, question_characters=_HUB_CHARACTERS)
    asked = load_questions(config.questions).choose(config.question_limit)
    characters = sum(n_characters(question, config.answer_by) for question in asked)
    return replace(sample, questions=len(asked), question_characters=characters / len(asked))


def _sample(config: EvaluateConfig, run: Job) -> tuple[Sample, list[str]]:
    """The prompts of the evaluation, and why a part of it cannot be measured on them."""
    prompts = artifacts.prompts(config.prompts)
    try:
        tuned_on = artifacts.prompts(str(run.config.get("prompts", "builtin")))
    except InputError:
        tuned_on = None  # the result has a note about it
    problems: list[str] = []
    kept = held_out(prompts, tuned_on)
    sample = choose_prompts(kept, config.limit)
    harmful, harmless = (int((sample.labels == label).sum()) for label in (HARMFUL, HARMLESS))
    if "kl" in config.suites and not harmless:
        _cannot("These prompts hold no harmless one, so there is no ability to measure.", config, problems)
    replied = artifacts.replied_by_base(config.model)
    found = Sample(
        harmful,
        harmless,
        0,
        0,
        characters=sum(map(len, sample.texts)) / max(len(sample), 1),
        known=known_shares(config, replied, sample),
    )
    if not {*ATTACKS, "direction"} & set(config.suites):
        return found, problems
    try:
        probing = held_out(prompts, tuned_on, probing=True)
        check_prompts(probing)
    except InputError as error:
        _cannot(str(error), config, problems)
        return found, problems
    measured = probing.measured()
    in_test = measured.select(measured.in_split("test"))
    directed = choose_prompts(in_test, config.limit)
    steered = choose_prompts(in_test, config.steering_limit, HARMFUL).texts
    layers = config.layers or config_of(run).targets
    rendering = config.rendering.over(rendering_of(run))
    known = find_activations(artifacts.model_name(config.model), measured, "last", run=run.id, rendering=rendering)
    return replace(
        found,
        steered=len(steered),
        directed=len(directed),
        measured=0 if known else len(measured),
        known=known_shares(config, replied, sample, steered, directed, layers),
    ), problems


def _cannot(sentence: str, config: EvaluateConfig, problems: list[str]) -> None:
    """Refuse a suite that is asked for alone; of a whole evaluation the rest goes on."""
    if config.suite != "all":
        raise InputError(sentence)
    problems.append(sentence)
