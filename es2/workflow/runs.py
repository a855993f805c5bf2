"""Fine-tuning runs as others use them: found by id, with their weights, exported.

A run is a job whose folder also holds what it trained. This module imports torch only to merge.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
from safetensors import SafetensorError

from es2.core.errors import Es2Error, InputError
from es2.core.files import (
    bring_back,
    content_key,
    expanded,
    file_digest,
    files_below,
    give_usual_mode,
    machine_error,
    numbered,
    output_path,
    quarantine,
    shipped,
    unreadable,
    write_text,
    writing,
)
from es2.core.progress import Reporter, silent
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.jobs.job import Job, read_job
from es2.jobs.queue import create_job, list_jobs, open_job
from es2.models.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_folder,
    check_adapter,
    find_adapter,
    is_hub_adapter,
)
from es2.models.adapter_fit import fit_adapter, write_renamed
from es2.models.architecture import empty_model
from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.models.loading import load_tokenizer, load_tuned
from es2.models.model_files import save_tokenizer
from es2.training.config import FinetuneConfig
from es2.workflow.model_card import model_card

KIND = "finetune"
SHOWCASE = "showcase"
"""The name of the shipped run in links and commands."""
ADAPTER, WEIGHTS = "adapter", "weights.safetensors"
AS_GIVEN = "adapter-as-given"
"""An imported adapter as it was, where it had to be renamed to fit its model."""


def list_runs(root: Path | None = None) -> list[Job]:
    """Every fine-tuning run, newest first."""
    return list_jobs(root, KIND)


def open_run(id: str, root: Path | None = None) -> Job:
    """The run of this id, or the shipped one where the id is `SHOWCASE`.

    Raises:
        InputError: when there is no such run.
    """
    if id == SHOWCASE:
        if (found := shipped_run()) is None:
            raise InputError("There is no showcase in this checkout; `es2 showcase` makes it.")
        return found
    job = open_job(id, root)
    if job.kind != KIND:
        raise InputError(f"Job {id} is no fine-tuning run but a {job.kind} job; `es2 runs` lists the runs.")
    return job


def shipped_run() -> Job | None:
    """The run that comes with the program; None if there is none. Raises `InputError` where it is damaged."""
    root = shipped()
    if not root.exists():
        bring_back(root, root.parent)
    runs = sorted((root / "runs").glob("*"))
    if not runs and (root / "showcase.json").exists():
        raise InputError(f"The showcase in {root} is of an earlier layout; `es2 showcase` makes it anew.")
    return read_job(runs[-1]) if runs else None


def run_title(run: Job) -> str:
    """What a run is called: the name it was given, else what it did."""
    layers = ", ".join(map(str, run.config.get("layers", ())))
    return run.name or f"{run.config.get('objective', 'ES2')} at {layers}"


def config_of(run: Job) -> FinetuneConfig:
    """The run's settings; raises `InputError` where they are damaged."""
    document = run.config
    if document.get("imported"):  # its objective and steps are not those of a fine-tune of ours
        document = {name: value for name, value in document.items() if name not in ("objective", "steps")}
    return FinetuneConfig.read(document, f"The config.json of run {run.id}")


def rendering_of(run: Job) -> Rendering:
    """How the run's model was given its prompts, when it was tuned or first compared."""
    known = ((run.result() or {}).get("rendering") or {}).get("settings")
    decided = config_of(run).rendering
    return decided if known is None else decided.over(Rendering.read(known, f"The result of run {run.id}"))


def tuned_weights(run: Job) -> Path:
    """What the run trained: the folder of its adapter, or the file of the blocks it changed.

    Raises:
        InputError: when it has left none (yet), is shipped, or has lost them: damaged ones are set aside, and the run
            then counts as failed, so that it can be resumed.
        MachineError: when they cannot be read.
    """
    run.check_own()
    found = next((run.path / name for name in (ADAPTER, WEIGHTS) if (run.path / name).exists()), None)
    result = run.result()
    if result is None:
        if found is None:
            raise InputError(
                f"Run {run.id} is {run.status()} and has left no weights; `es2 runs resume {run.id}` goes on."
            )
        return found
    stated = result.get("weights")
    if found is not None and stated in (None, weights_digest(found)):
        return found
    if found is not None:
        quarantine(found, found.stat().st_ino, "not what was written")
    again = f"`es2 runs resume {run.id}` makes them again"
    raise InputError(run.disown(f"The weights of run {run.id} are {'damaged' if found else 'gone'}; {again}."))


def weights_digest(weights: Path) -> str:
    """A digest of what `tuned_weights` gave. Raises `MachineError` when it cannot be read."""
    try:
        files = [weights] if weights.is_file() else files_below(weights)
        return content_key({path.name: file_digest(path) for path in files})
    except OSError as error:
        raise unreadable(error, weights) from error


