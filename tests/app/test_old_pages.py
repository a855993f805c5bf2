"""The app on what commit b0b27d8 left on disk: every page draws it, with the numbers that the old code drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app import artifacts
from app.state import Choice
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.workflow.runs import open_run
from tests.app.test_behaviour_page import choose, open_page
from tests.figures import charts_of
from tests.old_artifacts import EXPECTED, MODEL, RUNS, written_today

LINK = {"run": RUNS["done"], "model": MODEL, "prompts": "prompts.csv"}

pytestmark = pytest.mark.usefixtures("one_thread", "old_home")


@pytest.mark.parametrize("choice", [Choice(run=RUNS["done"]), Choice(model=MODEL, prompts="prompts.csv")])
def test_a_comparison_with_its_views(choice: Choice) -> None:
    found = artifacts.find_comparison(choice)
    assert found is not None
    assert found.run == (choice.run or RUNS["imported"]), "the newest, where none is asked for"
    assert found.targets == (1, 2)
    for kind in ("separation", "pca", "umap"):
        view = artifacts.view(found, 2, kind)
        assert view is not None
        expected = EXPECTED["umap"] if kind == "umap" else EXPECTED["views"][kind]
        assert view.tuned is not None
        np.testing.assert_allclose(view.tuned[0], expected, rtol=1e-5)


@pytest.mark.parametrize("page", ["", "layers", "behaviour", "robustness"])
def test_pages_of_the_run(page: str, old_home: Path) -> None:
    at = open_page(page, LINK)
    if page in ("behaviour", "robustness"):  # of two evaluations the one of the prompts that it was tuned on
        kept = find_evaluations(open_run(RUNS["done"]))
        choose(at, next(path.stem for path in kept if read_evaluation(path)["rows"].get("perturbation")))
    assert not at.error
    assert charts_of(at)
    assert written_today(old_home) == []


def test_the_curves_of_the_run() -> None:
    at = open_page("runs", LINK)
    at.button(key=f"curves_{RUNS['done']}").click().run()
    assert not at.exception
    assert not at.error
    steps = {trace["name"]: trace["x"] for drawn in charts_of(at).values() for one in drawn for trace in one["data"]}
    assert steps["separation"] == [1, 2, 3, 4]
    for name in ("prompts, held out", "replies, held out", "Fisher ratio", "scale-free units"):
        assert steps[name] == [2, 4], "where the events say watch_…"
