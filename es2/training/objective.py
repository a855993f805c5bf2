"""The ES2 loss and its terms, as pure functions of embeddings, in float32 at least.

Pre-norm transformers barely feel the length of a residual vector, so inflation raises a distance, and contraction a
ratio of between to within (`docs/numbers.md`): hence several terms. Base values are constants, own scales are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from es2.training.terms import MARGIN_TARGET, REFUSAL, Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_Value = TypeVar("_Value", "float", "Tensor")

_SHARPNESS = 24.0  # of the softplus: within ±1/24 of the target a prompt is half satisfied
_FISHER_FLOOR = 1e-6  # in units of the squared base scale: far below any real spread, well above float32's rounding
_SMALLEST = 1e-6  # a base value below this part of the scale is rounding and no unit to measure in
_NOTHING = 1e-12  # a length or scale below this is zero: its square is about to underflow in float32
_ABOVE, _BELOW = 2.0, 1.0  # nats; beyond these of `refusal` a prompt is pulled less and less
_MOMENTUM = 0.9  # of the running direction: it averages about ten batches


@dataclass(frozen=True)
class BaseLayer:
    """The base model's constants at one target layer, over the `tune` prompts.

    Attributes:
        pairwise_distance: mean ‖e_harmful − e_harmless‖ over all pairs, in the model's own units.
        harmless_mean: the mean harmless embedding.
        distance_to_harmless_mean: mean ‖e_harmful − harmless_mean‖.
        scale: sqrt of the class-balanced mean of ‖e‖²; 1 if all embeddings are as good as zero.
        difference: (harmful mean − harmless mean) / scale: where the running direction starts.
    """

    pairwise_distance: float
    harmless_mean: Float[Tensor, "d_model"]
    distance_to_harmless_mean: float
    scale: float
    difference: Float[Tensor, "d_model"]


def measure_base(harmful: Float[Tensor, "harmful d_model"], harmless: Float[Tensor, "harmless d_model"]) -> BaseLayer:
    """The base constants of one layer from the base embeddings of the `tune` prompts, at least one of each label."""
    harmful, harmless = _wide(harmful.detach()), _wide(harmless.detach())
    scale = float(_squared_scale(harmful, harmless).sqrt())
    scale = scale if scale > _NOTHING else 1.0
    harmless_mean = harmless.mean(dim=0)
    return BaseLayer(
        pairwise_distance=float(_mean_pairwise_distance(harmful, harmless)),
        harmless_mean=harmless_mean,
        distance_to_harmless_mean=float((harmful - harmless_mean).norm(dim=-1).mean()),
        scale=scale,
        difference=(harmful.mean(dim=0) - harmless_mean) / scale,
    )


def distance(
    harmful: Float[Tensor, "harmful d_model"], harmless: Float[Tensor, "harmless d_model"], base: BaseLayer
) -> Float[Tensor, ""]:
    """The paper's form (arXiv 2603.20206): mean ‖e_harmful − e_harmless‖ over all pairs ÷ its base value.

    Grows with the length of the residual stream: kept for comparison, not recommended.
    """
    return _mean_pairwise_distance(_wide(harmful), _wide(harmless)) / _unit(base.pairwise_distance, base)


def anchored(
    harmful: Float[Tensor, "harmful d_model"],
    harmless: Float[Tensor, "harmless d_model"],
    harmless_base: Float[Tensor, "harmless d_model"],
    base: BaseLayer,
) -> Float[Tensor, ""]:
    """The harmful cloud leaves, the harmless one stays put; `harmless_base` holds its prompts' base embeddings.

    mean ‖e_harmful − μ_base,harmless‖ ÷ its base value − mean ‖e_harmless − its own base embedding‖² ÷ scale², with
    the base's scale. Inflates as well, since only the harmless cloud is held.
    """
    away = (_wide(harmful) - base.harmless_mean).norm(dim=-1).mean()
    moved = (_wide(harmless) - _wide(harmless_base)).square().sum(dim=-1).mean()
    return away / _unit(base.distance_to_harmless_mean, base) - moved / base.scale**2


def fisher(
    harmful: Float[Tensor, "harmful d_model"], harmless: Float[Tensor, "harmless d_model"], base: BaseLayer
) -> Float[Tensor, ""]:
    """log of between-class over within-class variance, of this batch: invariant under scaling and rotation.

    Between is ‖μ_harmful − μ_harmless‖² of the batch's means, within the mean over classes of tr Σ (n − 1 below; 0
    for a class of one prompt). In expectation this is about log(ratio + 2/n); the bias is left in, since a corrected
    ratio is negative while the clouds overlap. Both variances carry the same tiny floor, so that identical embeddings
    give 0 and a zero gradient rather than NaN.
    """
    harmful, harmless = _wide(harmful), _wide(harmless)
    between = (harmful.mean(dim=0) - harmless.mean(dim=0)).square().sum()
    within = (_trace(harmful) + _trace(harmless)) / 2
    floor = _FISHER_FLOOR * base.scale**2
    return (between + floor).log() - (within + floor).log()


def margin(
    harmful: Float[Tensor, "harmful d_model"],
    harmless: Float[Tensor, "harmless d_model"],
    direction: Float[Tensor, "d_model"],
    target: float = MARGIN_TARGET,
) -> Float[Tensor, ""]:
    """Minus the class-balanced mean of softplus(24 · shortfall) / 24, the shortfall of a prompt's margin from `target`.

    A prompt's margin is ±(e − midpoint) · u / scale, + on its own side of the midpoint of the batch's class means; u is
    `direction` at length 1 and a constant (`running_direction`). Midpoint and scale are the batch's own and are
    differentiated through, so inflating both clouds changes nothing and has no gradient.
    """
    from torch.nn.functional import softplus

    harmful, harmless = _wide(harmful), _wide(harmless)
    direction = direction / direction.norm().clamp_min(_NOTHING)
    midpoint = (harmful.mean(dim=0) + harmless.mean(dim=0)) / 2
    scale = _squared_scale(harmful, harmless).clamp_min(_NOTHING**2).sqrt()
    shortfalls = []
    for cloud, side in ((harmful, 1.0), (harmless, -1.0)):
        # Elementwise rather than as a matrix product, which autocast would turn into bfloat16.
        margins = side * ((cloud - midpoint) * direction).sum(dim=-1) / scale
        shortfalls.append(softplus(_SHARPNESS * (target - margins)).mean() / _SHARPNESS)
    return -(shortfalls[0] + shortfalls[1]) / 2


def refusal(harmful: Float[Tensor, "harmful"], harmless: Float[Tensor, "harmless"], usual: float) -> Float[Tensor, ""]:
    """Minus the class-balanced mean of softplus(usual + 2 − z), z of a harmful prompt, and softplus(z − usual + 1), z
    of a harmless one.

    z is the log-odds, in nats, that a reply begins as the base's own refusals begin (`Workload.refusal_openings`), and
    `usual` the base's mean over harmless prompts: harmful ones are to exceed it by two nats, harmless ones to fall a
    nat short of it. Two clouds that overlap meet halfway, half a nat above it: refusals rise, those of harmless
    prompts hardly. It continues the separation into the first word, and is not part of ES2. No text is a target but
    first tokens of refusals that the base gives anyway.
    """
    from torch.nn.functional import softplus

    return -(softplus(usual + _ABOVE - harmful).mean() + softplus(harmless - (usual - _BELOW)).mean()) / 2


def running_direction(
    previous: Float[Tensor, "d_model"],
    harmful: Float[Tensor, "harmful d_model"],
    harmless: Float[Tensor, "harmless d_model"],
) -> Float[Tensor, "d_model"]:
    """The next running mean difference in units of the scale, a constant without gradient.

    The mean difference of one small batch is mostly noise. `BaseLayer.difference` is the first `previous`; each batch
    then counts for a tenth.
    """
    harmful, harmless = _wide(harmful.detach()), _wide(harmless.detach())
    scale = _squared_scale(harmful, harmless).clamp_min(_NOTHING**2).sqrt()
    difference = (harmful.mean(dim=0) - harmless.mean(dim=0)) / scale
    return _MOMENTUM * previous + (1 - _MOMENTUM) * difference


def separation(
    terms: tuple[Term, ...],
    harmful: Float[Tensor, "harmful layer d_model"],
    harmless: Float[Tensor, "harmless layer d_model"],
    *,
    harmless_base: Float[Tensor, "harmless layer d_model"] | None,
    base: Mapping[int, BaseLayer],
    directions: Float[Tensor, "layer d_model"],
    margin_target: float = MARGIN_TARGET,
    log_odds: tuple[Float[Tensor, "harmful"], Float[Tensor, "harmless"], float] | None = None,
) -> Float[Tensor, ""]:
    """The weighted sum of the terms, those of embeddings averaged over the target layers: what ES2 makes large.

    Args:
        terms: from `parse_objective`.
        harmful, harmless: embeddings of the global batch at the target layers.
        harmless_base: the base's embeddings of the same harmless prompts; only `anchored` needs them.
        base: the base constants of each target layer, in the order of axis `layer`.
        directions, margin_target: of `margin`; the directions from `running_direction`.
        log_odds: what `refusal` takes; without them that term is 0, as for a base that refuses nothing.
    """
    import torch

    values = []
    for index, constants in enumerate(base.values()):
        here, there = harmful[:, index], harmless[:, index]
        for term in terms:
            if term.name == REFUSAL:
                continue
            if term.name == "anchored":
                if harmless_base is None:
                    raise ValueError("The anchored term needs the base's embeddings of the harmless prompts.")
                value = anchored(here, there, harmless_base[:, index], constants)
            elif term.name == "margin":
                value = margin(here, there, directions[index], margin_target)
            else:
                value = {"distance": distance, "fisher": fisher}[term.name](here, there, constants)
            values.append(term.weight * value)
    total = torch.stack(values).sum() / len(base)
    if log_odds is not None:
        total = total + sum(term.weight for term in terms if term.name == REFUSAL) * refusal(*log_odds)
    return total


def es2_loss(separation: _Value, kl_prompt: _Value, kl_reply: _Value, kl_weight: float) -> _Value:
    """λ · (KL over prompt tokens + KL over reply tokens) − separation: the loss of the paper, the KL in two parts.

    Linear in its first three arguments, so the losses of a batch's parts, each with its share of the separation and of
    the KLs, add up to the batch's.
    """
    return kl_weight * (kl_prompt + kl_reply) - separation


def _wide(embeddings: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return embeddings if embeddings.dtype.itemsize >= 4 else embeddings.float()


def _unit(value: float, base: BaseLayer) -> float:
    return max(value, _SMALLEST * base.scale)


def _squared_scale(harmful: Tensor, harmless: Tensor) -> Tensor:
    """The class-balanced mean of ‖e‖²."""
    return (harmful.square().sum(dim=-1).mean() + harmless.square().sum(dim=-1).mean()) / 2


def _trace(cloud: Tensor) -> Tensor:
    """tr Σ of one class with n − 1 below; 0 for a single prompt."""
    return (cloud - cloud.mean(dim=0)).square().sum() / max(len(cloud) - 1, 1)


def _mean_pairwise_distance(harmful: Tensor, harmless: Tensor) -> Tensor:
    """The mean distance over all harmful × harmless pairs; where two embeddings coincide the gradient is 0."""
    import torch

    # By differences: the faster form by inner products loses half of float32's digits where clouds lie far from zero.
    return torch.cdist(harmful, harmless, compute_mode="donot_use_mm_for_euclid_dist").mean()
