"""Greedy replies of a model, as many at a time as fit, after a prefix that is run once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from es2.core.errors import InputError, MachineError
from es2.core.malloc import keep_freed_memory
from es2.core.progress import Reporter, silent
from es2.models.batching import (
    KeysAndValues,
    Tokens,
    batches_by_length,
    is_verified,
    keys_and_values,
    pad,
    positions_of,
    reply_batches,
    rounding_of,
    rows_that_fit,
    until_end,
    usual_reply_tokens,
    usual_tokens,
)
from es2.models.blocks import decoder_of
from es2.models.device import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_REFILL = 8  # rows are added once an eighth of them is free
_TRIED = 3  # tokens of a trial
_CACHES = ("cache_params", "state", "past_key_values")  # what models call what they keep of a pass


@runtime_checkable
class Steering(Protocol):
    """Hooks in a model that steer the rows of its passes."""

    def at(self, rows: Sequence[int] | None) -> None:
        """The prompts of the next pass's rows, whose last token is steered; None for passes to leave alone."""

    def forget(self, rows: Sequence[int]) -> None:
        """Prompts whose replies begin anew."""


@dataclass(frozen=True)
class ReplyBatch:
    """Replies that ended together: indices of the prompts, and their replies, end token included."""

    rows: tuple[int, ...]
    replies: tuple[tuple[int, ...], ...]


def greedy_replies(
    model: Any,
    prompts: Sequence[Tokens],
    n_tokens: int,
    end_tokens: frozenset[int],
    *,
    prefix: Tokens = (),
    done: Container[int] = (),
    steering: Steering | None = None,
    rows_at_once: int | None = None,
    report: Reporter = silent,
    stage: str = "reply",
) -> Iterator[ReplyBatch]:
    """Greedy replies, each as soon as it has ended.

    A reply that has ended leaves its row to the next prompt, and equal prompts are read once. Where that would change a
    number (a recurrent state), prompts of equal length reply together.

    Args:
        model: a transformers causal language model, with or without an adapter inside.
        prompts: rendered prompts; equal ones are variants that `steering` tells apart.
        n_tokens: of the longest reply.
        end_tokens: each ends a reply.
        prefix: the tokens that every prompt begins with; run once where that changes nothing.
        done: indices of prompts that need no reply any more.
        steering: hooks that steer a row by its prompt's index.
        rows_at_once: number of replies at a time; by default as many as fit. Halved whenever memory runs out.
        report: called at every token with `stage`; it may raise to stop.

    Raises:
        MachineError: when memory runs out even for a single prompt.
    """
    import torch

    waiting = [row for row in range(len(prompts)) if row not in done]
    waiting.sort(key=lambda row: (-len(prompts[row]), tuple(prompts[row]), row))
    total = n_tokens * len(waiting)
    report(stage, 0, total)
    if not waiting:
        return
    keep_freed_memory()
    if steering is not None:
        steering.at(None)
    prefix = prefix[: min(len(prompts[row]) for row in waiting) - 1]
    chosen = [tuple(prompts[row]) for row in waiting]
    # The trial is as long as the longest reply: a window may matter there alone.
    longest = (*chosen[0], *(chosen[0] * n_tokens)[: max(0, n_tokens - _TRIED)])
    if is_verified(model) or _rows_are_exact(model, [longest, chosen[-1]], prefix):
        with torch.inference_mode():
            shared = keys_and_values(decoder_of(model), prefix, model.device)
        found = _reply_in_rows(model, chosen, n_tokens, end_tokens, shared, steering, waiting, rows_at_once)
    else:
        cached = _cache_is_exact(model, [longest, chosen[-1]])
        if not cached and steering is not None:
            raise InputError(
                f"The {model.config.model_type!r} model computes other tokens from its cache than without, so replies "
                "under steering are unknown here; leave out the perturbation suite, or a sweep's defence."
            )
        found = _reply_in_batches(model, chosen, n_tokens, end_tokens, steering, waiting, rows_at_once, cached)
    finished = 0
    for rows, replies, n_unfinished in found:
        finished += n_tokens * len(rows)
        report(stage, min(total, finished + n_unfinished), total)
        if rows:
            yield ReplyBatch(tuple(waiting[row] for row in rows), replies)


