"""Batches: balanced, drawn pairwise, the same whatever the order of the file or the number of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.training.sampling import FILMED, count_tune, held_out_rows, make_schedule, sample_batches
from tests.builders import tiny_prompts


def loose_prompts(n_harmful: int, n_harmless: int, *, n_twins: int = 0) -> PromptSet:
    """`tune` prompts without twins, and `n_twins` pairs beside them."""
    labels = [HARMFUL] * n_harmful + [HARMLESS] * n_harmless + [HARMFUL, HARMLESS] * n_twins
    pairs = [f"text:{i}" for i in range(n_harmful + n_harmless)] + [f"pair-{i // 2}" for i in range(2 * n_twins)]
    texts = tuple(f"prompt {i}" for i in range(len(labels)))
    return PromptSet(
        "loose", texts, np.array(labels, dtype=np.int8), ("x",) * len(labels), tuple(pairs), ("tune",) * len(labels)
    )


def all_in(split: str, prompts: PromptSet) -> PromptSet:
    return PromptSet(
        prompts.name, prompts.texts, prompts.labels, prompts.categories, prompts.pairs, (split,) * len(prompts)
    )


def test_twins_are_drawn_together_and_everybody_once_an_epoch() -> None:
    prompts = all_in("tune", tiny_prompts(12))
    epoch = sample_batches(prompts, 4, 3, seed=0, kl_prompts=2)
    assert sorted(row for batch in epoch for row in (*batch.harmful, *batch.harmless)) == list(range(24))
    for batch in epoch:
        for harmful, harmless in zip(batch.harmful, batch.harmless, strict=True):
            assert prompts.pairs[harmful] == prompts.pairs[harmless]
            assert (prompts.labels[harmful], prompts.labels[harmless]) == (HARMFUL, HARMLESS)


def test_only_tune_is_drawn() -> None:
    prompts = tiny_prompts(60)
    drawn = {
        row
        for batch in sample_batches(prompts, 3, 40, seed=0, kl_prompts=2)
        for row in (*batch.harmful, *batch.harmless)
    }
    assert drawn
    assert {prompts.splits[row] for row in drawn} == {"tune"}


def test_a_longer_run_begins_like_a_shorter_one_and_seeds_differ() -> None:
    prompts = all_in("tune", tiny_prompts(10))
    assert sample_batches(prompts, 4, 17, seed=3, kl_prompts=2)[:5] == sample_batches(
        prompts, 4, 5, seed=3, kl_prompts=2
    )
    assert sample_batches(prompts, 4, 5, seed=3, kl_prompts=2) != sample_batches(prompts, 4, 5, seed=4, kl_prompts=2)
    first, second = sample_batches(prompts, 10, 2, seed=3, kl_prompts=2)
    assert first != second


def test_the_order_of_the_file_changes_nothing() -> None:
    prompts = all_in("tune", tiny_prompts(10))
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = PromptSet(
        "shuffled",
        tuple(prompts.texts[row] for row in order),
        prompts.labels[order],
        prompts.categories,
        tuple(prompts.pairs[row] for row in order),
        prompts.splits,
    )
    one, other = (
        [[given_.texts[row] for row in batch.harmful] for batch in sample_batches(given_, 3, 6, seed=0, kl_prompts=2)]
        for given_ in (prompts, shuffled)
    )
    assert one == other


@given(
    n_harmful=st.integers(0, 7),
    n_harmless=st.integers(0, 7),
    n_twins=st.integers(0, 4),
    size=st.integers(2, 6),
    seed=st.integers(0, 5),
)
def test_any_tune_split_gives_balanced_batches(
    n_harmful: int, n_harmless: int, n_twins: int, size: int, seed: int
) -> None:
    prompts = loose_prompts(n_harmful, n_harmless, n_twins=n_twins)
    counts = count_tune(prompts)
    if min(counts.values()) == 0:
        return
    batches = sample_batches(prompts, size, 20, seed, kl_prompts=2)
    assert len(batches) == 20
    for batch in batches:
        assert 1 <= len(batch.harmful) == len(batch.harmless) <= size
        assert {int(prompts.labels[row]) for row in batch.harmful} == {HARMFUL}
        assert {int(prompts.labels[row]) for row in batch.harmless} == {HARMLESS}
    larger = n_twins + max(n_harmful, n_harmless)
    full_epochs = 20 * min(size, larger) // larger
    drawn = {row for batch in batches for row in (*batch.harmful, *batch.harmless)}
    if full_epochs >= 10:  # each leaves out the same number at random, so after ten all have had their turn
        assert len(drawn) == len(prompts)


def test_few_pairs_make_smaller_batches() -> None:
    batches = sample_batches(all_in("tune", tiny_prompts(3)), 16, 2, seed=0, kl_prompts=2)
    assert [len(batch.harmful) for batch in batches] == [3, 3]


def test_the_watched_are_twins_and_stay_the_same_when_others_come() -> None:
    prompts = all_in("validation", tiny_prompts(30))
    harmful, harmless = (held_out_rows(prompts, "validation", label, 8) for label in (HARMFUL, HARMLESS))
    assert [prompts.pairs[row] for row in harmful] == [prompts.pairs[row] for row in harmless]
    assert len(harmful) == 8
    fewer = all_in("validation", tiny_prompts(20))
    kept = {prompts.pairs[row] for row in harmful} & set(fewer.pairs)
    assert kept <= {fewer.pairs[row] for row in held_out_rows(fewer, "validation", HARMFUL, 8)}


def test_the_plan_names_every_prompt_that_is_looked_at_and_no_other() -> None:
    prompts = tiny_prompts(80)
    plan = make_schedule(prompts, 4, 3, seed=0, validation_prompts=2, kl_prompts=2)
    assert {prompts.splits[row] for row in plan.rows} == {"tune", "validation", "test"}
    assert plan.validation.texts == tuple(prompts.texts[row] for row in plan.validation_rows)
    assert len(plan.validation_rows) == 4
    assert len(plan.tested) == 2
    assert all(prompts.labels[row] == HARMLESS for row in plan.tested)
    assert len(plan.rows) == 24 + 4 + 2
    assert plan.filmed == (0, 1, 2, 3)


def test_at_most_a_hundred_of_each_label_are_filmed_and_more_validated_ones_change_none() -> None:
    prompts = all_in("validation", tiny_prompts(130))
    prompts = replace(prompts, splits=tuple("tune" if row < 20 else "validation" for row in range(len(prompts))))
    many, fewer = (make_schedule(prompts, 4, 1, 0, validation_prompts=n, kl_prompts=2) for n in (120, 104))
    assert len(many.filmed) == FILMED
    assert many.validation.labels[list(many.filmed)].sum() == FILMED // 2
    assert many.validation.take(many.filmed).texts == fewer.validation.take(fewer.filmed).texts
