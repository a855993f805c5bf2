"""What a model says and how well it still speaks: greedy replies, rates of refusal, and closeness to the base model.

Replies are generated token by token for many prompts at once, because a token for one prompt costs as much as a token
for dozens. That is allowed to change nothing: prompts are filled up on the left under a mask with explicit positions,
the template's head is run once for all, and architectures on which that was not verified (or whose sliding window
would count the filling) reply to prompts of equal length at a time. The same loop runs a plain transformers model, one
with an adapter inside, and the model behind a TransformerLens bridge, so a pushed reply differs from a plain one in the
push alone. Base and tuned are one model in memory: base speaks first, then the fine-tune is put on. Numbers are plain
numpy on top; this module imports torch only where it generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.batching import (
    SHARING_VERIFIED,
    KeysAndValues,
    batches_by_length,
    cache_of,
    keys_and_values,
    reply_batches,
    until_end,
    usual_tokens,
)
from es2.errors import InputError, MachineError
from es2.jobs import Reporter, silent
from es2.model_files import first_line
from es2.prompts import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.refusal import VERDICTS
from es2.resampling import Interval, interval, safe_ratio

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from es2.kl import Head

Tokens = Sequence[int]
Around = Callable[[list[int]], AbstractContextManager[Any]]
"""Given the rows of a batch, what to have open while it replies; what it yields is handed on with the batch."""

_TOKENS_AT_ONCE = {"cpu": 9_600}  # prompts and replies together: a hundred short exchanges, about 0.5 GB of keys
_TOKENS_AT_ONCE_ACCELERATED = 16_384


# -------------------------------------------------------------------------------------------------------------- replies


@dataclass(frozen=True)
class ReplyBatch:
    """Replies that were generated together.

    Attributes:
        rows: which prompts, by index.
        replies: the reply of each, up to and including the token that ends it.
        seen: what `around` yielded.
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
    head: Tokens = (),
    done: Container[int] = (),
    around: Around | None = None,
    tokens_at_once: int | None = None,
    report: Reporter = silent,
    stage: str = "reply",
) -> Iterator[ReplyBatch]:
    """Reply to prompts greedily, in batches of like length.

    Args:
        model: a transformers causal language model, with or without an adapter inside; also a bridge's own
            `original_model`, under whose hooks `around` may push.
        prompts: rendered prompts.
        n_tokens: the longest reply.
        end_tokens: what ends one.
        head: the tokens that every prompt begins with; run once where that was verified to change nothing.
        done: indices of prompts that need no reply any more. Which prompts share a batch does not depend on it.
        around: opened for each batch, after the head was run.
        tokens_at_once: tokens of prompts and replies in one batch, at least one prompt; by default what suits the
            device.
        report: told at every token; it may raise to stop.
        stage: what it is told.

    Yields:
        Each batch as soon as it is complete.

    Raises:
        MachineError: when memory runs out even for a single prompt.
    """
    import torch

    from es2.models import is_out_of_memory

    config = model.config.get_text_config()
    verified = model.config.model_type in SHARING_VERIFIED
    window = getattr(config, "sliding_window", None)
    longest = max(map(len, prompts), default=0) + n_tokens
    pads = verified and (window is None or longest <= window)
    n_shared = len(head) if verified else 0
    budget = tokens_at_once or _TOKENS_AT_ONCE.get(model.device.type, _TOKENS_AT_ONCE_ACCELERATED)
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
        shared = keys_and_values(model.base_model, head[:n_shared], model.device)
        while waiting:
            batch = waiting.pop(0)
            sequences = [tuple(prompts[row][n_shared:]) for row in batch]

            def step(count: int, size: int = len(batch), before: int = finished) -> None:
                report(stage, before + min(count, n_tokens - 1) * size, total)

            try:
                with around(batch) if around else nullcontext() as seen:
                    replies = _reply(model, sequences, shared, n_tokens, end_tokens, pads, step)
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


def _reply(
    model: Any,
    sequences: list[tuple[int, ...]],
    shared: KeysAndValues,
    n_tokens: int,
    end_tokens: frozenset[int],
    pads: bool,
    step: Callable[[int], None],
) -> list[tuple[int, ...]]:
    """The greedy replies to prompts that all follow `shared`; without `pads` they are of equal length."""
    import torch

    width = max(map(len, sequences))
    latest = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(latest)
    for row, sequence in enumerate(sequences):
        latest[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    cache = cache_of(shared, len(sequences))
    mask = torch.cat([mask.new_ones(len(sequences), shared[0][0].shape[-2] if shared else 0), mask], dim=1)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    replies: list[list[int]] = [[] for _ in sequences]
    for count in range(n_tokens):
        step(count)
        inputs: dict[str, Any] = {}
        if pads:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -latest.shape[1] :]
            inputs = {"attention_mask": mask.to(model.device), "position_ids": positions.to(model.device)}
        output = model(latest.to(model.device), past_key_values=cache, use_cache=True, **last_only, **inputs)
        chosen = output.logits[:, -1].argmax(dim=-1).tolist()
        for reply, token in zip(replies, chosen, strict=True):
            reply.append(reply[-1] if reply and reply[-1] in end_tokens else token)
        if all(reply[-1] in end_tokens for reply in replies):
            break
        latest = torch.tensor([reply[-1:] for reply in replies])
        mask = torch.cat([mask, mask.new_ones(len(sequences), 1)], dim=1)
    return [until_end(reply, end_tokens) for reply in replies]


