"""Reading artifacts for the page, each once: a page runs at every click, so what it reads is cached by artifact key.

Of a layer two small arrays are kept, its embeddings only for the last two. All sessions share the cached values, which
are never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from app.state import Choice
from app.text import in_app
from es2.analysis.comparison import Comparison
from es2.analysis.layer_views import RENDERS, LayerViews
from es2.analysis.projection import FitOn, View
from es2.analysis.results import Analysis
from es2.core.errors import Es2Error
from es2.core.files import files_below, stamp_of
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.evaluation.results import find_evaluations
from es2.jobs.job import Job
from es2.models.catalogue import CATALOGUE, resolve
from es2.prompts.benchmarks import source_files
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ACTIVATIONS, META, TEXTS, ActivationSet
from es2.store.store import Store
from es2.workflow import compared, evaluation_plan
from es2.workflow.derived import find_activations, find_analysis_folder, find_umap, find_views_folder
from es2.workflow.runs import SHOWCASE, list_runs, open_run, rendering_of, shipped_run
from es2.workflow.runs import run_title as run_title

if TYPE_CHECKING:
    from jaxtyping import Float


ENDED = ("done", "stopped")
_AHEAD = ThreadPoolExecutor(1, thread_name_prefix="ahead")
_waiting: list[Future[object]] = []

_found: dict[tuple[object, ...], tuple[Comparison, tuple[object, ...] | None]] = {}
"""What `_comparison` has found, and the files it was read from; at most `_FOUND` of them, the newest last."""
_FOUND = 16

UMAP_START_SECONDS = 25.0
UMAP_SECONDS_PER_PROMPT = 2.5e-3
"""Measured on two cores with 576 dimensions; a hint, no more."""


def models() -> tuple[list[str], set[str]]:
    """Names to choose from, those with artifacts first, and the set of those with artifacts."""
    captured = list(dict.fromkeys(name for found in Store().list() if found.run is None for name in found.models))
    known = [entry.name for entry in CATALOGUE]
    return captured + [name for name in known if name not in captured], set(captured)


def model_name(model: str) -> str:
    """The name under which a model's artifacts are kept; a model with artifacts need not be on this machine.

    Raises:
        InputError: when `model` names nothing.
    """
    return model if model in models()[1] else resolve(model).name


def replied_by_base(model: str) -> frozenset[str]:
    """What a base replied to already, as `known_shares` takes it; nothing where that cannot be read."""
    with suppress(Es2Error):
        if (path := evaluation_plan.replies_of_base(model)) is not None:
            return _replied(str(path), stamp_of(path))
    return frozenset()


@st.cache_resource(max_entries=2, show_spinner=False)
def _replied(path: str, stamp: object) -> frozenset[str]:
    return evaluation_plan.replied_by_base(Path(path))


def existing(choice: Choice) -> tuple[Choice, list[str]]:
    """The choice with what does not exist replaced by what is usual, and a sentence for each replacement.

    A choice that asks for nothing gets the model and the prompts of the newest run that has ended; where nothing was
    made yet, those of the showcase.
    """
    notes = []
    if choice == Choice():
        newest = next((run.id for run in list_runs() if run.status() in ENDED), None)
        if newest is None and not Store().list():
            newest = SHOWCASE
        choice = replace(choice, **of_run(Choice(run=newest)))
    try:
        model_name(choice.model)
    except Es2Error as error:
        choice = replace(choice, model=Choice.model)
        notes.append(f"{error} The link asked for it; {choice.model} is shown instead.")
    try:
        prompts(choice.prompts)
    except Es2Error as error:
        choice = replace(choice, prompts=Choice.prompts)
        notes.append(f"{in_app(str(error))} The link asked for it; the {choice.prompts} prompts are shown instead.")
    return choice, notes


def prompts(source: str) -> PromptSet:
    """The prompt set of `source`, read again when its file changes. Raises as `load_prompts` does."""
    return _prompts(source, tuple(stamp_of(file) for file in source_files(source)))


@st.cache_resource(max_entries=8, show_spinner="Reading the prompts")
def _prompts(source: str, stamp: object) -> PromptSet:
    return load_prompts(source)


@dataclass(frozen=True)
class Opened:
    """What there is on disk for a model, a prompt set and a position: a `Comparison` without a tuned model."""

    prompts: PromptSet
    base: ActivationSet
    analysis: Analysis
    position: str
    tuned: None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies everything a figure is made from."""
        return (self.base.key, self.prompts.digest, self.position, str(self.analysis.config))


def find(model: str, prompt_set: PromptSet, position: str, rendering: Rendering = AS_THE_TEMPLATE) -> Opened | None:
    """The activation set of the measured prompts and its analysis, if both are there."""
    prompt_set = prompt_set.measured()
    found = find_activations(model, prompt_set, position, rendering=rendering)
    if found is None:
        return None
    activations = _keep(found)
    analysis = _analysis(activations, prompt_set, position)
    return Opened(prompt_set, activations, analysis, position) if analysis is not None else None


