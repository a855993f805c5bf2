"""The rows of `docs/architectures.md`, and the page that holds them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from unittest import mock

from tests.architectures.configs import ARCHITECTURES
from tests.architectures.outcomes import Cell, Row, markdown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
ADAPTERS = "tests.architectures.adapters"

MARK = "<!-- What follows is written by python -m tests.architectures --write. -->"


def row(name: str) -> Row:
    """One architecture's cells, everything kept in a temporary folder."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from tests.architectures.cells import Trial

    torch.set_num_threads(1)
    set_verbosity_error()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _places(Path(folder)):
        warnings.simplefilter("ignore")
        trial = Trial(ARCHITECTURES[name], Path(folder))
        cells = dict(trial.cells())
    del trial
    gc.collect()
    return Row(name, cells)


def _places(root: Path) -> mock._patch_dict:
    """Everything that the product keeps is kept below `root`."""
    names = {"ES2_HOME": root / "home", "ES2_CACHE": root / "cache", "ES2_SHOWCASE": root / "none"}
    return mock.patch.dict(os.environ, {name: str(path) for name, path in names.items()} | {"HF_HUB_OFFLINE": "1"})


def adapter_rows() -> list[Row]:
    """The kinds of adapter, each with one cell; none where the module that makes them is missing."""
    if not importlib.util.find_spec(ADAPTERS):
        return []
    kinds = importlib.import_module(ADAPTERS).rows()
    return [
        Row(f"{kind.name}: {kind.what}", {"merged": Cell(kind.outcome, kind.difference, kind.sentence or "")})
        for kind in kinds
    ]


def tables(rows: Sequence[Row], adapters: Sequence[Row]) -> dict[str, str]:
    """The tables of the page by their headings."""
    found = {"Architectures": markdown(rows, "architecture")}
    return found | ({"Adapters": markdown(adapters, "adapter: how peft makes it")} if adapters else {})


def page(text: str, sections: Mapping[str, str]) -> str:
    """A page's text with the versions and tables behind `MARK` written anew."""
    names = ("torch", "transformers", "transformer-lens", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    head = text.partition(MARK)[0]
    parts = [f"\n## {name}\n\n{table}" for name, table in sections.items()]
    return f"{head}{MARK}\n\nSeen with {versions}.\n" + "".join(parts)
