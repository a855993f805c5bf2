"""A fine-tuning run from end to end: tune (or take an adapter), capture, compare with base, reply, judge.

The replies are an ordinary evaluation in the run's folder, the one that `es2 evaluate --suite refusal` would make and
therefore finds there; killed, it goes on from what was replied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.analysis.results import LayerNumbers
from es2.analysis.verdict import layer_verdict, run_verdict
from es2.core.errors import Es2Error, InputError
from es2.core.files import DamagedError
from es2.core.progress import Reporter, silent
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import run_behaviour
from es2.jobs.job import Job
from es2.jobs.queue import open_job
from es2.models.catalogue import resolve
from es2.models.folders import model_doubts
from es2.models.placement import is_sharded_launch
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store
from es2.training.finetune import finetune
from es2.training.validation import ValidationPoint, behaviour_lost
from es2.workflow.evaluate import evaluate
from es2.workflow.prepare import prepare
from es2.workflow.runs import config_of, settle_adapter, tuned_weights, weights_digest

if TYPE_CHECKING:
    from es2.training.config import FinetuneConfig
    from es2.training.workload import Workload

logger = logging.getLogger(__name__)


def finetune_run(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path,
    report: Reporter = silent,
    store: Store | None = None,
    *,
    workload: Workload | None = None,
    stop: Callable[[Sequence[ValidationPoint]], str | None] = lambda validations: None,
    compares: bool = True,
) -> dict[str, Any]:
    """Fine-tune, capture the tuned model, compare it with base, let both reply, and judge. What `es2 finetune` prints.

    The fine-tune goes on from a checkpoint in `folder`, whose name is the run's id, if there is a whole one.

    Args:
        config: of the fine-tune.
        prompts: the prompt set.
        folder: the run's.
        report: takes the progress.
        store: where activation sets lie.
        workload, stop: as of `es2.training.finetune.finetune`.
        compares: whether the tuned model is captured and compared at once; else there is no verdict until
            `compare_run`.

    Returns:
        JSON values: how the run ended, its KLs on harmless `test` prompts, the numbers of every layer before and after,
        and the verdict at the target layers with its reason, and what is known of behaviour by then. Replies that could
        not be made, and a kept step that lost behaviour, are `warnings`.

    Raises:
        InputError, MachineError, Cancelled: as `es2.training.finetune.finetune` and `prepare` do.
    """
    try:
        found = finetune(config, prompts, folder, report, resume=True, workload=workload, stop=stop)
    except DamagedError as error:
        logger.warning("%s", error)
        found = finetune(config, prompts, folder, report, workload=workload, stop=stop)
    result = found.to_dict()
    if not compares:
        return _tuned(config, folder, result)
    return _compared(config, prompts, folder, result, report, store)


def compare_run(run: Job, prompts: PromptSet, report: Reporter = silent, store: Store | None = None) -> dict[str, Any]:
    """Make up for the comparison of a run that ended without one; its result is then that of `finetune_run`.

    Raises `InputError` and `MachineError` as `prepare` does, and where the run has no result.
    """
    result = run.result()
    if result is None:
        raise InputError(f"Run {run.id} is {run.status()} and has no result; `es2 runs resume {run.id}` goes on.")
    found = _compared(
        config_of(run), prompts, run.path, result | {"kl_test": result["kl_harmless_test"]}, report, store
    )
    run.amend(found)
    return found


def imported_run(
    config: FinetuneConfig, prompts: PromptSet, folder: Path, report: Reporter = silent, store: Store | None = None
) -> dict[str, Any]:
    """As `finetune_run`, of an adapter that was made elsewhere: nothing is trained and no KL is measured.

    Whether the adapter fits the model is found before anything is captured; doubts are `warnings` in the result.
    """
    nothing: dict[str, Any] = {"steps": 0, "best_step": 0, "seconds": 0.0, "seconds_per_step": 0.0, "validations": []}
    result = nothing | {"status": "done", "reason": None, "kl_test": None, "trained_parameters": None, "trained": None}
    warnings = settle_adapter(open_job(folder.name, folder.parent), report)
    compared = _compared(config, prompts, folder, result, report, store)
    return compared | {"warnings": warnings + compared["warnings"]}


def _compared(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path,
    result: Mapping[str, Any],
    report: Reporter,
    store: Store | None,
) -> dict[str, Any]:
    """Capture the tuned model, compare it with base, and add the numbers and the verdict to how the run went."""
    run = open_job(folder.name, folder.parent)
    tuned = _tuned(config, folder, result)
    prepared = prepare(
        config.model,
        prompts,
        run=run,
        rendering=config,
        device=config.device,
        dtype=config.dtype,
        store=store,
        report=report,
    )
    if config.replies:
        tuned["warnings"] += _reply(config, prompts, run, store, report)
    analysis, kl = prepared.analysis, result["kl_test"]
    targets = config.targets or analysis.recommended
    verdict = run_verdict(analysis, targets, kl, config.kl_budget)
    tuned_layers = analysis.tuned_layers or ()
    return tuned | {
        "target_layers": list(targets),
        "verdict": verdict.name,
        "verdict_reason": verdict.reason,
        **run_behaviour(run, tuned["weights"]).to_dict(verdict.name),
        "verdicts": {str(layer.layer): layer_verdict(layer, kl, config.kl_budget).to_dict() for layer in tuned_layers},
        "given_as": prepared.activations.given_as,
        "rendering": prepared.activations.rendering,
        "activations": {"base": prepared.activations.key, "tuned": prepared.tuned and prepared.tuned.key},
        "before": {str(layer.layer): _plain(layer) for layer in analysis.base_layers},
        "after": {str(layer.layer): _plain(layer) for layer in tuned_layers},
    }


def _tuned(config: FinetuneConfig, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a run whose tuned model was not captured."""
    run = open_job(folder.name, folder.parent)
    weights = weights_digest(tuned_weights(run))
    own = ("status", "reason", "steps", "best_step", "seconds", "seconds_per_step", "trained_parameters", "validations")
    unknown = ("verdict", "verdict_reason", "given_as", "rendering", "activations")
    return {name: result[name] for name in own} | {
        "trained": result.get("trained"),
        "run": run.id,
        "path": str(folder),
        "target_layers": list(config.targets),
        "kl_harmless_test": result["kl_test"],
        "weights": weights,
        **dict.fromkeys(unknown),
        **run_behaviour(run, weights).to_dict(None),
        "verdicts": {},
        "warnings": model_doubts(resolve(config.model)) + _lost(result),
        "before": {},
        "after": {},
    }


