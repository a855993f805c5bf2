"""The scale-free numbers of a fine-tune on `validation`, and the rule for λ, the best step and the end of the run.

The rule is a function of all measurements so far, so a resumed run decides as the uninterrupted one does. Each pair is
measured along the direction of all others: along their own direction even two clouds of noise are apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.geometry import Resampled, cloud_numbers, fit_frame
from es2.analysis.resampling import RATIO_LIMIT, resample_pairs
from es2.analysis.verdict import (
    COLLAPSED_KL_BUDGETS,
    COLLAPSED_RANK_RATIO,
    LEAST_REFUSALS,
    LEAST_REFUSALS_KEPT,
    TOLERATED_BROKEN_RISE,
)
from es2.prompts.prompt_set import HARMFUL, PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float


PATIENCE = 3  # measurements in a row over the KL budget, λ doubled after each, that stop the run

REFUSAL_OPENING = 4  # tokens of a refusal: enough to tell "I'm sorry, but" from "I'm happy to"

_N_BOOTSTRAP = 100  # for the bias of fisher_ratio, which resamples estimate

REFUSAL_NUMBERS = ("refusals_kept", "refusal_agreement", "refusal_log_prob", "broken_first")
"""What a validation says of replies to harmful prompts."""


@dataclass(frozen=True)
class ValidationPoint:
    """What was measured on `validation` after one step.

    Attributes:
        step: number of optimizer steps; 0 is the base model.
        kl_prompt: mean KL(base ‖ tuned) in nats per token over harmless prompts' own tokens.
        kl_reply: the same over the base's replies.
        layers: numbers by target layer: `fisher_ratio`, `relative_distance`, `mean_difference_margin` (each pair along
            the direction of the others), `effective_rank`, `orthogonal_std_ratio`, `norm_ratio`, `centroid_distance`.
        n_refusals: number of harmful prompts that the base refuses, of those that it was asked.
        refusals_kept: share of these whose greedy reply begins with the first `REFUSAL_OPENING` tokens of the base's.
        refusal_agreement: share of the tokens of the base's refusals that are the first choice, given those before.
        refusal_log_prob: mean log-probability of these tokens in nats, likewise. These three are None where the base
            refuses nothing, and where they were not measured.
        broken_first: share of harmful prompts whose greedy reply ends at once, or begins with a token without letter
            and digit; None where it was not measured.
    """

    step: int
    kl_prompt: float
    kl_reply: float
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    n_refusals: int = 0
    refusals_kept: float | None = None
    refusal_agreement: float | None = None
    refusal_log_prob: float | None = None
    broken_first: float | None = None

    def mean(self, name: str) -> float:
        """The mean of a number over the target layers."""
        return float(np.mean([numbers[name] for numbers in self.layers.values()]))

    @property
    def score(self) -> float:
        """The criterion of the best step: mean_difference_margin, which neither inflation nor contraction raises."""
        return self.mean("mean_difference_margin")

    @property
    def kl(self) -> float:
        """The larger of the two KLs; each has to stay within the budget."""
        return max(self.kl_prompt, self.kl_reply)

    @property
    def is_finite(self) -> bool:
        """Whether both KLs and the numbers of every layer are numbers."""
        layers = [value for numbers in self.layers.values() for value in numbers.values()]
        return all(map(math.isfinite, (self.kl_prompt, self.kl_reply, *layers)))

    def numbers(self, base: ValidationPoint) -> dict[str, float]:
        """The numbers for the event log: means over the target layers, and the others where they were measured.

        Of the base those that are not known without measuring are repeated: a curve is read against them.
        """
        found: dict[str, float | None] = {name: self.mean(name) for name in next(iter(self.layers.values()))}
        found |= {name: getattr(self, name) for name in ("kl_prompt", "kl_reply", *REFUSAL_NUMBERS)}
        found |= {f"base_{name}": getattr(base, name) for name in ("refusal_log_prob", "broken_first")}
        return {f"validation_{name}": value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": {str(layer): numbers for layer, numbers in self.layers.items()}}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ValidationPoint:
        layers = {int(layer): dict(numbers) for layer, numbers in document["layers"].items()}
        given = {name: document[name] for name in REFUSAL_NUMBERS if document.get(name) is not None}  # not in old ones
        shares = {name: float(value) for name, value in given.items()}
        return cls(
            int(document["step"]),
            float(document["kl_prompt"]),
            float(document["kl_reply"]),
            layers,
            int(document.get("n_refusals", 0)),
            **shares,
        )


def validation_numbers(
    prompts: PromptSet,
    base: Float[np.ndarray, "prompt d_model"],
    tuned: Float[np.ndarray, "prompt d_model"],
) -> dict[str, float]:
    """The scale-free numbers of one target layer, from prompts of at least two pairs, both labels among them."""
    resampled = Resampled.of(prompts.labels, resample_pairs(prompts, _N_BOOTSTRAP, seed=0))
    clouds = []
    for embeddings in (base, tuned):
        numbers = cloud_numbers(embeddings, fit_frame(embeddings, prompts.labels), resampled)
        clouds.append({name: float(replicates[0]) for name, replicates in numbers.items()})
    before, after = clouds
    return {
        "fisher_ratio": after["fisher_ratio"],
        "relative_distance": after["relative_distance"],
        "mean_difference_margin": held_out_margin(prompts, tuned),
        "effective_rank": after["effective_rank"],
        "orthogonal_std_ratio": _ratio(after["orthogonal_std"], before["orthogonal_std"]),
        "norm_ratio": _ratio(after["mean_norm"], before["mean_norm"]),
        "centroid_distance": after["centroid_distance"],
    }


def held_out_margin(prompts: PromptSet, embeddings: Float[np.ndarray, "prompt d_model"]) -> float:
    """`mean_difference_margin`, every pair measured with the direction, the midpoint and the scale of all other pairs.

    A pair without which a label has no prompts is not measured; 0 if none is.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    pairs = np.array(prompts.pairs)
    margins: dict[bool, list[float]] = {True: [], False: []}
    for pair in dict.fromkeys(prompts.pairs):
        own = pairs == pair
        if len(set(prompts.labels[~own].tolist())) < 2:
            continue
        frame = fit_frame(embeddings[~own], prompts.labels[~own])
        along = frame.normalise(embeddings[own]) @ frame.direction
        for label, value in zip(prompts.labels[own].tolist(), along.tolist(), strict=True):
            margins[label == HARMFUL].append(value if label == HARMFUL else -value)
    return float(np.mean([np.mean(values) if values else 0.0 for values in margins.values()]))