_Ended = tuple[Sequence[int], tuple[tuple[int, ...], ...], int]
"""Which prompts' replies have ended, these replies, and the number of tokens of those that have not."""


def _reply_in_rows(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    n_tokens: int,
    end_tokens: frozenset[int],
    shared: KeysAndValues,
    steering: Steering | None,
    names: Sequence[int],
    rows_at_once: int | None,
) -> Iterator[_Ended]:
    """Replies in rows that are filled again as they become free; the longest prompts come first."""
    import torch

    from es2.models.row_cache import Rows, key_bytes

    def steer(rows: Sequence[int] | None) -> None:
        if steering is not None:
            steering.at(rows if rows is None else [names[row] for row in rows])

    width = len(prompts[0]) + n_tokens - 1
    with torch.inference_mode():
        room = rows_at_once or rows_that_fit(str(model.device), width * key_bytes(model, shared))
    waiting = list(range(len(prompts)))
    rows: Rows | None = None
    replies: dict[int, list[int]] = {}
    while waiting or replies:
        try:
            if rows is None:
                rows = Rows(model, min(room, len(waiting)), width, shared)
            if waiting and (rows.n_free * _REFILL >= room or not replies):
                steer(None)
                chosen, waiting = waiting[: rows.n_free], waiting[rows.n_free :]
                replies |= {row: [] for row in chosen}
                rows.add([(row, prompts[row]) for row in chosen])
            steer(rows.indices)
            tokens = rows.step().argmax(dim=-1).tolist()
        except (MemoryError, RuntimeError) as error:
            _check_divisible(error, room)
            if steering is not None:
                steering.forget([names[row] for row in replies])
            waiting, replies, rows = sorted({*waiting, *replies}), {}, None
            room = max(1, min(room, len(waiting)) // 2)
            logger.warning("Memory ran out; %d prompts are replied to at a time.", room)
            continue
        ended = []
        for place, (row, token) in enumerate(zip(rows.indices, tokens, strict=True)):
            replies[row].append(token)
            if token in end_tokens or len(replies[row]) == n_tokens:
                ended.append(place)
        rows.go_on(tokens)
        gone = [rows.indices[place] for place in ended]
        if ended:
            rows.drop(ended)
        complete = tuple(tuple(replies.pop(row)) for row in gone)
        yield gone, complete, sum(map(len, replies.values()))


def _check_divisible(error: Exception, n_prompts: int) -> None:
    """Raise what went wrong with prompts that replied together, unless memory ran out and fewer may fit."""
    if not is_out_of_memory(error):
        raise error
    if n_prompts == 1:
        raise MachineError(
            "Memory ran out while replying to a single prompt; use bfloat16, a smaller model or shorter replies."
        ) from error


def _rows_are_exact(model: Any, prompts: Sequence[tuple[int, ...]], prefix: Tokens) -> bool:
    """Whether rows give the logits of whole prompts run alone, tried on prompts and the first tokens of replies."""
    import torch

    from es2.models.row_cache import Rows

    limit = rounding_of(model)
    try:
        with torch.inference_mode():
            shared = keys_and_values(decoder_of(model), prefix, model.device)
            rows = Rows(model, len(prompts), max(map(len, prompts)) + _TRIED, shared)
            rows.add(list(enumerate(prompts)))
            whole = [list(prompt) for prompt in prompts]
            for _ in range(_TRIED):
                found = rows.step()
                for logits, tokens in zip(found, whole, strict=True):
                    expected = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1]
                    if not (logits - expected).abs().max() <= limit * expected.abs().max():
                        return False
                    tokens.append(int(expected.argmax()))
                rows.go_on([tokens[-1] for tokens in whole])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        logger.debug("A %s model does not reply in rows: %s", model.config.model_type, error)
        return False
    return True


