"""What a command and a Python session both do: check what was asked for, run it as a job of this process, read its end.

Everything is checked before anything heavy is done, so a wrong setting costs no minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from es2.core.errors import Es2Error, InputError
from es2.core.progress import Reporter, silent
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import KIND as EVALUATE
from es2.evaluation.results import behaviour_of, run_behaviour
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.jobs.running import result_of, run_job
from es2.models.adapter_files import check_adapter, find_adapter, is_hub_adapter
from es2.models.catalogue import known_depth, resolve
from es2.models.checked import refuse_untunable
from es2.models.folders import model_doubts, model_folder
from es2.models.shape import count_layers
from es2.prompts.benchmarks import absolute_source
from es2.prompts.prompt_set import PromptSet
from es2.prompts.questions import absolute_questions, load_questions
from es2.training.config import FinetuneConfig
from es2.workflow.evaluate import unfinished_job
from es2.workflow.job_kinds import JOBS, run_here
from es2.workflow.prepare import prepare
from es2.workflow.runs import KIND as FINETUNE
from es2.workflow.runs import check_run, import_adapter, open_run, tuned_weights


def decide_finetune(
    model: str, prompts: PromptSet, settings: Mapping[str, Any], rendering: Rendering, report: Reporter = silent
) -> FinetuneConfig:
    """The settings of a fine-tune, checked against the model and the prompts.

    Args:
        model: a name for `resolve`.
        prompts: the prompt set.
        settings: of `FinetuneConfig` without the model. Layers that are None or empty become those that the base's
            analysis recommends, which is made where it is not on disk.
        rendering: how the model is given the prompts.
        report: takes the progress.

    Raises:
        InputError: for a setting that cannot be, with the remedy.
        MachineError: when network, memory or disk refuse.
    """
    spec = resolve(model)
    settings = {**settings, **dict(prompts.rendered_as(rendering))}
    given, first_block = settings.get("layers"), settings.get("first_block")
    until_then = {} if given else {"layers": (0,), "first_block": None}
    config = FinetuneConfig(**settings | {"model": spec.name} | until_then)
    if depth := known_depth(spec):
        config.check(depth, prompts)  # before the model is fetched
    model_files = model_folder(spec, report)
    n_layers = count_layers(model_files)
    config.check(n_layers, prompts)
    refuse_untunable(model_files, config.method)
    if not given:
        base = prepare(model, prompts, rendering=config, device=config.device, dtype=config.dtype, report=report)
        config = config.replace(layers=base.analysis.recommended, first_block=first_block)
        config.check(n_layers, prompts)
    return config


def begin_finetune(config: FinetuneConfig, source: str, name: str = "") -> Job:
    """A run of these settings and prompts, for `result_of_run`. Raises as `create_job` and `Job.rename`."""
    run = create_job(FINETUNE, config.to_dict() | {"prompts": absolute_source(source)})
    try:
        if name:
            run.rename(name)
    except Es2Error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def result_of_run(run: Job, report: Reporter = silent) -> dict[str, Any]:
    """The result of a created run, made in this process; raises the job's sentence when it comes to none."""
    exit_code = run_job(run.path, JOBS, report)
    return result_of(run, exit_code, f"Run {run.id} was {run.status()}; `es2 runs resume {run.id}` goes on.")


def begin_import(
    adapter: str,
    model: str,
    prompts: str,
    layers: Sequence[int],
    *,
    name: str = "",
    rendering: Rendering,
    device: str | None = None,
    dtype: str | None = None,
    replies: bool = True,
    report: Reporter = silent,
) -> Job:
    """A run of an adapter that was made elsewhere, for `result_of_run`.

    Arguments as of `import_adapter`. Raises `InputError` for a layer that the model has not, and as `import_adapter`.
    """
    spec = resolve(model)
    if not is_hub_adapter(adapter):
        check_adapter(find_adapter(adapter))  # before a model is fetched for it
    n_layers = count_layers(model_folder(spec, report))
    if outside := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise InputError(f"There is no layer {outside[0]}: the model's layers are 0 to {n_layers - 1}.")
    return import_adapter(
        adapter,
        spec.name,
        absolute_source(prompts),
        layers,
        name=name,
        rendering=rendering,
        device=device,
        dtype=dtype,
        replies=replies,
    )


def decide_evaluation(settings: Mapping[str, Any], rendering: Rendering) -> EvaluateConfig:
    """The settings of an evaluation with names and paths that hold in any folder; run and questions are looked at.

    Raises:
        InputError: for a model, a run, questions or settings that cannot be used.
    """
    asked = EvaluateConfig(**{**settings, **dict(rendering)})
    config = asked.replace(
        model=resolve(asked.model).name,
        prompts=absolute_source(asked.prompts),
        questions=absolute_questions(asked.questions),
        steering_limit=min(asked.steering_limit, asked.limit),
    )
    if config.run is not None:
        run = open_run(config.run)
        check_run(run, config.model)
        tuned_weights(run)
    if "ability" in config.suites:
        load_questions(config.questions)
    return config


def evaluate_here(config: EvaluateConfig, report: Reporter = silent) -> dict[str, Any]:
    """The result of an evaluation run in this process, with the verdict on its run; goes on with an interrupted one.

    Raises:
        InputError, MachineError: with the job's sentence when it comes to none.
    """
    result = run_here(EVALUATE, config.to_dict(), unfinished_job(config), report)
    if config.run is not None:
        run = open_run(config.run)
        verdict = (run.result() or {}).get("verdict")
        behaviour = behaviour_of(result, run) or run_behaviour(run)
        result = {**result, "verdict": verdict, **behaviour.to_dict(verdict)}
    result["warnings"] = model_doubts(resolve(config.model))
    return result
