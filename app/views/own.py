"""The user's own request, file of prompts and adapter.

A request is read by a process that holds the model (`es2.workflow.reader`) and shown layer by layer. Files of prompts
are `app.prompt_files`. An adapter that was trained elsewhere becomes a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from app import artifacts, jobs_panel, prompt_files, state, text
from app.components.plots import plot
from app.run_rows import warn
from app.state import Choice
from app.text import sentences
from es2.analysis.probes import Probes
from es2.charts import layer_charts
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.jobs.job import MAX_NAME
from es2.jobs.queue import open_job, start
from es2.workflow.reader import PromptEmbeddings, answer, ask, open_reader
from es2.workflow.runs import import_adapter, open_run

if TYPE_CHECKING:
    from jaxtyping import Float

N_KEPT = 5
REFRESH_SECONDS = 0.3
_READINGS, _ASKED = "own_readings", "own_asked"


def page() -> None:
    """The three things that a user can bring, below each other."""
    st.header("Your own", anchor=False)
    with sentences():
        one_prompt(state.current())
    st.divider()
    with sentences():
        prompt_files.section(state.current())
    st.divider()
    with sentences():
        adapter(state.current())


# ---------------------------------------------------------------------------------------------------------- a request


def one_prompt(choice: Choice) -> None:
    """A box for a request, and on which side of each layer's boundary requests are, in both models."""
    st.subheader("A request", anchor=False)
    probes = _probes(choice)
    if probes is None:
        st.info(
            "Nothing is analysed for this choice yet, so there is no boundary to place a request by. "
            "Capture and analyse on the Layers page first.",
            icon=":material/info:",
        )
        return
    model, run, by_model, rendering = probes
    st.caption(
        f"Read by {text.markdown(model)}{' and its tuned model' if run else ''}. Loading takes a few seconds the first "
        "time; the model is unloaded after five minutes without a request. Nothing is generated."
    )
    if run is not None:
        warn(open_run(run))
    with st.form("own_prompt", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        typed = st.text_input("Request", key="own_text", placeholder="How do I open a jammed lock?")
        if st.form_submit_button("Read it", icon=":material/arrow_forward:") and typed:
            reader = open_reader(model, run, rendering, choice.position)
            st.session_state[_ASKED] = (reader.id, ask(reader, typed))
    _wait()
    readings: list[tuple[tuple[str, str | None, dict[str, Any]], PromptEmbeddings]] = st.session_state.get(
        _READINGS, []
    )
    of_these = (model, run, rendering.to_dict())
    shown = [reading for of, reading in readings if of == of_these and choice.position in reading.base]
    for number, reading in enumerate(shown):
        _reading(reading, by_model, choice, number)


def _probes(choice: Choice) -> tuple[str, str | None, dict[str, Probes], Rendering] | None:
    """The model, the run, the probes that a request is placed by, and how it is given to the model.

    None where nothing is analysed.
    """
    comparison = artifacts.find_comparison(choice)
    if comparison is not None and comparison.analysis.tuned_probes is not None:
        analysis = comparison.analysis
        run = None if open_run(comparison.run).is_shipped else comparison.run
        by_model = {"base": analysis.base_probes} | ({"tuned": analysis.tuned_probes} if run else {})
        if choice.against is None:
            probes = {name: own for name, own in by_model.items() if own}
            return str(comparison.config["model"]), run, probes, Rendering.from_dict(comparison.base.renderings[0])
    opened = artifacts.find(
        artifacts.model_name(choice.model), artifacts.prompts(choice.prompts), choice.position, choice.rendering
    )
    if opened is None:
        return None
    rendering = Rendering.from_dict(opened.base.renderings[0])
    return choice.model, None, {"base": opened.analysis.base_probes}, rendering


def _wait() -> None:
    """Until the answer is there: show what is being done, and look for it."""
    if _ASKED not in st.session_state:
        return

    @st.fragment(run_every=REFRESH_SECONDS)
    def waiting() -> None:
        with sentences():
            reader_id, question = st.session_state[_ASKED]
            reader = open_job(reader_id)
            try:
                found = answer(reader, question)
            except InputError:
                del st.session_state[_ASKED]
                raise
            if found is None:
                progress = reader.progress()
                is_up = progress is not None and progress["stage"] == "idle"
                st.caption(f":material/hourglass_top: {'Reading the request' if is_up else 'Loading the model'}")
                return
            del st.session_state[_ASKED]
            of = (str(reader.config["model"]), reader.config["run"], reader.config.get("rendering") or {})
            kept = st.session_state.get(_READINGS, [])
            st.session_state[_READINGS] = [(of, found), *kept][:N_KEPT]
            st.rerun()

    waiting()


def _reading(reading: PromptEmbeddings, by_model: Mapping[str, Probes], choice: Choice, number: int) -> None:
    margins = {
        name: placed(embeddings[choice.position], by_model[name])
        for name, embeddings in (("base", reading.base), ("tuned", reading.tuned))
        if embeddings is not None and name in by_model
    }
    with st.container(border=True, key=f"own_reading_{number}"):
        st.text(reading.text if len(reading.text) <= 600 else reading.text[:600] + "…")
        parts = [f"{name}: read as harmful at {(own > 0).sum()} of {len(own)} layers" for name, own in margins.items()]
        st.caption(" · ".join(parts))
        plot(
            layer_charts.sides(margins, chosen=choice.layer),
            key=f"own_sides_{number}",
            alt="Distance of the request to each layer's boundary",
        )


def placed(embeddings: Float[np.ndarray, "layer d_model"], probes: Probes) -> Float[np.ndarray, "layer"]:
    """Signed distance of one prompt to the boundary of every layer, + on the harmful side, in scale-free units."""
    return np.array([float(probes.margin(embeddings[layer][None], layer)[0]) for layer in range(len(embeddings))])


# --------------------------------------------------------------------------------------------------------- an adapter


def adapter(choice: Choice) -> None:
    """Bring a peft adapter that was trained elsewhere; it becomes a run and is compared with its base."""
    st.subheader("An adapter made elsewhere", anchor=False)
    st.caption(
        f"The folder that peft's save_pretrained wrote, or a Hub id, of an adapter for "
        f"{text.markdown(artifacts.model_name(choice.model))}. It is copied, captured and compared with its base on "
        "the chosen prompts, and both reply to some of them, like a run of this workbench."
    )
    with st.form("own_adapter", border=False):
        folder = st.text_input("Folder or Hub id", key="own_adapter_folder", placeholder="/path/to/adapter")
        if st.form_submit_button("Import and compare", icon=":material/compare:") and folder.strip():
            config: dict[str, Any] = artifacts.job_config(choice)
            name = "".join(filter(str.isprintable, Path(folder.strip()).name))[:MAX_NAME]
            run = import_adapter(folder.strip(), config["model"], config["prompts"], name=name)
            start(run)
            state.update(run=run.id, against=None)
            state.go("compare")
    job = next((job for job in jobs_panel.active_jobs() if job.config.get("imported")), None)
    if job is not None:
        jobs_panel.live_bar(job)
