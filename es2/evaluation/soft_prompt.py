"""The soft prompt: a few vectors before the user's text that take a model's refusals away, fitted once for all prompts.

One of the embedding-level attacks in the table of the ES2 paper (arXiv 2603.20206). Its target is what the model itself
does: the probes at the attacked layers are to read harmless, and the first tokens of the model's own refusals are to
become unlikely. No answer is a target. Vectors live in memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.refusal import judge_reply
from es2.core.errors import InputError
from es2.evaluation.robustness import Attacker
from es2.models.batching import Tokens, end_tokens
from es2.prompts.prompt_set import stable_hash

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from es2.core.progress import Reporter


LENGTHS = (4,)  # numbers of vectors
BUDGETS = (0.05, 0.1, 0.2, 0.5)  # lengths of a vector relative to the mean length of a token's embedding
KINDS = ("soft_prompt", "soft_random")
"""The fitted vectors, and the control: vectors in random directions, other ones for each prompt."""

VERSION = 1  # raise it when the same settings would fit other vectors
N_FITTED = 16  # harmful prompts of `probe` that vectors are fitted on
STEPS = 10  # of Adam for each budget, which goes on from the vectors of the budget below
PROMPTS_PER_STEP = 4
OPENING_TOKENS = 32  # of a reply, in which a refusal is looked for
REFUSAL_TOKENS = 8  # of a refusal, which are to become unlikely
_RATE = 0.2  # of Adam, for coordinates that begin at about 1


@dataclass(frozen=True)
class SoftPrompt:
    """One soft prompt of the sweep.

    Attributes:
        direction: of `KINDS`; `none` for prompts as they are.
        length: number of vectors.
        budget: length of each vector relative to the mean length of a token's embedding.
    """

    direction: str = "none"
    length: int = 0
    budget: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The settings, with the `p0` that steerings have and a soft prompt has not."""
        return asdict(self) | {"p0": None}


def soft_sweep(lengths: Sequence[int] = LENGTHS, budgets: Sequence[float] = BUDGETS) -> list[SoftPrompt]:
    """No soft prompt, then each length, fitted and random, at every budget from the smallest on."""
    ordered = sorted(set(map(float, budgets)))
    return [SoftPrompt()] + [
        SoftPrompt(kind, length, budget) for length in sorted(set(lengths)) for kind in KINDS for budget in ordered
    ]


def check_soft_sweep(lengths: Sequence[int], budgets: Sequence[float]) -> None:
    """Raise `InputError` for a length or a budget that cannot be."""
    for length in lengths:
        if not 1 <= length <= 64:
            raise InputError(f"A soft prompt has 1 to 64 vectors, not {length!r}.")
    for budget in budgets:
        if not 0 < budget <= 100:
            raise InputError(
                f"A soft prompt's budget is relative to the length of a token's embedding, between 0 and 100, not "
                f"{budget!r}."
            )


def random_directions(text: str, length: int, width: int, seed: int) -> Float[np.ndarray, "vector width"]:
    """Unit vectors that depend on seed, length and text alone."""
    found = np.random.default_rng([seed, length, stable_hash("soft:" + text) % 2**32]).normal(size=(length, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def own_refusals(
    model: Any,
    words: Callable[[Sequence[int]], str],
    prompts: Sequence[Tokens],
    prefix: Tokens,
    report: Reporter,
    stage: str,
) -> list[tuple[int, ...]]:
    """The first tokens of the model's greedy reply to each prompt that it refuses; of other prompts none.

    `words` gives the text of a reply's answer (`answer_reader`): a thought is no refusal.
    """
    from es2.models.replies import greedy_replies

    found: list[tuple[int, ...]] = [()] * len(prompts)
    for batch in greedy_replies(
        model, prompts, OPENING_TOKENS, end_tokens(model), prefix=prefix, report=report, stage=stage
    ):
        for row, reply in zip(batch.rows, batch.replies, strict=True):
            if judge_reply(words(reply)) == "refusal":
                found[row] = reply[:REFUSAL_TOKENS]
    return found


def spliced(prompt: Tokens, start: int, own: Sequence[int]) -> tuple[int, ...]:
    """A prompt with the tokens of a soft prompt before the token at `start`."""
    return (*prompt[:start], *own, *prompt[start:])


def fit_soft_prompt(
    model: Any,
    attacker: Attacker,
    prompts: Sequence[Tokens],
    starts: Sequence[int],
    refusals: Sequence[Tokens],
    length: int,
    budgets: Sequence[float],
    *,
    prefix: Tokens,
    seed: int,
    step: Callable[[], None] = lambda: None,
) -> list[Float[Tensor, "vector width"]]:
    """Vectors for each budget, fitted by a few steps on a few prompts at a time.

    The loss is softplus of the log-odds of harmful that the probes read at `last`, the mean over the attacker's layers,
    and, over the tokens of the prompts' refusals, −log(1 − p). Where no prompt of a step is refused, no block above the
    attacked ones is run.

    Args:
        model: the attacked one, its weights frozen.
        attacker: with the probes of the same model.
        starts: for each prompt, the place of the first token of the user's own text.
        refusals: of `own_refusals`.
        budgets: ascending.
        prefix: the tokens that every prompt begins with; run once.
        step: called after each step; it may raise to stop.
    """
    import torch
    from torch.nn.functional import normalize, softplus

    from es2.models.forward import FinetuneForward
    from es2.models.soft_tokens import SoftTokens, embeddings_of, mean_embedding_norm

    width = embeddings_of(model, [0]).shape[-1]
    unit = mean_embedding_norm(model)
    drawn = np.random.default_rng([seed, length]).normal(size=(length, width))
    raw = torch.tensor(drawn, dtype=torch.float32, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=_RATE)
    forward = FinetuneForward(model, template_prefix=prefix, layers=attacker.layers)
    normals, slopes, offsets = (
        torch.tensor(np.array(values), dtype=torch.float32, device=model.device)
        for values in zip(*((plane.normal, plane.slope, plane.offset) for plane in attacker.planes), strict=True)
    )
    n_batches = -(-len(prompts) // PROMPTS_PER_STEP)
    found = []
    with SoftTokens(model, raw) as soft:
        own = range(soft.first, soft.first + length)
        given = [spliced(prompt, start, own) for prompt, start in zip(prompts, starts, strict=True)]
        with torch.no_grad():
            shared = forward.run_template_prefix()
        for number in range(STEPS * len(budgets)):
            soft.vectors = budgets[number // STEPS] * unit * normalize(raw, dim=1)
            rows = range(number % n_batches, len(given), n_batches)
            own_rows = [refusals[row] for row in rows]
            if any(own_rows):
                embeddings, states = forward.read_replies([given[row] for row in rows], own_rows, shared)
                logits = forward.head.logits(torch.cat(states))
                refusing = torch.tensor([token for reply in own_rows for token in reply], device=logits.device)
                others = logits.scatter(1, refusing[:, None], -torch.inf)  # −log(1 − p) has no other exact form
                kept = (logits.logsumexp(dim=1) - others.logsumexp(dim=1)).mean()
            else:
                embeddings = forward.embed([given[row] for row in rows], shared)
                kept = embeddings.new_zeros(())
            log_odds = (embeddings * normals).sum(dim=-1) * slopes + offsets
            (raw.grad,) = torch.autograd.grad(softplus(log_odds).mean() + kept, raw)
            adam.step()
            if (number + 1) % STEPS == 0:
                found.append((budgets[number // STEPS] * unit * normalize(raw, dim=1)).detach())
            step()
    return found