def put_on(model: Any, weights: Path) -> None:
    """Make a base model the tuned one, in place: an adapter's layers put in, or the changed blocks copied over.

    Args:
        model: from `es2.models.load_model`.
        weights: what `es2.runs.tuned_weights` gave.

    Raises:
        InputError: when the fine-tune is damaged or of another model.
    """
    if weights.is_file():
        from es2.models import load_blocks

        load_blocks(model, weights)
        return
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        PeftModel.from_pretrained(model, str(weights)).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"The adapter {str(weights)!r} does not fit the model ({first_line(error)}); "
            "give the model it was trained on."
        ) from error


# ---------------------------------------------------------------------------------------------------------------- rates


def rate_interval(
    values: Float[np.ndarray, "prompt"], weights: Float[np.ndarray, "resample prompt"], lowest: float = 0.0
) -> Interval:
    """The mean of `values` under every resample, with its interval.

    Where all prompts agree (nobody refused, or nobody changed) a bootstrap has nothing to resample and would claim
    certainty. There the bound is Wilson's: what may hide behind none out of n.

    Args:
        values: 0 or 1 for each prompt; −1, 0 or 1 for a paired difference (then `lowest` is −1).
        weights: multiplicities from `resample_pairs`.
        lowest: the smallest value possible; the largest is 1.
    """
    found = interval(weights @ values / weights.sum(axis=1))
    if np.ptp(values) > 0:
        return found
    hidden = 1.96**2 / (len(values) + 1.96**2)
    return Interval(found.value, max(lowest, found.value - hidden), min(1.0, found.value + hidden))


def refusal_numbers(
    prompts: PromptSet, verdicts: Mapping[str, Sequence[str]], weights: Float[np.ndarray, "resample prompt"]
) -> dict[str, Any]:
    """Defence success rate, over-refusal and what was neither refused nor answered, by model, and base → tuned.

    Args:
        prompts: in canonical order.
        verdicts: one of `es2.refusal.VERDICTS` for each prompt, by `base` and, where there is one, `tuned`.
        weights: `resample_pairs` of the same prompts; both models see the same resamples.

    Returns:
        JSON values. By model: `dsr` (refused / all harmful requests), `over_refusal` (refused / all harmless),
        `harmful_degenerate`, `harmful_empty`, `harmless_degenerate`, `harmless_empty`, each with its interval or None
        where the set lacks the label, and `counts` by label and verdict. `change`: tuned − base, paired, or None.
    """
    flags: dict[str, dict[str, Any]] = {model: {} for model in verdicts}
    rows = {LABEL_NAMES[label]: prompts.labels == label for label in (HARMFUL, HARMLESS)}
    names = {"harmful": "dsr", "harmless": "over_refusal"}
    for model, found in verdicts.items():
        array = np.array(found)
        for label, chosen in rows.items():
            flags[model][names[label]] = (array == "refusal", chosen)
            for verdict in ("degenerate", "empty"):
                flags[model][f"{label}_{verdict}"] = (array == verdict, chosen)

    def rated(values: np.ndarray, chosen: np.ndarray, lowest: float = 0.0) -> dict[str, Any] | None:
        if not chosen.any():
            return None
        return rate_interval(values[chosen].astype(np.float64), weights[:, chosen], lowest).to_dict()

    result: dict[str, Any] = {
        model: {name: rated(*pair) for name, pair in of_model.items()}
        | {
            "counts": {
                label: {
                    verdict: sum(bool(c) and v == verdict for v, c in zip(verdicts[model], chosen, strict=True))
                    for verdict in VERDICTS
                }
                for label, chosen in rows.items()
            }
        }
        for model, of_model in flags.items()
    }
    change = None
    if "tuned" in flags:
        change = {
            name: rated(flags["tuned"][name][0].astype(int) - flags["base"][name][0].astype(int), chosen, -1.0)
            for name, (_, chosen) in flags["base"].items()
        }
    return {"base": result["base"], "tuned": result.get("tuned"), "change": change}


# -------------------------------------------------------------------------------------------------------------- ability


