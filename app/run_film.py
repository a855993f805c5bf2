"""The film of a run: how its clouds moved, played on its page and taken away as an HTML file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import streamlit as st

from app import artifacts
from app.components import exports
from app.components.plots import plot
from es2.analysis.film import FilmView
from es2.charts.run_charts import History
from es2.core.errors import Es2Error
from es2.core.files import stamp_of
from es2.jobs.job import Job
from es2.prompts.prompt_set import PromptSet
from es2.report.film import film_caption, film_figure
from es2.store.film import FILM
from es2.workflow.film import find_film
from es2.workflow.runs import config_of

TITLE = "Film: held-out prompts, step by step"
_ALT = "The embeddings of held-out prompts at the target layers, step by step, beside loss, KL and margin"


def film(job: Job, history: History, *, key: str, live: bool = False) -> None:
    """Show a run's film, if it has one; of a run under way its last frame first, and nothing to choose."""
    folder = job.path / FILM
    if not folder.is_dir():
        return
    with st.container(key=f"film_{key}"):
        raw = False
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.markdown(f":small[**{TITLE}**]", width="content")
            if not live:
                raw = st.toggle(
                    "Raw lengths",
                    key=f"film_{key}_raw",
                    help="Draw in the model's own units instead of dividing each step by the length of its embeddings. "
                    "A residual stream that was merely inflated looks better separated then.",
                )
        view = _view(job, raw)
        if view is None:
            st.caption("It begins with the first look at held-out prompts.")
            return
        result = job.result() or {}
        figure = film_figure(view, history.curve("loss"), config_of(job).kl_budget, n_steps=history.total, at_end=live)
        plot(figure, key=f"film_{key}_figure", alt=_ALT)
        caption = film_caption(view, result.get("best_step"))
        st.caption(caption)
        if not live:
            name = f"Film of {artifacts.run_title(job)}"
            exports.download(
                "Save the film", partial(exports.chart, figure, name, caption), name, "html", f"film_{key}_save"
            )


def _view(job: Job, raw: bool) -> FilmView | None:
    stamps = tuple((path.name, stamp_of(path)) for path in sorted((job.path / FILM).glob("*")))
    try:
        prompts = artifacts.prompts(str(job.config.get("prompts", "builtin")))
    except Es2Error:
        prompts = None  # the list of runs says that the file is gone
    return _kept(job.path, stamps, raw, prompts.digest if prompts is not None else None, job, prompts)


@st.cache_resource(max_entries=8, show_spinner=False)
def _kept(
    path: Path, stamps: object, raw: bool, digest: str | None, _job: Job, _prompts: PromptSet | None
) -> FilmView | None:
    """As `find_film`; read again when a file has changed."""
    return find_film(_job, _prompts, raw=raw)
