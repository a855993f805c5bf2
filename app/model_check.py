"""The check of a model, on request: whether what the workbench reads of it is what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from app import jobs_panel, text
from app.state import Choice
from es2.core.errors import InputError
from es2.jobs.job import Job
from es2.models.catalogue import resolve
from es2.prompts.benchmarks import absolute_source

_ICONS = {True: ":material/check:", False: ":material/error:", None: ":material/remove:"}


def button(choice: Choice) -> None:
    """The button that opens the check of the chosen model, and of the chosen run's adapter on it, with its outcome."""
    try:
        spec = resolve(choice.model)
    except InputError:
        return  # the page shows what is wrong with the name
    model = spec.location if spec.kind in ("folder", "gguf") else spec.name
    config: dict[str, Any] = {"model": model, "prompts": absolute_source(choice.prompts), "run": choice.run}
    if asked := choice.rendering.to_dict():
        config["rendering"] = asked
    job = jobs_panel.latest("check", config)
    found = _result(job)
    failed = [check for check in (found or {}).get("checks", ()) if check["passed"] is False]
    if job is not None and job.is_active():
        label, icon = "Checking the model", ":material/hourglass:"
    elif found is None:
        label, icon = "Check this model", ":material/fact_check:"
    elif failed:
        label, icon = f"Checked: {len(failed)} wrong", ":material/error:"
    else:
        label, icon = "Checked: all as computed", ":material/check:"
    if st.button(label, key="check_model", type="tertiary", icon=icon):
        _dialog(config)
    if failed:
        st.error(text.markdown(failed[0]["sentence"]), icon=":material/error:")


@st.dialog("Is the model read as it computes?", width="large")
def _dialog(config: Mapping[str, Any]) -> None:
    st.caption(
        "A few prompts are read in the plain way, one at a time, and everything that the workbench reads of the model "
        "is held against that. What fails is refused from then on."
    )
    if jobs_panel.offer("check", config, "Check", "start_check", icon=":material/fact_check:"):
        return
    found = _result(jobs_panel.latest("check", config))
    for check in (found or {}).get("checks", ()):
        st.markdown(f"{_ICONS[check['passed']]} **{check['name']}**  {text.markdown(check['sentence'])}")
    rendered = [one for check in (found or {}).get("checks", ()) for one in check["details"].get("rendered", ())]
    if rendered:
        st.markdown("A prompt as the model reads it")
        st.code(rendered[0], language=None, wrap_lines=True)


def _result(job: Job | None) -> dict[str, Any] | None:
    """What a check has found; None while there is nothing."""
    return None if job is None or job.is_active() else job.result()
