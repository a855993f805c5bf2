"""Versions, for records that are read a year later: of what is installed, and of the forms in which things are kept.

Every kind of artifact states the version of its own form. One that a newer ES2 Workbench wrote is refused by a sentence
that says so, since to read it as an old one would be to guess; one that states none is of version 1.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from es2.core.errors import InputError

_PACKAGES = ("es2", "torch", "transformers", "transformer-lens", "peft", "numpy", "scikit-learn", "umap-learn")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, by name; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def format_of(stated: object, newest: int, what: str) -> int | None:
    """The version of an artifact's form: 1 where it states none, None where what it states is no version.

    Args:
        stated: what the artifact says.
        newest: the newest version that is read here.
        what: the artifact, with its path, as the sentence should call it.

    Raises:
        InputError: when it is of a newer version.
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
