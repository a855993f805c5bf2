"""Prompts as a model reads them: under its chat template, as tokens, with the positions to embed.

The date that some templates insert is pinned, so that a text has the same tokens on every day. A template that rewrites
or swallows a text is refused, since the model would then read another prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE, NONE, Rendering
from es2.models.batching import n_alike
from es2.models.model_files import first_line
from es2.models.template_settings import (
    PromptFrame,
    UnrenderedError,
    check_arguments,
    check_system_prompt,
    own_system_prompt,
    thinking_switch,
    without_system_prompt,
)
from es2.models.thinking import (
    ReplyThinking,
    marks_between,
    marks_in_source,
)
from es2.store.sources import MEAN, before_last, check_position

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PINNED_DATE = datetime(2024, 7, 26)
"""The date for templates that insert today's: the one that Llama's own template falls back to."""

_MARK = "florp"  # in the place of a user's text: one word in lower case, which no escaping or splitting changes
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What a template can raise besides jinja's own errors: it divides, indexes, calls and compares."""


@dataclass(frozen=True)
class Rendered:
    """Prompts as the model gets them.

    Attributes:
        token_ids: the tokens of each prompt, unpadded, generation prompt included.
        last_instruction: for each prompt, the index of the last token of the user's own text.
        templated: whether a chat template was applied; `False` for models that have none.
        first_instruction: for each prompt, the index of the first token of the user's own text.
    """

    token_ids: tuple[tuple[int, ...], ...]
    last_instruction: tuple[int, ...]
    templated: bool
    first_instruction: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.token_ids))

    @property
    def digest(self) -> str:
        """Identifies the tokens and the positions read from them."""
        data = json.dumps([self.token_ids, self.last_instruction], separators=(",", ":")).encode()
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def select(self, rows: Sequence[int]) -> Rendered:
        """Some of the prompts."""
        token_ids = tuple(self.token_ids[row] for row in rows)
        first, last = (
            tuple(where[row] for row in rows) if where else ()
            for where in (self.first_instruction, self.last_instruction)
        )
        return Rendered(token_ids, last, self.templated, first)

    def columns(self, position: str) -> list[int]:
        """For each prompt, the index of the token whose embedding `position` names; the last one of several."""
        return [last for _, last in self.spans(position)]

    def spans(self, position: str) -> list[tuple[int, int]]:
        """For each prompt, the first and the last token over which the embedding at `position` is a mean.

        Raises:
            InputError: for a token before the end that is not after the user's text.
        """
        if position == MEAN:
            return list(zip(self.first_instruction, self.last_instruction, strict=True))
        distance = before_last(check_position(position))
        if distance is None:
            return [(last, last) for last in self.last_instruction]
        ends = [len(tokens) - 1 for tokens in self.token_ids]
        n_after = min(end - last for end, last in zip(ends, self.last_instruction, strict=True))
        if distance >= max(1, n_after):
            furthest = f"last to last-{n_after - 1} lie" if n_after > 1 else "last alone lies"
            raise InputError(
                f"Position {position} is no token after the user's text: of the {n_after} there, {furthest} before the "
                "reply; choose one of these, last_instruction or mean."
            )
        return [(end - distance, end - distance) for end in ends]


def render(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rendering: Rendering = AS_THE_TEMPLATE,
    replies: Sequence[str] | None = None,
) -> Rendered:
    """Texts as the model reads them: one user message under the chat template, with the generation prompt.

    Templates that ask for today's date get `PINNED_DATE`. Without a chat template the plain text is tokenised.

    Args:
        texts: what the user says.
        replies: for each text, what the model's turn begins with; without a chat template it is the text's next line.

    Raises:
        InputError: when the template refuses or rewrites a text, or does not take what `rendering` asks for, or the
            tokenizer has no character spans of tokens.
    """
    if not tokenizer.is_fast:
        raise InputError("This model's tokenizer has no fast version (tokenizer.json); use a model that has one.")
    frame = prompt_frame(tokenizer, rendering)
    strings = [_framed(tokenizer, frame, text) for text in texts]
    templated = frame.template is not None
    between = "" if templated else "\n"
    begun = [f"{whole}{between}{reply}" for whole, reply in zip(strings, replies, strict=True)] if replies else strings
    encoded = tokenizer(begun, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    first_instruction, last_instruction = [], []
    for text, whole, spans in zip(texts, strings, encoded["offset_mapping"], strict=True):
        last_character = len(whole[: len(whole) - len(frame.tail)].rstrip()) - 1
        covering = [i for i, (start, end) in enumerate(spans) if start <= last_character < end]
        if not covering:
            raise InputError(f"The model's tokenizer swallows the end of the prompt {shown(text)}; remove it.")
        last_instruction.append(covering[-1])
        first_character = len(whole) - len(whole[len(frame.prefix) :].lstrip())
        first_instruction.append(next(i for i, (start, end) in enumerate(spans) if end > max(start, first_character)))
    return Rendered(
        tuple(map(tuple, encoded["input_ids"])), tuple(last_instruction), templated, tuple(first_instruction)
    )


def template_prefix(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], rendering: Rendering = AS_THE_TEMPLATE
) -> tuple[int, ...]:
    """The shared prefix: the tokens with which every prompt under the chat template begins, whatever its text."""
    # Two texts without a common beginning show where the prefix ends, also when the prompts all begin with one word.
    frame = prompt_frame(tokenizer, rendering)
    two = [f"{frame.prefix}{text}{frame.tail}" for text in "A1"]
    unlike = tokenizer(two, add_special_tokens=frame.template is None, verbose=False)["input_ids"]
    every = [*map(tuple, prompts), *map(tuple, unlike)]
    first, last = min(every), max(every)  # what these two share, all between them share
    return first[: min(n_alike(first, last), min(map(len, every)) - 1)]


