"""What an analysis is about: which rows fit the probes, which give the numbers, and what is refused first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.geometry import Resampled
from es2.analysis.probes import twins_of
from es2.analysis.resampling import Interval, Replicates, canonical, fold_of, intervals, resample_pairs, shuffled_labels
from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet, normalised
from es2.store.sources import TestSet

if TYPE_CHECKING:
    from jaxtyping import Int


MIN_PER_LABEL = 2


@dataclass(frozen=True)
class AnalysisSetup:
    """What all layers and both models share: prompts, weights, folds and shuffled labels."""

    config: AnalysisConfig
    probe_rows: Int[np.ndarray, "probe"]
    probe_labels: Int[np.ndarray, "probe"]
    probe_folds: Int[np.ndarray, "probe"]
    probe_shuffles: Int[np.ndarray, "shuffle probe"]
    test_rows: Int[np.ndarray, "test"]
    test_shuffles: Int[np.ndarray, "shuffle test"]
    test_twins: Int[np.ndarray, "2 pair"] | None
    resampled: Resampled
    in_domain_folds: Int[np.ndarray, "test"] | None

    def intervals(self, replicates: Mapping[str, Replicates]) -> dict[str, Interval]:
        return intervals(replicates, self.config.confidence)


def check_prompts(prompts: PromptSet, test_prompts: PromptSet | None = None) -> None:
    """Refuse prompts that cannot be analysed, before anything is captured; arguments as for `analyze`.

    Raises:
        InputError: when a label is missing where both are needed, or a test prompt is also among `prompts`.
    """
    if test_prompts is not None:
        known = {normalised(text) for text in prompts.texts}
        shared = sum(normalised(text) in known for text in test_prompts.texts)
        if shared:
            raise InputError(
                f"{shared} test prompts of {test_prompts.name!r} also stand in {prompts.name!r}; leave them out."
            )
    _check_labels(prompts.select(prompts.in_split("probe")), f"The `probe` split of {prompts.name!r}", "a probe")
    if test_prompts is None:
        _check_labels(prompts.select(prompts.in_split("test")), f"The `test` split of {prompts.name!r}", "the numbers")
    else:
        _check_labels(test_prompts, f"The test set {test_prompts.name!r}", "the numbers")


def make_setup(prompts: PromptSet, test: TestSet | None, config: AnalysisConfig) -> AnalysisSetup:
    check_prompts(prompts, None if test is None else test.prompts)
    probe_rows, probe = canonical(prompts, "probe")
    test_rows, measured = canonical(prompts, "test") if test is None else canonical(test.prompts)
    test_shuffles = shuffled_labels(measured, config.n_shuffles, config.seed)
    weights = resample_pairs(measured, config.n_bootstrap, config.seed)
    return AnalysisSetup(
        config,
        probe_rows,
        probe.labels,
        fold_of(probe, config.n_folds),
        shuffled_labels(probe, config.n_shuffles, config.seed),
        test_rows,
        test_shuffles,
        twins_of(test_shuffles.T, weights),
        Resampled.of(measured.labels, weights),
        None if test is None else fold_of(measured, config.n_folds),
    )


def count_labels(labels: Int[np.ndarray, "prompt"]) -> dict[str, int]:
    return {LABEL_NAMES[label]: int((labels == label).sum()) for label in (HARMFUL, HARMLESS)}


def _check_labels(prompts: PromptSet, whose: str, what: str) -> None:
    counts = count_labels(prompts.labels)
    if min(counts.values()) < MIN_PER_LABEL:
        found = " and ".join(f"{number} {label}" for label, number in counts.items())
        raise InputError(
            f"{whose} has {found} prompts, {what} need{'s' if what.startswith('a ') else ''} at least "
            f"{MIN_PER_LABEL} of each label (a few dozen to mean anything); add prompts, or a `split` column."
        )
