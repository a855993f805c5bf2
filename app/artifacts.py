"""Reading artifacts for the page, each once.

A page runs from top to bottom at every click, so what it reads is remembered by the keys of the artifacts it came from,
which change when anything in them does. One layer is read at a time, and what is remembered of it is two small arrays;
embeddings themselves are dropped at once, since a layer of a large model is tens of megabytes. Cached values are shared
by all sessions: they are frozen, and nobody writes into their arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from app.state import Choice
from es2.analysis.comparison import Comparison
from es2.analysis.layer_views import RENDERS, LayerViews
from es2.analysis.projection import FitOn, View
from es2.analysis.results import Analysis
from es2.core.errors import Es2Error
from es2.jobs.job import Job
from es2.models.catalogue import CATALOGUE, resolve
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.workflow import compared
from es2.workflow.derived import analysis_key, find_activations, find_analysis_folder, find_umap, find_views_folder
from es2.workflow.runs import list_runs, open_run, shipped_run

if TYPE_CHECKING:
    from jaxtyping import Float


ENDED = ("done", "stopped")
_AHEAD = ThreadPoolExecutor(1, thread_name_prefix="ahead")
_waiting: list[Future[object]] = []

UMAP_START_SECONDS = 25.0
UMAP_SECONDS_PER_PROMPT = 2.5e-3
"""Measured on two cores with 576 dimensions; a hint to the person who waits, no more."""


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


def existing(choice: Choice) -> tuple[Choice, list[str]]:
    """The choice with what does not exist replaced by what is usual, and a sentence for each replacement.

    Who asks for nothing gets the model and the prompts of the newest run that has ended.
    """
    notes = []
    if choice == Choice():
        ended = (run for run in list_runs() if run.status() in ENDED)
        choice = replace(choice, **of_run(Choice(run=next((run.id for run in ended), None))))
    try:
        model_name(choice.model)
    except Es2Error as error:
        choice = replace(choice, model=Choice.model)
        notes.append(f"{error} The link asked for it; {choice.model} is shown instead.")
    try:
        prompts(choice.prompts)
    except Es2Error as error:
        choice = replace(choice, prompts=Choice.prompts)
        notes.append(f"{error} The link asked for it; the {choice.prompts} prompts are shown instead.")
    return choice, notes


def prompts(source: str) -> PromptSet:
    """The prompt set of `source`, read again when its file changes. Raises as `load_prompts` does."""
    stamp = None
    if source != "builtin" and not source.startswith("hf:"):
        try:
            stat = Path(source).stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError):
            stamp = None  # load_prompts says what is wrong with it
    return _prompts(source, stamp)


@st.cache_resource(max_entries=8, show_spinner="Reading the prompts")
def _prompts(source: str, stamp: tuple[int, int] | None) -> PromptSet:
    return load_prompts(source)


@dataclass(frozen=True)
class Opened:
    """What there is on disk for a model, a prompt set and a position."""

    prompts: PromptSet
    activations: ActivationSet
    analysis: Analysis
    position: str

    @property
    def analysis_key(self) -> str:
        """The key of the analysis."""
        return analysis_key(self.activations, self.prompts, self.analysis.config)


def find(model: str, prompt_set: PromptSet, position: str) -> Opened | None:
    """The activation set of the measured prompts and its analysis, if both are there."""
    prompt_set = prompt_set.measured()
    found = find_activations(model, prompt_set, position)
    if found is None:
        return None
    activations = _keep(found)
    analysis = _analysis(activations, prompt_set, position)
    return Opened(prompt_set, activations, analysis, position) if analysis is not None else None


def _keep(found: ActivationSet) -> ActivationSet:
    return _kept(found.key, found.inode, found)


@st.cache_resource(max_entries=16, show_spinner=False)
def _kept(key: str, inode: int, _activations: ActivationSet) -> ActivationSet:
    """The same object at every run, so that its files are checked once."""
    return _activations


def _analysis(
    base: ActivationSet, prompt_set: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Analysis | None:
    """As `find_analysis`; read once for as long as its folder is the same one."""
    folder = find_analysis_folder(base, prompt_set, position, tuned)
    return _loaded(str(folder), folder.stat().st_ino) if folder is not None else None


@st.cache_resource(max_entries=16, show_spinner=False)
def _loaded(folder: str, inode: int) -> Analysis:
    return Analysis.load(Path(folder))


def _views_of(
    base: ActivationSet, prompt_set: PromptSet, analysis: Analysis, tuned: ActivationSet | None = None
) -> LayerViews | None:
    """What a job has worked out of all layers, if they are large; read once for as long as its folder is the same."""
    folder = find_views_folder(base, prompt_set, analysis.config, tuned)
    return _loaded_views(str(folder), folder.stat().st_ino) if folder is not None else None


@st.cache_resource(max_entries=4, show_spinner=False)
def _loaded_views(folder: str, inode: int) -> LayerViews:
    return LayerViews.load(Path(folder))


def margins(opened: Opened, layer: int) -> Float[np.ndarray, "prompt"]:
    """Signed distance of each prompt to the probe's boundary, + on the harmful side, in scale-free units."""
    return _margins(opened.activations.key, opened.analysis_key, opened.position, layer, opened)


