"""A system prompt, a switch of thinking and other arguments, held against what a chat template makes of them.

Templates ignore what they do not know without a word. So each of these is tried: a prompt that it leaves as it is means
that the model would not read what was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from es2.core.errors import InputError
from es2.models.thinking import ABSENT, SWITCHES, Thinking, last_in_words, thinking_of

_MARK = "gnarv"  # in the place of a system prompt: one word in lower case, which no escaping or splitting changes
_OWN_WORDS = 4  # before every text, markers and the role's name not counted: more than a heading
_TRIED: tuple[Any, ...] = (
    True,
    False,
    0,
    1,
    512,
    "",
    "x",
    "low",
    "medium",
    "high",
    "none",
    "on",
    "off",
    [],
    {},
    [{"title": "x", "text": "y"}],
)
"""Values that a template may tell apart."""
_WORDS = ("/think", "/no_think")  # of a system prompt, which some templates take for switches
_USUAL = {"messages", "add_generation_prompt", "continue_final_message", "strftime_now"}


@dataclass(frozen=True)
class PromptFrame:
    """What a tokenizer puts around every user's text.

    Attributes:
        prefix, tail: what stands before and after the text; empty for a model without a chat template.
        template: the chat template, its date pinned; None for a model without one.
        in_parts: whether the template takes a text in a list of parts only.
        system: the text of the system turn before the user's; None where there is none.
        system_in_parts: whether that goes in as a list of parts.
        arguments: what the template gets by name.
        own_system_prompt: what the template puts in the place of a system prompt by itself; None for nothing.
    """

    prefix: str = ""
    tail: str = ""
    template: str | None = None
    in_parts: bool = False
    system: str | None = None
    system_in_parts: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    own_system_prompt: str | None = None

    @property
    def thinking(self) -> Thinking:
        """What the end of a prompt does with the model's thinking, as `thinking_of` says."""
        return thinking_of(self.tail)

    @property
    def around(self) -> tuple[str, str]:
        """All that every prompt shares, by which two renderings are compared."""
        return self.prefix, self.tail

    def messages(self, text: str) -> list[dict[str, Any]]:
        """The conversation that a template renders."""

        def content(words: str, in_parts: bool) -> Any:
            return [{"type": "text", "text": words}] if in_parts else words

        user = [{"role": "user", "content": content(text, self.in_parts)}]
        if self.system is None:
            return user
        return [{"role": "system", "content": content(self.system, self.system_in_parts)}, *user]

    def to_dict(self) -> dict[str, Any]:
        """How prompts are given, for JSON: the system prompt, what stands around a text, and where `last` lies."""
        return {
            "system_prompt": self.own_system_prompt if self.system is None else self.system,
            "system_prompt_from": (
                "given" if self.system else None if self.own_system_prompt is None or self.system == "" else "template"
            ),
            "default_system_prompt": self.own_system_prompt,
            "thinking": self.thinking,
            "template_arguments": dict(self.arguments),
            "prefix": self.prefix,
            "tail": self.tail,
            "last": last_in_words(self.template, self.tail),
        }


Frames = Callable[[str | None, Mapping[str, Any]], PromptFrame]
"""What a template makes of a system prompt and of arguments; raises `UnrenderedError`."""


class UnrenderedError(InputError):
    """A template cannot render a conversation, for a `reason` of its own, or does not show the user's text once."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def own_system_prompt(frames: Frames, arguments: Mapping[str, Any]) -> str | None:
    """What a template puts where a system prompt would be when none is given; None for nothing."""
    try:
        plain, marked = frames(None, arguments), frames(_MARK, arguments)
    except UnrenderedError:
        return None
    before, found, after = marked.prefix.partition(_MARK)
    room = len(plain.prefix) - len(before) - len(after)
    if not found or room <= 0 or not (plain.prefix.startswith(before) and plain.prefix.endswith(after)):
        return None
    return plain.prefix[len(before) : len(before) + room].strip() or None


def without_system_prompt(frames: Frames, arguments: Mapping[str, Any], own: str | None) -> str | None:
    """The system prompt to give so that the template's own is left out; raises `InputError` where none is."""
    advice = "leave out --system-prompt none, or give another text in its place"
    if own is not None:
        try:
            found = frames("", arguments)
        except UnrenderedError:
            found = None
        if found is None or own in "".join(found.around):
            raise InputError(f"The model's chat template puts in a system prompt of its own in any case; {advice}.")
        return ""
    prefix = frames(None, arguments).prefix
    words = re.sub(r"<[^<>\s][^<>]*>|\[[^\[\]\s]*\]", " ", prefix).split()
    if len(words) >= _OWN_WORDS:
        raise InputError(
            f"The model's chat template begins every prompt with {' '.join(words)[:100]!r}, whatever the system "
            "prompt; leave out --system-prompt none."
        )
    return None


