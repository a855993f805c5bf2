"""How a model is given its prompts: under which system prompt, thinking or not, with which arguments of its template.

The settings of every command that renders prompts. At their defaults the chat template alone decides, and no key of an
artifact mentions them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self

from pydantic import field_validator

from es2.core.errors import InputError
from es2.core.files import expanded, parse_json
from es2.core.settings import Settings, setting

NONE, DEFAULT = "none", "default"
"""System prompts that are no text: the template's own is left out, or the template has its way."""

_MAX_CHARACTERS = 200_000
_KEY = re.compile(r"[A-Za-z_]\w*")
_PYTHON = {"True": True, "False": False, "None": None}  # as strings, all three would be true in a template


class Rendering(Settings):
    """What is decided of a prompt beside its text; a setting at its default is left to others, and to the template."""

    system_prompt: str | None = setting(
        None,
        "The system prompt: TEXT, @FILE, none (the template's own is left out) or default (the template has its way). "
        "Automatic: that of the run, else that of the prompts' file, else default.",
        label="System prompt",
        group="own",
        implicit=True,
    )
    thinking: str | None = setting(
        None,
        "Whether the model thinks before it answers, by its template's own switch. Automatic: as in the run, else "
        "default.",
        group="own",
        choices=("on", "off", DEFAULT),
        implicit=True,
    )
    template_arg: tuple[str, ...] = setting(
        (),
        "KEY=VALUE for the chat template, such as reasoning_effort=low; VALUE is JSON or text. May be given again.",
        label="Template arguments",
        group="own",
        of="argument",
        implicit=True,
    )

    @field_validator("system_prompt")
    @classmethod
    def _check_system_prompt(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise InputError("The system prompt is blank; give a text, or none to leave the template's own out.")
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("The system prompt holds half of a surrogate pair, which is no character; remove it.")
        if text is not None and len(text) > _MAX_CHARACTERS:
            raise InputError(f"The system prompt has {len(text):,} characters; at most {_MAX_CHARACTERS:,} are read.")
        return text

    @field_validator("template_arg")
    @classmethod
    def _canonical(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        found: dict[str, str] = {}
        for entry in entries:
            key, equals, text = entry.partition("=")
            if not equals or not _KEY.fullmatch(key.strip()):
                raise InputError(f"{entry[:60]!r} is no template argument; write KEY=VALUE, such as think=true.")
            if key.strip() in found:
                raise InputError(f"The template argument {key.strip()} is given twice; give it once.")
            if any("\ud800" <= character <= "\udfff" for character in entry):
                raise InputError(f"The template argument {key.strip()} holds half of a surrogate pair; remove it.")
            found[key.strip()] = json.dumps(_value(text.strip()), ensure_ascii=False)
        return tuple(f"{key}={found[key]}" for key in sorted(found))

    @property
    def rendering(self) -> Rendering:
        """These three settings alone, of settings that have others, too."""
        return Rendering(**{name: getattr(self, name) for name in Rendering.model_fields})

    @property
    def arguments(self) -> dict[str, Any]:
        """The values of `template_arg` by key."""
        return {key: parse_json(text) for key, _, text in (entry.partition("=") for entry in self.template_arg)}

    def over(self, other: Rendering) -> Self:
        """The same, with what is not decided here as in `other`."""
        fields = Rendering.model_fields
        return self.replace(
            **{name: getattr(other, name) for name, field in fields.items() if getattr(self, name) == field.default}
        )

    @property
    def settled(self) -> Rendering:
        """The same with `default` as None: a template gets the same for both."""
        chosen = self.rendering
        return chosen.replace(
            **{name: None for name in ("system_prompt", "thinking") if getattr(chosen, name) == DEFAULT}
        )


AS_THE_TEMPLATE = Rendering()
"""Nothing is decided: the chat template has its way."""


UNMENTIONED = dict.fromkeys(Rendering.model_fields)
"""What a `config.json` says of a rendering that is left open, for comparisons of one with another."""


def read_system_prompt(given: str) -> str:
    """A system prompt as it is given on a command line: `@FILE` is the text of a file, without line breaks at its end.

    Raises:
        InputError: when the file cannot be read as text.
    """
    if not given.startswith("@"):
        return given
    path = Path(expanded(given[1:]))
    try:
        if path.exists() and not path.is_file():
            raise ValueError
        with path.open(encoding="utf-8-sig") as file:
            return file.read(_MAX_CHARACTERS + 1).rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no file of UTF-8 text"
        raise InputError(f"The system prompt's file {given[1:][:200]!r} cannot be read ({reason}).") from error


def _value(text: str) -> Any:
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return parse_json(text)
    except ValueError:
        return text
