"""The estimate: sizes against real models, work against a count by hand, and no torch on the way."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.cli import main as cli
from es2.core.errors import InputError
from es2.evaluation.config import EvaluateConfig
from es2.models import costs
from es2.models import machine as machines
from es2.models.catalogue import CATALOGUE
from es2.models.machine import Machine, this_machine
from es2.models.shape import Shape, local_folder
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow import plan as planning
from es2.workflow.plan import STAGES, CostEstimate, capture_seconds, guessed_layers, plan, token_counts
from tests.builders import ARCHITECTURES, D_MODEL, save_tiny_model, tiny_model, tiny_prompts, write_prompts

FAST = Machine("cpu", 1e9, 8.0)
N_LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", n_layers=N_LAYERS)


@pytest.fixture
def prompts() -> PromptSet:
    return tiny_prompts(60)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cached_activations")


@pytest.fixture
def made(folder: Path, prompts: PromptSet, store: Store):
    """CostEstimate with changed settings on a machine of known speed."""

    def make(machine: Machine = FAST, lengths: list[int] | None = None, **changes: Any) -> CostEstimate:
        config = FinetuneConfig(layers=(2, 4), model=str(folder))
        return plan(config.replace(**changes), prompts, folder, lengths=lengths, machine=machine, store=store)

    return make


class TestShape:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_sizes_are_those_of_the_model(self, architecture: str, tmp_path: Path) -> None:
        """All but biases, norms and positions, which are small in any real model."""
        model = tiny_model(architecture)
        model.config.save_pretrained(tmp_path)
        shape = Shape.of_folder(tmp_path)
        matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2 and "wpe" not in name}
        block = sum(weight.numel() for name, weight in matrices.items() if ".0." in name)
        assert shape.block_parameters == block
        assert shape.head_parameters == 320 * D_MODEL
        assert shape.parameters == sum(weight.numel() for weight in matrices.values())

    def test_a_model_that_is_not_here_is_known_by_the_catalogue(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        entry = next(entry for entry in CATALOGUE if entry.name == "smollm2-135m-instruct")
        assert local_folder(entry.name) is None
        shape = Shape.of_model(entry.name)
        assert (shape.n_layers, shape.d_model) == (entry.n_layers, entry.d_model)
        assert shape.n_layers * shape.block_parameters + shape.head_parameters == entry.parameters

    def test_the_catalogue_knows_the_parts_of_a_model(self, tmp_path: Path, monkeypatch) -> None:
        """Against the published configurations, of a tied and an untied model; norms and biases are left out there."""
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        sizes = {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
        sizes |= {"num_hidden_layers": 24, "hidden_size": 896, "vocab_size": 151_936}
        sizes |= {"intermediate_size": 4864, "num_attention_heads": 14}
        untied = {"model_type": "llama", "num_key_value_heads": 32, "tie_word_embeddings": False}
        untied |= {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32_000}
        untied |= {"intermediate_size": 11_008, "num_attention_heads": 32}
        for name, config in (("qwen2.5-coder-0.5b-instruct", sizes), ("llama-2-7b-chat", untied)):
            (tmp_path / "config.json").write_text(json.dumps(config))
            known, found = Shape.of_model(name), Shape.of_folder(tmp_path)
            for part in ("n_layers", "d_model", "block_parameters", "head_parameters", "parameters"):
                assert getattr(known, part) == pytest.approx(getattr(found, part), rel=1e-3), (name, part)

    def test_an_unknown_size_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
        with pytest.raises(InputError, match="how wide"):
            Shape.of_folder(tmp_path)


class TestCapture:
    def test_takes_as_long_as_the_fine_tunes_own(self, made, folder: Path, prompts: PromptSet) -> None:
        alone = capture_seconds(str(folder), prompts.measured(), machine=FAST)
        weights = Shape.of_folder(folder).parameters * 4
        assert alone == pytest.approx(made().seconds["base capture"] + costs.start_seconds(1, weights))
        slow = replace(FAST, flops=FAST.flops / 10)
        assert capture_seconds(str(folder), prompts.measured(), machine=slow) > alone

    def test_auto_is_the_best_there_is(self, folder: Path, prompts: PromptSet, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 1e9)
        assert capture_seconds(str(folder), prompts, device="auto") == capture_seconds(str(folder), prompts)


class TestMachine:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        return tmp_path

    def test_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 7e9)
        assert this_machine().flops == 7e9
        monkeypatch.setattr(machines, "_measure_cpu", lambda: pytest.fail("measured twice"))
        machine = this_machine()
        assert (machine.device, machine.flops) == ("cpu", 7e9)
        assert machine.free_gb is not None
        assert machine.free_gb > 0

    def test_the_fastest_that_was_seen_is_kept(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that was busy when it was measured is measured again some time later, and not believed the second
        time when it is busier still."""
        for measured, expected in ((3e9, 3e9), (7e9, 7e9), (2e9, 7e9)):
            monkeypatch.setattr(machines, "_measure_cpu", lambda speed=measured: speed)
            assert this_machine().flops == expected
            (memo,) = cache.rglob("*.json")
            os.utime(memo, (0, 0))

    def test_waiting_for_the_processor_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A quarter of a second on the wall for each product would be a billion operations per second."""
        wall = itertools.count(step=0.25)
        monkeypatch.setattr(machines.time, "perf_counter", lambda: next(wall))
        assert machines._measure_cpu() / machines._cores() > 4e9

    def test_another_number_of_cores_is_another_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 7e9)
        this_machine()
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 9e9)
        monkeypatch.setattr(os, "cpu_count", lambda: 1234)
        assert this_machine().flops == 9e9

    @pytest.mark.parametrize("content", ["", "{}", '{"flops": "fast"}', '{"flops": 0}'])
    def test_a_damaged_memo_is_measured_again(self, cache: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 7e9)
        this_machine()
        (memo,) = cache.rglob("*.json")
        memo.write_text(content)
        monkeypatch.setattr(machines, "_measure_cpu", lambda: 8e9)
        assert this_machine().flops == 8e9

    def test_a_real_measurement_is_a_speed(self) -> None:
        assert 1e8 < this_machine().flops < 1e15

    def test_a_device_that_is_not_there_is_a_sentence(self) -> None:
        with pytest.raises(InputError, match="cannot be used"):
            this_machine("nonsense")


class TestPlan:
    def test_a_step_by_hand(self, made, folder: Path, prompts: PromptSet) -> None:
        """Prompts of 2 tokens and 8 of template; 3 pairs a step, one of them with its KL, targets 2 and 4 of 6."""
        settings = {"lengths": [2] * len(prompts), "steps": 1, "pairs_per_step": 3, "kl_prompts": 1, "reply_tokens": 5}
        found, ahead = made(**settings, objective="margin"), made(**settings, objective="margin+refusal")
        shape = Shape.of_folder(folder)
        block, head = 2 * shape.block_parameters, 2 * shape.head_parameters
        shallow = 5 * 10 * block * (5 + 3)  # forward through blocks 0 to 4, back through the trained 2 to 4
        with_kl = 10 + 4 + 24  # tokens: the prompt's, the reply's but the last, and the template's head
        deep = with_kl * block * (6 + 4) + with_kl * head * 3
        assert found.seconds["steps"] == pytest.approx((shallow + deep) / (1e9 * 0.37))
        read = 5 * 10 * block * (6 + 4) + 5 * head * 2  # the first words of all others
        assert ahead.seconds["steps"] == pytest.approx((read + deep) / (1e9 * 0.37))

    def test_a_capture_by_hand(self, made, folder: Path, prompts: PromptSet) -> None:
        found = made(lengths=[2] * len(prompts))
        n_measured = int((prompts.in_split("probe") | prompts.in_split("test")).sum())
        shape = Shape.of_folder(folder)
        expected = 2 * n_measured * 10 * N_LAYERS * shape.block_parameters / (1e9 * 0.62)
        assert found.seconds["tuned capture"] == pytest.approx(expected)
        assert found.seconds["base capture"] == found.seconds["tuned capture"]

    def test_every_stage_has_its_place(self, made) -> None:
        found = made()
        assert tuple(found.seconds) == STAGES
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_captured_base_takes_no_time(self, made, store: Store, folder: Path, prompts: PromptSet) -> None:
        before = made()
        measured = prompts.measured()
        meta = {"model": str(folder), "run": None, "texts_digest": measured.texts_digest}
        arrays = {"last": np.zeros((N_LAYERS, len(measured), D_MODEL), dtype=np.float32)}
        store.write("a" * 24, meta, measured.texts, arrays)
        after = made()
        assert after.seconds["base capture"] == 0
        assert after.seconds["tuned capture"] == before.seconds["tuned capture"]
        assert after.total_seconds < before.total_seconds

    @pytest.mark.parametrize(
        ("changes", "stage"),
        [
            ({"steps": 80}, "steps"),
            ({"pairs_per_step": 24}, "steps"),
            ({"kl_prompts": 8}, "steps"),
            ({"layers": (2, 5)}, "steps"),
            ({"method": "full"}, "steps"),
            ({"accumulate": 2}, "steps"),
            ({"objective": "margin+refusal"}, "steps"),
            ({"gradient_checkpointing": True}, "steps"),
            ({"validate_every": 1}, "validation"),
            ({"reply_tokens": 64}, "replies"),
        ],
    )
    def test_more_work_takes_longer(self, made, changes: dict[str, Any], stage: str) -> None:
        usual = {"objective": "margin"}
        assert made(**usual | changes).seconds[stage] > made(**usual).seconds[stage]

    def test_replies_at_the_end_are_those_of_an_evaluation(self, made, folder: Path, prompts: PromptSet) -> None:
        """Both models reply to every test prompt, of which there are fewer than an evaluation takes."""
        found, without = made(lengths=[2] * len(prompts)), made(lengths=[2] * len(prompts), replies=False)
        shape, usual, n_test = Shape.of_folder(folder), EvaluateConfig(), int(prompts.in_split("test").sum())
        assert n_test < 2 * usual.limit
        products = 2 * n_test * (2 + 8 + usual.new_tokens) * 2 * shape.parameters
        reading = 2 * usual.new_tokens * shape.parameters * 4 / costs.weight_bytes_per_second("cpu")
        assert found.seconds["behaviour"] == pytest.approx(products / (1e9 * 0.6) + reading)
        assert without.seconds["behaviour"] == 0
        loads = found.seconds["start"] - without.seconds["start"]
        assert found.total_seconds - without.total_seconds == pytest.approx(found.seconds["behaviour"] + loads)
        assert "--no-replies" in without.commands[-1]
        assert "replies" not in found.commands[-1]

    def test_twice_the_speed_is_half_the_time_of_the_work(self, made) -> None:
        slow, fast = made(), made(machine=replace(FAST, flops=2e9))
        for stage in ("steps", "validation", "tuned capture"):
            assert fast.seconds[stage] == pytest.approx(slow.seconds[stage] / 2)
        assert fast.seconds["start"] == slow.seconds["start"]

    def test_memory(self, made) -> None:
        usual = made(pairs_per_step=16)
        assert usual.memory_gb == max(usual.needs_gb.values())
        steps = usual.needs_gb["steps"]
        assert made(pairs_per_step=16, accumulate=4).needs_gb["steps"] < steps
        assert made(pairs_per_step=16, gradient_checkpointing=True).needs_gb["steps"] < steps
        full, lora = (made(pairs_per_step=16, **changes) for changes in ({"method": "full"}, {"rank": 1}))
        assert full.needs_gb["steps"] > lora.needs_gb["steps"]
        assert full.disk_gb > lora.disk_gb
        assert made(machine=replace(FAST, free_gb=usual.memory_gb + 1)).fits
        assert not made(machine=replace(FAST, free_gb=usual.memory_gb / 2)).fits
        assert made(machine=Machine("cuda", 1e12, None)).fits, "nobody asked the device"

    def test_nothing_to_fetch_for_a_folder(self, made) -> None:
        assert made().fetch_gb == 0

    def test_a_model_to_fetch(self, prompts: PromptSet, store: Store, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("ES2_CACHE", str(tmp_path))
        found = plan(FinetuneConfig(layers=(12, 18)), prompts, None, machine=FAST, store=store)
        assert found.fetch_gb > 0.2
        assert found.total_seconds > 0

    def test_what_would_be_refused_is_refused_here(self, made) -> None:
        with pytest.raises(InputError, match="no layer 99"):
            made(layers=(1, 99))
        with pytest.raises(InputError, match="Unknown objective"):
            made(objective="magic")


def test_tokens_are_those_of_the_tokenizer(folder: Path, prompts: PromptSet) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prompts.texts]
    assert token_counts(folder, prompts) == expected


def test_without_a_tokenizer_four_characters_are_a_token(prompts: PromptSet) -> None:
    assert token_counts(None, prompts) == [-(-len(text) // 4) for text in prompts.texts]


class TestOtherMachines:
    """7B and 70B from their configurations alone, for GPUs that are not here."""

    @pytest.fixture
    def planned(self, prompts: PromptSet, store: Store, tmp_path: Path):
        def make(billions: int, gpus: str, **changes: Any) -> CostEstimate:
            folder = write_config(tmp_path / f"llama-{billions}b", billions)
            config = FinetuneConfig(layers=(16, 23), model=str(folder), **changes)
            return plan(config, prompts, folder, machine=Machine.elsewhere(gpus), store=store)

        return make

    def test_shapes(self, tmp_path: Path) -> None:
        assert Shape.of_folder(write_config(tmp_path / "7", 7)).parameters == pytest.approx(6.74e9, rel=0.01)
        assert Shape.of_folder(write_config(tmp_path / "70", 70)).parameters == pytest.approx(70.6e9, rel=0.01)

    def test_7b_on_one_card(self, planned) -> None:
        large, small = planned(7, "80"), planned(7, "24")
        assert large.fits
        assert large.advice == ()
        assert large.needs_gb == small.needs_gb
        assert small.needs_gb["capture"] > 13.5, "bfloat16"
        assert [command.split()[:2] for command in large.commands] == [["es2", "capture"], ["es2", "finetune"]]

    def test_what_to_type_says_all_that_was_asked_for(self, planned) -> None:
        command = planned(7, "80", objective="fisher + 2*margin", first_block=3, validate_every=4).commands[-1]
        assert "--objective 'fisher + 2*margin' --first-block 3 --validate-every 4" in command

    def test_a_card_that_is_tight_is_worked_in_parts(self, planned) -> None:
        roomy = planned(7, "80", pairs_per_step=256)
        assert roomy.needs_gb["steps"] > 24
        tight = planned(7, "24", pairs_per_step=256)
        assert "--accumulate" in tight.commands[-1]
        assert "--pairs-per-step 256" in tight.commands[-1]
        assert "As asked for" in tight.advice[0]

    def test_7b_on_a_card_that_holds_only_four_bits(self, planned) -> None:
        found = planned(7, "14")
        assert not found.fits
        assert "--quantize 4bit" in found.commands[-1]
        assert any("Capture needs" in sentence for sentence in found.advice)

    def test_70b_on_eight(self, planned) -> None:
        found = planned(70, "8x80")
        assert not found.fits, "on one"
        capture, finetune = found.commands
        assert capture.startswith("es2 capture"), "one process lays it over all GPUs"
        assert finetune.startswith("accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m es2 finetune")
        assert any("lays it over all" in sentence for sentence in found.advice)
        assert any("141 GB" in sentence for sentence in found.advice), "the first process reads everything"

    def test_70b_that_nothing_makes_fit(self, planned) -> None:
        found = planned(70, "16")
        assert found.commands == ()
        assert any("No setting makes the fine-tune fit" in sentence for sentence in found.advice)
        full = planned(70, "8x80", method="full")
        assert not any("finetune" in command for command in full.commands)

    def test_too_little_disk(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planning, "_free_disk", lambda: 10**6)
        assert any("disk is too small" in sentence for sentence in planned(7, "80").advice)

    @pytest.mark.parametrize("gpus", ["", "0", "0x24", "eight", "8x", "24GB", "-1"])
    def test_gpus_that_are_not_understood(self, gpus: str) -> None:
        with pytest.raises(InputError, match="8x80"):
            Machine.elsewhere(gpus)


def write_config(folder: Path, billions: int) -> Path:
    """The configuration of Llama-2-7B or Llama-3-70B, and nothing else."""
    d_model, d_ff, n_layers, n_heads, n_kv, vocabulary = {
        7: (4096, 11008, 32, 32, 32, 32000),
        70: (8192, 28672, 80, 64, 8, 128256),
    }[billions]
    config = {
        "model_type": "llama", "hidden_size": d_model, "intermediate_size": d_ff, "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads, "num_key_value_heads": n_kv, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_driver_tells_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        assert command[-1] == "--id=2,3"
        return subprocess.CompletedProcess(command, 0, "20000\n10000\n")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("ES2_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_measure_torch", lambda device: 1e12)
    monkeypatch.setattr("subprocess.run", told)
    machine = this_machine("cuda")
    assert (machine.n_devices, machine.free_gb) == (2, pytest.approx(10.49, abs=0.01))

    def missing(command: list[str], **settings: Any) -> None:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr("subprocess.run", missing)
    assert this_machine("cuda").free_gb is None


@pytest.mark.parametrize(("n_layers", "expected"), [(1, (0,)), (2, (0, 1)), (30, (14, 22)), (32, (16, 23))])
def test_a_guess_lies_in_the_model(n_layers: int, expected: tuple[int, ...]) -> None:
    assert guessed_layers(n_layers) == expected


class TestCommand:
    @pytest.fixture
    def es2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))

        def run(*arguments: object) -> tuple[int, dict[str, Any]]:
            monkeypatch.setattr(sys, "argv", ["es2", *map(str, arguments), "--json"])
            with pytest.raises(SystemExit) as end:
                cli.main()
            return int(end.value.code or 0), json.loads(capsys.readouterr().out)

        return run

    def test_prints_one_document(self, es2, folder: Path, prompts: PromptSet, tmp_path: Path) -> None:
        source = write_prompts(tmp_path / "locks.csv", prompts)
        code, document = es2("plan", "--model", folder, "--prompts", source, "--layers", "1,3", "--steps", "7")
        assert code == 0
        assert document["target_layers"] == [1, 3]
        assert document["seconds"].keys() == set(STAGES)
        code, longer = es2("plan", "--model", folder, "--prompts", source, "--layers", "1,3", "--steps", "70")
        assert longer["seconds"]["steps"] > 5 * document["seconds"]["steps"]
        code, guessed = es2("plan", "--model", folder, "--prompts", source)
        assert guessed["target_layers"] == [2, 4]

    def test_bad_layers(self, es2, folder: Path, prompts: PromptSet, tmp_path: Path) -> None:
        source = write_prompts(tmp_path / "locks.csv", prompts)
        for layers, words in (("1,9", "no layer 9"), ("x", "no list of layers"), ("1,2,3", "allow-many-layers")):
            code, document = es2("plan", "--model", folder, "--prompts", source, "--layers", layers)
            assert code == 2
            assert words in document["error"]


def test_no_torch(folder: Path, tmp_path: Path) -> None:
    source = write_prompts(tmp_path / "locks.csv", tiny_prompts(60))
    script = f"""
import sys
from pathlib import Path
from es2.training.config import FinetuneConfig
from es2.models.shape import local_folder; from es2.workflow.plan import plan
from es2.prompts.loading import load_prompts
config = FinetuneConfig(layers=(1, 3), model={str(folder)!r})
assert plan(config, load_prompts({str(source)!r}), local_folder(config.model)).total_seconds > 0
print("heavy:", sorted({{"torch", "transformers", "transformer_lens", "peft", "umap"}} & set(sys.modules)))
"""
    environment = os.environ | {"ES2_HOME": str(tmp_path), "ES2_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert "heavy: []" in done.stdout, done.stdout + done.stderr
