"""One loaded model serves many fine-tunes: each comes to what it comes to alone, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.training.base import lent, measure_base
from es2.training.config import FinetuneConfig
from es2.training.finetune import finetune
from es2.training.sampling import make_schedule
from es2.training.workload import Workload
from tests.builders import save_tiny_model
from tests.training.test_finetune import PROMPTS, config_for

pytestmark = pytest.mark.usefixtures("one_thread")

TRIALS: tuple[dict[str, Any], ...] = (
    {"layers": (0, 1)},
    {"layers": (1, 2), "objective": "anchored", "rank": 2, "learning_rate": 1e-3},
    {"layers": (0, 2), "objective": "margin", "method": "full", "kl_weight": 3.0, "learning_rate": 1e-4},
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", initializer_range=0.1)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))


def measured(config: FinetuneConfig) -> Workload:
    plan = make_schedule(
        PROMPTS, config.pairs_per_step, config.steps, config.seed, config.validation_prompts, config.kl_prompts
    )
    files = model_folder(resolve(config.model))
    return measure_base(config, PROMPTS, files, plan, layers=(0, 1, 2), objectives=("fisher", "anchored"))


def weights_of(base: Workload) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in base.network.model.state_dict().items()}


def test_every_fine_tune_comes_to_what_it_comes_to_alone(llama: Path, tmp_path: Path) -> None:
    configs = [config_for(llama, **{"steps": 3, "validate_every": 2, **trial}) for trial in TRIALS]
    base = measured(configs[0])
    before = weights_of(base)
    for number, config in enumerate(configs):
        with lent(base, config) as workload:
            shared = finetune(config, PROMPTS, tmp_path / f"shared-{number}", workload=workload)
        alone = finetune(config, PROMPTS, tmp_path / f"alone-{number}")
        assert shared.losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-6)
        for point, other in zip(shared.validations, alone.validations, strict=True):
            for layer, numbers in other.layers.items():
                assert point.layers[layer] == pytest.approx(numbers, rel=1e-4, abs=1e-5)
            assert (point.kl_prompt, point.kl_reply) == pytest.approx((other.kl_prompt, other.kl_reply), abs=1e-6)
        after = weights_of(base)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert not any(weight.requires_grad for weight in base.network.model.parameters())


def test_it_is_given_back_by_a_fine_tune_that_fails(llama: Path, tmp_path: Path) -> None:
    config = config_for(llama, steps=2)
    base = measured(config)
    before = weights_of(base)

    def fail(*_: Any) -> None:
        raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError), lent(base, config) as workload:
        finetune(config, PROMPTS, tmp_path, workload=workload, stop=fail)
    after = weights_of(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_base_of_other_batches_is_no_base(llama: Path, tmp_path: Path) -> None:
    config = config_for(llama, steps=2)
    base = measured(config)
    with pytest.raises(ValueError, match="other prompts"), lent(base, config) as workload:
        finetune(config.replace(seed=1), PROMPTS, tmp_path, workload=workload)


def test_a_fine_tune_may_be_stopped_from_outside(llama: Path, tmp_path: Path) -> None:
    config = config_for(llama, steps=4, validate_every=2)
    seen: list[int] = []

    def stop(validations: Any) -> str:
        seen.append(len(validations))
        return "Another one is better."

    result = finetune(config, PROMPTS, tmp_path, stop=stop)
    assert (result.status, result.reason, result.steps, seen) == ("stopped", "Another one is better.", 2, [2])
    assert (result.output / "adapter_model.safetensors").exists()