@st.cache_resource(max_entries=256, show_spinner=False)
def _margins(key: str, analysis: str, position: str, layer: int, _opened: Opened) -> Float[np.ndarray, "prompt"]:
    if (drawn := _views_of(_opened.activations, _opened.prompts, _opened.analysis)) is not None:
        return drawn.margins(layer)[0]
    return _opened.analysis.base_probes.margin(_opened.activations.layer(layer, position), layer)


def view(opened: Opened, layer: int, kind: str) -> View | None:
    """Where each prompt stands in the plane; None for UMAP coordinates that were not computed yet."""
    if kind == "umap":
        coordinates = find_umap(opened.activations, opened.prompts, opened.position)
        return coordinates.view(layer) if coordinates is not None else None
    return _view(opened.activations.key, opened.analysis_key, opened.position, layer, kind, opened)


@st.cache_resource(max_entries=256, show_spinner=False)
def _view(key: str, analysis: str, position: str, layer: int, kind: str, _opened: Opened) -> View:
    if (drawn := _views_of(_opened.activations, _opened.prompts, _opened.analysis)) is not None:
        return drawn.view(kind, layer)
    embeddings = _opened.activations.layer(layer, position)
    # Axes are fitted on what is always shown, so that showing other splits moves no point.
    return RENDERS[kind](embeddings, _opened.analysis.base_probes, layer, fit=_opened.prompts.in_split("test"))


# ---------------------------------------------------------------------------------------------------- base and tuned


def run_title(run: Job) -> str:
    """What a run is called: the name it was given, else what it did."""
    layers = ", ".join(map(str, run.config.get("layers", ())))
    return run.name or f"{run.config.get('objective', 'ES2')} at {layers}"


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
    return (run.config.get("model"), run.config.get("prompts")) == (choice.model, choice.prompts)


def of_run(choice: Choice) -> dict[str, Any]:
    """The model and the prompts of the run that is asked for, as changes of the choice: the sidebar names them."""
    if choice.run is None:
        return {}
    try:
        config = open_run(choice.run).config
        return {"model": str(config["model"]), "prompts": str(config["prompts"])}
    except (Es2Error, KeyError):
        return {}  # the page says that there is no such run


def _comparison(run: Job, against: Job | None, position: str) -> Comparison | None:
    """Base or `against` beside a run; None where something is missing, which can be computed for any that is ours."""
    try:
        prompt_set = prompts(str(run.config.get("prompts", Choice.prompts))).measured()
    except Es2Error:
        return None  # its file is gone or broken; the list of runs says so
    try:
        found = compared.find_comparison(run, prompt_set, position, against, keep=_keep, find=_analysis)
    except compared.AbsentError:
        if run.is_shipped:
            raise
        return None
    return replace(found, names=(run_title(against), run_title(run))) if against is not None else found


