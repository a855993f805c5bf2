"""What a run says it came to, from what its fine-tune, its captures and its analysis gave."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from es2.analysis.verdict import KL_BUDGET
from es2.core.errors import InputError, MachineError
from es2.core.progress import Cancelled
from es2.evaluation.config import EvaluateConfig
from es2.prompts.loading import load_prompts
from es2.training.config import FinetuneConfig
from es2.training.validation import ValidationPoint
from es2.workflow import finetune_run as module
from es2.workflow.prepare import Prepared
from tests.builders import tiny_prompts
from tests.builders_artifacts import TARGETS, Compared, write_comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"), 60)


@pytest.fixture
def made(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `finetune_run` makes of a fine-tune that ended with these KLs, by the run's settings."""

    def run(
        kl: dict[str, float], validations: Sequence[ValidationPoint] = (), best_step: int = 1, **settings: Any
    ) -> dict[str, Any]:
        ended = {
            "status": "done", "reason": None, "steps": 1, "best_step": 1, "seconds": 1.0, "seconds_per_step": 1.0,
            "trained_parameters": 1, "validations": [], "kl_test": kl,
        }  # fmt: skip
        prepared = Prepared(compared.artifacts.activations, compared.tuned, compared.analysis)
        ended |= {"validations": [point.to_dict() for point in validations], "best_step": best_step}
        monkeypatch.setattr(module, "finetune", lambda *_, **__: SimpleNamespace(to_dict=lambda: ended))
        monkeypatch.setattr(module, "prepare", lambda *_, **__: prepared)
        return module.finetune_run(
            FinetuneConfig(layers=TARGETS, **{"replies": False} | settings),
            load_prompts(str(compared.artifacts.source)),
            compared.run.path,
        )

    return run


def test_the_verdict_is_by_the_runs_own_budget(made: Any) -> None:
    kl = {"prompt": 0.2, "reply": 0.45}
    wide, usual = made(kl, kl_budget=0.5), made(kl)
    assert wide["verdict"] == "separated"
    assert {verdict["name"] for verdict in wide["verdicts"].values()} != {"collapsed"}
    assert usual["verdict"] == "collapsed"
    assert usual["verdict_reason"].endswith(f"0.45 nats, the budget is {KL_BUDGET:g}.")
    assert {verdict["name"] for verdict in usual["verdicts"].values()} == {"collapsed"}
    assert made({"prompt": 0.2, "reply": 2.1}, kl_budget=0.5)["verdict_reason"].endswith("the budget is 0.5.")


KL = {"prompt": 0.01, "reply": 0.02}


class TestReplies:
    @pytest.fixture
    def evaluated(self, monkeypatch: pytest.MonkeyPatch) -> list[EvaluateConfig]:
        """The evaluations that were asked for."""
        found: list[EvaluateConfig] = []
        monkeypatch.setattr(module, "evaluate", lambda config, *_, **__: found.append(config))
        return found

    def test_an_ordinary_evaluation_is_asked_for(
        self, made: Any, evaluated: list[EvaluateConfig], compared: Compared
    ) -> None:
        result = made(KL, replies=True, device="cpu", dtype="float32")
        (config,) = evaluated
        assert (config.run, config.suite, config.limit) == (compared.run.id, "refusal", 48)
        assert config.prompts == str(compared.artifacts.source)
        usual = EvaluateConfig().to_dict()
        decided = {"model", "prompts", "run", "suite", "device", "dtype"}
        assert {name for name, value in config.to_dict().items() if value != usual[name]} <= decided
        assert result["warnings"] == []

    def test_not_of_prompts_that_have_changed_meanwhile(
        self, made: Any, evaluated: list[EvaluateConfig], compared: Compared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What they were is in memory alone, so nothing could be left out for having decided the run."""
        changed = tiny_prompts(60)
        monkeypatch.setattr(module, "load_prompts", lambda source: changed)
        (sentence,) = made(KL, replies=True)["warnings"]
        assert "have changed since the run began" in sentence
        assert evaluated == []

    def test_left_out(self, made: Any, evaluated: list[EvaluateConfig]) -> None:
        assert made(KL, replies=False)["warnings"] == []
        assert evaluated == []

    def test_not_where_the_model_lies_in_shards(
        self, made: Any, evaluated: list[EvaluateConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        (sentence,) = made(KL, replies=True)["warnings"]
        assert "shards" in sentence
        assert evaluated == []

    @pytest.mark.parametrize("error", [InputError("The prompt is too long."), MachineError("Memory ran out.")])
    def test_a_fine_tune_is_not_lost_with_its_replies(
        self, made: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(module, "evaluate", fail)
        result = made(KL, replies=True)
        assert result["verdict"] == "separated"
        assert result["warnings"] == [f"No replies were made: {error}"]

    def test_cancelled_it_is_cancelled(self, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise Cancelled

        monkeypatch.setattr(module, "evaluate", stop)
        with pytest.raises(Cancelled):
            made(KL, replies=True)


def test_a_kept_step_that_lost_behaviour_is_said(made: Any) -> None:
    layers = {2: {"effective_rank": 9.0, "mean_difference_margin": 0.1}}
    points = [
        ValidationPoint(step, 0.0, 0.0, layers, n_refusals=9, refusals_kept=kept)
        for step, kept in ((0, 1.0), (8, 0.25), (16, 0.75))
    ]
    (sentence,) = made(KL, points, best_step=8)["warnings"]
    assert "begins 0.25 of the base's 9 refusals" in sentence
    for best_step in (0, 16):
        assert made(KL, points, best_step=best_step)["warnings"] == []
