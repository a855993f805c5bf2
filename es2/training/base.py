"""The base of a fine-tune: the frozen model, loaded, and what is measured of it before anything is trained.

Several fine-tunes of one model on the same batches share it: each borrows the model, which has its own modules and
weights back afterwards, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from es2.core.errors import InputError
from es2.core.progress import Reporter, silent
from es2.models.chat_template import render, reply_thinking, template_prefix
from es2.models.forward import FinetuneForward
from es2.models.loading import load_model, load_sharded, load_tokenizer
from es2.models.placement import is_sharded_launch, processes_of_launch
from es2.models.shape import context_length
from es2.models.thinking import answer_reader
from es2.prompts.prompt_set import PromptSet
from es2.training.config import FinetuneConfig
from es2.training.sampling import BatchSchedule
from es2.training.terms import is_anchored

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from es2.training.workload import Workload


def measure_base(
    config: FinetuneConfig,
    prompts: PromptSet,
    model_files: Path,
    plan: BatchSchedule,
    *,
    layers: Sequence[int] = (),
    objectives: Sequence[str] = (),
    report: Reporter = silent,
) -> Workload:
    """Load the model of a fine-tune and measure its base.

    Args:
        config: of the fine-tune, with the rendering that the prompts decide.
        prompts: the prompt set.
        model_files: the model's folder.
        plan: the prompts of the fine-tune's steps and validations.
        layers: the layers that are embedded, ascending; the config's target layers if none is given.
        objectives: of all fine-tunes that will borrow the base; the config's own if none is given.
        report: of the loading and the measurements, in the main process only.

    Raises:
        InputError: for prompts that are too long, or an architecture that is not known.
        MachineError: when memory refuses.
    """
    from es2.training.workload import Workload

    tokenizer = load_tokenizer(model_files)
    tokens, prefix = _tokens(tokenizer, context_length(model_files), prompts, plan, config)
    processes = processes_of_launch(config.device)
    report = report if processes.is_main_process else silent
    report("load", 0, 1)
    return Workload(
        _frozen_network(config, model_files, prefix, processes, tuple(layers) or config.targets),
        plan,
        tokens,
        words=answer_reader(tokenizer, None),
        answer=answer_reader(tokenizer, reply_thinking(tokenizer, config.rendering)),
        reply_tokens=config.reply_tokens,
        every_harmless=any(map(is_anchored, objectives or (config.objective,))),
        harmful=plan.validation_replied,
        report=report,
    )


@contextmanager
def lent(base: Workload, config: FinetuneConfig) -> Iterator[Workload]:
    """Lend a base to one fine-tune; afterwards the model is as it was: no adapter, the same weights to the bit.

    Args:
        base: measured at the config's target layers at least, for a config that differs in `layers`, `objective`,
            `kl_weight`, `learning_rate`, `rank`, `alpha` and what else the base does not depend on.
        config: of the fine-tune.
    """
    model = base.network.model
    modules = [(module, dict(module._modules)) for module in model.modules()]
    blocks = [base.network.blocks[block] for block in config.blocks] if config.method == "full" else []
    weights = [(kept, kept.detach().clone()) for block in blocks for kept in (*block.parameters(), *block.buffers())]
    network = FinetuneForward(
        model,
        template_prefix=base.network.template_prefix,
        layers=config.targets,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    try:
        yield base.on(network)
    finally:
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        for kept, value in weights:
            kept.data, kept.grad = value, None
        model.requires_grad_(False)
        if hasattr(model, "peft_config"):
            del model.peft_config  # else the next adapter is warned to be a second one


def _frozen_network(
    config: FinetuneConfig,
    model_files: Path,
    prefix: tuple[int, ...],
    processes: PartialState,
    layers: Sequence[int],
) -> FinetuneForward:
    """The frozen base model on this process's device."""
    device = str(processes.device) if processes.num_processes > 1 else config.device
    if is_sharded_launch() and processes.num_processes > 1:
        model = load_sharded(model_files, config.dtype, str(device))
    else:
        model = load_model(model_files, dtype=config.dtype, device=device, quantize=config.quantize)
    model.requires_grad_(False)
    return FinetuneForward(
        model,
        template_prefix=prefix,
        layers=layers,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    prompts: PromptSet,
    plan: BatchSchedule,
    config: FinetuneConfig,
) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """The tokens of every prompt in the plan, and the template's shared prefix; `limit` is what the model reads."""
    rendered = render(tokenizer, [prompts.texts[row] for row in plan.rows], config).token_ids
    longest = max(map(len, rendered)) + config.reply_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"The longest prompt and {config.reply_tokens} tokens of reply need {longest:,} tokens, but the model "
            f"reads at most {limit:,}; shorten the prompt or the reply."
        )
    return dict(zip(plan.rows, rendered, strict=True)), template_prefix(tokenizer, rendered, config)
