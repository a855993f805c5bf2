"""Settings, each declared once: name, kind, default, bounds, a sentence of help, and the group it belongs to.

The command line, the app's forms, `config.json` and the tables of the docs are made from these declarations. Impossible
values are refused here, in one sentence that names the setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from es2.core.errors import InputError
from es2.core.former import todays_names

_LARGEST = 2**63
REPEATED = ("template_arg",)
"""List settings whose entries may hold commas: on the command line the option is given once for each."""
_EXAMPLES = {int: "12,18", float: "0.1,0.2", str: "a,b"}


def setting(
    default: Any,
    help: str,
    *,
    label: str = "",
    group: str = "advanced",
    of: str = "value",
    choices: Sequence[str] = (),
    suggestions: Sequence[str] = (),
    implicit: bool = False,
    step: float | None = None,
    format: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
) -> Any:
    """The declaration of one setting of a `Settings` model.

    Args:
        default: the shipped value; `...` where one has to be given.
        help: its effect, in a sentence.
        label: its name in a form.
        group: its place in a form: `main`, `advanced`, or `own` for a setting that has a place of its own.
        of: the word for one entry of a list.
        choices: the values that it, or an entry of it, may have; any if empty.
        suggestions: values that a form offers among others.
        implicit: whether JSON leaves it out at its default, so that keys of before it was declared are as they were.
        step, format: of a form's number field.
        ge, gt: its least value, or a value below all that it may have.
    """
    extra: Any = {"label": label, "group": group, "of": of, "step": step, "format": format}
    extra |= {"choices": tuple(choices), "suggestions": tuple(suggestions), "implicit": implicit}
    return Field(default, description=help, ge=ge, gt=gt, json_schema_extra=extra)


class Settings(BaseModel):
    """Everything that decides one kind of work. Frozen; impossible values raise `InputError`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_sentence(type(self), error)) from None
        for name, field in type(self).model_fields.items():
            choices, value = extra(field, "choices"), getattr(self, name)
            entries = value if isinstance(value, tuple) else (value,)
            if any(isinstance(entry, int) and abs(entry) >= 2**63 for entry in entries):
                raise InputError(f"{label_of(name, field)} cannot be {str(value)[:40]}: that is no number of 64 bits.")
            if choices and (wrong := [entry for entry in entries if entry is not None and entry not in choices]):
                label = extra(field, "of") if isinstance(value, tuple) else label_of(name, field).lower()
                raise InputError(f"Unknown {label} {wrong[0][:40]!r}; one of {', '.join(choices)}.")

    @model_validator(mode="before")
    @classmethod
    def _take_lists(cls, values: Any) -> Any:
        """JSON and TOML have no tuples."""
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def replace(self, **changes: Any) -> Self:
        """The same settings but for `changes`, checked again."""
        return type(self)(**dict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values by name, without `implicit` settings at their default."""
        fields = type(self).model_fields
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self
            if value != fields[name].default or not extra(fields[name], "implicit")
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The settings in a JSON object; entries of other names are ignored."""
        named = todays_names(dict(document))
        return cls(**{name: value for name, value in named.items() if name in cls.model_fields})

    @classmethod
    def from_text(cls, values: Mapping[str, Any]) -> Self:
        """The settings in the values of a command line or a form, where a list may be text with commas."""
        return cls(**{name: parse_list(cls, name, value) for name, value in values.items()})

    @classmethod
    def read(cls, document: Mapping[str, Any], what: str) -> Self:
        """As `from_dict`, of an object from a file, which the sentence calls `what`.

        Raises:
            InputError: for an entry that is missing or of another kind, or an impossible value.
        """
        if not isinstance(document, Mapping):
            raise InputError(f"{what} is damaged: its settings are no table; mend it, or start anew.")
        named = todays_names(dict(document))
        for name, field in cls.model_fields.items():
            if name not in named:
                if field.is_required():
                    raise InputError(f"{what} is damaged: it has no {name}; mend it, or start anew.")
            elif not _fits(named[name], field.annotation):
                shown = repr(named[name])[:60]
                raise InputError(f"{what} is damaged: {name} cannot be {shown}; mend it, or start anew.")
        try:
            return cls.from_dict(named)
        except InputError as error:
            raise InputError(f"{what}: {error}") from None


def parse_list(settings: type[Settings], name: str, value: Any) -> Any:
    """The entries of a list setting given as text with commas; other values as they are. Raises `InputError`."""
    field = settings.model_fields[name]
    kind = entry_kind(kind_of(field)[0])
    if kind is None or not isinstance(value, str):
        return value
    try:
        return tuple(kind(part.strip()) for part in value.split(",") if part.strip())
    except ValueError:
        of = extra(field, "of")
        raise InputError(f"{name} {value[:40]!r} is no list of {of}s; write it like {_EXAMPLES[kind]}.") from None


def option_words(settings: type[Settings], values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that sets these settings; none for those that are open, or off as they usually are.

    Other values than `settings` declares are options too.
    """
    words = []
    for name, value in values.items():
        usual = settings.model_fields[name].default if name in settings.model_fields else None
        if value is None or (value is False and usual is not True):
            continue
        if name in REPEATED:
            words += [f"--{name.replace('_', '-')}={entry}" for entry in value]
            continue
        words.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        if value is False:
            continue
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return words


def label_of(name: str, field: FieldInfo) -> str:
    """What a form calls a setting: its declared label, or its name."""
    return str(extra(field, "label") or name.replace("_", " ").capitalize())


def extra(field: FieldInfo, name: str) -> Any:
    """An argument of `setting` besides default, help and bounds."""
    found = field.json_schema_extra
    return found.get(name) if isinstance(found, dict) else None


def kind_of(field: FieldInfo) -> tuple[Any, bool]:
    """The kind of a setting's values, and whether it may be left open (None)."""
    kind = field.annotation
    arguments = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [one for one in arguments if one is not NoneType]
    return kinds[0], len(kinds) < len(arguments)


def entry_kind(kind: Any) -> Any:
    """The kind of a list's entries; None for what is no list."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def bounds_in_words(field: FieldInfo) -> str:
    """A setting's kind and bounds in words: `a whole number of at least 1`."""
    kind, _ = kind_of(field)
    if (entry := entry_kind(kind)) is not None:
        return f"a list of {'whole ' if entry is int else ''}numbers" if entry in (int, float) else "a list"
    if kind not in (int, float):
        return {bool: "true or false", str: "text"}.get(kind, "of another kind")
    words = "a whole number" if kind is int else "a number"
    for bound in field.metadata:
        if (least := getattr(bound, "ge", None)) is not None:
            return f"{words} of at least {least:g}"
        if (below := getattr(bound, "gt", None)) is not None:
            return f"{words} above {below:g}" if below else words.replace("a ", "a positive ")
    return words


def _sentence(settings: type[Settings], error: ValidationError) -> str:
    """The first wrong value, with what it must be."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = first["loc"]
    if not place or place[0] not in settings.model_fields:
        return f"There is no setting {str(place[0])[:40]!r}." if place else str(first["msg"])
    name, value = str(place[0]), repr(first["input"])[:60]
    field = settings.model_fields[name]
    kind, _ = kind_of(field)
    if first["type"] == "missing":
        return f"{name} is missing; it must be {bounds_in_words(field)}."
    if len(place) > 1 and entry_kind(kind) in (int, float):
        of = extra(field, "of")
        return f"There is no {of} {value}: {of}s are {bounds_in_words(field).removeprefix('a list of ')}."
    return f"{name} must be {bounds_in_words(field)}, not {value}."


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a kind, whatever its bounds."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind in (None, NoneType):
        return value is None
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and abs(value) < _LARGEST and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, kind)