def prompt_frame(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = AS_THE_TEMPLATE) -> PromptFrame:
    """What the tokenizer puts around a user's text.

    Raises:
        InputError: when its chat template cannot be used for prompts of one user's message, or refuses or ignores a
            part of `rendering`.
    """
    wanted = rendering.settled
    if tokenizer.chat_template is None:
        if wanted != AS_THE_TEMPLATE:
            raise InputError(
                "This model has no chat template, so it takes no system prompt, thinking or template argument; leave "
                "--system-prompt, --thinking and --template-arg out."
            )
        return PromptFrame()
    arguments = wanted.arguments
    if taken := sorted(_TAKEN & arguments.keys()):
        raise InputError(f"{taken[0]!r} is no argument of a chat template here; leave it out of --template-arg.")
    template = _pinned_template(tokenizer, arguments.get("tools"))

    def frame(system: str | None, given: Mapping[str, Any]) -> PromptFrame:
        return _find_frame(tokenizer, template, system, given)

    own = own_system_prompt(frame, arguments)
    system = wanted.system_prompt
    if system == NONE:
        system = without_system_prompt(frame, arguments, own)
    elif system is not None:
        check_system_prompt(frame, arguments, system, own)
    if wanted.thinking is not None:
        system, switch = thinking_switch(frame, system, arguments, wanted.thinking, own)
        arguments = arguments | switch
    found = replace(frame(system, arguments), own_system_prompt=own)
    check_arguments(frame, found, wanted.arguments)
    return found


def describe_rendering(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = AS_THE_TEMPLATE) -> dict[str, Any]:
    """How prompts are given to the model, for artifacts and outputs: the `settings`, and what `PromptFrame` says."""
    return {"settings": rendering.settled.to_dict()} | prompt_frame(tokenizer, rendering).to_dict()


def reply_thinking(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = AS_THE_TEMPLATE) -> ReplyThinking | None:
    """How replies to these prompts think before they answer, by the template's own markers; None where they do not.

    The markers are those around the thinking of a past turn, as the template shows it, or that it mentions.
    """
    frame = prompt_frame(tokenizer, rendering)
    if frame.template is None or frame.thinking == "closed":
        return None
    marks = _marks_of_a_past_turn(tokenizer, frame) or marks_in_source(str(tokenizer.get_chat_template()), frame.tail)
    if marks is None:
        return None
    opens, closes = marks
    opened = frame.thinking == "opened"
    return ReplyThinking(None if opened else opens, closes, opened)


def _marks_of_a_past_turn(tokenizer: PreTrainedTokenizerBase, frame: PromptFrame) -> tuple[str | None, str] | None:
    """The markers around the thinking of a past reply, where the template shows any."""
    thought, answer = "zarfing", "quibbed"
    turn = {"role": "assistant", "content": answer} | dict.fromkeys(_THOUGHTS, thought)
    try:
        whole = _apply(tokenizer, frame, _MARK, [turn])
    except _TEMPLATE_ERRORS:
        return None
    head, found, rest = whole.partition(thought)
    between, answered, _ = rest.partition(answer)
    if not found or not answered:
        return None
    before = f"{frame.prefix}{_MARK}{frame.tail}"
    return marks_between(head[len(before) :] if head.startswith(before) else "", between)


_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what templates call the thinking of a past turn

