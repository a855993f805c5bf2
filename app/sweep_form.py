"""The form that starts a sweep: how many trials, which settings are searched and where, how long it takes, one button.

What is refused here is what `es2 sweep` refuses, and before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, launch, state, text
from app.run_rows import METHOD_NAMES
from app.settings_form import SettingsForm, start_button
from app.state import Choice
from es2.core.errors import Es2Error, InputError
from es2.core.rendering import Rendering
from es2.core.settings import extra, parse_list
from es2.jobs.queue import find_jobs, start
from es2.models.catalogue import resolve
from es2.models.machine import this_machine
from es2.models.shape import Shape, local_folder
from es2.prompts.benchmarks import absolute_source
from es2.prompts.prompt_set import PromptSet
from es2.training.config import FinetuneConfig
from es2.workflow.plan import guessed_layers
from es2.workflow.sweep import checked_space, create_sweep
from es2.workflow.sweep_plan import sweep_seconds
from es2.workflow.sweep_space import SEARCHED, SHAPE, Space, SweepConfig
from es2.workflow.sweeps import KIND

OPEN = "sweep_open"
"""The session's key for whether the page shows the form."""
SEARCHED_NAMES = {
    "layers": "Target layers",
    "objective": "Objective",
    "kl_weight": "λ",
    "learning_rate": "Learning rate",
    "rank": "LoRA rank",
}
_FORM = "sweep"
_ALWAYS_OPEN = ("alpha",)  # twice the rank
_OTHERS = [
    name
    for name, field in FinetuneConfig.model_fields.items()
    if extra(field, "group") != "own"
    and name not in (*SEARCHED, *SHAPE, *_ALWAYS_OPEN, "replies", *Rendering.model_fields)
]


def form(choice: Choice) -> None:
    """Render the form for the model and the prompts of the choice."""
    with st.container(border=True, key="sweep_form"):
        st.subheader("Start a sweep", anchor=False)
        prompts = artifacts.prompts(choice.prompts)
        model = artifacts.model_name(choice.model)
        st.caption(
            f"Short fine-tunes of **{text.markdown(model)}** on {text.markdown(prompts.name)}, each with other "
            "settings; the first has the shipped ones. Each is a run of its own. Model and prompts are chosen at the "
            "left."
        )
        values, given = _settings(choice)
        spec = resolve(choice.model)
        given |= {"model": spec.location if spec.kind in ("folder", "gguf") else spec.name}
        given |= dict(prompts.rendered_as(choice.rendering))
        try:
            config, given, space, folder = _checked(values, given, prompts)
            problem = ""
        except InputError as error:
            config, problem = None, text.in_app(str(error))
        with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="sweep_start"):
            pressed = start_button("Start the sweep", "start_sweep", disabled=config is None)
            if config is None:
                st.markdown(f":red[{text.markdown(problem)}]", width="stretch")
            elif pressed:
                _begin(config, given, prompts, absolute_source(choice.prompts), space)
            else:
                _show_estimate(config, space, prompts, folder)


def _settings(choice: Choice) -> tuple[dict[str, Any], dict[str, Any]]:
    """Render the settings; returns those of the sweep, and those of every trial, where None is searched."""
    sweep = SettingsForm(SweepConfig, _FORM, {})
    trial = SettingsForm(FinetuneConfig, "sweep_fixed", {"method": METHOD_NAMES})
    values = sweep.group("main")
    free = _free()
    given: dict[str, Any] = dict.fromkeys((*SEARCHED, *_ALWAYS_OPEN))
    for at in range(0, len(SEARCHED), 3):
        for column, name in zip(st.columns(3, gap="small"), list(SEARCHED)[at : at + 3], strict=False):
            with column:
                if name in free:
                    values[SEARCHED[name]] = sweep.one(SEARCHED[name])
                else:
                    given[name] = trial.one(name, _usual_layers(choice) if name == "layers" else None)
    if "learning_rate" not in free and given["learning_rate"] is None:
        values["rate_factors"] = "1"
    with st.expander("Advanced", key="sweep_advanced"):
        values |= sweep.group("advanced")
        given |= trial.rows(_OTHERS)
    return values, given


def _free() -> Sequence[str]:
    """Render the choice of the settings that are searched."""
    known = state.settings(_FORM).get("free", list(SEARCHED))
    st.session_state["sweep_free"] = known
    st.pills(
        "Searched settings",
        list(SEARCHED),
        key="sweep_free",
        selection_mode="multi",
        format_func=SEARCHED_NAMES.__getitem__,
        help="What is searched has a range or a list below; what is not is the same in every trial.",
        on_change=lambda: state.take_setting(_FORM, "free", list(st.session_state["sweep_free"])),
    )
    free: list[str] = st.session_state["sweep_free"]
    return free


def _usual_layers(choice: Choice) -> tuple[int, ...]:
    return state.targets(choice.model, guessed_layers(Shape.of_model(choice.model).n_layers))


def _checked(
    values: Mapping[str, Any], given: Mapping[str, Any], prompts: PromptSet
) -> tuple[SweepConfig, dict[str, Any], Space, Path]:
    """The sweep, what is given of its trials, its space and the model's folder. Raises `InputError`."""
    folder = local_folder(str(given["model"]))
    if folder is None:
        raise InputError(
            "The model is not on this machine yet; capture and analyse it on the page Layers first, as a sweep would."
        )
    config = SweepConfig.from_text(dict(values))
    parsed = {name: parse_list(FinetuneConfig, name, value) for name, value in given.items()}
    return config, parsed, checked_space(config, parsed, prompts, folder), folder


def _begin(config: SweepConfig, given: Mapping[str, Any], prompts: PromptSet, source: str, space: Space) -> None:
    """Start the sweep, unless the same one is under way: a second click starts nothing."""
    same = {"sweep": config.to_dict(), "space": space.to_dict(), "prompts": source}
    if not any(job.is_active() for job in find_jobs(KIND, same)):
        start(create_sweep(config, given, prompts, source, lambda *_, **__: None))
    st.session_state[OPEN] = False
    state.settle(sweep=None, trial=None)
    st.rerun()


def _show_estimate(config: SweepConfig, space: Space, prompts: PromptSet, folder: Path) -> None:
    try:
        machine = replace(this_machine(space.fixed.get("device")), n_devices=1)
        lengths = launch.lengths_of(folder, prompts)
        seconds = sweep_seconds(space, config.trials, prompts, machine, lengths, defended=config.defence)
    except Es2Error as error:
        st.caption(f"No estimate: {text.markdown(str(error))}")
        return
    device = "an idle CPU" if machine.device == "cpu" else machine.device
    with st.container(key="sweep_estimate", gap="xsmall"):
        limit = None if config.minutes is None else 60 * config.minutes
        cut = limit is not None and limit < seconds
        st.markdown(f"At most **{text.duration(limit if cut and limit else seconds)}** on {device}")
        whole = f"All {config.trials:,} trials would take {text.duration(seconds)}. " if cut else ""
        st.caption(f"{whole}It ends earlier where trials are pruned, and can be cancelled and resumed.")
