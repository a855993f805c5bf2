"""Pages that are made while the site is built: one for each command, one for each public module, and files of the root.

They come from what is declared in the code, so a new command, option or public name has its page without being written
down again. In the `nav` of `mkdocs.yml` an entry `commands/*` holds all generated pages of that folder. Nothing here
imports mkdocs before it is called, so the tests can read the same pages without it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

OF_THE_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's root; one whose file is missing is left out."""

Commands = list[tuple[str, Any]]


def commands() -> Commands:
    """Every command as it is typed (`es2 runs show`) with its click command, groups before what is in them."""
    import typer

    from es2.cli.main import app

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for sub, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                yield from walk(f"{name} {sub}", inner)

    return list(walk("es2", typer.main.get_command(app)))[1:]


def all_commands() -> str:
    """The page that lists the commands, each with the first sentence of its help."""
    lines = ["# All commands", "", "| command | what it does |", "| --- | --- |"]
    for typed, command in commands():
        if typed.count(" ") == 1:
            first = _escaped(command.help or "").split("\n\n")[0]
            lines.append(f"| [`{typed}`]({typed.split()[1]}.md) | {first} |")
    return "\n".join(lines) + "\n"


def command_page(name: str) -> str:
    """The page of a command of `es2`, with a section for each of its own commands."""
    sections = [_section(typed, command) for typed, command in commands() if f"{typed} ".startswith(f"es2 {name} ")]
    return "\n\n".join(sections) + "\n"


def _section(typed: str, command: Any) -> str:
    context = command.make_context(typed, [], resilient_parsing=True)
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    usage = " ".join([typed, *command.collect_usage_pieces(context)])
    lines = [
        f"{'#' if typed.count(' ') == 1 else '##'} `{typed}`",
        "",
        _escaped(command.help or ""),
        "",
        f"    {usage}",
        "",
    ]
    arguments = [parameter for parameter in shown if parameter.param_type_name == "argument"]
    options = [parameter for parameter in shown if parameter.param_type_name != "argument"]
    for kind, parameters in (("argument", arguments), ("option", options)):
        if parameters:
            lines += [f"| {kind} | default | what it does |", "| --- | --- | --- |"]
            lines += [_row(parameter, context) for parameter in parameters] + [""]
    return "\n".join(lines).rstrip()


def _row(parameter: Any, context: Any) -> str:
    names, words = parameter.get_help_record(context)
    found = re.fullmatch(r"(.*?)(?:  \[(default: |)(.*)\])?", words, re.DOTALL)
    told, _, default = found.groups() if found else (words, "", None)
    shown = " / ".join(f"`{name}`".replace("|", "\\|") for name in names.split(" / "))
    return f"| {shown} | {f'`{default}`' if default else ''} | {_escaped(told)} |"


def _escaped(words: str) -> str:
    """Help as Markdown that shows it as it is: what is between backticks is code, a paragraph is one line."""
    paragraphs = [" ".join(one.split()) for one in re.split(r"\n\s*\n", words.replace("\b", "").strip())]
    parts = re.split(r"(`[^`]*`)", "\n\n".join(paragraphs))
    parts = [part if part[:1] == "`" else re.sub(r"([\\*_{}\[\]>|#])", r"\\\1", part) for part in parts]
    return "".join(part if part[:1] == "`" else part.replace("<", "&lt;") for part in parts)


def public_names(module: str) -> dict[str, str]:
    """Where each name in the `__all__` of a module is defined, by name; none where there is no `__all__`.

    The source is read, not run, since a lazy module would load torch; an import for type checkers alone says where its
    names come from.
    """
    for node in _source(module).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return {name: _home(name, module) for name in ast.literal_eval(node.value) if not name.startswith("_")}
    return {}


def _home(name: str, module: str) -> str:
    """Where a name of a module is defined, through any number of modules that pass it on."""
    for node in ast.walk(_source(module)):
        for alias in node.names if isinstance(node, ast.ImportFrom) and node.module else ():
            if name == (alias.asname or alias.name):
                return _home(alias.name, str(node.module))
    return f"{module}.{name}"


def docstring(name: str | None, module: str) -> str:
    """The docstring of a module, or of a function or class that is defined in it."""
    nodes: list[Any] = [one for one in _source(module).body if getattr(one, "name", None) == name]
    found = (nodes[0] if nodes else None) if name else _source(module)
    return (ast.get_docstring(found) or "") if found else ""


def _source(module: str) -> ast.Module:
    found = find_spec(module)
    return ast.parse(Path(str(found and found.origin)).read_text(encoding="utf-8"))


def api_page(module: str) -> str:
    """The page of a public module: what mkdocstrings makes of each public name, where it is defined."""
    summary = " ".join(docstring(None, module).split("\n\n")[0].split())
    lines = [f"# `{module}`", "", summary, ""]
    for where in public_names(module).values():
        lines += [f"::: {where}", ""]
    return "\n".join(lines)


def root_page(file: str) -> str:
    """A file of the root as a page: links into `docs/` lead to its pages, other relative links are words."""
    text = (ROOT / file).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    links_elsewhere = r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)"
    return re.sub(links_elsewhere, lambda found: found[0] if (ROOT / "docs" / found[2]).exists() else found[1], text)


def generated(modules: list[str]) -> dict[str, str]:
    """Every generated page: its text by its path."""
    top = [typed.split()[1] for typed, _ in commands() if typed.count(" ") == 1]
    pages = {"commands/index.md": all_commands()} | {f"commands/{name}.md": command_page(name) for name in top}
    pages |= {f"api/{module}.md": api_page(module) for module in modules if public_names(module)}
    return pages | {page: root_page(file) for page, file in OF_THE_ROOT.items() if (ROOT / file).is_file()}


def with_generated(nav: list[Any], pages: dict[str, str]) -> list[Any]:
    """The `nav` with generated pages in the place of `folder/*`, and without pages that are not there (yet)."""
    entries: list[Any] = []
    for entry in nav:
        (title, content), *_ = entry.items()
        if isinstance(content, list):
            entries.append({title: with_generated(content, pages)})
        elif content.endswith("/*"):
            folder = content.removesuffix("*")
            entries.append({title: [{_title(page): page} for page in pages if page.startswith(folder)]})
        elif content in pages or (ROOT / "docs" / content).is_file():
            entries.append(entry)
    return entries


def _title(page: str) -> str:
    name = Path(page).name.removesuffix(".md")
    if not page.startswith("commands/"):
        return name
    return "All commands" if name == "index" else f"es2 {name}"


def on_config(config: Any) -> Any:
    """mkdocs' hook: makes the pages and puts them into the navigation."""
    config.extra["pages"] = pages = generated(config.extra["api"])
    config.nav = with_generated(config.nav, pages)
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: adds the pages to what is built."""
    from mkdocs.structure.files import File

    for page, text in config.extra["pages"].items():
        files.append(File.generated(config, page, content=text))
    return files
