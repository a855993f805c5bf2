"""Greedy replies against transformers' own `generate()`, and against the products that they need.

The same prompts and the same longest reply; `generate()` gets them sorted by length, left-padded, in the batch size
that suits it best. The floor is the time of the linear layers alone, at as many rows as reply together, for every token
that has to be run: those of the prompts after their shared prefix, and those of the replies.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from es2.models.batching import end_tokens, rows_that_fit, until_end
from es2.models.chat_template import render, template_prefix
from es2.models.loading import load_model, load_tokenizer
from es2.models.replies import greedy_replies
from es2.models.row_cache import key_bytes
from tests.benchmarks.contest import Figure, Report, Settings, ratio

NEW_TOKENS = 64
BATCHES = (24, 48, 96)
TIES = 1 / 2000
"""The share of tokens at which a reply may part: two logits within rounding of each other."""


def generated(model: Any, prompts: list[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """The replies of `generate()`, in batches of `size` prompts of like length."""
    ends = end_tokens(model)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    replies: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = len(prompts[rows[0]])
        tokens = torch.tensor([(*[0] * (width - len(prompts[row])), *prompts[row]) for row in rows])
        mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
        with torch.inference_mode():
            found = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        replies |= {row: until_end(reply, ends) for row, reply in zip(rows, found[:, width:].tolist(), strict=True)}
    return [replies[row] for row in range(len(prompts))]


def ours(model: Any, prompts: list[tuple[int, ...]], prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The replies of the evaluation's own function."""
    replies: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, prompts, NEW_TOKENS, end_tokens(model), prefix=prefix):
        replies |= dict(zip(batch.rows, batch.replies, strict=True))
    return [replies[row] for row in range(len(prompts))]


def seconds_per_row(model: Any, n_rows: int) -> float:
    """Of all linear layers, at the rate of `n_rows` rows."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {layer.in_features: torch.randn(n_rows, layer.in_features, dtype=model.dtype) for layer in layers}
    took = []
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            took.append(time.perf_counter() - started)
    return statistics.median(took) / n_rows


def measure(settings: Settings) -> Report:
    """Ours and `generate()` in turns, on the default 96 or as many prompts as are asked for."""
    tokenizer = load_tokenizer(settings.folder)
    model: Any = load_model(settings.folder, dtype="float32", device="cpu").requires_grad_(False)
    prompts = list(render(tokenizer, settings.sample().texts).token_ids)
    prefix = template_prefix(tokenizer, prompts)
    sizes = sorted({min(size, len(prompts)) for size in BATCHES})
    contestants = {"ours": lambda: ours(model, prompts, prefix)}
    contestants |= {f"generate, {size} at once": lambda size=size: generated(model, prompts, size) for size in sizes}
    seconds, replies = settings.alternate(contestants)
    best = min(list(contestants)[1:], key=lambda name: statistics.median(seconds[name]))
    n_replied = sum(map(len, replies["ours"]))
    parted = sum(one != other for one, other in zip(replies["ours"], replies[best], strict=True))
    width = max(map(len, prompts)) + NEW_TOKENS - 1
    n_rows = min(len(prompts), rows_that_fit("cpu", width * key_bytes(model, [])))
    n_run = n_replied + sum(len(prompt) - len(prefix) - 1 for prompt in prompts)
    floor = n_run * seconds_per_row(model, n_rows)
    middle = statistics.median(seconds["ours"])
    figures = (
        Figure("generate() ÷ ours, at its best batch", ratio(seconds, best, "ours"), "×", at_least=2.5),
        Figure("floor ÷ ours", floor / middle, "×", at_least=0.75),
        Figure("ours, tokens of replies", n_replied / middle, "tokens/s"),
        Figure("replies that part from generate()'s, by token", parted / n_replied, "", at_most=TIES),
    )
    details = {"prompts": len(prompts), "rows": n_rows, "replied": n_replied, "seconds": seconds, "best": best}
    return Report("replies", figures, details)
