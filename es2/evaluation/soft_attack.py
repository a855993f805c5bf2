"""The soft-prompt part of an evaluation: what models reply after vectors that were fitted to each of them.

Vectors are never kept, so an evaluation that goes on after a kill fits them again: the same ones, up to rounding, since
the seed and the prompts decide them. Of replies only the class is kept.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from es2.analysis.refusal import RULES_VERSION
from es2.analysis.resampling import resample_pairs
from es2.analysis.results import Analysis
from es2.core.errors import InputError
from es2.evaluation.attack import attackers_of, curve_point
from es2.evaluation.robustness import Attacker
from es2.evaluation.soft_prompt import (
    N_FITTED,
    STEPS,
    VERSION,
    SoftPrompt,
    fit_soft_prompt,
    own_refusals,
    random_directions,
    soft_sweep,
    spliced,
)
from es2.evaluation.steering import Steered, Steering
from es2.evaluation.suites import BOOTSTRAP, Work, check_length, choose_prompts, generate, load
from es2.models.chat_template import Rendered, render, reply_thinking, template_prefix
from es2.models.loading import load_tokenizer
from es2.models.thinking import answer_reader
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.sources import LayerSource

if TYPE_CHECKING:
    from torch import Tensor


def soft_prompts(
    work: Work,
    prompts: PromptSet,
    sources: Mapping[str, LayerSource],
    analysis: Analysis,
    targets: Sequence[int] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each model replies to harmful `test` prompts after soft prompts; arguments as `perturbation`.

    Raises:
        InputError: for a model that cannot be given vectors, before anything is fitted.
    """
    config, measured = work.config, prompts.measured()
    attackers = attackers_of(work, measured, sources, analysis, targets)
    sample = choose_prompts(measured.select(measured.in_split("test")), config.steering_limit, HARMFUL)
    fitted_on = choose_prompts(measured.select(measured.in_split("probe")), N_FITTED, HARMFUL)
    tokenizer = load_tokenizer(work.folder)
    rendered, fitting = (render(tokenizer, some.texts, work.rendering) for some in (sample, fitted_on))
    work.thinking = reply_thinking(tokenizer, work.rendering)
    longest = max(config.soft_lengths) + max(map(len, (*rendered.token_ids, *fitting.token_ids)))
    check_length(work, longest)
    sweep = soft_sweep(config.soft_lengths, config.soft_budgets)
    found, refused = {}, {}
    for name in work.models:
        found[name], refused[name] = _reply_soft(
            work, name, attackers[name], tokenizer, sample, rendered, fitting, sweep
        )
    weights = resample_pairs(sample, BOOTSTRAP, config.seed)
    document = {
        "layers": list(attackers["base"].layers),
        "n_prompts": len(sample),
        "n_fitted": len(fitted_on),
        "n_refused": refused,
        "curve": [
            curve_point(soft.to_dict(), {name: found[name][index] for name in work.models}, weights)
            for index, soft in enumerate(sweep)
        ],
    }
    rows = [
        {"prompt": text, "steering": soft.to_dict()}
        | {name: {entry: found[name][index][row][entry] for entry in ("verdict", "read")} for name in work.models}
        for index, soft in enumerate(sweep)
        for row, text in enumerate(sample.texts)
    ]
    return document, rows


def _reply_soft(
    work: Work,
    name: str,
    attacker: Attacker,
    tokenizer: Any,
    sample: PromptSet,
    rendered: Rendered,
    fitting: Rendered,
    sweep: Sequence[SoftPrompt],
) -> tuple[list[list[dict[str, Any]]], int]:
    """The log's record of every soft prompt (outer) and prompt (inner), and how many of the fitted prompts are refused
    without one.
    """
    cases = [(soft, row) for soft in sweep for row in range(len(sample))]
    fixed = {"attacker": attacker.digest, "seed": work.config.seed, "rules": RULES_VERSION, "version": VERSION}
    learnt = fixed | {"fitted": fitting.digest}

    def key(soft: SoftPrompt, row: int) -> str:
        own = fixed
        if soft.direction == "soft_prompt":
            below = [one.budget for one in sweep if (one.direction, one.length) == (soft.direction, soft.length)]
            own = learnt | {"budgets": [budget for budget in below if budget <= soft.budget]}
        start = rendered.first_instruction[row]
        return work.key(name, rendered.token_ids[row], soft=soft.to_dict(), start=start, **own)

    keys = [key(soft, row) for soft, row in cases]
    counted = work.key(name, (), soft="refused", **learnt)
    if any(one not in work.log for one in (*keys, counted)):
        _generate_soft(work, name, attacker, tokenizer, sample, rendered, fitting, cases, keys, counted)
    records = [work.log[one] for one in keys]
    by_soft = [records[start : start + len(sample)] for start in range(0, len(records), len(sample))]
    return by_soft, int(work.log[counted]["read"]["n_refused"])


