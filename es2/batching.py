"""How prompts share a forward pass, and how replies end: what capture, fine-tune and evaluation have in common.

What all prompts begin with is run once; its keys and values are then handed to every batch of prompts that follow it.
Imports no torch by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KeysAndValues = list[tuple["torch.Tensor", "torch.Tensor"]]
"""Of the shared tokens, in every block; empty where nothing is shared."""

SHARING_VERIFIED = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox", "gemma")
"""Architectures (`model_type`) for which running a shared prefix once was tested to change nothing."""


REPLIES_AT_ONCE = 3
"""Times as many prompts of a fine-tune reply together: token by token there is less to do for each."""


def usual_tokens(device: str) -> int:
    """How many tokens a forward pass reads at once on this kind of torch device, where memory is not the limit."""
    return 640 if device == "cpu" else 16_384  # more is slower on a CPU: the batch outgrows the caches


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of like length, the longest first, so that too little memory shows at once.

    Args:
        lengths: tokens of each prompt.
        budget: padded tokens of one batch, at least one prompt.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def reply_batches(lengths: Sequence[int], budget: int, pads: bool) -> Iterator[list[int]]:
    """Indices of prompts that reply together: as `batches_by_length`, or without `pads` those of equal length only."""
    if pads:
        yield from batches_by_length(lengths, budget)
        return
    for length in sorted(set(lengths), reverse=True):
        rows = [row for row, n in enumerate(lengths) if n == length]
        size = max(1, budget // length)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


@dataclass
class Tree:
    """Prompts that share a row: what some of them begin with alike stands there once, as the beginning of a branch.

    Attributes:
        tokens: of the row.
        parents: for each token, where the one before it stands; −1 for a first one.
        depths: for each token, how many come before it in its prompt.
        slots: for each prompt, by its index, where its tokens stand.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    slots: dict[int, list[int]] = field(default_factory=dict)

    def grow(self, prompt: int, tokens: Sequence[int], stem: Sequence[int]) -> None:
        """Add a prompt that begins with the tokens at `stem`, slots that are there already."""
        path = list(stem)
        for depth in range(len(stem), len(tokens)):
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(tokens[depth])
            self.depths.append(depth)
        self.slots[prompt] = path


def n_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def plant(prompts: Sequence[Sequence[int]], width: int) -> list[Tree]:
    """Prompts in rows of at most `width` tokens (a longer prompt has its own), neighbours in the dictionary together.

    Contrast twins begin alike, and half of all questions begin like another one. A token that sees only its own branch
    is the same token in every prompt of that branch, so it is run once; and rows of many prompts fill up evenly.
    """
    trees: list[Tree] = []
    before: Sequence[int] = ()
    path: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: tuple(prompts[index])):
        tokens = prompts[index]
        alike = n_alike(before, tokens)
        if not trees or len(trees[-1].tokens) + len(tokens) - alike > width:
            trees.append(Tree())
            alike = 0
        trees[-1].grow(index, tokens, path[:alike])
        before, path = tokens, trees[-1].slots[index]
    return trees


def keys_and_values(decoder: Any, tokens: Sequence[int], device: torch.device) -> KeysAndValues:
    """Run what all prompts begin with once, so that what follows can attend to it; nothing for no tokens.

    Args:
        decoder: the blocks of a transformers model with what stands below them (`model.base_model`).
        tokens: the shared ones.
        device: the decoder's.
    """
    import torch

    if not tokens:
        return []
    cache = cache_of([], 1)
    decoder(torch.tensor([tuple(tokens)], device=device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(shared: KeysAndValues, n_prompts: int) -> Any:
    """A transformers cache that holds `shared` for each of `n_prompts` prompts; what follows is appended to it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(shared):
        cache.update(keys.expand(n_prompts, -1, -1, -1), values.expand(n_prompts, -1, -1, -1), layer)
    return cache


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a reply of this transformers model."""
    ids = model.generation_config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def until_end(reply: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """A reply up to and including the first token that ends it; all of it if none does."""
    end = next((index for index, token in enumerate(reply) if token in ends), len(reply) - 1)
    return tuple(reply[: end + 1])
