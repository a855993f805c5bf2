"""The whole analysis: known clouds, invariances, controls, awkward input, and what lies on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from es2.analysis.layers import analyze, recommend
from es2.analysis.probes import fit_path
from es2.analysis.results import LENGTHS, NUMBERS, Analysis, AnalysisConfig
from es2.core.errors import InputError
from es2.core.files import content_key
from es2.core.former import former_names
from es2.core.progress import Cancelled
from es2.store.sources import ArrayLayers, TestSet
from es2.workflow.derived import Captured, analysis_key
from tests.clouds import clouds, paired_prompts, permuted, rotation, single_prompts

CONFIG = AnalysisConfig(n_bootstrap=200, n_shuffles=4)
RAW = ("centroid_distance", "pairwise_distance", "mean_norm")
WITH_TEST_SET = ("in_domain_accuracy", "in_domain_auroc")
DISTANCES = (0.0, 1.5, 4.0, 2.0)


@pytest.fixture(scope="module")
def prompts():
    return paired_prompts(100)


@pytest.fixture(scope="module")
def analysis(prompts) -> Analysis:
    base = ArrayLayers(clouds(prompts, DISTANCES))
    return analyze(prompts, base, ArrayLayers(clouds(prompts, [2 * d for d in DISTANCES])), config=CONFIG)


def flat(document, path: str = "") -> dict[str, float]:
    """Every number of a JSON document by its path."""
    if isinstance(document, dict):
        return {k: v for key, item in document.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(document, list):
        return {k: v for key, item in enumerate(document) for k, v in flat(item, f"{path}/{key}").items()}
    return {path: document} if isinstance(document, (int, float)) else {}


def assert_same(first: Analysis, second: Analysis, *, rtol: float, but: tuple[str, ...] = ()) -> None:
    found, expected = flat(second.to_dict()), flat(first.to_dict())
    assert found.keys() == expected.keys()
    for path, number in expected.items():
        if not any(f"/{name}/" in path or path.endswith(f"/{name}") for name in but):
            assert found[path] == pytest.approx(number, rel=rtol, abs=rtol), path


def test_every_number_is_there_with_its_interval(analysis: Analysis) -> None:
    assert analysis.tuned_layers is not None
    for layer in (*analysis.base_layers, *analysis.tuned_layers):
        assert set(layer.numbers) == set(NUMBERS) - set(WITH_TEST_SET)
        for name, number in layer.numbers.items():
            assert number.low <= number.value <= number.high, name
        assert [point.C for point in layer.by_C] == list(CONFIG.Cs)
        chosen = next(point for point in layer.by_C if layer.C == point.C)
        assert chosen.numbers["margin_mean"] == layer.numbers["margin_mean"]


def test_clouds_of_known_distance(analysis: Analysis) -> None:
    """Unit Gaussians in 12 dimensions, the means d apart, the scale known."""
    for layer, distance in zip(analysis.base_layers, DISTANCES, strict=True):
        numbers = layer.numbers
        scale = np.sqrt(12 + distance**2 / 4 + 25)
        assert layer.scale == pytest.approx(scale, rel=0.07)
        if distance:
            assert numbers["relative_distance"].value == pytest.approx(distance / scale, rel=0.15)
            assert numbers["fisher_ratio"].value == pytest.approx(distance / np.sqrt(12), rel=0.15)
            assert numbers["mean_difference_margin"].value == pytest.approx(distance / 2 / scale, rel=0.25)
            assert numbers["fisher_ratio"].low > 0
        assert numbers["effective_rank"].value == pytest.approx(11, rel=0.15)
    accuracies = [layer.numbers["probe_accuracy"].value for layer in analysis.base_layers]
    assert accuracies[2] > 0.88  # the ideal probe reaches Φ(2) = 0.977
    assert accuracies[0] == pytest.approx(0.5, abs=0.12)
    assert analysis.best_layer == 2


def test_the_control_stays_at_chance(analysis: Analysis) -> None:
    for layer in analysis.base_layers:
        for name in ("probe_accuracy_control", "probe_auroc_control"):
            assert layer.numbers[name].value == pytest.approx(0.5, abs=0.08)


def test_margins_equal_the_probes_own(prompts, analysis: Analysis) -> None:
    """The table's margin is what `Probes.margin` gives, and the probe is a direct fit at the chosen cost."""
    embeddings = clouds(prompts, DISTANCES)[2]
    test, probe = prompts.in_split("test"), prompts.in_split("probe")
    probes = analysis.base_probes
    margins = probes.margin(embeddings, 2)
    signed = np.where(prompts.labels == 1, margins, -margins)[test]
    assert analysis.base_layers[2].numbers["margin_mean"].value == pytest.approx(signed.mean(), rel=1e-9)
    z = probes.frame(2).normalise(embeddings)
    weights, bias = fit_path(z[probe], prompts.labels[probe], (float(probes.C[2]),))
    np.testing.assert_allclose(probes.weights[2], weights[0], rtol=1e-5, atol=1e-7)
    assert probes.bias[2] == pytest.approx(bias[0], rel=1e-5, abs=1e-7)