def _generate_soft(
    work: Work,
    name: str,
    attacker: Attacker,
    tokenizer: Any,
    sample: PromptSet,
    rendered: Rendered,
    fitting: Rendered,
    cases: Sequence[tuple[SoftPrompt, int]],
    keys: Sequence[str],
    counted: str,
) -> None:
    """Fit the vectors of one model, and log what it replies after them."""
    import torch

    from es2.models.kl import read_lm_head
    from es2.models.soft_tokens import SoftTokens, embeddings_of, mean_embedding_norm, refuse_other_readers

    model = load(work, name)
    refuse_other_readers(model)
    try:
        read_lm_head(model)
    except InputError as error:
        raise InputError(f"No soft prompt can be fitted to this model: {error}") from error
    prefix = template_prefix(tokenizer, [*rendered.token_ids, *fitting.token_ids], work.rendering)
    prefix = prefix[: min(*rendered.first_instruction, *fitting.first_instruction)]
    refusals = own_refusals(
        model, answer_reader(tokenizer, work.thinking), fitting.token_ids, prefix, work.report, f"reply {name}"
    )
    numbers = {"n_refused": sum(map(bool, refusals)), "n_fitted": len(refusals)}
    work.log.add([{"key": counted, "model": name, "read": numbers}])
    fitted = _fit(work, name, model, attacker, fitting, refusals, prefix, [soft for soft, _ in cases])
    unit, width = mean_embedding_norm(model), embeddings_of(model, [0]).shape[-1]
    bank: list[Tensor] = []
    tokens: list[tuple[int, ...]] = []
    placed: dict[tuple[Any, ...], range] = {}
    first = SoftTokens(model, torch.empty(0)).first
    for soft, row in cases:
        own: tuple[Any, ...] = (soft,) if soft.direction == "soft_prompt" else (soft, row)
        if soft.length and own not in placed:
            start = first + sum(map(len, bank))
            placed[own] = range(start, start + soft.length)
            if soft.direction == "soft_prompt":
                bank.append(fitted[soft])
            else:
                random = random_directions(sample.texts[row], soft.length, width, work.config.seed)
                bank.append(torch.tensor(soft.budget * unit * random, dtype=torch.float32, device=model.device))
        tokens.append(spliced(rendered.token_ids[row], rendered.first_instruction[row], placed.get(own, ())))

    texts = [sample.texts[row] for _, row in cases]
    reading = Steered(model, attacker, [Steering("none", 0.0)] * len(cases), texts, work.config.seed)

    def entries(index: int, reply: tuple[int, ...], text: str) -> dict[str, Any]:
        soft = cases[index][0]
        read = reading.read.of(index) | {"relative": soft.budget}
        verdict = work.read(tokenizer, reply, text)[0]
        shown = {"prompt": texts[index], "steering": soft.to_dict(), "layers": list(attacker.layers)}
        return shown | {"verdict": verdict, "read": read}

    with SoftTokens(model, torch.cat(bank)), reading:
        stage = f"soft {name}"
        generate(work, model, name, tokenizer, tokens, prefix, keys, entries, stage=stage, steering=reading)
    del model, reading, bank, fitted
    gc.collect()


def _fit(
    work: Work,
    name: str,
    model: Any,
    attacker: Attacker,
    fitting: Rendered,
    refusals: Sequence[tuple[int, ...]],
    prefix: tuple[int, ...],
    sweep: Sequence[SoftPrompt],
) -> dict[SoftPrompt, Tensor]:
    """The fitted vectors of every soft prompt of a sweep."""
    wanted = [soft for soft in dict.fromkeys(sweep) if soft.direction == "soft_prompt"]
    done, total, stage = 0, STEPS * len(wanted), f"fit {name}"
    work.report(stage, 0, total)

    def step() -> None:
        nonlocal done
        done += 1
        work.report(stage, done, total)

    found: dict[SoftPrompt, Tensor] = {}
    for length, group in groupby(wanted, lambda soft: soft.length):
        own = list(group)
        vectors = fit_soft_prompt(
            model,
            attacker,
            fitting.token_ids,
            fitting.first_instruction,
            refusals,
            length,
            [soft.budget for soft in own],
            prefix=prefix,
            seed=work.config.seed,
            step=step,
        )
        found |= dict(zip(own, vectors, strict=True))
    return found
