"""Views against scikit-learn's PCA and against the probe's own margins."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.decomposition import PCA

from es2.analysis.layers import analyze
from es2.analysis.projection import (
    UmapCoordinates,
    pca_view,
    principal_axes,
    separation_view,
    umap_all_layers,
)
from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError
from es2.store.sources import ArrayLayers
from tests.clouds import clouds, paired_prompts, rotation

CONFIG = AnalysisConfig(n_bootstrap=2, n_shuffles=1, Cs=(1.0,))
PROMPTS = paired_prompts(40)
BASE = clouds(PROMPTS, (2.0, 3.0), topic=1.0)
TUNED = 4 * clouds(PROMPTS, (5.0, 6.0), topic=1.0, seed=1) + 3


@pytest.fixture(scope="module")
def probes():
    found = analyze(PROMPTS, ArrayLayers(BASE), ArrayLayers(TUNED), config=CONFIG)
    assert found.tuned_probes is not None
    return found.base_probes, found.tuned_probes


def normalised(embeddings, probes, layer: int):
    return (embeddings - probes.centre[layer]) / probes.scale[layer]


@pytest.mark.parametrize(("n_prompts", "d_model"), [(30, 8), (8, 30)])
def test_principal_axes_equal_sklearn_up_to_sign(n_prompts: int, d_model: int) -> None:
    embeddings = np.random.default_rng(0).normal(size=(n_prompts, d_model)) * np.arange(1, d_model + 1)
    mean, axes, parts = principal_axes(embeddings, 2)
    reference = PCA(2).fit(embeddings)
    np.testing.assert_allclose(mean, reference.mean_)
    np.testing.assert_allclose(parts, reference.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(axes @ reference.components_.T), np.eye(2), atol=1e-9)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_the_quick_way_for_many_prompts_finds_the_same_axes(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 5, shape[1]) ** 2
    exact = principal_axes(embeddings, 2)
    monkeypatch.setattr("es2.analysis.projection.LANCZOS_FROM", 30)
    quick = principal_axes(embeddings, 2)
    np.testing.assert_allclose(quick[2], exact[2], rtol=1e-5)
    np.testing.assert_allclose(np.abs(quick[1] @ exact[1].T), np.eye(2), atol=1e-3)
    np.testing.assert_array_equal(principal_axes(np.ones(shape), 2)[1], 0)


@pytest.mark.parametrize("draw", [separation_view, pca_view])
def test_large_layers_are_drawn_in_single_precision_and_look_the_same(
    draw: Any, probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_probes, tuned_probes = probes
    others = {"tuned": TUNED[1], "tuned_probes": tuned_probes}
    exact = draw(BASE[1], base_probes, 1, **others)
    monkeypatch.setattr("es2.analysis.projection.LANCZOS_FROM", 1)
    drawn = draw(BASE[1], base_probes, 1, **others)
    for points, expected in ((drawn.base, exact.base), (drawn.tuned, exact.tuned)):
        assert points.dtype == np.float64
        np.testing.assert_allclose(points, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(drawn.explained, exact.explained, rtol=1e-4)


def test_principal_axes_of_flat_clouds_are_zero_where_nothing_varies() -> None:
    line = np.outer(np.arange(5.0), [3.0, 4.0, 0.0])
    _, axes, parts = principal_axes(line, 2)
    np.testing.assert_allclose(np.abs(axes[0]), [0.6, 0.8, 0.0])
    np.testing.assert_array_equal(axes[1], 0)
    np.testing.assert_allclose(parts, [1, 0])
    np.testing.assert_array_equal(principal_axes(np.ones((4, 3)), 2)[1], 0)
    assert principal_axes(np.arange(4.0)[:, None], 2)[1].shape == (2, 1)


def test_separation_x_is_the_margin_and_y_is_orthogonal_to_it(probes) -> None:
    base_probes, tuned_probes = probes
    view = separation_view(BASE[1], base_probes, 1, tuned=TUNED[1], tuned_probes=tuned_probes)
    assert view.tuned is not None
    np.testing.assert_allclose(view.base[:, 0], base_probes.margin(BASE[1], 1))
    np.testing.assert_allclose(view.tuned[:, 0], tuned_probes.margin(TUNED[1], 1))
    for embeddings, own, column in ((BASE[1], base_probes, 0), (TUNED[1], tuned_probes, 1)):
        moved = embeddings + 9 * own.scale[1] * own.normal(1)  # nine units along the normal
        again = separation_view(
            BASE[1] if column else moved,
            base_probes,
            1,
            tuned=moved if column else TUNED[1],
            tuned_probes=tuned_probes,
        )
        before, after = (view.tuned, again.tuned) if column else (view.base, again.base)
        np.testing.assert_allclose(after - before, np.tile([9.0, 0.0], (len(before), 1)), atol=1e-9)


def test_separation_y_is_the_first_principal_component_of_the_rest(probes) -> None:
    base_probes, _ = probes
    test = PROMPTS.in_split("test")
    view = separation_view(BASE[0], base_probes, 0, fit=test)
    z = normalised(BASE[0], base_probes, 0)
    rest = z - np.outer(z @ base_probes.normal(0), base_probes.normal(0))
    reference = PCA(1).fit(rest[test])
    np.testing.assert_allclose(np.abs(view.base[:, 1]), np.abs(reference.transform(rest)[:, 0]), atol=1e-9)
    assert view.explained is not None
    total = z[test].var(axis=0).sum()
    assert view.explained[0] == pytest.approx((z[test] @ base_probes.normal(0)).var() / total)
    assert view.explained[1] == pytest.approx(reference.explained_variance_[0] * (test.sum() - 1) / test.sum() / total)


@pytest.mark.parametrize("fit_on", ["base", "both"])
def test_pca_equals_sklearn_in_a_shared_frame(probes, fit_on) -> None:
    base_probes, tuned_probes = probes
    test = PROMPTS.in_split("test")
    view = pca_view(BASE[0], base_probes, 0, tuned=TUNED[0], tuned_probes=tuned_probes, fit=test, fit_on=fit_on)
    zs = [normalised(BASE[0], base_probes, 0), normalised(TUNED[0], tuned_probes, 0)]
    fitted = np.concatenate([z[test] for z in (zs if fit_on == "both" else zs[:1])])
    reference = PCA(2).fit(fitted)
    for points, z in zip((view.base, view.tuned), zs, strict=True):
        np.testing.assert_allclose(np.abs(points), np.abs(reference.transform(z)), atol=1e-9)
    np.testing.assert_allclose(view.explained, reference.explained_variance_ratio_)
    assert f"{reference.explained_variance_ratio_[0]:.0%}" in view.axes[0]
    margins = base_probes.margin(BASE[0], 0)
    assert np.corrcoef(view.base[:, 0], margins)[0, 1] > 0  # the harmful side is the right one


def test_raw_views_keep_the_models_own_lengths(probes) -> None:
    base_probes, tuned_probes = probes
    for draw in (separation_view, pca_view):
        free = draw(BASE[0], base_probes, 0)
        raw = draw(BASE[0], base_probes, 0, raw=True)
        np.testing.assert_allclose(raw.base, free.base * base_probes.scale[0], atol=1e-9)
        assert "own units" in raw.axes[0]
        assert "scale-free units" in free.axes[0]
    both = separation_view(BASE[0], base_probes, 0, tuned=TUNED[0], tuned_probes=tuned_probes, raw=True)
    assert both.tuned is not None
    np.testing.assert_allclose(both.tuned[:, 0], tuned_probes.margin(TUNED[0], 0) * tuned_probes.scale[0])


def test_rotating_the_space_leaves_the_views() -> None:
    turn = rotation(BASE.shape[-1])
    turned = BASE @ turn
    first = analyze(PROMPTS, ArrayLayers(BASE), config=CONFIG).base_probes
    second = analyze(PROMPTS, ArrayLayers(turned), config=CONFIG).base_probes
    for draw in (separation_view, pca_view):
        np.testing.assert_allclose(draw(turned[0], second, 0).base, draw(BASE[0], first, 0).base, atol=1e-6)


def test_equal_embeddings_are_drawn_at_one_point() -> None:
    flat = np.ones_like(BASE)
    own = analyze(PROMPTS, ArrayLayers(flat), config=CONFIG).base_probes
    umap = umap_all_layers(PROMPTS, ArrayLayers(flat[:1])).view(0)
    for view in (separation_view(flat[0], own, 0), pca_view(flat[0], own, 0), umap):
        assert np.ptp(view.base, axis=0).tolist() == [0, 0]
    assert separation_view(flat[0], own, 0).explained == (0, 0)


def test_tuned_embeddings_need_tuned_probes(probes) -> None:
    with pytest.raises(ValueError, match="together"):
        pca_view(BASE[0], probes[0], 0, tuned=TUNED[0])


def test_umap_of_all_layers_is_deterministic_and_kept_on_disk(tmp_path) -> None:
    told: list[tuple[str, int, int]] = []
    base, tuned = BASE.copy(), TUNED.copy()
    base[0, :, 0] += 100.0 * PROMPTS.labels  # two islands
    tuned[0, :, 0] += 400.0 * PROMPTS.labels
    found = umap_all_layers(
        PROMPTS,
        ArrayLayers(base),
        ArrayLayers(tuned),
        report=lambda stage, done, total, **_: told.append((stage, done, total)),
    )
    assert found.points.shape == (2, 2, len(PROMPTS), 2)
    assert found.points.dtype == np.float32
    assert told == [("umap", done, 2) for done in range(3)]
    harmful = PROMPTS.labels == 1
    for points in found.points[0]:
        middles = points[harmful].mean(axis=0), points[~harmful].mean(axis=0)
        spread = max(points[harmful].std(), points[~harmful].std())
        assert np.linalg.norm(middles[0] - middles[1]) > spread
    again = umap_all_layers(PROMPTS, ArrayLayers(base), ArrayLayers(tuned))
    np.testing.assert_array_equal(again.points, found.points)

    found.save(tmp_path)
    loaded = UmapCoordinates.load(tmp_path)
    np.testing.assert_array_equal(loaded.points, found.points)
    view = loaded.view(1)
    assert (view.kind, view.approximate, view.explained) == ("umap", False, None)
    np.testing.assert_array_equal(view.base, found.points[1, 0])
    np.testing.assert_array_equal(view.tuned, found.points[1, 1])


def test_umap_fitted_on_base_places_tuned_approximately() -> None:
    view = umap_all_layers(PROMPTS, ArrayLayers(BASE[:1]), ArrayLayers(TUNED[:1]), fit_on="base").view(0)
    assert view.approximate
    assert view.tuned is not None
    assert view.tuned.shape == view.base.shape == (len(PROMPTS), 2)
    assert np.isfinite(view.tuned).all()
    alone = umap_all_layers(PROMPTS, ArrayLayers(BASE[:1])).view(0)
    assert not alone.approximate
    assert alone.tuned is None


def test_umap_of_the_fewest_points_it_takes() -> None:
    few = paired_prompts(5)
    points = umap_all_layers(few, ArrayLayers(clouds(few, (2.0,)))).points
    assert points.shape == (1, 1, 10, 2)
    assert np.isfinite(points).all()


def test_too_few_points_for_umap_give_a_pca(tmp_path) -> None:
    few = paired_prompts(4)
    found = umap_all_layers(few, ArrayLayers(clouds(few, (2.0,))), ArrayLayers(clouds(few, (4.0,))))
    found.save(tmp_path)
    view = UmapCoordinates.load(tmp_path).view(0)
    assert view.kind == "pca"
    assert "too few prompts" in view.axes[0]
    assert view.tuned is not None
    assert np.isfinite(view.base).all()
    assert view.base.std() > 0


def test_bad_input_to_umap_is_a_sentence(tmp_path) -> None:
    with pytest.raises(InputError, match="lacks a label"):
        umap_all_layers(paired_prompts(10, splits=("test",)), ArrayLayers(BASE[:, :20]))
    with pytest.raises(InputError, match="of 79 prompts"):
        umap_all_layers(PROMPTS, ArrayLayers(BASE[:, 1:]))
    broken = BASE.copy()
    broken[1, 0, 0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        umap_all_layers(paired_prompts(4), ArrayLayers(broken[1:, :8]))
    with pytest.raises(InputError, match="no readable UMAP"):
        UmapCoordinates.load(tmp_path)
    (tmp_path / "umap.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        UmapCoordinates.load(tmp_path)