def import_adapter(
    adapter: str | Path,
    model: str,
    prompts: str,
    layers: Sequence[int] = (),
    *,
    name: str = "",
    rendering: Rendering = AS_THE_TEMPLATE,
    device: str | None = None,
    dtype: str | None = None,
    replies: bool = True,
) -> Job:
    """Create a run whose adapter was made elsewhere; run as a job, it captures the tuned model and compares it.

    Args:
        adapter: the folder that peft wrote (`adapter_config.json` and `adapter_model.safetensors`, which are copied),
            one that holds it, or its Hub id (fetched by the job).
        model: the model it is for.
        prompts: the source of the prompts to compare on.
        layers: its target layers, if it had any; else those that the base's analysis recommends.
        name: of the run.
        rendering: how both models are given the prompts.
        device: where the model runs.
        dtype: the model's number format.
        replies: whether base and tuned reply to `test` prompts at the end.

    Raises:
        InputError: when the folder holds no such adapter. Whether it fits the model is found when the job begins. For a
            name that cannot be one, as `Job.rename`.
        MachineError: when the disk refuses; nothing is left behind.
    """
    given = str(adapter)
    found = None if is_hub_adapter(given) else find_adapter(given)
    if found is not None:
        check_adapter(found)
        given = str(Path(expanded(given)).absolute())
    settings = FinetuneConfig(
        layers=tuple(layers), model=model, device=device, dtype=dtype, replies=replies, **dict(rendering.rendering)
    )
    imported = {"prompts": prompts, "imported": str(found or given), "steps": 0, "objective": "imported"}
    if found is not None and str(found) != given:
        imported["imported_from"] = given
    run = create_job(KIND, settings.to_dict() | imported)
    try:
        if name:
            run.rename(name)
        if found is not None:
            _copy_adapter(found, run.path / ADAPTER)
    except OSError as error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise machine_error(error, run.path) from error
    except Es2Error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def settle_adapter(run: Job, report: Reporter = silent) -> list[str]:
    """Fetch an imported run's adapter if it is not there yet, and rename it where it has to be to fit its model.

    Returns:
        Sentences on what was done, and on an adapter that fits and may still be another model's, or a part of one.

    Raises:
        InputError: when it does not fit the model, or cannot be merged into it.
        MachineError: when network or disk refuse.
    """
    adapter, given, temporary = run.path / ADAPTER, run.path / AS_GIVEN, run.path / f".tmp-{ADAPTER}"
    config = run.config
    spec = resolve(config["model"])
    model = model_folder(spec, report)
    with writing(run.path):
        shutil.rmtree(temporary, ignore_errors=True)
        if not adapter.exists() and not given.exists():
            _copy_adapter(adapter_folder(config["imported"], report), temporary)
            temporary.rename(adapter)
        source = given if given.exists() else adapter
        fit = fit_adapter(source, partial(empty_model, model), config["imported"])
        if fit.renamed:
            write_renamed(source, fit, temporary)
            if source == adapter:
                adapter.rename(given)
            shutil.rmtree(adapter, ignore_errors=True)
            temporary.rename(adapter)
    where = config.get("imported_from")
    inside = [f"The adapter was found in {config['imported']!r}, the only one in {where!r}."] if where else []
    return inside + fit.doubts(spec.name, spec.location)


def _copy_adapter(source: Path, folder: Path) -> None:
    """Copy an adapter's two files and nothing else: a folder from elsewhere may hold links to what is not its own."""
    folder.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(source / name, folder / name)


def export(run: Job, out: Path, *, merged: bool = False, report: Reporter = silent) -> Path:
    """Write a run's adapter as peft writes it, or plain transformers weights with the fine-tune merged in; its card.

    Args:
        run: with weights.
        out: a folder that does not exist yet, or is empty.
        merged: whether to merge; needs the base model on this machine. Full fine-tunes can only be merged.
        report: takes the progress.

    Returns:
        The folder, whole or not there at all.

    Raises:
        InputError: when `out` is in use, or the run has no adapter to export.
        MachineError: when the disk or the memory refuse.
    """
    weights = tuned_weights(run)
    if not merged and weights.name == WEIGHTS:
        raise InputError(f"Run {run.id} trained whole blocks and has no adapter; export it with --merged.")
    out = output_path(out)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{str(out)!r} exists and is not an empty folder; give another one.")
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        if merged:
            _write_merged(run, weights, temporary, report)
        else:
            check_adapter(weights)
            _copy_adapter(weights, temporary)
        write_text(temporary / "README.md", model_card(run, config_of(run), merged=merged), errors="replace")
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise machine_error(numbered(error, out.parent), out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _sweep(out: Path) -> None:
    """Remove what exports to the same place left behind that were killed: their names end in a pid that is gone."""
    for stale in out.parent.glob(f".tmp-{glob.escape(out.name)}-*"):
        pid = stale.name.rpartition("-")[2]
        if re.fullmatch(r"[0-9]{1,9}", pid) and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)


def _write_merged(run: Job, weights: Path, folder: Path, report: Reporter) -> None:
    base = model_folder(resolve(config_of(run).model), report)
    report("merge", 0, 2)
    model = load_tuned(base, weights, device="cpu")
    report("merge", 1, 2)
    model.save_pretrained(folder)
    give_usual_mode(*folder.glob("*.safetensors"))
    save_tokenizer(load_tokenizer(base), folder)
    report("merge", 2, 2)


def check_run(run: Job, model: str) -> None:
    """Refuse a run of another model, or one without weights (`InputError`)."""
    tuned_weights(run)
    of = config_of(run).model
    if resolve(of).location != resolve(model).location:
        raise InputError(f"Run {run.id} tuned the model {of!r}, not {model!r}; give --model {of}.")
