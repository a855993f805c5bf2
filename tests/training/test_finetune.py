"""The fine-tune end to end on tiny models: it separates, it can be stopped and resumed anywhere, and it keeps its word.

What a run claims to have reached is measured again from the files that it leaves, with plain transformers and peft.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from es2.core.errors import InputError, MachineError
from es2.core.progress import Cancelled
from es2.models.adapters import apply_finetune
from es2.models.blocks import find_blocks
from es2.models.chat_template import render
from es2.models.loading import load_model, load_tokenizer
from es2.models.shape import count_layers
from es2.models.tensors import load_tensors, save_tensors
from es2.prompts.prompt_set import PromptSet
from es2.store.film import FILM, read_film, texts_by_hash
from es2.training import base as base_module
from es2.training import finetune as finetune_module
from es2.training.config import FinetuneConfig
from es2.training.finetune import FinetuneResult, finetune
from es2.training.validation import PATIENCE, ValidationPoint, validation_numbers
from tests.builders import save_tiny_model, tiny_prompts

N_LAYERS = 3
LAYERS = (0, 1)
ARCHITECTURES = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")


def split_prompts(n_pairs: int = 24) -> PromptSet:
    """Half of the pairs in `tune`, a quarter each in `validation` and `test`."""
    prompts = tiny_prompts(n_pairs)
    turns = ("tune", "validation", "tune", "test")
    return replace(prompts, splits=tuple(turns[row // 2 % 4] for row in range(len(prompts))))


PROMPTS = split_prompts()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of an architecture, with weights small enough to be trained in a few steps, saved once."""
    root = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else save_tiny_model(path, architecture, initializer_range=0.1)

    return folder


@pytest.fixture
def llama(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("llama")


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))


def config_for(model: Path, **settings: Any) -> FinetuneConfig:
    """A short run; its KL budget is wide, since tiny random models have no behaviour to keep."""
    defaults: dict[str, Any] = {
        "steps": 8, "pairs_per_step": 5, "validate_every": 4, "learning_rate": 3e-3, "reply_tokens": 4,
        "kl_budget": 1.0, "rank": 4, "objective": "fisher", "device": "cpu",
    }  # fmt: skip
    return FinetuneConfig(**{"layers": LAYERS, "model": str(model)} | defaults | settings)


