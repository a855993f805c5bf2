"""Command-line options made from declared settings, and the tables of settings in the docs.

`with_settings` replaces a command's parameter `settings` by an option for every declared setting, and passes the values
by name. `python -m es2.cli.options` prints docs/settings.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from es2.analysis.results import AnalysisConfig
from es2.capture.config import CaptureConfig
from es2.core.rendering import Rendering
from es2.core.settings import Settings, bounds_in_words, entry_kind, extra, kind_of, parse_list
from es2.evaluation.config import EvaluateConfig
from es2.training.config import FinetuneConfig
from es2.workflow.sweep_space import SweepConfig

COMMANDS: Mapping[str, type[Settings]] = {
    "capture": CaptureConfig,
    "analyze": AnalysisConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
}
"""Whose settings each command takes."""


def with_settings(
    settings: type[Settings],
    *,
    leave_out: Collection[str] = (),
    left_open: Mapping[str, str] | None = None,
    into: str = "settings",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each setting, but for those of `with_rendering`.

    Args:
        settings: the declarations.
        leave_out: settings that the command has parameters of its own for, or decides itself.
        left_open: settings that need not be given here, with what happens then, for the help.
        into: the command's parameter that is replaced.

    Returns:
        The decorator. That parameter receives the values by name; a list is given with commas.
    """
    left_open = left_open or {}
    names = [name for name in settings.model_fields if name not in (*leave_out, *Rendering.model_fields)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            values = {name: parse_list(settings, name, given.pop(name)) for name in names}
            command(**given, **{into: values})

        hints = get_type_hints(command, include_extras=True)
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == into:
                parameters += [_option(settings, name, left_open.get(name)) for name in names]
            else:
                parameters.append(
                    parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
                )
        del run.__wrapped__  # Typer is to see the options
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
        return run

    return decorate


def _option(settings: type[Settings], name: str, otherwise: str | None) -> inspect.Parameter:
    field = settings.model_fields[name]
    kind, may_be_open = kind_of(field)
    default = None if otherwise is not None or field.is_required() else field.default
    if entry_kind(kind) is not None:
        kind, default = str, default and ",".join(format(entry, "") for entry in default)
    words = f"{field.description} Default: {otherwise}." if otherwise is not None else field.description
    option = typer.Option(help=words)
    annotation = kind | None if may_be_open or default is None else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def table(settings: type[Settings]) -> list[str]:
    """The lines of a Markdown table of declared settings."""
    lines = ["| setting | default | may be | what it does |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        if name in Rendering.model_fields and settings is not Rendering:
            continue
        default = "" if field.is_required() else field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        choices = extra(field, "choices")
        few = "some" if entry_kind(kind_of(field)[0]) is not None else "one"
        may_be = f"{few} of {', '.join(choices)}" if choices else bounds_in_words(field)
        shown = "automatic" if default is None else f"`{default}`" if default != "" else ""
        lines.append(f"| `{name}` | {shown} | {may_be} | {str(field.description).replace('|', chr(92) + '|')} |")
    return lines


def page() -> str:
    """The text of docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting of every command, as it is declared in the code. On the command line a setting is an option "
        "(`kl_weight` is `--kl-weight`), a list is given with commas, and a setting that is left out has its default. "
        "The app's forms have the same settings, and `config.json` of a run holds them by these names.",
        "",
        "This page is made by `python -m es2.cli.options > docs/settings.md`.",
    ]
    for command, settings in COMMANDS.items():
        lines += ["", f"## `es2 {command}`", "", *table(settings)]
    where = "guide/rendering.md"
    of_all = f"Of every command that renders prompts ([{where}]({where})); a run keeps them."
    lines += ["", "## How prompts are given to the model", "", of_all, "", *table(Rendering)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
