"""The options about how a model is given its prompts, the same on every command that renders any."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from es2.cli.terminal import out
from es2.core.rendering import Rendering, read_system_prompt

_SHOWN_CHARACTERS = 160


def with_rendering(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Rendering`; it receives what was given as its parameter `rendering`."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)

    @wraps(command)
    def run(**given: Any) -> None:
        values = {name: given.pop(name) for name in Rendering.model_fields}
        if values["system_prompt"] is not None:
            values["system_prompt"] = read_system_prompt(values["system_prompt"])
        values["template_arg"] = tuple(values["template_arg"] or ())
        command(**given, rendering=Rendering(**values))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name != "rendering":
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=keyword))
            continue
        for name, field in Rendering.model_fields.items():
            kind: Any = list[str] | None if name == "template_arg" else str | None
            option = Annotated[kind, typer.Option(help=field.description)]
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=option))
    del run.__wrapped__  # Typer is to see the options
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return run


def show_rendering(rendering: Mapping[str, Any] | None) -> None:
    """Say how the model was given the prompts, and where `last` lies."""
    if not rendering:
        return
    if text := rendering.get("system_prompt"):
        of = " (the template's own)" if rendering.get("system_prompt_from") == "template" else ""
        shown = " ".join(text.split())
        more = f"… ({len(text):,} characters)" if len(shown) > _SHOWN_CHARACTERS else ""
        out.print(f"System prompt{of}: {shown[:_SHOWN_CHARACTERS]}{more}", soft_wrap=True)
    if given := rendering.get("template_arguments"):
        out.print(f"Template arguments: {', '.join(f'{key} = {value}' for key, value in given.items())}")
    out.print(f"Position last lies {rendering['last']}.")
