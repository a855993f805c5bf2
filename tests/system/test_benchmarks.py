"""Every benchmark runs, its contestants agree and its ratios are numbers; how fast it was decides nothing here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from es2.core.errors import InputError
from es2.jobs.queue import create_job
from es2.training.config import FinetuneConfig
from es2.workflow.sweep_space import SweepConfig, make_space
from es2.workflow.sweeps import write_trials
from tests.benchmarks import analysis, app, callback, capture, growth, layer_effect, step
from tests.benchmarks.contest import Figure, Report, Settings, exponent, table
from tests.builders import save_tiny_model, tiny_prompts, write_prompts

pytestmark = pytest.mark.usefixtures("places", "one_thread")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    return Settings(folder, tiny_prompts(60), n_prompts=20, repeats=2)


def values(report: Report) -> dict[str, float]:
    found = {figure.what: figure.value for figure in report.figures}
    assert all(math.isfinite(value) for value in found.values())
    return found


def test_the_sample_holds_whole_pairs_of_the_measured_prompts(settings: Settings) -> None:
    sample = settings.sample()
    assert 16 <= len(sample) <= 24
    assert set(sample.splits) <= {"probe", "test"}
    assert all(sample.pairs.count(pair) == 2 for pair in sample.pairs)


def test_captures_agree(settings: Settings) -> None:
    report = capture.measure(settings, memory=False)
    assert values(report)["ours ÷ floor"] > 0
    assert report.details["distinct_tokens"] < report.details["tokens"]
    errors = report.details["largest_error"]
    assert set(errors) == {"run_with_cache", "output_hidden_states"}
    assert all(error < 1e-4 for error in errors.values())
    assert all(len(seconds) == 2 for seconds in report.details["seconds"].values())


def test_steps_follow_the_same_losses(settings: Settings) -> None:
    config = FinetuneConfig(
        layers=(0, 1),
        steps=2,
        pairs_per_step=4,
        kl_prompts=2,
        reply_tokens=3,
        rank=2,
        kl_weight=3.0,
        learning_rate=0.02,
    )
    report = step.measure(settings, config)
    losses = report.details["losses"]
    np.testing.assert_allclose(losses["ours"], losses["straightforward"], rtol=1e-3, atol=1e-3)
    assert losses["ours"][0] != losses["ours"][1]
    values(report)


def test_analyses_agree(settings: Settings) -> None:
    report = analysis.measure(settings)
    assert values(report)["largest difference from scikit-learn"] < 5e-3


def test_growth_is_fitted(settings: Settings) -> None:
    sizes = {
        "capture": {"prompts": 2, "layers": 1, "width": 32},
        "step": {"prompts": 2, "layers": 2, "width": 32},
        "analysis": {"prompts": 12, "layers": 1, "width": 8},
    }
    report = growth.measure(Settings(settings.folder, settings.prompts, 0, repeats=1), sizes, n_pairs=60)
    assert len(values(report)) == 9


def test_the_app_is_timed(settings: Settings) -> None:
    report = app.measure(Settings(settings.folder, settings.prompts, 0, repeats=1))
    assert min(values(report).values()) > 0
    assert {"opening", "view", "layer, pca", "layer, separation"} == set(report.details["seconds"])


def test_an_exponent_is_the_power() -> None:
    assert exponent([10, 20, 40], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_a_figure_knows_whether_it_holds() -> None:
    assert Figure("", 3.4, "×", at_least=3.3).holds is True
    assert Figure("", 3.4, "×", at_most=3.3).holds is False
    assert Figure("", 3.4, "×").holds is None
    shown = table([Report("capture", (Figure("ours", 2.0, "×", at_least=3.0),), {})])
    assert list(shown.columns[4].cells) == ["NO"]


def test_memory_is_that_of_a_process_of_its_own(settings: Settings) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of memory can only be reset on Linux")
    assert 0 <= capture.added_memory("output_hidden_states", settings.folder, settings.sample()) < 2000


def test_what_the_callback_adds_is_timed(settings: Settings) -> None:
    report = callback.measure(settings, steps=2, length=16)
    assert values(report)["a save's capture"] > 0
    seconds = report.details["seconds"]
    assert (len(seconds["step"]), len(seconds["save"])) == (4, 2)
    assert len(report.details["prompt_tokens"]) == 2, "every save was captured anew"


@pytest.fixture
def sweep_over_layers(settings: Settings) -> Callable[..., str]:
    """A sweep by hand whose trials differ in their layers alone; the deeper the pair, the more it came to."""

    def write(status: str = "done", **given: Any) -> str:
        prompts = write_prompts(settings.folder.parent / "prompts.csv", settings.prompts)
        model = save_tiny_model(settings.folder.parent / "four-layers", n_layers=4)
        usual = {"objective": "fisher", "kl_weight": 10.0, "learning_rate": 1e-3, "rank": 4} | given
        usual |= {"device": "cpu", "kl_budget": 0.1}
        where = {} if "layers" in given else {"layer_range": (0, 3)}
        space = make_space(SweepConfig(**where), {"model": str(model), **usual}, 4)
        of = {"model": str(model), "prompts": str(prompts)}
        about = of | {"sweep": {"trials": 7}, "space": space.to_dict()}
        job = create_job("sweep", about)
        trials = [
            {"number": number, "status": status, "owner": "", "settings": {"layers": list(pair)}, "run": None}
            | {"numbers": {"separation": sum(pair) + number / 10, "kl": 0.02, "kept": True, "lost": None}}
            for number, pair in enumerate([*combinations(range(4), 2), (0, 1)])
        ]
        write_trials(job.path, trials)
        return job.id

    return write


def test_the_effect_of_a_layer_is_held_against_a_sweep(sweep_over_layers: Callable[..., str]) -> None:
    found = layer_effect.measure(sweep_over_layers(), n_pairs=6, step=0.01)
    json.dumps(found, allow_nan=False)
    assert (found["n_trials"], len(found["effects"])) == (6, 4), "a pair that was tried again counts once"
    pairs = {tuple(row["layers"]): row for row in found["trials"]}
    effects = {effect["layer"]: effect for effect in found["effects"]}
    assert pairs[0, 2]["of_layers"] == pytest.approx((effects[0]["gain_at_budget"] + effects[2]["gain_at_budget"]) / 2)
    by_block = [
        (sum(effects[block]["gains"].get(str(layer), 0.0) for layer in (0, 1)) / 2) ** 2 / effects[block]["kl"]
        for block in (0, 1)
    ]
    assert pairs[0, 1]["of_blocks"] == pytest.approx(math.sqrt(0.1 * sum(by_block)))
    for correlation in found["spearman"].values():
        assert correlation["kl"] == {"rho": None, "low": None, "high": None}, "all KLs are alike"
        assert -1 <= correlation["separation"]["low"] <= correlation["separation"]["high"] <= 1


def test_a_rank_correlation_and_its_interval() -> None:
    found = layer_effect.spearman([1, 2, 3, 4, 5, 6], [1, 8, 27, 64, 125, 100])
    assert found["rho"] == pytest.approx(spearmanr([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5]).statistic)
    assert found["low"] is not None
    assert found["low"] < found["rho"] <= found["high"]


@pytest.mark.parametrize(
    ("status", "given", "words"),
    [
        ("done", {"objective": None}, "searched objective, too"),
        ("done", {"layers": (0, 1), "rank": None}, "did not search the layers"),
        ("pruned", {}, "has whole trials of 0 pairs"),
    ],
)
def test_a_sweep_that_says_nothing_of_layers_is_refused(
    sweep_over_layers: Callable[..., str], status: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        layer_effect.measure(sweep_over_layers(status, **given), n_pairs=6, step=0.01)
