"""The ES2 fine-tune: objective, sampling, validation, checkpoints, the loop; and a callback for others' trainings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from es2.training.callback import RepresentationCallback

__all__ = ["RepresentationCallback"]


def __getattr__(name: str) -> Any:
    """`RepresentationCallback`, which imports transformers, so only when it is asked for."""
    if name == "RepresentationCallback":
        return import_module("es2.training.callback").RepresentationCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
