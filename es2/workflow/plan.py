"""What a fine-tune will take, before anything heavy is loaded: time by stage, memory, disk, and what to type.

Nearly all the work is matrix products: they are counted (tokens × weights × 2, block by block) and divided by the speed
at which this machine multiplies, which numpy measures once. So the app can ask without importing torch.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError
from es2.core.files import home
from es2.evaluation.config import EvaluateConfig
from es2.models import costs
from es2.models.batching import REPLIES_AT_ONCE, rows_that_fit, usual_tokens
from es2.models.catalogue import resolve
from es2.models.checked import refuse_untunable
from es2.models.costs import DTYPES
from es2.models.machine import ASSUMED_CPU_FLOPS, Machine, this_machine
from es2.models.placement import AUTO
from es2.models.shape import Shape, local_folder
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.training.sampling import make_schedule
from es2.training.terms import is_anchored, reads_refusals
from es2.workflow.derived import find_activations
from es2.workflow.memory import ALONE, SHARDED, TOGETHER, Way, disk_bytes, find_way, needs, number_format

STAGES = ("start", "base capture", "replies", "steps", "validation", "tuned capture", "analysis", "behaviour")
"""The parts of a fine-tune whose time is estimated, in the order in which they begin.

`replies` are the base's, which the fine-tune keeps; `behaviour` those of both models at the end.
"""


@dataclass(frozen=True)
class CostEstimate:
    """What a fine-tune will take, about.

    Attributes:
        seconds: by stage, in the order of `STAGES`; what is on disk already takes none.
        needs_gb: memory at the peak of each part (`capture`, `replies`, `steps`) in GB (10⁹ bytes), of one process.
        machine: where.
        fetch_gb: what has to be fetched first; 0 for a model that is here. Its time is not in `seconds`.
        disk_gb: what is written to the disk beside that.
        free_disk_gb: what is free there.
        commands: what to type so that it fits; empty where nothing does.
        advice: what else there is to know about whether it fits, in sentences.
    """

    seconds: Mapping[str, float]
    needs_gb: Mapping[str, float]
    machine: Machine
    fetch_gb: float
    disk_gb: float
    free_disk_gb: float
    commands: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def memory_gb(self) -> float:
        """At the peak of all parts, as asked for, in GB."""
        return max(self.needs_gb.values())

    @property
    def total_seconds(self) -> float:
        """Over all stages."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now is enough, as far as that is known."""
        return self.machine.free_gb is None or self.memory_gb <= self.machine.free_gb

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the sum and `fits`."""
        lists = {"commands": list(self.commands), "advice": list(self.advice)}
        sums = {"total_seconds": self.total_seconds, "memory_gb": self.memory_gb, "fits": self.fits}
        return asdict(self) | lists | sums


def plan(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path | None,
    *,
    lengths: Sequence[int] | None = None,
    machine: Machine | None = None,
    store: Store | None = None,
) -> CostEstimate:
    """Estimate a fine-tune with its two captures, its analysis and the replies at its end, as `finetune_run` does them.

    Args:
        config: of the fine-tune.
        prompts: the prompt set.
        folder: the model's folder (`local_folder`); None for one that is not here, whose sizes the catalogue has.
        lengths: number of tokens of every prompt; from `token_counts` if not given.
        machine: where; one device of `this_machine` if not given.
        store: where activation sets lie.

    Raises:
        InputError: as `FinetuneConfig.check`; also when the model's size is unknown.
        MachineError: as `this_machine`.
    """
    shape = Shape.of_folder(folder) if folder is not None else Shape.of_model(config.model)
    config.check(shape.n_layers, prompts)
    if folder is not None:
        refuse_untunable(folder, config.method)
    machine = machine or replace(this_machine(config.device), n_devices=1)
    weight_bytes = shape.parameters * DTYPES[number_format(config, machine)]
    lengths = token_counts(folder, prompts) if lengths is None else lengths
    own = [length + costs.TEMPLATE_TAIL for length in lengths]
    products, idle = _work(config, prompts, shape, own, weight_bytes, machine)
    measured = prompts.in_split("probe") | prompts.in_split("test")
    n_measured = int(measured.sum())
    tokens = sum(length for length, keep in zip(own, measured.tolist(), strict=True) if keep)
    captured = capture_products(shape, tokens)
    known = find_activations(resolve(config.model).name, prompts.measured(), "last", store, rendering=config)
    products |= {
        "base capture": 0.0 if known else captured,
        "tuned capture": captured,
        "analysis": analysis_products(shape, n_measured),
    }
    idle["behaviour"] = _behaviour_seconds(prompts, shape, own, weight_bytes, machine) if config.replies else 0.0
    idle["start"] = costs.start_seconds((2 if known else 3) + config.replies, weight_bytes)
    rate = machine.flops * costs.FINETUNE_EFFICIENCY
    together = {"replies": machine.n_devices, "steps": machine.n_devices, "validation": machine.n_devices}
    rates = {stage: rate * together.get(stage, 1) for stage in STAGES}
    rates |= dict.fromkeys(("base capture", "tuned capture"), machine.flops * costs.CAPTURE_EFFICIENCY)
    if machine.device != "cpu":
        rates["analysis"] = ASSUMED_CPU_FLOPS * costs.FINETUNE_EFFICIENCY
    launch = ALONE if machine.n_devices == 1 else TOGETHER
    of_parts = needs(config, shape, own, n_measured, machine, launch)
    fetch = 0.0 if folder is not None else shape.parameters * DTYPES["bfloat16"] / 1e9
    disk = disk_bytes(config, shape, n_measured, machine) / 1e9
    free_disk = _free_disk() / 1e9
    commands, advice = _advise(config, shape, own, n_measured, machine, of_parts)
    if fetch + disk > free_disk:
        advice.append(
            f"The disk is too small: {fetch + disk:.1f} GB are written and {free_disk:.1f} GB are free; set ES2_HOME "
            "and ES2_CACHE to folders on another disk."
        )
    return CostEstimate(
        seconds={stage: products.get(stage, 0.0) / rates[stage] + idle.get(stage, 0.0) for stage in STAGES},
        needs_gb={part: size / 1e9 for part, size in of_parts.items()},
        machine=machine,
        fetch_gb=fetch,
        disk_gb=disk,
        free_disk_gb=free_disk,
        commands=tuple(commands),
        advice=tuple(advice),
    )


def _behaviour_seconds(
    prompts: PromptSet, shape: Shape, own: Sequence[int], weight_bytes: float, machine: Machine
) -> float:
    """Seconds of both models' replies to `test` prompts, as many as an evaluation takes."""
    usual = EvaluateConfig()
    in_test = prompts.in_split("test")
    n_replies = sum(min(int((in_test & (prompts.labels == label)).sum()), usual.limit) for label in (HARMFUL, HARMLESS))
    lengths = [length for length, tested in zip(own, in_test.tolist(), strict=True) if tested]
    exchange = sum(lengths) / max(len(lengths), 1) + usual.new_tokens
    key_bytes = exchange * 2 * shape.d_kv * shape.n_layers * weight_bytes / shape.parameters
    at_once = rows_that_fit("cpu", int(key_bytes)) if machine.device == "cpu" else n_replies  # nothing asks a GPU here
    return 2 * costs.reply_seconds(
        n_replies,
        exchange,
        usual.new_tokens,
        tokens_per_second=machine.flops * costs.REPLY_EFFICIENCY / (2 * shape.parameters),
        reading=weight_bytes / costs.weight_bytes_per_second(machine.device),
        rows=max(1, at_once),
    )


