"""Versions of installed packages and of the formats of artifacts.

Every kind of artifact states its own format version. One of a newer ES2 Workbench is refused, since reading it as an
old one would be a guess; one that states none is of version 1.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from es2.core.errors import InputError

_PACKAGES = ("es2", "torch", "transformers", "transformer-lens", "peft", "numpy", "scikit-learn", "umap-learn")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide the numbers, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def format_of(stated: object, newest: int, what: str) -> int | None:
    """The format version of an artifact: 1 where it states none, None where the stated value is no version.

    Raises:
        InputError: when it is newer than `newest`; the sentence calls the artifact `what`.
    """
    if stated is None:
        return 1
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        return None
    if stated > newest:
        raise InputError(
            f"{what} was written by a newer ES2 Workbench (format {str(stated)[:20]}, this one reads up to {newest}); "
            "update ES2 Workbench."
        )
    return stated
