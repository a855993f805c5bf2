"""Two files, or one whose columns were chosen, all the way: fine-tune, evaluation, report, and the app's comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app import artifacts
from app.run_rows import about, lost_prompts
from app.state import Choice, read_link
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.prompts.loading import load_prompts
from es2.prompts.sources import read_source
from es2.workflow.runs import open_run
from tests.builders import save_tiny_model

SHORT = ("--layers", "1,2", "--steps", "2", "--pairs-per-step", "4", "--validate-every", "2")
QUICK = ("--suite", "refusal", "--limit", "4", "--new-tokens", "4")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two files of one label each, and one file whose columns have to be chosen."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny_model(folder / "tiny-llama")
    rows = "".join(f"How is lock {i} forced?;About {i};S{1 + i % 2}\n" for i in range(60))
    (folder / "Ziele | 100%.csv").write_text("goal;text;art\n" + rows)
    (folder / "gates.txt").write_text("".join(f"How is gate {i} oiled?\n" for i in range(60)))
    more = "".join(f"How is gate {i} oiled?;About {i};S9\n;None;S9\n" for i in range(60))
    (folder / "one.csv").write_text("goal;text;art\n" + rows + more)
    return folder


@pytest.mark.usefixtures("places", "one_thread")
@pytest.mark.parametrize("kind", ["two files", "columns chosen"])
def test_all_the_way(kind: str, files: Path, es2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)  # names are relative here, and the run's are not
    model = files / "tiny-llama"
    given: tuple[str, ...] = ("--harmful", "Ziele | 100%.csv:goal", "--harmless", "gates.txt")
    if kind == "columns chosen":
        given = ("--prompts", "one.csv", "--prompt-column", "goal", "--label-column", "art")
        given += ("--harmful-values", "S1,S2", "--skip-bad-rows")
    code, made = es2("finetune", "--model", model, *given, *SHORT)
    assert code == 0, made
    run = open_run(made["run"])
    source = run.config["prompts"]
    monkeypatch.chdir("/")
    prompts = load_prompts(source)
    assert prompts.labels.tolist() == [1] * 60 + [0] * 60
    assert all(Path(place).is_absolute() for place in read_source(source).places)

    code, analysed = es2("analyze", "--model", model, "--run", run.id, "--prompts", source)
    assert code == 0, analysed
    assert {number["layer"] for number in analysed["layers"]} >= {1, 2}
    code, evaluated = es2("evaluate", "--model", model, "--run", run.id, "--prompts", source, *QUICK)
    assert code == 0, evaluated
    assert read_evaluation(find_evaluations(run)[0])["prompts"]
    code, document = es2("report", "--run", run.id, "--out", tmp_path / "report.html")
    assert code == 0, document
    assert "How is lock" in (tmp_path / "report.html").read_text()
    code, shown = es2("runs", "show", run.id)
    assert code == 0
    assert shown["config"]["prompts"] == source

    choice, notes = read_link(Choice(model=str(model), prompts=source).to_link())
    assert notes == []
    assert choice.prompts == source
    found = artifacts.find_comparison(choice)
    assert found is not None
    assert found.run == run.id
    assert set(found.prompts.texts) <= set(prompts.texts)
    assert ("Ziele | 100%.csv and gates.txt (goal)" in about(run).replace("\\", "")) == (kind == "two files")
    assert lost_prompts(run) is None
    (files / "gates.txt").rename(files / "away.txt")
    lost = lost_prompts(run)
    (files / "away.txt").rename(files / "gates.txt")
    assert (f"no longer at {files / 'gates.txt'};" in str(lost)) == (kind == "two files")
