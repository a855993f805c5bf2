"""A system prompt, thinking and arguments under every kind of chat template, against transformers' own rendering."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.models.chat_template import (
    PINNED_DATE,
    describe_rendering,
    prompt_frame,
    render,
    reply_thinking,
    template_prefix,
)
from es2.models.thinking import ReplyThinking, answer_reader, last_in_words
from tests.builders import tiny_tokenizer
from tests.models.templates import KINDS, PROMPTS, Kind, tokenizer_of

TERSE = "You are terse."
SWITCHES: dict[str, tuple[str, Any, Any]] = {
    "thinking opened": ("enable_thinking", True, False),
    "thinking closed": ("thinking", True, False),
    "thinking hidden": ("enable_thinking", True, False),
}
"""By hand: what the kinds call their switch, and its values for on and off."""

USABLE = [kind for kind in KINDS if kind.template is not None and len(kind.refused) < len(PROMPTS)]
QWEN = (
    "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{% else %}<|im_start|>system\nYou are a model.<|im_end|>\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
"""With a system prompt by default, as Qwen2.5's."""
STUBBORN = QWEN.replace("if messages[0].role == 'system'", "if messages[0].role == 'system' and messages[0].content")
DATED = (
    "<|im_start|>system\nToday is a very fine day.{% if messages[0].role == 'system' %} {{ messages[0].content }}"
    + ("{% endif %}<|im_end|>\nuser: {{ messages[-1].content }}<|im_end|>\n")
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% endif %}"
    "user: {{ first }}{{ messages[-1].content }}<|im_end|>model: "
)
BUDGET = (
    "user: {{ messages[-1].content }}{% if thinking_budget is defined %} [{{ thinking_budget }}]{% endif %}<|im_end|>"
)


@pytest.fixture(autouse=True)
def on_the_pinned_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return PINNED_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def theirs(tokenizer: Any, system: str | None, text: str, in_parts: bool, **arguments: Any) -> list[int] | None:
    """Transformers' own tokens; None where the template fails."""

    def content(words: str) -> Any:
        return [{"type": "text", "text": words}] if in_parts else words

    messages: list[Any] = [] if system is None else [{"role": "system", "content": content(system)}]
    messages.append({"role": "user", "content": content(text)})
    try:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **arguments)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return None
    return list(tokens)


@pytest.mark.parametrize("thinking", [None, "on", "off"])
@pytest.mark.parametrize("system", [None, TERSE, "none"])
@pytest.mark.parametrize("kind", USABLE, ids=lambda kind: kind.name)
def test_every_combination_is_transformers_or_a_sentence(kind: Kind, system: str | None, thinking: str | None) -> None:
    tokenizer, text = tokenizer_of(kind), PROMPTS["plain"]
    key, on, off = SWITCHES.get(kind.name, ("", None, None))
    arguments = {key: on if thinking == "on" else off} if key and thinking in ("on", "off") else {}
    given = TERSE if system == TERSE else None
    if system == "none" and kind.name == "system prompt by default":
        given = ""
    expected = theirs(tokenizer, given, text, kind.in_parts, **arguments)
    plain = theirs(tokenizer, None, text, kind.in_parts, **arguments)
    shown = "" if expected is None else tokenizer.decode(expected)
    refused = expected is None or shown.count(text) != 1 or (TERSE not in shown and system == TERSE)
    refused = refused or (thinking in ("on", "off") and not key) or (system == TERSE and expected == plain)
    refused = refused or (system == "none" and kind.name in ("date from the clock", "date in other forms"))
    rendering = Rendering(system_prompt=system, thinking=thinking)
    if refused:
        with pytest.raises(InputError) as problem:
            render(tokenizer, [text], rendering)
        assert "\n" not in str(problem.value)
        assert "gnarv" not in str(problem.value)
        return
    found = render(tokenizer, [text, PROMPTS["question"]], rendering)
    assert list(found.token_ids[0]) == expected
    prefix = tokenizer.decode(template_prefix(tokenizer, found.token_ids, rendering))
    assert shown.startswith(prefix)
    assert found.last_instruction[0] < len(expected or ())


def test_default_is_the_templates_own_way() -> None:
    tokenizer = tiny_tokenizer(chat_template=QWEN)
    asked = Rendering(system_prompt="default", thinking="default")
    assert asked.settled == AS_THE_TEMPLATE
    assert render(tokenizer, ["Why?"], asked) == render(tokenizer, ["Why?"])


def test_a_system_prompt_changes_most_kinds() -> None:
    """So that the test above tries what it says."""
    taken = []
    for kind in USABLE:
        try:
            render(tokenizer_of(kind), ["Why?"], Rendering(system_prompt=TERSE))
            taken.append(kind.name)
        except InputError:
            pass
    assert len(taken) >= 12
    assert {"markers", "system prompt by default", "marked for training"} <= {*taken}


