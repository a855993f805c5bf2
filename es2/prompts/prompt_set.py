"""Labelled prompts and their splits.

The split of a prompt is a stable hash of its contrast pair, computed nowhere else: the same on every machine, and
unchanged when other prompts come or go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.errors import InputError
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.prompts.near_duplicates import near_duplicates

if TYPE_CHECKING:
    from jaxtyping import Bool, Int8


logger = logging.getLogger(__name__)

HARMFUL = 1
HARMLESS = 0
LABELS = {"harmful": HARMFUL, "harmless": HARMLESS}
LABEL_NAMES = {HARMFUL: "harmful", HARMLESS: "harmless"}

SPLITS = ("tune", "validation", "probe", "test")
FORMER_SPLITS = {"watch": "validation"}  # today's name by the one in older files
_SPLIT_ENDS = (0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Reading:
    """How files of prompts were understood, for display.

    Attributes:
        tables: for each file its name, the columns `prompt_column` and `label_column` (None where the label has another
            source, which `label_from` tells), and `values`: the label of each value of that column, and its rows.
        counts: prompts by label.
        duplicates: rows that repeat an earlier prompt.
        skipped: why rows were left out, a sentence each.
    """

    tables: tuple[Mapping[str, Any], ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    skipped: tuple[str, ...] = ()

    @property
    def system_prompts(self) -> tuple[str, ...]:
        """The first few different system turns of the chats; an empty text stands for rows without one."""
        found = [table.get("system_prompts") for table in self.tables]
        if not any(found):
            return ()
        return tuple(dict.fromkeys(text for own in found for text in own or ("",)))

    @property
    def is_plain(self) -> bool:
        """Whether nothing had to be interpreted: columns `prompt` and `label` with the two words, every row read."""
        return (
            not self.skipped
            and not self.system_prompts
            and all(
                (table["prompt_column"], table["label_column"]) == ("prompt", "label")
                and all(value == own["label"] for value, own in table["values"].items())
                for table in self.tables
            )
        )

    @property
    def sentence(self) -> str:
        """What was understood, in one line."""
        parts = []
        for table in self.tables:
            part = f"{table['file']}: prompts from {table['prompt_column']}, labels from {table['label_from']}"
            if values := table["values"]:
                named = [f"{value[:60]} = {own['label']} ({own['rows']})" for value, own in values.items()]
                part += f" ({', '.join(named[:6])}{', …' if len(named) > 6 else ''})"
            parts.append(part)
        rest = [f"{number:,} {word}" for word, number in self.counts.items()]
        if found := self.system_prompts:
            one = f"the system prompt of its chats, {_quoted(found[0])}"
            rest.append(one if len(found) == 1 else "system prompts that differ from row to row")
        rest += [f"{self.duplicates:,} duplicate(s) merged"] * bool(self.duplicates)
        rest += [f"{len(self.skipped):,} wrong row(s) left out"] * bool(self.skipped)
        return " ".join(f"Read {'; '.join(parts)}; {', '.join(rest)}.".split())  # a value may have line breaks

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, the first few skipped rows only."""
        return {
            "sentence": self.sentence,
            "tables": [dict(table) for table in self.tables],
            "counts": dict(self.counts),
            "duplicates": self.duplicates,
            "n_skipped": len(self.skipped),
            "skipped": list(self.skipped[:20]),
        }


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their labels, categories, pairs and splits, by column, in the order of the source.

    Attributes:
        name: `builtin`, a file's stem, or `hf:…`; for display only.
        texts: the prompts, without white space at either end.
        labels: 1 harmful, 0 harmless.
        categories: the source's own category, or `unspecified`.
        pairs: ids of contrast pairs, the unit of folds, bootstraps and shuffles. A prompt without a pair has an id of
            its own, made from its text.
        splits: one of `SPLITS` for each prompt.
        reading: how the file that they come from was understood; None for prompts of another origin.
    """

    name: str
    texts: tuple[str, ...]
    labels: Int8[np.ndarray, "prompt"]
    categories: tuple[str, ...]
    pairs: tuple[str, ...]
    splits: tuple[str, ...]
    reading: Reading | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """Identifies texts, labels, categories, pairs and splits, whatever their order."""
        splits = ("watch" if split == "validation" else split for split in self.splits)  # its name when keys were made
        return _digest(sorted(zip(self.texts, self.labels.tolist(), self.categories, self.pairs, splits, strict=True)))

    @cached_property
    def texts_digest(self) -> str:
        """Identifies the texts in their order: what an activation set depends on."""
        return _digest(self.texts)

    @cached_property
    def leak(self) -> str | None:
        """A warning of near-duplicates in different splits; None when there are none."""
        found = near_duplicates(self.texts, self.splits)
        if not found:
            return None
        first, second = (f"{self.texts[row][:80]!r} in {self.splits[row]}" for row in found[0])
        return (
            f"{len(found)} prompt(s) of {self.name!r} say nearly the same as one in another split, so that numbers on "
            f"`test` may flatter; give such prompts one pair id (the first: {first}, {second})."
        )

    def rendered_as(self, *given: Rendering) -> Rendering:
        """How these prompts are given to a model: what the first of `given` leaves open is as in the next one.

        A system prompt that all leave open is the one in the system turns of the prompts' own chats.

        Raises:
            InputError: when those turns differ.
        """
        chosen = AS_THE_TEMPLATE
        for one in given:
            chosen = chosen.over(one.rendering)
        own = self.reading.system_prompts if self.reading is not None and chosen.system_prompt is None else ()
        if len(own) > 1:
            first, second = (repr(text[:60]) if text else "none" for text in own[:2])
            raise InputError(
                f"The chats in {self.name!r} have different system prompts ({first}, {second}), and prompts are "
                "compared under one; give it with --system-prompt, or --system-prompt default for the template's own."
            )
        return chosen.replace(system_prompt=own[0]) if own else chosen

    def in_split(self, split: str) -> Bool[np.ndarray, "prompt"]:
        """Which prompts are in `split`."""
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; one of {', '.join(SPLITS)}.")
        return np.array([own == split for own in self.splits], dtype=bool)

    def measured(self) -> PromptSet:
        """The prompts that an analysis reads: `probe`, which fits the probes, and `test`, which gives the numbers."""
        return self._measured

    @cached_property
    def _measured(self) -> PromptSet:
        keep = self.in_split("probe") | self.in_split("test")
        return self if keep.all() else self.select(keep)

    def select(self, keep: Bool[np.ndarray, "prompt"]) -> PromptSet:
        """The prompts for which `keep` holds, in the same order."""
        return self.take(np.flatnonzero(keep).tolist())

    def take(self, rows: Sequence[int]) -> PromptSet:
        """The prompts at `rows`, in that order."""
        columns = (self.texts, self.categories, self.pairs, self.splits)
        texts, categories, pairs, splits = (tuple(column[row] for row in rows) for column in columns)
        return PromptSet(self.name, texts, self.labels[list(rows)], categories, pairs, splits, self.reading)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _digest(value: object) -> str:
    data = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def stable_hash(text: str) -> int:
    """A 64-bit hash of `text` that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_of(pair: str) -> str:
    """The split of a contrast pair: `tune` 50 %, `validation` 10 %, `probe` 20 %, `test` 20 % of the hash's range."""
    place = stable_hash("split:" + pair) / 2**64
    return next(split for split, end in zip(SPLITS, _SPLIT_ENDS, strict=True) if place < end)


def normalised(text: str) -> str:
    """The text by which duplicates are found: Unicode-composed, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def own_pair(text: str) -> str:
    """The pair id of a prompt that belongs to no pair."""
    return "text:" + hashlib.blake2b(normalised(text).encode(), digest_size=8).hexdigest()


def warn_of_likeness(prompts: PromptSet, others: PromptSet) -> None:
    """Log a warning when some of `prompts`, on which numbers are computed, are near-duplicates of some of `others`."""
    groups = ["others"] * len(others) + ["prompts"] * len(prompts)
    texts = (*others.texts, *prompts.texts)
    found = [pair for pair in near_duplicates(texts, groups) if pair[0] >= len(others)]
    if found:
        first, second = (repr(texts[row][:80]) for row in found[0])
        logger.warning(
            "%d prompt(s) of %r say nearly the same as one of %r, so numbers on them may flatter (the first: %s, %s).",
            len(found),
            prompts.name,
            others.name,
            first,
            second,
        )