def test_changes_are_paired(analysis: Analysis) -> None:
    assert analysis.tuned_layers is not None
    base, tuned = analysis.base_layers[1], analysis.tuned_layers[1]
    assert tuned.C == base.C
    assert tuned.change is not None
    assert base.change is None
    for name, change in tuned.change.items():
        assert change.difference.value == pytest.approx(tuned.numbers[name].value - base.numbers[name].value)
        assert (change.ratio is None) == (name not in LENGTHS)
    fisher = tuned.change["fisher_ratio"].ratio
    assert fisher is not None
    assert fisher.value == pytest.approx(2, rel=0.1)
    assert fisher.low > 1
    assert tuned.numbers["norm_ratio"] == tuned.change["mean_norm"].ratio
    assert tuned.numbers["orthogonal_std_ratio"] == tuned.change["orthogonal_std"].ratio
    assert tuned.numbers["direction_cosine"].value > 0.98
    # Same prompts, same resamples: the difference is surer than two intervals side by side would say.
    alone = tuned.numbers["fisher_ratio"].high - tuned.numbers["fisher_ratio"].low
    paired = tuned.change["fisher_ratio"].difference
    assert paired.high - paired.low < alone


def test_inflation_is_seen_as_such(prompts) -> None:
    """Everything five times as long: raw distances grow, nothing scale-free does."""
    base = clouds(prompts, (1.5, 3.0))
    tuned = analyze(prompts, ArrayLayers(base), ArrayLayers(5 * base), config=CONFIG).tuned_layers
    assert tuned is not None
    for layer in tuned:
        assert layer.change is not None
        for name, change in layer.change.items():
            if name in RAW:
                assert change.ratio is not None
                assert change.ratio.low == pytest.approx(5)
            else:
                assert change.difference.value == pytest.approx(0, abs=1e-6)
                assert change.difference.high - change.difference.low < 1e-5
        assert layer.numbers["norm_ratio"].value == pytest.approx(5)
        assert layer.numbers["orthogonal_std_ratio"].value == pytest.approx(1)
        assert layer.numbers["direction_cosine"].value == pytest.approx(1)


def test_contraction_is_seen_as_such(prompts) -> None:
    """What is left beside the separating axis shrinks to a third, along it nothing changes."""
    base = clouds(prompts, (4.0, 4.0), offset=40.0)
    tuned = base.copy()
    tuned[:, :, 1:-1] /= 3
    tuned[:, :, -1] = 40 + (tuned[:, :, -1] - 40) / 3
    layer = analyze(prompts, ArrayLayers(base), ArrayLayers(tuned), config=CONFIG).tuned_layers[0]  # type: ignore[index]
    assert layer.numbers["orthogonal_std_ratio"].value == pytest.approx(1 / 3, rel=0.15)
    assert layer.numbers["orthogonal_std_ratio"].high < 0.5
    assert layer.change["fisher_ratio"].ratio.low > 1  # type: ignore[index,union-attr]
    assert layer.change["relative_distance"].ratio.value == pytest.approx(1, abs=0.05)  # type: ignore[index,union-attr]


