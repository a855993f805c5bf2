"""Log-likelihoods of the options of multiple-choice questions under a model, a batch of questions at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from es2.core.progress import Reporter, silent
from es2.models.batching import (
    Tokens,
    batches_by_length,
    cache_before,
    is_verified,
    keys_and_values,
    n_alike,
    n_tokens_of,
    pad,
    usual_tokens,
)
from es2.models.blocks import decoder_of


def score_options(
    model: Any,
    contexts: Sequence[Tokens],
    questions: Sequence[Sequence[Tokens]],
    *,
    prefix: Tokens = (),
    report: Reporter = silent,
    stage: str = "answer",
) -> Iterator[dict[int, tuple[float, ...]]]:
    """The log-probability of each option's own tokens by the question's index, those of a batch together.

    An option's own tokens are those after the context. Options that differ in their last token alone, as letters do,
    are read in one pass of their question.

    Args:
        model: a transformers causal language model, with or without an adapter inside.
        contexts: of each question, the tokens of all that comes before an option.
        questions: of each question, the tokens of context and option together, for each of its options.
        prefix: the tokens that everything begins with; run once where that changes nothing.
        report: called after every batch with `stage`; it may raise to stop.
    """
    import torch

    report(stage, 0, len(questions))
    if not questions:
        return
    n_context = [_n_context(context, options) for context, options in zip(contexts, questions, strict=True)]
    passes = [list(dict.fromkeys(tuple(option[:-1]) for option in options)) for options in questions]
    prefix = prefix[: min(n_context) - 1] if is_verified(model) else ()  # the token before an option has to be run
    with torch.inference_mode():
        before = keys_and_values(decoder_of(model), prefix, model.device)
    n_before = n_tokens_of(before)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    finished = 0
    lengths = [sum(len(tokens) - n_before for tokens in of_question) for of_question in passes]
    for batch in batches_by_length(lengths, usual_tokens(model.device.type)):
        rows = [(question, tokens) for question in batch for tokens in passes[question]]
        own, mask = pad([tokens[n_before:] for _, tokens in rows], n_before=n_before)
        inputs: dict[str, Any] = {"attention_mask": mask.to(model.device), "use_cache": bool(before)}
        if before:
            inputs["past_key_values"] = cache_before(before)
        first = min(n_context[question] for question in batch) - 1 - n_before  # column whose logits are needed
        if keeps:
            inputs["logits_to_keep"] = own.shape[1] - first
        found: dict[int, dict[int, float]] = {question: {} for question in batch}
        with torch.inference_mode():
            logits = model(own.to(model.device), **inputs).logits
            first = own.shape[1] - logits.shape[1]
            for of_row, (question, tokens) in zip(logits, rows, strict=True):
                start = n_context[question] - 1 - n_before - first
                logs = of_row[start : len(tokens) - n_before - first].float().log_softmax(dim=-1)
                for number, option in enumerate(questions[question]):
                    if tuple(option[:-1]) == tokens:
                        targets = torch.tensor(list(option[n_context[question] :]), device=logs.device)
                        found[question][number] = float(logs.gather(1, targets[:, None]).double().sum())
        finished += len(batch)
        report(stage, finished, len(questions))
        yield {question: tuple(scores[number] for number in range(len(scores))) for question, scores in found.items()}


def _n_context(context: Tokens, options: Sequence[Tokens]) -> int:
    """Number of the context's tokens that all options have, which a tokenizer may cut otherwise before an option."""
    return min(*(n_alike(context, option) for option in options), min(map(len, options)) - 1)
