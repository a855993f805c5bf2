"""The functions of `import es2`, by name."""

from es2.api.making import compare, evaluate, finetune, import_adapter, open_run, report, sweep
from es2.api.reading import analyze, capture, check, load_model, load_prompts, project

__all__ = [
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
