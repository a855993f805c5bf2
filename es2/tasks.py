"""What a command and a job both do: the steps that lead from a model and prompts to artifacts on disk.

The command line runs these in the foreground, `es2.jobs` runs them as processes of their own for the app; both get the
same artifacts under the same keys. The functions whose names begin with `find_` only look on disk. They import nothing
heavy and need neither weights nor tokenizer, so that the app opens at once, also on a laptop to which somebody copied
a folder of artifacts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.errors import InputError
from es2.files import DamagedError
from es2.jobs import Job, Reporter, Task, lay_down, open_job, reopen, result_of, run_job, silent
from es2.layer_views import VIEWS_FORMAT, are_worthwhile, draw_layers
from es2.layers import ANALYSIS_FORMAT, Analysis, AnalysisConfig, TestSet, analyze, check_prompts
from es2.projection import PROJECTION_FORMAT, UmapCoordinates, umap_all_layers
from es2.prompts import PromptSet, load_prompts, normalised, warn_of_likeness
from es2.results import LayerNumbers
from es2.settings import check_settings
from es2.store import ActivationSet, Store, content_key

if TYPE_CHECKING:
    from es2.finetune import FinetuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A prompt set and its embeddings.

    Attributes:
        prompts: the prompts.
        base: their embeddings under the base model, or under the run that stands in its place.
        tuned: their embeddings under a run's tuned model, where one is asked for.
    """

    prompts: PromptSet
    base: ActivationSet
    tuned: ActivationSet | None = None


@dataclass(frozen=True)
class Prepared:
    """Activation sets and what was computed from them.

    Attributes:
        activations: of the measured prompts under the base model, or under the run that stands in its place.
        tuned: the same under the tuned model; None without a run.
        analysis: of base, or of both.
    """

    activations: ActivationSet
    tuned: ActivationSet | None
    analysis: Analysis


def analysis_key(
    base: ActivationSet,
    prompts: PromptSet,
    config: AnalysisConfig,
    *,
    tuned: ActivationSet | None = None,
    test: Captured | None = None,
) -> str:
    """The key of an analysis: everything that decides its numbers, and nothing else."""
    n_fitted = max(int(prompts.in_split("probe").sum()), len(test.prompts) if test else 0)
    # Where prompts outnumber dimensions, analyses before this entry hold probes that are not the best ones.
    corrected = {"fits": 2} if n_fitted > base.d_model else {}
    return content_key(
        corrected
        | {
            "kind": "analysis",
            "format": ANALYSIS_FORMAT,
            "base": base.key,
            "tuned": tuned and tuned.key,
            "prompts": prompts.digest,
            "test": test and [test.base.key, test.tuned and test.tuned.key, test.prompts.digest],
            "config": asdict(config),
        }
    )


def umap_key(activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None) -> str:
    """The key of the UMAP coordinates of all layers of one activation set, or of base and tuned in common maps."""
    return content_key(
        {
            "kind": "umap",
            "format": PROJECTION_FORMAT,
            "base": activations.key,
            "tuned": tuned and tuned.key,
            "prompts": prompts.digest,
            "position": position,
        }
    )


def views_key(
    base: ActivationSet, prompts: PromptSet, config: AnalysisConfig, tuned: ActivationSet | None = None
) -> str:
    """The key of the views of all layers that belong to an analysis."""
    analysis = analysis_key(base, prompts, config, tuned=tuned)
    return content_key({"kind": "views", "format": VIEWS_FORMAT, "analysis": analysis})


def find_activations(
    model: str, prompts: PromptSet, position: str, store: Store | None = None, run: str | None = None
) -> ActivationSet | None:
    """The newest activation set of exactly these prompts under this model or run, if there is one on disk."""
    return (store or Store()).find(model=model, texts_digest=prompts.texts_digest, position=position, run=run)


