"""Near-duplicates in different splits, where a probe fitted on one prompt has seen the other.

Two prompts are near-duplicates when their words are equal, whatever case and punctuation, or, from eight words on, all
words but one. Each prompt is looked up by its words and by its words less one, in linear time.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

FEWEST_WORDS = 8  # shorter prompts that differ in a word are different requests
MOST_WORDS = 100  # longer prompts are only compared as wholes

_WORD = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str], groups: Sequence[str]) -> list[tuple[int, int]]:
    """Rows of near-duplicates in different groups (splits or sets): each later one with the first, ascending."""
    firsts: defaultdict[int, dict[str, int]] = defaultdict(dict)
    found = []
    for row, (text, group) in enumerate(zip(texts, groups, strict=True)):
        alike = []
        for key in _keys(text):
            rows = firsts[key]
            alike += [other for of, other in rows.items() if of != group]
            rows.setdefault(group, row)
        if alike:
            found.append((row, min(alike)))
    return found


def _keys(text: str) -> Iterator[int]:
    words = tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or (text,)
    yield hash(words)
    if FEWEST_WORDS <= len(words) <= MOST_WORDS:
        for place in range(len(words)):
            yield hash((*words[:place], *words[place + 1 :]))
