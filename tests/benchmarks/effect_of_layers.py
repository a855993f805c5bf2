"""What a small step of one block's weights buys in separation, and costs in KL, before any fine-tune.

One backward pass gives every block the direction in which its weights raise the separation at its own layer and the
layers above. Each block alone is then moved a little that way, relative to the length of its weights, and the same
prompts are run again: that gives the change at every layer above, and the KL on harmless prompts as it is. A diagonal
of the Fisher information would be cheaper, but it leaves out how weights act together, and along one direction all of
them do. For small steps the gain grows with the step and the KL with its square, so gain / √KL depends on neither.

It does not predict what fine-tunes at these layers come to (`layer_effect.py` beside it measures that on a sweep, and
`docs/sweep.md` has the result), so it is no part of the workbench.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from es2.core.errors import InputError
from es2.core.progress import Reporter, silent
from es2.models.batching import Tokens, batches_by_length, pad, usual_tokens
from es2.models.blocks import BlockHooks, decoder_of
from es2.models.kl import read_lm_head, token_kl
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.training.objective import BaseLayer, fisher, measure_base

if TYPE_CHECKING:
    from jaxtyping import Float

STEP = 0.01
"""Length of the step relative to the block's weights: KLs are above rounding, and still grow with the square."""


@dataclass(frozen=True)
class LayerEffect:
    """What moving one block's weights does.

    Attributes:
        layer: the number of the block.
        slope: of the separation, the mean over this layer and all above, per relative length of the step, at its start.
        gains: change of the separation after the step, at this layer and each above.
        kl: KL(before ‖ after) on harmless prompts after the step, in nats per token.
    """

    layer: int
    slope: float
    gains: Mapping[int, float]
    kl: float

    def gain_at(self, kl_budget: float) -> float:
        """The mean gain over layers of the step whose KL is the budget, by the law of small steps; 0 without KL."""
        mean = sum(self.gains.values()) / len(self.gains)
        return mean * math.sqrt(kl_budget / self.kl) if self.kl > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values by name."""
        return asdict(self) | {"gains": {str(layer): gain for layer, gain in self.gains.items()}}


def layer_effects(
    model: Any,
    prompts: Sequence[Tokens],
    labels: Sequence[int],
    *,
    n_prefix: int = 0,
    step: float = STEP,
    tokens_at_once: int | None = None,
    report: Reporter = silent,
) -> list[LayerEffect]:
    """The effect of every block, by one backward pass and one forward pass for each.

    Separation is the log ratio of between-class to within-class variance at the last token (`objective.fisher`), of
    these very prompts: a few dozen pairs, of `tune`.

    Args:
        model: a plain transformers causal language model in float32; its weights are afterwards as they were.
        prompts, labels: rendered, at least two of each label.
        n_prefix: number of tokens that all prompts share, on which no KL is taken.
        step: length of the step relative to the block's weights.
        tokens_at_once: padded tokens per pass; by default what suits the device.
        report: called after every block (`effect`); it may raise to stop.

    Raises:
        InputError: for too few prompts, another dtype, a step that is no positive number, or an LM head that is not
            known.
    """
    is_harmful = torch.tensor([label == HARMFUL for label in labels])
    if min(list(labels).count(HARMFUL), list(labels).count(HARMLESS)) < 2:
        raise InputError("The effect of a layer needs at least two prompts of each label; add prompts.")
    if model.dtype != torch.float32:
        raise InputError(f"The effect of a layer needs the model in float32, not {model.dtype}; use --dtype float32.")
    if not 0 < step < math.inf:
        raise InputError(f"The step must be a positive number, not {step!r}.")
    head = read_lm_head(model)
    run = _runner(model, prompts, is_harmful, n_prefix, tokens_at_once or usual_tokens(model.device.type))
    blocks = list(BlockHooks(model).blocks)
    weights = [[weight for weight in block.parameters() if weight.is_floating_point()] for block in blocks]
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.requires_grad_(False)
        with torch.no_grad():
            base, states = run(None)
        constants = [measure_base(one[is_harmful], one[~is_harmful]) for one in base.unbind(1)]
        at_start = _separation(base, is_harmful, constants)
        for weight in (weight for of_block in weights for weight in of_block):
            weight.requires_grad_(True)
        leaf = base.clone().requires_grad_(True)
        _separation(leaf, is_harmful, constants).sum().backward()
        assert leaf.grad is not None
        run(leaf.grad)
        gradients = [[weight.grad for weight in of_block] for of_block in weights]
        model.requires_grad_(False)
        found = []
        report("effect", 0, len(blocks))
        for layer, (own, towards) in enumerate(zip(weights, gradients, strict=True)):
            n_above = len(blocks) - layer
            length, steepness = _norm(own), _norm([one for one in towards if one is not None])
            slope = steepness * length / n_above
            kept = [weight.detach().clone() for weight in own]
            try:
                with torch.no_grad():
                    for weight, gradient in zip(own, towards, strict=True):
                        if gradient is not None and steepness > 0:
                            weight += step * length / steepness * gradient
                    embeddings, moved = run(None)
            finally:
                with torch.no_grad():
                    for weight, value in zip(own, kept, strict=True):
                        weight.copy_(value)
            change = (_separation(embeddings, is_harmful, constants) - at_start).tolist()
            kl = float(token_kl(moved, states, head).double().mean().clamp(min=0))
            found.append(LayerEffect(layer, slope, {above: change[above] for above in range(layer, len(blocks))}, kl))
            report("effect", layer + 1, len(blocks))
        return found
    finally:
        for weight, needed in before:
            weight.grad = None
            weight.requires_grad_(needed)


def _separation(
    embeddings: Float[Tensor, "prompt layer d_model"], is_harmful: Tensor, constants: Sequence[BaseLayer]
) -> Float[Tensor, "layer"]:
    clouds = zip(embeddings[is_harmful].unbind(1), embeddings[~is_harmful].unbind(1), constants, strict=True)
    return torch.stack([fisher(harmful, harmless, base) for harmful, harmless, base in clouds])


def _runner(
    model: Any, prompts: Sequence[Tokens], is_harmful: Tensor, n_prefix: int, budget: int
) -> Callable[[Tensor | None], tuple[Tensor, Tensor]]:
    """A function that runs all prompts, batch by batch.

    It returns their embeddings `[prompt, layer, d_model]` and the states before the LM head at the harmless ones' own
    tokens. Given the gradient of a number by the embeddings, it adds that by the weights to these, which is exact and
    holds the graph of one batch at a time.
    """
    batches = list(batches_by_length([len(tokens) for tokens in prompts], budget))
    hooks = BlockHooks(model)

    def run(gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        found: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        for batch in batches:
            tokens, mask = pad([prompts[row] for row in batch])
            last = torch.tensor([len(prompts[row]) - 1 for row in batch], device=model.device)
            rows = torch.arange(len(batch), device=model.device)
            layers: list[Tensor] = []

            def read(activation: Tensor, hook: Any, rows: Tensor = rows, last: Tensor = last) -> None:
                layers.append(activation[rows, last])  # noqa: B023 (called within this turn)

            names = [f"blocks.{layer}.hook_out" for layer in range(len(hooks.blocks))]
            with hooks.hooks([(name, read) for name in names]):
                output = decoder_of(model)(
                    tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
                ).last_hidden_state
            embeddings = torch.stack(layers, dim=1)
            if gradient is not None:
                (embeddings * gradient[list(batch)]).sum().backward()
            for at, row in enumerate(batch):
                found[row] = embeddings[at].detach()
                if not is_harmful[row]:
                    states[row] = output[at, n_prefix : len(prompts[row])].detach()
        return torch.stack([found[row] for row in range(len(prompts))]), torch.cat(
            [states[row] for row in sorted(states)]
        )

    return run


def _norm(tensors: Sequence[Tensor]) -> float:
    """The length of all numbers together."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))
