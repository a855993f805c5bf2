"""The functions of `import es2` that make and judge runs: fine-tunes, sweeps, evaluations, comparisons, reports.

Long work shows a bar in a notebook and in a terminal. Interrupted (the stop button, Ctrl-C), it raises
`KeyboardInterrupt` and leaves nothing half written. The examples run in a folder that holds a model (`tiny-model`),
prompts (`locks.csv`) and an adapter (`adapter`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.analysis.results import AnalysisConfig
from es2.api.asking import (
    ModelLike,
    PromptsLike,
    RunLike,
    job_of,
    model_of,
    path_of,
    prepared_for,
    prompts_of,
    public,
    rendering_of,
    run_of,
    sorted_settings,
    source_of,
)
from es2.api.outcomes import Evaluation, Run, Sweep
from es2.api.progress import Progress, shown
from es2.api.records import Compared
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.training.config import FinetuneConfig
from es2.workflow.sweep_space import SEARCHED, SHAPE, SweepConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from es2.jobs.job import Job


@public
def finetune(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    layers: Sequence[int] = (),
    name: str = "",
    resume: RunLike | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Run:
    """Fine-tune a model with ES2, compare it with its base on prompts it never saw, and judge.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source; `tune` is trained on, `validation` chooses the step that is kept.
        layers: the target layers; by default the two that `analyze` recommends.
        name: what to call the run.
        resume: a run that was interrupted or cancelled and goes on from its last checkpoint, with its own settings.
        progress: `es2.api.progress.Progress`.
        settings: of `es2 finetune` (docs/settings.md): `objective`, `kl_weight`, `steps`, `learning_rate`, `replies` …

    Returns:
        The run: `outcome`, `result`, `to_frame()` (before and after at the target layers) and `plot()` (its curves).

    Raises:
        InputError: for a setting that cannot be, before anything heavy is done; also as `capture`.
        MachineError: as `capture`.
        KeyboardInterrupt: when it is interrupted; the run is then `cancelled` and can be resumed.

    Source: arXiv 2603.20206; loss = −separation + λ · KL on harmless prompts.

    >>> import es2
    >>> run = es2.finetune("./tiny-model", "locks.csv", layers=[1, 2], steps=2, pairs_per_step=4, replies=False)
    >>> run.status, run.result["target_layers"], sorted(run.result["kl_harmless_test"])
    ('done', [1, 2], ['prompt', 'reply'])
    """
    from es2.jobs.queue import reopen
    from es2.workflow.foreground import begin_finetune, decide_finetune

    if resume is not None:
        if settings or layers or name:
            raise InputError("A run that is resumed has its own settings; leave all others out.")
        of = job_of(resume)
        reopen(of)
        return _run_here(of, progress)
    (given,) = sorted_settings({**settings, "layers": layers}, FinetuneConfig)
    chosen = prompts_of(prompts)
    source = source_of(chosen)
    with shown(progress) as report:
        config = decide_finetune(model_of(model, None), chosen, given, rendering_of(given), report)
    return _run_here(begin_finetune(config, source, name), progress)


@public
def import_adapter(
    adapter: ModelLike,
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    layers: Sequence[int] = (),
    name: str = "",
    progress: Progress = None,
    **settings: Any,
) -> Run:
    """Take in an adapter that was trained elsewhere as a run, and compare the tuned model with its base.

    Args:
        adapter: the folder that peft's `save_pretrained` wrote, one that holds it, or a Hub id. It is copied.
        model: the model that it was trained on.
        prompts: a prompt set, or its source, to compare on.
        layers: its target layers; by default the two that `analyze` recommends.
        name: what to call the run.
        progress: `es2.api.progress.Progress`.
        settings: `replies`, `device`, `dtype` and of the rendering (docs/settings.md).

    Returns:
        The run, as of `finetune`; nothing was trained, so it has no curves.

    Raises:
        InputError: for an adapter that is none, or does not fit the model.
        MachineError: as `capture`.

    >>> import es2
    >>> run = es2.import_adapter("adapter", "./tiny-model", "locks.csv", layers=[1, 2], replies=False)
    >>> run.status, run.result["steps"]
    ('done', 0)
    """
    from es2.workflow.foreground import begin_import

    (given,) = sorted_settings({**settings, "layers": layers}, FinetuneConfig)
    chosen = prompts_of(prompts)
    source = source_of(chosen)
    allowed = ("layers", "replies", "device", "dtype", *Rendering.model_fields)
    if wrong := [one for one in given if one not in allowed]:
        raise InputError(f"An adapter that is taken in has no setting {wrong[0]!r}; there are {', '.join(allowed)}.")
    config = FinetuneConfig(**given)
    with shown(progress) as report:
        run = begin_import(
            path_of(adapter, "An adapter"),
            model_of(model, None),
            source,
            config.layers,
            name=name,
            rendering=chosen.rendered_as(config.rendering),
            device=config.device,
            dtype=config.dtype,
            replies=config.replies,
            report=report,
        )
    return _run_here(run, progress)


@public
def compare(
    run: RunLike, against: RunLike | None = None, *, position: str = "last", progress: Progress = None
) -> Compared:
    """A run beside its base, or beside another run of the same model; what is not on disk is computed.

    Args:
        run: the run.
        against: the run that takes the place of base.
        position: whose embeddings are read.
        progress: `es2.api.progress.Progress`.

    Returns:
        `outcome` and `reason`, `to_frame()` with a row for each number of each layer, and the figures of the page
        *Compare*.

    Raises:
        InputError: for a run that does not exist, has not ended, or is of another model or other prompts.
        MachineError: as `capture`.

    Source: the table of verdicts in docs/numbers.md.

    >>> import es2
    >>> compared = es2.compare(run)
    >>> compared.targets, sorted(set(compared.to_frame()["layer"]))
    ((1, 2), [0, 1, 2])
    >>> len(compared.plot("overview").data) > 1
    True
    """
    from es2.prompts.loading import load_prompts as load
    from es2.workflow.compared import AbsentError, find_comparison

    of, other = job_of(run), run_of(against)
    prompts = load(str(of.config.get("prompts", "builtin")))
    try:
        found = find_comparison(of, prompts.measured(), position, other)
    except AbsentError:
        if of.is_shipped or of.result() is None:
            raise
        config = AnalysisConfig(position=position)
        prepared_for(None, prompts, of, other, {}, {}, progress, config=config)
        found = find_comparison(of, prompts.measured(), position, other)
    return Compared(found)


@public
def evaluate(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    run: RunLike | None = None,
    suite: str = "all",
    progress: Progress = None,
    **settings: Any,
) -> Evaluation:
    """Does the separation hold: refusals, over-refusal, ability, and attacks on the embeddings, of base and tuned.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source. Of prompts that the run was tuned on only `test` counts.
        run: a fine-tuning run to compare with its base.
        suite: `refusal`, `kl`, `perturbation` (attacks), `soft_prompt`, `ability`, `direction`, or `all` but the last.
        progress: `es2.api.progress.Progress`.
        settings: of `es2 evaluate` (docs/settings.md): `limit`, `new_tokens`, `budgets`, `layers` …

    Returns:
        `to_frame()` with a row for each number, `plot("rates")`, `plot("attack")` and others; replies stay on disk.

    Raises:
        InputError, MachineError: as `capture`; for prompts that no suite can measure.
        KeyboardInterrupt: when it is interrupted; the same call goes on from the replies that it has.

    Source: docs/evaluation.md; SCAV (arXiv 2404.12038), RepE (arXiv 2310.01405).

    >>> import es2
    >>> found = es2.evaluate("./tiny-model", "locks.csv", suite="refusal", limit=2, new_tokens=4)
    >>> set(found.to_frame()["suite"]), found.plot("rates").layout.xaxis.title.text
    ({'refusal'}, 'share (no unit), 95 % interval')
    """
    from es2.workflow.foreground import decide_evaluation, evaluate_here

    of = run_of(run)
    (given,) = sorted_settings(settings, EvaluateConfig)
    decided = {"model": model_of(model, of), "prompts": source_of(prompts_of(prompts)), "suite": suite}
    config = decide_evaluation(given | decided | {"run": of and of.id}, rendering_of(given))
    with shown(progress) as report:
        return Evaluation(evaluate_here(config, report))


@public
def sweep(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    resume: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Sweep:
    """Many short fine-tunes over layers, objective, λ, learning rate and rank: how much separation for how much KL.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source.
        resume: the id of a sweep that goes on where it was interrupted, with its own settings.
        progress: `es2.api.progress.Progress`.
        settings: of `es2 sweep` (docs/settings.md): `trials`, `steps`, `objectives` …; a setting of `finetune` that is
            given is the same in all trials.

    Returns:
        `to_frame()` with a row for each trial, `best`, and the figures of the page *Sweep*.

    Raises:
        InputError, MachineError: as `finetune`; for a space with nothing to search.
        KeyboardInterrupt: when it is interrupted; the trials that ended are kept.

    Source: docs/sweep.md.

    >>> import es2
    >>> found = es2.sweep(
    ...     "./tiny-model", "locks.csv", trials=1, steps=2, pairs_per_step=4, validation_prompts=4, layers=[1, 2]
    ... )
    >>> found.to_frame()["trial"].tolist(), len(found.plot().data) > 1
    ([0], True)
    """
    from es2.jobs.running import result_of, run_job
    from es2.models.catalogue import resolve
    from es2.workflow.job_kinds import JOBS
    from es2.workflow.sweep import create_sweep
    from es2.workflow.sweeps import open_sweep, reopen_sweep

    with shown(progress) as report:
        if resume is not None:
            if settings:
                raise InputError("A sweep that is resumed has its own settings; leave all others out.")
            job = open_sweep(resume)
            reopen_sweep(job)
        else:
            own, fixed = sorted_settings(settings, SweepConfig, FinetuneConfig)
            chosen = prompts_of(prompts)
            usual = {name: field.default for name, field in FinetuneConfig.model_fields.items() if name not in SHAPE}
            usual |= dict.fromkeys((*SEARCHED, "alpha"))
            rendering = dict(chosen.rendered_as(rendering_of(fixed)))
            given = {**usual, **fixed, **rendering, "model": resolve(model_of(model, None)).name}
            job = create_sweep(SweepConfig(**own), given, chosen, source_of(chosen), report)
        exit_code = run_job(job.path, JOBS, report)
    return Sweep(result_of(job, exit_code, f"Sweep {job.id} was {job.status()}; `es2 sweep resume {job.id}` goes on."))


@public
def open_run(run: RunLike = "showcase") -> Run:
    """A fine-tuning run by its id, or the one that comes with the program.

    Raises:
        InputError: when there is no such run; `es2 runs` lists them.

    >>> import es2
    >>> run = es2.open_run(run.id)
    >>> run.status, run.settings["steps"]
    ('done', 2)
    """
    return Run(job_of(run))


@public
def report(run: RunLike, out: ModelLike, *, force: bool = False) -> Path:
    """One HTML file that shows what a run did: figures, numbers, settings, versions; it needs no network.

    Args:
        run: the run, or `showcase`.
        out: the file to write.
        force: whether to replace a file.

    Returns:
        The file's absolute path; it is whole or not there at all.

    Raises:
        InputError: when the file exists, or the run has not ended or was not compared.
        MachineError: when the machine refuses.

    >>> import es2
    >>> es2.report(run, "report.html").name
    'report.html'
    """
    from es2.report.report import write_report
    from es2.workflow.compared import find_compared

    return write_report(find_compared(job_of(run).id), Path(path_of(out, "A report")), force=force)


# ---------------------------------------------------------------------------------------------------------- their parts


def _run_here(run: Job, progress: Progress) -> Run:
    from es2.workflow.foreground import result_of_run

    with shown(progress) as report:
        result_of_run(run, report)
    return Run(run)
