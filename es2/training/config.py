"""The settings of a fine-tune, and what is refused before anything is loaded. Imports no torch."""

from __future__ import annotations

import math

from es2.analysis.verdict import KL_BUDGET
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.core.settings import setting
from es2.models.catalogue import DEFAULT_MODEL
from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.training.sampling import count_tune, held_out_rows
from es2.training.terms import DEFAULT_OBJECTIVE, MARGIN_TARGET, OBJECTIVES, parse_objective

MANY_LAYERS = 3  # number of target layers from which on the paper saw models collapse
_FIRST_BLOCK = 4  # blocks below read words; nothing there is about harm yet
_LAST_LEARNING_RATE = 0.1  # part of the learning rate that the decay ends at


class FinetuneConfig(Rendering):
    """Everything that decides what a fine-tune does."""

    layers: tuple[int, ...] = setting(
        ..., "The layers whose embeddings are to move apart; two is the ES2 paper's finding.", group="own", of="layer"
    )
    model: str = setting(
        DEFAULT_MODEL, "A catalogue name (`es2 models`), a Hub id, a local folder or a .gguf file.", group="own"
    )
    allow_many_layers: bool = setting(
        False,
        "Allow three or more target layers; the paper saw models collapse.",
        label="I want three or more target layers",
        group="own",
    )
    objective: str = setting(
        DEFAULT_OBJECTIVE,
        "What is made larger: distance (the paper's form, which a longer residual stream also raises), anchored "
        "(harmless embeddings stay), fisher, margin (both scale-free), or a mixture such as 1.0*margin+0.5*fisher. "
        "Beside one of these, refusal is for harmful requests, and them alone, to be answered as the base's refusals "
        "begin.",
        suggestions=(*OBJECTIVES, DEFAULT_OBJECTIVE),
        group="main",
    )
    method: str = setting(
        "lora",
        "lora trains a small adapter on the blocks up to the last target layer, full those blocks themselves, which "
        "takes more memory; experts is lora on the experts of these blocks, too, where the model is a mixture of them.",
        choices=("lora", "full", "experts"),
        group="main",
    )
    steps: int = setting(
        48, "Optimizer steps. Time grows with them; so does what is moved.", group="main", step=5, ge=1
    )
    kl_weight: float = setting(
        10.0,
        "λ, of the sum of both KLs: how strongly harmless behaviour is held, in separation per nat.",
        label="λ, weight of the KL",
        group="main",
        step=0.5,
        format="%.2f",
        ge=0,
    )
    learning_rate: float | None = setting(
        None,
        "Its peak, after the warm-up; from there it follows a cosine down to a tenth. Automatic: it grows with the "
        "typical size of the trained blocks' weights, since a step changes every trained weight by about the rate.",
        group="main",
        step=1e-4,
        format="%.1e",
        gt=0,
    )
    seed: int = setting(
        0, "Of the adapter's first weights and of the batches. The same seed repeats the same run.", group="main", ge=0
    )
    replies: bool = setting(
        True,
        "At the end base and tuned reply to 48 harmful and 48 harmless test prompts at most, so that the run says what "
        "became of behaviour. It decides nothing about the fine-tune.",
        label="Replies at the end",
        group="main",
    )
    pairs_per_step: int = setting(8, "Harmful prompts, and as many harmless ones, in every step.", step=4, ge=2)
    kl_prompts: int = setting(
        4,
        "Harmless prompts of a step whose logits are held to the base's; all have their embeddings moved. Logits cost "
        "five times as much as embeddings, and a random part of them estimates the same.",
        label="KL prompts per step",
        ge=1,
    )
    warmup_steps: int = setting(4, "Steps over which the learning rate rises.", label="Warm-up steps", ge=0)
    clip: float = setting(
        1.0, "A longer gradient is cut to this length.", label="Gradient norm", step=0.5, format="%.2f", gt=0
    )
    rank: int = setting(16, "Rank of the LoRA matrices.", label="LoRA rank", step=4, ge=1)
    alpha: int = setting(32, "LoRA's update is scaled by alpha / rank.", label="LoRA alpha", step=4, ge=1)
    kl_budget: float = setting(
        KL_BUDGET,
        "Nats per token that each KL may reach on held-out harmless prompts. Beyond it λ is doubled, then the run "
        "stops.",
        label="KL budget",
        step=0.05,
        format="%.2f",
        gt=0,
    )
    reply_tokens: int = setting(32, "Tokens of the base's own greedy reply that the second KL covers.", step=8, ge=1)
    margin_target: float = setting(
        MARGIN_TARGET, "Where the margin term stops, in scale-free units.", step=0.05, format="%.2f", gt=0
    )
    validate_every: int = setting(
        8, "Steps between two validations; also between two checkpoints.", label="Steps between validations", ge=1
    )
    validation_prompts: int = setting(
        64,
        "Prompts of each label that a validation reads at most, and harmless test prompts whose KL is measured.",
        step=8,
        ge=2,
    )
    accumulate: int = setting(
        1,
        "Parts that a step is worked through in: more parts need less memory and more time.",
        label="Parts of a step",
        ge=1,
    )
    first_block: int | None = setting(
        None,
        "First trained block; the last is the last target layer. Automatic: block 4, or the first target layer where "
        "that is lower.",
        label="First trained block",
        step=1,
    )
    gradient_checkpointing: bool = setting(False, "Recompute blocks in the backward pass: less memory, more time.")
    device: str | None = setting(None, "cuda, mps or cpu. Automatic: the best there is.")
    dtype: str | None = setting(
        None,
        "Number format of the frozen weights. Automatic: bfloat16 on a CUDA device, else float32.",
        label="Number format",
        choices=("float32", "bfloat16"),
    )
    quantize: str | None = setting(
        None,
        "Frozen weights of four bits (NF4 of bitsandbytes, on CUDA; es2[quantize]); only for an adapter.",
        label="Quantisation",
        choices=("4bit",),
    )

    @property
    def targets(self) -> tuple[int, ...]:
        """The target layers, ascending."""
        return tuple(sorted(self.layers))

    @property
    def blocks(self) -> range:
        """The trained blocks: nothing above the last target layer can move its embeddings."""
        first = min(_FIRST_BLOCK, self.targets[0]) if self.first_block is None else self.first_block
        return range(first, self.targets[-1] + 1)

    def learning_rate_at(self, step: int, peak: float) -> float:
        """The learning rate of one step, counted from 0, on the way to its peak and down from there."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return peak * (_LAST_LEARNING_RATE + (1 - _LAST_LEARNING_RATE) * cosine)

    def check(self, n_layers: int, prompts: PromptSet) -> None:
        """Refuse settings that cannot work with a model of `n_layers` blocks and these prompts.

        Raises:
            InputError: for the first setting that is wrong, with the remedy.
        """
        if not self.layers:
            raise InputError("No target layer is given; give two, such as 12,18.")
        for layer in self.layers:
            if not 0 <= layer < n_layers:
                raise InputError(f"There is no layer {layer}: the model's layers are 0 to {n_layers - 1}.")
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
        if self.quantize and self.method != "lora":
            raise InputError("Weights of four bits cannot be trained themselves; use --method lora with them.")
        first = self.first_block
        if first is not None and not 0 <= first <= self.targets[0]:
            raise InputError(
                f"The first trained block must be one of 0 to {self.targets[0]}, the first target layer, "
                f"not {self.first_block!r}."
            )
        if self.accumulate > self.pairs_per_step:
            raise InputError(f"accumulate ({self.accumulate}) cannot exceed pairs_per_step ({self.pairs_per_step}).")
        for label, count in count_tune(prompts).items():
            if count < 2:
                raise InputError(
                    f"{prompts.name!r} has {count} {LABEL_NAMES[label]} prompt(s) in its tune split; it needs two."
                )
        for label in (HARMFUL, HARMLESS):
            rows = held_out_rows(prompts, "validation", label, len(prompts))
            if len({prompts.pairs[row] for row in rows}) < 2:
                raise InputError(
                    f"{prompts.name!r} has too few {LABEL_NAMES[label]} prompts in its validation split ({len(rows)}); "
                    "it needs two of different pairs: add prompts, or a split column."
                )
