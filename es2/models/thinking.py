"""What the end of a prompt does with a model's thinking, read from the markers of its chat template, not from its name.

Models are compared at the end of the prompt, which for some lies inside a thinking block, for some behind an empty one.
"""

from __future__ import annotations

import re
from typing import Literal

Thinking = Literal["opened", "closed", "none"]

_MARKER = re.compile(r"<[^<>\s][^<>]*>|\[[^\[\]\s][^\[\]]*\]|◁[^◁▷]+▷")
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
        is_mirrored = not name.startswith(("|", "｜")) and name.endswith(("|", "｜"))  # <channel|> ends <|channel>
        closes = is_mirrored or _CLOSES.search(name.strip("|｜")) is not None
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


def _is_name(words: str) -> bool:
    """Whether words between two markers are the name of a thinking block."""
    return words.isalpha() and _THINKS.search(words) is not None
