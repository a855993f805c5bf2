"""The prompts of a fine-tune's steps and validations, as pure functions of the prompt set, the seed and the step.

So a resumed run samples the batches of the uninterrupted one, every process knows the whole batch without asking the
others, and nothing is computed for prompts that no batch contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from es2.analysis.resampling import canonical
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet, stable_hash

FILMED = 200
"""Number of `validation` prompts whose embeddings are kept at every validation, at most."""

_BASE_PAIRS = 128  # enough for a mean length; all of `tune` would take as long as several steps


@dataclass(frozen=True)
class Batch:
    """The prompts of one step, as rows of the prompt set: as many harmful as harmless ones.

    Attributes:
        harmful: rows of harmful prompts.
        harmless: of harmless prompts; where the set has pairs, the twins of `harmful`, in the same order.
        n_kl: number of harmless prompts, from the first on, whose KL is taken too. Couples come in random order, so it
            is an unbiased estimate of the KL of all.
    """

    harmful: tuple[int, ...]
    harmless: tuple[int, ...]
    n_kl: int


@dataclass(frozen=True)
class BatchSchedule:
    """The prompts that a fine-tune needs, as rows of the prompt set.

    Attributes:
        batches: of all steps.
        validation: the `validation` prompts, in canonical order.
        validation_rows: their rows.
        validation_kl: the half of their harmless ones whose KL is taken too: logits cost most.
        validation_replied: the half of their harmful ones that the base replies to, to see which it refuses.
        filmed: places among them of those whose embeddings are kept at every validation, at most `FILMED`.
        tested: harmless `test` prompts.
    """

    batches: tuple[Batch, ...]
    validation: PromptSet
    validation_rows: tuple[int, ...]
    validation_kl: tuple[int, ...]
    validation_replied: tuple[int, ...]
    filmed: tuple[int, ...]
    tested: tuple[int, ...]

    @cached_property
    def harmless(self) -> tuple[int, ...]:
        """Every harmless `tune` prompt in any batch."""
        return tuple(sorted({row for batch in self.batches for row in batch.harmless}))

    @cached_property
    def base_harmful(self) -> tuple[int, ...]:
        """The harmful `tune` prompts that the constants of the base are taken over: the first in the batches."""
        return tuple(dict.fromkeys(row for batch in self.batches for row in batch.harmful))[:_BASE_PAIRS]

    @cached_property
    def base_harmless(self) -> tuple[int, ...]:
        """The harmless ones, likewise."""
        return tuple(dict.fromkeys(row for batch in self.batches for row in batch.harmless))[:_BASE_PAIRS]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Every prompt of a batch, a validation or the test."""
        tuned = {row for batch in self.batches for row in (*batch.harmful, *batch.harmless)}
        return tuple(sorted({*tuned, *self.validation_rows, *self.tested}))


def make_schedule(
    prompts: PromptSet, pairs_per_step: int, steps: int, seed: int, validation_prompts: int, kl_prompts: int
) -> BatchSchedule:
    """The batches of all steps, and at most `validation_prompts` of each label of `validation` and `test`."""
    chosen = np.zeros(len(prompts), dtype=bool)
    for label in (HARMFUL, HARMLESS):
        chosen[held_out_rows(prompts, "validation", label, validation_prompts)] = True
    order, validation = canonical(prompts.select(chosen))
    rows = np.flatnonzero(chosen)[order].tolist()
    filmed = {row for label in LABEL_NAMES for row in held_out_rows(prompts, "validation", label, FILMED // 2)}
    half = max(1, validation_prompts // 2)
    return BatchSchedule(
        batches=tuple(sample_batches(prompts, pairs_per_step, steps, seed, kl_prompts)),
        validation=validation,
        validation_rows=tuple(rows),
        validation_kl=tuple(held_out_rows(prompts, "validation", HARMLESS, half)),
        validation_replied=tuple(held_out_rows(prompts, "validation", HARMFUL, half)),
        filmed=tuple(place for place, row in enumerate(rows) if row in filmed),
        tested=tuple(held_out_rows(prompts, "test", HARMLESS, validation_prompts)),
    )


def sample_batches(prompts: PromptSet, pairs_per_step: int, steps: int, seed: int, kl_prompts: int) -> list[Batch]:
    """The batches of all steps, sampled from `tune` epoch by epoch without replacement.

    Twins stay together. Prompts without a twin are coupled at random, anew in every epoch, the smaller class repeating
    itself. A set of fewer pairs than `pairs_per_step` gives smaller batches; no batch contains a prompt twice unless a
    label has fewer prompts than the batch has pairs.
    """
    batches: list[Batch] = []
    epoch = 0
    while len(batches) < steps:
        generator = np.random.default_rng([seed, epoch])
        couples = _couples(prompts, generator)
        size = min(pairs_per_step, len(couples))
        order = generator.permutation(len(couples))
        for start in range(0, len(couples) - size + 1, size):
            harmful, harmless = zip(*(couples[index] for index in order[start : start + size]), strict=True)
            batches.append(Batch(harmful, harmless, min(kl_prompts, size)))
        epoch += 1
    return batches[:steps]


def _couples(prompts: PromptSet, generator: np.random.Generator) -> list[tuple[int, int]]:
    """(harmful row, harmless row) for one epoch: the twins, then what has no twin, both labels in random order."""
    by_pair: dict[str, tuple[list[int], list[int]]] = {}
    for row in canonical(prompts, "tune")[0].tolist():
        sides = by_pair.setdefault(prompts.pairs[row], ([], []))
        sides[0 if prompts.labels[row] == HARMFUL else 1].append(row)
    couples = [couple for sides in by_pair.values() for couple in zip(*sides, strict=False)]
    left = []
    for side in (0, 1):
        twinned = {couple[side] for couple in couples}
        alone = [row for sides in by_pair.values() for row in sides[side] if row not in twinned]
        left.append(generator.permutation(alone).tolist() if alone else [])
    if not any(left):
        return couples
    # Where all prompts of one label have a twin, they serve a second time.
    pools = [
        alone or generator.permutation([couple[side] for couple in couples]).tolist() for side, alone in enumerate(left)
    ]
    return couples + [tuple(pool[index % len(pool)] for pool in pools) for index in range(max(map(len, left)))]


def held_out_rows(prompts: PromptSet, split: str, label: int, limit: int) -> list[int]:
    """At most `limit` prompts of one label of a split, as rows: those whose pair has the smallest hash.

    Twins share a hash, so the harmful and the harmless prompts chosen are twins of each other.
    """
    rows = np.flatnonzero(prompts.in_split(split) & (prompts.labels == label)).tolist()
    rows.sort(key=lambda row: (stable_hash("watch:" + prompts.pairs[row]), prompts.texts[row]))
    return rows[:limit]


def count_tune(prompts: PromptSet) -> dict[int, int]:
    """Number of `tune` prompts of each label."""
    return {label: int((prompts.in_split("tune") & (prompts.labels == label)).sum()) for label in (HARMFUL, HARMLESS)}
