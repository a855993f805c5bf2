"""What a model says and how well it still speaks: greedy replies, rates of refusal, and closeness to the base model.

Replies are generated token by token for many prompts at once, because a token for one prompt costs as much as a token
for dozens. That is allowed to change nothing: prompts are filled up on the left under a mask with explicit positions,
the template's head is run once for all, and architectures on which that was not verified (or whose sliding window would
count the filling) reply to prompts of equal length at a time. The same loop runs a plain transformers model, one with
an adapter inside, and the model behind a TransformerLens bridge, so a steered reply differs from a plain one in the
steering alone. Base and tuned are one model in memory: base speaks first, then the fine-tune is put on. Numbers are
plain numpy on top; this module imports torch only where it generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.resampling import Interval, interval, safe_ratio
from es2.evaluation.refusal import REPLY_CLASSES
from es2.models.batching import Tokens
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from es2.models.kl import LmHead


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
        verdicts: one of `es2.evaluation.refusal.REPLY_CLASSES` for each prompt, by `base` and, where there is one,
            `tuned`.
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
                    for verdict in REPLY_CLASSES
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


def compare_exchange(head: LmHead, base: Tensor, tuned: Tensor, reply: Tokens) -> Exchange:
    """Compare the states of `exchange_states` under base and tuned, for one prompt and the base's reply."""
    import torch

    from es2.models.kl import compare_tokens

    n_prompt = len(base) - len(reply) + 1
    device = head.weight.device
    kls, said_by, agreed, start = [], {"base": 0.0, "tuned": 0.0}, 0, 0
    said = torch.tensor(list(reply), device=device)[:, None]
    with torch.inference_mode():
        for found in compare_tokens(tuned.to(device), base.to(device), head):
            kls.append(found.kl.double().cpu())
            first = max(n_prompt - 1 - start, 0)  # the first state here that a token of the reply was read from
            start += len(found.kl)
            log_tuned, log_base = found.log_tuned[first:], found.log_base[first:]
            targets = said[start - len(log_base) - (n_prompt - 1) :][: len(log_base)]
            said_by["base"] += float(log_base.gather(1, targets).double().sum())
            said_by["tuned"] += float(log_tuned.gather(1, targets).double().sum())
            agreed += int((log_tuned.argmax(dim=-1) == targets[:, 0]).sum())
    kl = torch.cat(kls)
    return Exchange(
        kl_prompt=float(kl[:n_prompt].sum()),
        kl_reply=float(kl[n_prompt - 1 :].sum()),
        n_prompt=n_prompt,
        n_reply=len(reply),
        nll_base=-said_by["base"],
        nll_tuned=-said_by["tuned"],
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
