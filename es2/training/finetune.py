"""The ES2 fine-tune, from a prompt set to an adapter; reads top to bottom.

The separation needs all pairs of a batch, over accumulated parts and processes. So every step gathers the embeddings,
takes the separation's gradient by each of them, and sends every part's share of it, with its KL, through the model.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.core.files import content_key
from es2.core.former import former_names
from es2.core.progress import Cancelled, Reporter, silent
from es2.models.catalogue import resolve
from es2.models.checked import refuse_untunable
from es2.models.device import is_out_of_memory
from es2.models.folders import model_folder
from es2.models.placement import is_sharded_launch
from es2.models.shape import count_layers
from es2.prompts.prompt_set import PromptSet
from es2.training.checkpoint import State, assign, copies
from es2.training.config import FinetuneConfig
from es2.training.objective import es2_loss, running_direction, separation
from es2.training.sampling import make_schedule
from es2.training.terms import is_anchored, parse_objective, reads_refusals
from es2.training.validation import ValidationPoint, decide

if TYPE_CHECKING:
    from es2.training.objective import BaseLayer
    from es2.training.workload import Workload


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tune. The tuned weights lie in the run folder.

    Attributes:
        status: `done`, or `stopped` before its time or without a result within the KL budget.
        reason: why it stopped, in a sentence; `None` when done.
        steps: optimizer steps taken.
        best_step: of the kept weights; 0 is the base.
        losses: of every step.
        validations: the first is the base's.
        kl_test: `prompt` and `reply` KL of the kept weights on harmless `test` prompts; `None` without such prompts.
        output: the folder of the adapter, or the file of the changed blocks.
        trained_parameters: number of trained weights.
        trained: what they are (`es2.training.trainable.describe_trained`).
        seconds: of the whole call.
        seconds_per_step: of the optimizer steps alone.
    """

    status: str
    reason: str | None
    steps: int
    best_step: int
    losses: tuple[float, ...]
    validations: tuple[ValidationPoint, ...]
    kl_test: dict[str, float] | None
    output: Path
    trained_parameters: int
    trained: dict[str, Any]
    seconds: float
    seconds_per_step: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "losses": list(self.losses),
            "validations": [point.to_dict() for point in self.validations],
            "output": self.output.name,
        }


@contextmanager
def _out_of_memory_in_words() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "Memory ran out while tuning; work in several parts (accumulate), turn gradient checkpointing on, "
            "use bfloat16, or fewer pairs per step."
        ) from error


