"""Toy prompt sets and clouds of embeddings whose distances, margins and spreads are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.probes import Probes
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet, own_pair

if TYPE_CHECKING:
    from jaxtyping import Float


def paired_prompts(n_pairs: int, name: str = "toy", splits: Sequence[str] = ("probe", "test")) -> PromptSet:
    """Contrast pairs, harmful first, dealt out evenly over `splits`."""
    texts, labels, pairs, own_splits = [], [], [], []
    for pair in range(n_pairs):
        for label in (HARMFUL, HARMLESS):
            texts.append(f"{name} request {pair} {'bad' if label == HARMFUL else 'good'}")
            labels.append(label)
            pairs.append(f"{name}-{pair:04d}")
            own_splits.append(splits[pair % len(splits)])
    return _set(name, texts, labels, pairs, own_splits)


def single_prompts(labels: Sequence[int], name: str = "single", split: str = "test") -> PromptSet:
    """Prompts that belong to no pair."""
    texts = [f"{name} prompt {i}" for i in range(len(labels))]
    return _set(name, texts, labels, [own_pair(text) for text in texts], [split] * len(texts))


def _set(
    name: str, texts: Sequence[str], labels: Sequence[int], pairs: Sequence[str], splits: Sequence[str]
) -> PromptSet:
    return PromptSet(
        name,
        tuple(texts),
        np.array(labels, dtype=np.int8),
        ("unspecified",) * len(texts),
        tuple(pairs),
        tuple(splits),
    )


def permuted(prompts: PromptSet, order: Sequence[int]) -> PromptSet:
    """The same prompts in another order."""

    def pick(column: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(column[row] for row in order)

    return PromptSet(
        prompts.name,
        pick(prompts.texts),
        prompts.labels[list(order)],
        pick(prompts.categories),
        pick(prompts.pairs),
        pick(prompts.splits),
    )


def clouds(
    prompts: PromptSet,
    distances: Sequence[float],
    d_model: int = 12,
    *,
    topic: float = 0.0,
    offset: float = 5.0,
    seed: int = 0,
) -> Float[np.ndarray, "layer prompt d_model"]:
    """Unit Gaussians around two means `distances[l]` apart along the first axis, one pair of clouds a layer.

    `topic` is the deviation of what the two prompts of a pair share; `offset` moves everything along the last axis.
    """
    generator = np.random.default_rng(seed)
    names = sorted(set(prompts.pairs))
    pair = np.array([names.index(own) for own in prompts.pairs])
    side = np.where(prompts.labels == HARMFUL, 0.5, -0.5)
    layers = []
    for distance in distances:
        shared = topic * generator.normal(size=(len(names), d_model))
        cloud = generator.normal(size=(len(prompts), d_model)) + shared[pair]
        cloud[:, 0] += side * distance
        cloud[:, -1] += offset
        layers.append(cloud)
    return np.stack(layers)


def rotation(d_model: int, seed: int = 0) -> Float[np.ndarray, "d_model d_model"]:
    """A random orthogonal matrix."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d_model, d_model)))
    return matrix


def probability(
    probes: Probes, embeddings: Float[np.ndarray, "prompt d_model"], layer: int
) -> Float[np.ndarray, "prompt"]:
    """The probability of harmful that the probe of a layer gives, by its definition: sigmoid(w·z + b)."""
    logits = probes.frame(layer).normalise(embeddings) @ probes.weights[layer] + probes.bias[layer]
    return np.exp(-np.logaddexp(0, -logits))
