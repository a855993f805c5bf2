"""Prompts that say nearly the same and stand in different splits: what is fitted on one has seen the other.

The hash of a pair keeps twins together, and a prompt without a pair falls where its normalised text falls; but a file
may hold one request twice under two pair ids, or with another comma or one other word. Two prompts are nearly the same
here when their words are, whatever their case and punctuation, or, from eight words on, all their words but one. Each
prompt is looked up under its words and under its words less one, so that this takes no comparison of all with all.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

FEWEST_WORDS = 8
"""Shorter prompts differ in what they ask for when they differ in a word."""
MOST_WORDS = 100
"""Longer prompts are only compared as wholes."""

_WORD = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str], groups: Sequence[str]) -> list[tuple[int, int]]:
    """Each text that says nearly the same as one in another group, with the first such.

    Args:
        texts: prompts.
        groups: the split, or the set, that each belongs to.

    Returns:
        Rows of the two, the later one first, ascending.
    """
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