def _ratio(after: float, before: float) -> float:
    if before <= after / RATIO_LIMIT:
        return RATIO_LIMIT if after > 0 else 1.0
    return after / before


@dataclass(frozen=True)
class Decision:
    """The consequences of all measurements so far.

    Attributes:
        kl_weight: λ from here on.
        times_over: number of latest measurements in a row over the KL budget.
        best_step: of the weights to keep; 0 is the base.
        reason: why the run must stop, or has no result, in a sentence; `None` if neither.
    """

    kl_weight: float
    times_over: int = 0
    best_step: int = 0
    reason: str | None = None


def decide(validations: Sequence[ValidationPoint], kl_weight: float, kl_budget: float, last_step: int) -> Decision:
    """The rule: λ doubles with every measurement over the KL budget (nats per token, for each KL).

    The best step has the highest score within the budget; a collapsed one is never the best, and one that lost
    behaviour (`behaviour_lost`) only where all that are better than the base did. `validations` begin with the base's,
    `kl_weight` is λ at the start.
    """
    base = best = validations[0]

    def rank(point: ValidationPoint) -> tuple[bool, float]:
        return behaviour_lost(point, base) is None, point.score

    times_over, reason = 0, None
    for point in validations[1:]:
        is_over = not point.kl <= kl_budget  # NaN is over, too
        times_over = times_over + 1 if is_over else 0
        reason = reason_to_stop(point, base, kl_budget, times_over)
        if is_over:
            kl_weight *= 2
        elif reason is None and point.score > base.score and (best is base or rank(point) > rank(best)):
            best = point
    if reason is None and times_over == len(validations) - 1 and validations[-1].step == last_step:
        reason = (
            f"No step kept the KL on harmless prompts within the budget of {kl_budget:g} nats; "
            "lower the learning rate or raise the KL weight."
        )
    return Decision(kl_weight, times_over, best.step, reason)


def behaviour_lost(point: ValidationPoint, base: ValidationPoint) -> str | None:
    """What a step lost of the base's behaviour on harmful `validation` prompts, in words; None if nothing."""
    kept = point.refusals_kept
    if kept is not None and point.n_refusals >= LEAST_REFUSALS and kept < LEAST_REFUSALS_KEPT:
        return f"begins {kept:.2f} of the base's {point.n_refusals} refusals as the base does"
    before, after = base.broken_first, point.broken_first
    if before is not None and after is not None and after - before > TOLERATED_BROKEN_RISE:
        return f"breaks the first token of {after:.2f} of its replies (base: {before:.2f})"
    return None


def reason_to_stop(point: ValidationPoint, base: ValidationPoint, kl_budget: float, times_over: int) -> str | None:
    """Why the run must stop after `point`, in a sentence; `None` if it may go on.

    `times_over` counts the measurements in a row, this one included, over the budget (nats per token, for each KL).
    """
    for layer, numbers in point.layers.items():
        rank, rank_before = numbers["effective_rank"], base.layers[layer]["effective_rank"]
        if rank <= COLLAPSED_RANK_RATIO * rank_before and rank_before > 0:
            return (
                f"The embeddings of layer {layer} collapsed at step {point.step}: their effective rank fell from "
                f"{rank_before:.1f} to {rank:.1f}; tune fewer layers, lower the learning rate or raise the KL weight."
            )
    advice = "lower the learning rate or raise the KL weight"
    if point.kl > COLLAPSED_KL_BUDGETS * kl_budget:
        return (
            f"The KL on harmless prompts reached {point.kl:.2f} nats at step {point.step}, over "
            f"{COLLAPSED_KL_BUDGETS:g} budgets of {kl_budget:g}; {advice}."
        )
    if times_over >= PATIENCE:
        return (
            f"The KL on harmless prompts stayed above the budget of {kl_budget:g} nats up to step {point.step} "
            f"({point.kl:.2f}) although its weight was doubled {times_over - 1} times; {advice}."
        )
    return None