def test_permuting_the_prompts_changes_nothing(prompts, analysis: Analysis) -> None:
    order = np.random.default_rng(0).permutation(len(prompts))
    base, tuned = clouds(prompts, DISTANCES), clouds(prompts, [2 * d for d in DISTANCES])
    other = analyze(permuted(prompts, order), ArrayLayers(base[:, order]), ArrayLayers(tuned[:, order]), config=CONFIG)
    assert_same(analysis, other, rtol=1e-9)
    assert other.reason == analysis.reason


def test_scaling_leaves_what_is_scale_free(prompts) -> None:
    base = clouds(prompts, DISTANCES)
    first = analyze(prompts, ArrayLayers(base), config=CONFIG)
    longer = analyze(prompts, ArrayLayers(37 * base), config=CONFIG)
    assert_same(first, longer, rtol=1e-6, but=(*RAW, "scale"))
    for name in RAW:
        ratio = longer.base_layers[1].numbers[name].value / first.base_layers[1].numbers[name].value
        assert ratio == pytest.approx(37)


def test_one_rotation_leaves_everything(prompts) -> None:
    base = clouds(prompts, DISTANCES)
    first = analyze(prompts, ArrayLayers(base), config=CONFIG)
    assert_same(first, analyze(prompts, ArrayLayers(base @ rotation(12)), config=CONFIG), rtol=1e-6)


def test_a_test_set_of_other_origin(prompts) -> None:
    """There the labels part along another axis: the carried-over probe fails where a probe of its own succeeds."""
    other = single_prompts([1] * 60 + [0] * 90, name="elsewhere", split="tune")
    far = clouds(other, (4.0, 4.0), seed=3)
    far[1] = far[1][:, [1, 0, *range(2, 12)]]
    base = ArrayLayers(clouds(prompts, (4.0, 4.0)))
    found = analyze(prompts, base, base, test=TestSet(other, ArrayLayers(far), ArrayLayers(far)), config=CONFIG)
    same, turned = found.base_layers
    assert found.test_name == "elsewhere"
    assert found.n_prompts["test"] == {"harmful": 60, "harmless": 90}
    for layer in (same, turned):
        assert set(layer.numbers) == set(NUMBERS)
        assert layer.numbers["in_domain_accuracy"].value > 0.93
        assert layer.numbers["in_domain_auroc"].value > 0.97
    assert same.numbers["probe_accuracy"].value > 0.93
    assert turned.numbers["probe_accuracy"].value < 0.7
    assert found.tuned_layers is not None
    assert found.tuned_layers[0].numbers["in_domain_accuracy"] == same.numbers["in_domain_accuracy"]


def test_saved_and_loaded(analysis: Analysis, prompts, tmp_path) -> None:
    analysis.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["analysis.json", "probes.safetensors"]
    loaded = Analysis.load(tmp_path)
    assert loaded.to_dict() == analysis.to_dict()
    assert loaded.config == analysis.config
    embeddings = clouds(prompts, DISTANCES)[1]
    for old, new in ((analysis.base_probes, loaded.base_probes), (analysis.tuned_probes, loaded.tuned_probes)):
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(old.margin(embeddings, 1), new.margin(embeddings, 1))


def test_base_alone_is_saved_and_loaded(prompts, tmp_path) -> None:
    found = analyze(prompts, ArrayLayers(clouds(prompts, (1.0,))), config=CONFIG)
    found.save(tmp_path)
    loaded = Analysis.load(tmp_path)
    assert loaded.tuned_layers is None
    assert loaded.tuned_probes is None
    assert loaded.to_dict() == found.to_dict()
    assert "base_layers" not in found.to_dict()


