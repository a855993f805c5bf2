"""The card of an exported run: complete, true to the result, and without a place on this machine."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from es2.jobs.queue import create_job
from es2.report.glossary import COMPARED, TERMS
from es2.training.config import FinetuneConfig
from es2.workflow.model_card import model_card
from es2.workflow.runs import config_of
from tests.builders_artifacts import TARGETS, Compared, write_comparison
from tests.builders_evaluation import REFUSES_LESS, write_replies


@pytest.fixture(scope="module")
def compared(home: Path) -> Compared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        return write_comparison(home, 40)


@pytest.fixture(autouse=True)
def own_places(places: None) -> None:
    """Everything is below `home`."""


def head_of(card: str) -> Mapping[str, Any]:
    empty, head, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head)


def test_says_what_it_is_made_of_and_what_was_measured(compared: Compared, home: Path) -> None:
    card = model_card(compared.run, config_of(compared.run))
    assert head_of(card)["library_name"] == "peft"
    assert head_of(card)["base_model"] == "toy-model"
    assert "| data | prompts.csv |" in card
    assert "| target layers | 2, 3 |" in card
    assert "| λ, weight of the KL | 10 |" in card
    result = compared.run.result() or {}
    assert f"**{result['verdict'].capitalize()}, behaviour not measured.**" in card
    assert "What it replies was not measured." in card
    assert "Ability was not measured." in card
    for term in (*TERMS, *COMPARED):
        assert f"| {term.title} | " in card
        assert f"- *{term.title}*: {term.definition}" in card
    change = compared.analysis.layers[TARGETS[0]].change
    assert change is not None
    ratio = change["fisher_ratio"].ratio
    assert f"×{ratio.value:.2f} (×{ratio.low:.2f} to ×{ratio.high:.2f})" in card
    assert "## Limits" in card
    assert str(home) not in card


def test_says_what_became_of_replies(compared: Compared) -> None:
    write_replies(compared.run, "requests", *REFUSES_LESS)
    card = model_card(compared.run, config_of(compared.run), merged=True)
    assert "refuses less.**" in card
    assert "DSR" in card
    assert "share of harmful requests that are refused" in card
    assert head_of(card)["library_name"] == "transformers"


def test_names_no_folder_and_interprets_nothing(home: Path) -> None:
    config = FinetuneConfig(layers=(1, 2), model=str(home / "models" / "mine"))
    run = create_job("finetune", config.to_dict() | {"prompts": f"pair:{home}/a.csv|{home}/b.csv"})
    run.rename("<b>x</b> | [y](z)")
    card = model_card(run, config)
    assert "base_model" not in head_of(card)
    assert "from mine: a short" in card
    assert "| data | a.csv and b.csv |" in card
    assert "# \\<b\\>x\\</b\\> \\| \\[y\\](z)" in card
    assert "was not compared with its base" in card
    assert str(home) not in card


def test_an_adapter_from_elsewhere_has_no_settings_of_a_fine_tune(home: Path) -> None:
    config = FinetuneConfig(layers=(), model="smollm2-135m-instruct")
    run = create_job("finetune", config.to_dict() | {"imported": str(home / "adapter"), "objective": "imported"})
    card = model_card(run, config)
    assert head_of(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| training | elsewhere;" in card
    assert "Embedding Space Separation" not in card
    assert "λ" not in card


@pytest.mark.parametrize("merged", [False, True])
def test_says_how_it_is_loaded(home: Path, merged: bool) -> None:
    config = FinetuneConfig(layers=(1, 2), model="smollm2-135m-instruct")
    card = model_card(create_job("finetune", config.to_dict()), config, merged=merged)
    code = card.split("## How to load it")[1].split("##")[0]
    ast.parse(textwrap.dedent(code))
    assert ("PeftModel" in code, "HuggingFaceTB/SmolLM2-135M-Instruct" in code) == (not merged, not merged)