def sets() -> list[ActivationSet]:
    """Every activation set, newest first."""
    return Store().list()


def beside(opened: Opened, tuned: ActivationSet) -> tuple[ActivationSet, Analysis | None]:
    """A set that stands beside base, the same object at every run, and the analysis of both; None if there is none."""
    kept = _keep(tuned)
    return kept, _analysis(opened.base, opened.prompts, opened.position, kept)


def result_stamp(run: Job) -> object:
    """What tells a run's result from an earlier one."""
    return stamp_of(run.path / "result.json")


def by_position(opened: Opened) -> dict[str, Analysis | None]:
    """By captured position, from the end of the prompt on, its analysis; None where there is none yet."""
    captured = _captured(opened.base)
    return {position: _analysis(_keep(found), opened.prompts, position) for position, found in captured.items()}


def _captured(like: ActivationSet) -> dict[str, ActivationSet]:
    """By captured position, the set itself or one of the same prompts, model and rendering that holds it."""
    rendering = Rendering.from_dict(like.renderings[0])
    found = Store().by_position(model=like.model, texts_digest=like.texts_digest, run=like.run, rendering=rendering)
    return found | dict.fromkeys(like.positions, like)


def _keep(found: ActivationSet) -> ActivationSet:
    return _kept(found.key, found.inode, found)


@st.cache_resource(max_entries=32, show_spinner=False)
def _kept(key: str, inode: int, _activations: ActivationSet) -> ActivationSet:
    """The same object at every run, so that its files are checked once."""
    return _activations


