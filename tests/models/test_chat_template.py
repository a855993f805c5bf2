"""Every kind of chat template with every kind of text: the tokens, the positions, the refusals, the thinking."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from es2.core.errors import InputError
from es2.models.chat_template import PINNED_DATE, PromptFrame, prompt_frame, render, template_prefix
from es2.models.fingerprint import fingerprint
from es2.models.loading import load_tokenizer
from es2.models.thinking import thinking_of
from tests.builders import save_tiny_model, tiny_tokenizer
from tests.models.templates import KINDS, PROMPTS, Kind, page, tokenizer_of

BY_NAME = {kind.name: kind for kind in KINDS}
TOKENIZERS = {kind.name: tokenizer_of(kind) for kind in KINDS}
TEMPLATED = [kind for kind in KINDS if kind.template is not None]
USABLE = [kind for kind in TEMPLATED if len(kind.refused) < len(PROMPTS)]


def named(kind: Any) -> str | None:
    return kind.name if isinstance(kind, Kind) else None


@pytest.fixture(autouse=True)
def on_the_pinned_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that transformers' own rendering has the date that ours always has."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return PINNED_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_every_kind_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(KINDS) >= 26
    assert len({str(kind.template) for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", USABLE, ids=named)
def test_a_prompt_is_transformers_with_its_positions_on_the_right_tokens(kind: Kind, name: str) -> None:
    tokenizer, text = tokenizer_of(kind), PROMPTS[name]
    if name in kind.refused:
        with pytest.raises(InputError) as refused:
            render(tokenizer, [PROMPTS["plain"], text])
        assert kind.refused[name] in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    rendered = render(tokenizer, [PROMPTS["plain"], text])
    tokens, at = list(rendered.token_ids[1]), rendered.last_instruction[1]
    content = [{"type": "text", "text": text}] if kind.in_parts else text
    message: Any = {"role": "user", "content": content}
    assert tokens == tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(tokens) == kind.rendered(text)
    up_to_the_text = kind.rendered(text).removesuffix(kind.tail).rstrip()
    assert tokenizer.decode(tokens[: at + 1]) == up_to_the_text
    assert tokenizer.decode(tokens[:at]) != up_to_the_text
    assert rendered.columns("last")[1] == len(tokens) - 1
    assert tokenizer.decode(tokens[-1:]) == kind.last or not kind.tail
    assert rendered.templated


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATED if kind not in USABLE], ids=named)
def test_a_template_that_no_text_fits_is_refused_and_quotes_none(kind: Kind) -> None:
    for name, text in PROMPTS.items():
        with pytest.raises(InputError) as refused:
            render(tokenizer_of(kind), [text])
        assert kind.refused[name] in str(refused.value)
        assert "florp" not in str(refused.value)
        assert "prompt" not in str(refused.value)


@pytest.mark.parametrize("name", PROMPTS)
def test_without_a_template_a_prompt_is_its_text(name: str) -> None:
    tokenizer, text = tokenizer_of(BY_NAME["none"]), PROMPTS[name]
    rendered = render(tokenizer, [text])
    assert not rendered.templated
    assert list(rendered.token_ids[0]) == tokenizer(text)["input_ids"]
    assert tokenizer.decode(rendered.token_ids[0][: rendered.last_instruction[0] + 1]) == text.rstrip()
    assert prompt_frame(tokenizer) == PromptFrame()


@pytest.mark.parametrize("kind", USABLE, ids=named)
def test_what_stands_around_a_text(kind: Kind) -> None:
    tokenizer = tokenizer_of(kind)
    frame = prompt_frame(tokenizer)
    assert (frame.prefix, frame.tail, frame.in_parts) == (kind.prefix, kind.tail, kind.in_parts)
    assert frame.thinking == kind.thinking
    tokens = render(tokenizer, [PROMPTS["plain"], PROMPTS["question"]]).token_ids
    assert tokenizer.decode(template_prefix(tokenizer, tokens)) == kind.prefix


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(
        st.text(st.characters(), max_size=40),
        st.lists(st.sampled_from(["<think>", "</think>", "/no_think", " ", "\n\n", "'", "<|user|>", "a"])).map("".join),
    )
)
@example("half \ud800 of a pair")
def test_no_text_gets_another_error_or_a_position_outside_of_its_tokens(text: str) -> None:
    for kind in KINDS:
        tokenizer = TOKENIZERS[kind.name]
        problem = ""
        try:
            rendered = render(tokenizer, [text])
        except InputError as refused:
            problem = str(refused)
        if problem:
            assert "\n" not in problem
            assert "florp" not in problem
        else:
            at = [rendered.columns(position)[0] for position in ("last", "last_instruction")]
            assert 0 <= min(at) <= max(at) < len(rendered.token_ids[0])
            assert text.strip() in tokenizer.decode(rendered.token_ids[0])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Nobody reads ' + messages[0].content) }}", r"Nobody reads …"),
        ("{{ raise_exception('Nobody reads ' + messages[0].content.split()[0] | trim) }}", r"Nobody reads …"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.nothing() }}", "no attribute|undefined"),
        ("{{ messages[0].content % (1, 2) }}", "not all arguments"),
        ("{{ messages[0].content.encode('rot99') }}", "rot99"),
        ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "[Rr]ange"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ messages[0].content }", "unexpected"),
        ("{{ 'x }}", r"unexpected char \"'\"\)"),
    ],
)
def test_whatever_fails_in_a_template_is_one_sentence_that_quotes_no_prompt(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"cannot render one user's message without tools \(.*({reason})") as refused:
        render(tiny_tokenizer(chat_template=template), ["Hello"])
    assert "Hello" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_text_that_fails_alone_is_quoted() -> None:
    template = "{{ messages[0].content }}{% if 'x' in messages[0].content %}{{ 1 / 0 }}{% endif %}."
    with pytest.raises(InputError, match=r"fails on the prompt 'x' \(division by zero\)"):
        render(tiny_tokenizer(chat_template=template), ["a", "x"])


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "joined"])
def test_the_last_token_of_a_text_under_other_tokenizers(kind: str) -> None:
    """SentencePiece's marks of spaces, normalised text, and a token of the text's end and what follows it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "Why IS it só 🍞?"
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(special_tokens=["<unk>", "<user>", "<model>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "metaspace")
        special = ["<unk>", "<user>", "<model>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["Why is it so?\n\n" if kind == "joined" else "Why is it so?"] * 9, trainer)
    template = "<user>{{ messages[0].content }}\n\n<model>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    rendered = render(wrapped, [text, "Why?"])
    tokens = wrapped.convert_ids_to_tokens(list(rendered.token_ids[0]))
    at = rendered.last_instruction[0]
    assert (tokens[at], tokens[-1]) == ("?\n\n" if kind == "joined" else "?", "<model>")
    assert at == {"metaspace": len(tokens) - 4, "wordpiece": len(tokens) - 2, "joined": len(tokens) - 2}[kind]


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_prompt_is_called_blank(text: str) -> None:
    for kind in ("markers", "none"):
        with pytest.raises(InputError, match="is blank"):
            render(tokenizer_of(BY_NAME[kind]), ["Hello", text])


def test_the_shared_prefix_needs_no_text_of_ours() -> None:
    """It was found from the texts `A` and `1`, which a template may refuse: then the error quoted them."""
    tokenizer = tiny_tokenizer(chat_template="<user>{{ messages[0].content | lower }}</user>")
    tokens = render(tokenizer, ["why?", "where?"]).token_ids
    assert tokenizer.decode(template_prefix(tokenizer, tokens)) == "<user>"


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", "none"),
        ("<|im_end|>\n<|im_start|>assistant\n", "none"),
        ("[/INST]", "none"),
        ("\n\nAssistant:", "none"),
        ("<|channel|>final<|message|>", "none"),
        (" Think first, then answer.<|end|>\n<|assistant|>\n", "none"),
        ("/no_think<|assistant|>", "none"),
        ("<|no_think|><|assistant|>", "none"),
        ("<|START_RESPONSE|>", "none"),
        ("<think>", "opened"),
        ("\n\nAssistant: <think>\n", "opened"),
        ("<thinking>\n", "opened"),
        ("[THINK]", "opened"),
        ("◁think▷", "opened"),
        ("<｜Assistant｜><think>\n", "opened"),
        ("<|START_THINKING|>", "opened"),
        ("<|begin_of_thought|>\n\n", "opened"),
        ("<|inner_prefix|>", "opened"),
        ("<mm:think>", "opened"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "opened"),
        ("<|turn>model\n<|channel>thought\n", "opened"),
        ("<x:think>\n<x:cot_budget_reflect>None is left.</x:cot_budget_reflect>\n", "opened"),
        ("{effort: low}<|im_end|>\n<|im_start|>assistant\n<think>\n", "opened"),
        ("<think>\nLet me see", "opened"),
        ("Reasoning:\n", "opened"),
        ("<think></think>", "closed"),
        ("<think>\n\n</think>\n\n", "closed"),
        ("</think>", "closed"),
        ("</mm:think>", "closed"),
        ("/nothink<|assistant|>\n<think></think>", "closed"),
        ("<think:opensource></think:opensource>", "closed"),
        ("[THINK][/THINK]", "closed"),
        ("◁think▷◁/think▷", "closed"),
        ("<|START_THINKING|><|END_THINKING|>", "closed"),
        ("<|begin_of_thought|><|end_of_thought|>", "closed"),
        ("<|think|><|end|><|begin|>assistant", "closed"),
        ("<|turn>model\n<|channel>thought\n<channel|>", "closed"),
        ("<x:think>\n<x:cot_budget_reflect>None is left.</x:cot_budget_reflect>\n</x:think>", "closed"),
        ("<|inner_prefix|><|inner_suffix|>", "closed"),
        ("<unused94>thought\n<unused95>", "closed"),
    ],
)
def test_what_the_end_of_a_prompt_does_with_the_thinking(tail: str, expected: str) -> None:
    assert thinking_of(tail) == expected


def test_the_fingerprint_covers_every_file_that_decides_the_template(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", chat_template=None)
    seen = [fingerprint(folder).chat_template]
    assert seen == [None]
    named_one = folder / "additional_chat_templates" / "default.jinja"
    (folder / "processor_config.json").write_text("{}")  # of a wrapper that keeps its template elsewhere
    for name, template in (
        ("chat_template.json", "{{ messages[0].content }}"),
        ("chat_template.json", "{{ messages[0].content }}."),
        ("processor_config.json", "{{ messages[0].content }}?"),
    ):
        (folder / name).write_text(json.dumps({"chat_template": template}))
        assert load_tokenizer(folder).chat_template == template
        seen.append(fingerprint(folder).chat_template)
    named_one.parent.mkdir()
    named_one.write_text("{{ messages[0].content }}!")
    assert load_tokenizer(folder).chat_template == "{{ messages[0].content }}!"
    seen.append(fingerprint(folder).chat_template)
    assert len(set(seen)) == len(seen)


def test_of_named_templates_the_one_in_its_own_file_is_the_default(tmp_path: Path) -> None:
    """As the refusal of templates without a default advises."""
    folder = save_tiny_model(tmp_path / "model", chat_template="{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    own = (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "chat.jinja")
    with pytest.raises(InputError, match=r"'chat' and none called 'default'.*as chat_template\.jinja"):
        render(load_tokenizer(folder), ["Hello"])
    (folder / "chat_template.jinja").write_text(own.read_text())
    assert render(load_tokenizer(folder), ["Hello"]).templated


def test_the_page_is_made_from_the_kinds() -> None:
    assert (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8") == page()
