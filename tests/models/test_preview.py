"""One prompt token by token: nothing of it is lost, the positions are those of `Rendered`, and torch is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from es2.core.errors import InputError
from es2.core.rendering import NONE, Rendering
from es2.models.chat_template import render
from es2.models.preview import N_OF_REQUEST, ask, choices, preview
from tests.builders import tiny_tokenizer

SWITCHED = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}"
)


@pytest.mark.parametrize("text", ["Hi!", "Map 🗺 — é", "word " * 3 * N_OF_REQUEST])
def test_the_tokens_are_the_prompt(text: str) -> None:
    tokenizer = tiny_tokenizer()
    shown, rendered = preview(tokenizer, text), render(tokenizer, [text])
    (tokens,) = rendered.token_ids
    assert shown.before + "".join(shown.pieces) == tokenizer.decode(tokens)
    assert shown.n_before + len(shown.pieces) == len(tokens)
    assert shown.request == (rendered.first_instruction[0], rendered.last_instruction[0])
    assert rendered.columns(f"last-{shown.n_after - 1}") == [shown.request[1] + 1]


def test_what_a_template_lets_one_choose() -> None:
    can = choices(tiny_tokenizer(chat_template=SWITCHED))
    assert (can.system_prompt, can.none, can.thinking, can.default_system_prompt) == (True, True, True, "Be kind.")
    assert can.arguments == "enable_thinking"
    plain = choices(tiny_tokenizer(chat_template=None))
    assert (plain.templated, plain.system_prompt, plain.none, plain.thinking) == (False, False, False, False)


def test_a_process_answers_without_torch(tmp_path: Path) -> None:
    tiny_tokenizer(chat_template=SWITCHED).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    rendering = Rendering(system_prompt=NONE, thinking="off")
    can, shown = ask(tmp_path, "Why — é?", rendering)
    assert can.thinking
    assert shown == preview(tiny_tokenizer(chat_template=SWITCHED), "Why — é?", rendering)
    assert "after an empty thinking block" in shown.last  # type: ignore[union-attr]
    wrong = ask(tmp_path, "Why?", Rendering(template_arg=("enable_thinkng=true",)))[1]
    assert isinstance(wrong, InputError)
    assert "enable_thinkng" in str(wrong)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        ask(tmp_path, "Why?")


def test_asking_loads_no_torch() -> None:
    code = "import sys, es2.models.preview; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "set()"
