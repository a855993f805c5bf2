"""The callback in a training of others: what it keeps at a save equals a capture of the saved files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from es2.capture.capture import capture
from es2.core.errors import InputError
from es2.models.loading import load_tokenizer
from es2.store.store import Store
from es2.training import RepresentationCallback
from es2.workflow.series import find_members
from tests.builders import save_tiny_model, tiny_prompts

PROMPTS = tiny_prompts(20)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", initializer_range=0.1)


def train(base: Path, out: Path, *callbacks: Any, lora: bool) -> list[float]:
    """Four steps of TRL's SFTTrainer with a save at every second; returns the losses."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.1)
    settings = trl.SFTConfig(
        output_dir=str(out), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, max_length=64, gradient_checkpointing=False, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in PROMPTS.texts[:8]]),
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]) if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long
@pytest.mark.parametrize("lora", [True, False])
def test_every_save_of_an_sft_is_what_a_capture_of_its_files_finds(lora: bool, base: Path, tmp_path: Path) -> None:
    callback = RepresentationCallback(PROMPTS)
    losses = train(base, tmp_path / "out", callback, lora=lora)
    assert list(callback.captured) == [2, 4]
    shown = PROMPTS.measured()
    for step, found in callback.captured.items():
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        place: dict[str, Any] = {"model": str(base), "adapter": checkpoint} if lora else {"model": str(checkpoint)}
        again = capture(prompts=shown, device="cpu", run="import" if lora else None, **place)
        assert (again.computed, again.activations.key) == (False, found.key), "nothing is loaded for it"
        fresh = capture(prompts=shown, device="cpu", run="x" if lora else None, store=Store(tmp_path / "else"), **place)
        assert fresh.computed
        assert fresh.activations.key == found.key
        for layer in range(found.n_layers):
            np.testing.assert_allclose(found.layer(layer), fresh.activations.layer(layer), rtol=1e-3, atol=1e-4)
    assert Store().find(model=str(base), texts_digest=shown.texts_digest, position="last") is None
    began = capture(str(base), shown, device="cpu").activations
    assert [member.activations.key for member in find_members(began, "last")] == [
        found.key for found in callback.captured.values()
    ]
    first, last = callback.captured.values()
    assert not np.allclose(first.layer(2), last.layer(2), atol=1e-3), "the training moved them"
    assert train(base, tmp_path / "plain", lora=lora) == losses, "looking changes nothing"


class TestWithoutATrainer:
    """The callback's own calls, as a trainer makes them."""

    def saved(self, base: Path, out: Path) -> tuple[Any, TrainingArguments, TrainerState]:
        model = AutoModelForCausalLM.from_pretrained(base).train()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        model.save_pretrained(out / "checkpoint-3")
        load_tokenizer(base).save_pretrained(out / "checkpoint-3")
        arguments = TrainingArguments(output_dir=str(out), use_cpu=True, report_to=[])
        return model, arguments, TrainerState(global_step=3, is_world_process_zero=True)

    def test_a_save_is_captured_and_the_model_left_as_it_was(self, base: Path, tmp_path: Path) -> None:
        callback = RepresentationCallback(PROMPTS)
        model, arguments, state = self.saved(base, tmp_path)
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        callback.on_train_begin(arguments, state, TrainerControl(), model=model)
        callback.on_save(arguments, state, TrainerControl(), model=model)
        found = callback.captured[3]
        assert found.model == str(tmp_path / "checkpoint-3")
        began = capture(str(base), PROMPTS.measured(), device="cpu").activations
        assert found.meta["base"] == began.model
        assert found.meta["base_weights"] == began.meta["decides"]["weights"]
        assert [member.step for member in find_members(began, "last")] == [3]
        assert found.n_prompts == len(PROMPTS.measured())
        assert [module.training for module in model.modules()] == before
        fresh = capture(found.model, PROMPTS.measured(), device="cpu", store=Store(tmp_path / "else")).activations
        assert fresh.key == found.key
        np.testing.assert_allclose(found.layer(1), fresh.layer(1), rtol=1e-3, atol=1e-4)

    def test_another_process_captures_nothing(self, base: Path, tmp_path: Path) -> None:
        callback = RepresentationCallback(PROMPTS)
        model, arguments, _ = self.saved(base, tmp_path)
        callback.on_save(
            arguments, TrainerState(global_step=3, is_world_process_zero=False), TrainerControl(), model=model
        )
        assert callback.captured == {}

    def test_a_capture_that_fails_is_a_warning(
        self, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        callback = RepresentationCallback(PROMPTS)
        model, arguments, _ = self.saved(base, tmp_path)
        callback.on_save(
            arguments, TrainerState(global_step=9, is_world_process_zero=True), TrainerControl(), model=model
        )
        assert callback.captured == {}
        assert "Step 9 was saved but not captured" in caplog.text

    @pytest.mark.parametrize(("what", "sentence"), [("is_quantized", "quantised"), ("fsdp", "sharded")])
    def test_what_its_files_do_not_say_is_refused_at_the_beginning(
        self, what: str, sentence: str, base: Path, tmp_path: Path
    ) -> None:
        model, arguments, state = self.saved(base, tmp_path)
        object.__setattr__(model if what == "is_quantized" else arguments, what, True)
        with pytest.raises(InputError, match=sentence):
            RepresentationCallback(PROMPTS).on_train_begin(arguments, state, TrainerControl(), model=model)

    def test_prompts_are_read_before_the_training(self, tmp_path: Path) -> None:
        with pytest.raises(InputError):
            RepresentationCallback(str(tmp_path / "absent.csv"))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, es2.training; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
