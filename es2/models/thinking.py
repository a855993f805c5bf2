"""What the end of a prompt does with a model's thinking, read from the markers of its chat template, not from its name.

Models are compared at the end of the prompt, which for some lies inside a thinking block, for some behind an empty one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Thinking = Literal["opened", "closed", "none"]

ABSENT = object()
"""In the place of a value: the template does not get the argument."""

SWITCHES: tuple[tuple[str, Any, Any], ...] = (
    ("enable_thinking", True, False),
    ("thinking", True, False),
    ("enable_think", True, False),
    ("think", True, False),
    ("use_thinking", True, False),
    ("thinking_enabled", True, False),
    ("enable_reasoning", True, False),
    ("reasoning", True, False),
    ("disable_thinking", False, True),
    ("no_thinking", False, True),
    ("skip_thinking", False, True),
    ("skip_think", False, True),
    ("thinking_mode", "on", "off"),
    ("thinking_mode", "thinking", "chat"),
    ("thinking_mode", "enabled", "disabled"),
    ("reasoning_mode", "on", "off"),
    ("thinking", "on", "off"),
    ("thinking", "enabled", "disabled"),
    ("reasoning_effort", "high", "none"),
    ("thinking_budget", ABSENT, 0),
)
"""What templates call their switch of thinking, with its values for on and off."""

_MARKER = re.compile(r"<[^<>\s][^<>]*>|\[[^\[\]\s][^\[\]]*\]|◁[^◁▷]+▷")
_IN_SOURCE = re.compile(r"<[^<>\s'\"{}]+>|\[/?[A-Z_]+\]|◁[^◁▷]+▷")  # a marker, and no index or comparison of a template
_THINKS = re.compile(
    r"(?<!no)(?<!no[-_ ])(think|thought|reason|reflect|analysis|rationale|scratchpad)|(^|[^a-z])(cot|inner)([^a-z]|$)"
)
_CLOSES = re.compile(r"^[/\\]|(^|[^a-z])(end|close|stop|suffix)|(end|close|stop|suffix)([^a-z]|$)")


def thinking_of(tail: str) -> Thinking:
    """What the end of a rendered prompt, after the user's text, does with the model's thinking.

    A marker is a word in brackets, such as `<think>`, `[THINK]` or `<|START_THINKING|>`, and may be followed by its
    name, as in `<|channel>thought`.

    Returns:
        `opened` where the model goes on inside a thinking block, `closed` where a block is behind it, empty or closed
        without having been opened, and `none` where there is none (the model may open one by itself).
    """
    state: Thinking = "none"
    depth = 0
    markers = list(_MARKER.finditer(tail))
    ends = [*(marker.start() for marker in markers), len(tail)][1:]
    heading = ""  # what follows the marker before
    for marker, end in zip(markers, ends, strict=True):
        before, heading = heading, tail[marker.end() : end]
        name = marker[0][1:-1].lower()
        closes = _closes(name)
        if closes and _THINKS.search(name):
            depth = max(depth - 1, 0)
            state = "opened" if depth else "closed"
        elif not closes and (_THINKS.search(name) or _is_name(heading.strip().lower())):
            state, depth = "opened", depth + 1
        elif state == "opened" and (closes or not _is_name(before.lower())):  # else the end of a heading
            state, depth = "closed", 0
    words = tail[markers[-1].end() if markers else 0 :].rstrip().lower()
    if state == "none" and words.endswith(":") and _THINKS.search(words):
        return "opened"  # in words, as in "Here are my reasoning steps:"
    return state


def last_in_words(template: str | None, tail: str) -> str:
    """Where the last token of a prompt lies, in words: of a template, and what it puts after a user's text."""
    if template is None:
        return "on the last token of the text, which is given without a chat template"
    state = thinking_of(tail)
    if state == "opened":
        return "inside a thinking block that the prompt opens, before any thinking"
    if state == "closed":
        between = _MARKER.split(tail[: tail.rfind(_MARKER.findall(tail)[-1])])[-1]
        opens = any(_is_opening(marker) for marker in _MARKER.findall(tail))
        block = "an empty thinking block" if opens and not between.strip() else "the end of a thinking block"
        return f"after {block}, before the answer"
    if not tail.strip():
        return "after the user's text, without a generation prompt"
    may_think = any(_is_opening(marker) for marker in _IN_SOURCE.findall(template))
    return f"at the end of the generation prompt, before the reply{', which may begin with thinking' * may_think}"


