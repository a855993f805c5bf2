"""A check passes on sound models and finds the faults that are planted here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from es2.capture.capture import capture
from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE
from es2.store.store import Store
from es2.workflow import check as check_module
from es2.workflow.check import ModelCheck, check
from tests.builders import CHAT_TEMPLATE, save_tiny_adapter, save_tiny_model, tiny_prompts, tiny_tokenizer
from tests.models.test_blocks import HYBRID, tiny_wrapper

WEIGHTS = "adapter_model.safetensors"


def outcomes(result: ModelCheck) -> dict[str, bool | None]:
    return {check.name: check.passed for check in result.checks}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where checks are remembered: planted faults of the tiny model would be refused in other tests."""
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", {}), ("gpt2", {}), ("falcon", {"alibi": True}), ("granitemoehybrid", HYBRID), ("opt", {"ffn_dim": 64})],
)
def test_sound_models_pass(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    result = check(str(save_tiny_model(tmp_path / "model", architecture, **settings)), tiny_prompts(), device="cpu")
    assert result.passed, result.to_dict()
    assert set(outcomes(result)) == {*check_module._PLAN}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_wrapper_without_a_template_passes(tmp_path: Path) -> None:
    tiny_wrapper().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    result = check(str(tmp_path / "model"), tiny_prompts(), device="cpu")
    assert result.passed, result.to_dict()
    assert "plain text" in next(one.sentence for one in result.checks if one.name == "template")


@pytest.mark.parametrize(
    ("end", "thinking", "words"),
    [
        ("<think>\n{{ '' }}", "opened", "last lies inside a thinking block that the prompt opens"),
        ("<think></think>", "closed", "last lies after an empty thinking block, before the answer"),
        ("", "none", "last lies at the end of the generation prompt, before the reply."),
    ],
)
def test_it_says_what_the_template_does_with_the_thinking(end: str, thinking: str, words: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + end)
    sentence, details = check_module._template(folder, tiny_prompts(), {"rendering": AS_THE_TEMPLATE})
    assert details["thinking"] == thinking
    assert words in sentence


def test_an_adapter_passes_and_what_it_moves_is_stated(folder: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    result = check(str(folder), tiny_prompts(), adapter=adapter, device="cpu")
    assert result.passed
    assert result.checks[-1].name == "adapter"
    assert result.checks[-1].details["moved"] > 1e-3


def test_what_it_says_of_positions_and_training(folder: Path) -> None:
    details = {one.name: one.details for one in check(str(folder), tiny_prompts(), device="cpu").checks}
    assert details["positions"]["positions"][0]["last"] == "\n"
    assert "<|im_start|>assistant" in details["positions"]["rendered"][0]
    assert details["finetune"]["modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert 0 < details["finetune"]["share"] < 1


# --------------------------------------------------------------------------------------------------------------- faults


def wrap(patch: pytest.MonkeyPatch, owner: str, change: Callable[..., Any]) -> None:
    """Have what `owner` names, a function or a method, give what `change` makes of its result and its arguments."""
    module, _, name = owner.rpartition(".")
    if ":" in module:
        module, _, of = module.partition(":")
        holder: Any = getattr(__import__(module, fromlist=[of]), of)
    else:
        holder = __import__(module, fromlist=[name])
    original = getattr(holder, name)
    patch.setattr(holder, name, lambda *args, **settings: change(original(*args, **settings), *args))


def without_last(shared: list[tuple[torch.Tensor, torch.Tensor]], *_: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values in the order of another prefix."""
    return [(keys.roll(1, dims=-2), values.roll(2, dims=-2)) for keys, values in shared]


def shifted_layers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.capture.residuals._run_batch", lambda found, *_: np.roll(found, 1, axis=0))


def dropped_mask(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.capture.residuals._branches", lambda mask, *_: torch.zeros_like(mask))


def shifted_prefix(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.capture.residuals.keys_and_values", without_last)


def doubled_bos(patch: pytest.MonkeyPatch, folder: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ bos_token }}{{ bos_token }}" + CHAT_TEMPLATE)
    tokenizer.bos_token = "<|pad|>"
    tokenizer.save_pretrained(folder)


def rewriting_template(patch: pytest.MonkeyPatch, folder: Path) -> None:
    tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("| trim", "| trim | upper")).save_pretrained(folder)


def another_rendering(patch: pytest.MonkeyPatch, folder: Path) -> None:
    tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("strftime_now('%d %b %Y')", "'Monday'")).save_pretrained(folder)
    wrap(
        patch,
        "es2.workflow.check.render",
        lambda rendered, *_: replace(
            rendered,
            token_ids=tuple(tokens[1:] for tokens in rendered.token_ids),
            last_instruction=tuple(place - 1 for place in rendered.last_instruction),
        ),
    )


def shifted_position(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def change(rendered: Any, *_: Any) -> Any:
        return replace(rendered, last_instruction=tuple(place + 2 for place in rendered.last_instruction))

    wrap(patch, "es2.workflow.check.render", change)


def missing_tensor(patch: pytest.MonkeyPatch, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer_of_another(patch: pytest.MonkeyPatch, folder: Path) -> None:
    save_tiny_model(folder, vocab_size=150)


def reversed_blocks(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.workflow.check.find_blocks", lambda found, *_: (found[0], list(found[1])[::-1]))


def wrong_head(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.models.kl:LmHead.logits", lambda logits, *_: logits.roll(1, dims=-1))


def standing_positions(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def stay(found: None, rows: Any, tokens: Any) -> None:
        rows._places = rows._places - 1

    wrap(patch, "es2.models.row_cache:Rows.go_on", stay)


def wrong_prefix_of_a_step(patch: pytest.MonkeyPatch, folder: Path) -> None:
    wrap(patch, "es2.models.forward.keys_and_values", without_last)


def weights_without_number(patch: pytest.MonkeyPatch, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def empty_weights(patch: pytest.MonkeyPatch, folder: Path) -> None:
    weights = {name: 0 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("embeddings", shifted_layers),
        ("embeddings", dropped_mask),
        ("embeddings", shifted_prefix),
        ("tokens", doubled_bos),
        ("tokens", tokenizer_of_another),
        ("template", rewriting_template),
        ("template", another_rendering),
        ("positions", shifted_position),
        ("weights", missing_tensor),
        ("blocks", reversed_blocks),
        ("blocks", weights_without_number),
        ("blocks", empty_weights),
        ("head", wrong_head),
        ("replies", standing_positions),
        ("finetune", wrong_prefix_of_a_step),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_fault_is_found(
    name: str, plant: Callable[[pytest.MonkeyPatch, Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, folder)
    result = check(str(folder), tiny_prompts(), device="cpu")
    assert not result.passed
    assert next(found for found, passed in outcomes(result).items() if passed is False) == name


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_adapter_of_zeros_passes_and_one_without_numbers_does_not(
    value: float, folder: Path, tmp_path: Path
) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    weights = {name: torch.full_like(tensor, value) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    result = check(str(folder), tiny_prompts(), adapter=adapter, device="cpu")
    assert outcomes(result)["adapter"] is (value == 0)
    assert value != 0 or "changes nothing of the base" in result.checks[-1].sentence


def test_every_prompt_is_rendered(folder: Path) -> None:
    prompts = tiny_prompts(8)
    middle = sorted(prompts.texts, key=lambda text: (len(text), text))[5]
    cut = "| trim | replace(" + repr(middle) + ", 'x')"
    tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("| trim", cut)).save_pretrained(folder)
    assert outcomes(check(str(folder), prompts, device="cpu"))["template"] is False


def test_a_wrong_merge_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    wrap(monkeypatch, "peft.tuners.lora.layer:Linear.get_delta_weight", lambda delta, *_: 2 * delta)
    result = check(str(folder), tiny_prompts(), adapter=adapter, device="cpu")
    assert outcomes(result)["adapter"] is False
    assert "cannot be merged exactly" in result.checks[-1].sentence


def test_what_failed_is_refused_until_the_files_change(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    doubled_bos(pytest.MonkeyPatch(), folder)
    check(str(folder), tiny_prompts(), device="cpu")
    with pytest.raises(InputError, match=r"`es2 check` found the model .* wrong \(tokens\): Prompts begin with"):
        capture(str(folder), tiny_prompts(), store=store, device="cpu")
    tiny_tokenizer().save_pretrained(folder)
    assert capture(str(folder), tiny_prompts(), store=store, device="cpu").computed
