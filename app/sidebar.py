"""The sidebar: which model, which prompts, which position, and the jobs that are under way."""

from __future__ import annotations

import streamlit as st

from app import artifacts, jobs_panel, model_check, rendering_panel, state, text
from es2.core.errors import Es2Error, InputError
from es2.jobs.queue import list_jobs
from es2.models.catalogue import CATALOGUE, resolve
from es2.models.mirror import has_mirrored
from es2.prompts.sources import Source, read_source, source_title
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
    names, captured = artifacts.models()
    for name in ("model", "prompts", "position"):
        st.session_state[name] = getattr(choice, name)
    st.selectbox(
        "Model",
        names if choice.model in names else [choice.model, *names],
        key="model",
        format_func=lambda name: f"{name} · ready" if name in captured else name,
        accept_new_options=True,
        placeholder="Choose or type a model",
        help="Choose a name, or type a Hub id (owner/name), the path of a model folder, or of a .gguf file. "
        "Those that are ready have embeddings on disk and come first.",
        on_change=_model_changed,
    )
    st.selectbox(
        "Prompts",
        _prompt_sources(choice.prompts),
        key="prompts",
        format_func=_source_name,
        accept_new_options=True,
        placeholder="Choose or type a file",
        help="The built-in contrast pairs, or the path of a table (CSV, TSV, JSON, JSONL, TXT, Parquet; also .gz) with "
        "a column of prompts and one of labels and, where known, category, pair and split. Files are uploaded, and "
        "the reading of their columns is corrected, on the page Your own.",
        on_change=_prompts_changed,
    )
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
        state.update(model=_lasting(model), run=None, against=None)


def _lasting(model: str) -> str:
    """A typed folder or file as its absolute path; anything else as it is, for the page to judge."""
    try:
        spec = resolve(model)
    except InputError:
        return model
    return spec.location if spec.kind in ("folder", "gguf") else spec.name


def _prompts_changed() -> None:
    prompts = (st.session_state["prompts"] or "").strip()
    if prompts:
        try:
            state.choose_prompts(prompts)
        except InputError as error:
            state.update()
            state.note(str(error))


def _source_name(source: str) -> str:
    """A path as it is; two files, or columns that were chosen, in few words."""
    if source == "builtin":
        return "builtin · contrast pairs"
    return source if read_source(source) == Source(source) else source_title(source)


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


def _prompt_sources(chosen: str) -> list[str]:
    """The built-in set, what is chosen, and what jobs were given before."""
    used = [job.config["prompts"] for job in list_jobs() if isinstance(job.config.get("prompts"), str)]
    return list(dict.fromkeys(["builtin", chosen, *used]))
