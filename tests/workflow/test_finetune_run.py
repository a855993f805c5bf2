"""What a run says it came to, from what its fine-tune, its captures and its analysis gave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from es2.analysis.verdict import KL_BUDGET
from es2.training.config import FinetuneConfig
from es2.workflow import finetune_run as module
from es2.workflow.prepare import Prepared
from tests.builders_artifacts import TARGETS, Compared, write_comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"), 60)


@pytest.fixture
def made(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `finetune_run` makes of a fine-tune that ended with these KLs, by the run's settings."""

    def run(kl: dict[str, float], **settings: Any) -> dict[str, Any]:
        ended = {
            "status": "done", "reason": None, "steps": 1, "best_step": 1, "seconds": 1.0, "seconds_per_step": 1.0,
            "trained_parameters": 1, "validations": [], "kl_test": kl,
        }  # fmt: skip
        prepared = Prepared(compared.artifacts.activations, compared.tuned, compared.analysis)
        monkeypatch.setattr(module, "finetune", lambda *_, **__: SimpleNamespace(to_dict=lambda: ended))
        monkeypatch.setattr(module, "prepare", lambda *_, **__: prepared)
        return module.finetune_run(
            FinetuneConfig(layers=TARGETS, **settings), compared.artifacts.prompts, compared.run.path
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
