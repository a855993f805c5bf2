"""How a fine-tune is going on `validation`, and what follows: λ, the step that is kept, whether it may go on.

The loss cannot tell: it is made of the prompts that are being steered. So every few steps the scale-free numbers are
measured on prompts that nothing else looks at, and one rule, kept here in one place, decides from all measurements so
far; it keeps nothing between them, so a resumed run decides as the uninterrupted one does. The mean-difference
direction has to come from somewhere, too; each pair of `validation` is measured along the direction of all the others,
since along their own direction even two clouds of noise stand apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.geometry import Resampled, cloud_numbers, fit_frame
from es2.analysis.resampling import RATIO_LIMIT, resample_pairs
from es2.analysis.verdict import COLLAPSED_KL_BUDGETS, COLLAPSED_RANK_RATIO
from es2.prompts.prompt_set import HARMFUL, PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float


PATIENCE = 3
"""So many measurements in a row over the KL budget, the KL weight doubled after each, and the run stops."""

_N_BOOTSTRAP = 100  # for the bias of fisher_ratio, which is read off resamples; intervals are not needed here


@dataclass(frozen=True)
class ValidationPoint:
    """What was measured on `validation` after one step.

    Attributes:
        step: optimizer steps taken; 0 is the base model.
        kl_prompt: mean KL(base ‖ tuned) in nats per token over harmless prompts' own tokens.
        kl_reply: the same over the base's replies.
        layers: numbers by target layer: `fisher_ratio`, `relative_distance`, `mean_difference_margin` (each pair along
            the direction of the others), `effective_rank`, `orthogonal_std_ratio`, `norm_ratio`, `centroid_distance`.
    """

    step: int
    kl_prompt: float
    kl_reply: float
    layers: dict[int, dict[str, float]] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """The mean of a number over the target layers."""
        return float(np.mean([numbers[name] for numbers in self.layers.values()]))

    @property
    def score(self) -> float:
        """What the best step is best by: mean_difference_margin, which neither inflation nor contraction can raise."""
        return self.mean("mean_difference_margin")

    @property
    def kl(self) -> float:
        """The larger of the two KLs; each has to stay within the budget."""
        return max(self.kl_prompt, self.kl_reply)

    def numbers(self) -> dict[str, float]:
        """What the event log gets: means over the target layers, and the KLs."""
        names = next(iter(self.layers.values()))
        return {"validation_kl_prompt": self.kl_prompt, "validation_kl_reply": self.kl_reply} | {
            f"validation_{name}": self.mean(name) for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "kl_prompt": self.kl_prompt,
            "kl_reply": self.kl_reply,
            "layers": {str(layer): numbers for layer, numbers in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ValidationPoint:
        layers = {int(layer): dict(numbers) for layer, numbers in document["layers"].items()}
        return cls(int(document["step"]), float(document["kl_prompt"]), float(document["kl_reply"]), layers)


def validation_numbers(
    prompts: PromptSet,
    base: Float[np.ndarray, "prompt d_model"],
    tuned: Float[np.ndarray, "prompt d_model"],
) -> dict[str, float]:
    """The scale-free numbers of one target layer.

    Args:
        prompts: the `validation` prompts, at least two pairs with prompts of both labels in all.
        base: their base embeddings.
        tuned: their embeddings now.
    """
    drawn = Resampled.of(prompts.labels, resample_pairs(prompts, _N_BOOTSTRAP, seed=0))
    clouds = []
    for embeddings in (base, tuned):
        numbers = cloud_numbers(embeddings, fit_frame(embeddings, prompts.labels), drawn)
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

    A pair without which a label has nobody left is not measured; 0 if none is.
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


# -------------------------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True)
class Decision:
    """What follows from everything that was measured so far.

    Attributes:
        kl_weight: λ from here on.
        times_over: measurements in a row, up to the latest, that were over the KL budget.
        best_step: the step whose weights are kept; 0 is the base.
        reason: why the run must not go on, or came to nothing, in a sentence; `None` if neither.
    """

    kl_weight: float
    times_over: int = 0
    best_step: int = 0
    reason: str | None = None


def decide(validations: Sequence[ValidationPoint], kl_weight: float, kl_budget: float, last_step: int) -> Decision:
    """The rule: λ doubles with every measurement over the KL budget, and the best step is the one of the highest score
    within it. A collapsed step is never the best.

    Args:
        validations: every measurement, that of the base first.
        kl_weight: λ at the start.
        kl_budget: in nats per token, for each of the two KLs.
        last_step: the run's number of steps.
    """
    base = best = validations[0]
    times_over, reason = 0, None
    for point in validations[1:]:
        is_over = not point.kl <= kl_budget  # NaN is over, too
        times_over = times_over + 1 if is_over else 0
        reason = reason_to_stop(point, base, kl_budget, times_over)
        if is_over:
            kl_weight *= 2
        elif reason is None and point.score > best.score:
            best = point
    if reason is None and times_over == len(validations) - 1 and validations[-1].step == last_step:
        reason = (
            f"No step kept the KL on harmless prompts within the budget of {kl_budget:g} nats; "
            "lower the learning rate or raise the KL weight."
        )
    return Decision(kl_weight, times_over, best.step, reason)


def reason_to_stop(point: ValidationPoint, base: ValidationPoint, kl_budget: float, times_over: int) -> str | None:
    """Why the run must not go on after `point`, in a sentence; `None` if it may.

    Args:
        point: the latest measurement.
        base: that of step 0.
        kl_budget: in nats per token, for each of the two KLs.
        times_over: how many measurements in a row, this one included, were over the budget.
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
