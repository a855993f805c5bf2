"""The film of a run, read from its folder."""

from __future__ import annotations

from dataclasses import replace

from es2.analysis.film import FilmView, film_view
from es2.jobs.job import Job
from es2.prompts.prompt_set import PromptSet
from es2.store.film import FILM, frame_files, read_film, texts_by_hash


def find_film(run: Job, prompts: PromptSet | None, *, raw: bool = False) -> FilmView | None:
    """The points of a run's film; None for a run that has none, or not yet two frames of it.

    Args:
        prompts: whose texts are shown, all splits of them; None where they cannot be read.
        raw: as for `film_view`.

    Raises:
        InputError: for a film of a newer format.
        MachineError: when it cannot be read.
    """
    folder = run.path / FILM
    n_files, frames = len(frame_files(folder)), read_film(folder)
    view = film_view(frames, texts_by_hash(prompts) if prompts is not None else None, raw=raw)
    n_unread = max(0, n_files - len(frames))  # of a run under way there may be more by now
    return view and replace(view, n_lost=view.n_lost + n_unread)
