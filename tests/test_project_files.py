"""CONTRIBUTING.md and CITATION.cff, held against what is there."""

from __future__ import annotations

import re
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
