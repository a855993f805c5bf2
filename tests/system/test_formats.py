"""Upgrade: every kind of artifact states the version of its form, newer ones are refused, and older ones are read.

A year from now a folder lies beside a newer program, or a newer folder beside this one. Whoever opens it must be told
which of the two it is, and nothing may be set aside, overwritten or guessed at. Version 1 is the only one there has
been so far; what states none is read as that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.analysis.layer_views import RENDERS, VIEWS_FORMAT, LayerViews
from es2.analysis.projection import PROJECTION_FORMAT, UmapCoordinates
from es2.analysis.results import ANALYSIS_FORMAT, Analysis
from es2.core.errors import InputError
from es2.core.files import verify_checksum, with_checksum
from es2.core.versions import format_of
from es2.evaluation.reply_log import ReplyLog
from es2.evaluation.results import EVALUATION_FORMAT, find_evaluations, read_evaluation
from es2.jobs.queue import list_jobs, open_job
from es2.models import tensors
from es2.store.activation_set import FORMAT_VERSION
from es2.store.store import Store
from es2.workflow.compared import find_compared
from es2.workflow.runs import config_of
from es2.workflow.showcase import write
from tests.builders_artifacts import Compared, write_comparison

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A home with embeddings, an analysis, a map, views, a run, an evaluation and a showcase."""
    made = write_comparison(tmp_path_factory.mktemp("whole"), 24)
    home, prompts = made.artifacts.home, made.artifacts.prompts
    points = np.zeros((len(made.analysis.base_layers), 2, len(prompts), 2), dtype=np.float32)
    coordinates = UmapCoordinates(points, "umap", "both")
    (home / "umap").mkdir()
    coordinates.save(home / "umap")
    (home / "views").mkdir()
    LayerViews(dict.fromkeys(RENDERS, points), dict.fromkeys(RENDERS, points[:, 0, 0])).save(home / "views")
    (home / "analysis").mkdir()
    made.analysis.save(home / "analysis")
    evaluation = {
        "format": EVALUATION_FORMAT, "created": 1.7e9, "prompts": "x", "suite": {}, "rows": {}, "settings": {"limit": 4}
    }  # fmt: skip
    (made.run.path / "evaluation").mkdir()
    (made.run.path / "evaluation" / "0a.json").write_text(json.dumps(with_checksum(evaluation)))
    (home / "showcase").mkdir()
    models = (made.artifacts.activations, made.tuned)
    write(home / "showcase", made.run, made.run.config, prompts, models, made.analysis, coordinates)
    return made


@dataclass(frozen=True)
class Place:
    """One artifact in a home that may be spoilt.

    Attributes:
        file: the JSON file that states the version.
        read: reads the artifact as the program does.
        newest: the newest version that is read here.
    """

    file: Path
    read: Callable[[], object]
    newest: int

    def edit(self, **changes: Any) -> None:
        """Change entries, or leave those out that become None, and make the digest anew."""
        document = json.loads(self.file.read_text()) | changes
        document = {name: entry for name, entry in document.items() if entry is not None}
        self.file.write_text(json.dumps(with_checksum(document) if "digest" in document else document))


@pytest.fixture
def home(whole: Compared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.artifacts.home, tmp_path / "home", dirs_exist_ok=True))