def test_a_missing_damaged_or_newer_analysis_is_a_sentence(analysis: Analysis, tmp_path) -> None:
    with pytest.raises(InputError, match="no readable analysis"):
        Analysis.load(tmp_path)
    analysis.save(tmp_path)
    path = tmp_path / "analysis.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Analysis.load(tmp_path)
    path.write_text(json.dumps({key: item for key, item in whole.items() if key != "layers"}))
    with pytest.raises(InputError, match="no readable analysis"):
        Analysis.load(tmp_path)
    path.write_text(json.dumps(whole))
    (tmp_path / "probes.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="no readable analysis"):
        Analysis.load(tmp_path)


@pytest.mark.parametrize("kind", ["equal", "zero", "two points", "one dimension", "tiny set", "huge", "one layer"])
def test_degenerate_embeddings_never_give_nan(kind: str) -> None:
    prompts = paired_prompts(30 if kind != "tiny set" else 12)
    base = clouds(prompts, (2.0, 2.0)).astype(np.float32)
    if kind == "equal":
        base[:] = base[:, :1]
    elif kind == "zero":
        base[:] = 0
    elif kind == "two points":
        base = np.where(prompts.labels[None, :, None] == 1, base[:, :1], base[:, 1:2])
    elif kind == "one dimension":
        base = base[:, :, :1]
    elif kind == "huge":
        base = base * np.float32(1e30)
    elif kind == "one layer":
        base = base[:1]
    tuned = 3 * base if kind != "huge" else base
    found = analyze(prompts, ArrayLayers(base), ArrayLayers(tuned), config=CONFIG)
    json.dumps(found.to_dict(), allow_nan=False)
    numbers = found.base_layers[0].numbers
    if kind in ("equal", "zero"):
        assert numbers["probe_accuracy"].value == 0.5
        assert numbers["probe_auroc"].value == 0.5
        assert numbers["margin_mean"].value == 0
        assert numbers["effective_rank"].value == 0
        assert CONFIG.Cs[-1] == found.base_layers[0].C
    if kind == "two points":
        assert numbers["probe_accuracy"].value == 1
        assert numbers["fisher_ratio"].value == 1e6
    if kind == "one layer":
        assert found.recommended == (0,)
        assert "single layer" in found.reason


def test_broken_embeddings_are_a_sentence(prompts) -> None:
    base = clouds(prompts, (1.0, 1.0))
    broken = base.copy()
    broken[1, 3, 2] = np.nan
    with pytest.raises(InputError, match="Layer 1 of the base model holds values that are not finite, for 1 of 100"):
        analyze(prompts, ArrayLayers(broken), config=CONFIG)
    with pytest.raises(InputError, match="Layer 1 of the tuned model"):
        analyze(prompts, ArrayLayers(base), ArrayLayers(broken), config=CONFIG)
    with pytest.raises(InputError, match="of 199 prompts, the prompt set has 200"):
        analyze(prompts, ArrayLayers(base[:, 1:]), config=CONFIG)
    with pytest.raises(InputError, match="1 and 2 layers"):
        analyze(prompts, ArrayLayers(base), ArrayLayers(base[:1]), config=CONFIG)
    with pytest.raises(InputError, match="not the same model"):
        analyze(prompts, ArrayLayers(base), ArrayLayers(base[:, :, :5]), config=CONFIG)
    with pytest.raises(InputError, match="0 layers"):
        analyze(prompts, ArrayLayers(base[:0]), config=CONFIG)


def test_too_few_prompts_are_a_sentence(prompts) -> None:
    def without(split: str, label: int):
        keep = ~(prompts.in_split(split) & (prompts.labels == label))
        return prompts.select(keep), ArrayLayers(clouds(prompts, (1.0,))[:, keep])

    with pytest.raises(InputError, match="`probe` split of 'toy' has 0 harmful and 50 harmless"):
        analyze(*without("probe", 1), config=CONFIG)
    with pytest.raises(InputError, match="`test` split of 'toy' has 50 harmful and 0 harmless"):
        analyze(*without("test", 0), config=CONFIG)
    few = paired_prompts(2, splits=("probe",))
    with pytest.raises(InputError, match="`test` split"):
        analyze(few, ArrayLayers(clouds(few, (1.0,))), config=CONFIG)
    four = paired_prompts(4)
    folds_alike = CONFIG.replace(n_folds=2)
    one_fold = replace(four, pairs=tuple(split for split in four.splits))
    with pytest.raises(InputError, match="too few to cross-validate"):
        analyze(one_fold, ArrayLayers(clouds(four, (1.0,))), config=folds_alike)


def test_a_test_set_must_be_of_other_prompts_and_the_same_models(prompts) -> None:
    base = ArrayLayers(clouds(prompts, (1.0,)))
    with pytest.raises(InputError, match="200 test prompts of 'toy' also stand in 'toy'"):
        analyze(prompts, base, test=TestSet(prompts, base), config=CONFIG)
    other = paired_prompts(20, name="other")
    elsewhere = ArrayLayers(clouds(other, (1.0,)))
    with pytest.raises(InputError, match="same models"):
        analyze(prompts, base, base, test=TestSet(other, elsewhere), config=CONFIG)
    with pytest.raises(InputError, match="5 for the test set"):
        analyze(prompts, base, test=TestSet(other, ArrayLayers(elsewhere.array[:, :, :5])), config=CONFIG)


def test_progress_is_told_and_may_stop_the_work(prompts) -> None:
    told: list[tuple[str, int, int]] = []
    base = ArrayLayers(clouds(prompts, (1.0, 2.0, 3.0)))
    analyze(prompts, base, config=CONFIG, report=lambda stage, done, total, **_: told.append((stage, done, total)))
    assert told == [("analyse", done, 3) for done in range(4)]

    def stop(stage: str, done: int, total: int, **numbers: float) -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        analyze(prompts, base, config=CONFIG, report=stop)


@pytest.mark.parametrize("settings", [{"costs": ()}, {"costs": (1.0, 0.1)}, {"n_folds": 1}, {"confidence": 1.0}])
def test_impossible_settings_are_a_sentence(settings) -> None:
    with pytest.raises(InputError):
        AnalysisConfig(**settings)


def test_recommendation_prefers_the_middle_and_keeps_its_distance() -> None:
    loss = np.full(30, 0.6)
    loss[[2, 14, 15, 20, 28]] = [0.05, 0.30, 0.20, 0.31, 0.10]
    recommended, best, reason = recommend(loss.tolist(), (1 - loss).tolist())
    assert recommended == (15, 20)  # 2 and 28 are outside the middle, 14 is next door
    assert best == 2
    assert "layer 15 is read best among layers 6 to 23 of 0 to 29" in reason
    assert "0.200 nats" in reason
    assert "Over all layers, layer 2" in reason


@pytest.mark.parametrize(
    ("loss", "expected"),
    [([0.5, 0.4], (0, 1)), ([0.1, 0.4, 0.3], (1, 2)), ([0.5] * 4, (1, 2)), ([0.3] * 30, (6, 9))],
)
def test_recommendation_of_small_models_and_ties(loss: list[float], expected: tuple[int, int]) -> None:
    assert recommend(loss, [0.5] * len(loss))[0] == expected


@pytest.mark.parametrize(("d_model", "n_elsewhere", "is_another"), [(20, 0, False), (19, 0, True), (20, 21, True)])
def test_an_analysis_of_wrong_fits_is_not_found(d_model: int, n_elsewhere: int, is_another: bool) -> None:
    """Where prompts outnumbered dimensions, of `probe` or of another test set, fits could be wrong; only there."""
    prompts = paired_prompts(20)  # 20 prompts of `probe`
    base: Any = SimpleNamespace(key="base", whole="base", d_model=d_model)
    elsewhere = single_prompts([0, *[1] * (n_elsewhere - 1)]) if n_elsewhere else None
    test = Captured(elsewhere, base) if elsewhere else None
    before = {"kind": "analysis", "format": 1, "base": "base", "tuned": None, "prompts": prompts.digest}
    before |= {"test": test and ["base", None, test.prompts.digest], "config": former_names(CONFIG.to_dict())}
    assert (analysis_key(base, prompts, CONFIG, test=test) != content_key(before)) == is_another
