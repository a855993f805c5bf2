"""A job that keeps a model in memory and reads single prompts on request, so that the model is loaded once.

It takes requests from files in its folder and answers with files, without a port or a password, and ends by itself
after a while without a request.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.capture.residuals import capture_residuals
from es2.core.errors import Es2Error, InputError, one_line
from es2.core.files import parse_json, read_json, write_json, writing
from es2.core.progress import Reporter
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.jobs.job import Job
from es2.jobs.queue import launch, list_jobs, open_job
from es2.models.catalogue import resolve
from es2.models.chat_template import render
from es2.models.folders import model_folder
from es2.models.loading import load_bridge, load_tokenizer
from es2.prompts.rows import MAX_PROMPT_CHARACTERS
from es2.store.sources import POSITIONS, in_order
from es2.workflow.runs import tuned_weights

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformer_lens.model_bridge import TransformerBridge

    from es2.models.blocks import BlockHooks


KIND = "read"
IDLE_SECONDS = 300.0
"""Time after the last request at which the reader ends."""

_POLL_SECONDS = 0.05
_QUESTIONS, _ANSWERS = "questions", "answers"


@dataclass(frozen=True)
class PromptEmbeddings:
    """One prompt as the models see it.

    Attributes:
        text: the prompt.
        base: by position, its embedding after every block under the base model.
        tuned: the same under the run's tuned model; None without a run.
        n_tokens: number of tokens, the chat template's included.
    """

    text: str
    base: Mapping[str, Float[np.ndarray, "layer d_model"]]
    tuned: Mapping[str, Float[np.ndarray, "layer d_model"]] | None
    n_tokens: int


def open_reader(
    model: str, run: str | None = None, rendering: Rendering = AS_THE_TEMPLATE, position: str = "last"
) -> Job:
    """The reader of a model, and of a run of it, under a rendering: one that is up already, else a new one.

    It reads at `POSITIONS` and at `position`.

    Raises:
        MachineError: when it cannot be started.
    """
    config: dict[str, Any] = {"model": model, "run": run, "rendering": rendering.settled.to_dict()}
    config["positions"] = in_order((*POSITIONS, position))
    for job in list_jobs(kind=KIND):
        if config.items() <= job.config.items() and job.is_active() and not (job.path / "cancel").exists():
            return job
    return launch(KIND, config, heavy=False)


def ask(reader: Job, text: str) -> str:
    """The id under which the reader will answer a prompt, which this writes for it.

    Raises:
        InputError: for an empty or a very long prompt.
        MachineError: when the reader's folder cannot be written.
    """
    text = text.strip()
    if not text:
        raise InputError("The prompt is empty; type a request.")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(
            f"The prompt has {len(text):,} characters, at most {MAX_PROMPT_CHARACTERS:,} are read; shorten it."
        )
    id = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    with writing(reader.path):
        (reader.path / _QUESTIONS).mkdir(exist_ok=True)
        write_json(reader.path / _QUESTIONS / f"{id}.json", {"text": text})
    return id


def answer(reader: Job, id: str) -> PromptEmbeddings | None:
    """The answer to a question; None while it is on its way.

    Raises:
        InputError: when the prompt or the model could not be read, or the reader has ended, with the reason.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = reader.path / _ANSWERS / f"{id}.json"
    document = read_json(path)
    if document is None:
        if not reader.is_active() and not path.exists():
            raise InputError(reader.error() or "The model was let go of before it answered; ask again.")
        return None
    if document.get("error"):
        raise InputError(f"{one_line(document['error'])}.")
    try:
        arrays = load_file(path.with_suffix(".safetensors"))
        models: dict[str, dict[str, Any]] = {"base": {}}
        for key, array in arrays.items():
            name, _, position = key.partition(".")
            models.setdefault(name, {})[position] = array
        return PromptEmbeddings(str(document["text"]), models["base"], models.get("tuned"), int(document["n_tokens"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The answer in {str(path)!r} cannot be read ({one_line(error)}); ask again.") from error


def read_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    """The job: load the models and answer until `IDLE_SECONDS` pass without a request; returns how many it answered."""
    report("load", 0, 1)
    files = model_folder(resolve(config["model"]), report)
    tokenizer = load_tokenizer(files)
    rendering = Rendering.read(config.get("rendering") or {}, "The config.json of the reader")
    positions = config.get("positions") or POSITIONS
    bridges = {"base": load_bridge(files)}
    if config.get("run"):
        run = open_job(config["run"], folder.parent)
        bridges["tuned"] = load_bridge(files, adapter=tuned_weights(run))
    report("load", 1, 1)
    for name in (_QUESTIONS, _ANSWERS):
        (folder / name).mkdir(exist_ok=True)
    answered, last, reported = 0, time.monotonic(), 0.0
    while time.monotonic() - last < IDLE_SECONDS:
        for question in sorted((folder / _QUESTIONS).glob("*.json")):
            _answer(bridges, tokenizer, rendering, positions, question, folder / _ANSWERS)
            answered += 1
            last = time.monotonic()
        if time.monotonic() - reported >= 1:
            report("idle", 0, 0)  # raises when the reader was cancelled
            reported = time.monotonic()
        time.sleep(_POLL_SECONDS)
    return {"answered": answered}


def _answer(
    bridges: Mapping[str, TransformerBridge | BlockHooks],
    tokenizer: Any,
    rendering: Rendering,
    positions: Sequence[str],
    question: Path,
    answers: Path,
) -> None:
    """Answer one question and remove it; a prompt that cannot be read is answered with the error."""
    from safetensors.numpy import save_file

    document: dict[str, Any]
    try:
        text = str(parse_json(question.read_bytes())["text"])
        rendered = render(tokenizer, [text], rendering)
        arrays = {
            f"{name}.{position}": np.ascontiguousarray(values[:, 0])
            for name, bridge in bridges.items()
            for position, values in capture_residuals(bridge, rendered, positions).items()
        }
        save_file(arrays, answers / f"{question.stem}.safetensors")
        document = {"text": text, "n_tokens": rendered.n_tokens, "error": None}
    except (Es2Error, ValueError, KeyError, TypeError) as error:
        document = {"error": str(error)}
    write_json(answers / question.name, document)
    question.unlink(missing_ok=True)
