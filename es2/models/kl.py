"""KL(base ‖ tuned) over the full vocabulary from states before the frozen LM head, a chunk of logits at a time.

The gradient of a token's KL, (p_tuned − p_base) · W, is taken while the chunk's logits exist, and the backward pass
only scales it: exact, with one application of the head where checkpointing needs two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from es2.core.errors import InputError
from es2.models.blocks import decoder_of
from es2.models.costs import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class LmHead:
    """The frozen LM head: logits = cap · tanh(scale · (W · state + bias) / cap), without a cap just the product.

    `weight` is often the embedding matrix itself; `softcap` is Gemma 2's `final_logit_softcapping`, `scale` Cohere's
    `logit_scale` or its like.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, "vocab"] | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, states: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
        """Logits in float32 at least, from a product in the head's own dtype whatever autocast says."""
        with torch.autocast(self.weight.device.type, enabled=False):
            product = states.to(self.weight.dtype) @ self.weight.T
            logits = product if product.dtype.itemsize >= 4 else product.float()
            if self.bias is not None:
                logits = logits + self.bias
            if self.scale != 1:
                logits = logits * self.scale
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def log_odds(self, states: Float[Tensor, "token d_model"], among: Bool[Tensor, "vocab"]) -> Float[Tensor, "token"]:
        """log p / (1 − p) in nats, p the probability that the next token after a state is one of `among` (a mask)."""

        def odds(logits: Tensor) -> Tensor:
            inside = logits.masked_fill(~among, -math.inf).logsumexp(dim=-1)
            return inside - logits.masked_fill(among, -math.inf).logsumexp(dim=-1)

        return torch.cat([odds(self.logits(chunk)) for (chunk,) in _chunks(self, states)])

    @torch.no_grad()
    def next_tokens(self, states: Float[Tensor, "token d_model"]) -> list[int]:
        """The most likely next token after each state."""
        return torch.cat([self.logits(chunk).argmax(dim=-1) for (chunk,) in _chunks(self, states)]).tolist()


def tuned_lm_head(model: Any, base: LmHead) -> LmHead:
    """The head of the base's model after a fine-tune was put on; it is the base's own unless that changed it."""
    layer = model.get_output_embeddings()
    if isinstance(layer, torch.nn.Linear) and layer.weight.data_ptr() == base.weight.data_ptr():
        return base
    with torch.no_grad():
        # Whatever wraps the layer, it stays linear: what it makes of unit vectors are the columns of its weight.
        nothing = torch.zeros(1, base.weight.shape[1], dtype=base.weight.dtype, device=base.weight.device)
        bias = layer(nothing)[0]
        weight = (layer(torch.eye(base.weight.shape[1]).to(nothing)) - bias).T
    return replace(base, weight=weight, bias=bias if bool(bias.any()) else None)


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the number between whose negative and itself all logits lie."""


def read_lm_head(model: Any) -> LmHead:
    """The LM head of a transformers causal language model; `InputError` when `LmHead` gives other logits than it."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise InputError(f"The {model.config.model_type!r} model has no plain linear head, so its KL is unknown here.")
    text_config = model.config.get_text_config()
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(text_config, name, None))), None)
    head = LmHead(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), softcap)
    tokens = torch.arange(4, device=layer.weight.device)[None] + 5
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[0].float()
        states = decoder_of(model)(tokens, use_cache=False).last_hidden_state[0]
        head = replace(head, scale=_scale(expected, replace(head, softcap=None).logits(states), softcap))
        found = head.logits(states)
    if not bool(expected.isfinite().all()):
        raise InputError("The model's logits are not finite: its weights are damaged, or too large for this dtype.")
    tolerance = 1e-2 if layer.weight.dtype.itemsize < 4 else 1e-4
    if not torch.allclose(found, expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance):
        raise InputError(
            f"The {model.config.model_type!r} model changes its logits after the head, so its KL is unknown here; "
            "use another architecture."
        )
    return head


def _scale(expected: Tensor, product: Tensor, softcap: float | None) -> float:
    """The number by which a model multiplies the head's product: architectures have many names for it."""
    wanted, product = expected.double(), product.double()
    if softcap is not None:
        wanted = softcap * (wanted / softcap).atanh()
    scale = float((wanted * product).sum() / product.square().sum())
    return scale if math.isfinite(scale) and abs(scale - 1) > 1e-3 else 1.0


def token_kl(
    tuned: Float[Tensor, "token d_model"], base: Float[Tensor, "token d_model"], head: LmHead
) -> Float[Tensor, "token"]:
    """KL(base ‖ tuned) in nats of each token's distribution over the vocabulary, differentiable in `tuned` only.

    Args:
        tuned: the tuned model's states before the LM head.
        base: the base model's states of the same tokens.
        head: of both.
    """
    with torch.autocast(tuned.device.type, enabled=False):
        return _TokenKL.apply(tuned, base, head)


@dataclass(frozen=True)
class Compared:
    """Two models' distributions for a chunk of tokens: KL(base ‖ tuned) in nats, logits and (log-)probabilities."""

    kl: Float[Tensor, "token"]
    tuned_logits: Float[Tensor, "token vocab"]
    log_tuned: Float[Tensor, "token vocab"]
    log_base: Float[Tensor, "token vocab"]
    p_base: Float[Tensor, "token vocab"]


def compare_tokens(
    tuned: Float[Tensor, "token d_model"],
    base: Float[Tensor, "token d_model"],
    head: LmHead,
    base_head: LmHead | None = None,
) -> Iterator[Compared]:
    """Two models' distributions for tokens, a chunk at a time; as `token_kl`, `head` is of both without `base_head`."""
    for tuned_part, base_part in _chunks(head, tuned, base):
        logits = head.logits(tuned_part)
        log_base = (base_head or head).logits(base_part).log_softmax(dim=-1)
        log_tuned = logits.log_softmax(dim=-1)
        p_base = log_base.exp()
        yield Compared((p_base * (log_base - log_tuned)).sum(dim=-1), logits, log_tuned, log_base, p_base)


@torch.no_grad()
def score_tokens(
    states: Float[Tensor, "token d_model"], tokens: Sequence[int], head: LmHead
) -> tuple[Float[Tensor, "token"], list[int]]:
    """The log-probability of each token after the state before it, in nats on the CPU, and the first choice there."""
    targets = torch.tensor(list(tokens), device=states.device)
    logs: list[Tensor] = []
    choices: list[int] = []
    for part, wanted in _chunks(head, states, targets):
        log = head.logits(part).log_softmax(dim=-1)
        logs.append(log.gather(1, wanted[:, None])[:, 0].cpu())
        choices += log.argmax(dim=-1).tolist()
    return torch.cat(logs), choices


def _chunks(head: LmHead, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, LOGITS_AT_ONCE // len(head.weight))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tuned: Tensor, base: Tensor, head: LmHead) -> Tensor:
        divergences, gradients = [], []
        for found in compare_tokens(tuned.detach(), base.detach(), head):
            divergences.append(found.kl)
            if ctx.needs_input_grad[0]:
                by_logits = found.log_tuned.exp_().sub_(found.p_base)
                if head.softcap is not None:
                    by_logits *= 1 - (found.tuned_logits / head.softcap).square()
                if head.scale != 1:
                    by_logits *= head.scale
                gradients.append((by_logits.to(head.weight.dtype) @ head.weight).to(tuned.dtype))
            del found  # before the next chunk's logits are made
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(divergences)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (outer[:, None] * gradients).to(gradients.dtype), None, None
