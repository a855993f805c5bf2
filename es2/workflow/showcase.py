"""The showcase: a small real before and after that a fresh clone opens on, without a model, a download or a job.

Someone who has just cloned the project should see a true comparison within seconds, so one is committed: the default
model, the built-in prompts, the shipped settings. Embeddings of all measured prompts would be too much for a
repository, so it holds those of a part, in half precision, while the analysis beside them is of all measured prompts,
as the UMAP was fitted on all of them. Its part is chosen by hash, not by looks. What it shows is a claim about the
defaults, so it says which prompts and settings it is of, and is refused when it is not of these prompts any more.

It lies in the checkout, in `cached_activations/showcase`, whatever `ES2_HOME` says: it comes with the program, not with
the work. `ES2_SHOWCASE` names another folder. Where the package is installed without a checkout, `es2 showcase` writes
it below `ES2_HOME`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.analysis.comparison import Comparison
from es2.analysis.projection import UmapCoordinates
from es2.analysis.results import Analysis
from es2.core.errors import InputError, MachineError
from es2.core.files import (
    bring_back,
    content_key,
    file_digest,
    files_below,
    home,
    is_whole,
    new_folder,
    read_json,
    sealed,
    unreadable,
    write_json,
)
from es2.core.progress import Reporter, silent
from es2.core.versions import format_of, installed_versions
from es2.jobs.job import Job
from es2.jobs.queue import lay_down
from es2.jobs.running import run_job
from es2.models.catalogue import DEFAULT_MODEL, resolve
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet, stable_hash
from es2.store.activation_set import ActivationSet
from es2.store.store import SHOWCASE, Store
from es2.training.config import FinetuneConfig
from es2.workflow.job_kinds import JOBS
from es2.workflow.prepare import prepare, project
from es2.workflow.runs import config_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from es2.training.config import FinetuneConfig


SHOWCASE_FORMAT = 1
POSITION = "last"
LIMIT_BYTES = 19_500_000
"""Of everything in the folder. The promise is 20 MB; a repository keeps every version for ever."""

DOCUMENT = "showcase.json"
"""The file that says what the others are; it is written last."""

_ANALYSIS, _UMAP = "analysis", "umap"
_HALF_BELOW = 3e4
_MARGIN_BYTES = 2**16  # headers, digests and meta data of a few files
_FREE_SETTINGS = ("layers", "model", "device", "dtype")
"""Settings in which a run may differ and still be the default one; layers and model are checked by what they mean."""


@dataclass(frozen=True)
class Showcase:
    """What `load` found.

    Attributes:
        prompts: the part of the measured prompts whose embeddings are kept, in their order.
        base: their embeddings under the base model.
        tuned: their embeddings under the tuned model.
        analysis: of base and tuned on all measured prompts.
        umap: where the part stands in maps that were fitted on all measured prompts of both models.
        config: the run's settings, and `prompts`, the source of the prompts.
        result: what the run came to.
        events: the progress events of its training.
        about: the rest of `showcase.json`: versions, when and how it was made, how many prompts are measured.
    """

    prompts: PromptSet
    base: ActivationSet
    tuned: ActivationSet
    analysis: Analysis
    umap: UmapCoordinates
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]

    @property
    def comparison(self) -> Comparison:
        """Its two models side by side."""
        return Comparison(
            prompts=self.prompts,
            base=self.base,
            tuned=self.tuned,
            analysis=self.analysis,
            position=POSITION,
            names=("Base", "Tuned"),
            targets=tuple(self.result["target_layers"]),
            config=self.config,
            result=self.result,
            run=SHOWCASE,
            umap=self.umap,
        )


def folder() -> Path:
    """Where the showcase lies: `$ES2_SHOWCASE`, or in the checkout, or else below `home()`."""
    if chosen := os.environ.get("ES2_SHOWCASE"):
        return Path(chosen).absolute()
    root = Path(__file__).resolve().parents[2]
    return (root if (root / "app" / "main.py").is_file() else home()) / "cached_activations" / SHOWCASE


def load(path: Path | None = None) -> Showcase | None:
    """The checked showcase; None if there is none.

    Args:
        path: its folder; `folder()` if not given.

    Raises:
        InputError: when it is damaged, of another format, or not of the prompts that its source holds now.
        MachineError: when it cannot be read.
    """
    path = path or folder()
    if not path.exists():
        bring_back(path, path.parent)
    if not (path / DOCUMENT).exists():
        return None
    document = read_json(path / DOCUMENT)
    if document is None:
        raise _damaged(path, f"{DOCUMENT} is no JSON object")
    if not is_whole(document):
        raise _damaged(path, f"{DOCUMENT} is not what was written")
    if format_of(document.get("format"), SHOWCASE_FORMAT, f"The showcase in {path}") is None:
        raise _damaged(path, f"{DOCUMENT} states no format version")
    try:
        return _read(path, document)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{DOCUMENT} lacks an entry, or has one that cannot be") from error


def _read(path: Path, document: Mapping[str, Any]) -> Showcase:
    """What `document`, of the folder `path`, describes; an exception of Python's own where it describes nothing."""
    _check_files(path, document["files"])

    measured = load_prompts(document["prompts"]).measured()
    if measured.digest != document["prompts_digest"]:
        raise InputError(
            f"The showcase in {path} is of other prompts than {document['prompts']!r} holds now; "
            "`es2 showcase` rebuilds it."
        )
    prompts = measured.select(np.isin(measured.pairs, document["pairs"]))
    store = Store(path)
    base, tuned = (store.open(document["keys"][name]) for name in ("base", "tuned"))
    return Showcase(
        prompts=prompts,
        base=base,
        tuned=tuned,
        analysis=Analysis.load(path / _ANALYSIS),
        umap=UmapCoordinates.load(path / _UMAP),
        config=document["config"],
        result=document["result"],
        events=document["events"],
        about={name: document[name] for name in ("model", "prompts_digest", "n_prompts", "created", "versions")},
    )