def capture_seconds(
    model: str,
    prompts: PromptSet,
    *,
    device: str | None = None,
    lengths: Sequence[int] | None = None,
    machine: Machine | None = None,
) -> float:
    """Seconds that a capture of these prompts takes here, about, once the model is on this machine.

    Args:
        device: where the model runs; the best that is known if not given, or for `auto`.
        lengths: number of tokens of every prompt; from `token_counts` if not given.
        machine: where; `this_machine` if not given.

    Raises:
        InputError: when the model's size is unknown.
        MachineError: as `this_machine`.
    """
    folder = local_folder(model)
    shape = Shape.of_folder(folder) if folder is not None else Shape.of_model(model)
    machine = machine or this_machine(None if device == AUTO else device)
    lengths = token_counts(folder, prompts) if lengths is None else lengths
    tokens = sum(length + costs.TEMPLATE_TAIL for length in lengths)
    weight_bytes = shape.parameters * DTYPES["float32" if machine.device == "cpu" else "bfloat16"]
    rate = machine.flops * costs.CAPTURE_EFFICIENCY
    return costs.start_seconds(1, weight_bytes) + capture_products(shape, tokens) / rate


def capture_products(shape: Shape, tokens: int) -> float:
    """Number of floating-point operations of a capture; the LM head is not run."""
    return 2.0 * tokens * shape.n_layers * shape.block_parameters


