"""Intervals, shuffled labels and folds, all by contrast pair: twins are resampled, swapped and held out together.

A resample is a vector of multiplicities, one per prompt, and numbers are functions of such weights, so a thousand
resamples are one matrix product, and base and tuned share them. The order of prompts in a file changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from es2.prompts.prompt_set import HARMFUL, PromptSet, stable_hash

if TYPE_CHECKING:
    from jaxtyping import Float, Int


Replicates: TypeAlias = 'Float[np.ndarray, "resample"]'
"""One number under every resample; entry 0 is the number itself, on the prompts as they are."""

RATIO_LIMIT = 1e6
"""A ratio whose denominator vanishes is reported as this, so that no infinity reaches a file."""


@dataclass(frozen=True)
class Interval:
    """A number, on the prompts as they are, with its percentile interval, `low <= value <= high`."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The three numbers by name."""
        return asdict(self)


def interval(replicates: Replicates, confidence: float = 0.95) -> Interval:
    """The percentile interval of a number, widened to hold the number itself where resampling moves it to one side."""
    return intervals({"number": replicates}, confidence)["number"]


def intervals(replicates: Mapping[str, Replicates], confidence: float = 0.95) -> dict[str, Interval]:
    """`interval` of several numbers, by their names."""
    tail = (1 - confidence) / 2
    stacked = np.stack(list(replicates.values()))
    lows, highs = np.quantile(stacked[:, 1:], [tail, 1 - tail], axis=1)
    values = stacked[:, 0]
    bounds = np.stack([values, np.minimum(lows, values), np.maximum(highs, values)], axis=1)
    return {name: Interval(*own) for name, own in zip(replicates, bounds.tolist(), strict=True)}


def safe_ratio(
    numerator: Float[np.ndarray, "*shape"], denominator: Float[np.ndarray, "*shape"], *, both_zero: float
) -> Float[np.ndarray, "*shape"]:
    """`numerator / denominator` of non-negative numbers, never above `RATIO_LIMIT`; `both_zero` where both vanish."""
    limited = np.maximum(denominator, numerator / RATIO_LIMIT)
    vanishes = limited <= 0
    return np.where(vanishes, both_zero, np.minimum(numerator / np.where(vanishes, 1.0, limited), RATIO_LIMIT))


def canonical(prompts: PromptSet, split: str | None = None) -> tuple[Int[np.ndarray, "row"], PromptSet]:
    """The rows of a split (of the whole set without one) ordered by pair, label and text, and the prompts at them."""
    found = range(len(prompts)) if split is None else np.flatnonzero(prompts.in_split(split)).tolist()
    rows = sorted(found, key=lambda row: (prompts.pairs[row], int(prompts.labels[row]), prompts.texts[row]))
    return np.array(rows, dtype=np.int64), prompts.take(rows)


def _members(pairs: Sequence[str]) -> dict[str, list[int]]:
    members = defaultdict(list)
    for row, pair in enumerate(pairs):
        members[pair].append(row)
    return {pair: members[pair] for pair in sorted(members)}


def resample_pairs(prompts: PromptSet, n_bootstrap: int, seed: int) -> Float[np.ndarray, "resample prompt"]:
    """Multiplicities of every prompt under a bootstrap over pairs.

    Pairs are resampled with replacement among those of the same composition (numbers of harmful and of harmless
    prompts), so both classes keep their size.

    Args:
        prompts: in canonical order (`canonical`).
        n_bootstrap: number of resamples.

    Returns:
        `[1 + n_bootstrap, prompt]`; row 0 is all ones, the prompts as they are. Each prompt's multiplicities are
        contiguous, since numbers pick and order prompts.
    """
    strata: defaultdict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for rows in _members(prompts.pairs).values():
        strata[tuple(np.bincount(prompts.labels[rows], minlength=2).tolist())].append(rows)
    weights = np.ones((1 + n_bootstrap, len(prompts)), order="F")
    generator = np.random.default_rng(seed)
    for composition in sorted(strata):
        pairs = strata[composition]
        counts = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=n_bootstrap)
        for column, rows in enumerate(pairs):
            weights[1:, rows] = counts[:, column, None]
    return weights


def drawn_together(multiplicities: Float[np.ndarray, "prompt resample"]) -> Int[np.ndarray, "prompt"]:
    """A number for each prompt, `0 …`, the same for prompts of equal multiplicities in every resample."""
    units: dict[bytes, int] = {}
    return np.array([units.setdefault(row.tobytes(), len(units)) for row in multiplicities])


def shuffled_labels(prompts: PromptSet, n_shuffles: int, seed: int) -> Int[np.ndarray, "shuffle prompt"]:
    """Shuffled labels, the control for every probe.

    Labels are shuffled within pairs of both labels, and among all prompts without such a pair, by a hash of seed,
    shuffle and text, so the order of the prompts changes nothing.
    """
    blocks: list[list[int]] = []
    loose: list[int] = []
    for rows in _members(prompts.pairs).values():
        if len(set(prompts.labels[rows].tolist())) == 2:
            blocks.append(rows)
        else:
            loose += rows
    blocks.append(loose)
    to_deal = [(rows, int((prompts.labels[rows] == HARMFUL).sum())) for rows in blocks]
    shuffled = np.full((n_shuffles, len(prompts)), 1 - HARMFUL, dtype=np.int64)
    for shuffle in range(n_shuffles):
        keys = [(stable_hash(f"shuffle:{seed}:{shuffle}:{text}"), text) for text in prompts.texts]
        dealt = [row for rows, n_harmful in to_deal for row in sorted(rows, key=keys.__getitem__)[:n_harmful]]
        shuffled[shuffle, dealt] = HARMFUL
    return shuffled


def fold_of(prompts: PromptSet, n_folds: int) -> Int[np.ndarray, "prompt"]:
    """Every prompt's cross-validation fold, `0 … n_folds − 1`: a hash of its pair, so twins are held out together."""
    return np.array([stable_hash("fold:" + pair) % n_folds for pair in prompts.pairs], dtype=np.int64)