class Log:
    """A reporter that keeps everything, and asks to stop after so many steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[tuple[str, int, int, dict[str, float]]] = []
        self.stop_after = stop_after

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        self.events.append((stage, done, total, numbers))
        if stage == "finetune" and done == self.stop_after:
            raise Cancelled

    def steps(self) -> list[dict[str, float]]:
        return [numbers for stage, _, _, numbers in self.events if stage == "finetune"]


def tuned_model(model: Path, result: FinetuneResult) -> Any:
    """What a run left, loaded as anybody would: plain transformers, and peft or the changed blocks."""
    plain = load_model(model, device="cpu")
    if result.output.name == "adapter":
        from peft import PeftModel

        return PeftModel.from_pretrained(plain, str(result.output)).merge_and_unload()
    apply_finetune(plain, result.output)
    return plain


def embeddings(model: Any, folder: Path, prompts: PromptSet, layer: int) -> np.ndarray:
    with torch.no_grad():
        outputs = [
            model.base_model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[layer + 1][0, -1]
            for tokens in render(load_tokenizer(folder), prompts.texts).token_ids
        ]
    return torch.stack(outputs).numpy()


def adapter_tensors(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(result.output / "adapter_model.safetensors")


class TestSeparates:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_on_prompts_it_never_saw_as_the_adapter_shows(
        self, architecture: str, folder_of: Callable[[str], Path], tmp_path: Path
    ) -> None:
        model = folder_of(architecture)
        log = Log()
        result = finetune(config_for(model), PROMPTS, tmp_path, report=log)
        assert (result.status, result.steps, result.reason) == ("done", 8, None)
        assert result.best_step in (4, 8)
        assert all(math.isfinite(value) for numbers in log.steps() for value in numbers.values())

        base, tuned = load_model(model, device="cpu"), tuned_model(model, result)
        test = PROMPTS.select(PROMPTS.in_split("test"))
        validation = PROMPTS.select(PROMPTS.in_split("validation"))
        best = next(point for point in result.validations if point.step == result.best_step)
        for layer in LAYERS:
            before, after = (embeddings(either, model, test, layer) for either in (base, tuned))
            rows = validation_numbers(test, before, before), validation_numbers(test, before, after)
            assert rows[1]["fisher_ratio"] > 1.5 * rows[0]["fisher_ratio"]
            assert rows[1]["mean_difference_margin"] > 1.5 * rows[0]["mean_difference_margin"]
            # And what the run says it saw on validation is what its adapter gives.
            again = validation_numbers(
                validation, *(embeddings(either, model, validation, layer) for either in (base, tuned))
            )
            assert best.layers[layer] == pytest.approx(again, rel=1e-3)

    @pytest.mark.parametrize("objective", ["distance", "anchored", "fisher", "margin", "0.5*fisher+2*distance"])
    def test_with_every_objective(self, objective: str, llama: Path, tmp_path: Path) -> None:
        log = Log()
        finetune(config_for(llama, objective=objective, steps=6), PROMPTS, tmp_path, report=log)
        separations = [numbers["separation"] for numbers in log.steps()]
        assert separations[-1] > separations[0]

    def test_kl_of_the_result_is_that_of_the_saved_adapter(self, llama: Path, tmp_path: Path) -> None:
        result = finetune(config_for(llama), PROMPTS, tmp_path)
        base, tuned = load_model(llama, device="cpu"), tuned_model(llama, result)
        harmless = PROMPTS.select(PROMPTS.in_split("test") & (PROMPTS.labels == 0))
        tokenizer = load_tokenizer(llama)
        tokens = render(tokenizer, harmless.texts).token_ids
        other = render(tokenizer, ("A", "1")).token_ids
        head = next(i for i, (a, b) in enumerate(zip(*other, strict=False)) if a != b)
        sums, counts = np.zeros(2), np.zeros(2)
        for prompt in tokens:
            whole = base.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
            with torch.no_grad():
                before, after = (either(whole[:, :-1]).logits[0].log_softmax(dim=-1) for either in (base, tuned))
            kl = (before.exp() * (before - after)).sum(dim=-1).numpy()
            own, reply = kl[head : len(prompt)], kl[len(prompt) - 1 :]
            sums += own.sum(), reply.sum()
            counts += len(own), len(reply)
        assert result.kl_test is not None
        assert result.kl_test["prompt"] > 1e-3
        assert [result.kl_test["prompt"], result.kl_test["reply"]] == pytest.approx(sums / counts, rel=1e-2)

    def test_nothing_above_the_last_target_layer_and_no_head_is_trained(self, llama: Path, tmp_path: Path) -> None:
        settings = {"layers": (1,), "first_block": 1, "steps": 2}
        result = finetune(config_for(llama, **settings), PROMPTS, tmp_path)
        names = adapter_tensors(result)
        assert names
        assert all(".layers.1." in name for name in names)
        assert {name.split(".")[-3] for name in names} == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        }  # fmt: skip
        assert result.trained_parameters == sum(tensor.numel() for tensor in names.values())

    def test_the_capture_of_the_run_shows_it(self, llama: Path, tmp_path: Path) -> None:
        """The saved adapter goes through es2.capture.capture, TransformerLens and all."""
        from es2.capture.capture import capture

        result = finetune(config_for(llama), PROMPTS, tmp_path / "run")
        assert result.best_step > 0
        captured = capture(str(llama), PROMPTS, adapter=result.output, run="run", device="cpu").activations
        expected = embeddings(tuned_model(llama, result), llama, PROMPTS, 1)
        assert captured.layer(1) == pytest.approx(expected, abs=1e-4)

    def test_full_fine_tuning_leaves_the_changed_blocks_only(self, llama: Path, tmp_path: Path) -> None:
        result = finetune(config_for(llama, method="full", learning_rate=1e-3), PROMPTS, tmp_path)
        assert result.best_step > 0
        saved = safetensors.torch.load_file(result.output)
        base, tuned = load_model(llama, device="cpu"), tuned_model(llama, result)
        changed = {
            name for name, weight in tuned.named_parameters() if not torch.equal(weight, base.get_parameter(name))
        }
        assert changed <= saved.keys()
        assert {name.split(".")[2] for name in saved} == {"0", "1"}
        validation = PROMPTS.select(PROMPTS.in_split("validation"))
        before, after = (embeddings(either, llama, validation, 1) for either in (base, tuned))
        point = next(point for point in result.validations if point.step == result.best_step)
        assert point.layers[1] == pytest.approx(validation_numbers(validation, before, after), rel=1e-3)

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_in_bfloat16(self, method: str, llama: Path, tmp_path: Path) -> None:
        log = Log()
        result = finetune(config_for(llama, dtype="bfloat16", method=method), PROMPTS, tmp_path, report=log)
        assert result.best_step > 0
        assert result.validations[-1].score > result.validations[0].score
        assert all(tensor.dtype == torch.float32 for tensor in safetensors.torch.load_file(
            result.output / "adapter_model.safetensors" if method == "lora" else result.output
        ).values())  # fmt: skip


def test_what_is_logged_is_what_is_differentiated(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one loss: whatever it is changed to, the steps and the log follow."""
    free = finetune(config_for(llama, kl_weight=0.0), PROMPTS, tmp_path / "free")
    monkeypatch.setattr(finetune_module, "es2_loss", lambda separation, kl_prompt, kl_reply, kl_weight: -separation)
    log = Log()
    changed = finetune(config_for(llama, kl_weight=20.0), PROMPTS, tmp_path / "changed", report=log)
    assert changed.losses == pytest.approx([-numbers["separation"] for numbers in log.steps()])
    assert changed.losses == pytest.approx(free.losses, abs=1e-4)