@dataclass(frozen=True)
class ReplyThinking:
    """How a reply thinks before it answers.

    Attributes:
        opens: what a reply begins with that thinks; None where that is not known, or the prompt has opened the block.
        closes: what stands between thinking and answer.
        opened: whether the prompt ends inside a thinking block.
    """

    opens: str | None
    closes: str
    opened: bool

    def answer_at(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int | None:
        """The index of a reply's first token after the thinking: 0 where it does not think, None where it never ends.

        `decode` gives the text of tokens, special ones included.
        """
        text = decode(tokens)
        begun = self.opened or (self.opens is not None and text.lstrip().startswith(self.opens))
        if self.closes not in text or not (begun or self.opens is None):
            return None if begun else 0
        low, high = 1, len(tokens)  # the fewest tokens that hold the end of the thinking
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.closes in decode(tokens[:middle]) else (middle + 1, high)
        return low


def answer_reader(tokenizer: Any, thinking: ReplyThinking | None) -> Callable[[Sequence[int]], str]:
    """Gives the text of a reply's tokens after its thinking: empty where that never ends."""

    def read(reply: Sequence[int]) -> str:
        tokens = list(reply)
        decode = partial(tokenizer.decode, skip_special_tokens=False)
        start = 0 if thinking is None else thinking.answer_at(tokens, decode)
        return "" if start is None else str(tokenizer.decode(tokens[start:], skip_special_tokens=True))

    return read


def marks_between(head: str, between: str) -> tuple[str | None, str] | None:
    """The markers around thinking, from what a template puts before it and between it and the answer in a past turn."""
    closing = [marker for marker in _MARKER.findall(between) if _is_closing(marker)]
    if not closing and re.search(r"final|answer|response", between.lower()) is None:
        return None
    return head.strip() or None, closing[-1] if closing else between.strip()


def marks_in_source(template: str, tail: str) -> tuple[str | None, str] | None:
    """The markers around thinking that a template mentions: those of the block at the end of the prompt, if any."""
    found = list(dict.fromkeys([*_MARKER.findall(tail), *_IN_SOURCE.findall(template)]))
    closing = [marker for marker in found if _is_closing(marker)]
    opening = [marker for marker in found if _is_opening(marker)]
    if not closing:
        return None
    for opens in opening:
        for closes in closing:
            if _stem(opens) == _stem(closes):
                return opens, closes
    return (opening[0] if opening else None), closing[0]


def _stem(marker: str) -> str:
    """A marker's name without what says that it begins or ends."""
    return re.sub(r"[^a-z]|begin|start|open|prefix|end|close|stop|suffix|_of_", "", marker.lower())


def _is_closing(marker: str) -> bool:
    """Whether a marker ends a thinking block."""
    name = marker[1:-1].lower()
    return _THINKS.search(name) is not None and _closes(name)


def _is_opening(marker: str) -> bool:
    """Whether a marker opens a thinking block."""
    name = marker[1:-1].lower()
    return _THINKS.search(name) is not None and not _closes(name)


def _closes(name: str) -> bool:
    """Whether the name of a marker says that something ends."""
    is_mirrored = not name.startswith(("|", "｜")) and name.endswith(("|", "｜"))  # <channel|> ends <|channel>
    return is_mirrored or _CLOSES.search(name.strip("|｜")) is not None


def _is_name(words: str) -> bool:
    """Whether words between two markers are the name of a thinking block."""
    return words.isalpha() and _THINKS.search(words) is not None