_TAKEN = {
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
    "self",
    "strftime_now",
}
"""Arguments of `apply_chat_template` that are not the template's, and the clock, which is pinned."""


def _find_frame(
    tokenizer: PreTrainedTokenizerBase, template: str, system: str | None, arguments: Mapping[str, Any]
) -> PromptFrame:
    """What a template puts around a text, in the first form of messages that it takes."""
    mark = _MARK
    while mark in f"{system}{arguments}":
        mark += "o"
    forms = ((False, False), (True, True), (True, False), (False, True))
    refused: UnrenderedError | None = None
    for in_parts, system_in_parts in forms[:2] if system is None else forms:
        own = system_in_parts and system is not None
        tried = PromptFrame("", "", template, in_parts, system, own, arguments)
        try:
            prefix, found, tail = _apply(tokenizer, tried, mark).partition(mark)
        except _TEMPLATE_ERRORS as error:
            reason = re.sub(r" at \d+$", "", first_line(error).replace(mark, "…"))  # counted from the clock on
            refused = refused or UnrenderedError(
                f"The model's chat template cannot render one user's message without tools ({reason}); "
                "use another template or another model.",
                reason,
            )
            continue
        if found and mark not in tail:
            return replace(tried, prefix=prefix, tail=tail)
    raise refused or UnrenderedError(
        "This model's chat template does not show the user's text exactly once; use another template or another model.",
        "",
    )


def _pinned_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The chat template behind a macro that hides transformers' clock of the same name.

    Templates cannot be given a function: transformers replaces everything but plain data.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(map(repr, tokenizer.chat_template))
        raise InputError(
            f"This model has the chat templates {names} and none called 'default', so it is unclear which is meant; "
            "save the one that is meant as chat_template.jinja in the model's folder."
        )
    flags = [f"{flag}{letter}" for letter in string.ascii_letters if letter != "s" for flag in ("", *"-_0^#")]
    values = {f"%{flag}": PINNED_DATE.strftime(f"%{flag}") for flag in flags}
    values = {"%%": "\ue000"} | {flag: value for flag, value in values.items() if value != flag} | {"\ue000": "%"}
    clock = (
        "{% macro strftime_now(format) %}{% set shown = namespace(date=format) %}"
        f"{{% for flag, value in {json.dumps([*values.items()])} %}}"
        "{% set shown.date = shown.date | replace(flag, value) %}{% endfor %}{{ shown.date }}{% endmacro %}"
    )
    # The newline is swallowed (trim_blocks), so the template begins at the start of a line, as it does by itself.
    return f"{clock}\n{tokenizer.get_chat_template(tools=tools)}"


def _framed(tokenizer: PreTrainedTokenizerBase, frame: PromptFrame, text: str) -> str:
    """A text under the template, which must leave it as it is, up to white space around it."""
    if not text.strip():
        raise InputError(f"The prompt {shown(text)} is blank; remove it.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"The prompt {shown(text)} holds half of a surrogate pair, which is no character; remove it.")
    if frame.template is None:
        return text
    try:
        whole = _apply(tokenizer, frame, text)
    except _TEMPLATE_ERRORS as error:
        raise InputError(
            f"The model's chat template fails on the prompt {shown(text)} ({first_line(error)}); "
            "remove it, or use another model."
        ) from error
    own = whole.removeprefix(frame.prefix).removesuffix(frame.tail)
    is_framed = f"{frame.prefix}{own}{frame.tail}" == whole
    if is_framed and own.strip() == text.strip():
        return whole
    if is_framed and own.strip():
        what = f"rewrites the prompt {shown(text)} as {shown(own.strip())}"
    elif text.strip() in whole:
        what = f"puts other words around the prompt {shown(text)} (a part of it may be a switch, such as /no_think)"
    else:
        what = f"swallows the prompt {shown(text)} or a part of it"
    raise InputError(
        f"The model's chat template {what}, so the model would read another one; remove it, or use another model."
    )


def _apply(
    tokenizer: PreTrainedTokenizerBase, frame: PromptFrame, text: str, reply: Sequence[dict[str, Any]] = ()
) -> str:
    """The rendered text, or with a past `reply` that conversation; errors are those that a template can cause."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [*frame.messages(text), *reply],
                chat_template=frame.template,
                tokenize=False,
                add_generation_prompt=not reply,
                **frame.arguments,
            )
        )
    except TemplateError as error:
        raise ValueError(first_line(error)) from error


def shown(text: str) -> str:
    """A prompt as error messages quote it."""
    return repr(text if len(text) <= 80 else text[:80] + "…")