def analysis_products(shape: Shape, n_measured: int) -> float:
    """Number of floating-point operations of an analysis with its resamples."""
    return float(costs.ANALYSIS_PRODUCTS * shape.n_layers * AnalysisConfig().n_bootstrap * n_measured * shape.d_model)


def _free_disk() -> int:
    """Bytes that are free where artifacts are kept, or will be."""
    place = home()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def _advise(
    config: FinetuneConfig,
    shape: Shape,
    own: Sequence[int],
    n_measured: int,
    machine: Machine,
    of_parts: Mapping[str, float],
) -> tuple[list[str], list[str]]:
    """What to type so that capture and fine-tune fit, and what else there is to know."""
    if machine.free_gb is None:
        return [], []
    free, advice, commands = machine.free_gb * 1e9, [], []
    of_device = f"{machine.free_gb:.0f} GB" if machine.device == "cpu" else f"a GPU of {machine.free_gb:.0f} GB"
    model = f"--model {shlex.quote(config.model)}"
    if of_parts["capture"] <= free:
        several = f"accelerate launch --multi_gpu --num_processes {machine.n_devices} -m " * (machine.n_devices > 1)
        commands.append(f"{several}es2 capture {model}")
    elif machine.device == "cuda" and of_parts["capture"] <= (1 - costs.LEFT_FREE) * free * machine.n_devices:
        commands.append(f"es2 capture {model}")
        advice.append(f"The model is larger than {of_device}; capture, in one process, lays it over all of them.")
    elif machine.device == "cpu":
        commands.append(f"es2 capture {model} --device auto")
        advice.append(f"The model is larger than {of_device}; with --device auto the rest is read from disk, slowly.")
    else:
        advice.append(f"Capture needs {of_parts['capture'] / 1e9:.0f} GB: take a smaller model.")

    way = find_way(config, shape, own, n_measured, machine)
    if way is None:
        advice.append(
            f"No setting makes the fine-tune fit into {of_device}: take a smaller model, fewer pairs per step, or a "
            f"{'GPU' if machine.device == 'cpu' else 'larger GPU'}."
        )
        return commands, advice
    commands.append(_command(way, config, machine))
    if way.config != config or way.launch == SHARDED:
        asked = max(of_parts["replies"], of_parts["steps"]) / 1e9
        advice.append(
            f"As asked for, the fine-tune needs {asked:.1f} GB; as below about {way.finetune_bytes / 1e9:.1f} GB."
        )
    if way.launch == SHARDED:
        weights = shape.parameters * DTYPES[number_format(config, machine)] / 1e9
        advice.append(f"The first process reads all weights into the machine's memory: {weights:.0f} GB.")
    return commands, advice


def _command(way: Way, config: FinetuneConfig, machine: Machine) -> str:
    """What to type for a fine-tune."""
    words = ["es2 finetune", f"--model {shlex.quote(config.model)}", f"--layers {','.join(map(str, config.targets))}"]
    if way.launch:
        words[0] = f"accelerate launch {way.launch} --num_processes {machine.n_devices} -m es2 finetune"
    for name in (
        "objective", "steps", "pairs_per_step", "method", "rank", "first_block", "validate_every", "accumulate",
        "quantize", "dtype",
    ):  # fmt: skip
        value = getattr(way.config, name)
        if value != getattr(FinetuneConfig(layers=()), name):
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    if way.config.gradient_checkpointing:
        words.append("--gradient-checkpointing")
    if not way.config.replies:
        words.append("--no-replies")
    return " ".join(words)


def token_counts(folder: Path | None, prompts: PromptSet) -> list[int]:
    """Tokens of every prompt's own text: counted where the folder has a `tokenizer.json`, else characters / 4."""
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        return [math.ceil(len(text) / costs.CHARACTERS_PER_TOKEN) for text in prompts.texts]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"The tokenizer {str(file)!r} cannot be read ({str(error)[:100]}); fetch it again.") from error
    return [len(found.ids) for found in tokenizer.encode_batch(list(prompts.texts), add_special_tokens=False)]