def exchange_states(
    model: Any,
    prompts: Sequence[Tokens],
    replies: Sequence[Tokens],
    n_head: int,
    *,
    report: Reporter = silent,
    stage: str = "read",
) -> list[Tensor]:
    """The model's states before its head while it reads prompts and the replies that were given to them.

    Args:
        model: base or tuned.
        prompts: rendered prompts.
        replies: the base's replies to them.
        n_head: so many tokens of every prompt belong to the template's head and do not count.
        report: told after every batch.
        stage: what it is told.

    Returns:
        For each prompt `[token, d_model]` on the CPU: its own tokens after the template's head, then the reply's but
        the last. A reply's tokens were read off the states from the last prompt token on.
    """
    import torch

    sequences = [(*prompt, *reply[:-1]) for prompt, reply in zip(prompts, replies, strict=True)]
    budget = usual_tokens(model.device.type)
    states: dict[int, Tensor] = {}
    report(stage, 0, len(sequences))
    for batch in batches_by_length([len(sequence) for sequence in sequences], budget):
        width = len(sequences[batch[0]])
        # Right padding leaves every token at its own position, which is what models assume.
        tokens, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
        for index, row in enumerate(batch):
            tokens[index, : len(sequences[row])] = torch.tensor(sequences[row])
            mask[index, : len(sequences[row])] = 1
        with torch.inference_mode():
            output = model.base_model(
                tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            ).last_hidden_state
            for index, row in enumerate(batch):
                states[row] = output[index, n_head : len(sequences[row])].cpu().clone()
        report(stage, len(states), len(sequences))
    return [states[row] for row in range(len(sequences))]


@dataclass(frozen=True)
class Exchange:
    """How two models read one prompt and the base's reply to it; sums over tokens.

    Attributes:
        kl_prompt, kl_reply: KL(base ‖ tuned) in nats over the prompt's own tokens (`last` included) and over the
            distributions that the reply's tokens were drawn from (`last` included).
        n_prompt, n_reply: how many tokens those are.
        nll_base, nll_tuned: − log-probability of the reply.
        agreed: how many of the reply's tokens are also what the tuned model would say at that place.
    """

    kl_prompt: float
    kl_reply: float
    n_prompt: int
    n_reply: int
    nll_base: float
    nll_tuned: float
    agreed: int


def compare_exchange(head: Head, base: Tensor, tuned: Tensor, reply: Tokens) -> Exchange:
    """Compare the states of `exchange_states` under base and tuned, for one prompt and the base's reply."""
    import torch

    n_prompt = len(base) - len(reply) + 1
    device = head.weight.device
    kls, nlls, agreed = [], {"base": 0.0, "tuned": 0.0}, 0
    said = torch.tensor(list(reply), device=device)
    with torch.inference_mode():
        for start in range(0, len(base), 64):
            logs = {
                model: head.logits(states[start : start + 64].to(device)).log_softmax(dim=-1)
                for model, states in (("base", base), ("tuned", tuned))
            }
            kls.append((logs["base"].exp() * (logs["base"] - logs["tuned"])).sum(dim=-1).double().cpu())
            first = max(n_prompt - 1 - start, 0)  # the first state here that a token of the reply was read from
            targets = said[start + first - (n_prompt - 1) :][: max(len(logs["base"]) - first, 0), None]
            for model, log in logs.items():
                nlls[model] -= float(log[first:].gather(1, targets).double().sum()) if len(targets) else 0.0
            agreed += int((logs["tuned"][first:].argmax(dim=-1) == targets[:, 0]).sum()) if len(targets) else 0
    kl = torch.cat(kls)
    return Exchange(
        kl_prompt=float(kl[:n_prompt].sum()),
        kl_reply=float(kl[n_prompt - 1 :].sum()),
        n_prompt=n_prompt,
        n_reply=len(reply),
        nll_base=nlls["base"],
        nll_tuned=nlls["tuned"],
        agreed=agreed,
    )


def ability_numbers(
    exchanges: Sequence[Exchange], weights: Float[np.ndarray, "resample prompt"], compared: bool
) -> dict[str, Any]:
    """Closeness to the base on harmless prompts, per token, with intervals over prompts.

    Args:
        exchanges: of each prompt.
        weights: `resample_pairs` of the same prompts.
        compared: whether there is a tuned model; without one only the base's perplexity is told.

    Returns:
        JSON values: `kl_prompt` and `kl_reply` (nats per token), `perplexity` of the base's replies by `base` and
        `tuned` with their `ratio`, and `agreement`, the share of the base's tokens that tuned would also have said.
    """

    def column(name: str) -> Float[np.ndarray, "resample"]:
        return weights @ np.array([getattr(exchange, name) for exchange in exchanges], dtype=np.float64)

    n_reply = column("n_reply")
    perplexity = {model: np.exp(column(f"nll_{model}") / n_reply) for model in ("base", "tuned")}
    base = interval(perplexity["base"]).to_dict()
    if not compared:
        nothing = {"kl_prompt": None, "kl_reply": None, "agreement": None}
        return nothing | {"perplexity": {"base": base, "tuned": None, "ratio": None}}
    return {
        "kl_prompt": interval(column("kl_prompt") / column("n_prompt")).to_dict(),
        "kl_reply": interval(column("kl_reply") / n_reply).to_dict(),
        "agreement": interval(column("agreed") / n_reply).to_dict(),
        "perplexity": {
            "base": base,
            "tuned": interval(perplexity["tuned"]).to_dict(),
            "ratio": interval(safe_ratio(perplexity["tuned"], perplexity["base"], both_zero=1.0)).to_dict(),
        },
    }
