"""Does the separation hold? Behaviour, ability and embedding-level attacks, base and tuned over the same prompts.

Replies go into a log when their batch is done, under a key of all that decides them, and numbers are computed from the
log: a killed evaluation goes on where it was, and the base replies once for all its runs. Of the prompts that the run
was tuned on only `test` counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from es2.analysis.results import Analysis, AnalysisConfig
from es2.core.errors import InputError
from es2.core.files import content_key, expanded, with_checksum, write_json, writing
from es2.core.former import former_names
from es2.core.progress import Reporter, silent
from es2.core.rendering import UNMENTIONED
from es2.evaluation.attack import perturbation
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.direction import causal_check
from es2.evaluation.judge import Judge, classifier_judge, endpoint_judge
from es2.evaluation.multiple_choice import ability
from es2.evaluation.reply_log import ReplyLog, base_log
from es2.evaluation.results import EVALUATION_FORMAT, FOLDER, KIND, LOG, read_evaluation
from es2.evaluation.soft_attack import soft_prompts
from es2.evaluation.suites import Work, behaviour, held_out
from es2.jobs.job import Job
from es2.jobs.queue import list_jobs
from es2.models.catalogue import resolve
from es2.models.chat_template import describe_rendering, reply_thinking
from es2.models.checked import refuse_failed
from es2.models.device import choose_device, choose_dtype
from es2.models.fingerprint import fingerprint
from es2.models.folders import model_folder
from es2.models.loading import load_tokenizer
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.prompts.questions import QuestionSet, load_questions
from es2.store.sources import CHAT_TEMPLATE, PLAIN_TEXT, LayerSource
from es2.store.store import Store
from es2.workflow.prepare import prepare
from es2.workflow.runs import check_run, config_of, rendering_of, tuned_weights, weights_digest

_LATER = ("soft_lengths", "soft_budgets")
"""Settings that earlier results do not have."""


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
        config: the settings.
        prompts: what `config.prompts` names.
        folder: where the result and its replies are kept when there is no run; else it and the tuned model's replies
            go into the run's folder. Replies of the base are kept once in the home folder, too.
        run: the run that `config.run` names.
        store: where activation sets lie.
        report: called at every token and batch; it may raise to stop.

    Returns:
        JSON values: `suite` (by name; a suite of `all` that these prompts do not allow has a `problem`), what was
        evaluated, `path` of the kept result, which also has the replies (`read_evaluation`).

    Raises:
        InputError, MachineError: for a model, a run, prompts or settings that cannot be used.
        Cancelled: when `report` raised it; what was replied is kept.
    """
    begun = time.perf_counter()
    spec = resolve(config.model)
    tuned_on, note, weights, digest = None, None, None, None
    if run is not None:
        check_run(run, config.model)
        weights = tuned_weights(run)
        ended = run.result()
        digest = weights_digest(weights) if ended is None else ended.get("weights")
        try:
            tuned_on = load_prompts(str(run.config.get("prompts", "builtin")))
        except InputError as error:
            note = f"The run's own prompts cannot be read, so none of them was left out here ({error})"
    config = _decided(config, prompts, run)
    questions = _questions(config)
    judge = _make_judge(config)
    model_files = model_folder(spec, report)
    refuse_failed(model_files, weights, "evaluate")
    identity = fingerprint(model_files, weights).to_dict()
    given_as = CHAT_TEMPLATE if identity["chat_template"] is not None else PLAIN_TEXT
    place = (run.path if run is not None else folder) / FOLDER
    path = _kept_at(place, config, prompts, identity, questions)
    # Else other prompts were left out, or the run ended meanwhile.
    kept = _kept(path, config.suites)
    if kept is not None and "rendering" not in kept and reply_thinking(load_tokenizer(model_files), config):
        kept = None  # judged with the thinking
    if kept is not None and kept.get("note") == note and kept.get("weights", digest) == digest:
        return kept | {"given_as": given_as, "path": str(path), "seconds": time.perf_counter() - begun}
    device = config.device or choose_device()
    work = Work(
        config=config,
        run=run,
        weights=weights,
        folder=model_files,
        identity=identity,
        device=device,
        dtype=config.dtype or choose_dtype(device),
        log=ReplyLog(place / LOG, base_log(model_files, identity)),
        store=store or Store(),
        report=report,
        rendering=config.rendering,
    )
    rendering = describe_rendering(load_tokenizer(model_files), config)
    suite: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    known = cache(lambda: _known_embeddings(work, held_out(prompts, tuned_on, probing=True)))
    parts: dict[str, Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]] = {
        "refusal": lambda: behaviour(work, held_out(prompts, tuned_on), judge, "refusal"),
        "kl": lambda: behaviour(work, held_out(prompts, tuned_on), None, "kl"),
        "perturbation": lambda: perturbation(work, *known()),
        "soft_prompt": lambda: soft_prompts(work, *known()),
        "direction": lambda: causal_check(work, *known()),
    }
    if questions is not None:
        parts["ability"] = partial(ability, work, questions)
    for name in config.suites:
        if name == "ability" and suite and all("problem" in part for part in suite.values()):
            break  # of these prompts nothing can be measured
        try:
            suite[name], rows[name] = parts[name]()
        except InputError as error:
            suite[name] = {"problem": str(error)}
    if all("problem" in part for part in suite.values()):
        raise InputError(next(iter(suite.values()))["problem"])
    document = {
        "suite": suite,
        "model": spec.name,
        "run": config.run,
        "prompts": prompts.name,
        "given_as": given_as,
        "rendering": rendering,
        "thinks": work.thinking is not None,
        "note": note,
        "weights": digest,
        "settings": config.to_dict(),
        "path": str(path),
        "seconds": time.perf_counter() - begun,
        "generated": work.generated
        | {"tokens_per_second": work.generated["tokens"] / max(work.generated["seconds"], 1e-9)},
    }
    if run is None:
        work.log.keep_asked()
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        kept = {"format": EVALUATION_FORMAT, "created": time.time()} | document | {"rows": rows}
        write_json(path, with_checksum(kept))
    return document


