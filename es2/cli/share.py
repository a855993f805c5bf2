"""The commands that make something for others to look at: `showcase` and `report`; `es2.cli.main` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from es2.cli.terminal import AsJson, emit, out, progress
from es2.core.files import files_below


def showcase(
    run: Annotated[
        str | None,
        typer.Option(help="A finished run of qwen2.5-coder-0.5b-instruct with the default settings and prompts."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Make the before and after that a fresh clone shows; without --run, with a default fine-tune of its own."""
    from es2.core.files import shipped
    from es2.workflow.runs import open_run
    from es2.workflow.showcase import build

    with progress() as report:
        made = build(run=open_run(run) if run else None, report=report)
    n_measured = sum(sum(of_split.values()) for of_split in made.analysis.n_prompts.values())
    document = {
        "path": str(shipped()),
        "run": made.run,
        "verdict": made.result["verdict"],
        **made.behaviours[-1].to_dict(made.result["verdict"]),
        "n_prompts": {"measured": n_measured, "part": len(made.prompts)},
        "bytes": sum(file.stat().st_size for file in files_below(shipped())),
    }

    def show() -> None:
        counts = document["n_prompts"]
        out.print(
            f"Showcase of run {document['run']} ({document['outcome']}), embeddings of {counts['part']} of "
            f"{counts['measured']} measured prompts, {document['bytes'] / 1e6:.1f} MB: {document['path']}",
            soft_wrap=True,
        )

    emit(document, json_, show)


def report(
    run: Annotated[str, typer.Option(help="Which run (`es2 runs`), or showcase.")],
    out_file: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_: AsJson = False,
) -> None:
    """One HTML file that shows what a run did: figures, numbers, settings, versions; it needs no network."""
    from es2.report.report import write_report
    from es2.workflow.compared import find_compared

    path = write_report(find_compared(run), out_file, force=force)
    document = {"run": run, "path": str(path), "bytes": path.stat().st_size}
    emit(document, json_, lambda: out.print(f"Report of run {run}: {path}", soft_wrap=True))
