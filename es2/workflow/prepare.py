"""What a command and a job both do: the steps that lead from a model and prompts to artifacts on disk.

Commands run them in the foreground, the app in jobs; both get the same artifacts under the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from es2.analysis.layer_views import are_worthwhile, render_layers
from es2.analysis.layers import analyze
from es2.analysis.projection import umap_all_layers
from es2.analysis.results import Analysis, AnalysisConfig
from es2.analysis.setup import check_prompts
from es2.capture.capture import capture
from es2.core.errors import InputError
from es2.core.progress import Reporter, silent
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.jobs.job import Job
from es2.models.catalogue import resolve
from es2.models.folders import is_cached
from es2.prompts.prompt_set import PromptSet, normalised, warn_of_likeness
from es2.store.activation_set import ActivationSet
from es2.store.sources import TestSet, usual_positions
from es2.store.store import Store
from es2.workflow.derived import Captured, analysis_key, find_activations, umap_key, views_key
from es2.workflow.runs import check_run, rendering_of, tuned_weights


@dataclass(frozen=True)
class Prepared:
    """Activation sets of the measured prompts, and the analysis of base, or of both.

    Attributes:
        activations: under the base model, or under the run that takes its place.
        tuned: under the tuned model; None without a run.
    """

    activations: ActivationSet
    tuned: ActivationSet | None
    analysis: Analysis


def prepare(
    model: str,
    prompts: PromptSet,
    *,
    run: Job | None = None,
    against: Job | None = None,
    test_prompts: PromptSet | None = None,
    rendering: Rendering = AS_THE_TEMPLATE,
    config: AnalysisConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> Prepared:
    """Capture and analyse what is not on disk yet; of large layers compute the views, too.

    Only `prompts.measured()` is captured: no number looks at the other splits, and they are more than half.

    Args:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        prompts: the prompt set; its `probe` split fits the probes, its `test` split gives the numbers.
        run: a fine-tuning run of this model, to be compared with its base.
        against: another run of this model, to be compared with instead of the base.
        test_prompts: prompts of another origin that give the numbers instead, without those of `prompts`.
        rendering: how the models are given the prompts, both in the same way; what it leaves open is as in the run.
        config: the analysis' settings.
        device: where the model runs; chosen by `es2.models.device.choose_device` if not given.
        dtype: the model's number format; chosen by `es2.models.device.choose_dtype` if not given.
        store: where artifacts lie.
        report: takes the progress.

    Raises:
        InputError, MachineError: as `capture` and `analyze` do; also when the run is of another model or has left no
            weights.
    """
    config = config or AnalysisConfig()
    store = store or Store()
    for one in filter(None, (run, against)):
        check_run(one, model)

    # First what may be refused: an empty rest, before minutes of work.
    rendering = common_rendering(prompts, rendering, run, against)
    captured = partial(_captured, model, config.position, run, against, rendering, device, dtype, store, report)
    rest = without_shared(test_prompts, prompts) if test_prompts is not None else None
    if rest is not None and rest.rendered_as(rendering).settled != rendering.settled:
        raise InputError(
            f"The chats in {rest.name!r} have a system prompt and {prompts.name!r} has none, and prompts are compared "
            "under one; give it with --system-prompt, or --system-prompt default for the template's own."
        )
    check_prompts(prompts, rest)
    prompts = prompts.measured()
    own = captured(prompts)
    test = captured(rest) if rest is not None else None
    analysis = analysis_of(prompts, own.base, own.tuned, config, store, test, report)
    return Prepared(own.base, own.tuned, analysis)


def analysis_of(
    prompts: PromptSet,
    base: ActivationSet,
    tuned: ActivationSet | None,
    config: AnalysisConfig,
    store: Store,
    test: Captured | None = None,
    report: Reporter = silent,
) -> Analysis:
    """The analysis of captured prompts, with the views of large layers, computed unless it is on disk.

    Raises:
        InputError, MachineError: as `analyze` does.
    """
    source = TestSet(test.prompts, test.base, test.tuned) if test is not None else None
    key = analysis_key(base, prompts, config, tuned=tuned, test=test)
    holder = tuned or base
    with store.lock(key, lambda: report("wait", 0, 1)):
        if folder := holder.derived(key):
            analysis = Analysis.load(folder)
        else:
            analysis = analyze(prompts, base, tuned, test=source, config=config, report=report)
            with holder.write_derived(key) as folder:
                analysis.save(folder)
        if test is None and are_worthwhile(len(prompts), base.d_model):
            write_views(prompts, base, tuned, analysis, report)
    return analysis


def common_rendering(prompts: PromptSet, given: Rendering, run: Job | None, against: Job | None = None) -> Rendering:
    """The one rendering under which models are compared: as given, else as the run was tuned, else as the prompts say.

    Raises:
        InputError: when two runs were tuned under different ones, and none is given.
    """
    found = [prompts.rendered_as(given, rendering_of(one)) for one in (run, against) if one is not None]
    if len(found) == 2 and found[0].settled != found[1].settled and run is not None and against is not None:
        raise InputError(
            f"The runs {run.id} and {against.id} were tuned under different renderings, and models are compared under "
            "one; give it with --system-prompt, --thinking and --template-arg."
        )
    return found[0] if found else prompts.rendered_as(given)


def write_views(
    prompts: PromptSet, base: ActivationSet, tuned: ActivationSet | None, analysis: Analysis, report: Reporter = silent
) -> None:
    """Compute the views of all layers that belong to an analysis, unless they exist."""
    holder, position = tuned or base, analysis.config.position
    key = views_key(base, prompts, analysis.config, tuned)
    if holder.derived(key) is None:
        probes, tuned_probes = analysis.base_probes, analysis.tuned_probes
        views = render_layers(prompts, base, probes, tuned, tuned_probes, position=position, report=report)
        with holder.write_derived(key) as folder:
            views.save(folder)


def _captured(
    model: str,
    position: str,
    run: Job | None,
    against: Job | None,
    rendering: Rendering,
    device: str | None,
    dtype: str | None,
    store: Store,
    report: Reporter,
    prompts: PromptSet,
) -> Captured:
    """The prompts under base, or under the run in its place, and under the tuned model if there is a run."""
    spec = resolve(model)

    def activations(of: Job | None) -> ActivationSet:
        """From the store if the model is not on this machine but its embeddings are."""
        run_id = of.id if of else None
        known = find_activations(spec.name, prompts, position, store, run_id, rendering)
        if known is not None and not is_cached(spec):
            return known
        weights = tuned_weights(of) if of else None
        return capture(
            model,
            prompts,
            adapter=weights,
            run=run_id,
            positions=usual_positions(position),
            or_more=True,
            rendering=rendering,
            device=device,
            dtype=dtype,
            store=store,
            report=report,
        ).activations

    return Captured(prompts, activations(against), activations(run) if run else None)


def without_shared(prompts: PromptSet, others: PromptSet) -> PromptSet:
    """`prompts` without those whose normalised text is also in `others`; nearly equal ones are warned of.

    Raises:
        InputError: when nothing is left.
    """
    known = {normalised(text) for text in others.texts}
    keep = np.array([normalised(text) not in known for text in prompts.texts], dtype=bool)
    if not keep.any():
        raise InputError(f"Every test prompt of {prompts.name!r} is also in {others.name!r}; give other test prompts.")
    rest = prompts if keep.all() else prompts.select(keep)
    warn_of_likeness(rest, others)
    return rest


def project(
    model: str,
    prompts: PromptSet,
    *,
    run: Job | None = None,
    against: Job | None = None,
    rendering: Rendering = AS_THE_TEMPLATE,
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
    for one in filter(None, (run, against)):
        check_run(one, model)
    rendering = common_rendering(prompts, rendering, run, against)
    own = _captured(model, position, run, against, rendering, device, dtype, store, report, prompts)
    base, tuned = own.base, own.tuned
    holder = tuned or base
    key = umap_key(base, prompts, position, tuned)
    with store.lock(key, lambda: report("wait", 0, 1)):
        if holder.derived(key) is None:
            coordinates = umap_all_layers(prompts, base, tuned, position=position, report=report)
            with holder.write_derived(key) as folder:
                coordinates.save(folder)
    return holder, key
