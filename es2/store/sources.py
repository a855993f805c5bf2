"""Sources of embeddings for an analysis, and the checks that embeddings pass before any number is computed.

A source is anything with `n_layers` and `layer`, so an analysis reads an activation set on disk and an array in a test
alike. It gets rows that are finite and of the right model, or one sentence on what is wrong.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from es2.core.errors import InputError
from es2.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    from jaxtyping import Float, Int


POSITIONS = ("last", "last_instruction")
"""Which token is read: the last prompt token after the chat template, or the last token of the user's own text."""

MEAN = "mean"
"""The position that is the mean over all tokens of the user's own text."""

_BEFORE_LAST = re.compile(r"last-([1-9][0-9]{0,3})")


def before_last(position: str) -> int | None:
    """Number of tokens from a position to the last: 0 for `last`, 2 for `last-2`, None for other positions."""
    found = _BEFORE_LAST.fullmatch(position)
    return 0 if position == "last" else int(found[1]) if found else None


def is_position(position: str) -> bool:
    """Whether it names a position."""
    return position in (*POSITIONS, MEAN) or before_last(position) is not None


def check_position(position: str) -> str:
    """A position as it is; raises `InputError` for what is none."""
    if is_position(position):
        return position
    raise InputError(
        f"A position must be one of {', '.join((*POSITIONS, MEAN))}, or last-1, last-2 … for tokens before the last, "
        f"not {position[:40]!r}."
    )


def in_order(positions: Iterable[str]) -> list[str]:
    """Positions, each once, from the end of the prompt on; raises `InputError` as `check_position`."""

    def place(position: str) -> tuple[int, int]:
        distance = before_last(position)
        return (0, distance) if distance is not None else (1 + (position == MEAN), 0)

    return sorted({check_position(position) for position in positions}, key=place)


def usual_positions(position: str) -> tuple[str, ...]:
    """The positions that are captured together where this one is wanted."""
    return POSITIONS if position in POSITIONS else (position,)


CHAT_TEMPLATE, PLAIN_TEXT = "chat template", "plain text"
"""How a model is given a prompt: as a user's message under its chat template, or, for want of one, as it is."""

LENS, OWN_HOOKS = "transformer-lens", "transformers"
"""Whose hooks read embeddings: TransformerLens's, or those on the blocks of the plain transformers model."""

OWN_HOOKS_NOTE = "Embeddings were read by hooks on the model's own blocks, since TransformerLens has none that fit."

PLAIN_TEXT_NOTE = f"The model has no chat template, so it was given the prompts as {PLAIN_TEXT}."


@runtime_checkable
class LayerSource(Protocol):
    """Embeddings of one model on one prompt set; `es2.store.activation_set.ActivationSet` is one."""

    @property
    def n_layers(self) -> int: ...

    def layer(self, l: int, position: str = "last") -> Float[np.ndarray, "prompt d_model"]: ...


@dataclass(frozen=True)
class ArrayLayers:
    """A `LayerSource` of an array in memory, the same at every position."""

    array: Float[np.ndarray, "layer prompt d_model"]

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.array)

    def layer(self, l: int, position: str = "last") -> Float[np.ndarray, "prompt d_model"]:
        """The embeddings of layer `l`."""
        return self.array[l]


@dataclass(frozen=True)
class TestSet:
    """Prompts of another origin, none of them in the analysed prompt set, that give the numbers instead of `test`.

    All of them count, whatever their splits. `base` and, where one is analysed, `tuned` are their embeddings.
    """

    __test__ = False  # the name is no test for pytest to collect

    prompts: PromptSet
    base: LayerSource
    tuned: LayerSource | None = None


def read_rows(
    source: LayerSource, layer: int, position: str, n_prompts: int, rows: Int[np.ndarray, "row"], model: str
) -> Float[np.ndarray, "row d_model"]:
    """One layer's embeddings at `rows`, as exact as they are stored.

    Args:
        position: as `check_position` takes it.
        n_prompts: number of prompts in the prompt set.
        model: `base` or `tuned`, for the message.

    Raises:
        InputError: when the embeddings are of another number of prompts, or not finite.
    """
    embeddings = source.layer(layer, position)
    if len(embeddings) != n_prompts:
        raise InputError(
            f"The {model} model's embeddings are of {len(embeddings)} prompts, the prompt set has {n_prompts}; "
            "capture this prompt set."
        )
    chosen = embeddings[rows]
    broken = int((~np.isfinite(chosen).all(axis=1)).sum())
    if broken:
        raise InputError(
            f"Layer {layer} of the {model} model holds values that are not finite, for {broken} of {len(rows)} "
            "prompts; capture it again with `--dtype float32`."
        )
    return chosen


@dataclass(frozen=True)
class Readers:
    """Reads the `probe` and the test prompts' embeddings of one layer, one thread at a time.

    Attributes:
        models: embeddings of the prompt set, by `base` and `tuned`.
        tests: embeddings of the prompts that give the numbers, likewise.
        n_prompts: number of prompts in the prompt set.
        n_test_prompts: number of prompts in the set of the test prompts.
        probe_rows, test_rows: rows of `probe`, and of the test prompts.
        position: as `check_position` takes it.
    """

    models: Mapping[str, LayerSource]
    tests: Mapping[str, LayerSource]
    n_prompts: int
    n_test_prompts: int
    probe_rows: Int[np.ndarray, "probe"]
    test_rows: Int[np.ndarray, "test"]
    position: str
    reading: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.models.keys() != self.tests.keys():
            raise InputError(
                "The test set needs embeddings of the same models as the prompt set: base, or base and tuned."
            )
        counts = {source.n_layers for source in (*self.models.values(), *self.tests.values())}
        if len(counts) != 1 or not min(counts):
            raise InputError(
                f"The embeddings come from models of {' and '.join(map(str, sorted(counts)))} layers; "
                "all must be captured from one model of at least one layer."
            )

    def read(
        self, model: str, layer: int
    ) -> tuple[Float[np.ndarray, "probe d_model"], Float[np.ndarray, "test d_model"]]:
        """The embeddings of one layer under `base` or `tuned`.

        Raises:
            InputError: as `read_rows` does, or when prompt set and test set were captured from different models.
        """
        with self.reading:
            probe = read_rows(self.models[model], layer, self.position, self.n_prompts, self.probe_rows, model)
            test = read_rows(self.tests[model], layer, self.position, self.n_test_prompts, self.test_rows, model)
        if probe.shape[1] != test.shape[1]:
            raise InputError(
                f"The {model} model's embeddings have {probe.shape[1]} dimensions for the prompts and {test.shape[1]} "
                "for the test set; capture both with the same model."
            )
        return probe, test
