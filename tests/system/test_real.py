"""The whole way with the real SmolLM2-135M-Instruct: built-in prompts in, numbers of every layer out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from es2.analysis.results import AnalysisConfig
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.loading import load_builtin
from es2.store.store import Store
from es2.workflow.derived import find_activations, find_analysis
from es2.workflow.prepare import prepare

pytestmark = pytest.mark.real


def test_the_default_model_tells_built_in_prompts_apart_in_its_middle_layers(tmp_path: Path) -> None:
    everything = load_builtin()
    wanted = np.logical_or(everything.in_split("probe"), everything.in_split("test"))
    pairs = sorted(pair for pair in set(everything.pairs) if pair.endswith(("2", "4", "6")))
    prompts = everything.select(wanted & np.isin(everything.pairs, pairs))
    store = Store(tmp_path)

    prepared = prepare(DEFAULT_MODEL, prompts, store=store, config=AnalysisConfig(n_bootstrap=200))

    layers = prepared.analysis.layers
    assert len(layers) == 30
    auroc = np.array([layer.numbers["probe_auroc"].value for layer in layers])
    control = np.array([layer.numbers["probe_auroc_control"].value for layer in layers])
    assert auroc[14:24].mean() > 0.62, "harm is read in the middle of the model"
    assert auroc[14:24].mean() > auroc[:6].mean() + 0.05, "and better than in its first blocks"
    assert abs(control.mean() - 0.5) < 0.03
    assert all(6 <= layer < 24 for layer in prepared.analysis.recommended)

    # What the app will look for is there, and was found without the model.
    found = find_activations(DEFAULT_MODEL, prompts, "last", store)
    assert found is not None
    assert found.key == prepared.activations.key
    analysis = find_analysis(found, prompts, "last")
    assert analysis is not None
    assert analysis.config.n_bootstrap == 200, "these settings were not the shipped ones"