def _reply(config: FinetuneConfig, prompts: PromptSet, run: Job, store: Store | None, report: Reporter) -> list[str]:
    """Let base and tuned reply to the `test` prompts, and keep that in the run's folder; why they did not, if so.

    A fine-tune is not lost because its model does not reply here.
    """
    if is_sharded_launch():
        return ["No replies were made: the model lies in shards; `es2 evaluate` makes them where one device holds it."]
    try:
        source = str(run.config.get("prompts", "builtin"))
        if load_prompts(source).digest != prompts.digest:  # which of them decided the run is unknown there
            return [f"No replies were made: the prompts {source!r} have changed since the run began."]
        wanted = EvaluateConfig(
            model=config.model, prompts=source, run=run.id, suite="refusal", device=config.device, dtype=config.dtype
        )
        evaluate(wanted, prompts, run.path, run=run, store=store, report=report)
    except Es2Error as error:
        return [f"No replies were made: {error}"]
    return []


def _lost(result: Mapping[str, Any]) -> list[str]:
    """What the kept step lost of behaviour on `validation`, in a sentence."""
    points = {point["step"]: ValidationPoint.from_dict(point) for point in result["validations"]}
    lost = behaviour_lost(points[result["best_step"]], points[0]) if points else None
    sentence = f"No step within the KL budget both separates and holds the base's behaviour: the kept one {lost}."
    return [sentence] if lost else []


def _plain(layer: LayerNumbers) -> dict[str, Any]:
    """A layer's numbers, and for tuned their change, without the curve over C, which the analysis keeps."""
    return {name: value for name, value in layer.to_dict().items() if name != "by_C"}
