"""What a command and a job both do: the steps that lead from a model and prompts to artifacts on disk.

The command line runs these in the foreground, `es2.jobs` runs them as processes of their own for the app; both get the
same artifacts under the same keys. The functions whose names begin with `find_` only look on disk. They import nothing
heavy and need neither weights nor tokenizer, so that the app opens at once, also on a laptop to which somebody copied
a folder of artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es2.errors import InputError
from es2.jobs import Reporter, Task, silent
from es2.layers import ANALYSIS_FORMAT, Analysis, AnalysisConfig, TestSet, analyze
from es2.projection import PROJECTION_FORMAT, UmapCoordinates, umap_all_layers
from es2.prompts import PromptSet, load_prompts, normalised
from es2.store import ActivationSet, Store, content_key


@dataclass(frozen=True)
class Prepared:
    """An activation set and what was computed from it."""

    activations: ActivationSet
    analysis: Analysis


def analysis_key(
    activations: ActivationSet,
    prompts: PromptSet,
    config: AnalysisConfig,
    test: tuple[ActivationSet, PromptSet] | None = None,
) -> str:
    """The key of an analysis: everything that decides its numbers, and nothing else."""
    return content_key(
        {
            "kind": "analysis",
            "format": ANALYSIS_FORMAT,
            "base": activations.key,
            "prompts": prompts.digest,
            "test": test and [test[0].key, test[1].digest],
            "config": asdict(config),
        }
    )


def umap_key(activations: ActivationSet, prompts: PromptSet, position: str) -> str:
    """The key of the UMAP coordinates of all layers of one activation set."""
    return content_key(
        {
            "kind": "umap",
            "format": PROJECTION_FORMAT,
            "base": activations.key,
            "prompts": prompts.digest,
            "position": position,
        }
    )


def find_activations(model: str, prompts: PromptSet, position: str, store: Store | None = None) -> ActivationSet | None:
    """The newest activation set of these prompts under this model, if there is one on disk."""
    return (store or Store()).find(model=model, texts_digest=prompts.texts_digest, position=position)


def find_analysis(activations: ActivationSet, prompts: PromptSet, position: str) -> Analysis | None:
    """The analysis of an activation set with the shipped settings, if it was made."""
    folder = activations.derived(analysis_key(activations, prompts, AnalysisConfig(position=position)))
    return Analysis.load(folder) if folder else None


def find_umap(activations: ActivationSet, prompts: PromptSet, position: str) -> UmapCoordinates | None:
    """The UMAP coordinates of an activation set, if they were computed."""
    folder = activations.derived(umap_key(activations, prompts, position))
    return UmapCoordinates.load(folder) if folder else None


def prepare(
    model: str,
    prompts: PromptSet,
    *,
    test_prompts: PromptSet | None = None,
    config: AnalysisConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> Prepared:
    """Capture what is not captured yet and analyse what is not analysed yet.

    Args:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        prompts: the prompt set; its `probe` split fits the probes, its `test` split gives the numbers.
        test_prompts: prompts of another origin that give the numbers instead, less those that also stand in `prompts`.
        config: the analysis' settings.
        device: where the model runs; chosen by `es2.models.choose_device` if not given.
        dtype: the model's number format; chosen by `es2.models.choose_dtype` if not given.
        store: where artifacts lie.
        report: told about progress.

    Returns:
        The activation set of `prompts` and the analysis.

    Raises:
        InputError, MachineError: as `es2.capture.capture` and `es2.layers.analyze` do.
    """
    config = config or AnalysisConfig()
    store = store or Store()
    test = None
    if test_prompts is not None:
        test = without_shared(test_prompts, prompts)
    activations = _captured(model, prompts, config.position, device, dtype, store, report)
    source = tested = None
    if test is not None:
        tested = _captured(model, test, config.position, device, dtype, store, report)
        source = TestSet(prompts=test, base=tested)
    key = analysis_key(activations, prompts, config, (tested, test) if tested and test else None)
    with store.lock(key, lambda: report("wait", 0, 1)):
        if folder := activations.derived(key):
            return Prepared(activations, Analysis.load(folder))
        analysis = analyze(prompts, activations, test=source, config=config, report=report)
        with activations.write_derived(key) as folder:
            analysis.save(folder)
    return Prepared(activations, analysis)


def _captured(
    model: str,
    prompts: PromptSet,
    position: str,
    device: str | None,
    dtype: str | None,
    store: Store,
    report: Reporter,
) -> ActivationSet:
    """The activation set, from the store if the model is not on this machine but its embeddings are."""
    from es2.capture import POSITIONS, capture
    from es2.models import is_cached, resolve

    if position not in POSITIONS:
        raise InputError(f"The position must be one of {', '.join(POSITIONS)}, not {position[:40]!r}.")
    known = find_activations(model, prompts, position, store)
    if known is not None and not is_cached(resolve(model)):
        return known
    return capture(model, prompts, device=device, dtype=dtype, store=store, report=report).activations


def without_shared(prompts: PromptSet, others: PromptSet) -> PromptSet:
    """`prompts` less those whose normalised text also stands in `others`.

    Raises:
        InputError: when nothing is left.
    """
    known = {normalised(text) for text in others.texts}
    keep = np.array([normalised(text) not in known for text in prompts.texts], dtype=bool)
    if not keep.any():
        raise InputError(
            f"Every test prompt of {prompts.name!r} also stands in {others.name!r}; give other test prompts."
        )
    return prompts if keep.all() else prompts.select(keep)


def project(
    model: str,
    prompts: PromptSet,
    *,
    position: str = "last",
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> tuple[ActivationSet, str]:
    """Compute the UMAP coordinates of every layer, unless they are on disk already.

    Returns:
        The activation set, and the key of the coordinates kept beside it. Arguments and errors as for `prepare`.
    """
    store = store or Store()
    activations = _captured(model, prompts, position, device, dtype, store, report)
    key = umap_key(activations, prompts, position)
    with store.lock(key, lambda: report("wait", 0, 1)):
        if activations.derived(key) is None:
            coordinates = umap_all_layers(prompts, activations, position=position, report=report)
            with activations.write_derived(key) as folder:
                coordinates.save(folder)
    return activations, key


def _prepare_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    prompts = load_prompts(config["prompts"])
    position = config["position"]
    prepared = prepare(config["model"], prompts, config=AnalysisConfig(position=position), report=report)
    return {"activations": prepared.activations.key}


def _project_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    prompts = load_prompts(config["prompts"])
    activations, key = project(config["model"], prompts, position=config["position"], report=report)
    return {"activations": activations.key, "umap": key}


JOBS: Mapping[str, Task] = {
    "prepare": _prepare_job,
    "project": _project_job,
}
"""What `es2 job` can run: a job's kind and the function that does it."""