def _reply_in_batches(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    n_tokens: int,
    end_tokens: frozenset[int],
    steering: Steering | None,
    names: Sequence[int],
    rows_at_once: int | None,
    cached: bool,
) -> Iterator[_Ended]:
    """Replies to prompts of equal length, a batch after the other, by the model's own kind of cache or without one."""
    import torch

    lengths = [len(prompt) + n_tokens for prompt in prompts]
    budget = rows_at_once * lengths[0] if rows_at_once else usual_reply_tokens(model.device.type)
    budget = budget if cached else 1  # whole passes of one prompt each
    waiting = list(reply_batches(lengths, budget, False))
    while waiting:
        batch = waiting.pop(0)
        if steering is not None:
            steering.at([names[row] for row in batch])
        try:
            with torch.inference_mode():
                replies = decode(
                    _next_tokens(_last_logits(model, cached)),
                    [prompts[row] for row in batch],
                    n_tokens,
                    end_tokens,
                    pads=False,
                    device=model.device,
                )
        except (MemoryError, RuntimeError) as error:
            _check_divisible(error, len(batch))
            if steering is not None:
                steering.forget([names[row] for row in batch])
            waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        yield batch, tuple(replies), 0


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


def _cache_is_exact(model: Any, prompts: Sequence[tuple[int, ...]]) -> bool:
    """Whether a model's own cache gives two rows the logits of whole prompts alone, tried on some tokens of replies."""
    import torch

    limit = rounding_of(model)
    try:
        with torch.inference_mode():
            for prompt in prompts:
                steps: list[tuple[Tensor, Tensor]] = []
                rows = [(*prompt[shift:], *prompt[:shift]) for shift in (0, 1)]
                whole = [_last_logits(model, False) for _ in rows]
                latest = torch.tensor(rows, device=model.device)
                for _ in range(_TRIED):
                    alone = torch.cat([run(one[None], {}) for run, one in zip(whole, latest, strict=True)])
                    steps.append((latest, alone))
                    latest = alone.argmax(dim=-1)[:, None]
                cached = _last_logits(model, True)  # afterwards: a state may lie in the model itself
                for latest, alone in steps:
                    if not (cached(latest, {}) - alone).abs().max() <= limit * alone.abs().max():
                        return False
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        logger.debug("A %s model does not reply from a cache: %s", model.config.model_type, error)
        return False
    return True


def _next_tokens(logits: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Callable[..., list[int]]:
    """The most likely next tokens by `_last_logits`."""

    def run(latest: Tensor, inputs: dict[str, Tensor]) -> list[int]:
        chosen: list[int] = logits(latest, inputs).argmax(dim=-1).tolist()
        return chosen

    return run


def _last_logits(model: Any, cached: bool) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """The model's own logits after the latest tokens of rows: from the cache it makes itself, or from whole passes."""
    import torch

    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    name = next((name for name in _CACHES if name in accepted), "past_key_values")
    cache: Any = None
    seen: Tensor | None = None
    n_seen = 0

    def from_cache(latest: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        nonlocal cache, n_seen
        own = dict(inputs)
        if "position_ids" in accepted and "position_ids" not in own:  # some models count from 0 in every pass
            own["position_ids"] = torch.arange(n_seen, n_seen + latest.shape[1], device=latest.device).expand_as(latest)
        n_seen += latest.shape[1]
        output = model(latest, use_cache=True, **{name: cache}, **extra, **own)
        cache = getattr(output, name, None)
        logits: Tensor = output.logits[:, -1]
        return logits

    def from_the_start(latest: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        nonlocal seen
        seen = latest if seen is None else torch.cat([seen, latest], dim=1)
        logits: Tensor = model(seen, use_cache=False, **extra).logits[:, -1]
        return logits

    return from_cache if cached else from_the_start


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
            output = decoder_of(model)(
                tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).last_hidden_state
            for index, row in enumerate(batch):
                states[row] = output[index, n_prefix : len(sequences[row])].cpu().clone()
        report(stage, len(states), len(sequences))
    return [states[row] for row in range(len(sequences))]
