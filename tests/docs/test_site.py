"""Every command, setting, public name and page is in the docs site."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from es2.analysis.results import NUMBERS
from es2.cli import options
from es2.training.terms import OBJECTIVES, REFUSAL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def _hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _hooks()


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The generated pages."""
    return hooks.generated(SITE["extra"]["api"])


def _in_nav(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        (content,) = entry.values()
        yield from _in_nav(content) if isinstance(content, list) else [content]


def test_the_menu_has_every_page_once(pages: dict[str, str]) -> None:
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(_in_nav(hooks.with_generated(SITE["nav"], pages))) == sorted(written | set(pages))


def test_every_command_has_its_section_with_all_of_its_options(pages: dict[str, str]) -> None:
    for typed, command in hooks.commands():
        page = pages[f"commands/{typed.split()[1]}.md"]
        assert f"# `{typed}`\n\n" in page
        assert f"| [`es2 {typed.split()[1]}`]({typed.split()[1]}.md) | " in pages["commands/index.md"]
        assert (command.help or "").strip(), f"{typed} has no help"
        for parameter in command.params:
            assert parameter.hidden or any(f"`{name}" in page for name in (*parameter.opts, parameter.name))


def test_every_environment_variable_is_in_the_table() -> None:
    code = [path.read_text(encoding="utf-8") for folder in ("es2", "app") for path in (ROOT / folder).rglob("*.py")]
    table = (DOCS / "command-line.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(ES2_\w+)` \|", table, re.MULTILINE))
    assert told == set(re.findall(r"\bES2_[A-Z_]+\b", "".join(code)))


def test_every_objective_and_every_number_has_its_row() -> None:
    for page, names in (("concepts/es2.md", (*OBJECTIVES, REFUSAL)), ("numbers.md", NUMBERS)):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text] == [], page


def test_every_setting_is_an_option_of_its_command_and_in_the_table(pages: dict[str, str]) -> None:
    table = (DOCS / "settings.md").read_text(encoding="utf-8")
    for command, settings in options.COMMANDS.items():
        for name in settings.model_fields:
            option = name.removesuffix("s") if name == "positions" else name
            assert f"| `{name}` |" in table
            assert re.search(rf"`--{option.replace('_', '-')}[ `]", pages[f"commands/{command}.md"]), (command, name)


def test_every_public_name_is_in_the_reference_and_documented(pages: dict[str, str]) -> None:
    assert "es2" in SITE["extra"]["api"]
    for module in SITE["extra"]["api"]:
        for name, where in hooks.public_names(module).items():
            assert f"\n::: {where}\n" in pages[f"api/{module}.md"], name
            home, _, own = where.rpartition(".")
            assert hooks.docstring(own, home), f"{where} has no docstring"


def test_public_names_are_those_of_the_module() -> None:
    for module in SITE["extra"]["api"]:
        exported = getattr(importlib.import_module(module), "__all__", [])
        assert set(hooks.public_names(module)) == {name for name in exported if not name.startswith("_")}


def test_a_page_that_is_not_there_is_not_in_the_menu() -> None:
    nav = [{"a": "numbers.md"}, {"b": [{"c": "no-such-page.md"}, {"d": "made/*"}]}]
    made = {"made/e.md": ""}
    assert hooks.with_generated(nav, made) == [{"a": "numbers.md"}, {"b": [{"d": [{"e": "made/e.md"}]}]}]


def test_help_is_shown_as_it_is() -> None:
    assert hooks._escaped("`a_b` *c* <d>\n e\n\n[f] g_h") == "`a_b` \\*c\\* &lt;d\\> e\n\n\\[f\\] g\\_h"


def test_links_of_a_file_of_the_root_lead_to_pages_or_are_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[a](docs/numbers.md#the-probe) [b](es2/cli/main.py) [c](https://example.org/d)"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "numbers.md").touch()
    (tmp_path / "CONTRIBUTING.md").write_text(text)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.root_page("CONTRIBUTING.md") == "[a](numbers.md#the-probe) b [c](https://example.org/d)"


LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
WRITTEN = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as Python-Markdown and GitHub make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(text):
        there = page if not target else (page.parent / target).resolve()
        assert there.is_file(), f"{target} of {page.name}"
        assert not anchor or anchor in _anchors(there), f"{target}#{anchor} of {page.name}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Files of the code, the tests and the docs; a test's name behind `::` is in its file."""
    named = r"\b((?:app|docs|es2|tests)/[\w/.-]+\.(?:py|toml|csv|md|js|css))(?:::(\w+))?"
    for path, name in re.findall(named, page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), f"{path} of {page.name}"
        assert not name or name in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name} of {page.name}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_told_have_these_options(page: Path) -> None:
    known = {typed: command.params for typed, command in hooks.commands()}
    code = r"(?:^ {4}|`)(?:[^`\n#]*[ /])?es2 ([a-z]+)([^`\n#]*)"
    for name, rest in re.findall(code, page.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"es2 {name}" in known, f"es2 {name} of {page.name}"
        options = {option for one in known[f"es2 {name}"] for option in (*one.opts, *one.secondary_opts)}
        missing = set(re.findall(r"(?<=\s)--[a-z][\w-]*", rest)) - options - {"--help"}
        assert not missing, f"es2 {name} of {page.name}"