def find_analysis(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Analysis | None:
    """The analysis of an activation set, or of base and tuned, with the shipped settings, if it was made."""
    folder = find_analysis_folder(activations, prompts, position, tuned)
    return Analysis.load(folder) if folder else None


def find_analysis_folder(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Path | None:
    """Where `find_analysis` reads."""
    key = analysis_key(activations, prompts, AnalysisConfig(position=position), tuned=tuned)
    return (tuned or activations).derived(key)


def find_views_folder(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> Path | None:
    """Where the views of all layers lie that belong to `find_analysis`, if they were worked out beforehand."""
    key = views_key(activations, prompts, AnalysisConfig(position=position), tuned)
    return (tuned or activations).derived(key)


def find_umap(
    activations: ActivationSet, prompts: PromptSet, position: str, tuned: ActivationSet | None = None
) -> UmapCoordinates | None:
    """The UMAP coordinates of an activation set, or of base and tuned, if they were computed."""
    folder = (tuned or activations).derived(umap_key(activations, prompts, position, tuned))
    return UmapCoordinates.load(folder) if folder else None


def prepare(
    model: str,
    prompts: PromptSet,
    *,
    run: Job | None = None,
    against: Job | None = None,
    test_prompts: PromptSet | None = None,
    config: AnalysisConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> Prepared:
    """Capture what is not captured yet and analyse what is not analysed yet; of large layers work out the views, too.

    Only `prompts.measured()` is captured: no number looks at the other splits, and they are more than half.

    Args:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        prompts: the prompt set; its `probe` split fits the probes, its `test` split gives the numbers.
        run: a fine-tuning run of this model, to be compared with its base.
        against: another run of this model, to be compared with instead of the base.
        test_prompts: prompts of another origin that give the numbers instead, less those that also stand in `prompts`.
        config: the analysis' settings.
        device: where the model runs; chosen by `es2.models.choose_device` if not given.
        dtype: the model's number format; chosen by `es2.models.choose_dtype` if not given.
        store: where artifacts lie.
        report: told about progress.

    Returns:
        The activation sets of `prompts.measured()` and the analysis.

    Raises:
        InputError, MachineError: as `es2.capture.capture` and `es2.layers.analyze` do; also when the run is of another
            model or has left no weights.
    """
    config = config or AnalysisConfig()
    store = store or Store()
    for one in (run, against):
        if one is not None:
            check_run(one, model)

    captured = partial(_captured, model, config.position, run, against, device, dtype, store, report)
    # First what may be refused: an empty rest, before minutes of work.
    rest = without_shared(test_prompts, prompts) if test_prompts is not None else None
    check_prompts(prompts, rest)
    prompts = prompts.measured()
    own = captured(prompts)
    test = captured(rest) if rest is not None else None
    source = TestSet(test.prompts, test.base, test.tuned) if test is not None else None
    key = analysis_key(own.base, prompts, config, tuned=own.tuned, test=test)
    holder = own.tuned or own.base
    with store.lock(key, lambda: report("wait", 0, 1)):
        if folder := holder.derived(key):
            analysis = Analysis.load(folder)
        else:
            analysis = analyze(prompts, own.base, own.tuned, test=source, config=config, report=report)
            with holder.write_derived(key) as folder:
                analysis.save(folder)
        if test is None and are_worthwhile(len(prompts), own.base.d_model):
            write_views(prompts, own.base, own.tuned, analysis, report)
    return Prepared(own.base, own.tuned, analysis)


def write_views(
    prompts: PromptSet,
    base: ActivationSet,
    tuned: ActivationSet | None,
    analysis: Analysis,
    report: Reporter = silent,
) -> None:
    """Work out the views of all layers that belong to an analysis of base, or of base and tuned, unless they exist."""
    holder = tuned or base
    key = views_key(base, prompts, analysis.config, tuned)
    if holder.derived(key) is None:
        views = draw_layers(
            prompts,
            base,
            analysis.base_probes,
            tuned,
            analysis.tuned_probes,
            position=analysis.config.position,
            report=report,
        )
        with holder.write_derived(key) as folder:
            views.save(folder)


def check_run(run: Job, model: str) -> None:
    """Refuse a run of another model, or one without weights (`InputError`)."""
    from es2.models import resolve
    from es2.runs import config_of, tuned_weights

    tuned_weights(run)
    of = config_of(run).model
    if resolve(of).location != resolve(model).location:
        raise InputError(f"Run {run.id} tuned the model {of!r}, not {model!r}; give --model {of}.")


def _captured(
    model: str,
    position: str,
    run: Job | None,
    against: Job | None,
    device: str | None,
    dtype: str | None,
    store: Store,
    report: Reporter,
    prompts: PromptSet,
) -> Captured:
    """The prompts under base, or under the run in its place, and under the tuned model if there is a run."""
    base = _activations(model, prompts, position, against, device, dtype, store, report)
    tuned = _activations(model, prompts, position, run, device, dtype, store, report) if run else None
    return Captured(prompts, base, tuned)


def _activations(
    model: str,
    prompts: PromptSet,
    position: str,
    run: Job | None,
    device: str | None,
    dtype: str | None,
    store: Store,
    report: Reporter,
) -> ActivationSet:
    """The activation set, from the store if the model is not on this machine but its embeddings are."""
    from es2.capture import capture
    from es2.models import is_cached, resolve
    from es2.runs import tuned_weights

    spec = resolve(model)
    run_id = run.id if run else None
    known = store.find(model=spec.name, texts_digest=prompts.texts_digest, position=position, run=run_id)
    if known is not None and not is_cached(spec):
        return known
    return capture(
        model,
        prompts,
        adapter=tuned_weights(run) if run else None,
        run=run_id,
        device=device,
        dtype=dtype,
        store=store,
        report=report,
    ).activations


def without_shared(prompts: PromptSet, others: PromptSet) -> PromptSet:
    """`prompts` less those whose normalised text also stands in `others`; nearly equal ones are warned of.

    Raises:
        InputError: when nothing is left.
    """
    known = {normalised(text) for text in others.texts}
    keep = np.array([normalised(text) not in known for text in prompts.texts], dtype=bool)
    if not keep.any():
        raise InputError(
            f"Every test prompt of {prompts.name!r} also stands in {others.name!r}; give other test prompts."
        )
    rest = prompts if keep.all() else prompts.select(keep)
    warn_of_likeness(rest, others)
    return rest


def project(
    model: str,
    prompts: PromptSet,
    *,
    run: Job | None = None,
    against: Job | None = None,
    position: str = "last",
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> tuple[ActivationSet, str]:
    """Compute the UMAP coordinates of every layer, unless they are on disk already; with a run, in maps of both models.

    Returns:
        The activation set beside which the coordinates are kept (tuned where there is a run), and their key. Arguments
        and errors as for `prepare`.
    """
    store = store or Store()
    prompts = prompts.measured()
    for one in (run, against):
        if one is not None:
            check_run(one, model)
    own = _captured(model, position, run, against, device, dtype, store, report, prompts)
    base, tuned = own.base, own.tuned
    holder = tuned or base
    key = umap_key(base, prompts, position, tuned)
    with store.lock(key, lambda: report("wait", 0, 1)):
        if holder.derived(key) is None:
            coordinates = umap_all_layers(prompts, base, tuned, position=position, report=report)
            with holder.write_derived(key) as folder:
                coordinates.save(folder)
    return holder, key


def finetune_run(
    config: FinetuneConfig, prompts: PromptSet, folder: Path, report: Reporter = silent, store: Store | None = None
) -> dict[str, Any]:
    """Fine-tune, capture the tuned model, compare it with base, and judge. What `es2 finetune` prints.

    Args:
        config: the fine-tune's settings; it goes on from a checkpoint in `folder` if there is a whole one.
        prompts: the prompt set.
        folder: the run folder, whose name is the run's id.
        report: told about progress.
        store: where activation sets lie.

    Returns:
        JSON values: how the run ended, its KLs on harmless `test` prompts, the numbers of every layer before and after,
        and the verdict at the target layers with its reason.

    Raises:
        InputError, MachineError, Cancelled: as `es2.finetune.finetune` and `prepare` do.
    """
    from es2.finetune import finetune

    try:
        result = finetune(config, prompts, folder, report, resume=True)
    except DamagedError as error:
        logger.warning("%s", error)
        result = finetune(config, prompts, folder, report)
    return _compared(config, prompts, folder, result.to_dict(), report, store)


def imported_run(
    config: FinetuneConfig, prompts: PromptSet, folder: Path, report: Reporter = silent, store: Store | None = None
) -> dict[str, Any]:
    """As `finetune_run`, of an adapter that was made elsewhere: nothing is trained and no KL is measured."""
    nothing: dict[str, Any] = {"steps": 0, "best_step": 0, "seconds": 0.0, "seconds_per_step": 0.0, "watched": []}
    result = nothing | {"status": "done", "reason": None, "trained_parameters": None, "kl_test": None}
    return _compared(config, prompts, folder, result, report, store)


def _compared(
    config: FinetuneConfig,
    prompts: PromptSet,
    folder: Path,
    result: Mapping[str, Any],
    report: Reporter,
    store: Store | None,
) -> dict[str, Any]:
    """Capture the tuned model, compare it with base, and add the numbers and the verdict to how the run went."""
    from es2.runs import tuned_weights, weights_digest
    from es2.verdict import layer_verdict, run_verdict

    run = open_job(folder.name, folder.parent)
    weights = weights_digest(tuned_weights(run))
    prepared = prepare(
        config.model, prompts, run=run, device=config.device, dtype=config.dtype, store=store, report=report
    )
    analysis, kl = prepared.analysis, result["kl_test"]
    targets = config.targets or analysis.recommended
    verdict = run_verdict(analysis, targets, kl)
    tuned_layers = analysis.tuned_layers or ()
    own = ("status", "reason", "steps", "best_step", "seconds", "seconds_per_step", "trained_parameters", "watched")
    return {name: result[name] for name in own} | {
        "run": run.id,
        "path": str(folder),
        "target_layers": list(targets),
        "kl_harmless_test": kl,
        "weights": weights,
        "verdict": verdict.name,
        "verdict_reason": verdict.reason,
        "verdicts": {str(layer.layer): layer_verdict(layer, kl).to_dict() for layer in tuned_layers},
        "activations": {"base": prepared.activations.key, "tuned": prepared.tuned and prepared.tuned.key},
        "before": {str(layer.layer): _plain(layer) for layer in analysis.base_layers},
        "after": {str(layer.layer): _plain(layer) for layer in tuned_layers},
    }


def _plain(layer: LayerNumbers) -> dict[str, Any]:
    """A layer's numbers, and for tuned their change, without the curve over C, which the analysis keeps."""
    return {name: value for name, value in layer.to_dict().items() if name != "by_cost"}


def _prepare_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    run, against = _runs(config, folder)
    prepared = prepare(
        config["model"],
        load_prompts(config["prompts"]),
        run=run,
        against=against,
        config=AnalysisConfig(position=config["position"]),
        report=report,
    )
    return {"activations": prepared.activations.key}


def _project_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    run, against = _runs(config, folder)
    prompts = load_prompts(config["prompts"])
    activations, key = project(
        config["model"], prompts, run=run, against=against, position=config["position"], report=report
    )
    return {"activations": activations.key, "umap": key}


def _runs(config: dict[str, Any], folder: Path) -> tuple[Job | None, Job | None]:
    """The runs that a job compares: `run` and `against` in its config, by id."""
    ids = (config.get("run"), config.get("against"))
    run, against = (open_job(id, folder.parent) if id else None for id in ids)
    return run, against


def _finetune_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    from es2.runs import config_of

    do = imported_run if config.get("imported") else finetune_run
    return do(config_of(Job(folder, config)), load_prompts(config["prompts"]), folder, report)


def _read_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    from es2.reader import read_job

    return read_job(config, report, folder)


def _evaluate_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    from es2.evaluate import EvaluateConfig, evaluate

    check_settings(EvaluateConfig, config, f"The config.json of job {folder.name}")
    settings = EvaluateConfig.from_dict(config)
    run, _ = _runs(config, folder)
    return evaluate(settings, load_prompts(settings.prompts), folder, run=run, report=report)


JOBS: Mapping[str, Task] = {
    "read": _read_job,
    "prepare": _prepare_job,
    "project": _project_job,
    "finetune": _finetune_job,
    "evaluate": _evaluate_job,
}
"""What `es2 job` can run: a job's kind and the function that does it."""


def run_here(kind: str, config: Mapping[str, Any], unfinished: Job | None, report: Reporter = silent) -> dict[str, Any]:
    """Run a job in this process: one of this config that ended before its time, or else a new one.

    Returns:
        Its result.

    Raises:
        InputError, MachineError: with the job's sentence when it comes to none.
    """
    if unfinished is None:
        job = lay_down(kind, config)
    else:
        job = unfinished
        reopen(job)
    exit_code = run_job(job.path, JOBS, report)
    return result_of(job, exit_code, f"Job {job.id} was {job.status()}; the same command goes on from what it has.")
