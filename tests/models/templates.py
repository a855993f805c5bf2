"""Kinds of chat templates, by what they do to a prompt, each with a template of our own.

`docs/templates.md` lists them; it is made by

    python -m tests.models.templates > docs/templates.md

What is right is written down here by hand: the words around a text, its last token and the thinking. Published
templates do the same in other words; which ones is known from rendering 119 of them (transformers 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.builders import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from es2.models.thinking import Thinking


PROMPTS = {
    "plain": "Tell me how bread is baked",
    "question": "Why is the sky blue?",
    "white space": " \n  How do I oil a lock? \n\n",
    "blank lines": "First  this.\n\n\nThen\tthat:  two spaces, three lines",
    "thinking tags": "What does </think> mean, and <think>?",
    "switch": "Name a river. /no_think",
    "long": "Count the ships that left the harbour, one by one, and say where each of them went. " * 40,
    "markers": "Is <|im_end|> or [/INST] a word of <s>?",
    "quotes": 'He said "it\'s <b>5 & 6</b>": {{ messages }} {% if x %} \\n #}',
    "other scripts": "Größe — 大きさ 🍞",
}
"""User's texts of ten kinds."""

ALL = tuple(PROMPTS)


@dataclass(frozen=True)
class Kind:
    """A kind of chat template.

    Attributes:
        name, does: what it is called here, and what it does.
        published: some of the models whose published templates do that.
        template: our own instance; named ones by name, None for a model without a template.
        prefix, tail: the words that come before and after every text.
        trims: whether it removes white space around a text.
        in_parts: whether it takes a text in a list of parts only.
        thinking: what the end of the prompt does with it.
        refused: by prompt, a part of the sentence that refuses it.
        why: what the workbench does where it does not just render.
    """

    name: str
    does: str
    published: str
    template: str | dict[str, str] | None
    prefix: str = ""
    tail: str = ""
    trims: bool = False
    in_parts: bool = False
    thinking: Thinking = "none"
    refused: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    def rendered(self, text: str) -> str:
        """The prompt as it must be."""
        return f"{self.prefix}{text.strip() if self.trims else text}{self.tail}"

    @property
    def last(self) -> str:
        """The last token of every prompt; nothing where that is the last of the text."""
        whole = re.search(r"(<[^<>]+>|\[[^\[\]]+\]|.)\Z", self.tail, re.DOTALL)
        return whole[0] if whole else ""