class TestSameCurve:
    """Parts, processes and recomputation change the loss by rounding only."""

    @pytest.fixture(scope="class")
    def expected(self, folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
        folder = tmp_path_factory.mktemp("run")
        return finetune(config_for(folder_of("llama"), objective="fisher+margin+anchored"), PROMPTS, folder)

    def check(self, losses: list[float], expected: FinetuneResult) -> None:
        assert len(set(expected.losses)) == 8
        assert losses == pytest.approx(expected.losses, abs=1e-4)

    @pytest.mark.parametrize("settings", [{"accumulate": 2}, {"accumulate": 5}, {"gradient_checkpointing": True}])
    def test_in_parts_or_recomputed(
        self, settings: dict[str, Any], llama: Path, expected: FinetuneResult, tmp_path: Path
    ) -> None:
        config = config_for(llama, objective="fisher+margin+anchored", **settings)
        self.check(list(finetune(config, PROMPTS, tmp_path).losses), expected)

    @pytest.mark.long
    def test_in_two_processes_under_accelerate(self, llama: Path, expected: FinetuneResult, tmp_path: Path) -> None:
        config = config_for(llama, objective="fisher+margin+anchored", accumulate=2)
        result, other = run_in_two_processes(config, tmp_path, stop_after=3)
        assert result["losses"] == other["losses"]
        self.check(result["losses"], expected)
        last = expected.validations[-1].to_dict()
        assert result["validations"][-1]["kl_reply"] == pytest.approx(last["kl_reply"], abs=1e-4)
        assert result["validations"][-1]["layers"]["1"] == pytest.approx(last["layers"]["1"], rel=1e-3)
        assert result["validations"][-1]["broken_first"] == last["broken_first"]
        assert result["kl_test"] == pytest.approx(expected.kl_test, abs=1e-4)
        base, *frames = read_film(tmp_path / "whole" / FILM)
        assert [frame.step for frame in frames] == [point["step"] for point in result["validations"][1:]]
        assert base.embeddings().all(), "no process's prompts are missing"
        # Asked to stop, the main process takes the other along; resumed, both go on as if nothing had been.
        assert (result["cancelled"], other["cancelled"]) == (True, True)
        self.check(result["resumed"], expected)


def run_in_two_processes(config: FinetuneConfig, folder: Path, stop_after: int) -> list[dict[str, Any]]:
    """Run a config under `accelerate launch`: once to its end, once cancelled and resumed; both processes' accounts."""
    script = folder / "script.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "from es2.training.finetune import FinetuneConfig, finetune\n"
        "from es2.core.progress import Cancelled\n"
        "from tests.training.test_finetune import PROMPTS, Log\n"
        "settings = json.loads(Path(sys.argv[1]).read_text())\n"
        "config, folder = FinetuneConfig.from_dict(settings), Path(sys.argv[1]).parent\n"
        "document = finetune(config, PROMPTS, folder / 'whole').to_dict() | {'cancelled': False}\n"
        "assert PartialState().num_processes == 2\n"
        "try:\n"
        "    finetune(config, PROMPTS, folder / 'parts', report=Log(settings['stop_after']))\n"
        "except Cancelled:\n"
        "    document['cancelled'] = True\n"
        "document['resumed'] = finetune(config, PROMPTS, folder / 'parts', resume=True).to_dict()['losses']\n"
        "(folder / f'result-{PartialState().process_index}.json').write_text(json.dumps(document))\n"
        "PartialState().destroy_process_group()\n"
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"stop_after": stop_after}))
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--main_process_port", "0"]
    subprocess.run([*command, str(script), str(folder / "config.json")], check=True, env=environment, timeout=300)
    return [json.loads((folder / f"result-{index}.json").read_text()) for index in (0, 1)]

    def test_a_label_of_which_there_are_few(self, llama: Path, tmp_path: Path) -> None:
        """A prompt that stands in a batch twice counts twice, in parts as in one."""
        tune = np.flatnonzero(PROMPTS.in_split("tune") & (PROMPTS.labels == 1))
        keep = np.ones(len(PROMPTS), dtype=bool)
        keep[tune[2:]] = False
        few = PROMPTS.select(keep)
        whole = finetune(config_for(llama, steps=3), few, tmp_path / "whole")
        parts = finetune(config_for(llama, steps=3, accumulate=3), few, tmp_path / "parts")
        assert parts.losses == pytest.approx(whole.losses, abs=1e-4)


