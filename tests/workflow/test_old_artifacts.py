"""What commit b0b27d8 left on disk is opened by today's code, with the numbers that the old code read from it.

Names in code may change; names in people's files stay what they were when they were written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.core.errors import InputError
from es2.core.files import read_json
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.jobs.queue import list_jobs, open_job, reopen
from es2.jobs.running import run_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import SPLITS
from es2.store.store import Store
from es2.workflow import reproduce
from es2.workflow.derived import find_activations, find_analysis, find_umap, find_views_folder
from es2.workflow.evaluate import evaluate, find_evaluation
from es2.workflow.job_kinds import JOBS
from es2.workflow.reader import answer
from es2.workflow.runs import config_of, open_run, tuned_weights
from tests.old_artifacts import EXPECTED, MODEL, RUNS, check, written_today

Es2 = Callable[..., tuple[int, dict[str, Any]]]

GIVEN = ("--model", MODEL, "--prompts", "prompts.csv", "--device", "cpu")
OF_THE_JOB = {"format", "kind", "created", "heavy", "host", "pid", "prompts", "prompts_digest", "imported", "digest"}

pytestmark = pytest.mark.usefixtures("one_thread", "old_home")


def test_a_prompt_file_with_the_old_names_of_splits() -> None:
    prompts = load_prompts("prompts.csv")
    assert Counter(prompts.splits) == dict(zip(SPLITS, (16, 8, 24, 24), strict=True))
    validation = {pair for pair, split in zip(prompts.pairs, prompts.splits, strict=True) if split == SPLITS[1]}
    assert validation == {f"pair-{number}" for number in range(8, 12)}, "in the file it is called watch"


class TestActivationSets:
    def test_each_opens(self) -> None:
        assert {found.key for found in Store().list()} == EXPECTED["embeddings"].keys()
        for key, positions in EXPECTED["embeddings"].items():
            found = Store().open(key)
            check([found.texts[0], len(found.texts)], EXPECTED["texts"][key])
            for position, norms in positions.items():
                check([float(np.linalg.norm(found.layer(l, position))) for l in range(found.n_layers)], norms, 1e-5)

    def test_capturing_the_same_finds_it(self, es2: Es2, old_home: Path) -> None:
        given = ("--model", MODEL, "--prompts", "harmful.csv", "--position", "last", "--dtype", "bfloat16")
        code, document = es2("capture", *given, "--device", "cpu")
        assert code == 0, document
        assert (document["key"], document["computed"]) == (EXPECTED["half"], False)
        assert Store().open(EXPECTED["half"]).meta["dtype"] == "float16"
        assert written_today(old_home) == []


class TestDerived:
    @pytest.mark.parametrize(
        ("name", "more"),
        [
            ("base", ()),
            ("run", ("--run", RUNS["done"])),
            ("full", ("--run", RUNS["full"])),
            ("others", ("--run", RUNS["done"], "--test-prompts", "others.csv")),
        ],
    )
    def test_analyze_answers_from_disk(self, es2: Es2, old_home: Path, name: str, more: tuple[str, ...]) -> None:
        code, document = es2("analyze", *GIVEN, *more)
        assert code == 0, document
        check(document, EXPECTED["analyses"][name])
        assert written_today(old_home) == [], "same keys, so nothing is computed"

    @pytest.mark.parametrize("run", [None, RUNS["done"], RUNS["imported"]])
    def test_the_app_finds_it_without_the_model(self, run: str | None) -> None:
        prompts = load_prompts("prompts.csv").measured()
        base = find_activations(MODEL, prompts, "last")
        assert base is not None
        tuned = run and find_activations(MODEL, prompts, "last", run=run)
        analysis = find_analysis(base, prompts, "last", tuned or None)
        assert analysis is not None
        check(analysis.to_dict()["layers"], EXPECTED["analyses"]["run" if run else "base"]["layers"])
        assert find_views_folder(base, prompts, analysis.config, tuned or None)
        umap = find_umap(base, prompts, "last", tuned or None)
        assert umap is not None
        view = umap.view(2)
        if run:
            assert view.tuned is not None
            check(view.tuned[0].tolist(), EXPECTED["umap"])


class TestRuns:
    def test_all_are_listed(self, es2: Es2) -> None:
        assert {job.id: [job.kind, job.status()] for job in list_jobs()} == EXPECTED["jobs"]
        code, document = es2("runs")
        assert code == 0
        rows = {row["name"]: row for row in document["runs"]}
        check(rows, EXPECTED["runs"])

    @pytest.mark.parametrize("name", RUNS)
    def test_show(self, es2: Es2, name: str) -> None:
        code, document = es2("runs", "show", RUNS[name])
        assert code == 0
        assert (document["result"] is None) == (name in ("killed", "failed", "cancelled"))

    @pytest.mark.parametrize("name", RUNS)
    def test_every_setting_is_read(self, name: str) -> None:
        run = open_run(RUNS[name])
        written = read_json(run.path / "config.json")
        assert written is not None
        others = OF_THE_JOB if name != "imported" else (*OF_THE_JOB, "objective", "steps")  # it was not trained here
        check(config_of(run).to_dict(), {name: value for name, value in written.items() if name not in others})

    @pytest.mark.parametrize("name", ["done", "stopped", "full", "imported"])
    def test_weights_are_whole(self, name: str) -> None:
        assert tuned_weights(open_run(RUNS[name])).name == ("weights.safetensors" if name == "full" else "adapter")

    @pytest.mark.parametrize(
        ("name", "more", "file"),
        [("done", (), "adapter_model.safetensors"), ("full", ("--merged",), "model.safetensors")],
    )
    def test_export(self, es2: Es2, name: str, more: tuple[str, ...], file: str, tmp_path: Path) -> None:
        code, document = es2("export", "--run", RUNS[name], "--out", tmp_path / "out", *more)
        assert code == 0, document
        assert (tmp_path / "out" / file).is_file()

    @pytest.mark.parametrize("name", ["done", "stopped", "full", "imported"])
    def test_report(self, es2: Es2, name: str, tmp_path: Path) -> None:
        code, document = es2("report", "--run", RUNS[name], "--out", tmp_path / "report.html")
        assert code == 0, document
        verdict, page = EXPECTED["runs"][name]["verdict"], (tmp_path / "report.html").read_text(encoding="utf-8")
        assert verdict in page.casefold()
        assert ("Under attack" in page) == (name == "done"), "whose evaluations are here"
        assert ("Soft prompts were not measured." in page) == (name == "done")

    def test_an_interrupted_one_goes_on_from_its_checkpoint(self) -> None:
        run = open_run(RUNS["killed"])
        with pytest.raises(InputError, match="has left no weights"):
            tuned_weights(run)
        steps = []

        def report(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage == "finetune":
                steps.append(done)

        reopen(run)
        assert run_job(run.path, JOBS, report) == 0, run.error()
        assert steps == [3, 4], "the first two are in the checkpoint"
        check(run.result(), EXPECTED["killed"], rel=1e-2)


class TestEvaluations:
    def test_kept_results_are_read(self) -> None:
        for name in (RUNS["done"], next(id for id in EXPECTED["jobs"] if open_job(id).name == "alone")):
            for path in find_evaluations(open_job(name)):
                document = read_evaluation(path)
                assert document["rows"]
                assert all("problem" in part or part["n_prompts"] for part in document["suite"].values())
        assert len(find_evaluations(open_run(RUNS["done"]))) == 2

    @pytest.mark.parametrize("prompts", ["prompts.csv", "harmful.csv"])
    def test_the_same_again_asks_the_questions_and_generates_nothing(self, old_home: Path, prompts: str) -> None:
        """All suites were three, so the old result is not all that is asked for today."""
        run = open_run(RUNS["done"])
        (job,) = [job for job in list_jobs(kind="evaluate") if job.config["prompts"] == prompts and job.config["run"]]
        (old,) = [
            document
            for document in map(read_evaluation, find_evaluations(run))
            if document["settings"]["prompts"] == prompts
        ]
        config = EvaluateConfig.from_dict(job.config).replace(question_limit=3, soft_budgets=())
        assert find_evaluation(config, load_prompts(prompts), run) is None
        again = evaluate(config, load_prompts(prompts), job.path, run=run)
        assert again["generated"]["replies"] == 0, "every reply is in the log, under its old key"
        assert again["suite"]["ability"]["n_questions"] == 3
        check(again["suite"], old["suite"], rel=1e-4)

    def test_a_single_suite_is_found_under_its_old_key(self, old_home: Path) -> None:
        (job,) = [job for job in list_jobs(kind="evaluate") if not job.config["run"]]
        (path,) = find_evaluations(job)
        again = evaluate(EvaluateConfig.from_dict(job.config), load_prompts("harmful.csv"), job.path)
        assert Path(again["path"]).name == path.name
        assert again["generated"]["replies"] == 0
        assert written_today(old_home) == []


def test_a_reproduction_that_is_done_is_read(old_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "absolute_source", str)  # as where the artifacts were made: no path of a machine
    protocol = reproduce.read_protocol("protocol.toml")
    protocol = replace(
        protocol,
        finetune=protocol.finetune.replace(objective="fisher", margin_target=0.6),  # its defaults then
        evaluate=protocol.evaluate.replace(question_limit=3, soft_budgets=()),
    )
    document = reproduce.reproduce(protocol, MODEL)
    for one in document["evaluations"]:
        del one["path"]
    expected = {**EXPECTED["reproduced"]}
    for one in expected["evaluations"]:
        del one["findings"]  # sentences, in today's words
    check(document, expected, rel=1e-4)
    again = ("evaluation/", "-evaluate-")  # for the questions, which the old evaluations had not
    assert all(any(part in path for part in again) for path in written_today(old_home))


def test_a_readers_answer() -> None:
    expected = EXPECTED["reading"]
    reading = answer(open_job(expected["job"]), expected["question"])
    assert reading is not None
    assert reading.n_tokens == expected["n_tokens"]
    assert reading.tuned is not None
    check(float(np.linalg.norm(reading.tuned["last"])), expected["tuned"], 1e-5)


def test_a_showcase_of_the_former_layout_is_refused_with_the_way_out(es2: Es2) -> None:
    code, document = es2("report", "--run", "showcase", "--out", "report.html")
    assert code == 2
    assert "is of an earlier layout; `es2 showcase` makes it anew" in document["error"]
