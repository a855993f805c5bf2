"""What is derived from activation sets is found by what it states, whatever settings it was made with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.workflow.derived import Captured, analysis_key, find_analysis, find_analysis_folder
from tests.builders_artifacts import Artifacts, write_artifacts

FEW = AnalysisConfig(n_bootstrap=50, n_shuffles=1)
OTHER = AnalysisConfig(n_bootstrap=60, n_shuffles=1)


@pytest.fixture
def made(tmp_path: Path) -> Artifacts:
    return write_artifacts(tmp_path, 40, analysed=False)


def save(made: Artifacts, config: AnalysisConfig, age: int = 0, key: str | None = None) -> Path:
    """Analyse with these settings, so many seconds ago."""
    key = key or analysis_key(made.activations, made.prompts, config)
    with made.activations.write_derived(key) as folder:
        analyze(made.prompts, made.activations, config=config).save(folder)
        stat = (folder / "analysis.json").stat()
        os.utime(folder / "analysis.json", (stat.st_atime, stat.st_mtime - age))
    return made.activations.path / "derived" / key


def test_the_newest_analysis_is_found_whatever_its_settings(made: Artifacts) -> None:
    assert find_analysis(made.activations, made.prompts, "last") is None
    older, newer = save(made, FEW, age=100), save(made, OTHER)
    assert find_analysis_folder(made.activations, made.prompts, "last") == newer
    os.utime(older / "analysis.json")
    found = find_analysis(made.activations, made.prompts, "last")
    assert found is not None
    assert found.config == FEW


def test_only_of_these_prompts_and_this_position(made: Artifacts) -> None:
    save(made, FEW)
    assert find_analysis(made.activations, made.prompts, "last_instruction") is None
    others = made.prompts.select(made.prompts.in_split("test"))
    assert find_analysis(made.activations, others, "last") is None
    # Numbers of other test prompts lie beside them and are not these prompts' own.
    test = Captured(made.prompts, made.activations)
    save(made, OTHER, key=analysis_key(made.activations, made.prompts, OTHER, test=test))
    found = find_analysis(made.activations, made.prompts, "last")
    assert found is not None
    assert found.config == FEW


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3}', '{"config": {"costs": 1}}', None])
def test_a_damaged_one_is_passed_over(made: Artifacts, content: str | None) -> None:
    whole, damaged = save(made, FEW, age=100), save(made, OTHER)
    file = damaged / "analysis.json"
    if content is None:
        document = json.loads(file.read_text())
        content = json.dumps(document | {"best_layer": 1 - document["best_layer"]})
    file.write_text(content)
    assert find_analysis_folder(made.activations, made.prompts, "last") == whole