def test_the_templates_own_system_prompt_is_told_and_left_out() -> None:
    tokenizer = tiny_tokenizer(chat_template=QWEN)
    told = describe_rendering(tokenizer)
    assert (told["system_prompt"], told["system_prompt_from"]) == ("You are a model.", "template")
    given = describe_rendering(tokenizer, Rendering(system_prompt=TERSE))
    assert (given["system_prompt"], given["default_system_prompt"]) == (TERSE, "You are a model.")
    left_out = describe_rendering(tokenizer, Rendering(system_prompt="none"))
    assert (left_out["system_prompt"], left_out["system_prompt_from"]) == ("", None)
    assert "You are a model" not in tokenizer.decode(
        render(tokenizer, ["Why?"], Rendering(system_prompt="none")).token_ids[0]
    )
    assert prompt_frame(tokenizer, Rendering(system_prompt="You are a model.")).around == prompt_frame(tokenizer).around


@pytest.mark.parametrize(
    ("template", "given", "problem"),
    [
        (STUBBORN, "none", "puts in a system prompt of its own in any case"),
        (DATED, "none", "begins every prompt with 'system Today is a very fine day"),
        ("user: {{ messages[-1].content }}", TERSE, "ignores a system prompt"),
        ("user: {{ messages[-1].content }}", "user", "ignores a system prompt"),
        ("{{ messages[0].content }}", TERSE, "refuses a system prompt"),
        (GEMMA.replace("content + '", "content | upper + '"), TERSE, "rewrites the system prompt"),
        (GEMMA.replace("content + '", "content.replace('/no_think', '') + '"), "Be brief. /no_think", "rewrites"),
        (
            GEMMA.replace("{% set", "{{ raise_exception('No system, please') }}{% set"),
            TERSE,
            "refuses.*No system, please",
        ),
        (None, TERSE, "has no chat template"),
    ],
)
def test_a_system_prompt_that_would_not_be_read_is_refused(template: str | None, given: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as refused:
        render(tiny_tokenizer(chat_template=template), ["Why?"], Rendering(system_prompt=given))
    assert "\n" not in str(refused.value)


def test_a_system_prompt_may_hold_any_words() -> None:
    for text in ("florp gnarv", "Two\nlines: {{ messages }}", "user", " padded "):
        for template in (QWEN, GEMMA, DATED):
            tokenizer = tiny_tokenizer(chat_template=template)
            found = render(tokenizer, ["Why florp?"], Rendering(system_prompt=text))
            assert list(found.token_ids[0]) == theirs(tokenizer, text, "Why florp?", False)


def test_an_argument_reaches_the_template_and_a_mistyped_one_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat_template=BUDGET)
    found = render(tokenizer, ["Why?"], Rendering(template_arg=("thinking_budget=512",)))
    assert list(found.token_ids[0]) == theirs(tokenizer, None, "Why?", False, thinking_budget=512)
    with pytest.raises(InputError, match=r"makes nothing of 'thinking_budged'.*knows thinking_budget"):
        render(tokenizer, ["Why?"], Rendering(template_arg=("thinking_budged=512",)))
    with pytest.raises(InputError, match="'tokenize' is no argument"):
        render(tokenizer, ["Why?"], Rendering(template_arg=("tokenize=true",)))
    with pytest.raises(InputError, match="decide the same"):
        render(tokenizer, ["Why?"], Rendering(thinking="off", template_arg=("thinking_budget=512",)))


@pytest.mark.parametrize("named", [True, False])
def test_an_effort_is_a_switch_only_where_the_template_knows_of_none(named: bool) -> None:
    """gpt-oss shows any word after `Reasoning:`, and thinks under all of them."""
    known = "{% if reasoning_effort == 'none' %} Do not think.{% endif %}" if named else ""
    tokenizer = tiny_tokenizer(
        chat_template="Reasoning: {{ reasoning_effort | default('medium') }}" + known + "\n{{ messages[-1].content }}:"
    )
    if named:
        assert prompt_frame(tokenizer, Rendering(thinking="off")).arguments == {"reasoning_effort": "none"}
        return
    with pytest.raises(InputError, match=r"no switch for thinking.*knows reasoning_effort"):
        render(tokenizer, ["Why?"], Rendering(thinking="off"))
    assert prompt_frame(tokenizer, Rendering(template_arg=("reasoning_effort=low",))).prefix == "Reasoning: low\n"


