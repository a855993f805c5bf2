"""pyproject.toml, CONTRIBUTING.md and CITATION.cff, held against what is there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_every_file_that_contributors_are_sent_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:app|docs|es2|tests|\.ci)/[\w/.]+", text))
    assert len(named) > 20
    assert {path for path in named if "NAME" not in path and not (ROOT / path.rstrip(".")).exists()} == set()


def test_contributors_are_sent_to_names_that_exist() -> None:
    """Each line of a recipe begins with a file and names what is in it in code."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path, rest in re.findall(r"^\d\. `([\w/.]+\.py)`(?: \([^)]*\))?(?: or `[^`]+` \([^)]*\))?: (.*)$", text, re.M):
        if "NAME" in path:
            continue
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([A-Za-z_]+)`", rest.partition(";")[0]):
            assert re.search(rf"\b{name}\b", source), f"{name} is not in {path}"


def test_the_citation_names_the_paper_and_the_tool() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["cff-version"], cited["title"], cited["license"]) == ("1.2.0", "ES2 Workbench", "MIT")
    assert cited["authors"] == [{"name": "ES2 Workbench developers"}]
    (paper,) = cited["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhao", "Wang", "Shen"]
    assert paper["identifiers"][0]["value"] == "arXiv:2603.20206"


def imported(node: ast.AST) -> Iterator[str]:
    """The top-level packages that a file imports, but for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module.partition(".")[0]
        yield from imported(child)


def test_every_package_that_is_imported_is_a_dependency() -> None:
    """What merely comes with another package is missing once that one stops needing it."""
    files = [path for folder in ("es2", "app") for path in (ROOT / folder).rglob("*.py")]
    names = {name for path in files for name in imported(ast.parse(path.read_text(encoding="utf-8")))}
    distributions = packages_distributions()
    needed = {distributions[name][0] for name in names - {"es2", "app"} if name not in sys.stdlib_module_names}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = {re.split(r"[<>=]", entry)[0] for entry in project["dependencies"]}

    def plain(found: set[str]) -> set[str]:
        return {name.lower().replace("_", "-") for name in found}

    assert "torch" in needed
    assert plain(needed) - plain(stated) == set()
