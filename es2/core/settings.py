"""Settings as they come back from a file: every entry of the kind that it was written as, or a sentence.

A config is a frozen dataclass whose annotations already say what each entry may be, so they are what is checked; which
values make sense is for the config itself to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from es2.core.errors import InputError


def check_settings(config: type, document: Mapping[str, Any], what: str) -> None:
    """Refuse a JSON object from which a config cannot be made.

    Args:
        config: a dataclass of numbers, texts, booleans, None and tuples of these.
        document: what was read; entries of other names belong to somebody else.
        what: the object, as the sentence should call it.

    Raises:
        InputError: for an entry that is missing or of another kind.
    """
    kinds = get_type_hints(config)
    for entry in fields(config):
        if entry.name in document:
            if not _fits(document[entry.name], kinds[entry.name]):
                shown = repr(document[entry.name])[:60]
                raise InputError(f"{what} is damaged: {entry.name} cannot be {shown}; mend it, or start anew.")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise InputError(f"{what} is damaged: it has no {entry.name}; mend it, or start anew.")


def _fits(value: object, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind in (None, NoneType):
        return value is None
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and abs(value) < 2**63 and math.isfinite(value)  # type: ignore[arg-type]
    return isinstance(value, kind)
