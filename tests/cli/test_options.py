"""A setting that is in one place is in all: the command's options, the app's form, the file, the docs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from streamlit.testing.v1 import AppTest

from es2.cli import main as cli
from es2.cli import options
from es2.core.rendering import Rendering
from es2.core.settings import extra
from es2.training.config import FinetuneConfig

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def options_of(command: str) -> dict[str, click.Parameter]:
    """The parameters of a command by name, as Typer makes them."""
    group: Any = typer.main.get_command(cli.app)
    return {str(parameter.name): parameter for parameter in group.commands[command].params}


@pytest.mark.parametrize("command", options.COMMANDS)
def test_every_setting_is_an_option_with_the_declared_help(command: str) -> None:
    found = options_of(command)
    for name, field in options.COMMANDS[command].model_fields.items():
        shown = "position" if name == "positions" else name
        assert shown in found
        if shown == name and name not in ("model", "prompts"):
            assert str(getattr(found[name], "help", "")).startswith(str(field.description))


def test_plan_takes_what_finetune_takes() -> None:
    assert options_of("finetune").keys() - {"log_to"} <= options_of("plan").keys()


def test_the_docs_list_the_same_settings() -> None:
    assert DOCS.read_text(encoding="utf-8") == options.page()


def test_options_reach_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, es2: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    """One that had no option until now; nothing is loaded before it is refused."""
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    code, document = es2("finetune", "--layers", "1", "--kl-prompts", "0", "--model", _config(tmp_path))
    assert code == 2
    assert "kl_prompts must be a whole number of at least 1, not 0" in document["error"]


def _config(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    return str(folder)


def _form() -> None:
    import streamlit as st

    from app.settings_form import SettingsForm
    from es2.training.config import FinetuneConfig

    form = SettingsForm(FinetuneConfig, "launch", {})
    st.json(sorted({**form.group("main"), **form.group("advanced")}))


def test_the_form_has_every_setting_that_has_no_place_of_its_own() -> None:
    shown = json.loads(AppTest.from_function(_form, default_timeout=30).run().json[0].value)
    own = [name for name, field in FinetuneConfig.model_fields.items() if extra(field, "group") == "own"]
    assert own == [*Rendering.model_fields, "layers", "model", "allow_many_layers"]
    assert set(shown) | set(own) == set(FinetuneConfig.model_fields)


def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["es2", "finetune", "--stepz", "3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
