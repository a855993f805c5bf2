"""The options about prompts, the same on every command that takes any: one source or two files, and their columns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from es2.cli.terminal import errors
from es2.core.errors import InputError

if TYPE_CHECKING:
    from es2.prompts.prompt_set import PromptSet

_OPTIONS: dict[str, Any] = {
    "harmful": Annotated[
        str | None, typer.Option(help="FILE[:COLUMN] of harmful prompts alone, in place of --prompts; with --harmless.")
    ],
    "harmless": Annotated[str | None, typer.Option(help="FILE[:COLUMN] of harmless prompts alone; with --harmful.")],
    "prompt_column": Annotated[str | None, typer.Option(help="The column of the prompts, where it is not found.")],
    "label_column": Annotated[str | None, typer.Option(help="The column of the labels, where it is not found.")],
    "harmful_values": Annotated[
        str | None,
        typer.Option(help="The harmful values of the label's column, such as S1,S2; all others are harmless."),
    ],
    "skip_bad_rows": Annotated[bool, typer.Option("--skip-bad-rows", help="Leave wrong rows out, and count them.")],
}


def with_prompts(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `prompts` the options about them; it receives one source string or a list."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    usual = signature.parameters["prompts"].default

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in _OPTIONS}
        prompts = given["prompts"]
        if usual is None:  # a list of sources, or none at all
            sources = prompts or [None] * any(chosen.values())
            given["prompts"] = [_source(source, **chosen) for source in sources] or None
        else:
            given["prompts"] = _source(prompts, **chosen) if prompts or any(chosen.values()) else usual
        command(**given)

    parameters = []
    for parameter in signature.parameters.values():
        annotation, default = hints[parameter.name], parameter.default
        if parameter.name == "prompts" and usual is not None:
            annotation, default = Annotated[str | None, *annotation.__metadata__], None
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(parameter.replace(annotation=annotation, default=default, kind=keyword))
        if parameter.name == "prompts":
            for name, option in _OPTIONS.items():
                value = False if name == "skip_bad_rows" else None
                parameters.append(inspect.Parameter(name, keyword, default=value, annotation=option))
    del run.__wrapped__  # Typer is to see the options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return run


def _source(
    prompts: str | None,
    harmful: str | None,
    harmless: str | None,
    prompt_column: str | None,
    label_column: str | None,
    harmful_values: str | None,
    skip_bad_rows: bool,
) -> str:
    """The source string of what was given on the command line. Raises `InputError` for what does not go together."""
    from es2.prompts.loading import two_files
    from es2.prompts.sources import read_source, write_source

    values = tuple(value.strip() for value in (harmful_values or "").split(",") if value.strip())
    if harmful or harmless:
        if prompts:
            raise InputError("Give prompts either by --prompts, or by --harmful and --harmless, not both.")
        if not (harmful and harmless):
            given, other = ("--harmful", "--harmless") if harmful else ("--harmless", "--harmful")
            raise InputError(f"{given} alone gives prompts of one label; give {other} FILE too.")
        if label_column or values:
            raise InputError(
                "With --harmful and --harmless the files are the labels; leave out --label-column and --harmful-values."
            )
        source = two_files(str(harmful), str(harmless))
        source = replace(
            source,
            prompt_column=source.prompt_column or prompt_column,
            harmless_column=source.harmless_column or prompt_column,
            skip_bad_rows=skip_bad_rows,
        )
        return write_source(source)
    if prompts is None:
        raise InputError("These options are about columns of a file; give the file with --prompts.")
    source = read_source(prompts)
    return write_source(
        replace(
            source,
            prompt_column=prompt_column or source.prompt_column,
            label_column=label_column or source.label_column,
            harmful_values=values or source.harmful_values,
            skip_bad_rows=skip_bad_rows or source.skip_bad_rows,
        )
    )


def read_prompts(source: str) -> PromptSet:
    """The prompts of a source; how a file was read goes to stderr. Raises as `load_prompts`."""
    from es2.prompts.loading import load_prompts

    prompts = load_prompts(source)
    if prompts.reading is not None and not prompts.reading.is_plain and os.environ.get("RANK", "0") == "0":
        errors.print(prompts.reading.sentence, soft_wrap=True)
    return prompts


def reading_of(prompts: PromptSet) -> dict[str, Any] | None:
    """How a file of prompts was understood, for a JSON document."""
    return None if prompts.reading is None else prompts.reading.to_dict()
