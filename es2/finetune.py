"""The ES2 fine-tune, from a prompt set to an adapter; reads top to bottom.

The separation needs all pairs of a batch, which neither a part of an accumulated batch nor one process of several
holds. So every step first brings the embeddings of the whole batch together, takes the separation and its gradient with
respect to each embedding, and then lets every part push its share of that gradient, with its KL, through the model.
Accumulation and data parallelism are the same few lines and the same numbers as a single pass, without a wrapper round
the model. What the base says is measured before the adapter goes in, from the same weights: there is no second model.
Nothing in a step is random and batches are functions of seed and step, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.checkpoint import Progress, State, assign, copies
from es2.errors import InputError, MachineError
from es2.files import content_key
from es2.jobs import Cancelled, Reporter, silent
from es2.model_files import read_config
from es2.models import (
    DEFAULT_MODEL,
    context_length,
    is_out_of_memory,
    load_model,
    load_sharded,
    load_tokenizer,
    model_folder,
    resolve,
)
from es2.objective import MARGIN_TARGET, parse_objective, running_direction, separation, total_loss
from es2.placement import is_sharded_launch, processes_of_launch
from es2.prompts import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet
from es2.training_data import count_tune, held_out_rows, make_plan
from es2.verdict import KL_BUDGET
from es2.watch import WatchPoint

if TYPE_CHECKING:
    from es2.training_data import Plan

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
        objective: a term of `es2.objective.OBJECTIVES` or a mixture such as `1.0*margin+0.5*fisher`.
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


def count_layers(folder: Path) -> int:
    """The number of blocks of the model in a folder, from its configuration alone.

    Raises:
        InputError: when the configuration does not say.
    """
    config = read_config(folder / "config.json")
    config = config.get("text_config") or config
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(name), int):
            return int(config[name])
    raise InputError(f"The model in {str(folder)!r} does not say how many layers it has; use another model.")


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune came to. The tuned weights lie in the run folder.

    Attributes:
        status: `done`, or `stopped` before its time or without a result within the KL budget.
        reason: why it stopped, in a sentence; `None` when done.
        steps: optimizer steps taken.
        best_step: the step that the kept weights are of; 0 is the base.
        losses: the loss of every step.
        watched: what was measured on `watch`; the first entry is the base.
        kl_test: the KLs on harmless `test` prompts, `prompt` and `reply`, of the kept weights; `None` without such
            prompts.
        output: the kept weights: the folder of the adapter, or the file of the changed blocks.
        trained_parameters: how many weights were trained.
        seconds: how long this call took.
        seconds_per_step: of the optimizer steps alone.
    """

    status: str
    reason: str | None
    steps: int
    best_step: int
    losses: tuple[float, ...]
    watched: tuple[WatchPoint, ...]
    kl_test: dict[str, float] | None
    output: Path
    trained_parameters: int
    seconds: float
    seconds_per_step: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "reason": self.reason,
            "steps": self.steps,
            "best_step": self.best_step,
            "losses": list(self.losses),
            "watched": [point.to_dict() for point in self.watched],
            "kl_test": self.kl_test,
            "output": self.output.name,
            "trained_parameters": self.trained_parameters,
            "seconds": self.seconds,
            "seconds_per_step": self.seconds_per_step,
        }


# ------------------------------------------------------------------------------------------------------- the fine-tune


@contextmanager
def _out_of_memory_in_words() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "Memory ran out while tuning; work in several parts (accumulate), turn gradient checkpointing on, "
            "use bfloat16, or draw fewer pairs per step."
        ) from error


