"""Does the separation hold? Behaviour, ability and embedding-level attacks, base and tuned over the same prompts.

One function ties the parts together, and everything that took a model is kept: a reply goes into a log the moment its
batch is done, under a key of all that decides it (weights, adapter, tokens, settings, push), so an evaluation that was
killed goes on where it was, one with more prompts generates only what is new, and nothing is said twice. Numbers are
worked out anew from the log each time, so a resumed evaluation ends like one that was never interrupted. Who may be
looked at follows the splits: of the prompts that the run was tuned on only its `test` split counts. The app imports
this module to find and read results; torch is imported where a model runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from es2.attack import perturbation
from es2.errors import InputError
from es2.files import content_key, expanded, is_whole, machine_error, read_json, sealed, write_json
from es2.jobs import Job, Reporter, find_jobs, silent
from es2.judge import KEY_VARIABLE, Judge, check_endpoint, classifier_judge, endpoint_judge
from es2.models import DEFAULT_MODEL, choose_device, choose_dtype, fingerprint, model_folder, resolve
from es2.prompts import PromptSet, load_prompts
from es2.push import BUDGETS, pushes
from es2.reply_log import ReplyLog
from es2.robustness import DIRECTIONS, P0, logit
from es2.store import Store
from es2.suites import Work, behaviour, held_out
from es2.versions import format_of

KIND = "evaluate"
SUITES = ("refusal", "kl", "perturbation")
EVALUATION_FORMAT = 1

_LAST_SECOND = 2**37  # years from now, before what a calendar can say
_FOLDER, _LOG = "evaluation", "replies.jsonl"


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides an evaluation, but the judge's key.

    Attributes:
        model: a catalogue name, a Hub id, a folder or a `.gguf` file.
        prompts: the source of the prompt set, as `es2.prompts.load_prompts` understands it.
        run: id of the fine-tuning run to compare with its base; None for the base alone.
        suite: one of `SUITES`, or `all`.
        limit: at most so many prompts of each label are replied to.
        new_tokens: the longest reply. Late refusals come after 20 to 30 tokens.
        kl_tokens: tokens of the base's reply that KL, perplexity and agreement cover, as in a fine-tune.
        push_limit: at most so many harmful prompts are pushed; each is replied to once per push and model.
        layers: where embeddings are pushed; by default the run's target layers, else the recommended ones.
        directions: some of `es2.robustness.DIRECTIONS`.
        budgets: lengths of a push relative to the embedding's own.
        p0s: probabilities of harmful to be reached.
        seed: of the random directions and the resamples.
        device: a torch device; by default the best there is.
        dtype: the model's number format; by default what suits the device.
        judge_url: an OpenAI-compatible endpoint that is asked for a second opinion; None for none.
        judge_model: the model's name there.
        judge_key_variable: the environment variable that holds the key.
        judge_folder: a local text classifier to ask instead.
        judge_label: the classifier's class that means refusal.
    """

    model: str = DEFAULT_MODEL
    prompts: str = "builtin"
    run: str | None = None
    suite: str = "all"
    limit: int = 48
    new_tokens: int = 64
    kl_tokens: int = 32
    push_limit: int = 12
    layers: tuple[int, ...] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    budgets: tuple[float, ...] = BUDGETS
    p0s: tuple[float, ...] = P0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key_variable: str = KEY_VARIABLE
    judge_folder: str | None = None
    judge_label: str | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "directions", "budgets", "p0s"):  # JSON has lists only
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.suite not in (*SUITES, "all"):
            raise InputError(f"Unknown suite {self.suite[:40]!r}; one of {', '.join(SUITES)}, all.")
        for name in ("limit", "new_tokens", "kl_tokens", "push_limit"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")
        for budget in self.budgets:
            if not 0 < budget <= 10:
                raise InputError(f"A budget is a length relative to the embedding's, between 0 and 10, not {budget!r}.")
        for p0 in self.p0s:
            logit(p0)
        pushes(self.directions, self.budgets, self.p0s)
        if self.judge_url and self.judge_folder:
            raise InputError("Give one judge: an endpoint (--judge-url) or a classifier's folder (--judge-folder).")
        if self.judge_url and not self.judge_model:
            raise InputError("A judge behind an endpoint needs its model's name there (--judge-model).")
        if self.judge_url:  # here, before anything of it is written down
            check_endpoint(self.judge_url, self.judge_key_variable)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EvaluateConfig:
        """The config in a JSON object; entries of other names belong to somebody else and are left alone."""
        return cls(**{entry.name: document[entry.name] for entry in fields(cls) if entry.name in document})

    @property
    def suites(self) -> tuple[str, ...]:
        """Which parts are asked for."""
        return SUITES if self.suite == "all" else (self.suite,)


def evaluate(
    config: EvaluateConfig,
    prompts: PromptSet,
    folder: Path,
    *,
    run: Job | None = None,
    store: Store | None = None,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Run the suites and keep their result.

    Args:
        config: what to do.
        prompts: what `config.prompts` names.
        folder: where replies and the result are kept when there is no run; else they go into the run's folder.
        run: the run that `config.run` names.
        store: where activation sets lie.
        report: told about every token and batch; it may raise to stop.

    Returns:
        JSON values: `suite` (by name; a suite of `all` that these prompts do not allow has a `problem`), what was
        evaluated, `path` of the kept result, which also has the replies (`read_evaluation`).

    Raises:
        InputError, MachineError: for a model, a run, prompts or settings that cannot be used.
        Cancelled: when `report` raised it; what was replied is kept.
    """
    begun = time.perf_counter()
    spec = resolve(config.model)
    tuned_on, note, weights = None, None, None
    if run is not None:
        from es2.runs import tuned_weights
        from es2.tasks import check_run

        check_run(run, config.model)
        weights = tuned_weights(run)
        try:
            tuned_on = load_prompts(str(run.config.get("prompts", "builtin")))
        except InputError as error:
            note = f"The run's own prompts cannot be read, so none of them was left out here ({error})"
    judge = _make_judge(config)
    model_files = model_folder(spec, report)
    device = config.device or choose_device()
    place = (run.path if run is not None else folder) / _FOLDER
    work = Work(
        config=config,
        run=run,
        weights=weights,
        folder=model_files,
        identity=fingerprint(model_files, weights).to_dict(),
        device=device,
        dtype=config.dtype or choose_dtype(device),
        log=ReplyLog(place / _LOG),
        store=store or Store(),
        report=report,
    )
    suite: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]] = {
        "refusal": lambda: behaviour(work, held_out(prompts, tuned_on), judge, "refusal"),
        "kl": lambda: behaviour(work, held_out(prompts, tuned_on), None, "kl"),
        "perturbation": lambda: perturbation(work, held_out(prompts, tuned_on, probing=True)),
    }
    for name in config.suites:
        try:
            suite[name], rows[name] = parts[name]()
        except InputError as error:
            if config.suite != "all":
                raise
            suite[name] = {"problem": str(error)}
    if all("problem" in part for part in suite.values()):
        raise InputError(suite["refusal"]["problem"])
    path = _kept_at(place, config, prompts, work.identity)
    document = {
        "suite": suite,
        "model": spec.name,
        "run": config.run,
        "prompts": prompts.name,
        "note": note,
        "settings": config.to_dict(),
        "path": str(path),
        "seconds": time.perf_counter() - begun,
        "generated": work.generated
        | {"tokens_per_second": work.generated["tokens"] / max(work.generated["seconds"], 1e-9)},
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        kept = {"format": EVALUATION_FORMAT, "created": time.time()} | document | {"rows": rows}
        write_json(path, sealed(kept))
    except OSError as error:
        raise machine_error(error, place) from error
    return document


def _kept_at(place: Path, config: EvaluateConfig, prompts: PromptSet, identity: Mapping[str, Any]) -> Path:
    """Where a result is kept: under a key of everything that decides it."""
    key = content_key({"config": config.to_dict(), "prompts": prompts.digest, "identity": identity})
    return place / f"{key}.json"


def _make_judge(config: EvaluateConfig) -> Judge | None:
    if config.judge_url:
        return endpoint_judge(config.judge_url, config.judge_model or "", key_variable=config.judge_key_variable)
    if config.judge_folder:
        return classifier_judge(Path(expanded(config.judge_folder)), config.judge_label)
    return None


def find_evaluations(owner: Job) -> list[Path]:
    """The kept results of a run, or of an evaluation job without one, newest first."""
    folder = owner.path / _FOLDER
    found = [path for path in folder.glob("*.json") if not path.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def find_evaluation(config: EvaluateConfig, prompts: PromptSet, run: Job) -> dict[str, Any] | None:
    """The kept result of exactly this evaluation of a run, with its replies and where it lies; None if there is none.

    Raises:
        InputError, MachineError: when the model or the run cannot be used, or the result cannot be read.
    """
    from es2.runs import tuned_weights

    identity = fingerprint(model_folder(resolve(config.model)), tuned_weights(run)).to_dict()
    path = _kept_at(run.path / _FOLDER, config, prompts, identity)
    return read_evaluation(path) | {"path": str(path)} if path.is_file() else None


def read_evaluation(path: Path) -> dict[str, Any]:
    """A kept result with its replies: `suite`, `settings`, … and `rows` by suite.

    Raises:
        InputError: when the file holds none, a damaged one, or one of a newer format.
    """
    document = read_json(path)
    whole = document is not None and is_whole(document)
    known = document is not None and whole and format_of(document.get("format"), EVALUATION_FORMAT, str(path))
    if document is None or not known or not _is_evaluation(document):
        raise InputError(f"{str(path)!r} holds no evaluation, or a damaged one; run `es2 evaluate` again.")
    return document


def _is_evaluation(document: Mapping[str, Any]) -> bool:
    kinds = {"suite": dict, "rows": dict, "settings": dict, "prompts": str, "created": (int, float)}
    if not all(isinstance(document.get(name), kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
        return False
    parts, rows = document["suite"].values(), document["rows"].values()
    if not ("limit" in document["settings"] and 0 <= document["created"] < _LAST_SECOND):
        return False
    return all(isinstance(part, dict) for part in parts) and all(isinstance(row, list) for row in rows)


def unfinished_job(config: EvaluateConfig, root: Path | None = None) -> Job | None:
    """The newest evaluation of exactly this config that ended before its time, so that it can be gone on with."""
    newest = next(iter(find_jobs(KIND, config.to_dict(), root)), None)
    return newest if newest and newest.status() in ("cancelled", "interrupted", "failed") else None
