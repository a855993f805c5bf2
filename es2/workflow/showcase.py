"""The showcase: a small real before and after that a fresh clone opens on, without a model, a download or a job.

It is an ordinary run without weights, below a read-only root (`es2.core.files.shipped`). Its activation sets hold a
part of the prompts, chosen by hash, in half precision; the analysis and the UMAP are of all measured prompts. Its
evaluations on its own prompts come with the verdict on every reply, and without the replies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.projection import UmapCoordinates
from es2.analysis.results import Analysis
from es2.core.errors import InputError
from es2.core.files import (
    content_key,
    files_below,
    is_installed,
    new_folder,
    read_json,
    shipped,
    with_checksum,
    write_json,
)
from es2.core.progress import Reporter, silent
from es2.core.versions import installed_versions
from es2.evaluation.results import FOLDER as EVALUATION
from es2.evaluation.results import find_evaluations, is_of, read_evaluation, verdicts_only
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.jobs.running import result_of, run_job
from es2.models.catalogue import resolve
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet, stable_hash
from es2.report.page import Compared
from es2.store.activation_set import ActivationSet
from es2.store.embeddings import fits_half
from es2.store.store import FOLDER, Store
from es2.training.config import FinetuneConfig
from es2.workflow.compared import find_compared
from es2.workflow.derived import analysis_key, umap_key
from es2.workflow.job_kinds import JOBS
from es2.workflow.prepare import prepare, project
from es2.workflow.runs import SHOWCASE, config_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


MODEL = "qwen2.5-coder-0.5b-instruct"
"""A small model that refuses: what a fine-tune does to refusals cannot be shown on one that does not."""
NAME = "Showcase"
POSITION = "last"
LIMIT_BYTES = 19_500_000
"""Of everything in the folder; a repository keeps every version for ever."""

_MARGIN_BYTES = 2**16  # headers, digests and meta data of a few files
_FREE_SETTINGS = ("layers", "model", "device", "dtype", "replies")
"""Settings in which a run may differ and still be the default one; layers and model are checked by what they mean."""
_OF_THE_MACHINE = ("host", "pid")


def build(
    *,
    run: Job | None = None,
    model: str = MODEL,
    prompts: str = "builtin",
    settings: FinetuneConfig | None = None,
    limit: int = LIMIT_BYTES,
    report: Reporter = silent,
) -> Compared:
    """Make the showcase anew; the old one stays until the new one is whole. Returns what `find_compared` reads from it.

    Args:
        run: a finished run to take, of this model, these prompts and these settings; without it one is made.
        model: a catalogue name, a Hub id or a folder.
        prompts: the source of the prompts, as `load_prompts` takes it.
        settings: of the fine-tune, all but `layers` and `model`; the shipped ones if not given. The target layers are
            those that the analysis of the base recommends.
        limit: number of bytes that the folder may take.
        report: takes the progress.

    Raises:
        InputError: for a run that is another one or has no result, when not even one pair of each split fits, or when
            the showcase is part of an installed package.
        MachineError: when the machine refuses; either, with its sentence, when the fine-tune fails.
    """
    path = shipped()
    if is_installed(path):
        raise InputError(
            f"The showcase in {path} is part of the installed package; make it in a clone, or name another folder in "
            "ES2_SHOWCASE."
        )
    settings = settings or FinetuneConfig(layers=())
    prompt_set = load_prompts(prompts)
    if run is None:
        run = _tune(model, prompts, prompt_set, settings, report)
    else:
        _check_run(run, model, prompts, settings)
    result = run.result()
    if result is None:
        raise InputError(f"Run {run.id} is {run.status()} and has no result; finish it or leave --run away.")
    prepared = prepare(model, prompt_set, run=run, device=settings.device, dtype=settings.dtype, report=report)
    tuned = prepared.tuned
    assert tuned is not None  # there is a run
    if tuple(result["target_layers"]) != prepared.analysis.recommended:
        raise InputError(
            f"Run {run.id} has the target layers {result['target_layers']}, the default ones are "
            f"{list(prepared.analysis.recommended)}; leave --run away and `es2 showcase` makes the run."
        )
    holder, key = project(model, prompt_set, run=run, device=settings.device, dtype=settings.dtype, report=report)
    umap_folder = holder.derived(key)
    assert umap_folder is not None  # it was just made
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(path.parent, path.parent, path.name, replace=True) as new:
        umap = UmapCoordinates.load(umap_folder)
        models = (prepared.activations, tuned)
        config = run.config | settings.to_dict() | {"layers": result["target_layers"], "model": model}
        write(new, run, config, prompt_set.measured(), models, prepared.analysis, umap, limit)
    return find_compared(SHOWCASE)


def _tune(model: str, source: str, prompts: PromptSet, settings: FinetuneConfig, report: Reporter) -> Job:
    """The default fine-tune, in a job folder of its own like any other run."""
    base = prepare(model, prompts, device=settings.device, dtype=settings.dtype, report=report)
    config = settings.replace(model=model, layers=base.analysis.recommended)
    config.check(base.activations.n_layers, prompts)
    run = create_job("finetune", config.to_dict() | {"prompts": source})
    run.rename(NAME)
    code = run_job(run.path, JOBS, report)
    result_of(run, code, f"Run {run.id} was {run.status()}; `es2 runs resume {run.id}` goes on.")
    return run


def _check_run(run: Job, model: str, source: str, settings: FinetuneConfig) -> None:
    """Refuse a run that is not of this model, these prompts and these settings (`InputError`)."""

    def facts(config: FinetuneConfig, model: str, source: object) -> dict[str, object]:
        decisive = {name: value for name, value in config.to_dict().items() if name not in _FREE_SETTINGS}
        return {"model": resolve(model).location, "prompt set": source} | decisive

    own = config_of(run)
    usual = facts(settings, model, source)
    for name, value in facts(own, own.model, run.config.get("prompts")).items():
        if value != usual[name]:
            raise InputError(
                f"Run {run.id} cannot be the showcase: its {name} is {value!r}, the default is {usual[name]!r}; "
                "leave --run away and `es2 showcase` makes the run."
            )


def write(
    new: Path,
    run: Job,
    config: Mapping[str, Any],
    measured: PromptSet,
    models: tuple[ActivationSet, ActivationSet],
    analysis: Analysis,
    umap: UmapCoordinates,
    limit: int = LIMIT_BYTES,
) -> None:
    """Fill the empty folder `new` with all of a run that is shipped, in at most `limit` bytes.

    Args:
        new: the folder.
        run: the run, with a result.
        config: the settings for its `config.json`.
        measured: its measured prompts.
        models: their embeddings under base and tuned; `analysis` and `umap` are of both.

    Raises:
        InputError: when not even one pair of each split fits.
        OSError, MachineError: as the machine gives it.
    """
    itemsize = 2 if all(_fits_half(one) for one in models) else 4
    per_prompt = len(models) * models[0].n_layers * (models[0].d_model * itemsize + 2 * 4)
    texts = sum(len(text.encode()) for text in measured.texts)
    (new / "analysis").mkdir()
    analysis.save(new / "analysis")
    end = _write_run(new / "runs" / run.id, run, config)
    spent = sum(file.stat().st_size for file in files_below(new)) + 2 * texts + _MARGIN_BYTES
    shutil.rmtree(new / "analysis")
    chosen = choose_pairs(measured, (limit - spent) // per_prompt)

    part = measured.select(chosen)
    store = Store(new / FOLDER)
    base, tuned = (_write_part(store, one, part, chosen, "float16" if itemsize == 2 else "float32") for one in models)
    with tuned.write_derived(analysis_key(base, measured, analysis.config, tuned=tuned)) as folder:
        analysis.save(folder)
    with tuned.write_derived(umap_key(base, part, POSITION, tuned)) as folder:
        replace(umap, points=umap.points[:, :, chosen]).save(folder)
    shutil.rmtree(store.root / ".locks")
    end["result"]["activations"] = {"base": base.key, "tuned": tuned.key}
    write_json(new / "runs" / run.id / "result.json", with_checksum(end))


def _write_run(folder: Path, run: Job, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write a run's folder without weights and without names of the machine; returns the content of `result.json`."""
    end, events = read_json(run.path / "result.json"), run.events()[0]
    if end is None or end.get("result") is None:
        raise InputError(f"Run {run.id} was removed; leave --run away and `es2 showcase` makes one.")
    folder.mkdir(parents=True)
    own = {name: entry for name, entry in config.items() if name not in _OF_THE_MACHINE}
    write_json(folder / "config.json", with_checksum(own | {"versions": installed_versions()}))
    training = [event for event in events if event.get("stage") == "finetune" and "loss" in event]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in training))
    write_json(folder / "name.json", {"name": NAME})
    end |= {"result": {name: entry for name, entry in end["result"].items() if name != "path"}}
    write_json(folder / "result.json", with_checksum(end))
    shipped_suites: set[str] = set()
    for path in find_evaluations(run):  # the newest first, which may hold what an earlier one does
        document = read_evaluation(path)
        is_ours = is_of(document, run) and document["settings"]["prompts"] == run.config["prompts"]
        if is_ours and not shipped_suites.issuperset(document["suite"]):
            shipped_suites.update(document["suite"])
            kept = verdicts_only(document) | {"model": config["model"], "path": f"{EVALUATION}/{path.name}"}
            kept["settings"] = kept["settings"] | {"model": config["model"]}
            (folder / EVALUATION).mkdir(exist_ok=True)
            write_json(folder / EVALUATION / path.name, with_checksum(kept))
    return end