def _kept(path: Path, suites: Sequence[str]) -> dict[str, Any] | None:
    """What `evaluate` returned when it made this file; None where it is absent or damaged, or a part had a problem, or
    is one that evaluations did not have then.
    """
    try:
        found = read_evaluation(path) if path.is_file() else None
    except InputError:
        return None
    if found is None or not set(suites) <= found["suite"].keys():
        return None
    if any("problem" in part for part in found["suite"].values()):
        return None
    if (found["suite"].get("refusal", {}).get("judge") or {}).get("problem") is not None:
        return None
    left_out = ("format", "created", "rows", "digest")
    nothing = {"tokens": 0, "seconds": 0.0, "replies": 0, "tokens_per_second": 0.0}
    return {name: entry for name, entry in found.items() if name not in left_out} | {"generated": nothing}


def _known_embeddings(
    work: Work, prompts: PromptSet
) -> tuple[PromptSet, dict[str, LayerSource], Analysis, tuple[int, ...]]:
    """What attackers know, as `perturbation` takes it; captured and analysed where it is not yet."""
    config = work.config
    prepared = prepare(
        config.model,
        prompts,
        run=work.run,
        rendering=config,
        config=AnalysisConfig(position="last"),
        device=config.device,
        dtype=config.dtype,
        store=work.store,
        report=work.report,
    )
    sources: dict[str, LayerSource] = {"base": prepared.activations}
    sources |= {"tuned": prepared.tuned} if prepared.tuned else {}
    return prompts, sources, prepared.analysis, config_of(work.run).targets if work.run is not None else ()


def _decided(config: EvaluateConfig, prompts: PromptSet, run: Job | None) -> EvaluateConfig:
    """The settings with what they leave open of the rendering: as the run was tuned, else as the prompts say."""
    found = prompts.rendered_as(config, *([rendering_of(run)] if run is not None else ()))
    return config.replace(**dict(found))


def _questions(config: EvaluateConfig) -> QuestionSet | None:
    """The questions that are asked for; None where a suite without any is."""
    return load_questions(config.questions) if "ability" in config.suites else None


def _kept_at(
    place: Path,
    config: EvaluateConfig,
    prompts: PromptSet,
    identity: Mapping[str, Any],
    questions: QuestionSet | None,
) -> Path:
    """Where a result is kept: under a key of everything that decides it.

    Settings that came later count where they differ from their defaults alone, and those of questions where questions
    are asked, so that earlier results are found.
    """
    defaults, settings = EvaluateConfig().to_dict(), config.replace(**dict(config.settled)).to_dict()
    asked = {name: settings.pop(name) for name in ("questions", "question_limit", "answer_by")}
    decided = {name: value for name, value in settings.items() if name not in _LATER or value != defaults[name]}
    parts = {"config": former_names(decided), "prompts": prompts.digest, "identity": identity}
    if questions is not None:
        parts["questions"] = asked | {"questions": questions.digest}
    return place / f"{content_key(parts)}.json"


def _make_judge(config: EvaluateConfig) -> Judge | None:
    if config.judge_url:
        return endpoint_judge(config.judge_url, config.judge_model or "", key_variable=config.judge_key_variable)
    if config.judge_folder:
        return classifier_judge(Path(expanded(config.judge_folder)), config.judge_label)
    return None


def find_evaluation(config: EvaluateConfig, prompts: PromptSet, run: Job) -> dict[str, Any] | None:
    """The kept result of exactly this evaluation of a run, with its replies and where it lies; None if there is none.

    Raises:
        InputError, MachineError: when the model or the run cannot be used, or the result cannot be read.
    """
    identity = fingerprint(model_folder(resolve(config.model)), tuned_weights(run)).to_dict()
    path = _kept_at(run.path / FOLDER, _decided(config, prompts, run), prompts, identity, _questions(config))
    return read_evaluation(path) | {"path": str(path)} if path.is_file() else None


def unfinished_job(config: EvaluateConfig, root: Path | None = None) -> Job | None:
    """The newest evaluation of exactly this config that ended before its time, so that it can be gone on with."""
    usual = EvaluateConfig()
    unnamed = {"thinking_tokens": usual.thinking_tokens, "controls": usual.controls, **UNMENTIONED}
    defaults = usual.to_dict() | unnamed  # of settings that an earlier job does not name
    wanted = unnamed | config.to_dict()
    same = (job for job in list_jobs(root, KIND) if {**defaults, **job.config}.items() >= wanted.items())
    newest = next(same, None)
    return newest if newest and newest.status() in ("cancelled", "interrupted", "failed") else None