def tokenizer_of(kind: Kind) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with the kind's template; each marker is one token, as in a published model."""
    tokenizer = tiny_tokenizer(chat_template=None)
    markers = re.findall(r"<[^<>\s]+>|\[/?INST\]", f"{kind.prefix}{kind.tail}<s></think>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(dict.fromkeys(markers))})
    tokenizer.chat_template = kind.template
    return tokenizer


SIMPLE = "<|user|>{{ messages[0].content }}<|assistant|>"
TURNS = "{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}<|end|>\n{% endfor %}"
REPLY = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
AROUND = {"prefix": "<|user|>\n", "tail": "<|end|>\n<|assistant|>\n"}
NOT_SHOWN = dict.fromkeys(ALL, "does not show the user's text exactly once")
CANNOT = dict.fromkeys(ALL, "cannot render one user's message without tools")

KINDS = (
    # ---------------------------------------------------------------------------------------------- the words of a turn
    Kind(
        "markers",
        "Puts every turn between markers, a line break after each.",
        "Qwen, Phi-3, LFM2, Yi, SmolLM2, Zephyr",
        TURNS + REPLY,
        **AROUND,
    ),
    Kind(
        "headings",
        "Names the role in a heading between two markers, two line breaks after it.",
        "Llama 3 and 3.1, functionary",
        "{{ bos_token }}{% for turn in messages %}{{ '<|head|>' + turn.role + '<|/head|>\n\n' + turn.content }}<|end|>"
        "{% endfor %}{{ '<|head|>assistant<|/head|>\n\n' if add_generation_prompt }}",
        prefix="<s><|head|>user<|/head|>\n\n",
        tail="<|end|><|head|>assistant<|/head|>\n\n",
    ),
    Kind(
        "role without an end",
        "Ends in the name of the role, no marker after it.",
        "Solar-Open, gpt-oss",
        "{% for turn in messages %}<|begin|>{{ turn.role }}<|text|>{{ turn.content }}<|end|>{% endfor %}"
        "<|begin|>assistant",
        prefix="<|begin|>user<|text|>",
        tail="<|end|><|begin|>assistant",
    ),
    Kind(
        "instruction brackets",
        "Puts the request between brackets, with or without a generation prompt.",
        "Llama 2, Mistral, Devstral",
        "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
        "{% else %} {{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}",
        prefix="<s>[INST] ",
        tail=" [/INST]",
    ),
    Kind(
        "words alone",
        "Has no markers: headings in words, the tail begins with a line break.",
        "Alpaca, Vicuna, Solar, AmberChat, Falcon, RWKV",
        "{% for turn in messages %}{{ '### ' + turn.role | capitalize + ':\n' + turn.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### Reply:{% endif %}",
        prefix="### User:\n",
        tail="\n\n### Reply:",
    ),
    Kind(
        "nothing after the text",
        "Asks for no reply: the prompt ends with the text.",
        "open-instruct's simple chat",
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% endfor %}",
        prefix="user: ",
    ),
    Kind(
        "no beginning of text",
        "Leaves out the token that the tokenizer would begin a plain text with.",
        "Gemma as chujiezheng and unsloth have it",
        SIMPLE,
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "trimming",
        "Removes white space around the text.",
        "Llama 3, Gemma, Nemotron Nano 2",
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content | trim }}<|end|>{% endfor %}<|assistant|>",
        prefix="<|user|>",
        tail="<|end|><|assistant|>",
        trims=True,
    ),
    Kind(
        "white space control",
        "Is laid out over indented lines, which must leave no trace in the prompt.",
        "Qwen3, GLM-4.6",
        """
        {%- for turn in messages %}
            {%- set role = turn['role'] -%}
            {{- '<|' ~ role ~ '|>' }}
            {{- turn['content'] }}
        {%- endfor -%}
        {%- if add_generation_prompt %}
            {{- '<|assistant|>' -}}
        {%- endif -%}
        """,
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "macros and loops with breaks",
        "Shows turns through macros of its own, looks for the last request from the end, and leaves loops early.",
        "gpt-oss, Qwen3",
        "{% macro turn(role, text) %}{{ '<|' + role + '|>' + text + '<|end|>' }}{% endmacro %}"
        "{% set seen = namespace(last=-1) %}{% for one in messages[::-1] %}{% if one.role == 'user' %}"
        "{% set seen.last = messages | length - 1 - loop.index0 %}{% break %}{% endif %}{% endfor %}"
        "{% for one in messages %}{{ turn(one.role, one.content) }}{% endfor %}"
        "{{ '<|assistant|>' if seen.last >= 0 else '' }}",
        prefix="<|user|>",
        tail="<|end|><|assistant|>",
    ),
    Kind(
        "marked for training",
        "Marks the replies that a training counts, with a tag that only transformers has.",
        "TRL's templates of Qwen3, Llama 3 and others",
        "{% for turn in messages %}{% if turn.role == 'assistant' %}"
        "{% generation %}{{ turn.content }}{% endgeneration %}{% else %}"
        "<|user|>{{ turn.content }}{% endif %}{% endfor %}<|assistant|>",
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "checks the turns",
        "Raises an error unless user and assistant take turns, or for a system prompt.",
        "Gemma 2, Mistral, Llama 2",
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system prompt here') }}{% endif %}"
        "{% for turn in messages %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Turns must alternate') }}{% endif %}<|{{ turn.role }}|>{{ turn.content }}{% endfor %}"
        "<|model|>",
        prefix="<|user|>",
        tail="<|model|>",
    ),
    # ----------------------------------------------------------------------------------------------- what else it shows
    Kind(
        "system prompt by default",
        "Puts a system prompt of its own before the text where none is given.",
        "Qwen2.5, SmolLM3, Granite 4.0, Devstral, Kimi K2, Apriel, command-r7b",
        "{% if messages[0].role != 'system' %}<|system|>\nYou are a careful helper.<|end|>\n{% endif %}"
        + TURNS
        + REPLY,
        prefix="<|system|>\nYou are a careful helper.<|end|>\n<|user|>\n",
        tail="<|end|>\n<|assistant|>\n",
        why="; the system prompt is part of it",
    ),
    Kind(
        "date from the clock",
        "Shows the day on which it is used.",
        "Llama 3.1 to 3.3, Granite 3.3, gpt-oss, Mistral Small 3.2, Apertus, Solar-Open",
        "<|system|>Today is {{ strftime_now('%d %b %Y') }}.{{ ' The year is ' ~ strftime_now(format='%Y') }}.<|end|>"
        + SIMPLE,
        prefix="<|system|>Today is 26 Jul 2024. The year is 2024.<|end|><|user|>",
        tail="<|assistant|>",
        why="; the date is always 26 July 2024",
    ),
    Kind(
        "date in other forms",
        "Writes the date with directives that few use, or a per cent sign.",
        "none so far",
        "{{ strftime_now('%-d.%-m.%y, %A %e %B, %F, day %j, %H:%M, 100 %% %^a%n') }}" + SIMPLE,
        prefix="26.7.24, Friday 26 July, 2024-07-26, day 208, 00:00, 100 % FRI\n<|user|>",
        tail="<|assistant|>",
        why="; the date is always 26 July 2024",
    ),
    Kind(
        "date only when told",
        "Shows a date where it gets one, and else none.",
        "MiroThinker",
        "{% if date_string is defined %}<|system|>Today is {{ date_string }}.<|end|>{% endif %}" + SIMPLE,
        prefix="<|user|>",
        tail="<|assistant|>",
        why="; without a date, as everywhere",
    ),
    Kind(
        "date with a default",
        "Falls back to a date of its own, or asks the clock where there is one.",
        "Llama 3.1 and 3.2",
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
        "{% set date_string = '1 Jan 2020' %}{% endif %}{% endif %}<|system|>{{ date_string }}<|end|>" + SIMPLE,
        prefix="<|system|>26 Jul 2024<|end|><|user|>",
        tail="<|assistant|>",
        why="; the date is always 26 July 2024",
    ),
    Kind(
        "tools on request",
        "Lists tools where there are some.",
        "Llama 3.1, Qwen2.5, GLM-4.6",
        "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}" + SIMPLE,
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "tools required",
        "Goes through the tools, of which there are none.",
        "the tool templates of Hermes 2 Pro and command-r-plus, llama.cpp's Phi-4-mini",
        "{% if tools is defined %}{% for tool in tools %}{{ tool.name }}{% endfor %}{% endif %}" + SIMPLE,
        refused=CANNOT,
        why="refused before anything is captured, as transformers fails",
    ),
    Kind(
        "variables required",
        "Uses a variable that only its own program passes.",
        "firefunction-v2",
        "<|functions|>{{ functions | tojson }}" + SIMPLE,
        refused=CANNOT,
        why="refused before anything is captured, as transformers fails",
    ),
    # --------------------------------------------------------------------------------------------------------- thinking
    Kind(
        "thinking opened",
        "Begins the reply inside a thinking block.",
        "Qwen3.5 and 3.6, DeepSeek-R1, Nemotron 3, MiniMax-M2, GLM-4.7 and 5.2, StepFun 3.5, Olmo-Think",
        "{% if enable_thinking is defined and not enable_thinking %}{% set open = '<think></think>' %}"
        "{% else %}{% set open = '<think>\n' %}{% endif %}" + TURNS + "<|assistant|>{{ open }}",
        prefix="<|user|>\n",
        tail="<|end|>\n<|assistant|><think>\n",
        thinking="opened",
    ),
    Kind(
        "thinking opened under a name",
        "Opens a channel or a part that is called thinking.",
        "Kimi K3; gpt-oss, whose model opens it by itself",
        "{% for turn in messages %}<|open|>{{ turn.role }}<|sep|>{{ turn.content }}<|close|>{% endfor %}"
        "<|open|>assistant<|sep|><|open|>think<|sep|>",
        prefix="<|open|>user<|sep|>",
        tail="<|close|><|open|>assistant<|sep|><|open|>think<|sep|>",
        thinking="opened",
    ),
    Kind(
        "thinking opened in words",
        "Begins the reasoning with a sentence.",
        "Apriel 1.6",
        SIMPLE + "\nThis is how I reason, step by step:\n{{ '' }}",
        prefix="<|user|>",
        tail="<|assistant|>\nThis is how I reason, step by step:\n",
        thinking="opened",
    ),
    Kind(
        "thinking closed",
        "Puts an empty thinking block before the reply.",
        "DeepSeek V3.1 and V3.2, QwQ as llama.cpp has it, Hy3",
        "{% set thinks = thinking is defined and thinking %}"
        + TURNS
        + "<|assistant|><think>\n\n{% if not thinks %}</think>\n\n{{ '' }}{% endif %}",
        prefix="<|user|>\n",
        tail="<|end|>\n<|assistant|><think>\n\n</think>\n\n",
        thinking="closed",
    ),
    Kind(
        "thinking closed unopened",
        "Ends a thinking block that it has not begun.",
        "DeepSeek V4, Laguna-XS.2, GLM-4.7 with thinking off",
        SIMPLE + "</think>",
        prefix="<|user|>",
        tail="<|assistant|></think>",
        thinking="closed",
    ),
    Kind(
        "thinking closed under a name",
        "Opens and ends a channel that is called thought.",
        "Gemma 4, Solar-Open with low effort",
        "<|turn>user\n{{ messages[0].content | trim }}<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        prefix="<|turn>user\n",
        tail="<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
        trims=True,
        thinking="closed",
    ),
    Kind(
        "thinking closed by other markers",
        "Has markers of its own for an empty block.",
        "command-r7b, Cohere 2 MoE with thinking off",
        SIMPLE + "<|START_THINKING|><|END_THINKING|>",
        prefix="<|user|>",
        tail="<|assistant|><|START_THINKING|><|END_THINKING|>",
        thinking="closed",
    ),
    Kind(
        "thinking hidden",
        "Leaves it to the model: the template shows a block only where a keyword says so.",
        "Qwen3, SmolLM3, GLM-4.6, MiniCPM5, Bielik 3",
        SIMPLE
        + "{% if enable_thinking is defined %}{{ '<think>\n' + ('' if enable_thinking else '</think>\n') }}{% endif %}",
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "effort in the head",
        "Says before the text how much the model is to think.",
        "gpt-oss, Granite 3.3, Seed-OSS, GLM-5.2, Apertus",
        "<|system|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>" + SIMPLE,
        prefix="<|system|>Reasoning: medium<|end|><|user|>",
        tail="<|assistant|>",
    ),
    # ----------------------------------------------------------------------------------------- what becomes of the text
    Kind(
        "switch in the text",
        "Takes a word of the text as a switch of its thinking and lets it stand.",
        "none of those rendered; Qwen3 leaves its switch to the model",
        "{% set quick = '/no_think' in messages[0].content %}"
        + SIMPLE
        + "{{ '<think></think>' if quick else '<think>' }}",
        prefix="<|user|>",
        tail="<|assistant|><think>",
        thinking="opened",
        refused={"switch": "puts other words around the prompt 'Name a river. /no_think'"},
        why="; a prompt with the switch is refused, since its `last` would be another token than its neighbours'",
    ),
    Kind(
        "switch taken out of the text",
        "Takes a word of the text as a switch and removes it.",
        "Nemotron Nano 2",
        "<|user|>{{ messages[0].content | replace('/no_think', '') | trim }}<|assistant|>"
        "{{ '<think></think>' if '/no_think' in messages[0].content else '<think>' }}",
        prefix="<|user|>",
        tail="<|assistant|><think>",
        trims=True,
        thinking="opened",
        refused={"switch": "swallows the prompt 'Name a river. /no_think' or a part of it"},
        why="; a prompt with the switch is refused",
    ),
    Kind(
        "cut at a tag",
        "Keeps only what follows an end of thinking, also in a user's text.",
        "Nemotron Nano 2",
        "<|user|>{{ messages[0].content.split('</think>')[-1] | trim }}<|assistant|>",
        prefix="<|user|>",
        tail="<|assistant|>",
        trims=True,
        refused={
            "thinking tags": "rewrites the prompt 'What does </think> mean, and <think>?' as 'mean, and <think>?'"
        },
        why="; a prompt that is cut is refused",
    ),
    Kind(
        "paragraphs made one",
        "Makes blank lines single line breaks.",
        "Falcon",
        "User: {{ messages[0].content | replace('\r\n', '\n') | replace('\n\n', '\n') | trim }}\n\nFalcon:",
        prefix="User: ",
        tail="\n\nFalcon:",
        trims=True,
        refused={"blank lines": "rewrites the prompt"},
        why="; a prompt that is changed is refused",
    ),
    Kind(
        "escaping",
        "Shows the text as a JSON string or with HTML entities.",
        "none so far, but templates of tools do it to arguments",
        "<|user|>{{ messages[0].content | e }}<|assistant|>",
        prefix="<|user|>",
        tail="<|assistant|>",
        refused=dict.fromkeys(("thinking tags", "markers", "quotes"), "rewrites the prompt"),
        why="; a prompt that is changed is refused",
    ),
    Kind(
        "text twice",
        "Repeats the text.",
        "none so far",
        "{{ messages[0].content }}\n\n" + SIMPLE,
        refused=NOT_SHOWN,
        why="refused, since no one token is its last",
    ),
    Kind(
        "text in parts only",
        "Goes through a list of parts, in which pictures may be, and shows nothing of a plain text.",
        "Idefics3, LLaVA-NeXT",
        "<|user|>{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}<|image|>{% endif %}{% endfor %}<|assistant|>",
        prefix="<|user|>",
        tail="<|assistant|>",
        in_parts=True,
        why="; the text goes in as a list of one part",
    ),
    Kind(
        "text or parts",
        "Takes a plain text as well as a list of parts.",
        "Qwen2.5-VL, Qwen3-VL, Gemma 3",
        "<|user|>{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
        "{% for part in messages[0].content %}<|part|>{{ part.text }}{% endfor %}{% endif %}<|assistant|>",
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    # --------------------------------------------------------------------------------------------------- which template
    Kind(
        "named, one the default",
        "Is one of several: one by default, one for tools, one for documents.",
        "command-r-plus, Hermes 2 Pro and 3",
        {"default": SIMPLE, "tool_use": "{{ tools[0].name }}" + SIMPLE, "rag": "{{ documents[0].text }}" + SIMPLE},
        prefix="<|user|>",
        tail="<|assistant|>",
    ),
    Kind(
        "named, none the default",
        "Is one of several, none of which is the default.",
        "tokenizers that lost theirs in a conversion",
        {"chat": SIMPLE, "rag": "{{ documents[0].text }}" + SIMPLE},
        refused=dict.fromkeys(ALL, "has the chat templates 'chat', 'rag' and none called 'default'"),
        why="refused; the sentence names them",
    ),
    Kind(
        "failing",
        "Divides by nothing.",
        "files that were damaged or edited",
        "{{ messages | length / (messages | length - 1) }}" + SIMPLE,
        refused=CANNOT,
        why="refused before anything is captured",
    ),
    Kind(
        "none",
        "There is no template: a base model.",
        "base models",
        None,
        why="rendered as plain text, and every output says so",
    ),
)
"""Every kind; its name is unique."""