def _views_of_pair(comparison: Comparison) -> LayerViews | None:
    return _views_of(comparison.base, comparison.prompts, comparison.analysis, comparison.tuned)


def pair_margins(comparison: Comparison, layer: int) -> tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
    """Signed distance of each prompt to each model's own boundary, + on the harmful side, in scale-free units."""
    return _pair_margins(comparison.key, layer, comparison)


@st.cache_resource(max_entries=2, show_spinner=False)
def _pair_layer(
    key: tuple[str, ...], layer: int, _comparison: Comparison
) -> tuple[Float[np.ndarray, "prompt d_model"], Float[np.ndarray, "prompt d_model"]]:
    """The embeddings of both models, for the margins and the view, which ask one after the other."""
    with ThreadPoolExecutor(2) as pool:
        base, tuned = pool.map(
            lambda one: one.layer(layer, _comparison.position), (_comparison.base, _comparison.tuned)
        )
    return base, tuned


@st.cache_resource(max_entries=256, show_spinner=False)
def _pair_margins(
    key: tuple[str, ...], layer: int, _comparison: Comparison
) -> tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
    if (drawn := _views_of_pair(_comparison)) is not None:
        base, tuned = drawn.margins(layer)
        return base, tuned
    analysis = _comparison.analysis
    assert analysis.tuned_probes is not None  # a comparison has both
    base, tuned = _pair_layer(key, layer, _comparison)
    return analysis.base_probes.margin(base, layer), analysis.tuned_probes.margin(tuned, layer)


def pair_view(
    comparison: Comparison, layer: int, kind: str, *, fit_on: FitOn = "base", raw: bool = False
) -> View | None:
    """Where each prompt stands in both models, in one frame; None for UMAP coordinates that were not computed yet.

    Args:
        comparison: what is compared.
        layer: the layer's index.
        kind: `separation`, `pca` or `umap`.
        fit_on: what PCA's axes are fitted on.
        raw: whether lengths are the models' own rather than divided by each model's scale; not for UMAP.
    """
    if kind == "umap":
        coordinates = find_umap(comparison.base, comparison.prompts, comparison.position, comparison.tuned)
        return coordinates.view(layer) if coordinates is not None else None
    return _pair_view(comparison.key, layer, kind, fit_on, raw, comparison)


@st.cache_resource(max_entries=256, show_spinner=False)
def _pair_view(key: tuple[str, ...], layer: int, kind: str, fit_on: FitOn, raw: bool, _comparison: Comparison) -> View:
    usual = fit_on == "base" and not raw
    if usual and (drawn := _views_of_pair(_comparison)) is not None:
        return drawn.view(kind, layer)
    base, tuned = _pair_layer(key, layer, _comparison)
    return RENDERS[kind](
        base,
        _comparison.analysis.base_probes,
        layer,
        tuned=tuned,
        tuned_probes=_comparison.analysis.tuned_probes,
        fit=_comparison.prompts.in_split("test"),
        fit_on=fit_on,
        raw=raw,
    )


def make_ready(work: Callable[[int], object], layer: int, n_layers: int) -> None:
    """Do the work of the layers beside this one in the background, since people go from layer to layer.

    What still waits from the last call is given up. What goes wrong here goes wrong again, and is told, when somebody
    goes to that layer.
    """
    for one in _waiting:
        one.cancel()
    _waiting[:] = [_AHEAD.submit(work, near) for near in (layer + 1, layer - 1) if 0 <= near < n_layers]


def umap_seconds(opened: Opened) -> float:
    """About how long UMAP of every layer will take."""
    points = opened.activations.n_layers * opened.activations.n_prompts
    return UMAP_START_SECONDS + UMAP_SECONDS_PER_PROMPT * points


def job_config(choice: Choice) -> dict[str, str]:
    """What a job is told, so that it makes what the page looks for."""
    return {"model": choice.model, "prompts": choice.prompts, "position": choice.position}