def _work(
    config: FinetuneConfig,
    prompts: PromptSet,
    shape: Shape,
    own: Sequence[int],
    weight_bytes: float,
    machine: Machine,
) -> tuple[dict[str, float], dict[str, float]]:
    """Floating-point operations of the fine-tune itself by stage, and seconds that no faster product would save."""
    schedule = make_schedule(
        prompts, config.pairs_per_step, config.steps, config.seed, config.validation_prompts, config.kl_prompts
    )
    n_shallow, n_deep = config.targets[-1] + 1, shape.n_layers
    n_trained, n_above_first = len(config.blocks), n_deep - config.blocks[0]
    n_decoded = config.reply_tokens - 1

    def blocks(tokens: float, n: float) -> float:
        return 2.0 * tokens * n * shape.block_parameters

    def lm_head(tokens: float, times: int) -> float:
        return 2.0 * tokens * times * shape.head_parameters

    def tokens_of(rows: Iterable[int], more: int = 0) -> int:
        return sum(own[row] + more for row in rows)

    # The base: replies with their states, and the embeddings of what else its constants need.
    replied = {row for batch in schedule.batches for row in batch.harmless[: batch.n_kl]}
    replied |= {*schedule.validation_kl, *schedule.validation_replied, *schedule.tested}
    known = {*schedule.base_harmful, *schedule.base_harmless, *schedule.validation_rows}
    if is_anchored(config.objective):
        known |= set(schedule.harmless)
    decoded = len(replied) * n_decoded
    replies = blocks(tokens_of(replied) + decoded, n_deep) + lm_head(decoded + len(replied), 1)
    replies += blocks(tokens_of(known - replied), n_shallow)
    at_once = REPLIES_AT_ONCE * usual_tokens(machine.device)
    n_batches = math.ceil(tokens_of(replied) / at_once)
    reading = costs.weight_bytes_per_second(machine.device)

    # A step: everyone's embeddings, the KL of some, and back to the first trained block. Weights that are trained
    # themselves cost a second product of the backward pass; LoRA's are too small to count.
    full = int(config.method == "full")
    ahead = reads_refusals(config.objective)
    again = int(config.gradient_checkpointing)
    steps = 0.0
    template = costs.TEMPLATE_PREFIX if config.gradient_checkpointing else 0  # not shared then
    for batch in schedule.batches:
        with_kl, without = batch.harmless[: batch.n_kl], (*batch.harmful, *batch.harmless[batch.n_kl :])
        shallow, deep = tokens_of(without, template), tokens_of(with_kl, template + n_decoded)
        if not template:
            deep += costs.TEMPLATE_PREFIX * config.accumulate
        steps += lm_head(deep, 3)
        if ahead:  # of those without a KL, one state each is read
            steps += lm_head(len(without), 2)
            shallow, deep = 0, shallow + deep
        steps += blocks(shallow, n_shallow + (1 + full + again) * n_trained)
        steps += blocks(deep, n_deep + (1 + again) * n_above_first + full * n_trained)
        if config.accumulate > 1:  # the embeddings are needed before the parts can be run
            everyone = tokens_of((*batch.harmful, *batch.harmless), template)
            steps += blocks(everyone, n_deep if ahead else n_shallow)

    n_validations = math.ceil(config.steps / config.validate_every)
    kl_rows = set(schedule.validation_kl)
    harmful = {row for row in schedule.validation_rows if prompts.labels[row] == HARMFUL}
    validation = blocks(tokens_of({*schedule.validation_rows} - kl_rows - harmful), n_shallow)
    read = tokens_of(kl_rows, n_decoded)
    validation += blocks(read, n_deep) + lm_head(read, 2)
    refused = costs.REFUSED_SHARE * len(schedule.validation_replied) * n_decoded
    validation += blocks(tokens_of(harmful) + refused, n_deep) + lm_head(len(harmful) + refused, 1)
    tested = tokens_of(schedule.tested, n_decoded)
    validating = n_validations * validation + blocks(tested, n_deep) + lm_head(tested, 2)
    return (
        {"replies": replies, "steps": steps, "validation": validating},
        {"replies": n_batches * n_decoded * weight_bytes / reading},
    )


def guessed_layers(n_layers: int) -> tuple[int, ...]:
    """Two target layers for a model that was not analysed yet, halfway and at three quarters: a place to start from."""
    return tuple(sorted({round(0.5 * (n_layers - 1)), round(0.75 * (n_layers - 1))}))
