"""Kept results of evaluations: where they lie, and reading them back with their checks."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from es2.analysis.verdict import Behaviour, behaviour_verdict
from es2.core.errors import Es2Error, InputError
from es2.core.files import read_json, verify_checksum
from es2.core.former import todays_names
from es2.core.versions import format_of
from es2.jobs.job import Job
from es2.models.catalogue import DEFAULT_MODEL

logger = logging.getLogger(__name__)

KIND = "evaluate"  # of its jobs
EVALUATION_FORMAT = 1
SHOWN_CHARACTERS = 200  # kept of a reply to a steered request

_LAST_SECOND = 2**37  # years from now, before what a calendar can say
FOLDER, LOG = "evaluation", "replies.jsonl"


def find_evaluations(owner: Job) -> list[Path]:
    """The kept results of a run, or of an evaluation job without one, newest first."""
    folder = owner.path / FOLDER
    found = [path for path in folder.glob("*.json") if not path.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def read_evaluation(path: Path) -> dict[str, Any]:
    """A kept result with its replies: `suite`, `settings`, … and `rows` by suite.

    Raises:
        InputError: when the file holds none, a damaged one, or one of a newer format.
    """
    document = read_json(path)
    whole = document is not None and verify_checksum(document)
    known = document is not None and whole and format_of(document.get("format"), EVALUATION_FORMAT, str(path))
    if document is None or not known or not _is_evaluation(document):
        raise InputError(f"{str(path)!r} holds no evaluation, or a damaged one; run `es2 evaluate` again.")
    found: dict[str, Any] = todays_names(document)
    return found


def _is_evaluation(document: Mapping[str, Any]) -> bool:
    kinds = {"suite": dict, "rows": dict, "settings": dict, "prompts": str, "created": (int, float)}
    if not all(isinstance(document.get(name), kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
        return False
    parts, rows = document["suite"].values(), document["rows"].values()
    if not ("limit" in document["settings"] and 0 <= document["created"] < _LAST_SECOND):
        return False
    return all(isinstance(part, dict) for part in parts) and all(isinstance(row, list) for row in rows)


def run_behaviour(run: Job, weights: str | None = None) -> Behaviour:
    """What the newest evaluation of a run that counts (`behaviour_of`) says of its behaviour.

    It is read anew wherever a run is shown, since evaluations come after the result. `weights` is the digest of the
    run's weights where its result is still to come.
    """
    for path in find_evaluations(run):
        try:
            found = behaviour_of(read_evaluation(path), run, weights)
        except (Es2Error, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s does not count for the behaviour of run %s: %s", path, run.id, error)
            continue
        if found is not None:
            return found
    missing = "No evaluation says what this run replies to harmful requests that it never saw"
    if run.is_shipped:
        return Behaviour(None, f"{missing}.")
    model = str(run.config.get("model"))
    model = "MODEL" if Path(model).is_absolute() else model  # a place on this machine, and results travel
    options = ["--run", run.id, "--suite", "refusal"] + (["--model", model] if model != DEFAULT_MODEL else [])
    return Behaviour(None, f"{missing}; the Behaviour page or `es2 evaluate {shlex.join(options)}` makes one.")


def newest_attack(run: Job) -> dict[str, Any] | None:
    """The newest evaluation of the weights that a run has now that attacked both models; None without one."""

    def attacked(document: Mapping[str, Any]) -> bool:
        parts = [document["suite"].get(name, {}) for name in ("perturbation", "soft_prompt")]
        return any(all(point.get("tuned") for point in part.get("curve") or [{}]) for part in parts)

    return _newest(run, attacked, "attacks")


def newest_directions(run: Job) -> dict[str, Any] | None:
    """The newest one, as `newest_attack`, that removed and added directions of both models."""

    def checked(document: Mapping[str, Any]) -> bool:
        return all(record.get("tuned") for record in document["suite"].get("direction", {}).get("layers") or [{}])

    return _newest(run, checked, "directions")


def _newest(run: Job, holds: Callable[[Mapping[str, Any]], bool], what: str) -> dict[str, Any] | None:
    for path in find_evaluations(run):
        try:
            document = read_evaluation(path)
        except Es2Error as error:
            logger.warning("%s says nothing of %s on run %s: %s", path, what, run.id, error)
            continue
        if holds(document) and is_of(document, run):
            return document
    return None


def behaviour_of(document: Mapping[str, Any], run: Job, weights: str | None = None) -> Behaviour | None:
    """What an evaluation says of the behaviour of a run, or None where it does not count.

    It counts when both models replied to harmful requests, it is of this run and the weights that the run has now, and
    the prompts that decided the run could be left out. `weights` is as for `run_behaviour`.
    """
    refusal = document["suite"].get("refusal")
    if not is_of(document, run, weights) or document.get("note") is not None:
        return None
    if not refusal or "problem" in refusal or not (refusal["change"] and refusal["change"]["dsr"]):
        return None
    return behaviour_verdict(refusal, document["prompts"])


def run_ability(run: Job) -> Mapping[str, Any] | None:
    """The multiple-choice numbers, base → tuned, of the newest evaluation of a run that has them; else None."""
    for path in find_evaluations(run):
        try:
            document = read_evaluation(path)
            part: Mapping[str, Any] = document["suite"].get("ability") or {}
            if is_of(document, run) and part.get("change"):
                return part
        except (Es2Error, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s does not count for the ability of run %s: %s", path, run.id, error)
    return None


def verdicts_only(document: Mapping[str, Any]) -> dict[str, Any]:
    """A kept result, of whichever suite, with the verdict on each reply and without its words."""

    def bare(entry: Any) -> Any:
        if not isinstance(entry, Mapping) or "verdict" not in entry:
            return entry
        return {name: value for name, value in entry.items() if name not in ("text", "thinking")}

    rows = {
        suite: [{name: bare(entry) for name, entry in row.items()} for row in of_suite]
        for suite, of_suite in document["rows"].items()
    }
    return {**document, "rows": rows}


def is_of(document: Mapping[str, Any], run: Job, weights: str | None = None) -> bool:
    """Whether an evaluation is of a run and the weights that it has now, not of a fine-tune made again since.

    Of a run without a result its weights are unknown, if they are not given (`run_behaviour`).
    """
    if document.get("run") != run.id:
        return False
    if (result := run.result()) is not None:
        weights = result.get("weights")
    elif weights is None:
        return True
    return bool(document.get("weights", weights) == weights)
