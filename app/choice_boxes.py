"""The boxes in which model and prompts are chosen, the same in the sidebar and in the panel of the rendering.

What a box is set to is in the session's state, under its key.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app import artifacts
from es2.core.errors import InputError
from es2.jobs.queue import list_jobs
from es2.models.catalogue import resolve
from es2.prompts.sources import Source, read_source, source_title


def model_box(key: str, on_change: Callable[[], None] | None = None) -> None:
    """Choose or type a model."""
    names, captured = artifacts.models()
    chosen = st.session_state[key]
    st.selectbox(
        "Model",
        names if chosen in names else [chosen, *names],
        key=key,
        format_func=lambda name: f"{name} · ready" if name in captured else name,
        accept_new_options=True,
        placeholder="Choose or type a model",
        help="Choose a name, or type a Hub id (owner/name), the path of a model folder, or of a .gguf file. "
        "Those that are ready have embeddings on disk and come first.",
        on_change=on_change,
    )


def prompts_box(key: str, on_change: Callable[[], None] | None = None) -> None:
    """Choose prompts, or type a file."""
    used = [job.config["prompts"] for job in list_jobs() if isinstance(job.config.get("prompts"), str)]
    st.selectbox(
        "Prompts",
        list(dict.fromkeys(["builtin", st.session_state[key], *used])),
        key=key,
        format_func=_source_name,
        accept_new_options=True,
        placeholder="Choose or type a file",
        help="The built-in contrast pairs, or the path of a table (CSV, TSV, JSON, JSONL, TXT, Parquet; also .gz) with "
        "a column of prompts and one of labels and, where known, category, pair and split. Files are uploaded, and "
        "the reading of their columns is corrected, on the page Your own.",
        on_change=on_change,
    )


def lasting(model: str) -> str:
    """A typed folder or file as its absolute path; anything else as it is, for the page to judge."""
    try:
        spec = resolve(model)
    except InputError:
        return model
    return spec.location if spec.kind in ("folder", "gguf") else spec.name


def _source_name(source: str) -> str:
    """A path as it is; two files, or columns that were chosen, in few words."""
    if source == "builtin":
        return "builtin · contrast pairs"
    return source if read_source(source) == Source(source) else source_title(source)
