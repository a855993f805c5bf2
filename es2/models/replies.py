"""Greedy replies of a model, in batches of like length after a prefix that is run once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from es2.core.errors import MachineError
from es2.core.progress import Reporter, silent
from es2.models.batching import (
    Tokens,
    batches_by_length,
    cache_of,
    is_verified,
    keys_and_values,
    may_pad,
    pad,
    positions_of,
    reply_batches,
    until_end,
    usual_reply_tokens,
    usual_tokens,
)
from es2.models.device import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Around = Callable[[list[int]], AbstractContextManager[Any]]
"""Given the rows of a batch, a context to reply in; the batch carries what it yields."""


@dataclass(frozen=True)
class ReplyBatch:
    """Replies that were generated together: indices of the prompts, their replies (end token included), and what
    `around` yielded.
    """

    rows: tuple[int, ...]
    replies: tuple[tuple[int, ...], ...]
    seen: Any = None


def greedy_replies(
    model: Any,
    prompts: Sequence[Tokens],
    n_tokens: int,
    end_tokens: frozenset[int],
    *,
    prefix: Tokens = (),
    done: Container[int] = (),
    around: Around | None = None,
    tokens_at_once: int | None = None,
    report: Reporter = silent,
    stage: str = "reply",
) -> Iterator[ReplyBatch]:
    """Batches of greedy replies, each as soon as it is complete.

    Args:
        model: a transformers causal language model, with or without an adapter inside; also a bridge's own
            `original_model`, under whose hooks `around` may steer.
        prompts: rendered prompts.
        n_tokens: of the longest reply.
        end_tokens: each ends a reply.
        prefix: the tokens that every prompt begins with; run once where that was verified to change nothing.
        done: indices of prompts that need no reply any more. Which prompts share a batch does not depend on it.
        around: given the rows of a batch, a context to reply in; the batch carries what it yields.
        tokens_at_once: of prompts and replies in one batch, at least one prompt; by default what suits the device.
        report: called at every token with `stage`; it may raise to stop.

    Raises:
        MachineError: when memory runs out even for a single prompt.
    """
    import torch

    pads = may_pad(model, max(map(len, prompts), default=0) + n_tokens)
    n_shared = len(prefix) if is_verified(model) else 0
    budget = tokens_at_once or usual_reply_tokens(model.device.type)
    waiting = [
        [row for row in batch if row not in done]
        for batch in reply_batches([len(prompt) + n_tokens for prompt in prompts], budget, pads)
    ]
    waiting = [batch for batch in waiting if batch]
    total = n_tokens * sum(map(len, waiting))
    finished = 0
    report(stage, 0, total)
    if not waiting:
        return
    with torch.inference_mode():
        shared = keys_and_values(model.base_model, prefix[:n_shared], model.device)
        while waiting:
            batch = waiting.pop(0)
            sequences = [tuple(prompts[row][n_shared:]) for row in batch]

            def step(count: int, size: int = len(batch), before: int = finished) -> None:
                report(stage, before + min(count, n_tokens - 1) * size, total)

            try:
                with around(batch) if around else nullcontext() as seen:
                    replies = decode(
                        _next_tokens(model, cache_of(shared, len(batch))),
                        sequences,
                        n_tokens,
                        end_tokens,
                        pads=pads,
                        device=model.device,
                        n_before=n_shared,
                        step=step,
                    )
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise MachineError(
                        "Memory ran out while replying to a single prompt; use bfloat16, a smaller model or shorter "
                        "replies."
                    ) from error
                waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            finished += n_tokens * len(batch)
            report(stage, finished, total)
            yield ReplyBatch(tuple(batch), tuple(replies), seen)


def decode(
    next_tokens: Callable[[Tensor, dict[str, Tensor]], list[int]],
    sequences: Sequence[Tokens],
    n_tokens: int,
    end_tokens: frozenset[int],
    *,
    pads: bool,
    device: torch.device,
    side: Literal["right", "left"] = "left",
    n_before: int = 0,
    go_on: Callable[[bool], bool] = bool,
    step: Callable[[int], None] = lambda count: None,
) -> list[tuple[int, ...]]:
    """The greedy replies to the prompts of one batch: the one loop over tokens that there is.

    Args:
        next_tokens: runs the model on tokens `[prompt, token]` (whole prompts, then the latest token of each), with an
            attention mask and positions if `pads`; returns the next token of each row.
        sequences: of each prompt, what follows the shared tokens.
        n_tokens: of the longest reply.
        end_tokens: each ends a reply.
        pads: whether the prompts may differ in length.
        device: of the inputs of `next_tokens`.
        side: of the padding. Reading or steering the last column needs `left`; on the right, the reply's tokens follow
            the padding, which no token attends to, at the positions that they would have without it.
        n_before: number of shared tokens.
        go_on: given whether any reply is unfinished, whether to run the model once more.
        step: called with the number of tokens done, before each pass; it may raise to stop.
    """
    import torch

    latest, mask = pad(sequences, side=side, n_before=n_before)
    replies: list[list[int]] = [[] for _ in sequences]
    for count in range(n_tokens):
        step(count)
        inputs = {}
        if pads:
            positions = positions_of(mask)[:, -latest.shape[1] :]
            inputs = {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
        for reply, token in zip(replies, next_tokens(latest.to(device), inputs), strict=True):
            reply.append(reply[-1] if reply and reply[-1] in end_tokens else token)
        if count + 1 == n_tokens or not go_on(any(reply[-1] not in end_tokens for reply in replies)):
            break
        latest = torch.tensor([reply[-1:] for reply in replies])
        mask = torch.cat([mask, mask.new_ones(len(sequences), 1)], dim=1)
    return [until_end(reply, end_tokens) for reply in replies]


def _next_tokens(model: Any, cache: Any) -> Callable[[Tensor, dict[str, Tensor]], list[int]]:
    """Reads the most likely next tokens off a model's own logits, adding to the cache."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def run(latest: Tensor, inputs: dict[str, Tensor]) -> list[int]:
        output = model(latest, past_key_values=cache, use_cache=True, **last_only, **inputs)
        chosen: list[int] = output.logits[:, -1].argmax(dim=-1).tolist()
        return chosen

    return run


def exchange_states(
    model: Any,
    prompts: Sequence[Tokens],
    replies: Sequence[Tokens],
    n_prefix: int,
    *,
    report: Reporter = silent,
    stage: str = "read",
) -> list[Tensor]:
    """The states before the LM head of a model, base or tuned, that reads prompts and the base's replies to them.

    For each prompt `[token, d_model]` on the CPU: its own tokens after the template's prefix of `n_prefix` tokens, then
    the reply's but the last. A reply's tokens were read from the states from the last prompt token on.
    """
    import torch

    sequences = [(*prompt, *reply[:-1]) for prompt, reply in zip(prompts, replies, strict=True)]
    budget = usual_tokens(model.device.type)
    states: dict[int, Tensor] = {}
    report(stage, 0, len(sequences))
    for batch in batches_by_length([len(sequence) for sequence in sequences], budget):
        tokens, mask = pad([sequences[row] for row in batch])
        with torch.inference_mode():
            output = model.base_model(
                tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).last_hidden_state
            for index, row in enumerate(batch):
                states[row] = output[index, n_prefix : len(sequences[row])].cpu().clone()
        report(stage, len(states), len(sequences))
    return [states[row] for row in range(len(sequences))]
