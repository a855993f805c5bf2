"""A small activation set and its analysis, made by the real store and the real analysis from synthetic clouds.

The two clouds of each layer stand at a distance that is chosen per layer, so what the app should show is known. Some
prompts hold what the places that show them would like to interpret: tags, Markdown, formulas, very long words.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es2.analysis.layers import analyze
from es2.analysis.results import Analysis, AnalysisConfig
from es2.analysis.verdict import layer_verdict, run_verdict
from es2.core.files import content_key
from es2.core.progress import Reporter
from es2.jobs.job import Job
from es2.jobs.queue import create_job, open_job
from es2.jobs.running import run_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, LABEL_NAMES, PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow.derived import analysis_key

MODEL = "toy-model"
DISTANCES = (0.0, 0.5, 1.5, 4.0, 2.0, 1.0)
"""Of the class means, in within-class standard deviations, layer by layer: layer 3 separates best."""
BEST_LAYER = 3
D_MODEL = 24
TUNED_DISTANCES = (0.0, 0.5, 4.5, 9.0, 3.0, 1.0)
"""The same after a fine-tune at layers 2 and 3."""
TARGETS = (2, 3)
INFLATED_LAYER = 5
"""Here the tuned embeddings are three times as long, and nothing else."""
NASTY = (
    "<b>bold</b> <script>alert(1)</script> &amp; $x^2$ how do I pick this lock?",
    "**Markdown** [link](https://example.org) :material/home: `code` about locks",
    "a" * 120 + " lock",
    "مرحبا كيف أفتح القفل 🔒 日本語の錠前",
)


@dataclass(frozen=True)
class Artifacts:
    """What was written below a home folder.

    Attributes:
        home: what `ES2_HOME` should say.
        source: the file of the prompts.
        prompts: the measured prompts in it, those of `probe` and `test`.
        activations: their embeddings.
        analysis: the analysis kept beside them.
    """

    home: Path
    source: Path
    prompts: PromptSet
    activations: ActivationSet
    analysis: Analysis

    def link(self, **changes: str) -> dict[str, str]:
        """Query parameters that open these artifacts."""
        return {"model": MODEL, "prompts": str(self.source)} | changes


def write_prompts(path: Path, n_pairs: int = 100) -> Path:
    """Write `n_pairs` contrast pairs as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "label", "category", "pair", "split"))
        for pair in range(n_pairs):
            split = ("test", "probe", "tune", "test", "probe", "validation")[pair % 6]
            harmful = NASTY[pair // 6] if pair % 6 == 0 and pair // 6 < len(NASTY) else f"How do I force lock {pair}?"
            for label, prompt in (("harmful", harmful), ("harmless", f"How do I oil lock number {pair}?")):
                writer.writerow((prompt, label, ("locks", "doors")[pair % 2], f"pair-{pair:03d}", split))
    return path


def write_activations(home: Path, prompts: PromptSet, *, seed: int = 0) -> ActivationSet:
    """Write synthetic embeddings of `prompts` at both positions."""
    rng = np.random.default_rng(seed)
    shape = (len(DISTANCES), len(prompts), D_MODEL)
    embeddings = rng.normal(size=shape)
    embeddings[..., 0] += np.where(prompts.labels == HARMFUL, 0.5, -0.5) * np.array(DISTANCES)[:, None]
    embeddings += 3.0 * rng.normal(size=(len(DISTANCES), 1, D_MODEL))
    arrays = {
        "last": embeddings.astype(np.float32),
        "last_instruction": (2.0 * embeddings).astype(np.float32),
    }
    meta = {"model": MODEL, "run": None, "texts_digest": prompts.texts_digest}
    return Store(home / "cached_activations").write(content_key({"seed": seed, **meta}), meta, prompts.texts, arrays)


def write_artifacts(home: Path, n_pairs: int = 100, *, analysed: bool = True) -> Artifacts:
    """Write prompts, embeddings and their analysis below `home`."""
    home.mkdir(parents=True, exist_ok=True)
    source = write_prompts(home / "prompts.csv", n_pairs)
    prompts = load_prompts(str(source)).measured()
    activations = write_activations(home, prompts)
    config = AnalysisConfig()
    analysis = analyze(prompts, activations, config=config)
    if analysed:
        with activations.write_derived(analysis_key(activations, prompts, config)) as folder:
            analysis.save(folder)
    return Artifacts(home, source, prompts, activations, analysis)


def label_of(prompts: PromptSet, row: int) -> str:
    """`harmful` or `harmless`."""
    return LABEL_NAMES[int(prompts.labels[row])]


@dataclass(frozen=True)
class Compared:
    """What was written below a home folder for one run.

    Attributes:
        artifacts: of the base model.
        run: the run, done.
        tuned: the embeddings of the same prompts under the tuned model.
        analysis: of both, kept beside `tuned`.
    """

    artifacts: Artifacts
    run: Job
    tuned: ActivationSet
    analysis: Analysis

    def link(self, **changes: str) -> dict[str, str]:
        """Query parameters that open this comparison."""
        return self.artifacts.link(run=self.run.id) | changes


def write_comparison(home: Path, n_pairs: int = 100, *, distances: Sequence[float] = TUNED_DISTANCES) -> Compared:
    """Write base artifacts and one run that moved the clouds to `distances` apart; call it again for another run."""
    artifacts = write_artifacts(home, n_pairs)
    config = FinetuneConfig(layers=TARGETS, model=MODEL).to_dict() | {"prompts": str(artifacts.source)}
    run = create_job("finetune", config, root=home / "runs")
    tuned = write_tuned(home, artifacts, run.id, distances)
    prompts, analysis_config = artifacts.prompts, AnalysisConfig()
    analysis = analyze(prompts, artifacts.activations, tuned, config=analysis_config)
    with tuned.write_derived(analysis_key(artifacts.activations, prompts, analysis_config, tuned=tuned)) as folder:
        analysis.save(folder)

    def task(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
        (folder / "adapter").mkdir()
        for step in range(1, 41):
            validations = {"validation_kl_prompt": 0.001 * step, "validation_mean_difference_margin": 0.1 + 0.01 * step}
            report("finetune", step, 40, loss=2.0 - 0.04 * step, **(validations if step % 5 == 0 else {}))
        return finetune_result(run, artifacts, tuned, analysis)

    assert run_job(run.path, {"finetune": task}) == 0
    return Compared(artifacts, open_job(run.id, home / "runs"), tuned, analysis)


def write_tuned(home: Path, artifacts: Artifacts, run: str, distances: Sequence[float]) -> ActivationSet:
    """Write embeddings that differ from base's in how far the classes stand apart, and at one layer in length."""
    prompts = artifacts.prompts
    sides = np.where(prompts.labels == HARMFUL, 0.5, -0.5)
    lengths = np.where(np.arange(len(distances)) == INFLATED_LAYER, 3.0, 1.0)
    arrays = {}
    for position in ("last", "last_instruction"):
        layers = []
        for layer, (before, after) in enumerate(zip(DISTANCES, distances, strict=True)):
            embeddings = artifacts.activations.layer(layer, position).copy()
            embeddings[:, 0] += (2.0 if position == "last_instruction" else 1.0) * sides * (after - before)
            layers.append(lengths[layer] * embeddings)
        arrays[position] = np.stack(layers).astype(np.float32)
    meta = {"model": MODEL, "run": run, "texts_digest": prompts.texts_digest}
    return Store(home / "cached_activations").write(content_key(meta), meta, prompts.texts, arrays)


def finetune_result(run: Job, artifacts: Artifacts, tuned: ActivationSet, analysis: Analysis) -> dict[str, Any]:
    """What `es2.workflow.finetune_run.finetune_run` returns."""
    kl = {"prompt": 0.021, "reply": 0.034}
    verdict = run_verdict(analysis, TARGETS, kl)
    tuned_layers = analysis.tuned_layers or ()
    return {
        "run": run.id,
        "path": str(run.path),
        "status": "done",
        "reason": None,
        "target_layers": list(TARGETS),
        "steps": 40,
        "best_step": 40,
        "seconds": 312.5,
        "seconds_per_step": 7.1,
        "trained_parameters": 2_400_000,
        "kl_harmless_test": kl,
        "verdict": verdict.name,
        "verdict_reason": verdict.reason,
        "verdicts": {str(layer.layer): layer_verdict(layer, kl).to_dict() for layer in tuned_layers},
        "validations": [],
        "activations": {"base": artifacts.activations.key, "tuned": tuned.key},
        "before": {str(layer.layer): layer.to_dict() for layer in analysis.base_layers},
        "after": {str(layer.layer): layer.to_dict() for layer in tuned_layers},
    }