def test_a_switch_that_is_a_word_of_the_system_prompt() -> None:
    """As Nemotron Nano 2's, which takes it out."""
    tokenizer = tiny_tokenizer(
        chat_template="{% if messages[0].role == 'system' %}<|im_start|>{{ messages[0].content "
        "| replace('/no_think', '') | replace('/think', '') | trim }}\n{% endif %}{{ messages[-1].content }}\nReply: "
        "{% if '/no_think' in messages[0].content %}<think></think>{% else %}<think>\n{% endif %}"
    )
    for system, thinking, given, tail in (
        (TERSE, "off", f"{TERSE} /no_think", "<think></think>"),
        (TERSE, "on", f"{TERSE} /think", "<think>\n"),
        (None, "off", "/no_think", "<think></think>"),
    ):
        rendering = Rendering(system_prompt=system, thinking=thinking)
        assert prompt_frame(tokenizer, rendering).tail == f"\nReply: {tail}"
        assert list(render(tokenizer, ["Why?"], rendering).token_ids[0]) == theirs(tokenizer, given, "Why?", False)


def test_an_argument_may_have_the_value_that_the_template_has_by_itself() -> None:
    kind = next(kind for kind in KINDS if kind.name == "effort in the head")
    tokenizer = tokenizer_of(kind)
    plain, same = (
        render(tokenizer, ["Why?"], Rendering(template_arg=given)) for given in ((), ("reasoning_effort=medium",))
    )
    assert plain == same


@pytest.mark.parametrize(
    ("template", "tail", "words"),
    [
        (None, "", "without a chat template"),
        ("", "<|im_start|>assistant\n", "at the end of the generation prompt, before the reply"),
        ("{{ '<think>' }}", "<|im_start|>assistant\n", "before the reply, which may begin with thinking"),
        ("", "<|assistant|><think>\n", "inside a thinking block that the prompt opens"),
        ("", "<think>\n\n</think>\n\n", "after an empty thinking block, before the answer"),
        ("", "<think>None is left.</think>", "after the end of a thinking block, before the answer"),
        ("", "</think>", "after the end of a thinking block, before the answer"),
        ("", "\n", "after the user's text, without a generation prompt"),
    ],
)
def test_where_last_lies_in_words(template: str | None, tail: str, words: str) -> None:
    assert words in last_in_words(template, tail)


HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Shows the thinking of past turns, as Qwen3's."""
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking %}<|channel|>analysis"
    "<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""As gpt-oss."""
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("template", "thinking", "expected"),
    [
        (HISTORY, None, ReplyThinking("<think>", "</think>", False)),
        (HISTORY, "on", ReplyThinking("<think>", "</think>", False)),
        (HISTORY, "off", None),
        (CHANNELS, None, ReplyThinking("<|channel|>analysis<|message|>", FINAL, False)),
        (QWEN, None, None),
        (QWEN + "<think>\n{# up to </think> #}", None, ReplyThinking(None, "</think>", True)),
        (QWEN + "{% if x %}[THINK]a[/THINK]{% endif %}", None, ReplyThinking("[THINK]", "[/THINK]", False)),
        (
            QWEN + "{% set a = '<|START_THINKING|>' %}{% set b = '<|END_THINKING|>' %}",
            None,
            ReplyThinking("<|START_THINKING|>", "<|END_THINKING|>", False),
        ),
        (
            QWEN + "{{ '' if '</x:think>' in 'a' else '' }}<mm:think>{# </mm:think> #}",
            None,
            ReplyThinking(None, "</mm:think>", True),
        ),
        (None, None, None),
    ],
)
def test_how_replies_think(template: str | None, thinking: str | None, expected: ReplyThinking | None) -> None:
    assert reply_thinking(tiny_tokenizer(chat_template=template), Rendering(thinking=thinking)) == expected


@pytest.mark.parametrize(
    ("marks", "reply", "answer"),
    [
        (ReplyThinking(None, "</think>", True), "Let me see.</think>\n\nNo.", "\n\nNo."),
        (ReplyThinking(None, "</think>", True), "Let me see.", None),
        (ReplyThinking("<think>", "</think>", False), "<think>\nHm.</think>No.", "No."),
        (ReplyThinking("<think>", "</think>", False), "\n<think>\nHm", None),
        (ReplyThinking("<think>", "</think>", False), "The tag </think> ends it.", "The tag </think> ends it."),
        (ReplyThinking(None, FINAL, False), f"<|channel|>analysis<|message|>Hm{FINAL}No.", "No."),
        (ReplyThinking(None, FINAL, False), "No.", "No."),
    ],
)
def test_where_the_answer_begins(marks: ReplyThinking, reply: str, answer: str | None) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    tokens = tokenizer(reply)["input_ids"]
    at = marks.answer_at(tokens, tokenizer.decode)
    assert (None if at is None else tokenizer.decode(tokens[at:])) == answer
    assert answer_reader(tokenizer, marks)(tokens) == (answer or "")


def test_the_date_stays_pinned_under_arguments(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "date from the clock")
    with pytest.raises(InputError, match="'strftime_now' is no argument"):
        render(tokenizer_of(kind), ["Why?"], Rendering(template_arg=("strftime_now=x",)))
