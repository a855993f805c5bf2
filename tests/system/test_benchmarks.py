"""Every benchmark runs, its contestants agree and its ratios are numbers; how fast it was decides nothing here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from es2.training.config import FinetuneConfig
from tests.benchmarks import analysis, app, callback, capture, growth, step
from tests.benchmarks.contest import Figure, Report, Settings, exponent, table
from tests.builders import save_tiny_model, tiny_prompts

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