class TestFilm:
    def test_holds_what_the_models_make_of_the_prompts(self, llama: Path, tmp_path: Path) -> None:
        result = finetune(config_for(llama, steps=4, validate_every=2), PROMPTS, tmp_path)
        frames = {frame.step: frame for frame in read_film(tmp_path / FILM)}
        assert list(frames) == [0, 2, 4]
        shown = texts_by_hash(PROMPTS.select(PROMPTS.in_split("validation")))
        for step, model in ((0, load_model(llama, device="cpu")), (result.best_step, tuned_model(llama, result))):
            texts = [shown[prompt] for prompt in frames[step].prompts]
            rows = [PROMPTS.texts.index(text) for text in texts]
            assert len(rows) == len(set(rows)) == len(shown), "all of them, as there are few"
            assert frames[step].labels == tuple(PROMPTS.labels[rows].tolist())
            for place, layer in enumerate(LAYERS):
                expected = embeddings(model, llama, PROMPTS.take(rows), layer)
                np.testing.assert_allclose(frames[step].embeddings()[place], expected, rtol=2e-3, atol=2e-3)
        points = {point.step: point for point in result.validations}
        for step, frame in frames.items():
            assert frame.numbers["mean_difference_margin"] == pytest.approx(points[step].score)
            assert frame.numbers["kl_reply"] == points[step].kl_reply

    def test_goes_on_with_a_resumed_run_and_replaces_what_is_done_again(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama, steps=6, validate_every=2)
        finetune(config, PROMPTS, tmp_path / "whole")
        with pytest.raises(Cancelled):
            finetune(config, PROMPTS, tmp_path / "parts", report=Log(3))
        film = tmp_path / "parts" / FILM
        shutil.copy(film / "00000002.safetensors", film / "00000004.safetensors")  # killed before its checkpoint
        seen: list[list[int]] = []

        def look(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage == "finetune":
                seen.append([int(path.name[:8]) for path in sorted(film.iterdir())])

        finetune(config, PROMPTS, tmp_path / "parts", report=look, resume=True)
        assert seen == [[0, 2, 4], [0, 2, 4], [0, 2, 4, 6]], "from the checkpoint of step 3 on"
        for one, other in zip(*(read_film(tmp_path / name / FILM) for name in ("whole", "parts")), strict=True):
            assert (one.step, one.numbers) == (other.step, other.numbers)
            np.testing.assert_array_equal(one.embeddings(), other.embeddings())

    def test_of_a_run_that_begins_anew_nothing_is_left(self, llama: Path, tmp_path: Path) -> None:
        finetune(config_for(llama, steps=4, validate_every=2), PROMPTS, tmp_path)
        finetune(config_for(llama, steps=2, validate_every=2, layers=(1,)), PROMPTS, tmp_path)
        assert [(frame.step, frame.layers) for frame in read_film(tmp_path / FILM)] == [(0, (1,)), (2, (1,))]

    def test_a_full_disk_is_a_sentence(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("es2.store.film.write_bytes", full)
        with pytest.raises(MachineError, match="No space is left"):
            finetune(config_for(llama, steps=1), PROMPTS, tmp_path)


class TestResume:
    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("stop_after", [3, 4])
    def test_cancelled_and_resumed_is_as_if_never_stopped(
        self, method: str, stop_after: int, llama: Path, tmp_path: Path
    ) -> None:
        config = config_for(llama, method=method, learning_rate=1e-3)
        whole = finetune(config, PROMPTS, tmp_path / "whole")
        with pytest.raises(Cancelled):
            finetune(config, PROMPTS, tmp_path / "parts", report=Log(stop_after))
        log = Log()
        resumed = finetune(config, PROMPTS, tmp_path / "parts", report=log, resume=True)
        assert [done for stage, done, _, _ in log.events if stage == "finetune"] == list(range(stop_after + 1, 9))
        assert resumed.losses == whole.losses
        assert resumed.validations == whole.validations
        assert resumed.best_step == whole.best_step
        left, right = (
            safetensors.torch.load_file(
                result.output / "adapter_model.safetensors" if method == "lora" else result.output
            )
            for result in (whole, resumed)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)

    @pytest.mark.long
    def test_killed_it_loses_the_steps_since_the_last_checkpoint(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama, steps=400, validate_every=2, learning_rate=1e-5)
        script = (
            "import json, sys; from pathlib import Path; from tests.training.test_finetune import *;"
            "config = FinetuneConfig.from_dict(json.loads(sys.argv[1]));"
            "finetune(config, PROMPTS, Path(sys.argv[2]))"
        )
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, json.dumps(config.to_dict()), str(tmp_path / "run")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        checkpoint = tmp_path / "run" / "checkpoint" / "state.safetensors"
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        steps: list[int] = []

        def stop_at_once(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage == "finetune":
                steps.append(done)
                raise Cancelled

        with pytest.raises(Cancelled):
            finetune(config, PROMPTS, tmp_path / "run", report=stop_at_once, resume=True)
        assert steps[0] > 1
        assert steps[0] % 2 == 1  # the step after a checkpoint, and those are written at every second

    def test_without_a_checkpoint_it_starts_from_the_beginning(self, llama: Path, tmp_path: Path) -> None:
        assert finetune(config_for(llama, steps=2), PROMPTS, tmp_path, resume=True).steps == 2

    def test_a_finished_run_resumed_gives_its_result_again(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama, steps=4)
        first = finetune(config, PROMPTS, tmp_path)
        tensors = adapter_tensors(first)
        again = finetune(config, PROMPTS, tmp_path, resume=True)
        assert (again.losses, again.best_step, again.kl_test) == (first.losses, first.best_step, first.kl_test)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in adapter_tensors(again).items())

    def test_a_checkpoint_with_what_earlier_versions_kept_in_it_goes_on(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama)
        whole = finetune(config, PROMPTS, tmp_path / "whole")
        with pytest.raises(Cancelled):
            finetune(config, PROMPTS, tmp_path / "parts", report=Log(5))
        checkpoint = tmp_path / "parts" / "checkpoint" / "state.safetensors"
        tensors, state = load_tensors(checkpoint)
        decision = {"kl_weight": config.kl_weight, "times_over": 0, "best_step": 4, "reason": None}
        save_tensors(checkpoint, tensors, state | {"progress": state["progress"] | decision})
        resumed = finetune(config, PROMPTS, tmp_path / "parts", resume=True)
        assert (resumed.losses, resumed.validations, resumed.best_step) == (
            whole.losses,
            whole.validations,
            whole.best_step,
        )

    def test_a_lambda_that_was_doubled_stays_so(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.training.workload import Workload

        original = Workload.validate
        monkeypatch.setattr(
            Workload, "validate", lambda workload, step: replace(original(workload, step), kl_reply=1.5 * (step == 4))
        )
        with pytest.raises(Cancelled):
            finetune(config_for(llama, kl_weight=2.0), PROMPTS, tmp_path, report=Log(6))
        log = Log()
        finetune(config_for(llama, kl_weight=2.0), PROMPTS, tmp_path, report=log, resume=True)
        assert [numbers["kl_weight"] for numbers in log.steps()] == [4.0, 4.0]

    def test_a_checkpoint_of_another_config_or_other_prompts_is_refused(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama, steps=2)
        finetune(config, PROMPTS, tmp_path)
        for other, prompts in ((config.replace(seed=1), PROMPTS), (config, split_prompts(28))):
            with pytest.raises(InputError, match="another config or other prompts"):
                finetune(other, prompts, tmp_path, resume=True)

    def test_a_corrupted_checkpoint_is_refused(self, llama: Path, tmp_path: Path) -> None:
        config = config_for(llama, steps=2)
        finetune(config, PROMPTS, tmp_path)
        checkpoint = tmp_path / "checkpoint" / "state.safetensors"
        data = bytearray(checkpoint.read_bytes())
        data[-100] ^= 1
        checkpoint.write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            finetune(config, PROMPTS, tmp_path, resume=True)

    def test_nothing_is_pickled(self, llama: Path, tmp_path: Path) -> None:
        finetune(config_for(llama, steps=2), PROMPTS, tmp_path)
        kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
        assert kinds == {".safetensors", ".json", ".md"}


class TestStops:
    def test_no_number_stops_it_and_keeps_the_last_good_adapter(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = finetune(config_for(llama), PROMPTS, tmp_path / "good")
        original, calls = finetune_module.separation, []

        def spoilt(*arguments: Any, **settings: Any) -> torch.Tensor:
            calls.append(1)
            return original(*arguments, **settings) * (math.nan if len(calls) == 7 else 1)

        monkeypatch.setattr(finetune_module, "separation", spoilt)
        result = finetune(config_for(llama), PROMPTS, tmp_path / "bad")
        assert (result.status, result.steps, result.best_step) == ("stopped", 6, 4)
        assert "no number at step 7" in (result.reason or "")
        assert result.losses == good.losses[:6]
        assert all(tensor.isfinite().all() for tensor in adapter_tensors(result).values())
        assert result.kl_test is not None
        assert math.isfinite(result.kl_test["reply"])

    def test_a_validation_without_numbers_stops_it(self, llama: Path, tmp_path: Path) -> None:
        """Steps that long leave weights whose embeddings overflow, though the loss before them was a number."""
        result = finetune(config_for(llama, learning_rate=1e30, warmup_steps=0, validate_every=1), PROMPTS, tmp_path)
        assert (result.status, result.steps, result.best_step) == ("stopped", 1, 0)
        assert "at step 1 gave no numbers; lower the learning rate" in (result.reason or "")
        assert [point.step for point in result.validations] == [0]
        assert all(tensor.isfinite().all() for tensor in adapter_tensors(result).values())

    def test_weights_that_are_no_number_are_never_stepped_into(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
        result = finetune(config_for(llama), PROMPTS, tmp_path)
        assert (result.status, result.steps, result.best_step) == ("stopped", 0, 0)
        assert all((tensor == 0).all() for name, tensor in adapter_tensors(result).items() if "lora_B" in name)

    def test_a_kl_over_its_budget_backs_off_and_then_stops(self, llama: Path, tmp_path: Path) -> None:
        log = Log()
        config = config_for(llama, steps=60, validate_every=1, kl_budget=0.002, kl_weight=2.0, learning_rate=2e-3)
        result = finetune(config, PROMPTS, tmp_path, report=log)
        assert result.status == "stopped"
        assert "KL" in (result.reason or "")
        assert result.steps < 60
        over = [point.step for point in result.validations if point.kl > 0.002]
        assert over
        weights = [numbers["kl_weight"] for numbers in log.steps()]
        assert weights[0] == 2.0
        assert len(over) == 1 or weights[-1] > 2.0
        best = next(point for point in result.validations if point.step == result.best_step)
        assert best.kl <= 0.002

    def test_without_a_step_inside_the_budget_the_base_is_kept(self, llama: Path, tmp_path: Path) -> None:
        result = finetune(config_for(llama, kl_budget=1e-3, steps=4, kl_weight=0.0), PROMPTS, tmp_path)
        assert (result.status, result.best_step) == ("stopped", 0)
        assert result.kl_test == pytest.approx({"prompt": 0, "reply": 0}, abs=1e-5)

    def test_the_best_step_is_kept_not_the_last(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.training.workload import Workload

        original = Workload.validate

        def worse_at_the_end(workload: Workload, step: int) -> ValidationPoint:
            point = original(workload, step)
            return replace(point, kl_reply=0.2) if step == 8 else point

        monkeypatch.setattr(Workload, "validate", worse_at_the_end)
        result = finetune(config_for(llama, kl_budget=0.1, kl_weight=20.0), PROMPTS, tmp_path / "a")
        monkeypatch.undo()
        assert (result.status, result.steps, result.best_step) == ("done", 8, 4)
        with pytest.raises(Cancelled):
            finetune(config_for(llama, kl_budget=0.1, kl_weight=20.0), PROMPTS, tmp_path / "b", report=Log(4))
        state = safetensors.torch.load_file(tmp_path / "b" / "checkpoint" / "state.safetensors")
        kept = adapter_tensors(result)
        assert sorted(tensor.sum().item() for tensor in kept.values()) == sorted(
            tensor.sum().item() for name, tensor in state.items() if name.startswith("trained/")
        )

    def test_a_collapse_stops_it(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from es2.training.workload import Workload

        original = Workload.validate

        def collapsed(workload: Workload, step: int) -> ValidationPoint:
            point = original(workload, step)
            return replace(point, layers={l: {**numbers, "effective_rank": 0.1} for l, numbers in point.layers.items()})

        monkeypatch.setattr(Workload, "validate", collapsed)
        result = finetune(config_for(llama), PROMPTS, tmp_path)
        assert (result.status, result.steps, result.best_step) == ("stopped", 4, 0)
        assert "collapsed" in (result.reason or "")
        # Resuming it does not go on as if nothing had been.
        again = finetune(config_for(llama), PROMPTS, tmp_path, resume=True)
        assert (again.status, again.steps, again.reason) == ("stopped", 4, result.reason)

    def test_cancelled_while_the_base_is_measured(self, llama: Path, tmp_path: Path) -> None:
        def report(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage == "base" and done:
                raise Cancelled

        with pytest.raises(Cancelled):
            finetune(config_for(llama), PROMPTS, tmp_path, report=report)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_is_a_sentence_and_keeps_the_checkpoint(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, calls = safetensors.torch.save_file, []

        def full(tensors: Any, path: Any, metadata: Any = None) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(tensors, path, metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(MachineError, match="No space is left"):
            finetune(config_for(llama), PROMPTS, tmp_path)
        monkeypatch.undo()
        log = Log()
        assert finetune(config_for(llama), PROMPTS, tmp_path, report=log, resume=True).steps == 8
        assert len(log.steps()) == 4

    def test_a_disk_that_is_full_at_the_end_leaves_no_half_adapter(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from peft import PeftModel

        def full(model: Any, folder: str, **_: Any) -> None:
            Path(folder).mkdir(parents=True)
            Path(folder, "adapter_config.json").write_text("{}")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(PeftModel, "save_pretrained", full)
        with pytest.raises(MachineError, match="No space is left"):
            finetune(config_for(llama, steps=2), PROMPTS, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "film"}

    def test_too_little_memory_is_a_sentence(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_memory(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(finetune_module, "separation", no_memory)
        with pytest.raises(MachineError, match="Memory ran out while tuning"):
            finetune(config_for(llama), PROMPTS, tmp_path)


class TestConfig:
    WRONG = (
        ({"layers": ()}, "No target layer"),
        ({"layers": (0, 3)}, "no layer 3: the model's layers are 0 to 2"),
        ({"layers": (-1,)}, "no layer -1"),
        ({"layers": (1.0,)}, "no layer 1.0"),
        ({"layers": (1, 1)}, "twice"),
        ({"layers": (0, 1, 2)}, "--allow-many-layers"),
        ({"objective": "cosine"}, "Unknown objective 'cosine'"),
        ({"method": "qlora"}, "Unknown method 'qlora'"),
        ({"first_block": 1}, "first trained block"),
        ({"first_block": -1}, "first trained block"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"pairs_per_step": 1}, "pairs_per_step must be"),
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"learning_rate": math.inf}, "learning_rate must be"),
        ({"kl_weight": -1.0}, "kl_weight must be"),
        ({"kl_budget": 0}, "kl_budget must be"),
        ({"validate_every": 0}, "validate_every must be"),
        ({"validation_prompts": 1}, "validation_prompts must be"),
        ({"reply_tokens": 0}, "reply_tokens must be"),
        ({"accumulate": 6}, "accumulate"),
        ({"seed": -1}, "seed must be"),
        ({"dtype": "float16"}, "float16"),
    )

    @pytest.mark.parametrize(("settings", "sentence"), WRONG)
    def test_what_cannot_work_is_refused_before_a_model_is_loaded(
        self, settings: dict[str, Any], sentence: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        with pytest.raises(InputError) as error:
            finetune(config_for(llama, **settings), PROMPTS, tmp_path)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("split", "label", "sentence"),
        [
            ("tune", 1, "harmful prompt(s) in its tune split"),
            ("validation", 0, "too few harmless prompts in its validation"),
        ],
    )
    def test_prompts_that_are_missing_are_named(self, split: str, label: int, sentence: str, llama: Path) -> None:
        wanted = PROMPTS.in_split(split) & (PROMPTS.labels == label)
        wanted[np.flatnonzero(wanted)[0]] = False
        with pytest.raises(InputError) as error:
            config_for(llama).check(N_LAYERS, PROMPTS.select(~wanted))
        assert sentence in str(error.value)

    def test_many_layers_can_be_asked_for(self, llama: Path) -> None:
        config_for(llama, layers=(0, 1, 2), allow_many_layers=True).check(N_LAYERS, PROMPTS)

    def test_prompts_longer_than_the_model_reads_are_refused(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="reads at most 256"):
            finetune(config_for(llama, reply_tokens=250), PROMPTS, tmp_path)

    def test_a_launcher_that_is_not_known_is_refused(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(InputError, match="not under DEEPSPEED"):
            finetune(config_for(llama), PROMPTS, tmp_path)

    def test_survives_json_and_leaves_other_entries_alone(self, llama: Path) -> None:
        config = config_for(llama)
        document = json.loads(json.dumps(config.to_dict())) | {"kind": "finetune"}
        assert FinetuneConfig.from_dict(document) == config

    def test_checking_needs_no_torch(self, llama: Path) -> None:
        script = (
            "import sys; from es2.training.finetune import *; from es2.prompts.loading import load_prompts;"
            f"n = count_layers(__import__('pathlib').Path({str(llama)!r}));"
            "FinetuneConfig(layers=(0, 1)).check(n, load_prompts('builtin'));"
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_learning_rate_rises_and_falls(self) -> None:
        config = FinetuneConfig(layers=(5,), steps=40, warmup_steps=4)
        rates = [config.learning_rate_at(step, 1.0) for step in range(41)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert all(later < earlier for earlier, later in pairwise(rates[4:]))
        assert rates[40] == pytest.approx(0.1)

    def test_trained_blocks_by_default(self) -> None:
        assert FinetuneConfig(layers=(18, 12)).blocks == range(4, 19)
        assert FinetuneConfig(layers=(2, 6)).blocks == range(2, 7)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_layers_are_counted_without_loading(self, architecture: str, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of(architecture)
        assert count_layers(folder) == len(find_blocks(load_model(folder, device="cpu"))[1]) == N_LAYERS


def test_two_runs_on_one_model_do_not_disturb_each_other(llama: Path, tmp_path: Path) -> None:
    config = config_for(llama, steps=4)
    copy = shutil.copytree(llama, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    first = finetune(config.replace(model=str(copy)), PROMPTS, tmp_path / "one")
    second = finetune(config.replace(model=str(copy)), PROMPTS, tmp_path / "two")
    assert first.losses == second.losses
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_patience_is_more_than_one() -> None:
    """Backing off must get a chance to help."""
    assert PATIENCE >= 2