def _check_files(path: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        try:
            sound = file_digest(path / name) == digest
        except FileNotFoundError:
            raise _damaged(path, f"{name} is missing") from None
        except OSError as error:
            raise unreadable(error, path / name) from error
        if not sound:
            raise _damaged(path, f"{name} is not what was written")


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"The showcase in {path} is damaged ({problem}); `es2 showcase` rebuilds it.")


# ------------------------------------------------------------------------------------------------------------- making


def build(
    *,
    run: Job | None = None,
    model: str = DEFAULT_MODEL,
    prompts: str = "builtin",
    settings: FinetuneConfig | None = None,
    path: Path | None = None,
    limit: int = LIMIT_BYTES,
    report: Reporter = silent,
) -> Showcase:
    """Make the showcase anew and put it in the place of the old one, which stays until the new one is whole.

    Args:
        run: a finished run to take, of this model, these prompts and these settings; without it one is made.
        model: a catalogue name, a Hub id or a folder.
        prompts: the source of the prompts, as `load_prompts` takes it.
        settings: of the fine-tune, all but `layers` and `model`; the shipped ones if not given. The target layers are
            those that the analysis of the base recommends.
        path: the folder; `folder()` if not given.
        limit: bytes that the folder may take.
        report: told about progress.

    Returns:
        What `load` reads from the new folder.

    Raises:
        InputError: for a run that is another one or has no result, or when not even one pair of each split fits.
        MachineError: when the machine refuses, or the fine-tune fails.
    """
    settings = settings or FinetuneConfig(layers=())
    path = path or folder()
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
    training = [event for event in run.events()[0] if event.get("stage") == "finetune" and "loss" in event]
    measured = prompt_set.measured()
    document = {
        "format": SHOWCASE_FORMAT,
        "model": prepared.activations.model,
        "prompts": prompts,
        "prompts_digest": measured.digest,
        "config": {**settings.to_dict(), "layers": result["target_layers"], "model": model, "prompts": prompts},
        "result": {name: value for name, value in result.items() if name != "path"},
        "events": training,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(path.parent, path.parent, path.name, replace=True) as new:
        umap = UmapCoordinates.load(umap_folder)
        _write(new, document, measured, (prepared.activations, tuned), prepared.analysis, umap, limit)
    made = load(path)
    assert made is not None  # it was just written
    return made


def _tune(model: str, source: str, prompts: PromptSet, settings: FinetuneConfig, report: Reporter) -> Job:
    """The default fine-tune, in a job folder of its own like any other run."""
    base = prepare(model, prompts, device=settings.device, dtype=settings.dtype, report=report)
    config = settings.replace(model=model, layers=base.analysis.recommended)
    config.check(base.activations.n_layers, prompts)
    run = lay_down("finetune", config.to_dict() | {"prompts": source})
    run.rename("Showcase")
    run_job(run.path, JOBS, report)
    if run.result() is None:
        raise MachineError(run.error() or f"Run {run.id} was {run.status()}; `es2 runs resume {run.id}` goes on.")
    return run


def _check_run(run: Job, model: str, source: str, settings: FinetuneConfig) -> None:
    def refuse(what: str, own: object, usual: object) -> InputError:
        return InputError(
            f"Run {run.id} cannot be the showcase: its {what} is {own!r}, the default is {usual!r}; "
            "leave --run away and `es2 showcase` makes the run."
        )

    config = config_of(run)
    if resolve(config.model).location != resolve(model).location:
        raise refuse("model", config.model, model)
    if run.config.get("prompts") != source:
        raise refuse("prompt set", run.config.get("prompts"), source)
    usual = settings.to_dict()
    for name, own in config.to_dict().items():
        if name not in _FREE_SETTINGS and own != usual[name]:
            raise refuse(name, own, usual[name])


def _write(
    new: Path,
    document: dict[str, Any],
    measured: PromptSet,
    models: tuple[ActivationSet, ActivationSet],
    analysis: Analysis,
    umap: UmapCoordinates,
    limit: int,
) -> None:
    (new / _ANALYSIS).mkdir()
    analysis.save(new / _ANALYSIS)
    base = models[0]
    itemsize = 2 if all(_fits_half(one) for one in models) else 4
    per_prompt = len(models) * base.n_layers * (base.d_model * itemsize + 2 * 4)
    texts = sum(len(text.encode()) for text in measured.texts)
    whole = document | {"pairs": list(measured.pairs)}
    spent = _size(new) + 2 * texts + len(json.dumps(whole, indent=1).encode()) + _MARGIN_BYTES
    chosen = choose_pairs(measured, (limit - spent) // per_prompt)
    part = measured.select(chosen)

    store = Store(new)
    keys = {}
    for name, activations in zip(("base", "tuned"), models, strict=True):
        keys[name] = _write_part(store, activations, part, chosen, "float16" if itemsize == 2 else "float32")
    shutil.rmtree(new / ".locks")
    (new / _UMAP).mkdir()
    replace(umap, points=umap.points[:, :, chosen]).save(new / _UMAP)
    files = files_below(new)
    complete = document | {
        "n_prompts": {"measured": len(measured), "part": len(part)},
        "pairs": sorted(set(part.pairs)),
        "keys": keys,
        "files": {file.relative_to(new).as_posix(): file_digest(file) for file in files},
    }
    write_json(new / DOCUMENT, sealed(complete))


def choose_pairs(prompts: PromptSet, n_prompts: int) -> Bool[np.ndarray, "prompt"]:
    """Whole pairs of `test` and `probe`, at most `n_prompts` prompts, each split in proportion to its size.

    Within a split pairs come in the order of their stable hash, so a smaller part lies within a larger one and nobody
    has picked them.

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
) -> str:
    """Write the chosen prompts' embeddings; returns the key."""
    array: Float[np.ndarray, "layer prompt d_model"] = np.stack(
        [activations.layer(layer, POSITION)[chosen].astype(dtype) for layer in range(activations.n_layers)]
    )
    kept = ("model", "aliases", "run", "templated", "decides", "versions")
    meta = {name: activations.meta[name] for name in kept if name in activations.meta}
    meta |= {"texts_digest": part.texts_digest, "part_of": activations.key}
    key = content_key({"kind": SHOWCASE, "part_of": activations.key, "texts": part.texts_digest, "dtype": dtype})
    return store.write(key, meta, part.texts, {POSITION: array}).key


def _fits_half(activations: ActivationSet) -> bool:
    layers = (activations.layer(layer, POSITION) for layer in range(activations.n_layers))
    return all(float(np.abs(layer).max(initial=0)) < _HALF_BELOW for layer in layers)


def _size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in files_below(path))
