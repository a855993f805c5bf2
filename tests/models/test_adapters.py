"""Adapters that peft takes in silence though they are another model's, a part of one, or cannot be merged exactly."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from es2.core.errors import InputError, MachineError
from es2.models import adapters
from es2.models.adapter_files import check_adapter, fetch_adapter, find_adapter, is_hub_adapter
from es2.models.adapter_fit import Fit, fit_adapter, write_renamed
from es2.models.adapters import apply_finetune
from es2.models.architecture import empty_model
from es2.models.checked import look_at
from es2.models.loading import load_model, load_tuned
from tests.builders import save_tiny_adapter, save_tiny_model, tiny_tokenizer

TOKENS = torch.arange(5, 12)[None]
WRAPPER = "model.language_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal Gemma 3, whose vision tower has blocks of the same names and sizes as its language model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    text = sizes | {"vocab_size": 320, "num_key_value_heads": 4, "head_dim": 8, "initializer_range": 0.3}
    text |= {"query_pre_attn_scalar": 8, "sliding_window": 8, "max_position_embeddings": 256}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=True)
    )
    made = tmp_path_factory.mktemp("models") / "wrapper"
    model.save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def renamed(adapter: Path, change: Callable[[str], str | None]) -> Path:
    """The adapter with its weights under other names; those without one are left out."""
    file = adapter / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({new: weights[name] for name in weights if (new := change(name))}, file)
    return adapter


def reconfigured(adapter: Path, **changes: Any) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    return adapter


def names_in(adapter: Path) -> list[str]:
    return sorted(safetensors.torch.load_file(adapter / "adapter_model.safetensors"))


def fit(adapter: Path, model: Path) -> Fit:
    return fit_adapter(adapter, partial(empty_model, model))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def live(adapter: Path, model: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load_model(model, device="cpu"), str(adapter)).eval())


# --------------------------------------------------------------------------------------------------- names and shapes

SAVED_AS: Mapping[str, Callable[[str], str]] = {
    "of a wrapper": lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
    "of an older wrapper": lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
    "a prefix too few": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "a prefix too many": lambda name: name.replace("base_model.model.", "base_model.model.model."),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "without peft's own prefix": lambda name: name.replace("base_model.model.", ""),
    "under its own name": lambda name: name.replace(".weight", ".mine.weight"),
}


@pytest.mark.parametrize("saved", SAVED_AS)
def test_a_beginning_that_differs_is_renamed(saved: str, folder: Path, tmp_path: Path) -> None:
    """Also where the configuration chooses by it: the ranks of one layer, and the modules, are given as patterns."""
    torch.manual_seed(0)
    chosen = {"target_modules": r".*layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)", "init_lora_weights": False}
    ranks = {"rank_pattern": {r".*layers\.1\.self_attn.q_proj": 4}, "alpha_pattern": {"layers.2.mlp.down_proj": 3}}
    tuned = get_peft_model(load_model(folder, device="cpu"), LoraConfig(r=2, lora_alpha=8, **chosen, **ranks)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    whole = {name: (tmp_path / "adapter" / name).read_bytes() for name in ("adapter_config.json",)}
    given = renamed(tmp_path / "adapter", SAVED_AS[saved])
    before = (given / "adapter_model.safetensors").read_bytes()

    found = fit(given, folder)
    assert found.renamed
    (doubt,) = found.doubts(str(folder))
    assert doubt.startswith("The adapter's weights were renamed to fit the model: ")
    write_renamed(given, found, tmp_path / "renamed")
    assert fit(tmp_path / "renamed", folder).renamed is False
    expected = logits(tuned)
    for adapter in (given, tmp_path / "renamed"):
        assert torch.allclose(logits(load_tuned(folder, adapter, device="cpu")), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(live(tmp_path / "renamed", folder), expected)
    assert (given / "adapter_model.safetensors").read_bytes() == before
    assert {name: (given / name).read_bytes() for name in whole} == whole


def test_an_adapter_of_the_text_model_goes_to_the_language_model_of_a_wrapper(wrapper: Path, tmp_path: Path) -> None:
    """Not to the vision tower, whose blocks have the same names and sizes."""
    settings = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    tuned = get_peft_model(load_model(wrapper, device="cpu"), settings).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    given = renamed(tmp_path / "adapter", lambda name: name.replace(WRAPPER, "model."))
    reconfigured(given, target_modules=["q_proj", "v_proj"])
    found = fit(given, wrapper)
    assert found.missing == ()
    assert all(WRAPPER in name for name in found.names.values())
    merged = logits(load_tuned(wrapper, given, device="cpu"))
    assert torch.allclose(merged, logits(tuned), rtol=1e-4, atol=1e-4)


def test_the_model_without_weights_is_the_one_that_is_loaded(folder: Path, wrapper: Path, tmp_path: Path) -> None:
    """Also where transformers has it among those that read images alone."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = sizes | {"model_type": "llama", "vocab_size": 320, "pad_token_id": 0}
    vision = sizes | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=310)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    for model in (folder, wrapper, tmp_path):
        loaded, empty = load_model(model, device="cpu"), empty_model(model)
        assert type(empty) is type(loaded)
        assert {n: w.shape for n, w in empty.state_dict().items()} == {
            n: w.shape for n, w in loaded.state_dict().items()
        }


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("layers.1.", "layers.7."),
        lambda name: name.replace("layers.2.self_attn.q_proj", "layers.2.self_attn.qkv_proj"),
        lambda name: name.replace("model.model.layers", "model.model.vision_tower.encoder.layers"),
        lambda name: name.replace("layers.1", "language_model.layers.1"),
    ],
    ids=["of a deeper model", "of other modules", "of a vision tower", "of two beginnings"],
)
def test_every_weight_has_a_home(change: Callable[[str], str], merge: bool, folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = renamed(save_tiny_adapter(tmp_path / "adapter", folder), change)
    own = names_in(save_tiny_adapter(tmp_path / "own", folder))
    first = next(name for name in names_in(adapter) if name not in own)
    with pytest.raises(InputError, match="have no module there") as refused:
        apply_finetune(model, adapter, merge=merge)
    assert first in str(refused.value)
    assert str(folder) in str(refused.value), "the base that the adapter names"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_two_renamings_that_fit_are_none(folder: Path, tmp_path: Path) -> None:
    """Where an adapter's weights might belong to either of two stacks, neither is chosen."""

    def twice() -> Any:
        model: Any = empty_model(folder)
        for stack in ("language_model", "text_model"):
            model.model.add_module(stack, torch.nn.Module())
            model.model.get_submodule(stack).layers = copy.deepcopy(model.model.layers)
        del model.model.layers
        return model

    with pytest.raises(InputError, match="have no module there"):
        fit_adapter(save_tiny_adapter(tmp_path / "adapter", folder), twice)


def test_what_the_configuration_does_not_ask_for_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    for changes in ({"target_modules": ["down_proj"]}, {"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]}):
        shutil.copytree(adapter, tmp_path / "other", dirs_exist_ok=True)
        with pytest.raises(InputError, match=r"of its 12 weights are for modules that its config"):
            apply_finetune(load_model(folder, device="cpu"), reconfigured(tmp_path / "other", **changes), merge=True)


def test_a_weight_of_another_shape_is_named_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=96)
    adapter = save_tiny_adapter(tmp_path / "adapter", wide)
    monkeypatch.setattr("es2.models.loading.load_model", None)
    with pytest.raises(InputError) as refused:
        load_tuned(folder, adapter, device="cpu")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert f"{name} has the shape (2, 96), where the model takes (2, 64)" in str(refused.value)
    with pytest.raises(InputError, match="holds no peft adapter"):
        load_tuned(folder, tmp_path, device="cpu")


def test_parameters_that_share_a_module_have_a_home(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe = save_tiny_model(tmp_path / "moe", "qwen3_moe", num_key_value_heads=2, head_dim=16, **experts)
    settings = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    get_peft_model(load_model(moe, device="cpu"), settings).save_pretrained(tmp_path / "adapter")
    assert any(".base_layer." in name for name in names_in(tmp_path / "adapter"))
    apply_finetune(load_model(moe, device="cpu"), tmp_path / "adapter", merge=True)


def test_an_adapter_of_experts_that_were_maps_of_their_own_goes_to_the_fused_ones(tmp_path: Path) -> None:
    """As transformers 4 had Mixtral, whose adapters are still published."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
    moe = save_tiny_model(tmp_path / "moe", "mixtral", **sizes)
    tuned: Any = load_model(moe, device="cpu")
    torch.manual_seed(0)
    weights = {}
    for number, layer in enumerate(tuned.model.layers):
        experts = layer.mlp.experts
        middle = experts.down_proj.shape[-1]
        for expert in range(4):
            gate_up, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
            for name, map_ in {"w1": gate_up[:middle], "w3": gate_up[middle:], "w2": down}.items():
                a, b = 0.3 * torch.randn(2, map_.shape[1]), 0.3 * torch.randn(map_.shape[0], 2)
                key = f"base_model.model.model.layers.{number}.block_sparse_moe.experts.{expert}.{name}"
                weights |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                map_ += 2 * b @ a
    (tmp_path / "adapter").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = logits(load_tuned(moe, tmp_path / "adapter", device="cpu"))
    assert torch.allclose(merged, logits(tuned), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, logits(load_model(moe, device="cpu")), rtol=1e-1, atol=1e-1)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_end_that_is_tied_is_not_merged(end: str, tmp_path: Path) -> None:
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    settings = LoraConfig(r=2, target_modules=[end], init_lora_weights=False)
    get_peft_model(load_model(tied, device="cpu"), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=rf"changes .*{end}, whose weights are"):
        apply_finetune(load_model(tied, device="cpu"), tmp_path / "adapter", merge=True)


def test_an_end_of_its_own_is_merged(folder: Path, tmp_path: Path) -> None:
    base: Any = load_model(folder, device="cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(folder, device="cpu")
    apply_finetune(merged, tmp_path / "adapter", merge=True)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def test_a_merge_that_gives_another_model_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.01 * right(self, name))
    with pytest.raises(InputError, match=r"cannot be merged exactly \(the logits are \d\.\d% off"):
        apply_finetune(load_model(folder, device="cpu"), adapter, merge=True)
    apply_finetune(load_model(folder, device="cpu"), adapter)


def test_blocks_that_share_their_weights_are_not_tuned(tmp_path: Path) -> None:
    """Each use of Zamba's one attention block has an adapter of its own, and all would end in the same weights."""
    sizes = {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    sizes |= {"num_key_value_heads": 4, "use_mamba_kernels": False, "tie_word_embeddings": True}
    zamba = save_tiny_model(tmp_path / "zamba", "zamba", n_layers=4, **sizes)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(zamba, device="cpu"), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        InputError, match=r"changes model\.layers\.1\..*q_proj, whose weights are also those of .*layers\.3\."
    ):
        load_tuned(zamba, tmp_path / "adapter", device="cpu")
    with pytest.raises(InputError, match="'zamba' model has the same weights in several blocks"):
        look_at(zamba)


@pytest.mark.parametrize("dtype", adapters._MERGED)
def test_rounding_is_no_other_model(dtype: str, folder: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    apply_finetune(load_model(folder, device="cpu", dtype=dtype), adapter, merge=True)


# -------------------------------------------------------------------------------------------------------------- doubts


def test_a_part_of_an_adapter_and_another_base_are_doubted(folder: Path, tmp_path: Path) -> None:
    whole = reconfigured(save_tiny_adapter(tmp_path / "whole", folder), init_lora_weights=True)
    assert fit(whole, folder).doubts(str(folder)) == []
    (other,) = fit(whole, folder).doubts("another-model")
    assert "as its base, not 'another-model'" in other
    assert fit(whole, folder).doubts("a name", f"owner/{folder.name.upper()}") == []

    def part(name: str, change: Callable[[str], bool]) -> Path:
        return renamed(shutil.copytree(whole, tmp_path / name), lambda name: name if change(name) else None)

    first = part("first", lambda name: "layers.0." in name)
    (sentence,) = fit(first, folder).doubts(str(folder))
    assert "weights in layers 0 alone, while its configuration asks for 0, 1, 2" in sentence
    apply_finetune(load_model(folder, device="cpu"), first, merge=True)
    (sentence,) = fit(part("half", lambda name: "q_proj" in name), folder).doubts(str(folder))
    assert "has no weights for model.layers.0.mlp.down_proj and 2 more, which its configuration asks for" in sentence
    for asked in ({"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"target_modules": r".*layers.0\..*_proj"}):
        shutil.copytree(first, tmp_path / "asked", dirs_exist_ok=True)
        assert fit(reconfigured(tmp_path / "asked", **asked), folder).doubts(str(folder)) == [] or "target" in str(
            asked
        )

    with pytest.raises(InputError, match=r"no weights for model\.layers\.1.*begins with random ones"):
        fit(reconfigured(first, init_lora_weights=False), folder)


# ------------------------------------------------------------------------------------------------- where they are found


def test_an_adapter_inside_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    inside = save_tiny_adapter(tmp_path / "given" / "checkpoint-250", folder)
    assert find_adapter(str(tmp_path / "given")) == inside
    assert find_adapter(str(inside)) == inside
    shutil.copytree(inside, tmp_path / "given" / "checkpoint-1000")
    with pytest.raises(
        InputError, match=r"holds 2 adapters \(checkpoint-250, checkpoint-1000\); give the folder of one"
    ):
        find_adapter(str(tmp_path / "given"))
    shutil.copytree(inside, tmp_path / "given", dirs_exist_ok=True)
    assert find_adapter(str(tmp_path / "given")) == tmp_path / "given", "the outermost, where it is one"
    with pytest.raises(InputError, match="holds no peft adapter"):
        find_adapter(str(tmp_path / "nowhere"))


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that holds the adapter in `given`; `fetched` are the files asked for, and `error` is raised instead."""
    import huggingface_hub

    state = SimpleNamespace(error=None, fetched=[], given=tmp_path / "hub", snapshot=tmp_path / "snapshot")
    save_tiny_adapter(state.given, folder)

    def model_info(self: Any, hub_id: str) -> SimpleNamespace:
        if state.error:
            raise state.error
        names = [str(file.relative_to(state.given)) for file in state.given.rglob("*") if file.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(hub_id: str, name: str) -> str:
        (state.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(state.given / name, state.snapshot / name)
        state.fetched.append(name)
        return str(state.snapshot / name)

    def snapshot_download(hub_id: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if not state.snapshot.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("Nothing here.")
        return str(state.snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_an_adapter_of_the_hub_is_fetched_once_and_nothing_else(hub: SimpleNamespace, monkeypatch: Any) -> None:
    for name in ("adapter_model.bin", "README.md", "tokenizer.json", "training_args.bin"):
        (hub.given / name).write_bytes(b"other")
    assert is_hub_adapter("owner/adapter")
    assert not is_hub_adapter("/owner/adapter")
    assert not is_hub_adapter("owner/../adapter")
    fetched = fetch_adapter("owner/adapter")
    check_adapter(fetched)
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]
    hub.error = ConnectionError("no network")
    assert fetch_adapter("owner/adapter") == fetched
    monkeypatch.chdir(hub.given.parent)
    (hub.given.parent / "owner" / "adapter").mkdir(parents=True)
    assert not is_hub_adapter("owner/adapter"), "a folder of that name is meant"


def test_an_adapter_in_a_subfolder_of_the_hub_is_found(hub: SimpleNamespace) -> None:
    (hub.given / "checkpoint-250").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (hub.given / name).rename(hub.given / "checkpoint-250" / name)
    assert fetch_adapter("owner/adapter") == hub.snapshot / "checkpoint-250"
    shutil.copytree(hub.given / "checkpoint-250", hub.given / "checkpoint-500")
    shutil.rmtree(hub.snapshot)
    with pytest.raises(
        InputError, match=r"'owner/adapter on the Hub' holds 2 adapters \(checkpoint-250, checkpoint-500\)"
    ):
        fetch_adapter("owner/adapter")


def test_what_the_hub_has_not_or_refuses_is_one_sentence(hub: SimpleNamespace) -> None:
    hub.error = ConnectionError("offline")
    with pytest.raises(MachineError, match=r"The adapter 'owner/adapter' cannot be fetched.*offline"):
        fetch_adapter("owner/adapter")
    hub.error = None
    (hub.given / "adapter_model.safetensors").rename(hub.given / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors, and other formats.*can run code"):
        fetch_adapter("owner/adapter")
    (hub.given / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="holds no peft adapter"):
        fetch_adapter("owner/adapter")
    assert not hub.fetched
