"""The notebooks: each cell runs in order, on a tiny model, and none holds what a run of it printed."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import es2
from tests.builders import tiny_prompts, write_prompts

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
SMALL: dict[str, dict[str, Any]] = {
    "first_look": {
        "model": "./tiny-model",
        "source": "many.csv",
        "steps": 2,
        "pairs_per_step": 4,
        "replies": 4,
        "tokens": 4,
    },
    "your_own": {"model": "./tiny-model", "layers": [1, 2], "steps": 1},
}


def cells(name: str) -> list[dict[str, Any]]:
    document = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def test_there_is_a_test_of_each_notebook() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.parametrize("name", SMALL)
def test_no_output_is_kept(name: str) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name))
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells(name)) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_from_top_to_bottom(
    name: str, folder: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As papermill does it: the cell that is tagged `parameters` is followed by other values."""
    work = folder / name
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "tiny-model").symlink_to(folder / "tiny-model")
    (work / "adapter").symlink_to(folder / "adapter")
    write_prompts(work / "many.csv", tiny_prompts(120))
    names: dict[str, Any] = {}
    last: Any = None
    for cell in cells(name):
        program = ast.parse("".join(cell["source"]))
        shown = program.body.pop() if isinstance(program.body[-1], ast.Expr) else None
        exec(compile(program, name, "exec"), names)
        if shown is not None:
            assert isinstance(shown, ast.Expr)
            last = eval(compile(ast.Expression(shown.value), name, "eval"), names)
            assert last is not None, "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            assert SMALL[name].keys() <= names.keys()
            names |= SMALL[name]
    assert isinstance(last, tuple)
    assert last[1].is_file()
    assert es2.open_run(last[0]).status == "done"