def choose_pairs(prompts: PromptSet, n_prompts: int) -> Bool[np.ndarray, "prompt"]:
    """Whole pairs of `test` and `probe`, at most `n_prompts` prompts, each split in proportion to its size.

    Within a split pairs come in the order of their stable hash, so a smaller part lies within a larger one.

    Raises:
        InputError: when there is no room for a pair of each split.
    """
    ranked = []
    for split in ("test", "probe"):
        of_split = sorted(set(np.array(prompts.pairs)[prompts.in_split(split)].tolist()), key=stable_hash)
        ranked += [((rank + 0.5) / len(of_split), split != "test", pair) for rank, pair in enumerate(of_split)]
    sizes = {pair: prompts.pairs.count(pair) for _, _, pair in ranked}
    chosen: set[str] = set()
    room = n_prompts
    for _, _, pair in sorted(ranked):
        if sizes[pair] <= room:
            chosen.add(pair)
            room -= sizes[pair]
    keep = np.isin(prompts.pairs, sorted(chosen))
    if not all((keep & prompts.in_split(split)).any() for split in ("test", "probe")):
        raise InputError(f"Only {max(0, n_prompts)} prompts fit into the showcase; allow it more bytes.")
    return keep


def _write_part(
    store: Store, activations: ActivationSet, part: PromptSet, chosen: Bool[np.ndarray, "prompt"], dtype: str
) -> ActivationSet:
    """Write the chosen prompts' embeddings."""
    array: Float[np.ndarray, "layer prompt d_model"] = np.stack(
        [activations.layer(layer, POSITION)[chosen].astype(dtype) for layer in range(activations.n_layers)]
    )
    kept = ("model", "aliases", "run", "templated", "decides", "versions")
    meta = {name: activations.meta[name] for name in kept if name in activations.meta}
    meta |= {"texts_digest": part.texts_digest, "part_of": activations.key}
    key = content_key({"kind": SHOWCASE, "part_of": activations.key, "texts": part.texts_digest, "dtype": dtype})
    return store.write(key, meta, part.texts, {POSITION: array})


def _fits_half(activations: ActivationSet) -> bool:
    layers = (activations.layer(layer, POSITION) for layer in range(activations.n_layers))
    return all(map(fits_half, layers))
