"""A fine-tuning run from end to end: tune (or take an adapter), capture, compare with base, judge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.analysis.results import LayerNumbers
from es2.analysis.verdict import layer_verdict, run_verdict
from es2.core.files import DamagedError
from es2.core.progress import Reporter, silent
from es2.evaluation.results import run_behaviour
from es2.jobs.queue import open_job
from es2.models.catalogue import resolve
from es2.models.folders import model_doubts
from es2.prompts.prompt_set import PromptSet
from es2.store.store import Store
from es2.training.finetune import finetune
from es2.workflow.prepare import prepare
from es2.workflow.runs import settle_adapter, tuned_weights, weights_digest

if TYPE_CHECKING:
    from es2.training.config import FinetuneConfig

logger = logging.getLogger(__name__)


def finetune_run(
    config: FinetuneConfig, prompts: PromptSet, folder: Path, report: Reporter = silent, store: Store | None = None
) -> dict[str, Any]:
    """Fine-tune, capture the tuned model, compare it with base, and judge. What `es2 finetune` prints.

    The fine-tune goes on from a checkpoint in `folder`, whose name is the run's id, if there is a whole one.

    Returns:
        JSON values: how the run ended, its KLs on harmless `test` prompts, the numbers of every layer before and after,
        and the verdict at the target layers with its reason, and what is known of behaviour by then.

    Raises:
        InputError, MachineError, Cancelled: as `es2.training.finetune.finetune` and `prepare` do.
    """
    try:
        result = finetune(config, prompts, folder, report, resume=True)
    except DamagedError as error:
        logger.warning("%s", error)
        result = finetune(config, prompts, folder, report)
    return _compared(config, prompts, folder, result.to_dict(), report, store)


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
    weights = weights_digest(tuned_weights(run))
    prepared = prepare(
        config.model, prompts, run=run, device=config.device, dtype=config.dtype, store=store, report=report
    )
    analysis, kl = prepared.analysis, result["kl_test"]
    targets = config.targets or analysis.recommended
    verdict = run_verdict(analysis, targets, kl, config.kl_budget)
    tuned_layers = analysis.tuned_layers or ()
    own = ("status", "reason", "steps", "best_step", "seconds", "seconds_per_step", "trained_parameters", "validations")
    return {name: result[name] for name in own} | {
        "trained": result.get("trained"),
        "run": run.id,
        "path": str(folder),
        "target_layers": list(targets),
        "kl_harmless_test": kl,
        "weights": weights,
        "verdict": verdict.name,
        "verdict_reason": verdict.reason,
        **run_behaviour(run).to_dict(verdict.name),
        "verdicts": {str(layer.layer): layer_verdict(layer, kl, config.kl_budget).to_dict() for layer in tuned_layers},
        "given_as": prepared.activations.given_as,
        "activations": {"base": prepared.activations.key, "tuned": prepared.tuned and prepared.tuned.key},
        "warnings": model_doubts(resolve(config.model)),
        "before": {str(layer.layer): _plain(layer) for layer in analysis.base_layers},
        "after": {str(layer.layer): _plain(layer) for layer in tuned_layers},
    }


def _plain(layer: LayerNumbers) -> dict[str, Any]:
    """A layer's numbers, and for tuned their change, without the curve over C, which the analysis keeps."""
    return {name: value for name, value in layer.to_dict().items() if name != "by_C"}
