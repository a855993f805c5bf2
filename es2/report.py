"""A report: one HTML file that shows what a fine-tune did and needs nothing else, to be sent to a colleague.

Whoever opens it has neither the workbench nor, perhaps, a network, so the file holds everything: plotly.js once, the
figures as data, the numbers, what was done and with what. Nothing is loaded from anywhere, which a content security
policy in the file enforces. This module finds what a report is about and writes the file; the page itself is made in
`es2.report_page`.
"""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path

from es2 import showcase
from es2.errors import InputError
from es2.files import machine_error, output_path
from es2.jobs import Job
from es2.prompts import load_prompts
from es2.report_page import Compared, report_html
from es2.runs import open_run
from es2.store import SHOWCASE, Store
from es2.tasks import find_analysis

__all__ = ["Compared", "find_compared", "report_html", "write_report"]


def find_compared(run: str) -> Compared:
    """A run beside its base, or the showcase, from what lies on disk.

    Args:
        run: a run's id, or `showcase`.

    Raises:
        InputError: when there is no such run or showcase, or something that the report needs is missing.
    """
    if run != SHOWCASE:
        return _of_run(open_run(run))
    found = showcase.load()
    if found is None:
        raise InputError("There is no showcase in this checkout; `es2 showcase` makes it.")
    return Compared(**vars(found.comparison), title="Showcase", events=found.events)


def _of_run(run: Job) -> Compared:
    result = run.result()
    if result is None:
        raise InputError(
            f"Run {run.id} is {run.status()} and has no result to report; `es2 runs resume {run.id}` goes on."
        )
    position = "last"
    prompts = load_prompts(run.config["prompts"]).measured()
    base, tuned = (Store().get(result["activations"][name]) for name in ("base", "tuned"))
    if base is None or tuned is None:
        raise InputError(f"The embeddings of run {run.id} are not here any more; {_again(run)}")
    if base.texts_digest != prompts.texts_digest:
        raise InputError(f"The prompts {run.config['prompts']!r} have changed since run {run.id}; fine-tune again.")
    analysis = find_analysis(base, prompts, position, tuned)
    if analysis is None:
        raise InputError(f"The analysis of run {run.id} is not here any more; {_again(run)}")
    return Compared(
        prompts=prompts,
        base=base,
        tuned=tuned,
        analysis=analysis,
        position=position,
        names=("Base", "Tuned"),
        targets=tuple(result["target_layers"]),
        config=run.config,
        result=result,
        run=run.id,
        title=run.name or run.id,
        events=run.events()[0],
    )


def _again(run: Job) -> str:
    options = shlex.join(("--model", run.config["model"], "--prompts", run.config["prompts"], "--run", run.id))
    return f"`es2 analyze {options}` makes it again."


def write_report(compared: Compared, out: Path, *, force: bool = False) -> Path:
    """Write the report, whole or not at all.

    Args:
        compared: what it is about.
        out: the HTML file.
        force: whether a file that exists is replaced.

    Returns:
        The file's absolute path.

    Raises:
        InputError: when the file exists and is not to be replaced, or is a folder.
        MachineError: when the machine refuses; an old file stays as it was.
    """
    out = output_path(out)
    if out.is_dir():
        raise InputError(f"{str(out)!r} is a folder; give the name of an HTML file.")
    if out.exists() and not force:
        raise InputError(f"{str(out)!r} exists; give another name, or --force to replace it.")
    page = report_html(compared)
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise machine_error(error, out) from error
    finally:
        temporary.unlink(missing_ok=True)
    return out
