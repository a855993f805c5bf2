"""A pytest plugin that checks the annotated shapes of analysis, models and training while their tests run.

The annotations stand under `TYPE_CHECKING`, so that no process waits for jaxtyping. Here the modules are imported with
that name true and with jaxtyping's import hook, so that beartype holds every argument and result against its shape.
Used as `python -m pytest -p tests.checked_shapes tests/analysis tests/models tests/training`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import typing
from typing import Any

from beartype import BeartypeConf, beartype

PACKAGES = ("es2.analysis", "es2.models", "es2.training")


def checked(function: Any) -> Any:
    """The function or class as beartype checks it; an int is a float, as it is for mypy (PEP 484)."""
    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))


def _import_all() -> None:
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)


def _import_others() -> None:
    """What the modules import from elsewhere, some of it under `TYPE_CHECKING`: there the name is to stay false."""
    import beartype.claw
    import jaxtyping
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    assert all((beartype, jaxtyping, TransformerBridge, PreTrainedModel, PreTrainedTokenizerBase))
    _import_all()
    for name in [name for name in sys.modules if name.startswith("es2.")]:
        del sys.modules[name]  # but for `es2` itself, whose names for type checkers would import everything


def pytest_configure() -> None:
    """Import the packages with their shapes checked, before any test module imports them without."""
    from jaxtyping import install_import_hook

    _import_others()
    with install_import_hook(PACKAGES, "tests.checked_shapes.checked"):
        typing.TYPE_CHECKING = True
        try:
            _import_all()
        finally:
            typing.TYPE_CHECKING = False
