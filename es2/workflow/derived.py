"""The keys of what is derived from activation sets, and looking for it on disk.

Nothing here needs weights, a tokenizer or torch, so the app opens at once, also on artifacts of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from es2.analysis.layer_views import VIEWS_FORMAT
from es2.analysis.projection import PROJECTION_FORMAT, UmapCoordinates
from es2.analysis.results import ANALYSIS_FORMAT, Analysis, AnalysisConfig
from es2.core.errors import InputError
from es2.core.files import content_key, read_json, stamp_of
from es2.core.former import former_names
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store


def analysis_key(
    base: ActivationSet,
    prompts: PromptSet,
    config: AnalysisConfig,
    *,
    tuned: ActivationSet | None = None,
    test: Captured | None = None,
) -> str:
    """The key of an analysis: everything that decides its numbers, and nothing else; of a part, that of the whole."""
    n_fitted = max(int(prompts.in_split("probe").sum()), len(test.prompts) if test else 0)
    # Where prompts outnumber dimensions, analyses before this entry hold probes that are not the best ones.
    corrected = {"fits": 2} if n_fitted > base.d_model else {}
    return content_key(
        corrected
        | {
            "kind": "analysis",
            "format": ANALYSIS_FORMAT,
            "base": base.whole,
            "tuned": tuned and tuned.whole,
            "prompts": prompts.digest,
            "test": test and [test.base.key, test.tuned and test.tuned.key, test.prompts.digest],
            "config": former_names(config.to_dict()),
        }
    )


def umap_key(activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None) -> str:
    """The key of the UMAP coordinates of all layers of one activation set, or of base and tuned in common maps."""
    return content_key(
        {
            "kind": "umap",
            "format": PROJECTION_FORMAT,
            "base": activations.key,
            "tuned": tuned and tuned.key,
            "prompts": prompts.digest,
            "position": position,
        }
    )


def views_key(
    base: ActivationSet, prompts: PromptSet, config: AnalysisConfig, tuned: ActivationSet | None = None
) -> str:
    """The key of the views of all layers that belong to an analysis."""
    analysis = analysis_key(base, prompts, config, tuned=tuned)
    return content_key({"kind": "views", "format": VIEWS_FORMAT, "analysis": analysis})


def find_activations(
    model: str,
    prompts: PromptSet,
    position: str,
    store: Store | None = None,
    run: str | None = None,
    rendering: Rendering = AS_THE_TEMPLATE,
) -> ActivationSet | None:
    """The newest activation set of exactly these prompts under this model or run and rendering, if one is on disk."""
    asked = prompts.rendered_as(rendering)
    digest = prompts.texts_digest
    return (store or Store()).find(model=model, texts_digest=digest, position=position, run=run, rendering=asked)


def find_analysis(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Analysis | None:
    """The newest analysis of an activation set, or of base and tuned, whatever its settings; None if there is none."""
    folder = find_analysis_folder(activations, prompts, position, tuned)
    return Analysis.load(folder) if folder else None


def find_analysis_folder(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Path | None:
    """Where `find_analysis` reads: a folder under the key of these embeddings and prompts and of its own settings."""
    holder = tuned or activations
    files = (holder.path / "derived").glob("*/analysis.json")
    stamps = {file: stamp for file in files if (stamp := stamp_of(file)) is not None}
    for file in sorted(stamps, key=lambda file: -stamps[file][1]):
        config = _config_in(file, stamps[file])
        if config is not None and config.position == position:
            key = analysis_key(activations, prompts, config, tuned=tuned)
            if key == file.parent.name and (folder := holder.derived(key)) is not None:
                return folder
    # A damaged one has no settings; under the usual settings' key it is refused by its name.
    return holder.derived(analysis_key(activations, prompts, AnalysisConfig(position=position), tuned=tuned))


@lru_cache(maxsize=256)
def _config_in(file: Path, stamp: object) -> AnalysisConfig | None:
    """The settings in an `analysis.json`; None where they cannot be read."""
    try:
        return AnalysisConfig.read((read_json(file) or {})["config"], str(file))
    except (InputError, LookupError, TypeError):
        return None


def find_views_folder(
    activations: ActivationSet, prompts: PromptSet, config: AnalysisConfig, tuned: ActivationSet | None = None
) -> Path | None:
    """The folder of the views of all layers that belong to an analysis, if they were computed."""
    return (tuned or activations).derived(views_key(activations, prompts, config, tuned))


def find_umap(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> UmapCoordinates | None:
    """The UMAP coordinates of an activation set, or of base and tuned, if they were computed."""
    folder = (tuned or activations).derived(umap_key(activations, prompts, position, tuned))
    return UmapCoordinates.load(folder) if folder else None


@dataclass(frozen=True)
class Captured:
    """A prompt set and its embeddings under base, or the run that takes its place, and under a run's tuned model."""

    prompts: PromptSet
    base: ActivationSet
    tuned: ActivationSet | None = None