@_out_of_memory_in_words()
def finetune(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path,
    report: Reporter = silent,
    resume: bool = False,
    workload: Workload | None = None,
    stop: Callable[[Sequence[ValidationPoint]], str | None] = lambda validations: None,
) -> FinetuneResult:
    """Move harmful and harmless embeddings apart at the target layers, and keep harmless behaviour.

    Args:
        config: the settings.
        prompts: trained on its `tune` split, evaluated on `validation`; the KLs of the result are measured on `test`.
        folder: the run folder. `adapter/` (as peft writes it) or `weights.safetensors` (the changed blocks, for `full`)
            is written at the end, `checkpoint/` and `film/` on the way.
        report: called for the base measurements (`base`) and every step (`finetune`, with its numbers), in the main
            process only.
        resume: go on from `checkpoint/` in `folder`, if there is one.
        workload: the loaded model and its base measurements, lent for this config (`es2.training.base.lent`); by
            default the model is loaded and measured here.
        stop: says after a validation why the run must stop, in a sentence, from all validations so far; None if not.

    Returns:
        The best step on `validation` within the KL budget, also when the run had to be stopped.

    Raises:
        InputError: for a config, a model, prompts or a checkpoint that cannot be used.
        MachineError: when disk or memory refuse.
        Cancelled: when `report` raised it; the state is in `checkpoint/` by then.
    """
    started = time.perf_counter()
    _check_launcher(config)
    spec = resolve(config.model)
    config = config.replace(**dict(prompts.rendered_as(config)))
    model_files = model_folder(spec, report)
    config.check(count_layers(model_files), prompts)
    refuse_untunable(model_files, config.method)
    plan = make_schedule(
        prompts, config.pairs_per_step, config.steps, config.seed, config.validation_prompts, config.kl_prompts
    )

    import torch

    from es2.training.base import measure_base
    from es2.training.trainable import automatic_learning_rate, describe_trained, make_trainable

    # The base is measured before the adapter goes in, from the same weights: there is no second model.
    if workload is None:
        workload = measure_base(config, prompts, model_files, plan, report=report)
    elif (workload.plan.batches, workload.plan.rows) != (plan.batches, plan.rows):
        raise ValueError("The base was measured for other prompts than this fine-tune's.")
    network = workload.network
    report = report if workload.processes.is_main_process else silent
    base_layers = workload.base_layers()

    # What is trained, an adapter or blocks, and everything that the steps will change.
    peak = config.learning_rate or automatic_learning_rate(network, config)
    trained, write_output = make_trainable(network, config, spec.location)
    description = describe_trained(network, config, trained)
    if description["experts"] == "frozen":
        logger.warning("%s", description["sentence"])
    state = State(
        trained=trained,
        best=copies(trained),
        optimizer=torch.optim.AdamW(trained.values(), lr=peak, weight_decay=0.0),
        directions=torch.stack([layer.difference for layer in base_layers.values()]),
        losses=[],
        validations=[workload.validate_base()],
    )
    checkpoint = folder / "checkpoint" / "state.safetensors"
    decisive = {name: value for name, value in config.to_dict().items() if name != "replies"}
    identity = content_key({"config": former_names(decisive), "prompts": prompts.digest})
    if resume and checkpoint.is_file():
        state.load(checkpoint, identity)
    workload.begin_film(folder, state.validations[0], state.step)

    decision = decide(state.validations, config.kl_weight, config.kl_budget, config.steps)
    reason, first_step, stepping = decision.reason, state.step, 0.0
    while state.step < config.steps and reason is None:
        step_started = time.perf_counter()
        numbers = _backward(config, state, workload, base_layers, decision.kl_weight)
        numbers["gradient_norm"] = torch.nn.utils.clip_grad_norm_(trained.values(), config.clip).item()
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])):
            reason = (
                f"The loss or its gradient was no number at step {state.step + 1}; lower the learning rate, or use "
                "float32 if the model ran in bfloat16."
            )
            break
        numbers["learning_rate"] = config.learning_rate_at(state.step, peak)
        for group in state.optimizer.param_groups:
            group["lr"] = numbers["learning_rate"]
        state.optimizer.step()
        state.losses.append(numbers["loss"])
        stepping += time.perf_counter() - step_started

        # Is it any good, and may it go on?
        if state.step % config.validate_every == 0 or state.step == config.steps:
            point = workload.validate(state.step)
            if not point.is_finite:
                reason = (
                    f"The validation at step {state.step} gave no numbers; lower the learning rate, or use float32 if "
                    "the model ran in bfloat16."
                )
                break
            numbers |= point.numbers(state.validations[0])
            state.validations.append(point)
            decision = decide(state.validations, config.kl_weight, config.kl_budget, config.steps)
            reason = decision.reason or stop(state.validations)
            if decision.best_step == state.step:
                state.best = copies(trained)
            workload.film(folder, point)
            workload.on_main(lambda: state.save(checkpoint, identity))
        if workload.is_cancelled(lambda: report("finetune", state.step, config.steps, **numbers)):  # noqa: B023
            workload.on_main(lambda: state.save(checkpoint, identity))
            raise Cancelled

    assign(trained, state.best)
    output = folder / ("weights.safetensors" if config.method == "full" else "adapter")
    workload.on_main(lambda: write_output(output))
    return FinetuneResult(
        status="done" if reason is None else "stopped",
        reason=reason,
        steps=state.step,
        best_step=decision.best_step,
        losses=tuple(state.losses),
        validations=tuple(state.validations),
        kl_test=workload.measure_kl(),
        output=output,
        trained_parameters=sum(parameter.numel() for parameter in trained.values()),
        trained=description,
        seconds=time.perf_counter() - started,
        seconds_per_step=stepping / max(1, state.step - first_step),
    )


