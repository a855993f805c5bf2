"""ES2 Workbench: where inside a language model are harmful and harmless prompts told apart, how far apart are they,
and what does Embedding Space Separation fine-tuning (arXiv 2603.20206) do to that?

`import es2` loads none of it: a name is loaded when it is first used, torch and pandas when a function needs them.
`es2.capture` and `es2.report` are packages of the library, too; as names of this module they are the functions.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from es2.api.functions import (
        analyze,
        capture,
        check,
        compare,
        evaluate,
        finetune,
        import_adapter,
        load_model,
        load_prompts,
        open_run,
        project,
        report,
        sweep,
    )
    from es2.core.errors import InputError, MachineError

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "MachineError",
    "__version__",
    "analyze",
    "capture",
    "check",
    "compare",
    "evaluate",
    "finetune",
    "import_adapter",
    "load_model",
    "load_prompts",
    "open_run",
    "project",
    "report",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in ("InputError", "MachineError"):
        from es2.core import errors

        return getattr(errors, name)
    if name not in __all__:
        raise AttributeError(f"module 'es2' has no attribute {name!r}")
    from es2.api import functions

    return getattr(functions, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(ModuleType):
    """A package with the name of a function: called, and asked for its help, it is the function."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._function(*arguments, **settings)

    @property
    def _function(self) -> Any:
        from es2.api import functions

        return getattr(functions, self.__name__.rpartition(".")[2])

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._function.__doc__

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._function)


class _Face(ModuleType):
    """This module: the import system sets a package as its attribute, wherever that is imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
