"""The sidebar: which model, which prompts, which position, and the jobs that are under way."""

from __future__ import annotations

import streamlit as st

from app import artifacts, jobs_panel, model_check, rendering_panel, state, text
from app.choice_boxes import lasting, model_box, prompts_box
from es2.core.errors import Es2Error, InputError
from es2.models.catalogue import CATALOGUE
from es2.models.mirror import has_mirrored
from es2.store.sources import POSITIONS, before_last

POSITION_NAMES = {"last": "Last token", "last_instruction": "Last of request"}


def position_name(position: str) -> str:
    """What a position is called."""
    distance = before_last(position)
    return POSITION_NAMES.get(position) or ("Mean of request" if distance is None else f"{distance} before last")


_ENTRIES = {entry.name: entry for entry in CATALOGUE}


def show() -> None:
    """Render the sidebar's choices; the jobs follow at its end."""
    st.subheader("ES2 Workbench", anchor=False)
    choice = state.current()
    for name in ("model", "prompts", "position"):
        st.session_state[name] = getattr(choice, name)
    model_box("model", _model_changed)
    prompts_box("prompts", _prompts_changed)
    _how_they_are_read(choice.prompts)
    st.segmented_control(
        "Position",
        dict.fromkeys((*POSITIONS, choice.position)),
        key="position",
        format_func=position_name,
        required=True,
        width="stretch",
        help="Whose embedding is read. **Last token**: the last token of the chat template, where the model is about "
        "to answer; refusal is read best here. **Last of request**: the last token of the user's own text; "
        "harmfulness is read best here. Other tokens, and the mean over the request, are under “How the model reads "
        "them”.",
        on_change=lambda: state.update(position=st.session_state["position"]),
    )
    rendering_panel.button(choice)
    if (entry := _ENTRIES.get(choice.model)) is not None:
        access = "gated on the Hub" if entry.gated else "open"
        if has_mirrored(entry.name):
            access += ", here rounded to four bits, from packages of a third party"
        st.caption(
            f"{entry.parameters / 1e6:,.0f} M weights, {entry.n_layers} layers, {entry.d_model} dimensions, "
            f"{entry.licence}, {access}. Capturing takes about {entry.memory_gb('float32'):.1f} GB of memory on a CPU."
        )
    model_check.button(choice)
    st.markdown("**Jobs**")
    jobs_panel.poll()


def _model_changed() -> None:
    model = (st.session_state["model"] or "").strip()
    if model:
        state.update(model=lasting(model), run=None, against=None, series=())


def _prompts_changed() -> None:
    prompts = (st.session_state["prompts"] or "").strip()
    if prompts:
        try:
            state.choose_prompts(prompts)
        except InputError as error:
            state.update()
            state.note(str(error))


def _how_they_are_read(source: str) -> None:
    """What was understood where that was not plain, near-duplicates in two splits, and the way to correct the reading.

    What is wrong with prompts that cannot be read is on the page.
    """
    try:
        prompts = artifacts.prompts(source)
    except Es2Error:
        prompts = None
    if prompts is not None and prompts.reading is not None and not prompts.reading.is_plain:
        st.caption(text.markdown(prompts.reading.sentence))
    if prompts is not None and prompts.leak is not None:
        st.warning(text.markdown(prompts.leak))
    is_file = prompts is None or prompts.reading is not None
    if is_file and st.button("See how they are read", key="to_reading", type="tertiary", icon=":material/table_view:"):
        state.go("own")
