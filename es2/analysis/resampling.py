"""What decides whether a number means anything: intervals, shuffled labels and folds, all by contrast pair.

The two prompts of a pair are twins, so they are drawn, swapped and held out together; treating them as independent
would make every interval too narrow. A resample is a vector of multiplicities, one per prompt, and every number of
`es2.analysis.geometry` and `es2.analysis.probes` is a function of such weights: a thousand resamples are then one
matrix product, and base and tuned see the same ones, so that their difference has an interval of its own. All
randomness is keyed by hashes of the prompts or drawn in a canonical order, so the order in which prompts stand in a
file changes nothing.
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
    """A number with its percentile interval, `low <= value <= high`.

    Attributes:
        value: the number on the prompts as they are.
        low: lower bound.
        high: upper bound.
    """

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

    def pick(column: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(column[row] for row in rows)

    return np.array(rows, dtype=np.int64), PromptSet(
        prompts.name,
        pick(prompts.texts),
        prompts.labels[rows],
        pick(prompts.categories),
        pick(prompts.pairs),
        pick(prompts.splits),
    )


def _members(pairs: Sequence[str]) -> dict[str, list[int]]:
    members = defaultdict(list)
    for row, pair in enumerate(pairs):
        members[pair].append(row)
    return {pair: members[pair] for pair in sorted(members)}


def resample_pairs(prompts: PromptSet, n_bootstrap: int, seed: int) -> Float[np.ndarray, "resample prompt"]:
    """Multiplicities of every prompt under a bootstrap over pairs.

    Pairs are drawn with replacement among those of the same composition (so many harmful, so many harmless), so both
    classes keep their size in every resample and neither can vanish.

    Args:
        prompts: in canonical order (`canonical`).
        n_bootstrap: the number of resamples.
        seed: of the draw.

    Returns:
        `[1 + n_bootstrap, prompt]`; row 0 is all ones, the prompts as they are. In memory each prompt's multiplicities
        lie in one piece, since numbers pick and order prompts.
    """
    strata: defaultdict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for rows in _members(prompts.pairs).values():
        strata[tuple(np.bincount(prompts.labels[rows], minlength=2).tolist())].append(rows)
    weights = np.ones((1 + n_bootstrap, len(prompts)), order="F")
    generator = np.random.default_rng(seed)
    for composition in sorted(strata):
        pairs = strata[composition]
        draws = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=n_bootstrap)
        for column, rows in enumerate(pairs):
            weights[1:, rows] = draws[:, column, None]
    return weights


def drawn_together(multiplicities: Float[np.ndarray, "prompt resample"]) -> Int[np.ndarray, "prompt"]:
    """A number for each prompt, `0 …`, the same for prompts that every resample draws equally often."""
    units: dict[bytes, int] = {}
    return np.array([units.setdefault(row.tobytes(), len(units)) for row in multiplicities])


def shuffled_labels(prompts: PromptSet, n_shuffles: int, seed: int) -> Int[np.ndarray, "shuffle prompt"]:
    """Labels that mean nothing, as alike the true ones as can be: the control for every probe.

    Within a pair of both labels they are dealt out anew, which for a pair of two is a coin of its own; prompts without
    such a pair deal theirs out among themselves. Who gets which is decided by a hash of seed, shuffle and text, so the
    order of the prompts plays no part.
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
