"""Views worked out beforehand: equal to those that are made when somebody looks, and made where people would wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from app import artifacts as reading
from app.state import Choice
from es2.analysis.layer_views import RENDERS, LayerViews, render_layers
from es2.analysis.projection import View
from es2.core.errors import InputError
from es2.prompts.loading import load_prompts
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.workflow.derived import find_views_folder
from es2.workflow.prepare import prepare, write_views
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.builders_artifacts import DISTANCES, MODEL, Compared, write_comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"), 40)


def live(compared: Compared, kind: str, layer: int) -> View:
    analysis, artifacts = compared.analysis, compared.artifacts
    return RENDERS[kind](
        artifacts.activations.layer(layer),
        analysis.base_probes,
        layer,
        tuned=compared.tuned.layer(layer),
        tuned_probes=analysis.tuned_probes,
        fit=artifacts.prompts.in_split("test"),
    )


@pytest.fixture(scope="module")
def views(compared: Compared) -> LayerViews:
    analysis, artifacts = compared.analysis, compared.artifacts
    told: list[tuple[str, int, int]] = []
    found = render_layers(
        artifacts.prompts,
        artifacts.activations,
        analysis.base_probes,
        compared.tuned,
        analysis.tuned_probes,
        report=lambda stage, done, total, **_: told.append((stage, done, total)),
    )
    assert told == [("draw", done, len(DISTANCES)) for done in range(len(DISTANCES) + 1)]
    return found


@pytest.mark.parametrize("kind", RENDERS)
def test_every_layer_is_drawn_as_when_somebody_looks(compared: Compared, views: LayerViews, kind: str) -> None:
    for layer in range(len(DISTANCES)):
        drawn, expected = views.view(kind, layer), live(compared, kind, layer)
        for points, others in ((drawn.base, expected.base), (drawn.tuned, expected.tuned)):
            assert points is not None
            np.testing.assert_allclose(points, others, rtol=1e-6, atol=1e-6)
        assert (drawn.kind, drawn.axes, drawn.explained) == (expected.kind, expected.axes, expected.explained)


def test_margins_are_the_probes_own(compared: Compared, views: LayerViews) -> None:
    probes, tuned_probes = compared.analysis.base_probes, compared.analysis.tuned_probes
    assert tuned_probes is not None
    base, tuned = views.margins(3)
    np.testing.assert_allclose(base, probes.margin(compared.artifacts.activations.layer(3), 3), rtol=1e-6)
    np.testing.assert_allclose(tuned, tuned_probes.margin(compared.tuned.layer(3), 3), rtol=1e-6)


def test_they_are_kept_on_disk(views: LayerViews, tmp_path: Path) -> None:
    views.save(tmp_path)
    found = LayerViews.load(tmp_path)
    for kind in RENDERS:
        np.testing.assert_array_equal(found.points[kind], views.points[kind])
        np.testing.assert_array_equal(found.explained[kind], views.explained[kind])


@pytest.mark.parametrize("name", ["pca.points", "separation.explained"])
@pytest.mark.parametrize(
    "spoil", [lambda array: array[1:], lambda array: array * np.nan, lambda array: array.astype(int)]
)
def test_what_cannot_be_read_is_a_sentence(views: LayerViews, tmp_path: Path, name: str, spoil: Any) -> None:
    views.save(tmp_path)
    tensors = load_file(tmp_path / "views.safetensors")
    save_file(tensors | {name: spoil(tensors[name])}, tmp_path / "views.safetensors")
    with pytest.raises(InputError, match="no readable views"):
        LayerViews.load(tmp_path)


def test_the_page_reads_them_instead_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_comparison(tmp_path, 40)
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    prompts, base = made.artifacts.prompts, made.artifacts.activations
    write_views(prompts, base, None, made.artifacts.analysis)
    write_views(prompts, base, made.tuned, made.analysis)
    expected = {kind: live(made, kind, 2) for kind in RENDERS}
    monkeypatch.setattr(ActivationSet, "layer", lambda *_: pytest.fail("reads a layer's embeddings"))
    comparison = reading.find_comparison(Choice(run=made.run.id))
    opened = reading.find(MODEL, load_prompts(str(made.artifacts.source)), "last")
    assert comparison is not None
    assert opened is not None
    for kind in RENDERS:
        pair, alone = reading.view(comparison, 2, kind), reading.view(opened, 2, kind)
        assert pair is not None
        assert alone is not None
        np.testing.assert_allclose(pair.tuned, expected[kind].tuned, atol=1e-6)
        np.testing.assert_allclose(alone.base, expected[kind].base, atol=1e-6)
    before, after = reading.margins(comparison, 2)
    np.testing.assert_allclose(before, expected["separation"].base[:, 0], atol=1e-6)
    np.testing.assert_allclose(after, expected["separation"].tuned[:, 0], atol=1e-6)
    np.testing.assert_allclose(reading.margins(opened, 2)[0], before, atol=1e-6)


@pytest.mark.parametrize("choice", [{"raw": True}, {"fit_on": "both"}])
def test_other_axes_are_still_made_when_somebody_looks(
    compared: Compared, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ES2_HOME", str(compared.artifacts.home))
    write_views(compared.artifacts.prompts, compared.artifacts.activations, compared.tuned, compared.analysis)
    comparison = reading.find_comparison(Choice(run=compared.run.id))
    assert comparison is not None
    usual, other = (reading.view(comparison, 2, "pca", **chosen) for chosen in ({}, choice))
    assert usual is not None
    assert other is not None
    assert not np.allclose(usual.base, other.base, rtol=1e-3)


def test_they_are_made_of_large_layers_with_the_analysis_or_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_tiny_model(tmp_path / "tiny-llama"))
    prompts = load_prompts(str(write_prompts(tmp_path / "locks.csv", tiny_prompts(60))))
    store = Store(tmp_path / "store")
    prepared = prepare(model, prompts, store=store)
    measured = prompts.measured()
    assert find_views_folder(prepared.activations, measured, prepared.analysis.config) is None, (
        "these are no large layers"
    )
    monkeypatch.setattr("es2.analysis.layer_views.LANCZOS_FROM", 4)
    told: list[str] = []
    prepare(model, prompts, store=store, report=lambda stage, done, total, **_: told.append(stage))
    folder = find_views_folder(prepared.activations, measured, prepared.analysis.config)
    assert folder is not None
    assert LayerViews.load(folder).points["pca"].shape[1:] == (1, len(measured), 2)
    assert "draw" in told
    assert "analyse" not in told
    told.clear()
    prepare(model, prompts, store=store, report=lambda stage, done, total, **_: told.append(stage))
    assert "draw" not in told, "made once"
