"""How prompts share a forward pass; what capture and fine-tune have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SHARING_VERIFIED = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox", "gemma")
"""Architectures (`model_type`) for which running a shared prefix once was tested to change nothing."""


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