def page() -> str:
    """The page `docs/templates.md`."""
    lines = [
        "# What becomes of a prompt in a chat template",
        "",
        "Models are compared at the end of a prompt, and what is there is up to the chat template that was published",
        "with the model. This page says what the workbench makes of every kind of template known here.",
        "",
        "A prompt is one user's message. *Rendered* means: as transformers renders it (`apply_chat_template` with",
        "`add_generation_prompt=True` and no keyword), token for token. A system prompt, thinking and other arguments",
        "of a template are for [options](guide/rendering.md). What would change a text is refused with a sentence that",
        "quotes it, before anything is captured: the numbers would be of another prompt.",
        "",
        "- `last` is the last token of the prompt, generation prompt included.",
        "- `last_instruction` is in every kind the last token of the user's own text, white space after it left out,",
        "  or the one token that a tokenizer makes of the text's last character and the line break after it.",
        "- *Thinking*: whether the prompt ends inside a thinking block (*opened*), behind an empty one (*closed*), or",
        "  neither (*none*; many models then open one by themselves). Models that differ in it are read at different",
        "  moments.",
        "",
        f"Tests try each of these kinds, {len(KINDS)} in all, on templates written for them, with {len(PROMPTS)} kinds",
        "of texts.",
        "",
        "This page is made by `python -m tests.models.templates > docs/templates.md`.",
        "",
        "| kind | what the template does | published with, among others | the workbench | `last` | thinking |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        last = f"`{kind.last!r}`".replace("'", "") if kind.last else "the text's last"
        if not kind.tail and not kind.prefix and kind.template is not None:
            last, thinking = "–", "–"  # refused altogether
        else:
            thinking = kind.thinking
        done = f"rendered{kind.why}" if kind.why.startswith(";") else kind.why or "rendered"
        cells = (kind.name, kind.does, kind.published, done, last, thinking)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(page())