def check_system_prompt(frames: Frames, arguments: Mapping[str, Any], text: str, own: str | None) -> None:
    """Refuse a system prompt (`InputError`) that the template refuses, ignores or rewrites."""
    plain = None
    try:
        plain = frames(None, arguments)
    except UnrenderedError:
        found = frames(text, arguments)  # some templates need one
    else:
        try:
            found = frames(text, arguments)
        except UnrenderedError as error:
            reason = error.reason or "with one it does not show the user's text once"
            raise InputError(
                f"The model's chat template refuses a system prompt ({reason}); leave --system-prompt out."
            ) from error
    if plain is not None and plain.around == found.around and text.strip() != own:
        raise InputError(
            "The model's chat template ignores a system prompt, so the model would not read it; leave --system-prompt "
            "out, or put its words into the prompts."
        )
    if not any(text.strip() in part for part in found.around):
        raise InputError(
            "The model's chat template rewrites the system prompt, so the model would read another one (a part of it "
            "may be a switch, such as /no_think, for which there is --thinking); change it."
        )


def thinking_switch(
    frames: Frames, system: str | None, arguments: Mapping[str, Any], wanted: str, own: str | None
) -> tuple[str | None, dict[str, Any]]:
    """The system prompt and the arguments that turn thinking `on` or `off`.

    The switch is an argument, or a word that the template takes out of a system prompt. An argument that the template
    merely shows, such as an effort of any name, is no switch: the model may know nothing of the value.

    Raises:
        InputError: where the template has no switch that is known.
    """
    for key, on, off in SWITCHES:
        others = {name: value for name, value in arguments.items() if name != key}
        ends = [_around(frames, system, others | ({} if value is ABSENT else {key: value})) for value in (on, off)]
        if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
            continue
        source = frames(system, others).template or ""
        is_named = isinstance(off, str) and re.search(rf"['\"]{off}['\"]", source) is not None
        if not (isinstance(off, bool) or is_named or ends[0][1] != ends[1][1]):
            continue
        if key in arguments:
            raise InputError(
                f"--thinking and the template argument {key} decide the same; leave out --thinking, or "
                f"--template-arg {key}."
            )
        value = on if wanted == "on" else off
        return system, {} if value is ABSENT else {key: value}
    texts = [f"{own or '' if system is None else system} {word}".strip() for word in _WORDS]
    ends = [_around(frames, text, arguments) for text in texts]
    taken = all(end is not None and word not in "".join(end) for end, word in zip(ends, _WORDS, strict=True))
    if taken and ends[0] != ends[1]:
        return texts[0 if wanted == "on" else 1], {}
    plain = frames(system, arguments)
    raise InputError(
        "The model's chat template has no switch for thinking that is known here (enable_thinking, thinking, "
        "reasoning_effort and the like), and last always lies "
        f"{last_in_words(plain.template, plain.tail)}; leave --thinking out, or give the template's own switch with "
        f"--template-arg (it knows {names_in(plain.template or '')})."
    )


def check_arguments(frames: Frames, found: PromptFrame, keys: Mapping[str, Any]) -> None:
    """Refuse an argument (`InputError`) that changes no prompt whatever its value, as a mistyped one."""
    for key in keys:
        others = {name: value for name, value in found.arguments.items() if name != key}
        tried: Iterator[Mapping[str, Any]] = iter([others, *(others | {key: value} for value in _TRIED)])
        if not any(_around(frames, found.system, given) not in (None, found.around) for given in tried):
            raise InputError(
                f"The model's chat template makes nothing of {key!r}: no value changes the prompt (it knows "
                f"{names_in(found.template or '')}); correct --template-arg, or leave it out."
            )


def _around(frames: Frames, system: str | None, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    try:
        return frames(system, arguments).around
    except UnrenderedError:
        return None


def names_in(template: str) -> str:
    """The arguments that a template mentions, in words."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template).environment
        known = meta.find_undeclared_variables(environment.parse(template)) - _USUAL - environment.globals.keys()
    except TemplateError:
        known = set()
    return ", ".join(sorted(name for name in known if not name.endswith("_token"))) or "none"
