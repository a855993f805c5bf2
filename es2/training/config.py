"""What decides a fine-tune, and what is refused before anything is loaded. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from es2.analysis.verdict import KL_BUDGET
from es2.core.errors import InputError
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.training.sampling import count_tune, held_out_rows
from es2.training.terms import MARGIN_TARGET, parse_objective

METHODS = ("lora", "full")
MANY_LAYERS = 3
"""From so many target layers on the paper saw the model collapse; they have to be asked for."""

_FIRST_BLOCK = 4  # blocks below read words; nothing there is about harm yet
_LAST_LEARNING_RATE = 0.1  # part of the learning rate that the decay ends at


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides what a fine-tune does.

    Attributes:
        layers: the target layers, whose embeddings are to move apart; two is the paper's finding.
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        objective: a term of `es2.training.terms.OBJECTIVES` or a mixture such as `1.0*margin+0.5*fisher`.
        method: `lora` (an adapter on all linear maps of the trained blocks) or `full` (the blocks themselves).
        first_block: the first trained block; the last is the last target layer. By default 4, or the first target
            layer where that is lower.
        rank: of the LoRA matrices.
        alpha: LoRA's scaling; the update is alpha / rank · B · A.
        steps: optimizer steps.
        pairs_per_step: harmful prompts, and as many harmless ones, in the global batch of one step.
        kl_prompts: so many of the harmless prompts of a step have their logits held to the base's; all have their
            embeddings moved. Logits cost five times as much as embeddings, and a random part of them says the same.
        learning_rate: its peak, after the warm-up; from there it follows a cosine down to a tenth.
        warmup_steps: steps over which the learning rate rises.
        clip: the largest norm of the gradient.
        kl_weight: λ, of the sum of both KLs, in separation per nat.
        kl_budget: nats per token that each KL may reach on `watch`.
        reply_tokens: tokens of the base's greedy reply that the second KL covers.
        margin_target: where the `margin` term stops pushing, in units of the scale.
        watch_every: steps between two looks at `watch`; also between two checkpoints.
        watch_prompts: at most so many prompts of each label are watched, and as many harmless `test` prompts measured.
        accumulate: parts that every process works through one after the other, to save memory.
        gradient_checkpointing: recompute blocks in the backward pass, to save more memory.
        allow_many_layers: whether three or more target layers are meant.
        seed: of the adapter's first weights and of the batches.
        device: a torch device; by default the best there is.
        dtype: `float32` or `bfloat16` for the frozen weights; by default what suits the device.
        quantize: `4bit` for frozen weights of four bits (NF4 of bitsandbytes, on CUDA); only for an adapter.
    """

    layers: tuple[int, ...]
    model: str = DEFAULT_MODEL
    objective: str = "fisher"
    method: str = "lora"
    first_block: int | None = None
    rank: int = 16
    alpha: int = 32
    steps: int = 16
    pairs_per_step: int = 16
    kl_prompts: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 4
    clip: float = 1.0
    kl_weight: float = 10.0
    kl_budget: float = KL_BUDGET
    reply_tokens: int = 32
    margin_target: float = MARGIN_TARGET
    watch_every: int = 8
    watch_prompts: int = 64
    accumulate: int = 1
    gradient_checkpointing: bool = False
    allow_many_layers: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists only

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> FinetuneConfig:
        """The config in a JSON object; entries of other names belong to somebody else and are left alone."""
        return cls(**{entry.name: document[entry.name] for entry in fields(cls) if entry.name in document})

    @property
    def targets(self) -> tuple[int, ...]:
        """The target layers, ascending."""
        return tuple(sorted(self.layers))

    @property
    def blocks(self) -> range:
        """The trained blocks: nothing above the last target layer can move its embeddings."""
        first = min(_FIRST_BLOCK, self.targets[0]) if self.first_block is None else self.first_block
        return range(first, self.targets[-1] + 1)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (_LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * cosine)

    def check(self, n_layers: int, prompts: PromptSet) -> None:
        """Refuse what cannot work, before anything is loaded. Imports no torch.

        Args:
            n_layers: the model's number of blocks (`count_layers`).
            prompts: the prompt set to tune on.

        Raises:
            InputError: for the first setting that is wrong, with what to change.
        """
        if not self.layers:
            raise InputError("No target layer is given; give two, such as 12,18.")
        for layer in self.layers:
            if not _is_whole(layer, 0) or layer >= n_layers:
                raise InputError(f"There is no layer {layer!r}: the model's layers are 0 to {n_layers - 1}.")
        if len(set(self.layers)) < len(self.layers):
            raise InputError(
                f"The target layers {', '.join(map(str, self.layers))} name a layer twice; give each once."
            )
        if len(self.layers) >= MANY_LAYERS and not self.allow_many_layers:
            raise InputError(
                f"{len(self.layers)} target layers: the ES2 paper saw models collapse from three on; "
                "give two, or allow it with --allow-many-layers."
            )
        parse_objective(self.objective)
        if self.method not in METHODS:
            raise InputError(f"Unknown method {str(self.method)[:40]!r}; one of {', '.join(METHODS)}.")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"Training in {str(self.dtype)[:40]!r} is not possible; use float32 or bfloat16.")
        if self.quantize not in (None, "4bit"):
            raise InputError(f"Unknown quantisation {str(self.quantize)[:40]!r}; only 4bit is known.")
        if self.quantize and self.method != "lora":
            raise InputError("Weights of four bits cannot be trained themselves; use --method lora with them.")
        first = self.first_block
        if first is not None and not (_is_whole(first, 0) and first <= self.targets[0]):
            raise InputError(
                f"The first trained block must be one of 0 to {self.targets[0]}, the first target layer, "
                f"not {self.first_block!r}."
            )
        smallest = {
            "steps": 1, "pairs_per_step": 2, "rank": 1, "alpha": 1, "reply_tokens": 1, "watch_every": 1,
            "kl_prompts": 1, "watch_prompts": 2, "accumulate": 1, "warmup_steps": 0, "seed": 0,
        }  # fmt: skip
        for name, least in smallest.items():
            if not _is_whole(getattr(self, name), least):
                raise InputError(f"{name} must be a whole number of at least {least}, not {getattr(self, name)!r}.")
        for name in ("learning_rate", "clip", "kl_budget", "margin_target"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be a positive number, not {getattr(self, name)!r}.")
        if not (_is_number(self.kl_weight) and self.kl_weight >= 0):
            raise InputError(f"kl_weight must be a number of at least 0, not {self.kl_weight!r}.")
        if self.accumulate > self.pairs_per_step:
            raise InputError(f"accumulate ({self.accumulate}) cannot exceed pairs_per_step ({self.pairs_per_step}).")
        for label, count in count_tune(prompts).items():
            if count < 2:
                raise InputError(
                    f"{prompts.name!r} has {count} {LABEL_NAMES[label]} prompt(s) in its tune split; it needs two."
                )
        for label in (HARMFUL, HARMLESS):
            rows = held_out_rows(prompts, "watch", label, len(prompts))
            if len({prompts.pairs[row] for row in rows}) < 2:
                raise InputError(
                    f"{prompts.name!r} has too few {LABEL_NAMES[label]} prompts in its watch split ({len(rows)}); "
                    "it needs two of different pairs: add prompts, or a split column."
                )


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