def _backward(
    config: FinetuneConfig, state: State, workload: Workload, base: Mapping[int, BaseLayer], kl_weight: float
) -> dict[str, float]:
    """The next batch's loss and its parts; the trained weights hold its gradient afterwards."""
    import torch

    batch = workload.plan.batches[state.step]
    n_harmful, n_places = len(batch.harmful), len(batch.harmful) + len(batch.harmless)
    parts = workload.parts(batch, config.accumulate)
    n_prompt, n_reply = workload.count_tokens(parts)

    # The embeddings of the whole batch, and the gradient of its separation by each of them. A single part keeps its
    # graph for below; several parts are run once more there, so that only one graph is ever held.
    ahead = reads_refusals(config.objective) and bool(workload.refusal_openings.any())
    held = workload.run(parts[0], ahead) if len(parts) == 1 else None
    with torch.no_grad():
        found = [(held.embeddings, held.log_odds)] if held else [workload.look(part, ahead) for part in parts]
    shape = workload.network.embedding_shape
    embeddings = workload.gather(parts, [one for one, _ in found], n_places, shape).requires_grad_()
    log_odds = workload.gather(parts, [one for _, one in found], n_places, ()).requires_grad_()
    harmful, harmless = embeddings[:n_harmful], embeddings[n_harmful:]
    for index, direction in enumerate(state.directions):
        state.directions[index] = running_direction(direction, harmful[:, index], harmless[:, index])
    value = separation(
        parse_objective(config.objective),
        harmful,
        harmless,
        harmless_base=workload.base_embeddings(batch.harmless) if is_anchored(config.objective) else None,
        base=base,
        directions=state.directions,
        margin_target=config.margin_target,
        log_odds=(log_odds[:n_harmful], log_odds[n_harmful:], workload.usual_log_odds) if ahead else None,
    )
    towards, inclined = torch.autograd.grad(value, (embeddings, log_odds), allow_unused=True, materialize_grads=True)

    # Every part sends its share of that gradient, and of the KL's, through the model.
    state.optimizer.zero_grad()
    kl_sums = torch.zeros(2, device=workload.network.device)
    for part in parts:
        run, places = held or workload.run(part, ahead), list(part.places)
        # Of the separation, which has these gradients.
        share = (towards[places] * run.embeddings).sum() + (inclined[places] * run.log_odds).sum()
        es2_loss(share, run.kl_prompt / n_prompt, run.kl_reply / n_reply, kl_weight).backward()
        kl_sums += torch.stack([run.kl_prompt, run.kl_reply]).detach()
    workload.sum_gradients(state.trained.values())
    kl_prompt, kl_reply = (workload.total(kl_sums).cpu() / torch.tensor([n_prompt, n_reply])).tolist()
    return {
        "loss": es2_loss(value.item(), kl_prompt, kl_reply, kl_weight),
        "separation": value.item(),
        "kl_prompt": kl_prompt,
        "kl_reply": kl_reply,
        "kl_weight": kl_weight,
    }


def _check_launcher(config: FinetuneConfig) -> None:
    """Refuse launchers that would split the model in other ways than FSDP."""
    for plugin in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true"):
            raise InputError(
                f"The fine-tune runs data-parallel or under FSDP, not under {plugin}; launch it with "
                "`accelerate launch --multi_gpu` or `--use_fsdp`."
            )
    if is_sharded_launch() and (config.method != "lora" or config.quantize):
        raise InputError(
            "Under FSDP the weights lie in shards and only an adapter is trained; leave out --method and "
            "--quantize, or launch it with `accelerate launch --multi_gpu`."
        )