@_out_of_memory_in_words()
def finetune(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path,
    report: Reporter = silent,
    resume: bool = False,
) -> FinetuneResult:
    """Move harmful and harmless embeddings apart at the target layers, and keep harmless behaviour.

    Args:
        config: what to do.
        prompts: trained on its `tune` split, watched on `watch`; the KLs of the result are measured on `test`.
        folder: the run folder. `adapter/` (as peft writes it) or `weights.safetensors` (the changed blocks, for `full`)
            is written at the end, `checkpoint/` on the way.
        report: told about the base measurements (`base`) and every step (`finetune`, with its numbers), in the main
            process of several only.
        resume: go on from `checkpoint/` in `folder`, if there is one.

    Returns:
        The result: the best step on `watch` within the KL budget, also when the run had to be stopped.

    Raises:
        InputError: for a config, a model, prompts or a checkpoint that cannot be used.
        MachineError: when disk or memory refuse.
        Cancelled: when `report` raised it; the state is in `checkpoint/` by then.
    """
    started = time.perf_counter()
    spec = resolve(config.model)
    model_files = model_folder(spec, report)
    config.check(count_layers(model_files), prompts)
    _check_launcher(config)
    terms = parse_objective(config.objective)
    plan = make_plan(prompts, config.pairs_per_step, config.steps, config.seed, config.watch_prompts, config.kl_prompts)

    import torch

    from es2.passes import Network
    from es2.trainable import make_trainable
    from es2.workload import Workload

    # The base: its embeddings, its replies and the states they were read from, before anything is trained.
    tokens, template_head = _tokens(model_files, prompts, plan, config.reply_tokens)
    processes = processes_of_launch(config.device)
    report = report if processes.is_main_process else silent
    report("load", 0, 1)
    device = str(processes.device) if processes.num_processes > 1 else config.device
    if is_sharded_launch() and processes.num_processes > 1:
        model = load_sharded(model_files, config.dtype, str(device))
    else:
        model = load_model(model_files, dtype=config.dtype, device=device, quantize=config.quantize)
    model.requires_grad_(False)
    network = Network(
        model,
        template_head=template_head,
        layers=config.targets,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    anchored = any(term.name == "anchored" for term in terms)
    workload = Workload(network, plan, tokens, config.reply_tokens, anchored, report)
    base_layers = workload.base_layers()

    # What is trained, an adapter or blocks, and everything that the steps will change.
    trained, write_output = make_trainable(
        network,
        config.method,
        config.blocks,
        rank=config.rank,
        alpha=config.alpha,
        seed=config.seed,
        location=spec.location,
    )
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=0.0)
    state = State(
        progress=Progress(config.kl_weight, watched=[workload.watch_base()]),
        trained=trained,
        best=copies(trained),
        optimizer=optimizer,
        directions=torch.stack([layer.difference for layer in base_layers.values()]),
    )
    progress = state.progress
    checkpoint = folder / "checkpoint" / "state.safetensors"
    identity = content_key({"config": config.to_dict(), "prompts": prompts.digest})
    if resume and checkpoint.is_file():
        state.load(checkpoint, identity)

    first_step, stepping = progress.step, 0.0
    while progress.step < config.steps and progress.reason is None:
        step_started = time.perf_counter()
        batch = plan.batches[progress.step]
        n_harmful, n_places = len(batch.harmful), len(batch.harmful) + len(batch.harmless)
        parts = workload.parts(batch, config.accumulate)
        n_prompt, n_reply = workload.count_tokens(parts)

        # The embeddings of the whole batch, and the gradient of its separation by each of them. What is run in one
        # part keeps its graph for below; several parts are run once more there, so that only one graph is ever held.
        held = workload.run(parts[0]) if len(parts) == 1 else None
        with torch.no_grad():
            found = [held.embeddings] if held else [workload.embed(part) for part in parts]
        embeddings = workload.gather(parts, found, n_places).requires_grad_()
        harmful, harmless = embeddings[:n_harmful], embeddings[n_harmful:]
        for index, direction in enumerate(state.directions):
            state.directions[index] = running_direction(direction, harmful[:, index], harmless[:, index])
        value = separation(
            terms,
            harmful,
            harmless,
            harmless_base=workload.base_embeddings(batch.harmless) if anchored else None,
            base=base_layers,
            directions=state.directions,
            margin_target=config.margin_target,
        )
        (towards,) = torch.autograd.grad(value, embeddings)

        # Every part sends its share of that gradient, and of the KL's, through the model.
        optimizer.zero_grad()
        kl_sums = torch.zeros(2, device=network.device)
        for part in parts:
            run = held or workload.run(part)
            kl = run.kl_prompt / n_prompt + run.kl_reply / n_reply
            (progress.kl_weight * kl - (towards[list(part.places)] * run.embeddings).sum()).backward()
            kl_sums += torch.stack([run.kl_prompt, run.kl_reply]).detach()
        held = None
        workload.sum_gradients(trained.values())
        kl_prompt, kl_reply = (workload.total(kl_sums).cpu() / torch.tensor([n_prompt, n_reply])).tolist()
        loss = total_loss(value.item(), kl_prompt, kl_reply, progress.kl_weight)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            progress.reason = (
                f"The loss or its gradient was no number at step {progress.step + 1}; lower the learning rate, or use "
                "float32 if the model ran in bfloat16."
            )
            break
        learning_rate = config.learning_rate_at(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        progress.step += 1
        progress.losses.append(loss)
        stepping += time.perf_counter() - step_started
        numbers = {
            "loss": loss,
            "separation": value.item(),
            "kl_prompt": kl_prompt,
            "kl_reply": kl_reply,
            "kl_weight": progress.kl_weight,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
        }

        # Is it any good, and may it go on?
        if progress.step % config.watch_every == 0 or progress.step == config.steps:
            point = workload.watch(progress.step)
            numbers |= point.numbers()
            progress.judge(point, config.kl_budget)
            if progress.best_step == point.step:
                state.best = copies(trained)
            workload.on_main(lambda: state.save(checkpoint, identity))
        if workload.is_cancelled(lambda: report("finetune", progress.step, config.steps, **numbers)):  # noqa: B023
            workload.on_main(lambda: state.save(checkpoint, identity))
            raise Cancelled

    if progress.reason is None and all(point.kl > config.kl_budget for point in progress.watched[1:]):
        progress.reason = (
            f"No step kept the KL on harmless prompts within the budget of {config.kl_budget:g} nats; "
            "lower the learning rate or raise the KL weight."
        )
    assign(trained, state.best)
    output = folder / ("adapter" if config.method == "lora" else "weights.safetensors")
    workload.on_main(lambda: write_output(output))
    return FinetuneResult(
        status="done" if progress.reason is None else "stopped",
        reason=progress.reason,
        steps=progress.step,
        best_step=progress.best_step,
        losses=tuple(progress.losses),
        watched=tuple(progress.watched),
        kl_test=workload.measure_kl(),
        output=output,
        trained_parameters=sum(parameter.numel() for parameter in trained.values()),
        seconds=time.perf_counter() - started,
        seconds_per_step=stepping / max(1, progress.step - first_step),
    )


# -------------------------------------------------------------------------------------------------------- its parts


def _check_launcher(config: FinetuneConfig) -> None:
    """Refuse launchers that would take the model apart in ways that are not known here."""
    for plugin in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true"):
            raise InputError(
                f"The fine-tune runs data-parallel or under FSDP, not under {plugin}; launch it with "
                "`accelerate launch --multi_gpu` or `--use_fsdp`."
            )
    if is_sharded_launch() and (config.method != "lora" or config.quantize):
        raise InputError(
            "Under FSDP the weights lie in shards and only an adapter is trained; leave out --method full and "
            "--quantize, or launch it with `accelerate launch --multi_gpu`."
        )


def _tokens(
    model_files: Path, prompts: PromptSet, plan: Plan, reply_tokens: int
) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """The tokens of every prompt in the plan, and what all prompts of this model begin with: the template's head."""
    from es2.rendering import render, template_head

    tokenizer = load_tokenizer(model_files)
    rendered = render(tokenizer, [prompts.texts[row] for row in plan.rows]).token_ids
    limit = context_length(model_files)
    longest = max(map(len, rendered)) + reply_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"The longest prompt and {reply_tokens} tokens of reply need {longest:,} tokens, but the model reads at "
            f"most {limit:,}; shorten the prompt or the reply."
        )
    return dict(zip(plan.rows, rendered, strict=True)), template_head(tokenizer, rendered)
