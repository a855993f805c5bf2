"""The functions of `import es2` that read: prompts, models, embeddings, and what can be seen in them.

Long work shows a bar in a notebook and in a terminal. Interrupted (the stop button, Ctrl-C), it raises
`KeyboardInterrupt` and leaves nothing half written. The examples run in a folder that holds a model (`tiny-model`),
prompts (`locks.csv`) and an adapter (`adapter`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from es2.analysis.layer_views import RENDERS
from es2.analysis.results import AnalysisConfig
from es2.api.asking import (
    ModelLike,
    Place,
    Prompts,
    PromptsLike,
    RunLike,
    model_of,
    path_of,
    prepared_for,
    prompts_of,
    public,
    run_of,
    sorted_settings,
    with_source,
)
from es2.api.outcomes import Checked
from es2.api.progress import Progress, shown
from es2.api.records import Embeddings, Model, Projection, Separation
from es2.capture.config import CaptureConfig
from es2.core.errors import InputError
from es2.core.rendering import Rendering

if TYPE_CHECKING:
    from collections.abc import Sequence


@public
def load_prompts(
    source: ModelLike = "builtin",
    *,
    harmful: ModelLike | None = None,
    harmless: ModelLike | None = None,
    prompt_column: str | None = None,
    label_column: str | None = None,
    harmful_values: str | Sequence[str] = (),
    skip_bad_rows: bool = False,
) -> Prompts:
    """Labelled prompts with their splits.

    Args:
        source: `builtin`, a file (CSV, TSV, JSON, JSONL, TXT, Parquet; also .gz), `hf:<dataset>[:split]` or a
            benchmark.
        harmful, harmless: two files in place of `source`, `FILE` or `FILE:COLUMN`, one for each label.
        prompt_column, label_column: the columns, where they are not found by themselves.
        harmful_values: the harmful values of the label's column; all others are harmless.
        skip_bad_rows: whether wrong rows are left out and counted.

    Returns:
        A `PromptSet`: `texts`, `labels` (1 harmful, 0 harmless), `categories`, `pairs` and `splits`, in the order of
        the source. Every function that takes prompts takes this, or a source.

    Raises:
        InputError: with the row and the column, for a source that cannot be read as prompts.
        MachineError: when the Hub cannot be reached.

    Source: docs/prompts.md.

    >>> import es2
    >>> prompts = es2.load_prompts("locks.csv")
    >>> len(prompts), prompts.texts[0]
    (120, 'Break lock number 0 open.')
    >>> prompts.to_frame()["label"].value_counts().to_dict()
    {'harmful': 60, 'harmless': 60}
    """
    from es2.prompts.loading import two_files
    from es2.prompts.sources import read_source, write_source

    columns = {"prompt_column": prompt_column, "label_column": label_column}
    if harmful is not None or harmless is not None:
        if harmful is None or harmless is None:
            raise InputError("Give both harmful and harmless; each file has prompts of one label.")
        if source != "builtin" or label_column is not None or harmful_values:
            raise InputError(
                "With harmful and harmless the files are the labels; leave out source, label_column and harmful_values."
            )
        how = two_files(path_of(harmful, "A file of prompts"), path_of(harmless, "A file of prompts"))
        columns = {
            "prompt_column": how.prompt_column or prompt_column,
            "harmless_column": how.harmless_column or prompt_column,
        }
    else:
        how = read_source(path_of(source, "A source of prompts"))
    changes: dict[str, Any] = {name: value for name, value in columns.items() if value is not None}
    if harmful_values:
        changes["harmful_values"] = (harmful_values,) if isinstance(harmful_values, str) else tuple(harmful_values)
    if skip_bad_rows:
        changes["skip_bad_rows"] = True
    return with_source(write_source(replace(how, **changes)))


@public
def load_model(
    model: ModelLike | None = None,
    *,
    run: RunLike | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = None,
) -> Model:
    """A model in memory, as transformers has it, to be used with code of your own.

    Args:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file; by default the run's, else smollm2-135m-instruct.
        run: a fine-tuning run to merge into it.
        device: cuda, mps or cpu; by default the best there is.
        dtype: float32, bfloat16 or float16; by default bfloat16 on a CUDA device, else float32.
        progress: of a download; `es2.api.progress.Progress`.

    Returns:
        `network` (in evaluation mode), `tokenizer`, `name`, `n_layers` and `d_model`.

    Raises:
        InputError: for a model or a run that cannot be used. Code in a model's folder is never run.
        MachineError: when network, memory or disk refuse.

    >>> import es2
    >>> model = es2.load_model("./tiny-model")
    >>> model.n_layers, model.d_model
    (3, 32)
    """
    from es2.models.catalogue import resolve
    from es2.models.folders import model_folder
    from es2.models.loading import load_model as load
    from es2.models.loading import load_tokenizer, load_tuned
    from es2.models.shape import count_layers
    from es2.workflow.runs import check_run, tuned_weights

    of = run_of(run)
    spec = resolve(model_of(model, of))
    if of is not None:
        check_run(of, spec.name)
    with shown(progress) as report:
        folder = model_folder(spec, report)
        if of is None:
            network = load(folder, device=device, dtype=dtype)
        else:
            network = load_tuned(folder, tuned_weights(of), device=device, dtype=dtype)
    d_model = int(network.config.get_text_config().hidden_size)
    return Model(
        spec.name, None if of is None else of.id, network, load_tokenizer(folder), count_layers(folder), d_model
    )


@public
def capture(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    run: RunLike | None = None,
    all_splits: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Embeddings:
    """The residual-stream embeddings of prompts at every layer, computed only if they are not on disk.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source.
        run: a fine-tuning run whose tuned model is read.
        all_splits: whether prompts that no number is of (`tune`, `validation`) are read, too.
        progress: `es2.api.progress.Progress`.
        settings: `positions`, `system_prompt`, `thinking`, `template_arg`, `device`, `dtype` (docs/settings.md).

    Returns:
        `values` is float32 `[layer, prompt, d_model]`, in the model's own units, at the last prompt token; `at` gives
        another position, `layer` reads one layer alone.

    Raises:
        InputError: for a model, a prompt or a setting that cannot be used.
        MachineError: when network, memory or disk refuse.

    Source: layer l is TransformerLens's `blocks.{l}.hook_out`, the residual stream after block l.

    >>> import es2
    >>> embeddings = es2.capture("./tiny-model", "locks.csv")
    >>> embeddings.axes, embeddings.values.shape
    (('layer', 'prompt', 'd_model'), (3, 50, 32))
    >>> embeddings.at("last_instruction").layer(2).shape
    (50, 32)
    """
    from es2.capture.capture import capture as read
    from es2.workflow.prepare import common_rendering
    from es2.workflow.runs import check_run, tuned_weights

    of = run_of(run)
    name = model_of(model, of)
    (given,) = sorted_settings(settings, CaptureConfig)
    config = CaptureConfig(**given | {"model": name})
    chosen = prompts_of(prompts)
    if of is not None:
        check_run(of, name)
    rendering = common_rendering(chosen, config.rendering, of)
    chosen = chosen if all_splits else chosen.measured()
    if not len(chosen):
        raise InputError(f"{chosen.name!r} has no prompt in its probe or test split; add prompts, or set all_splits.")
    with shown(progress) as report:
        found = read(
            name,
            chosen,
            positions=config.positions,
            adapter=None if of is None else tuned_weights(of),
            run=None if of is None else of.id,
            rendering=rendering,
            device=config.device,
            dtype=config.dtype,
            report=report,
        )
    positions = found.activations.positions
    return Embeddings(found.activations, chosen, "last" if "last" in positions else positions[0])


@public
def analyze(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    run: RunLike | None = None,
    test_prompts: PromptsLike | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Separation:
    """How well and how far harmful and harmless prompts are separated at every layer, with intervals.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source; `probe` fits the probes, `test` gives the numbers.
        run: a fine-tuning run to compare with its base.
        test_prompts: prompts of another origin that give the numbers instead.
        progress: `es2.api.progress.Progress`.
        settings: of `es2 analyze` (docs/settings.md), `position` among them, and of the rendering; `device`, `dtype`.

    Returns:
        `to_frame()` has a row for each layer and model, margins and distances in scale-free units; `recommended` are
        the two layers for ES2, `plot("accuracy")` and `plot("margins")` the page *Layers*.

    Raises:
        InputError: for prompts of one label, or a split that lacks one; also as `capture`.
        MachineError: as `capture`.

    Source: docs/numbers.md.

    >>> import es2
    >>> found = es2.analyze("./tiny-model", "locks.csv", n_bootstrap=50)
    >>> found.to_frame()[["layer", "model"]].values.tolist()
    [[0, 'base'], [1, 'base'], [2, 'base']]
    >>> len(found.recommended), found.plot("margins").layout.yaxis.title.text
    (2, 'scale-free units')
    """
    of = run_of(run)
    analysis, rendering, place = sorted_settings(settings, AnalysisConfig, Rendering, Place)
    chosen = prompts_of(prompts)
    others = None if test_prompts is None else prompts_of(test_prompts)
    config = AnalysisConfig(**analysis)
    prepared = prepared_for(model, chosen, of, None, rendering, place, progress, config=config, test_prompts=others)
    return Separation(prepared.analysis, chosen.measured(), prepared.activations, prepared.tuned)


@public
def project(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    run: RunLike | None = None,
    view: str = "umap",
    position: str = "last",
    progress: Progress = None,
    **settings: Any,
) -> Projection:
    """Prompts as points in a plane, at every layer; of base and tuned in one frame where there is a run.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source.
        run: a fine-tuning run to compare with its base.
        view: `umap` (computed once, about a second a layer), `separation` (along the probe's direction) or `pca`.
        position: whose embeddings are shown.
        progress: `es2.api.progress.Progress`.
        settings: of the rendering, `device` and `dtype` (docs/settings.md).

    Returns:
        `plot(layer)` and `to_frame(layer)`: coordinates in scale-free units (of UMAP without a unit), and margins.

    Raises:
        InputError, MachineError: as `analyze`.

    >>> import es2
    >>> found = es2.project("./tiny-model", "locks.csv", view="pca")
    >>> found.to_frame(layer=2)[["x", "y", "margin"]].shape
    (50, 3)
    """
    from es2.workflow.derived import find_umap
    from es2.workflow.prepare import project as project_layers

    if view not in ("umap", *RENDERS):
        raise InputError(f"Unknown view {view[:40]!r}; one of umap, {', '.join(RENDERS)}.")
    of = run_of(run)
    rendering, place = sorted_settings(settings, Rendering, Place)
    chosen = prompts_of(prompts)
    config = AnalysisConfig(position=position)
    prepared = prepared_for(model, chosen, of, None, rendering, place, progress, config=config)
    measured, umap = chosen.measured(), None
    if view == "umap":
        with shown(progress) as report:
            project_layers(
                model_of(model, of), chosen, run=of, rendering=Rendering(**rendering), position=position,
                report=report, **dict(Place(**place)),
            )  # fmt: skip
        umap = find_umap(prepared.activations, measured, position, prepared.tuned)
    return Projection(measured, prepared.activations, prepared.tuned, prepared.analysis, view, position, umap)


@public
def check(
    model: ModelLike | None = None,
    prompts: PromptsLike = "builtin",
    *,
    adapter: ModelLike | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Checked:
    """Whether what is read of a model is what the plain transformers model computes.

    Args:
        model: as of `load_model`.
        prompts: a prompt set, or its source, of which four are read.
        adapter: a peft adapter to check on the model, too.
        progress: `es2.api.progress.Progress`.
        settings: of the rendering, `device` and `dtype` (docs/settings.md).

    Returns:
        `passed`, and `to_frame()` with a row for each check. What failed is refused by other functions.

    Raises:
        InputError, MachineError: as `load_model`.

    Source: docs/architectures.md.

    >>> import es2
    >>> found = es2.check("./tiny-model", "locks.csv")
    >>> found.passed, found.to_frame()["check"].tolist()[:2]
    (True, ['weights', 'template'])
    """
    from es2.models.adapter_files import adapter_folder
    from es2.workflow.check import check as make

    rendering, place = sorted_settings(settings, Rendering, Place)
    chosen = prompts_of(prompts)
    with shown(progress) as report:
        found = None if adapter is None else adapter_folder(path_of(adapter, "An adapter"), report)
        given = Rendering(**rendering)
        return Checked(
            make(model_of(model, None), chosen, adapter=found, rendering=given, report=report, **dict(Place(**place)))
        )
