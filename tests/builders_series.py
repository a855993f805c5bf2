"""A base with a run and the checkpoints of somebody else's training beside it, from synthetic clouds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es2.core.files import content_key
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from tests.builders_artifacts import DISTANCES, MODEL, TUNED_DISTANCES, Artifacts, Compared, write_comparison

TRAINING = "/elsewhere/sft"
STEPS = (50, 100)


@dataclass(frozen=True)
class Series:
    """What was written below a home folder.

    Attributes:
        compared: base and a run of it, analysed.
        checkpoints: of a training of others at `STEPS`, not analysed: a pair's distance grows from step to step.
    """

    compared: Compared
    checkpoints: tuple[ActivationSet, ...]

    @property
    def artifacts(self) -> Artifacts:
        return self.compared.artifacts


def write_series(home: Path, n_pairs: int = 100) -> Series:
    """Write a base, one run and two checkpoints of an SFT of whole weights."""
    compared = write_comparison(home, n_pairs)
    checkpoints = []
    for step in STEPS:
        part = 0.5 * step / STEPS[-1]
        pairs = zip(DISTANCES, TUNED_DISTANCES, strict=True)
        distances = [(1 - part) * before + part * after for before, after in pairs]
        about = {"model": f"{TRAINING}/checkpoint-{step}", "base": MODEL}
        checkpoints.append(write_set(home, compared.artifacts, distances, **about))
    return Series(compared, tuple(checkpoints))


def write_set(
    home: Path,
    artifacts: Artifacts,
    distances: Sequence[float] = DISTANCES,
    *,
    prompts: PromptSet | None = None,
    positions: Sequence[str] = ("last", "last_instruction"),
    **meta: Any,
) -> ActivationSet:
    """Write embeddings whose classes stand `distances` apart, with further entries of `meta.json`."""
    of = artifacts.prompts
    sides = np.where(of.labels == HARMFUL, 0.5, -0.5)
    layers = []
    for layer, (before, after) in enumerate(zip(DISTANCES, distances, strict=False)):
        embeddings = artifacts.activations.layer(layer).copy()
        embeddings[:, 0] += sides * (after - before)
        layers.append(embeddings if prompts is None else embeddings[: len(prompts)])
    shown = prompts or of
    meta = {"model": MODEL, "run": None, "texts_digest": shown.texts_digest} | meta
    arrays = dict.fromkeys(positions, np.stack(layers).astype(np.float32))
    key = content_key({"distances": list(distances), "positions": list(positions), **meta})
    return Store(home / "cached_activations").write(key, meta, shown.texts, arrays)