@pytest.fixture
def place(home: Path, whole: Compared, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("ES2_SHOWCASE", str(home / "showcase"))
    store, key, runs = Store(home / "cached_activations"), whole.tuned.key, home / "runs"
    derived = next((store.root / key / "derived").iterdir())
    evaluation = runs / whole.run.id / "evaluation" / "0a.json"
    places = {
        "activation set": Place(store.root / key / "meta.json", lambda: store.open(key).texts, FORMAT_VERSION),
        "derived": Place(derived / "digests.json", lambda: store.open(key).derived(derived.name), FORMAT_VERSION),
        "analysis": Place(home / "analysis/analysis.json", lambda: Analysis.load(home / "analysis"), ANALYSIS_FORMAT),
        "map": Place(home / "umap/umap.json", lambda: UmapCoordinates.load(home / "umap"), PROJECTION_FORMAT),
        "views": Place(home / "views/views.json", lambda: LayerViews.load(home / "views"), VIEWS_FORMAT),
        "job": Place(runs / whole.run.id / "config.json", lambda: config_of(open_job(whole.run.id, runs)), 1),
        "evaluation": Place(evaluation, lambda: read_evaluation(evaluation), EVALUATION_FORMAT),
        "showcase": Place(
            home / "showcase" / "runs" / whole.run.id / "config.json", lambda: find_compared("showcase"), 1
        ),
    }
    return places[request.param]


KINDS = ("activation set", "derived", "analysis", "map", "views", "job", "evaluation", "showcase")
every_kind = pytest.mark.parametrize("place", KINDS, indirect=True)


@every_kind
class TestEveryKind:
    def test_is_read_as_it_was_written(self, place: Place) -> None:
        assert json.loads(place.file.read_text())["format"] == place.newest == 1
        assert place.read() is not None

    def test_states_no_version_where_it_is_from_before_there_were_any(self, place: Place) -> None:
        place.edit(format=None)
        assert place.read() is not None

    @pytest.mark.parametrize("version", [2, 10**19])
    def test_of_a_newer_version_is_refused_by_its_name_and_left_alone(self, place: Place, version: int) -> None:
        place.edit(format=version, entries_of_tomorrow=[1])
        before = {path: path.stat().st_mtime_ns for path in place.file.parent.rglob("*")}
        with pytest.raises(InputError) as refused:
            place.read()
        sentence = str(refused.value)
        assert str(place.file.parent) in sentence
        assert f"newer ES2 Workbench (format {version}, this one reads up to 1); update ES2 Workbench." in sentence
        assert {path: path.stat().st_mtime_ns for path in place.file.parent.rglob("*")} == before

    @pytest.mark.parametrize("version", ["1", 0, -1, 1.0, True, [], {}])
    def test_whose_version_is_none_counts_as_damaged(self, place: Place, version: object) -> None:
        place.edit(format=version)
        try:
            found, sentence = place.read(), ""  # what is derived is set aside without an error
        except InputError as refused:
            found, sentence = None, str(refused)
        assert found is None
        assert "newer" not in sentence

    def test_may_hold_entries_that_nobody_knows(self, place: Place) -> None:
        place.edit(surprise={"a": [1]})
        assert place.read() is not None


@pytest.mark.parametrize("place", [kind for kind in KINDS if kind not in ("analysis", "map", "views")], indirect=True)
def test_a_version_that_was_damaged_is_not_taken_for_newer(place: Place) -> None:
    """Their digest tells, or for analyses, maps and views that of the folder they lie in."""
    place.file.write_text(json.dumps(json.loads(place.file.read_text()) | {"format": 3}))
    with pytest.raises(InputError, match="damaged") if "derived" not in str(place.file) else nullcontext():
        assert place.read() is None


class TestJobs:
    def test_a_result_of_a_newer_version_is_no_result_and_says_so(self, home: Path, whole: Compared) -> None:
        path = home / "runs" / whole.run.id / "result.json"
        document = json.loads(path.read_text())
        assert document["format"] == 1
        assert verify_checksum(document)
        document.pop("digest")
        path.write_text(json.dumps(with_checksum(document | {"format": 2})))
        run = open_job(whole.run.id, home / "runs")
        assert (run.status(), run.result()) == ("interrupted", None)
        assert "newer ES2 Workbench (format 2" in str(run.error())
        assert str(path) in str(run.error())

    def test_one_from_before_there_were_digests_is_believed(self, home: Path, whole: Compared) -> None:
        path = home / "runs" / whole.run.id / "result.json"
        document = json.loads(path.read_text())
        del document["digest"]
        path.write_text(json.dumps(document))
        run = open_job(whole.run.id, home / "runs")
        assert run.status() == "done"
        assert run.result() == whole.run.result()

    def test_a_result_that_was_changed_is_none(self, home: Path, whole: Compared) -> None:
        path = home / "runs" / whole.run.id / "result.json"
        path.write_text(path.read_text().replace('"separated"', '"collapsed"'))
        run = open_job(whole.run.id, home / "runs")
        assert (run.status(), run.result()) == ("interrupted", None)
        assert f"The result of job {run.id} is damaged" in str(run.error())

    def test_a_list_goes_on_without_a_newer_one(
        self, home: Path, whole: Compared, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = home / "runs" / whole.run.id / "config.json"
        path.write_text(json.dumps(with_checksum(json.loads(path.read_text()) | {"format": 2})))
        assert list_jobs(home / "runs") == []
        assert "newer ES2 Workbench" in caplog.text

    def test_events_of_kinds_that_nobody_knows_are_let_pass(self, home: Path, whole: Compared) -> None:
        run = open_job(whole.run.id, home / "runs")
        known = run.events()[0]
        with (run.path / "events.jsonl").open("a") as file:
            file.write('{"event": "of tomorrow", "anything": [1]}\n')
        assert run.events()[0] == [*known, {"event": "of tomorrow", "anything": [1]}]
        assert run.progress() is not None


class TestReplies:
    def test_lines_from_before_there_were_digests_are_read_and_changed_ones_are_not(self, tmp_path: Path) -> None:
        path = tmp_path / "replies.jsonl"
        path.write_text('{"key": "old", "text": "No."}\n')
        ReplyLog(path).add([{"key": "new", "text": "Yes."}])
        log = ReplyLog(path)
        assert (log["old"]["text"], log["new"]["text"]) == ("No.", "Yes.")
        path.write_text(path.read_text().replace("Yes.", "Yet."))
        assert "new" not in ReplyLog(path)


class TestCheckpoints:
    def test_the_version_stands_in_the_header(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        from es2.training import checkpoint

        path = tmp_path / "state.safetensors"
        monkeypatch.setattr(tensors, "CHECKPOINT_FORMAT", 3)
        checkpoint.save_tensors(path, {"a": torch.zeros(2)}, {"step": 1})
        assert checkpoint.load_tensors(path)[1] == {"step": 1}
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"state\.safetensors was written by a newer .*format 3, .* up to 1"):
            checkpoint.load_tensors(path)


def test_a_version_is_a_whole_number_from_one_on() -> None:
    assert [format_of(stated, 3, "X") for stated in (None, 1, 3)] == [1, 1, 3]
    assert [format_of(stated, 3, "X") for stated in (0, -1, "1", 1.0, True, [])] == [None] * 6
    with pytest.raises(InputError, match=r"^X was written by a newer ES2 Workbench \(format 4, this one reads up to 3"):
        format_of(4, 3, "X")


class TestTheCheckout:
    """What earlier versions of this very program have left there stays readable as it is."""

    def test_its_activation_sets(self) -> None:
        store = Store(CHECKOUT / "cached_activations")
        for activations in store.list():
            assert activations.meta["format"] == 1
            for folder in (activations.path / "derived").glob("[!.]*[!0-9.-]"):
                if (folder / "analysis.json").exists():
                    assert Analysis.load(folder).layers

    def test_its_showcase(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ES2_SHOWCASE", str(CHECKOUT / "cached_activations" / "showcase"))
        found = find_compared("showcase")
        assert found.targets == tuple(found.result["target_layers"])

    def test_its_runs(self) -> None:
        for run in list_jobs(CHECKOUT / "runs", "finetune"):
            assert run.status() in ("done", "stopped", "failed", "cancelled", "interrupted", "running", "queued")
            assert config_of(run).targets
            assert all(read_evaluation(path)["suite"] for path in find_evaluations(run))
            if run.status() == "done":
                assert run.result() is not None
                assert any("loss" in event for event in run.events()[0])