def _analysis(
    base: ActivationSet, prompt_set: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Analysis | None:
    """As `find_analysis`; read once for as long as its folder is the same one."""
    folder = find_analysis_folder(base, prompt_set, position, tuned)
    return _loaded(str(folder), folder.stat().st_ino) if folder is not None else None


@st.cache_resource(max_entries=32, show_spinner=False)
def _loaded(folder: str, inode: int) -> Analysis:
    return Analysis.load(Path(folder))


def _views_of(shown: Opened | Comparison) -> LayerViews | None:
    """What a job has computed of all layers, if they are large; read once for as long as its folder is the same."""
    folder = find_views_folder(shown.base, shown.prompts, shown.analysis.config, shown.tuned)
    return _loaded_views(str(folder), folder.stat().st_ino) if folder is not None else None


@st.cache_resource(max_entries=4, show_spinner=False)
def _loaded_views(folder: str, inode: int) -> LayerViews:
    return LayerViews.load(Path(folder))


@st.cache_resource(max_entries=2, show_spinner=False)
def _embeddings(
    key: tuple[str, ...], layer: int, _shown: Opened | Comparison
) -> tuple[Float[np.ndarray, "prompt d_model"], ...]:
    """One layer under each model, for the margins and the view, which ask one after the other."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(lambda one: one.layer(layer, _shown.position), filter(None, (_shown.base, _shown.tuned))))


def margins(shown: Opened | Comparison, layer: int) -> tuple[Float[np.ndarray, "prompt"], ...]:
    """By model, the signed distance of each prompt to its own boundary, + on the harmful side, in scale-free units."""
    return _margins(shown.key, layer, shown)


@st.cache_resource(max_entries=512, show_spinner=False)
def _margins(key: tuple[str, ...], layer: int, _shown: Opened | Comparison) -> tuple[Float[np.ndarray, "prompt"], ...]:
    if (rendered := _views_of(_shown)) is not None:
        return tuple(rendered.margins(layer))
    probes = filter(None, (_shown.analysis.base_probes, _shown.analysis.tuned_probes))
    return tuple(own.margin(one, layer) for own, one in zip(probes, _embeddings(key, layer, _shown), strict=True))


def view(
    shown: Opened | Comparison, layer: int, kind: str, *, fit_on: FitOn = "base", raw: bool = False
) -> View | None:
    """Where each prompt is in each model, in one frame; None for UMAP coordinates that were not computed yet.

    Args:
        shown: one model, or two.
        layer: the layer's index.
        kind: `separation`, `pca` or `umap`.
        fit_on: what PCA's axes are fitted on.
        raw: whether lengths are the models' own rather than divided by each model's scale; not for UMAP.
    """
    if kind == "umap":
        coordinates = find_umap(shown.base, shown.prompts, shown.position, shown.tuned)
        return coordinates.view(layer) if coordinates is not None else None
    return _view(shown.key, layer, kind, fit_on, raw, shown)


@st.cache_resource(max_entries=512, show_spinner=False)
def _view(key: tuple[str, ...], layer: int, kind: str, fit_on: FitOn, raw: bool, _shown: Opened | Comparison) -> View:
    usual = fit_on == "base" and not raw
    if usual and (rendered := _views_of(_shown)) is not None:
        return rendered.view(kind, layer)
    base, *tuned = _embeddings(key, layer, _shown)
    return RENDERS[kind](
        base,
        _shown.analysis.base_probes,
        layer,
        tuned=tuned[0] if tuned else None,
        tuned_probes=_shown.analysis.tuned_probes,
        # Axes are fitted on what is always shown, so that showing other splits moves no point.
        fit=_shown.prompts.in_split("test"),
        fit_on=fit_on,
        raw=raw,
    )


def find_comparison(choice: Choice) -> Comparison | None:
    """What the choice compares, if all of it is on disk: its run (with `against`), else the newest run of its model and
    prompts, else the shipped one.

    Raises:
        InputError: for a run that does not exist, or a shipped one that is damaged or of other prompts than there are.
    """
    if choice.run is not None:
        run = open_run(choice.run)
        against = open_run(choice.against) if choice.against else None
        return _comparison(run, against, choice.position)
    for run in filter(partial(_is_of, choice), list_runs()):
        if run.status() in ENDED and (found := _comparison(run, None, choice.position)) is not None:
            return found
    shipped = shipped_run() if choice.position == Choice.position else None
    return _comparison(shipped, None, choice.position) if shipped is not None and _is_of(choice, shipped) else None


def _is_of(choice: Choice, run: Job) -> bool:
    if (run.config.get("model"), run.config.get("prompts")) != (choice.model, choice.prompts):
        return False
    if choice.rendering == AS_THE_TEMPLATE:
        return True
    tuned = rendering_of(run)
    return choice.rendering.over(tuned).settled == tuned.settled


def of_run(choice: Choice) -> dict[str, Any]:
    """The model and the prompts of the run that is asked for, as changes of the choice: the sidebar names them."""
    if choice.run is None:
        return {}
    try:
        config = open_run(choice.run).config
        return {"model": str(config["model"]), "prompts": str(config["prompts"])}
    except (Es2Error, KeyError):
        return {}  # the page shows that there is no such run


def _comparison(run: Job, against: Job | None, position: str) -> Comparison | None:
    """Base or `against` beside a run; None where something is missing, which can be computed for any that is ours."""
    try:
        prompt_set = prompts(str(run.config.get("prompts", Choice.prompts))).measured()
    except Es2Error:
        return None  # its file is gone or broken, as the list of runs shows
    asked = (run.path, against and against.path, position, prompt_set.digest)
    found, read_at = _found.get(asked, (None, None))
    stamps = _stamps(run, against, found) if found is not None else None
    if found is None or stamps != read_at:
        try:
            found = compared.find_comparison(run, prompt_set, position, against, keep=_keep, find=_analysis)
        except compared.AbsentError:
            _found.pop(asked, None)
            if run.is_shipped:
                raise
            return None
        # Only what lay still while it was read counts as read.
        _found[asked] = (found, stamps if stamps == _stamps(run, against, found) else None)
        for oldest in list(_found)[:-_FOUND]:
            _found.pop(oldest, None)
    return replace(found, names=(run_title(against), run_title(run))) if against is not None else found


def compared_by_position(comparison: Comparison, choice: Choice) -> dict[str, Analysis | None]:
    """As `by_position`, of both models of a comparison; a shipped run has the position that is shown, and no other."""
    run = open_run(comparison.run)
    if run.is_shipped:
        return {comparison.position: comparison.analysis}
    against = open_run(choice.against) if choice.against and choice.run else None
    tuned = _captured(comparison.tuned)
    found = {
        position: _comparison(run, against, position) for position in _captured(comparison.base) if position in tuned
    }
    return {position: one.analysis if one is not None else None for position, one in found.items()}


def _stamps(run: Job, against: Job | None, found: Comparison) -> tuple[object, ...]:
    """The stamps of the files that a comparison is read from."""
    files: list[Path] = []
    for job in filter(None, (run, against)):
        files += [job.path / "result.json", *find_evaluations(job)]
    files += [found.base.path / name for name in (META, ACTIVATIONS, TEXTS)]
    with suppress(OSError):
        files += files_below(found.tuned.path)
    return tuple(map(stamp_of, files))


def make_ready(work: Callable[[int], object], layer: int, n_layers: int) -> None:
    """Do the work of the layers beside this one in the background, since people go from layer to layer.

    What still waits from the last call is given up. An error here is raised again, and shown, when the page turns to
    that layer.
    """
    for one in _waiting:
        one.cancel()
    _waiting[:] = [_AHEAD.submit(work, near) for near in (layer + 1, layer - 1) if 0 <= near < n_layers]


def umap_seconds(shown: Opened | Comparison) -> float:
    """About how long UMAP of every layer will take."""
    n_points = shown.base.n_layers * shown.base.n_prompts * (1 if shown.tuned is None else 2)
    return UMAP_START_SECONDS + UMAP_SECONDS_PER_PROMPT * n_points


def job_config(choice: Choice) -> dict[str, Any]:
    """The settings of a job that makes what the page looks for."""
    asked = choice.rendering.to_dict()
    of = {"model": choice.model, "prompts": choice.prompts, "position": choice.position}
    return of | ({"rendering": asked} if asked else {})
